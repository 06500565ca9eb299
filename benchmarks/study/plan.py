"""What the study runs, as data: arms by phase, and the rule that turns tuning rows into learning rates.

A row (see run.py) is found by what its arm is, never by a name, so that arms that two questions share are run once.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

TUNING_SEEDS = (100, 101)
SEEDS = (0, 1, 2, 3, 4)
METHODS = ("tspin", "spin", "sft", "tspin_no_history", "tspin_ref")
SCORE = "exact_match"  # greedy, on held-out problems, of the last policy: what rates are tuned on
RATES = (3e-7, 1e-6, 3e-6, 1e-5, 3e-5, 1e-4, 3e-4, 1e-3)
SHARED_RATE = 1e-5
_FIRST_RATES = {"sft": (3e-5, 1e-4, 3e-4), "spin": (1e-6, 3e-6, 1e-5), "tspin_ref": (1e-6, 3e-6, 1e-5)}
_FIRST_RATES |= dict.fromkeys(("tspin", "tspin_no_history"), (3e-6, 1e-5, 3e-5))

# Common to all arms; the paper's alpha and beta and SPIN's lam are the program's defaults.
COMMON: dict[str, Any] = {
    "answer_pattern": r"#(\d+)$",
    "prompt_template": "{prompt}",
    "max_new_tokens": 48,
    "generation_batch_size": 256,
    "shard_size": 512,
    "num_train_epochs": 2,
    "per_device_train_batch_size": 32,
    "per_device_eval_batch_size": 64,
    "max_length": 96,
    "logging_steps": 8,
    "use_cpu": True,
    "disable_tqdm": True,
}
TRAIN_ROWS, EVAL_ROWS, ITERATIONS = 512, 400, 5


@dataclass(frozen=True)
class Arm:
    """One run: the keys in which it differs from COMMON, its seed, and what it is evaluated on.

    start: keys of the arm, of the same seed, whose last policy is this one's pi_0; None: the sloppy pupil itself.
    """

    keys: Mapping[str, Any]
    seed: int
    split: str = "test"
    start: Mapping[str, Any] | None = field(default=None)

    @property
    def iterations(self) -> int:
        return self.keys.get("iterations", ITERATIONS)

    @property
    def id(self) -> str:
        return self._hash(self.keys)

    @property
    def lineage(self) -> str:
        """Of the directory, which arms share that differ in `iterations` alone: the longer goes on where the shorter ended."""
        return self._hash({key: value for key, value in self.keys.items() if key != "iterations"})

    def _hash(self, keys: Mapping[str, Any]) -> str:
        known = [dict(keys), self.seed, self.split, None if self.start is None else dict(self.start)]
        return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:12]


Rows = Mapping[str, dict[str, Any]]  # by id; of an arm that was run again from another pi_0, by id and pi_0


def final(row: Mapping[str, Any], key: str = SCORE) -> float:
    """A score of the last policy of a row."""
    return row["iterations"][-1][key]


def _tuning_arm(method: str, rate: float, seed: int) -> Arm:
    return Arm({"method": method, "learning_rate": rate}, seed, "valid")


def tuning_scores(rows: Rows, method: str) -> dict[float, list[float]]:
    """The validation score of each rate that has all its seeds, by rate."""
    scores = {}
    for rate in RATES:
        found = [rows.get(_tuning_arm(method, rate, seed).id) for seed in TUNING_SEEDS]
        if all(found):
            scores[rate] = [final(row) for row in found if row]
    return scores


def tuned_rate(rows: Rows, method: str) -> float | None:
    """The rate with the best mean score, of equals the smaller; None while the best lies at an end of what was tried."""
    scores = tuning_scores(rows, method)
    if any(rate not in scores for rate in _next_rates(rows, method)):
        return None
    return max(scores, key=lambda rate: (sum(scores[rate]), -rate))


def _next_rates(rows: Rows, method: str) -> list[float]:
    # The first three, and neighbours for as long as the best has one that was not tried.
    scores = tuning_scores(rows, method)
    wanted = list(_FIRST_RATES[method])
    if all(rate in scores for rate in wanted):
        best = RATES.index(max(scores, key=lambda rate: (sum(scores[rate]), -rate)))
        wanted += RATES[max(0, best - 1) : best + 2]
    return list(dict.fromkeys(wanted))


def tuning(rows: Rows, methods: Sequence[str]) -> list[Arm]:
    """The tuning arms of these methods that the rows so far ask for."""
    return [
        _tuning_arm(method, rate, seed)
        for method in methods
        for rate in _next_rates(rows, method)
        for seed in TUNING_SEEDS
    ]


QUARTER = {"max_rows": TRAIN_ROWS // 4}
MATCHED = {**QUARTER, "num_train_epochs": 8}
# Name: keys beside the tuned rate of the method. What a question compares with is among them or among METHODS.
CONTROLS: dict[str, dict[str, Any]] = {
    "spin at 1e-5": {"method": "spin", "learning_rate": SHARED_RATE},
    "tspin at 1e-5": {"method": "tspin", "learning_rate": SHARED_RATE},
    "sft at 1e-5": {"method": "sft", "learning_rate": SHARED_RATE},
    "tspin_no_history at 1e-5": {"method": "tspin_no_history", "learning_rate": SHARED_RATE},
    "spin at 1e-5, lam 1": {"method": "spin", "learning_rate": SHARED_RATE, "lam": 1.0},
    "tspin at 1e-5, alpha 0.1": {"method": "tspin", "learning_rate": SHARED_RATE, "alpha": 0.1},
    "tspin, a quarter": {"method": "tspin", **QUARTER},
    "tspin, a quarter, steps matched": {"method": "tspin", **MATCHED},
    "sft, a quarter": {"method": "sft", **QUARTER},
    "sft, a quarter, steps matched": {"method": "sft", **MATCHED},
    "tspin, beta 0.3": {"method": "tspin", "beta": 0.3},
    "tspin, beta 1": {"method": "tspin", "beta": 1.0},
    "tspin, alpha 0.1": {"method": "tspin", "alpha": 0.1},
    "tspin, alpha 0.3": {"method": "tspin", "alpha": 0.3},
    "spin, lam 0.3": {"method": "spin", "lam": 0.3},
    "spin, lam 1": {"method": "spin", "lam": 1.0},
    "tspin, mean": {"method": "tspin", "logp_reduction": "mean"},
    "tspin, mean, alpha 30": {"method": "tspin", "logp_reduction": "mean", "alpha": 30.0},
    "spin, mean": {"method": "spin", "logp_reduction": "mean"},
    "spin, mean, lam 3": {"method": "spin", "logp_reduction": "mean", "lam": 3.0},
    "tspin, 10 iterations": {"method": "tspin", "iterations": 10},
    "spin, 10 iterations": {"method": "spin", "iterations": 10},
    "tspin_no_history, 10 iterations": {"method": "tspin_no_history", "iterations": 10},
}
# From a pi_0 that SFT has already fine-tuned on the same quarter of the prompts.
FINE_TUNED = "sft, a quarter, steps matched"
MENDING: dict[str, dict[str, Any]] = {
    "fine-tuned, tspin": {"method": "tspin", **MATCHED},
    "fine-tuned, tspin, drop_identical": {"method": "tspin", **MATCHED, "drop_identical": True},
    "fine-tuned, tspin, sft_coef 1": {"method": "tspin", **MATCHED, "sft_coef": 1.0},
    "fine-tuned, tspin, both": {"method": "tspin", **MATCHED, "drop_identical": True, "sft_coef": 1.0},
    "fine-tuned, spin": {"method": "spin", **MATCHED},
    "fine-tuned, sft": {"method": "sft", **MATCHED},
}
NAMES = (*METHODS, *CONTROLS, *MENDING)
# What each control is compared with, and what the comparison asks.
QUESTIONS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("One shared rate of 1e-5", "tspin at 1e-5", ("spin at 1e-5", "tspin_no_history at 1e-5", "sft at 1e-5")),
    ("Scale of the loss at 1e-5, T-SPIN", "tspin at 1e-5", ("tspin at 1e-5, alpha 0.1",)),
    ("Scale of the loss at 1e-5, SPIN", "spin at 1e-5", ("spin at 1e-5, lam 1",)),
    ("alpha, at T-SPIN's tuned rate", "tspin", ("tspin, alpha 0.1", "tspin, alpha 0.3")),
    ("lam, at SPIN's tuned rate", "spin", ("spin, lam 0.3", "spin, lam 1")),
    ("beta", "tspin", ("tspin_no_history", "tspin, beta 0.3", "tspin, beta 1")),
    ("Sum against mean, T-SPIN", "tspin", ("tspin, mean", "tspin, mean, alpha 30")),
    ("Sum against mean, SPIN", "spin", ("spin, mean", "spin, mean, lam 3")),
    ("A quarter of the data, T-SPIN", "tspin", ("tspin, a quarter", "tspin, a quarter, steps matched")),
    ("A quarter of the data, SFT", "sft", ("sft, a quarter", "sft, a quarter, steps matched")),
    ("10 iterations", "tspin, 10 iterations", ("spin, 10 iterations", "tspin_no_history, 10 iterations")),
    (
        "pi_0 already fine-tuned on the same prompts",
        "fine-tuned, sft",
        tuple(n for n in MENDING if n != "fine-tuned, sft"),
    ),
)
# Of what the claims compare beside, each with the arm that it is compared with.
_CLAIMED = (
    *((method, "tspin") for method in METHODS[1:]),
    *((name, "sft") for name in ("tspin, a quarter", "tspin, a quarter, steps matched")),
)
PAIRS = (*((name, base) for _, base, names in QUESTIONS for name in names), *_CLAIMED)


def named(name: str, seed: int, rates: Mapping[str, float]) -> Arm:
    """The arm of a name in METHODS, CONTROLS or MENDING, on the test split, at the tuned rates."""

    def tuned(keys: Mapping[str, Any]) -> dict[str, Any]:
        return {"learning_rate": rates[keys["method"]], **keys}

    if name in METHODS:
        return Arm(tuned({"method": name}), seed)
    if name in CONTROLS:
        return Arm(tuned(CONTROLS[name]), seed)
    return Arm(tuned(MENDING[name]), seed, start=tuned(CONTROLS[FINE_TUNED]))


def phases(rows: Rows) -> list[list[Arm]]:
    """Lists of arms to be done one list after the other, as far as the rates that the rows have settled reach."""
    found: list[list[Arm]] = []
    rates: dict[str, float] = {}
    for methods in (METHODS[:3], METHODS[3:]):
        found.append(tuning(rows, methods))
        for method in methods:
            if (rate := tuned_rate(rows, method)) is None:
                return found
            rates[method] = rate
        found.append([named(method, seed, rates) for seed in SEEDS for method in methods])
    for seeds in (SEEDS[:3], SEEDS[3:]):
        found += [[named(name, seed, rates) for seed in seeds for name in names] for names in (CONTROLS, MENDING)]
    return found


def runs_of(rows: Rows, arm: Arm) -> list[dict[str, Any]]:
    """The rows of an arm, one for each pi_0 that it was run from, the first run first."""
    return [row for key, row in rows.items() if key.partition(" ")[0] == arm.id]


def unpaired(rows: Rows) -> list[tuple[Arm, str]]:
    """Arms to run again, and the pi_0 to run them from: that of an arm which is compared with them and has no run in common."""
    found: dict[tuple[str, str], tuple[Arm, str]] = {}
    rates = {method: rate for method in METHODS if (rate := tuned_rate(rows, method)) is not None}
    for name, base in PAIRS:
        if {
            keys["method"] for keys in ({**CONTROLS, **MENDING}.get(n, {"method": n}) for n in (name, base))
        } <= rates.keys():
            for seed in SEEDS:
                arm = named(base, seed, rates)
                ours, theirs = runs_of(rows, named(name, seed, rates)), runs_of(rows, arm)
                known = {row["pi_0_sha256"] for row in theirs}
                if ours and theirs and not any(row["pi_0_sha256"] in known for row in ours):
                    found[arm.id, ours[0]["pi_0_sha256"]] = arm, ours[0]["pi_0_sha256"]
    return list(found.values())
