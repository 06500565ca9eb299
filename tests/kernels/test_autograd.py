"""What autograd may ask of the ops: no wrong second derivative or second backward, no_grad costs nothing."""

import math
from functools import partial

import pytest
import torch
from torch.autograd import forward_ad

from tspin_kernels import linear_logprobs, linear_sequence_loss
from tspin_kernels._head import rows_module

from .oracle import least_budget, make_case
from .preferences import simpo
from .sequences import make_sequences


def token_loss(fused, hidden, case, **options):
    """A scalar from all three outputs of linear_logprobs, with a different weight for each token."""
    weight = case.weight.requires_grad_(options.pop("train_head", True))
    outputs = linear_logprobs(hidden, weight, case.targets, case.bias, backend=fused.backend, **options)
    return sum((o * u).sum() for o, u in zip(outputs, case.upstream, strict=True))


def group_loss(fused, hidden, case, **options):
    """linear_sequence_loss of pairs over the same rows."""
    ids = torch.arange(len(case.targets), device=hidden.device) % 4
    weight = case.weight.requires_grad_(options.pop("train_head", True))
    return linear_sequence_loss(
        hidden, weight, case.targets, ids, simpo, case.bias, group_size=2, backend=fused.backend, **options
    )[0]


OPS = [pytest.param(token_loss, id="linear_logprobs"), pytest.param(group_loss, id="linear_sequence_loss")]


@pytest.fixture
def inputs(fused):
    case = make_case(8, 150, seed=1).to(fused.device)
    return case.hidden.clone().requires_grad_(), case


@pytest.fixture(params=["store", "blocks"])
def options(request, fused, inputs):
    """The plan that keeps the logits, and the one that makes them again."""
    if request.param == "store":
        return {}
    hidden, case = inputs
    budgets = [
        least_budget(lambda b, op=op: op(fused, hidden, case, memory_budget=b).backward())
        for op in (token_loss, group_loss)
    ]
    hidden.grad = case.weight.grad = None
    return {"memory_budget": max(budgets)}


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("upstream_requires_grad", [False, True], ids=["constant_upstream", "live_upstream"])
def test_a_second_derivative_raises(fused, inputs, options, op, upstream_requires_grad):
    """With a constant upstream gradient too, where a gradient formed in the forward would pass for a constant."""
    hidden, case = inputs
    loss = op(fused, hidden, case, **options)
    factor = torch.tensor(2.0, device=fused.device, requires_grad=upstream_requires_grad)
    with pytest.raises(RuntimeError):
        (dhidden,) = torch.autograd.grad(loss * factor, hidden, create_graph=True)
        (dhidden.square().sum() + hidden.square().sum()).backward()


@pytest.mark.parametrize("op", OPS)
def test_a_second_derivative_in_the_upstream_scalar_raises(fused, inputs, options, op):
    """The gradient is linear in the upstream scalar; its derivative in it must not be lost silently either."""
    hidden, case = inputs
    factor = torch.tensor(2.0, device=fused.device, requires_grad=True)
    with pytest.raises(RuntimeError):
        (dhidden,) = torch.autograd.grad(op(fused, hidden, case, **options) * factor, hidden, create_graph=True)
        (dhidden.sum() + factor).backward()


@pytest.mark.parametrize("op", OPS)
def test_a_second_backward_is_right_or_raises(fused, inputs, options, op):
    hidden, case = inputs
    loss = op(fused, hidden, case, **options)
    first = torch.autograd.grad(loss, [hidden, case.weight], retain_graph=True)
    kept = [g.clone() for g in first]
    try:
        second = torch.autograd.grad(3 * loss, [hidden, case.weight])
    except RuntimeError:
        pass
    else:
        for a, b in zip(kept, second, strict=True):
            assert torch.allclose(3 * a, b, atol=1e-6)
    for a, b in zip(first, kept, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("moved", [torch.clone, lambda t: t], ids=["copied", "as they are"])
def test_a_second_backward_raises_whatever_was_done_to_what_was_saved(fused, inputs, moved):
    """Offloaded and brought back, the logits that the first backward used up look untouched."""
    hidden, case = inputs
    with torch.autograd.graph.saved_tensors_hooks(moved, lambda t: t):
        loss = linear_logprobs(hidden, case.weight, case.targets, backend=fused.backend).logprobs.sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=r"backward was called twice.*memory_budget"):
        loss.backward()


@pytest.mark.parametrize("groups", [False, True], ids=["linear_logprobs", "linear_sequence_loss"])
def test_forward_mode_raises(fused, inputs, groups):
    """A tangent of zeros would be wrong."""
    hidden, case = inputs
    hidden, ids = hidden.detach(), torch.arange(8, device=fused.device) % 4

    def op(hidden):
        if groups:
            args = hidden, case.weight, case.targets, ids, simpo
            return linear_sequence_loss(*args, group_size=2, backend=fused.backend)[0]
        return linear_logprobs(hidden, case.weight, case.targets, backend=fused.backend).logprobs

    message = r"hidden.*tangent.*reverse mode"
    with pytest.raises(RuntimeError, match=message):
        torch.func.jvp(op, (hidden,), (torch.ones_like(hidden),))
    with forward_ad.dual_level():
        with pytest.raises(RuntimeError, match=message):
            op(forward_ad.make_dual(hidden, torch.ones_like(hidden)))
        op(hidden)


@pytest.mark.parametrize("op", OPS)
def test_backward_after_release_raises(fused, inputs, options, op):
    hidden, case = inputs
    loss = op(fused, hidden, case, **options)
    loss.backward()
    with pytest.raises(RuntimeError):
        loss.backward()


@pytest.mark.parametrize("op", OPS)
def test_gradients_accumulate(fused, inputs, options, op):
    hidden, case = inputs
    op(fused, hidden, case, **options).backward()
    once = [hidden.grad.clone(), case.weight.grad.clone()]
    op(fused, hidden, case, **options).backward()
    for leaf, want in zip((hidden, case.weight), once, strict=True):
        assert torch.allclose(leaf.grad, 2 * want, atol=1e-6)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("factor", [-2.5, 0.5, 0.0])
def test_upstream_scalar(fused, inputs, options, op, factor):
    """One, which costs no pass over the gradients, against what must be multiplied."""
    hidden, case = inputs
    one = torch.autograd.grad(op(fused, hidden, case, **options), [hidden, case.weight])
    scaled = torch.autograd.grad(op(fused, hidden, case, **options) * factor, [hidden, case.weight])
    for got, want in zip(scaled, one, strict=True):
        assert torch.allclose(got, factor * want, atol=1e-6)


@pytest.mark.parametrize("size", [0, 1, 2048, 3 * 2048 + 1, 40_000])
def test_every_value_of_a_gradient_is_scaled(fused, size):
    """Around the blocks of its kernel, which one program may own several of."""
    module = rows_module(fused.backend, torch.device(fused.device))
    values = torch.randn(size, generator=torch.Generator().manual_seed(size)).to(fused.device)
    for factor in (1.0, -3.0, math.nan):
        got = module.scale_(values.clone(), torch.tensor(factor, device=fused.device))
        assert torch.equal(got.isnan(), (values * factor).isnan())
        assert torch.equal(got.nan_to_num(), (values * factor).nan_to_num())


@pytest.mark.parametrize("op", OPS)
def test_the_trunk_gets_its_gradient(fused, inputs, options, op):
    """Through a trunk, with a frozen head: leaf gradients are the chain rule's."""
    hidden, case = inputs
    trunk = torch.eye(8, device=fused.device).requires_grad_()
    (direct,) = torch.autograd.grad(op(fused, hidden, case, train_head=False, **options), hidden)
    op(fused, hidden.detach() @ trunk, case, train_head=False, **options).backward()
    assert torch.allclose(trunk.grad, hidden.detach().t() @ direct, atol=1e-5)
    assert case.weight.grad is None


@pytest.mark.parametrize("op", OPS)
def test_only_the_head_trains(fused, inputs, options, op):
    hidden, case = inputs
    both = torch.autograd.grad(op(fused, hidden, case, **options), [hidden, case.weight])
    (alone,) = torch.autograd.grad(op(fused, hidden.detach(), case, **options), [case.weight])
    assert torch.allclose(alone, both[1], atol=1e-6)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradient_nothing_is_saved(fused, inputs, op, mode):
    hidden, case = inputs
    want = op(fused, hidden, case).detach()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t), mode():
        loss = op(fused, hidden, case)
    assert torch.allclose(loss, want) and not loss.requires_grad and not saved


@pytest.mark.parametrize("op", OPS)
def test_under_gradient_checkpointing(fused, inputs, options, op):
    """The op inside a checkpointed block runs twice; the gradient is the same."""
    hidden, case = inputs
    want = torch.autograd.grad(op(fused, hidden, case, **options), [hidden, case.weight])
    call = partial(op, fused, case=case, **options)
    loss = torch.utils.checkpoint.checkpoint(lambda h: call(h), hidden, use_reentrant=False)
    for got, expected in zip(torch.autograd.grad(loss, [hidden, case.weight]), want, strict=True):
        assert torch.allclose(got, expected, atol=1e-6)


def test_a_loss_without_gradient(fused):
    """A constant loss_fn: a number, and gradients of zero."""
    sequences = make_sequences(2, seed=2)
    case = sequences.case.to(fused.device)
    hidden = case.hidden.requires_grad_()

    def constant(s):
        return torch.ones(len(s.logprobs), device=s.logprobs.device)

    ids = sequences.sequence_ids.to(fused.device)
    loss, _ = linear_sequence_loss(
        hidden, case.weight, case.targets, ids, constant, group_size=2, backend=fused.backend
    )
    loss.backward()
    assert loss.item() == 1.0 and hidden.grad is not None and (hidden.grad == 0).all()


def test_statistics_carry_no_gradient(fused):
    sequences = make_sequences(2, seed=3)
    case = sequences.case.to(fused.device)
    hidden = case.hidden.requires_grad_()
    ids = sequences.sequence_ids.to(fused.device)
    _, stats = linear_sequence_loss(hidden, case.weight, case.targets, ids, simpo, group_size=2, backend=fused.backend)
    assert not any(t.requires_grad for t in stats)
    with pytest.raises(RuntimeError):
        stats.logprobs.sum().backward()


def test_unused_loss_gives_no_gradient(fused, inputs):
    """Only one of two calls enters the loss: the other costs nothing and leaves no trace."""
    hidden, case = inputs
    unused = group_loss(fused, hidden, case)
    hidden.square().sum().backward()
    assert torch.equal(hidden.grad, 2 * hidden.detach())
    unused.backward()
    assert not torch.equal(hidden.grad, 2 * hidden.detach())
