"""Responses sampled from exactly the policy that is trained, kept as token ids in resumable shards.

`sample_responses` is the reference of what a backend does; `tspin.continuous` and `tspin.remote` hold the others, with
the same arguments and result, and `tspin.backends` picks one.

Deliberately not `model.generate`: its effective defaults (top_k = 50, the model's own generation_config) are another
distribution than the one whose log-probabilities the loss compares, and its random stream is shared by the batch.

Here a response depends on the weights, its prompt, the seed and its row, and on nothing else but rounding:
row r draws one uniform number per token from a generator of its own, seeded with the first 63 bits of
SHA-256("<seed>:<r>"), and turns it into a token by the inverse of the distribution function of
softmax(logits / temperature). Batches are fixed slices of the shard's rows, sorted by prompt length, so a shard made
again is bitwise the same on the same machine. Another batch size or another machine gives the same draws, but logits
that differ in their last bits, so that now and then a token on a boundary differs.
"""

from __future__ import annotations

import hashlib
import inspect
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import pyarrow as pa
import torch
from tqdm.auto import tqdm
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from tspin.data import Example, stop_token_ids
from tspin.model import cache_keyword, naming_out_of_memory, vocabulary_size
from tspin.storage import read_shard, remove_partial, shard_request, write_shard

logger = logging.getLogger(__name__)

_SCHEMA = pa.schema(
    [
        ("row", pa.int64()),
        ("token_ids", pa.list_(pa.int32())),
        ("finish_reason", pa.string()),
        ("text", pa.string()),
    ]
)


@dataclass(frozen=True)
class Generation:
    """One response: `token_ids` ends with the stop token when `finish_reason` is "stop", and has none when "length".

    `text` is the decoded response without special tokens; it is for readers, the ids are the data.
    """

    token_ids: list[int]
    finish_reason: Literal["stop", "length"]
    text: str


@dataclass(frozen=True)
class Backend:
    """How shards are sampled: by a function with the arguments and the result of `sample_responses`.

    facts: what of it determines the responses; stored with the shards, so that those of two backends are not mixed.
    """

    sample: Callable[..., list[Generation]]
    facts: Mapping[str, Any]


def derived_seed(seed: int, name: str) -> int:
    """The seed of one use of randomness in a run: the first 31 bits of SHA-256("<seed>/<name>")."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:4], "big") >> 1


def row_seed(seed: int, row: int) -> int:
    """The seed of one row's generator: the first 63 bits of SHA-256("<seed>:<row>")."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{row}".encode()).digest()[:8], "big") >> 1


def row_uniforms(seed: int, row: int, count: int) -> torch.Tensor:
    """[count] float64 in [0, 1) on the CPU: the draws of one row; a larger count only appends."""
    return torch.rand(count, dtype=torch.float64, generator=torch.Generator().manual_seed(row_seed(seed, row)))


def next_tokens(
    logits: torch.Tensor, uniforms: torch.Tensor, temperature: float = 1.0, top_p: float = 1.0, top_k: int = 0
) -> torch.Tensor:
    """One token per row from softmax(logits / temperature), by the inverse of its distribution function.

    Args:
        logits: [B, V], any float dtype; the softmax is in float32, its running sum in float64.
        uniforms: [B] float64 in [0, 1). Ignored at temperature 0, which takes the first largest logit.
        top_p: keep the smallest set of most likely tokens whose probability reaches it; 1 keeps all.
        top_k: keep the k most likely tokens and ties of the last; 0 keeps all.
    Returns:
        [B] int64.
    """
    logits = logits.float()
    if temperature == 0:
        return logits.argmax(dim=-1)
    logits = logits / temperature
    if 0 < top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k, dim=-1).values[:, -1:], -torch.inf)
    if top_p < 1:
        values, order = logits.sort(dim=-1, descending=True, stable=True)
        probabilities = values.softmax(dim=-1)
        beyond = probabilities.cumsum(dim=-1, dtype=torch.float64) - probabilities >= top_p
        logits = logits.masked_fill(torch.zeros_like(beyond).scatter(-1, order, beyond), -torch.inf)
    cumulative = logits.softmax(dim=-1).cumsum(dim=-1, dtype=torch.float64)
    total = cumulative[:, -1:]
    below_total = torch.nextafter(total, torch.zeros_like(total))
    return torch.searchsorted(cumulative, torch.minimum(uniforms[:, None] * total, below_total), right=True).squeeze(-1)


@contextmanager
def _sampling_mode(model: PreTrainedModel, autocast_dtype: torch.dtype | None) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), torch.autocast(model.device.type, autocast_dtype, enabled=autocast_dtype is not None):
            yield
    finally:
        model.train(was_training)


def _decode_batch(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    uniforms: torch.Tensor,
    stop_ids: torch.Tensor,
    pad_id: int,
    sampling: dict[str, Any],
) -> list[tuple[list[int], bool]]:
    """Token ids and whether a stop token ended them, for each prompt, in one left-padded batch.

    uniforms: [B, max_new_tokens] on the model's device. Rows that have ended leave the batch and the cache as soon as
    they are an eighth of it, a rule that reads nothing but the tokens and so repeats exactly.
    """
    device, max_new_tokens = model.device, uniforms.shape[1]
    width = max(len(prompt) for prompt in prompts)
    tokens = torch.tensor([[pad_id] * (width - len(p)) + list(p) for p in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    known = inspect.signature(model.forward).parameters
    cache = DynamicCache(config=model.config)
    cached = {cache_keyword(model): cache}
    collected = torch.full((len(prompts), max_new_tokens), pad_id, dtype=torch.int64, device=device)
    lengths = torch.full((len(prompts),), max_new_tokens, dtype=torch.int64, device=device)
    stopped = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    live = torch.arange(len(prompts), device=device)
    for step in range(max_new_tokens):
        inputs: dict[str, Any] = {"input_ids": tokens, "attention_mask": mask, **cached}
        if "position_ids" in known:
            inputs["position_ids"] = positions
        if "logits_to_keep" in known:
            inputs["logits_to_keep"] = 1
        logits = model(**inputs, use_cache=True).logits[:, -1]
        if logits.isnan().any():
            raise ValueError(
                "model gave NaN logits while sampling; its weights are broken, or a lower precision overflows: restore the "
                "checkpoint, or set torch_dtype: float32 and fp16: false"
            )
        chosen = next_tokens(logits, uniforms[live, step], **sampling)
        collected[live, step] = chosen
        ended = torch.isin(chosen, stop_ids) & ~stopped[live]
        lengths[live[ended]] = step + 1
        stopped[live[ended]] = True
        running = ~stopped[live]
        count = int(running.sum())
        if count == 0:
            break
        tokens, positions = chosen[:, None], positions[:, -1:] + 1
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=-1)
        if len(live) - count >= max(1, len(live) // 8):
            kept = running.nonzero().squeeze(-1)
            live, tokens, positions, mask = live[kept], tokens[kept], positions[kept], mask[kept]
            cache.reorder_cache(cast(torch.LongTensor, kept))
    return [(ids[:length], stop) for ids, length, stop in zip(collected.tolist(), lengths.tolist(), stopped.tolist())]


def sample_responses(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    *,
    seed: int,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    batch_size: int = 32,
    autocast_dtype: torch.dtype | None = None,
    progress: tqdm | None = None,
) -> list[Generation]:
    """One response per example, in the order of `examples`; nothing of the model's generation_config but its stop ids.

    Greedy at temperature 0. See the module's docstring for what a response depends on.

    Raises:
        ValueError: an argument is out of range, a row comes twice, a prompt is empty, or the logits are NaN.
        BatchTooLargeError: a batch does not fit the GPU.
    """
    check_request(model, examples, max_new_tokens, temperature, top_p, top_k, batch_size)
    stop_ids = sorted(stop_token_ids(tokenizer, model.generation_config))
    pad_id = cast(int, stop_ids[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id)
    stops = torch.tensor(stop_ids, device=model.device)
    sampling = {"temperature": temperature, "top_p": top_p, "top_k": top_k}
    order = sorted(range(len(examples)), key=lambda i: (-len(examples[i].prompt_ids), examples[i].row))
    generations: dict[int, Generation] = {}
    with _sampling_mode(model, autocast_dtype):
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            uniforms = torch.stack([row_uniforms(seed, examples[i].row, max_new_tokens) for i in batch])
            prompts = [examples[i].prompt_ids for i in batch]
            try:
                with naming_out_of_memory(len(batch), "decoding", "generation_batch_size"):
                    decoded = _decode_batch(model, prompts, uniforms.to(model.device), stops, pad_id, sampling)
            except IndexError as error:
                raise ValueError(
                    f"max_new_tokens: want room in the model's positions, got {max_new_tokens} behind a prompt of "
                    f"{max(map(len, prompts))} tokens; lower max_new_tokens or max_length"
                ) from error
            for i, (ids, stop) in zip(batch, decoded):
                generations[i] = Generation(ids, "stop" if stop else "length", text_of(tokenizer, ids))
            if progress is not None:
                progress.update(len(batch))
    return [generations[i] for i in range(len(examples))]


def generate_responses(
    model: PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    directory: str | Path,
    *,
    seed: int,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    batch_size: int = 32,
    shard_size: int = 512,
    process_index: int = 0,
    num_processes: int = 1,
    autocast_dtype: torch.dtype | None = None,
    model_id: str = "",
    backend: Backend | None = None,
    desc: str = "generate",
) -> None:
    """Write one response per example to `directory`, `shard_size` examples to a parquet shard (see `tspin.storage`).

    Whole shards are kept, torn ones made again; a shard in flight when the process is killed is lost, no more.
    Shard s belongs to process s % num_processes, so the same rows get the same seeds and batches whatever their number.

    Args:
        model: None where the backend has its own.
        model_id: what identifies the weights; stored, so that shards of another model are refused.
        backend: what samples; None for `sample_responses`.
    Raises:
        ValueError: as `sample_responses`; shards of another request lie in `directory`; no space left.
    """
    if shard_size < 1:
        raise ValueError(f"shard_size: want at least 1, got {shard_size}; 512 is the default")
    check_request(model, examples, max_new_tokens, temperature, top_p, top_k, batch_size)
    if backend is None:
        facts = {"backend": "transformers", "batch_size": batch_size, "autocast": str(autocast_dtype)}
        backend = Backend(sample_responses, facts)
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    request: dict[str, Any] = {
        "seed": seed,
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        **backend.facts,
        "rows": len(examples),
        "shard_size": shard_size,
        "prompts": _prompts_hash(examples),
        "model": model_id,
    }
    shards = range(process_index, -(-len(examples) // shard_size), num_processes)
    for index in shards:
        # Its own alone: another process may be writing its shard at this moment.
        remove_partial(directory, f"shard-{index:05d}-*")
    slices = {index: examples[index * shard_size : (index + 1) * shard_size] for index in shards}
    with tqdm(
        total=sum(map(len, slices.values())), desc=desc, unit="row", disable=None if process_index == 0 else True
    ) as bar:
        for index, rows in slices.items():
            if read_shard(directory, index, request) is not None:
                bar.update(len(rows))
                continue
            generations = backend.sample(
                model,
                tokenizer,
                rows,
                seed=seed,
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                top_p=top_p,
                top_k=top_k,
                batch_size=batch_size,
                autocast_dtype=autocast_dtype,
                progress=bar,
            )
            records = [
                {"row": e.row, "token_ids": g.token_ids, "finish_reason": g.finish_reason, "text": g.text}
                for e, g in zip(rows, generations)
            ]
            write_shard(directory, index, pa.Table.from_pylist(records, schema=_SCHEMA), request)


def read_generations(directory: str | Path) -> dict[int, Generation]:
    """All responses of `directory`, by row.

    Raises:
        ValueError: there are none, or a shard is missing or torn; the shard is named.
    """
    request = shard_request(directory)
    if request is None:
        raise ValueError(f"{directory} holds no whole shard of responses; run the command that generates them again")
    generations: dict[int, Generation] = {}
    for index in range(-(-request["rows"] // request["shard_size"])):
        table = read_shard(directory, index, request)
        if table is None:
            raise ValueError(
                f"{directory}: shard-{index:05d} is missing or torn; run the command that generates it again"
            )
        for record in table.to_pylist():
            generations[record["row"]] = Generation(record["token_ids"], record["finish_reason"], record["text"])
    return generations


def check_request(
    model: PreTrainedModel | None,
    examples: Sequence[Example],
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    top_k: int,
    batch_size: int,
) -> None:
    """Raise ValueError where an argument of `sample_responses` is out of range, a row comes twice or its tokens do not fit."""
    for name, value, good, wanted in (
        ("max_new_tokens", max_new_tokens, max_new_tokens >= 1, "at least 1"),
        ("temperature", temperature, 0 <= temperature < float("inf"), "at least 0 (0 is greedy)"),
        ("top_p", top_p, 0 < top_p <= 1, "in (0, 1]; 1 keeps all"),
        ("top_k", top_k, top_k >= 0, "at least 0; 0 keeps all"),
        ("batch_size", batch_size, batch_size >= 1, "at least 1"),
    ):
        if not good:
            raise ValueError(f"{name}: want {wanted}, got {value}")
    seen: set[int] = set()
    vocabulary = math.inf if model is None else vocabulary_size(model)
    for example in examples:
        if (most := max((*example.prompt_ids, *example.response_ids), default=0)) >= vocabulary:
            raise ValueError(
                f"tokenizer: want token ids below {vocabulary}, as the model has embeddings, got {most} in row "
                f"{example.row}; use the model's own tokenizer"
            )
        if example.row in seen:
            raise ValueError(f"examples: want each row once, got row {example.row} twice; rows key seeds and responses")
        if not example.prompt_ids:
            raise ValueError(f"examples: want a token to start from, got an empty prompt in row {example.row}")
        seen.add(example.row)


def text_of(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int]) -> str:
    """What a reader is shown of a response: its tokens without the special ones."""
    return cast(str, tokenizer.decode(list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))


def _prompts_hash(examples: Sequence[Example]) -> str:
    digest = hashlib.sha256()
    for example in examples:
        digest.update(np.array([example.row, len(example.prompt_ids), *example.prompt_ids], dtype="<i8").tobytes())
    return digest.hexdigest()
