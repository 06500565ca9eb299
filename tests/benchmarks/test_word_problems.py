"""The word problems are what they say, the plan goes on where it stopped, and one arm runs from nothing."""

import itertools
import json
import random
import re
from dataclasses import replace
from typing import ClassVar

import pytest

from benchmarks.study import word_problems as study
from benchmarks.study.problems import ANSWER, FAMILIES, TOKEN, calculate, distinct, problems, split_of, vocabulary
from benchmarks.study.word_pupil import build_tokenizer
from benchmarks.study.word_results import changes, comparison_table, differences, tuning_table, write

TINY = study.SIZES["tiny"]
SEEDS = range(TINY.seeds)
SPLITS = ("train", "val", "test", "templates")


def first(split: str, count: int, seed: int = 0):
    return list(itertools.islice(problems(split, seed), count))


def test_clean_answers_hold_in_every_step_and_sloppy_ones_forget_to_carry():
    for problem in first("train", 500):
        for text, is_sloppy in ((problem.answer, False), (problem.sloppy, True)):
            steps = re.findall(r"(\d+) ([-+*]) (\d+) = (\d+)", text)
            assert len(steps) == 2
            for x, operator, y, result in steps:
                assert int(result) == calculate(operator, int(x), int(y), is_sloppy)
                if not is_sloppy:
                    assert int(result) == eval(f"{x}{operator}{y}")
            assert re.search(ANSWER, text).group(1) == steps[-1][-1]
        # Numbers of the answer's first step come from the problem.
        assert set(steps[0][0:3:2]) <= set(re.findall(r"\d+", problem.prompt)) | {"2", "3", "4"}


@pytest.mark.parametrize(
    "operator, x, y, wanted",
    [
        ("+", 47, 38, 75),
        ("+", 47, 32, 79),
        ("+", 95, 93, 188),
        ("-", 182, 47, 145),
        ("-", 187, 42, 145),
        ("*", 3, 27, 61),
        ("*", 27, 3, 61),
    ],
)
def test_a_sloppy_pupil_works_each_column_for_itself(operator, x, y, wanted):
    assert calculate(operator, x, y, sloppy=True) == wanted


def test_a_pupil_that_learns_sloppiness_is_right_in_a_third_of_the_problems():
    made = first("train", 4000) + first("test", 2000)
    right = sum(re.search(ANSWER, p.answer)[1] == re.search(ANSWER, p.sloppy)[1] for p in made)
    assert 0.30 < right / len(made) < 0.45


def test_splits_share_no_numbers_and_held_out_templates_are_in_no_other_split():
    seen = {split: set() for split in SPLITS}
    for split in SPLITS:
        for problem in first(split, 3000):
            family = next(f for f in FAMILIES if f.name == problem.family)
            seen[split].add((problem.family, problem.answer.rpartition(" = ")[0], problem.template))
            assert (problem.template == len(family.templates) - 1) == (split == "templates")
    numbers = {split: {key[:2] for key in keys} for split, keys in seen.items()}
    for one, other in itertools.combinations(("train", "val", "test"), 2):
        assert not numbers[one] & numbers[other]
    assert not numbers["train"] & numbers["templates"]
    for family in FAMILIES:
        rng, names = random.Random(1), []
        for _ in range(4000):
            names.append(split_of(family, {name: rng.randint(*bounds) for name, bounds in family.bounds.items()}))
        assert names.count("val") / 4000 == pytest.approx(1 / 16, abs=0.03)
        assert names.count("test") / 4000 == pytest.approx(1 / 8, abs=0.04)


def test_problems_are_the_same_every_time_and_distinct_ones_are_distinct():
    assert first("train", 50, 3) == first("train", 50, 3) != first("train", 50, 4)
    made = distinct("templates", 1, 300)
    assert len({p.prompt for p in made}) == 300 and made == distinct("templates", 1, 300)


def test_unseen_phrasing_has_no_unseen_word():
    def words(texts):
        return set(re.findall(r"[A-Za-z]+", re.sub(r"\{\w+\}", "", " ".join(texts))))

    known = words(t for f in FAMILIES for t in (*f.templates[:-1], *f.sentences))
    assert words(f.templates[-1] for f in FAMILIES) <= known | {"dollars"}


def test_every_token_is_known_and_texts_come_back():
    tokenizer = build_tokenizer()
    assert len(vocabulary()) == len(set(vocabulary()))
    for problem in itertools.chain(*(first(split, 300) for split in SPLITS)):
        for text in (f"{problem.prompt}\n{problem.answer}", problem.sloppy):
            ids = tokenizer(text, add_special_tokens=False).input_ids
            assert tokenizer.unk_token_id not in ids and tokenizer.decode(ids) == text
            assert len(ids) == len(re.findall(TOKEN, text))
        assert len(ids) < 64


def row_of(arm: study.Arm, greedy: float, pupil: str | None = None) -> dict:
    point = {split: {"greedy": greedy, "sampled": greedy / 2} for split in arm.splits}
    fresh = {"fresh_share": 0.2, "fresh_identical": 0.5, "fresh_rows": 60}
    points = [{"iteration": t, **point} | (fresh if t >= 0 else {}) for t in (-1, 0)]
    facts = {
        "phase": arm.phase,
        "method": arm.method,
        "rate": arm.rate,
        "seed": arm.seed,
        "size": "tiny",
        "seconds": 1.0,
    }
    return {"arm": arm.name, **facts, "pupil": pupil or f"p{arm.seed}", "iterations": points}


def tuned_rows() -> list[dict]:
    """Every method best at its second rate, T-SPIN at its third, next to which one more was then tried."""
    rows = []
    for arm in [*study.plan([], TINY), study.Arm("tune", "tspin", 3e-5, study.TUNING_SEED)]:
        best = study.RATES[arm.method][2 if arm.method == "tspin" else 1]
        rows.append(row_of(arm, 0.6 if arm.rate == best else 0.4))
    return rows


def test_rates_of_every_method_are_tuned_first():
    arms = study.plan([], TINY)
    assert {a.phase for a in arms} == {"tune"} and {a.seed for a in arms} == {study.TUNING_SEED} and len(arms) == 15
    rows = tuned_rows()
    assert study.plan(rows[:-1], TINY) == [  # methods whose rates are known can go on
        study.Arm("tune", "tspin", 3e-5, study.TUNING_SEED),
        *(
            study.Arm("test", m, r, s)
            for s in SEEDS
            for m, r in (("spin", 1e-6), ("sft", 1e-4), ("tspin_no_history", 3e-5), ("tspin_ref", 3e-5))
        ),
    ]
    arms = study.plan(rows, TINY)
    assert [a.seed for a in arms] == [seed for seed in SEEDS for _ in study.METHODS]
    assert {a.method: a.rate for a in arms} == {
        "tspin": 1e-5,
        "spin": 1e-6,
        "sft": 1e-4,
        "tspin_no_history": 3e-5,
        "tspin_ref": 3e-5,
    }
    assert study.plan([*rows, row_of(arms[0], 0.5)], TINY) == arms[1:]
    assert {a.seed for a in study.plan(rows, replace(TINY, seeds=5))} == {0, 1, 2, 3, 4}


def test_a_grid_grows_while_an_end_is_the_best_of_it():
    tried = lambda **found: [
        row_of(study.Arm("tune", "spin", float(r), study.TUNING_SEED), score) for r, score in found.items()
    ]
    rates = lambda **found: study.grid(tried(**found), "spin")
    three = [3e-7, 1e-6, 3e-6]
    assert rates() == rates(**{"3e-7": 0.9}) == rates(**{"3e-7": 0.1, "1e-6": 0.2, "3e-6": 0.1}) == three
    assert rates(**{"3e-7": 0.3, "1e-6": 0.2, "3e-6": 0.1}) == [1e-7, *three]
    assert rates(**{"3e-7": 0.1, "1e-6": 0.2, "3e-6": 0.3}) == [*three, 1e-5]
    assert rates(**{"3e-7": 0.2, "1e-6": 0.2, "3e-6": 0.1}) == three  # equals: the lower one, and nothing beyond it
    every = {f"{rate:g}": rate for rate in study._HALF_DECADES}
    assert rates(**every) == list(study._HALF_DECADES) and study.tuned(tried(**every), "spin") == 3e-3


def test_differences_are_between_arms_of_one_pupil():
    tspin, spin = (study.Arm("test", method, 1e-5, 0) for method in ("tspin", "spin"))
    rows = [row_of(tspin, 0.7), row_of(spin, 0.5), row_of(replace(spin, seed=1), 0.4, "another")]
    rows[1]["iterations"][0]["test"] = {"greedy": 0.3, "sampled": 0.3}
    assert differences(rows, rows[1:], lambda p: p["test"]["greedy"], 0) == pytest.approx([-0.2])
    assert differences(rows, rows[1:], lambda p: p["test"]["greedy"], -1) == pytest.approx([-0.3])
    assert differences(rows, rows[1:], lambda p: p.get("fresh_share"), -1) == []
    table = comparison_table(rows)
    assert "| T-SPIN, unseen numbers, greedy | 1e-05 | 1 | 0.700 | 0.700 |  |  |" in table
    spin = "| SPIN, unseen numbers, greedy | 1e-05 | 2 | 0.350 ± 0.071 | 0.450 ± 0.071 | -0.200 (1 seed) | pending |"
    assert spin in table


def test_intervals_are_students_over_seeds_and_changes_are_seed_by_seed():
    tspin, spin = (
        [row_of(study.Arm("test", method, 1e-5, seed), 0.5) for seed in SEEDS] for method in ("tspin", "spin")
    )
    for row, last in zip(spin, (0.4, 0.5, 0.9)):
        row["iterations"][-1]["test"] = {"greedy": last, "sampled": last}
    # By hand: mean 0.1, standard deviation 0.2646, Student's t of two degrees 4.303.
    assert "+0.100 [-0.557, +0.757] |" in comparison_table(tspin + spin)
    assert "- SPIN at 1e-05: +0.100 [-0.557, +0.757]; largest drop less T-SPIN's -0.100 [-0.757, +0.557]" in changes(
        tspin + spin
    )
    assert "- T-SPIN at 1e-05: +0.000 [+0.000, +0.000]" in changes(tspin)


def test_runs_at_another_rate_are_another_arm():
    rows = [
        *tuned_rows(),
        *(row_of(study.Arm("test", "tspin", rate, 0), greedy) for rate, greedy in ((1e-5, 0.7), (3e-5, 0.1))),
    ]
    rows += [row_of(study.Arm("test", "spin", rate, 0), greedy) for rate, greedy in ((3e-7, 0.2), (1e-6, 0.6))]
    lines = [line for line in comparison_table(rows).splitlines() if "SPIN, unseen numbers, greedy" in line]
    assert [line.split(" | ")[1:5] for line in lines] == [
        ["1e-05", "1", "0.700", "0.700"],
        ["3e-05", "1", "0.100", "0.100"],
        ["1e-06", "1", "0.600", "0.600"],
        ["3e-07", "1", "0.200", "0.200"],
    ]
    assert changes(rows).count("SPIN at") == 4
    assert differences(rows, rows[-1:], lambda p: p["test"]["greedy"], 0) == pytest.approx([-0.1])


def test_a_share_of_few_fresh_pairs_is_left_out_with_its_mean():
    rows = [row_of(study.Arm("test", "tspin", 1e-5, seed), 0.5) for seed in (0, 1)]
    assert "| T-SPIN, fresh y<y' | 1e-05 | 2 | - | 0.200 ± 0.000 |  |" in comparison_table(rows)
    rows[0]["iterations"][-1]["fresh_identical"] = 0.52  # 28.8 of 60
    assert "| T-SPIN, fresh y<y' | 1e-05 | 2 | - | - |  |" in comparison_table(rows)


def test_the_table_and_the_picture_of_rows(tmp_path):
    rows = tuned_rows()
    assert "1e-05: 0.600 *, 3e-05: 0.400" in tuning_table(rows) and "1e-06: 0.600 *, 3e-06" in tuning_table(rows)
    assert "- sft: 3e-05: -," in tuning_table([])
    write(rows, tmp_path)
    assert not list(tmp_path.iterdir())
    write(
        rows + [row_of(study.Arm("test", method, 1e-5, s), 0.5) for method in study.METHODS for s in (0, 1)], tmp_path
    )
    assert (tmp_path / "word_problems_tiny.png").stat().st_size > 20_000


def test_a_file_of_rows_of_several_sizes_is_shown_one_size_at_a_time(tmp_path, capsys):
    row = row_of(study.Arm("test", "tspin", 1e-5, 0), 0.5)
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row | {"size": size}) + "\n" for size in ("tiny", "small", "small")))
    for size, is_held in (("tiny", True), ("small", True), ("full", False)):
        assert study.main(["table", str(path), "--size", size]) == 0
        assert ("T-SPIN, unseen numbers, greedy | 1e-05 | 1" in capsys.readouterr().out) == is_held
        assert (tmp_path / f"word_problems_{size}.png").exists() == is_held


def test_the_page_shows_what_the_rows_that_are_committed_come_to():
    page = (study.HERE / "WORD_PROBLEMS.md").read_text(encoding="utf-8")
    for size in study.SIZES:
        rows = study.read_rows(study.HERE / "word_problems.jsonl", size)
        if rows:
            assert not study.plan(rows, study.SIZES[size]) or "not all arms" in page
            assert tuning_table(rows) in page and comparison_table(rows) in page and changes(rows) in page
            assert (study.HERE / f"word_problems_{size}.png").exists()


class Process:
    """Stands in for a started command: a pupil is a folder, an arm a row; what `fails` fails, what `hangs` never ends."""

    log: ClassVar[list[str]] = []
    fails: ClassVar[set[str]] = set()
    hangs = False

    def __init__(self, command, **_):
        words = command[3:]
        directory = study.Path(words[words.index("--directory") + 1])
        self.returncode = None if self.hangs else 0
        if words[0] == "pupil":
            (directory / f"pupil_tiny_{words[2]}").mkdir(parents=True)
            self.log.append(f"pupil {words[2]}")
            self.returncode = 0
            return
        arm = study.Arm(words[1], words[2], float(words[3]), int(words[4]))
        self.log.append(arm.name)
        if arm.method in self.fails:
            self.returncode = 1
            return
        (directory / arm.name).mkdir(parents=True)
        (directory / arm.name / "row.json").write_text(json.dumps(row_of(arm, 0.5)))

    def poll(self):
        return self.returncode

    def wait(self, timeout=None):
        return self.returncode

    def kill(self):
        self.log.append("killed")


@pytest.fixture
def processes(monkeypatch):
    monkeypatch.setattr(study.subprocess, "Popen", Process)
    monkeypatch.setattr(study.time, "sleep", lambda _: None)
    Process.log, Process.fails, Process.hangs = [], set(), False
    return Process


def test_a_call_goes_on_after_the_rows_that_are_there(processes, tmp_path):
    path, options = tmp_path / "rows.jsonl", {"seconds": 60, "jobs": 2, "commit": None}
    arms = study.plan([], TINY)
    path.write_text("".join(json.dumps(row_of(arm, 0.5)) + "\n" for arm in arms[:-1]))
    assert study.run(tmp_path, path, TINY, **options) == 0
    started = [name for name in processes.log if name != "killed"]
    assert started[:2] == [f"pupil {study.TUNING_SEED}", arms[-1].name]
    assert [name for name in started if name.startswith("pupil")] == [f"pupil {s}" for s in (study.TUNING_SEED, *SEEDS)]
    assert len(study.read_rows(path, "tiny")) == len(arms) + 15 and not study.plan(study.read_rows(path, "tiny"), TINY)
    assert study.read_rows(path) == []  # of the full size


def test_a_failed_arm_is_counted_and_does_not_stop_the_others(processes, tmp_path):
    processes.fails = {"spin"}
    assert study.run(tmp_path, tmp_path / "rows.jsonl", TINY, seconds=60, jobs=3, commit=None) == 3
    assert {row["method"] for row in study.read_rows(tmp_path / "rows.jsonl", "tiny")} >= {"tspin", "sft"}


def test_what_would_not_end_in_time_is_not_begun_and_what_runs_then_is_stopped(processes, tmp_path):
    path, arms = tmp_path / "rows.jsonl", study.plan([], TINY)
    path.write_text(json.dumps(row_of(arms[0], 0.5) | {"seconds": 1000}) + "\n")
    assert study.run(tmp_path, path, TINY, seconds=900, jobs=2, commit=None) == 0
    assert processes.log == []
    processes.hangs = True
    path.write_text("")
    assert study.run(tmp_path, path, TINY, seconds=0.3, jobs=2, commit=None) == 0
    assert [name for name in processes.log if name != "killed"][1:] == [arm.name for arm in arms[:2]]
    assert processes.log[-2:] == ["killed", "killed"] and not study.read_rows(path, "tiny")


def test_an_arm_runs_from_nothing_and_its_pupil_is_made_the_same_again(tmp_path):
    size = replace(TINY, rows=8, held_out=4, iterations=1)
    arm = study.Arm("test", "tspin", 1e-4, 0)
    hashes = []
    for folder in ("one", "two"):
        study.make_pupil(size, 0, tmp_path / folder / "pupil_tiny_0")
        hashes.append(study.storage.model_hash(tmp_path / folder / "pupil_tiny_0"))
    assert hashes[0] == hashes[1]
    row = study.run_arm(arm, size, tmp_path / "one", "abc")
    assert (row["arm"], row["pupil"], row["commit"]) == (arm.name, hashes[0], "abc")
    assert [point["iteration"] for point in row["iterations"]] == [-1, 0]
    assert all(set(point["test"]) == set(point["templates"]) == {"greedy", "sampled"} for point in row["iterations"])
    assert row["iterations"][1]["fresh_rows"] == 8 and 0 <= row["iterations"][1]["fresh_identical"] <= 1
    training = row["iterations"][1]["training"]
    assert training["logps/chosen"] < 0 and "saturated" in training and 0 <= row["iterations"][1]["fresh_share"] <= 1
    json.dumps(row)


def test_scores_are_counted_split_by_split(tmp_path):
    import pyarrow as pa

    from tspin.generate import _SCHEMA
    from tspin.storage import write_json, write_shard

    arm, size = study.Arm("test", "sft", 1e-4, 0), replace(TINY, held_out=3)
    study._write_rows(tmp_path / "held_out.jsonl", [("test", 3), ("templates", 3)], 0)
    answers = [json.loads(line)["completion"] for line in (tmp_path / "held_out.jsonl").read_text().splitlines()]
    for mode, right in (("greedy", {0, 4, 5}), ("sampled", {1, 2, 3})):
        texts = [answer if i in right else "The answer is 0." for i, answer in enumerate(answers)]
        reasons = ["length" if (mode, i) == ("sampled", 3) else "stop" for i in range(6)]
        records = [
            {"row": i, "token_ids": [1], "finish_reason": reason, "text": text}
            for i, (text, reason) in enumerate(zip(texts, reasons))
        ]
        request = {"rows": 6, "shard_size": 6}
        (tmp_path / "eval" / mode).mkdir(parents=True)
        write_shard(tmp_path / "eval" / mode, 0, pa.Table.from_pylist(records, schema=_SCHEMA), request)
    write_json(tmp_path / "eval.json", {"iteration": 0})
    scores = study._scores(tmp_path / "eval.json", arm, size, tmp_path)
    assert scores["test"] == {"greedy": pytest.approx(1 / 3), "sampled": pytest.approx(2 / 3)}
    assert scores["templates"] == {"greedy": pytest.approx(2 / 3), "sampled": 0}
