"""The loop under two processes: the same rows and weights as one has, also after kill -9 of one of the two.

Run as a script it is one of two processes, which may kill itself at a chosen event (see faults.py).
"""

import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from faults import killable_run
from safetensors.torch import load_file
from test_loop import make_toy, outcome, toy_config
from transformers import Trainer

from tspin import storage
from tspin.cli import main
from tspin.generate import read_generations
from tspin.loop import SelfPlay


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    root = tmp_path_factory.mktemp("toy")
    make_toy(root)
    return root


def launch(*arguments: str) -> subprocess.CompletedProcess:
    """Two gloo processes of the module or script that the arguments name; --cpu would start only one."""
    options = "--multi_gpu --num_processes 2 --num_machines 1 --main_process_port 0 --mixed_precision no"
    command = [sys.executable, "-m", "accelerate.commands.launch", *options.split(), "--dynamo_backend", "no"]
    command += arguments
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


@pytest.fixture(scope="module")
def two_processes(toy, tmp_path_factory):
    """A finished run of `tspin run` by two processes, with references."""
    directory = tmp_path_factory.mktemp("two")
    toy_config(toy, directory / "run", method="tspin_ref").save(directory / "config.yaml")
    done = launch("-m", "tspin", "run", "--config", str(directory / "config.yaml"))
    assert done.returncode == 0, done.stderr[:6000]
    assert storage.read_record(directory / "run" / "run.json")["processes"] == 2
    return directory / "run"


def test_two_processes_sample_the_same_rows_and_train_to_the_same_weights(toy, two_processes, tmp_path):
    one = tmp_path / "run"
    SelfPlay(toy_config(toy, one, method="tspin_ref", per_device_train_batch_size=8)).run()
    for name in ("iter_00/synthetic", "proto"):
        shards = {path.name for path in (one / name).iterdir()}
        assert shards == {path.name for path in (two_processes / name).iterdir()} and len(shards) == 3
        assert read_generations(one / name) == read_generations(two_processes / name)
    weights = [load_file(run / "iter_00" / "model" / "model.safetensors") for run in (one, two_processes)]
    start = load_file(toy / "model" / "model.safetensors")
    for name, tensor in weights[0].items():
        assert not torch.equal(tensor, start[name])
        torch.testing.assert_close(weights[1][name], tensor, rtol=1e-3, atol=1e-5)


def test_a_run_of_two_processes_is_not_continued_by_one(toy, two_processes):
    with pytest.raises(ValueError, match="of 2 processes, now there are 1; launch as many"):
        SelfPlay(toy_config(toy, two_processes, method="tspin_ref")).run()


def test_the_single_steps_on_two_processes_do_what_one_does(toy, two_processes, tmp_path, capsys):
    """`tspin generate`, `train` and `eval`: the same rows, weights to rounding, one result printed once."""
    config = toy_config(toy, tmp_path / "unused", method="tspin_ref", per_device_train_batch_size=8)
    config.save(tmp_path / "config.yaml")
    triplets = str(two_processes / "iter_00" / "triplets.parquet")
    for command, *words in (["generate"], ["train", "--triplets", triplets], ["eval"]):
        words = [command, *words, "--config", str(tmp_path / "config.yaml"), "--output_dir"]
        assert main([*words, str(tmp_path / f"{command}-1")]) == 0
        printed = capsys.readouterr().out
        half = ["--per_device_train_batch_size", "4"]
        done = launch("-m", "tspin", *words, str(tmp_path / f"{command}-2"), *half)
        assert done.returncode == 0, done.stderr[:6000]
    one, two = (read_generations(tmp_path / f"generate-{n}") for n in (1, 2))
    assert one == two and len(one) == 24
    weights = [load_file(tmp_path / f"train-{n}" / "model" / "model.safetensors") for n in (1, 2)]
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, rtol=1e-3, atol=1e-5)
    one, two = json.loads(printed), json.loads(done.stdout)
    assert {key: one.pop(key) for key in ("model", "versions")} == {key: two.pop(key) for key in ("model", "versions")}
    assert two == pytest.approx(one, rel=1e-4)


# Fixed in transformers at some version after 5.17; processes with a GPU of their own were never affected.
LOADS_ONTO_CPU = 'device.type != "cpu"' in inspect.getsource(Trainer._load_optimizer_and_scheduler)


@pytest.mark.skipif(not LOADS_ONTO_CPU, reason="this transformers loads the optimizer of a CPU process onto cpu:0")
@pytest.mark.parametrize("event", ["next_tokens", "safe_save_file"])
def test_a_killed_process_of_two_costs_nothing(toy, two_processes, tmp_path, event):
    # next_tokens is called by the second process as well; only the first one saves.
    rank, nth = ("1", 20) if event == "next_tokens" else ("0", 1)
    torn = launch(__file__, str(toy), str(tmp_path / "run"), rank, event, str(nth))
    assert torn.returncode != 0 and not (tmp_path / "run" / "iter_01" / "model").exists()
    toy_config(toy, tmp_path / "run", method="tspin_ref").save(tmp_path / "config.yaml")
    done = launch("-m", "tspin", "run", "--config", str(tmp_path / "config.yaml"))
    assert done.returncode == 0, done.stderr[:6000]
    assert outcome(tmp_path / "run") == outcome(two_processes)


def run_rank(root: str, output_dir: str, rank: str, event: str, nth: str) -> None:
    """One of two processes; process `rank` dies at its nth `event`."""
    config = toy_config(Path(root), Path(output_dir), method="tspin_ref")
    log = Path(f"{output_dir}.events_{os.environ['RANK']}")
    moment = "torn" if event == "safe_save_file" else "before"
    killable_run(config, [event, int(nth), moment] if os.environ["RANK"] == rank else None, log)


if __name__ == "__main__":
    run_rank(*sys.argv[1:])
