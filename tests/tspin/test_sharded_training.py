"""FSDP2 through accelerate on two processes that talk by gloo: the same steps as one process.

Run as a program, this file is one of the two processes: it trains every scenario and saves what it saw. Accelerate shards only on
accelerators, so the processes tell it that their CPU is one; what it then does (groups, optimizer, checkpoints) is its own code.
"""

import os
import socket
import subprocess
import sys
import traceback
from pathlib import Path

import pytest
import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from peft import LoraConfig
from test_trainer import BARE, QUIET, assert_close, build, parameters, triplets
from transformers import LlamaForCausalLM

from tspin.loading import add_adapter
from tspin.trainer import TSPINConfig, TSPINTrainer

LORA = {"r": 2, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM", "init_lora_weights": False}
# Model and options of two processes; one process gets batches twice as large.
SCENARIOS = {
    "tail": ({}, {}),
    "tied": ({"tie_word_embeddings": True}, {}),
    "checkpointing": ({}, {"gradient_checkpointing": True}),
    "sequential": ({}, {"sequential_backward": "on", "drop_identical": True, "entropy_coef": 0.1}),
    "plain": ({}, {"fused": "off"}),
    "lora": ({"lora": LORA}, {}),
    "lora_tied": ({"lora": LORA, "tie_word_embeddings": True}, {}),
    "lora_trained_head": ({"lora": LORA | {"modules_to_save": ["lm_head"]}}, {}),
    "lora_on_head": ({"lora": LORA | {"target_modules": ["q_proj", "lm_head"]}}, {}),
    "accumulated": ({}, {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 1}),
}
ROWS = triplets(7, identical=(2, 3))


def make(lora=None, **config):
    model = build(**config)
    return model if lora is None else add_adapter(model, LoraConfig(**lora), seed=0)


def arguments(directory, options, **sharding):
    return TSPINConfig(
        output_dir=str(directory), **QUIET | BARE | {"per_device_train_batch_size": 2} | options | sharding
    )


def finish(trainer, resume=None):
    """(parameters by name, evaluation, step logs) after training."""
    trainer.train(resume_from_checkpoint=resume)
    metrics = {k: v for k, v in trainer.evaluate(ROWS[:3]).items() if "per_second" not in k and "runtime" not in k}
    whole = {
        name: (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().clone()
        for name, p in trainer.model.named_parameters()
    }
    return whole, metrics, [log["loss"] for log in trainer.state.log_history if "loss" in log]


def sharded(directory, changes, options, resume=None):
    layer = {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}
    args = arguments(directory, options, fsdp=True, fsdp_config=layer)
    assert args.world_size == 2
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    trainer = TSPINTrainer(make(**changes), args, ROWS, iteration=1)
    results = finish(trainer, resume)
    assert any(hasattr(p, "full_tensor") for p in trainer.model.parameters())
    return results


def main(directory):
    results = {}
    for name, (changes, options) in SCENARIOS.items():
        try:
            results[name] = sharded(directory / name, changes, options)
        except Exception:
            results[name] = traceback.format_exc()
    saving = {"save_strategy": "steps", "save_steps": 1, "optim": "rmsprop", "learning_rate": 1e-3}
    results["whole"] = sharded(directory / "whole", {}, saving)
    results["resumed"] = sharded(directory / "whole", {}, saving, resume=str(directory / "whole/checkpoint-2"))
    torch.save(results, directory / f"{os.environ['RANK']}.pt")


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    directory = tmp_path_factory.mktemp("ranks")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    world = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    world |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    children = []
    for rank in range(2):
        environment = {**os.environ, **world, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        with open(directory / f"{rank}.log", "w") as log:
            command = [sys.executable, __file__, str(directory)]
            children.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
    try:
        codes = [child.wait(timeout=500) for child in children]
    finally:
        for child in children:
            child.kill()
    assert codes == [0, 0], "".join((directory / f"{rank}.log").read_text()[-3000:] for rank in range(2))
    return [torch.load(directory / f"{rank}.pt", weights_only=False) for rank in range(2)], directory


@pytest.mark.parametrize("name", SCENARIOS)
def test_two_sharded_processes_train_as_one(tmp_path, two_processes, name):
    changes, options = SCENARIOS[name]
    doubled = options | {"per_device_train_batch_size": 2 * options.get("per_device_train_batch_size", 2)}
    model = make(**changes)
    start = parameters(model)
    whole, metrics, losses = finish(TSPINTrainer(model, arguments(tmp_path, doubled), ROWS, iteration=1))
    assert (parameters(model) - start).abs().max() > 1e-4
    results, _ = two_processes
    for rank in range(2):
        assert not isinstance(results[rank][name], str), results[rank][name]
        got, got_metrics, got_losses = results[rank][name]
        assert {key.replace("_fsdp_wrapped_module.", "") for key in got} == set(whole)
        for key in whole:
            assert_close(got[key], whole[key])
        assert got_losses == pytest.approx(losses, rel=1e-4)
        assert got_metrics == pytest.approx(metrics, rel=1e-4, abs=1e-4)


def test_sharded_checkpoints_resume_bitwise_and_are_whole_models(two_processes):
    results, directory = two_processes
    whole, resumed = results[0]["whole"], results[0]["resumed"]
    assert all(torch.equal(whole[0][key], resumed[0][key]) for key in whole[0])
    saved = LlamaForCausalLM.from_pretrained(directory / "whole/checkpoint-4")
    assert all(torch.equal(whole[0][key], p) for key, p in saved.named_parameters())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
