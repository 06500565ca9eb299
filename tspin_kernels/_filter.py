"""Certified column filtering: the gradient of peaked rows from the few vocabulary columns that carry it.

In a trained model almost all of a row's gradient dz sits in a few of the V columns. Rows of a like peak share a set of columns
C, and dH = dz W, dW = dz^T H are made from these alone. For each row t with upstream gradients g (log-prob) and h (entropy),

    sum over j not in C of |dz_tj|  <=  e_t = tau (|g_t| + |h_t|) scale / temperature                    (1)

is summed up, not presumed; a row that would break it takes the dense path. A threshold on single elements would not bound the
sum: a flat row is nothing but small elements. With h = 0 and no softcap, (1) says that the probability dropped is at most tau.
Up to rounding, (1) gives

    ||error of dH_t|| <= e_t max_j ||W_j||          ||error of dW|| (Frobenius) <= sum_t e_t ||h_t||     (h_t: hidden row)

The column of a row's target is always kept, and the gradient of the bias is exact.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from tspin_kernels._blocks import (
    Gradients,
    Head,
    RowStats,
    Upstream,
    add_column_sums,
    add_product,
    form_gradient,
    product,
    to_front,
    without_autocast,
)

# Rows that choose their columns together, and what it costs to gather and scatter a column, in rows of its products:
# estimates, for the CPU and for an H200.
_SHARING = {"cpu": (128, 32)}
_SHARING_ELSEWHERE = (512, 512)
# A block chooses between this many numbers of columns, each the last one over the square root of two.
_SETS = 12
_WORKSPACE_BYTES = 64 * 2**20


@dataclass
class FilterReport:
    """What column filtering left to multiply, summed over the calls that were given this report.

    Counts rows that have a gradient; with a process group, of this rank's columns.
    """

    rows: int = 0
    dense_rows: int = 0  # of them, those that kept every column
    entries: int = 0  # of the rows' dlogits
    kept_entries: int = 0

    @property
    def kept_fraction(self) -> float:
        """What is left of the products of the backward: 1 where nothing was filtered."""
        return self.kept_entries / self.entries if self.entries else 1.0

    def count(self, rows: int, columns: int, V: int) -> None:
        """Count `rows` of which each kept `columns` out of V."""
        self.rows += rows
        self.dense_rows += rows if columns == V else 0
        self.entries += rows * V
        self.kept_entries += rows * columns


def _sharing(device: torch.device) -> tuple[int, int]:
    return _SHARING.get(device.type, _SHARING_ELSEWHERE)


def _columns_per_step(D: int) -> int:
    return max(1, _WORKSPACE_BYTES // (4 * D))


def filter_bytes(head: Head, device: torch.device) -> int:
    """Bytes that filtering takes beside the store: a block of rows with its shares, and the operands of one step of columns."""
    per_block, _ = _sharing(device)
    (_, D), V = head.weight.shape, head.widest
    logit, operand = head.logits_dtype.itemsize, head.compute_dtype.itemsize
    widened = 4 if operand < 4 and device.type == "cpu" else 0
    choice = V * (per_block * (2 * logit + widened) + 5 * _SETS + 32)
    accumulator = 4 * V * D if operand < 4 else 0
    return choice + accumulator + min(_columns_per_step(D), V) * (per_block * operand + D * (4 + operand))


def _choose_columns(
    dlogits: Tensor, size: Tensor, targets: Tensor, limit: float, overhead: int
) -> tuple[Tensor, Tensor] | None:
    """Which rows of a block keep which columns: (fits [N] bool, columns [C]), or None where all are better off dense.

    Args:
        dlogits: [N, V] of like rows. size: [N] their |g| + |h|. targets: [N] from the first column; may lie outside.
        limit: most that a row may drop of sum |dlogits| / size.
    """
    N, V = dlogits.shape
    # At least as many columns as rows, so that every set has room for the targets.
    counts = sorted({max(N, int(V * 2 ** (-k / 2))) for k in range(1, _SETS + 1)})
    if counts[-1] >= V:
        return None
    share = dlogits.abs()
    # Each row over its size, in proportion: a row of small coefficients has its say.
    weights = (size.amin() / size).unsqueeze(0).to(share.dtype)
    mass = product(weights, share, size.dtype).squeeze(0).nan_to_num_(0, posinf=0)
    inside = (targets >= 0) & (targets < V)
    mass.scatter_reduce_(0, targets.clamp(0, V - 1), torch.where(inside, torch.inf, 0).to(mass.dtype), "amax")
    order = mass.argsort(descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(0, order, torch.arange(V, device=order.device))
    is_dropped = rank.unsqueeze(1) >= torch.tensor(counts, device=order.device)
    fits = product(share, is_dropped.to(share.dtype), size.dtype) <= limit * size.unsqueeze(1)
    numbers = fits.sum(0).tolist()
    costs = [(n + overhead) * count + (N - n) * V for n, count in zip(numbers, counts)]
    best = min(range(len(counts)), key=costs.__getitem__)
    if costs[best] >= N * V:
        return None
    return fits[:, best], order[: counts[best]].sort().values


@without_autocast
def compute_filtered_gradients(
    head: Head,
    hidden: Tensor,
    index: Tensor,
    targets: Tensor,
    stats: RowStats,
    upstream: Upstream,
    grads: Gradients,
    store: Tensor,
    tolerance: float,
    report: FilterReport | None,
) -> None:
    """`compute_gradients` within a tolerance, from the products in `store` [N, V], which is destroyed.

    Row i of `grads.hidden` [N, D] is written; the gradients of weight and bias, in float32 or wider, are added.
    """
    report = FilterReport() if report is None else report
    (N, V), dtype = store.shape, head.compute_dtype
    # In place: the columns are chosen by what is not yet rounded.
    store, unscale = form_gradient(head, store, targets, stats, upstream, for_products=False)
    add_column_sums(grads.bias, store, unscale)
    targets = targets - head.start
    size = torch.stack([gradient.abs() for gradient in upstream if gradient is not None]).sum(0)
    size = size if unscale is None else size / unscale
    # What all ranks drop together stays within the tolerance.
    ranks = 1 if head.shard is None else head.shard.ranks
    limit = tolerance * abs(head.transform.logit_scale) / head.transform.temperature / ranks
    per_block, overhead = _sharing(store.device)
    is_dense = torch.ones(N, dtype=torch.bool, device=store.device)
    # By the largest probability of a row, which is exp(-log_s).
    for rows in stats.log_s.argsort(stable=True).split(per_block):
        dlogits = store.index_select(0, rows)
        chosen = _choose_columns(dlogits, size[rows], targets[rows], limit, overhead)
        if chosen is None:
            continue
        fits, columns = chosen
        rows = rows[fits]
        is_dense[rows] = False
        report.count(rows.shape[0], columns.shape[0], V)
        operand = hidden.index_select(0, index[rows]).to(dtype)
        dhidden = operand.new_empty(operand.shape, dtype=stats.m.dtype)
        for step, part in enumerate(columns.split(_columns_per_step(hidden.shape[-1]))):
            kept = dlogits.index_select(1, part)[fits].to(dtype)
            if grads.hidden is not None:
                add_product(dhidden, kept, head.weight.index_select(0, part).to(dtype), step == 0, unscale)
            if grads.weight is not None:
                dweight = product(kept.T, operand, stats.m.dtype)
                grads.weight.index_add_(0, part, dweight if unscale is None else dweight * unscale)
        if grads.hidden is not None:
            grads.hidden[rows] = dhidden.to(grads.hidden.dtype)
    places = to_front(is_dense, store)
    report.count(places.shape[0], V, V)
    operand = hidden.index_select(0, index[places]).to(dtype)
    dlogits = store[: places.shape[0]].to(dtype)
    if grads.hidden is not None:
        dhidden = grads.hidden.new_empty(operand.shape)
        add_product(dhidden, dlogits, head.weight.to(dtype), True, unscale)
        grads.hidden[places] = dhidden
    if grads.weight is not None:
        add_product(grads.weight, dlogits.T, operand, False, unscale)
