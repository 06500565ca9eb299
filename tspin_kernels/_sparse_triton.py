"""What filtering keeps of the rows of a gradient, and sums over it, as Triton kernels: the twin of `_sparse_torch`, where the
arguments are documented."""

# Triton's own annotations describe a kernel's body, not its launch.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportReturnType=false

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from tspin_kernels._sparse_torch import FRACTION, FRACTIONS

# Of `keep_largest`: lists of each row, one for a thread; how long a list is.
_LISTS, _LISTED = 256, 16
# Rows and columns of the operand of `segment_sums` that a program reads at once.
_SUM_ROWS, _SUM_BLOCK = 4, 1024
# Bytes that `keep_largest` needs for each row beside its results.
SCRATCH = 4 * _LISTS * (_LISTED + 1) + 4


@triton.jit
def _list_large_kernel(
    dlogits_ptr,  # [N, V'] in any dtype
    limit_ptr,  # [N] float32
    lists_ptr,  # [N, LISTED, LISTS] int32, out, first columns over LANE
    counts_ptr,  # [N, LISTS] int32, out
    small_ptr,  # [N] float32, out
    V,
    stride_n,
    LOWEST: tl.constexpr,
    LISTS: tl.constexpr,
    LISTED: tl.constexpr,
    LANE: tl.constexpr,
):
    # One program owns one row. LANE columns of a thread that are all below the lowest threshold are summed up; if they are not, the
    # thread lists where they are. Threads meet at the end of the row alone.
    row = tl.program_id(0).to(tl.int64)
    lists_ptr += row * (LISTS * LISTED) + tl.arange(0, LISTS)
    lowest = tl.load(limit_ptr + row) * LOWEST
    small = tl.zeros([LISTS], tl.float32)
    count = tl.zeros([LISTS], tl.int32)
    for start in range(0, V, LISTS * LANE):
        offs_v = start + tl.arange(0, LISTS)[:, None] * LANE + tl.arange(0, LANE)[None, :]
        share = tl.abs(tl.load(dlogits_ptr + row * stride_n + offs_v, mask=offs_v < V, other=0.0).to(tl.float32))
        is_small = tl.max(share, axis=1) <= lowest
        # A nan, which no maximum need show, spoils the sum.
        small += tl.where(is_small, tl.sum(share, axis=1), 0.0)
        tl.store(lists_ptr + count * LISTS, start // LANE + tl.arange(0, LISTS), mask=(count < LISTED) & ~is_small)
        count += tl.where(is_small, 0, 1)
    tl.store(counts_ptr + row * LISTS + tl.arange(0, LISTS), count)
    tl.store(small_ptr + row, tl.sum(small, axis=0))


@triton.jit
def _listed(row_ptr, lists_ptr, count, place, V, LISTS: tl.constexpr, LANE: tl.constexpr):
    # LANE columns of each list, their values, and which of them there are.
    in_list = place < count
    first = tl.load(lists_ptr + place * LISTS, mask=in_list, other=0) * LANE
    columns = first[:, None] + tl.arange(0, LANE)[None, :]
    in_row = in_list[:, None] & (columns < V)
    return columns, tl.load(row_ptr + columns, mask=in_row, other=0.0).to(tl.float32), in_row


@triton.jit(do_not_specialize=["most"])
def _keep_largest_kernel(
    dlogits_ptr,  # [N, V'] in any dtype
    target_ptr,  # [N] int64
    limit_ptr,  # [N] float32
    lists_ptr,  # [N, LISTED, LISTS] int32
    counts_ptr,  # [N, LISTS] int32
    small_ptr,  # [N] float32
    columns_ptr,  # [N, most] int32, out
    values_ptr,  # [N, most] float32, out
    lengths_ptr,  # [N] int32, out
    V,
    most,
    stride_n,
    LOG_FRACTION: tl.constexpr,
    FRACTIONS: tl.constexpr,
    LISTS: tl.constexpr,
    LISTED: tl.constexpr,
    LANE: tl.constexpr,
):
    # One program owns one row and finds the best threshold in what is listed of it.
    row = tl.program_id(0).to(tl.int64)
    row_ptr = dlogits_ptr + row * stride_n
    lists_ptr += row * (LISTS * LISTED) + tl.arange(0, LISTS)
    count = tl.load(counts_ptr + row * LISTS + tl.arange(0, LISTS))
    longest = tl.max(count, axis=0)
    limit = tl.load(limit_ptr + row)
    small = tl.load(small_ptr + row)
    target = tl.load(target_ptr + row)
    # Written so that a nan is dense.
    tl.store(lengths_ptr + row, -1)
    if tl.where(small <= limit, longest, LISTED + 1) <= LISTED:
        low, high = 0, FRACTIONS - 1
        while low < high:
            middle = (low + high) // 2
            threshold = limit * tl.exp2(LOG_FRACTION * middle)
            left_out = tl.zeros([LISTS], tl.float32)
            for place in range(0, longest):
                _, values, _ = _listed(row_ptr, lists_ptr, count, place, V, LISTS, LANE)
                share = tl.abs(values)
                left_out += tl.sum(tl.where(share <= threshold, share, 0.0), axis=1)
            fits = small + tl.sum(left_out, axis=0) <= limit
            low = tl.where(fits, low, middle + 1)
            high = tl.where(fits, middle, high)

        threshold = limit * tl.exp2(LOG_FRACTION * low)
        kept = tl.zeros([LISTS], tl.int32)
        is_listed = tl.zeros([LISTS], tl.int32)
        for place in range(0, longest):
            columns, values, in_row = _listed(row_ptr, lists_ptr, count, place, V, LISTS, LANE)
            is_target = in_row & (columns == target)
            is_listed += tl.sum(tl.where(is_target, 1, 0), axis=1)
            kept += tl.sum(tl.where(is_target | (in_row & ~(tl.abs(values) <= threshold)), 1, 0), axis=1)
        # A target among columns that are all small comes last.
        is_added = tl.where((target >= 0) & (target < V), 1 - tl.sum(is_listed, axis=0), 0)
        total = tl.sum(kept, axis=0) + is_added
        if total <= most:
            tl.store(lengths_ptr + row, total)
            into = row * most + tl.cumsum(kept, axis=0) - kept
            for place in range(0, longest):
                in_list = place < count
                first = tl.load(lists_ptr + place * LISTS, mask=in_list, other=0) * LANE
                for column in range(LANE):
                    in_row = in_list & (first + column < V)
                    value = tl.load(row_ptr + first + column, mask=in_row, other=0.0).to(tl.float32)
                    is_kept = in_row & ((first + column == target) | ~(tl.abs(value) <= threshold))
                    tl.store(columns_ptr + into, first + column, mask=is_kept)
                    tl.store(values_ptr + into, value, mask=is_kept)
                    into += tl.where(is_kept, 1, 0)
            last = row * most + total - 1
            value = tl.load(row_ptr + target, mask=is_added > 0, other=0.0).to(tl.float32)
            tl.store(columns_ptr + last, target.to(tl.int32), mask=is_added > 0)
            tl.store(values_ptr + last, value, mask=is_added > 0)


@triton.jit
def _segment_sums_kernel(
    out_ptr,  # [S, D], out; read too unless FRESH
    starts_ptr,  # [S + 1] int64
    index_ptr,  # [E] int32 or int64
    values_ptr,  # [E] float32
    operand_ptr,  # [M, D] in any dtype
    factor_ptr,  # [], read when HAS_FACTOR
    D,
    stride_out,
    stride_operand,
    HAS_FACTOR: tl.constexpr,
    FRESH: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # One program owns BLOCK_D columns of one segment's sum and takes BLOCK_E rows of the operand at a time.
    segment = tl.program_id(0).to(tl.int64)
    first = tl.load(starts_ptr + segment)
    last = tl.load(starts_ptr + segment + 1)
    offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    in_d = offs_d < D
    if FRESH or first < last:
        sums = tl.zeros([BLOCK_E, BLOCK_D], tl.float32)
        for start in range(first, last, BLOCK_E):
            entry = start + tl.arange(0, BLOCK_E)
            in_e = entry < last
            index = tl.load(index_ptr + entry, mask=in_e, other=0).to(tl.int64)
            values = tl.load(values_ptr + entry, mask=in_e, other=0.0)
            rows = operand_ptr + index[:, None] * stride_operand + offs_d[None, :]
            sums += values[:, None] * tl.load(rows, mask=in_e[:, None] & in_d[None, :], other=0.0).to(tl.float32)
        total = tl.sum(sums, axis=0)
        if HAS_FACTOR:
            total *= tl.load(factor_ptr)
        into = out_ptr + segment * stride_out + offs_d
        if not FRESH:
            total += tl.load(into, mask=in_d, other=0.0).to(tl.float32)
        tl.store(into, total, mask=in_d)


def keep_largest(dlogits: Tensor, targets: Tensor, limits: Tensor, most: int) -> tuple[Tensor, Tensor, Tensor]:
    N, V = dlogits.shape
    assert dlogits.stride(1) == 1
    columns = torch.empty(N, most, dtype=torch.int32, device=dlogits.device)
    values = torch.empty(N, most, dtype=torch.float32, device=dlogits.device)
    lengths = torch.empty(N, dtype=torch.int32, device=dlogits.device)
    lists = torch.empty(N, _LISTED, _LISTS, dtype=torch.int32, device=dlogits.device)
    counts = torch.empty(N, _LISTS, dtype=torch.int32, device=dlogits.device)
    small = torch.empty_like(limits)
    # LANE: columns that a thread reads at once, 16 bytes.
    options = {"LISTS": _LISTS, "LISTED": _LISTED, "LANE": 16 // dlogits.element_size(), "num_warps": _LISTS // 32}
    if N:
        with torch.cuda.device_of(dlogits):
            _list_large_kernel[(N,)](
                dlogits,
                limits,
                lists,
                counts,
                small,
                V,
                dlogits.stride(0),
                LOWEST=FRACTION ** (FRACTIONS - 1),
                **options,
            )
            _keep_largest_kernel[(N,)](
                dlogits,
                targets,
                limits,
                lists,
                counts,
                small,
                columns,
                values,
                lengths,
                V,
                most,
                dlogits.stride(0),
                LOG_FRACTION=math.log2(FRACTION),
                FRACTIONS=FRACTIONS,
                **options,
            )
    return columns, values, lengths


def segment_sums(
    out: Tensor, starts: Tensor, index: Tensor, values: Tensor, operand: Tensor, factor: Tensor | None, fresh: bool
) -> None:
    S, D = out.shape
    assert out.stride(1) == 1
    if operand.stride(1) != 1:
        operand = operand.contiguous()
    block = min(_SUM_BLOCK, triton.next_power_of_2(D))
    if S:
        with torch.cuda.device_of(out):
            _segment_sums_kernel[(S, triton.cdiv(D, block))](
                out,
                starts,
                index,
                values,
                operand,
                values if factor is None else factor,
                D,
                out.stride(0),
                operand.stride(0),
                HAS_FACTOR=factor is not None,
                FRESH=fresh,
                BLOCK_E=_SUM_ROWS,
                BLOCK_D=block,
            )
