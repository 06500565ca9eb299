"""Certified filtering: the gradient of peaked rows from the few vocabulary columns that carry it.

In a trained model almost all of a row's gradient dz sits in a few of the V columns. A row t keeps those above a threshold of its
own, and dH = dz W, dW = dz^T H are summed over what is kept, entry by entry. With upstream gradients g (log-prob) and h (entropy),

    sum over j left out of |dz_tj|  <=  e_t = tau (|g_t| + |h_t|) |scale| / temperature                    (1)

is summed up, not presumed: a threshold on single elements would not bound the sum, since a flat row is nothing but small elements.
A row that keeps more columns than it gains by takes the dense path. With h = 0 and no softcap, (1) says that the probability left
out is at most tau. Up to rounding, (1) gives

    ||error of dH_t|| <= e_t max_j ||W_j||          ||error of dW|| (Frobenius) <= sum_t e_t ||h_t||     (h_t: hidden row)

The column of a row's target is always kept, and the gradient of the bias is exact.
"""

from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from tspin_kernels import _rows_torch, _sparse_torch
from tspin_kernels._blocks import (
    Gradients,
    RowStats,
    Scattered,
    Upstream,
    add_column_sums,
    form_gradient,
    multiply_out,
    to_front,
    without_autocast,
)
from tspin_kernels._head import Head
from tspin_kernels._inputs import HostCopy

# Entries of a dense row that cost as much as one that is kept: an estimate for the CPU, measured on an H200.
_ENTRY_COST = {"cpu": 16}
_ENTRY_COST_ELSEWHERE = 128


@dataclass
class FilterReport:
    """What filtering kept, summed over the calls that were given this report.

    Counts rows that have a gradient; with a process group, of this rank's columns.
    """

    rows: int = 0
    dense_rows: int = 0  # of them, those that kept every column
    entries: int = 0  # of the rows' dlogits
    kept_entries: int = 0

    @property
    def kept_fraction(self) -> float:
        """What is left of the entries that the backward multiplies out: 1 where nothing was filtered."""
        return self.kept_entries / self.entries if self.entries else 1.0

    def count(self, rows: int, dense_rows: int, kept_entries: int, V: int) -> None:
        """Count `rows`, those among them that kept all V columns, and the entries that all of them kept."""
        self.rows += rows
        self.dense_rows += dense_rows
        self.entries += rows * V
        self.kept_entries += kept_entries


def sparse_module(rows: ModuleType) -> ModuleType:
    """The module for what is kept, beside a module of row kernels."""
    if rows is _rows_torch:
        return _sparse_torch
    from tspin_kernels import _sparse_triton

    return _sparse_triton


def _most_kept(V: int, device: torch.device) -> int:
    """How many columns a row may keep and still gain."""
    return V // _ENTRY_COST.get(device.type, _ENTRY_COST_ELSEWHERE)


def filter_bytes(head: Head, device: torch.device, dhidden: torch.dtype | None) -> tuple[int, int]:
    """Bytes that filtering takes beside the store: of a call, and of each of its rows, whose gradient is a `dhidden`."""
    V, D, is_narrow = head.widest, head.weight.shape[1], head.compute_dtype.itemsize < 4
    # PyTorch sums in the dtype of what it sums, rows of the weight and its gradient both.
    widened = 8 * V * D if is_narrow and head.rows is _rows_torch else 0
    # Gradients of all rows, and of the dense ones.
    row = 0 if dhidden is None else 2 * D * dhidden.itemsize
    # Place and value of an entry, and both again in the order of rows and of columns.
    return widened, row + sparse_module(head.rows).SCRATCH + 72 * _most_kept(V, device)


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
    live: Tensor,
    tolerance: float,
    report: FilterReport | None,
    fresh: bool,
) -> None:
    """`compute_gradients` within a tolerance, from the products in `store` [N, V], padded, which is destroyed.

    `grads.hidden` is `Scattered`. The gradient of the weight is written; not `fresh`: added. The bias' is always added. `live` [N]:
    which rows have a gradient.
    """
    V, device, sparse = head.V, store.device, sparse_module(head.rows)
    into, dhidden = grads.hidden, None
    if isinstance(into, Scattered):
        dhidden = hidden.new_empty(store.shape[0], hidden.shape[1], dtype=into.dtype)
    # In place: columns are chosen by what is not yet rounded.
    store, unscale = form_gradient(head, store, targets, stats, upstream, for_products=False)
    if grads.bias is not None:
        add_column_sums(grads.bias, store.masked_fill_(~live.unsqueeze(1), 0)[:, :V], unscale)
    size = torch.stack([gradient.abs() for gradient in upstream if gradient is not None]).sum(0)
    size = size if unscale is None else size / unscale
    # What all ranks drop together stays within the tolerance.
    ranks = 1 if head.shard is None else head.shard.ranks
    limit = tolerance * abs(head.transform.logit_scale) / head.transform.temperature / ranks
    # Of a row that is not finite nothing may go.
    limits = (limit * size).nan_to_num(0, posinf=0)
    columns, values, lengths = sparse.keep_largest(store[:, :V], targets - head.start, limits, _most_kept(V, device))
    lengths = torch.where(live, lengths, 0)
    is_dense = lengths < 0
    counts = HostCopy(torch.stack([live.sum(), is_dense.sum()]))
    # Entries in the order of rows; a GPU is waited for.
    row, place = (torch.arange(columns.shape[1], device=device) < lengths.unsqueeze(1)).nonzero(as_tuple=True)
    rows, n = counts.read()
    columns, values = columns[row, place], values[row, place]
    if dhidden is not None:
        starts = torch.nn.functional.pad(lengths.clamp(min=0).cumsum(0), (1, 0))
        sparse.segment_sums(dhidden, starts, columns, values, head.weight, unscale, True)
    dense = to_front(is_dense, n, store, head.rows)
    if report is not None:
        report.count(rows, n, n * V + columns.shape[0], V)
    if n:
        of_dense = None if dhidden is None else dhidden.new_empty(n, hidden.shape[1])
        dlogits = store[:n].to(head.compute_dtype)
        multiply_out(head, hidden, index[dense], dlogits, unscale, Gradients(of_dense, grads.weight, None), fresh)
        if dhidden is not None:
            dhidden[dense] = of_dense  # type: ignore
    if grads.weight is not None:
        order = columns.argsort(stable=True)
        starts = torch.searchsorted(columns[order], torch.arange(V + 1, device=device, dtype=columns.dtype))
        sparse.segment_sums(grads.weight, starts, index[row[order]], values[order], hidden, unscale, fresh and not n)
    if isinstance(into, Scattered):
        into.write(0, store.shape[0], dhidden)  # type: ignore
