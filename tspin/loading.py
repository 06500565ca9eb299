"""What a config names, as objects: models and tokenizers, from safetensors and without foreign code, and adapters over them.

Deliberately knows nothing of scoring or training.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainingArguments,
    set_seed,
)

from tspin.sharding import whole_on_each_process
from tspin.storage import read_json

if TYPE_CHECKING:
    from tspin.config import SelfPlayConfig
    from tspin.training_args import TSPINConfig

logger = logging.getLogger(__name__)


def load_model(
    name_or_path: str,
    *,
    revision: str | None = None,
    dtype: str | torch.dtype = "float32",
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    quantization: str = "none",
    device: torch.device | str = "cpu",
) -> PreTrainedModel:
    """The causal LM of a local directory or a hub name, from safetensors only.

    Args:
        name_or_path: directory, or hub name.
        revision: commit, tag or branch of a hub model.
        dtype: of the weights. Keep "float32" for training: a step of 5e-7 vanishes in bfloat16.
        attn_implementation: transformers' name of the attention; None for its default.
        trust_remote_code: run code that comes with the checkpoint.
        quantization: "nf4" or "int8" keeps the weights of the linear layers (not of the output head) in 4 or 8 bits, through
            bitsandbytes; they can then be trained by adapters only.
        device: where the weights go.
    Raises:
        ValueError: the checkpoint is pickled, damaged, an adapter, or lacks weights of the model; bitsandbytes is missing.
    """
    # Without it transformers asks a hub service to convert a pickled checkpoint and waits for the answer.
    os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "1")
    if os.path.isdir(name_or_path):
        _refuse_files(name_or_path)
    quantized: dict[str, Any] = {}
    if quantization != "none":
        quantized = {"quantization_config": _quantization_config(quantization), "device_map": {"": device}}
    try:
        with whole_on_each_process():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                name_or_path,
                revision=revision or "main",
                dtype=dtype,
                attn_implementation=attn_implementation,
                trust_remote_code=trust_remote_code,
                use_safetensors=True,
                output_loading_info=True,
                **quantized,
            )
    except Exception as error:
        raise ValueError(
            f"model_name_or_path: cannot load {name_or_path!r}: {error}; want a directory or hub name of a causal LM "
            "with config.json and intact safetensors weights"
        ) from error
    model, info = loaded
    if getattr(model, "_hf_peft_config_loaded", False):
        raise ValueError(_is_adapter(name_or_path))
    if info["missing_keys"]:
        raise ValueError(
            f"model_name_or_path: {name_or_path!r} lacks the weights {sorted(info['missing_keys'])[:5]}, which would "
            "start at random; want a complete checkpoint of a causal LM"
        )
    if not quantized:
        return model.to(device)
    for module in model.modules():
        # On some CPUs bitsandbytes repacks weights at the first forward without gradients, and has no gradients from then on.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


def _refuse_files(directory: str) -> None:
    """ValueError where the files of a checkpoint are pickled, those of an adapter, or lie elsewhere."""
    files = sorted(os.listdir(directory))
    pickled = [name for name in files if name.endswith((".bin", ".pt", ".pth")) and "model" in name]
    if pickled and not any(name.endswith(".safetensors") for name in files):
        raise ValueError(
            f"model_name_or_path: want safetensors, got the pickled {os.path.join(directory, pickled[0])}, "
            "which can run code when it is loaded; convert to safetensors with save_pretrained where you trust it"
        )
    if "adapter_config.json" in files:
        raise ValueError(_is_adapter(directory))
    for index in (name for name in files if name.endswith(".safetensors.index.json")):
        named = read_json(os.path.join(directory, index)).get("weight_map", {}).values()
        if outside := [name for name in named if os.path.basename(name) != name]:
            raise ValueError(
                f"model_name_or_path: want an index of files beside it, {os.path.join(directory, index)} names "
                f"{outside[0]}; save the model again with save_pretrained"
            )


def _quantization_config(quantization: str) -> BitsAndBytesConfig:
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError(
            f"quantization: {quantization!r} wants the package bitsandbytes, which is missing; "
            "pip install 'tspin[quantization]'"
        )
    if quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")


def _is_adapter(name: str) -> str:
    return (
        f"model_name_or_path: want a whole model, got the adapter {name}, which takes its weights from a model that it names; "
        "merge the two with peft's merge_and_unload, and save_pretrained the result"
    )


def load_tokenizer(
    name_or_path: str, *, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """The tokenizer of a local directory or hub name; where it has no padding token, the end token serves as one.

    Raises:
        ValueError: it cannot be loaded, or has no end-of-sequence token.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            name_or_path, revision=revision or "main", trust_remote_code=trust_remote_code
        )
    except Exception as error:
        raise ValueError(f"tokenizer_name_or_path: cannot load a tokenizer from {name_or_path!r}: {error}") from error
    # transformers makes an empty tokenizer of a directory that has a config.json but no tokenizer.
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        raise ValueError(f"tokenizer_name_or_path: want the files of a tokenizer, {name_or_path!r} has none; add them")
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"tokenizer_name_or_path: want a tokenizer with an end token, {name_or_path!r} has none; set eos_token in "
            "its tokenizer_config.json"
        )
    if tokenizer.pad_token_id is None:
        logger.info("the tokenizer has no padding token; its end token %r serves as one", tokenizer.eos_token)
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def model_of(
    config: SelfPlayConfig,
    path: str | None = None,
    *,
    revision: str | None = None,
    whole: bool = False,
    device: torch.device | str = "cpu",
) -> PreTrainedModel:
    """The model that a run's keys name, or that of `path` in its place, loaded as the keys say; see `load_model`.

    revision: of the hub model; default the config's. whole: without the config's quantization.
    """
    named = path is None
    return load_model(
        config.model_name_or_path if path is None else path,
        revision=(revision or config.model_revision) if named else None,
        dtype=config.torch_dtype,
        attn_implementation=config.attn_implementation,
        trust_remote_code=config.trust_remote_code,
        quantization="none" if whole else config.quantization,
        device=device,
    )


def local_directory(name_or_path: str, revision: str | None = None) -> str:
    """The directory of a model: itself, or the snapshot of a hub name, which is downloaded where it is not cached."""
    if os.path.isdir(name_or_path):
        return os.path.abspath(name_or_path)
    from huggingface_hub import snapshot_download

    pickled = ["*.bin", "*.pt", "*.pth", "*.ckpt", "*.msgpack", "*.h5", "*.gguf", "*.onnx"]
    return snapshot_download(name_or_path, revision=revision, ignore_patterns=pickled)


def tokenizer_of(config: SelfPlayConfig, *, revision: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer that a run's keys name; `revision` is that of the hub model, default the config's."""
    own = config.tokenizer_name_or_path
    return load_tokenizer(
        own or config.model_name_or_path,
        revision=None if own else revision or config.model_revision,
        trust_remote_code=config.trust_remote_code,
    )


def training_args_of(config: SelfPlayConfig, iteration: int = 0, **fixed: Any) -> TSPINConfig:
    """The trainer's arguments of one iteration of a run, outside the loop; `fixed` win over the config's."""
    from tspin.training_args import TSPINConfig

    own = {"output_dir": config.output_dir, "seed": config.seed}
    return TSPINConfig(**own | config.training_at(iteration) | fixed)


def lora_config(config: SelfPlayConfig) -> Any:
    """The peft config that a run's keys `use_peft` and `lora_*` stand for; None without `use_peft`."""
    if not config.use_peft:
        return None
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise ValueError("use_peft: want the package peft, which is missing; pip install 'tspin[peft]'") from error
    targets = config.lora_target_modules
    return LoraConfig(r=config.lora_r, lora_alpha=config.lora_alpha, target_modules=targets, task_type="CAUSAL_LM")


def add_adapter(model: nn.Module, peft_config: Any, *, seed: int) -> nn.Module:
    """The model wrapped by peft, its adapter's weights drawn from `seed`."""
    try:
        from peft import get_peft_model
    except ImportError as error:
        raise ImportError("peft_config: needs peft; pip install 'tspin[peft]'") from error
    set_seed(seed)
    return get_peft_model(model, peft_config)  # type: ignore


def warn_of_rounded_steps(model: nn.Module, args: TrainingArguments) -> None:
    """Log a warning where trainable weights are of 16 bits and the optimizer does not make up for their rounding."""
    low = {p.dtype for p in model.parameters() if p.requires_grad} & {torch.bfloat16, torch.float16}
    compensated = args.optim == "stable_adamw" or any(w in (args.optim_args or "") for w in ("kahan", "stochastic"))
    if low and not compensated:
        logger.warning(
            "trainable weights are %s, which lose steps of learning_rate %g; load them as float32 (with bf16=True for "
            "speed), or use optim='stable_adamw', which compensates",
            low.pop(),
            args.learning_rate,
        )
