"""A comparison's runs are the runs of its arms alone, bit for bit; it refuses what a run refuses, before it spends anything.

Run as a script it is what the test of kills starts.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from faults import Events
from test_loop import make_toy, outcome, toy_config

from tspin import storage
from tspin.cli import main
from tspin.compare import Arm, Comparison, SharingSelfPlay, read_comparison
from tspin.config import SelfPlayConfig
from tspin.loop import SelfPlay

ARMS = [Arm("tspin"), Arm("ref", {"method": "tspin_ref", "learning_rate": 3e-4}), Arm("sft")]
SHARED = ("eval_initial", "iter_00/synthetic", "proto")


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    root = tmp_path_factory.mktemp("toy")
    make_toy(root)
    return root


def values_of(toy: Path, output_dir: Path, **changes) -> dict:
    short = {"max_rows": 16, "num_train_epochs": 1, "save_steps": 100}
    return toy_config(toy, output_dir, **short | changes).to_dict()


def records(directory: Path) -> dict:
    done = storage.read_record(directory / "state.json")["done"]
    # metrics.jsonl holds times
    return {name: record for name, record in done.items() if not name.endswith("/train")}


def stages_made(directory: Path) -> list[str]:
    return [json.loads(line)["stage"] for line in (directory / "timings.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def compared(toy, tmp_path_factory):
    return Comparison(values_of(toy, tmp_path_factory.mktemp("compare")), ARMS, [0, 1]).run()


def test_every_arm_is_the_run_that_its_config_makes_alone(compared, tmp_path):
    for result in compared[1:3]:
        alone = tmp_path / result.output_dir.name
        config = SelfPlayConfig.from_file(result.output_dir / "config.yaml", {"output_dir": str(alone)})
        assert SelfPlay(config).run(report=False).model_hash == result.model_hash
        assert outcome(alone) == outcome(result.output_dir)
        assert records(alone) == records(result.output_dir)
    assert len({result.model_hash for result in compared}) == len(compared), "no two arms are the same"


def test_what_arms_make_alike_is_made_once_for_each_seed(compared):
    made = {result.output_dir.name: {*SHARED} & {*stages_made(result.output_dir)} for result in compared}
    others = {f"{arm.name}_seed_{seed}": set() for arm in ARMS[1:] for seed in (0, 1)}
    assert made == {"tspin_seed_0": {*SHARED}, "tspin_seed_1": {*SHARED}, **others}
    assert (compared[0].output_dir.parent / "report" / "report.html").exists()


def test_the_plain_run_finds_an_arm_complete(compared, tmp_path):
    directory = shutil.copytree(compared[1].output_dir, tmp_path / "run")
    before = stages_made(directory)
    config = SelfPlayConfig.from_file(directory / "config.yaml", {"output_dir": str(directory)})
    assert SelfPlay(config).run(report=False).model_hash == compared[1].model_hash
    assert stages_made(directory) == before


class Opened(Exception):
    """A run that stops before its first stage."""


def taken(monkeypatch, donor: Path, config: SelfPlayConfig) -> set[str]:
    """The stages that a run of this config copies from a donor before it does anything itself."""

    def stop(*_):
        raise Opened

    with monkeypatch.context() as patch, pytest.raises(Opened):
        patch.setattr(SelfPlay, "_stage", stop)
        SharingSelfPlay(config, [donor]).run()
    return {*storage.read_record(Path(config.output_dir) / "state.json")["done"]}


@pytest.mark.parametrize(
    "changes", [{"temperature": 0.9}, {"max_rows": 10}, {"generation_batch_size": 8}, {"seed": 5}, {}]
)
def test_runs_that_differ_before_training_share_nothing(compared, toy, tmp_path, monkeypatch, changes):
    config = SelfPlayConfig.from_dict(values_of(toy, tmp_path / "run", **{"seed": 0, **changes}))
    assert taken(monkeypatch, compared[0].output_dir, config) == (set() if changes else {*SHARED})


def test_a_run_takes_what_it_needs_and_no_more(compared, toy, tmp_path, monkeypatch):
    needs = {"sft": SHARED[:1], "spin": SHARED[:2], "tspin_no_history": SHARED[:2], "tspin_ref": SHARED}
    for method, stages in needs.items():
        config = SelfPlayConfig.from_dict(values_of(toy, tmp_path / method, seed=0, method=method))
        assert taken(monkeypatch, compared[0].output_dir, config) == {*stages}


def test_nothing_is_taken_from_another_model_or_from_altered_files(compared, toy, tmp_path, monkeypatch):
    donor = shutil.copytree(compared[0].output_dir, tmp_path / "donor")
    shard = next((donor / "iter_00" / "synthetic").glob("shard-00000-*"))
    shard.write_bytes(shard.read_bytes()[:-1])
    config = SelfPlayConfig.from_dict(values_of(toy, tmp_path / "altered", seed=0))
    assert taken(monkeypatch, donor, config) == {"eval_initial", "proto"}
    record = storage.read_record(donor / "run.json")
    record["model"]["files"]["model.safetensors"] = "another"
    storage.write_record(donor / "run.json", record)
    config = SelfPlayConfig.from_dict(values_of(toy, tmp_path / "other", seed=0))
    assert taken(monkeypatch, donor, config) == set()


def test_what_a_donor_has_done_counts_with_the_config_that_did_it(compared, toy, tmp_path, monkeypatch):
    donor = shutil.copytree(compared[0].output_dir, tmp_path / "donor")
    text = (donor / "config.yaml").read_text()
    (donor / "config.yaml").write_text(f"{text}temperature: 0.9\n")
    config = SelfPlayConfig.from_dict(values_of(toy, tmp_path / "other", seed=0, temperature=0.9))
    assert taken(monkeypatch, donor, config) == set()
    config = SelfPlayConfig.from_dict(values_of(toy, tmp_path / "same", seed=0))
    assert taken(monkeypatch, donor, config) == {*SHARED}


def test_a_changed_config_is_refused_before_anything_is_run(compared, toy, tmp_path):
    directory = compared[0].output_dir.parent
    changed = values_of(toy, directory, learning_rate=2e-3)
    with pytest.raises(ValueError, match=r"tspin_seed_0 belongs to .*learning_rate: 0.001 -> 0.002"):
        Comparison(changed, [Arm("tspin_no_history"), Arm("tspin")], [0]).run()
    assert not (directory / "tspin_no_history_seed_0").exists()


def test_a_name_too_long_for_the_disk_is_named(toy, tmp_path):
    with pytest.raises(ValueError, match=r"cannot use .*File name too long.*; choose another output_dir"):
        Comparison(values_of(toy, tmp_path / ("x" * 300)), [Arm("tspin")], [0]).run()


def test_arms_from_words_and_from_a_file(toy, tmp_path):
    assert Arm.from_text("tspin") == Arm("tspin", {"method": "tspin"})
    arm = Arm.from_text("fast:method=spin,learning_rate=[1e-5,3e-6], lam=1")
    assert arm == Arm("fast", {"method": "spin", "learning_rate": "[1e-5,3e-6]", "lam": "1"})
    values = {**values_of(toy, tmp_path), "model_name_or_path": "pupil-{seed}"}
    comparison = read_comparison(values, "tspin,spin", ["fast:method=spin,learning_rate=[1e-5,3e-6]"], "3,4")
    assert [(name, seed) for name, seed in comparison.configs] == [
        (n, s) for s in (3, 4) for n in ("tspin", "spin", "fast")
    ]
    fast = comparison.configs["fast", 4]
    assert fast.training["learning_rate"] == [1e-5, 3e-6] and fast.training["method"] == "spin"
    assert fast.model_name_or_path == "pupil-4" and fast.seed == 4 and Path(fast.output_dir).name == "fast_seed_4"
    common = read_comparison({**values, "method": "spin"}, "spin", ["slow:learning_rate=1e-6"], "0")
    assert common.configs["slow", 0].training["method"] == "spin"
    from_file = read_comparison(
        {**values, "arms": {"tspin": None, "low": {"method": "sft", "learning_rate": 1e-6}}, "seeds": [0]}
    )
    assert from_file.configs["low", 0].training["learning_rate"] == 1e-6
    assert from_file.configs["tspin", 0].training["method"] == "tspin"


@pytest.mark.parametrize(
    ("changes", "methods", "arms", "seeds", "message"),
    [
        ({}, None, [], "0", "arms: want one or more, got none; .* --methods"),
        ({}, "tspin", [], None, "seeds: want one or more, got none; .* --seeds"),
        ({}, "tspin", [], "0,x", "seeds: want whole numbers"),
        ({}, "tspin,tspin", [], "0", "arms: want one or more, each once"),
        ({}, "tspin", [], "0,0", "seeds: want one or more, each once"),
        ({}, None, ["a/b:method=spin"], "0", "arm: want a name of letters"),
        ({}, None, ["spin:lam"], "0", "arm: want name:key=value"),
        ({}, None, ["spin:seed=3"], "0", "arm spin: seed may not be set"),
        ({}, None, ["spin:lamb=3"], "0", "arm spin: unknown key 'lamb'; did you mean lam"),
        (
            {},
            "tspin,foo",
            [],
            "0",
            r"arm foo: want a method \(tspin, .*sft.*\) or keys .*; correct it, or write foo:method=tspin",
        ),
        ({"arms": {"foo": None}}, None, [], "0", "arm foo: want a method"),
        (
            {},
            "tspin",
            ["same:method=tspin"],
            "0",
            "arms: want arms that differ .* tspin and same with the same config; leave",
        ),
        ({"beta": 0.3}, "spin", ["same:beta=0.3,method=spin"], "0", "spin and same with the same config"),
        ({"arms": ["tspin"]}, None, [], "0", "arms: want lines `name: {key: value, ...}`"),
    ],
)
def test_bad_comparisons_are_refused(toy, tmp_path, changes, methods, arms, seeds, message):
    with pytest.raises(ValueError, match=message):
        read_comparison({**values_of(toy, tmp_path), **changes}, methods, arms, seeds)


def test_the_command_ends_in_tables_and_a_report(compared, toy, capsys, tmp_path):
    directory = compared[0].output_dir.parent
    file = tmp_path / "compare.yaml"
    file.write_text(
        yaml.safe_dump({**values_of(toy, directory), "arms": {"tspin": None, "sft": None}, "seeds": [0, 1]})
    )
    assert main(["compare", "--config", str(file)]) == 0
    shown = capsys.readouterr().out
    # Whole texts are not compared with whole texts: there is no answer_pattern.
    assert "log-likelihood" in shown and "greedy" not in shown and str(directory / "report" / "report.html") in shown
    assert main(["compare", "--config", str(file), "--methods", "tspin", "--learning_rate", "3"]) == 2
    assert "belongs to a run with another config" in capsys.readouterr().err


def harness(root: str, directory: str, kills: list[list]) -> None:
    """The comparison killed at each of these events in turn, gone on with each time, and then left alone."""
    import torch

    torch.set_num_threads(1)
    for fatal in [*kills, None]:
        child = os.fork()
        if child == 0:
            Events(fatal, Path(directory) / "events").watch(shutil, "copytree")
            Comparison(values_of(Path(root), Path(directory)), ARMS[:2], [0]).run()
            os._exit(0)
        print("status", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def test_a_killed_comparison_goes_on_to_the_same_runs(compared, toy, tmp_path):
    # The first arm copies two models as it exports them; then the second arm takes over, and dies there twice.
    kills = json.dumps([["copytree", 2, "after"], ["copytree", 1, "before"]])
    command = [sys.executable, __file__, str(toy), str(tmp_path), kills]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    statuses = [int(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("status ")]
    assert statuses == [-signal.SIGKILL, -signal.SIGKILL, 0], done.stderr[-4000:]
    for result in compared[:2]:
        again = tmp_path / result.output_dir.name
        assert outcome(again) == outcome(result.output_dir) and records(again) == records(result.output_dir)
        assert {*SHARED} & {*stages_made(again)} == ({*SHARED} if result is compared[0] else set())


if __name__ == "__main__":
    harness(sys.argv[1], sys.argv[2], json.loads(sys.argv[3]))
