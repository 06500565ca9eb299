"""The registered ops behind `linear_logprobs`, forward and backward, over the blockwise engine.

Registered ops make it one node for torch.compile and let `torch.library.opcheck` examine it. The forward op returns the
statistics that the backward needs, and, under the `store` plan, the products, which the backward rewrites in place.
"""

from functools import partial

import torch
from torch import Tensor
from torch.distributed import distributed_c10d

from tspin_kernels._blocks import (
    Gradients,
    RowStats,
    Scattered,
    Upstream,
    compute_gradients,
    compute_stats,
    form_gradient,
    multiply_out,
)
from tspin_kernels._head import Head, padded_columns, rows_module
from tspin_kernels._inputs import LogitTransform, accumulate_dtype, check_targets_in_range
from tspin_kernels._plan import Blocks, Sizes, plan_blocks
from tspin_kernels._shards import gather_widths, place_shard


def _head(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    constants: list[float],
    operand_dtype: torch.dtype,
    logits_dtype: torch.dtype,
    backend: str,
    group: str,
    widths: list[int],
) -> Head:
    # `group` is the name of the process group that holds the vocabulary together, '' where there is none; `widths` are its ranks'.
    logit_scale, softcap, temperature = constants
    transform = LogitTransform(logit_scale, softcap if softcap > 0 else None, temperature)
    bias = None if bias is None else bias.contiguous()
    shard = place_shard(_resolve(group), widths) if group else None
    return Head(weight, bias, transform, operand_dtype, logits_dtype, rows_module(backend, hidden.device), shard)


def _resolve(group: str) -> distributed_c10d.ProcessGroup:
    return distributed_c10d._resolve_process_group(group)  # pyright: ignore


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
    gathered: bool,
) -> bool:
    # Decided on all rows, ignored ones too, so that shapes never depend on data. Row kernels play no part in it.
    head = Head(weight, bias, LogitTransform(), operand_dtype, logits_dtype, rows_module("torch", hidden.device))
    N = hidden.shape[0]
    sizes = head.sizes(N, hidden, *gradient_dtypes, gathered=gathered, scattered=gathered)
    total = sizes.total(N, head.widest)
    return total + (0 if in_place else N * head.widest * logits_dtype.itemsize) <= memory_budget


def _sizes(
    head: Head,
    N: int,
    hidden: Tensor,
    dtypes: tuple[torch.dtype | None, torch.dtype | None],
    index: Tensor | None,
) -> Sizes:
    # Of the N rows that count. What ranks sum lies together until it has travelled.
    is_some = index is not None
    return head.sizes(N, hidden, *dtypes, gathered=is_some, scattered=is_some and head.shard is None)


# Compiled graphs lie on the user's disk under these names: an op that takes or returns something else needs another one.
_NAME = "tspin_kernels::linear_logprobs_2"


@torch.library.custom_op(_NAME, mutates_args=())
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    shared = {"hidden": hidden.shape[0], "entropy": with_entropy, "hidden.requires_grad": wanted[0]}
    widths = gather_widths(_resolve(group), weight.shape[0], hidden.device, shared) if group else []
    head = _head(hidden, weight, bias, constants, operand_dtype, logits_dtype, backend, group, widths)
    index = _counted(targets, ignore_index)
    counted = targets.contiguous() if index is None else targets[index]
    check_targets_in_range(counted, head.V if head.shard is None else head.shard.V)
    N = counted.shape[0]
    dtypes = _gradient_dtypes(hidden, weight, grad_buffer, operand_dtype, wanted, group)
    may_ignore = ignore_index is not None
    if any(wanted) and _stores(
        hidden, weight, bias, operand_dtype, logits_dtype, memory_budget, in_place, dtypes, may_ignore
    ):
        products = hidden.new_empty(hidden.shape[0], head.padded(head.V), dtype=head.logits_dtype)
        store, blocks = products[:N], Blocks(max(1, N), head.V)
        products[N:].zero_()
    else:
        products, store = hidden.new_empty(0, 0, dtype=head.logits_dtype), None
        # With a gradient, the blocks are those of the backward: a budget too small for it must fail here.
        blocks = plan_blocks(_sizes(head, N, hidden, dtypes, index), memory_budget)
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
        # On the CPU: the backward asks no rank and waits for no GPU.
        torch.tensor(widths, dtype=torch.int64, device="cpu"),
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
    stores = any(wanted) and _stores(
        hidden, weight, bias, operand_dtype, logits_dtype, memory_budget, in_place, dtypes, ignore_index is not None
    )
    width = padded_columns(weight.shape[0], operand_dtype)
    products = hidden.new_empty((hidden.shape[0], width) if stores else (0, 0), dtype=logits_dtype)
    entropy = torch.empty_like(row) if with_entropy else row.new_empty(0)
    widths = torch.empty(_resolve(group).size() if group else 0, dtype=torch.int64, device="cpu")
    return row, entropy, torch.empty_like(row), torch.empty_like(row), torch.empty_like(row), products, widths


def _put_rows(whole: Tensor, index: Tensor, start: int, stop: int, values: Tensor) -> None:
    whole.index_copy_(0, index[start:stop], values.to(whole.dtype))


def _gradients(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    entropy: Tensor,
    m: Tensor,
    log_s: Tensor,
    products: Tensor,
    widths: Tensor,
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
    head = _head(
        hidden, weight, bias, constants, operand_dtype, logits_dtype, backend, group, widths.tolist() if group else []
    )
    index = _counted(targets, ignore_index)

    def pick(values: Tensor | None) -> Tensor | None:
        return None if values is None else values.contiguous() if index is None else values[index]

    counted = targets.contiguous() if index is None else targets[index]
    N = counted.shape[0]
    stats = RowStats(pick(m), pick(log_s), None, pick(entropy) if dentropy is not None else None)  # pyright: ignore[reportArgumentType]
    upstream = Upstream(pick(dlogprobs), pick(dentropy), pick(dlogsumexp))
    dtypes = _gradient_dtypes(hidden, weight, grad_buffer, operand_dtype, wanted, group)
    dhidden: Tensor | None = None
    into: Tensor | Scattered | None = None
    # Of the rows that count, together where they are all, or where ranks sum them first; else each in its place at once.
    together = index is None or head.shard is not None
    if dtypes[0] is not None:
        if index is None or together:
            into = dhidden = hidden.new_empty(N, hidden.shape[1], dtype=dtypes[0])
        else:
            dhidden = torch.zeros_like(hidden, memory_format=torch.contiguous_format)
            into = Scattered(partial(_put_rows, dhidden, index), dtypes[0])
    new_weight_gradient = wanted[1] and grad_buffer is None
    dweight = torch.empty_like(weight, memory_format=torch.contiguous_format) if new_weight_gradient else grad_buffer
    dbias = hidden.new_zeros(head.V, dtype=accumulate_dtype(operand_dtype)) if wanted[2] else None
    if N == 0 or all(gradient is None for gradient in upstream):
        for gradient in (dhidden, dweight if new_weight_gradient else None):
            if gradient is not None:
                gradient.zero_()
    else:
        grads = Gradients(into, dweight, dbias)
        if products.numel() > 0:
            store = products[:N] if in_place else products[:N].clone()
            dlogits, unscale = form_gradient(head, store, counted, stats, upstream, wanted[0] or wanted[1])
            multiply_out(head, hidden, index, dlogits, unscale, grads, fresh=new_weight_gradient)
        else:
            blocks = plan_blocks(_sizes(head, N, hidden, dtypes, index), memory_budget)
            compute_gradients(head, hidden, index, counted, stats, upstream, blocks, grads, fresh=new_weight_gradient)
        if head.shard is not None and dhidden is not None:
            head.shard.sum_(dhidden)
    if dhidden is not None and together:
        dhidden = dhidden.to(hidden.dtype)
        if index is not None:
            dhidden = torch.zeros_like(hidden, memory_format=torch.contiguous_format).index_copy_(0, index, dhidden)
    missing = hidden.new_empty(0)
    return (
        missing if dhidden is None else dhidden,
        dweight if dweight is not None and new_weight_gradient else weight.new_empty(0),
        missing.clone() if dbias is None or bias is None else dbias.to(bias.dtype),
    )


def _fake_gradients(hidden, weight, bias, *rest):
    grad_buffer, wanted = rest[9], rest[14]
    return (
        hidden.new_empty(hidden.shape if wanted[0] else 0),
        weight.new_empty(weight.shape if wanted[1] and grad_buffer is None else 0),
        bias.new_empty(bias.shape) if wanted[2] else hidden.new_empty(0),
    )


# A compiled graph may not rewrite what its forward returned, so it takes the op that leaves the products alone.
_BACKWARD_OPS = {
    in_place: torch.library.custom_op(f"{_NAME}_backward{suffix}", mutates_args=mutated)(_gradients)
    for in_place, suffix, mutated in ((False, "", ("grad_buffer",)), (True, "_", ("products", "grad_buffer")))
}
for _op in _BACKWARD_OPS.values():
    _op.register_fake(_fake_gradients)


def _setup_context(ctx, inputs, output):
    hidden, weight, bias, targets, grad_buffer, ignore_index, constants, *dtypes, _, wanted = inputs[:11]
    _, entropy, _, m, log_s, products, widths = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(m, log_s, products, widths)
    ctx.save_for_backward(hidden, weight, bias, targets, entropy, m, log_s, products, widths)
    ctx.stores = products.numel() > 0
    # Not saved as the others are: between a forward and its backward other calls may add to the buffer.
    ctx.grad_buffer = grad_buffer
    ctx.constants = (ignore_index, constants, *dtypes, wanted, *inputs[11:])


def _backward(ctx, dlogprobs, dentropy, dlogsumexp, *_):
    wanted, in_place = ctx.constants[4], ctx.constants[6]
    if dlogprobs is None and dentropy is None and dlogsumexp is None:
        return (None,) * 15
    if getattr(ctx, "is_spent", False):
        raise RuntimeError(
            "linear_logprobs: backward was called twice; the first call made the gradient out of the logits that it had kept. Call "
            "it once on the sum of the losses, or give a memory_budget too small for all logits, which are then made again"
        )
    ctx.is_spent = in_place and ctx.stores
    upstream = (dlogprobs, dentropy, dlogsumexp)
    dhidden, dweight, dbias = _BACKWARD_OPS[in_place](*ctx.saved_tensors, *upstream, ctx.grad_buffer, *ctx.constants)
    return (
        dhidden if wanted[0] else None,
        dweight if wanted[1] and ctx.grad_buffer is None else None,
        dbias if wanted[2] else None,
        *(None,) * 12,
    )


forward_op.register_autograd(_backward, setup_context=_setup_context)
