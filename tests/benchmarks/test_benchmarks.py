"""The benchmark runs from end to end on the CPU, times nothing that is wrong, and hides nothing that is missing."""

import json
import time
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from benchmarks import logprobs, measure, peers, tables
from benchmarks.__main__ import main
from benchmarks.reference import Evaluation, gradient_errors, output_errors, worst_row
from benchmarks.workloads import Case, make_workload, mean_entropy, select_cases
from tspin_kernels._head import Head
from tspin_kernels._inputs import LogitTransform

CPU = torch.device("cpu")
TINY = select_cases("tiny")[0]
OURS = {"recompute", "store", "loss", "loss_frozen_head", "loss_filtered", "infer"}


def pick(*keys: str) -> list[peers.Implementation]:
    return [each for each in peers.IMPLEMENTATIONS if each.key in keys and not each.wide]


def bench(implementations, *, data="random", entropy=None, case=TINY):
    rows = logprobs.Bench(make_workload(case, data, CPU, entropy), implementations).run(time.monotonic())
    return [row for row in rows if row["implementation"] not in tables.BARE]


@pytest.fixture(autouse=True)
def _few_rounds(monkeypatch):
    monkeypatch.setattr(measure, "MAX_ROUNDS", 3)


def test_end_to_end(tmp_path, capsys):
    arguments = ["logprobs", "--cases", "tiny", "--peers", "none", "--data", "random,peaked", "--seconds", "60"]
    assert main([*arguments, "--device", "cpu", "--out", str(tmp_path)]) == 0
    rows = [json.loads(line) for line in (tmp_path / "cpu.jsonl").read_text().splitlines()]
    assert {(row["data"], row["mean_entropy"]) for row in rows} == {("random", None), ("peaked", 1.3), ("peaked", 2.2)}
    for row in rows:
        assert row.keys() >= set(logprobs.FIELDS)
        assert row["ms_p20"] <= row["ms"] <= row["ms_p80"], row
    ours = [row for row in rows if row["implementation"] == "tspin"]
    assert {row["plan"] for row in ours} == OURS
    assert len(ours) == 3 * len(OURS), "float32 logits of float32 inputs are no other implementation"
    for row in ours:
        assert row["bitwise"] is True
        assert row["floor_ms"] == pytest.approx(row["gemm_ms"] + row["traffic_ms"])
        assert row["memory_budget"] > 0 and row["extra_mib"] >= 0
        assert row["error_logprob"] is not None
        assert (row["error_dweight"] is None) == (row["plan"] in ("infer", "loss_frozen_head"))

    for command in ("table", "summary", "plots"):
        assert main([command, str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert all(f"tspin {plan}" in printed for plan in OURS)
    assert (tmp_path / "cpu-roofline.png").read_bytes().startswith(b"\x89PNG")


def without_entropy_gradient(result, w):
    return result._replace(entropy=result.entropy.detach(), roots=result.roots[:1], upstream=result.upstream[:1])


def without_last_column(result, w):
    wrong = peers.plain_logprobs(w.hidden, w.weight[:-1], w.targets.clamp(max=w.case.V - 2))
    return result._replace(logprobs=wrong[0], entropy=wrong[1])


def one_wrong_row(result, w):
    # Small enough to hide in the mean square.
    return result._replace(logprobs=result.logprobs + 7e-5 * (torch.arange(w.case.N) == 3))


def one_wrong_gradient_row(result, w):
    g = result.upstream[0] * (1 + 1e-5 * (w.g.abs() == w.g.abs().max()))
    return result._replace(upstream=(g, result.upstream[1]))


def uniform_upstream(result, w):
    return result._replace(upstream=tuple(u[:1].expand_as(u) for u in result.upstream))


def not_a_number(result, w):
    return result._replace(entropy=result.entropy * torch.nan)


WRONG = [
    without_entropy_gradient,
    without_last_column,
    one_wrong_row,
    one_wrong_gradient_row,
    uniform_upstream,
    not_a_number,
]


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_implementation_is_never_timed(wrong):
    naive = pick("naive")[0]

    def load(_):
        return lambda hidden, weight, w: wrong(peers._tokens(*peers.plain_logprobs(hidden, weight, w.targets), w), w)

    rows = bench([naive, replace(naive, name="wrong", load=load, passes=("forward+backward",))])
    assert all(row["ms"] for row in rows if row["implementation"] == "naive")
    (row,) = [row for row in rows if row["implementation"] == "wrong"]
    assert row.get("ms") is None and "allowed" in row["refused"], row


def test_missing_and_failing_peers_are_rows_with_a_reason(monkeypatch):
    def absent(_):
        raise ModuleNotFoundError("No module named 'rival'")

    def greedy(_):
        return lambda hidden, weight, w: torch.empty(2**60)

    naive = pick("naive")[0]
    monkeypatch.setitem(__import__("sys").modules, "quack", None)
    rows = bench(
        [naive, replace(naive, name="absent", load=absent), replace(naive, name="greedy", load=greedy), *pick("quack")]
    )
    reasons = {row["implementation"]: row.get("missing") for row in rows}
    assert reasons["absent"] == "ModuleNotFoundError: No module named 'rival'"
    assert reasons["greedy"] == "out of memory"
    assert "quack" in reasons["quack"]
    assert all(row["ms"] is None if reasons[row["implementation"]] else row["ms"] for row in map(with_ms, rows))
    assert "No module named 'rival'" in tables.table([complete(row) for row in rows])


def with_ms(row):
    return {"ms": None} | row


def complete(row):
    return {field: None for field in logprobs.FIELDS} | {"case": "tiny", "data": "random", "device": "cpu"} | row


def test_our_failure_is_the_exit_code(monkeypatch, tmp_path):
    def broken(*_):
        raise RuntimeError("broken")

    broken_ours = tuple(replace(each, load=broken) if each.plan == "store" else each for each in peers.IMPLEMENTATIONS)
    monkeypatch.setattr(peers, "IMPLEMENTATIONS", broken_ours)
    arguments = ["logprobs", "--cases", "tiny", "--peers", "none", "--data", "random", "--seconds", "30"]
    assert main([*arguments, "--device", "cpu", "--out", str(tmp_path)]) == 1


def test_out_of_time_is_a_row(tmp_path):
    options = {"data": ["random"], "peers": "none", "device": CPU, "out": tmp_path / "rows.jsonl"}
    rows = logprobs.run([TINY], seconds=0.0, **options)
    assert rows and all(row["missing"] == "out of time" and row["ms"] is None for row in rows)


def test_unusable_device_stops_the_process_and_names_the_culprit(tmp_path, monkeypatch):
    def faulty(*_):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(peers, "IMPLEMENTATIONS", (*pick("naive"), replace(pick("trl")[0], load=faulty)))
    options = {"data": ["random"], "peers": "all", "device": CPU, "out": tmp_path / "rows.jsonl", "seconds": 30.0}
    with pytest.raises(measure.PoisonedDevice) as caught:
        logprobs.run([replace(TINY, name="first", implementations=("naive",)), TINY], **options)
    assert (caught.value.culprit, caught.value.done) == ("trl", 1)
    assert [row["implementation"] for row in logprobs.run([TINY], excluded=("trl",), **options)][:1] == ["naive"]


@pytest.mark.parametrize("entropy", [1.3, 2.2])
def test_peaked_data(entropy):
    case = Case("peaked", 512, 64, 1000, (), torch.float32)
    w = make_workload(case, "peaked", CPU, entropy)
    assert mean_entropy(w.hidden, w.weight) == pytest.approx(entropy, abs=0.05)
    exact = Evaluation(w, exact=True).statistics
    assert exact.entropy.mean().item() == pytest.approx(entropy, abs=0.05)
    # Targets drawn from the softmax: their mean NLL estimates the mean entropy.
    assert -exact.logprobs.mean().item() == pytest.approx(entropy, abs=0.25)
    assert (w.hidden[:, 0] == 1).all() and (w.weight[:-1, 0] > w.weight[1:, 0]).all()
    again = make_workload(case, "peaked", CPU, entropy)
    assert torch.equal(w.weight, again.weight) and torch.equal(w.targets, again.targets)


@pytest.mark.parametrize("task", ["tokens", "nll", "mean", "sequences"])
def test_reference_gradients_are_those_of_autograd(task):
    w = make_workload(replace(TINY, N=40, V=70, D=8, dtype=torch.float64), "random", CPU)
    exact = Evaluation(w, exact=True)
    hidden, weight = w.hidden.clone().requires_grad_(), w.weight.clone().requires_grad_()
    log_p = (hidden @ weight.T).log_softmax(-1)
    logprobs, entropy = log_p.gather(1, w.targets[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)
    g, h = exact.upstream(task)
    total = (g * logprobs).sum() + (0 if h is None else (h * entropy).sum())
    got = torch.autograd.grad(total, (hidden, weight))
    assert max(gradient_errors(exact.gradients(task), got).values()) < 1e-12
    errors = output_errors(exact.statistics, "tokens", w, logprobs.detach(), entropy.detach())
    assert max(errors.values()) < 1e-12


def test_every_call_once_a_round_in_an_order_drawn_anew():
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "abcdef"}
    times, failed = measure.timed_rounds(calls, CPU, seconds=0.0)
    assert not failed and all(found.rounds == 3 for found in times.values())
    rounds = ["".join(order[start : start + 6]) for start in range(0, len(order), 6)]
    assert len(rounds) == 4 and all(sorted(found) == list("abcdef") for found in rounds), "one warm-up and three"
    assert len(set(rounds)) == 4 and len({"ab" in found for found in rounds}) == 2, (
        "no call always follows the same one"
    )


def test_peak_bytes_counts_what_is_freed_inside():
    peak, kept = measure.peak_bytes(lambda: torch.ones(2**20).mul(2).sum(), CPU)
    assert 2 * 2**22 <= peak < 2 * 2**22 + 2**16 and kept == 2**21


def test_times_of_different_runs_are_never_mixed():
    def row(time, name, ms):
        return complete({"time": time, "implementation": name, "ms": ms})

    full = [row("1", "naive", 1.0), row("1", "trl", 2.0)]
    later = [row("2", "naive", 3.0), row("2", "trl", None), row("2", "quack", None)]
    assert tables.fullest_runs(full + later) == full
    assert tables.fullest_runs(full + [again | {"time": "3"} for again in full])[0]["time"] == "3"


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match=r"cases: want .* got 'huge'"):
        select_cases("huge")
    with pytest.raises(ValueError, match=r"peers: want .* got \['rival'\]"):
        peers.select("rival", TINY)


@pytest.mark.parametrize("case", select_cases("goals,odd"), ids=lambda case: case.name)
@pytest.mark.parametrize("wide", [False, True])
def test_budgets_of_the_plans_hold_their_logits_in_one_block(case, wide):
    dtype, like = torch.bfloat16, torch.empty(0, dtype=torch.bfloat16, device="meta")
    weight = torch.empty(case.V, case.D, dtype=dtype, device="meta")
    head = Head(weight, None, LogitTransform(), dtype, torch.float32 if wide else dtype, None)
    workload = SimpleNamespace(case=case)
    budget = peers.wide_store_budget(workload) if wide else peers.store_budget(workload)
    sizes = partial(head.sizes, case.N, like, dtype, dtype)
    assert sizes(gathered=True, scattered=True).total(case.N, head.widest) <= budget
    assert budget < 1.05 * sizes(gathered=True, scattered=True).total(case.N, head.widest)
    more = peers.recompute_budget(workload)
    assert sizes(gathered=False, scattered=False).total(case.N, head.widest) > more or case.name.startswith(
        "n8192-d4096-v3"
    )


def test_the_worst_row_is_relative_to_itself():
    truth = torch.tensor([[3.0, 4.0], [0.0, 0.1], [0.0, 0.0]]).double()
    assert worst_row(truth, truth.float()) < 1e-7
    got = truth.clone()
    got[1, 0] = 0.05
    assert worst_row(truth, got) == pytest.approx(0.5)
    got[2, 0] = 1e-9
    assert worst_row(truth, got) == torch.inf and worst_row(truth, None) is None


def test_the_summary_holds_ours_against_peers_and_budget():
    def row(name, plan, ms, **more):
        facts = {
            "case": "c",
            "data": "peaked",
            "device": "H",
            "time": "t",
            "D": 4096,
            "task": "tokens",
            "bitwise": True,
        }
        facts |= {
            "pass": "forward+backward",
            "floor_ms": 1.0,
            "extra_mib": 8.0,
            "memory_budget": 2**23,
            "mean_entropy": 1.3,
        }
        return facts | {"implementation": name, "plan": plan, "ms": ms, "error_logprob": None} | more

    rows = [
        row("quack", None, 10.0),
        row("tspin", "loss", 10.1),
        row("verl", None, 30.0),
        row("tspin", "recompute", 20.0),
    ]
    rows.append(row("tspin", "loss", 11.0, logits_dtype="float32"))
    rows.append(row("tspin", "loss_filtered", 5.9, kept_fraction=0.03, error_dweight_worst_row=1.02))
    text = tables.summary(rows)
    for found in (
        "loss / quack 1.01!",
        "recompute / verl 0.67,",
        "fp32 logits / tspin loss 1.09,",
        "filtered / quack 0.59,",
    ):
        assert found in text, text
    assert "extra memory / budget 1.00\n" in text + "\n" and "kept 3.00%, worst row of dweight 1" in text
    flat = tables.summary([r | {"mean_entropy": 2.2, "extra_mib": 8.5} for r in rows])
    assert "loss_filtered / tspin loss 0.58" in flat and "budget 1.06!" in flat
