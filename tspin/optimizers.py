"""What an optimizer holds beside weights and gradients, and how to let it hold less.

Bytes of torch.optim are measured on one real step of a small weight, not listed. Deliberately defines no optimizer.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from tspin.tracing import WORK, LiveBytes

# Copies of the trainable elements, in float32, where the optimizer's package is not at hand to be asked.
_STATES = {"adamw": 2, "adam": 2, "rmsprop": 1, "lion": 1, "ademamix": 3, "adafactor": 0}
_PROBE = 4096
_LARGE = 2**28  # bytes of weights


def spare_copies(optimizer: torch.optim.Optimizer) -> None:
    """Let torch.optim step large weights one after the other, unless the user chose between `foreach` and `fused`.

    Its default on a GPU works on lists of all weights, in one or two copies of all of them beside gradients and states. That is
    faster for many small weights only; large ones keep a GPU busy each.
    """
    groups = optimizer.param_groups
    if _is_large([p for group in groups for p in group["params"]]):
        for group in groups:
            if group.get("foreach", True) is None and not group.get("fused"):
                group["foreach"] = False


def _is_large(parameters: Sequence[Tensor]) -> bool:
    return sum(p.numel() * p.element_size() for p in parameters) >= _LARGE


@dataclass(frozen=True)
class OptimizerBytes:
    """Of each trainable element: states, and temporaries of a step on lists of all weights and of one on each in turn."""

    state: float
    of_all: float = 0.0  # 0 where it never works on lists
    of_one: float = 0.0
    of_last: float = 0.0  # what the weight before has left while one is stepped

    def states(self, trainable: Sequence[Tensor]) -> int:
        return int(self.state * sum(p.numel() for p in trainable))

    def temporaries(self, trainable: Sequence[Tensor]) -> int:
        sizes = [p.numel() for p in trainable]
        if self.of_all and not _is_large(trainable):
            return int(self.of_all * sum(sizes))
        return int(max((self.of_last * last + self.of_one * size for last, size in pairwise([0, *sizes])), default=0))


def optimizer_bytes(args: TrainingArguments, dtype: torch.dtype, gpu: bool) -> OptimizerBytes:
    """Of `args.optim` on weights of a dtype, on a GPU or on the CPU."""
    name = str(getattr(args.optim, "value", args.optim))
    try:
        kind, options = Trainer.get_optimizer_cls_and_kwargs(args)
    except (ImportError, ValueError):
        kind, options = None, {}
    if kind is None or not kind.__module__.startswith("torch.optim"):
        if "paged" in name:
            return OptimizerBytes(0.0)
        count = next((count for key, count in _STATES.items() if key in name), 2)
        bits = next((bits for key, bits in (("8bit", 8.25), ("4bit", 4.5)) if key in name), 32)
        return OptimizerBytes(count * bits / 8)
    state, of_one = _probe(kind, options, dtype, 1)
    of_last = _probe(kind, options, dtype, 2)[1] - of_one
    # On a GPU torch.optim works on lists unless the kernel is fused.
    of_all = _probe(kind, options | {"foreach": True}, dtype, 1)[1] if gpu and not options.get("fused") else 0.0
    return OptimizerBytes(state, of_all, of_one, of_last)


def _probe(kind: Any, options: dict[str, Any], dtype: torch.dtype, weights: int) -> tuple[float, float]:
    """Bytes of the states per element, and of the temporaries of a step on some weights per element of one of them."""
    parameters = [nn.Parameter(torch.zeros(_PROBE, dtype=dtype)) for _ in range(weights)]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer, live = kind(parameters, **options), LiveBytes()
    optimizer.step()
    states = [t for state in optimizer.state.values() for t in state.values() if isinstance(t, Tensor)]
    live.hold([*parameters, *(p.grad for p in parameters), *states], "held")
    with live:
        optimizer.step()
    of_elements = sum(t.nbytes for t in states if t.numel() == _PROBE)
    temporaries = max(terms.get(WORK, 0) for terms in live.peaks().values())
    return of_elements / weights / _PROBE, temporaries / _PROBE
