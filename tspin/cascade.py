"""Softmax attention over rows that share prompts, in few calls of a flash kernel and in the memory of one.

Every token attends to its own part of the row (a prompt or a response), causally; every response also attends to its prompt. The
partial softmaxes are merged by their log-sum-exp, and so is a sink. No key is kept twice, no mask is kept, and the backward runs
the kernel's own backward on each piece with the merged output and log-sum-exp, which is exact. Deliberately knows no soft cap:
`tspin.prefix` takes that.

T tokens of a packed row; H query heads, H_kv key heads, d their width; P tokens of a prompt, L of a response.
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
    """Attention of consecutive runs of query rows, each to one run of key rows: the boundaries of both, from 0.

    The last query of a run is aligned with its last key. `causal` hides the keys after the aligned one, `reach` those that lie
    further than so many positions before it.
    """

    query_ends: tuple[int, ...]
    key_ends: tuple[int, ...]
    causal: bool
    reach: int | None = None

    def spans(self) -> list[tuple[slice, slice]]:
        pairs = zip(pairwise(self.query_ends), pairwise(self.key_ends), strict=True)
        return [(slice(*query), slice(*key)) for query, key in pairs]


Rows = tuple[slice, ...]


class Plan(NamedTuple):
    """Blocks of each part with itself; and blocks of responses with prompts, with the rows of these queries and of these keys."""

    own: Blocks
    cross: tuple[tuple[Rows, Rows, Blocks], ...]


@lru_cache(maxsize=4)
def _plan(layout: PrefixLayout, window: int | None) -> Plan:
    """A prompt with one response is one part with it. A window that leaves the prompt asks for a call per length of responses."""
    farthest = max(P + max(lengths) for P, lengths in layout.groups)
    W = None if window is None or window >= farthest else window
    own, runs = [0], []
    for P, lengths in layout.groups:
        start, first = own[-1], own[-1] + P
        if len(lengths) == 1:
            own.append(first + lengths[0])
            continue
        own += accumulate(lengths, initial=first)
        if W is None:
            runs.append((slice(first, own[-1]), slice(start, first)))
        else:
            begins = own[-len(lengths) - 1 :]
            keys = slice(max(start, first - W + 1), first)
            runs += [(slice(begin, begin + min(L, W - 1)), keys) for begin, L in zip(begins, lengths)]

    def call(runs: list[tuple[slice, slice]], reach: int | None) -> tuple[Rows, Rows, Blocks]:
        queries, keys = (tuple(spans) for spans in zip(*runs, strict=True))
        ends = [(0, *accumulate(map(_size, spans))) for spans in (queries, keys)]
        return queries, keys, Blocks(ends[0], ends[1], False, reach)

    if W is None:
        return Plan(Blocks(tuple(own), tuple(own), True), (call(runs, None),) if runs else ())
    sizes = sorted({_size(queries) for queries, _ in runs} - {0})
    cross = [call([run for run in runs if _size(run[0]) == size], W - 1 - size) for size in sizes]
    return Plan(Blocks(tuple(own), tuple(own), True, W - 1), tuple(cross))


def _size(rows: slice) -> int:
    return rows.stop - rows.start


def _take(x: Tensor, rows: Rows, dim: int = 0) -> Tensor:
    parts = [x.narrow(dim, span.start, _size(span)) for span in rows]
    return torch.cat(parts, dim) if len(parts) > 1 else parts[0]


def _parts(x: Tensor, rows: Rows, dim: int = 0) -> list[tuple[slice, Tensor]]:
    return list(zip(rows, x.split([_size(span) for span in rows], dim), strict=True))


def _has_varlen(q: Tensor) -> bool:
    return q.is_cuda


@lru_cache(maxsize=16)
def _ends(blocks: Blocks, device: torch.device) -> tuple[Any, ...]:
    # cum_seq_q, cum_seq_k, max_q, max_k of the varlen kernels
    ends = [torch.tensor(ends, dtype=torch.int32, device=device) for ends in blocks[:2]]
    return (*ends, *(max(b - a for a, b in pairwise(ends)) for ends in blocks[:2]))


def _cpu_options(blocks: Blocks, queries: slice, keys: slice, like: Tensor) -> dict[str, Any]:
    """is_causal or an additive attn_mask of one block, for the flash kernel of the CPU, which knows no windows."""
    Q, K = _size(queries), _size(keys)
    if blocks.reach is None or blocks.reach >= K:
        return {"is_causal": blocks.causal}
    distance = torch.arange(K - Q, K)[:, None] - torch.arange(K)
    hidden = (distance > blocks.reach) | (distance < 0) if blocks.causal else distance > blocks.reach
    return {"is_causal": False, "attn_mask": torch.zeros(Q, K, dtype=like.dtype).masked_fill_(hidden, -torch.inf)}


def _forward(q: Tensor, k: Tensor, v: Tensor, blocks: Blocks, scale: float) -> tuple[Tensor, Tensor]:
    """q [Tq, H, d], k and v [Tk, H_kv, d] -> output [Tq, H, d], log-sum-exp [H, Tq]."""
    if _has_varlen(q):
        inputs = (q, k, v, *_ends(blocks, q.device), 0.0, blocks.causal, False)
        return torch.ops.aten._flash_attention_forward(*inputs, scale=scale, window_size_left=blocks.reach)[:2]
    op = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    batched = lambda x, rows: x[rows].transpose(0, 1)[None]
    pieces = [
        op(batched(q, a), batched(k, b), batched(v, b), **_cpu_options(blocks, a, b, q), scale=scale)
        for a, b in blocks.spans()
    ]
    return torch.cat([out[0].transpose(0, 1) for out, _ in pieces]), torch.cat([lse[0] for _, lse in pieces], 1)


def _backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, blocks: Blocks, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, of the share that these keys have in a softmax whose output and log-sum-exp are given."""
    if _has_varlen(q):
        seed = torch.zeros(2, dtype=torch.uint64, device=q.device)
        inputs = (grad, q, k, v, out, lse, *_ends(blocks, q.device), 0.0, blocks.causal, seed, seed[:0])
        return torch.ops.aten._flash_attention_backward(*inputs, scale=scale, window_size_left=blocks.reach)
    op = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    batched = lambda x, rows: x[rows].transpose(0, 1)[None]
    pieces = []
    for a, b in blocks.spans():
        inputs = (batched(grad, a), batched(q, a), batched(k, b), batched(v, b), batched(out, a), lse[None, :, a])
        pieces.append(op(*inputs, dropout_p=0.0, **_cpu_options(blocks, a, b, q), scale=scale))
    return tuple(torch.cat([piece[i][0].transpose(0, 1) for piece in pieces]) for i in range(3))  # type: ignore


def _share(part: Tensor, whole: Tensor) -> Tensor:
    # [T, H, 1] weight of a partial softmax in a merged one, from their log-sum-exp [H, T]
    return (part - whole).exp().T[..., None]


class _Cascade(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, plan: Plan, scale: float) -> Tensor:
        out, lse = _forward(q, k, v, plan.own, scale)
        for queries, keys, blocks in plan.cross:
            other, other_lse = _forward(_take(q, queries), _take(k, keys), _take(v, keys), blocks, scale)
            for (rows, part), (_, part_lse) in zip(_parts(other, queries), _parts(other_lse, queries, 1), strict=True):
                merged = torch.logaddexp(lse[:, rows], part_lse)
                out[rows] = out[rows] * _share(lse[:, rows], merged) + part * _share(part_lse, merged)
                lse[:, rows] = merged
        if sinks is not None:
            merged = torch.logaddexp(lse, sinks.to(lse.dtype)[:, None])
            out, lse = (out * _share(lse, merged)).to(out.dtype), merged
        ctx.save_for_backward(q, k, v, sinks, out, lse)
        ctx.plan, ctx.scale = plan, scale
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore
        q, k, v, sinks, out, lse = ctx.saved_tensors
        grads = _backward(grad, q, k, v, out, lse, ctx.plan.own, ctx.scale)
        for queries, keys, blocks in ctx.plan.cross:
            of = (queries, queries, keys, keys, queries)
            inputs = [_take(x, rows) for x, rows in zip((grad, q, k, v, out), of, strict=True)]
            # Kernels take rows at any stride, but not this vector.
            shares = _backward(*inputs, _take(lse, queries, 1).contiguous(), blocks, ctx.scale)  # type: ignore
            for whole, share, spans in zip(grads, shares, of[1:4], strict=True):
                for rows, part in _parts(share, spans):
                    whole[rows].add_(part)
        of_sinks = None
        if sinks is not None:
            weights = (sinks.to(lse.dtype)[:, None] - lse).exp()
            of_sinks = -(weights * (grad * out).sum(-1).T).sum(1).to(sinks.dtype)
        return (*grads, of_sinks, None, None)


def can_cascade(query: Tensor, value: Tensor) -> bool:
    """Whether there is a flash kernel for these heads: on CPU any; on NVIDIA GPUs from Ampere on, those of 16 bits."""
    if query.device.type == "cpu":
        return value.shape[-1] == query.shape[-1]
    is_recent = query.is_cuda and torch.version.hip is None and torch.cuda.get_device_capability(query.device) >= (8, 0)
    return is_recent and fits_varlen(query, value)


def fits_varlen(query: Tensor, value: Tensor) -> bool:
    """Whether CUDA's varlen flash kernels take heads of this dtype and width."""
    d = query.shape[-1]
    return value.shape[-1] == d and query.dtype in (torch.float16, torch.bfloat16) and d % 8 == 0 and d <= 256


def cascade_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: PrefixLayout,
    scale: float,
    window: int | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """query [1, H, T, d], key and value [1, H_kv, T, d] of one dtype -> [1, T, H, d]; differentiable in all three and in sinks.

    window: how many positions a token sees, itself included. sinks: [H] logits of an extra key without value.
    """
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    return _Cascade.apply(q, k, v, sinks, _plan(layout, window), scale)[None]  # type: ignore
