"""What `linear_logprobs` means, in plain PyTorch: it stores the logits and leaves the gradient to autograd."""

import torch
import torch.nn.functional as F
from torch import Tensor

from tspin_kernels._inputs import (
    LogitTransform,
    TokenLogprobs,
    accumulate_dtype,
    check_inputs,
    check_targets_in_range,
    compute_dtype,
)


def linear_logprobs_reference(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int | None = -100,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    entropy: str | bool = "grad",
    memory_budget: int | None = None,
    backend: str = "reference",
    logits_dtype: torch.dtype | None = None,
) -> TokenLogprobs:
    """Plain PyTorch with the signature of `linear_logprobs`, which documents it. `memory_budget` and `backend` have no effect."""
    transform = LogitTransform(logit_scale, softcap, temperature)
    check_inputs(hidden, weight, targets, bias, transform, entropy)
    if targets.shape != hidden.shape[:-1]:
        raise ValueError(f"targets: want {list(hidden.shape[:-1])}, one per row of hidden, got {list(targets.shape)}")
    keep = torch.ones_like(targets, dtype=torch.bool) if ignore_index is None else targets != ignore_index
    check_targets_in_range(targets[keep], weight.shape[0])
    operand = compute_dtype(hidden, weight)
    with torch.autocast(hidden.device.type, enabled=False):
        # Rounded to the dtype of the operands first, so that logits_dtype is about the product alone.
        product = [t.to(operand).to(logits_dtype or operand) for t in (hidden[keep], weight)]
        logits = F.linear(*product)
    logits = logits.to(accumulate_dtype(logits.dtype))
    logits = (logits if bias is None else logits + bias) * logit_scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits / temperature
    log_softmax = logits.log_softmax(-1)

    def scatter(values: Tensor) -> Tensor:
        return values.new_zeros(targets.shape).masked_scatter(keep, values)

    def row_entropy() -> Tensor:
        p = log_softmax.exp()
        return -(p * log_softmax.masked_fill(log_softmax == -torch.inf, 0)).sum(-1)

    logprobs = scatter(log_softmax.gather(-1, targets[keep].unsqueeze(-1)).squeeze(-1))
    logsumexp = scatter(logits.logsumexp(-1))
    if entropy is False:
        return TokenLogprobs(logprobs, None, logsumexp)
    if entropy == "value":
        with torch.no_grad():
            return TokenLogprobs(logprobs, scatter(row_entropy()), logsumexp)
    return TokenLogprobs(logprobs, scatter(row_entropy()), logsumexp)
