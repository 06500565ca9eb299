"""What a configuration will need: the peak memory of a training step, term by term, and the longest context that fits a GPU.

The step is traced on tensors without data (tspin.tracing) from the model's config alone: its own layers, attention, adapters and
checkpointing run, so there is no formula for any architecture, and what a term counts is what the code allocates. The
loss head comes from tspin_kernels' planner, the optimizer from one real step on a small weight. One process is priced, or
one of several that FSDP2 divides the model over, which is arithmetic and no trace; what DDP's buckets add is not. It
deliberately reads no weights and no data.

P prompt tokens, L tokens of a response, G members of a triplet.
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from transformers import AutoModelForCausalLM, PreTrainedConfig

from tspin import tiling
from tspin.model import causal_lm, decoder_layers, disable_dropout, head_of
from tspin.optimizers import OptimizerBytes, optimizer_bytes
from tspin.prefix import NAME, PrefixLayout, layout_inputs, refusal
from tspin.tracing import (
    COPIES,
    WORK,
    LiveBytes,
    Select,
    assume_no_padding,
    gpu_attention,
    grouped_experts,
    head_loss,
    two_tiles,
)

if TYPE_CHECKING:
    from tspin.training_args import TSPINConfig

WEIGHTS, FROZEN, STATES, GRADIENTS = "weights", "frozen weights", "optimizer states", "gradients"
KEPT, HEAD, LOGITS = "activations kept for the backward", "output head", "logits"
TEMPORARIES = "optimizer's temporaries"
_LAST, _BETWEEN, _FIRST = "backward of the last layer", "backward", "backward of the first layer"
OPTIMIZER_PHASE = "optimizer"
SCORING_PHASE = "scoring of the whole triplet"
BACKWARD_PHASES = (SCORING_PHASE, "forward", "loss", _LAST, _BETWEEN, _FIRST)
_DEPTHS = (3, 4)
_Phases = dict[str, dict[str, int]]


@dataclass(frozen=True)
class Context:
    """The tokens of one triplet: a prompt and the responses that follow it."""

    prompt: int
    responses: tuple[int, ...]

    @property
    def tokens(self) -> int:
        """Of the prompt once and of all responses."""
        return self.prompt + sum(self.responses)


@dataclass(frozen=True)
class MemoryPrediction:
    """Bytes by what they are for, at the fullest moment of each phase of a step; `gpu`: of a CUDA GPU, else of the CPU."""

    context: Context
    phases: dict[str, dict[str, int]]
    shared: bool
    sequential: bool
    tiled: bool = False

    @property
    def fullest(self) -> str:
        """The phase that the peak falls in."""
        return max(self.phases, key=lambda phase: sum(self.phases[phase].values()))

    @property
    def terms(self) -> dict[str, int]:
        """Bytes of each term at the peak."""
        return self.phases[self.fullest]

    @property
    def peak(self) -> int:
        """Most bytes allocated at once."""
        return sum(self.terms.values())


def predict_memory(
    config: PreTrainedConfig,
    args: TSPINConfig,
    *,
    prompt_tokens: int,
    response_tokens: int | Sequence[int],
    others: Sequence[Context] | None = None,
    dtype: torch.dtype = torch.float32,
    peft_config: Any = None,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    gpu: bool = True,
    sharing: bool = True,
    members: int | None = None,
    quantization: str = "none",
    gpus: int = 1,
) -> MemoryPrediction:
    """The memory of one optimizer step of `TSPINTrainer` on triplets of the given lengths.

    Args:
        config: of the model, as transformers reads it from config.json.
        args: of the trainer; method, batch, optimizer, checkpointing, autocast, head, tiles and the sequential backward are read
            from it, "auto" being off.
        prompt_tokens, response_tokens: lengths; one number stands for all members.
        others: the further triplets of the micro-batch of `args.per_device_train_batch_size`, where they are not all as long.
        dtype: of the weights. peft_config: the adapter to train, None for all weights.
        attn_implementation, trust_remote_code: as for loading.
        gpu: of a CUDA GPU with a fused attention kernel; False: of this machine's CPU.
        sharing: one row for a triplet, where the model can; else three rows.
        members: of a triplet; default those of iteration 1.
        quantization: "nf4" or "int8": bits of the frozen weights of linear layers under an adapter.
        gpus: over which FSDP2 divides weights, gradients and states, layer by layer.
    Raises:
        ValueError: lengths that are not positive, or a model that no causal LM class knows.
    """
    members = len(args.members_at(1)) if members is None else members
    lengths = (response_tokens,) * members if isinstance(response_tokens, int) else tuple(response_tokens)[:members]
    if prompt_tokens < 1 or not lengths or min(lengths) < 1:
        raise ValueError(
            f"prompt_tokens, response_tokens: want positive lengths, got {prompt_tokens} and {response_tokens}"
        )
    first = Context(prompt_tokens, lengths)
    sequential = args.sequential_backward == "on"
    optimizer = optimizer_bytes(args, dtype, gpu)
    loading = {"dtype": dtype, "attn_implementation": attn_implementation, "trust_remote_code": trust_remote_code}

    def trace(config: PreTrainedConfig) -> MemoryPrediction:
        with _quiet():
            with torch.device("meta"):
                model: nn.Module = AutoModelForCausalLM.from_config(config, **loading)
                shared = sharing and refusal(model) is None  # type: ignore[arg-type]
                if peft_config is not None:
                    from peft import get_peft_model

                    model = get_peft_model(model, peft_config)  # type: ignore
            with FakeTensorMode(), torch.device("cpu"):
                _leave_meta(model)
                quantized = _Quantized.of(model, quantization, dtype)
                batch = args.per_device_train_batch_size
                contexts = [first] * batch if others is None else [first, *others][:batch]
                if sequential:
                    contexts = [Context(prompt_tokens, (max(lengths),))]
                step = _Step(args, model, contexts, shared, gpu)
                step.accumulates = sequential or args.gradient_accumulation_steps > 1
                if sequential and shared:
                    step.scored = first
                phases = step.trace(optimizer)
        phases = {phase: quantized.applied(terms) for phase, terms in phases.items()}
        return MemoryPrediction(first, phases, shared, sequential, step.tiled)

    depth = config.get_text_config().num_hidden_layers
    layers = _LayerSizes.of(config, trust_remote_code)
    if depth <= max(_DEPTHS) or not layers.equal:
        whole = trace(config)
    else:
        few, more = (trace(_with_depth(config, n)) for n in _DEPTHS)
        whole = replace(more, phases=_at_depth(few.phases, more.phases, depth))
    if gpus == 1:
        return whole
    itemsize = (args.autocast_dtype or dtype).itemsize
    sharded = _Sharded(gpus, layers.largest * itemsize, layers.rest * itemsize)
    return replace(whole, phases={phase: sharded.applied(phase, terms) for phase, terms in whole.phases.items()})


def _with_depth(config: PreTrainedConfig, layers: int) -> PreTrainedConfig:
    config = copy.deepcopy(config)
    text = config.get_text_config()
    depth = text.num_hidden_layers
    for name, value in list(vars(text).items()):
        if isinstance(value, list) and len(value) == depth:
            setattr(text, name, value[:layers])
    text.num_hidden_layers = layers
    return config


@dataclass(frozen=True)
class _LayerSizes:
    """Whether all layers are alike; elements of the largest, and of what is in no layer."""

    equal: bool
    largest: int
    rest: int

    @classmethod
    def of(cls, config: PreTrainedConfig, trust_remote_code: bool) -> _LayerSizes:
        key = type(config), config.to_json_string(), trust_remote_code
        if key not in _KNOWN_LAYERS:
            _KNOWN_LAYERS[key] = cls._read(copy.deepcopy(config), trust_remote_code)
        return _KNOWN_LAYERS[key]

    @classmethod
    def _read(cls, config: PreTrainedConfig, trust_remote_code: bool) -> _LayerSizes:
        text = config.get_text_config()
        with _quiet(), torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
        layers = decoder_layers(model)
        kinds = {(type(layer), *((n, p.shape) for n, p in layer.named_parameters())) for layer in layers}
        sizes = [sum(p.numel() for p in layer.parameters()) for layer in layers]
        one_type = len(set(getattr(text, "layer_types", None) or ())) <= 1
        total = sum(p.numel() for p in model.parameters())
        return cls(one_type and len(kinds) == 1, max(sizes, default=0), total - sum(sizes))


_KNOWN_LAYERS: dict[tuple, _LayerSizes] = {}


def _at_depth(few: _Phases, more: _Phases, depth: int) -> _Phases:
    # Every term is linear in the layers at the forward's end and in the backward of the last and the first of them; between
    # those two it goes evenly from the one to the other.
    low, high = _DEPTHS
    phases = {}
    for phase in more.keys() - {_BETWEEN}:
        a, b = few[phase], more[phase]
        terms = {t: a.get(t, 0) + (b.get(t, 0) - a.get(t, 0)) * (depth - low) // (high - low) for t in a | b}
        phases[phase] = {term: size for term, size in terms.items() if size > 0}
    return {phase: phases[phase] for phase in more if phase in phases}


class _Step:
    """One training step without data, on a model that is made for it and spoilt by it."""

    def __init__(
        self, args: TSPINConfig, model: nn.Module, contexts: Sequence[Context], shared: bool, gpu: bool
    ) -> None:
        self.args, self.model, self.contexts = args, model, contexts
        self.shared, self.gpu, self.accumulates = shared, gpu, False
        self.scored: Context | None = None  # without a gradient, before the step
        disable_dropout(model)
        if shared:
            causal_lm(model).set_attn_implementation(NAME)
        elif len({context.prompt + response for context in contexts for response in context.responses}) == 1:
            assume_no_padding(causal_lm(model))
        self.tiled = args.sequence_tiling == "on" and tiling.refusal(model) is None
        if self.tiled:
            tiling.tile_sequences(model)
        if args.gradient_checkpointing:
            _enable_checkpointing(model, dict(args.gradient_checkpointing_kwargs or {}))  # type: ignore
        model.train()

    def trace(self, optimizer: OptimizerBytes) -> dict[str, dict[str, int]]:
        """Bytes by label at the fullest moment of each phase."""
        parameters = list(self.model.parameters())
        trainable = [p for p in parameters if p.requires_grad]
        live = LiveBytes()
        live.hold(trainable, WEIGHTS)
        live.hold([*parameters, *self.model.buffers()], FROZEN if len(trainable) < len(parameters) else WEIGHTS)
        states = torch.empty(optimizer.states(trainable), dtype=torch.uint8)
        live.hold(states, STATES)
        if self.accumulates:
            for p in trainable:
                p.grad = torch.empty_like(p)
            live.hold([p.grad for p in trainable], GRADIENTS)
        with live, two_tiles(), grouped_experts(), gpu_attention() if self.gpu else nullcontext():
            if self.scored is not None:
                with torch.no_grad(), self._autocast():
                    self._score(live, self.scored)
            with self._autocast():
                loss = self._forward(live)
            live.label, live.phase = WORK, _LAST
            loss.backward()
            del loss
            live.relabel([p.grad for p in trainable], GRADIENTS)
            live.label, live.phase = TEMPORARIES, OPTIMIZER_PHASE
            torch.empty(optimizer.temporaries(trainable), dtype=torch.uint8)
        phases = live.peaks()
        phases.pop("before")
        return phases

    def _score(self, live: LiveBytes, context: Context) -> None:
        inputs, count = self._inputs([context]), sum(context.responses)
        live.phase, core = SCORING_PHASE, causal_lm(self.model)
        if self.args.fused == "off":
            rows = torch.empty(count, dtype=torch.int64)
            logits = Select.apply(self.model(**inputs, use_cache=False).logits.flatten(0, 1), rows)
            logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
            return
        hidden = core.base_model(**inputs, use_cache=False).last_hidden_state.flatten(0, 1)
        torch.clear_autocast_cache()
        head_loss(hidden, head_of(self.model), [count], budget=self.args.memory_budget, on_cpu=not self.gpu)

    def _forward(self, live: LiveBytes) -> Tensor:
        per_group = [sum(context.responses) for context in self.contexts]
        inputs = self._inputs(self.contexts)
        live.phase, core = "forward", causal_lm(self.model)
        layers = decoder_layers(core)
        for layer, phase in zip(layers[-2::-1], [*[_BETWEEN] * (len(layers) - 2), _FIRST], strict=False):
            layer.register_forward_hook(partial(_on_gradient, partial(setattr, live, "phase", phase)))
        if self.args.fused == "off":
            logits = self.model(**inputs, use_cache=False).logits
            live.relabel_all(WORK, KEPT)
            live.relabel(logits, LOGITS)
            live.label, live.phase = LOGITS, "loss"
            rows = torch.empty(sum(per_group), dtype=torch.int64)
            logits = Select.apply(logits.flatten(0, 1), rows)
            every = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
            with torch.set_grad_enabled(self.args.entropy_coef != 0):
                entropy = -(every.exp() * every).sum(-1)
            return every.gather(-1, rows[:, None]).sum() + entropy.sum()
        hidden = core.base_model(**inputs, use_cache=False).last_hidden_state.flatten(0, 1)
        torch.clear_autocast_cache()
        live.relabel_all(WORK, KEPT)
        live.label, live.phase = HEAD, "loss"
        head = head_of(self.model)
        return head_loss(hidden, head, per_group, budget=self.args.memory_budget, on_cpu=not self.gpu)

    def _inputs(self, contexts: Sequence[Context]) -> dict[str, Any]:
        if self.shared:
            layout = PrefixLayout(tuple((context.prompt, context.responses) for context in contexts))
            input_ids = torch.empty(1, sum(context.tokens for context in contexts), dtype=torch.int64)
            return {"input_ids": input_ids, **layout_inputs(layout, torch.device("cpu"))}
        lengths = [context.prompt + response for context in contexts for response in context.responses]
        input_ids = torch.empty(len(lengths), max(lengths), dtype=torch.int64)
        return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids) if len(set(lengths)) > 1 else None}

    def _autocast(self) -> Any:
        dtype = self.args.autocast_dtype
        return nullcontext() if dtype is None else torch.autocast("cpu", dtype=dtype)


def _on_gradient(enter: Callable[[], None], module: nn.Module, args: Any, output: Any) -> None:
    hidden = output[0] if isinstance(output, tuple) else output
    if hidden.requires_grad and torch.is_grad_enabled():
        hidden.register_hook(lambda _: enter())


def _leave_meta(model: nn.Module) -> None:
    # The same tensors as the CPU's, still without data; tied ones stay tied.
    made: dict[int, Any] = {}

    def on_cpu(tensor: Tensor) -> Tensor:
        if id(tensor) not in made:
            new: Any = torch.empty(tensor.shape, dtype=tensor.dtype)
            new = nn.Parameter(new, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else new
            made[id(tensor)] = (new, tensor)
        return made[id(tensor)][0]

    for module in model.modules():
        for tensors in (module._parameters, module._buffers, vars(module)):
            tensors.update({name: on_cpu(t) for name, t in tensors.items() if isinstance(t, Tensor)})  # type: ignore


def _enable_checkpointing(model: Any, options: dict[str, Any]) -> None:
    offload, every = options.pop("offload", False), options.pop("every_n_layers", 1)
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable(options or None, every_n_layers=every)
    if offload:
        for module in model.modules():
            function = getattr(module, "_gradient_checkpointing_func", None)
            if function is not None:
                module._gradient_checkpointing_func = _offloaded(function)


def _offloaded(function: Any) -> Any:
    # What transformers' `offload` keeps in host memory has no bytes here until it is wanted again.
    def checkpoint(*args: Any, **kwargs: Any) -> Any:
        with saved_tensors_hooks(lambda t: (t.shape, t.dtype), lambda kept: torch.empty(kept[0], dtype=kept[1])):
            return function(*args, **kwargs)

    return checkpoint


@dataclass(frozen=True)
class _Quantized:
    """Of frozen linear layers in bitsandbytes' formats, in bytes: what they no longer take, and one of them made whole again."""

    saved: int = 0
    whole: int = 0

    @classmethod
    def of(cls, model: nn.Module, quantization: str, dtype: torch.dtype) -> _Quantized:
        if quantization == "none":
            return cls()
        head = head_of(model).weight
        linear = [m.weight for m in model.modules() if isinstance(m, nn.Linear) and not m.weight.requires_grad]
        elements = [w.numel() for w in linear if w is not head]
        # nf4 keeps a float32 scale for each 64 weights, int8 one for each row.
        kept = 4.5 / 8 if quantization == "nf4" else 1.0
        return cls(int(sum(elements) * (dtype.itemsize - kept)), max(elements, default=0) * dtype.itemsize)

    def applied(self, terms: dict[str, int]) -> dict[str, int]:
        if not self.saved:
            return terms
        return terms | {FROZEN: terms[FROZEN] - self.saved, "a quantized weight made whole": self.whole}


@dataclass(frozen=True)
class _Sharded:
    """FSDP2 over some GPUs: what lies in shares, and in bytes the layer and the rest that are gathered to be computed with."""

    gpus: int
    layer: int
    rest: int

    def applied(self, phase: str, terms: dict[str, int]) -> dict[str, int]:
        divided = (WEIGHTS, FROZEN, STATES, GRADIENTS, TEMPORARIES)
        shares = {term: -(-size // self.gpus) if term in divided else size for term, size in terms.items()}
        # Its gathered weights are the copies that autocast would make.
        shares.pop(COPIES, None)
        if phase == OPTIMIZER_PHASE:
            return shares
        # One layer at work and the next on its way, and in the backward the gradient of both, not yet in shares.
        times = 1 if phase == "forward" else 2
        return shares | {"gathered by FSDP2": times * (2 * self.layer + self.rest)}


@contextmanager
def _quiet() -> Iterator[None]:
    # Of a model that is never run, transformers has nothing to say that a user should read.
    logger = logging.getLogger("transformers")
    level = logger.level
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            logger.setLevel(level)
