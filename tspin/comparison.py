"""Several runs side by side: groups of runs that differ only in their seed, and the statistics of groups.

A group's spread is over seeds; a difference between groups is taken seed by seed, so that what a seed makes easy or hard for all
methods drops out. Deliberately draws no conclusion: means, standard deviations and 95 % confidence intervals, no ranks.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from tspin.config import default_of, loop_fields, training_fields
from tspin.run_files import Run

# Where a run lies and which draw it is; runs that differ in nothing else are one method.
_NOT_COMPARED = ("seed", "output_dir", "model_name_or_path", "allow_config_change")


@dataclass(frozen=True)
class Group:
    """Runs of one config, one a seed."""

    label: str
    runs: tuple[Run, ...]
    config: dict[str, Any]

    def values(self, t: int, key: str) -> dict[int, float]:
        """By seed, what iteration t has under `key`."""
        scores = {run.seed: run.score(t, key) for run in self.runs}
        return {seed: score for seed, score in scores.items() if score is not None}


@dataclass(frozen=True)
class Estimate:
    """Mean of n values, their sample standard deviation, and half the width of the mean's 95 % confidence interval
    (Student's t); the last two are None where n < 2."""

    mean: float
    sd: float | None
    ci: float | None
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Estimate | None:
        """None of no values."""
        n = len(values)
        if n < 2:
            return cls(values[0], None, None, 1) if n else None
        sd = stdev(values) if all(map(math.isfinite, values)) else math.nan
        return cls(mean(values), sd, student_t(n - 1) * sd / math.sqrt(n), n)


def student_t(df: int, coverage: float = 0.95) -> float:
    """The t with P(|T| < t) = coverage for Student's distribution of `df` degrees of freedom; Abramowitz and Stegun 26.7.3-4."""

    def covered(t: float) -> float:
        theta = math.atan(t / math.sqrt(df))
        odd, cosine = df % 2, math.cos(theta)
        term, total = (cosine if odd else 1.0), 0.0
        for k in range(df // 2):
            total += term
            term *= cosine**2 * ((2 * k + 2) / (2 * k + 3) if odd else (2 * k + 1) / (2 * k + 2))
        return 2 / math.pi * (theta + math.sin(theta) * total) if odd else math.sin(theta) * total

    low, high = 0.0, 1.0
    while covered(high) < coverage:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if covered(middle) < coverage else (low, middle)
    return high


def paired_difference(first: Group, other: Group, t: int, key: str) -> Estimate | None:
    """`other` less `first`, seed by seed, at iteration t; None where they share no seed."""
    ours, theirs = first.values(t, key), other.values(t, key)
    return Estimate.of([theirs[seed] - ours[seed] for seed in sorted(ours.keys() & theirs.keys())])


def last_common_iteration(groups: Sequence[Group], key: str) -> int | None:
    """The last iteration at which every group has a seed in common with the first."""
    iterations = {row["iteration"] for run in groups[0].runs for row in run.rows}
    shared = (t for t in iterations if all(paired_difference(groups[0], group, t, key) for group in groups))
    return max(shared, default=None)


def group_runs(runs: Sequence[str | Path | Run]) -> list[Group]:
    """Runs grouped by their configs, a key left out counting as its default; groups and runs keep the given order.

    A group is called as the arm of `tspin compare` that it is, and otherwise by its method and what parts it from the others.
    Runs from different models are one group, as pi_0 may be made anew for each seed, unless they have the same seed.

    Raises:
        ValueError: a directory holds no run, or two have the same config, seed and model.
    """
    read = [run if isinstance(run, Run) else Run.read(run) for run in runs]
    defaults = _defaults({"method"}.union(*(run.config for run in read)))
    configs = [defaults | run.config for run in read]
    ignored = _NOT_COMPARED
    if _twins(read, configs, ignored):
        ignored = tuple(key for key in ignored if key != "model_name_or_path")
    if twins := _twins(read, configs, ignored):
        raise ValueError(
            f"RUN: want runs that differ in config or seed, got {twins[0].directory} and {twins[1].directory}, "
            "which are one sample and not two; leave one out"
        )
    members: dict[str, list[int]] = {}
    for i, config in enumerate(configs):
        members.setdefault(_key(config, ignored), []).append(i)
    firsts = [configs[indices[0]] for indices in members.values()]
    labels = _labels(firsts, ignored)
    names = [_arm([read[i] for i in indices]) or label for indices, label in zip(members.values(), labels)]
    labels = names if len(set(names)) == len(names) else labels
    return [
        Group(label, tuple(read[i] for i in indices), config)
        for label, indices, config in zip(labels, members.values(), firsts)
    ]


def config_differences(groups: Sequence[Group]) -> list[tuple[str, list[Any]]]:
    """The keys whose values differ between groups, with each group's value; None where a key is unknown to this version."""
    names = sorted({key for group in groups for key in group.config} - set(_NOT_COMPARED[:2]), key=_rank)
    rows = [(key, [group.config.get(key) for group in groups]) for key in names]
    return [(key, values) for key, values in rows if any(value != values[0] for value in values)]


def _defaults(keys: set[str]) -> dict[str, Any]:
    fields = loop_fields() | training_fields()
    return {key: default_of(fields[key]) for key in sorted(keys) if key in fields}


def _rank(key: str) -> tuple[int, str]:
    return (0 if key == "method" else 1, key)


def _key(config: dict[str, Any], ignored: Sequence[str]) -> str:
    return repr(sorted((key, repr(value)) for key, value in config.items() if key not in ignored))


def _twins(runs: Sequence[Run], configs: Sequence[dict[str, Any]], ignored: Sequence[str]) -> tuple[Run, Run] | None:
    seen: dict[tuple[str, int], Run] = {}
    for run, config in zip(runs, configs):
        other = seen.setdefault((_key(config, ignored), run.seed), run)
        if other is not run:
            return other, run
    return None


def _arm(runs: Sequence[Run]) -> str | None:
    """The name in `<arm>_seed_<seed>`, where all runs lie in such directories and have the same."""
    found = [re.fullmatch(rf"(.+)_seed_{run.seed}", run.directory.absolute().name) for run in runs]
    names = {match and match[1] for match in found}
    return names.pop() if len(names) == 1 else None


def _labels(configs: list[dict[str, Any]], ignored: Sequence[str]) -> list[str]:
    """The method, and as few keys as tell a group from those of its method; of groups of one method their keys alone."""
    keys = sorted({key for config in configs for key in config} - set(ignored), key=_rank)
    labels = [str(config["method"]) for config in configs]
    for key in keys:
        texts = [f"{label}, {key}={config.get(key)}" for label, config in zip(labels, configs)]
        alike = {label: {text for text, own in zip(texts, labels) if own == label} for label in labels}
        labels = [text if len(alike[label]) > 1 else label for text, label in zip(texts, labels)]
    if len(configs) > 1 and len({config["method"] for config in configs}) == 1:
        labels = [label.partition(", ")[2] for label in labels]
    return labels
