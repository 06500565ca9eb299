"""`tspin demo`: a whole self-play run on a laptop's CPU, from a model that does not exist yet to a trained one.

The task is three-digit addition with worked columns. A tiny Llama is pre-trained on solutions of which most forget to carry:
a sloppy pupil. Then the very code of `tspin run` fine-tunes it on 512 clean solutions. What is made here is the task, the
tokenizer and the pupil; the loop is `tspin.loop.SelfPlay`, and the config it leaves behind runs again by `tspin run`.
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
from typing import Any

from rich.console import Console
from rich.progress import track

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


def demo_config(directory: Path, *, quick: bool, seed: int) -> dict[str, object]:
    """The flat config of the demo's run: the paper's alpha and beta, the learning rate and sizes of a toy."""
    return {
        "model_name_or_path": str(directory / "pupil"),
        "dataset": str(directory / "train.jsonl"),
        "eval_dataset": str(directory / "test.jsonl"),
        "answer_pattern": r"#(\d+)$",
        "prompt_template": "{prompt}",
        "output_dir": str(directory / "run"),
        "iterations": 2 if quick else 5,
        "max_new_tokens": 48,
        "generation_batch_size": 128,
        "shard_size": 256,
        "seed": seed,
        "method": "tspin",
        "learning_rate": 1e-5,
        "num_train_epochs": 2,
        "per_device_train_batch_size": 32,
        "max_length": 96,
        "logging_steps": 4,
        "use_cpu": True,
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; a second call with the same directory goes on where the first stopped."""
    parser = argparse.ArgumentParser(prog="tspin demo", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--output_dir", type=Path, default=Path("tspin-demo"), help="where everything goes")
    parser.add_argument(
        "--quick", action="store_true", help="a short run of two iterations, too short to mean anything"
    )
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)

    from tspin.config import SelfPlayConfig
    from tspin.loop import SelfPlay
    from tspin.report import iteration_table

    console, start = Console(), time.perf_counter()
    directory = options.output_dir.resolve()
    directory.mkdir(parents=True, exist_ok=True)
    done = directory / "pupil.done"
    if not done.exists():
        write_rows(directory / "train.jsonl", "train", 128 if options.quick else 512, options.seed)
        write_rows(directory / "test.jsonl", "test", 64 if options.quick else 400, options.seed)
        pretrain(
            directory / "pupil",
            build_tokenizer(),
            sloppy_texts(options.seed),
            steps=60 if options.quick else 220,
            batch_size=128,
            learning_rate=3e-3,
            seed=options.seed,
            **PUPIL,
        )
        done.touch()
    config = SelfPlayConfig.from_dict(demo_config(directory, quick=options.quick, seed=options.seed))
    config.save(directory / "config.yaml")
    result = SelfPlay(config).run()

    console.print(iteration_table(result.output_dir))
    console.print(
        "A sloppy pupil learns to carry from 512 clean solutions, without a reference model or a reward model.\n"
        "This is a toy: one seed, one learning rate. On so clean a task plain SFT does better still (method: sft)."
        if not options.quick
        else "A quick run: too short for its numbers to mean anything."
    )
    console.print(f"report   {result.output_dir / 'report' / 'report.html'}")
    console.print(f"model    {result.model_dir}  sha256 {result.model_hash[:16]}")
    console.print(f"again    tspin run --config {directory / 'config.yaml'} --output_dir ANOTHER")
    console.print(f"time     {time.perf_counter() - start:.0f} s")
    return 0
