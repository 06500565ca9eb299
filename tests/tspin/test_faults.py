"""Nothing is lost: a run that is killed, damaged, out of space or not alone ends as if nothing had been, or says what is wrong.

A sample in the ordinary suite, all of it under `pytest -m soak`, whose log says what became of every fault;
`TSPIN_FAULTS=0.2` runs a random fifth of them.
"""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from faults import HOWS, damage, files_of, kind, outcome, run_jobs
from test_loop import METHODS, make_toy, toy_config

from tspin import storage
from tspin.loop import SelfPlay

SMALL = {"max_rows": 16, "eval_rows": 2}
RIGHT = {"same", "named", "refused", "scratch"}
SHARE = float(os.environ.get("TSPIN_FAULTS", 1))
STEP, EVENTS = 3, ("fsync", "replace", "unlink", "rmtree", "next_tokens", "step", "save", "safe_save_file")


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    root = tmp_path_factory.mktemp("toy")
    make_toy(root)
    return root


@pytest.fixture(scope="module")
def undisturbed(toy, tmp_path_factory):
    """For a method: its undisturbed run with its result, and runs killed in the middle of each kind of stage, made once."""
    made = {}

    def make(method):
        if method not in made:
            root = tmp_path_factory.mktemp(method)
            # Amid the training of iteration 1, after its second checkpoint; and amid the first shard of samples.
            amid = {"training": ["step", 14, "before"], "generation": ["next_tokens", 20, "before"]}
            plan = [{"faults": [], "keep": True}]
            plan += [{"faults": [{"fatal": fatal}], "keep": True, "leave": True} for fatal in amid.values()]
            first, *others = run_jobs(toy, root, plan, method=method, **SMALL)
            assert first["statuses"] == [0] and first["counts"]["step"] == 16, first
            assert all(other["statuses"] == [-signal.SIGKILL] for other in others)
            made[method] = first, {stage: Path(other["run"]) for stage, other in zip(amid, others)}
        return made[method]

    return make


def check_killed(results, wanted, first):
    """Every run ends as the undisturbed one, and repeats at most a checkpoint interval and a shard for each kill."""
    for result in results:
        assert result["statuses"][-1] == 0, (result["faults"], result["printed"][-3000:])
        found = outcome(Path(result["run"]))
        assert found == wanted, (
            result["faults"],
            sorted(k for k in {*wanted, *found} if found.get(k) != wanted.get(k)),
        )
        kills = result["statuses"].count(-signal.SIGKILL)
        assert result["counts"]["step"] <= first["counts"]["step"] + STEP * kills, result
        assert result["counts"]["next_tokens"] <= first["counts"]["next_tokens"] + 12 * kills, result
        shutil.rmtree(result["run"])


def kill_plan(counts, seconds, draw, number):
    """Kills at random events, half of them torn writes or renames and half at random times; every third run is killed twice."""
    plan = []
    for i in range(number):
        faults = []
        for _ in range(1 + (i % 3 == 2)):
            if i % 2:
                faults.append({"after": draw.uniform(0, seconds)})
            else:
                name = draw.choice([event for event in EVENTS if counts.get(event)])
                faults.append({"fatal": [name, draw.randrange(counts[name]), draw.choice(["before", "torn", "after"])]})
        plan.append({"faults": faults, "keep": True})
    return plan


def test_a_killed_run_ends_as_if_it_had_not_been(toy, tmp_path, undisturbed):
    first, _ = undisturbed("tspin")
    assert all(first["counts"].get(event) for event in EVENTS)
    moments = [["replace", 0, "after"], ["step", 4, "before"], ["save", 1, "torn"], ["safe_save_file", 2, "torn"]]
    plan = [{"faults": [{"fatal": moment}], "keep": True} for moment in moments]
    plan += kill_plan(first["counts"], first["seconds"], random.Random(1), 2)
    results = run_jobs(toy, tmp_path, plan, method="tspin", **SMALL)
    assert all(result["statuses"][0] == -signal.SIGKILL for result in results[: len(moments)])
    check_killed(results, outcome(Path(first["run"])), first)


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("method", METHODS)
def test_fifty_random_kills(toy, tmp_path, undisturbed, method):
    first, _ = undisturbed(method)
    plan = kill_plan(first["counts"], first["seconds"], random.Random(method), round(50 * SHARE))
    results = run_jobs(toy, tmp_path, plan, method=method, **SMALL)
    kills = sum(result["statuses"].count(-signal.SIGKILL) for result in results)
    check_killed(results, outcome(Path(first["run"])), first)
    print(f"\n{method}: {len(results)} runs killed {kills} times: {len(results)} as undisturbed, 0 lost, 0 silent")


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_kills_before_and_after_every_rename(toy, tmp_path, undisturbed):
    """Those of shards, triplets, models, evaluations, seals and of state.json are the borders of stages."""
    first, _ = undisturbed("tspin")
    moments = [["replace", i, moment] for i in range(first["counts"]["replace"]) for moment in ("before", "after")]
    results = run_jobs(
        toy, tmp_path, [{"faults": [{"fatal": m}], "keep": True} for m in moments], method="tspin", **SMALL
    )
    check_killed(results, outcome(Path(first["run"])), first)
    print(f"\nborders: {len(results)} kills before or after a rename: 0 lost, 0 silent")


def damage_plan(first, amid, draw):
    """Each kind of file of the finished run and of two killed ones, damaged in each way."""
    wanted, plan = first["run"], []
    for start in (first["run"], *map(str, amid.values())):
        for name in files_of(Path(start)):
            for how in (*HOWS, *(["stray"] if "shard" in name or "model/" in name else [])):
                fault = {"damage": name, "how": how, "seed": draw.randrange(2**32)}
                plan.append({"start": start, "faults": [fault], "wanted": wanted})
    return plan


def check_damaged(results, method):
    table = Counter((r["verdict"] if r["verdict"] in RIGHT else "WRONG") for r in results)
    print(f"\n{method}: {len(results)} damaged files: {dict(table)}")
    rows: dict[str, Counter] = {}
    for r in results:
        rows.setdefault(kind(r["faults"][0]["damage"]), Counter())[r["verdict"].split(":")[0]] += 1
    for name, counts in sorted(rows.items()):
        print(f"    {name}: " + ", ".join(f"{count} {word}" for word, count in sorted(counts.items())))
    wrong = [(r["faults"][0], r["run"], r["verdict"]) for r in results if r["verdict"] not in RIGHT]
    assert not wrong, json.dumps(wrong[:20], indent=1)


def test_a_damaged_file_is_made_again_or_named_with_a_remedy(toy, tmp_path, undisturbed):
    first, amid = undisturbed("tspin")
    plan = random.Random(3).sample(damage_plan(first, amid, random.Random(3)), 10)
    check_damaged(run_jobs(toy, tmp_path, plan, method="tspin", **SMALL), "tspin")


@pytest.mark.soak
@pytest.mark.timeout(5400)
@pytest.mark.parametrize("method", METHODS)
def test_every_kind_of_file_damaged_in_every_way(toy, tmp_path, undisturbed, method):
    first, amid = undisturbed(method)
    # All of it for the method that writes every kind of file, a sample for the others.
    plan = damage_plan(first, amid, random.Random(method))
    plan = random.Random(method).sample(plan, round((len(plan) if method == "tspin_ref" else 60) * SHARE))
    check_damaged(run_jobs(toy, tmp_path, plan, method=method, **SMALL), method)


def test_faults_can_be_seen(tmp_path):
    """Each way of damage changes the file, and a change of any file of a run changes its outcome."""
    for how in (*HOWS, "stray"):
        path = tmp_path / how / "model.safetensors"
        path.parent.mkdir()
        path.write_bytes(bytes(range(1, 200)))
        before = outcome(path.parent)
        damage(path, how, random.Random(0))
        assert outcome(path.parent) != before, how


@pytest.mark.soak
def test_two_runs_on_one_directory(toy, tmp_path):
    """One of them ends undisturbed; the other says who holds the directory."""
    config = toy_config(toy, tmp_path / "run", iterations=1)
    config.save(tmp_path / "config.yaml")
    command = [sys.executable, "-m", "tspin", "run", "--config", str(tmp_path / "config.yaml")]
    runs = [subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) for _ in range(2)]
    errors = [run.communicate()[1] for run in runs]
    codes = [run.returncode for run in runs]
    assert sorted(codes) == [0, 2], errors
    loser = codes.index(2)
    assert re.search(rf"run is in use by process {runs[1 - loser].pid}; wait for it or stop it, or", errors[loser])
    again = SelfPlay(toy_config(toy, tmp_path / "alone", iterations=1)).run()
    assert storage.model_hash(tmp_path / "run" / "iter_00" / "model") == again.model_hash


@pytest.fixture
def small_disk(tmp_path):
    """A mounted tmpfs and what sets its size in KiB."""
    path = tmp_path / "disk"
    path.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", path], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"a small file system cannot be mounted here: {mounted.stderr.strip()}")

    def resize(kib):
        subprocess.run(["mount", "-o", f"remount,size={kib}k", path], check=True)

    yield path, resize
    # Weights are mapped from it for as long as a model lives.
    subprocess.run(["umount", "--lazy", path], check=True)


def fill_again_and_again(toy, small_disk, step, undisturbed):
    """Run on a disk too small, enlarged a little each time, until the run ends; the number of times it was full."""
    first, _ = undisturbed("tspin_ref")
    (path, resize), full, size = small_disk, 0, 16
    while True:
        resize(size)
        try:
            SelfPlay(toy_config(toy, path / "run", method="tspin_ref", **SMALL)).run()
            break
        except ValueError as error:
            assert re.search(
                r"no space left on the device while writing .*; free some space and run the same", str(error)
            )
            full, size = full + 1, size + step
    found, wanted = outcome(path / "run"), outcome(Path(first["run"]))
    assert found == wanted
    return full


def test_a_disk_that_fills_is_named_and_nothing_is_lost(toy, small_disk, undisturbed):
    assert fill_again_and_again(toy, small_disk, 112, undisturbed) >= 2


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_a_disk_that_fills_at_every_few_kilobytes(toy, small_disk, undisturbed):
    full = fill_again_and_again(toy, small_disk, 8, undisturbed)
    print(f"\nfull disk: met {full} times, each named; the run ends as undisturbed")
    assert full > 30
