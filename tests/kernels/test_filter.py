"""Filtering keeps its certificate: no row drops more than its tolerance, and rows that would are exact."""

import math
from functools import partial

import pytest
import torch
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st

from tspin_kernels import FilterReport, _filter, linear_sequence_loss, linear_tspin_loss
from tspin_kernels._head import rows_module

from .test_memory import product_flops

D, V = 16, 1024
UPSTREAM = -1.7


def make_logits(kinds, seed=0):
    """Logits [N, V] of rows that are peaked (nearly all on two columns), flat, or peaked over a flat tail of a tenth."""
    g = torch.Generator().manual_seed(seed)
    rows = []
    for kind in kinds:
        z = torch.randn(V, generator=g, dtype=torch.float64)
        top = torch.randint(32, (2,), generator=g)
        if kind == "peaked":
            z[top] += 16
        elif kind == "tail":
            z = 0.1 * z
            z[top[0]] = math.log(9 * V)
        rows.append(z)
    return torch.stack(rows)


def make_call(kinds, seed=0, dtype=torch.float64):
    """Arguments of the op: one token per sequence, one sequence per group, targets drawn from the rows' softmax."""
    z = make_logits(kinds, seed)
    N = len(kinds)
    # The product is the logits: hidden is a one-hot of the row, weight the logits' transpose.
    hidden, weight = torch.eye(N, dtype=torch.float64), z.T.contiguous()
    targets = torch.multinomial(z.softmax(1), 1, generator=torch.Generator().manual_seed(seed)).squeeze(1)
    return hidden.to(dtype), weight.to(dtype), targets, torch.arange(N)


def evaluate(call, g, h, *, bias=None, device="cpu", **options):
    """Loss, statistics and gradients for coefficients g, h [N] of each row's log-prob and entropy."""
    hidden, weight, targets, ids = (t.to(device) for t in call)
    leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    leaves += [] if bias is None else [bias.to(device).clone().requires_grad_()]

    def loss_fn(s, g, h):
        return g * s.logprobs[:, 0] + (0 if h is None else h * s.entropy[:, 0])

    inputs = [
        None if t is None else t.to(device, leaves[0].dtype if leaves[0].dtype.itemsize > 2 else torch.float32)
        for t in (g, h)
    ]
    loss, stats = linear_sequence_loss(
        leaves[0],
        leaves[1],
        targets,
        ids,
        (lambda s, g: loss_fn(s, g, None)) if h is None else loss_fn,
        *leaves[2:],
        group_size=1,
        group_inputs=[t for t in inputs if t is not None],
        normalizer=1.0,
        entropy="value" if h is None else "grad",
        **options,
    )
    (loss * UPSTREAM).backward()
    named = {"loss": loss, "logprobs": stats.logprobs, "dhidden": leaves[0].grad, "dweight": leaves[1].grad}
    named |= {} if bias is None else {"dbias": leaves[2].grad}
    return {name: t.detach().double().cpu() for name, t in named.items()}


def assert_within_bound(got, exact, call, size, tolerance, scale=1.0, rounding=1e-12):
    """The two bounds of the documentation, for rows of |g| + |h| = size."""
    e = tolerance * size.double() * abs(UPSTREAM) * scale
    hidden, weight = call[0].double(), call[1].double()
    row_error = (got["dhidden"] - exact["dhidden"]).norm(dim=1)
    slack = rounding * exact["dhidden"].norm(dim=1).max()
    assert (row_error <= e * weight.norm(dim=1).max() + slack).all(), (row_error, e)
    weight_error = (got["dweight"] - exact["dweight"]).norm()
    assert weight_error <= (e * hidden.norm(dim=1)).sum() + rounding * exact["dweight"].norm()


@settings(max_examples=60, derandomize=True, deadline=None)
@given(
    kinds=st.lists(st.sampled_from(["peaked", "peaked", "flat", "tail"]), min_size=1, max_size=40),
    seed=st.integers(0, 2**31),
    tolerance=st.sampled_from([0.0, 1e-3, 0.03, 0.06, 0.2, 0.35, 1.0]),
    with_entropy=st.booleans(),
    transform=st.sampled_from(
        [
            {},
            {"temperature": 0.7},
            {"logit_scale": -0.5},
            {"logit_scale": 0.1, "temperature": 0.1},
            {"softcap": 20.0, "temperature": 1.5},
        ]
    ),
    cost=st.sampled_from([2, 16, 128]),
)
def test_no_error_exceeds_its_bound(kinds, seed, tolerance, with_entropy, transform, cost):
    call = make_call(kinds, seed)
    generator = torch.Generator().manual_seed(seed)
    # Coefficients of very different size: a tolerance that were shared between rows would let large ones spoil small ones.
    g, h = torch.randn(2, len(kinds), generator=generator, dtype=torch.float64) * torch.logspace(-4, 2, len(kinds))
    h = h if with_entropy else None
    bias = torch.randn(V, generator=generator, dtype=torch.float64)
    exact = evaluate(call, g, h, bias=bias, **transform)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_filter, "_ENTRY_COST", {"cpu": cost})
        got = evaluate(call, g, h, bias=bias, filter_tolerance=tolerance, **transform)
    scale = abs(transform.get("logit_scale", 1.0)) / transform.get("temperature", 1.0)
    size = g.abs() + (0 if h is None else h.abs())
    assert_within_bound(got, exact, call, size, tolerance, scale)
    # hidden is one-hot, so dweight is dlogits itself.
    dropped = (got["dweight"] - exact["dweight"]).abs().sum(0)
    rounding = 1e-9 * exact["dweight"].abs().sum(0)
    assert (dropped <= tolerance * size * abs(UPSTREAM) * scale + rounding).all()
    for name in ("loss", "logprobs"):
        assert torch.equal(got[name], exact[name]), name
    torch.testing.assert_close(got["dbias"], exact["dbias"], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("coefficient", [1.0, 1e-6])
def test_every_dtype_filters_within_its_rounding(fused, dtype, coefficient):
    kinds = ["peaked"] * 48 + ["flat"] * 2
    call = make_call(kinds, 3, dtype)
    g = torch.full((len(kinds),), coefficient)
    exact = evaluate([t.double() if t.is_floating_point() else t for t in call], g, None)
    report = FilterReport()
    got = evaluate(
        call, g, None, device=fused.device, backend=fused.backend, filter_tolerance=0.01, filter_report=report
    )
    assert report.dense_rows < 10
    rounding = 8 * torch.finfo(dtype).eps
    assert_within_bound(got, exact, call, g, 0.01, rounding=rounding)


@pytest.mark.parametrize("kind", ["flat", "tail"])
@pytest.mark.parametrize("seed", range(3))
def test_planted_flat_rows_take_the_dense_path(kind, seed):
    """Each column of theirs is small, their sum is not: the rows are exact, and the peaked ones beside them filtered."""
    kinds = ["peaked"] * 30 + [kind] * 3 + ["peaked"] * 30
    call, g = make_call(kinds, seed), torch.ones(63, dtype=torch.float64)
    report = FilterReport()
    exact = evaluate(call, g, None)
    got = evaluate(call, g, None, filter_tolerance=0.01, filter_report=report)
    assert (report.rows, report.dense_rows) == (63, 3)
    assert report.entries == 63 * V
    assert 3 / 63 < report.kept_fraction < 0.2
    torch.testing.assert_close(got["dhidden"][30:33], exact["dhidden"][30:33], rtol=1e-12, atol=1e-12)
    assert (got["dhidden"] - exact["dhidden"])[:30].norm() > 1e-9


def test_an_entropy_gradient_has_its_own_mass():
    """Columns whose probability is within the tolerance, but not their p (|ln p| + H), are kept."""
    z = torch.zeros(40, V, dtype=torch.float64)
    z[:, 0] = math.log(V / 0.003)  # 0.3 % outside of column 0, of -p ln p about 4 %
    call = [torch.eye(40, dtype=torch.float64), z.T.contiguous(), torch.zeros(40, dtype=torch.int64), torch.arange(40)]
    ones, none = torch.ones(40, dtype=torch.float64), torch.zeros(40, dtype=torch.float64)
    dense = []
    for g, h, tolerance in ((ones, none, 0.01), (none, ones, 0.01), (none, ones, 0.1)):
        report = FilterReport()
        evaluate(call, g, h, filter_tolerance=tolerance, filter_report=report)
        dense.append(report.dense_rows)
    assert dense == [0, 40, 0]


def test_targets_are_kept_whatever_the_tolerance():
    """Rows that know their targets: with a tolerance of one, all of their gradient could go."""
    z = torch.full((8, V), -40.0, dtype=torch.float64)
    targets = torch.arange(0, 512, 64)
    z[torch.arange(8), targets], z[torch.arange(8), targets + 1] = 10, 0
    call = [torch.eye(8, dtype=torch.float64), z.T.contiguous(), targets, torch.arange(8)]
    report = FilterReport()
    got = evaluate(call, torch.ones(8), None, filter_tolerance=1.0, filter_report=report)
    assert report.kept_entries == 8
    assert (got["dweight"][targets] != 0).any(1).all()


@pytest.mark.parametrize("wanted", ["both", "hidden", "weight"])
def test_flops_are_those_of_what_was_kept(wanted):
    call, report = make_call(["peaked"] * 60 + ["flat"] * 4), FilterReport()
    hidden, weight, targets, ids = call
    hidden.requires_grad_(wanted != "weight")
    weight.requires_grad_(wanted != "hidden")

    def run():
        linear_sequence_loss(
            hidden,
            weight,
            targets,
            ids,
            lambda s: s.logprobs[:, 0],
            group_size=1,
            filter_tolerance=0.01,
            filter_report=report,
        )

    flops = product_flops(run)
    width = hidden.shape[1]
    products = 2 if wanted == "both" else 1
    # What is kept of other rows is not multiplied but summed up.
    assert report.dense_rows == 4
    assert flops == 2 * 64 * V * width + 2 * products * 4 * V * width
    assert 4 * V < report.kept_entries < 4 * V + 60 * 8


@pytest.mark.parametrize("blocks", [1, 4])
def test_groups_beyond_the_budget_are_exact(blocks):
    """A budget too small for one group takes two passes, and nothing is filtered; several blocks filter each their own."""
    call, g, report = make_call(["peaked"] * 64), torch.ones(64, dtype=torch.float64), FilterReport()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_filter, "_ENTRY_COST", {"cpu": 64})
        head = 8 * V * 64
        budget = 2**20 if blocks == 4 else head
        got = evaluate(call, g, None, filter_tolerance=0.01, filter_report=report, memory_budget=budget)
    exact = evaluate(call, g, None)
    assert report.rows == 64
    if blocks == 4:
        assert report.dense_rows == 0
    assert_within_bound(got, exact, call, g, 0.01)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_row_that_is_not_finite_stays_so(bad):
    call, g = make_call(["peaked"] * 40), torch.ones(40, dtype=torch.float64)
    g[7] = bad
    got = evaluate(call, g, None, filter_tolerance=0.01)
    others = torch.arange(40) != 7
    assert not got["dhidden"][7].isfinite().any() and not got["dweight"][:, 7].isfinite().any()
    assert got["dhidden"][others].isfinite().all()


def test_zero_coefficients_are_neither_filtered_nor_counted():
    call, report = make_call(["peaked"] * 40), FilterReport()
    g = (torch.arange(40) % 2).double()
    got = evaluate(call, g, None, filter_tolerance=0.01, filter_report=report)
    assert report.rows == 20
    assert (got["dhidden"][g == 0] == 0).all()


def test_a_row_without_a_coefficient_may_be_anything():
    call, g, bias = make_call(["peaked"] * 40), torch.ones(40, dtype=torch.float64), torch.zeros(V, dtype=torch.float64)
    g[5] = 0
    call[0][5, 5] = math.nan
    got = evaluate(call, g, None, bias=bias, filter_tolerance=0.01)
    assert all(got[name].isfinite().all() for name in ("dhidden", "dweight", "dbias"))


def test_more_columns_above_the_lowest_threshold_than_are_listed(fused):
    """Entries of one thread's turns, all above it and all together below the limit: none need be kept, but all may."""
    kernels, columns = _filter.sparse_module(rows_module(fused.backend, torch.device(fused.device))), 17 * 2048
    dlogits = torch.zeros(2, columns, device=fused.device)
    dlogits[0, ::1024] = 1e-3
    dlogits[1, 3] = 1e-3
    limits, targets = dlogits.sum(1) * 1.01, torch.full((2,), -1, device=fused.device)
    _, _, lengths = kernels.keep_largest(dlogits, targets, limits, 2)
    assert lengths.tolist() == [-1 if fused.backend == "triton" else 0, 0]


def test_small_columns_count_beside_those_that_are_looked_at(fused):
    """Three of a fifth of the limit could go, were there not 3,000 that together have seven tenths of it."""
    kernels = _filter.sparse_module(rows_module(fused.backend, torch.device(fused.device)))
    dlogits, at = torch.zeros(2, 5000, device=fused.device), [4001, 4333, 4999]
    dlogits[:, at] = 0.2
    dlogits[1, :3000] = 0.7 / 3000
    limits, targets = torch.ones(2, device=fused.device), torch.full((2,), -1, device=fused.device)
    columns, _, lengths = kernels.keep_largest(dlogits, targets, limits, 3)
    assert lengths.tolist() == [0, 3] and sorted(columns[1, :3].tolist()) == at


def test_a_vocabulary_too_small_to_choose_from_is_dense(fused):
    call, report = make_call(["peaked"] * 40, dtype=torch.float32), FilterReport()
    call = [call[0], call[1][:15], call[2] % 15, call[3]]
    g, options = torch.ones(40), {"device": fused.device, "backend": fused.backend}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_filter, "_ENTRY_COST", {fused.device: 16})
        got = evaluate(call, g, None, **options, filter_tolerance=0.5, filter_report=report)
    assert report.kept_fraction == 1.0
    torch.testing.assert_close(got["dweight"], evaluate(call, g, None, **options)["dweight"])


@settings(
    max_examples=25,
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    phases=[Phase.explicit, Phase.generate],  # under the interpreter, to shrink takes minutes
)
@given(
    columns=st.sampled_from([1, 300, 2500]),
    most=st.sampled_from([0, 7, 400]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    tolerance=st.sampled_from([0.0, 0.01, 0.3, 2.0, math.nan]),
    peak=st.sampled_from([0.0, 6.0, 40.0]),
    bad=st.none() | st.sampled_from([math.nan, math.inf]),
    seed=st.integers(0, 2**31),
)
@example(columns=2500, most=400, dtype=torch.float32, tolerance=0.01, peak=40.0, bad=None, seed=1)  # from several tiles
@example(
    columns=300, most=400, dtype=torch.float32, tolerance=0.3, peak=6.0, bad=math.nan, seed=2
)  # a nan among what is kept
def test_what_a_row_keeps(fused, columns, most, dtype, tolerance, peak, bad, seed):
    """Everything but small elements that together stay within the limit; the target; and all that is not finite."""
    draw = torch.Generator().manual_seed(seed)
    buffer = torch.randn(9, columns + 3, generator=draw)[:, :columns].mul(peak / 4).exp().mul(1e-3)
    buffer *= torch.randn(9, columns, generator=draw).sign()
    buffer = torch.cat([buffer, buffer[:, :3]], 1).to(dtype)[:, :columns]
    if bad is not None:
        buffer[4, columns // 2] = bad
    targets = torch.randint(-2, columns + 2, (9,), generator=draw)
    limits = tolerance * buffer.float().abs().nan_to_num(0, posinf=0).sum(1)
    kernels = _filter.sparse_module(rows_module(fused.backend, torch.device(fused.device)))
    found = kernels.keep_largest(*(t.to(fused.device) for t in (buffer, targets, limits)), most)
    places, values, lengths = (t.cpu() for t in found)
    assert places.dtype == lengths.dtype == torch.int32 and values.dtype == torch.float32
    for row, (limit, target, length) in enumerate(zip(limits.tolist(), targets.tolist(), lengths.tolist())):
        share = buffer[row].double().abs()
        if length < 0:
            # No threshold would do: either they leave out too much or they keep too many.
            for k in range(43):
                is_left = share <= limit * 2 ** (-k / 4)
                is_too_much = share[is_left].sum() > 0.999 * limit or (~is_left).sum() >= most
                assert is_too_much or not limit >= 0 or not share.isfinite().all(), (row, k)
            continue
        assert length <= most
        kept = places[row, :length].long()
        assert len(kept.unique()) == length
        torch.testing.assert_close(values[row, :length], buffer[row, kept].float(), rtol=0, atol=0, equal_nan=True)
        is_left = torch.ones(columns, dtype=torch.bool)
        is_left[kept] = False
        assert share[is_left].isfinite().all() and (not share[is_left].any() or share[is_left].sum() <= 1.00001 * limit)
        assert not 0 <= target < columns or not is_left[target]
        above = kept[kept != target]
        assert not is_left.any() or not len(above) or not share[above].min() < share[is_left].max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [1, 40, 1500])
@pytest.mark.parametrize("fresh", [True, False])
@pytest.mark.parametrize("factor", [None, 0.25])
def test_segments_are_summed(fused, dtype, width, fresh, factor):
    """Empty ones, one of an entry and one of many, rows of the operand in any order and repeated."""
    draw = torch.Generator().manual_seed(width)
    lengths = torch.tensor([0, 1, 0, 0, 37, 4, 3, 0])
    starts, E = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)), int(lengths.sum())
    index = torch.randint(11, (E,), generator=draw, dtype=torch.int32)
    values, operand = torch.randn(E, generator=draw), torch.randn(11, width, generator=draw).to(dtype)
    before = torch.randn(8, width, generator=draw)
    want = torch.zeros(8, width, dtype=torch.float64)
    want.index_add_(
        0, torch.arange(8).repeat_interleave(lengths), values.double()[:, None] * operand[index.long()].double()
    )
    want = want * (factor or 1) + (0 if fresh else before.double())
    out, starts, index, values, operand = (
        t.to(fused.device) for t in (before.fill_(math.nan) if fresh else before, starts, index, values, operand)
    )
    kernels = _filter.sparse_module(rows_module(fused.backend, torch.device(fused.device)))
    scale = None if factor is None else torch.tensor(factor, device=fused.device)
    kernels.segment_sums(out, starts, index, values, operand, scale, fresh)
    torch.testing.assert_close(out.cpu().double(), want, rtol=1e-5, atol=1e-5)


def test_no_entry_at_all(fused):
    out = torch.full((3, 4), 2.0, device=fused.device)
    kernels = _filter.sparse_module(rows_module(fused.backend, torch.device(fused.device)))
    starts, nothing = torch.zeros(4, dtype=torch.int64, device=fused.device), torch.empty(0, device=fused.device)
    kernels.segment_sums(out, starts, nothing.long(), nothing, torch.ones(5, 4, device=fused.device), None, False)
    assert (out == 2).all()
    kernels.segment_sums(out, starts, nothing.long(), nothing, torch.ones(5, 4, device=fused.device), None, True)
    assert (out == 0).all()


def test_linear_tspin_loss_passes_the_tolerance_on():
    hidden, weight, targets, ids = make_call(["peaked"] * 48)
    report = FilterReport()
    linear_tspin_loss(
        hidden.requires_grad_(), weight, targets, ids, filter_tolerance=0.01, filter_report=report, beta=0.5
    )
    assert report.rows == 48
    assert report.kept_fraction < 0.5


@pytest.mark.parametrize("tolerance", [-0.1, 1.5, math.nan])
def test_a_tolerance_that_is_no_share_raises(tolerance):
    call = partial(evaluate, make_call(["peaked"]), torch.ones(1), None)
    with pytest.raises(ValueError, match="filter_tolerance: want a number from 0 to 1"):
        call(filter_tolerance=tolerance)


def test_a_report_without_a_tolerance_raises():
    with pytest.raises(ValueError, match="filter_report: want a filter_tolerance"):
        evaluate(make_call(["peaked"]), torch.ones(1), None, filter_report=FilterReport())


def test_the_reference_does_not_filter():
    with pytest.raises(ValueError, match="filter_tolerance: want None with backend='reference'"):
        evaluate(make_call(["peaked"]), torch.ones(1), None, filter_tolerance=0.1, backend="reference")


def test_operands_of_any_strides(fused):
    call = make_call(["peaked"] * 5 + ["flat"], dtype=torch.float32)
    hidden, weight, *rest = (t.to(fused.device) for t in call)
    everyother = torch.stack([hidden, -hidden], -1).flatten(-2)[:, ::2]
    assert everyother.stride(1) == 2

    def gradients(hidden, weight):
        leaves = [t.detach().requires_grad_() for t in (hidden, weight)]
        options = {"group_size": 1, "backend": fused.backend, "filter_tolerance": 1e-3}
        linear_sequence_loss(*leaves, *rest, lambda s: s.logprobs[:, 0], **options)[0].backward()
        return [leaf.grad for leaf in leaves]

    want = gradients(hidden, weight)
    for strided in ((hidden.T.contiguous().T, weight), (everyother, weight), (hidden, weight.T.contiguous().T)):
        for a, b in zip(gradients(*strided), want, strict=True):
            torch.testing.assert_close(a, b)
