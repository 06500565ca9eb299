"""What a run shows a person: a table of its iterations and one picture, from the files the loop writes. Reads nothing else,
works on an unfinished run, and computes nothing but averages.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

# Okabe-Ito, distinguishable to colour-blind eyes; one colour a role throughout.
_COLOURS = {"chosen": "#0072B2", "rejected": "#D55E00", "proto": "#009E73", "grey": "#555555"}
_ROLES = {"chosen": "real", "rejected": "synthetic", "proto": "proto"}
# Header, key, format; the value is eval.json's where the key is there, else the mean over the iteration's training log.
_COLUMNS = (
    ("exact match", "exact_match", ".3f"),
    ("sampled match", "exact_match_sampled", ".3f"),
    ("eval logp", "logprob", ".1f"),
    ("fresh y<y'", "fresh_share", ".2f"),
    ("logp real", "logps/chosen", ".1f"),
    ("logp synth.", "logps/rejected", ".1f"),
    ("logp proto", "logps/proto", ".1f"),
    ("margin", "rewards/margins", ".1f"),
    ("hist. margin", "rewards/history_margins", ".1f"),
)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The training log of one iteration: its lines that carry a loss, in order; empty where there is no file."""
    if not path.exists():
        return []
    lines = path.read_bytes().splitlines()
    entries = [_numbers(line, f"{path}, line {number}") for number, line in enumerate(lines, 1) if line.strip()]
    return [entry for entry in entries if "loss" in entry]


def _numbers(text: bytes, where: str) -> dict[str, Any]:
    """The numbers of a JSON object."""
    try:
        entry = json.loads(text)
        if isinstance(entry, dict):
            return {key: value for key, value in entry.items() if isinstance(value, (int, float))}
        problem = f"want a JSON object, got {type(entry).__name__}"
    except (ValueError, RecursionError) as error:
        problem = str(error)
    raise ValueError(f"{where} is damaged: {problem}; restore it, or delete the file") from None


def read_iterations(run_dir: str | Path) -> list[dict[str, Any]]:
    """One dict an iteration, from -1 (the initial policy) on: `iteration`, its evaluation, the mean of its training log under the
    log's own names, and `log`, the log itself. Iterations not yet trained are left out.

    Raises:
        ValueError: the directory holds no run, or a file of it is damaged.
    """
    directory = Path(run_dir)
    if not (directory / "config.yaml").exists():
        raise ValueError(f"run: want a run directory, got {directory}, which has no config.yaml")
    rows = []
    for t, evaluation, log in [
        (-1, directory / "eval_initial.json", []),
        *(
            (int(path.name[5:]), path / "eval.json", read_metrics(path / "metrics.jsonl"))
            for path in sorted(directory.glob("iter_[0-9]*"))
            if path.name[5:].isdecimal()
        ),
    ]:
        scores = _numbers(evaluation.read_bytes(), str(evaluation)) if evaluation.exists() else {}
        keys = {key for entry in log for key in entry}
        means = {key: _mean([entry[key] for entry in log if key in entry]) for key in keys}
        if scores or log:
            rows.append({**means, **scores, "iteration": t, "log": log})
    return rows


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def iteration_table(run_dir: str | Path) -> Table:
    """The table shown after each iteration: held-out scores of the policy it ended with, training means on the way."""
    rows = read_iterations(run_dir)
    table = Table(title=f"{Path(run_dir).name}: log-probs in nats per response", box=box.SIMPLE, padding=(0, 1, 0, 0))
    table.add_column("iter.", no_wrap=True)
    columns = [column for column in _COLUMNS if any(column[1] in row for row in rows)]
    for header, _, _ in columns:
        table.add_column(header.replace(" ", "\n"), justify="right", no_wrap=True)
    for row in rows:
        cells = [format(row[key], spec) if key in row else "" for _, key, spec in columns]
        table.add_row("initial" if row["iteration"] < 0 else str(row["iteration"]), *cells)
    return table


def write_report(run_dir: str | Path) -> Path:
    """Write `report/report.png` and `report/table.md` into the run directory and return the folder."""
    directory = Path(run_dir)
    rows = read_iterations(directory)
    folder = directory / "report"
    folder.mkdir(exist_ok=True)
    (folder / "table.md").write_text(_markdown(rows), encoding="utf-8")
    _plot(rows, folder / "report.png", directory.name)
    return folder


def _markdown(rows: list[dict[str, Any]]) -> str:
    columns = [column for column in _COLUMNS if any(column[1] in row for row in rows)]
    lines = [
        "| iteration | " + " | ".join(header for header, _, _ in columns) + " |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for row in rows:
        cells = [format(row[key], spec) if key in row else "" for _, key, spec in columns]
        lines.append("| " + " | ".join(["initial" if row["iteration"] < 0 else str(row["iteration"]), *cells]) + " |")
    return "\n".join(lines) + "\n"


def _plot(rows: list[dict[str, Any]], path: Path, title: str) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 6.5), layout="constrained")
    figure.suptitle(title)
    axes = figure.subplots(2, 2)

    scores = axes[0, 0]
    for key, label, style in (("exact_match", "greedy", "-o"), ("exact_match_sampled", "sampled", "--s")):
        _curve(scores, rows, key, style, color=_COLOURS["grey"], label=label)
    scores.set(title="Held-out exact match", xlabel="iteration (-1: initial policy)", ylabel="share", ylim=(0, 1))

    fresh = axes[0, 1]
    _curve(fresh, rows, "fresh_share", "-o", color=_COLOURS["rejected"], label="logp(real) < logp(fresh sample)")
    fresh.set(title="Fresh pairs in the wrong order", xlabel="iteration", ylabel="share", ylim=(0, 1))

    # Each iteration's log side by side, as one continuous axis of optimizer steps.
    start, borders = 0, []
    series: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        for entry in row["log"]:
            for key, value in entry.items():
                series.setdefault(key, []).append((start + entry.get("step", 0), value))
        if row["log"]:
            start += row["log"][-1].get("step", 0)
            borders.append(start)
    for axis, prefix, name, unit in (
        (axes[1, 0], "logps", "Log-probability of a response", "nats"),
        (axes[1, 1], "entropy", "Entropy", "nats per token"),
    ):
        for key, role in _ROLES.items():
            points = series.get(f"{prefix}/{key}", [])
            if points:
                axis.plot(*zip(*points), color=_COLOURS[key], label=role, linewidth=1.2)
        for border in borders[:-1]:
            axis.axvline(border, color="#cccccc", linewidth=0.8, zorder=0)
        axis.set(title=name, xlabel="optimizer step (lines: iterations)", ylabel=unit)
    for axis in axes.flat:
        axis.grid(alpha=0.25)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(frameon=False)
    figure.savefig(path, dpi=110)


def _curve(axis: Any, rows: list[dict[str, Any]], key: str, style: str, **options: Any) -> None:
    points = [(row["iteration"], row[key]) for row in rows if key in row]
    if points:
        axis.plot(*zip(*points), style, **options)
        axis.set_xticks([x for x, _ in points])
