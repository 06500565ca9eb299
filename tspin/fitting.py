"""Whether a configuration fits a GPU, the longest context that does, and which keys to change where it does not.

Every answer is a question to tspin.memory's prediction; this module deliberately knows no term of it.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from tspin.loading import lora_config
from tspin.memory import BACKWARD_PHASES, FROZEN, OPTIMIZER_PHASE, WEIGHTS, Context, MemoryPrediction, predict_memory
from tspin.model import causal_lm, head_of
from tspin.prefix import NAME

if TYPE_CHECKING:
    from tspin.config import SelfPlayConfig
    from tspin.trainer import TSPINConfig

# Of a GPU's memory, what tensors get: the rest is CUDA's own and holes that the allocator cannot fill.
USABLE = 0.92
_LEAST, _RESOLUTION = 16, 0.02


def parse_memory(text: str) -> int:
    """Bytes of "24GB", "24GiB" or "24", which all mean 24 x 2**30, as GPUs are sold. Raises ValueError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:g|gb|gib)?", text.strip().lower())
    if match is None or not float(match[1]):
        raise ValueError(f"gpu_memory: want gigabytes such as 24GB, got {text!r}")
    return int(float(match[1]) * 2**30)


def longest_context(
    config: PreTrainedConfig, args: TSPINConfig, *, gpu_memory: int, prompt_per_response: float = 8.0, **options: Any
) -> Context | None:
    """The triplet with the longest prompt, to about 2 %, whose step fits; None where none does.

    gpu_memory: bytes of the GPU. prompt_per_response: tokens of the prompt by tokens of each response. options: of
    `predict_memory`. Never longer than the positions that the model has.
    """
    usable, members = USABLE * gpu_memory, len(args.members_at(options.get("iteration", 1)))

    def context(prompt: int) -> Context:
        return Context(prompt, (max(1, round(prompt / prompt_per_response)),) * members)

    def peak(prompt: int) -> int:
        triplet = context(prompt)
        lengths = {"prompt_tokens": triplet.prompt, "response_tokens": triplet.responses}
        return predict_memory(config, args, **lengths, **options).peak

    positions = getattr(config.get_text_config(), "max_position_embeddings", None) or 2**24
    most = max(_LEAST, int(positions / (1 + 1 / prompt_per_response)))
    low, below = _LEAST, peak(_LEAST) - usable
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


def joint_pass_fits(
    model: nn.Module,
    args: TSPINConfig,
    longest_prompt: int,
    longest_responses: Sequence[int],
    available: int,
    *,
    sharing: bool = True,
    gpu: bool = True,
) -> bool:
    """Whether one backward through whole micro-batches fits beside the loaded model; else take one response at a time.

    Args:
        model: as the trainer has it, with its adapter, before the first step, so without optimizer states.
        args: of the trainer.
        longest_prompt, longest_responses: tokens of the prompt and of each member, at their longest.
        available: bytes that may still be allocated: on CUDA `torch.cuda.mem_get_info()[0]` and what the allocator has
            reserved but not given out.
        sharing: whether prompts are shared. gpu: False where the model runs on the CPU.
    """
    core = causal_lm(model)
    config = copy.deepcopy(core.config)
    vars(config).pop("quantization_config", None)
    attention = config._attn_implementation
    adapters: Any = getattr(model, "peft_config", None)
    prediction = predict_memory(
        config,
        args,
        prompt_tokens=longest_prompt,
        response_tokens=longest_responses,
        members=len(longest_responses),
        dtype=head_of(model).weight.dtype,
        peft_config=None if adapters is None else adapters[model.active_adapter],  # type: ignore[index]
        attn_implementation="sdpa" if attention == NAME else attention,
        sharing=sharing,
        sequential=False,
        gpu=gpu,
    )
    loaded = prediction.terms.get(WEIGHTS, 0) + prediction.terms.get(FROZEN, 0)
    return prediction.peak - loaded <= USABLE * available


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
    """The prediction for a run's config, at the lengths of its data.

    Args:
        config: of the run. args: of the iteration that scores most members, which is `iteration`.
        prompt, response: tokens of the longest of each.
        gpu_memory: bytes; None predicts for the CPU.
    """

    def __init__(
        self,
        config: SelfPlayConfig,
        args: TSPINConfig,
        iteration: int,
        prompt: int,
        response: int,
        gpu_memory: int | None,
    ) -> None:
        self.gpu_memory = gpu_memory
        self.args, self.prompt, self.response = args, prompt, response
        self.model = read_model_config(config)
        self.options: dict[str, Any] = {
            "dtype": getattr(torch, config.torch_dtype),
            "peft_config": lora_config(config),
            "quantization": config.quantization,
            "attn_implementation": config.attn_implementation,
            "trust_remote_code": config.trust_remote_code,
            "iteration": iteration,
            "sharing": args.prefix_sharing != "off",
            "gpu": gpu_memory is not None,
        }
        self.run_config = config
        self.prediction = self._predict(args, self.options)

    def _predict(self, args: TSPINConfig, options: dict[str, Any]) -> MemoryPrediction:
        lengths = {"prompt_tokens": self.prompt, "response_tokens": self.response}
        return predict_memory(self.model, args, **lengths, **options)

    @property
    def fits(self) -> bool:
        """Whether the peak is within the usable share of the GPU; True where there is none."""
        return self.gpu_memory is None or self.prediction.peak <= USABLE * self.gpu_memory

    def table(self) -> list[str]:
        """One line for each term at the peak, the largest first."""
        p = self.prediction
        terms = sorted(p.terms.items(), key=lambda term: -term[1])
        lines = [f"    {_size(size)}  {term}" for term, size in terms]
        return [*lines, f"    {_size(p.peak)}  at the peak, in the {p.fullest}"]

    def verdict(self) -> str:
        """The peak against the GPU in one line. Raises ValueError, with the remedies, where it does not fit."""
        p = self.prediction
        rows = "one response at a time" if p.sequential else "one row a triplet" if p.shared else "a row a response"
        text = f"{_size(p.peak).strip()} for a prompt of {self.prompt} and {len(p.context.responses)} responses "
        text += f"of {self.response} tokens, {rows}"
        if self.gpu_memory is None:
            return text
        usable = f"{_size(int(USABLE * self.gpu_memory)).strip()} that tensors get of {_size(self.gpu_memory).strip()}"
        if self.fits:
            return f"{text}, within the {usable}; {self._longest(self.args, self.options)}"
        remedies = [f"{keys} ({_size(peak).strip()})" for keys, peak in self.remedies()]
        advice = "; together with what comes before: " + ", then ".join(remedies) if remedies else ""
        raise ValueError(f"want at most the {usable}, got {text}{advice}; {self._longest(self.args, self.options)}")

    def _longest(self, args: TSPINConfig, options: dict[str, Any]) -> str:
        assert self.gpu_memory is not None
        ratio = self.prompt / self.response
        found = longest_context(self.model, args, gpu_memory=self.gpu_memory, prompt_per_response=ratio, **options)
        if found is None:
            return "no context fits"
        return f"longest at this ratio: a prompt of {found.prompt} and responses of {found.responses[0]}"

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
                    changed["peft_config"] = lora_config(replace(self.run_config, use_peft=True))
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
            yield _Lever({"use_peft": True}, (*BACKWARD_PHASES, OPTIMIZER_PHASE))
        if self.options["quantization"] == "none":
            yield _Lever({"quantization": "nf4"}, (*BACKWARD_PHASES, OPTIMIZER_PHASE))


class _Lever(NamedTuple):
    keys: dict[str, Any]
    phases: tuple[str, ...]  # that it makes smaller


def _size(size: int) -> str:
    return f"{size / 2**30:7.2f} GiB" if size >= 2**27 else f"{size / 2**20:7.2f} MiB"


def _yaml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value).replace("True", "true").replace("'", "")
