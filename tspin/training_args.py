"""TSPINConfig: transformers' TrainingArguments with the keys of self-play fine-tuning, checked before anything is loaded."""

import importlib.util
import re
from dataclasses import dataclass
from typing import Literal, get_args, get_type_hints

import torch
from transformers import TrainingArguments
from transformers.integrations.integration_utils import get_available_reporting_integrations
from transformers.utils.import_utils import is_torch_bf16_gpu_available

from tspin.data import MEMBERS

_LEAST = {"per_device_train_batch_size": 1, "per_device_eval_batch_size": 1, "gradient_accumulation_steps": 1}
_LEAST |= {"dataloader_num_workers": 0}
_OF_BITSANDBYTES = re.compile(r"^(?!adamw_torch).*(8bit|32bit|bnb|ademamix)")


@dataclass
class TSPINConfig(TrainingArguments):
    """TrainingArguments with the keys of self-play fine-tuning.

    The paper states the method's coefficients, RMSProp, no weight decay and 10 % warm-up; learning rate, linear decay
    and epochs are SPIN's; the rest are transformers' own defaults.

    Args:
        method: "tspin"; "tspin_no_history" (beta = 0 in every iteration); "tspin_ref" and "spin", which need the
            previous policy's log-probs as columns ref_<member>_logps; "sft".
        alpha: scale of T-SPIN's margins, 1/nats.
        beta: weight of the historical advantage from iteration 1 on.
        beta_first_iteration: the same at iteration 0, where synthetic and proto come from one policy.
        lam: scale of SPIN's margin, 1/nats.
        spin_mix_previous: train on the synthetic data of the last two iterations, as SPIN's code does; for the loop.
        loss_type: "logistic" or "exponential".
        logp_reduction: log-prob of a response as the "sum" or the "mean" over its tokens.
        entropy_coef: weight of the mean entropy per token, subtracted from the loss and differentiated.
        sft_coef: weight of the real response's mean negative log-likelihood per token, added to the loss.
        drop_identical: leave out triplets whose synthetic response equals the real one.
        max_length: most tokens of prompt and response, for rows that this trainer tokenises itself.
        fused: "on" scores through the output head without [N, V] logits and refuses models where that is inexact;
            "off" takes the model's logits; "auto" is "on" where it is exact, otherwise "off" with a warning.
        memory_budget: bytes that the head may use for blocks of logits; None lets the op choose.
        prefix_sharing: "on" computes the prompt of a triplet once, in one row `[x, y, y', y0]`, and packs a micro-batch into it
            without padding; refuses models that cannot. "off" gives every response a row of its own; "auto" is "on" where the
            architecture allows it. The first batch of a run is compared with separate rows, and a difference stops it.
        sequence_tiling: "on" runs MLPs, experts, norms and adapters some thousand tokens at a time, so that what is wide in a layer
            never exists for a whole row; exact, with gradient_checkpointing at hardly more time. "auto" does where a step would
            not fit the GPU.
        sequential_backward: "on" runs the backward one response at a time, in the activation memory of the longest one and
            about a third more time; "auto" does where the joint pass would not fit the GPU, not even in tiles.
    """

    method: Literal["tspin", "tspin_no_history", "tspin_ref", "spin", "sft"] = "tspin"
    alpha: float = 1.0
    beta: float = 0.1
    beta_first_iteration: float = 0.0
    lam: float = 0.1
    spin_mix_previous: bool = False
    loss_type: Literal["logistic", "exponential"] = "logistic"
    logp_reduction: Literal["sum", "mean"] = "sum"
    entropy_coef: float = 0.0
    sft_coef: float = 0.0
    drop_identical: bool = False
    max_length: int = 2048
    fused: Literal["auto", "on", "off"] = "auto"
    memory_budget: int | None = None
    prefix_sharing: Literal["auto", "on", "off"] = "auto"
    sequence_tiling: Literal["auto", "on", "off"] = "auto"
    sequential_backward: Literal["auto", "on", "off"] = "auto"

    learning_rate: float = 5e-7
    num_train_epochs: float = 3.0
    optim: str = "rmsprop"
    warmup_steps: float = 0.1
    bf16: bool | None = None
    logging_steps: float = 1
    logging_nan_inf_filter: bool = False
    report_to: str | list[str] | None = "none"
    # Of transformers, which takes both and says one.
    fsdp: bool | str | None = None
    remove_unused_columns: bool = False

    def __post_init__(self):
        # YAML 1.1 reads on and off as booleans.
        switches = ("fused", "prefix_sharing", "sequence_tiling", "sequential_backward")
        for name in switches:
            if isinstance(getattr(self, name), bool):
                setattr(self, name, "on" if getattr(self, name) else "off")
        if self.bf16 is None:
            self.bf16 = not self.fp16 and not self.use_cpu and is_torch_bf16_gpu_available()
        hints = get_type_hints(TSPINConfig)
        for name in ("method", "loss_type", "logp_reduction", *switches):
            if getattr(self, name) not in get_args(hints[name]):
                raise ValueError(f"{name}: want one of {get_args(hints[name])}, got {getattr(self, name)!r}")
        for name in ("alpha", "lam", "max_length", "beta", "beta_first_iteration", "sft_coef"):
            value, may_be_zero = getattr(self, name), name.startswith(("beta", "sft"))
            if not (value > 0 or (may_be_zero and value == 0)):
                raise ValueError(f"{name}: want a {'non-negative' if may_be_zero else 'positive'} number, got {value}")
        for name, least in _LEAST.items():
            if not (value := getattr(self, name)) >= least:
                raise ValueError(f"{name}: want {least} or more, got {value}")
        if self.max_steps <= 0 and not self.num_train_epochs > 0:
            raise ValueError(f"num_train_epochs: want more than 0 without max_steps, got {self.num_train_epochs}")
        if self.save_strategy == "best" and self.eval_strategy == "no":
            raise ValueError("save_strategy: want no, steps or epoch where no eval_strategy tells the best, got 'best'")
        if self.label_smoothing_factor:
            raise ValueError(
                f"label_smoothing_factor: want 0, got {self.label_smoothing_factor}; the loss compares whole responses and has no "
                "smoothing, sft_coef and entropy_coef are what it has"
            )
        super().__post_init__()
        # Now, not when the first trainer is made, which in a run is after hours of sampling.
        if absent := set(self.report_to or ()) - {*get_available_reporting_integrations(), "all"}:
            package = "'tspin[tensorboard]'" if absent == {"tensorboard"} else f"the packages of {sorted(absent)}"
            raise ValueError(
                f"report_to: want trackers that are installed, got {self.report_to}; pip install {package}"
            )
        optimizer = str(getattr(self.optim, "value", self.optim))
        if _OF_BITSANDBYTES.search(optimizer) and importlib.util.find_spec("bitsandbytes") is None:
            raise ValueError(
                f"optim: {optimizer!r} wants the package bitsandbytes, which is missing; pip install 'tspin[quantization]'"
            )

    @property
    def autocast_dtype(self) -> torch.dtype | None:
        """Of the forward passes: `bf16`, `fp16`, or None for the weights' own."""
        return torch.bfloat16 if self.bf16 else torch.float16 if self.fp16 else None

    @property
    def needs_references(self) -> bool:
        """Whether the method compares with the previous policy, whose log-probs the data set must then carry."""
        return self.method in ("spin", "tspin_ref")

    def beta_at(self, iteration: int) -> float:
        """Weight of the historical advantage in an iteration of the loop."""
        if self.method not in ("tspin", "tspin_ref"):
            return 0.0
        return self.beta if iteration > 0 else self.beta_first_iteration

    def members_at(self, iteration: int) -> tuple[str, ...]:
        """Responses that an iteration scores: the proto response only where its coefficient is not 0."""
        return MEMBERS[: 1 if self.method == "sft" else 3 if self.beta_at(iteration) else 2]
