"""`linear_logprobs`: what it promises, and what it looks at before the registered ops (`_token_ops.py`) take over."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tspin_kernels._inputs import (
    LogitTransform,
    TokenLogprobs,
    check_budget,
    check_inputs,
    compute_dtype,
    refuse_lost_derivatives,
)
from tspin_kernels._plan import DEFAULT_BUDGET
from tspin_kernels._reference import linear_logprobs_reference
from tspin_kernels._token_ops import forward_op

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_forward_outside_graphs = torch.compiler.disable(
    forward_op, reason="linear_logprobs(grad_buffer=...) adds to a tensor in its backward, which a traced graph cannot"
)


def check_grad_buffer(grad_buffer: Tensor, weight: Tensor) -> None:
    """Raise ValueError unless the weight's gradient can be added into `grad_buffer`."""
    if not weight.requires_grad:
        raise ValueError("grad_buffer: want a weight that requires grad, got one that does not; leave grad_buffer out")
    if grad_buffer.shape != weight.shape:
        raise ValueError(f"grad_buffer: want the shape of weight, {list(weight.shape)}, got {list(grad_buffer.shape)}")
    if grad_buffer.dtype not in (torch.float32, weight.dtype):
        raise ValueError(f"grad_buffer: want torch.float32 or {weight.dtype} as weight, got {grad_buffer.dtype}")
    if grad_buffer.device != weight.device:
        raise ValueError(f"grad_buffer: want the device of weight, {weight.device}, got {grad_buffer.device}")
    if grad_buffer.requires_grad:
        raise ValueError("grad_buffer: want a tensor that does not require grad, got one that does; detach it")


def linear_logprobs(
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
    backend: str = "auto",
    logits_dtype: torch.dtype | None = None,
    grad_buffer: Tensor | None = None,
    process_group: "ProcessGroup | None" = None,
) -> TokenLogprobs:
    """Log-probability of each target, entropy and log-sum-exp of its distribution, without the [N, V] logits.

    The logits are `z = hidden weight^T + bias`, then `z * logit_scale`, `softcap * tanh(z / softcap)`, `/ temperature`.
    There is no shift: `targets[i]` is what `hidden[i]` predicts. Rows to ignore are dropped before any matrix product.

    Args:
        hidden: [..., D] float16, bfloat16, float32 or float64, of any strides. Differentiable.
        weight: [V, D], the output head, in the dtype of `hidden` (any floating dtype under autocast). Differentiable.
        targets: [...] int64 in [0, V), or `ignore_index`. Outside: ValueError on the CPU, nan on a GPU.
        bias: [V], may hold -inf for tokens that cannot be. Differentiable.
        ignore_index: rows to leave out; None means that all count, and saves a GPU the wait for their number.
        temperature, logit_scale, softcap: the logit transform; softcap None is off.
        entropy: "grad" differentiable, "value" not, False not computed (and None in the result).
        memory_budget: bytes for logits and accumulators, 2 GiB by default. Where the logits of the call fit they are kept for the
            backward (6NVD flops); else they are made again block by block (8NVD).
        backend: "triton", "torch" or "reference"; "auto" is triton on a GPU and torch on a CPU. A named one never falls back.
        logits_dtype: dtype in which products leave the matrix multiplication, by default the inputs' own; float32 costs time and
            takes the rounding of each logit away.
        grad_buffer: [V, D] float32 or in the dtype of `weight`. The backward adds the weight's gradient to it, and autograd gets
            none for `weight`: gradients of several calls are summed without a second [V, D] tensor. Under torch.compile it
            breaks the graph.
        process_group: the ranks over which the vocabulary is cut, in the order of its columns; `weight` and `bias` are this rank's
            rows [V_r, D] and [V_r], of which ranks may have different numbers. `hidden`, `targets` and the options are the same
            on every rank, and so are the results, bit by bit. Each rank goes on to the same loss; its weight and bias get
            their own gradient, `hidden` the whole one, summed over the ranks in float32 and held in it until then.

    Returns:
        TokenLogprobs(logprobs, entropy, logsumexp), each of the shape of `targets`, float32 (float64 for float64), nats, 0 where
        ignored. A row with nan in `hidden` is nan. Differentiable once and in reverse mode: a second derivative raises, as does
        forward mode. Under the store plan the backward runs once, and a second (`retain_graph=True`) raises.

    Raises:
        ValueError: wrong shapes, dtypes, devices or constants, or constants that require grad; a budget too small for one block
            (it names the least).
    """
    if backend == "reference":
        refuse_with_reference(grad_buffer=grad_buffer, process_group=process_group)
        return linear_logprobs_reference(
            hidden,
            weight,
            targets,
            bias,
            ignore_index=ignore_index,
            temperature=temperature,
            logit_scale=logit_scale,
            softcap=softcap,
            entropy=entropy,
            logits_dtype=logits_dtype,
        )
    constants = {"temperature": temperature, "logit_scale": logit_scale, "softcap": softcap}
    refuse_lost_derivatives(hidden, weight, bias, **constants)
    transform = LogitTransform(float(logit_scale), None if softcap is None else float(softcap), float(temperature))
    check_inputs(hidden, weight, targets, bias, transform, entropy, empty_weight=process_group is not None)
    if targets.shape != hidden.shape[:-1]:
        raise ValueError(f"targets: want {list(hidden.shape[:-1])}, one per row of hidden, got {list(targets.shape)}")
    if grad_buffer is not None:
        check_grad_buffer(grad_buffer, weight)
    dtypes = product_dtypes(hidden, weight, logits_dtype, backend)
    grad = torch.is_grad_enabled()
    forward = forward_op if grad_buffer is None else _forward_outside_graphs
    logprobs, row_entropy, logsumexp, *_ = forward(
        hidden.reshape(-1, hidden.shape[-1]),
        weight,  # pyright: ignore[reportCallIssue]
        bias,
        targets.reshape(-1),
        grad_buffer,
        ignore_index,
        [transform.logit_scale, transform.softcap or 0.0, transform.temperature],
        *dtypes,
        entropy is not False,
        [
            grad and hidden.requires_grad,
            grad and weight.requires_grad,
            grad and bias is not None and bias.requires_grad,
        ],
        check_budget(memory_budget, DEFAULT_BUDGET),
        not torch.compiler.is_compiling(),
        backend,
        "" if process_group is None else process_group.group_name,
    )
    if entropy is False:
        return TokenLogprobs(logprobs.view(targets.shape), None, logsumexp.view(targets.shape))
    if entropy == "value":
        row_entropy = row_entropy.detach()
    return TokenLogprobs(logprobs.view(targets.shape), row_entropy.view(targets.shape), logsumexp.view(targets.shape))


def product_dtypes(
    hidden: Tensor, weight: Tensor, logits_dtype: torch.dtype | None, backend: str
) -> tuple[torch.dtype, torch.dtype]:
    """Dtypes of the operands of a product and of its result. Raises ValueError where a backend cannot."""
    operand = compute_dtype(hidden, weight)
    result = operand if logits_dtype is None else logits_dtype
    if result not in (operand, torch.float32) or operand == torch.float64 != result:
        raise ValueError(f"logits_dtype: want None, {operand} or torch.float32, got {logits_dtype}")
    if operand == torch.float64 and backend == "triton":
        raise ValueError(
            "hidden: want float16, bfloat16 or float32 with backend='triton', got float64; use backend='torch'"
        )
    return operand, result


def refuse_with_reference(**options: object) -> None:
    """Raise ValueError for an option, given and not None, that the reference does not have."""
    for name, value in options.items():
        if value is not None:
            raise ValueError(f"{name}: want None with backend='reference', which is plain PyTorch; use another backend")
