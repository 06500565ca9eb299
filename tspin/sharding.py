"""Models that DeepSpeed or FSDP2 divides over processes: whole before, so that they can be probed and can sample, and whole after.

A trainer shards the model that it is given. Deliberately shards nothing itself.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

_FIRST_PROCESS_ONLY = "FSDP_CPU_RAM_EFFICIENT_LOADING"


@contextmanager
def whole_on_each_process() -> Iterator[None]:
    """Inside it transformers loads all weights on every process, not shares of them for DeepSpeed or none but on the first for
    FSDP."""
    unset_hf_deepspeed_config()
    before = os.environ.pop(_FIRST_PROCESS_ONLY, None)
    try:
        yield
    finally:
        if before is not None:
            os.environ[_FIRST_PROCESS_ONLY] = before


@torch.no_grad()
def whole_weights(model: nn.Module, *, frozen: bool = False) -> dict[str, Tensor]:
    """The trained parameters by name, whole, on the CPU, as precise as the optimizer keeps them. To be called on all processes.

    frozen: those too that are not trained, and buffers: all that a checkpoint of the model holds.
    """
    named = dict(model.named_parameters())
    known = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    # Copies even of what is on the CPU, as it may be a view of a buffer that is freed. One after the other: a GPU may not hold all.
    whole = {name: _whole(p).to("cpu", copy=True) for name, p in named.items() if frozen or p.requires_grad}
    if frozen:
        whole |= {name: t.to("cpu", copy=True) for name, t in model.state_dict().items() if name not in known}
    return {name.replace("_fsdp_wrapped_module.", ""): tensor for name, tensor in whole.items()}


def _whole(parameter: Any) -> Tensor:
    if hasattr(parameter, "full_tensor"):
        return parameter.full_tensor()
    is_partitioned = hasattr(parameter, "ds_id")
    if parameter.requires_grad and (is_partitioned or hasattr(parameter, "_hp_mapping")):
        from deepspeed.utils import safe_get_full_fp32_param

        return safe_get_full_fp32_param(parameter)
    if not is_partitioned:
        return parameter.detach()
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter]):
        return parameter.detach().clone()
