"""What a policy makes of given responses: exact match, log-likelihood, accuracy, and reference log-probs.

No benchmark and no few-shot prompts (tspin.harness has them): the rows are rendered by the template of the run. Numbers are
of the policy as it is; greedy exact match flatters it, the sampled one is what self-play sees. Log-probs are in nats.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pyarrow as pa
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tspin.collator import TripletCollator
from tspin.data import Example
from tspin.generate import Generation, generate_responses, read_generations, sample_responses
from tspin.scoring import score_references
from tspin.storage import hash_json, read_shard, write_shard

GREEDY, SAMPLED = "greedy", "sampled"


def extract_answer(text: str, pattern: str | None = None) -> str | None:
    """The last group of the last match of `pattern` (the match itself without groups), stripped; None without a match.

    pattern None: the whole text, stripped.
    """
    if pattern is None:
        return text.strip()
    matches = list(re.finditer(pattern, text))
    if not matches:
        return None
    answer = matches[-1].group(matches[-1].re.groups)
    return None if answer is None else answer.strip()


def exact_match(examples: Sequence[Example], generations: Sequence[Generation], pattern: str | None = None) -> float:
    """Share of generations that ended by themselves with the answer of the annotated response.

    Raises:
        ValueError: an annotated response holds no answer; its row is named.
    """
    right = 0
    for example, generation in zip(examples, generations, strict=True):
        wanted = extract_answer(example.response, pattern)
        if wanted is None:
            raise ValueError(
                f"answer_pattern: want a match in every annotated response, got none for {pattern!r} in row "
                f"{example.row}: {example.response[:80]!r}; correct the pattern or leave it out"
            )
        right += generation.finish_reason == "stop" and extract_answer(generation.text, pattern) == wanted
    return right / len(examples)


def annotated_logprobs(
    model: PreTrainedModel, examples: Sequence[Example], *, pad_token_id: int, **scoring: Any
) -> list[float]:
    """Summed log-probs (nats) under the model of the annotated responses; scoring: as `tspin.scoring.score_references`."""
    features = [{"prompt_ids": e.prompt_ids, "chosen_ids": e.response_ids} for e in examples]
    collator = TripletCollator(pad_token_id, ("chosen",))
    return score_references(model, features, collator, desc="log-likelihood", **scoring)["ref_chosen_logps"]


def accuracy(
    model: PreTrainedModel, examples: Sequence[Example], logprobs: Sequence[float], **scoring: Any
) -> dict[str, float]:
    """Of examples with choices, the share whose annotated response is the likeliest; ties count as wrong.

    logprobs: of the annotated responses, nats. scoring: as `annotated_logprobs`.
    Returns:
        accuracy: by the log-prob of the whole answer, end token included; accuracy_norm: by that over its characters. With two
        answers it is the share of pairs in the right order.
    """
    others = [replace(e, response_ids=ids) for e in examples for _, ids in e.choices]
    scores = iter(annotated_logprobs(model, others, **scoring))
    right = right_norm = 0
    for example, own in zip(examples, logprobs, strict=True):
        rivals = [(next(scores), len(text)) for text, _ in example.choices]
        right += own > max(score for score, _ in rivals)
        right_norm += own / len(example.response) > max(score / length for score, length in rivals)
    return {"accuracy": right / len(examples), "accuracy_norm": right_norm / len(examples)}


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    *,
    answer_pattern: str | None = None,
    max_new_tokens: int = 256,
    batch_size: int = 32,
    seed: int = 42,
    sampled: bool = True,
    directory: str | Path | None = None,
    autocast_dtype: torch.dtype | None = None,
    scoring_batch_size: int = 8,
    **scoring: Any,
) -> dict[str, Any]:
    """Exact match, log-likelihood and, where the rows have choices, accuracy on held-out rows.

    Args:
        directory: where `generate_answers` has written the responses; None samples them here and keeps none.
        scoring: as `tspin.scoring.scoring_options`.
    Returns:
        exact_match: greedy; exact_match_sampled: at temperature 1 (absent unless `sampled`); logprob: mean summed
        log-prob of the annotated responses, nats; nll_per_token: nats; truncated_greedy: share of greedy responses that were
        cut; accuracy, accuracy_norm: as `accuracy` (absent without choices); rows, tokens: of the annotated responses.
    Raises:
        ValueError: no examples, or `answer_pattern` matches no answer in an annotated response.
    """
    if not examples:
        raise ValueError("examples: want at least one held-out row, got none")
    settings = {"max_new_tokens": max_new_tokens, "batch_size": batch_size, "autocast_dtype": autocast_dtype}
    answers: dict[str, list[Generation]] = {}
    for mode, temperature in _decodings(sampled):
        if directory is None:
            answers[mode] = sample_responses(model, tokenizer, examples, seed=seed, temperature=temperature, **settings)
        else:
            read = read_generations(Path(directory) / mode)
            answers[mode] = [read[e.row] for e in examples]
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    scoring |= {"pad_token_id": cast(int, padding), "batch_size": scoring_batch_size, "autocast_dtype": autocast_dtype}
    logprobs = annotated_logprobs(model, examples, **scoring)
    result: dict[str, Any] = {"exact_match": exact_match(examples, answers[GREEDY], answer_pattern)}
    if sampled:
        result["exact_match_sampled"] = exact_match(examples, answers[SAMPLED], answer_pattern)
    if examples[0].choices:
        result |= accuracy(model, examples, logprobs, **scoring)
    tokens = sum(len(e.response_ids) for e in examples)
    return result | {
        "logprob": sum(logprobs) / len(examples),
        "nll_per_token": -sum(logprobs) / tokens,
        "truncated_greedy": sum(g.finish_reason == "length" for g in answers[GREEDY]) / len(examples),
        "rows": len(examples),
        "tokens": tokens,
    }


def _decodings(sampled: bool) -> list[tuple[str, float]]:
    """The modes of answering, each with its temperature."""
    return [(GREEDY, 0.0), *([(SAMPLED, 1.0)] if sampled else [])]


def merge_evaluations(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The result of `evaluate` on all rows, from its results on disjoint parts of them."""
    counts = {name: sum(part[name] for part in parts) for name in ("rows", "tokens")}
    return {
        name: counts[name] if name in counts else sum(part[name] * part[unit] for part in parts) / counts[unit]
        for name in parts[0]
        for unit in ["tokens" if name == "nll_per_token" else "rows"]
    }


def generate_answers(
    model: PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    directory: str | Path,
    *,
    seed: int,
    sampled: bool = True,
    **settings: Any,
) -> None:
    """Write the greedy and, if `sampled`, the sampled responses below `directory`; settings as `generate_responses`."""
    for mode, temperature in _decodings(sampled):
        options = {"seed": seed, "temperature": temperature, "desc": f"answer, {mode}", **settings}
        generate_responses(model, tokenizer, examples, Path(directory) / mode, **options)


def write_references(
    model: PreTrainedModel,
    table: pa.Table,
    directory: str | Path,
    collator: TripletCollator,
    *,
    batch_size: int,
    shard_size: int,
    process_index: int = 0,
    num_processes: int = 1,
    autocast_dtype: torch.dtype | None = None,
    model_id: str = "",
    **scoring: Any,
) -> None:
    """Write the model's log-probs of all members of a table of triplets, in shards as `generate_responses` does."""
    rows = table.to_pylist()
    request = {
        "model": model_id,
        "triplets": hash_json(rows),
        "members": list(collator.members),
        "rows": len(rows),
        "shard_size": shard_size,
        "batch_size": batch_size,
        "autocast": str(autocast_dtype),
    }
    for index in range(process_index, -(-len(rows) // shard_size), num_processes):
        if read_shard(directory, index, request) is None:
            part = rows[index * shard_size : (index + 1) * shard_size]
            options = {"batch_size": batch_size, "autocast_dtype": autocast_dtype, **scoring}
            scores = score_references(model, part, collator, **options)
            write_shard(directory, index, pa.table(scores), request)


def read_references(directory: str | Path, table: pa.Table) -> pa.Table:
    """The table of triplets with the columns ref_<member>_logps that `write_references` left for it.

    Raises:
        ValueError: a shard is missing or torn; it is named.
    """
    shards: list[pa.Table] = []
    while sum(shard.num_rows for shard in shards) < table.num_rows:
        shard = read_shard(directory, len(shards))
        if shard is None:
            raise ValueError(f"{directory}: shard-{len(shards):05d} is missing or torn; run the same command again")
        shards.append(shard.replace_schema_metadata(None))
    scores = pa.concat_tables(shards)
    for name in scores.column_names:
        table = table.append_column(name, scores[name])
    return table
