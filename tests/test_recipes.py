"""The recipes: every key says whose its value is, the paper's values are the paper's, `tspin check` needs no weights for them."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch
import yaml

from tspin import cli
from tspin.config import SelfPlayConfig

RECIPES = Path(__file__).parents[1] / "recipes"
ULTRACHAT = ("zephyr_7b_ultrachat", "mistral_7b_ultrachat")
# As the paper states them.
PAPER = {
    "conversation_round": "first",
    "max_rows": 50000,
    "prompt_template": "### Instruction: {prompt}\n\n### Response: ",
    "tasks": "paper",
    "method": "tspin",
    "iterations": 5,
    "alpha": 1.0,
    "beta": 0.1,
    "beta_first_iteration": 0.0,
    "loss_type": "logistic",
    "optim": "rmsprop",
    "weight_decay": 0.0,
    "warmup_steps": 0.1,
    "max_length": 2048,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
}
SPIN = {"learning_rate", "lr_scheduler_type", "num_train_epochs", "max_new_tokens", "logp_reduction"}
MISTRAL = {
    "architectures": ["MistralForCausalLM"],
    "model_type": "mistral",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 32768,
    "sliding_window": 4096,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-05,
    "vocab_size": 32000,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@pytest.mark.parametrize("name", ULTRACHAT)
def test_the_recipe_of_the_paper_says_whose_each_value_is(name):
    lines = (RECIPES / f"{name}.yaml").read_text().splitlines()
    said = dict(re.findall(r"^(\w+): .*?  ?#+ (paper|SPIN|ours)\b", "\n".join(lines), re.M))
    config = SelfPlayConfig.from_file(RECIPES / f"{name}.yaml")
    given = yaml.safe_load((RECIPES / f"{name}.yaml").read_text())
    assert said.keys() == given.keys()
    values = config.to_dict()
    assert {key for key, whose in said.items() if whose == "SPIN"} == SPIN
    stated = {key for key, whose in said.items() if whose == "paper"}
    assert stated == PAPER.keys() | {"model_name_or_path", "dataset"}
    assert {key: values[key] for key in PAPER} == PAPER


def test_the_two_recipes_of_the_paper_differ_in_the_model_alone():
    zephyr, mistral = (SelfPlayConfig.from_file(RECIPES / f"{name}.yaml") for name in ULTRACHAT)
    assert {key for key, *_ in zephyr.diff(mistral)} == {"model_name_or_path"}


def test_the_launch_file_means_fsdp2_over_eight_processes(monkeypatch):
    from accelerate import FullyShardedDataParallelPlugin
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_multi_gpu_env

    words = ["--config_file", str(RECIPES / "fsdp2_8gpus.yaml"), "-m", "tspin"]
    launch, *_ = _validate_launch_command(launch_command_parser().parse_args(words))
    assert (launch.num_processes, launch.num_machines, launch.use_fsdp) == (8, 1, True)
    for name, value in prepare_multi_gpu_env(launch).items():
        monkeypatch.setenv(name, value)
    plugin = FullyShardedDataParallelPlugin()
    plugin.set_mixed_precision(launch.mixed_precision)
    assert plugin.fsdp_version == 2 and plugin.reshard_after_forward is True
    assert str(plugin.state_dict_type) == "StateDictType.FULL_STATE_DICT"
    assert not plugin.cpu_ram_efficient_loading and not plugin.activation_checkpointing
    assert plugin.mixed_precision_policy.param_dtype == torch.bfloat16


def check_recipe(name: str, root: Path, layers: int) -> int:
    sys.path.insert(0, str(Path(__file__).parent / "tspin"))
    from test_data import make_tokenizer

    make_tokenizer(bos=True, chat=None).save_pretrained(root / "model")
    (root / "model" / "config.json").write_text(json.dumps(MISTRAL | {"num_hidden_layers": layers}))
    turns = [{"role": role, "content": f"{role} says " + "so " * n} for n in (60, 20) for role in ("user", "assistant")]
    (root / "data").mkdir()
    for split in ("train_sft", "test_sft"):
        row = {"prompt": turns[0]["content"], "prompt_id": "0", "messages": turns}
        long = [{"role": "user", "content": "x" * 3000}, turns[1]]
        rows = "".join(json.dumps(r) + "\n" for r in (row, {"prompt": "x", "messages": long}))
        (root / "data" / f"{split}-00000-of-00001.jsonl").write_text(rows)
    words = ["--config", str(RECIPES / f"{name}.yaml"), "--model_name_or_path", str(root / "model"), "--tasks", "null"]
    words += ["--dataset", str(root / "data"), "--eval_dataset", str(root / "data"), "--gpu", "H100", "--gpus", "8"]
    return cli.main(["check", *words])


def test_check_of_the_recipe_without_weights(tmp_path, capsys):
    assert check_recipe("zephyr_7b_ultrachat", tmp_path, layers=2) == 0
    out = capsys.readouterr().out
    assert "of config.json alone" in out and "data: 1 rows" in out  # the prompt that fills max_length is left out
    assert "on each of 8 GPUs under FSDP2, within the 73.60 GiB that tensors get of 80.00 GiB" in out
    assert "cost: predicted, not measured" in out and "assumes 40%" in out
    assert "response  u" not in out and "a | s | s | i | s | t | a | n | t" in out


@pytest.mark.soak
def test_check_of_the_recipe_at_its_full_size(tmp_path, capsys):
    assert check_recipe("mistral_7b_ultrachat", tmp_path, layers=32) == 0
    out = capsys.readouterr().out
    assert "MistralForCausalLM, 7,241,732,096 parameters" in out and "3.37 GiB  weights" in out


@pytest.mark.soak
def test_the_costs_and_peaks_that_the_page_states(tmp_path):
    from transformers import AutoModelForCausalLM, MistralConfig

    from tspin.cost import GPUS, Cost
    from tspin.fitting import MemoryCheck
    from tspin.loading import training_args_of
    from tspin.memory import Context

    page = (RECIPES.parent / "docs" / "paper_recipe.md").read_text()
    sizes = MistralConfig(**{k: v for k, v in MISTRAL.items() if k not in ("architectures", "model_type")})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(sizes)
    config = SelfPlayConfig.from_file(
        RECIPES / "mistral_7b_ultrachat.yaml", {"use_cpu": True, "output_dir": str(tmp_path)}
    )
    args = [training_args_of(config, t) for t in range(5)]
    rows = re.findall(r"^\| (\d+) \+ (\d+) \| (\w+) \| (.*) \|$", page, re.M)
    assert len(rows) == 4
    for prompt, answer, gpu, stated in rows:
        lengths = [(int(prompt), int(answer))]
        cost = Cost(config, model, args, lengths * 50000, lengths * 256, GPUS[gpu])
        found = [*(s.hours for s in (*cost.iterations[0], cost.iterations[1][1])), cost.hours]
        assert [float(cell) for cell in stated.split(" | ")] == pytest.approx(found, rel=0.03), (gpu, found)
    assert f"each of the {cost.forward.kernels:,} kernels" in page
    for gpus, peak in ((8, "25.16 GiB  at the peak"), (4, "need 32.0 GiB each"), (2, "two 48.6")):
        check = MemoryCheck(sizes, args[1], Context(1792, (256,) * 3), 80 * 2**30, gpus=gpus, sharing=True)
        assert peak in page and check.prediction.peak / 2**30 == pytest.approx(
            float(re.search(r"\d+\.\d+", peak)[0]), abs=0.06
        )
