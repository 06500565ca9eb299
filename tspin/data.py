"""Rows of annotated prompts, read from files or the hub, rendered by one template, as token ids; triplets.

The prompt and each response are tokenised apart and their ids concatenated, so the prompt's tokens are the same for
all members of a triplet. Text never decides what a response is: ids and finish reasons do. This module deliberately
samples nothing and knows no loss.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import datasets
import jinja2
import pyarrow as pa
from tqdm.auto import tqdm
from transformers import GenerationConfig
from transformers import PreTrainedTokenizerBase as Tokenizer

from tspin.rows import BadRow, candidates, exchange, read_rows

if TYPE_CHECKING:
    from tspin.config import SelfPlayConfig
    from tspin.generate import Generation

logger = logging.getLogger(__name__)

MEMBERS = ("chosen", "rejected", "proto")


@dataclass(frozen=True)
class Example:
    """One annotated prompt.

    `row` is its index in the source, counted before any row is dropped; seeds and responses are keyed by it.
    `prompt` is the text as the template renders it, and `prompt_ids` its tokens.
    `response_ids` end with one end token, or with none when `overlong` cut them. `choices`: text and ids of every other answer
    to choose among, of held-out rows with a `choices_column`.
    """

    row: int
    prompt: str
    response: str
    prompt_ids: list[int]
    response_ids: list[int]
    choices: tuple[tuple[str, list[int]], ...] = ()


@dataclass(frozen=True)
class DataReport:
    """What became of the rows of one source: total = kept + bad + overlong_dropped."""

    source: str
    total: int
    kept: int
    bad: int
    overlong_dropped: int
    overlong_cut: int
    first_bad: str | None

    def __str__(self) -> str:
        parts = [f"{self.kept} of {self.total} rows"]
        parts += [f"{self.bad} bad and skipped, the first: {self.first_bad}"] if self.bad else []
        parts += [f"{self.overlong_dropped} beyond max_length and dropped"] if self.overlong_dropped else []
        parts += [f"{self.overlong_cut} beyond max_length and cut"] if self.overlong_cut else []
        return f"{self.source}: {'; '.join(parts)}"


def stop_token_ids(tokenizer: Tokenizer, model_generation_config: GenerationConfig | None = None) -> tuple[int, ...]:
    """The ids that end a response, the tokenizer's end token first, then those of the generation config.

    Raises:
        ValueError: there is none.
    """
    configured: Any = getattr(model_generation_config, "eos_token_id", None)
    configured = [configured] if isinstance(configured, int) else configured or []
    ids: tuple[Any, ...] = tuple(dict.fromkeys(i for i in (tokenizer.eos_token_id, *configured) if i is not None))
    if not ids:
        raise ValueError("tokenizer: want an end token, got none; set eos_token in tokenizer_config.json")
    return ids


def load_examples(
    config: SelfPlayConfig, tokenizer: Tokenizer, *, split: str = "train"
) -> tuple[list[Example], DataReport]:
    """The rows of `config.dataset` (split "train") or `config.eval_dataset` (split "eval"), tokenised.

    Raises:
        FileNotFoundError: the path does not exist.
        ValueError: a row cannot be used and on_bad_row is "error"; a response is too long and overlong is "error";
            no row is left; the source cannot be read; the tokenizer lacks an end token or a chat template.
    """
    training = split == "train"
    name = config.dataset if training else config.eval_dataset
    if name is None:
        raise ValueError("eval_dataset: want a path or hub name of held-out rows, got null; set --eval_dataset")
    named, key = (config.dataset_split, "dataset") if training else (config.eval_split, "eval_dataset")
    columns = (config.prompt_column, config.response_column, config.choices_column)
    source = read_rows(name, config.dataset_config, named, key, columns)
    source = islice(source, config.max_rows if training else config.eval_rows)
    encode = Encoder(tokenizer, config.prompt_template, end_token_ids(config, tokenizer))
    max_length = config.training_value("max_length")
    examples: list[Example] = []
    total = bad = cut = 0
    first_bad = None
    for row, (where, record) in enumerate(tqdm(source, desc=f"tokenise {split}", unit="row", delay=2, disable=None)):
        total += 1
        try:
            turns, reply = exchange(record, config.prompt_column, config.response_column, config.conversation_round)
            prompt, prompt_ids, response_ids = encode(turns, reply)
            texts = [] if training or config.choices_column is None else candidates(record, config.choices_column)
            others = [text for text in dict.fromkeys(texts) if text != reply["content"]]
            choices = tuple((text, encode(turns, reply | {"content": text})[2]) for text in others)
            if texts and not choices:
                raise BadRow(
                    f"column {config.choices_column!r}: want another answer than the annotated, got none; add one"
                )
            kept_ids = fit(prompt_ids, response_ids, max_length, config.overlong)
        except BadRow as error:
            if config.on_bad_row == "error":
                raise BadRow(f"{where}: {error} (or --on_bad_row skip)") from error
            bad += 1
            first_bad = first_bad or f"{where}: {error}"
            continue
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        if kept_ids is not None:
            cut += len(kept_ids) < len(response_ids)
            examples.append(Example(row, prompt, reply["content"], prompt_ids, kept_ids, choices))
    report = DataReport(name, total, len(examples), bad, total - len(examples) - bad, cut, first_bad)
    logger.log(logging.WARNING if len(examples) < total or cut else logging.INFO, "%s", report)
    if not examples:
        raise ValueError(f"no row is left of {report}; want at least one (is max_length {max_length} too small?)")
    return examples, report


def end_token_ids(config: SelfPlayConfig, tokenizer: Tokenizer) -> tuple[int, ...]:
    """The ids that end a response in a run; a chat template may use one that only the generation config names."""
    if config.prompt_template != "chat":
        return stop_token_ids(tokenizer)
    try:
        beside = GenerationConfig.from_pretrained(config.model_name_or_path, revision=config.model_revision or "main")
    except (OSError, ValueError):
        beside = None
    return stop_token_ids(tokenizer, beside)


class Encoder:
    """Renders an exchange by one template and tokenises it: the one place where text becomes ids.

    Args:
        prompt_template: text with `{prompt}`, or "chat" for the tokenizer's chat template.
        stop_ids: the ids that end a response; the first one is appended to a plain response.
    Raises:
        ValueError: the template is "chat" and the tokenizer has none.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_template: str, stop_ids: Sequence[int]):
        self.tokenizer: Any = tokenizer
        self.template, self.stop_ids = prompt_template, tuple(stop_ids)
        self.is_chat = prompt_template == "chat"
        if self.is_chat and not tokenizer.chat_template:
            raise ValueError(
                "prompt_template: want text with {prompt}, got 'chat', but the tokenizer has no chat template"
            )
        bos: Any = tokenizer.bos_token_id
        self.bos = [bos] if bos is not None and tokenizer("a").input_ids[:1] == [bos] else []

    def __call__(self, turns: list[dict], reply: dict) -> tuple[str, list[int], list[int]]:
        """The prompt's text, its ids, and the response's ids, which end with exactly one end token."""
        if self.is_chat:
            prompt, rendered = self._render(turns, reply)
            prompt_ids = self._ids(prompt)
        elif [turn["role"] for turn in turns] != ["user"]:
            roles = ", ".join(turn["role"] for turn in turns)
            raise BadRow(f"want one user turn for a plain prompt_template, got {roles}; set --prompt_template chat")
        else:
            prompt, rendered = self.template.replace("{prompt}", turns[0]["content"]), reply["content"]
            prompt_ids = self._ids(prompt)
            prompt_ids = prompt_ids if prompt_ids[: len(self.bos)] == self.bos else self.bos + prompt_ids
        ids = self._ids(rendered)
        end = next((i for i, token in enumerate(ids) if token in self.stop_ids), None)
        if end is None and self.is_chat:
            names = self.tokenizer.convert_ids_to_tokens(list(self.stop_ids))
            wanted = f"want an end token, one of {names}, where the chat template ends a response"
            raise BadRow(f"{wanted}, got {rendered[-20:]!r}; set eos_token in tokenizer_config.json")
        end = len(ids) if end is None else end
        if end == 0 or self.tokenizer.decode(ids[end + 1 :], skip_special_tokens=True).strip():
            raise BadRow("want a response with text before its end token and none after it; repair the text")
        return prompt, prompt_ids, [*ids[:end], *(ids[end : end + 1] or self.stop_ids[:1])]

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids

    def _render(self, turns: list[dict], reply: dict) -> tuple[str, str]:
        try:
            prompt = self.tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
            whole = self.tokenizer.apply_chat_template([*turns, reply], tokenize=False)
        except jinja2.TemplateError as error:
            raise BadRow(f"the chat template refuses the row: {error}; reorder its turns or drop it") from None
        except Exception as error:  # of the template's own code
            failure = f"{type(error).__name__}: {error}"
            raise BadRow(
                f"the chat template fails on the row ({failure}); repair the template or drop the row"
            ) from None
        if not whole.startswith(prompt):
            raise BadRow("want the prompt's rendering to begin the whole's, got another; use a plain prompt_template")
        return prompt, whole[len(prompt) :]


def fit(prompt_ids: Sequence[int], response_ids: list[int], max_length: int, overlong: str) -> list[int] | None:
    """The response if it fits behind its prompt, else what `overlong` makes of it; None: drop.

    Prompts are never cut; a cut response has no end token.

    Raises:
        BadRow: the prompt is empty or fills max_length.
        ValueError: the response does not fit and overlong is "error".
    """
    if not prompt_ids:
        raise BadRow("want a prompt of at least one token, got none; fill it, or use a tokenizer with a start token")
    room = max_length - len(prompt_ids)
    if room < 1:
        raise BadRow(
            f"the prompt's {len(prompt_ids)} tokens fill max_length {max_length}; shorten it or raise max_length"
        )
    if len(response_ids) <= room:
        return response_ids
    if overlong == "error":
        total = len(prompt_ids) + len(response_ids)
        raise ValueError(f"want at most max_length {max_length} tokens, got {total}; raise it, or set overlong: drop")
    return response_ids[:room] if overlong == "cut" else None


def build_triplets(
    examples: Sequence[Example],
    synthetic: Mapping[int, Generation],
    proto: Mapping[int, Generation] | None = None,
    *,
    max_length: int = 2048,
    overlong: str = "drop",
) -> pa.Table:
    """One row per example whose members fit: texts under TRL's names, ids, and finish reasons.

    Columns: row, prompt, chosen, rejected, prompt_ids, chosen_ids, rejected_ids, rejected_finish_reason, and with
    `proto` proto, proto_ids, proto_finish_reason. A member cut by `overlong` has the finish reason "length".

    Raises:
        ValueError: a response is missing or empty, or too long where overlong is "error".
    """
    sources = {"rejected": synthetic} | ({} if proto is None else {"proto": proto})
    records = []
    for example in examples:
        record: dict[str, Any] = {"row": example.row, "prompt": example.prompt, "prompt_ids": example.prompt_ids}
        record |= {"chosen": example.response}
        record["chosen_ids"] = fit(example.prompt_ids, example.response_ids, max_length, overlong)
        for member, source in sources.items():
            if example.row not in source or not source[example.row].token_ids:
                raise ValueError(f"{member}: want a response for row {example.row}, got none; generate it again")
            made = source[example.row]
            kept_ids = fit(example.prompt_ids, made.token_ids, max_length, overlong)
            is_whole = kept_ids == made.token_ids
            record |= {member: made.text, f"{member}_ids": kept_ids}
            record[f"{member}_finish_reason"] = made.finish_reason if is_whole else "length"
        records.append(record)
    ids = [f"{member}_ids" for member in ("chosen", *sources)]
    kept = [record for record in records if all(record[column] is not None for column in ids)]
    _log_dropped(len(records), len(kept))
    columns = [("row", pa.int64()), *((name, pa.string()) for name in ("prompt", "chosen", *sources))]
    columns += [(name, pa.list_(pa.int32())) for name in ("prompt_ids", *ids)]
    columns += [(f"{member}_finish_reason", pa.string()) for member in sources]
    return pa.Table.from_pylist(kept, schema=pa.schema(columns))


def _log_dropped(total: int, kept: int) -> None:
    if kept < total:
        logger.warning("%d of %d triplets end beyond max_length and are dropped (see overlong)", total - kept, total)


def tokenize_triplets(
    dataset: datasets.Dataset,
    tokenizer: Tokenizer,
    prompt_template: str | None = None,
    max_length: int = 2048,
    overlong: str = "drop",
) -> datasets.Dataset:
    """Add the ids columns to TRL's rows: chosen, with rejected and proto where present, as text or as messages.

    prompt_template None takes text as it is and messages through the chat template.

    Raises:
        ValueError: a row cannot be used; it is named.
    """
    members = [member for member in MEMBERS if member in dataset.column_names]
    if "chosen" not in members:
        raise ValueError(f"dataset: want columns prompt, chosen, rejected (and proto), got {dataset.column_names}")
    if prompt_template is None:
        prompt_template = "{prompt}" if len(dataset) and isinstance(dataset[0]["chosen"], str) else "chat"
    encode = Encoder(tokenizer, prompt_template, stop_token_ids(tokenizer))
    prompt_column = "prompt" if "prompt" in dataset.column_names else None

    def ids_of(record: dict[str, Any], row: int) -> dict[str, Any]:
        columns: dict[str, Any] = {}
        try:
            for member in members:
                _, prompt_ids, response_ids = encode(*exchange(record, prompt_column, member))
                if columns.setdefault("prompt_ids", prompt_ids) != prompt_ids:
                    raise BadRow(f"column {member!r}: want the prompt of 'chosen', got another; repair the row")
                kept_ids = fit(prompt_ids, response_ids, max_length, overlong)
                columns[f"{member}_ids"] = kept_ids or []
                columns[f"{member}_finish_reason"] = "stop" if kept_ids == response_ids else "length"
        except ValueError as error:
            raise ValueError(f"dataset, row {row}: {error}") from error
        return columns

    encoded = dataset.map(ids_of, with_indices=True, desc="tokenise triplets", load_from_cache_file=False)
    kept = [i for i, row in enumerate(zip(*(encoded[f"{member}_ids"] for member in members))) if all(row)]
    _log_dropped(len(encoded), len(kept))
    return encoded.select(kept)
