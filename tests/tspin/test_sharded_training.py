"""FSDP2 and DeepSpeed through accelerate on two processes that talk by gloo: the same steps, checkpoints and runs as one process.

Run as a program, this file is one of the two processes: it trains every scenario and saves what it saw. Accelerate shards only on
accelerators, so the processes tell it that their CPU is one; what it then does (groups, optimizer, checkpoints) is its own code.
"""

import importlib.util
import os
import sys
import traceback
from pathlib import Path

import pytest
import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from peft import LoraConfig
from processes import run_two
from safetensors.torch import load_file
from test_loop import make_toy, toy_config
from test_trainer import BARE, QUIET, assert_close, build, parameters, triplets
from transformers import LlamaForCausalLM, OPTConfig, OPTForCausalLM

from tspin import tiling
from tspin.generate import read_generations
from tspin.loading import add_adapter
from tspin.loop import SelfPlay
from tspin.sharding import whole_weights
from tspin.trainer import NonFiniteLossError, TSPINTrainer
from tspin.training_args import TSPINConfig

LORA = {"r": 2, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM", "init_lora_weights": False}
# Model and options of two processes; one process gets batches twice as large.
SCENARIOS = {
    "tail": ({}, {}),
    "tied": ({"tie_word_embeddings": True}, {}),
    "alone": ({}, {}),
    "opt": ({"opt": True}, {}),
    "checkpointing": ({}, {"gradient_checkpointing": True}),
    "sequential": ({}, {"sequential_backward": "on", "drop_identical": True, "entropy_coef": 0.1}),
    "tiled": ({}, {"sequence_tiling": "on"}),
    "tiled_checkpointing": ({}, {"sequence_tiling": "on", "gradient_checkpointing": True}),
    "tiled_lora": ({"lora": LORA}, {"sequence_tiling": "on", "sequential_backward": "on"}),
    "plain": ({}, {"fused": "off"}),
    "lora": ({"lora": LORA}, {}),
    "lora_tied": ({"lora": LORA, "tie_word_embeddings": True}, {}),
    "lora_trained_head": ({"lora": LORA | {"modules_to_save": ["lm_head"]}}, {}),
    "lora_on_head": ({"lora": LORA | {"target_modules": ["q_proj", "lm_head"]}}, {}),
    "accumulated": ({}, {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 1}),
    "sequential_accumulated": (
        {},
        {"sequential_backward": "on", "gradient_accumulation_steps": 2, "per_device_train_batch_size": 1},
    ),
}
ROWS = triplets(7, identical=(2, 3))
SAVING = {"save_strategy": "steps", "save_steps": 1, "optim": "rmsprop", "learning_rate": 1e-3}
ZERO = {f"{name}": "auto" for name in ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps")}
ZERO |= {"gradient_clipping": "auto"}


def make(lora=None, opt=False, **config):
    if opt:
        torch.manual_seed(0)
        sizes = {"vocab_size": 53, "hidden_size": 16, "ffn_dim": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        sizes |= {"word_embed_proj_dim": 16, "pad_token_id": 0, "max_position_embeddings": 64}
        return OPTForCausalLM(OPTConfig(**sizes, tie_word_embeddings=False, dropout=0.0))
    model = build(**config)
    return model if lora is None else add_adapter(model, LoraConfig(**lora), seed=0)


def arguments(directory, options, **sharding):
    return TSPINConfig(
        output_dir=str(directory), **QUIET | BARE | {"per_device_train_batch_size": 2} | options | sharding
    )


def finish(trainer, resume=None):
    """(trained parameters by name, evaluation, step logs) after training."""
    trainer.train(resume_from_checkpoint=resume)
    metrics = {k: v for k, v in trainer.evaluate(ROWS[:3]).items() if "per_second" not in k and "runtime" not in k}
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    return whole_weights(trainer.model, frozen=True), metrics, losses


def sharding(kind, layers):
    if kind == "fsdp":
        return {"fsdp": True, "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": layers}}
    # Small parameters would be kept whole.
    zero = {"stage": int(kind.removeprefix("zero")), "stage3_param_persistence_threshold": 0}
    return {"deepspeed": ZERO | {"zero_optimization": zero}}


def sharded(kind, directory, name, changes, options):
    layers = ["OPTDecoderLayer" if "opt" in changes else "LlamaDecoderLayer"] + ["Linear"] * (name == "alone")
    args = arguments(directory, options, **sharding(kind, layers))
    assert args.world_size == 2
    trainer = TSPINTrainer(make(**changes), args, ROWS, iteration=1)
    assert trainer.is_fsdp_enabled == (kind == "fsdp") and trainer.is_deepspeed_enabled == (kind != "fsdp")
    return trainer


def group_of_head(model):
    """Names of the modules that share FSDP's group with the head."""
    head = model.get_output_embeddings()
    names = {id(module): name for name, module in model.named_modules()}
    for module in model.modules():
        if hasattr(module, "_get_fsdp_state") and head in (own := module._get_fsdp_state()._modules):
            return [names[id(m)] for m in own]


def main(directory, kind):
    if kind != "fsdp":
        import deepspeed

        # It would compile a collective of its own for CPUs.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed("gloo")
    tiling.MLP_TILE = tiling.NORM_TILE = 3  # of one process, all rows are shorter than a tile
    pretend(DistributedType.MULTI_GPU if kind == "fsdp" else DistributedType.DEEPSPEED)
    results, groups = {}, {}
    for name, (changes, options) in SCENARIOS.items():
        try:
            trainer = sharded(kind, directory / name, name, changes, options)
            results[name] = finish(trainer)
            groups[name] = group_of_head(trainer.model) if kind == "fsdp" else None
        except Exception:
            results[name] = traceback.format_exc()
    results["groups"] = groups
    results["whole"] = finish(sharded(kind, directory / "whole", "whole", {}, SAVING))
    checkpoint = str(directory / "whole/checkpoint-2")
    results["resumed"] = finish(sharded(kind, directory / "whole", "whole", {}, SAVING), checkpoint)
    results["failure"] = failure_on_one_rank(kind, directory)
    results["runs"] = [run(kind, directory, lora) for lora in (False, True)]
    torch.save(results, directory / f"{os.environ['RANK']}.pt")
    sys.stdout.flush()
    os._exit(0)  # DeepSpeed's threads may abort an ordinary end.


def pretend(distributed_type):
    begin = PartialState.__init__

    def init(self, *args, **kwargs):
        begin(self, *args, **kwargs)
        if self._shared_state["distributed_type"] == DistributedType.MULTI_CPU:
            self._shared_state["distributed_type"] = distributed_type

    PartialState.__init__ = init


def failure_on_one_rank(kind, directory):
    """Whether a loss that is nan on rank 1 alone stops this rank with its weights untouched."""
    trainer = sharded(kind, directory / "failure", "failure", {}, {})
    plain = trainer._score
    factor = float("nan") if os.environ["RANK"] == "1" else 1.0
    trainer._score = lambda *args: (lambda loss, sequences: (loss * factor, sequences))(*plain(*args))
    try:
        trainer.train()
    except NonFiniteLossError:
        start = dict(make().named_parameters())
        return all(torch.equal(start[name], p) for name, p in whole_weights(trainer.model).items())


def run(kind, directory, lora):
    """Directory of one iteration of `tspin run`."""
    options = sharding(kind, ["LlamaDecoderLayer"]) | toy_options(lora)
    output_dir = directory / f"run-{lora}"
    SelfPlay(toy_config(directory / "toy", output_dir, **options)).run()
    return output_dir


def toy_options(lora):
    adapter = {"use_peft": True, "lora_r": 2, "lora_target_modules": ["q_proj"]} if lora else {}
    return {"iterations": 1, "num_train_epochs": 1} | adapter


@pytest.fixture(scope="module", params=["fsdp", "zero2", "zero3"])
def two_processes(request, tmp_path_factory):
    if request.param != "fsdp" and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed: pip install -c constraints.txt -e '.[deepspeed]'")
    directory = tmp_path_factory.mktemp("ranks")
    make_toy(directory / "toy")
    run_two(__file__, directory, request.param, DS_ACCELERATOR="cpu", TRITON_INTERPRET="")
    results = [torch.load(directory / f"{rank}.pt", weights_only=False) for rank in range(2)]
    return results, directory, request.param


_ALONE = {}  # what one process does is the same for every way of sharding


def of_one_process(name, directory):
    if name not in _ALONE:
        changes, options = SCENARIOS[name]
        doubled = options | {"per_device_train_batch_size": 2 * options.get("per_device_train_batch_size", 2)}
        model = make(**changes)
        start = parameters(model)
        _ALONE[name] = finish(TSPINTrainer(model, arguments(directory, doubled), ROWS, iteration=1))
        assert (parameters(model) - start).abs().max() > 1e-4
    return _ALONE[name]


@pytest.mark.parametrize("name", SCENARIOS)
def test_two_sharded_processes_train_as_one(tmp_path, two_processes, name):
    results, _, kind = two_processes
    if kind == "zero3" and SCENARIOS[name][1].get("sequence_tiling"):
        assert all("sequence_tiling: want 'off', got 'on': DeepSpeed ZeRO-3" in seen[name] for seen in results)
        return
    whole, metrics, losses = of_one_process(name, tmp_path)
    for rank in range(2):
        assert not isinstance(results[rank][name], str), results[rank][name]
        got, got_metrics, got_losses = results[rank][name]
        assert set(got) == set(whole)
        for key in whole:
            assert_close(got[key], whole[key])
        assert got_losses == pytest.approx(losses, rel=1e-4)
        assert got_metrics == pytest.approx(metrics, rel=1e-4, abs=1e-4)


def test_the_scenarios_put_the_head_where_their_names_say(two_processes):
    results, _, kind = two_processes
    if kind != "fsdp":
        return
    groups = results[0]["groups"]
    assert groups["tail"] == ["model.norm", "lm_head"] and groups["alone"] == ["lm_head"] == groups["opt"]
    assert {"lm_head", "model.embed_tokens"} <= set(groups["tied"])
    assert not any("norm" in name for name in groups["lora_trained_head"])


def test_sharded_checkpoints_resume_bitwise_and_are_whole_models(two_processes):
    results, directory, _ = two_processes
    whole, resumed = results[0]["whole"], results[0]["resumed"]
    assert all(torch.equal(whole[0][key], resumed[0][key]) for key in whole[0])
    saved = LlamaForCausalLM.from_pretrained(directory / "whole/checkpoint-4")
    assert all(torch.equal(whole[0][key], p) for key, p in saved.named_parameters())


def test_a_loss_that_is_not_finite_on_one_rank_stops_both_before_the_step(two_processes):
    results, _, _ = two_processes
    assert [seen["failure"] for seen in results] == [True, True]


@pytest.mark.parametrize("lora", [False, True])
def test_a_sharded_run_is_that_of_one_process(tmp_path, two_processes, lora):
    results, directory, _ = two_processes
    one, two = tmp_path / "run", results[0]["runs"][lora]
    SelfPlay(toy_config(directory / "toy", one, per_device_train_batch_size=8, **toy_options(lora))).run()
    for name in ("iter_00/synthetic", "eval_initial/greedy"):
        assert read_generations(one / name) == read_generations(two / name)
    models = [path / "iter_00/model" for path in (one, two)]
    assert sorted(p.name for p in models[0].iterdir()) == sorted(p.name for p in models[1].iterdir())
    weights = [load_file(path / "model.safetensors") for path in models]
    start = load_file(directory / "toy/model/model.safetensors")
    assert any(not torch.equal(tensor, start[name]) for name, tensor in weights[0].items())
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, rtol=1e-3, atol=1e-5)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
