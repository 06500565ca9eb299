"""Certified column filtering: the gradient of peaked rows from the few vocabulary columns that carry it.

In a trained model almost all of a row's gradient dz sits in a few of the V columns. Rows of like entropy share a choice of
columns C, and dH = dz W, dW = dz^T H are made from these alone. For each row t of upstream gradients g (log-prob) and h (entropy),

    sum over j not in C of |dz_tj|  <=  tau (|g_t| + |h_t|) scale / temperature                          (1)

is summed up, not presumed; a row that would break it, or whose bound is not finite, takes the dense path. A threshold on single
elements would not bound the sum: a flat row is nothing but small elements. Where only log-probs have a gradient and no softcap is
set, (1) says that the probability dropped is at most tau. From (1), with e_t its right side,

    ||error of dH_t|| <= e_t max_j ||W_j||          ||error of dW|| (Frobenius) <= sum_t e_t ||h_t||

up to rounding. The column of a row's target is always kept, and the gradient of the bias is exact.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from tspin_kernels._blocks import Gradients, Head, RowStats, Upstream, add_product, rescale, to_front, wide_product, without_autocast

# Sizes of the nested sets of columns from which a block of rows chooses, as powers of the square root of two below V.
_HALVINGS = range(12, 0, -1)
# Rows that choose together, and what it costs to gather and scatter a column, in rows of its products: estimates, for the CPU
# and for an H200.
_SHARING = {"cpu": (128, 32)}
_SHARING_ELSEWHERE = (512, 512)
_WORKSPACE_BYTES = 64 * 2**20
# Of the choice, per column and block of rows: its mass twice, its place in the order, its level, and what a sort needs.
_CHOICE_BYTES = 32


@dataclass
class FilterReport:
    """What column filtering left to multiply, summed over the calls that were given this report.

    Rows are those with a gradient. With a process group the entries are of this rank's columns.
    """

    rows: int = 0
    dense_rows: int = 0  # of them, those that kept every column
    entries: int = 0  # of the rows' dlogits
    kept_entries: int = 0

    @property
    def kept_fraction(self) -> float:
        """What is left of the products of the backward: 1 without any filtering."""
        return self.kept_entries / self.entries if self.entries else 1.0

    def add(self, rows: int, V: int, filtered: int = 0, kept: int = 0) -> None:
        """Count `rows` of which `filtered` keep `kept` entries between them."""
        self.rows += rows
        self.dense_rows += rows - filtered
        self.entries += rows * V
        self.kept_entries += (rows - filtered) * V + kept


def _sharing(device: torch.device) -> tuple[int, int]:
    return _SHARING.get(device.type, _SHARING_ELSEWHERE)


def _columns_per_step(D: int) -> int:
    return max(1, _WORKSPACE_BYTES // (4 * D))


def filter_bytes(head: Head, device: torch.device) -> tuple[int, int]:
    """Bytes that filtering takes beside the store, once and for each of its rows."""
    per_block, _ = _sharing(device)
    (_, D), itemsize = head.weight.shape, head.compute_dtype.itemsize
    once = min(_columns_per_step(D), head.widest) * (per_block * itemsize + D * (4 + itemsize))
    return once, -(-_CHOICE_BYTES * head.widest // per_block)


def _choose(
    head: Head, dlogits: Tensor, targets: Tensor, entropy: Tensor, size: Tensor, bound: Tensor
) -> list[tuple[Tensor, Tensor]]:
    """Rows that may be filtered, by blocks, and the columns that each block keeps.

    `size` [N] is |g| + |h| and `bound` [N] the right side of (1); `targets` [N] are counted from the first column.
    The host waits for the device once, for the numbers of rows.
    """
    N, V = dlogits.shape
    per_block, overhead = _sharing(dlogits.device)
    # At least as many columns as rows, so that no set lacks a target.
    sizes = {max(min(N, per_block), -(-int(V * 2 ** (-k / 2)) // 64) * 64) for k in _HALVINGS}
    sizes = sorted(size for size in sizes if size < V)
    if not sizes:
        return []
    rows = entropy.argsort(stable=True)
    block = torch.arange(N, device=rows.device) // per_block
    mass = head.rows.column_mass(dlogits, rows, 1 / size[rows], per_block).nan_to_num_(0)
    target = targets[rows]
    first = torch.where((target >= 0) & (target < V), torch.inf, 0).to(mass.dtype)
    mass.view(-1).scatter_reduce_(0, block * V + target.clamp(0, V - 1), first, "amax")
    order = mass.argsort(1, descending=True, stable=True)
    # A column is of level l if it is in the set l and in none before.
    rank_level = torch.bucketize(torch.arange(V, device=rows.device), torch.tensor(sizes, device=rows.device), right=True)
    level = torch.empty_like(order, dtype=torch.uint8).scatter_(1, order, rank_level.to(torch.uint8).expand_as(order))
    within = head.rows.level_mass(dlogits, rows, level, per_block)
    dropped = within.flip(1).cumsum(1).flip(1)[:, 1 : len(sizes) + 1]
    limit = bound[rows, None]
    misses = (~((dropped <= limit) & limit.isfinite())).sum(1)
    key = block * (len(sizes) + 1) + misses
    rows = rows[key.argsort(stable=True)]
    blocks = order.shape[0]
    counts = torch.bincount(key, minlength=blocks * (len(sizes) + 1)).view(blocks, -1).cumsum(1).tolist()
    chosen = []
    for b, fitting in enumerate(counts):
        n = min(per_block, N - b * per_block)
        costs = [(fit + overhead) * size + (n - fit) * V for fit, size in zip(fitting, sizes)]
        best = min(range(len(sizes)), key=costs.__getitem__)
        if fitting[best] and costs[best] < n * V:
            start = b * per_block
            chosen.append((rows[start : start + fitting[best]], order[b, : sizes[best]].sort().values))
    return chosen


@without_autocast
def compute_filtered_gradients(
    head: Head,
    hidden: Tensor,
    index: Tensor,
    targets: Tensor,
    stats: RowStats,
    upstream: Upstream,
    store: Tensor,
    grads: Gradients,
    tolerance: float,
    report: FilterReport,
) -> None:
    """`compute_gradients` within a tolerance, from the products in `store` [N, V], which is destroyed.

    Row i of `grads.hidden` [N, D] is written; the gradients of weight and bias, in float32 or wider, are added.
    """
    (N, V), targets = store.shape, targets - head.start
    unscale = None
    if head.compute_dtype == torch.float16:
        upstream, unscale = rescale(upstream)
    entropy_gradient = None if upstream.entropy is None else stats.entropy
    head.rows.dlogits_(
        store, head.bias, targets, stats.m, stats.log_s, entropy_gradient, *upstream, head.transform
    )
    if grads.bias is not None:
        column_sums = store.sum(0, dtype=grads.bias.dtype)
        grads.bias += column_sums if unscale is None else column_sums * unscale
    size = sum(gradient.abs() for gradient in upstream if gradient is not None)
    # What all ranks drop together stays within the tolerance.
    share = tolerance / (1 if head.shard is None else head.shard.ranks)
    bound = size * (share * abs(head.transform.logit_scale) / head.transform.temperature)
    assert isinstance(size, Tensor) and stats.entropy is not None
    chosen = _choose(head, store, targets, stats.entropy, size, bound)

    is_dense = torch.ones(N, dtype=torch.bool, device=store.device)
    for rows, columns in chosen:
        is_dense[rows] = False
        operand = hidden.index_select(0, index[rows]).to(head.compute_dtype)
        dhidden = operand.new_empty(operand.shape, dtype=stats.m.dtype)
        for step, part in enumerate(columns.split(_columns_per_step(hidden.shape[-1]))):
            dlogits = store[rows[:, None], part].to(head.compute_dtype)
            if grads.hidden is not None:
                add_product(dhidden, dlogits, head.weight[part].to(head.compute_dtype), step == 0, unscale)
            if grads.weight is not None:
                product = wide_product(dlogits.T, operand)
                grads.weight.index_add_(0, part, product if unscale is None else product * unscale)
        if grads.hidden is not None:
            grads.hidden[rows] = dhidden.to(grads.hidden.dtype)
    filtered = sum(rows.shape[0] for rows, _ in chosen)
    report.add(N, V, filtered, sum(rows.shape[0] * columns.shape[0] for rows, columns in chosen))
    if filtered == N:
        return
    places = to_front(is_dense, store)
    dlogits = store[: N - filtered].to(head.compute_dtype)
    operand = hidden.index_select(0, index[places]).to(head.compute_dtype)
    if grads.hidden is not None:
        dhidden = grads.hidden.new_empty(operand.shape)
        add_product(dhidden, dlogits, head.weight.to(head.compute_dtype), True, unscale)
        grads.hidden[places] = dhidden
    if grads.weight is not None:
        add_product(grads.weight, dlogits.T, operand, False, unscale)
