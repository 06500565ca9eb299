"""The benchmarks of training steps run from end to end on the CPU; a wrong implementation is refused, a capped one ends."""

import json

import pytest
import torch

from benchmarks import long_context, measure, tables, training
from benchmarks.__main__ import main

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _few_rounds(monkeypatch):
    monkeypatch.setattr(measure, "MAX_ROUNDS", 3)


def test_end_to_end(tmp_path, capsys):
    pytest.importorskip("trl", reason="every implementation is measured, trl's too")
    common = ["--models", "tiny", "--methods", "full,lora", "--device", "cpu", "--out", str(tmp_path)]
    assert main(["train_step", "--lengths", "64x16,24x24x2", "--seconds", "2", *common]) == 0
    assert main(["memory", "--ratios", "4", "--caps", "0.002", "--seconds", "240", *common]) == 0
    rows = [json.loads(line) for line in (tmp_path / "cpu.jsonl").read_text().splitlines()]
    assert all(row.keys() >= set(long_context.FIELDS) for row in rows)
    steps = [row for row in rows if row["benchmark"] == "train_step"]
    assert len(steps) == 2 * 2 * len(training.IMPLEMENTATIONS)
    for row in steps:
        assert row["refused"] is None and row["missing"] is None
        assert row["ms_p20"] <= row["ms"] <= row["ms_p80"] and 0 < row["above_gib"] < row["peak_gib"]
    found = [row for row in rows if row["longest"] is not None]
    assert len(found) == 2 * len(training.IMPLEMENTATIONS)
    for row in found:
        assert row["cap_gib"] == 0.002 and row["missing"] is None
        tried = [r for r in rows if r["longest"] is None and r["benchmark"] == "memory"]
        tried = [r for r in tried if (r["method"], r["implementation"]) == (row["method"], row["implementation"])]
        fitting = [r["tokens"] for r in tried if r["peak_gib"] <= 0.002]
        beyond = [r["tokens"] for r in tried if r["missing"] == "above the cap"]
        assert row["longest"] == max(fitting) and row["longest"] < min(beyond) <= 1.06 * row["longest"] + 8

    for command in ("table", "summary", "plots"):
        assert main([command, str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "train_step | tiny | lora | 64 + 3 x 16" in printed and "tiny | full | 2 x (24 + 3 x 24)" in printed
    assert "cap 0.002" in printed
    assert (tmp_path / "cpu-tiny-full.png").read_bytes().startswith(b"\x89PNG")


def wrong_prompt(model, triplet):
    seen = training.Triplets(triplet.prompts.flip(1), triplet.responses)
    return training._naive(model, seen)


def without_gradient_of_y0(model, triplet):
    hidden = training._separate_hidden(model, triplet)
    keep = torch.arange(len(hidden)) < 2 * len(hidden) // 3
    return training._fused_loss(model, torch.where(keep[:, None], hidden, hidden.detach()), triplet)


@pytest.mark.parametrize("wrong", [wrong_prompt, without_gradient_of_y0])
@pytest.mark.parametrize("method", training.METHODS)
def test_a_wrong_implementation_is_refused_and_not_measured(tmp_path, monkeypatch, wrong, method):
    monkeypatch.setitem(training.IMPLEMENTATIONS, "trl_style", wrong)
    common = {"device": CPU, "seconds": 1, "out": tmp_path / "rows.jsonl"}
    rows = long_context.train_step([("tiny", method)], [(32, 8, 1)], **common)
    refused = {row["implementation"]: row["refused"] for row in rows}
    assert "gradient norm" in refused.pop("trl_style") and set(refused.values()) == {None}
    row = next(row for row in rows if row["implementation"] == "trl_style")
    assert row["ms"] is None and row["peak_gib"] is None


def test_an_implementation_that_is_not_installed_is_a_row(tmp_path, monkeypatch):
    def absent(model, triplet):
        raise ModuleNotFoundError("No module named 'trl'")

    monkeypatch.setitem(training.IMPLEMENTATIONS, "trl_style", absent)
    rows = long_context.train_step([("tiny", "full")], [(32, 8, 1)], device=CPU, seconds=1, out=tmp_path / "rows.jsonl")
    refused = {row["implementation"]: row["refused"] for row in rows}
    assert "No module named 'trl'" in refused.pop("trl_style") and set(refused.values()) == {None}


def test_a_device_without_memory_is_a_row(tmp_path, monkeypatch):
    def full(model, triplet):
        if triplet.prompts.numel() + triplet.responses.numel() > 400:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return training._naive(model, triplet)

    monkeypatch.delitem(training.IMPLEMENTATIONS, "trl_style")
    monkeypatch.setitem(training.IMPLEMENTATIONS, "naive", full)
    common = {"device": CPU, "seconds": 30, "out": tmp_path / "rows.jsonl"}
    step = long_context.train_step([("tiny", "full")], [(400, 8, 1)], **common)
    assert [row["missing"] for row in step if row["implementation"] == "naive"] == ["out of memory"]
    monkeypatch.setattr(training, "IMPLEMENTATIONS", {"naive": full, "tspin": training._tspin})
    found = long_context.memory([("tiny", "full")], [4.0], [1.0], ["naive"], **common)
    assert 380 <= found[-1]["longest"] <= 400
    assert any(row["missing"] == "out of memory" and row["tokens"] > 400 for row in found)


def test_a_search_that_was_cut_off_replaces_none_that_came_further():
    cell = {"benchmark": "memory", "model": "m", "method": "full", "device": "d", "prompt_per_response": 8.0}
    cell |= {"cap_gib": 24.0, "implementation": "tspin", "peak_gib": 1.0, "ms": None, "refused": None}
    for found, shown in (
        ([(70, "cut"), (50, "cut")], 70),
        ([(50, "cut"), (70, "cut")], 70),
        ([(60, None), (70, "cut")], 60),
        ([(70, "cut"), (60, None)], 60),
    ):
        table = tables.training_table(cell | {"longest": longest, "missing": missing} for longest, missing in found)
        assert f"{shown} longest" in table and table.count("longest") == 1


class Clocked:
    """Stands for an implementation whose memory and time are known: {usable} bytes hold a prompt of {limit}."""

    device, vocab = CPU, 10
    resident = gradients = lambda self: 0

    def __init__(self, monkeypatch, limit, floor=0.0, seconds=0.0, curve=1.0, on_gpu=True):
        self.limit, self.floor, self.seconds, self.curve, self.on_gpu = limit, floor, seconds, curve, on_gpu
        self.now, self.tries, self.usable = 0.0, [], 2**34
        monkeypatch.setattr(long_context, "make_triplets", lambda prompt, *args: range(prompt))
        monkeypatch.setattr(long_context, "_usable", lambda device, cap: self.usable)
        monkeypatch.setattr(long_context.time, "monotonic", lambda: self.now)

    def peak(self, name, triplet):
        part = len(triplet) / self.limit
        self.now += (0.2 if self.tries else 5.0) + self.seconds * part**2  # the first call compiles
        self.tries.append(len(triplet))
        # The floor is the optimizer's, which asks for the same at every length.
        backward = int(part**self.curve * self.usable)
        peak = max(int(self.floor * self.usable), backward)
        return (peak, backward) if peak <= self.usable or not self.on_gpu else "out of memory"

    def search(self, deadline=1e9):
        return list(long_context._search(self, "x", 8.0, 1.0, deadline, 2**20))


@pytest.mark.parametrize("on_gpu", [True, False])
@pytest.mark.parametrize("curve", [1.0, 0.9, 1.1])
@pytest.mark.parametrize("floor", [0.0, 0.3, 0.95])
@pytest.mark.parametrize("limit", [400, 25159, 703584])
def test_the_search_finds_the_longest_in_few_tries(monkeypatch, limit, floor, curve, on_gpu):
    arms = Clocked(monkeypatch, limit, floor, curve=curve, on_gpu=on_gpu)
    *tried, found = arms.search()
    fitting = [prompt for prompt in arms.tries if prompt <= limit]
    assert found["prompt"] == max(fitting) and found["missing"] is None and limit <= 1.03 * max(fitting) + 2
    # What does not fit is a row too.
    assert [row["prompt"] for row in tried] == arms.tries and max(arms.tries) > limit
    assert len(arms.tries) <= 16
    assert sum(prompt > limit / 2 for prompt in arms.tries) <= (3 if curve == 1 and limit > 400 else 10)


@pytest.mark.parametrize("seconds", [10.0, 100.0, 1000.0])
@pytest.mark.parametrize("deadline", [1.0, 8.0, 60.0, 300.0])
def test_a_search_ends_in_time_with_the_longest_that_it_had_time_for(monkeypatch, seconds, deadline):
    arms = Clocked(monkeypatch, 300_000, 0.3, seconds)
    *_, found = arms.search(deadline)
    assert arms.now <= max(deadline + 1, 5.3)
    if found["missing"] is None:
        assert found["prompt"] > 290_000
    else:
        assert found["missing"] == "out of time: a lower bound"
        assert found["prompt"] == max(prompt for prompt in arms.tries if prompt <= arms.limit)
        # Most of the time is spent on the longest.
        could = 300_000 * ((deadline - 6) / seconds) ** 0.5 if deadline > 6 else 0
        assert found["prompt"] >= min(could, 270_000) / 2


def test_bad_input(tmp_path):
    common = {"device": CPU, "seconds": 1, "out": tmp_path / "rows.jsonl"}
    with pytest.raises(ValueError, match="models: want names of"):
        long_context.train_step([("gpt", "full")], [(8, 8)], **common)
    with pytest.raises(ValueError, match="caps: want a number of GiB on the CPU"):
        long_context.memory([("tiny", "full")], [8.0], [None], **common)
