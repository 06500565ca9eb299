"""Softmax attention over rows that share prompts, in two calls of a flash kernel and in the memory of one.

Every token attends to its own part of the row (a prompt or a response), causally; every response also attends to all of its prompt.
The two partial softmaxes are merged by their log-sum-exp. No key is copied, no mask is made, and the backward runs the kernel's own
backward on each half with the merged output and log-sum-exp, which is exact. Deliberately knows neither windows, soft caps nor
sinks: `tspin.prefix` takes these.

T tokens of a packed row; H query heads, H_kv key heads, d their width.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from tspin.prefix import PrefixLayout


class Blocks(NamedTuple):
    """Attention of consecutive runs of query rows, each to one run of key rows: the boundaries of both, from 0."""

    query_ends: tuple[int, ...]
    key_ends: tuple[int, ...]
    causal: bool

    def spans(self) -> list[tuple[slice, slice]]:
        pairs = zip(pairwise(self.query_ends), pairwise(self.key_ends), strict=True)
        return [(slice(*query), slice(*key)) for query, key in pairs]


@lru_cache(maxsize=8)
def _by_device(blocks: Blocks, device: torch.device) -> tuple[Any, ...]:
    # cum_seq_q, cum_seq_k, max_q, max_k of the varlen kernels
    ends = [torch.tensor(ends, dtype=torch.int32, device=device) for ends in blocks[:2]]
    return (*ends, *(max(b - a for a, b in pairwise(ends)) for ends in blocks[:2]))


@lru_cache(maxsize=4)
def _plan(layout: PrefixLayout, device: torch.device) -> tuple[Blocks, Blocks, Tensor, Tensor]:
    """Blocks of each part with itself and of responses with prompts, and the rows of these responses and of these prompts.

    A prompt with one response is one part with it, and has no block of the second kind.
    """
    own, queries, keys, responses, prompts = [0], [0], [0], [], []
    for P, lengths in layout.groups:
        start, stop = own[-1] + P, own[-1] + P + sum(lengths)
        if len(lengths) == 1:
            own.append(stop)
            continue
        prompts.append(torch.arange(own[-1], start))
        responses.append(torch.arange(start, stop))
        own += accumulate(lengths, initial=start)
        queries.append(queries[-1] + stop - start)
        keys.append(keys[-1] + P)
    selves, cross = Blocks(tuple(own), tuple(own), True), Blocks(tuple(queries), tuple(keys), False)
    rows = [torch.cat(parts or [torch.arange(0)]).to(device) for parts in (responses, prompts)]
    return selves, cross, *rows


def _has_varlen(q: Tensor) -> bool:
    return q.is_cuda


def _forward(q: Tensor, k: Tensor, v: Tensor, blocks: Blocks, scale: float) -> tuple[Tensor, Tensor]:
    """q [Tq, H, d], k and v [Tk, H_kv, d] -> output [Tq, H, d], log-sum-exp [H, Tq]."""
    if _has_varlen(q):
        ends = _by_device(blocks, q.device)
        return torch.ops.aten._flash_attention_forward(q, k, v, *ends, 0.0, blocks.causal, False, scale=scale)[:2]
    op = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    batched = lambda x, rows: x[rows].transpose(0, 1)[None]
    pieces = [
        op(batched(q, a), batched(k, b), batched(v, b), 0.0, blocks.causal, scale=scale) for a, b in blocks.spans()
    ]
    return torch.cat([out[0].transpose(0, 1) for out, _ in pieces]), torch.cat([lse[0] for _, lse in pieces], 1)


def _backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, blocks: Blocks, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, of the share that these keys have in a softmax whose output and log-sum-exp are given."""
    if _has_varlen(q):
        ends = _by_device(blocks, q.device)
        seed = torch.zeros(2, dtype=torch.uint64, device=q.device)
        inputs = (grad, q, k, v, out, lse, *ends, 0.0, blocks.causal, seed, seed[:0])
        return torch.ops.aten._flash_attention_backward(*inputs, scale=scale)
    op = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    batched = lambda x, rows: x[rows].transpose(0, 1)[None]
    pieces = []
    for a, b in blocks.spans():
        inputs = (batched(grad, a), batched(q, a), batched(k, b), batched(v, b), batched(out, a), lse[None, :, a])
        pieces.append(op(*inputs, 0.0, blocks.causal, scale=scale))
    return tuple(torch.cat([piece[i][0].transpose(0, 1) for piece in pieces]) for i in range(3))  # type: ignore


class _Cascade(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, layout: PrefixLayout, scale: float) -> Tensor:
        own, cross, responses, prompts = _plan(layout, q.device)
        out, lse = _forward(q, k, v, own, scale)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.layout, ctx.scale = layout, scale
        if not len(prompts):
            return out
        shared = (q.index_select(0, responses), k.index_select(0, prompts), v.index_select(0, prompts))
        other, other_lse = _forward(*shared, cross, scale)
        mine, mine_lse = out.index_select(0, responses), lse.index_select(1, responses)
        merged = torch.logaddexp(mine_lse, other_lse)
        shares = [(part - merged).exp().T[..., None] for part in (mine_lse, other_lse)]
        out.index_copy_(0, responses, (mine * shares[0] + other * shares[1]).to(out.dtype))
        lse.index_copy_(1, responses, merged)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore
        q, k, v, out, lse = ctx.saved_tensors
        own, cross, responses, prompts = _plan(ctx.layout, q.device)
        grads = _backward(grad, q, k, v, out, lse, own, ctx.scale)
        if not len(prompts):
            return (*grads, None, None)
        indices = (responses, responses, prompts, prompts, responses)
        inputs = [x.index_select(0, rows) for x, rows in zip((grad, q, k, v, out), indices, strict=True)]
        parts = _backward(*inputs, lse.index_select(1, responses), cross, ctx.scale)
        for whole, part, rows in zip(grads, parts, indices[1:4], strict=True):
            whole.index_add_(0, rows, part)
        return (*grads, None, None)


def can_cascade(query: Tensor, value: Tensor) -> bool:
    """Whether there is a flash kernel for these heads: on CPU any, on CUDA those of 16 bits."""
    d = query.shape[-1]
    if value.shape[-1] != d:
        return False
    return query.device.type == "cpu" or (
        query.is_cuda and query.dtype in (torch.float16, torch.bfloat16) and d % 8 == 0 and d <= 256
    )


def cascade_attention(query: Tensor, key: Tensor, value: Tensor, layout: PrefixLayout, scale: float) -> Tensor:
    """query [1, H, T, d], key and value [1, H_kv, T, d] of one dtype -> [1, T, H, d]; differentiable in all three."""
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    return _Cascade.apply(q, k, v, layout, scale)[None]  # type: ignore
