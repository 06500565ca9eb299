"""linear_sequence_loss: order of rows, empty sequences, ignored tokens, shared hidden rows, groups per block."""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tspin_kernels import linear_sequence_loss

from .oracle import plain_sequence_loss, relative_error
from .preferences import simpo, spin, tspin
from .sequences import BUDGETS, assert_loss_matches_oracle, budget_options, evaluate_loss, make_sequences


@pytest.fixture
def op(implementation):
    return partial(linear_sequence_loss, backend=implementation.backend)


def permuted(sequences, order):
    case = sequences.case
    return replace(
        sequences,
        case=replace(case, hidden=case.hidden[order], targets=case.targets[order]),
        sequence_ids=sequences.sequence_ids[order],
    )


@pytest.mark.parametrize("budget", BUDGETS)
def test_rows_come_in_any_order(op, implementation, budget):
    sequences = make_sequences(3, seed=1, shuffle=False)
    options = budget_options(op, sequences, tspin, budget)
    base = evaluate_loss(op, sequences, tspin, device=implementation.device, **options)
    order = torch.randperm(len(sequences.sequence_ids), generator=torch.Generator().manual_seed(0))
    moved = evaluate_loss(op, permuted(sequences, order), tspin, device=implementation.device, **options)
    for name in base:
        want = base[name][order] if name == "dhidden" else base[name]
        assert torch.allclose(moved[name], want, atol=2e-5), name


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("missing", [(0,), (4,), (11,), (3, 4, 5), (9, 10, 11), (0, 4, 8)], ids=str)
def test_empty_sequences_and_groups(op, implementation, missing, budget):
    """An empty sequence has log-prob 0 and length 0; an empty group counts in the loss, at the end too."""
    sequences = make_sequences(3, 4, seed=2)
    kept = ~torch.isin(sequences.sequence_ids, torch.tensor(missing))
    sequences = permuted(sequences, kept.nonzero()[:, 0])
    assert_loss_matches_oracle(op, sequences, tspin, device=implementation.device, budget=budget)
    options = budget_options(op, sequences, tspin, budget)
    got = evaluate_loss(op, sequences, tspin, device=implementation.device, **options)
    for s in missing:
        assert got["lengths"].flatten()[s] == 0 and got["logprobs"].flatten()[s] == 0


@pytest.mark.parametrize("budget", BUDGETS)
def test_ignored_tokens_count_for_nothing(op, implementation, budget):
    sequences = make_sequences(3, seed=3, ignored=0.4)
    assert_loss_matches_oracle(op, sequences, tspin, device=implementation.device, budget=budget)
    poisoned = sequences.case.hidden.clone()
    poisoned[sequences.case.targets == -100] = math.nan
    dirty = replace(sequences, case=replace(sequences.case, hidden=poisoned))
    options = budget_options(op, sequences, tspin, budget)
    clean, got = (evaluate_loss(op, s, tspin, device=implementation.device, **options) for s in (sequences, dirty))
    for name in clean:
        assert torch.equal(got[name], clean[name]), name


@pytest.mark.parametrize("everything", ["ignored", "absent"])
def test_no_token_counts(op, implementation, everything):
    """Only empty sequences: the loss of log-probs 0, zero gradients."""
    sequences = make_sequences(3, 2, seed=4)
    if everything == "ignored":
        sequences = replace(
            sequences, case=replace(sequences.case, targets=torch.full_like(sequences.case.targets, -100))
        )
    else:
        sequences = permuted(sequences, torch.zeros(0, dtype=torch.int64))
    got = evaluate_loss(op, sequences, tspin, device=implementation.device)
    assert math.isclose(got["loss"].item(), 1.1 * math.log(2), rel_tol=1e-6)
    for name in ("logprobs", "lengths", "dhidden", "dweight", "dbias"):
        assert (got[name] == 0).all(), name


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("weights", [[1.0, 0.0, 0.5], [0.0, 0.0, 0.0], [0.0, 0.0, 2.0]], ids=str)
def test_uninitialised_memory_is_never_read(op, implementation, budget, weights):
    """`use_deterministic_algorithms` fills fresh memory with NaN; groups without weight write nothing."""
    sequences = replace(make_sequences(3, 3, seed=5, ignored=0.3), group_inputs=(torch.tensor(weights),))

    def weighted(s, w):
        return w * tspin(s)

    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert_loss_matches_oracle(op, sequences, weighted, device=implementation.device, budget=budget)
        if implementation.backend != "reference":
            options = {"filter_tolerance": 1e-6, **budget_options(op, sequences, weighted, budget)}
            got = evaluate_loss(op, sequences, weighted, device=implementation.device, **options)
            assert all(value.isfinite().all() for value in got.values())
    finally:
        torch.use_deterministic_algorithms(before)


@pytest.mark.parametrize("budget", BUDGETS)
def test_shared_hidden_rows(op, implementation, budget):
    """One hidden row predicts the first token of several responses: its gradient is the sum over them."""
    sequences = make_sequences(3, seed=5)
    N = len(sequences.sequence_ids)
    rows = torch.randint(7, (N,), generator=torch.Generator().manual_seed(1))
    sequences = replace(sequences, rows=rows, case=replace(sequences.case, hidden=sequences.case.hidden[:9]))
    assert_loss_matches_oracle(op, sequences, tspin, device=implementation.device, budget=budget)
    options = budget_options(op, sequences, tspin, budget)
    got = evaluate_loss(op, sequences, tspin, device=implementation.device, **options)
    assert got["dhidden"].shape == (9, 8) and (got["dhidden"][7:] == 0).all()


@pytest.mark.parametrize("budget", [None, 2, 1])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_row_shared_by_many_is_summed_in_float32(op, implementation, dtype, budget):
    """The error is that of separate rows summed in float64; 300 sums in the short dtype lose several times as much."""
    if implementation.backend == "reference":
        pytest.skip("the reference leaves the sum to PyTorch's gather, which sums in the short dtype")
    if implementation.interpreted:
        pytest.skip("300 rows are slow under Triton's interpreter, and the sum is shared with the torch backend")
    sequences = make_sequences(2, 60, seed=6, dtype=dtype, longest=4)
    N = len(sequences.sequence_ids)
    shared = sequences.case.hidden[:1]
    apart = replace(sequences, case=replace(sequences.case, hidden=shared.expand(N, -1).contiguous()))
    exact = evaluate_loss(plain_sequence_loss, replace(apart, case=apart.case.to(torch.float64)), simpo)["dhidden"].sum(
        0
    )
    plain = evaluate_loss(plain_sequence_loss, apart, simpo)["dhidden"].sum(0)
    together = replace(sequences, rows=torch.zeros(N, dtype=torch.int64), case=replace(sequences.case, hidden=shared))
    options = budget_options(op, together, simpo, budget)
    got = evaluate_loss(op, together, simpo, device=implementation.device, **options)["dhidden"][0]
    assert relative_error(got, exact) < 2 * relative_error(plain, exact) + torch.finfo(dtype).eps / 2


def test_rows_of_a_batch_of_hidden_states(op, implementation):
    """hidden [R, T, D] with rows into its flattened positions, as a trainer calls it."""
    sequences = make_sequences(3, 2, seed=7)
    N = len(sequences.sequence_ids)
    rows = torch.randperm(2 * N, generator=torch.Generator().manual_seed(2))[:N]
    wide = torch.full((2 * N, 8), math.nan)
    wide[rows] = sequences.case.hidden
    batch = replace(sequences, rows=rows, case=replace(sequences.case, hidden=wide.view(2, N, 8)))
    got, want = (evaluate_loss(op, s, tspin, device=implementation.device) for s in (batch, sequences))
    assert got["dhidden"].shape == (2, N, 8)
    assert torch.equal(got["dhidden"].flatten(0, 1)[rows], want["dhidden"])
    for name in ("loss", "logprobs", "dweight"):
        assert torch.equal(got[name], want[name]), name


def test_groups_per_block_follow_the_budget(fused):
    """All groups in one call of the loss at the default budget, one by one at a small one; inputs are sliced alike."""
    if fused.interpreted:
        pytest.skip("slow under Triton's interpreter; the blocks of groups are shared with the torch backend")
    sequences = make_sequences(2, 5, seed=8, longest=12, reference=True)
    numbers = torch.arange(5.0)
    blocks = []

    def recording(s, ref, number):
        assert ref.shape == s.logprobs.shape == s.lengths.shape and number.shape == s.logprobs.shape[:1]
        assert torch.allclose(ref, sequences.group_inputs[0].to(ref)[number.long()])
        blocks.append(len(s.logprobs))
        return spin(s, ref)

    op = partial(linear_sequence_loss, backend=fused.backend)
    numbered = replace(sequences, group_inputs=(*sequences.group_inputs, numbers))
    seen = set()
    for multiple in (None, 8, 4, 3, 2.5, 2, 1.5, 1.2):
        options = budget_options(op, numbered, recording, multiple)
        blocks.clear()
        evaluate_loss(op, numbered, recording, device=fused.device, **options)
        assert sum(blocks) == 5
        seen.add(tuple(blocks))
    assert {(5,), (1, 1, 1, 1, 1)} < seen, seen


def test_num_groups_defaults_to_the_last_sequence(op, implementation):
    sequences = make_sequences(2, 4, seed=9, bias=False)
    case = sequences.case.to(implementation.device)
    args = (case.hidden, case.weight, case.targets, sequences.sequence_ids.to(implementation.device), simpo)
    assert op(*args, group_size=2)[1].logprobs.shape == (4, 2)
    loss, stats = op(*args, group_size=2, num_groups=6)
    assert stats.logprobs.shape == (6, 2) and (stats.lengths[4:] == 0).all()
    want = plain_sequence_loss(
        sequences.case.hidden,
        sequences.case.weight,
        sequences.case.targets,
        sequences.sequence_ids,
        simpo,
        group_size=2,
        num_groups=6,
    )[0]
    assert torch.allclose(loss.cpu(), want, atol=1e-5)


@settings(max_examples=25, derandomize=True, deadline=None)
@given(
    group_size=st.integers(1, 4),
    num_groups=st.integers(1, 6),
    longest=st.integers(1, 8),
    seed=st.integers(0, 2**31),
    budget=st.sampled_from(BUDGETS),
    ignored=st.sampled_from([0.0, 0.5]),
)
def test_random_layouts_match_plain_pytorch(group_size, num_groups, longest, seed, budget, ignored):
    sequences = make_sequences(group_size, num_groups, longest=longest, seed=seed, ignored=ignored)

    def coupled(s):
        """Couples every sequence of a group with every other one, with a gradient that depends on all of them."""
        return torch.logsumexp(0.3 * s.logprobs + 0.1 * s.lengths, 1) + s.logprobs.tanh().prod(1)

    op = partial(linear_sequence_loss, backend="torch")
    assert_loss_matches_oracle(op, sequences, coupled, device="cpu", budget=budget)


def test_more_sequences_than_two_bytes_number():
    """In falling order, so that a number that wraps is sorted elsewhere."""
    S, draw = 2**15 + 9, torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(rows, 4, generator=draw, requires_grad=True) for rows in (S, 8))
    targets, ids = torch.randint(8, (S,), generator=draw), torch.arange(S - 1, -1, -1)
    scale = torch.randn(S, generator=draw)
    call = partial(linear_sequence_loss, hidden, weight, targets, ids, lambda s, c: c * s.logprobs[:, 0], group_size=1)
    found = [
        torch.autograd.grad(call(group_inputs=[scale], backend=b)[0], [hidden, weight]) for b in ("torch", "reference")
    ]
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want)
