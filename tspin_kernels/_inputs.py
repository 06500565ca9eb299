"""What the ops accept and what they return: dimensions, dtypes, errors. Shared by the reference and the blockwise op.

Dimensions: N tokens, D hidden width, V vocabulary, S sequences, G groups.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

ENTROPY_MODES = ("grad", "value", False)


class TokenLogprobs(NamedTuple):
    """Per-token results, each of the shape of `targets`, float32 (float64 for float64 inputs), nats; 0 where ignored."""

    logprobs: Tensor
    entropy: Tensor | None
    logsumexp: Tensor


class LogitTransform(NamedTuple):
    """From the product to the logit: `* logit_scale`, `softcap * tanh(. / softcap)`, `/ temperature`, in this order."""

    logit_scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0

    @property
    def is_identity(self) -> bool:
        return self.logit_scale == 1.0 and self.softcap is None and self.temperature == 1.0


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of row statistics and sums: float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def compute_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """The dtype of the products: autocast's where it is on, else the one dtype of `hidden` and `weight`."""
    device_type = hidden.device.type
    if torch.is_autocast_enabled(device_type) and hidden.dtype != torch.float64:
        return torch.get_autocast_dtype(device_type)
    if hidden.dtype != weight.dtype:
        remedy = "cast one of them" + ("" if hidden.dtype == torch.float64 else ", or call under torch.autocast")
        raise ValueError(f"weight: want the dtype of hidden, {hidden.dtype}, got {weight.dtype}; {remedy}")
    return hidden.dtype


def check_inputs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    transform: LogitTransform,
    entropy: str | bool,
    empty_weight: bool = False,
) -> None:
    """Raise ValueError for wrong shapes, dtypes, devices and constants. Reads no tensor data."""
    if hidden.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise ValueError(f"hidden: want float16, bfloat16, float32 or float64, got {hidden.dtype}")
    if hidden.dim() < 1 or weight.dim() != 2:
        raise ValueError(f"weight: want [V, D] and hidden [..., D], got {list(weight.shape)} and {list(hidden.shape)}")
    V, D = weight.shape
    if hidden.shape[-1] != D:
        hint = "; is the weight transposed?" if hidden.shape[-1] == V else ""
        raise ValueError(
            f"weight: want [V, {hidden.shape[-1]}] to fit hidden {list(hidden.shape)}, got [{V}, {D}]{hint}"
        )
    if (V == 0 and not empty_weight) or D == 0:
        raise ValueError(f"weight: want at least one row and one column, got [{V}, {D}]")
    if bias is not None and tuple(bias.shape) != (V,):
        raise ValueError(f"bias: want [{V}], one per row of weight, got {list(bias.shape)}")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and not tensor.is_floating_point():
            raise ValueError(f"{name}: want a floating dtype, got {tensor.dtype}; dequantize it first")
    if targets.dtype != torch.int64:
        raise ValueError(f"targets: want int64, got {targets.dtype}; use targets.long()")
    check_devices(hidden, weight=weight, targets=targets, bias=bias)
    if not 0 < transform.temperature < math.inf:
        raise ValueError(f"temperature: want a positive number, got {transform.temperature}")
    if not -math.inf < transform.logit_scale < math.inf:
        raise ValueError(f"logit_scale: want a number, got {transform.logit_scale}")
    if transform.softcap is not None and not 0 < transform.softcap < math.inf:
        raise ValueError(f"softcap: want a positive number or None, got {transform.softcap}")
    if entropy not in ENTROPY_MODES:
        raise ValueError(f"entropy: want 'grad', 'value' or False, got {entropy!r}")


def check_devices(hidden: Tensor, **others: Tensor | None) -> None:
    """Raise ValueError for a tensor that lies elsewhere than `hidden`."""
    for name, tensor in others.items():
        if tensor is not None and tensor.device != hidden.device:
            raise ValueError(
                f"{name}: want the device of hidden, {hidden.device}, got {tensor.device}; move one of them"
            )


def check_budget(memory_budget: int | None, default: int) -> int:
    """The bytes of a budget, or the default. Raises ValueError."""
    if memory_budget is None:
        return default
    if isinstance(memory_budget, bool) or not isinstance(memory_budget, int | torch.SymInt):
        raise ValueError(f"memory_budget: want an int, bytes, got {memory_budget!r}")
    return memory_budget


def refuse_lost_derivatives(hidden: Tensor, weight: Tensor, bias: Tensor | None, **constants: float | None) -> None:
    """Raise for derivatives that would be missing without a word: in constants of the transform, and in forward mode."""
    for name, value in constants.items():
        if isinstance(value, Tensor) and value.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"{name}: want a number, got a tensor that requires grad, which would get none; pass {name}.item(), "
                "or use backend='reference'"
            )
    if forward_ad._current_level >= 0:
        for name, tensor in (("hidden", hidden), ("weight", weight), ("bias", bias)):
            if tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None:
                raise RuntimeError(
                    f"{name}: want a tensor without tangent, got one of forward-mode differentiation, of which these ops have "
                    "none; use reverse mode, or backend='reference'"
                )


class HostCopy:
    """Values on their way from a device to the host, which waits for them when it reads them and not for what is queued after."""

    def __init__(self, values: Tensor):
        self._values = values.to("cpu", non_blocking=values.is_cuda)
        self._copied = torch.cuda.current_stream(values.device).record_event() if values.is_cuda else None

    def read(self) -> Any:
        """As Tensor.tolist()."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._values.tolist()


def answers_at_once(device: torch.device) -> bool:
    """Whether looking at a value costs nothing; a GPU has to finish first what was queued before."""
    return device.type == "cpu"


def check_targets_in_range(targets: Tensor, V: int) -> None:
    """Raise on the CPU, where looking costs nothing, when a target that counts is outside [0, V)."""
    if not answers_at_once(targets.device) or targets.numel() == 0:
        return
    low, high = int(targets.min()), int(targets.max())
    if low < 0 or high >= V:
        raise ValueError(
            f"targets: want token ids in [0, {V}), got {low if low < 0 else high}; "
            "is ignore_index set to the padding value, or the vocabulary resized?"
        )
