"""What fits: the longest context lies on the edge of the GPU, remedies are what the prediction says of their keys."""

import sys
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, BloomConfig, LlamaConfig, Mamba2Config, Qwen2Config

from tspin import cli
from tspin.check import _check_model
from tspin.config import SelfPlayConfig
from tspin.data import Example
from tspin.fitting import USABLE, MemoryCheck, longest_context, parse_memory
from tspin.loading import add_adapter, lora_config, training_args_of
from tspin.memory import Context, _LayerSizes, predict_memory
from tspin.training_args import TSPINConfig

SMALL = LlamaConfig(
    hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4, vocab_size=300, head_dim=16
)
MIB = 2**20


def training_args(tmp_path, **values) -> TSPINConfig:
    values = {"per_device_train_batch_size": 1} | values
    return TSPINConfig(output_dir=str(tmp_path), use_cpu=True, **{"memory_budget": MIB} | values)


def test_sizes_are_read_as_gpus_are_sold():
    assert parse_memory("24GB") == parse_memory(" 24 GiB") == parse_memory("24") == 24 * 2**30
    for text in ("24MB", "much", "0GB", "-3GB"):
        with pytest.raises(ValueError, match="gpu_memory: want"):
            parse_memory(text)


@pytest.mark.parametrize("ratio", [8.0, 1.0])
def test_the_longest_context_lies_on_the_edge(tmp_path, ratio):
    args, gpu = training_args(tmp_path), 64 * MIB
    found = longest_context(SMALL, args, gpu_memory=gpu, prompt_per_response=ratio)
    assert found.prompt / found.responses[0] == pytest.approx(ratio, rel=0.05)
    peak = predict_memory(SMALL, args, prompt_tokens=found.prompt, response_tokens=found.responses).peak
    more = int(found.prompt * 1.04)
    beyond = predict_memory(SMALL, args, prompt_tokens=more, response_tokens=round(more / ratio)).peak
    assert peak <= USABLE * gpu < beyond


def test_the_longest_context_knows_its_bounds(tmp_path):
    args = training_args(tmp_path)
    assert longest_context(SMALL, args, gpu_memory=2 * MIB) is None
    found = longest_context(SMALL, args, gpu_memory=2**40, prompt_per_response=1.0)
    assert found.prompt + found.responses[0] == SMALL.max_position_embeddings


def test_the_levers_lengthen_the_context(tmp_path):
    def longest(**values):
        return longest_context(SMALL, training_args(tmp_path, **values), gpu_memory=20 * MIB).prompt

    plain, kept_on_gpu = longest(), longest(gradient_checkpointing=True)
    offloaded = longest(gradient_checkpointing=True, gradient_checkpointing_kwargs={"offload": True})
    sequential = longest(gradient_checkpointing=True, sequential_backward="on")
    separate = longest_context(
        SMALL, training_args(tmp_path, gradient_checkpointing=True), gpu_memory=20 * MIB, sharing=False
    ).prompt
    assert plain < separate < kept_on_gpu < min(offloaded, sequential)


def test_tiles_nearly_double_the_longest_context_of_a_qwen(tmp_path):
    """Layers as wide as Qwen2.5-1.5B's; the vocabulary is not."""
    shape = {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "vocab_size": 1024}
    qwen = Qwen2Config(**shape, num_attention_heads=12, num_key_value_heads=2, max_position_embeddings=2**20)
    bytes_per_token = {}
    for switch in ("off", "on"):
        args = training_args(tmp_path, gradient_checkpointing=True, sequence_tiling=switch, memory_budget=None)
        short, long = (
            predict_memory(qwen, args, prompt_tokens=8 * n, response_tokens=n, dtype=torch.bfloat16)
            for n in (16384, 32768)
        )
        bytes_per_token[switch] = (long.peak - short.peak) / (long.context.tokens - short.context.tokens)
    assert 1.9 * bytes_per_token["on"] < bytes_per_token["off"]


@pytest.mark.parametrize("adapted", [False, True], ids=["full", "lora"])
def test_a_model_fits_at_its_own_peak_and_not_below(tmp_path, adapted):
    config = SelfPlayConfig.from_dict(
        {
            "model_name_or_path": "x",
            "dataset": "x",
            "output_dir": "x",
            "use_peft": True,
            "lora_target_modules": ["q_proj"],
        }
    )
    adapter, args = lora_config(config) if adapted else None, training_args(tmp_path)
    model = AutoModelForCausalLM.from_config(SMALL)
    model = add_adapter(model, adapter, seed=0) if adapted else model
    peak = predict_memory(SMALL, args, prompt_tokens=256, response_tokens=(64, 32, 48), peft_config=adapter).peak
    edge = peak / USABLE
    for gpu_memory, fits in ((int(edge * 1.01), True), (int(edge * 0.99), False)):
        assert MemoryCheck.of_model(model, args, Context(256, (64, 32, 48)), gpu_memory).fits == fits


def run_config(path, **values) -> SelfPlayConfig:
    return SelfPlayConfig.from_dict(
        {"model_name_or_path": str(path), "dataset": "x", "output_dir": "x", "use_cpu": True, "bf16": False} | values
    )


def test_remedies_are_predictions_and_end_where_it_fits(tmp_path):
    SMALL.save_pretrained(tmp_path)
    config = run_config(tmp_path)
    args = TSPINConfig(output_dir="x", **config.training_at(1))
    check = MemoryCheck.of_run(config, args, Context(256, (64,) * 3), 24 * MIB)
    assert not check.fits
    remedies = list(check.remedies())
    peaks = [check.prediction.peak, *(peak for _, peak in remedies)]
    assert peaks == sorted(peaks, reverse=True) and peaks[-2] > USABLE * check.gpu_memory >= peaks[-1]
    assert remedies[0][0].startswith("per_device_train_batch_size: 1, gradient_accumulation_steps: 8")
    one = replace(args, per_device_train_batch_size=1, gradient_accumulation_steps=8)
    first = predict_memory(SMALL, one, prompt_tokens=256, response_tokens=64).peak
    assert first == remedies[0][1]
    spared = check.spared()
    assert spared.fits and spared.args.sequential_backward == "on" and spared.need() in check.verdict()
    sharded = MemoryCheck.of_run(config, args, check.context, 4 * MIB, gpus=2)
    assert not sharded.fits and sharded.spared() is sharded
    settled = replace(args, sequence_tiling="off", sequential_backward="off")
    check = MemoryCheck.of_run(config, settled, check.context, check.gpu_memory)
    with pytest.raises(ValueError, match=r"per_device_train_batch_size: 1.*longest at this ratio"):
        check.verdict()


def test_no_adapter_is_suggested_where_peft_is_missing(tmp_path, monkeypatch):
    SMALL.save_pretrained(tmp_path)
    monkeypatch.setitem(sys.modules, "peft", None)
    config = run_config(tmp_path, per_device_train_batch_size=1)
    args = TSPINConfig(output_dir="x", **config.training_at(1))
    check = MemoryCheck.of_run(config, args, Context(256, (64,) * 3), MIB)
    assert check.adapter is None and not any("use_peft" in keys for keys, _ in check.remedies())


def test_quantized_weights_and_adapters_cost_less(tmp_path):
    wide = LlamaConfig(
        **{**SMALL.to_dict(), "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 8, "head_dim": 128}
    )
    adapter = lora_config(run_config(tmp_path, use_peft=True))
    args = training_args(tmp_path, gradient_checkpointing=True)

    def frozen(quantization):
        lengths = {"prompt_tokens": 32, "response_tokens": 8}
        found = predict_memory(
            wide, args, **lengths, peft_config=adapter, quantization=quantization, dtype=torch.bfloat16
        )
        return found.terms["frozen weights"]

    layers = 8 * (4 * 512 * 512 + 3 * 512 * 1024)
    wanted = {"int8": layers, "nf4": layers * (2 - 4.5 / 8)}
    for quantization, saved in wanted.items():
        assert frozen("none") - frozen(quantization) == pytest.approx(saved, rel=1e-3)


def test_check_of_a_model_without_weights(tmp_path, capsys):
    SMALL.save_pretrained(tmp_path)
    words = ["--model_name_or_path", str(tmp_path), "--dataset", "absent.jsonl", "--max_length", "64"]
    words += ["--max_new_tokens", "16", "--gpu_memory"]
    assert cli.main(["check", *words, "24GB"]) == 2
    captured = capsys.readouterr()
    assert "ok  memory: " in captured.out and "of 24.00 GiB; longest at this ratio" in captured.out
    assert "optimizer states" in captured.out and "at the peak, in the" in captured.out
    assert "check failed: tokenizer" in captured.err and "memory" not in captured.err
    # What the trainer takes by itself is counted, unless it is switched off.
    assert cli.main(["check", *words, "0.01GB"]) == 2
    assert "ok  memory: " in (out := capsys.readouterr().out) and "one response at a time, within" in out
    assert cli.main(["check", *words, "0.01GB", "--sequence_tiling", "off", "--sequential_backward", "off"]) == 2
    out, err = capsys.readouterr()
    assert "NO  memory: want at most" in out and "memory" in err


def test_what_cannot_be_predicted_is_no_failure(tmp_path, monkeypatch, capsys):
    """Of a model's own code, which no config can mend."""

    def broken(*args, **options):
        raise RuntimeError("no meta kernel")

    SMALL.save_pretrained(tmp_path)
    monkeypatch.setattr("tspin.fitting.predict_memory", broken)
    words = ["--model_name_or_path", str(tmp_path), "--dataset", "absent.jsonl", "--gpu_memory", "24GB"]
    assert cli.main(["check", *words]) == 2
    out, err = capsys.readouterr()
    assert "ok  memory: not predicted, as the model does not run without data: RuntimeError, no meta kernel" in out
    assert "memory" not in err


def test_a_config_with_infinities_has_layers():
    """FalconH1 and Mamba 2 have one, which no round trip through JSON would bring back."""
    text = Mamba2Config(
        num_heads=4, head_dim=32, hidden_size=64, expand=2, num_hidden_layers=3, vocab_size=300, n_groups=1
    )
    assert _LayerSizes.of(text, False).equal


def test_where_positions_end_what_fits_that_far_is_said_without_keys(tmp_path):
    check = MemoryCheck(SMALL, training_args(tmp_path, gradient_checkpointing=True), Context(64, (8, 8, 8)), 2**40)
    assert (
        "longest at this ratio: a prompt of 1820 and responses of 228, all the positions that the model has"
        in check.verdict()
    )
    short = longest_context(SMALL, training_args(tmp_path), gpu_memory=2**40, prompt_per_response=0.001)
    assert short.prompt + short.responses[0] <= SMALL.max_position_embeddings


def test_tiles_that_a_model_does_not_allow_are_refused_before_the_run(tmp_path):
    BloomConfig(vocab_size=300, hidden_size=64, n_layer=2, n_head=4).save_pretrained(tmp_path)
    values = {"model_name_or_path": str(tmp_path), "dataset": "d", "sequence_tiling": "on", "use_cpu": True}
    config, example = SelfPlayConfig.from_dict(values), Example(0, "", "", [1], [2])
    with pytest.raises(ValueError, match="sequence_tiling: want 'off', got 'on': BloomMLP reads more"):
        _check_model(config, [training_args_of(config, 0)], range(300), [example], [])
