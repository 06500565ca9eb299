"""linear_sequence_loss against plain PyTorch: every preference loss, block size, dtype, and the order of the tokens."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from tspin_kernels import (
    SequenceStats,
    linear_logprobs,
    linear_sequence_loss,
    linear_tspin_loss,
    sequence_loss,
    tspin_loss,
)

from .oracle import plain_logprobs, plain_sequence_loss
from .preferences import PREFERENCES, entropy_bonus, simpo, tspin
from .sequences import BUDGETS, UPSTREAM, assert_loss_matches_oracle, evaluate_loss, make_sequences

TRANSFORMS = [
    {"temperature": 0.7},
    {"logit_scale": 0.25},
    {"softcap": 3.0},
    {"temperature": 1.7, "logit_scale": 2.5, "softcap": 4.0},
]


@pytest.fixture
def op(implementation):
    return partial(linear_sequence_loss, backend=implementation.backend)


def entropy_mode(name):
    return {"entropy": "grad"} if name == "entropy_bonus" else {}


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("name", PREFERENCES)
def test_preference_losses(op, implementation, name, budget):
    """From all groups in one block to a group that is larger than the budget."""
    preference = PREFERENCES[name]
    sequences = make_sequences(preference.group_size, reference=preference.reference, seed=1)
    call = entropy_mode(name)
    assert_loss_matches_oracle(
        op, sequences, preference.loss_fn, device=implementation.device, budget=budget, call=call
    )


@pytest.mark.parametrize("name", ["tspin", "entropy_bonus", "dpo_with_sft"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("budget", [None, 2, 1])
def test_short_dtypes(op, implementation, dtype, name, budget):
    preference = PREFERENCES[name]
    sequences = make_sequences(
        preference.group_size, reference=preference.reference, seed=2, dtype=dtype, V=129, spread=1.0
    )
    call = entropy_mode(name)
    assert_loss_matches_oracle(
        op, sequences, preference.loss_fn, device=implementation.device, budget=budget, call=call
    )


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
@pytest.mark.parametrize("budget", [None, 2, 1])
def test_logit_transforms(op, implementation, transform, bias, budget):
    sequences = make_sequences(3, seed=3, bias=bias)
    call = {"entropy": "grad"}
    assert_loss_matches_oracle(
        op, sequences, entropy_bonus, device=implementation.device, budget=budget, call=call, **transform
    )


@pytest.mark.parametrize("V", [1, 2, 127, 128, 129, 1025, 4097])
def test_vocabulary_edges(op, implementation, V):
    sequences = make_sequences(3, 2, seed=4, V=V, longest=3)
    assert_loss_matches_oracle(op, sequences, entropy_bonus, device=implementation.device, call={"entropy": "grad"})


@pytest.mark.parametrize("offset", [-150.0, 150.0])
@pytest.mark.parametrize("budget", [None, 2, 1])
def test_far_from_zero(op, implementation, offset, budget):
    sequences = make_sequences(3, seed=5, offset=offset)
    assert_loss_matches_oracle(op, sequences, tspin, device=implementation.device, budget=budget)


@pytest.mark.parametrize("normalizer", [None, 7.5, 1, "tensor"])
def test_normalizer(op, implementation, normalizer):
    sequences = make_sequences(2, seed=6)
    value = 2.5 if normalizer == "tensor" else normalizer
    given = torch.tensor(2.5, device=implementation.device) if normalizer == "tensor" else normalizer
    want = evaluate_loss(plain_sequence_loss, sequences, simpo, normalizer=value)
    got = evaluate_loss(op, sequences, simpo, device=implementation.device, normalizer=given)
    for name in want:
        assert torch.allclose(got[name], want[name], atol=1e-5), name


def test_result_type(op, implementation):
    sequences = make_sequences(3, 4, seed=7, dtype=torch.bfloat16)
    case = sequences.case.to(implementation.device)
    hidden = case.hidden.clone().requires_grad_()
    args = (hidden, case.weight, case.targets, sequences.sequence_ids.to(implementation.device), tspin, case.bias)
    for entropy in ("grad", "value", False):
        loss, stats = op(*args, group_size=3, entropy=entropy)
        assert loss.shape == () and loss.dtype == torch.float32 and loss.requires_grad
        assert isinstance(stats, SequenceStats)
        assert stats.logprobs.shape == stats.lengths.shape == (4, 3)
        assert stats.lengths.dtype == torch.int64 and stats.logprobs.dtype == torch.float32
        assert not stats.logprobs.requires_grad and not stats.lengths.requires_grad
        assert (stats.entropy is None) == (entropy is False)
        if entropy:
            assert stats.entropy.dtype == torch.float32 and not stats.entropy.requires_grad


def test_entropy_gradient_follows_its_mode(op, implementation):
    """With entropy="value" the entropy is a number to the loss, with "grad" a function of the weights."""
    sequences = make_sequences(3, seed=8)
    on, off = (
        evaluate_loss(op, sequences, entropy_bonus, device=implementation.device, entropy=mode)
        for mode in ("grad", "value")
    )
    assert torch.allclose(on["loss"], off["loss"], atol=1e-5)

    def constant_entropy(s):
        return entropy_bonus(s._replace(entropy=s.entropy.detach()))

    want = evaluate_loss(plain_sequence_loss, sequences, constant_entropy)
    assert torch.allclose(off["dweight"], want["dweight"], atol=1e-5)
    assert not torch.allclose(on["dweight"], want["dweight"], atol=1e-3)


@pytest.mark.parametrize("budget", [None, 2, 1])
def test_linear_tspin_loss_is_tspin_loss(implementation, budget):
    sequences = make_sequences(3, seed=9)

    def written_out(s):
        return tspin_loss(*s.logprobs.unbind(1), alpha=0.5, beta=0.3, loss_type="exponential")

    def op(hidden, weight, targets, sequence_ids, _, bias, *, group_size, group_inputs, rows, num_groups, **options):
        options = {"alpha": 0.5, "beta": 0.3, "loss_type": "exponential", "backend": implementation.backend, **options}
        return linear_tspin_loss(
            hidden, weight, targets, sequence_ids, bias, num_groups=num_groups, rows=rows, **options
        )

    assert_loss_matches_oracle(op, sequences, written_out, device=implementation.device, budget=budget)


def test_the_plain_half_gives_the_same_loss(implementation):
    """sequence_loss on the log-probs of linear_logprobs: same loss, statistics and gradients as the fused op."""
    sequences = make_sequences(3, seed=10, ignored=0.2)

    def op(hidden, weight, targets, sequence_ids, loss_fn, bias, *, rows, **options):
        logprobs, entropy, _ = linear_logprobs(hidden, weight, targets, bias, backend=implementation.backend)
        kept = targets != -100
        return sequence_loss(logprobs[kept], entropy[kept], sequence_ids[kept], loss_fn, **options)

    assert_loss_matches_oracle(op, sequences, entropy_bonus, device=implementation.device)


def test_sequence_loss_without_entropy():
    sequences = make_sequences(2, 3, seed=11)
    logprobs = torch.randn(len(sequences.sequence_ids), dtype=torch.float64, requires_grad=True)

    def call(logprobs):
        loss, stats = sequence_loss(logprobs, None, sequences.sequence_ids, simpo, group_size=2)
        assert loss.shape == () and stats.entropy is None
        return loss

    assert torch.autograd.gradcheck(call, [logprobs])


def test_coefficients_of_theorem_1(op, implementation):
    """The gradient of eq. (7) is three scalars per triplet times the gradients of three sequence log-probs."""
    sequences = make_sequences(3, 1, seed=12)
    got = evaluate_loss(op, sequences, tspin, device=implementation.device)
    case = sequences.case.to(torch.float64)
    hidden = case.hidden.clone().requires_grad_()
    tokens = plain_logprobs(hidden, case.weight, case.targets, case.bias)[0]
    real, synthetic, proto = torch.zeros(3, dtype=torch.float64).index_add(0, sequences.sequence_ids, tokens)
    current, history = torch.sigmoid(synthetic - real).detach(), torch.sigmoid(proto - synthetic).detach()
    (-current * real + (current - 0.1 * history) * synthetic + 0.1 * history * proto).backward()
    assert torch.allclose(got["dhidden"], UPSTREAM * hidden.grad, atol=1e-5)


def test_zero_coefficients_give_zero_gradients(op, implementation):
    """Groups without weight in the loss: exact zeros there, the others unchanged."""
    sequences = make_sequences(3, 4, seed=13, bias=False)
    weights = torch.tensor([1.0, 0.0, 0.5, 0.0])

    def weighted(s, w):
        return w * tspin(s)

    got = evaluate_loss(op, replace(sequences, group_inputs=(weights,)), weighted, device=implementation.device)
    silent = (weights == 0)[sequences.sequence_ids // 3]
    assert (got["dhidden"][silent] == 0).all() and (got["dhidden"][~silent] != 0).any(1).all()
    for budget in BUDGETS:
        assert_loss_matches_oracle(
            op, replace(sequences, group_inputs=(weights,)), weighted, device=implementation.device, budget=budget
        )
