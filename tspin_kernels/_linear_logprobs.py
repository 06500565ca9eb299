"""`linear_logprobs`: two registered ops, forward and backward, over the blockwise engine, and the public function.

Registered ops make it one node for torch.compile and let `torch.library.opcheck` examine it. The forward op returns the
statistics that the backward needs, and, under the `store` plan, the products, which the backward rewrites in place.
"""

import torch
from torch import Tensor

from tspin_kernels._blocks import Gradients, Head, RowStats, Upstream, compute_gradients, compute_stats, rows_module
from tspin_kernels._inputs import (
    LogitTransform,
    TokenLogprobs,
    accumulate_dtype,
    check_inputs,
    check_targets_in_range,
    compute_dtype,
)
from tspin_kernels._plan import DEFAULT_BUDGET, Blocks, plan_blocks
from tspin_kernels._reference import linear_logprobs_reference


def _head(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    constants: list[float],
    operand_dtype: torch.dtype,
    logits_dtype: torch.dtype,
    backend: str,
) -> Head:
    logit_scale, softcap, temperature = constants
    transform = LogitTransform(logit_scale, softcap if softcap > 0 else None, temperature)
    bias = None if bias is None else bias.contiguous()
    return Head(weight, bias, transform, operand_dtype, logits_dtype, rows_module(backend, hidden.device))


def _counted(targets: Tensor, ignore_index: int | None) -> Tensor | None:
    # Indices of the rows that count, None where all do and nothing needs to be gathered.
    if ignore_index is None:
        return None
    index = (targets != ignore_index).nonzero().squeeze(1)
    return None if index.shape[0] == targets.shape[0] else index


def _stores(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    operand_dtype: torch.dtype,
    logits_dtype: torch.dtype,
    memory_budget: int,
    in_place: bool,
    wanted: list[bool],
) -> bool:
    # Decided on all rows, ignored ones too, so that shapes never depend on data. A row-kernel module plays no part in it.
    if not any(wanted):
        return False
    head = Head(weight, bias, LogitTransform(), operand_dtype, logits_dtype, rows=torch)
    N = hidden.shape[0]
    total = head.sizes(N, hidden, gathered=False, dhidden=wanted[0], dweight=wanted[1]).total(N, head.V)
    return total + (0 if in_place else N * head.V * logits_dtype.itemsize) <= memory_budget


@torch.library.custom_op("tspin_kernels::linear_logprobs", mutates_args=())
def _forward_op(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    ignore_index: int | None,
    constants: list[float],
    operand_dtype: torch.dtype,
    logits_dtype: torch.dtype,
    with_entropy: bool,
    wanted: list[bool],
    memory_budget: int,
    in_place: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    head = _head(hidden, weight, bias, constants, operand_dtype, logits_dtype, backend)
    index = _counted(targets, ignore_index)
    counted = targets.contiguous() if index is None else targets[index]
    check_targets_in_range(counted, head.V)
    N = counted.shape[0]
    if _stores(hidden, weight, bias, operand_dtype, logits_dtype, memory_budget, in_place, wanted):
        products = hidden.new_empty(hidden.shape[0], head.V, dtype=head.logits_dtype)
        store, blocks = products[:N], Blocks(max(1, N), head.V)
        products[N:].zero_()
    else:
        products, store = hidden.new_empty(0, 0, dtype=head.logits_dtype), None
        # With a gradient, the blocks are those of the backward: a budget too small for it must fail here.
        sizes = head.sizes(N, hidden, gathered=index is not None, dhidden=wanted[0], dweight=wanted[1])
        blocks = plan_blocks(sizes, memory_budget)
    stats = compute_stats(head, hidden, index, counted, blocks, with_entropy, store)

    def scatter(values: Tensor | None) -> Tensor:
        if values is None:
            return stats.m.new_empty(0)
        return values if index is None else values.new_zeros(targets.shape).index_copy_(0, index, values)

    logsumexp = stats.m + stats.log_s
    return (
        scatter(stats.logprobs),
        scatter(stats.entropy),
        scatter(logsumexp),
        scatter(stats.m),
        scatter(stats.log_s),
        products,
    )


@_forward_op.register_fake
def _(
    hidden, weight, bias, targets, ignore_index, constants, operand_dtype, logits_dtype, with_entropy, wanted, *options
):
    row = hidden.new_empty(targets.shape, dtype=accumulate_dtype(operand_dtype))
    stores = _stores(hidden, weight, bias, operand_dtype, logits_dtype, *options[:2], wanted)
    products = hidden.new_empty((hidden.shape[0], weight.shape[0]) if stores else (0, 0), dtype=logits_dtype)
    entropy = torch.empty_like(row) if with_entropy else row.new_empty(0)
    return row, entropy, torch.empty_like(row), torch.empty_like(row), torch.empty_like(row), products


def _gradients(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    entropy: Tensor,
    m: Tensor,
    log_s: Tensor,
    products: Tensor,
    dlogprobs: Tensor | None,
    dentropy: Tensor | None,
    dlogsumexp: Tensor | None,
    ignore_index: int | None,
    constants: list[float],
    operand_dtype: torch.dtype,
    logits_dtype: torch.dtype,
    wanted: list[bool],
    memory_budget: int,
    in_place: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    head = _head(hidden, weight, bias, constants, operand_dtype, logits_dtype, backend)
    index = _counted(targets, ignore_index)

    def pick(values: Tensor | None) -> Tensor | None:
        return None if values is None else values.contiguous() if index is None else values[index]

    counted = targets.contiguous() if index is None else targets[index]
    N = counted.shape[0]
    stats = RowStats(pick(m), pick(log_s), m, pick(entropy) if dentropy is not None else None)
    upstream = Upstream(pick(dlogprobs), pick(dentropy), pick(dlogsumexp))
    dhidden = hidden.new_empty(N, hidden.shape[1]) if wanted[0] else None
    dweight = torch.empty_like(weight, memory_format=torch.contiguous_format) if wanted[1] else None
    dbias = hidden.new_empty(head.V, dtype=accumulate_dtype(operand_dtype)) if wanted[2] else None
    if N == 0 or all(gradient is None for gradient in upstream):
        for gradient in (dhidden, dweight, dbias):
            if gradient is not None:
                gradient.zero_()
    else:
        if products.numel() > 0:
            store = products[:N] if in_place else products[:N].clone()
            blocks = Blocks(N, head.V)
        else:
            store = None
            sizes = head.sizes(N, hidden, gathered=index is not None, dhidden=wanted[0], dweight=wanted[1])
            blocks = plan_blocks(sizes, memory_budget)
        grads = Gradients(dhidden, dweight, dbias)
        compute_gradients(head, hidden, index, counted, stats, upstream, blocks, grads, store=store)
    if dhidden is not None and index is not None:
        dhidden = torch.zeros_like(hidden, memory_format=torch.contiguous_format).index_copy_(0, index, dhidden)
    missing = hidden.new_empty(0)
    return (
        missing if dhidden is None else dhidden,
        weight.new_empty(0) if dweight is None else dweight,
        missing.clone() if dbias is None or bias is None else dbias.to(bias.dtype),
    )


def _fake_gradients(hidden, weight, bias, *rest):
    wanted = rest[-4]
    return (
        hidden.new_empty(hidden.shape if wanted[0] else 0),
        weight.new_empty(weight.shape if wanted[1] else 0),
        bias.new_empty(bias.shape) if wanted[2] else hidden.new_empty(0),
    )


# A compiled graph may not rewrite what its forward returned, so it takes the op that leaves the products alone.
_BACKWARD_OPS = {
    in_place: torch.library.custom_op(f"tspin_kernels::linear_logprobs_backward{suffix}", mutates_args=mutated)(
        _gradients
    )
    for in_place, suffix, mutated in ((False, "", ()), (True, "_", ("products",)))
}
for _op in _BACKWARD_OPS.values():
    _op.register_fake(_fake_gradients)


def _setup_context(ctx, inputs, output):
    hidden, weight, bias, targets, ignore_index, constants, *dtypes, _, wanted, memory_budget, in_place, backend = (
        inputs
    )
    _, entropy, _, m, log_s, products = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(m, log_s, products)
    ctx.save_for_backward(hidden, weight, bias, targets, entropy, m, log_s, products)
    ctx.constants = (ignore_index, constants, *dtypes, wanted, memory_budget, in_place, backend)


def _backward(ctx, dlogprobs, dentropy, dlogsumexp, *_):
    wanted = ctx.constants[4]
    if dlogprobs is None and dentropy is None and dlogsumexp is None:
        return (None,) * 13
    backward_op = _BACKWARD_OPS[ctx.constants[6]]
    dhidden, dweight, dbias = backward_op(*ctx.saved_tensors, dlogprobs, dentropy, dlogsumexp, *ctx.constants)
    return (
        dhidden if wanted[0] else None,
        dweight if wanted[1] else None,
        dbias if wanted[2] else None,
        *(None,) * 10,
    )


_forward_op.register_autograd(_backward, setup_context=_setup_context)


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

    Returns:
        TokenLogprobs(logprobs, entropy, logsumexp), each of the shape of `targets`, float32 (float64 for float64), nats, 0 where
        ignored. A row with nan in `hidden` is nan. Differentiable once: a second derivative raises. Under the store plan the
        backward runs once, and a second (`retain_graph=True`) raises.

    Raises:
        ValueError: wrong shapes, dtypes, devices or constants; a budget too small for one block (it names the least).
    """
    if backend == "reference":
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
    transform = LogitTransform(float(logit_scale), softcap, float(temperature))
    check_inputs(hidden, weight, targets, bias, transform, entropy)
    if targets.shape != hidden.shape[:-1]:
        raise ValueError(f"targets: want {list(hidden.shape[:-1])}, one per row of hidden, got {list(targets.shape)}")
    dtypes = product_dtypes(hidden, weight, logits_dtype, backend)
    grad = torch.is_grad_enabled()
    logprobs, row_entropy, logsumexp, *_ = _forward_op(
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        bias,
        targets.reshape(-1),
        ignore_index,
        [transform.logit_scale, softcap or 0.0, transform.temperature],
        *dtypes,
        entropy is not False,
        [
            grad and hidden.requires_grad,
            grad and weight.requires_grad,
            grad and bias is not None and bias.requires_grad,
        ],
        DEFAULT_BUDGET if memory_budget is None else memory_budget,
        not torch.compiler.is_compiling(),
        backend,
    )
    if entropy is False:
        return TokenLogprobs(logprobs.view(targets.shape), None, logsumexp.view(targets.shape))
    if entropy == "value":
        row_entropy = row_entropy.detach()
    return TokenLogprobs(logprobs.view(targets.shape), row_entropy.view(targets.shape), logsumexp.view(targets.shape))


def product_dtypes(hidden: Tensor, weight: Tensor, logits_dtype: torch.dtype | None, backend: str) -> list[torch.dtype]:
    """Dtypes of the operands of a product and of its result. Raises ValueError where a backend cannot."""
    operand = compute_dtype(hidden, weight)
    result = operand if logits_dtype is None else logits_dtype
    if result not in (operand, torch.float32) or operand == torch.float64 != result:
        raise ValueError(f"logits_dtype: want None, {operand} or torch.float32, got {logits_dtype}")
    if operand == torch.float64 and backend == "triton":
        raise ValueError(
            "hidden: want float16, bfloat16 or float32 with backend='triton', got float64; use backend='torch'"
        )
    return [operand, result]
