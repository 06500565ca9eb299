"""What `linear_sequence_loss` does with its rows: blocks of whole groups, each projected, scored and turned into gradients.

The products and row work are the engine's (`_blocks.py`); nothing here knows of autograd's graph but the little one of the loss.
"""

from collections.abc import Callable, Sequence
from functools import partial, reduce
from typing import NamedTuple

import torch
from torch import Tensor

from tspin_kernels._blocks import (
    PRODUCT_BYTES,
    Gradients,
    Scattered,
    Upstream,
    compute_gradients,
    compute_stats,
    form_gradient,
    multiply_out,
    to_front,
)
from tspin_kernels._filter import FilterReport, compute_filtered_gradients, filter_bytes
from tspin_kernels._head import Head
from tspin_kernels._inputs import HostCopy, accumulate_dtype, answers_at_once
from tspin_kernels._plan import Blocks, Sizes, plan_blocks
from tspin_kernels._sequences import LossFn, SequenceStats, group_losses, run_lengths, sum_sequences


def _coefficients(
    loss_fn: LossFn, stats: SequenceStats, group_inputs: Sequence[Tensor], entropy_grad: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    # Losses [g] and their derivatives in the log-probs and entropies [g, group_size], by autograd through the user's function.
    with torch.enable_grad():
        logprobs = stats.logprobs.detach().requires_grad_()
        entropy = stats.entropy
        if entropy is not None:
            entropy = entropy.detach().requires_grad_(entropy_grad)
        losses = group_losses(loss_fn, SequenceStats(logprobs, entropy, stats.lengths), group_inputs)
        leaves = [logprobs] + ([entropy] if entropy is not None and entropy_grad else [])
        _refuse_captured(losses, leaves)
        if not losses.requires_grad:
            return losses, torch.zeros_like(logprobs), None
        grads = torch.autograd.grad(losses.sum(), leaves, allow_unused=True)
    dlogprobs = torch.zeros_like(logprobs) if grads[0] is None else grads[0]
    return losses.detach(), dlogprobs, grads[1] if len(grads) > 1 else None


def _refuse_captured(losses: Tensor, leaves: list[Tensor]) -> None:
    # Every leaf of the loss' little graph must be ours: one captured by the closure would get no gradient.
    nodes, seen = [losses.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        if variable is not None and not any(variable is leaf for leaf in leaves):
            raise ValueError(
                f"loss_fn: want a function of its arguments and constants, got one that captures a tensor {list(variable.shape)} "
                "that requires grad; detach it, or add its term to the loss outside"
            )
        nodes.extend(next_node for next_node, _ in node.next_functions)


class Rows(NamedTuple):
    """The rows that count, ordered by sequence."""

    index: Tensor  # [N] into hidden
    may_repeat: bool  # whether several of them may be one row of hidden
    targets: Tensor  # [N]
    ids: Tensor  # [N] sequence of each row, an integer of any width
    lengths: Tensor  # [G, group_size]

    @property
    def groups(self) -> int:
        return self.lengths.shape[0]

    def per_group(self) -> list[int]:
        """Rows of each group; a GPU is waited for."""
        return self.lengths.sum(1).tolist()


class Call(NamedTuple):
    """The constants of one call."""

    loss_fn: LossFn
    group_inputs: Sequence[Tensor]
    normalizer: float | Tensor
    entropy: str | bool
    budget: int
    with_grad: bool  # whether autograd is on where the op was called
    filter_tolerance: float | None = None
    filter_report: FilterReport | None = None


def check_rows(rows: Tensor | None, H: int) -> Callable[[], None]:
    # What raises where indices are not of H hidden rows: at once where that costs nothing, else whenever it is called.
    ends = None if rows is None or rows.numel() == 0 else HostCopy(torch.stack(rows.aminmax()))

    def verify() -> None:
        smallest, largest = ends.read() if ends else (0, -1)
        if smallest < 0 or largest >= H:
            raise ValueError(f"rows: want indices in [0, {H}), got {smallest} to {largest}")

    if rows is not None and answers_at_once(rows.device):
        verify()
    return verify


def select_rows(
    targets: Tensor,
    ids: Tensor,
    rows: Tensor | None,
    ignore_index: int | None,
    num_groups: int,
    group_size: int,
    H: int,
) -> Rows:
    if not answers_at_once(ids.device):
        # Whoever is out of range is told so later, and reads no memory that is not there.
        ids = ids.clamp(0, max(0, num_groups * group_size - 1))
        rows = None if rows is None else rows.clamp(0, max(0, H - 1))
    # A GPU sorts two bytes in two passes, eight in eight.
    ids, order = torch.sort(ids.to(torch.int16 if num_groups * group_size < 2**15 else torch.int64), stable=True)
    if ignore_index is not None:
        counts = (targets[order] != ignore_index).nonzero().squeeze(1)
        ids, order = ids[counts], order[counts]
    lengths = run_lengths(ids, num_groups * group_size).view(num_groups, group_size)
    index = order if rows is None else rows[order]
    return Rows(index, rows is not None, targets[order], ids, lengths)


class _HiddenGradient:
    """The gradient in all hidden rows; where several targets share a row, their parts are summed in float32."""

    def __init__(self, hidden: Tensor, rows: Rows, dtype: torch.dtype):
        self.total = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device)
        self.may_repeat = rows.may_repeat
        self.slots: Tensor | None = None
        if rows.may_repeat and dtype in (torch.float16, torch.bfloat16):
            unique, inverse, counts = torch.unique(rows.index, return_inverse=True, return_counts=True)
            is_shared = counts > 1
            self.shared_rows = unique[is_shared]
            self.shared = hidden.new_zeros(len(self.shared_rows), hidden.shape[1], dtype=torch.float32)
            # Of each selected row, its place among the shared ones, or -1.
            self.slots = torch.where(is_shared, is_shared.cumsum(0) - 1, -1)[inverse]

    def add(self, selected: Tensor, index: Tensor, start: int, stop: int, part: Tensor) -> None:
        """Add the gradients `part` of the rows `selected[start:stop]` that count, the hidden rows `index[start:stop]`."""
        selected, index = selected[start:stop], index[start:stop]
        if self.may_repeat and self.slots is None:
            self.total.index_put_((index,), part, accumulate=True)
            return
        self.total.index_copy_(0, index, part.to(self.total.dtype))
        if self.slots is not None:
            # What was written into shared rows is overwritten in the end.
            slots = self.slots[selected]
            several = (slots >= 0).nonzero().squeeze(1)
            self.shared.index_put_((slots[several],), part[several].float(), accumulate=True)

    def result(self) -> Tensor:
        if self.slots is not None:
            self.total.index_copy_(0, self.shared_rows, self.shared.to(self.total.dtype))
        return self.total


def _live_rows(upstream: Upstream) -> Tensor:
    # Which rows [N] may have a gradient: all but those of upstream gradients that are exactly zero. A nan is not zero.
    return reduce(torch.logical_or, [gradient != 0 for gradient in upstream if gradient is not None])


class Range(NamedTuple):
    """Consecutive groups, and their rows."""

    start: int
    stop: int
    rows: slice


def _pack(per_group: list[int], max_rows: int) -> list[Range] | None:
    # Ranges of groups of at most `max_rows` rows, None where one group alone has more.
    ranges, start, first, last = [], 0, 0, 0
    for group, rows in enumerate(per_group):
        if rows > max_rows:
            return None
        if last + rows - first > max_rows:
            ranges.append(Range(start, group, slice(first, last)))
            start, first = group, last
        last += rows
    ranges.append(Range(start, len(per_group), slice(first, last)))
    return ranges


class GroupPlan(NamedTuple):
    """Which groups are taken together, and the dtypes of their gradients."""

    ranges: list[Range]
    one_pass: bool  # the logits of a range become their own gradient; else its products are made twice
    wanted: list[bool]  # gradients of hidden rows, weight and bias
    dtypes: tuple[torch.dtype | None, torch.dtype | None]  # of those of hidden rows and weight; None where not wanted
    dweight: torch.dtype  # of the weight's while ranges are summed
    budget: int

    def sizes(self, head: Head, hidden: Tensor, n: int) -> Sizes:
        """Those of a range of n rows."""
        return head.sizes(n, hidden, *self.dtypes, gathered=True, scattered=True)

    def blocks(self, head: Head, hidden: Tensor, n: int) -> Blocks:
        """Those of a range of n rows."""
        return Blocks(max(1, n), head.V) if self.one_pass else plan_blocks(self.sizes(head, hidden, n), self.budget)


def plan_groups(
    head: Head, hidden: Tensor, rows: Rows, wanted: list[bool], budget: int, filtered: bool = False
) -> GroupPlan:
    """The plan of a call; `hidden` is asked for its dtype and device alone."""
    wide, is_half = accumulate_dtype(head.compute_dtype), head.compute_dtype == torch.float16
    # A float16 gradient waits in float32 for its scale; what ranks sum is not rounded before.
    dhidden = wide if is_half or head.shard is not None else hidden.dtype
    dtypes = dhidden if wanted[0] else None, head.weight.dtype if wanted[1] else None
    ranges = _fitting_ranges(head, hidden, rows, dtypes, budget, filtered) if any(wanted) else None
    is_summed = ranges is not None and len(ranges) > 1
    dweight = wide if is_half or is_summed else head.weight.dtype
    whole = [Range(0, rows.groups, slice(0, rows.index.shape[0]))]
    return GroupPlan(ranges or whole, ranges is not None, wanted, dtypes, dweight, budget)


def _fitting_ranges(
    head: Head,
    hidden: Tensor,
    rows: Rows,
    dtypes: tuple[torch.dtype | None, torch.dtype | None],
    budget: int,
    filtered: bool,
) -> list[Range] | None:
    # Ranges whose logits fit beside their gradients in `hidden` and weight, of `dtypes`; None where one group is too large, and the
    # call takes two passes.
    N, V, D = rows.index.shape[0], head.widest, head.weight.shape[1]
    fixed, per_row = filter_bytes(head, hidden.device, dtypes[0]) if filtered else (0, 0)
    sizes = head.sizes(N, hidden, *dtypes, gathered=True, scattered=not filtered)
    if sizes.total(N, V) + fixed + N * per_row <= budget:
        return [Range(0, rows.groups, slice(0, N))]
    fixed += V * sizes.col_bytes
    # Several blocks sum the weight's gradient in float32, taken a few columns at a time.
    if sizes.dweight == "narrow":
        fixed += 4 * D * V + min(PRODUCT_BYTES, 4 * D * V)
    per_row += V * sizes.logit_bytes + sizes.row_bytes + sizes.hidden_bytes(1, V)
    return _pack(rows.per_group(), (budget - fixed) // per_row)


def run_groups(
    head: Head, hidden: Tensor, rows: Rows, call: Call, wanted: list[bool]
) -> tuple[Tensor, SequenceStats, Gradients]:
    # Loss, statistics and gradients; the gradients of `hidden` rows are summed where a row serves several targets.
    V, D, dtype = head.V, head.weight.shape[1], accumulate_dtype(head.compute_dtype)
    plan = plan_groups(head, hidden, rows, wanted, call.budget, call.filter_tolerance is not None)
    hidden_gradient = None if plan.dtypes[0] is None else _HiddenGradient(hidden, rows, plan.dtypes[0])
    # Written by the first range, or added to.
    grads = Gradients(
        None,
        hidden.new_empty(V, D, dtype=plan.dweight) if wanted[1] else None,
        hidden.new_zeros(V, dtype=dtype) if wanted[2] else None,
    )
    if plan.one_pass:
        # Once for all ranges, where their weight is the whole one.
        head = head.columns(0, V)
    parts: list[tuple[Tensor, SequenceStats]] = []
    fresh = True
    for at in plan.ranges:
        losses, sequences, is_written = _run_range(head, hidden, rows, call, plan, at, hidden_gradient, grads, fresh)
        parts.append((losses, sequences))
        fresh = fresh and not is_written
    if fresh and grads.weight is not None:
        grads.weight.zero_()
    losses = torch.cat([losses for losses, _ in parts])
    loss = losses.double().sum().to(dtype) / call.normalizer
    sums, entropies, lengths = zip(*(sequences for _, sequences in parts), strict=True)
    stats = SequenceStats(torch.cat(sums), None if entropies[0] is None else torch.cat(entropies), torch.cat(lengths))
    if hidden_gradient is None:
        return loss, stats, grads
    dhidden = hidden_gradient.result()
    return loss, stats, grads._replace(hidden=dhidden if head.shard is None else head.shard.sum_(dhidden))


def _run_range(
    head: Head,
    hidden: Tensor,
    rows: Rows,
    call: Call,
    plan: GroupPlan,
    at: Range,
    hidden_gradient: _HiddenGradient | None,
    grads: Gradients,
    fresh: bool,
) -> tuple[Tensor, SequenceStats, bool]:
    # Losses and statistics of one range, and whether its gradients were added: all but those of a range where none counts. What
    # lies in memory for it, its logits above all, is gone before the next.
    g0, g1, block = at
    index, targets = rows.index[block], rows.targets[block]
    n, group_size = index.shape[0], rows.lengths.shape[1]
    store = hidden.new_empty(n, head.padded(head.V), dtype=head.logits_dtype) if plan.one_pass else None
    blocks = plan.blocks(head, hidden, n)
    stats = compute_stats(head, hidden, index, targets, blocks, call.entropy is not False, store)
    lengths = rows.lengths[g0:g1]
    entropy = None if stats.entropy is None else sum_sequences(stats.entropy, lengths)
    sequences = SequenceStats(sum_sequences(stats.logprobs, lengths), entropy, lengths)
    inputs = [tensor[g0:g1] for tensor in call.group_inputs]
    if not any(plan.wanted):
        with torch.set_grad_enabled(call.with_grad):
            losses = group_losses(call.loss_fn, sequences, inputs)
        _refuse_captured(losses, [])
        return losses, sequences, False
    losses, dlogprobs, dentropy = _coefficients(call.loss_fn, sequences, inputs, call.entropy == "grad")
    if n == 0:
        return losses, sequences, False
    local, dtype = rows.ids[block].long() - g0 * group_size, stats.m.dtype
    upstream = Upstream(
        *(None if d is None else (d / call.normalizer).reshape(-1)[local].to(dtype) for d in (dlogprobs, dentropy))
    )
    selected = torch.arange(block.start, block.stop, device=hidden.device)
    live, dlogits, unscale = _live_rows(upstream), None, None
    if store is None or call.filter_tolerance is None:
        # All dlogits are on their way before the host asks how many rows count: to ask costs a GPU nothing.
        counted = HostCopy(live.sum())
        if store is not None:
            dlogits, unscale = form_gradient(head, store, targets, stats, upstream, plan.wanted[0] or plan.wanted[1])
        count = counted.read()
        if count == 0:
            return losses, sequences, False
        if count < n:
            places = to_front(live, count, dlogits, head.rows)
            selected, index = places + block.start, index[places]
            if dlogits is not None:
                dlogits = dlogits[:count]
            else:
                targets, stats, upstream = targets[places], stats.take(places), upstream.take(places)
    into = grads
    if hidden_gradient is not None:
        put = partial(hidden_gradient.add, selected, index)
        into = grads._replace(hidden=Scattered(put, hidden_gradient.total.dtype))
    if store is None:
        compute_gradients(head, hidden, index, targets, stats, upstream, blocks, into, fresh)
        if call.filter_report is not None:
            count = index.shape[0]
            call.filter_report.count(count, count, count * head.V, head.V)
    elif dlogits is not None:
        multiply_out(head, hidden, index, dlogits, unscale, into, fresh)
    else:
        assert call.filter_tolerance is not None
        filtering = live, call.filter_tolerance, call.filter_report, fresh
        compute_filtered_gradients(head, hidden, index, targets, stats, upstream, into, store, *filtering)
    return losses, sequences, True
