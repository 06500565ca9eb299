"""The registered ops behind `linear_logprobs`, forward and backward, over the blockwise engine.

Registered ops make it one node for torch.compile and let `torch.library.opcheck` examine it. The forward op returns the
statistics that the backward needs, and, under the `store` plan, the products, which the backward rewrites in place.
"""

import torch
from torch import Tensor
from torch.distributed import distributed_c10d

from tspin_kernels._blocks import (
    Gradients,
    Head,
    RowStats,
    Upstream,
    compute_gradients,
    compute_stats,
    form_gradient,
    multiply_out,
    padded_columns,
    rows_module,
)
from tspin_kernels._inputs import LogitTransform, accumulate_dtype, check_targets_in_range
from tspin_kernels._plan import Blocks, plan_blocks
from tspin_kernels._shards import find_shard


def _head(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    constants: list[float],
    operand_dtype: torch.dtype,
    logits_dtype: torch.dtype,
    backend: str,
    group: str,
    shared: dict[str, int],
) -> Head:
    # `group` is the name of the process group that holds the vocabulary together, '' where there is none.
    logit_scale, softcap, temperature = constants
    transform = LogitTransform(logit_scale, softcap if softcap > 0 else None, temperature)
    bias = None if bias is None else bias.contiguous()
    shard = None
    if group:
        process_group = distributed_c10d._resolve_process_group(group)  # pyright: ignore
        shard = find_shard(process_group, weight.shape[0], hidden.device, shared)
    return Head(weight, bias, transform, operand_dtype, logits_dtype, rows_module(backend, hidden.device), shard)


def _gradient_dtypes(
    hidden: Tensor,
    weight: Tensor,
    grad_buffer: Tensor | None,
    operand_dtype: torch.dtype,
    wanted: list[bool],
    group: str,
) -> tuple[torch.dtype | None, torch.dtype | None]:
    # Of dhidden and dweight as they are written. What is then summed over ranks is not rounded before.
    dhidden = accumulate_dtype(operand_dtype) if group else hidden.dtype
    dweight = weight.dtype if grad_buffer is None else grad_buffer.dtype
    return dhidden if wanted[0] else None, dweight if wanted[1] else None


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
    gradient_dtypes: tuple[torch.dtype | None, torch.dtype | None],
) -> bool:
    # Decided on all rows, ignored ones too, so that shapes never depend on data. A row-kernel module plays no part in it.
    head = Head(weight, bias, LogitTransform(), operand_dtype, logits_dtype, rows=torch)
    N = hidden.shape[0]
    total = head.sizes(N, hidden, False, *gradient_dtypes).total(N, head.widest)
    return total + (0 if in_place else N * head.widest * logits_dtype.itemsize) <= memory_budget


@torch.library.custom_op("tspin_kernels::linear_logprobs", mutates_args=())
def forward_op(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    grad_buffer: Tensor | None,
    ignore_index: int | None,
    constants: list[float],
    operand_dtype: torch.dtype,
    logits_dtype: torch.dtype,
    with_entropy: bool,
    wanted: list[bool],
    memory_budget: int,
    in_place: bool,
    backend: str,
    group: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    shared = {"hidden": hidden.shape[0], "entropy": with_entropy, "hidden.requires_grad": wanted[0]}
    head = _head(hidden, weight, bias, constants, operand_dtype, logits_dtype, backend, group, shared)
    index = _counted(targets, ignore_index)
    counted = targets.contiguous() if index is None else targets[index]
    check_targets_in_range(counted, head.V if head.shard is None else head.shard.V)
    N = counted.shape[0]
    dtypes = _gradient_dtypes(hidden, weight, grad_buffer, operand_dtype, wanted, group)
    if any(wanted) and _stores(hidden, weight, bias, operand_dtype, logits_dtype, memory_budget, in_place, dtypes):
        products = hidden.new_empty(hidden.shape[0], head.padded(head.V), dtype=head.logits_dtype)
        store, blocks = products[:N], Blocks(max(1, N), head.V)
        products[N:].zero_()
    else:
        products, store = hidden.new_empty(0, 0, dtype=head.logits_dtype), None
        # With a gradient, the blocks are those of the backward: a budget too small for it must fail here.
        blocks = plan_blocks(head.sizes(N, hidden, index is not None, *dtypes), memory_budget)
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


@forward_op.register_fake
def _(
    hidden,
    weight,
    bias,
    targets,
    grad_buffer,
    ignore_index,
    constants,
    operand_dtype,
    logits_dtype,
    with_entropy,
    wanted,
    memory_budget,
    in_place,
    backend,
    group,
):
    row = hidden.new_empty(targets.shape, dtype=accumulate_dtype(operand_dtype))
    dtypes = _gradient_dtypes(hidden, weight, grad_buffer, operand_dtype, wanted, group)
    stores = any(wanted) and _stores(hidden, weight, bias, operand_dtype, logits_dtype, memory_budget, in_place, dtypes)
    width = padded_columns(weight.shape[0], operand_dtype)
    products = hidden.new_empty((hidden.shape[0], width) if stores else (0, 0), dtype=logits_dtype)
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
    grad_buffer: Tensor | None,
    ignore_index: int | None,
    constants: list[float],
    operand_dtype: torch.dtype,
    logits_dtype: torch.dtype,
    wanted: list[bool],
    memory_budget: int,
    in_place: bool,
    backend: str,
    group: str,
) -> tuple[Tensor, Tensor, Tensor]:
    head = _head(hidden, weight, bias, constants, operand_dtype, logits_dtype, backend, group, {})
    index = _counted(targets, ignore_index)

    def pick(values: Tensor | None) -> Tensor | None:
        return None if values is None else values.contiguous() if index is None else values[index]

    counted = targets.contiguous() if index is None else targets[index]
    N = counted.shape[0]
    stats = RowStats(pick(m), pick(log_s), m, pick(entropy) if dentropy is not None else None)  # pyright: ignore[reportArgumentType]
    upstream = Upstream(pick(dlogprobs), pick(dentropy), pick(dlogsumexp))
    dtypes = _gradient_dtypes(hidden, weight, grad_buffer, operand_dtype, wanted, group)
    dhidden = hidden.new_empty(N, hidden.shape[1], dtype=dtypes[0]) if wanted[0] else None
    new_weight_gradient = wanted[1] and grad_buffer is None
    dweight = torch.empty_like(weight, memory_format=torch.contiguous_format) if new_weight_gradient else grad_buffer
    dbias = hidden.new_zeros(head.V, dtype=accumulate_dtype(operand_dtype)) if wanted[2] else None
    if N == 0 or all(gradient is None for gradient in upstream):
        for gradient in (dhidden, dweight if new_weight_gradient else None):
            if gradient is not None:
                gradient.zero_()
    else:
        grads = Gradients(dhidden, dweight, dbias)
        if products.numel() > 0:
            store = products[:N] if in_place else products[:N].clone()
            dlogits, unscale = form_gradient(head, store, counted, stats, upstream, wanted[0] or wanted[1])
            multiply_out(head, hidden, index, dlogits, unscale, grads, fresh=new_weight_gradient)
        else:
            blocks = plan_blocks(head.sizes(N, hidden, index is not None, *dtypes), memory_budget)
            compute_gradients(head, hidden, index, counted, stats, upstream, blocks, grads, fresh=new_weight_gradient)
        if head.shard is not None and dhidden is not None:
            head.shard.sum_(dhidden)
    dhidden = None if dhidden is None else dhidden.to(hidden.dtype)
    if dhidden is not None and index is not None:
        dhidden = torch.zeros_like(hidden, memory_format=torch.contiguous_format).index_copy_(0, index, dhidden)
    missing = hidden.new_empty(0)
    return (
        missing if dhidden is None else dhidden,
        dweight if dweight is not None and new_weight_gradient else weight.new_empty(0),
        missing.clone() if dbias is None or bias is None else dbias.to(bias.dtype),
    )


def _fake_gradients(hidden, weight, bias, *rest):
    grad_buffer, wanted = rest[8], rest[13]
    return (
        hidden.new_empty(hidden.shape if wanted[0] else 0),
        weight.new_empty(weight.shape if wanted[1] and grad_buffer is None else 0),
        bias.new_empty(bias.shape) if wanted[2] else hidden.new_empty(0),
    )


# A compiled graph may not rewrite what its forward returned, so it takes the op that leaves the products alone.
_BACKWARD_OPS = {
    in_place: torch.library.custom_op(f"tspin_kernels::linear_logprobs_backward{suffix}", mutates_args=mutated)(
        _gradients
    )
    for in_place, suffix, mutated in ((False, "", ("grad_buffer",)), (True, "_", ("products", "grad_buffer")))
}
for _op in _BACKWARD_OPS.values():
    _op.register_fake(_fake_gradients)


def _setup_context(ctx, inputs, output):
    hidden, weight, bias, targets, grad_buffer, ignore_index, constants, *dtypes, _, wanted = inputs[:11]
    _, entropy, _, m, log_s, products = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(m, log_s, products)
    ctx.save_for_backward(hidden, weight, bias, targets, entropy, m, log_s, products)
    # Not saved as the others are: between a forward and its backward other calls may add to the buffer.
    ctx.grad_buffer = grad_buffer
    ctx.constants = (ignore_index, constants, *dtypes, wanted, *inputs[11:])


def _backward(ctx, dlogprobs, dentropy, dlogsumexp, *_):
    wanted, in_place = ctx.constants[4], ctx.constants[6]
    if dlogprobs is None and dentropy is None and dlogsumexp is None:
        return (None,) * 15
    upstream = (dlogprobs, dentropy, dlogsumexp)
    dhidden, dweight, dbias = _BACKWARD_OPS[in_place](*ctx.saved_tensors, *upstream, ctx.grad_buffer, *ctx.constants)
    return (
        dhidden if wanted[0] else None,
        dweight if wanted[1] and ctx.grad_buffer is None else None,
        dbias if wanted[2] else None,
        *(None,) * 12,
    )


forward_op.register_autograd(_backward, setup_context=_setup_context)
