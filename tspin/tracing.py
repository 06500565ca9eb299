"""The bytes of one training step, followed on tensors without data: the model's own code runs, no memory is spent.

Each storage that an operation makes, and its end, is an event; replayed, they give the memory of every moment by what it is
for. The tensors say they are the CPU's. To price a CUDA GPU instead, its attention kernels are stood in for by functions that
keep what the kernels keep; the output head always is, by its own planner. Deliberately one step of one configuration:
what that means for a run is tspin.memory's.

N response tokens, V vocabulary, D hidden width; H query heads, L queries, S keys, d their width.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations import moe
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from tspin import attention, prefix, tiling
from tspin.model import Head
from tspin_kernels._groups import GroupPlan, plan_groups
from tspin_kernels._head import Head as KernelHead
from tspin_kernels._inputs import LogitTransform
from tspin_kernels._linear_logprobs import product_dtypes
from tspin_kernels._plan import DEFAULT_BUDGET
from tspin_kernels._rows_torch import _TILE

WORK, COPIES = "working set", "weight copies of autocast"


class LiveBytes(TorchDispatchMode):
    """Records the beginning and the end of every storage that operations make while it is on.

    `label` and `phase` are what is written beside them. What is there before is brought in by `hold`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.label, self.phase = WORK, "before"
        self.labels: list[str] = []  # of each storage
        self._events: list[tuple[int, int, str]] = []  # storage, change in bytes, phase
        self._live: dict[int, int] = {}  # address of a living storage -> its number
        self._ends: list[weakref.ref] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        is_weight_copy = func is torch.ops.aten._to_copy.default and isinstance(args[0], nn.Parameter)
        self.hold(out, COPIES if is_weight_copy else self.label)
        return out

    def hold(self, tensors: Any, label: str) -> None:
        """Count the storages of tensors that are not counted yet."""
        for leaf in tree_leaves(tensors):
            if not isinstance(leaf, Tensor) or (storage := leaf.untyped_storage())._cdata in self._live:
                continue
            number, key, size = len(self.labels), storage._cdata, storage.nbytes()
            self.labels.append(label)
            self._live[key] = number
            self._events.append((number, size, self.phase))
            self._ends.append(
                weakref.ref(storage, lambda _, key=key, number=number, size=size: self._end(key, number, size))
            )

    def _end(self, key: int, number: int, size: int) -> None:
        if self._live.get(key) == number:
            del self._live[key]
        self._events.append((number, -size, self.phase))

    def relabel(self, tensors: Any, label: str) -> None:
        """Say what living storages turned out to be."""
        for leaf in tree_leaves(tensors):
            if isinstance(leaf, Tensor) and (number := self._live.get(leaf.untyped_storage()._cdata)) is not None:
                self.labels[number] = label

    def relabel_all(self, label: str, new: str) -> None:
        """Say what all living storages of a label turned out to be."""
        for number in self._live.values():
            if self.labels[number] == label:
                self.labels[number] = new

    def peaks(self) -> dict[str, dict[str, int]]:
        """Of each phase, the bytes by label at its fullest moment."""
        found: dict[str, dict[str, int]] = {}
        now: Counter[str] = Counter()
        for number, change, phase in self._events:
            now[self.labels[number]] += change
            if phase not in found or now.total() > sum(found[phase].values()):
                found[phase] = {label: size for label, size in now.items() if size}
        return found


def _flash_outputs(query: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    # Output and log-sum-exp; heads before rows or after them.
    return query.new_empty(*query.shape[:-1], value.shape[-1]), query.new_empty(query.shape[:-1], dtype=torch.float32)


def _flash_gradients(query: Tensor, key: Tensor, value: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of a CUDA flash kernel, beside its work: a float32 sum of the queries' and, heads in dimension `heads`, the keys'
    and values' of every query head, which are summed over those of a group after."""
    work = [query.new_empty(query.shape[:-1], dtype=torch.float32), torch.empty_like(query, dtype=torch.float32)]
    H = query.shape[heads]
    if key.shape[heads] != H:
        work += [t.new_empty(*t.shape[:heads], H, *t.shape[heads + 1 :]) for t in (key, value)]
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


class _FlashAttention(torch.autograd.Function):
    """What a fused CUDA attention keeps: its inputs, its output and the log-sum-exp [B, H, L]; never [L, S] scores."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
        out, lse = _flash_outputs(query, value)
        ctx.save_for_backward(query, key, value, out, lse, bias)
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore
        query, key, value, *_ = ctx.saved_tensors
        return *_flash_gradients(query, key, value, 1), None


def _flash_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *args: Any, **kwargs: Any
) -> Tensor:
    if torch.is_autocast_enabled("cpu"):
        query, key, value = (t.to(torch.get_autocast_dtype("cpu")) for t in (query, key, value))
    # A boolean mask becomes one of the queries' dtype, which the kernel keeps.
    bias = None if attn_mask is None else attn_mask.new_empty(attn_mask.shape, dtype=query.dtype)
    return _FlashAttention.apply(query, key, value, bias)


def _varlen_forward(q: Tensor, k: Tensor, v: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    out, lse = _flash_outputs(q, v)
    return out, lse.T


def _varlen_backward(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _flash_gradients(q, k, v, 1)


def _flex_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
) -> tuple[Tensor, None]:
    return _FlashAttention.apply(query, key, value, None).transpose(1, 2), None


@contextmanager
def gpu_attention() -> Iterator[None]:
    """Within it, attention costs what a CUDA GPU's kernels cost, in layers that a backward runs again too.

    Of scaled_dot_product_attention a fused kernel is assumed, of rows that share a prompt whichever kernel `tspin.prefix` takes on
    a GPU from Ampere on.
    """
    stand_ins = {
        (F, "scaled_dot_product_attention"): _flash_attention,  # a function mode would be off during a backward
        (prefix, "has_kernel"): attention.fits_varlen,
        (prefix, "_has_flex"): lambda query: True,
        (prefix, "_block_mask"): lambda *args: None,
        (prefix, "flex_attention_forward"): _flex_attention,
        (attention, "_has_varlen"): lambda q: True,
        (attention, "_forward"): _varlen_forward,
        (attention, "_backward"): _varlen_backward,
    }
    with _in_place(stand_ins):
        yield


class _ExpertProduct(torch.autograd.Function):
    """The rows of each expert by its own weight: whichever rows those are, this many products and bytes.

    input: [S, K]; weight: [E, K, N]; returns [S, N].
    """

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(input, weight)
        with torch.autocast("cpu", enabled=False):  # of which a grouped product knows nothing
            return input @ weight[0]

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, Tensor | None]:  # type: ignore
        _, weight = ctx.saved_tensors
        dinput = dout @ weight[0].T if ctx.needs_input_grad[0] else None
        return dinput, weight.new_empty(weight.shape) if ctx.needs_input_grad[1] else None


@contextmanager
def grouped_experts() -> Iterator[None]:
    """Within it, mixtures of experts run without data in any dtype, which torch's own grouped product does in bfloat16 alone."""
    stand_in = lambda input, weight, offs: _ExpertProduct.apply(input.to(weight.dtype), weight)
    with _in_place({(moe, "_grouped_mm"): stand_in}):
        yield


@contextmanager
def two_tiles() -> Iterator[None]:
    """Within it, `tspin.tiling` runs two tiles of a row: the others would take the same memory, one after another."""
    tiles = tiling.tiles
    with _in_place({(tiling, "tiles"): lambda total, most: tiles(total, most)[:2]}):
        yield


@contextmanager
def _in_place(stand_ins: dict[tuple[Any, str], Any]) -> Iterator[None]:
    before = {place: getattr(*place) for place in stand_ins}
    for place, stand_in in stand_ins.items():
        setattr(*place, stand_in)
    try:
        yield
    finally:
        for place, function in before.items():
            setattr(*place, function)


def assume_no_padding(model: PreTrainedModel) -> None:
    """Let sdpa leave out its mask where rows without padding need none, which it would have to read a tensor to find out."""
    if model.config._attn_implementation == "sdpa":
        model.set_attn_implementation(_UNPADDED)


def _unpadded_mask(*args: Any, **kwargs: Any) -> Tensor | None:
    return sdpa_mask(*args, **kwargs | {"attention_mask": None, "allow_is_causal_skip": True})


_UNPADDED = "tspin_unpadded"
AttentionInterface.register(_UNPADDED, sdpa_attention_forward)
AttentionMaskInterface.register(_UNPADDED, _unpadded_mask)


class Select(torch.autograd.Function):
    """`tensor[rows]` at its cost: tensors without data would be copied once more in the backward."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, rows: Tensor) -> Tensor:
        ctx.shape = tensor.shape
        return tensor.new_empty(len(rows), *tensor.shape[1:])

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, None]:
        return dout.new_empty(ctx.shape), None


class _HeadRows(NamedTuple):
    """What the planner asks of `tspin_kernels._groups.Rows`."""

    index: Tensor  # [N]
    sizes: list[int]

    @property
    def groups(self) -> int:
        return len(self.sizes)

    def per_group(self) -> list[int]:
        return self.sizes


class _HeadLoss(torch.autograd.Function):
    """The allocations of `linear_sequence_loss`, sized by its own planner, in its order."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, plan: GroupPlan, ranges: list[int]
    ) -> Tensor:
        # ranges: bytes of the logits of each, with all that its products need.
        ctx.dtypes = [hidden.dtype, weight.dtype, None if bias is None else bias.dtype]
        grads: list[Tensor | None] = [None, None, None]
        if plan.wanted[0]:
            grads[0] = hidden.new_empty(hidden.shape, dtype=plan.dtypes[0])
        if plan.wanted[1]:
            grads[1] = weight.new_empty(weight.shape, dtype=plan.dweight)
        if plan.wanted[2] and bias is not None:
            grads[2] = bias.new_empty(bias.shape, dtype=torch.float32)
        for size in ranges:
            hidden.new_empty(size, dtype=torch.uint8)
        ctx.grads = grads
        return hidden.new_empty((), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        grads, ctx.grads = ctx.grads, None
        return *(None if g is None else g.to(dtype) for g, dtype in zip(grads, ctx.dtypes, strict=True)), None, None


def head_loss(hidden: Tensor, head: Head, per_group: Sequence[int], *, budget: int | None, on_cpu: bool) -> Tensor:
    """A scalar that costs what `linear_sequence_loss` costs over groups of `per_group` response tokens.

    hidden: [T, D]. Under autocast, as the op itself, in its dtype. budget: bytes, None for the op's own.
    """
    compute, logits = product_dtypes(hidden, head.weight, None, "auto")
    weight, bias, N = head.weight, head.bias, sum(per_group)
    kernel = KernelHead(weight, bias, LogitTransform(), compute, logits, None)  # type: ignore[arg-type]
    # The planner asks a tensor for its dtype and whether the CPU holds it.
    like = hidden if on_cpu else torch.empty(0, dtype=hidden.dtype, device="meta")
    grad = torch.is_grad_enabled()
    wanted = [grad and t is not None and t.requires_grad for t in (hidden, weight, bias)]
    rows: Any = _HeadRows(hidden.new_empty(N, dtype=torch.int64), list(per_group))
    plan = plan_groups(kernel, like, rows, wanted, DEFAULT_BUDGET if budget is None else budget)
    ranges = []
    for _, _, block in plan.ranges:
        n = block.stop - block.start
        shape = plan.blocks(kernel, like, n)
        # On a CPU the work on rows holds a few float32 tiles of logits; on a GPU it is a kernel.
        tiles = 3 * 4 * min(n * shape.cols, _TILE["cpu"]) if on_cpu else 0
        ranges.append(plan.sizes(kernel, like, n).total(shape.rows, shape.cols) + tiles)
    return _HeadLoss.apply(hidden, weight, bias, plan, ranges)
