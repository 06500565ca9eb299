"""A vocabulary cut over two processes that talk by gloo gives what one process with all of it gives.

Run as a program, this file is one of the two processes: it evaluates every scenario and saves what it saw.
"""

import math
import os
import re
import socket
import subprocess
import sys
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import tspin_kernels
from tspin_kernels import FilterReport, linear_logprobs, linear_sequence_loss

from .conftest import FUSED
from .oracle import assert_within_budget, evaluate, logit_rounding, make_case, plain_logprobs, plain_sequence_loss
from .preferences import entropy_bonus, tspin
from .sequences import evaluate_loss, make_sequences

V = 150
RANGES = [(0, 97), (97, V)]
BACKENDS = [fused.backend for fused in FUSED if fused.device == "cpu"]


def case_of(dtype=torch.float32, **options):
    return make_case(11, V, seed=1, dtype=dtype, spread=1.0, **options)


def masked_case():
    """The second rank's tokens all cannot be, and of the first's some."""
    case = case_of()
    bias = case.bias.clone()
    bias[90:] = -math.inf
    return replace(case, bias=bias, targets=case.targets % 90)


TRANSFORM = {"temperature": 0.7, "logit_scale": 1.3, "softcap": 4.0}
# Of linear_logprobs: a case, what the oracle is told too, and what the op alone is.
TOKENS = {
    "plain": (case_of(), {}, {}),
    "blocks": (case_of(), {}, {"memory_budget": 4500}),
    "transformed": (case_of(ignored=0.3), TRANSFORM, {}),
    "transformed_blocks": (case_of(ignored=0.3), TRANSFORM, {"memory_budget": 4500}),
    "no_bias": (case_of(bias=False), {}, {}),
    "bfloat16": (case_of(torch.bfloat16), {}, {}),
    "float16_blocks": (case_of(torch.float16), {}, {"memory_budget": 14000}),
    "far": (case_of(offset=-150.0), {}, {}),
    "masked": (masked_case(), {}, {}),
    "all_ignored": (case_of(ignored=1.0), {}, {}),
}


def weighted(s, w):
    """Coefficients of which some are zero, so that sequences are skipped."""
    return w[:, 0] * tspin(s)


def without(sequences, *missing):
    kept = ~torch.isin(sequences.sequence_ids, torch.tensor(missing))
    case = sequences.case
    case = replace(case, hidden=case.hidden[kept], targets=case.targets[kept])
    return replace(sequences, case=case, sequence_ids=sequences.sequence_ids[kept])


def shared_rows():
    sequences = make_sequences(3, 4, V=V, seed=3)
    N = len(sequences.sequence_ids)
    rows = torch.randint(7, (N,), generator=torch.Generator().manual_seed(1))
    return replace(sequences, rows=rows, case=replace(sequences.case, hidden=sequences.case.hidden[:9]))


def with_zeros():
    return replace(make_sequences(3, 4, V=V, seed=4), group_inputs=(torch.tensor([[1.0], [0.0], [-2.0], [0.0]]),))


# Of linear_sequence_loss: sequences, loss, and options; a budget of 12000 holds some groups, of 6000 a part of one.
GROUPS = {
    "tspin": (make_sequences(3, 4, V=V, seed=2, ignored=0.2), tspin, {}),
    "entropy_bonus": (make_sequences(3, 4, V=V, seed=2), entropy_bonus, {"entropy": "grad"} | TRANSFORM),
    "groups": (make_sequences(3, 6, V=V, seed=2), entropy_bonus, {"entropy": "grad", "memory_budget": 12000}),
    "part_of_a_group": (make_sequences(3, 4, V=V, seed=2), entropy_bonus, {"entropy": "grad", "memory_budget": 6000}),
    "empty": (without(make_sequences(3, 4, V=V, seed=2), 0, 4, 9, 10, 11), tspin, {}),
    "shared_rows": (shared_rows(), tspin, {}),
    "zeros": (with_zeros(), weighted, {}),
    "filtered": (make_sequences(3, 4, V=V, seed=2, bias=False), tspin, {"filter_tolerance": 1e-7}),
    "zeros_in_blocks": (with_zeros(), weighted, {"memory_budget": 6000}),
    "bfloat16": (make_sequences(3, 4, V=V, seed=2, dtype=torch.bfloat16, spread=1.0), tspin, {}),
}
KEYS = [("tokens", name, backend) for name in TOKENS for backend in BACKENDS] + [
    ("groups", name, backend) for name in GROUPS for backend in BACKENDS
]


def part(case, rank):
    start, stop = RANGES[rank]
    bias = None if case.bias is None else case.bias[start:stop]
    return replace(case, weight=case.weight[start:stop], bias=bias)


def seen(kind, name, backend, rank):
    """What a rank gets: outputs, and the gradients of all hidden rows and of its own part of the head."""
    options = {"backend": backend, "process_group": dist.group.WORLD}
    if kind == "tokens":
        case, told, own = TOKENS[name]
        return evaluate(partial(linear_logprobs, **options), part(case, rank), **told, **own)
    sequences, loss_fn, own = GROUPS[name]
    sequences = replace(sequences, case=part(sequences.case, rank))
    return evaluate_loss(partial(linear_sequence_loss, **options), sequences, loss_fn, **own)


def refusals(rank):
    """The errors of calls that no rank may be left waiting in."""
    case, group = part(case_of(), rank), dist.group.WORLD
    hidden = case.hidden.clone().requires_grad_(rank == 0)
    pairs = make_sequences(2, 2, V=V)
    calls = {
        "requires_grad": lambda: linear_logprobs(hidden, case.weight, case.targets, process_group=group),
        "rows": lambda: linear_logprobs(
            case.hidden[rank:], case.weight, case.targets[rank:], ignore_index=None, process_group=group
        ),
        "budget": lambda: evaluate_loss(
            partial(linear_sequence_loss, process_group=group, memory_budget=10000 + rank),
            replace(pairs, case=part(pairs.case, rank)),
            lambda s: s.logprobs.sum(1),
        ),
        "targets": lambda: linear_logprobs(case.hidden, case.weight, case.targets + V, process_group=group),
        "empty": lambda: linear_logprobs(
            case.hidden, case.weight[: 97 * (1 - rank)], case.targets, process_group=group
        ),
        "empty groups": lambda: evaluate_loss(
            partial(linear_sequence_loss, process_group=group),
            replace(pairs, case=replace(pairs.case, weight=pairs.case.weight[: 97 * (1 - rank)], bias=None)),
            lambda s: s.logprobs.sum(1),
        ),
    }
    messages = {}
    for name, call in calls.items():
        try:
            call()
            messages[name] = "no error"
        except ValueError as error:
            messages[name] = str(error)
    return messages


def compiled(rank):
    case = part(case_of(), rank)
    op = torch.compile(partial(linear_logprobs, process_group=dist.group.WORLD), backend="aot_eager")
    return evaluate(lambda *args: op(*args), case)


def filtered(rank):
    """Rows that have 0.4 or 0.8 of the tolerance in each rank's flat tail, where half of it may go; how many were dense."""
    found = []
    for share in (0.4, 0.8):
        z = torch.zeros(40, 400, dtype=torch.float64)
        z[:, 0] = math.log(400 / (2 * share * 0.01))
        case = [torch.eye(40, dtype=torch.float64), z.T[200 * rank : 200 * rank + 200].contiguous().requires_grad_()]
        report = FilterReport()
        linear_sequence_loss(
            *case,
            torch.zeros(40, dtype=torch.int64),
            torch.arange(40),
            lambda s: s.logprobs[:, 0],
            group_size=1,
            process_group=dist.group.WORLD,
            filter_tolerance=0.01,
            filter_report=report,
        )
        found.append((report.rows, report.dense_rows))
    return found


def trained_by_one(rank):
    """The gradient of the head's part on rank 0, which alone has one: the other rank has no backward to meet it in."""
    case = part(case_of(bias=False), rank)
    weight = case.weight.clone().requires_grad_(rank == 0)
    loss = linear_logprobs(case.hidden, weight, case.targets, process_group=dist.group.WORLD).logprobs.sum()
    if rank == 0:
        loss.backward()
    return weight.grad


def travelled(rank):
    """How many numbers each rank sends in each exchange of a forward and its backward."""
    sizes, gather, reduce = [], dist.all_gather, dist.all_reduce

    def gathered(parts, sent, group):
        sizes.append(sent.numel())
        return gather(parts, sent, group=group)

    def reduced(values, group):
        sizes.append(values.numel())
        return reduce(values, group=group)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_gather", gathered)
        patch.setattr(dist, "all_reduce", reduced)
        seen("tokens", "blocks", "torch", rank)
        seen("groups", "groups", "torch", rank)
    return sizes


def main(directory):
    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    results = {key: seen(*key, rank) for key in KEYS}
    results |= {"refusals": refusals(rank), "compiled": compiled(rank), "filtered": filtered(rank)}
    results["trained by one"] = trained_by_one(rank)
    results["travelled"] = travelled(rank)
    torch.save(results, f"{directory}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What ranks 0 and 1 saw."""
    directory = tmp_path_factory.mktemp("ranks")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    roots = [Path(__file__).parents[__name__.count(".")], Path(tspin_kernels.__file__).parent.parent]
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    world |= {"PYTHONPATH": os.pathsep.join(map(str, roots))}
    children = []
    for rank in range(2):
        with open(directory / f"{rank}.log", "w") as log:
            command = [sys.executable, "-m", __name__, str(directory)]
            children.append(
                subprocess.Popen(command, env={**os.environ, **world, "RANK": str(rank)}, stdout=log, stderr=log)
            )
    try:
        codes = [child.wait(timeout=300) for child in children]
    finally:
        for child in children:
            child.kill()
    assert codes == [0, 0], "\n".join((directory / f"{rank}.log").read_text()[-3000:] for rank in range(2))
    return [torch.load(directory / f"{rank}.pt", weights_only=False) for rank in range(2)]


def joined(ranks, key):
    """The results of both ranks as one's; what must be the same is the same bit by bit."""
    first, second = ranks[0][key], ranks[1][key]
    assert first.keys() == second.keys()
    whole = {}
    for name in first:
        if name in ("dweight", "dbias"):
            whole[name] = torch.cat([first[name], second[name]])
        else:
            assert torch.equal(first[name], second[name]), f"{name} differs between ranks"
            whole[name] = first[name]
    return whole


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", TOKENS)
def test_logprobs_of_two_processes(ranks, name, backend):
    case, told, _ = TOKENS[name]
    exact, plain = (evaluate(plain_logprobs, c, **told) for c in (case.to(torch.float64), case))
    transform = {k: v for k, v in told.items() if k != "softcap"}
    finite = replace(case, bias=None) if name == "masked" else case
    assert_within_budget(joined(ranks, ("tokens", name, backend)), plain, exact, logit_rounding(finite, **transform))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", GROUPS)
def test_sequence_loss_of_two_processes(ranks, name, backend):
    sequences, loss_fn, options = GROUPS[name]
    transform = {k: v for k, v in options.items() if k in TRANSFORM}
    double = replace(
        sequences,
        case=sequences.case.to(torch.float64),
        group_inputs=tuple(t.double() for t in sequences.group_inputs),
    )
    exact, plain = (evaluate_loss(plain_sequence_loss, s, loss_fn, **transform) for s in (double, sequences))
    got = joined(ranks, ("groups", name, backend))
    rounding = max(64 * torch.finfo(torch.float32).eps, 2 * torch.finfo(sequences.case.hidden.dtype).eps)
    for tensor, truth in exact.items():
        size = max(truth.abs().max().item(), 1.0 if tensor in ("loss", "logprobs", "entropy") else 0.0)
        allowed = 4 * (plain[tensor] - truth).abs().max().item() + rounding * size
        error = (got[tensor] - truth).abs().max().item()
        assert error <= allowed, f"{tensor}: error {error:.3g}, allowed {allowed:.3g}, size {size:.3g}"


def test_under_the_compiler(ranks):
    got, want = joined(ranks, "compiled"), joined(ranks, ("tokens", "plain", "torch"))
    for name in want:
        assert torch.allclose(got[name], want[name], atol=1e-5), name


@pytest.mark.parametrize(
    "call, message",
    [
        ("requires_grad", r"hidden.requires_grad: want the same on every rank.*\[1, 0\]"),
        ("rows", r"hidden: want the same on every rank.*\[11, 10\]"),
        ("budget", r"memory_budget: want the same on every rank.*\[10000, 10001\]"),
        ("targets", r"targets: want token ids in \[0, 150\)"),
        ("empty", r"weight: want at least one row on every rank.*\[97, 0\]"),
        ("empty groups", r"weight: want at least one row on every rank.*\[97, 0\]"),
    ],
)
def test_ranks_that_disagree_all_raise(ranks, call, message):
    for rank in ranks:
        assert re.search(message, rank["refusals"][call]), rank["refusals"][call]


def test_a_part_of_the_head_may_be_trained_alone(ranks):
    case = case_of(bias=False)
    weight = case.weight.clone().requires_grad_()
    linear_logprobs(case.hidden, weight, case.targets).logprobs.sum().backward()
    torch.testing.assert_close(ranks[0]["trained by one"], weight.grad[: RANGES[0][1]], atol=1e-5, rtol=1e-5)
    assert ranks[1]["trained by one"] is None


def test_only_statistics_and_dhidden_travel(ranks):
    """In the forward the widths and what ranks must agree on; four numbers a row; the gradient of the hidden rows. Nothing grows
    with V."""
    rows = len(GROUPS["groups"][0].sequence_ids)
    for rank in ranks:
        sizes = rank["travelled"]
        assert sum(sizes) == (4 + 4 * 11) + 8 * 11 + (8 + 4 * rows + 8 * rows), sizes
        assert max(sizes) <= 8 * max(11, rows)


def test_what_all_ranks_drop_together_is_within_the_tolerance(ranks):
    for rank in ranks:
        assert rank["filtered"] == [(40, 0), (40, 40)]


def test_the_reference_has_no_process_group():
    case = case_of()
    with pytest.raises(ValueError, match=r"process_group.*reference"):
        linear_logprobs(case.hidden, case.weight, case.targets, backend="reference", process_group=object())


if __name__ == "__main__":
    main(sys.argv[1])
