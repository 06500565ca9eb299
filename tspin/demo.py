"""`tspin demo`: whole self-play runs on a laptop's CPU, from a model that does not exist yet to a trained one.

The task is three-digit addition with worked columns. A tiny Llama is pre-trained on solutions of which most forget to carry:
a sloppy pupil. Then the very code of `tspin compare` fine-tunes it on 512 clean solutions, by T-SPIN, SPIN and SFT. What is made
here is the task, the tokenizer and the pupil; the config that is left behind is that of the T-SPIN run, for `tspin run`.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import random
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

_SLOPPY = 0.85  # share of pre-training solutions that never carry
_SLIP = 0.03  # probability that such a solution gets a column wrong
_CHARACTERS = "".join(chr(code) for code in range(32, 122))


def solve(a: int, b: int, rng: random.Random | None = None) -> str:
    """The worked columns of a + b, from the ones up, e.g. ` 6+8+0=14 1+1+1=03 8+3+0=11 #1134`.

    Each column reads digit + digit + carry = sum. With `rng`, a sloppy pupil works: no carries, and some columns wrong.
    """
    columns, digits, carry = [], "", 0
    for place in (1, 10, 100):
        x, y = a // place % 10, b // place % 10
        total = x + y + carry
        if rng is not None and rng.random() < _SLIP:
            total = rng.randrange(20)
        columns.append(f"{x}+{y}+{carry}={total:02d}")
        digits = str(total % 10) + digits
        carry = 0 if rng is not None else total // 10
    return f" {' '.join(columns)} #{total // 10}{digits}".replace("#0", "#")


def _split(prompt: str) -> str:
    # Decided by the prompt alone, so that no split ever sees another's problems.
    byte = hashlib.sha256(prompt.encode()).digest()[0]
    return "test" if byte < 32 else "valid" if byte < 64 else "train"


def problems(split: str, seed: int) -> Iterator[tuple[str, int, int]]:
    """Endless problems `(prompt, a, b)` of "train", "valid" or "test", which share none."""
    rng = random.Random(f"{seed}/{split}")
    while True:
        a, b = rng.randrange(100, 1000), rng.randrange(100, 1000)
        prompt = f"{a}+{b}:"
        if _split(prompt) == split:
            yield prompt, a, b


def write_rows(path: Path, split: str, rows: int, seed: int) -> None:
    """Write `rows` different problems with clean solutions as JSON lines."""
    made: dict[str, str] = {}
    for prompt, a, b in problems(split, seed):
        made.setdefault(prompt, solve(a, b))
        if len(made) == rows:
            break
    lines = (json.dumps({"prompt": prompt, "completion": completion}) for prompt, completion in made.items())
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def build_tokenizer():
    """The tokenizer of the pupil: one token a character."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: i for i, token in enumerate(["<pad>", "<eos>", "<unk>", *_CHARACTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def sloppy_texts(seed: int) -> Iterator[str]:
    """Endless problems with the solutions of a pupil who mostly forgets to carry."""
    rng = random.Random(seed)
    for prompt, a, b in problems("train", seed + 1):
        yield prompt + solve(a, b, rng if rng.random() < _SLOPPY else None)


def pretrain(
    directory: Path,
    tokenizer: Any,
    texts: Iterator[str],
    *,
    steps: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
    **llama: Any,
) -> None:
    """Train a Llama of the sizes `llama` from scratch on endless `texts` by AdamW and save it with its tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, get_linear_schedule_with_warmup, set_seed

    set_seed(seed)
    special = {"pad_token_id": tokenizer.pad_token_id, "bos_token_id": None, "eos_token_id": tokenizer.eos_token_id}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), tie_word_embeddings=True, **special, **llama))
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.01)
    schedule = get_linear_schedule_with_warmup(optimizer, steps // 20, steps)
    for _ in track(range(steps), "pre-training"):
        lines = [text + tokenizer.eos_token for text in itertools.islice(texts, batch_size)]
        batch = tokenizer(lines, return_tensors="pt", padding=True, return_token_type_ids=False)
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        model(**batch, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


PUPIL = {
    "hidden_size": 96,
    "intermediate_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "initializer_range": 0.1,  # about 1 / sqrt(hidden_size): 220 steps leave the usual 0.02 untrained
}


class Size(NamedTuple):
    """How much of everything: pre-training steps, training and held-out problems, rounds of self-play."""

    steps: int = 220
    train_rows: int = 512
    test_rows: int = 400
    iterations: int = 5

    @property
    def error(self) -> float:
        """The largest standard error that a share of the held-out problems can have."""
        return 0.5 / self.test_rows**0.5


FULL, QUICK = Size(), Size(steps=180, train_rows=256, test_rows=200, iterations=2)
# Each method at the rate that served it best on other seeds' validation problems: benchmarks/study, "Tuning".
RATES = {"tspin": 3e-6, "spin": 1e-6, "sft": 1e-4}


def demo_config(directory: Path, size: Size, seed: int) -> dict[str, Any]:
    """The flat keys that the demo's arms have in common: the paper's alpha and beta, SPIN's lam, the sizes of a toy."""
    return {
        "model_name_or_path": str(directory / "pupil"),
        "dataset": str(directory / "train.jsonl"),
        "eval_dataset": str(directory / "test.jsonl"),
        "answer_pattern": r"#(\d+)$",
        "prompt_template": "{prompt}",
        "output_dir": str(directory / "runs"),
        "iterations": size.iterations,
        "max_new_tokens": 48,
        "generation_batch_size": 256,
        "shard_size": 512,
        "seed": seed,
        "num_train_epochs": 2,
        "per_device_train_batch_size": 32,
        "per_device_eval_batch_size": 64,
        "max_length": 96,
        "logging_steps": 4,
        "use_cpu": True,
    }


CAVEAT = (
    "What this shows: a pupil who forgets to carry learns it from {rows} clean solutions by playing against himself, without a "
    "reward model. What it does not show: that one method is better. It is a toy and a single seed. Over five, T-SPIN ends above "
    "SPIN in greedy accuracy; sampled, which is ahead changes with the seed, and after ten iterations it is SPIN. Each method has "
    "its own learning rate, tuned on other seeds; at one shared rate of 1e-5, SPIN falls apart on some. On answers as clean as "
    "these, plain SFT does without self-play and does better. Greedy decoding flatters them all; the sampled column is what "
    "self-play sees. More seeds, controls, and what did not hold of the paper's claims: benchmarks/study/STUDY.md in the "
    "repository."
)
QUICK_CAVEAT = "A quick run, on a pupil half taught and with few problems: the program runs. Its numbers mean nothing."


def _table(runs: dict[str, Path]) -> Table:
    """Greedy and sampled exact match of each arm by iteration."""
    from tspin.run_files import read_iterations

    scores = {"greedy": "exact_match", "sampled": "exact_match_sampled"}
    by_arm = {arm: {row["iteration"]: row for row in read_iterations(run)} for arm, run in runs.items()}
    table = Table(box=box.SIMPLE, padding=(0, 1, 0, 0))
    table.add_column("iter.")
    for decoding in scores:
        for arm in runs:
            table.add_column(f"{decoding}\n{arm}", justify="right", no_wrap=True)
    for t in sorted({t for rows in by_arm.values() for t in rows}):
        cells = [f"{rows[t][key]:.3f}" for key in scores.values() for rows in by_arm.values()]
        table.add_row("pupil" if t < 0 else str(t), *cells)
    return table


def _prepare(directory: Path, size: Size, seed: int) -> None:
    """The problems and the pupil, unless an earlier call made them.

    Raises:
        ValueError: an earlier call made others.
    """
    done, what = directory / "pupil.json", {**size._asdict(), "seed": seed}
    if done.exists():
        if (known := json.loads(done.read_text(encoding="utf-8"))) != what:
            raise ValueError(
                f"output_dir: want a directory for {what}, got {directory} with a demo of {known}; choose another"
            )
        return
    write_rows(directory / "train.jsonl", "train", size.train_rows, seed)
    write_rows(directory / "test.jsonl", "test", size.test_rows, seed)
    options = {"steps": size.steps, "batch_size": 128, "learning_rate": 3e-3, "seed": seed}
    pretrain(directory / "pupil", build_tokenizer(), sloppy_texts(seed), **options, **PUPIL)
    done.write_text(json.dumps(what), encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; a second call with the same directory goes on where the first stopped."""
    parser = argparse.ArgumentParser(prog="tspin demo", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--output_dir", type=Path, default=Path("tspin-demo"), help="where everything goes")
    parser.add_argument("--quick", action="store_true", help="T-SPIN alone, on a pupil half taught: shows that it runs")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)

    from tspin.compare import Arm, Comparison

    start, size = time.perf_counter(), QUICK if options.quick else FULL
    directory = options.output_dir.resolve()
    directory.mkdir(parents=True, exist_ok=True)
    _prepare(directory, size, options.seed)
    values = demo_config(directory, size, options.seed)
    arms = [Arm(method, {"learning_rate": rate}) for method, rate in RATES.items()][: 1 if options.quick else None]
    comparison = Comparison(values, arms, [options.seed])
    comparison.configs[arms[0].name, options.seed].save(directory / "config.yaml")
    results = comparison.run(QUICK_CAVEAT if options.quick else None)

    console = Console()
    runs = {arm.name: result.output_dir for arm, result in zip(arms, results)}
    console.print(f"Exact match on {size.test_rows} held-out sums (standard error at most {size.error:.3f})")
    console.print(_table(runs))
    console.print(QUICK_CAVEAT if options.quick else CAVEAT.format(rows=size.train_rows))
    console.print(f"plot     {comparison.directory / 'report' / 'scores.png'}", soft_wrap=True)
    console.print(f"report   {comparison.directory / 'report' / 'report.html'}", soft_wrap=True)
    console.print(f"T-SPIN   {results[0].model_dir}  sha256 {results[0].model_hash[:16]}", soft_wrap=True)
    console.print(f"again    tspin run --config {directory / 'config.yaml'} --output_dir ANOTHER", soft_wrap=True)
    console.print(f"time     {time.perf_counter() - start:.0f} s")
    return 0
