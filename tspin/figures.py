"""The pictures of a report that show the course of a run: its scores by iteration and its training log.

Draws from what `tspin.run_files` reads; a panel without data is left out. What single pairs show is in tspin.pair_figures.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple, cast

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tspin.comparison import Estimate, Group
from tspin.pair_figures import likelihoods, rewards
from tspin.plotting import (
    BLACK,
    BLUE,
    CROWDED,
    GREY,
    LOOK,
    ORANGE,
    PURPLE,
    ROLES,
    SKY,
    WIDTH,
    Picture,
    drawable,
    end_label,
    finish,
    iteration_ticks,
    legend,
    short_names,
    style_of,
)
from tspin.run_files import Run
from tspin.tables import scores_of

_BINS = 24  # points that an iteration's log is averaged into, at most


class _Line(NamedTuple):
    key: str
    label: str
    colour: str
    style: str = "-"


# Title, unit and lines of a panel where one method is shown.
_PANELS: tuple[tuple[str, str, tuple[_Line, ...]], ...] = (
    ("Rewards", "reward", tuple(_Line(f"rewards/{m}", label, c) for m, label, c in ROLES)),
    ("Log-likelihoods", "nats per response", tuple(_Line(f"logps/{m}", label, c) for m, label, c in ROLES)),
    (
        "Margins of the rewards",
        "difference of rewards",
        (
            _Line("rewards/margins", "current, y less y'", PURPLE),
            _Line("rewards/history_margins", "history, y' less y0", SKY, "--"),
        ),
    ),
    (
        "Gradient weights",
        "weight, from 0 to 1",
        (
            _Line("weights/current", "current, sigmoid(-u)", PURPLE),
            _Line("weights/history", "history, sigmoid(-v)", SKY, "--"),
        ),
    ),
    ("Entropy", "nats per token", tuple(_Line(f"entropy/{m}", label, c) for m, label, c in ROLES)),
    ("Lengths", "tokens", tuple(_Line(f"lengths/{m}", label, c) for m, label, c in ROLES)),
    (
        "Shares of triplets",
        "share",
        (
            _Line("rewards/accuracies", "reward favours y", BLUE),
            _Line("saturated", "saturated", ORANGE),
            _Line("misaligned", "misaligned", BLACK, ":"),
            _Line("identical", "y' = y", GREY, "--"),
            _Line("truncated", "truncated", PURPLE, "--"),
        ),
    ),
    ("Loss", "loss", (_Line("loss", "loss", GREY),)),
)
# The same for several methods: a line a method, a row of panels for each of these.
_ROWS: tuple[tuple[tuple[str, str], ...], ...] = (
    tuple((f"rewards/{m}", f"Reward of {label}") for m, label, _ in ROLES),
    tuple((f"logps/{m}", f"Log-likelihood of {label}, nats") for m, label, _ in ROLES),
    (
        ("rewards/margins", "Current margin"),
        ("rewards/history_margins", "History margin"),
        ("rewards/accuracies", "Share with r(y) > r(y')"),
    ),
    (
        ("weights/current", "Current gradient weight"),
        ("weights/history", "History gradient weight"),
        ("loss", "Loss (of each method's own)"),
    ),
    tuple((f"entropy/{m}", f"Entropy of {label}, nats/token") for m, label, _ in ROLES),
    tuple((f"lengths/{m}", f"Length of {label}, tokens") for m, label, _ in ROLES),
    (("saturated", "Share saturated"), ("misaligned", "Share misaligned"), ("identical", "Share with y' = y")),
)


def draw(groups: Sequence[Group]) -> dict[str, Picture]:
    """The pictures of these groups by name; those without any data are left out."""
    pictures = {}
    names = short_names([group.label for group in groups])
    groups = [replace(group, label=name) for group, name in zip(groups, names)]
    with rc_context(LOOK):
        for name, picture in (
            ("scores", _scores(groups)),
            ("dynamics", _dynamics(groups[0]) if len(groups) == 1 else _dynamics_of_methods(groups)),
            ("rewards", rewards(groups)),
            ("likelihoods", likelihoods(groups)),
        ):
            if picture is not None:
                pictures[name] = picture
    return pictures


def _scores(groups: Sequence[Group]) -> Picture | None:
    """What `scores_of` names, by iteration: means over seeds with standard deviations, and each seed as a thin line."""
    panels, alts, labels = [], [], []
    for key, _, spec, title in scores_of(groups):
        curves = []
        for group in groups:
            steps = sorted({row["iteration"] for run in group.runs for row in run.rows if key in row})
            points = [(t, estimate) for t in steps if (estimate := Estimate.of([*group.values(t, key).values()]))]
            points = [(t, estimate) for t, estimate in points if math.isfinite(estimate.mean)]
            if points:
                curves.append((group, points))
        if curves:
            panels.append((key, title, spec, curves))
    if not panels:
        return None
    columns, height = (2, 3.1) if len(panels) <= 4 else (3, 2.5)
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(WIDTH, height * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).flat
    # Beside narrow panels there is room for numbers, and for names none.
    is_crowded = len(groups) > (CROWDED if columns == 2 else 1)
    step = min(0.05, 0.4 / len(groups))
    for axis, (key, title, spec, curves) in zip(grid, panels):
        texts = []
        for group, points in curves:
            index = groups.index(group)
            colour, style = style_of(index)
            shift = step * (index - (len(groups) - 1) / 2)
            xs, means = [t + shift for t, _ in points], [estimate.mean for _, estimate in points]
            bars = [_bar(group, key, t, estimate) for t, estimate in points]
            axis.errorbar(
                xs, means, yerr=bars, color=colour, ls=style, marker="o", ms=4.5, capsize=2.5, elinewidth=1, lw=1.6
            )
            for run in group.runs if len(group.runs) > 1 else ():
                own = [(t + shift, score) for t, _ in points if (score := run.score(t, key)) is not None]
                axis.plot(*zip(*own), color=colour, ls=style, lw=0.7, alpha=0.35)
            if not is_crowded:
                label = group.label if len(groups) > 1 else format(means[-1], spec)
                texts.append(end_label(axis, means[-1], label, colour))
            alts.append(f"{title}, {group.label}: from {means[0]:{spec}} to {means[-1]:{spec}}")
        axis.set(
            title=textwrap.fill(drawable(title[0].upper() + title[1:]), 115 // columns),
            xlabel="policy after iteration (π₀: initial)",
        )
        if key.startswith(("exact_match", "accuracy")):
            axis.set_ylim(-0.02, 1.02)
        elif key == "fresh_share":
            axis.set_ylim(bottom=0)
        iteration_ticks(axis, [t for _, points in curves for t, _ in points])
        labels.append((axis, texts))
    for axis in figure.axes[len(panels) :]:
        axis.remove()
    if is_crowded:
        legend(figure, [group.label for group in groups])
    return finish(figure, labels, f"Scores by iteration. {'; '.join(alts)}.")


def _bar(group: Group, key: str, t: int, estimate: Estimate) -> float:
    """Half an error bar: the standard deviation over seeds, or of one seed's share the standard error of its rows."""
    if estimate.sd is not None:
        return estimate.sd if math.isfinite(estimate.sd) else 0.0
    if key.startswith("tasks/"):
        error = "tasks_stderr/" + key.removeprefix("tasks/")
        return next((run.score(t, error) or 0.0 for run in group.runs if run.score(t, key) is not None), 0.0)
    is_of_rows = key.startswith(("exact_match", "accuracy"))
    rows = "rows" if is_of_rows else "fresh_rows" if key == "fresh_share" else ""
    known = [run for run in group.runs if run.score(t, key) is not None and run.score(t, rows)]
    if not known or not 0 <= estimate.mean <= 1:
        return 0.0
    count = cast(float, known[0].score(t, rows))
    if key == "fresh_share":  # y' = y is left out of the share, and not of the rows
        count *= 1 - (known[0].score(t, "fresh_identical") or 0.0)
    return math.sqrt(estimate.mean * (1 - estimate.mean) / count) if count else 0.0


def _log_length(run: Run, t: int, log: list[dict[str, Any]]) -> float:
    """Optimizer steps of an iteration: its last one, or while it is under way what its epochs foretell."""
    step, epoch = log[-1].get("step", len(log)), log[-1].get("epoch")
    if f"iter_{t:02d}/train" in run.stages or not epoch:
        return step
    limits = [run.config.get("num_train_epochs", 3.0), run.config.get("max_steps", -1)]
    epochs, steps = (v[min(t, len(v) - 1)] if isinstance(v, list) else v for v in limits)
    return max(step, steps if steps > 0 else step / epoch * epochs)


def _series(group: Group, key: str) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """For each iteration x (iterations), mean over seeds and standard deviation over seeds of `key` in bins of the log."""
    curves = []
    for t in sorted({row["iteration"] for run in group.runs for row in run.rows}):
        logs = [(run, row["log"]) for run in group.runs for row in run.rows if row["iteration"] == t and row["log"]]
        bins: dict[int, list[tuple[float, float]]] = {}
        count = min(_BINS, max((len(log) for _, log in logs), default=1))
        for run, log in logs:
            length, own = _log_length(run, t, log), {}
            for i, entry in enumerate(log):
                # Without y', whether it is y or was cut says nothing.
                is_known = key not in ("identical", "truncated") or "logps/rejected" in entry
                if is_known and math.isfinite(entry.get(key, math.nan)):
                    at = min(entry.get("step", i + 1) / length, 1.0)
                    own.setdefault(max(math.ceil(at * count - 1e-9) - 1, 0), []).append((t + at, entry[key]))
            for index, points in own.items():
                bins.setdefault(index, []).append(tuple(np.mean(points, axis=0)))
        if bins:
            stacks = [np.array(bins[index]) for index in sorted(bins)]
            x, y = np.array([stack.mean(0) for stack in stacks]).T
            sd = np.array([stack[:, 1].std(ddof=1) if len(stack) > 1 else 0.0 for stack in stacks])
            curves.append((x, y, sd))
    return curves


def _draw_series(axis: Axes, curves: list[tuple[np.ndarray, np.ndarray, np.ndarray]], colour: str, style: Any) -> None:
    for x, y, sd in curves:
        axis.plot(x, y, color=colour, ls=style, lw=1.5, marker="." if len(x) < 9 else None, ms=5)
        if sd.any():
            axis.fill_between(x, y - sd, y + sd, color=colour, alpha=0.15, lw=0)


def _dress_steps(axis: Axes, groups: Sequence[Group], title: str, unit: str = "") -> None:
    iterations = {row["iteration"] for group in groups for run in group.runs for row in run.rows if row["log"]}
    axis.set(title=title, ylabel=unit, xlim=(min(iterations) - 0.02, max(iterations) + 1.02))
    axis.grid(False, axis="x")
    for t in sorted(iterations)[1:]:
        axis.axvline(t, color="#cccccc", lw=0.8, zorder=0)
    iteration_ticks(axis, iterations, offset=0.5)
    axis.tick_params(axis="x", length=0)


def _dynamics(group: Group) -> Picture | None:
    """What the training log holds of one method, over iterations side by side."""
    panels = []
    for title, unit, lines in _PANELS:
        drawn = [(line, curves) for line in lines if (curves := _series(group, line.key))]
        if drawn:
            panels.append((title, unit, drawn))
    if not panels:
        return None
    rows = -(-len(panels) // 2)
    figure = Figure(figsize=(WIDTH, 2.5 * rows + 0.3), layout="constrained")
    figure.subplots(rows, 2, squeeze=False)
    labels = []
    for axis, (title, unit, drawn) in zip(figure.axes, panels):
        for line, curves in drawn:
            _draw_series(axis, curves, line.colour, line.style)
        _dress_steps(axis, [group], title, unit)
        labels.append((axis, [end_label(axis, curves[-1][1][-1], line.label, line.colour) for line, curves in drawn]))
    for axis in figure.axes[len(panels) :]:
        axis.remove()
    for axis in figure.axes[-2:]:
        axis.set_xlabel("iteration")
    ends = [
        f"{title}: " + ", ".join(f"{line.label} {c[-1][1][-1]:.3g}" for line, c in drawn) for title, _, drawn in panels
    ]
    return finish(figure, labels, f"Training log of {group.label}; at its end, {'; '.join(ends)}.")


def _dynamics_of_methods(groups: Sequence[Group]) -> Picture | None:
    """One quantity a panel, one line a method."""
    rows = [[(title, [_series(group, key) for group in groups]) for key, title in row] for row in _ROWS]
    rows = [row for row in rows if any(any(curves) for _, curves in row)]
    if not rows:
        return None
    figure = Figure(figsize=(WIDTH, 2.15 * len(rows) + 0.3), layout="constrained")
    grid = figure.subplots(len(rows), 3, squeeze=False)
    for axes, row in zip(grid, rows):
        for axis, (title, curves) in zip(axes, row):
            for i, own in enumerate(curves):
                _draw_series(axis, own, *style_of(i))
            if any(curves):
                _dress_steps(axis, groups, title)
            else:
                axis.remove()
    for axis in grid[-1]:
        axis.set_xlabel("iteration")
    legend(figure, [group.label for group in groups])
    return finish(figure, [], f"Training logs of {', '.join(group.label for group in groups)}, a panel a quantity.")
