"""Properties that need no oracle: sums to one, shifts, permutations, entropy bounds, rows of dlogits, block sizes."""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tspin_kernels import linear_logprobs

from .oracle import evaluate, least_budget, make_case, plain_logprobs, relative_error


@pytest.fixture
def op(implementation):
    return partial(linear_logprobs, backend=implementation.backend)


@pytest.mark.parametrize("V", [1, 2, 100, 128, 129, 257])
def test_probabilities_sum_to_one(op, implementation, V):
    """One hidden row expanded to all targets; -20 everywhere makes a phantom column of logit 0 outweigh the rest."""
    case = make_case(1, V, seed=V, offset=-20.0).to(implementation.device)
    result = op(
        case.hidden.expand(V, -1),
        case.weight,
        torch.arange(V, device=implementation.device),
        case.bias,
        temperature=0.9,
    )
    assert abs(torch.logsumexp(result.logprobs.double(), 0).item()) < 2e-6 * 20
    entropy = -(result.logprobs.double().exp() * result.logprobs.double()).sum()
    assert torch.allclose(result.entropy.double(), entropy.expand(V), atol=5e-5)


@pytest.mark.parametrize("shift", [-1024.0, -64.0, 64.0, 1024.0])
def test_a_constant_added_to_all_logits_changes_nothing(op, implementation, shift):
    """Values on a grid that float32 holds exactly at every shift."""
    g = torch.Generator().manual_seed(0)
    case = make_case(6, 129, D=4)
    case = replace(
        case,
        hidden=torch.randint(-8, 9, (6, 4), generator=g) / 8.0,
        weight=torch.randint(-8, 9, (129, 4), generator=g) / 8.0,
        bias=torch.randint(-64, 65, (129,), generator=g) / 64.0,
        upstream=(case.upstream[0], case.upstream[1], torch.zeros(6)),
    )
    base = evaluate(op, case, device=implementation.device)
    moved = evaluate(op, replace(case, bias=case.bias + shift), device=implementation.device)
    assert torch.allclose(moved["logsumexp"], base["logsumexp"] + shift, atol=abs(shift) * 2e-7)
    for name in base.keys() - {"logsumexp"}:
        assert torch.allclose(moved[name], base[name], atol=2e-5), name


def test_permuting_the_vocabulary_permutes_the_gradient(op, implementation):
    case = make_case(9, 133, seed=1)
    order = torch.randperm(133, generator=torch.Generator().manual_seed(0))
    place = torch.argsort(order)
    base = evaluate(op, case, device=implementation.device, softcap=6.0)
    other = replace(case, weight=case.weight[order], bias=case.bias[order], targets=place[case.targets])
    moved = evaluate(op, other, device=implementation.device, softcap=6.0)
    for name in ("logprobs", "entropy", "logsumexp", "dhidden"):
        assert torch.allclose(moved[name], base[name], atol=2e-5), name
    for name in ("dweight", "dbias"):
        assert torch.allclose(moved[name], base[name][order], atol=2e-5), name


@pytest.mark.parametrize("spread", [0.0, 0.1, 3.0, 40.0])
@pytest.mark.parametrize("offset", [-150.0, 0.0, 150.0])
def test_entropy_bounds(op, implementation, spread, offset):
    V = 300
    case = make_case(16, V, seed=2, bias=False, spread=spread).to(implementation.device)
    bias = torch.full((V,), offset, device=implementation.device)
    entropy = op(case.hidden, case.weight, case.targets, bias).entropy
    assert (entropy >= -1e-6).all() and (entropy <= math.log(V) * (1 + 1e-5)).all()
    if spread == 0:
        assert torch.allclose(entropy, torch.full_like(entropy, math.log(V)), rtol=1e-5)


@pytest.mark.parametrize("logit_scale, temperature", [(1.0, 1.0), (0.5, 2.0)])
def test_rows_of_dlogits_sum_to_zero(op, implementation, logit_scale, temperature):
    """dbias of a single row is its row of dlogits: log-prob and entropy ignore a shift, logsumexp moves with it."""
    case = make_case(1, 129, seed=3)
    case = replace(case, upstream=(torch.tensor([0.7]), torch.tensor([-1.3]), torch.tensor([0.0])))
    options = {"logit_scale": logit_scale, "temperature": temperature}
    row = evaluate(op, case, device=implementation.device, **options)["dbias"]
    assert abs(row.sum()) < 1e-6 * row.abs().sum() + 1e-7
    assert row.abs().sum() > 0.1
    with_lse = replace(case, upstream=(*case.upstream[:2], torch.tensor([0.4])))
    row = evaluate(op, with_lse, device=implementation.device, **options)["dbias"]
    assert abs(row.sum() - 0.4 * logit_scale / temperature) < 1e-6


def test_equal_weight_rows_give_no_gradient(op, implementation):
    case = make_case(5, 100, seed=4, bias=False)
    case = replace(
        case, weight=case.weight[:1].expand(100, -1).contiguous(), upstream=(*case.upstream[:2], torch.zeros(5))
    )
    got = evaluate(op, case, device=implementation.device)
    assert got["dhidden"].abs().max() < 1e-5
    assert torch.allclose(got["logprobs"], torch.full((5,), -math.log(100), dtype=torch.float64), atol=1e-5)


@pytest.mark.parametrize("N, V", [(40, 200), (100, 33), (33, 129)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_budget_gives_the_same_answer(fused, N, V, dtype):
    """Several blocks along both axes against one block, within the rounding of the dtype."""
    case = make_case(N, V, D=16, seed=5, ignored=0.2, dtype=dtype)
    call = partial(
        evaluate, partial(linear_logprobs, backend=fused.backend), case, device=fused.device, temperature=0.9
    )
    whole = call()
    tolerance = {torch.float32: 2e-6, torch.bfloat16: 1e-2}[dtype]
    least = least_budget(lambda budget: call(memory_budget=budget, backend="torch"))
    for multiple in (1,) if fused.interpreted else (1, 1.3, 2, 4):
        got = call(memory_budget=int(multiple * least))
        for name in whole:
            assert relative_error(got[name], whole[name]) < tolerance, f"{name} at {multiple} times the least budget"


def test_the_same_call_gives_the_same_bits(fused):
    case = make_case(20, 200, D=16, seed=6)
    call = partial(evaluate, partial(linear_logprobs, backend=fused.backend), case, device=fused.device)
    for budget in (None, least_budget(lambda budget: call(memory_budget=budget, backend="torch"))):
        first, second = (call(memory_budget=budget) for _ in range(2))
        assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("N, V", [(16, 4096), (4096, 16)])
def test_blocks_are_accumulated_in_float32(fused, N, V, dtype):
    """Over 64 blocks the error of the sum stays that of one product; in the short dtype it triples."""
    if fused.interpreted:
        pytest.skip(
            "64 blocks are slow under Triton's interpreter, and the accumulation is shared with the torch backend"
        )
    case = make_case(N, V, D=32, seed=7, dtype=dtype, bias=False, spread=0.5)
    case = replace(case, upstream=(torch.rand(N) + 0.5, torch.zeros(N), torch.zeros(N)))
    call = partial(evaluate, partial(linear_logprobs, backend=fused.backend), case, device=fused.device)
    exact = evaluate(plain_logprobs, case.to(torch.float64))
    plain = evaluate(plain_logprobs, case)
    got = call(memory_budget=least_budget(lambda budget: call(memory_budget=budget)))
    for name in ("dhidden", "dweight"):
        allowed = 1.5 * relative_error(plain[name], exact[name])
        assert relative_error(got[name], exact[name]) < allowed, name


@settings(max_examples=40, derandomize=True, deadline=None)
@given(
    N=st.integers(1, 20),
    V=st.integers(1, 200),
    D=st.integers(1, 9),
    seed=st.integers(0, 2**31),
    multiple=st.sampled_from([None, 1, 2]),
    temperature=st.floats(0.3, 3.0),
    logit_scale=st.floats(0.2, 2.0),
    softcap=st.none() | st.floats(1.0, 20.0),
    offset=st.sampled_from([-30.0, 0.0, 30.0]),
    ignored=st.sampled_from([0.0, 0.5]),
)
def test_random_calls_match_float64(N, V, D, seed, multiple, temperature, logit_scale, softcap, offset, ignored):
    case = make_case(N, V, D, seed=seed, offset=offset, ignored=ignored)
    transform = {"temperature": temperature, "logit_scale": logit_scale, "softcap": softcap}
    exact = evaluate(plain_logprobs, case.to(torch.float64), **transform)
    call = partial(evaluate, partial(linear_logprobs, backend="torch"), case, **transform)
    got = call(memory_budget=multiple and multiple * least_budget(lambda budget: call(memory_budget=budget)))
    magnitude = (abs(offset) + 12) * logit_scale / temperature
    for name, truth in exact.items():
        size = truth.abs().max().item() if name.startswith("d") else magnitude
        assert torch.allclose(got[name], truth, rtol=0, atol=1e-6 * max(1.0, magnitude) * max(size, 1e-2)), name
