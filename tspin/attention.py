"""Softmax attention over rows that share prompts, in few calls of a flash kernel and in the memory of one row.

Every token attends to its own part of the row (a prompt or a response), causally; every response also attends to its prompt.

On CUDA one call of a kernel for rows of several lengths does it: a prompt is one of its rows, and so is each response with the
prompt's keys before its own, which are copied while the call lasts. Its backward, whose kernel takes room for every query head of
every key, is a call for every so many keys; the gradients of copies are summed. A long prompt attends to itself in a call apart,
for which PyTorch chooses the kernel.
On a CPU, where long runs of queries are what makes a kernel fast, all responses attend to their prompt together and to themselves
apart. The partial softmaxes are merged by their log-sum-exp (so is a sink, on either device), and the backward runs the kernel's
own backward on each call with the merged output and log-sum-exp, which is exact.

For the backward nothing but the row is kept, and no mask of it. Deliberately knows no soft cap: `tspin.prefix` takes that.

T tokens of a packed row; H query heads, H_kv key heads, d their width; P tokens of a prompt, L of a response; W of a window.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from itertools import accumulate, groupby, pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from tspin.prefix import PrefixLayout

_LONG = 2048  # tokens of a prompt that goes apart on a GPU; by reckoning (benchmarks/LOG.md), until a GPU has timed it
_KEYS = 16384  # of a backward call on a GPU, which has thread blocks for every 128 of them and every head


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


class Call(NamedTuple):
    """Blocks over the rows of some parts: which parts hold the queries, and which the keys, those of a copy more than once."""

    queries: tuple[int, ...]
    keys: tuple[int, ...]
    blocks: Blocks


class Plan(NamedTuple):
    """The sizes of the parts that make up a row; calls, the first of which has every query that is not `apart`; parts apart.

    `pieces`: the first call as several, of its queries in order, for the backward.
    """

    parts: tuple[int, ...]
    calls: tuple[Call, ...]
    pieces: tuple[Call, ...]
    apart: tuple[int, ...]

    def spans(self, indices: tuple[int, ...]) -> tuple[slice, ...]:
        """The rows of these parts, neighbours as one."""
        return _spans(self.parts, indices)

    def take(self, x: Tensor, indices: tuple[int, ...], dim: int = 0) -> Tensor:
        """The rows of these parts, without a copy where they are neighbours."""
        first, *others = self.spans(indices)
        if not others:
            return x.narrow(dim, first.start, first.stop - first.start)
        pieces = x.split(self.parts, dim)  # type: ignore
        return torch.cat([pieces[i] for i in indices], dim)

    def give(self, *taken: tuple[Tensor, tuple[int, ...]]) -> Tensor:
        """[T, ...] from what `take` made of such a tensor: copies summed, zeros where nothing was taken."""
        x, indices = taken[0]
        if len(taken) == 1 and indices == tuple(range(len(self.parts))):
            return x
        found: list[list[Tensor]] = [[] for _ in self.parts]
        for rows, indices in taken:
            for i, piece in zip(indices, rows.split([self.parts[i] for i in indices]), strict=True):
                found[i].append(piece)
        wholes = (_sum(pieces) if pieces else x.new_zeros(n, *x.shape[1:]) for n, pieces in zip(self.parts, found))
        return torch.cat(list(wholes))


@lru_cache(maxsize=32)
def _spans(parts: tuple[int, ...], indices: tuple[int, ...]) -> tuple[slice, ...]:
    ends = (0, *accumulate(parts))
    runs = [[i for _, i in run] for _, run in groupby(enumerate(indices), lambda pair: pair[1] - pair[0])]
    return tuple(slice(ends[run[0]], ends[run[-1] + 1]) for run in runs)


def _sum(pieces: list[Tensor]) -> Tensor:
    # All at once: 16 bits are rounded to but once.
    return torch.stack(pieces).sum(0) if len(pieces) > 1 else pieces[0]


_Run = tuple[tuple[int, ...], tuple[int, ...]]  # parts that hold queries, and parts that hold their keys


class _Parts:
    """Parts in the making, with runs of queries and keys among them."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def add(self, *sizes: int) -> tuple[int, ...]:
        start = len(self.sizes)
        self.sizes += [n for n in sizes if n]
        return tuple(range(start, len(self.sizes)))

    def call(self, runs: list[_Run], causal: bool, reach: int | None) -> Call:
        size = lambda indices: sum(self.sizes[i] for i in indices)
        ends = [(0, *accumulate(size(run[side]) for run in runs)) for side in (0, 1)]
        queries, keys = (tuple(i for run in runs for i in run[side]) for side in (0, 1))
        return Call(queries, keys, Blocks(ends[0], ends[1], causal, reach))


@lru_cache(maxsize=8)
def plan_calls(
    layout: PrefixLayout, window: int | None, copies: bool, long: int | None, most_keys: int | None = None
) -> Plan:
    """The calls for a packed row: one where prompts' keys are copied for each response, or else one more for prompts and responses.

    A prompt with one response is one part with it. Without a window, runs that see themselves alone go apart from `long` tokens on.
    A backward takes `most_keys` at once, or those of one run.
    """
    farthest = max(P + max(lengths) for P, lengths in layout.groups)
    W = None if window is None or window >= farthest else window
    reach = None if W is None else W - 1
    parts, own, cross, apart = _Parts(), [], [], []
    for P, lengths in layout.groups:
        if len(lengths) == 1:
            P, lengths = P + lengths[0], ()
        seen = min(P, P if reach is None else reach) if lengths else 0  # of the prompt, by a response
        prompt = parts.add(P - seen, seen)
        shared = prompt[-1:] if seen else ()
        if long is not None and reach is None and long <= P:
            apart += prompt
        else:
            own.append((prompt, prompt))
        responses = [parts.add(*((n := min(L, L if reach is None else reach)), L - n)) for L in lengths]
        own += [(response, (shared if copies else ()) + response) for response in responses]
        if shared and not copies and reach is None:
            cross.append((sum(responses, ()), shared))
        elif shared and not copies:
            cross += [(response[:1], shared) for response in responses]
    calls = [parts.call(own, True, reach)] if own else []
    pieces = [parts.call(runs, True, reach) for runs in _pieces(own, parts.sizes, most_keys)]
    # A call with a window has responses of one length: how far they are from the prompt's last key depends on it.
    size = lambda run: 0 if reach is None else sum(parts.sizes[i] for i in run[0])
    for n, runs in groupby(sorted(cross, key=size), size):
        calls.append(parts.call(list(runs), False, None if reach is None else reach - n))
    return Plan(tuple(parts.sizes), tuple(calls), tuple(pieces), tuple(apart))


def _pieces(runs: list[_Run], sizes: list[int], most_keys: int | None) -> Iterator[list[_Run]]:
    piece, keys = [], 0
    for run in runs:
        own = sum(sizes[i] for i in run[1])
        if piece and most_keys is not None and keys + own > most_keys:
            yield piece
            piece, keys = [], 0
        piece.append(run)
        keys += own
    if piece:
        yield piece


def _has_varlen(q: Tensor) -> bool:
    return q.is_cuda


@lru_cache(maxsize=16)
def _ends(blocks: Blocks, device: torch.device) -> tuple[Any, ...]:
    # cum_seq_q, cum_seq_k, max_q, max_k of the varlen kernels
    ends = [torch.tensor(ends, dtype=torch.int32, device=device) for ends in blocks[:2]]
    return (*ends, *(max(b - a for a, b in pairwise(ends)) for ends in blocks[:2]))


@lru_cache(maxsize=8)
def _seed(device: torch.device) -> Tensor:
    # Of a dropout that there is none of.
    return torch.zeros(2, dtype=torch.uint64, device=device)


def _cpu_options(blocks: Blocks, queries: slice, keys: slice, like: Tensor) -> dict[str, Any]:
    """is_causal or an additive attn_mask of one block, for the flash kernel of the CPU, which knows no windows."""
    Q, K = queries.stop - queries.start, keys.stop - keys.start
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
        seed = _seed(q.device)
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


class _Attention(torch.autograd.Function):
    """q [Tq, H, d], of the queries of the plan's first call; k and v [T, H_kv, d], of the whole row -> [Tq, H, d]."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, plan: Plan, scale: float) -> Tensor:
        first, *others = plan.calls
        out, lse = _forward(q, plan.take(k, first.keys), plan.take(v, first.keys), first.blocks, scale)
        for queries, keys, blocks in others:
            other, other_lse = _forward(plan.take(q, queries), plan.take(k, keys), plan.take(v, keys), blocks, scale)
            start = 0
            for rows in plan.spans(queries):
                part = slice(start, start := start + rows.stop - rows.start)
                merged = torch.logaddexp(lse[:, rows], other_lse[:, part])
                out[rows] = out[rows] * _share(lse[:, rows], merged) + other[part] * _share(other_lse[:, part], merged)
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
        plan, start = ctx.plan, 0
        dqs, dks, dvs = found = [], [], []
        for _, keys, blocks in plan.pieces:
            rows = slice(start, start := start + blocks.query_ends[-1])
            # Kernels take rows at any stride, but not this vector.
            inputs = (grad[rows], q[rows], plan.take(k, keys), plan.take(v, keys), out[rows], lse[:, rows].contiguous())
            grads = _backward(*inputs, blocks, ctx.scale)
            del inputs
            for kind, of_piece in zip(found, grads, strict=True):
                kind.append(of_piece)
        dq = dqs[0] if len(dqs) == 1 else torch.cat(dqs)
        dk, dv = (plan.give(*zip(of, (piece.keys for piece in plan.pieces), strict=True)) for of in (dks, dvs))
        del dqs, dks, dvs, found, grads
        for queries, keys, blocks in plan.calls[1:]:
            of = (queries, queries, keys, keys, queries)
            inputs = [plan.take(x, rows) for x, rows in zip((grad, q, k, v, out), of, strict=True)]
            shares = _backward(*inputs, plan.take(lse, queries, 1).contiguous(), blocks, ctx.scale)  # type: ignore
            for whole, share, indices in zip((dq, dk, dv), shares, of[1:4], strict=True):
                spans = plan.spans(indices)
                for rows, part in zip(spans, share.split([span.stop - span.start for span in spans]), strict=True):
                    whole[rows].add_(part)
        of_sinks = None
        if sinks is not None:
            weights = (sinks.to(lse.dtype)[:, None] - lse).exp()
            of_sinks = -(weights * (grad * out).sum(-1).T).sum(1).to(sinks.dtype)
        return dq, dk, dv, of_sinks, None, None


def has_kernel(query: Tensor, value: Tensor) -> bool:
    """Whether there is a flash kernel for these heads: on CPU any; on NVIDIA GPUs from Ampere on, those of 16 bits."""
    if query.device.type == "cpu":
        return value.shape[-1] == query.shape[-1]
    is_recent = query.is_cuda and torch.version.hip is None and torch.cuda.get_device_capability(query.device) >= (8, 0)
    return is_recent and fits_varlen(query, value)


def fits_varlen(query: Tensor, value: Tensor) -> bool:
    """Whether CUDA's varlen flash kernels take heads of this dtype and width."""
    d = query.shape[-1]
    return value.shape[-1] == d and query.dtype in (torch.float16, torch.bfloat16) and d % 8 == 0 and d <= 256


def shared_prompt_attention(
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
    on_gpu = _has_varlen(query)
    long = _LONG if on_gpu and sinks is None else None
    plan = plan_calls(layout, window, on_gpu, long, _KEYS if on_gpu else None)
    return attend(query, key, value, plan, scale, sinks)


def attend(query: Tensor, key: Tensor, value: Tensor, plan: Plan, scale: float, sinks: Tensor | None = None) -> Tensor:
    """`shared_prompt_attention` by the calls of a plan."""
    # Not x[0], whose gradient is written into a tensor of zeros.
    q, k, v = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
    if not plan.apart:
        return _Attention.apply(q, k, v, sinks, plan, scale)[None]  # type: ignore
    parts = [x.split(plan.parts) for x in (q, k, v)]  # type: ignore
    found = {}
    for i in plan.apart:
        own_q, own_k, own_v = (x[i].transpose(0, 1)[None] for x in parts)
        is_grouped = q.shape[1] != k.shape[1]
        out = F.scaled_dot_product_attention(own_q, own_k, own_v, is_causal=True, scale=scale, enable_gqa=is_grouped)
        found[i] = out.squeeze(0).transpose(0, 1)
    for call in plan.calls:  # none or one
        rest = _Attention.apply(plan.take(q, call.queries), k, v, sinks, plan, scale)
        found |= zip(call.queries, rest.split([plan.parts[i] for i in call.queries]), strict=True)  # type: ignore
    return torch.cat([found[i] for i in range(len(plan.parts))])[None]
