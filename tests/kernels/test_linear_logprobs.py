"""linear_logprobs against the float64 oracle: backends, dtypes, tile edges, transforms, random upstreams."""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch

from tspin_kernels import TokenLogprobs, linear_logprobs, linear_logprobs_reference

from .oracle import (
    OUTPUTS,
    assert_matches_oracle,
    assert_within_budget,
    evaluate,
    least_budget,
    logit_rounding,
    make_case,
    plain_logprobs,
)

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
VOCABULARIES = [1, 2, 31, 32, 33, 127, 128, 129, 1000, 1023, 1025, 2047, 2049, 4095, 4096, 4097, 8191, 8193]
TRANSFORMS = [
    {},
    {"temperature": 0.7},
    {"logit_scale": 0.25},
    {"softcap": 3.0},
    {"temperature": 1.7, "logit_scale": 2.5, "softcap": 4.0},
]


@pytest.fixture
def op(implementation):
    return partial(linear_logprobs, backend=implementation.backend)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("V", VOCABULARIES)
def test_matches_float64_at_vocabulary_edges(op, implementation, V, dtype):
    case = make_case(5, V, seed=V, dtype=dtype)
    assert_matches_oracle(op, case, device=implementation.device)


@pytest.mark.parametrize("N", [1, 2, 3, 15, 16, 17, 63, 65])
def test_matches_float64_at_token_edges(op, implementation, N):
    assert_matches_oracle(op, make_case(N, 50, seed=N), device=implementation.device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
def test_matches_float64_under_logit_transforms(op, implementation, transform, bias, dtype):
    case = make_case(7, 130, seed=1, dtype=dtype, bias=bias)
    assert_matches_oracle(op, case, device=implementation.device, **transform)


@pytest.mark.parametrize("offset", [-150.0, 0.0, 150.0])
@pytest.mark.parametrize("transform", [{}, {"temperature": 0.7}], ids=str)
def test_matches_float64_far_from_zero(op, implementation, offset, transform):
    case = make_case(7, 129, seed=2, offset=offset)
    assert_matches_oracle(op, case, device=implementation.device, **transform)


@pytest.mark.parametrize("offset", [-5000.0, 5000.0])
def test_entropy_keeps_its_digits_at_a_large_offset(fused, offset):
    """Logits on a grid of 1/64 are exact in float32 at 5000, so only the op's own arithmetic can lose digits."""
    g = torch.Generator().manual_seed(3)
    case = make_case(6, 200, D=4)
    hidden, weight = (torch.randint(-8, 9, (n, 4), generator=g) / 8 for n in (6, 200))
    case = replace(case, hidden=hidden, weight=weight, bias=torch.full((200,), offset))
    exact = evaluate(plain_logprobs, case.to(torch.float64))
    got = evaluate(partial(linear_logprobs, backend=fused.backend), case, device=fused.device)
    for name in ("logprobs", "entropy"):
        assert (got[name] - exact[name]).abs().max() < 2e-5, name
    for name in ("dhidden", "dweight", "dbias"):
        assert (got[name] - exact[name]).abs().max() < 2e-5 * exact[name].abs().max(), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_of_a_confident_prediction(op, implementation, dtype):
    """p = 0.999 at the target: 1 - p must be formed before rounding to a short dtype."""
    V, p = 64, 0.999
    gap = math.log(p * (V - 1) / (1 - p))
    case = make_case(4, V, D=V, dtype=dtype, bias=False)
    case = replace(case, upstream=(case.upstream[0], torch.zeros(4), torch.zeros(4)))
    eye = torch.eye(V, dtype=dtype)
    case = replace(case, hidden=eye[:4] * 4, weight=eye * round(gap / 4, 2), targets=torch.arange(4))
    assert_matches_oracle(op, case, device=implementation.device)
    exact = evaluate(plain_logprobs, case.to(torch.float64))
    got = evaluate(op, case, device=implementation.device)
    for row in range(4):
        error = (got["dhidden"][row, row] - exact["dhidden"][row, row]).abs() / exact["dhidden"][row, row].abs()
        assert error < 0.02, f"row {row}: relative error {error:.3f} of the gradient along the target"


@pytest.mark.parametrize("only", OUTPUTS)
def test_each_output_has_its_own_gradient(op, implementation, only):
    """One output at a time, so that no gradient can hide behind another."""
    case = make_case(6, 70, seed=4)
    upstream = tuple(u if name == only else torch.zeros_like(u) for name, u in zip(OUTPUTS, case.upstream, strict=True))
    case = replace(case, upstream=upstream)
    assert_matches_oracle(op, case, device=implementation.device, temperature=0.8)


@pytest.mark.parametrize("only", OUTPUTS)
def test_backward_of_a_single_output(implementation, only):
    """The other two outputs get no upstream gradient at all."""
    case = make_case(6, 70, seed=5)

    def single(function):
        def call(*args, **options):
            chosen = dict(zip(OUTPUTS, function(*args, **options), strict=True))[only]
            return [chosen if name == only else None for name in OUTPUTS]

        return call

    exact = evaluate(single(plain_logprobs), case.to(torch.float64))
    plain = evaluate(single(plain_logprobs), case)
    op = single(partial(linear_logprobs, backend=implementation.backend))
    assert_within_budget(evaluate(op, case, device=implementation.device), plain, exact, logit_rounding(case))


def test_upstream_gradients_differ_per_token(op, implementation):
    """All weight on the last token: an op that reads upstream[0] for every row returns nothing."""
    case = make_case(5, 40, seed=6)
    last = tuple(torch.zeros(5).index_fill(0, torch.tensor([4]), value) for value in (1.0, -0.5, 0.25))
    case = replace(case, upstream=last)
    got = evaluate(op, case, device=implementation.device)
    assert got["dhidden"][:4].abs().max() == 0
    assert_matches_oracle(op, case, device=implementation.device)


@pytest.mark.parametrize("entropy", ["grad", "value", False])
def test_entropy_modes(op, implementation, entropy):
    case = make_case(6, 50, seed=7)
    leaf = case.to(implementation.device)
    hidden = leaf.hidden.clone().requires_grad_()
    result = op(hidden, leaf.weight, leaf.targets, leaf.bias, entropy=entropy)
    exact = plain_logprobs(
        *(t.double() if t.is_floating_point() else t for t in (case.hidden, case.weight, case.targets, case.bias))
    )
    if entropy is False:
        assert result.entropy is None
    else:
        assert (result.entropy.detach().cpu() - exact[1]).abs().max() < 1e-5
        assert result.entropy.requires_grad == (entropy == "grad")
    (result.logprobs * leaf.upstream[0]).sum().backward()
    other = hidden.grad.clone()
    hidden.grad = None
    (op(hidden, leaf.weight, leaf.targets, leaf.bias).logprobs * leaf.upstream[0]).sum().backward()
    assert (other - hidden.grad).abs().max() < 1e-5


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_result_type(implementation, dtype):
    if dtype == torch.float64 and implementation.backend == "triton":
        pytest.skip("float64 is for gradcheck of the PyTorch implementations; the Triton backend need not take it")
    case = make_case(6, 20, dtype=dtype).to(implementation.device)
    hidden, weight, bias = (t.clone().requires_grad_() for t in (case.hidden, case.weight, case.bias))
    result = linear_logprobs(
        hidden.view(2, 3, -1), weight, case.targets.view(2, 3), bias, backend=implementation.backend
    )
    assert isinstance(result, TokenLogprobs)
    for output in result:
        assert output.shape == (2, 3)
        assert output.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert output.device.type == implementation.device
    sum(o.sum() for o in result).backward()
    for leaf in (hidden, weight, bias):
        assert leaf.grad.dtype == dtype and leaf.grad.shape == leaf.shape


def test_leading_dimensions_are_only_a_shape(op, implementation):
    case = make_case(6, 20).to(implementation.device)
    flat = op(case.hidden, case.weight, case.targets, case.bias)
    for shape in [(6,), (2, 3), (1, 2, 3), (6, 1)]:
        shaped = op(case.hidden.view(*shape, -1), case.weight, case.targets.view(shape), case.bias)
        for got, want in zip(shaped, flat, strict=True):
            assert got.shape == shape
            assert torch.equal(got.flatten(), want)


def test_one_token_without_a_leading_dimension(op, implementation):
    case = make_case(1, 20).to(implementation.device)
    result = op(case.hidden[0], case.weight, case.targets[0], case.bias)
    assert result.logprobs.shape == ()
    assert torch.equal(result.logprobs, op(case.hidden, case.weight, case.targets, case.bias).logprobs[0])


def test_reference_is_the_reference_backend():
    case = make_case(6, 20, ignored=0.3)
    got = evaluate(linear_logprobs_reference, case)
    named = evaluate(partial(linear_logprobs, backend="reference"), case)
    assert all(torch.equal(got[name], named[name]) for name in named)


@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
def test_the_reference_passes_gradcheck(transform):
    case = make_case(4, 6, D=3, seed=8, ignored=0.3, dtype=torch.float64, spread=1.0)

    def call(hidden, weight, bias):
        return tuple(linear_logprobs_reference(hidden, weight, case.targets, bias, **transform))

    assert torch.autograd.gradcheck(call, [t.clone().requires_grad_() for t in (case.hidden, case.weight, case.bias)])


@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
def test_the_torch_backend_in_float64(transform):
    case = make_case(20, 100, seed=8, ignored=0.3, dtype=torch.float64)
    call = partial(evaluate, partial(linear_logprobs, backend="torch"), case, **transform)
    exact = evaluate(plain_logprobs, case, **transform)
    for budget in (None, least_budget(lambda budget: call(memory_budget=budget))):
        got = call(memory_budget=budget)
        for name in exact:
            assert (got[name] - exact[name]).abs().max() < 1e-12 * max(1, exact[name].abs().max()), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_float32_logits_are_closer_to_the_truth(fused, dtype):
    """`logits_dtype=torch.float32` keeps the accumulator: results as good as the rounded inputs allow."""
    case = make_case(32, 257, D=64, seed=9, dtype=dtype)
    exact = evaluate(plain_logprobs, case.to(torch.float64))
    got = evaluate(
        partial(linear_logprobs, backend=fused.backend), case, device=fused.device, logits_dtype=torch.float32
    )
    for name in OUTPUTS:
        assert (got[name] - exact[name]).abs().max() < 5e-5, name
    assert_within_budget(got, evaluate(plain_logprobs, case), exact, logit_rounding(case))


@pytest.mark.skipif(
    not torch.cuda.is_available(),
    reason="4 GiB of logits need a GPU; see test_offsets.py",
)
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_more_than_2_to_the_31_logits_in_one_block(backend):
    N, V, D = 14336, 151936, 16
    case = make_case(N, V, D, dtype=torch.bfloat16, bias=False, seed=10).to("cuda")
    hidden = case.hidden.clone().requires_grad_()
    result = linear_logprobs(hidden, case.weight, case.targets, backend=backend, memory_budget=1 << 36)
    result.logprobs.sum().backward()
    tail = slice(N - 64, N)
    few = case.hidden[tail].clone().requires_grad_()
    want = linear_logprobs(few, case.weight, case.targets[tail], backend=backend)
    want.logprobs.sum().backward()
    assert torch.allclose(result.logprobs[tail], want.logprobs, atol=1e-3)
    assert torch.allclose(hidden.grad[tail], few.grad, atol=2e-2)
