"""The pictures of STUDY.md: exact match by iteration, what moves underneath, and the controls with their intervals."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.study import plan
from tspin.comparison import Estimate

if TYPE_CHECKING:
    from benchmarks.study.claims import Study

# Okabe and Ito's colours; one a method, with a marker of its own besides.
STYLE = {
    "tspin": ("#0072B2", "o"),
    "spin": ("#D55E00", "s"),
    "sft": ("#009E73", "^"),
    "tspin_no_history": ("#CC79A7", "D"),
    "tspin_ref": ("#E69F00", "v"),
}
_ROLES = {"chosen": ("real y", "#0072B2"), "rejected": ("synthetic y'", "#D55E00"), "proto": ("proto y0", "#009E73")}
_LOOK = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "font.size": 9,
}


def draw(study: Study, folder: Path) -> list[str]:
    """Every figure that the rows allow, as PNG in `folder`. Returns their names."""
    from matplotlib import rc_context

    figures = {"rates.png": _rates, "scores.png": _scores, "mechanism.png": _mechanism, "controls.png": _controls}
    names = []
    with rc_context({**_LOOK, "axes.axisbelow": True}):
        for name, make in figures.items():
            if (figure := make(study)) is not None:
                figure.savefig(folder / name, dpi=120)
                names.append(name)
    return names


def _figure(columns: int, height: float, **options: Any) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, height), layout="constrained")
    return figure, figure.subplots(1, columns, **options)


def _band(axis: Any, study: Study, name: str, of: Callable, steps: range, **style: Any) -> None:
    # Mean over seeds, and a band of one standard deviation.
    points = [(t, study.estimate(name, of(t))) for t in steps]
    points = [(t, estimate) for t, estimate in points if estimate]
    x, mean = [t for t, _ in points], [e.mean for _, e in points]
    axis.plot(x, mean, **{"linewidth": 1.6, "markersize": 4.5, **style})
    sd = [e.sd or 0 for _, e in points]
    axis.fill_between(
        x, [m - s for m, s in zip(mean, sd)], [m + s for m, s in zip(mean, sd)], color=style["color"], alpha=0.12, lw=0
    )


def _rates(study: Study) -> Any:
    """Validation score of the last policy against the learning rate, a small mark a seed."""
    from benchmarks.study.result import LABELS

    scores = {method: plan.tuning_scores(study.rows, method) for method in plan.METHODS}
    if not any(scores.values()):
        return None
    figure, axis = _figure(1, 3.6)
    for method, by_rate in scores.items():
        colour, marker = STYLE[method]
        if by_rate:
            means = [sum(values) / len(values) for values in by_rate.values()]
            axis.plot(list(by_rate), means, color=colour, marker=marker, linewidth=1.6, label=LABELS[method])
        for rate, values in by_rate.items():
            axis.plot([rate] * len(values), values, color=colour, marker=marker, ls="", markersize=3, alpha=0.5)
    axis.set(xscale="log", xlabel="learning rate", ylabel="exact match, greedy, last policy", ylim=(0, 1))
    axis.set_title(f"Validation problems, seeds {plan.TUNING_SEEDS[0]} and {plan.TUNING_SEEDS[1]}")
    axis.legend(frameon=False, fontsize=8, loc="lower right")
    return figure


def _scores(study: Study) -> Any:
    from benchmarks.study.claims import SAMPLED, at
    from benchmarks.study.result import LABELS

    names = [name for name in plan.METHODS if study.arms.get(name)]
    if not names:
        return None
    figure, axes = _figure(2, 4, sharey=True)
    for axis, key, title in ((axes[0], plan.SCORE, "greedy"), (axes[1], SAMPLED, "sampled at temperature 1")):
        for name in names:
            colour, marker = STYLE[name]
            label = f"{LABELS[name]} ({study.rates[name]:.0e})".replace("e-0", "e-")
            _band(
                axis,
                study,
                name,
                lambda t, key=key: at(t, key),
                range(-1, plan.ITERATIONS),
                color=colour,
                marker=marker,
                label=label,
            )
        axis.set(title=f"Exact match on test problems, {title}", xlabel="iteration (-1: pi_0)", ylim=(0, 1))
    axes[0].legend(frameon=False, title="method (tuned rate)", fontsize=8)
    return figure


def _mechanism(study: Study) -> Any:
    """Log-probs of the three roles over SPIN and T-SPIN with and without history, and the fresh pairs in the wrong order."""
    from benchmarks.study.claims import FRESH, at
    from benchmarks.study.result import LABELS

    names = [name for name in ("tspin", "tspin_no_history", "spin") if study.arms.get(name)]
    if not names:
        return None
    figure, axes = _figure(len(names) + 1, 3.4)
    steps = range(plan.ITERATIONS)
    for i, (axis, name) in enumerate(zip(axes, names)):
        for role, (label, colour) in _ROLES.items():
            if all(f"logps/{role}" in row["iterations"][-1]["mean"] for row in study.arms[name].values()):
                start = 1 if role == "proto" else 0
                of = lambda t, role=role: at(t, f"logps/{role}", "mean")
                _band(axis, study, name, of, range(start, plan.ITERATIONS), color=colour, marker="o", label=label)
        axis.set(title=LABELS[name], xlabel="iteration", ylabel="nats per response, while training" if i == 0 else "")
        axis.sharey(axes[0])
        axis.legend(frameon=False, fontsize=8)
    for name in names:
        colour, marker = STYLE[name]
        _band(axes[-1], study, name, lambda t: at(t, FRESH), steps, color=colour, marker=marker, label=LABELS[name])
    axes[-1].set(
        title="Fresh pairs, y < y'", xlabel="iteration", ylabel="share with logp(y) < logp(y')", ylim=(0, None)
    )
    # Above the lines, which fall from the upper left.
    axes[-1].set_ylim(top=1.35 * axes[-1].get_ylim()[1])
    axes[-1].legend(frameon=False, fontsize=8, loc="upper right")
    return figure


def _controls(study: Study) -> Any:
    """Differences in greedy and sampled exact match from each question's base, with 95 % intervals."""
    from benchmarks.study.claims import SAMPLED, last
    from benchmarks.study.result import QUESTIONS

    lines: list[tuple[str, list[Estimate | None]]] = []
    for question, base, names in QUESTIONS:
        made = [(name, [study.difference(name, base, last(key)) for key in (plan.SCORE, SAMPLED)]) for name in names]
        made = [(f"    {name}", pair) for name, pair in made if pair[0]]
        lines += [(question, []), *made] if made else []
    if not lines:
        return None
    figure, axis = _figure(1, 0.8 + 0.24 * len(lines))
    for y, (_, pair) in enumerate(lines):
        for estimate, offset, colour, marker in zip(pair, (-0.14, 0.14), ("#0072B2", "#E69F00"), ("o", "s")):
            if estimate:
                axis.errorbar(estimate.mean, y + offset, xerr=estimate.ci or 0, color=colour, fmt=marker, ms=4, lw=1.2)
    axis.axvline(0, color="#555555", lw=0.8)
    for label, colour, marker in (("greedy", "#0072B2", "o"), ("sampled", "#E69F00", "s")):
        axis.plot([], [], color=colour, marker=marker, ls="", label=label)
    axis.set_yticks(range(len(lines)), [name for name, _ in lines], ha="left")
    axis.tick_params(axis="y", pad=235, length=0)
    axis.set(
        ylim=(len(lines) - 0.4, -0.6), xlabel="difference in exact match of the last policy, 95 % interval over seeds"
    )
    axis.legend(frameon=False, loc="lower left", fontsize=8)
    return figure
