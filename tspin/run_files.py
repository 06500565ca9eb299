"""What a run directory holds, read back for people: config, scores, training log, pairs, samples, timings.

Works on an unfinished run: whatever is not there yet, or is being written, reads as nothing. It computes nothing but means.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tspin.config import read_values, typed_value

logger = logging.getLogger(__name__)

_COMPUTED_WITH = ("iterations", "seed", "num_train_epochs", "max_steps")
_MEMBERS = ("logps/chosen", "logps/rejected", "logps/proto", "rewards/chosen", "rewards/rejected")
_PAIRS = pa.schema(
    [
        pa.field("set", pa.string(), nullable=False),
        pa.field("identical", pa.bool_(), nullable=False),
        *((name, pa.float64()) for name in _MEMBERS),
    ]
)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The training log of one iteration: its lines that carry a loss, in order; empty where there is no file."""
    return [_numbers(entry) for entry in read_json_lines(path) if "loss" in entry]


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines, but for a last line that is still being written.

    Raises:
        ValueError: another line is damaged; it is named.
    """
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    whole = lines if lines and lines[-1].endswith(b"\n") else lines[:-1]
    return [_json_object(line, f"{path}, line {number}") for number, line in enumerate(whole, 1) if line.strip()]


def _json_object(text: bytes, where: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
        if isinstance(value, dict):
            return value
        problem = f"want a JSON object, got {type(value).__name__}"
    except (ValueError, RecursionError) as error:
        problem = str(error)
    raise ValueError(f"{where} is damaged: {problem}; restore it, or delete the file") from None


def _read_config(path: Path) -> dict[str, Any]:
    """The flat keys, of which only those are checked that somebody computes with: another version may have had others."""
    values = read_values(path)
    try:
        values |= {key: typed_value(key, values[key]) for key in _COMPUTED_WITH if key in values}
        re.compile(values.get("answer_pattern") or "")
    except (TypeError, ValueError, re.error) as error:
        raise ValueError(f"{path} is damaged: {error}; restore it, or correct the line") from None
    return values


def _read_timings(path: Path) -> list[dict[str, Any]]:
    """Of timings.jsonl; none, with a warning, where it is damaged: it tells nothing that a report could not be without."""
    try:
        entries = read_json_lines(path)
        if all(
            {"stage", "seconds", "finished"} <= e.keys() and isinstance(e["seconds"], (int, float)) for e in entries
        ):
            return entries
        problem = f"{path} is damaged: want a stage and its seconds in each line; restore it, or delete the file"
    except ValueError as error:
        problem = str(error)
    logger.warning("%s; the report has no times", problem)
    return []


def _numbers(entry: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in entry.items() if isinstance(value, (int, float))}


def read_iterations(run_dir: str | Path) -> list[dict[str, Any]]:
    """One dict an iteration, from -1 (the initial policy) on: `iteration`, its evaluation, the mean of its training log under the
    log's own names, and `log`, the log itself. Iterations not yet trained are left out.

    Raises:
        ValueError: the directory holds no run, or a file of it is damaged.
    """
    directory = Path(run_dir)
    if lacks := _lacks(directory):
        below = sorted(str(path.parent) for depth in ("*", "*/*") for path in directory.glob(f"{depth}/run.json"))
        remedy = f"give the runs below it: {' '.join(below[:6])}{' ...' * (len(below) > 6)}"
        raise ValueError(
            f"run: want a run directory, got {directory}, which has no {lacks}; "
            f"{remedy if below else 'give the output_dir of `tspin run`'}"
        )
    rows = []
    for t, evaluation, log in [
        (-1, directory / "eval_initial.json", []),
        *((t, path / "eval.json", read_metrics(path / "metrics.jsonl")) for t, path in iteration_folders(directory)),
    ]:
        scores = _numbers(_json_object(evaluation.read_bytes(), str(evaluation))) if evaluation.exists() else {}
        keys = {key for entry in log for key in entry}
        means = {key: _mean([entry[key] for entry in log if key in entry]) for key in keys}
        if scores or log:
            rows.append({**means, **scores, "iteration": t, "log": log})
    return rows


def iteration_folders(directory: Path) -> list[tuple[int, Path]]:
    """The folders of a run's iterations by number; what else begins like one, a copy say, is left alone."""
    named = (path for path in directory.glob("iter_*") if path.name[5:].isdecimal() and path.is_dir())
    return sorted((int(path.name[5:]), path) for path in named)


def _lacks(directory: Path) -> str | None:
    """What a run binds its directory with, and this one does not hold: a config.yaml alone may be anybody's."""
    known = {name: (directory / name).exists() for name in ("config.yaml", "run.json", "state.json")}
    return "config.yaml" if not known["config.yaml"] else None if any([*known.values()][1:]) else "run.json"


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


@dataclass(frozen=True)
class Run:
    """One run directory as it stands: its flat config, `read_iterations`, run.json, the stages that are done, timings.jsonl."""

    directory: Path
    config: dict[str, Any]
    rows: list[dict[str, Any]]
    record: dict[str, Any] = field(default_factory=dict)
    stages: dict[str, dict[str, str]] = field(default_factory=dict)
    timings: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def read(cls, run_dir: str | Path) -> Run:
        """The run in a directory.

        Raises:
            ValueError: the directory holds no run, or a file of it is damaged.
        """
        directory = Path(run_dir)
        rows = read_iterations(directory)

        def json_of(name: str, *objects: str) -> dict[str, Any]:
            # `objects`: keys whose values are objects too, where they are there.
            path = directory / name
            value = _json_object(path.read_bytes(), str(path)) if path.exists() else {}
            for key in objects:
                if not isinstance(value.get(key, {}), dict):
                    raise ValueError(f"{path} is damaged: want an object under {key!r}; restore it, or delete the file")
            return value

        stages = json_of("state.json", "done").get("done", {})
        return cls(
            directory=directory,
            config=_read_config(directory / "config.yaml"),
            rows=rows,
            record=json_of("run.json", "versions", "data", "eval_data", "model"),
            stages={name: made for name, made in stages.items() if isinstance(made, dict)},
            timings=_read_timings(directory / "timings.jsonl"),
        )

    @property
    def seed(self) -> int:
        return self.config.get("seed", 42)

    def score(self, t: int, key: str) -> float | None:
        """What iteration t (-1: the initial policy) has under `key` of `read_iterations`; None where it has nothing yet."""
        return next((row.get(key) for row in self.rows if row["iteration"] == t), None)

    def pairs(self, t: int) -> dict[str, np.ndarray] | None:
        """The pairs of `tspin.pairs` at the end of iteration t, nan for null; None where there are none.

        Raises:
            ValueError: the file is damaged.
        """
        path = self.directory / f"iter_{t:02d}" / "pairs.parquet"
        if not path.exists():
            return None
        try:
            table = pq.read_table(path).select(_PAIRS.names).cast(_PAIRS)
            return {name: table[name].to_numpy() for name in table.column_names}
        except (KeyError, OSError, ValueError, pa.ArrowException) as error:
            problem, *_ = [*str(error).splitlines(), ""]
            raise ValueError(
                f"{path} is damaged: want a parquet file as tspin.pairs makes it: {problem}; "
                "restore it, or delete the file"
            ) from None

    def prompts(self, count: int) -> list[Prompt]:
        """The first rows of the training data: what `responses` can be shown beside. Empty before the first triplets are built."""
        for _, folder in iteration_folders(self.directory):
            path = folder / "triplets.parquet"
            with contextlib.suppress(OSError, pa.ArrowException):
                table = pq.read_table(path, columns=["row", "prompt", "chosen"])
                rows = sorted({row["row"]: row for row in table.to_pylist()}.values(), key=lambda row: row["row"])
                return [Prompt(row["row"], row["prompt"], row["chosen"]) for row in rows[:count]]
        return []

    def responses(self, rows: Sequence[int]) -> dict[str, dict[int, tuple[str, str]]]:
        """By source, then by row: text and finish reason. Sources: "y0", the proto responses; "π0", "π1", ..., the policies."""
        sources = {"y0": self.directory / "proto"}
        for t, folder in iteration_folders(self.directory):
            sources |= {f"π{t}": folder / "synthetic"} if (folder / "synthetic").exists() else {}
            sources |= {f"π{t + 1}": folder / "fresh"} if (folder / "fresh").exists() else {}
        found = {name: _responses(directory, set(rows)) for name, directory in sources.items()}
        return {name: texts for name, texts in found.items() if texts}


class Prompt(NamedTuple):
    """A row of the training data: its number, the prompt, and the annotated response."""

    row: int
    text: str
    response: str


def _responses(directory: Path, rows: set[int]) -> dict[int, tuple[str, str]]:
    found: dict[int, tuple[str, str]] = {}
    for path in sorted(directory.glob("shard-*.parquet")):
        if rows <= found.keys():
            break
        with contextlib.suppress(OSError, pa.ArrowException):
            table = pq.read_table(path, columns=["row", "text", "finish_reason"])
            own = {row["row"]: (row["text"], row["finish_reason"]) for row in table.to_pylist()}
            found |= {row: own[row] for row in rows & own.keys()}
    return found
