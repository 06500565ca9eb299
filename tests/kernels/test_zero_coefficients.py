"""Sequences without weight in the loss cost no product of the backward, and change nothing for the others."""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tspin_kernels import linear_sequence_loss

from .preferences import tspin
from .sequences import BUDGETS, assert_loss_matches_oracle, budget_options, evaluate_loss, make_sequences
from .test_memory import product_flops

D, V = 8, 150


def weighted_sum(s, weights):
    """Each sequence's log-prob has the coefficient given for it, some of which are zero; entropy's are zero too."""
    return (weights * s.logprobs).sum(1) + 0 * s.entropy.sum(1)


def with_weights(sequences, weights):
    return replace(sequences, group_inputs=(torch.as_tensor(weights, dtype=torch.float32).view(-1, 3),))


@settings(max_examples=40, derandomize=True, deadline=None)
@given(
    weights=st.lists(st.sampled_from([0.0, 0.0, -1.3, 0.7]), min_size=12, max_size=12),
    seed=st.integers(0, 2**31),
    budget=st.sampled_from(BUDGETS),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    shared=st.booleans(),
)
def test_any_pattern_of_zeros_matches_plain_pytorch(weights, seed, budget, dtype, shared):
    sequences = with_weights(make_sequences(3, 4, seed=seed, dtype=dtype, spread=1.0), weights)
    N = len(sequences.sequence_ids)
    if shared:
        rows = torch.randint(N, (N,), generator=torch.Generator().manual_seed(seed))
        sequences = replace(sequences, rows=rows)
    op = partial(linear_sequence_loss, backend="torch")
    call = {"entropy": "grad"}
    assert_loss_matches_oracle(op, sequences, weighted_sum, device="cpu", budget=budget, call=call)
    options = budget_options(op, sequences, weighted_sum, budget, **call)
    got = evaluate_loss(op, sequences, weighted_sum, **options, **call)
    used = torch.arange(N) if sequences.rows is None else sequences.rows
    live = used[torch.tensor(weights)[sequences.sequence_ids] != 0]
    silent = torch.ones(N, dtype=torch.bool).index_fill(0, live, False)
    assert (got["dhidden"][silent] == 0).all()


@pytest.mark.parametrize("budget", [None, 4, 1])
@pytest.mark.parametrize("weights", [[0.0] * 12, [0, 1, 0] * 4, [0] * 6 + [1, -2, 0.5] * 2, [1] * 11 + [0]], ids=str)
def test_flops_are_those_of_the_sequences_that_count(fused, weights, budget):
    """Two passes over every row, then four over the rows that count, and two more where a group is larger than the budget."""
    sequences = with_weights(make_sequences(3, 4, seed=1), weights)
    if fused.interpreted and budget == 4:
        pytest.skip("slow under Triton's interpreter; the blocks of groups are shared with the torch backend")
    op = partial(linear_sequence_loss, backend=fused.backend)
    options = budget_options(op, sequences, weighted_sum, budget)
    flops = product_flops(lambda: evaluate_loss(op, sequences, weighted_sum, device=fused.device, **options))
    live = (torch.tensor(weights)[sequences.sequence_ids] != 0).sum().item()
    assert flops == (2 * len(sequences.sequence_ids) + (6 if budget == 1 else 4) * live) * V * D


def test_a_hidden_row_that_is_nan_and_does_not_count_leaves_no_trace(fused):
    """nan times zero is nan: a row that is skipped can poison nothing, one that is masked could."""
    weights = [0, 1, 2, 0, 0, 0, 1, 0, 1, 1, 1, 1]
    sequences = with_weights(make_sequences(3, 4, seed=2), weights)
    dead = torch.tensor(weights)[sequences.sequence_ids] == 0
    hidden = sequences.case.hidden.clone()
    hidden[dead] = math.nan
    poisoned = replace(sequences, case=replace(sequences.case, hidden=hidden))
    op = partial(linear_sequence_loss, backend=fused.backend)

    def selected(s, w):
        return torch.where(w != 0, w * s.logprobs, 0).sum(1)

    clean, got = (evaluate_loss(op, s, selected, device=fused.device) for s in (sequences, poisoned))
    for name in ("loss", "dhidden", "dweight", "dbias"):
        assert torch.equal(got[name], clean[name]), name


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_coefficient_that_is_not_finite_is_not_skipped(fused, bad, budget):
    sequences = with_weights(make_sequences(3, 4, seed=3), [0, 0, 0, 0, bad, 0, 1, 0, 0, 0, 0, 0])
    op = partial(linear_sequence_loss, backend=fused.backend)

    def loss_fn(s, w):
        return torch.where(w != 0, w * s.logprobs, 0).sum(1)

    options = budget_options(op, sequences, loss_fn, budget)
    got = evaluate_loss(op, sequences, loss_fn, device=fused.device, **options)
    assert not got["dhidden"][sequences.sequence_ids == 4].isfinite().any()
    assert not got["dweight"].isfinite().all()
    assert got["dhidden"][sequences.sequence_ids != 4].isfinite().all()


@pytest.mark.parametrize("budget", BUDGETS)
def test_an_entropy_coefficient_alone_counts(fused, budget):
    """Log-probs without weight, entropies with: nothing may be skipped."""
    sequences = make_sequences(3, seed=4)

    def entropy_only(s):
        return 0 * s.logprobs.sum(1) - (s.entropy / s.lengths.clamp(min=1)).mean(1)

    op = partial(linear_sequence_loss, backend=fused.backend)
    call = {"entropy": "grad"}
    assert_loss_matches_oracle(op, sequences, entropy_only, device=fused.device, budget=budget, call=call)


def test_sequences_that_all_count_are_left_in_place(fused):
    """Weights of one, and the same loss without weights: bitwise the same."""
    sequences = make_sequences(3, 4, seed=5)
    op = partial(linear_sequence_loss, backend=fused.backend)

    def weighted(s, w):
        return w[:, 0] * tspin(s)

    plain = evaluate_loss(op, sequences, tspin, device=fused.device)
    got = evaluate_loss(op, with_weights(sequences, [1.0] * 12), weighted, device=fused.device)
    for name in plain:
        assert torch.equal(got[name], plain[name]), name
