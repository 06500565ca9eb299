"""Training, evaluation and references with shared prompts are those of separate rows, and a model that cannot is refused."""

import logging
import math

import pytest
import torch
from peft import LoraConfig
from test_trainer import METHODS, V, build, parameters, train, triplets
from transformers import DogeConfig, DogeForCausalLM, modeling_utils

from tspin.collator import TripletCollator
from tspin.loading import add_adapter
from tspin.model import install_scoring, score_batch
from tspin.prefix import NAME, share_prompts
from tspin.scoring import score_references, verify_packed_row
from tspin.trainer import TSPINTrainer
from tspin.training_args import TSPINConfig

CASES = {method: {"method": method} for method in METHODS} | {
    "one by one": {"sequential_backward": "on"},
    "regularised": {"entropy_coef": 0.3, "sft_coef": 0.2, "logp_reduction": "mean", "drop_identical": True},
    "plain": {"fused": "off"},
    "lora": {"lora": True},
    "adam": {"optim": "adamw_torch", "learning_rate": 1e-3, "weight_decay": 0.1},
    "reentrant": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
    "not reentrant": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
}


def run(tmp_path, options, sharing, rows=None, **more):
    options = {"per_device_train_batch_size": 3, "alpha": 0.3} | options
    model = build()
    if options.pop("lora", False):
        adapter = LoraConfig(r=2, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM", init_lora_weights=False)
        model = add_adapter(model, adapter, seed=0)
    rows = rows or triplets(7, identical=(2,), references=True)
    return train(tmp_path, rows, model, prefix_sharing=sharing, **options, **more)


def same_training(one, other):
    points, logs, _ = one
    others, other_logs, _ = other
    assert (points[-1] - points[0]).abs().max() > 1e-3
    torch.testing.assert_close(points, others, rtol=1e-5, atol=1e-5)
    for log, other_log in zip(logs, other_logs, strict=True):
        assert set(log) == set(other_log)
        shared = set(log) - {"tokens_per_second"}
        assert {k: log[k] for k in shared} == pytest.approx({k: other_log[k] for k in shared}, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_training_is_that_of_separate_rows(tmp_path, name):
    shared = run(tmp_path, CASES[name], "on")
    assert shared[2].sharing and shared[2].data_collator.packed
    same_training(shared, run(tmp_path, CASES[name], "off"))


def test_training_is_that_of_separate_rows_however_unequal_they_are(tmp_path):
    rows = triplets(4)
    rows[0] |= {"prompt_ids": [5] * 7 + [9] * 40, "rejected_ids": [4] * 50, "proto_ids": [6]}
    rows[1] |= {"prompt_ids": [7], "chosen_ids": [8], "rejected_ids": [3], "proto_ids": [4]}
    options = {"per_device_train_batch_size": 4, "alpha": 0.01}
    same_training(run(tmp_path, options, "on", rows), run(tmp_path, options, "off", rows))


@pytest.mark.parametrize("tiling", ["off", "on"])
def test_training_with_activations_in_host_memory_is_that_without(tmp_path, monkeypatch, tiling):
    for tile in ("MLP_TILE", "NORM_TILE"):
        monkeypatch.setattr(f"tspin.tiling.{tile}", 8)
    saved, save_on_cpu = [], modeling_utils.save_on_cpu

    def unpinned(pin_memory, **options):
        saved.append(pin_memory)
        return save_on_cpu(pin_memory=False, **options)

    # A CPU has no pinned memory.
    monkeypatch.setattr(modeling_utils, "save_on_cpu", unpinned)
    options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"offload": True}}
    offloaded = run(tmp_path, options | {"sequence_tiling": tiling}, "on")
    assert saved
    same_training(offloaded, run(tmp_path, {}, "on"))


def test_under_autocast_they_differ_by_its_rounding(tmp_path):
    shared, _, _ = run(tmp_path, {"bf16": True}, "on")
    apart, _, _ = run(tmp_path, {"bf16": True}, "off")
    assert (shared - apart).abs().max() < 0.02 * (apart[-1] - apart[0]).abs().max()


def test_a_packed_batch_holds_every_prompt_once_and_no_padding():
    rows = triplets(3)
    rows[1]["chosen_ids"] = list(range(3, 43))
    batch = TripletCollator(0, packed=True)(rows)
    want = [token for row in rows for part in ("prompt", "chosen", "rejected", "proto") for token in row[f"{part}_ids"]]
    assert batch["input_ids"].tolist() == [want]
    padded = TripletCollator(0)(rows)
    for name in ("targets", "sequence_ids", "lengths", "identical", "truncated"):
        assert torch.equal(batch[name], padded[name])


def test_evaluation_is_that_of_separate_rows_and_leaves_the_model_as_it_was(tmp_path):
    rows, seen = triplets(5), {}
    for sharing in ("on", "off"):
        args = TSPINConfig(output_dir=str(tmp_path), use_cpu=True, per_device_eval_batch_size=2, prefix_sharing=sharing)
        trainer = TSPINTrainer(build(), args, rows, rows, iteration=1)
        before = trainer.model.config._attn_implementation
        metrics = trainer.evaluate()
        assert trainer.model.config._attn_implementation == before != NAME
        seen[sharing] = {k: v for k, v in metrics.items() if "second" not in k and "time" not in k}
    assert seen["on"] == pytest.approx(seen["off"], rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("members", [("chosen",), ("chosen", "rejected"), ("chosen", "rejected", "proto")])
def test_references_are_those_of_separate_rows(members):
    model, rows, collator = build(), triplets(5), TripletCollator(0, members)
    before = model.config._attn_implementation
    shared = score_references(model, rows, collator, batch_size=2, prefix_sharing=True)
    apart = score_references(model, rows, collator, batch_size=2)
    assert model.config._attn_implementation == before != NAME
    for name, values in apart.items():
        assert shared[name] == pytest.approx(values, rel=1e-5, abs=1e-5)


def test_shared_rows_outside_the_switch_are_refused():
    model = build()
    install_scoring(model)
    batch = TripletCollator(0, packed=True)(triplets(2))
    with pytest.raises(ValueError, match="share_prompts"):
        score_batch(model, batch, lambda s: s.logprobs[:, 0])
    with share_prompts(model):
        score_batch(model, batch, lambda s: s.logprobs[:, 0])


def loud(model):
    """Weights that attend sharply, as trained ones do."""
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return model


def doge():
    """An architecture that adds a mask of its own making to the one it is given."""
    torch.manual_seed(0)
    sizes = {"vocab_size": V, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}
    model = DogeForCausalLM(DogeConfig(**sizes, num_attention_heads=2, pad_token_id=0))
    return loud(model)


def positions_of_the_row():
    model = loud(build())
    drop = lambda module, args, kwargs: (args, kwargs | {"position_ids": None})
    model.model.register_forward_pre_hook(drop, with_kwargs=True)
    return model


def neighbours():
    model = build()
    model.model.embed_tokens.register_forward_hook(lambda module, args, x: x + 0.1 * x.roll(1, dims=1))
    return model


def start_of_the_row():
    """Wrong in no row but one of several triplets."""
    model = build()
    model.model.embed_tokens.register_forward_hook(lambda module, args, x: x + 0.5 * x[:, :1])
    return model


@pytest.mark.parametrize("sharing, method", [("auto", "tspin"), ("on", "spin")])
@pytest.mark.parametrize("wrong", [doge, positions_of_the_row, neighbours, start_of_the_row])
def test_a_model_that_reads_more_from_a_row_stops_the_run_at_its_first_batch(tmp_path, sharing, method, wrong):
    model, rows = wrong(), triplets(6, references=True)
    before, attention = parameters(model), model.config._attn_implementation
    with pytest.raises(ValueError, match=r"prefix_sharing: .* differ .*ForCausalLM reads .* use prefix_sharing='off'"):
        train(tmp_path, rows, model, prefix_sharing=sharing, per_device_train_batch_size=2, method=method)
    assert torch.equal(parameters(model), before) and model.config._attn_implementation == attention
    train(tmp_path, rows, model, prefix_sharing="off", per_device_train_batch_size=2, method=method)
    with pytest.raises(ValueError, match="use prefix_sharing='off'"):
        score_references(wrong(), rows, TripletCollator(0), prefix_sharing=True)
    args = TSPINConfig(output_dir=str(tmp_path), use_cpu=True, prefix_sharing=sharing, method=method)
    with pytest.raises(ValueError, match="use prefix_sharing='off'"):
        TSPINTrainer(wrong(), args, eval_dataset=rows, iteration=1).evaluate()


@pytest.mark.parametrize("value", [-math.inf, math.nan])
def test_log_probs_that_are_not_finite_in_either_way_are_no_difference(value):
    model = build()
    model.lm_head.bias = torch.nn.Parameter(torch.zeros(V))
    rows = triplets(2)
    with torch.no_grad():
        model.lm_head.bias[rows[1]["proto_ids"][0]] = value
    install_scoring(model)
    verify_packed_row(model, TripletCollator(0, packed=True)(rows))


def test_every_run_verifies_its_first_batch_also_after_a_checkpoint(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr("tspin.trainer.verify_packed_row", lambda *a, **k: calls.append(verify_packed_row(*a, **k)))
    options = {"save_strategy": "steps", "save_steps": 2, "num_train_epochs": 2}
    whole = run(tmp_path, options, "on")
    assert len(calls) == 1
    resumed = run(tmp_path, options, "on", resume=str(tmp_path / "checkpoint-4"))
    assert len(calls) == 2
    assert torch.equal(resumed[0][-1], whole[0][-1])
    assert NAME not in (tmp_path / "checkpoint-4" / "config.json").read_text()
    resumed[2].train()
    assert len(calls) == 3 and resumed[2].model.config._attn_implementation != NAME


def test_one_by_one_scores_a_triplet_in_one_pass_and_runs_its_responses_apart(tmp_path):
    model, passes = build(), []
    see = lambda module, args, inputs: passes.append((torch.is_grad_enabled(), inputs["input_ids"].shape[1]))
    model.register_forward_pre_hook(see, with_kwargs=True)
    rows = triplets(2)
    options = {"per_device_train_batch_size": 2, "num_train_epochs": 1}
    train(tmp_path, rows, model, sequential_backward="on", prefix_sharing="on", **options)
    count = lambda row, *names: sum(len(row[f"{name}_ids"]) for name in names)
    members = ("chosen", "rejected", "proto")
    whole = [(False, count(row, "prompt", *members)) for row in rows]
    single = [(True, count(row, "prompt", member)) for row in rows for member in members]
    assert sorted(passes[-8:-6]) == sorted(whole) and sorted(passes[-6:]) == sorted(single)
    # Nor does the verification take a row of two triplets.
    assert max(length for _, length in passes) == max(length for _, length in whole)


def test_a_model_that_cannot_share_is_refused_or_scored_in_separate_rows(tmp_path, caplog):
    model = build()
    model.config.layer_types = ["conv"]
    with pytest.raises(
        ValueError, match=r"prefix_sharing: want .* got LlamaForCausalLM: .*conv.* prefix_sharing='off'"
    ):
        TSPINTrainer(model, TSPINConfig(output_dir=str(tmp_path), use_cpu=True, prefix_sharing="on"), triplets(2))
    with caplog.at_level(logging.WARNING, logger="tspin.scoring"):
        trainer = TSPINTrainer(model, TSPINConfig(output_dir=str(tmp_path), use_cpu=True), triplets(2))
    assert not trainer.sharing and not trainer.data_collator.packed
    assert caplog.text.count("a row of its own") == 1
