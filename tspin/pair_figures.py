"""The pictures of a report that are made from single pairs (tspin.pairs): rewards against log-likelihoods, the paper's Figure 3,
and mean log-likelihoods under the policy of each iteration, its Figure 7.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tspin.comparison import Estimate, Group
from tspin.plotting import ORANGE, PURPLE, ROLES, VERMILION, WIDTH, Picture, end_label, finish, ink, iteration_ticks
from tspin.run_files import Run

_COLUMNS = 5  # iterations shown side by side, at most


def rewards(groups: Sequence[Group]) -> Picture | None:
    """The paper's Figure 3: above, reward against log-likelihood of each response; below, the margins of each pair in both."""
    drawn = [(group, tables) for group in groups if (tables := _pairs_with_rewards(group))]
    if not drawn:
        return None
    iterations = sorted({t for _, tables in drawn for t in tables})
    if len(iterations) > _COLUMNS:
        iterations = [iterations[round(i)] for i in np.linspace(0, len(iterations) - 1, _COLUMNS)]
    columns, rows = max(len(iterations), 3), 2 * len(drawn)
    figure = Figure(figsize=(WIDTH, 2.5 * rows + 0.2), layout="constrained")
    figure.subplots(rows, columns, squeeze=False, sharex="row", sharey="row")
    grid = np.array(figure.axes).reshape(rows, columns)
    alts = []
    for upper, lower, (group, tables) in zip(grid[::2], grid[1::2], drawn):
        for axis in (*upper[len(iterations) :], *lower[len(iterations) :]):
            axis.remove()
        for column, t in enumerate(iterations):
            if t in tables:
                _draw_responses(upper[column], tables[t])
                shares = _draw_margins(lower[column], tables[t])
                alts.append(f"{group.label}, iteration {t}: {', '.join(shares)} misaligned")
            # Above the first panel alone, on a line of its own, where there is room to the right.
            method = f"{group.label}\n" if len(groups) > 1 and column == 0 else ""
            upper[column].set(title=f"{method}iteration {t}", xlabel="log-likelihood, nats")
            lower[column].set(xlabel="r(y) less r(y')")
        upper[0].set_ylabel("reward")
        lower[0].set_ylabel("logp(y) less logp(y')")
        _limit(upper[: len(iterations)])
        _limit(lower[: len(iterations)], corner=0.3)
        for axis in lower[: len(iterations)]:
            (_, right), (bottom, _) = axis.get_xlim(), axis.get_ylim()
            axis.fill_between([0, right], bottom, 0, color="#ececec", zorder=0, lw=0)
    return finish(figure, [], f"Rewards against log-likelihoods. {'; '.join(alts)}.")


def _pairs_with_rewards(group: Group) -> dict[int, dict[str, np.ndarray]]:
    """By iteration, the columns of all seeds' pairs that have rewards and whose y' is not y."""
    found: dict[int, list[Any]] = {}
    for run in group.runs:
        for row in run.rows:
            table = run.pairs(row["iteration"])
            if table is not None:
                kept = ~table["identical"] & ~np.isnan(table["rewards/rejected"])
                found.setdefault(row["iteration"], []).append({name: column[kept] for name, column in table.items()})
    columns = ("set", "logps/chosen", "logps/rejected", "rewards/chosen", "rewards/rejected")
    stacks = {t: {c: np.concatenate([part[c] for part in parts]) for c in columns} for t, parts in found.items()}
    return {t: stack for t, stack in stacks.items() if len(stack["set"])}


def _draw_responses(axis: Axes, table: dict[str, np.ndarray]) -> None:
    trained = table["set"] == "trained"
    for place, (member, label, colour) in enumerate(ROLES[:2]):
        x, y = table[f"logps/{member}"][trained], table[f"rewards/{member}"][trained]
        axis.scatter(x, y, s=9, color=colour, alpha=0.45, lw=0)
        _corner(axis, 0.03, 0.97 - 0.1 * place, label, colour, va="top", ha="left")


def _draw_margins(axis: Axes, table: dict[str, np.ndarray]) -> list[str]:
    shares = []
    reward = table["rewards/chosen"] - table["rewards/rejected"]
    logp = table["logps/chosen"] - table["logps/rejected"]
    for place, (name, colour, marker) in enumerate((("fresh", ORANGE, "^"), ("trained", PURPLE, "o"))):
        own = table["set"] == name
        if own.any():
            axis.scatter(reward[own], logp[own], s=10, color=colour, marker=marker, alpha=0.5, lw=0)
            share = np.mean((reward[own] > 0) & (logp[own] < 0))
            shares.append(f"{share:.0%} of {name}")
            _corner(axis, 0.97, 0.03 + 0.1 * place, f"{name}: {share:.0%}", colour, va="bottom", ha="right")
    axis.axhline(0, color="#777777", lw=0.8, zorder=1)
    axis.axvline(0, color="#777777", lw=0.8, zorder=1)
    return shares


def _corner(axis: Axes, x: float, y: float, text: str, colour: str, **options: Any) -> None:
    box = {"facecolor": "white", "alpha": 0.75, "edgecolor": "none", "pad": 0.8}
    axis.text(
        x, y, text, color=ink(colour), fontsize=9, fontweight="bold", transform=axis.transAxes, bbox=box, **options
    )


def _limit(axes: Sequence[Axes], corner: float = 0.0) -> None:
    """Limits of a row of panels that hold all but its outermost points; `corner`: the least share of an axis beyond zero."""
    offsets = [np.ma.getdata(scatter.get_offsets()) for axis in axes for scatter in axis.collections]
    points = np.concatenate([part for part in offsets if len(part)] or [np.zeros((1, 2))])
    points = points[np.isfinite(points).all(1)]
    if not len(points):
        return
    low, high = np.percentile(points, [0.5, 99.5], axis=0)
    room = 0.06 * np.maximum(high - low, 1e-3)
    low, high = low - room, high + room
    if corner:
        low[0], high[1] = min(low[0], 0), max(high[1], 0)
        high[0] = max(high[0], -low[0] * corner / (1 - corner))
        low[1] = min(low[1], -high[1] * corner / (1 - corner))
    axes[0].set_xlim(low[0], high[0])
    axes[0].set_ylim(low[1], high[1])


def likelihoods(groups: Sequence[Group]) -> Picture | None:
    """The paper's Figure 7: mean log-likelihoods under the policy that each iteration ends with, a panel a method."""
    panels = [(group, curves) for group in groups if (curves := _likelihood_curves(group))]
    if not panels:
        return None
    columns = min(len(panels), 3)
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(WIDTH if columns > 1 else 0.62 * WIDTH, 3.2 * rows), layout="constrained")
    figure.subplots(rows, columns, squeeze=False, sharey=True)
    labels, alts = [], []
    for axis, (group, curves) in zip(figure.axes, panels):
        texts = []
        for label, colour, style, points in curves:
            xs, means, bars = [t for t, _ in points], [e.mean for _, e in points], [e.sd or 0.0 for _, e in points]
            face = "white" if style == "--" else colour
            axis.errorbar(
                xs, means, yerr=bars, color=colour, ls=style, marker="o", mfc=face, ms=4.5, capsize=2.5, elinewidth=1
            )
            texts.append(end_label(axis, means[-1], label, colour))
            alts.append(f"{group.label}, {label}: from {means[0]:.2f} to {means[-1]:.2f}")
        axis.set(title=group.label if len(groups) > 1 else "", xlabel="policy after iteration")
        axis.yaxis.set_tick_params(labelleft=True)
        iteration_ticks(axis, [t for *_, points in curves for t, _ in points])
        labels.append((axis, texts))
    for axis in figure.axes[len(panels) :]:
        axis.remove()
    for axis in figure.axes[::columns]:
        axis.set_ylabel("mean log-likelihood, nats")
    return finish(figure, labels, f"Log-likelihoods by iteration. {'; '.join(alts)}.")


def _likelihood_curves(group: Group) -> list[tuple[str, str, str, list[tuple[int, Estimate]]]]:
    """Label, colour, style and (iteration, mean over seeds of means over pairs) of each kind of response."""
    curves = []
    requests = [("trained", *role, "-") for role in ROLES] + [("fresh", "rejected", "fresh y'", VERMILION, "--")]
    for name, member, label, colour, style in requests:
        points = []
        for t in sorted({row["iteration"] for run in group.runs for row in run.rows if row["iteration"] >= 0}):
            means = [mean for run in group.runs if (mean := _mean_logp(run, t, name, member)) is not None]
            if means:
                points.append((t, Estimate.of(means)))
        if points:
            curves.append((label, colour, style, points))
    return curves


def _mean_logp(run: Run, t: int, name: str, member: str) -> float | None:
    table = run.pairs(t)
    if table is None:
        return None
    values = table[f"logps/{member}"][table["set"] == name]
    return float(values.mean()) if len(values) and np.isfinite(values).all() else None
