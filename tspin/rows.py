"""Rows as people keep them: JSON lines, JSON, parquet or the hub, in the column layouts of prompt and completion, messages,
SPIN and TRL, turned into one exchange of messages. This module deliberately knows no tokenizer.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import datasets
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

_SUFFIXES = (".jsonl", ".json", ".parquet")
_SPLIT_NAMES = "train|test|validation|valid|val|dev|eval"
_COLUMNS = ("prompt", "response", "completion", "chosen", "messages", "real")
_LAYOUTS = "prompt with response, completion or chosen; messages; real; or --prompt_column and --response_column"


class BadRow(ValueError):
    """One row that cannot be used; the message says what was wanted, what came, and the remedy."""


def read_rows(
    name: str, config_name: str | None, split: str, key: str = "dataset", columns: Collection[str | None] = ()
) -> Iterator[tuple[str, Mapping | BadRow]]:
    """The rows of a file, of a directory's files of one split, or of a hub data set, each with the place it lies at.

    A row that cannot be parsed comes as a BadRow, so that the rows after it keep their numbers. key: what errors call the source.
    columns: wanted beside those of the known layouts. What a parquet file has besides is null: Python need not be able to hold it.
    """
    path = Path(os.path.expanduser(name))
    if path.is_dir():
        files = _split_files(path / config_name if config_name and (path / config_name).is_dir() else path, split, key)
    elif path.exists() or path.suffix in _SUFFIXES or name.startswith(("/", ".", "~")):
        files = [path]
    else:
        yield from _hub_rows(name, config_name, split, key)
        return
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"{key}: want a file, directory or hub name, got {file}, which does not exist")
        if file.suffix not in _SUFFIXES:
            raise ValueError(f"{key}: want a file that ends in {', '.join(_SUFFIXES)}, got {file}; convert it")
        wanted = [*_COLUMNS, *filter(None, columns)]
        yield from (_parquet_rows(file, key, wanted) if file.suffix == ".parquet" else _json_rows(file, key))


def _split_files(directory: Path, split: str, key: str) -> list[Path]:
    """The files named after the split (train.jsonl, train-00000-of-00002.parquet); all, where none names a split."""
    files = sorted(file for file in directory.iterdir() if file.suffix in _SUFFIXES and file.is_file())
    named = {file: re.match(rf"({re.escape(split)}|{_SPLIT_NAMES})(?=[-_.]|$)", file.stem) for file in files}
    chosen = [file for file, match in named.items() if match and match[1] == split] if any(named.values()) else files
    if not chosen:
        there = ", ".join(file.name for file in files) or "no data file"
        want = f"{split}*{', '.join(_SUFFIXES)} (dataset_split or eval_split; max_rows takes the first rows)"
        raise ValueError(f"{key}: want {want} in {directory}, got {there}; name a file or another split")
    return chosen


def _json_rows(file: Path, key: str) -> Iterator[tuple[str, Mapping | BadRow]]:
    with file.open("rb") as lines:
        head = lines.read(4096)
        start = head.removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
        lines.seek(0)
        if not (encoding := json.detect_encoding(head)).startswith("utf-8"):
            raise ValueError(f"{key}: want UTF-8, got {encoding} in {file}; convert it: iconv -f {encoding} -t utf-8")
        if start == b"[" and file.suffix == ".json":
            try:
                rows = json.loads(lines.read().decode("utf-8-sig"))
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{key}: {file} is not valid JSON: {error}; is it cut short?") from None
            yield from ((f"{file}, row {number}", record) for number, record in enumerate(rows, 1))
            return
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    record = json.loads(line.decode("utf-8-sig"))
                except (ValueError, RecursionError) as error:
                    record = BadRow(f"want one JSON object a line, got broken JSON ({error}); repair the line")
                yield f"{file}, line {number}", record


def _parquet_rows(file: Path, key: str, wanted: list[str]) -> Iterator[tuple[str, Mapping]]:
    number = 0
    try:
        parquet = pq.ParquetFile(file)
        unread = dict.fromkeys(parquet.schema_arrow.names)
        for batch in parquet.iter_batches(batch_size=1024, columns=wanted):
            columns = {
                name: _values(name, column, file, key) for name, column in zip(batch.schema.names, batch.columns)
            }
            for i in range(batch.num_rows):
                number += 1
                yield f"{file}, row {number}", unread | {name: values[i] for name, values in columns.items()}
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{key}: {file} is not a whole parquet file: {error}; is it cut short?") from None


def _values(name: str, column: pa.Array, file: Path, key: str) -> list:
    try:
        return column.to_pylist()
    except Exception as error:  # a year, a time zone or a text that Python does not know
        raise ValueError(
            f"{key}: column {name!r} of {file}: want values that Python can hold, got {column.type}: {error}; convert it"
        ) from error


def _hub_rows(name: str, config_name: str | None, split: str, key: str) -> Iterator[tuple[str, Any]]:
    try:
        rows = datasets.load_dataset(name, config_name, split=split)
    except Exception as error:
        wanted = f"an existing path or a data set on the hub with config {config_name!r} and split {split!r}"
        raise ValueError(f"{key}: want {wanted}, got {name!r}: {error}") from error
    yield from ((f"{name}, row {number}", record) for number, record in enumerate(rows, 1))


def exchange(
    record: Any, prompt_column: str | None = None, response_column: str | None = None, which: str = "last"
) -> tuple[list[dict], dict]:
    """The turns before the annotated response, and that response as a turn, of one row in any known layout.

    which: "last" or "first" answer of a conversation.
    """
    if isinstance(record, BadRow):
        raise record
    if not isinstance(record, Mapping):
        raise BadRow(f"want a JSON object, got {type(record).__name__}; write one object with named columns")
    present = {key for key, value in record.items() if value is not None}
    if response_column is not None:
        pair = (prompt_column, response_column)
    elif whole := next((key for key in ("real", "messages") if key in present), None):
        pair = (None, whole)
    else:
        answer = next((key for key in ("response", "completion", "chosen") if key in present), "response")
        pair = ("prompt" if "prompt" in present or answer != "chosen" else None, answer)
    missing = [column for column in pair if column is not None and column not in present]
    if missing and missing[0] in record:
        raise BadRow(f"column {missing[0]!r}: want text or a list of messages, got null; fill it")
    if missing:
        raise BadRow(f"column {missing[0]!r} is missing; got columns {sorted(map(str, record))}; want {_LAYOUTS}")
    turns = [] if pair[0] is None else _turns(record[pair[0]], "user", pair[0])
    replies = _turns(record[pair[1]], "assistant", pair[1])
    answers = [i for i, turn in enumerate(replies) if turn["role"] == "assistant"]
    if not answers:
        raise BadRow(f"column {pair[1]!r}: want an assistant turn, got none; annotate the row")
    end = answers[0 if which == "first" else -1]
    turns = replies[:end] if any(turn["role"] == "user" for turn in replies[:end]) else turns + replies[:end]
    if not turns:
        raise BadRow(f"column {pair[1]!r}: want a user turn before the response, got none; name a --prompt_column")
    return turns, replies[end]


def candidates(record: Any, column: str) -> list[str]:
    """The answers of one row to choose among: a list of texts, one text, or the messages of one (TRL's `rejected`)."""
    if column not in record:
        raise BadRow(
            f"column {column!r} is missing; got columns {sorted(map(str, record))}; name another --choices_column"
        )
    value = record[column]
    if isinstance(value, list) and value and all(isinstance(entry, Mapping) for entry in value):
        value = [turn["content"] for turn in _turns(value, "assistant", column)[-1:]]
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) and text.strip() for text in texts):
        raise BadRow(f"column {column!r}: want a list of texts to choose among, got {str(value)[:80]!r}; convert it")
    return texts


def _turns(value: Any, role: str, column: str) -> list[dict]:
    """A text as one turn of `role`, or a list of messages as it is, without empty optional fields."""
    turns = [{"role": role, "content": value}] if isinstance(value, str) else value
    if not isinstance(turns, list):
        raise BadRow(f"column {column!r}: want text or a list of messages, got {type(value).__name__}; convert it")
    for turn in turns:
        if not isinstance(turn, Mapping) or not isinstance(turn.get("role"), str):
            raise BadRow(f"column {column!r}: want messages with role and content, got {str(turn)[:80]!r}; convert it")
        if not isinstance(turn.get("content"), str) or not turn["content"].strip():
            raise BadRow(f"column {column!r}: want text in the {turn['role']} turn, got none or only spaces; fill it")
        if any("\ud800" <= character <= "\udfff" for character in turn["content"]):
            raise BadRow(f"column {column!r}: want valid Unicode, got a lone surrogate; repair the text")
    return [{key: entry for key, entry in turn.items() if entry is not None} for turn in turns]


def check_columns(dataset: Any, ids: list[str], numbers: list[str], vocabulary: int) -> None:
    """ValueError where a column of `ids` holds anything but lists of the vocabulary's token ids, or one of `numbers` no numbers."""
    for name in [*ids, *numbers]:
        try:
            table = getattr(dataset, "data", None)
            column = pa.array([row[name] for row in dataset]) if table is None else table.column(name)
        except (pa.ArrowException, TypeError) as error:
            raise ValueError(f"dataset: column {name!r} holds values of several types: {error}; convert it") from None
        kind = column.type
        if name in numbers:
            if not (pa.types.is_floating(kind) or pa.types.is_integer(kind)):
                raise ValueError(f"dataset: column {name!r}: want a number in each row, got {kind}; convert it")
            continue
        is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
        if pa.types.is_null(kind) or (is_list and pa.types.is_null(kind.value_type)):
            continue  # empty responses, which the collator names
        if not (is_list and pa.types.is_integer(kind.value_type)):
            raise ValueError(f"dataset: column {name!r}: want a list of token ids in each row, got {kind}; tokenise it")
        flat: Any = column.flatten() if table is None else pa.chunked_array(chunk.flatten() for chunk in column.chunks)
        least, most = cast(Any, pc).min_max(flat).as_py().values()
        if least is not None and not 0 <= least <= most < vocabulary:
            raise ValueError(
                f"dataset: column {name!r}: want token ids in [0, {vocabulary}), as the model has embeddings, got {least} to "
                f"{most}; use the model's own tokenizer"
            )
