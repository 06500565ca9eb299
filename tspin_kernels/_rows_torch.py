"""What happens between the matrix products, in PyTorch, in place and tile by tile: the twin of `_rows_triton`.

Derivation, for one row with logits z, target y, running maximum m, s = sum exp(z - m), u = sum exp(z - m) (z - m):

    logsumexp = m + ln s        logp = (z_y - m) - ln s        H = ln s - u / s

The entropy is a sum of two terms of one sign, so it keeps its precision at any offset of the logits. With g, h, q the
upstream gradients of logp, H and logsumexp, and p = exp((z - m) - ln s),

    dz = g 1[y] + p (q - g - h (ln p + H))

m and ln s are kept apart: their sum loses digits that p needs. A logit of -inf has p = 0 and adds nothing.
"""

import torch
from torch import Tensor

from tspin_kernels._inputs import LogitTransform

# Elements of a tile: on a CPU it stays in the cache, on a GPU it keeps the launches few.
_TILE = {"cpu": 2**18}
_TILE_ELSEWHERE = 2**23
# Any below the logarithm of the smallest number.
_LOG_ZERO = {torch.float32: -200.0, torch.float64: -800.0}


def tiles(logits: Tensor):
    rows = max(1, _TILE.get(logits.device.type, _TILE_ELSEWHERE) // max(1, logits.shape[1]))
    return (slice(start, start + rows) for start in range(0, logits.shape[0], rows))


def _logits_tile(
    raw: Tensor, bias: Tensor | None, transform: LogitTransform, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """Logits of a tile [rows, V'] and the softcap's slope, None without one. May alias `raw`."""
    z = raw.to(dtype)
    if bias is not None:
        z = z + bias.to(dtype)
    if transform.softcap is not None:
        tanh = torch.tanh(z * (transform.logit_scale / transform.softcap))
        return tanh * (transform.softcap / transform.temperature), 1 - tanh * tanh
    scale = transform.logit_scale / transform.temperature
    return (z if scale == 1.0 else z * scale), None


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
    """Take one vocabulary block into the running statistics of its rows.

    Args:
        logits: [N, V'] products with the weight rows of this block. Not changed.
        bias: [V'] or None.
        targets: [N] int64, counted from the first column of this block; outside [0, V') where the target is elsewhere.
        m, s, u, target_logit: [N] float32, in and out; they start at -inf, 0, 0 and nan. u is None when no entropy is wanted.
    """
    width = logits.shape[1]
    for tile in tiles(logits):
        z, _ = _logits_tile(logits[tile], bias, transform, m.dtype)
        m_old, local = m[tile], targets[tile]
        hit = (local >= 0) & (local < width)
        picked = z.gather(1, local.clamp(0, width - 1).unsqueeze(1)).squeeze(1)
        target_logit[tile] = torch.where(hit, picked, target_logit[tile])

        m_new = torch.maximum(m_old, z.amax(1))
        # Rows of -inf alone so far: any finite reference will do.
        reference = m_new.masked_fill(m_new == -torch.inf, 0)
        decay = torch.exp(m_old - reference)
        shifted = torch.sub(z, reference.unsqueeze(1))
        weights = shifted.exp()
        if u is not None:
            moved = (m_old - reference).masked_fill(m_old == -torch.inf, 0)
            u[tile] = decay * (u[tile] + moved * s[tile])
        s[tile] = s[tile] * decay + weights.sum(1)
        if u is not None:
            # The finite floor makes exp(-inf) * -inf a zero and lets nan through.
            u[tile] += weights.mul_(shifted.clamp_(min=torch.finfo(m.dtype).min)).sum(1)
        m[tile] = m_new


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
    """Write the gradient of the loss in one block of products, rounded once.

    Args:
        logits: [N, V'] products. bias, targets, transform: as in `row_stats_`.
        dlogits: [N, V'] their gradient, out; may be the same tensor.
        m, log_s, entropy: [N] float32, final statistics of the whole rows; entropy only where h is given.
        g, h, q: [N] float32 upstream gradients of log-prob, entropy and logsumexp; None counts as zero.
    """
    width = logits.shape[1]
    for tile in tiles(logits):
        z, slope = _logits_tile(logits[tile], bias, transform, m.dtype)
        log_p = torch.sub(z, m[tile].unsqueeze(1)).sub_(log_s[tile].unsqueeze(1))
        base = torch.zeros_like(m[tile])
        if g is not None:
            base = base - g[tile]
        if q is not None:
            base = base + q[tile]
        if h is None:
            dz = log_p.exp_().mul_(base.unsqueeze(1))
        else:
            assert entropy is not None
            p = log_p.exp()
            # Where p is zero log_p may be infinite, and their product nan.
            factor = log_p.clamp_(min=_LOG_ZERO[m.dtype]).add_(entropy[tile].unsqueeze(1)).mul_(-h[tile].unsqueeze(1))
            dz = factor.add_(base.unsqueeze(1)).mul_(p)
        if g is not None:
            local = targets[tile]
            hit = (local >= 0) & (local < width)
            dz.scatter_add_(1, local.clamp(0, width - 1).unsqueeze(1), (g[tile] * hit).unsqueeze(1))
        if slope is not None:
            dz.mul_(slope)
        scale = transform.logit_scale / transform.temperature
        dlogits[tile] = dz if scale == 1.0 else dz.mul_(scale)


def scale_(values: Tensor, factor: Tensor) -> Tensor:
    """values times `factor` [], in place; a factor of one, the usual upstream gradient, costs nothing where it can be seen."""
    return values if values.device.type == "cpu" and factor.item() == 1 else values.mul_(factor)


def move_rows_(store: Tensor, order: Tensor) -> None:
    """Row i of `store` [N, V'] becomes what row order[i] is; those that differ read rows from n on.

    order: [n] int64.
    """
    (places,) = (order != torch.arange(order.shape[0], device=order.device)).nonzero(as_tuple=True)
    if places.shape[0]:
        # In steps, so that the copy in flight is small beside the store.
        step = -(-places.shape[0] // 16)
        for into, origin in zip(places.split(step), order[places].split(step), strict=True):
            store.index_copy_(0, into, store.index_select(0, origin))
