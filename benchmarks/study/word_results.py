"""The rows of the word problems as a table and a picture: means over seeds, differences seed by seed, no ranks."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from benchmarks.study.figures import STYLE
from benchmarks.study.word_problems import METHODS, RATES, TUNING_SEED, grid, is_of, scores, tuned

Row = dict[str, Any]
_PANELS = (
    ("Unseen numbers, greedy", lambda p: p["test"]["greedy"]),
    ("Unseen numbers, sampled at temperature 1", lambda p: p["test"]["sampled"]),
    ("Unseen phrasing, greedy", lambda p: p["templates"]["greedy"]),
    ("Fresh pairs with logp(y) < logp(y')", lambda p: p.get("fresh_share")),
)


def write(rows: Sequence[Row], folder: Path) -> str:
    """Write table.md and, once an arm of the comparison has run, word_problems.png to `folder`; return the table."""
    text = f"{tuning_table(rows)}\n{comparison_table(rows)}"
    (folder / "table.md").write_text(text, encoding="utf-8")
    if any(row["phase"] == "test" for row in rows):
        _draw(rows, folder / "word_problems.png")
    return text


def tuning_table(rows: Sequence[Row]) -> str:
    """Greedy exact match on validation numbers at the last iteration, by method and rate; the highest is marked."""
    lines = [f"Tuning, seed {TUNING_SEED}: greedy exact match on validation numbers at the last iteration.\n"]
    for method in RATES:
        found, rates, best = scores(rows, method), grid(rows, method), tuned(rows, method)
        cells = [
            f"{rate:g}: {found[rate]:.3f}{' *' * (rate == best)}" if rate in found else f"{rate:g}: -" for rate in rates
        ]
        edge = " (the edge of the grid)" if best in (rates[0], rates[-1]) else ""
        lines.append(f"- {method}: {', '.join(cells)}{edge}")
    return "\n".join([*lines, ""])


def comparison_table(rows: Sequence[Row]) -> str:
    """Means and standard deviations over seeds at the first and last policy, and paired differences to T-SPIN."""
    columns = ("method", "rate", "seeds", "unseen numbers: greedy", "sampled", "unseen phrasing: greedy", "fresh y<y'")
    lines = [f"| {' | '.join((*columns, 'less T-SPIN, greedy'))} |", "|---" * 8 + "|"]
    first = [row for row in rows if row["phase"] == "test"]
    pupils = list({row["pupil"]: row["iterations"][0] for row in first}.values())
    if pupils:
        cells = [_spread([get(p) for p in pupils]) for _, get in _PANELS[:3]]
        lines.append(f"| initial | | {len(pupils)} | {' | '.join(cells)} | | |")
    for method in METHODS:
        mine = [row for row in rows if is_of(row, "test", method)]
        if mine:
            cells = [_spread([get(row["iterations"][-1]) for row in mine]) for _, get in _PANELS]
            difference = "" if method == "tspin" else _spread(differences(rows, method, _PANELS[0][1]), sign=True)
            rates = ", ".join(sorted({f"{row['rate']:g}" for row in mine}))
            lines.append(f"| {method} | {rates} | {len(mine)} | {' | '.join(cells)} | {difference} |")
    return "\n".join([*lines, ""])


def differences(rows: Sequence[Row], method: str, get: Callable[[Row], float]) -> list[float]:
    """`method` less T-SPIN at the last iteration, of the pairs of arms that began with the same pupil, bit for bit."""
    theirs = {row["pupil"]: row for row in rows if is_of(row, "test", "tspin")}
    mine = [row for row in rows if is_of(row, "test", method) and row["pupil"] in theirs]
    return [get(row["iterations"][-1]) - get(theirs[row["pupil"]]["iterations"][-1]) for row in mine]


def _spread(values: Sequence[float | None], sign: bool = False) -> str:
    known = [value for value in values if value is not None and not math.isnan(value)]
    if not known:
        return "-"
    spec = "+.3f" if sign else ".3f"
    return f"{mean(known):{spec}}" + (f" ({stdev(known):.3f})" if len(known) > 1 else "")


def _draw(rows: Sequence[Row], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7), layout="constrained")
    for axis, (title, get) in zip(figure.subplots(2, 2).flat, _PANELS):
        for method, (colour, marker) in STYLE.items():
            mine = [row["iterations"] for row in rows if is_of(row, "test", method)]
            if not mine:
                continue
            curves = [[(p["iteration"], get(p)) for p in row if get(p) is not None] for row in mine]
            for curve in curves:
                axis.plot(*zip(*curve), color=colour, alpha=0.3, linewidth=0.8)
            means = [(t, mean(c[i][1] for c in curves)) for i, (t, _) in enumerate(min(curves, key=len))]
            axis.plot(*zip(*means), color=colour, marker=marker, markersize=5, label=method)
        axis.set(title=title, xlabel="iteration (-1: initial policy)", ylabel="share", ylim=(0, 1))
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)
    figure.suptitle("Word problems: means over seeds (thin lines: seeds)")
    figure.savefig(path, dpi=110)
