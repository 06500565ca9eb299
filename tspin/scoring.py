"""Scoring without training: how a model is scored, log-probs of a whole data set, and packed rows checked against separate ones.

What is decided here holds for the trainer, the references and the evaluation alike: whether log-probs come through the output head,
and whether the members of a triplet share one prompt. Deliberately computes no loss.

N response tokens, B groups (prompts), G members of a group. Log-probs are in nats.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from tspin.collator import TripletCollator
from tspin.model import causal_lm, install_scoring, naming_out_of_memory, probe_head, score_batch
from tspin.prefix import refusal, share_prompts
from tspin.sequential import one_by_one

if TYPE_CHECKING:
    from tspin.training_args import TSPINConfig

logger = logging.getLogger(__name__)


def scoring_options(args: TSPINConfig, model: nn.Module) -> dict[str, Any]:
    """`fused`, `memory_budget` and `prefix_sharing` for this model: what `args` ask for, "auto" where it is exact.

    Raises:
        ValueError: `args.fused` or `args.prefix_sharing` is "on" and the model cannot.
    """
    fused = args.fused != "off"
    if fused:
        try:
            probe_head(model)
        except ValueError as reason:
            if args.fused == "on":
                raise
            logger.warning("%s; fused='auto' now takes the model's logits", reason)
            fused = False
    sharing = args.prefix_sharing != "off"
    reason = refusal(causal_lm(model)) if sharing else None
    if reason is not None:
        if args.prefix_sharing == "on":
            raise ValueError(
                f"prefix_sharing: want a model that can share prompts, got {type(causal_lm(model)).__name__}: {reason}; "
                "use prefix_sharing='off'"
            )
        logger.warning("prefix_sharing='auto' gives every response a row of its own: %s", reason)
        sharing = False
    return {"fused": fused, "memory_budget": args.memory_budget, "prefix_sharing": sharing}


def _token_logprobs(model: nn.Module, batch: dict[str, Any], **request: Any) -> Tensor:
    """[N] float32: every token scored as a sequence of its own."""
    N = len(batch["targets"])
    singles = batch | {"sequence_ids": torch.arange(N, device=batch["targets"].device), "lengths": torch.ones(N, 1)}
    _, sequences = score_batch(model, singles, lambda s: s.logprobs[:, 0], entropy=False, **request)
    return sequences.logprobs[:, 0].float()


def _rounding(model: nn.Module) -> float:
    """Half of the places of the coarsest arithmetic in a forward pass, as a difference of log-probs in nats."""
    device = next(model.parameters()).device.type
    # Quantized weights (of integer dtypes) are multiplied in 16 bits.
    dtypes = {p.dtype if p.is_floating_point() else torch.bfloat16 for p in model.parameters()}
    if torch.is_autocast_enabled(device):
        dtypes.add(torch.get_autocast_dtype(device))
    if device == "cuda" and torch.get_float32_matmul_precision() != "highest":
        dtypes.add(torch.float16)  # TF32 has as many places
    return max(torch.finfo(dtype).eps for dtype in dtypes) ** 0.5


@torch.no_grad()
def verify_packed_row(
    model: nn.Module, batch: dict[str, Any], *, core: nn.Module | None = None, reduce: Any = None, **request: Any
) -> None:
    """Compare the last triplet of a packed batch with separate rows under the model's own attention, one row at a time.

    The last one, because only it sees what the packed row might leak from every triplet before it. Wherever the root mean
    square over a response's tokens is beyond twice the square root of the arithmetic's epsilon, the models differ in kind.

    Args:
        model: called as `tspin.model.score_batch` does, outside `share_prompts`; may be wrapped by DDP or FSDP.
        batch: of a packed `TripletCollator`, on the model's device.
        core: the model inside the wrapper; default `model`.
        reduce: sums a tensor over ranks, so that all of them raise; called once.
        request: `fused` and `memory_budget`, as `score_references`.
    Raises:
        ValueError: they differ.
    """
    core = model if core is None else core
    was_training = core.training
    core.eval()
    try:
        members = len(batch["prefix_layout"].groups[-1][1])
        apart = [_token_logprobs(model, row, **request) for row in list(one_by_one(batch, packed=False))[-members:]]
        with share_prompts(causal_lm(core)):
            together = _token_logprobs(model, batch, **request)
    finally:
        core.train(was_training)
    lengths = batch["lengths"][-1].tolist()
    pairs = zip(apart, together[-sum(lengths) :].split(lengths), strict=True)
    # Equal infinities are no difference, and nan in both is for the trainer to report.
    gaps = [torch.where((a == b) | (a.isnan() & b.isnan()), 0.0, a - b) for a, b in pairs]
    worst = torch.stack([gap.square().mean().sqrt() for gap in gaps]).max()
    tolerance = 2 * _rounding(core)
    wrong = (~(worst <= tolerance)).long()
    if (wrong if reduce is None else reduce(wrong)).item():
        raise ValueError(
            f"prefix_sharing: the log-probs of a shared row differ from those of separate rows by up to "
            f"{torch.cat(gaps).abs().max().item():.2g} nats per token (root mean square {worst.item():.2g}, tolerance "
            f"{tolerance:.2g}), here or on another process: {type(causal_lm(core)).__name__} reads more from a row than "
            "softmax attention and positions; use prefix_sharing='off'"
        )


@torch.no_grad()
def score_references(
    model: nn.Module,
    dataset: Sequence[dict[str, Any]],
    collator: TripletCollator,
    *,
    batch_size: int = 8,
    memory_budget: int | None = None,
    fused: bool = True,
    prefix_sharing: bool = False,
    autocast_dtype: torch.dtype | None = None,
    desc: str = "reference log-probs",
) -> dict[str, list[float]]:
    """Summed log-probs (nats) of every member of every row under the model, without gradient, in the dataset's order.

    Args:
        model: a causal LM; dropout is inactive while scoring.
        dataset: rows with the token id columns of `tspin.data.build_triplets`.
        collator: its `members` name the columns that come back.
        batch_size: rows per forward pass.
        memory_budget: bytes for the head, as in `linear_sequence_loss`.
        fused: False takes the model's own logits, for models that `probe_head` refuses.
        prefix_sharing: the members of a row share one prompt; the first batch is compared with separate rows.
        autocast_dtype: of the forward passes; None leaves autocast as it is.
        desc: label of the progress bar.
    Returns:
        {"ref_<member>_logps": [len(dataset)]}, ready to be added as columns.
    Raises:
        ValueError: prompts cannot be shared by this model.
        BatchTooLargeError: a batch does not fit the GPU.
    """
    install_scoring(model)
    request: dict[str, Any] = {"memory_budget": memory_budget, "fused": fused}
    device = next(model.parameters()).device
    columns: dict[str, list[float]] = {f"ref_{member}_logps": [] for member in collator.members}
    collator = replace(collator, packed=prefix_sharing)

    def batch_at(start: int) -> dict[str, Any]:
        batch = collator([dataset[i] for i in range(start, min(start + batch_size, len(dataset)))])
        return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}

    was_training = model.training
    model.eval()
    try:
        with ExitStack() as stack:
            if autocast_dtype is not None:
                stack.enter_context(torch.autocast(device.type, autocast_dtype))
            if prefix_sharing:
                if len(dataset):
                    verify_packed_row(model, batch_at(0), **request)
                stack.enter_context(share_prompts(causal_lm(model)))
            for start in tqdm(range(0, len(dataset), batch_size), desc=desc, disable=None):
                loss_fn = lambda s: s.logprobs[:, 0]
                with naming_out_of_memory(
                    batch_size, "scoring", "per_device_train_batch_size or per_device_eval_batch_size"
                ):
                    _, sequences = score_batch(model, batch_at(start), loss_fn, entropy=False, **request)
                for column, values in zip(columns.values(), sequences.logprobs.T.tolist(), strict=True):
                    column.extend(values)
    finally:
        model.train(was_training)
    return columns
