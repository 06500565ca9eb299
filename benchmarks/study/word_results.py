"""The rows of the word problems as tables and a picture: means over seeds, differences seed by seed, no ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.study.claims import FEWEST, shown
from benchmarks.study.figures import STYLE
from benchmarks.study.result import LABELS, spread, table
from benchmarks.study.word_problems import METHODS, RATES, TUNING_SEED, grid, is_of, scores, tuned
from tspin.comparison import Estimate

Row = dict[str, Any]
Value = Callable[[Row], float | None]


def _fresh(point: Row) -> float | None:
    # Of the pairs whose y' is not y; a share of few is no number.
    pairs = round(point.get("fresh_rows", 0) * (1 - point.get("fresh_identical", 0)))
    return point.get("fresh_share") if pairs >= FEWEST else None


MEASURES: tuple[tuple[str, Value], ...] = (
    ("Unseen numbers, greedy", lambda p: p["test"]["greedy"]),
    ("Unseen numbers, sampled", lambda p: p["test"]["sampled"]),
    ("Unseen phrasing, greedy", lambda p: p["templates"]["greedy"]),
    ("Fresh y<y'", _fresh),
)


def write(rows: Sequence[Row], folder: Path) -> str:
    """Draw word_problems_SIZE.png into `folder`, once an arm of the comparison has run, and return the tables."""
    if any(row["phase"] == "test" for row in rows):
        _draw(rows, folder / f"word_problems_{rows[0]['size']}.png")
    return f"{tuning_table(rows)}\n\n{comparison_table(rows)}\n\n{changes(rows)}\n"


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
    return "\n".join(lines)


def comparison_table(rows: Sequence[Row]) -> str:
    """Each measure of each method by iteration, mean and standard deviation over seeds, and paired differences to T-SPIN with their
    95 % intervals: of the last policies, and of means over those from iteration 1 on."""
    steps = range(
        -1, max((row["iterations"][-1]["iteration"] for row in rows if row["phase"] == "test"), default=-1) + 1
    )
    lines = []
    for title, get in MEASURES:
        for (method, rate), mine in _arms(rows).items():
            cells = [spread(_estimate(mine, t, get)) for t in steps]
            less = [
                "" if method == "tspin" else shown(Estimate.of(differences(rows, mine, get, first)), sign=True)
                for first in (steps[-1], 1)
            ]
            name = f"{LABELS[method]}, {title[0].lower()}{title[1:]}"
            lines.append([name, f"{rate:g}", str(len(mine)), *cells, *less])
    headers = ["", "rate", "seeds", *("pi_0" if t < 0 else str(t) for t in steps)]
    headers += ["last, less T-SPIN", "mean from 1 on, less T-SPIN"]
    return table(headers, lines)


def changes(rows: Sequence[Row]) -> str:
    """How each method's policies change from one iteration to the next, greedy on unseen numbers, and its largest drop less
    T-SPIN's, with 95 % intervals."""
    lines = []
    for (method, rate), mine in _arms(rows).items():
        text = ", ".join(shown(Estimate.of(found), sign=True) for found in zip(*map(_changes, mine)))
        drop = Estimate.of(_paired(rows, mine, lambda row: -min(_changes(row))))
        less = "" if method == "tspin" else f"; largest drop less T-SPIN's {shown(drop, sign=True)}"
        lines.append(f"- {LABELS[method]} at {rate:g}: {text}{less}")
    return "\n".join(["Changes from one policy to the next, greedy on unseen numbers:\n", *lines])


def _arms(rows: Sequence[Row]) -> dict[tuple[str, float], list[Row]]:
    # The runs of the comparison by method and rate: of each method those at its tuned rate first.
    keys = {(row["method"], row["rate"]) for row in rows if row["phase"] == "test"}
    order = sorted(keys, key=lambda key: (METHODS.index(key[0]), key[1] != tuned(rows, key[0]), key[1]))
    return {key: [row for row in rows if is_of(row, "test", key[0]) and row["rate"] == key[1]] for key in order}


def _changes(row: Row) -> list[float]:
    greedy = [point["test"]["greedy"] for point in row["iterations"]]
    return [after - before for before, after in pairwise(greedy)]


def differences(rows: Sequence[Row], mine: Sequence[Row], get: Value, first: int) -> list[float]:
    """`mine` less T-SPIN, means over the policies from iteration `first` on, of the pairs of arms that began with the same pupil,
    bit for bit."""

    def of(row: Row) -> float | None:
        values = [get(point) for point in row["iterations"] if point["iteration"] >= first]
        return None if None in values or not values else mean(values)  # type: ignore[type-var]

    return _paired(rows, mine, of)


def _paired(rows: Sequence[Row], mine: Sequence[Row], of: Callable[[Row], float | None]) -> list[float]:
    # At its tuned rate, which is the first.
    base = next((arm for (method, _), arm in _arms(rows).items() if method == "tspin"), [])
    theirs = {row["pupil"]: of(row) for row in base}
    pairs = [(of(row), theirs.get(row["pupil"])) for row in mine]
    return [ours - other for ours, other in pairs if ours is not None and other is not None]


def _estimate(rows: Sequence[Row], t: int, get: Value) -> Estimate | None:
    """Over the seeds, where every one has a value."""
    values = [get(point) for row in rows for point in row["iterations"] if point["iteration"] == t]
    return None if None in values else Estimate.of(values)  # type: ignore[arg-type]


def _draw(rows: Sequence[Row], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7), layout="constrained")
    for axis, (title, get) in zip(figure.subplots(2, 2).flat, MEASURES):
        for (method, rate), mine in _arms(rows).items():
            if rate != (tuned(rows, method) or rate):
                continue
            colour, marker = STYLE[method]
            for row in mine:
                thin = {"color": colour, "alpha": 0.3, "linewidth": 0.8}
                _plot(axis, [(p["iteration"], get(p)) for p in row["iterations"]], **thin)
            means = [(p["iteration"], _estimate(mine, p["iteration"], get)) for p in mine[0]["iterations"]]
            points = [(t, None if estimate is None else estimate.mean) for t, estimate in means]
            _plot(axis, points, color=colour, marker=marker, markersize=5, label=LABELS[method])
        axis.set(title=title, xlabel="iteration (-1: initial policy)", ylabel="share", ylim=(0, 1))
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)
    figure.suptitle("Word problems: means over seeds (thin lines: seeds)")
    figure.savefig(path, dpi=110)


def _plot(axis: Any, points: Sequence[tuple[int, float | None]], **style: Any) -> None:
    known = [(t, value) for t, value in points if value is not None]
    axis.plot([t for t, _ in known], [value for _, value in known], **style)
