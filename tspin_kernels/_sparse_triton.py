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

# Of `keep_largest`: programs; lists of each, one for a thread; how long a list is; columns that a thread takes in one turn.
_KEEP_PROGRAMS, _LISTS, _LISTED, _COLUMNS = 1056, 256, 16, 8
# Rows and columns of the operand of `segment_sums` that a program reads at once.
_SUM_ROWS, _SUM_BLOCK = 4, 1024
# Bytes that `keep_largest` needs beside its results.
SCRATCH = _KEEP_PROGRAMS * _LISTS * _LISTED * 8


@triton.jit
def _list(small, count, values, offs_v, lowest, lists_ptr, LISTS: tl.constexpr, LISTED: tl.constexpr):
    # A column for each list: small ones are summed up, others written down, bits of column and value.
    values = values.to(tl.float32)
    share = tl.abs(values)
    # A nan is not small.
    is_small = share <= lowest
    entry = (offs_v.to(tl.int64) << 32) | values.to(tl.uint32, bitcast=True).to(tl.int64)
    tl.store(lists_ptr + count * LISTS, entry, mask=(count < LISTED) & ~is_small)
    return small + tl.where(is_small, share, 0.0), count + tl.where(is_small, 0, 1)


@triton.jit(do_not_specialize=["N", "V", "most"])
def _keep_largest_kernel(
    dlogits_ptr,  # [N, V'] in any dtype
    target_ptr,  # [N] int64
    limit_ptr,  # [N] float32
    lists_ptr,  # [programs, LISTED, LISTS] int64, scratch
    columns_ptr,  # [N, most] int32, out
    values_ptr,  # [N, most] float32, out
    lengths_ptr,  # [N] int32, out
    N,
    V,
    most,
    stride_n,
    LOG_FRACTION: tl.constexpr,
    FRACTIONS: tl.constexpr,
    LISTS: tl.constexpr,
    LISTED: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    # One program owns every so many rows and reads each once: what the lowest threshold leaves out it sums up, the rest it lists,
    # each thread for itself. The best threshold is then found in the lists alone.
    first = tl.program_id(0).to(tl.int64)
    offs_list = tl.arange(0, LISTS)
    lists_ptr += first * (LISTS * LISTED) + offs_list
    for row in range(first, N, tl.num_programs(0)):
        row_ptr = dlogits_ptr + row * stride_n
        target = tl.load(target_ptr + row)
        limit = tl.load(limit_ptr + row)
        lowest = limit * tl.exp2(LOG_FRACTION * (FRACTIONS - 1.0))
        small = tl.zeros([LISTS], tl.float32)
        count = tl.zeros([LISTS], tl.int32)
        whole = V // (LISTS * COLUMNS) * (LISTS * COLUMNS)
        for start in range(0, whole, LISTS * COLUMNS):
            for c in tl.static_range(COLUMNS):
                offs_v = start + c * LISTS + offs_list
                values = tl.load(row_ptr + offs_v)
                small, count = _list(small, count, values, offs_v, lowest, lists_ptr, LISTS, LISTED)
        for start in range(whole, V, LISTS):
            offs_v = start + offs_list
            values = tl.load(row_ptr + offs_v, mask=offs_v < V, other=0.0)
            small, count = _list(small, count, values, offs_v, lowest, lists_ptr, LISTS, LISTED)
        all_small = tl.sum(small, axis=0)

        longest = tl.max(count, axis=0)

        # Whatever thread reads a list: it is written, and will be read before the next row's.
        tl.debug_barrier()
        # Written so that a nan is dense.
        tl.store(lengths_ptr + row, -1)
        if tl.where(all_small <= limit, longest, LISTED + 1) <= LISTED:
            low, high = 0, FRACTIONS - 1
            while low < high:
                middle = (low + high) // 2
                threshold = limit * tl.exp2(LOG_FRACTION * middle)
                left_out = tl.zeros([LISTS], tl.float32)
                for place in range(0, longest):
                    entry = tl.load(lists_ptr + place * LISTS, mask=place < count, other=0)
                    share = tl.abs(entry.to(tl.int32).to(tl.float32, bitcast=True))
                    left_out += tl.where(share <= threshold, share, 0.0)
                fits = all_small + tl.sum(left_out, axis=0) <= limit
                low = tl.where(fits, low, middle + 1)
                high = tl.where(fits, middle, high)

            threshold = limit * tl.exp2(LOG_FRACTION * low)
            kept = tl.zeros([LISTS], tl.int32)
            is_listed = tl.zeros([LISTS], tl.int32)
            for place in range(0, longest):
                in_list = place < count
                entry = tl.load(lists_ptr + place * LISTS, mask=in_list, other=0)
                share = tl.abs(entry.to(tl.int32).to(tl.float32, bitcast=True))
                is_target = in_list & ((entry >> 32) == target)
                is_listed += tl.where(is_target, 1, 0)
                kept += tl.where(is_target | (in_list & ~(share <= threshold)), 1, 0)
            # A target that is too small for the lists comes last.
            is_added = tl.where((target >= 0) & (target < V), 1 - tl.sum(is_listed, axis=0), 0)
            total = tl.sum(kept, axis=0) + is_added
            if total <= most:
                tl.store(lengths_ptr + row, total)
                into = row * most + tl.cumsum(kept, axis=0) - kept
                for place in range(0, longest):
                    in_list = place < count
                    entry = tl.load(lists_ptr + place * LISTS, mask=in_list, other=0)
                    value = entry.to(tl.int32).to(tl.float32, bitcast=True)
                    is_kept = in_list & (((entry >> 32) == target) | ~(tl.abs(value) <= threshold))
                    tl.store(columns_ptr + into, (entry >> 32).to(tl.int32), mask=is_kept)
                    tl.store(values_ptr + into, value, mask=is_kept)
                    into += tl.where(is_kept, 1, 0)
                last = row * most + total - 1
                value = tl.load(row_ptr + target, mask=is_added > 0, other=0.0).to(tl.float32)
                tl.store(columns_ptr + last, target.to(tl.int32), mask=is_added > 0)
                tl.store(values_ptr + last, value, mask=is_added > 0)
        tl.debug_barrier()


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
    programs = min(N, _KEEP_PROGRAMS)
    lists = torch.empty(programs, _LISTED, _LISTS, dtype=torch.int64, device=dlogits.device)
    if N:
        with torch.cuda.device_of(dlogits):
            _keep_largest_kernel[(programs,)](
                dlogits,
                targets,
                limits,
                lists,
                columns,
                values,
                lengths,
                N,
                V,
                most,
                dlogits.stride(0),
                LOG_FRACTION=math.log2(FRACTION),
                FRACTIONS=FRACTIONS,
                LISTS=_LISTS,
                LISTED=_LISTED,
                COLUMNS=_COLUMNS,
                num_warps=_LISTS // 32,
            )
    return columns, values, lengths


def segment_sums(
    out: Tensor, starts: Tensor, index: Tensor, values: Tensor, operand: Tensor, factor: Tensor | None, fresh: bool
) -> None:
    S, D = out.shape
    assert out.stride(1) == operand.stride(1) == 1
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
