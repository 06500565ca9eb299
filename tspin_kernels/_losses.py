"""The self-play losses as pure functions of sequence log-probs: the only copy of their maths.

With u = logp(real) - logp(synthetic) and v = logp(synthetic) - logp(proto), T-SPIN (arXiv 2601.08198, eq. 7) is
`l(alpha u) + beta l(alpha v)`: the current advantage and the historical one. l is decreasing: logistic
`-log sigmoid(z)` or exponential `exp(-z)`. All log-probs are in nats.
"""

import torch.nn.functional as F
from torch import Tensor


def _surrogate(z: Tensor, loss_type: str) -> Tensor:
    if loss_type == "logistic":
        return F.softplus(-z)
    if loss_type == "exponential":
        return (-z).exp()
    raise ValueError(f"loss_type: want 'logistic' or 'exponential', got {loss_type!r}")


def tspin_loss(
    real: Tensor,
    synthetic: Tensor,
    proto: Tensor | None = None,
    *,
    alpha: float = 1.0,
    beta: float = 0.1,
    loss_type: str = "logistic",
) -> Tensor:
    """T-SPIN loss of each triplet (arXiv 2601.08198, eq. 7).

    Args:
        real, synthetic, proto: [B] log-probs of the annotated response, of the one sampled from the last policy and of
            the one sampled from the initial policy, nats. Differentiable. `proto` may be None at beta=0.
        alpha: scale of the margins, 1/nats.
        beta: weight of the historical advantage; 0 gives T-SPIN without history.
        loss_type: "logistic" or "exponential".

    Returns: [B] losses.
    """
    current = _surrogate(alpha * (real - synthetic), loss_type)
    # Left out at beta = 0, where an infinite margin would give 0 * inf.
    if beta == 0:
        return current
    if proto is None:
        raise ValueError(f"proto: want log-probs [B] because beta is {beta}, got None; pass them, or beta=0")
    return current + beta * _surrogate(alpha * (synthetic - proto), loss_type)


def tspin_ref_loss(
    real: Tensor,
    synthetic: Tensor,
    proto: Tensor | None,
    ref_real: Tensor,
    ref_synthetic: Tensor,
    ref_proto: Tensor | None,
    *,
    alpha: float = 1.0,
    beta: float = 0.1,
    loss_type: str = "logistic",
) -> Tensor:
    """T-SPIN with a reference model (the paper's ablation, eq. 9): every log-prob is replaced by `logp - ref`.

    All [B], nats; the rest as in `tspin_loss`.
    """
    if beta != 0 and (proto is None or ref_proto is None):
        raise ValueError(f"proto, ref_proto: want log-probs [B] because beta is {beta}, got None; pass both, or beta=0")
    return tspin_loss(
        real - ref_real,
        synthetic - ref_synthetic,
        None if proto is None or ref_proto is None else proto - ref_proto,
        alpha=alpha,
        beta=beta,
        loss_type=loss_type,
    )


def spin_loss(
    real: Tensor,
    synthetic: Tensor,
    ref_real: Tensor,
    ref_synthetic: Tensor,
    *,
    lam: float = 0.1,
    loss_type: str = "logistic",
) -> Tensor:
    """SPIN loss of each pair (arXiv 2401.01335): `l(lam * [(real - ref_real) - (synthetic - ref_synthetic)])`. All [B], nats."""
    return _surrogate(lam * ((real - ref_real) - (synthetic - ref_synthetic)), loss_type)


def sft_loss(real: Tensor) -> Tensor:
    """Negative log-likelihood of each annotated response: `-real`. [B], nats."""
    return -real
