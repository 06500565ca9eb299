"""What filtering keeps of the rows of a gradient, and sums over it, in PyTorch: the twin of `_sparse_triton`."""

import torch
from torch import Tensor

from tspin_kernels._rows_torch import tiles

# Thresholds that filtering tries, as parts of a row's limit: one, and each the last one times the fraction.
FRACTION, FRACTIONS = 2**-1.5, 8


def keep_largest(dlogits: Tensor, targets: Tensor, limits: Tensor, most: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of each row the columns that are left when those below a threshold go, whose sum of |dlogits| may not exceed the row's limit.

    Args:
        dlogits: [N, V']. targets: [N], columns that stay; outside [0, V') where there is none. limits: [N] float32.
        most: how many columns a row may keep.

    Returns:
        columns [N, most] int32 in rising order, their dlogits [N, most] in the dtype of `limits`, and how many they are [N] int32;
        -1 for a row that would keep more, whose others are undefined.
    """
    (N, V), dtype = dlogits.shape, limits.dtype
    columns = torch.zeros(N, most, dtype=torch.int32, device=dlogits.device)
    values = torch.zeros(N, most, dtype=dtype, device=dlogits.device)
    lengths = torch.empty(N, dtype=torch.int32, device=dlogits.device)
    for tile in tiles(dlogits):
        dz, local, limit = dlogits[tile].to(dtype), targets[tile].unsqueeze(1), limits[tile].unsqueeze(1)
        share = dz.abs()
        # The largest of the limit's fractions that leaves out no more than the limit, by bisection; zero leaves out nothing.
        fractions = torch.tensor([*(FRACTION**k for k in range(FRACTIONS)), 0.0], dtype=dtype, device=dz.device)
        low, high = torch.zeros_like(local), torch.full_like(local, FRACTIONS)
        while bool((low < high).any()):
            middle = (low + high) // 2
            left_out = torch.where(share <= limit * fractions[middle], share, 0.0).sum(1, keepdim=True)
            fits = left_out <= limit
            low, high = torch.where(fits, low, middle + 1).minimum(high), torch.where(fits, middle, high)
        # Written so that a nan stays, and everything where the limit is nan.
        is_kept = ~(share <= limit * fractions[low])
        hit = (local >= 0) & (local < V)
        is_kept.scatter_(1, local.clamp(0, V - 1), is_kept.gather(1, local.clamp(0, V - 1)) | hit)
        count = is_kept.sum(1)
        is_kept &= (count <= most).unsqueeze(1)
        row, column = is_kept.nonzero(as_tuple=True)
        written = torch.where(count <= most, count, 0)
        place = torch.arange(row.shape[0], device=row.device) - (written.cumsum(0) - written)[row]
        columns[tile][row, place] = column.int()
        values[tile][row, place] = dz[row, column]
        lengths[tile] = torch.where(count <= most, count, -1).int()
    return columns, values, lengths


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
