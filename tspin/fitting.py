"""Whether a configuration fits a GPU, the longest context that does, and which keys to change where it does not.

Every answer is a question to tspin.memory's prediction; this module deliberately knows no term of it.
"""

from __future__ import annotations

import copy
import importlib.util
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from tspin.loading import lora_config
from tspin.memory import BACKWARD_PHASES, OPTIMIZER_PHASE, Context, MemoryPrediction, predict_memory
from tspin.model import causal_lm, head_of
from tspin.prefix import NAME

if TYPE_CHECKING:
    from tspin.config import SelfPlayConfig
    from tspin.training_args import TSPINConfig

# Of a GPU's memory, what tensors get: the rest is CUDA's own and holes that the allocator cannot fill.
USABLE = 0.92
_LEAST, _RESOLUTION = 16, 0.02


def parse_memory(text: str) -> int:
    """Bytes of "24GB", "24GiB" or "24", which all mean 24 x 2**30, as GPUs are sold. Raises ValueError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:g|gb|gib)?", text.strip().lower())
    if match is None or not float(match[1]):
        raise ValueError(f"gpu_memory: want gigabytes such as 24GB, got {text!r}")
    return int(float(match[1]) * 2**30)


def gpu_memory(device: torch.device) -> int | None:
    """Bytes of a CUDA GPU that this process may take; None for another device."""
    if device.type != "cuda":
        return None
    share = torch.cuda.get_per_process_memory_fraction(device.index)
    return int(share * torch.cuda.get_device_properties(device).total_memory)


def longest_context(
    config: PreTrainedConfig, args: TSPINConfig, *, gpu_memory: int, prompt_per_response: float = 8.0, **options: Any
) -> Context | None:
    """The triplet with the longest prompt, to about 2 %, whose step fits; None where none does.

    gpu_memory: bytes of the GPU. prompt_per_response: tokens of the prompt by tokens of each response. options: of
    `predict_memory`. Never longer than the positions that the model has.
    """
    usable = USABLE * gpu_memory
    members = options.get("members") or len(args.members_at(1))

    def context(prompt: int) -> Context:
        return Context(prompt, (max(1, round(prompt / prompt_per_response)),) * members)

    def peak(prompt: int) -> int:
        triplet = context(prompt)
        lengths = {"prompt_tokens": triplet.prompt, "response_tokens": triplet.responses}
        return predict_memory(config, args, **lengths, **options).peak

    most = _most_prompt(config, prompt_per_response)
    low = min(_LEAST, most)
    below = peak(low) - usable
    if below > 0:
        return None
    high, above = low, below
    while above <= 0:
        low, below = high, above
        if low == most:
            return context(low)
        high = min(most, low * 64)
        above = peak(high) - usable
    side = 0
    while high - low > max(1, _RESOLUTION * low):
        # The Illinois method: regula falsi that halves the weight of an end which stays.
        guess = round((low * above - high * below) / (above - below))
        guess = min(max(guess, low + 1), high - 1)
        found = peak(guess) - usable
        if found <= 0:
            low, below, above, side = guess, found, above / 2 if side < 0 else above, -1
        else:
            high, above, below, side = guess, found, below / 2 if side > 0 else below, 1
    return context(low)


def _most_prompt(config: PreTrainedConfig, prompt_per_response: float) -> int:
    """The longest prompt that leaves a response its positions."""
    positions = getattr(config.get_text_config(), "max_position_embeddings", None) or 2**24
    return max(1, int(positions / (1 + 1 / prompt_per_response)))


def read_model_config(config: SelfPlayConfig) -> PreTrainedConfig:
    """config.json of the model that a run names, without its weights. Raises ValueError."""
    name, revision = config.model_name_or_path, config.model_revision or "main"
    try:
        return AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=config.trust_remote_code)
    except Exception as error:
        raise ValueError(f"model_name_or_path: cannot read config.json of {name!r}: {error}") from error


def model_without_weights(config: SelfPlayConfig) -> PreTrainedModel:
    """The model that config.json describes, on the meta device."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(
            read_model_config(config), trust_remote_code=config.trust_remote_code, dtype=torch.float32
        )


class MemoryCheck:
    """The prediction for the longest triplet of a training run, against a GPU.

    Args:
        model: its config.
        args: of the trainer.
        context: tokens of the longest triplet; of the longest ones, where several make a micro-batch.
        gpu_memory: bytes; None predicts for the CPU.
        adapter: what `use_peft` would train, for a remedy; None where that is no choice.
        options: of `predict_memory`, but `gpu`.
    """

    def __init__(
        self,
        model: PreTrainedConfig,
        args: TSPINConfig,
        context: Context | Sequence[Context],
        gpu_memory: int | None,
        *,
        adapter: Any = None,
        **options: Any,
    ) -> None:
        self.model, self.args, self.gpu_memory, self.adapter = model, args, gpu_memory, adapter
        self.contexts = [context] * args.per_device_train_batch_size if isinstance(context, Context) else list(context)
        self.context = self.contexts[0]
        self.options = {"peft_config": None, "quantization": "none"} | options | {"gpu": gpu_memory is not None}
        self.prediction = self._predict(args, self.options)

    @classmethod
    def of_run(
        cls,
        config: SelfPlayConfig,
        args: TSPINConfig,
        context: Context | Sequence[Context],
        gpu_memory: int | None,
        *,
        gpus: int = 1,
    ) -> MemoryCheck:
        """For a run's config, without its weights. args, context: of the iteration that scores most members."""
        has_peft = importlib.util.find_spec("peft") is not None
        return cls(
            read_model_config(config),
            args,
            context,
            gpu_memory,
            gpus=gpus,
            adapter=lora_config(replace(config, use_peft=True)) if has_peft else None,
            dtype=getattr(torch, config.torch_dtype),
            peft_config=lora_config(config),
            quantization=config.quantization,
            attn_implementation=config.attn_implementation,
            trust_remote_code=config.trust_remote_code,
            sharing=args.prefix_sharing != "off",
        )

    @classmethod
    def of_model(
        cls,
        model: nn.Module,
        args: TSPINConfig,
        context: Context | Sequence[Context],
        gpu_memory: int | None,
        **options: Any,
    ) -> MemoryCheck:
        """For a model as the trainer has it, with its adapter."""
        core = causal_lm(model)
        config = copy.deepcopy(core.config)
        quantized: Any = vars(config).pop("quantization_config", None)
        attention, adapters = config._attn_implementation, getattr(model, "peft_config", None)
        return cls(
            config,
            args,
            context,
            gpu_memory,
            dtype=head_of(model).weight.dtype,
            peft_config=None if adapters is None else adapters[model.active_adapter],  # type: ignore[index]
            quantization="none" if quantized is None else "nf4" if quantized.load_in_4bit else "int8",
            attn_implementation="sdpa" if attention == NAME else attention,
            **options,
        )

    def _predict(self, args: TSPINConfig, options: dict[str, Any]) -> MemoryPrediction:
        lengths: dict[str, Any] = {"prompt_tokens": self.context.prompt, "response_tokens": self.context.responses}
        lengths |= {"others": self.contexts[1:], "members": len(self.context.responses)}
        return predict_memory(self.model, args, **lengths, **options)

    @property
    def fits(self) -> bool:
        """Whether the peak is within the usable share of the GPU; True where there is none."""
        return self.gpu_memory is None or self.prediction.peak <= USABLE * self.gpu_memory

    def spared(self) -> MemoryCheck:
        """With what the trainer takes of "auto" where a step does not fit: tiles, then one response at a time, until it does.

        Of each only where it lowers the peak; and none on several GPUs, whose steps a run does not predict.
        """
        check, several = self, self.options.get("gpus", 1) > 1
        for key in ("sequence_tiling", "sequential_backward"):
            if check.fits or several or getattr(check.args, key) != "auto":
                continue
            args = copy.copy(check.args)
            setattr(args, key, "on")
            tried = MemoryCheck(self.model, args, self.contexts, self.gpu_memory, adapter=self.adapter, **self.options)
            check = tried if tried.prediction.peak < check.prediction.peak else check
        return check

    def table(self) -> list[str]:
        """One line for each term at the peak, the largest first."""
        p = self.prediction
        terms = sorted(p.terms.items(), key=lambda term: -term[1])
        lines = [f"    {_size(size)}  {term}" for term, size in terms]
        return [*lines, f"    {_size(p.peak)}  at the peak, in the {p.fullest}"]

    def need(self) -> str:
        """The peak, and of what, in words."""
        p, responses = self.prediction, self.context.responses
        rows = "one response at a time" if p.sequential else "one row a triplet" if p.shared else "a row a response"
        lengths = " to ".join(map(str, sorted({min(responses), max(responses)})))
        rows += " in tiles" if p.tiled else ""
        text = f"{_size(p.peak).strip()} for a prompt of {self.context.prompt} and {len(responses)} responses of "
        shorter = len(self.contexts) > 1 and self.contexts[-1] != self.context and not p.sequential
        rows += f", with the next longest, {len(self.contexts)} in all" if shorter else ""
        shards = self.options.get("gpus", 1)
        return f"{text}{lengths} tokens, {rows}" + (f", on each of {shards} GPUs under FSDP2" if shards > 1 else "")

    def verdict(self) -> str:
        """The peak against the GPU in one line. Raises ValueError, with the remedies, where it does not fit."""
        if self.gpu_memory is None:
            return self.need()
        check, longest = self.spared(), self._longest()
        usable = f"{_size(int(USABLE * self.gpu_memory)).strip()} that tensors get of {_size(self.gpu_memory).strip()}"
        if check.fits:
            return f"{check.need()}, within the {usable}; {longest}"
        raise ValueError(f"want at most the {usable}, got {check.need()}{check.advice()}; {longest}")

    def advice(self) -> str:
        """The remedies as the end of a sentence; empty where there is none."""
        remedies = [f"{keys} ({_size(peak).strip()})" for keys, peak in self.remedies()]
        return "; what would help, each with those before it: " + ", then ".join(remedies) if remedies else ""

    def _longest(self) -> str:
        assert self.gpu_memory is not None
        members, options = len(self.context.responses), self.options
        ratio = self.context.prompt / max(self.context.responses)
        args, ways = self.args, [{}]
        if options.get("gpus", 1) == 1:
            # Whatever "auto" may take. One response at a time holds gradients while it goes forward, and may be the shorter.
            keys = [key for key in ("sequence_tiling", "sequential_backward") if getattr(args, key) == "auto"]
            ways = [dict.fromkeys(keys[:n], "on") for n in {max(len(keys) - 1, 0), len(keys)}]
        found = []
        for way in ways:
            tried = copy.copy(args)
            vars(tried).update(way)
            size = {"gpu_memory": self.gpu_memory, "prompt_per_response": ratio, "members": members}
            found.append(longest_context(self.model, tried, **size, **options))
        longest = max((f for f in found if f is not None), key=lambda f: f.prompt, default=None)
        if longest is None:
            return "no context fits"
        how = "".join(f", {key}: {value}" for key, value in ways[found.index(longest)].items())
        text = f"a prompt of {longest.prompt} and responses of {longest.responses[0]}"
        if longest.prompt == _most_prompt(self.model, ratio):
            text += ", all the positions that the model has"
            plain = MemoryCheck(self.model, args, longest, self.gpu_memory, **options)
            if plain.fits:
                how = ""
        return f"longest at this ratio{how}: {text}"

    def remedies(self) -> Iterator[tuple[str, int]]:
        """Keys to set, each with the peak that is left with it and all before it, until the step fits."""
        assert self.gpu_memory is not None
        args, options, now = copy.copy(self.args), dict(self.options), self.prediction
        pending = list(self._levers())
        # Of the levers that act on the fullest phase the first, until the step fits or none is left.
        while lever := next((x for x in pending if now.fullest in x.phases), None):
            pending.remove(lever)
            tried, changed = copy.copy(args), dict(options)
            for key, value in lever.keys.items():
                if key == "use_peft":
                    changed["peft_config"] = self.adapter
                elif key == "quantization":
                    changed[key] = value
                else:
                    setattr(tried, key, value)
            found = self._predict(tried, changed)
            if found.peak >= 0.98 * now.peak:
                continue
            args, options, now = tried, changed, found
            yield ", ".join(f"{key}: {_yaml(value)}" for key, value in lever.keys.items()), now.peak
            if now.peak <= USABLE * self.gpu_memory:
                return

    def _levers(self) -> Iterator[_Lever]:
        # In the order of what they cost: time, then exactness of the optimizer, then what is trained.
        args = self.args
        if args.per_device_train_batch_size > 1:
            steps = args.gradient_accumulation_steps * args.per_device_train_batch_size
            yield _Lever({"per_device_train_batch_size": 1, "gradient_accumulation_steps": steps}, BACKWARD_PHASES)
        if not args.gradient_checkpointing:
            yield _Lever({"gradient_checkpointing": True}, BACKWARD_PHASES)
        if args.sequence_tiling != "on":
            yield _Lever({"sequence_tiling": "on"}, BACKWARD_PHASES)
        if args.sequential_backward != "on":
            yield _Lever({"sequential_backward": "on"}, BACKWARD_PHASES)
        checkpointing: Any = args.gradient_checkpointing_kwargs or {}
        if not checkpointing.get("offload"):
            yield _Lever({"gradient_checkpointing_kwargs": {"offload": True}}, BACKWARD_PHASES)
        if self.options["peft_config"] is None:
            name = str(getattr(args.optim, "value", args.optim))
            if "8bit" not in name:
                eight = "rmsprop_bnb_8bit" if "rmsprop" in name else "adamw_bnb_8bit"
                yield _Lever({"optim": eight}, (*BACKWARD_PHASES, OPTIMIZER_PHASE))
            if self.adapter is not None:
                yield _Lever({"use_peft": True}, (*BACKWARD_PHASES, OPTIMIZER_PHASE))
        if self.options["quantization"] == "none" and (self.adapter or self.options["peft_config"]) is not None:
            yield _Lever({"quantization": "nf4"}, (*BACKWARD_PHASES, OPTIMIZER_PHASE))


class _Lever(NamedTuple):
    keys: dict[str, Any]
    phases: tuple[str, ...]  # that it makes smaller


def _size(size: int) -> str:
    return f"{size / 2**30:7.2f} GiB" if size >= 2**27 else f"{size / 2**20:7.2f} MiB"


def _yaml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value).replace("True", "true").replace("'", "")
