"""Every example runs, and what it changes changes no loss and no weight, compiled or not."""

import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))
NEEDED = {"lightning_module": ("lightning", "2.0"), "trl_dpo": ("trl", "1.16")}


@pytest.fixture(params=EXAMPLES, ids=lambda path: path.stem)
def example(request):
    if needed := NEEDED.get(request.param.stem):
        pytest.importorskip(*needed, reason="needs {} {}".format(*needed))
    return request.param


@pytest.fixture(autouse=True)
def fresh_accelerator():
    from accelerate.state import AcceleratorState, GradientState, PartialState

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def test_before_and_after_are_one_training(example):
    train = runpy.run_path(str(example))["train"]
    (before, old), (after, new), (compiled, newer) = train(before=True), train(), train(compile_with="aot_eager")
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert len(before) >= 4 and before[0] != before[-1]
    torch.testing.assert_close([after, compiled], [before, before], rtol=1e-5, atol=1e-5)
    assert (next(train(before=True, steps=1)[1].parameters()) - next(old.parameters())).abs().max() > 1e-4
    for a, b, c in zip(old.parameters(), new.parameters(), newer.parameters(), strict=True):
        torch.testing.assert_close([b, c], [a, a], rtol=1e-5, atol=1e-5)


def test_the_command_prints_the_losses(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["pytorch_loop.py", "--before"])
    runpy.run_path(str(EXAMPLES[0].with_name("pytorch_loop.py")), run_name="__main__")
    assert len([float(word) for word in capsys.readouterr().out.split()]) == 5


@pytest.mark.soak
def test_two_processes_train_alike_too():
    def losses(*words):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *words]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return sorted([float(word) for word in line.split()] for line in done.stdout.splitlines())

    example = str(EXAMPLES[0].with_name("accelerate_loop.py"))
    before, after = losses(example, "--before"), losses(example)
    assert [len(line) for line in before] == [4, 4] and before[0] != before[1]
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)
