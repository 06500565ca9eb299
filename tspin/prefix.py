"""Prompt sharing: one row `[x, y, y', y0]` in place of three, the prompt computed once, through a registered attention function.

No model is patched. The layout of a row travels as a forward keyword to the attention function, which lets each response
see the prompt and itself. Positions are those of separate rows, so rotary embeddings and sliding windows are too. Models whose
layers mix tokens by anything but softmax attention are refused; one that makes masks of its own (Doge) is not noticed here, so
`tspin.scoring.verify_packed_row` compares a first batch with separate rows.

P tokens of a prompt, L of a response, T of a packed row; H query heads, d their width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.masking_utils import sdpa_mask

from tspin.attention import has_kernel, shared_prompt_attention

NAME = "tspin_prefix"
_ATTENTION_LAYERS = {"full_attention", "sliding_attention"}


@dataclass(frozen=True)
class PrefixLayout:
    """Where the groups of one packed row lie: for each, the prompt's length P and the lengths L of its responses, which follow
    it. A group starts where the last one ended."""

    groups: tuple[tuple[int, tuple[int, ...]], ...]

    def responses(self) -> Iterator[tuple[slice, slice]]:
        """Where the prompt and where the response of each member lies in the row."""
        start = 0
        for P, lengths in self.groups:
            prompt, start = slice(start, start + P), start + P
            for L in lengths:
                yield prompt, slice(start, start + L)
                start += L

    def position_ids(self) -> Tensor:
        """[1, T] int64: each response continues its prompt."""
        parts = []
        for P, lengths in self.groups:
            parts += [torch.arange(P), *(torch.arange(P, P + L) for L in lengths)]
        return torch.cat(parts)[None]


def _visible(L: int, S: int, sliding_window: int | None, device: torch.device) -> Tensor | None:
    """[L, S] bool: which of S keys each of the last L positions sees; None where plain causality says it all."""
    window = S if sliding_window is None else min(S, sliding_window)
    if L == S == window:
        return None
    distance = torch.arange(S - L, S, device=device)[:, None] - torch.arange(S, device=device)
    return (distance >= 0) & (distance < window)


@lru_cache(maxsize=4)
def _block_mask(layout: PrefixLayout, window: int | None, device: torch.device) -> BlockMask:
    """What each token of a packed row sees, for FlexAttention."""
    parts = [(g, m, n) for g, (P, lengths) in enumerate(layout.groups) for m, n in enumerate((P, *lengths))]
    group, part, count = torch.tensor(parts).T
    group, part = (x.repeat_interleave(count).to(device) for x in (group, part))
    position = layout.position_ids()[0].to(device)
    T = len(position)

    def sees(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        apart = position[i] - position[j]
        same = (group[i] == group[j]) & ((part[j] == 0) | (part[i] == part[j]))
        return same & (apart >= 0) & (apart < (T if window is None else window))

    return create_block_mask(sees, None, None, T, T, device=device)  # type: ignore


def _has_flex(query: Tensor) -> bool:
    return query.is_cuda


def _attend(
    query: Tensor,  # [B, H, L, d]
    key: Tensor,  # [B, H_kv, S, d]
    value: Tensor,  # [B, H_kv, S, d]
    visible: Tensor | None,  # bool, broadcast to [B, H, L, S]; None: causal, for L of 1 or S
    scaling: float,
    softcap: float | None,
    sinks: Tensor | None,  # [H] logits of an extra key without value
) -> Tensor:
    H, L, S = query.shape[1], query.shape[2], key.shape[2]
    if softcap is None and sinks is None:
        return F.scaled_dot_product_attention(
            query, key, value, visible, is_causal=visible is None and L > 1, scale=scaling, enable_gqa=key.shape[1] != H
        )
    repeats = H // key.shape[1]
    scores = query @ key.repeat_interleave(repeats, 1).transpose(2, 3) * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if visible is None:
        visible = torch.ones(L, S, dtype=torch.bool, device=query.device).tril(S - L)
    scores = scores.masked_fill(~visible, torch.finfo(scores.dtype).min)
    if sinks is not None:
        scores = torch.cat([scores, sinks.view(1, -1, 1, 1).expand(len(scores), -1, L, 1).to(scores.dtype)], -1)
    weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
    return weights[..., :S] @ value.repeat_interleave(repeats, 1)


def prefix_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    prefix_layout: PrefixLayout | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: query [B, H, T, d], key and value [B, H_kv, T, d] -> ([B, T, H, d], None).

    Without a layout (generation, probing, separate rows) it is ordinary attention under the mask of transformers' sdpa.
    """
    logits = (query.shape[-1] ** -0.5 if scaling is None else scaling, softcap, s_aux)
    if prefix_layout is None:
        return _attend(query, key, value, attention_mask, *logits).transpose(1, 2), None
    if torch.is_autocast_enabled(query.device.type):
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    if softcap is None and has_kernel(query, value):
        return shared_prompt_attention(query, key, value, prefix_layout, logits[0], sliding_window, s_aux), None
    if softcap is not None and _has_flex(query):
        mask = _block_mask(prefix_layout, sliding_window, query.device)
        options = {"scaling": logits[0], "softcap": softcap, "s_aux": s_aux}
        return flex_attention_forward(module, query, key, value, mask, **options)[0], None
    pieces, start = [], 0
    for P, lengths in prefix_layout.groups:
        prompt = slice(start, start + P)
        shared_key, shared_value = key[:, :, prompt], value[:, :, prompt]
        visible = _visible(P, P, sliding_window, query.device)
        pieces.append(_attend(query[:, :, prompt], shared_key, shared_value, visible, *logits))
        start += P
        for L in lengths:
            own = slice(start, start + L)
            visible = _visible(L, P + L, sliding_window, query.device)
            keys = torch.cat([shared_key, key[:, :, own]], 2)
            values = torch.cat([shared_value, value[:, :, own]], 2)
            pieces.append(_attend(query[:, :, own], keys, values, visible, *logits))
            start += L
    return torch.cat(pieces, 2).transpose(1, 2), None


AttentionInterface.register(NAME, prefix_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


def refusal(model: PreTrainedModel) -> str | None:
    """Why the prompts of this model cannot be shared, None where they can."""
    config = model.config.get_text_config()
    layers = set(getattr(config, "layer_types", None) or ()) - _ATTENTION_LAYERS
    if layers:
        return f"its layers include {sorted(layers)}"
    if getattr(model, "_is_stateful", False) or any(hasattr(config, key) for key in ("mamba_d_state", "ssm_cfg")):
        return "its layers carry a recurrent state"
    if not getattr(model, "_supports_attention_backend", False):
        return f"{type(model).__name__} does not take a registered attention function"
    if getattr(config, "output_router_logits", False):
        return "its router's loss reads a padding mask (output_router_logits)"
    return None


@contextmanager
def share_prompts(model: PreTrainedModel) -> Iterator[None]:
    """Inside it the model has the attention that understands a `prefix_layout`; ValueError where `refusal` has a reason."""
    reason = refusal(model)
    if reason is not None:
        raise ValueError(
            f"prefix_sharing: {type(model).__name__} cannot share prompts: {reason}; use prefix_sharing='off'"
        )
    before: Any = model.config._attn_implementation
    model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def layout_inputs(layout: PrefixLayout, device: torch.device) -> dict[str, Any]:
    """Forward keywords beside `input_ids` [1, T] for a packed row."""
    # A mask of four dimensions is handed through as it is, so that no [T, T] mask is ever made.
    return {
        "position_ids": layout.position_ids().to(device),
        "attention_mask": torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device),
        "prefix_layout": layout,
    }
