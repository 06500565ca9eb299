"""The MLPs, experts, norms and adapters of a model some thousand tokens at a time: what is wide in them is never as long as a row.

With gradient checkpointing on they are most of what a backward holds for each token: an MLP is several times wider than the hidden
states, experts copy a token for each of those that it is sent to, norms and adapters compute in float32. All read one token at a
time, so tiles of tokens give what the whole row gives. A tile runs forward, and again just before its own backward. Under
transformers' (non-reentrant) checkpointing that is hardly more work: the recomputation stops at an MLP's input, its last saved
tensor, unless a layer reads the MLP's output again (a norm after it, as in Gemma and OLMo2); only norms and adapters outside MLPs
run once more. Deliberately knows no architecture, and leaves attention alone.

B rows of T tokens, D hidden width.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import output_capturing

from tspin.model import causal_lm, decoder_layers

# Tokens: products of so many are as fast as those of a whole row, and weight gradients are rarely added up.
MLP_TILE = 4096
NORM_TILE = 2 * MLP_TILE
# Tokens of a tile that an expert is to get on average: its weights are read again for each tile.
EXPERT_TILE = 512
_MULTIPLE = 128
_MLPS = ("mlp", "feed_forward", "block_sparse_moe", "shared_mlp")


def _is_norm(module: nn.Module) -> bool:
    # torch's own are one kernel without inner activations.
    return type(module).__name__.endswith("Norm") and not isinstance(module, nn.LayerNorm | nn.RMSNorm)


def _tiled_modules(model: nn.Module) -> Iterator[tuple[nn.Module, int]]:
    """The modules that read one token at a time and compute in more than what they take and give, with the tokens of a tile."""
    for norm in filter(_is_norm, causal_lm(model).base_model.children()):
        yield norm, NORM_TILE
    for layer in decoder_layers(model):
        for name, child in layer.named_children():
            if name in _MLPS:
                yield child, _mlp_tile(child)
                continue
            for module in child.modules():
                if _is_norm(module):
                    yield module, NORM_TILE
                elif hasattr(module, "base_layer") and hasattr(module, "in_features"):
                    yield module, MLP_TILE  # an adapter, which casts what it reads


def expert_counts(mlp: nn.Module) -> tuple[int, int]:
    """How many experts it has, and to how many of them it sends a token; 1 and 1 where it has none."""
    count, chosen = (max((getattr(m, name, 0) for m in mlp.modules()), default=0) for name in ("num_experts", "top_k"))
    return max(1, count), max(1, chosen)


def _mlp_tile(mlp: nn.Module) -> int:
    count, chosen = expert_counts(mlp)
    return MLP_TILE if count == 1 else max(MLP_TILE, EXPERT_TILE * count // chosen)


def refusal(model: nn.Module) -> str | None:
    """Why a row of this model cannot be tiled, None where it can; tried on a few tokens where the weights are there."""
    modules = [module for module, _ in _tiled_modules(model)]
    if not any(name in _MLPS for layer in decoder_layers(model) for name, _ in layer.named_children()):
        return f"its layers have no module named {' or '.join(_MLPS)}"
    for module in modules:
        if any(isinstance(m, nn.modules.dropout._DropoutNd) and m.p > 0 for m in module.modules()):
            return f"{type(module).__name__} has a dropout above 0, which its second forward would draw anew"
        if any(name.endswith("jitter_noise") and value for m in module.modules() for name, value in vars(m).items()):
            return f"{type(module).__name__} has a jitter noise above 0, which its second forward would draw anew"
        inputs = inspect.signature(module.forward).parameters.values()
        if sum(p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in inputs) != 1:
            return f"{type(module).__name__} reads more than hidden states"
    return _mixes_tokens(model)


def tile_sequences(model: nn.Module) -> Callable[[], None]:
    """Let the MLPs, experts, norms and adapters of a causal LM run some thousand tokens at a time, in forward and backward.

    Results and gradients are those of whole rows, to rounding; gradients of 16-bit weights are summed over tiles in float32. For
    any trainer: a model with its adapters, before DDP or FSDP wrap it. Calling it twice changes nothing. `torch.compile` leaves
    what is tiled as it is. Experts run whole in a forward that is asked for router logits, whose loss needs those of all tokens.

    Returns:
        A function that gives the modules back the forward that they had.
    Raises:
        ValueError: layers that are not recognised, that mix tokens where they should not, or that have dropout there.
    """
    reason = refusal(model)
    if reason is not None:
        raise ValueError(
            f"sequence_tiling: want layers whose MLPs read one token at a time, got {type(causal_lm(model)).__name__}: {reason}; "
            "leave it untiled, in a config by sequence_tiling='off'"
        )
    before = []
    for module, tokens in _tiled_modules(model):
        if getattr(module.forward, "func", None) is not _in_tiles:
            before.append((module, vars(module).get("forward")))
            module.forward = partial(_in_tiles, module.forward, module, tokens)

    def untile() -> None:
        for module, forward in before:
            del module.forward
            if forward is not None:
                module.forward = forward

    return untile


@torch.no_grad()
def _mixes_tokens(model: nn.Module) -> str | None:
    core = causal_lm(model)
    weight: Any = core.get_input_embeddings().weight  # type: ignore
    if weight.is_meta or isinstance(weight, torch._subclasses.FakeTensor):
        return None
    generator = torch.Generator().manual_seed(0)
    # One of each kind: layers are alike.
    kinds = {(type(m), *(p.shape for p in m.parameters())): m for m, _ in _tiled_modules(model)}
    for module in kinds.values():
        dtype = next((p.dtype for p in module.parameters() if p.is_floating_point()), weight.dtype)
        own: Any = getattr(module, "weight", None)
        shape: Any = (core.config.get_text_config().hidden_size,)
        if hasattr(module, "in_features"):
            shape = (module.in_features,)
        elif own is not None:
            shape = own.shape  # a norm may have a weight for each head
        x: Any = torch.randn(1, 6, *shape, generator=generator).to(weight.device, dtype)
        read = _reader(module, module, [])
        try:
            whole: Any = read(x)
            if not isinstance(whole, Tensor) or whole.shape[:2] != x.shape[:2]:
                return f"{type(module).__name__} does not return hidden states alone"
            apart = torch.cat([read(x[:, t : t + 1]) for t in range(x.shape[1])], 1)
        except Exception as error:  # of a model's own code
            return f"{type(module).__name__} could not be tried on a few tokens: {error}"
        # Half of the places, of TF32 at best, which a GPU may have multiplied in.
        rounding = max(torch.finfo(dtype).eps, torch.finfo(torch.float16).eps) ** 0.5
        if not (apart - whole).abs().max() <= rounding * whole.abs().max():
            return f"{type(module).__name__} mixes tokens"
    return None


@torch.compiler.disable  # which cannot trace a backward that differentiates
def _in_tiles(
    forward: Callable[..., Any], module: nn.Module, tokens: int, hidden_states: Tensor, *args: Any, **kwargs: Any
) -> Any:
    if hidden_states.shape[:2].numel() <= tokens or args or kwargs or (_has_experts(module) and _asks_for_routing()):
        return forward(hidden_states, *args, **kwargs)
    others: list[None] = []
    read = _reader(forward, module, others)
    flat = hidden_states.reshape(1, -1, *hidden_states.shape[2:])
    # Asked for now: under FSDP2 these are the weights that it has just gathered.
    weights = [p for p in module.parameters() if p.requires_grad]
    if torch.is_grad_enabled() and (weights or flat.requires_grad):
        kept = _Keep.apply(flat, torch.empty(0, requires_grad=True))
        out: Any = _Tiles.apply(kept, read, tokens, *weights)
    else:
        out = _run(read, flat, tokens)
    out = out.view(*hidden_states.shape[:2], *out.shape[2:])
    return (out, *others) if others else out


def _has_experts(module: nn.Module) -> bool:
    return hasattr(module, "experts")


def _asks_for_routing() -> bool:
    return "router_logits" in (output_capturing._active_collector.get() or ())


def _reader(forward: Callable[[Tensor], Any], module: nn.Module, others: list[None]) -> Callable[[Tensor], Any]:
    """`forward`; of experts the first output alone, since layers read no other, and a None in `others` for each of those."""

    def first(hidden: Tensor) -> Any:
        out = forward(hidden)
        if not isinstance(out, tuple):
            return out
        others[:] = [None] * (len(out) - 1)
        return out[0]

    return first if _has_experts(module) else forward


def tiles(total: int, most: int) -> list[slice]:
    """The tokens of a row in nearly equal parts of at most `most`."""
    number = -(-total // most)
    size = min(most, -(-total // (number * _MULTIPLE)) * _MULTIPLE)
    return [slice(start, min(start + size, total)) for start in range(0, total, size)]


def _run(forward: Callable[[Tensor], Tensor], hidden: Tensor, tokens: int) -> Tensor:
    out: Any = None
    for tile in tiles(hidden.shape[1], tokens):
        part = forward(hidden[:, tile])
        out = part.new_empty(1, hidden.shape[1], *part.shape[2:]) if out is None else out
        out[:, tile] = part
    return out


class _Keep(torch.autograd.Function):
    """The input of `_Tiles`, saved by a node before it: when a recomputation has come to it, it has all that the backward needs."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, anchor: Tensor) -> Tensor:
        # The anchor wants a gradient, which makes this a node even where `hidden` wants none.
        ctx.save_for_backward(hidden)
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, dhidden: Tensor) -> tuple[Tensor, None]:  # type: ignore
        return dhidden, None


class _Tiles(torch.autograd.Function):
    """A module over tiles of what `_Keep` has saved, which run again in the backward, one after another."""

    @staticmethod
    def forward(ctx: Any, kept: Tensor, module: Callable[[Tensor], Tensor], tokens: int, *weights: Tensor) -> Tensor:
        device = kept.device.type
        ctx.input, ctx.module, ctx.tokens, ctx.weights = kept.grad_fn, module, tokens, weights
        ctx.autocast = device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
        return _run(module, kept, tokens)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore
        (hidden,) = ctx.input.saved_tensors
        dhidden, sums = torch.empty_like(hidden), [None] * len(ctx.weights)
        with torch.enable_grad(), torch.autocast(*ctx.autocast):
            for tile in tiles(hidden.shape[1], ctx.tokens):
                part = hidden[:, tile].detach().requires_grad_()
                out = ctx.module(part)
                grads = torch.autograd.grad(out, (part, *ctx.weights), dout[:, tile], allow_unused=True)
                dhidden[:, tile] = grads[0]
                sums = [_sum(a, b) for a, b in zip(sums, grads[1:], strict=True)]
        return dhidden, None, None, *(g if g is None else g.to(w.dtype) for g, w in zip(sums, ctx.weights, strict=True))


def _sum(total: Tensor | None, more: Tensor | None) -> Tensor | None:
    if total is None or more is None:
        return total if more is None else more.to(torch.promote_types(more.dtype, torch.float32))
    return total.add_(more)
