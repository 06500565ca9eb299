"""The initial policy of the word problems: a Llama from scratch that has learnt from a pupil who neither carries nor borrows.

The same seed gives the same weights on the same machine, whoever makes the batches.
"""

from __future__ import annotations

import math
import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.study.problems import TOKEN, problems, vocabulary
from tspin import storage

SLOPPY = 0.85  # share of pre-training answers by a pupil who neither carries nor borrows


@dataclass(frozen=True)
class Size:
    """Of the model, its pre-training, the data and the runs."""

    name: str
    hidden: int
    layers: int
    heads: int
    steps: int  # of pre-training
    batch: int
    rate: float
    rows: int  # of training prompts
    held_out: int  # of each held-out split
    iterations: int
    generation_batch: int
    seeds: int  # of the comparison, from 0 on


SIZES = {
    "full": Size("full", 512, 8, 8, 3000, 256, 1e-3, 2048, 512, 5, 512, 3),
    # What two CPU cores finish in an afternoon.
    "small": Size("small", 128, 4, 4, 1500, 64, 3e-3, 1024, 256, 5, 256, 5),
    # Shows that everything runs; its rows mean nothing.
    "tiny": Size("tiny", 32, 2, 2, 12, 16, 3e-3, 24, 8, 2, 16, 3),
}


def build_tokenizer() -> Any:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    ids = {token: i for i, token in enumerate(["<pad>", "<eos>", "<unk>", *vocabulary()])}
    core = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(TOKEN), "isolated")
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


class _Corpus:
    """Batches of the pre-training corpus, each made from its number alone, whatever process makes it."""

    def __init__(self, size: Size, seed: int):
        self.size, self.seed, self.tokenizer = size, seed, build_tokenizer()

    def __len__(self) -> int:
        return self.size.steps

    def __getitem__(self, number: int) -> Any:
        rng, texts = random.Random(f"{self.seed}/{number}"), []
        for problem in problems("train", f"corpus/{self.seed}/{number}"):
            texts.append(f"{problem.prompt}\n{problem.sloppy if rng.random() < SLOPPY else problem.answer}<eos>")
            if len(texts) == self.size.batch:
                return self.tokenizer(texts, return_tensors="pt", padding=True, return_token_type_ids=False).data


def make_pupil(size: Size, seed: int, directory: Path) -> None:
    """Pre-train the initial policy of a seed on the sloppy corpus, and save it with its tokenizer."""
    import torch
    from torch.utils.data import DataLoader
    from transformers import LlamaConfig, LlamaForCausalLM, get_linear_schedule_with_warmup, set_seed

    set_seed(seed)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    corpus = _Corpus(size, seed)
    special = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
    config = LlamaConfig(
        vocab_size=len(corpus.tokenizer),
        hidden_size=size.hidden,
        intermediate_size=size.hidden * 11 // 4,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        max_position_embeddings=256,
        initializer_range=min(0.1, 1 / math.sqrt(size.hidden)),
        tie_word_embeddings=True,
        **special,
    )
    model = LlamaForCausalLM(config).to(device)
    on_gpu = device.type == "cuda"
    optimizer = torch.optim.AdamW(model.parameters(), lr=size.rate, weight_decay=0.01, fused=on_gpu)
    schedule = get_linear_schedule_with_warmup(optimizer, size.steps // 20, size.steps)
    start = time.monotonic()
    for step, batch in enumerate(DataLoader(corpus, batch_size=None, num_workers=4 if on_gpu else 0)):  # type: ignore[arg-type]
        batch = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        with torch.autocast(device.type, torch.bfloat16, enabled=on_gpu):
            # Without the mask: no token sees the padding after it, and attention has a deterministic backward.
            loss = model(batch["input_ids"], labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % max(1, size.steps // 10) == 0 or step + 1 == size.steps:
            print(f"pupil {seed}: step {step}, loss {loss.item():.3f}, {time.monotonic() - start:.0f} s", flush=True)
    with storage.staged_directory(directory) as staged:
        model.save_pretrained(staged)
        corpus.tokenizer.save_pretrained(staged)
