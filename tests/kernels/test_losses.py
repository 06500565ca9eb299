"""The losses as functions of sequence log-probs: formulas, Theorem 1, extreme margins, missing proto, errors."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tspin_kernels import sft_loss, spin_loss, tspin_loss, tspin_ref_loss

B = 5


def log_probs(count, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    return [(torch.randn(B, generator=g, dtype=dtype) - 3.0).requires_grad_() for _ in range(count)]


def surrogate(z, loss_type):
    return -torch.log(torch.sigmoid(z)) if loss_type == "logistic" else torch.exp(-z)


@pytest.mark.parametrize("loss_type", ["logistic", "exponential"])
@pytest.mark.parametrize("alpha, beta", [(1.0, 0.1), (0.3, 1.0), (2.0, 0.0)])
def test_tspin_formula(loss_type, alpha, beta):
    y, s, p = log_probs(3)
    want = surrogate(alpha * (y - s), loss_type) + beta * surrogate(alpha * (s - p), loss_type)
    got = tspin_loss(y, s, p, alpha=alpha, beta=beta, loss_type=loss_type)
    assert got.shape == (B,) and torch.allclose(got, want)


@pytest.mark.parametrize("loss_type", ["logistic", "exponential"])
def test_spin_formula(loss_type):
    y, s, ref_y, ref_s = log_probs(4)
    want = surrogate(0.3 * ((y - ref_y) - (s - ref_s)), loss_type)
    assert torch.allclose(spin_loss(y, s, ref_y, ref_s, lam=0.3, loss_type=loss_type), want)


@pytest.mark.parametrize("loss_type", ["logistic", "exponential"])
def test_tspin_ref_formula(loss_type):
    y, s, p, ref_y, ref_s, ref_p = log_probs(6)
    want = tspin_loss(y - ref_y, s - ref_s, p - ref_p, alpha=0.5, beta=0.3, loss_type=loss_type)
    assert torch.allclose(tspin_ref_loss(y, s, p, ref_y, ref_s, ref_p, alpha=0.5, beta=0.3, loss_type=loss_type), want)


def test_sft_is_the_negative_log_likelihood():
    (y,) = log_probs(1)
    assert torch.equal(sft_loss(y), -y)


def test_defaults_are_the_papers():
    y, s, p, ref_y, ref_s, ref_p = log_probs(6)
    assert torch.equal(tspin_loss(y, s, p), tspin_loss(y, s, p, alpha=1.0, beta=0.1, loss_type="logistic"))
    assert torch.equal(spin_loss(y, s, ref_y, ref_s), spin_loss(y, s, ref_y, ref_s, lam=0.1, loss_type="logistic"))
    refs = (ref_y, ref_s, ref_p)
    assert torch.equal(
        tspin_ref_loss(y, s, p, *refs), tspin_ref_loss(y, s, p, *refs, alpha=1.0, beta=0.1, loss_type="logistic")
    )


def test_gradient_is_theorem_1():
    y, s, p = log_probs(3)
    tspin_loss(y, s, p, alpha=0.7, beta=0.4).sum().backward()
    current, history = torch.sigmoid(-0.7 * (y - s)).detach(), torch.sigmoid(-0.7 * (s - p)).detach()
    assert torch.allclose(y.grad, -0.7 * current)
    assert torch.allclose(s.grad, 0.7 * current - 0.7 * 0.4 * history)
    assert torch.allclose(p.grad, 0.7 * 0.4 * history)


@pytest.mark.parametrize("loss_type", ["logistic", "exponential"])
def test_gradcheck(loss_type):
    def call(y, s, p, ref_y, ref_s, ref_p):
        plain = tspin_loss(y, s, p, alpha=0.5, beta=0.3, loss_type=loss_type)
        ref = tspin_ref_loss(y, s, p, ref_y, ref_s, ref_p, alpha=0.5, beta=0.3, loss_type=loss_type)
        return plain + ref + spin_loss(y, s, ref_y, ref_s, loss_type=loss_type) + sft_loss(y)

    assert torch.autograd.gradcheck(call, log_probs(6))
    assert torch.autograd.gradgradcheck(call, log_probs(6))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("margin", [-5000.0, -100.0, 100.0, 5000.0])
def test_logistic_loss_of_extreme_margins(margin, dtype):
    """Long answers: the loss grows linearly or vanishes, its slope is -1 or 0, and nothing overflows."""
    y = torch.tensor([margin], dtype=dtype, requires_grad=True)
    zero = torch.zeros(1, dtype=dtype)
    loss = tspin_loss(y, zero, zero, beta=0.0)
    loss.sum().backward()
    assert torch.allclose(loss, torch.tensor([max(0.0, -margin)], dtype=dtype))
    assert torch.allclose(y.grad, torch.tensor([-1.0 if margin < 0 else 0.0], dtype=dtype))
    assert torch.isfinite(spin_loss(y, zero, zero, zero, lam=1.0)).all()


@pytest.mark.parametrize("proto", [None, math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("loss_type", ["logistic", "exponential"])
def test_proto_plays_no_part_at_beta_zero(proto, loss_type):
    """Not even as 0 * inf."""
    y, s = log_probs(2)
    third = None if proto is None else torch.full((B,), proto, dtype=torch.float64)
    loss = tspin_loss(y, s, third, beta=0.0, loss_type=loss_type)
    assert torch.allclose(loss, surrogate(y - s, loss_type))
    (dy,) = torch.autograd.grad(loss.sum(), y)
    assert torch.isfinite(dy).all()
    ref = tspin_ref_loss(y, s, third, torch.zeros_like(y), torch.zeros_like(y), third, beta=0.0, loss_type=loss_type)
    assert torch.allclose(ref, loss)


def test_errors_name_the_argument():
    y, s, p = log_probs(3)
    with pytest.raises(ValueError, match=r"proto.*beta"):
        tspin_loss(y, s)
    with pytest.raises(ValueError, match=r"proto.*beta"):
        tspin_ref_loss(y, s, None, y, s, None)
    with pytest.raises(ValueError, match=r"ref_proto"):
        tspin_ref_loss(y, s, p, y, s, None)
    for call in (tspin_loss, lambda *a, **k: spin_loss(*a[:2], *a[:2], **k)):
        with pytest.raises(ValueError, match=r"loss_type.*logistic.*exponential.*hinge"):
            call(y, s, p, loss_type="hinge")


@settings(max_examples=50, derandomize=True, deadline=None)
@given(st.lists(st.floats(-300, 0), min_size=3, max_size=3), st.floats(0.05, 2), st.floats(0, 2), st.floats(-100, 100))
def test_only_differences_matter(values, alpha, beta, shift):
    """Every response made equally likelier changes nothing, and a likelier annotated response never costs more."""
    y, s, p = (torch.tensor([v], dtype=torch.float64) for v in values)
    base = tspin_loss(y, s, p, alpha=alpha, beta=beta)
    assert torch.allclose(tspin_loss(y + shift, s + shift, p + shift, alpha=alpha, beta=beta), base, atol=1e-9)
    assert (tspin_loss(y + 1, s, p, alpha=alpha, beta=beta) <= base).all()
    assert (base >= 0).all()
