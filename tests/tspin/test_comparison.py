"""Groups of runs and their statistics, against tables of Student's t and against arithmetic done by hand."""

import json
import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tspin.comparison import (
    Estimate,
    config_differences,
    group_runs,
    last_common_iteration,
    paired_difference,
    student_t,
)
from tspin.run_files import Run


def run(name="run", scores=(), **config):
    rows = [{"iteration": t, "exact_match": score, "log": []} for t, score in enumerate(scores) if score is not None]
    return Run(Path(name), {"method": "tspin", "model_name_or_path": "m", **config}, rows)


# Abramowitz and Stegun, table 26.10, Q = 0.975 and 0.995 one-sided.
@pytest.mark.parametrize(
    "df, wide, wider",
    [
        (1, 12.706, 63.657),
        (2, 4.303, 9.925),
        (3, 3.182, 5.841),
        (4, 2.776, 4.604),
        (9, 2.262, 3.250),
        (30, 2.042, 2.750),
    ],
)
def test_students_t_is_that_of_the_tables(df, wide, wider):
    assert student_t(df) == pytest.approx(wide, abs=6e-4)
    assert student_t(df, 0.99) == pytest.approx(wider, abs=6e-4)


def test_many_degrees_of_freedom_are_the_normal_distribution():
    assert student_t(100_001) == pytest.approx(1.959964, abs=1e-4) == student_t(100_000)


def test_an_estimate_has_mean_standard_deviation_and_interval():
    assert Estimate.of([]) is None
    assert Estimate.of([0.3]) == Estimate(0.3, None, None, 1)
    made = Estimate.of([1.0, 2.0, 6.0])
    assert (made.mean, made.n, made.sd) == (3.0, 3, pytest.approx(math.sqrt(7)))
    assert made.ci == pytest.approx(4.30265 * math.sqrt(7 / 3), rel=1e-5)
    assert math.isnan(Estimate.of([1.0, math.inf]).sd)


@settings(derandomize=True, max_examples=50, deadline=None)
@given(st.lists(st.floats(-1, 1), min_size=2, max_size=8), st.floats(-10, 10), st.randoms())
def test_a_shift_of_all_seeds_is_the_difference_whatever_the_seeds_and_their_order(scores, shift, rng):
    first = [run(f"a{seed}", [score], seed=seed) for seed, score in enumerate(scores)]
    other = [run(f"b{seed}", [score + shift], seed=seed, method="spin") for seed, score in enumerate(scores)]
    rng.shuffle(other)
    ours, theirs = group_runs([*first, *other])
    difference = paired_difference(ours, theirs, 0, "exact_match")
    assert difference.mean == pytest.approx(shift, abs=1e-12) and difference.n == len(scores)
    assert difference.ci == pytest.approx(0, abs=1e-9)


def test_only_seeds_that_both_have_are_paired():
    runs = [run("a0", [0.5, 0.6], seed=0), run("a1", [0.5], seed=1)]
    runs += [run("b1", [0.7, 0.9], seed=1, method="spin"), run("b2", [0.1, 0.1], seed=2, method="spin")]
    ours, theirs = group_runs(runs)
    assert paired_difference(ours, theirs, 0, "exact_match") == Estimate(pytest.approx(0.2), None, None, 1)
    assert paired_difference(ours, theirs, 1, "exact_match") is None
    assert last_common_iteration([ours, theirs], "exact_match") == 0
    assert last_common_iteration([ours, theirs], "logprob") is None


def test_groups_are_what_differs_besides_seed_and_place():
    runs = [
        run("a", seed=0, output_dir="x", dataset="d"),
        run("b", seed=1, output_dir="y", dataset="d", model_name_or_path="another"),
        run("c", seed=0, dataset="d", learning_rate=1e-5),
        run("d", seed=0, dataset="d", method="spin", beta=0.5),
        run("e", seed=0, dataset="d", method="spin", beta=0.3),
        run("f", seed=0, dataset="d", method="sft"),
    ]
    groups = group_runs(runs)
    assert [[r.directory.name for r in g.runs] for g in groups] == [["a", "b"], ["c"], ["d"], ["e"], ["f"]]
    assert len({g.label for g in groups}) == 5
    assert [g.label.split(",")[0] for g in groups] == ["tspin", "tspin", "spin", "spin", "sft"]
    differing = dict(config_differences(groups))
    assert next(iter(differing)) == "method" and set(differing) == {"method", "beta", "learning_rate"}
    assert differing["beta"] == [0.1, 0.1, 0.5, 0.3, 0.1] and differing["learning_rate"][:2] == [5e-7, 1e-5]


def test_a_default_that_is_given_is_no_difference():
    one, two = run("a", seed=0), run("b", seed=1, beta=0.1, learning_rate=5e-7, temperature=1.0, on_bad_row="error")
    (group,) = group_runs([one, two])
    assert group.label == "tspin" and len(group.runs) == 2


def test_labels_name_the_method_only_where_it_differs():
    assert [g.label for g in group_runs([run("a", alpha=0.3), run("b")])] == ["alpha=0.3", "alpha=1.0"]
    assert [g.label for g in group_runs([run("a", method="spin", lam=1.0), run("b")])] == ["spin", "tspin"]


def test_a_label_has_the_keys_that_part_its_method_and_none_of_another(tmp_path):
    runs = [
        run("a", alpha=0.3),
        run("b"),
        run("c", method="spin"),
        run("d", method="spin", lam=1.0),
        run("e", method="sft"),
    ]
    labels = ["tspin, alpha=0.3", "tspin, alpha=1.0", "spin, lam=0.1", "spin, lam=1.0", "sft"]
    assert [g.label for g in group_runs(runs)] == labels


def test_an_arm_keeps_its_name_as_its_label():
    keys = {"method": "spin", "lam": 1.0}
    runs = [run(f"x/gentle_seed_{seed}", seed=seed, sft_coef=0.5, **keys) for seed in (0, 1)]
    runs += [run("x/sft_seed_0", seed=0, method="spin", alpha=2.0), run("other", seed=0, **keys)]
    assert [g.label for g in group_runs(runs)][:2] == ["gentle", "sft"]
    assert group_runs(runs)[2].label == "alpha=1.0, sft_coef=0.0", "no arm"
    table = dict(config_differences(group_runs(runs)))
    assert table == {"alpha": [1.0, 2.0, 1.0], "lam": [1.0, 0.1, 1.0], "sft_coef": [0.5, 0.0, 0.0]}
    # Of two comparisons, and of one config under two names, no name says which group it is.
    twice = [run("x/a_seed_0", seed=0, lam=1.0), run("y/a_seed_0", seed=0)]
    assert [g.label for g in group_runs(twice)] == ["lam=1.0", "lam=0.1"]
    assert [g.label for g in group_runs([run("x/a_seed_0", seed=0), run("x/b_seed_1", seed=1)])] == ["tspin"]
    assert group_runs([run("x/a_seed_0", seed=1)])[0].label == "tspin", "the seed of another"


def test_models_part_groups_only_where_seeds_do_not():
    runs = [run(f"{model}{seed}", seed=seed, model_name_or_path=model) for model in "xy" for seed in (0, 1)]
    groups = group_runs(runs)
    assert [g.label for g in groups] == ["model_name_or_path=x", "model_name_or_path=y"]
    assert [len(g.runs) for g in groups] == [2, 2]


def test_the_same_sample_twice_is_refused(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text(json.dumps({"method": "spin", "seed": 3, "output_dir": name}))
        (tmp_path / name / "run.json").write_text("{}")
    with pytest.raises(
        ValueError, match=r"want runs that differ in config or seed, got .*one and .*two.*leave one out"
    ):
        group_runs([tmp_path / "one", tmp_path / "two"])
    with pytest.raises(ValueError, match="leave one out"):
        group_runs([tmp_path / "one", tmp_path / "one"])
