"""Pair by pair, what the policy that an iteration ends with makes of the triplets it was trained on and of its own new samples.

Means hide what the paper's Figure 3 shows: whether the responses that get the higher reward are also the likelier ones. The table
holds both for the first training rows: as "trained" on, and "fresh", with responses sampled anew from the policy just trained. Made
from what the run directory holds, it is bitwise the same when it is made again. Log-probs are in nats.

N rows, G members of a triplet (chosen = real, rejected = synthetic, proto).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import torch
from torch import Tensor
from transformers import PreTrainedModel

from tspin.collator import TripletCollator
from tspin.data import MEMBERS, Example
from tspin.generate import Generation
from tspin.metrics import rewards
from tspin.scoring import score_references, scoring_options
from tspin_kernels import SequenceStats

if TYPE_CHECKING:
    from tspin.training_args import TSPINConfig

_NUMBERS = [f"{kind}/{member}" for kind in ("logps", "rewards") for member in MEMBERS]
_SCHEMA = pa.schema(
    [
        ("set", pa.string()),
        ("row", pa.int64()),
        ("identical", pa.bool_()),
        *((f"lengths/{member}", pa.int32()) for member in MEMBERS),
        *((name, pa.float64()) for name in _NUMBERS),
    ]
)


def pair_table(
    load: Callable[[int], PreTrainedModel],
    args: TSPINConfig,
    t: int,
    trained: pa.Table,
    examples: Sequence[Example],
    samples: Mapping[int, Generation],
    initial: Mapping[int, Generation] | None = None,
    *,
    pad_token_id: int,
) -> pa.Table:
    """The pairs at the end of iteration t.

    Args:
        load: gives pi_t of its argument. pi_{t+1} scores everything; pi_t only where the rewards need a reference.
        trained: the triplets of the iteration, with their references where the method has any.
        examples: the rows to take; those that `trained` lacks are only fresh.
        samples: responses of pi_{t+1} to them.
        initial: responses of pi_0, which stand for y0 where `trained` has none.
    Returns:
        Columns set ("trained" or "fresh"), row, identical (y' = y), and for each member lengths/<member> (tokens), logps/<member>
        (summed over tokens) and rewards/<member> (those of training: scaled, less the reference's, summed or mean); null where a
        row has no such member, and for rewards of SFT or without a reference.
    """
    wanted = {example.row for example in examples}
    rows = [row | {"set": "trained"} for row in trained.to_pylist() if row["row"] in wanted]
    for row in rows:
        if initial is not None and "proto_ids" not in row:
            row["proto_ids"] = initial[row["row"]].token_ids
    fresh = [
        {"set": "fresh", "row": e.row, "prompt_ids": e.prompt_ids, "chosen_ids": e.response_ids}
        | {"rejected_ids": samples[e.row].token_ids}
        for e in examples
    ]
    if args.needs_references:
        for row, values in zip(fresh, _scores(load(t), args, fresh, pad_token_id).tolist(), strict=True):
            row |= {f"ref_{member}_logps": value for member, value in zip(MEMBERS, values)}
    model = load(t + 1)
    parts = [part for part in (rows, fresh) if part]
    return pa.concat_tables([_table(args, part, _scores(model, args, part, pad_token_id)) for part in parts])


def fresh_summary(pairs: pa.Table) -> dict[str, Any]:
    """What eval.json tells of the fresh pairs.

    Returns:
        fresh_share: of the pairs whose y' is not y, the share with logp(y) < logp(y'); absent where there is none such.
        fresh_identical: share with y' = y. fresh_rows: number of pairs, those included.
    """
    fresh = [pair for pair in pairs.to_pylist() if pair["set"] == "fresh"]
    below = [pair["logps/chosen"] < pair["logps/rejected"] for pair in fresh if not pair["identical"]]
    share = {"fresh_share": sum(below) / len(below)} if below else {}
    return {**share, "fresh_identical": 1 - len(below) / len(fresh), "fresh_rows": len(fresh)}


def _members(row: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(member for member in MEMBERS if row.get(f"{member}_ids"))


def _scores(model: PreTrainedModel, args: TSPINConfig, rows: list[dict[str, Any]], pad_token_id: int) -> Tensor:
    """[N, G] float64 summed log-probs of the members that all rows have."""
    features = [{name: row[name] for name in row if name.endswith("_ids")} for row in rows]
    options = {"batch_size": args.per_device_eval_batch_size, "autocast_dtype": args.autocast_dtype, "desc": "pairs"}
    options |= scoring_options(args, model)
    scores = score_references(model, features, TripletCollator(pad_token_id, _members(rows[0])), **options)
    return torch.tensor(list(scores.values()), dtype=torch.float64).T


def _table(args: TSPINConfig, rows: list[dict[str, Any]], logps: Tensor) -> pa.Table:
    members = _members(rows[0])
    lengths = torch.tensor([[len(row[f"{member}_ids"]) for member in members] for row in rows])
    referenced = [member for member in members if f"ref_{member}_logps" in rows[0] or not args.needs_references]
    refs = None
    if args.needs_references:
        refs = torch.tensor([[row[f"ref_{member}_logps"] for member in referenced] for row in rows]).double()
    stats = SequenceStats(logps[:, : len(referenced)], None, lengths[:, : len(referenced)])
    values = [] if args.method == "sft" else rewards(args, stats, refs).T.tolist()
    columns: dict[str, list[Any]] = {name: [row.get(name) for row in rows] for name in ("set", "row")}
    columns["identical"] = [row.get("rejected_ids") == row["chosen_ids"] for row in rows]
    columns |= {f"lengths/{member}": column for member, column in zip(members, lengths.T.tolist())}
    columns |= {f"logps/{member}": column for member, column in zip(members, logps.T.tolist())}
    columns |= {f"rewards/{member}": column for member, column in zip(referenced, values)}
    absent = {field.name: [None] * len(rows) for field in _SCHEMA if field.name not in columns}
    return pa.table(columns | absent, schema=_SCHEMA)
