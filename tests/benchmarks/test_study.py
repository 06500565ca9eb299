"""The study's plan, verdicts and page on made-up rows, and its runner on a tiny pupil. No ranking of methods is asserted."""

import json
import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from benchmarks.study import claims, figures, plan, result, run
from benchmarks.study.claims import Study
from benchmarks.study.plan import Arm

LOGGED = {
    "logps/chosen": -2.0,
    "logps/rejected": -5.0,
    "logps/proto": -7.0,
    "rewards/accuracies": 0.9,
    "misaligned": 0.5,
}


def made_row(arm: Arm, curve: list[float], **logged: float) -> dict:
    """The row of an arm whose exact match runs along `curve`, pi_0 first."""
    entries = [
        {
            "iteration": t - 1,
            "exact_match": score,
            "exact_match_sampled": score / 2,
            "fresh_share": 0.2,
            "fresh_identical": 0.5,
            "mean": LOGGED | logged,
        }
        for t, score in enumerate(curve)
    ]
    facts = {
        "versions": {"torch": "2", "transformers": "5"},
        "machine": "m",
        "commit": "c",
        "cpu_s": 3.0,
        "wall_s": 4.0,
    }
    entries = [{**entry, "last": entry["mean"]} for entry in entries]
    facts |= {
        "id": arm.id,
        "keys": dict(arm.keys),
        "seed": arm.seed,
        "split": arm.split,
        "pi_0_sha256": f"pupil {arm.seed}",
    }
    return {**facts, "iterations": entries}


def test_the_legend_of_fresh_pairs_keeps_off_the_lines():
    study = Study.of(run.read_rows(Path(figures.__file__).with_name("rows.jsonl")))
    figure = figures._mechanism(study)
    figure.draw_without_rendering()
    axis = figure.axes[-1]
    box = axis.get_legend().get_window_extent()
    paths = [axis.transData.transform_path(line.get_path()) for line in axis.lines]
    assert not any(path.intersects_bbox(box, filled=False) for path in paths)


def tuned_rows(best: dict[str, float]) -> dict[str, dict]:
    """Rows of all tuning that the plan asks for, when each method's score falls with the distance from its best rate."""
    rows: dict[str, dict] = {}
    while missing := [arm for arm in plan.tuning(rows, plan.METHODS) if arm.id not in rows]:
        for arm in missing:
            distance = abs(plan.RATES.index(arm.keys["learning_rate"]) - plan.RATES.index(best[arm.keys["method"]]))
            rows[arm.id] = made_row(arm, [0.3] + [0.9 - 0.1 * distance + 0.01 * (arm.seed % 2)] * plan.ITERATIONS)
    return rows


BEST = {"tspin": 1e-5, "spin": 3e-7, "sft": 1e-3, "tspin_no_history": 3e-6, "tspin_ref": 1e-6}


def full_rows(curves: dict[str, list[float]]) -> dict[str, dict]:
    """Tuned rows and every arm of the plan; a name without a curve of its own rises from 0.5 to 0.9, a bit more with each seed."""
    rows = tuned_rows(BEST)
    rates = {method: plan.tuned_rate(rows, method) for method in plan.METHODS}
    for name in reversed(plan.NAMES):
        for seed in plan.SEEDS:
            arm = plan.named(name, seed, rates)
            curve = curves.get(name, [0.3, 0.5, 0.6, 0.7, 0.8, 0.9])
            curve = curve + [curve[-1]] * (arm.iterations - plan.ITERATIONS)
            rows[arm.id] = made_row(arm, [score + 0.002 * seed * t for t, score in enumerate(curve)])
    return rows


def test_the_grid_grows_until_the_best_rate_has_been_compared_with_both_neighbours():
    rows = tuned_rows(BEST)
    for method, best in BEST.items():
        assert plan.tuned_rate(rows, method) == best
        tried, index = plan.tuning_scores(rows, method), plan.RATES.index(best)
        assert {*plan.RATES[max(0, index - 1) : index + 2]} <= tried.keys()
    edge = {"tspin": 3e-5}
    some = {id: row for id, row in tuned_rows(BEST | edge).items() if row["keys"]["learning_rate"] != 1e-4}
    assert plan.tuned_rate(some, "tspin") is None, "the best rate so far has a neighbour that was not tried"


def test_phases_come_one_by_one_and_end():
    rows: dict[str, dict] = {}
    seen = []
    while missing := next((m for phase in plan.phases(rows) if (m := [a for a in phase if a.id not in rows])), None):
        seen.append({arm.split for arm in missing})
        assert len({arm.lineage for arm in missing}) == len({arm.id for arm in missing}), "two arms in one directory"
        for arm in missing:
            best = BEST[arm.keys["method"]]
            distance = abs(plan.RATES.index(arm.keys["learning_rate"]) - plan.RATES.index(best))
            rows[arm.id] = made_row(arm, [0.3] + [0.9 - 0.1 * distance] * arm.iterations)
    assert {"valid"} in seen and seen[-1] == {"test"}
    assert all(len(series) == len(plan.SEEDS) for series in Study.of(rows).arms.values())
    assert Study.of(rows).arms.keys() == set(plan.NAMES)
    tuning, others = ({r["seed"] for r in rows.values() if r["split"] == split} for split in ("valid", "test"))
    assert not tuning & others


def test_an_arm_is_known_by_what_it_is():
    arm = Arm({"method": "tspin", "iterations": 10}, 0)
    assert arm.id != Arm({"method": "tspin"}, 0).id and arm.lineage == Arm({"method": "tspin"}, 0).lineage
    for other in (Arm(arm.keys, 1), Arm(arm.keys, 0, "valid"), Arm(arm.keys, 0, start={"method": "sft"})):
        assert other.id != arm.id and other.lineage != arm.lineage
    assert Arm(dict(reversed(arm.keys.items())), 0).id == arm.id


@pytest.mark.parametrize(
    ("name", "curves", "word"),
    [
        ("a", {"spin": [0.3, 0.5, 0.8, 0.7, 0.6, 0.5]}, "holds"),
        ("a", {}, "does not hold"),  # SPIN rises as well
        ("a", {"spin": [0.3, 0.5, 0.8, 0.7, 0.6, 0.5], "tspin": [0.3, 0.5, 0.6, 0.55, 0.8, 0.9]}, "does not hold"),
        ("c", {"tspin, a quarter, steps matched": [0.3, 0.5, 0.6, 0.7, 0.8, 0.885]}, "holds"),
        ("c", {"tspin, a quarter, steps matched": [0.3, 0.5, 0.6, 0.7, 0.8, 0.85]}, "does not hold"),
        ("d", {"tspin_no_history": [0.3, 0.5, 0.6, 0.5, 0.6, 0.7]}, "holds"),
        ("d", {"tspin_no_history": [0.3, 0.6, 0.7, 0.8, 0.9, 0.95]}, "does not hold"),
        ("b", {}, "does not hold"),  # as many fresh pairs in the wrong order under both
    ],
)
def test_verdicts_follow_the_rules_of_the_page(name, curves, word):
    decide = {"a": claims.claim_a, "b": claims.claim_b, "c": claims.claim_c, "d": claims.claim_d}[name]
    rows = full_rows(curves)
    assert decide(Study.of(rows)).word == word
    arms = {"a": ("tspin", "spin"), "b": ("spin",), "c": ("sft",), "d": ("tspin_no_history",)}[name]
    gone = next(iter(Study.of(rows).arms[arms[0]].values()))["id"]
    assert decide(Study.of({id: row for id, row in rows.items() if id != gone})).word == "is pending"


def test_fresh_pairs_are_counted_without_those_whose_two_responses_are_one():
    row = made_row(Arm({"method": "spin"}, 0), [0.3, 0.5])
    assert claims.last(claims.FRESH)(row) == claims.at(0, claims.FRESH)(row) == 0.4
    row["iterations"][-1] |= {"fresh_share": 0.0, "fresh_identical": 1.0}
    assert math.isnan(claims.last(claims.FRESH)(row))
    # A share of 26 of 256 pairs, or of 32 of which a quarter is left.
    row["iterations"][-1] |= {"fresh_share": 0.05, "fresh_identical": 0.9}
    assert math.isnan(claims.last(claims.FRESH)(row))
    row["iterations"][-1] |= {"fresh_share": 0.05, "fresh_identical": 0.75}
    assert claims.last(claims.FRESH)(row) == 0.2
    few = made_row(Arm({"method": "spin", **plan.QUARTER}, 0), [0.3, 0.5])
    few["iterations"][-1] |= {"fresh_share": 0.05, "fresh_identical": 0.78}
    assert math.isnan(claims.last(claims.FRESH)(few))
    rows = full_rows({})
    study = Study.of(rows)
    study.arms["spin"][3]["iterations"][-1] |= {"fresh_share": 0.0, "fresh_identical": 1.0}
    assert sorted(study.values("spin", claims.last(claims.FRESH))) == [0, 1, 2, 4]


def test_differences_are_between_runs_from_one_pupil(tmp_path):
    rows = full_rows({"spin, lam 1": [0.3, 0.5, 0.6, 0.7, 0.8, 0.95]})
    assert plan.unpaired(rows) == []
    rates = {method: plan.tuned_rate(rows, method) for method in plan.METHODS}
    moved, base = (plan.named(name, 2, rates) for name in ("spin, lam 1", "spin"))
    rows[moved.id]["pi_0_sha256"] = "another pupil"
    study = Study.of(rows)
    assert study.difference("spin, lam 1", "spin").n == 4 and study.estimate("spin, lam 1", plan.final).n == 5
    assert plan.unpaired(rows) == [(base, "another pupil")]
    # Run again from there, which is a row of its own, for this difference alone.
    path = tmp_path / "rows.jsonl"
    again = made_row(base, [0.3, 0.5, 0.6, 0.7, 0.8, 0.1]) | {"pi_0_sha256": "another pupil"}
    for row in [*rows.values(), again]:
        run.append_row(path, row)
    rows = run.read_rows(path)
    assert [row["pi_0_sha256"] for row in plan.runs_of(rows, base)] == ["pupil 2", "another pupil"]
    assert plan.unpaired(rows) == []
    study = Study.of(rows)
    found = study.difference("spin, lam 1", "spin")
    assert found.n == 5 and found.mean == pytest.approx((4 * 0.05 + 0.87) / 5)
    assert study.estimate("spin", plan.final).mean == pytest.approx(0.9 + 0.002 * 5 * 2)
    assert "pending" not in result.page(rows).lower()


def test_noise_over_seeds_leaves_a_claim_unsettled():
    rows = full_rows({"spin": [0.3, 0.5, 0.8, 0.7, 0.6, 0.5]})
    study = Study.of(rows)
    for seed, row in study.arms["tspin"].items():
        for t, entry in enumerate(row["iterations"]):
            entry["exact_match"] += 0.4 * (-1) ** (seed + t) * (seed < 2)
    assert claims.claim_a(Study.of(rows)).word == "is not settled"


def test_a_mean_on_the_wrong_side_settles_nothing():
    flat = [0.3, 0.5, 0.6, 0.7, 0.8, 0.9]
    rows = full_rows({"tspin_no_history": flat})
    assert claims.claim_d(Study.of(rows)).word == "does not hold"  # as fast in every seed
    for seed, row in Study.of(rows).arms["tspin_no_history"].items():
        for t, entry in enumerate(row["iterations"]):
            entry["exact_match"] += 0.01 * seed - 0.018 + 0.004 * (seed - 2) * t
    found = Study.of(rows)
    along = found.difference("tspin", "tspin_no_history")
    assert along.mean < 0 < along.mean + along.ci
    assert claims.claim_d(found).word == "is not settled"
    assert claims.side(along) == "not told apart"


@pytest.mark.parametrize(
    ("values", "word"), [([0.1, 0.2], "not told apart"), ([0.1, 0.11], "ahead"), ([-0.1, -0.11], "behind")]
)
def test_words_for_an_interval(values, word):
    assert claims.side(claims.Estimate.of(values)) == word
    assert claims.side(claims.Estimate.of(values[:1])) == claims.side(None) == "not told apart"


def test_the_page_begins_with_what_does_not_hold_and_counts_what_is_there(tmp_path):
    rows = full_rows({"tspin_no_history": [0.3, 0.5, 0.6, 0.5, 0.6, 0.7]})
    page = result.write(rows, tmp_path).read_text()
    first, *_ = page.splitlines()
    assert first.startswith("- **Does not hold: (a)")
    assert "pending" not in page.lower()
    for name in ("rates", "scores", "mechanism", "controls"):
        assert f"![{name}]({name}.png)" in page and (tmp_path / f"{name}.png").stat().st_size > 10_000
    assert "So far" not in page
    sorted_page = result.page(full_rows({"spin": [0.3, 0.5, 0.8, 0.7, 0.6, 0.5]}))
    assert sorted_page.startswith("- **Does not hold: (b)") and "- **Holds: (a)" in sorted_page
    partial = result.page({id: row for id, row in rows.items() if row["seed"] != 4})
    assert (
        "(a) T-SPIN rises at every iteration, SPIN peaks and falls: is pending.** So far, not yet with 5 seeds: T-SPIN"
        in partial
    )
    empty = result.page({})
    assert "So far" not in empty
    assert empty.startswith("- **Is pending: (a)") and "0 of 18" in empty
    for name in plan.NAMES:
        if name not in plan.METHODS:
            assert f"| {name} |" in page, "every control is in a block of the table"


def test_rows_survive_a_torn_line(tmp_path):
    path = tmp_path / "rows.jsonl"
    run.append_row(path, {"id": "a"})
    with path.open("a") as file:
        file.write('{"id": "b", "ke')
    run.append_row(path, {"id": "c"})
    assert list(run.read_rows(path)) == ["a", "c"]


@pytest.fixture
def tiny(monkeypatch):
    """The runner in this process, on a pupil and problems of a tiny size and two arms, of which one goes on from the other."""
    from tspin import demo

    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    monkeypatch.setattr(demo, "PUPIL", demo.PUPIL | sizes)
    for name, value in {"TRAIN_ROWS": 8, "EVAL_ROWS": 4, "ITERATIONS": 1}.items():
        monkeypatch.setattr(plan, name, value)
        monkeypatch.setattr(run, name, value)
    monkeypatch.setattr(run, "PRETRAINING", {"steps": 2, "batch_size": 4, "learning_rate": 1e-3})
    small = {"max_new_tokens": 3, "per_device_train_batch_size": 4, "num_train_epochs": 1}
    monkeypatch.setattr(run, "COMMON", plan.COMMON | small)
    monkeypatch.setattr(run, "ProcessPoolExecutor", lambda *_, **__: ThreadPoolExecutor(1))
    base = {"method": "sft", "learning_rate": 1e-3}
    first = [Arm({"method": "tspin", "learning_rate": 1e-3}, 0), Arm(base, 0)]
    second = [Arm({"method": "tspin", "learning_rate": 1e-3, "iterations": 2}, 0)]
    second.append(Arm({"method": "spin", "learning_rate": 1e-3}, 0, start=base))
    monkeypatch.setattr(run, "phases", lambda rows: [first, second])
    return first + second


def lasting(row: dict) -> dict:
    return {key: value for key, value in row.items() if key not in ("cpu_s", "wall_s", "time")}


def test_a_study_goes_on_from_its_rows_and_repeats_them(tiny, tmp_path):
    rows_path = tmp_path / "rows.jsonl"
    assert run.run(tmp_path / "a", rows_path, jobs=1, commit="c", limit=1) == 3
    assert list(run.read_rows(rows_path)) == [tiny[0].id]
    assert run.run(tmp_path / "a", rows_path, jobs=1, commit="c") == 0
    rows = run.read_rows(rows_path)
    assert list(rows) == [arm.id for arm in tiny]
    for arm in tiny:
        row = rows[arm.id]
        assert [entry["iteration"] for entry in row["iterations"]] == list(range(-1, arm.iterations))
        assert {"exact_match", "exact_match_sampled"} <= row["iterations"][-1].keys() and row["iterations"][-1]["mean"][
            "loss"
        ] > 0
    assert rows[tiny[3].id]["pi_0_sha256"] == rows[tiny[1].id]["model_sha256"], "it starts from where its start ended"
    assert rows[tiny[2].id]["iterations"][:2][0] == rows[tiny[0].id]["iterations"][0]
    # What is longer went on in the directory of what is shorter, and is as if it had been run at once, on another machine.
    other = tmp_path / "others.jsonl"
    run.append_row(other, rows[tiny[0].id])
    run.append_row(other, rows[tiny[1].id])
    assert run.run(tmp_path / "b", other, jobs=1, commit="c") == 0
    again = run.read_rows(other)
    assert again[tiny[2].id]["model_sha256"] == rows[tiny[2].id]["model_sha256"]
    assert lasting(again[tiny[3].id]) == lasting(rows[tiny[3].id])
    # A kill after an arm and before its row: the row is made from what is there, be it longer than the arm, without times.
    kept = [line for line in other.read_text().splitlines(True) if tiny[0].id not in line and tiny[3].id not in line]
    rows_path.write_text("".join(kept))
    assert run.run(tmp_path / "b", rows_path, jobs=1, commit="c") == 0
    late = run.read_rows(rows_path)
    assert lasting(late[tiny[3].id]) == lasting(rows[tiny[3].id]) and late[tiny[3].id]["cpu_s"] is None
    short = late[tiny[0].id]
    assert len(short["iterations"]) == 2 and short["model_sha256"] == rows[tiny[0].id]["model_sha256"]
    assert json.loads(json.dumps(late)) == late
