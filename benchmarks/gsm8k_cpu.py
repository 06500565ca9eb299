"""Real input on a laptop: `recipes/gsm8k.yaml` on local GSM8K rows, with a tokenizer and a 1.1M-parameter model made on the spot.

    python benchmarks/gsm8k_cpu.py --data DIR_WITH_train.jsonl_AND_test.jsonl

It shows that the whole loop takes real data; a model of this size solves no problem of GSM8K, so its exact match stays near 0.
"""

import argparse
import json
import random
import time
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console

from tspin.config import SelfPlayConfig
from tspin.demo import pretrain
from tspin.loop import SelfPlay
from tspin.report import iteration_table

TEMPLATE = "### Instruction: {prompt}\n\n### Response: "


def build_tokenizer(rows: list[dict[str, str]]):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2048,
        special_tokens=["<pad>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((row["question"] + "\n" + row["answer"] for row in rows), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def endless_texts(rows: list[dict[str, str]], seed: int) -> Iterator[str]:
    rng = random.Random(seed)
    while True:
        for row in rng.sample(rows, len(rows)):
            yield TEMPLATE.format(prompt=row["question"]) + row["answer"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output_dir", type=Path, default=Path("tspin-run-gsm8k"))
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--pretraining_steps", type=int, default=300)
    options = parser.parse_args()

    start = time.perf_counter()
    pupil = options.output_dir / "pupil"
    if not (pupil / "tokenizer.json").exists():
        lines = (options.data / "train.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines]
        pretrain(
            pupil,
            build_tokenizer(rows),
            endless_texts(rows, seed=0),
            steps=options.pretraining_steps,
            batch_size=16,
            learning_rate=2e-3,
            seed=0,
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=4,
            max_position_embeddings=1024,
            initializer_range=0.08,
        )
    overrides = {
        "model_name_or_path": str(pupil),
        "dataset": str(options.data),
        "eval_dataset": str(options.data),
        "eval_rows": 100,
        "max_rows": options.rows,
        "output_dir": str(options.output_dir / "run"),
        "iterations": 2,
        "num_train_epochs": 1,
        "learning_rate": 5e-6,
        "max_new_tokens": 200,
        "generation_batch_size": 100,
        "shard_size": 200,
        "per_device_train_batch_size": 16,
        "gradient_checkpointing": False,
        "bf16": False,
        "use_cpu": True,
    }
    config = SelfPlayConfig.from_file(Path(__file__).parents[1] / "recipes" / "gsm8k.yaml", overrides)
    result = SelfPlay(config).run()
    console = Console(width=200)
    console.print(iteration_table(result.output_dir))
    console.print(f"{options.rows} rows, {time.perf_counter() - start:.0f} s, model sha256 {result.model_hash[:16]}")


if __name__ == "__main__":
    main()
