"""What a run will take: floating-point operations of training, scoring and sampling by term, and from them GPU hours.

The operations are counted on the model's own forward without data, so there is no formula for any architecture. The hours rest on
assumptions that `ASSUMED` states and nothing here measures: they are a plan's, not a clock's. Not priced: benchmarks
(`tasks`), loading and saving, and what GPUs wait for each other.

T tokens, P of a prompt, L of a response, V vocabulary, D hidden width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache, PreTrainedModel

from tspin.model import cache_keyword, head_of
from tspin.prefix import refusal
from tspin.tiling import expert_counts
from tspin.tracing import grouped_experts

if TYPE_CHECKING:
    from tspin.config import SelfPlayConfig
    from tspin.training_args import TSPINConfig


@dataclass(frozen=True)
class GPU:
    """From the maker's data sheet: dense 16-bit and 32-bit TFLOP/s, TB/s of its memory, and GB as it is sold."""

    tflops16: float
    tflops32: float
    tb_per_s: float
    gigabytes: int


GPUS = {
    "RTX4090": GPU(165, 82.6, 1.01, 24),
    "A100": GPU(312, 19.5, 2.04, 80),
    "H100": GPU(989, 67, 3.35, 80),
    "H200": GPU(989, 67, 4.8, 141),
    "B200": GPU(2250, 80, 8.0, 180),
}


@dataclass(frozen=True)
class Assumptions:
    """Of what a GPU achieves; ours, unmeasured.

    flops: share of its TFLOP/s in training and prefill. bandwidth: share of its TB/s in decoding. kernel_us: microseconds that
    eager PyTorch needs to launch one kernel, which bounds a decoding step of a small batch. cache_passes: times that a
    decoding step reads or writes the key-value cache, which is copied as it grows.
    """

    flops: float = 0.4
    bandwidth: float = 0.6
    kernel_us: float = 15.0
    cache_passes: float = 3.0

    def __str__(self) -> str:
        return (
            f"{self.flops:.0%} of the peak TFLOP/s, {self.bandwidth:.0%} of the peak TB/s in decoding and {self.kernel_us:g} us a "
            "kernel there, every sample as long as max_new_tokens"
        )


ASSUMED = Assumptions()


@dataclass(frozen=True)
class Forward:
    """Of one forward of a model: FLOP of each token in its layers, of each pair of tokens that attend, and of each scored token in
    the head; weights that every decoding step reads, elements of the cache of each token, and kernels of a decoding step; weights
    of experts, and the share of them that a token is sent to."""

    token: float
    pair: float
    head: float
    weights: int
    cache: int
    kernels: int
    experts: int = 0
    chosen: float = 0.0

    def read(self, sequences: int) -> float:
        """Weights that a decoding step of so many sequences reads, each of which chooses its experts for itself."""
        return self.weights + self.experts * (1 - (1 - self.chosen) ** sequences)

    @classmethod
    def of(cls, model: PreTrainedModel) -> Forward:
        """Counted on the meta device. Raises ValueError where a model does not run without data."""
        head, core = head_of(model).weight, cast(Any, model.base_model)
        short, long = 64, 128
        try:
            with torch.no_grad(), torch.device("meta"), grouped_experts():
                flops = [_flops(model, length) for length in (short, long)]
                cache: Any = DynamicCache(config=model.config)
                cached = {cache_keyword(model): cache}
                prompt = torch.zeros(1, short, dtype=torch.int64)
                core(prompt, use_cache=True, **cached)
                kept = sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers)
                with _Kernels() as kernels:
                    core(prompt[:, :1], use_cache=True, **cached)
        except Exception as error:
            raise ValueError(f"cost: {type(model).__name__} cannot be counted without data: {error}") from error
        # Linear in the tokens but for attention, which is counted there without a mask: all pairs.
        pair = (flops[1] / long - flops[0] / short) / (long - short)
        token = flops[0] / short - pair * short
        # Lookups of the embedding cost nothing; a tied head is read as the head.
        embedding = cast(Any, model.get_input_embeddings()).weight
        experts, chosen = _experts(model)
        read = sum(p.numel() for p in model.parameters()) - experts - (0 if embedding is head else embedding.numel())
        return cls(token, pair, 2.0 * head.numel(), read, kept // short, kernels.count, experts, chosen)


def _experts(model: nn.Module) -> tuple[int, float]:
    """Elements of all experts, and the share of them that a token is sent to."""
    sizes, shares = [], []
    for block in model.modules():
        if isinstance(getattr(block, "experts", None), nn.Module):
            count, chosen = expert_counts(block)
            sizes.append(sum(p.numel() for p in block.experts.parameters()))  # type: ignore
            shares.append(chosen / count)
    return sum(sizes), max(shares, default=0.0)


def _flops(model: Any, length: int) -> int:
    with FlopCounterMode(display=False) as counter:
        # Without a cache transformers looks into the positions for packed rows, which needs data.
        model.base_model(torch.zeros(1, length, dtype=torch.int64), use_cache=True)
    return counter.get_total_flops()


class _Kernels(TorchDispatchMode):
    """Counts the operations that are not mere views."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class Stage:
    """One term of a run: its name, its FLOP, and its GPU hours as predicted."""

    name: str
    flop: float
    hours: float


class Cost:
    """The terms of a run on one kind of GPU.

    Args:
        model: on the meta device.
        args: the trainer's, of each iteration.
        lengths: prompt and annotated tokens of each training row. held_out: the same of `eval_dataset`.
    """

    def __init__(
        self,
        config: SelfPlayConfig,
        model: PreTrainedModel,
        args: Sequence[TSPINConfig],
        lengths: Sequence[tuple[int, int]],
        held_out: Sequence[tuple[int, int]],
        gpu: GPU,
        assumed: Assumptions = ASSUMED,
    ) -> None:
        self.config, self.gpu, self.assumed = config, gpu, assumed
        self.forward = Forward.of(model)
        self.is_16_bit = args[0].autocast_dtype is not None or config.torch_dtype != "float32"
        self.shared = args[0].prefix_sharing != "off" and refusal(model) is None
        self.iterations = [self._iteration(a, t, lengths) for t, a in enumerate(args)]
        # Sampled once from the initial policy.
        needs_proto = any("proto" in a.members_at(t) for t, a in enumerate(args))
        self.once = [self._sampling("proto responses", lengths)] if needs_proto else []
        if held_out:
            answers = self._sampling("held-out answers", held_out, 2 if config.eval_sampled else 1)
            count = len(args) + 1
            self.once.append(Stage(f"{answers.name}, {count} times", answers.flop * count, answers.hours * count))

    @property
    def hours(self) -> float:
        """GPU hours of the whole run."""
        return sum(stage.hours for stage in [*self.once, *(s for stages in self.iterations for s in stages)])

    def _iteration(self, args: TSPINConfig, t: int, lengths: Sequence[tuple[int, int]]) -> list[Stage]:
        stages = [] if args.method == "sft" else [self._sampling("sampling", lengths)]
        once = self._scored(args.members_at(t), lengths)
        if args.needs_references:
            stages.append(self._computed("log-probs of the last policy", sum(once)))
        # Backward: two products for each of the forward, one where the weight is frozen; checkpoints and tiles run layers again.
        backward = 1 if self.config.use_peft else 2
        again = args.gradient_checkpointing or args.sequence_tiling == "on"
        layers = 1 + backward + bool(again) + (args.sequential_backward == "on")
        mixed = 2 if args.spin_mix_previous and t > 0 else 1
        flop = (once[0] * layers + once[1] * (1 + backward)) * args.num_train_epochs * mixed
        return [*stages, self._computed("training", flop)]

    def _scored(self, members: Sequence[str], lengths: Sequence[tuple[int, int]]) -> tuple[float, float]:
        """FLOP of one forward over all triplets: in the layers, and in the head."""
        tokens = pairs = scored = 0.0
        for prompt, annotated in lengths:
            responses = [annotated, *[self._sampled(prompt)] * (len(members) - 1)]
            for number, response in enumerate(responses):
                own = response if self.shared and number else prompt + response
                tokens += own
                # A response's tokens see the prompt and those before them; a prompt's those before them.
                pairs += response * (prompt + response / 2) + (0 if self.shared and number else prompt * prompt / 2)
                scored += response
        return self.forward.token * tokens + self.forward.pair * pairs, self.forward.head * scored

    def _sampled(self, prompt: int) -> int:
        return max(1, min(self.config.max_new_tokens, self.config.training_value("max_length") - prompt))

    def _rate(self) -> float:
        return self.assumed.flops * 1e12 * (self.gpu.tflops16 if self.is_16_bit else self.gpu.tflops32)

    def _computed(self, name: str, flop: float) -> Stage:
        return Stage(name, flop, flop / self._rate() / 3600)

    def _sampling(self, name: str, lengths: Sequence[tuple[int, int]], times: int = 1) -> Stage:
        f, new, size = self.forward, self.config.max_new_tokens, self.config.generation_batch_size
        prompts = sorted((prompt for prompt, _ in lengths), reverse=True)
        flop = seconds = 0.0
        for start in range(0, len(prompts), size):
            batch = prompts[start : start + size]
            prefill = sum(f.token * p + f.pair * p * p / 2 for p in batch)
            decode = sum(new * (f.token + f.head + f.pair * (p + new / 2)) for p in batch)
            # A step reads its weights once, and the cache of what was said so far.
            cached = f.cache * sum(p + new / 2 for p in batch) * self.assumed.cache_passes
            moved = (f.read(len(batch)) + cached) * (2 if self.is_16_bit else 4)
            step = max(
                moved / (self.assumed.bandwidth * self.gpu.tb_per_s * 1e12),
                f.kernels * self.assumed.kernel_us * 1e-6,
                decode / new / self._rate(),
            )
            flop += prefill + decode
            seconds += prefill / self._rate() + new * step
        return Stage(name, flop * times, seconds * times / 3600)

    def table(self) -> list[str]:
        """One line for each term: of the most expensive iteration, and of what is not in any."""
        most = max(range(len(self.iterations)), key=lambda t: sum(s.hours for s in self.iterations[t]))
        named = [(f"iteration {most}: {s.name}", s) for s in self.iterations[most]]
        return [
            f"    {_number(s.hours):>7} GPU hours  {name}, {s.flop:.1e} FLOP"
            for name, s in [*named, *((f"in all: {s.name}", s) for s in self.once)]
        ]

    def verdict(self, name: str, gpus: int = 1) -> str:
        """The whole run in one line, with what it rests on."""
        text = (
            f"predicted, not measured: {_number(self.hours)} hours of one {name} for {len(self.iterations)} iterations"
        )
        if gpus > 1:
            text += f", {_number(self.hours / gpus)} on {gpus} that never wait for each other"
        unpriced = "; the benchmarks of `tasks` come on top" if self.config.tasks else ""
        return f"{text}; assumes {self.assumed}{unpriced}"


def _number(hours: float) -> str:
    return f"{hours:.{max(0, 1 - math.floor(math.log10(hours)))}f}" if 0 < hours < 10 else f"{hours:.0f}"


def gpu_named(name: str) -> GPU:
    """A GPU of `GPUS`, whatever the case and spaces. Raises ValueError."""
    known = GPUS.get(name.upper().replace(" ", "").replace("-", ""))
    if known is None:
        raise ValueError(
            f"gpu: want one of {', '.join(GPUS)}, got {name!r}; for another give --gpu_memory, without its cost"
        )
    return known
