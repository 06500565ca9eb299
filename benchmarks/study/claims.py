"""The rows of named arms, statistics over seeds, and the verdict on each of the paper's claims.

Intervals are 95 % by Student's t over seeds, of differences taken seed by seed. The rules of the verdicts stand in STUDY.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from statistics import mean
from typing import Any, NamedTuple

from benchmarks.study import plan
from benchmarks.study.plan import (
    CONTROLS,
    MENDING,
    METHODS,
    NAMES,
    SEEDS,
    Rows,
    final,
    named,
    tuned_rate,
)
from tspin.comparison import Estimate
from tspin.loop import FRESH_ROWS

Row = Mapping[str, Any]
Series = dict[int, Row]  # by seed
SAMPLED, FRESH = "exact_match_sampled", "fresh_share"
HALF = 0.4  # of the pairs misaligned, which (b) lets pass for a half
MARGIN = 0.02  # of exact match, within which (c) lets two policies pass for matched
FEWEST = 30  # pairs of which a share is worth a number


class Study(NamedTuple):
    """The rows of each named arm, by seed, and the tuned rates."""

    rows: Rows
    rates: dict[str, float]
    arms: dict[str, Series]
    runs: dict[str, dict[int, list[Row]]]  # each seed's again, with those from other pupils

    @classmethod
    def of(cls, rows: Rows) -> Study:
        rates = {method: rate for method in METHODS if (rate := tuned_rate(rows, method)) is not None}
        arms: dict[str, Series] = {}
        runs: dict[str, dict[int, list[Row]]] = {}
        for name in NAMES:
            keys = {**CONTROLS, **MENDING}.get(name, {"method": name})
            if keys["method"] in rates and (name not in MENDING or "sft" in rates):
                found = {seed: list(plan.runs_of(rows, named(name, seed, rates))) for seed in SEEDS}
                runs[name] = {seed: list(of) for seed, of in found.items() if of}
                arms[name] = {seed: of[0] for seed, of in found.items() if of}
        return cls(rows, rates, arms, runs)

    def values(self, name: str, of: Callable[[Row], float]) -> dict[int, float]:
        """By seed, of the first run; without what is not a number."""
        found = {seed: of(row) for seed, row in self.arms.get(name, {}).items()}
        return {seed: value for seed, value in found.items() if not math.isnan(value)}

    def estimate(self, name: str, of: Callable[[Row], float]) -> Estimate | None:
        return Estimate.of(list(self.values(name, of).values()))

    def difference(self, name: str, base: str, of: Callable[[Row], float] = final) -> Estimate | None:
        """Of `name` less `base`, over the seeds in which both have a run from one pi_0."""
        ours, theirs = self.runs.get(name, {}), self.runs.get(base, {})
        found = []
        for seed in sorted(ours.keys() & theirs.keys()):
            pairs = ((a, b) for a in ours[seed] for b in theirs[seed] if a["pi_0_sha256"] == b["pi_0_sha256"])
            found += [of(a) - of(b) for a, b in list(pairs)[:1]]
        return Estimate.of([value for value in found if not math.isnan(value)])


def at(t: int, key: str, part: str | None = None) -> Callable[[Row], float]:
    """What a row has under `key` after iteration t; of its training log's `part`, mean or last, where that is given.

    FRESH is of the pairs whose y' is not y, nan of fewer than FEWEST; rows count it of all.
    """

    def value(row: Row) -> float:
        entry = row["iterations"][t + 1]
        if key == FRESH and part is None:
            distinct = 1 - entry["fresh_identical"]
            pairs = distinct * min(FRESH_ROWS, row["keys"].get("max_rows", plan.TRAIN_ROWS))
            return entry[FRESH] / distinct if pairs >= FEWEST else math.nan
        return (entry if part is None else entry[part])[key]

    return value


def last(key: str) -> Callable[[Row], float]:
    return lambda row: at(len(row["iterations"]) - 2, key)(row)


def shown(estimate: Estimate | None, sign: bool = False) -> str:
    """`mean [low, high]`; the mean alone where there is one value."""
    if estimate is None:
        return "pending"
    spec = "+.3f" if sign else ".3f"
    if estimate.ci is None:
        return f"{estimate.mean:{spec}} (1 seed)"
    return f"{estimate.mean:{spec}} [{estimate.mean - estimate.ci:{spec}}, {estimate.mean + estimate.ci:{spec}}]"


class Verdict(NamedTuple):
    """`word` is `holds`, `does not hold`, `is not settled` or `is pending`; `why` is a sentence of numbers."""

    word: str
    why: str

    @property
    def is_begun(self) -> bool:
        """Whether it is pending, with some of its arms run."""
        return self.word == "is pending" and self != NOT_RUN


NOT_RUN = Verdict("is pending", "Its arms have not been run.")


def _seeds(study: Study, *names: str) -> bool:
    return all(len(study.arms.get(name, {})) == len(SEEDS) for name in names)


def claim_a(study: Study, tspin: str = "tspin", spin: str = "spin") -> Verdict:
    """T-SPIN rises at every iteration, SPIN peaks and falls."""
    if not (study.arms.get(tspin) and study.arms.get(spin)):
        return NOT_RUN
    rises = [study.estimate(tspin, _change(t - 1, t)) for t in range(1, plan.ITERATIONS)]
    curve = [study.estimate(spin, at(t, plan.SCORE)) for t in range(plan.ITERATIONS)]
    peak = max(range(plan.ITERATIONS - 1), key=lambda t: getattr(curve[t], "mean", 0))
    fall = study.estimate(spin, _change(peak, plan.ITERATIONS - 1))
    heard = [study.estimate(tspin, _change(t - 1, t, SAMPLED)) for t in range(1, plan.ITERATIONS)]
    greedy, sampled = study.difference(tspin, spin), study.difference(tspin, spin, last(SAMPLED))
    why = (
        f"T-SPIN changes from iteration to iteration by {', '.join(shown(rise, True) for rise in rises)} greedy and "
        f"{', '.join(shown(rise, True) for rise in heard)} sampled. Of the iterations before the last SPIN is best at {peak}, "
        f"and changes by {shown(fall, True)} from there to the last. T-SPIN less SPIN at the last: "
        f"{shown(greedy, True)} greedy, {shown(sampled, True)} sampled."
    )
    halves = [(rise, 0) for rise in rises], [(_negated(fall), 0)]
    for name, half in zip(("That T-SPIN rises", "that SPIN falls"), halves):
        why += f" {name} {_all(study, (tspin, spin), half)}" + (";" if half is halves[0] else ".")
    return Verdict(_all(study, (tspin, spin), [*halves[0], *halves[1]]), why)


def claim_b(study: Study, tspin: str = "tspin", spin: str = "spin") -> Verdict:
    """Under SPIN about half of the pairs whose reward favours y have logp(y) < logp(y') at iterations 1 and 2."""
    if not (study.arms.get(tspin) and study.arms.get(spin)):
        return NOT_RUN
    favoured, shares = (
        [study.estimate(spin, at(t, key, "last")) for t in (1, 2)] for key in ("rewards/accuracies", "misaligned")
    )
    ours, theirs = study.estimate(tspin, last(FRESH)), study.estimate(spin, last(FRESH))
    difference = study.difference(spin, tspin, last(FRESH))
    why = (
        "Over the last eight optimizer steps of SPIN's iterations 1 and 2, rewards favour y in "
        f"{' and '.join(map(shown, favoured))} of the pairs in which y' is not y, and {' and '.join(map(shown, shares))} of those "
        "pairs are misaligned. T-SPIN's count is zero by construction, as its reward is the log-likelihood, and no evidence. The "
        "fair contrast is the share of freshly sampled "
        f"pairs with logp(y) < logp(y') at the last iteration, y' = y left out: {shown(theirs)} under SPIN, {shown(ours)} under "
        f"T-SPIN, a difference of {shown(difference, True)}."
    )
    return Verdict(_all(study, (tspin, spin), [*((share, HALF) for share in shares), (difference, 0)]), why)


def claim_c(study: Study) -> Verdict:
    """T-SPIN on a quarter of the data matches SFT on all of it."""
    matched, plain, own = "tspin, a quarter, steps matched", "tspin, a quarter", "sft, a quarter, steps matched"
    if not (study.arms.get(matched) and study.arms.get("sft")):
        return NOT_RUN
    less = study.difference(matched, "sft")
    why = (
        f"T-SPIN on a quarter, with as many steps, less SFT on all: {shown(less, True)} greedy, "
        f"{shown(study.difference(matched, 'sft', last(SAMPLED)), True)} sampled; with a quarter of the steps "
        f"{shown(study.difference(plain, 'sft'), True)}. SFT itself on a quarter, with as many steps, less SFT on all: "
        f"{shown(study.difference(own, 'sft'), True)}."
    )
    return Verdict(_all(study, (matched, "sft"), [(less, -MARGIN)]), why)


def claim_d(study: Study) -> Verdict:
    """Without history, progress is slower and less stable."""
    with_history, without = "tspin", "tspin_no_history"
    if not (study.arms.get(with_history) and study.arms.get(without)):
        return NOT_RUN
    steps = range(1, plan.ITERATIONS)
    along = study.difference(with_history, without, lambda row: mean(at(t, plan.SCORE)(row) for t in steps))
    drop = study.difference(without, with_history, lambda row: -min(_change(t - 1, t)(row) for t in steps))
    ends = [study.difference(with_history, without, last(key)) for key in (plan.SCORE, SAMPLED)]
    why = (
        f"T-SPIN with history less without: {shown(along, True)} as a mean over iterations 1 to {plan.ITERATIONS - 1}, "
        f"{shown(ends[0], True)} at the last, {shown(ends[1], True)} sampled at the last, where history is "
        f"{side(ends[0])} greedy and {side(ends[1])} sampled. The largest drop from one "
        f"iteration to the next is larger without history by {shown(drop, True)}. That progress is slower "
        f"{_all(study, (with_history, without), [(along, 0)])}; that it is less stable "
        f"{_all(study, (with_history, without), [(drop, 0)])}."
    )
    return Verdict(_all(study, (with_history, without), [(along, 0), (drop, 0)]), why)


def side(difference: Estimate | None) -> str:
    """What an interval of a difference says in words."""
    if (
        difference is None
        or difference.ci is None
        or difference.mean - difference.ci <= 0 <= difference.mean + difference.ci
    ):
        return "not told apart"
    return "ahead" if difference.mean > 0 else "behind"


def _change(before: int, after: int, key: str = plan.SCORE) -> Callable[[Row], float]:
    return lambda row: at(after, key)(row) - at(before, key)(row)


def _negated(estimate: Estimate | None) -> Estimate | None:
    return None if estimate is None else replace(estimate, mean=-estimate.mean)


def _all(study: Study, names: Sequence[str], wanted: Sequence[tuple[Estimate | None, float]]) -> str:
    """`holds` where every interval lies above its bound, `does not hold` where one does not reach above it."""
    if not _seeds(study, *names) or any(estimate is None for estimate, _ in wanted):
        return "is pending"
    pairs = [(estimate, bound) for estimate, bound in wanted if estimate is not None]
    if all(estimate.mean - (estimate.ci or 0.0) > bound for estimate, bound in pairs):
        return "holds"
    refuted = any(estimate.mean + (estimate.ci or 0.0) <= bound for estimate, bound in pairs)
    return "does not hold" if refuted else "is not settled"


CLAIMS = {
    "(a) T-SPIN rises at every iteration, SPIN peaks and falls": claim_a,
    "(b) under SPIN, rewards favour annotated responses that are less likely than synthetic ones": claim_b,
    "(c) T-SPIN on a quarter of the data matches SFT on all of it": claim_c,
    "(d) without history, progress is slower and less stable": claim_d,
}
