"""The loop under processes: the same weights after kill -9 at any moment, and the same rows with two processes.

Run as a script it is what these tests start: it kills itself at a chosen event (a file synced or renamed, a tensor file
saved, an optimizer step, a token sampled), without any help from the packages.
"""

import inspect
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import traceback
from pathlib import Path

import pytest
import torch
import transformers.modeling_utils
from safetensors.torch import load_file
from test_loop import METHODS, make_toy, outcome, toy_config
from transformers import Trainer

from tspin import generate, storage
from tspin.cli import main
from tspin.config import SelfPlayConfig
from tspin.generate import read_generations
from tspin.loop import SelfPlay


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    root = tmp_path_factory.mktemp("toy")
    make_toy(root)
    return root


class Events:
    """Counts what a run does and kills the process at event number `fatal`; a saved file is halved first."""

    def __init__(self, fatal: int | None, log: Path, only: str | None = None):
        self.fatal, self.log, self.only, self.count = fatal, log, only, 0

    def watch(self, owner, name: str, target: int | None = None) -> None:
        """Make each call of owner.name an event; argument `target` is the file it writes."""
        real = getattr(owner, name)

        def call(*args, **kwargs):
            if self.only not in (None, name):
                return real(*args, **kwargs)
            dies = self.count == self.fatal
            self.count += 1
            with open(self.log, "a") as file:
                file.write(name + "\n")
            if dies and target is None:
                os.kill(os.getpid(), signal.SIGKILL)
            result = real(*args, **kwargs)
            if dies:
                path = args[target] if len(args) > target else kwargs["filename"]
                os.truncate(path, os.path.getsize(path) // 2)
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        setattr(owner, name, call)


def killable_run(config: SelfPlayConfig, fatal: int | None, log: Path, only: str | None = None) -> None:
    """SelfPlay(config).run(), killed at the event of this number; `only` counts events of one name."""
    events = Events(fatal, log, only)
    for owner, name in ((os, "fsync"), (os, "replace"), (shutil, "rmtree"), (generate, "next_tokens")):
        events.watch(owner, name)
    events.watch(torch.optim.RMSprop, "step")
    events.watch(torch, "save", target=1)
    events.watch(transformers.modeling_utils, "safe_save_file", target=1)
    SelfPlay(config).run()


def harness(root: str, directory: str, plan: str, changes: str) -> None:
    """For each list of fatal events in `plan`: a run killed at each in turn, then one left alone; prints outcomes."""
    torch.set_num_threads(1)
    for number, fatal_events in enumerate(json.loads(plan)):
        output_dir, log = Path(directory) / f"run_{number}", Path(directory) / f"events_{number}"
        statuses = []
        for fatal in [*fatal_events, None]:
            child = os.fork()
            if child == 0:
                try:
                    killable_run(toy_config(Path(root), output_dir, **json.loads(changes)), fatal, log)
                except BaseException:
                    traceback.print_exc()
                    os._exit(1)
                os._exit(0)
            statuses.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        print(json.dumps({"plan": fatal_events, "statuses": statuses, "log": str(log), "run": str(output_dir)}))


def run_harness(toy: Path, tmp_path: Path, plan: list[list[int]], **changes) -> list[dict]:
    tmp_path.mkdir(exist_ok=True)
    command = [sys.executable, __file__, "fork", str(toy), str(tmp_path), json.dumps(plan), json.dumps(changes)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    results = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"plan"')]
    assert len(results) == len(plan)
    for result in results:
        assert result["statuses"][-1] == 0, (result, done.stderr[-4000:])
    return results


def check_interrupted(results: list[dict]) -> None:
    """The first result is of the undisturbed run; the others must equal it, having repeated no more than allowed."""
    wanted = outcome(Path(results[0]["run"]))
    assert not wanted["leftovers"]
    steps, tokens = (Path(results[0]["log"]).read_text().split().count(name) for name in ("step", "next_tokens"))
    assert steps == 24
    for result in results[1:]:
        kills = [status for status in result["statuses"] if status == -signal.SIGKILL]
        assert outcome(Path(result["run"])) == wanted, result
        events = Path(result["log"]).read_text().split()
        # A kill costs at most save_steps = 3 steps, and one shard: two batches of at most 6 tokens.
        assert events.count("step") <= steps + 3 * len(kills), result
        assert events.count("next_tokens") <= tokens + 12 * len(kills), result


def events_of(toy, tmp_path, **changes) -> list[str]:
    (result,) = run_harness(toy, tmp_path, [[]], **changes)
    return Path(result["log"]).read_text().split()


@pytest.mark.timeout(400)
def test_kill_9_at_fixed_moments_gives_the_same_run(toy, tmp_path):
    events = events_of(toy, tmp_path / "count", method="tspin")
    at = {name: [i for i, event in enumerate(events) if event == name] for name in set(events)}
    assert set(at) == {"fsync", "replace", "rmtree", "next_tokens", "step", "save", "safe_save_file"}
    moments = [
        at["replace"][0],
        at["next_tokens"][len(at["next_tokens"]) // 2],
        at["step"][4],
        at["save"][1],
        at["safe_save_file"][2],
        at["replace"][-2],
    ]
    results = run_harness(toy, tmp_path / "kill", [[], *([m] for m in moments), [at["step"][5], 40]], method="tspin")
    assert all(r["statuses"][0] == -signal.SIGKILL for r in results[1:])
    check_interrupted(results)


@pytest.mark.soak
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("method", METHODS)
def test_kill_9_at_random_moments_gives_the_same_run(toy, tmp_path, method):
    draw, events = random.Random(method), events_of(toy, tmp_path / "count", method=method)
    plan = [[draw.randrange(len(events)) for _ in range(draw.randrange(1, 4))] for _ in range(25)]
    check_interrupted(run_harness(toy, tmp_path / "kill", [[], *plan], method=method))


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
    assert json.loads(done.stdout) == pytest.approx(json.loads(printed), rel=1e-4)


# Fixed in transformers at some version after 5.17; processes with a GPU of their own were never affected.
LOADS_ONTO_CPU = 'device.type != "cpu"' in inspect.getsource(Trainer._load_optimizer_and_scheduler)


@pytest.mark.skipif(not LOADS_ONTO_CPU, reason="this transformers loads the optimizer of a CPU process onto cpu:0")
@pytest.mark.parametrize("event", ["next_tokens", "safe_save_file"])
def test_a_killed_process_of_two_costs_nothing(toy, two_processes, tmp_path, event):
    # next_tokens is called by the second process as well; only the first one saves.
    rank, nth = ("1", 20) if event == "next_tokens" else ("0", 1)
    torn = launch(__file__, "rank", str(toy), str(tmp_path / "run"), rank, event, str(nth))
    assert torn.returncode != 0 and not (tmp_path / "run" / "iter_01" / "model").exists()
    toy_config(toy, tmp_path / "run", method="tspin_ref").save(tmp_path / "config.yaml")
    done = launch("-m", "tspin", "run", "--config", str(tmp_path / "config.yaml"))
    assert done.returncode == 0, done.stderr[:6000]
    assert outcome(tmp_path / "run") == outcome(two_processes)


def run_rank(root: str, output_dir: str, rank: str, event: str, nth: str) -> None:
    """One of two processes; process `rank` dies at its nth `event`."""
    config = toy_config(Path(root), Path(output_dir), method="tspin_ref")
    log = Path(f"{output_dir}.events_{os.environ['RANK']}")
    killable_run(config, int(nth) if os.environ["RANK"] == rank else None, log, only=event)


if __name__ == "__main__":
    {"fork": harness, "rank": run_rank}[sys.argv[1]](*sys.argv[2:])
