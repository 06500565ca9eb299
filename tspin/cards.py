"""What a run says of its models and its data, as the hub's cards: README.md files whose YAML head `huggingface_hub` reads.

A card is a pure function of what the run directory records, so that a run made twice, or resumed, has the same bytes: no times, no
path of this machine. The loop writes the cards after each iteration; a hash of a stage leaves README.md out (`storage`). A card
that somebody has changed, its licence say, is left as it is: the hash at its end tells.
"""

from __future__ import annotations

import functools
import hashlib
import logging
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from tspin import storage
from tspin.config import SelfPlayConfig
from tspin.ledger import Ledger
from tspin.run_files import read_iterations
from tspin.tables import scores_in
from tspin.training_args import TSPINConfig

logger = logging.getLogger(__name__)

_METHODS = {"tspin": "T-SPIN", "tspin_no_history": "T-SPIN without history", "tspin_ref": "T-SPIN with a reference"}
_METHODS |= {"spin": "SPIN", "sft": "supervised fine-tuning"}
# What the columns of a card's evaluation mean, by key of eval.json.
_NOTES = {
    "exact_match": "Exact match: greedy, and of a sample at temperature 1.",
    "accuracy": "Accuracy: of the choice with the highest log-likelihood.",
    "tasks/average": "Tasks: lm-evaluation-harness.",
    "logprob": "Eval logp: log-prob of an annotated response, nats.",
    "fresh_share": "Fresh y<y': share of own samples likelier than the annotated response.",
}
# Further settings that a card shows where they are given; others may hold paths of this machine.
_SHOWN = {
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "bf16",
    "drop_identical",
    "fp16",
    "fused",
    "gradient_accumulation_steps",
}
_SHOWN |= {
    "gradient_checkpointing",
    "lr_scheduler_kwargs",
    "lr_scheduler_type",
    "max_grad_norm",
    "max_length",
    "max_steps",
}
_SHOWN |= {"neftune_noise_alpha", "optim_args", "per_device_train_batch_size", "prefix_sharing", "sequence_tiling"}
_SHOWN |= {"sequential_backward", "spin_mix_previous", "tf32", "warmup_ratio", "warmup_steps", "weight_decay"}
# Ends a card, after the SHA-256 of what stands before it.
_MARK = "\n<!-- written by tspin, SHA-256 {} -->\n"
_CITATION = """```bibtex
@inproceedings{wang2025triplets,
  title     = {Triplets Better Than Pairs: Towards Stable and Effective Self-Play Fine-Tuning for {LLMs}},
  author    = {Wang and others},
  booktitle = {Advances in Neural Information Processing Systems},
  year      = {2025},
  note      = {arXiv:2601.08198}
}
```
"""
# Of a column's name, or of its end.
_COLUMNS = {
    "row": "number of the row in the source",
    "prompt": "the prompt as the model saw it",
    "chosen": "the annotated response",
    "rejected": "a sample of the policy that the iteration started from",
    "proto": "a sample of the initial policy",
    "_ids": "the token ids that were trained on",
    "_finish_reason": "`stop`, or `length` where the sample was cut short",
    "_logps": "log-prob under the previous policy, nats",
}


def write_cards(run_dir: str | Path) -> None:
    """Write README.md, of the triplets, into the run directory and one into each iteration's model directory.

    A card that is there and was changed stays.
    """
    run = _Run(Path(run_dir))
    for t in run.finished("model"):
        _write(run.at(t) / "model" / "README.md", model_card(run, t))
    if run.tables:
        _write(run.directory / "README.md", data_card(run))


def _write(path: Path, card: str) -> None:
    there = path.read_bytes() if path.exists() else None
    if there is None or there == _marked(there.rpartition(b"\n<!-- ")[0]):
        storage.write_atomic(path, _marked(card.encode()))
    else:
        _say_kept(path)


def _marked(card: bytes) -> bytes:
    return card + _MARK.format(hashlib.sha256(card).hexdigest()).encode()


@functools.cache
def _say_kept(path: Path) -> None:
    """Once for each card."""
    logger.warning(
        "%s was changed since it was written and stays as it is; delete it, and the run writes it anew", path
    )


class _Run:
    """The records of a run directory that the cards tell."""

    def __init__(self, directory: Path):
        self.directory = directory
        self.config = SelfPlayConfig.from_file(directory / "config.yaml")
        self.record = storage.read_record(directory / "run.json")
        self.ledger = Ledger(directory)
        self.ledger.read()
        self.scores = {row["iteration"]: row for row in read_iterations(directory)}
        self.tables: dict[int, tuple[list[str], int, str]] = {}
        for t in self.finished("triplets"):
            path = self.at(t) / "triplets.parquet"
            try:
                self.tables[t] = _facts(path)
            except (pa.ArrowException, OSError) as error:
                logger.warning("%s is not a whole parquet file: %s; its card leaves it out", path, error)

    def at(self, t: int) -> Path:
        return self.directory / f"iter_{t:02d}"

    def finished(self, stage: str) -> list[int]:
        """The iterations that have done a stage and still hold what it made."""
        done = {t: self.ledger.done.get(f"iter_{t:02d}/{stage}") for t in range(self.config.iterations)}
        return [t for t, made in done.items() if made and all((self.directory / path).exists() for path in made)]

    def config_of(self, t: int, stage: str) -> SelfPlayConfig:
        """The config that a stage was done with; the present one where an older state.json does not say."""
        origin = self.ledger.origin_of(f"iter_{t:02d}/{stage}")
        return self.config if origin is None else SelfPlayConfig.from_dict(origin["config"])

    @property
    def base(self) -> tuple[str | None, str]:
        """pi_0 as a hub name, None for a local one, and in words."""
        model = self.record["model"]
        if name := model.get("name"):
            return name, f"[{name}](https://huggingface.co/{name}), commit `{model['commit']}`"
        weights = {file: digest for file, digest in model["files"].items() if file.endswith(".safetensors")}
        name = Path(self.config.model_name_or_path).name
        return None, f"a local checkpoint, `{name}`, SHA-256 of its weights `{storage.hash_json(weights)}`"

    def source(self, t: int) -> tuple[str | None, str]:
        """The annotated rows of an iteration as a hub name, None for local ones, and in words."""
        origin = self.ledger.origin_of(f"iter_{t:02d}/triplets")
        name, data = self.config_of(t, "triplets").dataset, (origin or self.record)["data"]
        rows = f"{data['rows']} rows, SHA-256 of their token ids `{data['sha256']}`"
        is_local = Path(name).suffix in (".jsonl", ".json", ".parquet") or name[0] in "./~" or Path(name).exists()
        if not is_local:
            return name, f"[{name}](https://huggingface.co/datasets/{name}), {rows}"
        return None, f"`{Path(name).name}`, {rows}"


def model_card(run: _Run, t: int) -> str:
    """The card of the policy that iteration t ended with."""
    (base, base_text), (source, source_text), config = run.base, run.source(t), run.config_of(t, "train")
    head: dict[str, Any] = {"base_model": base} if base else {}
    head |= {"datasets": [source]} if source else {}
    head |= {"library_name": "transformers", "license": "unknown", "pipeline_tag": "text-generation"}
    head |= {"tags": ["self-play", "tspin", "t-spin"]}
    args = TSPINConfig(str(run.directory), **config.training_at(t))
    method, prompt = _METHODS[args.method], config.prompt_template
    given = {key: value for key, value in sorted(config.training_at(t).items()) if key in _SHOWN}
    facts = {
        "Base model": base_text,
        "Method": f"{method}, iteration {t} of 0 to {run.config.iterations - 1}",
        **_coefficients(args, t),
        "Learning rate": f"{args.learning_rate:g}, {args.num_train_epochs:g} epochs, {getattr(args.optim, 'value', args.optim)}",
        "Other settings": ", ".join(f"`{key}: {value}`" for key, value in given.items()) or "defaults",
        "Adapters": f"LoRA of rank {config.lora_r}, alpha {config.lora_alpha}, merged" if config.use_peft else "none",
        "Data": source_text,
        **({} if args.method == "sft" else {"Samples": _sampling(run.config_of(t, "synthetic"))}),
        "Prompt template": "the tokenizer's chat template" if prompt == "chat" else f"`{prompt!r}`",
        "Seed": str(config.seed),
        "SHA-256 of its other files": f"`{run.ledger.done[f'iter_{t:02d}/model'][f'iter_{t:02d}/model']}`",
    }
    return "\n".join(
        [
            f"---\n{_yaml(head)}---\n",
            f"# {base or Path(config.model_name_or_path).name}, {method}, iteration {t}\n",
            "Fine-tuned by self-play with [T-SPIN](https://arxiv.org/abs/2601.08198): annotated responses are preferred to the "
            "model's own, and these to what the model said before any fine-tuning.\n"
            if args.method.startswith("tspin")
            else f"Fine-tuned by {method} in the loop of the package tspin.\n",
            *_table(("setting", "value"), facts.items()),
            "\n## Evaluation\n",
            *_evaluation(run, t),
            "\n## Versions\n",
            _versions(run),
            "\n## Licence\n",
            "The weights are derived from the base model and keep the terms of its licence; the data may add their own. Put the "
            "identifier that applies in place of `unknown` above.",
            "\n## Citation\n",
            _CITATION,
        ]
    )


def data_card(run: _Run) -> str:
    """The card of the triplets of all iterations so far, one configuration each."""
    built = list(run.tables)
    (base, base_text), (_, source_text) = run.base, run.source(built[-1])
    files = [{"config_name": f"iter_{t:02d}", "data_files": f"iter_{t:02d}/triplets.parquet"} for t in built]
    files[-1]["default"] = True  # type: ignore[assignment]
    head = {"configs": files, "license": "unknown", "tags": ["self-play", "tspin", "t-spin"]}
    head |= {"task_categories": ["text-generation"]}
    names = run.tables[built[-1]][0]
    columns = [
        (
            f"`{name}`",
            next(text for end, text in _COLUMNS.items() if name == end or (end[0] == "_" and name.endswith(end))),
        )
        for name in names
    ]
    rows = [(f"iter_{t:02d}", count, cut) for t, (_, count, cut) in run.tables.items()]
    made_from = {"Source": source_text, "Model": base_text}
    parts = ["# Annotated prompts of a run of the package tspin\n"]
    usage: list[str] = []
    if "rejected" in names:
        ways = {t: _sampling(run.config_of(t, "synthetic")) for t in built}
        is_one = len(set(ways.values())) == 1
        made_from["Samples"] = (
            ways[built[-1]] if is_one else "; ".join(f"iter_{t:02d} {way}" for t, way in ways.items())
        )
        parts = [
            f"# Triplets of self-play from {base or Path(run.config.model_name_or_path).name}\n",
            "Prompts with their annotated responses and, of each iteration, the model's own: the columns of TRL's preference data "
            "sets, so that TRL takes them as they are.\n",
        ]
        usage = [
            "\n```bash",
            f"trl dpo --dataset_name THIS_REPOSITORY --dataset_config iter_{built[-1]:02d} --model_name_or_path MODEL",
            "```\n",
            "TRL tokenises the text columns again and ends every response; rows whose `rejected_finish_reason` is `length` did not "
            "end. The `_ids` columns hold what was trained on.",
        ]
    return "\n".join(
        [
            f"---\n{_yaml(head)}---\n",
            *parts,
            *_table(("configuration", "rows", "samples cut short"), rows),
            "",
            *_table(("column", "what it holds"), columns),
            "",
            *_table(("made from", ""), made_from.items()),
            *usage,
            "\n## Versions\n",
            _versions(run),
            "\n## Licence\n",
            "Prompts and annotated responses keep the licence of their source. The other responses are outputs of the model above, "
            "whose licence may restrict their use. Put the identifier that applies in place of `unknown` above.",
            "\n## Citation\n",
            _CITATION,
        ]
    )


def _yaml(head: dict[str, Any]) -> str:
    return yaml.safe_dump(head, sort_keys=False, allow_unicode=True)


def _coefficients(args: TSPINConfig, t: int) -> dict[str, str]:
    if args.method == "sft":
        return {}
    named = {"lam": args.lam} if args.method == "spin" else {"alpha": args.alpha, "beta": args.beta_at(t)}
    named |= {key: value for key in ("sft_coef", "entropy_coef") if (value := getattr(args, key))}
    text = ", ".join(f"{name} {value:g}" for name, value in named.items())
    return {"Coefficients": f"{text}; {args.loss_type} loss, {args.logp_reduction} of log-probs"}


def _sampling(config: SelfPlayConfig) -> str:
    text = f"at temperature {config.temperature:g}, at most {config.max_new_tokens} tokens"
    text += f", top_p {config.top_p:g}" if config.top_p < 1 else ""
    return text + (f", top_k {config.top_k}" if config.top_k else "")


def _evaluation(run: _Run, t: int) -> list[str]:
    scored = {s: run.scores[s] for s in range(-1, t + 1) if s in run.scores}
    config = run.config
    columns = scores_in(dict.fromkeys(key for row in scored.values() for key in row), bool(config.answer_pattern))
    if not columns:
        return ["None was made."]
    rows = [
        ["initial" if s < 0 else s, *(format(row[c.key], c.spec) if c.key in row else "" for c in columns)]
        for s, row in scored.items()
    ]
    held_out = Path(config.eval_dataset).name if config.eval_dataset else None
    note = f"{scored[t].get('rows', '')} held-out rows of `{held_out}`. " if held_out and t in scored else ""
    notes = [text for key, text in _NOTES.items() if any(column.key == key for column in columns)]
    return [*_table(("iteration", *(column.header for column in columns)), rows), f"\n{note}{' '.join(notes)}".rstrip()]


def _versions(run: _Run) -> str:
    held = {name: version for name, version in run.record["versions"].items() if version}
    return ", ".join(f"{name} {version}" for name, version in held.items()) + f"; processes: {run.record['processes']}."


def _table(header: tuple[str, ...], rows: Any) -> list[str]:
    cells = [[str(cell).replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    return [f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *cells)]


def _facts(path: Path) -> tuple[list[str], int, str]:
    """Columns and number of rows of a table of triplets, and the share of samples cut short, '' where there are none."""
    table = pq.ParquetFile(path)
    names, rows = table.schema_arrow.names, table.metadata.num_rows
    if "rejected_finish_reason" not in names:
        return names, rows, ""
    reasons = table.read(columns=["rejected_finish_reason"])["rejected_finish_reason"].to_pylist()
    return names, rows, f"{reasons.count('length') / max(1, rows):.3f}"
