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


@triton.jit
def _logits_tile(
    row_ptr,  # the products of one row
    bias_ptr,  # [V'], read when HAS_BIAS
    offs_v,
    in_v,
    logit_scale,
    softcap,
    temperature,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
):
    # Logits in float32 and their slope, d logit / d product. Columns past the vocabulary are -inf, last of all.
    z = tl.load(row_ptr + offs_v, mask=in_v, other=0.0).to(tl.float32)
    if HAS_BIAS:
        z += tl.load(bias_ptr + offs_v, mask=in_v, other=0.0).to(tl.float32)
    z = z * logit_scale
    slope = logit_scale / temperature
    if HAS_SOFTCAP:
        tanh = 1.0 - 2.0 / (tl.exp(2.0 * (z / softcap)) + 1.0)
        z = softcap * tanh
        slope = slope * (1.0 - tanh * tanh)
    z = z / temperature
    return tl.where(in_v, z, float("-inf")), slope


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
    HAS_SOFTCAP: tl.constexpr,
    WITH_ENTROPY: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    # One program owns one row and reads each of its logits once.
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * stride_logits_n
    m = tl.load(m_ptr + row)
    s = tl.load(s_ptr + row)
    u = 0.0
    if WITH_ENTROPY:
        u = tl.load(u_ptr + row)

    for start in range(0, V, BLOCK_V):
        offs_v = start + tl.arange(0, BLOCK_V)
        z, _ = _logits_tile(
            row_ptr, bias_ptr, offs_v, offs_v < V, logit_scale, softcap, temperature, HAS_BIAS, HAS_SOFTCAP
        )
        m_new = tl.maximum(m, tl.max(z, axis=0))
        # Rows of -inf alone so far: any finite reference will do.
        reference = tl.where(m_new == float("-inf"), 0.0, m_new)
        decay = tl.exp(m - reference)
        weights = tl.exp(z - reference)
        if WITH_ENTROPY:
            moved = tl.where(m == float("-inf"), 0.0, m - reference)
            terms = tl.where(z == float("-inf"), 0.0, weights * (z - reference))
            u = decay * (u + moved * s) + tl.sum(terms, axis=0)
        s = s * decay + tl.sum(weights, axis=0)
        m = m_new

    tl.store(m_ptr + row, m)
    tl.store(s_ptr + row, s)
    if WITH_ENTROPY:
        tl.store(u_ptr + row, u)
    target = tl.load(target_ptr + row)
    hit = (target >= 0) & (target < V)
    z, _ = _logits_tile(row_ptr, bias_ptr, target, hit, logit_scale, softcap, temperature, HAS_BIAS, HAS_SOFTCAP)
    tl.store(target_logit_ptr + row, z, mask=hit)


@triton.jit
def _dlogits_kernel(
    logits_ptr,  # [N, V'] in the buffer's dtype: products in, their gradient out
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
    logit_scale,
    softcap,
    temperature,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_G: tl.constexpr,
    HAS_H: tl.constexpr,
    HAS_Q: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    # One program owns BLOCK_V columns of one row.
    row = tl.program_id(0).to(tl.int64)
    offs_v = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    in_v = offs_v < V
    row_ptr = logits_ptr + row * stride_logits_n
    z, slope = _logits_tile(row_ptr, bias_ptr, offs_v, in_v, logit_scale, softcap, temperature, HAS_BIAS, HAS_SOFTCAP)

    log_p = (z - tl.load(m_ptr + row)) - tl.load(log_s_ptr + row)
    p = tl.exp(log_p)
    factor = tl.zeros([BLOCK_V], tl.float32)
    if HAS_Q:
        factor += tl.load(q_ptr + row)
    if HAS_G:
        factor -= tl.load(g_ptr + row)
    if HAS_H:
        factor -= tl.load(h_ptr + row) * (log_p + tl.load(entropy_ptr + row))
    # p = 0 may meet an infinite factor, whose product would be nan.
    dz = tl.where(p == 0.0, 0.0, p * factor)
    if HAS_G:
        dz += tl.where(offs_v == tl.load(target_ptr + row), tl.load(g_ptr + row), 0.0)
    tl.store(row_ptr + offs_v, dz * slope, mask=in_v)


def _launch_options(logits: Tensor) -> dict[str, int]:
    block_v = min(_MAX_BLOCK_V, max(128, triton.next_power_of_2(logits.shape[1])))
    return {"BLOCK_V": block_v, "num_warps": max(1, min(8, block_v // 256))}


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
            HAS_SOFTCAP=transform.softcap is not None,
            WITH_ENTROPY=u is not None,
            **_launch_options(logits),
        )


def dlogits_(
    logits: Tensor,
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
    assert logits.stride(1) == 1
    options = _launch_options(logits)
    with torch.cuda.device_of(logits):
        _dlogits_kernel[(N, triton.cdiv(V, options["BLOCK_V"]))](
            logits,
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
            transform.logit_scale,
            transform.softcap or 1.0,
            transform.temperature,
            HAS_BIAS=bias is not None,
            HAS_SOFTCAP=transform.softcap is not None,
            HAS_G=g is not None,
            HAS_H=h is not None,
            HAS_Q=q is not None,
            **options,
        )
