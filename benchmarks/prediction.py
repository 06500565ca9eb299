"""The memory that `tspin check` predicts: beside what a GPU's allocator counts while TSPINTrainer takes the same steps
(`prediction`), and the longest triplet that each way of saving memory is predicted to let fit, which needs no GPU (`longest`).

Models have the shapes of `benchmarks.training` and random weights; a cell is a model, how it is trained, and the lengths of its
triplets.
"""

import gc
import tempfile
from itertools import groupby, product
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from benchmarks import measure
from benchmarks.training import LORA_MODULES, model_config
from tspin.data import MEMBERS
from tspin.fitting import longest_context
from tspin.memory import predict_memory
from tspin.trainer import TSPINTrainer
from tspin.training_args import TSPINConfig

_CHECKPOINTED = {"gradient_checkpointing": True}
# model, method, tokens of the prompt and of each response, options of the trainer
CELLS: list[tuple[str, str, int, int, dict[str, Any]]] = [
    ("qwen2.5-1.5b", "full", 8192, 512, _CHECKPOINTED),
    ("qwen2.5-1.5b", "full", 2048, 512, {"prefix_sharing": "off"}),
    ("qwen2.5-1.5b", "full", 2048, 2048, _CHECKPOINTED | {"sequential_backward": "on", "optim": "adamw_torch"}),
    ("llama-3.1-8b", "lora", 8192, 1024, _CHECKPOINTED),
    ("llama-3.1-8b", "lora", 1024, 256, {"per_device_train_batch_size": 2}),
    ("qwen2.5-1.5b", "full", 32768, 4096, _CHECKPOINTED | {"sequence_tiling": "on"}),
    ("llama-3.1-8b", "lora", 16384, 2048, _CHECKPOINTED | {"sequence_tiling": "on"}),
]
_OFFLOAD = {"gradient_checkpointing_kwargs": {"offload": True}}
# Beside gradient checkpointing.
LEVERS: dict[str, dict[str, Any]] = {
    "three rows": {"prefix_sharing": "off"},
    "one row": {},
    "in tiles": {"sequence_tiling": "on"},
    "in tiles, one response at a time": {"sequence_tiling": "on", "sequential_backward": "on"},
    "in tiles, offloaded": {"sequence_tiling": "on"} | _OFFLOAD,
}


def run(device: torch.device, out: Path, commit: str | None = None, steps: int = 2) -> list[dict[str, Any]]:
    """Train and predict every cell, adding rows to `out`. Raises ValueError for a CPU, where no allocator counts."""
    if device.type != "cuda":
        raise ValueError(f"device: want a GPU, whose allocator counts bytes, got {device}")
    rows = []
    for model, method, prompt, response, options in CELLS:
        row = {"benchmark": "prediction", "model": model, "method": method, "prompt": prompt, "response": response}
        row |= {"options": options} | measure.environment(device, commit)
        row |= {"transformers": measure.installed("transformers"), "missing": None}
        try:
            row |= _cell(model, method, prompt, response, options, device, steps)
        except Exception as error:
            row["missing"] = measure.reason(error)
        gc.collect()
        torch.cuda.empty_cache()
        measure.append_rows(out, [row])
        rows.append(row)
    return rows


def longest(cells: list[tuple[str, str]], ratios: list[float], caps: list[float], out: Path) -> list[dict[str, Any]]:
    """The longest triplet predicted to fit a GPU of each of `caps` GiB, for each (model, method), in bf16 weights and RMSProp as in
    `memory`; rows are added to `out`."""
    rows = []
    for model, method in cells:
        adapter = _adapter() if method == "lora" else None
        options = {"dtype": torch.bfloat16, "peft_config": adapter}
        for cap, ratio, (name, levers) in product(caps, ratios, LEVERS.items()):
            args = TSPINConfig(
                output_dir="unused", use_cpu=True, **_CHECKPOINTED | {"per_device_train_batch_size": 1} | levers
            )
            sharing = args.prefix_sharing != "off"
            found = longest_context(
                *(model_config(model), args),
                gpu_memory=int(cap * 2**30),
                prompt_per_response=ratio,
                sharing=sharing,
                **options,
            )
            row = {
                "benchmark": "longest",
                "model": model,
                "method": method,
                "cap_gib": cap,
                "prompt_per_response": ratio,
            }
            row |= {"levers": name, "longest": 0 if found is None else found.tokens}
            row |= measure.environment(torch.device("cpu"), None) | {"transformers": measure.installed("transformers")}
            measure.append_rows(out, [row])
            rows.append(row)
    return rows


def longest_table(rows: list[dict[str, Any]]) -> str:
    """One line for each model, card and ratio, its tokens by what saves memory."""
    lines = []
    keys = ("model", "method", "cap_gib", "prompt_per_response")
    for key, same in groupby(rows, lambda row: tuple(row[k] for k in keys)):
        lines.append("{}, {}, {:g} GiB, {:g} : 1".format(*key))
        lines += [f"    {row['longest']:9,}  {row['levers']}" for row in same]
    return "\n".join(lines)


def _adapter() -> Any:
    from peft import LoraConfig

    return LoraConfig(r=16, target_modules=LORA_MODULES, task_type="CAUSAL_LM")


def _cell(
    model_name: str, method: str, prompt: int, response: int, options: dict, device: torch.device, steps: int
) -> dict:
    config, adapter = model_config(model_name), _adapter() if method == "lora" else None
    # As tspin loads them: what is trained is float32, what is frozen need not be.
    dtype = torch.float32 if adapter is None else torch.bfloat16
    with tempfile.TemporaryDirectory() as folder:
        common = {"max_steps": steps, "save_strategy": "no", "bf16": True, "max_length": 2**20, "disable_tqdm": True}
        common["per_device_train_batch_size"] = 1
        args = TSPINConfig(output_dir=folder, use_cpu=device.type == "cpu", **common | options)
        sharing = args.prefix_sharing != "off"
        lengths = {
            "prompt_tokens": prompt,
            "response_tokens": response,
            "sharing": sharing,
            "gpu": device.type == "cuda",
        }
        predicted = predict_memory(config, args, **lengths, dtype=dtype, peft_config=adapter)
        with device:
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        generator = torch.Generator().manual_seed(0)
        draw = lambda n: torch.randint(config.vocab_size, (n,), generator=generator).tolist()
        triplets = [
            {"prompt_ids": draw(prompt), **{f"{member}_ids": draw(response) for member in MEMBERS}}
            for _ in range(steps * args.per_device_train_batch_size)
        ]
        trainer = TSPINTrainer(model, args, triplets, peft_config=adapter, iteration=1)
        del model
        torch.cuda.reset_peak_memory_stats(device)
        trainer.train()
        measured = torch.cuda.max_memory_allocated(device)
    return {
        "predicted_gib": predicted.peak / 2**30,
        "measured_gib": measured / 2**30,
        "ratio": predicted.peak / measured,
        "terms": {name: size / 2**30 for name, size in predicted.terms.items()},
    }


def table(rows: list[dict[str, Any]]) -> str:
    """One line for each cell."""
    lines = [f"{'model':14} {'method':6} {'prompt':>7} {'response':>8} {'predicted':>10} {'measured':>9} {'ratio':>6}"]
    for row in rows:
        start = f"{row['model']:14} {row['method']:6} {row['prompt']:7} {row['response']:8} "
        sizes = (
            "{predicted_gib:6.2f} GiB {measured_gib:5.2f} GiB {ratio:6.3f}".format_map(row)
            if not row["missing"]
            else ""
        )
        lines.append(f"{start}{sizes or row['missing']}  {row['options']}")
    return "\n".join(lines)
