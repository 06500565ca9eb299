"""The blockwise engine of both ops: matrix products by cuBLAS (or the CPU's BLAS), row work between them by a `_rows_*` module.

A block is [tokens, vocabulary columns]. The forward takes each block into the rows' statistics; the backward turns it into
the gradient in place and multiplies it out. Nothing of size [N, V] exists unless the caller hands in a store for it.
"""

from collections.abc import Callable
from functools import wraps
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tspin_kernels._head import Head, product
from tspin_kernels._inputs import accumulate_dtype
from tspin_kernels._plan import Blocks

# A product on its way into a wider sum is made in slices of at most this.
PRODUCT_BYTES = 64 * 2**20
# Where its slices start: elsewhere a GPU takes products for older matrix units.
_ALIGNED = 256


class RowStats(NamedTuple):
    """Final statistics of each row, [N], float32 (float64 for float64 products)."""

    m: Tensor
    log_s: Tensor
    logprobs: Tensor | None
    entropy: Tensor | None

    def take(self, rows: Tensor | slice) -> "RowStats":
        return RowStats(*(None if values is None else values[rows] for values in self))  # pyright: ignore[reportArgumentType]


class Upstream(NamedTuple):
    """Gradients of the loss in log-prob, entropy and logsumexp of each row, [N]; None counts as zero."""

    logprobs: Tensor | None
    entropy: Tensor | None = None
    logsumexp: Tensor | None = None

    def take(self, rows: Tensor | slice) -> "Upstream":
        return Upstream(*(None if values is None else values[rows] for values in self))


class Scattered(NamedTuple):
    """A gradient of rows that go elsewhere: `write(start, stop, values)` takes those from start to stop [stop - start, D], each
    row once, in the dtype or in a wider one."""

    write: Callable[[int, int, Tensor], None]
    dtype: torch.dtype


class Gradients(NamedTuple):
    """Gradients in the hidden rows [N, D], weight [V, D] and bias [V]; None where not wanted."""

    hidden: Tensor | Scattered | None
    weight: Tensor | None
    bias: Tensor | None


def add_product(out: Tensor, a: Tensor, b: Tensor, first: bool, unscale: Tensor | None) -> None:
    """out (+)= a @ b * unscale; `first` overwrites. A sum over several products is always in float32 or wider."""
    if out.dtype == a.dtype and unscale is None:
        torch.mm(a, b, out=out) if first else out.addmm_(a, b)
        return
    if first and unscale is None and a.device.type != "cpu":
        product(a, b, out.dtype, out)
        return
    step = max(1, PRODUCT_BYTES // (4 * b.shape[1]))
    for start, stop in _steps(a.shape[0], step - step % _ALIGNED or step):
        part = product(a[start:stop], b, accumulate_dtype(a.dtype))
        if unscale is not None:
            part.mul_(unscale)
        out[start:stop].copy_(part) if first else out[start:stop].add_(part)


def _steps(size: int, step: int) -> list[tuple[int, int]]:
    return [(start, min(start + step, size)) for start in range(0, size, step)]


def _from_column(targets: Tensor, start: int) -> Tensor:
    # Counted from that column of the vocabulary on.
    return targets - start if start else targets


def take(hidden: Tensor, index: Tensor | None, start: int, stop: int) -> Tensor:
    """Rows start to stop of `hidden`, or of `hidden[index]` without making it."""
    return hidden[start:stop] if index is None else hidden.index_select(0, index[start:stop])


class _Buffer:
    """One block of logits or their gradient, padded: a view of the store, or of memory that every block uses again."""

    def __init__(self, head: Head, rows: int, cols: int, dtype: torch.dtype, store: Tensor | None = None):
        self.head, self.store = head, store
        self.memory = None
        if store is None:
            self.memory = torch.empty(rows * head.padded(cols), dtype=dtype, device=head.weight.device)

    def block(self, r0: int, r1: int, c0: int, c1: int) -> Tensor:
        width = self.head.padded(c1 - c0)
        if self.memory is None:
            assert self.store is not None
            return self.store[r0:r1, c0 : c0 + width]
        return self.memory[: (r1 - r0) * width].view(r1 - r0, width)


def without_autocast(function: Callable[..., Any]) -> Callable[..., Any]:
    """For what chooses the dtype of each product itself; autocast would round what it widens."""

    @wraps(function)
    def wrapped(head: Head, *args: Any, **options: Any) -> Any:
        with torch.autocast(head.weight.device.type, enabled=False):
            return function(head, *args, **options)

    return wrapped


@without_autocast
def compute_stats(
    head: Head,
    hidden: Tensor,
    index: Tensor | None,
    targets: Tensor,
    blocks: Blocks,
    with_entropy: bool,
    store: Tensor | None = None,
) -> RowStats:
    """Statistics of the rows `hidden[index]` against `targets` [N]; `store` [N, V], padded, keeps the products for the gradient."""
    N = targets.shape[0]
    m = torch.full((N,), -torch.inf, dtype=accumulate_dtype(head.compute_dtype), device=hidden.device)
    s = torch.zeros_like(m)
    u = torch.zeros_like(m) if with_entropy else None
    # A target in no column, outside [0, V), leaves nan.
    target_logit = torch.full_like(m, torch.nan)
    buffer = _Buffer(head, min(blocks.rows, N), blocks.cols, head.logits_dtype, store)
    for r0, r1 in _steps(N, blocks.rows):
        rows = take(hidden, index, r0, r1)
        for c0, c1 in _steps(head.V, blocks.cols):
            part = head.columns(c0, c1)
            logits = buffer.block(r0, r1, c0, c1)
            part.project(rows, logits)
            head.rows.row_stats_(
                logits[:, : part.V],
                part.bias,
                _from_column(targets[r0:r1], head.start + c0),
                m[r0:r1],
                s[r0:r1],
                None if u is None else u[r0:r1],
                target_logit[r0:r1],
                head.transform,
            )
            del part  # a copy that the budget counts once, as the rows are
        del rows
    if head.shard is not None:
        m, s, u, target_logit = head.shard.merge(m, s, u, target_logit, targets - head.start)
    log_s = s.log()
    return RowStats(m, log_s, (target_logit - m) - log_s, None if u is None else log_s - u / s)


@without_autocast
def compute_gradients(
    head: Head,
    hidden: Tensor,
    index: Tensor | None,
    targets: Tensor,
    stats: RowStats,
    upstream: Upstream,
    blocks: Blocks,
    grads: Gradients,
    fresh: bool = True,
) -> None:
    """Write into `grads` the gradients of the rows `hidden[index]`, whose products are made again, block by block.

    Row i of `grads.hidden` [N, D] belongs to `hidden[index[i]]` and is always written. Not `fresh`: that of the weight is added.
    The bias' is always added.
    """
    N = targets.shape[0]
    upstream, unscale = rescale(upstream, head)
    row_steps, col_steps = _steps(N, blocks.rows), _steps(head.V, blocks.cols)
    if blocks.tokens_inner:
        order = [(row, col) for col in col_steps for row in row_steps]
    else:
        order = [(row, col) for row in row_steps for col in col_steps]
    shape = N, head.weight.shape[1]
    dhidden = _Sum(grads.hidden, shape, len(col_steps), blocks.rows, blocks.tokens_inner, True, unscale)
    shape = head.V, head.weight.shape[1]
    dweight = _Sum(grads.weight, shape, len(row_steps), blocks.cols, not blocks.tokens_inner, fresh, unscale)
    size = min(blocks.rows, N), blocks.cols
    buffer = gradients = _Buffer(head, *size, head.logits_dtype)
    if head.logits_dtype != head.compute_dtype and (grads.hidden is not None or grads.weight is not None):
        gradients = _Buffer(head, *size, head.compute_dtype)
    at, part = -1, head
    for (r0, r1), (c0, c1) in order:
        if at != c0:
            part = head  # lets the copy before go
            at, part = c0, head.columns(c0, c1)
        block = slice(r0, r1)
        rows = take(hidden, index, r0, r1).to(head.compute_dtype)
        logits, dlogits = (each.block(r0, r1, c0, c1) for each in (buffer, gradients))
        part.project(rows, logits)
        local = _from_column(targets[block], head.start + c0)
        _form_dlogits(part, logits, dlogits, local, stats.take(block), upstream.take(block))
        dhidden.add(r0, r1, dlogits, part.weight, c0 == 0, c1 == head.V)
        dweight.add(c0, c1, dlogits[:, : part.V].T, rows, r0 == 0, r1 == N)
        add_column_sums(None if grads.bias is None else grads.bias[c0:c1], dlogits[:, : part.V], unscale)
        del rows


@without_autocast
def form_gradient(
    head: Head, store: Tensor, targets: Tensor, stats: RowStats, upstream: Upstream, for_products: bool
) -> tuple[Tensor, Tensor | None]:
    """The gradient of the products in `store` [N, V], padded, and what takes a scale out of it again: in the same memory, but wide
    products have their gradient apart where it is `for_products` of its own."""
    upstream, unscale = rescale(upstream, head)
    is_apart = for_products and head.logits_dtype != head.compute_dtype
    dlogits = torch.empty_like(store, dtype=head.compute_dtype) if is_apart else store
    _form_dlogits(head, store, dlogits, _from_column(targets, head.start), stats, upstream)
    return dlogits, unscale


@without_autocast
def multiply_out(
    head: Head,
    hidden: Tensor,
    index: Tensor | None,
    dlogits: Tensor,
    unscale: Tensor | None,
    grads: Gradients,
    fresh: bool = True,
) -> None:
    """Write into `grads` what `dlogits` [N, V], padded, of the rows `hidden[index]` come to, as `compute_gradients` does."""
    N, V, D = dlogits.shape[0], head.V, head.weight.shape[1]
    if grads.hidden is not None:
        _Sum(grads.hidden, (N, D), 1, N, True, True, unscale).add(0, N, dlogits, head.columns(0, V).weight, True, True)
    if grads.weight is not None:
        rows = take(hidden, index, 0, N).to(head.compute_dtype)
        _Sum(grads.weight, (V, D), 1, V, True, fresh, unscale).add(0, V, dlogits[:, :V].T, rows, True, True)
    add_column_sums(grads.bias, dlogits[:, :V], unscale)


def _form_dlogits(
    head: Head, logits: Tensor, dlogits: Tensor, targets: Tensor, stats: RowStats, upstream: Upstream
) -> None:
    # The gradient of the products `logits` [N, V], padded, into `dlogits`; `targets` [N] are counted from the first column.
    entropy, V = None if upstream.entropy is None else stats.entropy, head.V
    vectors = (head.bias, targets, stats.m, stats.log_s, entropy, *upstream)
    head.rows.dlogits_(logits[:, :V], dlogits[:, :V], *vectors, head.transform)
    if dlogits is not logits:
        # In place the padding is a product with zeros.
        dlogits[:, V:].zero_()


def add_column_sums(dbias: Tensor | None, dlogits: Tensor, unscale: Tensor | None) -> None:
    """Add to `dbias` [V] the column sums of `dlogits` [N, V] times `unscale`."""
    if dbias is not None:
        column_sums = dlogits.sum(0, dtype=dbias.dtype)
        dbias += column_sums if unscale is None else column_sums * unscale


class _Sum:
    """The sum of one gradient [rows, D] over blocks: made in `out` itself; or beside it, in float32 where `out` is narrow.

    `products`: of how many a row of `out` is the sum. `step`: rows of `out` in a block; unless several products are summed for the
    `whole` of it at a time, the blocks of one step follow each other. Not `fresh`: the sum is added to what `out` holds. `out` may
    be None: nothing is made.
    """

    def __init__(
        self,
        out: Tensor | Scattered | None,
        shape: tuple[int, int],
        products: int,
        step: int,
        whole: bool,
        fresh: bool,
        unscale: Tensor | None,
    ):
        self.out, self.fresh, self.unscale = out, fresh, unscale
        self.whole = whole and products > 1
        self.beside: Tensor | None = None
        self.size = shape[0] if self.whole else min(step, shape[0]), shape[1]
        if out is not None:
            is_sum = products > 1 or unscale is not None
            self.dtype = accumulate_dtype(out.dtype) if is_sum else out.dtype
            self.is_beside = isinstance(out, Scattered) or self.dtype != out.dtype

    def add(self, start: int, stop: int, a: Tensor, b: Tensor, first: bool, last: bool) -> None:
        """Add a @ b to the rows from start to stop, `first` and `last` of their products."""
        if self.out is None:
            return
        if not self.is_beside:
            assert isinstance(self.out, Tensor)
            add_product(self.out[start:stop], a, b, first and self.fresh, self.unscale)
            return
        if self.beside is None:
            self.beside = a.new_empty(self.size, dtype=self.dtype)
        total = self.beside[start:stop] if self.whole else self.beside[: stop - start]
        add_product(total, a, b, first, self.unscale)
        if not last:
            return
        if isinstance(self.out, Scattered):
            self.out.write(start, stop, total)
        else:
            out = self.out[start:stop]
            out.copy_(total) if self.fresh else out.add_(total)


def rescale(upstream: Upstream, head: Head) -> tuple[Upstream, Tensor | None]:
    """For float16: times a power of two that brings the largest dlogits near 1024, where the small ones keep their digits too and
    sums of upstream gradients do not overflow; and that power's inverse."""
    if head.compute_dtype != torch.float16:
        return upstream, None
    slope = abs(head.transform.logit_scale) / head.transform.temperature
    largest = slope * torch.stack([g.abs().max() for g in upstream if g is not None]).max()
    exponent = torch.where(largest > 0, torch.frexp(largest)[1] - 10, 0).clamp(-120, 120)
    scale = torch.ldexp(torch.ones_like(largest), -exponent)
    return Upstream(*(None if g is None else g * scale for g in upstream)), 1 / scale


def to_front(kept: Tensor, count: int, store: Tensor | None, rows: ModuleType) -> Tensor:
    """Places of the `count` rows that `kept` [N] marks, in the order in which they then stand at the front of `store` [N, V].

    A row from the back takes the place of one at the front that is left out: to leave a row out costs at most one copied
    row, as much as its dlogits would have; gathering would copy all that stay.
    """
    order = torch.arange(count, device=kept.device)
    if count in (0, kept.shape[0]):
        return order
    places = torch.sort(kept, descending=True, stable=True).indices[:count]
    is_hole = ~kept[:count]
    holes = is_hole.cumsum(0)
    # The last ones of `places` stand at the back, as many as there are holes.
    order = torch.where(is_hole, places[(holes + (count - 1) - holes[-1]).clamp(min=0)], order)
    if store is not None:
        rows.move_rows_(store, order)
    return order
