"""What filtering keeps of the rows of a gradient, and sums over it, in PyTorch: the twin of `_sparse_triton`."""

import torch
from torch import Tensor

from tspin_kernels._rows_torch import tiles

# Thresholds that filtering tries, as parts of a row's limit: one, and each the last one times the fraction.
FRACTION, FRACTIONS = 2**-0.25, 43
# How many of a row's columns are looked at one by one: so many, or so many times what it may keep.
_LISTED, _LISTED_TIMES = 4096, 8
# Bytes that `keep_largest` needs for each row beside its results, but for tiles.
SCRATCH = 0


def keep_largest(dlogits: Tensor, targets: Tensor, limits: Tensor, most: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of each row the columns that are left when those below a threshold go, whose sum of |dlogits| may not exceed the row's limit.

    Args:
        dlogits: [N, V']. targets: [N], columns that stay; outside [0, V') where there is none. limits: [N] float32.
        most: how many columns a row may keep.

    Returns:
        columns [N, most] int32 in any order, their dlogits [N, most] in the dtype of `limits`, and how many they are [N] int32;
        -1 for a row that would keep more, whose others are undefined. A row that has many above the lowest threshold, or a nan, may
        be -1 too.
    """
    (N, V), dtype = dlogits.shape, limits.dtype
    columns = torch.zeros(N, most, dtype=torch.int32, device=dlogits.device)
    values = torch.zeros(N, most, dtype=dtype, device=dlogits.device)
    lengths = torch.empty(N, dtype=torch.int32, device=dlogits.device)
    fractions = torch.tensor([FRACTION**k for k in range(FRACTIONS)], dtype=dtype, device=dlogits.device)
    for tile in tiles(dlogits):
        dz, target, limit = dlogits[tile].to(dtype), targets[tile], limits[tile]
        share = dz.abs()
        # What the lowest threshold leaves out is summed up, the rest listed. A nan is not small.
        is_small = share <= (limit * fractions[-1]).unsqueeze(1)
        small = torch.where(is_small, share, 0.0).sum(1)
        listed = V - is_small.sum(1)
        is_sparse = (small <= limit) & (listed <= max(_LISTED, _LISTED_TIMES * most))
        row, column = (~is_small & is_sparse.unsqueeze(1)).nonzero(as_tuple=True)
        listed = torch.where(is_sparse, listed, 0)
        value = dz[row, column]
        share = value.abs()
        # The largest of the limit's fractions that leaves out no more than the limit, by bisection.
        low, high = torch.zeros_like(target), torch.full_like(target, FRACTIONS - 1)
        while bool((low < high).any()):
            middle = (low + high) // 2
            is_left = share <= (limit * fractions[middle])[row]
            fits = small + _sums(torch.where(is_left, share, 0.0), listed) <= limit
            low, high = torch.where(fits, low, middle + 1).minimum(high), torch.where(fits, middle, high)
        is_kept = ~(share <= (limit * fractions[low])[row]) | (column == target[row])
        # A target that is too small for the list comes last.
        local = target.clamp(0, V - 1).unsqueeze(1)
        is_added = (target >= 0) & (target < V) & is_small.gather(1, local).squeeze(1)
        kept = _sums(is_kept.to(dtype), listed).long()
        count = kept + is_added
        is_sparse &= count <= most
        is_kept &= is_sparse[row]
        written = torch.where(is_sparse, kept, 0)
        row, column, value = row[is_kept], column[is_kept], value[is_kept]
        place = torch.arange(row.shape[0], device=row.device) - (written.cumsum(0) - written)[row]
        columns[tile][row, place], values[tile][row, place] = column.int(), value
        (row,) = (is_added & is_sparse).nonzero(as_tuple=True)
        columns[tile][row, kept[row]] = target[row].int()
        values[tile][row, kept[row]] = dz[row, target[row]]
        lengths[tile] = torch.where(is_sparse, count, -1).int()
    return columns, values, lengths


def _sums(values: Tensor, lengths: Tensor) -> Tensor:
    return torch.segment_reduce(values, "sum", lengths=lengths, unsafe=True, initial=0)


def segment_sums(
    out: Tensor, starts: Tensor, index: Tensor, values: Tensor, operand: Tensor, factor: Tensor | None, fresh: bool
) -> None:
    """out[i] (+)= factor * the sum of values[e] operand[index[e]] over the entries e of segment i; `fresh` overwrites.

    Args:
        out: [S, D]. starts: [S + 1], where each segment starts and the last one ends. index, values: [E]. operand: [M, D].
        factor: [] or None.
    """
    index = index.long()
    if operand.dtype != values.dtype:
        # In one dtype throughout, of no more rows than are wanted.
        wanted, index = index.unique(return_inverse=True)
        operand = operand.index_select(0, wanted).to(values.dtype)
    sums = torch.zeros(out.shape, dtype=values.dtype, device=out.device)
    if index.shape[0]:
        sums = torch.nn.functional.embedding_bag(
            index, operand, starts.long(), mode="sum", per_sample_weights=values, include_last_offset=True
        )
    sums = sums if factor is None else sums * factor
    out.copy_(sums) if fresh else out.add_(sums)
