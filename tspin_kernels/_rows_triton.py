"""What happens between the matrix products, as Triton kernels that read each logit once: the twin of `_rows_torch`,
where the formulas are derived and the arguments documented.

`TRITON_INTERPRET=1`, set before this module is imported, runs the kernels on the CPU.
"""

# Triton's own annotations describe a kernel's body, not its launch.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportReturnType=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from tspin_kernels._inputs import LogitTransform

_MAX_BLOCK_V = 4096
_LOWEST = tl.constexpr(torch.finfo(torch.float32).min)
# Any below the logarithm of the smallest float32.
_LOG_ZERO = tl.constexpr(-200.0)
# Of `scale_`: enough programs to fill any GPU, few enough to cost nothing when they have nothing to do.
_SCALE_BLOCK, _SCALE_PROGRAMS = 2048, 2048
_MOVE_OPTIONS = {"BLOCK": 8192, "num_warps": 8}


@triton.jit
def _exp(x):
    # Of exp2, which flushes what is denormal to zero, Triton makes one instruction where exp takes four.
    return tl.exp2(x * 1.4426950408889634)


@triton.jit
def _finite(m):
    # A reference for logits of maximum m: where all are -inf, any number will do.
    return tl.where(m == float("-inf"), 0.0, m)


@triton.jit
def _move(m, s, u, reference):
    # The sum of exp(z - m) (z - m), moved from m to another reference.
    return _exp(m - reference) * (u + tl.where(m == float("-inf"), 0.0, m - reference) * s)


@triton.jit
def _tanh(x):
    # Near zero the difference of two numbers near one would have lost its digits; the polynomial's error is 1e-8 there.
    y = x * x
    small = x * (1 + y * (-1 / 3 + y * (2 / 15 + y * (-17 / 315 + y * (62 / 2835)))))
    return tl.where(y < 0.0625, small, 1.0 - 2.0 / (_exp(2.0 * x) + 1.0))


@triton.jit
def _logits_tile(
    products,  # of one row, in the buffer's dtype
    bias_ptr,  # [V'], read when HAS_BIAS
    offs_v,
    in_v,
    logit_scale,
    softcap,
    temperature,
    HAS_BIAS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
):
    # Logits in float32 and the slope of their softcap. Products past the vocabulary give any number.
    z = products.to(tl.float32)
    if HAS_BIAS:
        z += tl.load(bias_ptr + offs_v, mask=in_v, other=0.0).to(tl.float32)
    # Only constants are divided: a division of each logit would take as long as its exponential.
    slope = 1.0
    if HAS_SOFTCAP:
        tanh = _tanh(z * (logit_scale / softcap))
        z = tanh * (softcap / temperature)
        slope = 1.0 - tanh * tanh
    elif HAS_SCALE:
        z = z * (logit_scale / temperature)
    return z, slope


@triton.jit
def _row_stats_kernel(
    logits_ptr,  # [N, V'] in the buffer's dtype
    bias_ptr,  # [V']
    target_ptr,  # [N] int64, counted from this block's first column
    m_ptr,  # [N] float32, running maximum, in/out
    s_ptr,  # [N] float32, running sum of exp(z - m), in/out
    u_ptr,  # [N] float32, running sum of exp(z - m) (z - m), in/out
    target_logit_ptr,  # [N] float32, written where the target is in this block
    V,
    stride_logits_n,
    logit_scale,
    softcap,
    temperature,
    HAS_BIAS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    WITH_ENTROPY: tl.constexpr,
    BLOCK_V: tl.constexpr,
    LANE: tl.constexpr,
):
    # One program owns one row and reads each of its logits once. Every LANE columns have sums of their own, those of one
    # thread: threads meet at the end of the row alone.
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * stride_logits_n
    columns = tl.arange(0, BLOCK_V // LANE)[:, None] * LANE + tl.arange(0, LANE)[None, :]
    m = tl.full([BLOCK_V // LANE], float("-inf"), tl.float32)
    s = tl.zeros([BLOCK_V // LANE], tl.float32)
    u = tl.zeros([BLOCK_V // LANE], tl.float32)

    for start in range(0, V, BLOCK_V):
        offs_v = start + columns
        in_v = offs_v < V
        products = tl.load(row_ptr + offs_v, mask=in_v, other=float("-inf"))
        z, _ = _logits_tile(
            products, bias_ptr, offs_v, in_v, logit_scale, softcap, temperature, HAS_BIAS, HAS_SCALE, HAS_SOFTCAP
        )
        if HAS_SCALE:
            # Columns past the vocabulary are no longer sure to be -inf.
            z = tl.where(in_v, z, float("-inf"))
        m_new = tl.maximum(m, tl.max(z, axis=1))
        reference = _finite(m_new)
        shifted = z - reference[:, None]
        weights = _exp(shifted)
        if WITH_ENTROPY:
            # The finite floor makes exp(-inf) * -inf a zero; nan is in the weight already.
            u = _move(m, s, u, reference) + tl.sum(weights * tl.maximum(shifted, _LOWEST), axis=1)
        s = s * _exp(m - reference) + tl.sum(weights, axis=1)
        m = m_new

    m_old = tl.load(m_ptr + row)
    s_old = tl.load(s_ptr + row)
    m_row = tl.maximum(m_old, tl.max(m, axis=0))
    reference = _finite(m_row)
    tl.store(m_ptr + row, m_row)
    tl.store(s_ptr + row, s_old * _exp(m_old - reference) + tl.sum(s * _exp(m - reference), axis=0))
    if WITH_ENTROPY:
        u_old = _move(m_old, s_old, tl.load(u_ptr + row), reference)
        tl.store(u_ptr + row, u_old + tl.sum(_move(m, s, u, reference), axis=0))
    target = tl.load(target_ptr + row)
    hit = (target >= 0) & (target < V)
    products = tl.load(row_ptr + target, mask=hit, other=0.0)
    z, _ = _logits_tile(
        products, bias_ptr, target, hit, logit_scale, softcap, temperature, HAS_BIAS, HAS_SCALE, HAS_SOFTCAP
    )
    tl.store(target_logit_ptr + row, z, mask=hit)


@triton.jit
def _dlogits_kernel(
    logits_ptr,  # [N, V'] in the buffer's dtype
    dlogits_ptr,  # [N, V'] in the dtype of the products, out; may be the same memory
    bias_ptr,  # [V']
    target_ptr,  # [N] int64, counted from this block's first column
    m_ptr,  # [N] float32
    log_s_ptr,  # [N] float32
    entropy_ptr,  # [N] float32, read when HAS_H
    g_ptr,  # [N] float32, upstream of the log-prob
    h_ptr,  # [N] float32, upstream of the entropy
    q_ptr,  # [N] float32, upstream of the logsumexp
    V,
    stride_logits_n,
    stride_dlogits_n,
    logit_scale,
    softcap,
    temperature,
    HAS_BIAS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_G: tl.constexpr,
    HAS_H: tl.constexpr,
    HAS_Q: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    # One program owns BLOCK_V columns of one row; programs follow each other along the rows.
    blocks = tl.cdiv(V, BLOCK_V)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    start = tl.program_id(0) % blocks * BLOCK_V
    row_ptr = logits_ptr + row * stride_logits_n
    m = tl.load(m_ptr + row)
    log_s = tl.load(log_s_ptr + row)
    scale = logit_scale / temperature
    base = 0.0
    if HAS_Q:
        base += scale * tl.load(q_ptr + row)
    if HAS_G:
        g = scale * tl.load(g_ptr + row)
        base -= g
        target = tl.load(target_ptr + row)
    if HAS_H:
        h = scale * tl.load(h_ptr + row)
        entropy = tl.load(entropy_ptr + row)

    offs_v = start + tl.arange(0, BLOCK_V)
    in_v = offs_v < V
    products = tl.load(row_ptr + offs_v, mask=in_v, other=0.0)
    z, slope = _logits_tile(
        products, bias_ptr, offs_v, in_v, logit_scale, softcap, temperature, HAS_BIAS, HAS_SCALE, HAS_SOFTCAP
    )
    log_p = (z - m) - log_s
    factor = base
    if HAS_H:
        # Where p is zero log_p may be infinite, and their product nan.
        factor = base - h * (tl.maximum(log_p, _LOG_ZERO) + entropy)
    dz = _exp(log_p) * factor
    if HAS_G:  # noqa: SIM102
        # A branch, since few programs hold the target.
        if (target >= start) & (target < start + BLOCK_V):
            dz += tl.where(offs_v == target, g, 0.0)
    tl.store(dlogits_ptr + row * stride_dlogits_n + offs_v, dz * slope, mask=in_v)


@triton.jit
def _scale_kernel(
    values_ptr,  # [size], in/out
    factor_ptr,  # []
    size,
    BLOCK: tl.constexpr,
):
    # One program owns every so many blocks of values, and leaves them alone where the factor is one.
    factor = tl.load(factor_ptr)
    if factor != 1.0:
        first = tl.program_id(0).to(tl.int64) * BLOCK
        for start in range(first, size, tl.num_programs(0) * BLOCK):
            offs = start + tl.arange(0, BLOCK)
            values = tl.load(values_ptr + offs, mask=offs < size, other=0.0).to(tl.float32)
            tl.store(values_ptr + offs, values * factor, mask=offs < size)


@triton.jit
def _move_rows_kernel(
    store_ptr,  # [N, V'] in any dtype, in/out
    order_ptr,  # [n] int64
    V,
    stride_store_n,
    BLOCK: tl.constexpr,
):
    # One program owns one row, and leaves it alone where it stays.
    row = tl.program_id(0).to(tl.int64)
    origin = tl.load(order_ptr + row)
    if origin != row:
        for start in range(0, V, BLOCK):
            offs_v = start + tl.arange(0, BLOCK)
            values = tl.load(store_ptr + origin * stride_store_n + offs_v, mask=offs_v < V)
            tl.store(store_ptr + row * stride_store_n + offs_v, values, mask=offs_v < V)


def _launch_options(logits: Tensor) -> dict[str, int]:
    block_v = min(_MAX_BLOCK_V, max(128, triton.next_power_of_2(logits.shape[1])))
    # A thread takes 32 bytes at once; with 64, some cases spill.
    return {"BLOCK_V": block_v, "num_warps": max(1, block_v * logits.element_size() // 1024)}


def row_stats_(
    logits: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    m: Tensor,
    s: Tensor,
    u: Tensor | None,
    target_logit: Tensor,
    transform: LogitTransform,
) -> None:
    N, V = logits.shape
    assert logits.stride(1) == 1
    with torch.cuda.device_of(logits):
        _row_stats_kernel[(N,)](
            logits,
            logits if bias is None else bias,
            targets,
            m,
            s,
            s if u is None else u,
            target_logit,
            V,
            logits.stride(0),
            transform.logit_scale,
            transform.softcap or 1.0,
            transform.temperature,
            HAS_BIAS=bias is not None,
            HAS_SCALE=not transform.is_identity,
            HAS_SOFTCAP=transform.softcap is not None,
            WITH_ENTROPY=u is not None,
            # Columns that a thread reads at once: 16 bytes.
            LANE=16 // logits.element_size(),
            **_launch_options(logits),
        )


def dlogits_(
    logits: Tensor,
    dlogits: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    m: Tensor,
    log_s: Tensor,
    entropy: Tensor | None,
    g: Tensor | None,
    h: Tensor | None,
    q: Tensor | None,
    transform: LogitTransform,
) -> None:
    N, V = logits.shape
    assert logits.stride(1) == dlogits.stride(1) == 1
    options = _launch_options(logits)
    with torch.cuda.device_of(logits):
        _dlogits_kernel[(N * triton.cdiv(V, options["BLOCK_V"]),)](
            logits,
            dlogits,
            logits if bias is None else bias,
            targets,
            m,
            log_s,
            m if entropy is None else entropy,
            m if g is None else g,
            m if h is None else h,
            m if q is None else q,
            V,
            logits.stride(0),
            dlogits.stride(0),
            transform.logit_scale,
            transform.softcap or 1.0,
            transform.temperature,
            HAS_BIAS=bias is not None,
            HAS_SCALE=not transform.is_identity,
            HAS_SOFTCAP=transform.softcap is not None,
            HAS_G=g is not None,
            HAS_H=h is not None,
            HAS_Q=q is not None,
            **options,
        )


def scale_(values: Tensor, factor: Tensor) -> Tensor:
    assert values.is_contiguous()
    programs = min(_SCALE_PROGRAMS, triton.cdiv(values.numel(), _SCALE_BLOCK))
    if programs:
        with torch.cuda.device_of(values):
            _scale_kernel[(programs,)](values, factor, values.numel(), BLOCK=_SCALE_BLOCK)
    return values


def move_rows_(store: Tensor, order: Tensor) -> None:
    assert store.stride(1) == 1
    if order.shape[0]:
        with torch.cuda.device_of(store):
            _move_rows_kernel[(order.shape[0],)](store, order, store.shape[1], store.stride(0), **_MOVE_OPTIONS)
