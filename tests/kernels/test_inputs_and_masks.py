"""Layouts and masks: strides, stride-0 upstream gradients, ignored rows, empty inputs, masked vocabulary, NaN rows."""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch

from tspin_kernels import linear_logprobs

from .oracle import OUTPUTS, assert_matches_oracle, evaluate, make_case, plain_logprobs


@pytest.fixture
def op(implementation):
    return partial(linear_logprobs, backend=implementation.backend)


@pytest.mark.parametrize("budget", [None, 4096])
@pytest.mark.parametrize("layout", ["transposed", "sliced", "expanded"])
def test_any_input_layout(op, implementation, layout, budget):
    case = make_case(9, 70, D=8, seed=1)

    def change(t):
        if layout == "transposed":
            return t.t().contiguous().t() if t.dim() == 2 else t
        if layout == "sliced":
            wide = torch.full((*t.shape[:-1], 2 * t.shape[-1]), 7).to(t)
            wide[..., ::2] = t
            return wide[..., ::2]
        return t[:1].expand_as(t)

    case = replace(
        case,
        hidden=change(case.hidden),
        weight=change(case.weight),
        targets=change(case.targets),
        bias=change(case.bias),
    )

    def strided(function):
        return lambda hidden, weight, targets, bias, **kw: function(hidden, weight, targets, bias, **kw)

    dense = replace(case, hidden=case.hidden.contiguous(), weight=case.weight.contiguous(), bias=case.bias.contiguous())
    exact = evaluate(plain_logprobs, dense.to(torch.float64))
    device = implementation.device
    leaves = [t.to(device).detach().requires_grad_() for t in (case.hidden, case.weight, case.bias)]
    outputs = strided(op)(leaves[0], leaves[1], case.targets.to(device), leaves[2], memory_budget=budget)
    grads = torch.autograd.grad(list(outputs), leaves, [u.to(device) for u in case.upstream])
    for name, got in zip([*OUTPUTS, "dhidden", "dweight", "dbias"], [*outputs, *grads], strict=True):
        assert torch.allclose(got.detach().double().cpu(), exact[name], atol=1e-5 * max(1, exact[name].abs().max())), (
            name
        )


@pytest.mark.parametrize("upstream", ["sum", "strided", "transposed", "broadcast"])
def test_any_upstream_layout(op, implementation, upstream):
    case = make_case(12, 40, seed=2)
    device = implementation.device
    g = {
        "sum": torch.ones(()).expand(3, 4),
        "strided": torch.randn(3, 8, generator=torch.Generator().manual_seed(0))[:, ::2],
        "transposed": torch.randn(4, 3, generator=torch.Generator().manual_seed(0)).t(),
        "broadcast": torch.randn(3, 1, generator=torch.Generator().manual_seed(0)).expand(3, 4),
    }[upstream]
    case = replace(case, upstream=tuple(g.flatten() for _ in range(3)))
    exact = evaluate(plain_logprobs, case.to(torch.float64))
    hidden = case.hidden.to(device).view(3, 4, -1).requires_grad_()
    weight = case.weight.to(device).requires_grad_()
    outputs = op(hidden, weight, case.targets.to(device).view(3, 4), case.bias.to(device))
    dhidden, dweight = torch.autograd.grad(list(outputs), [hidden, weight], [g.to(device)] * 3)
    for name, got in {"dhidden": dhidden.flatten(0, 1), "dweight": dweight}.items():
        assert torch.allclose(got.double().cpu(), exact[name], atol=1e-5 * exact[name].abs().max()), name


@pytest.mark.parametrize("ignore_index", [-100, 0, 5, None])
def test_ignored_rows(op, implementation, ignore_index):
    case = make_case(20, 30, seed=3, ignored=0.0 if ignore_index is None else 0.4, ignore_index=ignore_index or 0)
    assert_matches_oracle(op, case, device=implementation.device, ignore_index=ignore_index)
    got = evaluate(op, case, device=implementation.device, ignore_index=ignore_index)
    ignored = torch.zeros(20, dtype=torch.bool) if ignore_index is None else case.targets == ignore_index
    for name in (*OUTPUTS, "dhidden"):
        assert (got[name][ignored] == 0).all(), name
        assert (got[name][~ignored] != 0).all(), name


def test_ignored_rows_are_never_read(op, implementation):
    """Padding may hold anything: NaN there must reach neither the outputs nor any gradient."""
    case = make_case(20, 30, seed=4, ignored=0.4)
    poisoned = case.hidden.clone()
    poisoned[case.targets == -100] = math.nan
    upstream = tuple(torch.where(case.targets == -100, math.nan, u) for u in case.upstream)
    clean, dirty = (
        evaluate(op, c, device=implementation.device) for c in (case, replace(case, hidden=poisoned, upstream=upstream))
    )
    for name in clean:
        assert torch.equal(clean[name], dirty[name]), name


@pytest.mark.parametrize("shape", [(0,), (0, 3), (2, 0), (4,), (2, 3)], ids=str)
def test_no_row_counts(op, implementation, shape):
    """Empty and all-ignored inputs: zeros of the right shape, gradients zero rather than None or NaN."""
    case = make_case(1, 30).to(implementation.device)
    hidden = torch.full((*shape, 8), math.nan, device=implementation.device, requires_grad=True)
    weight, bias = case.weight.requires_grad_(), case.bias.requires_grad_()
    result = op(hidden, weight, torch.full(shape, -100, device=implementation.device), bias)
    for output in result:
        assert output.shape == shape and (output == 0).all()
    sum(o.sum() for o in result).backward()
    for leaf in (hidden, weight, bias):
        assert leaf.grad is not None and leaf.grad.shape == leaf.shape and (leaf.grad == 0).all()


@pytest.mark.parametrize("deterministic", [False, True], ids=["", "nan_filled"])
def test_uninitialised_memory_is_never_read(op, implementation, deterministic):
    """`use_deterministic_algorithms` fills fresh memory with NaN."""
    case = make_case(20, 130, seed=5, ignored=0.5)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(deterministic, warn_only=True)
    try:
        for budget in (None, 4096):
            assert_matches_oracle(op, case, device=implementation.device, call={"memory_budget": budget})
        # A vocabulary that is padded, the gradient of its logits beside them.
        narrow, call = make_case(20, 131, seed=5, dtype=torch.bfloat16), {"logits_dtype": torch.float32}
        for budget in (None, 20000):
            assert_matches_oracle(op, narrow, device=implementation.device, call=call | {"memory_budget": budget})
    finally:
        torch.use_deterministic_algorithms(before)


@pytest.mark.parametrize("budget", [None, 4096])
@pytest.mark.parametrize(
    "masked", [(0,), (1, 2, 3, 4), tuple(range(32)), tuple(range(96, 130))], ids=["first", "few", "tile", "tail"]
)
def test_masked_vocabulary(op, implementation, masked, budget):
    """-inf logits carry no probability, no entropy and no gradient, wherever they stand in a tile."""
    case = make_case(6, 130, seed=6)
    bias = case.bias.index_fill(0, torch.tensor(masked), -math.inf)
    kept = torch.tensor([c for c in range(130) if c not in masked])
    case = replace(case, bias=bias, targets=kept[case.targets % len(kept)])
    assert_matches_oracle(op, case, device=implementation.device, temperature=0.9, call={"memory_budget": budget})
    got = evaluate(op, case, device=implementation.device)
    assert (got["dbias"][list(masked)] == 0).all() and (got["dweight"][list(masked)] == 0).all()


def test_masked_target(op, implementation):
    """A target without probability: log-prob -inf in its own row, the other rows and outputs untouched."""
    case = make_case(6, 130, seed=7)
    target = int(case.targets[2])
    case = replace(case, bias=case.bias.index_fill(0, torch.tensor([target]), -math.inf))
    exact = plain_logprobs(case.hidden, case.weight, case.targets, case.bias)
    case = case.to(implementation.device)
    got = op(case.hidden, case.weight, case.targets, case.bias)
    assert got.logprobs[2].item() == -math.inf
    for name, want in zip(OUTPUTS, exact, strict=True):
        assert torch.allclose(getattr(got, name).cpu(), want, atol=1e-5), name


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_nan_row_stays_in_its_row(op, implementation, value):
    case = make_case(6, 50, seed=8)
    broken = case.hidden.clone()
    broken[2, 3] = value
    clean = evaluate(op, case, device=implementation.device)
    got = evaluate(op, replace(case, hidden=broken), device=implementation.device)
    others = [0, 1, 3, 4, 5]
    for name in (*OUTPUTS, "dhidden"):
        assert value == math.inf or got[name][2].isnan().any(), name
        assert torch.allclose(got[name][others], clean[name][others], atol=1e-6), name


def test_inputs_are_not_changed(op, implementation):
    case = make_case(9, 70, seed=9, ignored=0.3).to(implementation.device)
    before = [t.clone() for t in (case.hidden, case.weight, case.targets, case.bias, *case.upstream)]
    evaluate(op, case, device=implementation.device)
    for old, new in zip(before, (case.hidden, case.weight, case.targets, case.bias, *case.upstream), strict=True):
        assert torch.equal(old, new)


def test_int32_targets_are_refused_or_right(op, implementation):
    case = make_case(5, 20).to(implementation.device)
    try:
        result = op(case.hidden, case.weight, case.targets.int(), case.bias)
    except ValueError as error:
        assert "targets" in str(error) and "int64" in str(error)
    else:
        assert torch.equal(result.logprobs, op(case.hidden, case.weight, case.targets, case.bias).logprobs)
