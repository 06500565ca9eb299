"""What filtering keeps of the rows of a gradient, and sums over it, as Triton kernels: the twin of `_sparse_torch`, where the
arguments are documented."""

# Triton's own annotations describe a kernel's body, not its launch.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportReturnType=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from tspin_kernels._sparse_torch import FRACTION

# Columns of `keep_largest`, and rows and columns of the operand of `segment_sums`, that a program reads at once.
_KEEP_BLOCK, _SUM_ROWS, _SUM_BLOCK = 1024, 4, 1024


@triton.jit
def _left_out(left_out, share, threshold):
    return left_out + tl.sum(tl.where(share <= threshold, share, 0.0), axis=1)


@triton.jit
def _keep_largest_kernel(
    dlogits_ptr,  # [N, V'] in any dtype
    target_ptr,  # [N] int64
    limit_ptr,  # [N] float32
    columns_ptr,  # [N, most] int32, out
    values_ptr,  # [N, most] float32, out
    lengths_ptr,  # [N] int32, out
    V,
    most,
    stride_n,
    FRACTION: tl.constexpr,
    BLOCK_V: tl.constexpr,
    LANE: tl.constexpr,
):
    # One program owns one row: it sums up what each of eight thresholds leaves out, then writes what stays above the best.
    row = tl.program_id(0).to(tl.int64)
    row_ptr = dlogits_ptr + row * stride_n
    limit = tl.load(limit_ptr + row)
    t0 = limit
    t1 = t0 * FRACTION
    t2 = t1 * FRACTION
    t3 = t2 * FRACTION
    t4 = t3 * FRACTION
    t5 = t4 * FRACTION
    t6 = t5 * FRACTION
    t7 = t6 * FRACTION
    s0 = tl.zeros([BLOCK_V // LANE], tl.float32)
    s1, s2, s3, s4, s5, s6, s7 = s0, s0, s0, s0, s0, s0, s0
    tile = tl.arange(0, BLOCK_V // LANE)[:, None] * LANE + tl.arange(0, LANE)[None, :]
    for start in range(0, V, BLOCK_V):
        share = tl.abs(tl.load(row_ptr + start + tile, mask=start + tile < V, other=0.0).to(tl.float32))
        s0 = _left_out(s0, share, t0)
        s1 = _left_out(s1, share, t1)
        s2 = _left_out(s2, share, t2)
        s3 = _left_out(s3, share, t3)
        s4 = _left_out(s4, share, t4)
        s5 = _left_out(s5, share, t5)
        s6 = _left_out(s6, share, t6)
        s7 = _left_out(s7, share, t7)
    # What leaves out nothing: where the limit or a sum is nan, it stays.
    threshold = 0.0
    threshold = tl.where(tl.sum(s7, axis=0) <= limit, t7, threshold)
    threshold = tl.where(tl.sum(s6, axis=0) <= limit, t6, threshold)
    threshold = tl.where(tl.sum(s5, axis=0) <= limit, t5, threshold)
    threshold = tl.where(tl.sum(s4, axis=0) <= limit, t4, threshold)
    threshold = tl.where(tl.sum(s3, axis=0) <= limit, t3, threshold)
    threshold = tl.where(tl.sum(s2, axis=0) <= limit, t2, threshold)
    threshold = tl.where(tl.sum(s1, axis=0) <= limit, t1, threshold)
    threshold = tl.where(tl.sum(s0, axis=0) <= limit, t0, threshold)

    target = tl.load(target_ptr + row)
    count = 0
    start = 0
    while (start < V) & (count <= most):
        offs_v = start + tl.arange(0, BLOCK_V)
        values = tl.load(row_ptr + offs_v, mask=offs_v < V, other=0.0).to(tl.float32)
        # A nan stays.
        is_kept = (offs_v < V) & ((tl.abs(values) > threshold) | (values != values) | (offs_v == target))
        found = tl.sum(is_kept.to(tl.int32), axis=0)
        if found > 0:
            place = count + tl.cumsum(is_kept.to(tl.int32), axis=0) - 1
            fits = is_kept & (place < most)
            tl.store(columns_ptr + row * most + place, offs_v, mask=fits)
            tl.store(values_ptr + row * most + place, values, mask=fits)
        count += found
        start += BLOCK_V
    tl.store(lengths_ptr + row, tl.where(count <= most, count, -1))


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
    with torch.cuda.device_of(dlogits):
        _keep_largest_kernel[(N,)](
            dlogits,
            targets,
            limits,
            columns,
            values,
            lengths,
            V,
            most,
            dlogits.stride(0),
            FRACTION=FRACTION,
            LANE=16 // dlogits.element_size(),
            BLOCK_V=_KEEP_BLOCK,
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
