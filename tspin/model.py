"""Language models as the trainer sees them: the output head, and one forward pass from tokens to a loss.

Works for every transformers causal LM whose logits are `transform(hidden weight^T + bias)` of its trunk's hidden
states, wrapped by peft or not; `probe_head` compares with real logits once and refuses the others. Deliberately holds
no patch for any architecture, and scores inside the model's own forward so that the hooks of DDP and FSDP fire.

N response tokens, R rows of tokens of length T, B groups (prompts), G members of a group, V vocabulary, D hidden width.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import MethodType
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tspin.prefix import NAME as PREFIX_ATTENTION
from tspin.prefix import layout_inputs
from tspin_kernels import SequenceStats, linear_logprobs, linear_sequence_loss, sequence_loss

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Head:
    """How hidden states become logits: `z = hidden weight^T + bias`, times `logit_scale`, then the soft cap.

    weight: [V, D], differentiable; with a LoRA adapter on the head, the base weight plus the adapter's update.
    bias: [V] or None. softcap: `softcap * tanh(z / softcap)`, or None.
    """

    weight: Tensor
    bias: Tensor | None
    logit_scale: float
    softcap: float | None


def causal_lm(model: nn.Module) -> PreTrainedModel:
    """The transformers model: the adapted one inside a peft wrapper, everything else as it is."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The layers of a causal LM, from the first to the last; none where they are not in one list of the config's length."""
    core = causal_lm(model)
    depth = core.config.get_text_config().num_hidden_layers
    lists = (list(m) for m in core.modules() if isinstance(m, nn.ModuleList) and len(m) == depth)
    return next(lists, [])


def _head_module(model: nn.Module) -> nn.Module:
    core = causal_lm(model)
    head = core.get_output_embeddings() if hasattr(core, "get_output_embeddings") else None
    if head is None or core.base_model is core:
        raise ValueError(
            f"model: want a transformers causal LM with a trunk (base_model) and an output head, got "
            f"{type(core).__name__}; use fused='off' for models that only give logits"
        )
    return head


def _head_weight(head: Any) -> Tensor:
    """[V, D] weight of the head; a LoRA update is added as a differentiable tensor."""
    if not hasattr(head, "base_layer"):
        return head.weight
    from peft.tuners.lora import Linear

    if not isinstance(head, Linear) or head.lora_variant or any(head.lora_bias.values()):
        raise ValueError(
            f"peft_config: want plain LoRA on the output head, got {type(head).__name__} with variants "
            f"{sorted(getattr(head, 'lora_variant', {}))}; leave the head out of target_modules, or use fused='off'"
        )
    weight: Any = head.base_layer.weight
    if not head.merged and not head.disable_adapters:
        for adapter in head.active_adapters:
            if adapter in head.lora_A:
                weight = weight + head.get_delta_weight(adapter).to(weight.dtype)
    return weight


def head_of(model: nn.Module) -> Head:
    """The output head of a causal LM and its logit transform, read from the module and the config.

    Raises:
        ValueError: the model has no head or trunk, or its head carries an adapter other than plain LoRA.
    """
    module = _head_module(model)
    config = causal_lm(model).config.get_text_config()
    number = lambda key: value if isinstance(value := getattr(config, key, None), int | float) and value else None
    scale = (number("logit_scale") or 1.0) * (number("lm_head_multiplier") or 1.0) / (number("logits_scaling") or 1.0)
    softcap = number("final_logit_softcapping") or number("logits_soft_cap")
    bias = getattr(getattr(module, "base_layer", module), "bias", None)
    return Head(_head_weight(module), bias, scale, softcap)


@torch.no_grad()
def probe_head(model: nn.Module) -> None:
    """Compare the head's log-probs and entropies with the model's real logits on a few tokens.

    The head's input is scaled so that logits spread over tens of nats: a soft cap or a scale that the config keys
    did not reveal shows even on a freshly initialised model.

    Raises:
        ValueError: they differ, so the model cannot be scored through its head.
    """
    head, core = head_of(model), causal_lm(model)
    V = head.weight.shape[0]
    input_ids = (torch.arange(1, 9, device=head.weight.device) * 7 % V)[None]
    mask = torch.ones_like(input_ids)
    was_training = model.training
    model.eval()
    try:
        hidden = core.base_model(input_ids=input_ids, attention_mask=mask, use_cache=False).last_hidden_state[0]
        amplify = 20.0 / (hidden @ head.weight.T).float().std().clamp(min=1e-6).item()
        amplified = []

        def scale_input(module: nn.Module, args: tuple) -> tuple:
            amplified.append(module)
            return (args[0] * amplify, *args[1:])

        hook = _head_module(model).register_forward_pre_hook(scale_input)
        try:
            logits = core(input_ids=input_ids, attention_mask=mask, use_cache=False).logits[0]
        finally:
            hook.remove()
    finally:
        model.train(was_training)
    targets = torch.arange(0, V, max(1, V // 16), device=hidden.device)
    want = logits.float().log_softmax(-1)
    got = linear_logprobs(
        (hidden * amplify if amplified else hidden)[:, None].expand(-1, len(targets), -1),
        head.weight,
        targets.expand(len(hidden), -1),
        head.bias,
        logit_scale=head.logit_scale,
        softcap=head.softcap,
        entropy="value",
    )
    entropy = -(want.exp() * want).sum(-1, keepdim=True)
    gap = max((got.logprobs - want[:, targets]).abs().max(), (got.entropy - entropy).abs().max()).item()
    tolerance = 64 * torch.finfo(hidden.dtype).eps * max(1.0, logits.abs().max().item())
    if not gap <= tolerance:
        raise ValueError(
            f"model: {type(core).__name__} cannot be scored through its output head: log-probs differ from its own "
            f"logits by {gap:.2g} nats (tolerance {tolerance:.2g}), so it transforms hidden states or logits in a way "
            "its config does not say; use fused='off', which takes the model's logits at the cost of their memory"
        )


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout probability to 0: a log-prob under dropout is not the policy's log-prob.

    Covers dropout modules (adapters' too), probabilities kept as attributes, and those read from the config.
    """
    changed = set()
    holders = [*model.modules(), *{id(c): c for m in model.modules() if (c := vars(m).get("config"))}.values()]
    for holder in holders:
        for name, value in list(vars(holder).items()):
            is_probability = "drop" in name or (name == "p" and isinstance(holder, nn.modules.dropout._DropoutNd))
            if is_probability and isinstance(value, float) and value > 0:
                setattr(holder, name, 0.0)
                changed.add(f"{type(holder).__name__}.{name}")
    if changed:
        logger.info("dropout set to 0 in %s: log-probs must be those of the policy", ", ".join(sorted(changed)))


class BatchTooLargeError(ValueError, torch.OutOfMemoryError):
    """A batch without a gradient did not fit the GPU; the message says which key makes it smaller. What is finished is kept."""


@contextmanager
def naming_out_of_memory(rows: int, what: str, keys: str) -> Iterator[None]:
    """BatchTooLargeError where the device has no room for `rows` rows at once."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise BatchTooLargeError(
            f"{keys}: want batches that fit the GPU, got no memory for {what} {rows} rows at once; lower it and go on with "
            "allow_config_change: true"
        ) from error


@dataclass(frozen=True)
class ScoreRequest:
    """What `model(input_ids=..., attention_mask=..., score=request)` computes from the hidden states.

    rows: [N] int64 indices into the flattened [R * T] hidden states; targets, sequence_ids: [N] int64.
    loss_fn, group_size, group_inputs, num_groups, normalizer, entropy, memory_budget: as `linear_sequence_loss`.
    fused: through the head without [N, V] logits; False takes the model's own logits.
    """

    rows: Tensor
    targets: Tensor
    sequence_ids: Tensor
    loss_fn: Callable[..., Tensor]
    group_size: int
    group_inputs: tuple[Tensor, ...] = ()
    num_groups: int | None = None
    normalizer: float | Tensor | None = None
    entropy: Any = "value"
    memory_budget: int | None = None
    fused: bool = True


def _call_as(module: nn.Module, forward: Callable, *args: Any) -> Any:
    # Hooks of the module fire as in a forward of its own: FSDP gathers the weight there and scatters its gradient.
    before = vars(module).get("forward")
    module.forward = forward
    try:
        return module(*args)
    finally:
        del module.forward
        if before is not None:
            module.forward = before


def _score(model: nn.Module, plain_forward: Callable, score: ScoreRequest, **inputs) -> tuple[Tensor, SequenceStats]:
    if "prefix_layout" in inputs and causal_lm(model).config._attn_implementation != PREFIX_ATTENTION:
        raise ValueError("batch: rows that share prompts are scored inside tspin.prefix.share_prompts(model); got none")
    groups = {name: getattr(score, name) for name in ("group_size", "group_inputs", "num_groups", "normalizer")}
    if score.fused:
        hidden = causal_lm(model).base_model(**inputs, use_cache=False).last_hidden_state

        def loss(hidden: Tensor) -> tuple[Tensor, SequenceStats]:
            # Autocast has kept copies of the weights of all layers, which are done.
            torch.clear_autocast_cache()
            head = head_of(model)
            return linear_sequence_loss(
                *(hidden.flatten(0, 1), head.weight, score.targets, score.sequence_ids, score.loss_fn, head.bias),  # type: ignore
                rows=score.rows,
                entropy=score.entropy,
                memory_budget=score.memory_budget,
                ignore_index=None,
                logit_scale=head.logit_scale,
                softcap=head.softcap,
                **groups,
            )

        return _call_as(_head_module(model), loss, hidden)
    logits = plain_forward(model, **inputs, use_cache=False).logits.flatten(0, 1)[score.rows]
    every = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    logprobs = every.gather(-1, score.targets[:, None])[:, 0]
    with torch.set_grad_enabled(torch.is_grad_enabled() and score.entropy == "grad"):
        entropy = -(every.exp() * every).sum(-1) if score.entropy else None
    return sequence_loss(logprobs, entropy, score.sequence_ids, score.loss_fn, **groups)


def cache_keyword(model: nn.Module) -> str:
    """What the model's forward calls its cache of keys and values: transformers renamed it in 5.24."""
    return "cache" if "cache" in inspect.signature(causal_lm(model).forward).parameters else "past_key_values"


def install_scoring(model: nn.Module) -> None:
    """Give the model's own forward the keyword `score`: with a ScoreRequest it returns (loss, SequenceStats).

    Without it, forward is unchanged, but dropout is off for good. Calling it twice changes nothing.

    Raises:
        ValueError: a peft method that prepends virtual tokens, which shift every position.
    """
    if any(config.is_prompt_learning for config in getattr(model, "peft_config", {}).values()):
        raise ValueError(
            "peft_config: want an adapter inside the layers (LoRA and its kin), got prompt learning, whose virtual "
            "tokens shift every position; use LoraConfig"
        )
    if "_scores_sequences" in vars(model):
        return
    disable_dropout(model)
    plain_forward = type(model).forward

    def forward(self, *args, score: ScoreRequest | None = None, **inputs):
        if score is None:
            return plain_forward(self, *args, **inputs)
        return _score(self, plain_forward, score, **inputs)

    # generate() reads the signature to learn which inputs the model takes.
    forward.__signature__ = inspect.signature(plain_forward)  # type: ignore
    model.forward = MethodType(forward, model)
    model._scores_sequences = True  # type: ignore


def vocabulary_size(model: nn.Module) -> int:
    """Rows of the input embeddings: the token ids below it are legal, whatever the tokenizer has."""
    embeddings: Any = cast(Any, model).get_input_embeddings()
    return getattr(embeddings, "num_embeddings", None) or embeddings.weight.shape[0]


def score_batch(model: nn.Module, batch: dict[str, Any], loss_fn: Callable[..., Tensor], **request):
    """(loss, SequenceStats [B, G]) of a `TripletCollator` batch; `request` are further fields of ScoreRequest."""
    inputs, layout = {"attention_mask": batch["attention_mask"]}, batch.get("prefix_layout")
    if layout is not None:
        inputs = layout_inputs(layout, batch["input_ids"].device)
    groups, members = batch["lengths"].shape
    score = ScoreRequest(
        batch["rows"], batch["targets"], batch["sequence_ids"], loss_fn, members, num_groups=groups, **request
    )
    return model(input_ids=batch["input_ids"], **inputs, score=score)
