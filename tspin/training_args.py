"""TSPINConfig: transformers' TrainingArguments with the keys of self-play fine-tuning, checked before anything is loaded."""

import copy
import importlib.util
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_type_hints

import torch
from torch.utils.checkpoint import checkpoint
from transformers import TrainingArguments, get_scheduler
from transformers.integrations.integration_utils import get_available_reporting_integrations
from transformers.utils.import_utils import is_liger_kernel_available, is_torch_bf16_gpu_available

from tspin.data import MEMBERS

_SWITCHES = ("fused", "prefix_sharing", "sequence_tiling", "sequential_backward")
_POSITIVE = ("alpha", "lam", "max_length")
_LEAST = {"per_device_train_batch_size": 1, "per_device_eval_batch_size": 1, "gradient_accumulation_steps": 1}
_LEAST |= dict.fromkeys(("beta", "beta_first_iteration", "sft_coef", "learning_rate", "warmup_steps"), 0)
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
        for name in _SWITCHES:
            if isinstance(getattr(self, name), bool):
                setattr(self, name, "on" if getattr(self, name) else "off")
        if self.bf16 is None:
            self.bf16 = not self.fp16 and not self.use_cpu and is_torch_bf16_gpu_available()
        self._check_values()
        super().__post_init__()
        self._check_batches()
        self._check_packages()

    def _check_values(self) -> None:
        hints = get_type_hints(TSPINConfig)
        for name in ("method", "loss_type", "logp_reduction", *_SWITCHES):
            if getattr(self, name) not in get_args(hints[name]):
                raise ValueError(f"{name}: want one of {get_args(hints[name])}, got {getattr(self, name)!r}")
        for name in (*_POSITIVE, *_LEAST, "entropy_coef"):
            if not abs(value := getattr(self, name)) < math.inf:
                raise ValueError(f"{name}: want a finite number, got {value}")
        for name in _POSITIVE:
            if not (value := getattr(self, name)) > 0:
                raise ValueError(f"{name}: want a positive number, got {value}")
        for name, least in _LEAST.items():
            if not (value := getattr(self, name)) >= least:
                raise ValueError(f"{name}: want {least} or more, got {value}")
        if self.max_steps <= 0 and not 0 < self.num_train_epochs < math.inf:
            raise ValueError(
                f"num_train_epochs: want a finite number above 0 without max_steps, got {self.num_train_epochs}"
            )
        if self.save_strategy == "best" and self.eval_strategy == "no":
            raise ValueError("save_strategy: want no, steps or epoch where no eval_strategy tells the best, got 'best'")
        if self.label_smoothing_factor:
            raise ValueError(
                f"label_smoothing_factor: want 0, got {self.label_smoothing_factor}; the loss compares whole responses and has no "
                "smoothing, sft_coef and entropy_coef are what it has"
            )

    def _check_batches(self) -> None:
        if self.train_sampling_strategy not in ("random", "sequential"):
            raise ValueError(
                f"train_sampling_strategy: want random or sequential, got {self.train_sampling_strategy!r}, which goes by the "
                "length of a row, and a triplet has several"
            )
        accelerator: Any = self.accelerator_config
        if accelerator.dispatch_batches:
            raise ValueError(
                "accelerator_config: want dispatch_batches false, got true; a batch of triplets cannot be cut by its rows"
            )

    def _check_packages(self) -> None:
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
        if self.use_liger_kernel and not is_liger_kernel_available():
            raise ValueError(
                "use_liger_kernel: want the package liger-kernel, which is missing; pip install liger-kernel"
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

    def rehearse(self) -> None:
        """Make what transformers makes when a training starts, and refuses only then, for a weight of one number.

        Raises:
            ValueError: optimizer, schedule, checkpointing of activations or compilation cannot be made; it names the keys.
        """
        trials: dict[tuple[str, ...], Callable[[], None]] = {
            ("optim", "optim_args"): self._make_optimizer,
            ("lr_scheduler_type", "lr_scheduler_kwargs"): self._make_schedule,
        }
        if self.gradient_checkpointing:
            trials[("gradient_checkpointing_kwargs",)] = self._checkpoint
        if self.torch_compile:
            trials[("torch_compile_backend", "torch_compile_mode")] = self._compile
        for keys, make in trials.items():
            try:
                make()
            except Exception as error:  # of any package's own code
                given = ", ".join(f"{key}: {getattr(value := getattr(self, key), 'value', value)!r}" for key in keys)
                raise ValueError(
                    f"{given} would stop the training at its start: {' '.join(str(error).split())}"
                ) from error

    def _make_optimizer(self) -> None:
        from transformers import Trainer

        # Without its random numbers, which a run may have taken up.
        model: Any = torch.nn.Sequential(torch.nn.utils.skip_init(torch.nn.Linear, 1, 1))
        args = copy.copy(self)
        # Names of layers that the model here has not got.
        args.optim_target_modules = self.optim_target_modules and "all-linear"
        optimizer, options = Trainer.get_optimizer_cls_and_kwargs(args, model)
        if optimizer.__module__.startswith("torch.optim."):
            optimizer(model.parameters(), **options)

    def _make_schedule(self) -> None:
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], self.learning_rate)
        # Its first step lies behind the warm-up.
        options: Any = self.lr_scheduler_kwargs
        get_scheduler(self.lr_scheduler_type, optimizer, 0, 1000, options)

    def _checkpoint(self) -> None:
        given: Any = self.gradient_checkpointing_kwargs or {}
        # As transformers does: two are its own, and of none that are left it makes this one.
        options = {key: value for key, value in given.items() if key not in ("every_n_layers", "offload")}
        checkpoint(torch.neg, torch.zeros(1, requires_grad=True), **options or {"use_reentrant": False})

    def _compile(self) -> None:
        torch.compile(torch.neg, backend=self.torch_compile_backend or "inductor", mode=self.torch_compile_mode)

    def check_rows(self, rows: int) -> None:
        """Raise ValueError where `dataloader_drop_last` leaves no batch of so many rows."""
        accelerator: Any = self.accelerator_config
        batch = self.per_device_train_batch_size * (1 if accelerator.split_batches else self.world_size)
        if self.dataloader_drop_last and rows < batch:
            raise ValueError(
                f"dataloader_drop_last: want the {batch} rows or more of one batch over all processes, got {rows}; set it to "
                "false, or lower per_device_train_batch_size"
            )
