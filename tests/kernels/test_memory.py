"""Floors: matrix-product flops of every plan, no [N, V] tensor under a small budget, bytes in flight.

Counted by the profiler: registered ops hide their inner products from FlopCounterMode and every other dispatch mode.
"""

import itertools
from functools import partial

import pytest
import torch
from torch.profiler import ProfilerActivity, profile, record_function

from tspin_kernels import (
    _blocks,
    _groups,
    _head,
    _inputs,
    _rows_torch,
    _sequences,
    linear_logprobs,
    linear_sequence_loss,
)
from tspin_kernels._inputs import HostCopy
from tspin_kernels._plan import Sizes, plan_blocks

from .oracle import least_budget, make_case
from .preferences import tspin

N, V, D = 12, 150, 8
# Where the product's operands stand among the inputs, by name of the op.
PRODUCTS = {"aten::mm": 0, "aten::bmm": 0, "aten::addmm": 1, "aten::addmm_": 1, "aten::baddbmm": 1, "aten::baddbmm_": 1}


def profiled(call):
    """The operators that `call` runs, backward threads and the insides of registered ops included."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True, profile_memory=True) as recorded:
        call()
    return recorded


def product_flops(call) -> int:
    flops = 0
    for event in profiled(call).events():
        if event.name in PRODUCTS:
            a, b = event.input_shapes[PRODUCTS[event.name] :][:2]
            flops += 2 * torch.Size(a).numel() * b[-1]
        assert event.name not in ("aten::mv", "aten::addmv", "aten::addmv_", "aten::dot"), (
            "a product that this test does not count"
        )
    return flops


def tokens(implementation, hidden, weight, case, **options):
    outputs = linear_logprobs(hidden, weight, case.targets, case.bias, backend=implementation.backend, **options)
    return sum((o * u).sum() for o, u in zip(outputs, case.upstream, strict=True))


def groups(implementation, hidden, weight, case, **options):
    ids = torch.arange(len(case.targets), device=hidden.device) * 6 // len(case.targets)
    options = {"entropy": "grad", "group_size": 3, "backend": implementation.backend, **options}
    return linear_sequence_loss(hidden, weight, case.targets, ids, tspin, case.bias, **options)[0]


@pytest.fixture(params=[tokens, groups], ids=["linear_logprobs", "linear_sequence_loss"])
def op(request):
    return request.param


@pytest.fixture
def case(fused):
    return make_case(N, V, D, seed=1).to(fused.device)


def leaves(case, *wanted):
    return [t.clone().requires_grad_(name in wanted) for name, t in (("hidden", case.hidden), ("weight", case.weight))]


@pytest.mark.parametrize("wanted, passes", [(("hidden", "weight"), 6), (("hidden",), 4), (("weight",), 4)], ids=str)
def test_flops_where_the_logits_fit(fused, case, op, wanted, passes):
    """6NVD, or 4NVD with a frozen head, whose gradient is never formed."""
    hidden, weight = leaves(case, *wanted)
    assert product_flops(lambda: op(fused, hidden, weight, case).backward()) == passes * N * V * D
    assert (hidden.grad is None) == ("hidden" not in wanted) and (weight.grad is None) == ("weight" not in wanted)


@pytest.mark.parametrize("wanted, passes", [(("hidden", "weight"), 8), (("hidden",), 6), (("weight",), 6)], ids=str)
def test_flops_where_they_do_not_fit(fused, case, op, wanted, passes):
    """8NVD: also for a group larger than the budget."""
    hidden, weight = leaves(case, *wanted)
    call = partial(op, fused, hidden, weight, case)
    least = least_budget(lambda budget: call(memory_budget=budget).backward())
    assert product_flops(lambda: call(memory_budget=least).backward()) == passes * N * V * D


def test_flops_of_one_group_per_block(fused, case):
    """Groups that fit one by one still cost a single projection."""
    hidden, weight = leaves(case, "hidden", "weight")
    call = partial(groups, fused, hidden, weight, case)
    one_group = 4 * (N // 2) * (V + 2 * D)  # with the rows' gradient
    assert one_group < 4 * N * V
    assert product_flops(lambda: call(memory_budget=one_group).backward()) == 6 * N * V * D


@pytest.mark.parametrize("budget", [None, "least"])
@pytest.mark.parametrize("mode", ["no_grad", "inference", "nothing_requires_grad"])
def test_flops_without_gradient(fused, case, op, mode, budget):
    """Nothing but the projection: 2NVD, though the inputs require grad."""
    hidden, weight = leaves(case, *(() if mode == "nothing_requires_grad" else ("hidden", "weight")))
    context = {"no_grad": torch.no_grad, "inference": torch.inference_mode, "nothing_requires_grad": torch.enable_grad}[
        mode
    ]
    with context():
        call = partial(op, fused, hidden, weight, case)
        options = {} if budget is None else {"memory_budget": least_budget(lambda budget: call(memory_budget=budget))}
        assert product_flops(lambda: call(**options)) == 2 * N * V * D


WAITS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::bincount", "aten::_unique2")


def order_of_waits(monkeypatch, call) -> list[str]:
    """Products, what the host of a GPU would have to wait for, and what it reads of copies, in the order in which they come."""

    def named(name, function):
        def wrapper(*args):
            with record_function(name):
                return function(*args)

        return wrapper

    with monkeypatch.context() as patch:
        # As on a GPU: nothing is looked at early, and nobody asks for the upstream scalar.
        for module in (_inputs, _groups, _sequences):
            patch.setattr(module, "answers_at_once", lambda device: False)
        patch.setattr(_rows_torch, "scale_", torch.Tensor.mul_)
        patch.setattr(HostCopy, "read", named("read", lambda copy: copy._values.numpy().tolist()))
        patch.setattr(torch.Tensor, "tolist", named("wait", torch.Tensor.tolist))
        events = sorted(profiled(call).events(), key=lambda event: event.time_range.start)
    names = {**dict.fromkeys(PRODUCTS, "product"), **dict.fromkeys(WAITS, "wait"), "wait": "wait", "read": "read"}
    return [names[event.name] for event in events if event.name in names]


@pytest.mark.parametrize("ignore_index", [None, -100])
def test_a_gpu_is_not_waited_for_before_its_work_is_queued(monkeypatch, case, fused, op, ignore_index):
    """But for the number of rows that count, in each pass, where some may not. The host asks which rows have a gradient when the
    projection and dlogits are queued, and whether ids are in range when all is."""
    if fused.device != "cpu":
        pytest.skip("read off the order of operators, which is that of the CPU")
    hidden, weight = leaves(case, "hidden", "weight")
    options = {"ignore_index": ignore_index} | ({"num_groups": 2} if op is groups else {})
    seen = order_of_waits(monkeypatch, lambda: op(fused, hidden, weight, case, **options).backward())
    counts = [] if ignore_index is None else ["wait"]
    if op is groups:
        assert seen == [*counts, "product", "read", "product", "product", "read"]
    else:
        assert seen == [*counts, "product", *counts, "product", "product"]


def test_ids_out_of_range_are_named_when_the_work_is_queued(monkeypatch, case, fused):
    """And nothing is read or written where they point."""
    hidden, weight = leaves(case, "hidden", "weight")
    for module in (_inputs, _groups, _sequences):
        monkeypatch.setattr(module, "answers_at_once", lambda device: False)
    ids = torch.arange(N, device=fused.device) * 6 // N
    options = {"group_size": 3, "num_groups": 2, "backend": fused.backend}
    for wrong in (-1, 6, 2**40):
        bad = ids.clone()
        bad[3] = wrong
        with pytest.raises(ValueError, match=rf"sequence_ids: want ids .* got {wrong}"):
            linear_sequence_loss(hidden, weight, case.targets, bad, tspin, **options)
        rows = torch.arange(N, device=fused.device)
        rows[3] = wrong * 2
        with pytest.raises(ValueError, match=rf"rows: want indices in \[0, {N}\), got .*{wrong * 2}"):
            linear_sequence_loss(hidden, weight, case.targets, ids, tspin, rows=rows, **options)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradient_less_budget_does(fused, op, mode):
    """The float32 sums of a bfloat16 gradient that nobody will ask for are not counted."""
    case = make_case(N, V, D, seed=1, dtype=torch.bfloat16).to(fused.device)
    hidden, weight = leaves(case, "hidden", "weight")
    call = partial(op, fused, hidden, weight, case)
    with_gradient = least_budget(lambda budget: call(memory_budget=budget).backward())
    with mode():
        assert least_budget(lambda budget: call(memory_budget=budget)) < with_gradient


def test_ignored_rows_cost_nothing(fused, case, op):
    case.targets[::3] = -100
    hidden, weight = leaves(case, "hidden", "weight")
    assert product_flops(lambda: op(fused, hidden, weight, case).backward()) == 6 * (N - N // 3) * V * D


def test_an_entropy_that_is_only_read_costs_no_product(fused, case, op):
    hidden, weight = leaves(case, "hidden")
    for entropy in ("value", "grad", False):
        outputs = linear_logprobs(hidden, weight, case.targets, backend=fused.backend, entropy=entropy)
        assert product_flops(lambda outputs=outputs: outputs.logprobs.sum().backward()) == 2 * N * V * D


def test_no_tensor_of_all_logits(fused, op):
    """Under a small budget no operator sees as many as half of the [N, V] logits."""
    if fused.interpreted:
        pytest.skip("100 blocks are slow under Triton's interpreter; the plan is shared with the torch backend")
    case = make_case(64, 400, 4, seed=2).to(fused.device)
    hidden, weight = leaves(case, "hidden", "weight")
    call = partial(op, fused, hidden, weight, case)

    def largest(**options):
        events = profiled(lambda: call(**options).backward()).events()
        return max(
            torch.Size(shape).numel()
            for event in events
            for shape in event.input_shapes or []
            if isinstance(shape, list)
        )

    assert largest(memory_budget=least_budget(lambda budget: call(memory_budget=budget))) < 64 * 400 // 2
    assert largest() >= 64 * 400, "the default budget keeps them, so this test can fail"


def peak_bytes(call, device: str) -> int:
    """Largest growth of allocated bytes during `call`."""
    if device != "cpu":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    events = [e for e in profiled(call).profiler.kineto_results.events() if e.name() == "[memory]"]
    current = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        current += event.nbytes()
        peak = max(peak, current)
    return peak


def bytes_of_tiles(fused, block: int) -> int:
    """What the row kernels may take beside the budget, for a block of so many logits: PyTorch's float32 copies of a tile."""
    tile = min(block, _rows_torch._TILE_ELSEWHERE) if str(fused) == "torch-cuda" else 2**18
    return 2**20 + 20 * tile


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows, columns", [(1024, 8192), (8192, 1024)])
def test_bytes_in_flight(fused, op, rows, columns, dtype):
    """Gradients, budget, per-token vectors and the row kernels' tiles, beside 32 MiB of float32 logits."""
    if fused.interpreted:
        pytest.skip("1024 rows are slow under Triton's interpreter; the plan is shared with the torch backend")
    case = make_case(rows, columns, 8, seed=3, dtype=dtype, bias=False).to(fused.device)
    hidden, weight = leaves(case, "hidden", "weight")
    budget = 2 * 2**20
    peak = peak_bytes(lambda: op(fused, hidden, weight, case, memory_budget=budget).backward(), fused.device)
    gradients = (rows + columns) * 8 * dtype.itemsize
    tiles = bytes_of_tiles(fused, budget // dtype.itemsize)
    assert peak < 2 * gradients + budget + 100 * rows + tiles, f"{peak / 2**20:.1f} MiB"
    assert peak > gradients, "the profiler saw no allocations"


@pytest.mark.parametrize("ignored", [0, 1])
@pytest.mark.parametrize("wanted", [("hidden", "weight"), ("hidden",), ("weight",)], ids="-".join)
@pytest.mark.parametrize("plan", ["store", "almost", "blocks"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bytes_of_hidden_rows(monkeypatch, fused, op, dtype, plan, wanted, ignored):
    """As wide as the vocabulary: what is gathered of them, and what of their gradient is not yet in its place, is in the budget.

    Almost: the logits would fit, but not with a copy of the rows.
    """
    if fused.interpreted:
        pytest.skip("1024 rows are slow under Triton's interpreter; the plan is shared with the torch backend")
    monkeypatch.setitem(_rows_torch._TILE, "cpu", 2**14)  # so that a copy is more than the row kernels take
    size = 1024
    case = make_case(size, size, size, seed=3, dtype=dtype, bias=False).to(fused.device)
    case.targets[:ignored] = -100
    hidden, weight = leaves(case, *wanted)
    copy = size * size * dtype.itemsize
    budget = {"store": 64 * 2**20, "almost": copy + copy // 4, "blocks": 3 * copy // 4}[plan]
    if dtype == torch.bfloat16:
        budget *= 4  # a CPU widens operands and sums in float32
    peak = peak_bytes(lambda: op(fused, hidden, weight, case, memory_budget=budget).backward(), fused.device)
    gradients = copy * len(wanted)
    tiles = 2**20 + 20 * 2**14 if fused.device == "cpu" else bytes_of_tiles(fused, budget // dtype.itemsize)
    assert gradients < peak < gradients + budget + 200 * size + tiles, f"{peak / 2**20:.1f} MiB"


def test_the_logits_of_some_groups_are_gone_before_the_next(monkeypatch, fused):
    """Ranges of whole groups whose logits become their own gradient: the budget holds those of one range."""
    if fused.interpreted:
        pytest.skip("1024 rows are slow under Triton's interpreter; the ranges are shared with the torch backend")
    monkeypatch.setitem(_rows_torch._TILE, "cpu", 2**14)
    rows, columns, groups, budget = 1024, 2048, 16, 2 * 2**20  # 8 MiB of logits
    case = make_case(rows, columns, 8, seed=3, bias=False).to(fused.device)
    hidden, weight = leaves(case, "hidden", "weight")
    ids = torch.arange(rows, device=fused.device) * 3 * groups // rows
    call = partial(linear_sequence_loss, hidden, weight, case.targets, ids, tspin, group_size=3, backend=fused.backend)
    assert product_flops(lambda: call(memory_budget=budget)[0].backward()) == 6 * rows * columns * 8, "one pass"
    peak = peak_bytes(lambda: call(memory_budget=budget)[0].backward(), fused.device)
    tiles = 2**20 // 2 if fused.device == "cpu" else bytes_of_tiles(fused, budget // 4)
    assert budget // 2 < peak < budget + 2 * 4 * 8 * (rows + columns) + 200 * rows + tiles, f"{peak / 2**20:.2f} MiB"


@pytest.mark.parametrize("N, columns, width", [(100, 128, 4096), (5000, 64, 900), (17, 5001, 8), (1, 1, 1)])
@pytest.mark.parametrize("dhidden", [None, "direct", "wide", "narrow"])
@pytest.mark.parametrize("scattered", [0, 2, 4])
def test_no_budget_below_the_one_that_is_named_would_do(N, columns, width, dhidden, scattered):
    for dweight, always_sum in itertools.product((None, "direct", "wide", "narrow"), (False, True)):
        sizes = Sizes(N, columns, width, 2, dhidden, dweight, always_sum, scattered=scattered)
        with pytest.raises(ValueError, match="at least") as error:
            plan_blocks(sizes, 0)
        least = int(str(error.value).split("at least ")[1].split()[0])
        blocks = plan_blocks(sizes, least)
        assert sizes.total(blocks.rows, blocks.cols) <= least <= sizes.total(max(1, N), columns)
        for less in (1, 64, 1000):
            with pytest.raises(ValueError, match="at least"):
                plan_blocks(sizes, least - less)


@pytest.mark.parametrize("logits_dtype", [None, torch.float32], ids=str)
def test_bytes_of_wide_logits(fused, op, logits_dtype):
    """A budget of many tiles, of which the narrow gradient beside float32 logits is a fifth or more, and CPUs widen all logits."""
    if fused.interpreted:
        pytest.skip("1024 rows are slow under Triton's interpreter; the plan is shared with the torch backend")
    case = make_case(1024, 8192, 8, seed=3, dtype=torch.bfloat16, bias=False).to(fused.device)
    hidden, weight = leaves(case, "hidden", "weight")
    budget = 40 * 2**20
    options = {"memory_budget": budget, "logits_dtype": logits_dtype}
    peak = peak_bytes(lambda: op(fused, hidden, weight, case, **options).backward(), fused.device)
    is_wide = logits_dtype is not None or fused.device == "cpu"
    assert peak > (budget // 2 if is_wide else 1024 * 8192 * 2), f"{peak / 2**20:.1f} MiB"
    assert peak < budget + bytes_of_tiles(fused, 1024 * 8192), f"{peak / 2**20:.1f} MiB"


def test_products_start_and_end_where_a_gpu_loads_whole_vectors(monkeypatch):
    """Logits of an odd vocabulary are products of whole 16 bytes; slices on their way to a wider sum begin at multiples of 256."""
    product, widths = _head.product, []

    def recorded(a, b, dtype, out=None):
        widths.append((a.shape[0], b.shape[1]))
        return product(a, b, dtype, out)

    for module in (_head, _blocks):
        monkeypatch.setattr(module, "product", recorded)
    hidden, weight = torch.randn(5, 8).bfloat16(), torch.randn(131, 8).bfloat16()
    linear_logprobs(hidden, weight, torch.arange(5))
    assert widths == [(5, 136)]
    widths.clear()
    monkeypatch.setattr(_blocks, "PRODUCT_BYTES", 4 * 8 * 1000)
    out = torch.empty(1500, 8)
    a = torch.randn(1500, 5).bfloat16()
    _blocks.add_product(out, a, hidden, True, None)
    assert [rows for rows, _ in widths] == [768, 732]
    torch.testing.assert_close(out, a.float() @ hidden.float())
