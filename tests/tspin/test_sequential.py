"""The backward one response at a time gives what the joint pass gives, in the memory of one response."""

import re
from collections import Counter

import pytest
import torch
from peft import LoraConfig
from test_trainer import BARE, QUIET, V, build, parameters, train, triplets
from transformers import Trainer, TrainerState

import tspin.trainer
from tspin import tiling
from tspin.collator import TripletCollator
from tspin.data import MEMBERS
from tspin.fitting import USABLE, MemoryCheck
from tspin.loading import add_adapter
from tspin.memory import Context
from tspin.model import BatchTooLargeError, install_scoring, score_batch
from tspin.sequential import backward_one_by_one, one_by_one
from tspin.trainer import StepTooLargeError, TSPINTrainer
from tspin.training_args import TSPINConfig

CASES = {method: {"method": method} for method in ("tspin", "tspin_no_history", "tspin_ref", "spin", "sft")} | {
    "regularised": {"entropy_coef": 0.3, "sft_coef": 0.2, "logp_reduction": "mean"},
    "spin_entropy": {"method": "spin", "entropy_coef": -0.2, "loss_type": "exponential"},
    "drop_identical": {"drop_identical": True},
    "accumulated": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
    "checkpointing": {"gradient_checkpointing": True},
    "plain": {"fused": "off"},
    "momentum": {"optim": "adamw_torch", "learning_rate": 1e-3, "weight_decay": 0.1},
    "lora": {"lora": True},
}


def run(tmp_path, options, sequential):
    options = {"per_device_train_batch_size": 4, "alpha": 0.1} | options
    model = build()
    if options.pop("lora", False):
        adapter = LoraConfig(r=2, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM", init_lora_weights=False)
        model = add_adapter(model, adapter, seed=0)
    rows = triplets(7, identical=(0, 3, 6), references=True)
    return train(tmp_path, rows, model, sequential_backward=sequential, **options)


@pytest.mark.parametrize("name", CASES)
def test_trajectories_and_metrics_are_those_of_the_joint_pass(tmp_path, name):
    joint, logs, _ = run(tmp_path, CASES[name], "off")
    points, others, _ = run(tmp_path, CASES[name], "on")
    assert (joint[-1] - joint[0]).abs().max() > 1e-3
    torch.testing.assert_close(points, joint, rtol=1e-6, atol=1e-6)
    for log, other in zip(logs, others, strict=True):
        assert set(log) == set(other)
        shared = set(log) - {"tokens_per_second"}
        assert {k: other[k] for k in shared} == pytest.approx({k: log[k] for k in shared}, rel=1e-5, abs=1e-5)


def test_under_autocast_they_differ_by_its_rounding(tmp_path):
    joint, _, _ = run(tmp_path, {"bf16": True}, "off")
    points, _, _ = run(tmp_path, {"bf16": True}, "on")
    moved = (joint[-1] - joint[0]).abs().max()
    assert (points - joint).abs().max() < 0.02 * moved


def test_gradients_are_taken_of_one_unpadded_row_at_a_time_and_never_of_zeros(tmp_path):
    seen = []
    model = build()

    def record(module, args, inputs):
        if torch.is_grad_enabled():
            seen.append(tuple(inputs["input_ids"].shape))

    # The trainer installs its forward on the model; the hook sees every call of it.
    model.register_forward_pre_hook(record, with_kwargs=True)
    rows = triplets(4, identical=(1, 3))
    options = {"sequential_backward": "on", "drop_identical": True, "per_device_train_batch_size": 4}
    train(tmp_path, rows, model, num_train_epochs=1, **options)
    kept = [
        (1, len(row["prompt_ids"]) + len(row[f"{m}_ids"])) for row in rows[::2] for m in ("chosen", "rejected", "proto")
    ]
    # The last row of a batch runs whatever its coefficient.
    assert not Counter(kept) - Counter(seen) and len(seen) - len(kept) in (0, 1)


def test_rows_are_those_of_the_batch():
    rows = triplets(3)
    batch = TripletCollator(pad_token_id=0)(rows)
    singles = list(one_by_one(batch))
    wanted = [(row["prompt_ids"], row[f"{m}_ids"]) for row in rows for m in ("chosen", "rejected", "proto")]
    for single, (prompt, response) in zip(singles, wanted, strict=True):
        assert single["input_ids"].tolist() == [prompt + response]
        assert single["attention_mask"].all() and single["attention_mask"].shape == single["input_ids"].shape
        assert single["rows"].tolist() == list(range(len(prompt) - 1, len(prompt) + len(response) - 1))
        assert single["targets"].tolist() == response and not single["sequence_ids"].any()
        assert single["lengths"].tolist() == [[len(response)]]


def test_an_infinite_log_prob_without_weight_leaves_loss_and_gradient_finite():
    model = build()
    with torch.no_grad():
        model.lm_head.weight.zero_()
    model.lm_head.bias = torch.nn.Parameter(torch.zeros(V))
    with torch.no_grad():
        model.lm_head.bias[5] = -torch.inf
    install_scoring(model)
    rows = triplets(2)
    rows[1]["proto_ids"] = [5, 7]
    keep = torch.tensor([True, False])

    def loss_fn(sequences, keep):
        logprobs = torch.where(keep[:, None], sequences.logprobs, 0.0)
        return torch.where(keep, -logprobs[:, 0] + logprobs[:, 1], 0.0)

    batch = TripletCollator(pad_token_id=0)(rows)
    for skip_zeros in (True, False):
        model.zero_grad()
        score = lambda *args, **options: score_batch(model, *args, **options)
        loss, sequences = backward_one_by_one(
            *(score, lambda loss: loss.backward(), batch, loss_fn), group_inputs=(keep,), skip_zeros=skip_zeros
        )
        loss.backward()
        assert sequences.logprobs[1, 2] == -torch.inf and torch.isfinite(loss)
        assert torch.isfinite(model.lm_head.weight.grad).all() and model.lm_head.weight.grad.abs().max() > 0


def test_a_step_without_any_weight_still_has_gradients(tmp_path):
    points, logs, _ = train(
        tmp_path, triplets(2, identical=(0, 1)), drop_identical=True, num_train_epochs=1, sequential_backward="on"
    )
    assert torch.equal(points[-1], parameters(build())) and logs[0]["loss"] == 0


def prediction(rows, intermediate_size=16, **options) -> MemoryCheck:
    args = TSPINConfig(output_dir="x", **QUIET | BARE | options)
    sharing = options.get("prefix_sharing") != "off"
    contexts = [Context(len(row["prompt_ids"]), tuple(len(row[f"{name}_ids"]) for name in MEMBERS)) for row in rows]
    contexts.sort(key=lambda c: -c.tokens if sharing else -c.prompt - max(c.responses))
    model, longest = build(intermediate_size=intermediate_size), contexts[: args.per_device_train_batch_size]
    return MemoryCheck.of_model(model, args, longest, 1, sharing=sharing)


@pytest.mark.parametrize("options", [{}, {"prefix_sharing": "off"}, {"per_device_train_batch_size": 3}])
def test_auto_takes_tiles_and_then_one_response_at_a_time_just_where_the_longest_triplets_would_not_fit(
    tmp_path, monkeypatch, caplog, options
):
    monkeypatch.setattr(tiling, "MLP_TILE", 8)
    monkeypatch.setattr(tiling, "NORM_TILE", 8)
    rows = triplets(7)
    for row in rows[3:6]:
        row["prompt_ids"] *= 20
    whole, tiled = (
        prediction(rows, **options, sequence_tiling=switch, intermediate_size=256).prediction.peak
        for switch in ("off", "on")
    )
    assert tiled < 0.9 * whole
    joint, _, trainer = train(
        tmp_path, rows, build(intermediate_size=256), **options, sequence_tiling="off", sequential_backward="off"
    )
    assert not trainer.sequential and not trainer.tiled
    sizes = {1.01 * whole: (False, False), 0.99 * whole: (True, False), 0.99 * tiled: (True, True)}
    for size, wanted in sizes.items():
        caplog.clear()
        monkeypatch.setattr(tspin.trainer, "gpu_memory", lambda device, size=size: int(size / USABLE))
        points, _, trainer = train(tmp_path, rows, build(intermediate_size=256), **options)
        assert (trainer.tiled, trainer.sequential) == wanted
        assert ("tokens at a time" in caplog.text, "one response at a time" in caplog.text) == wanted
        torch.testing.assert_close(points, joint, rtol=1e-6, atol=1e-6)
    train_one = lambda **keys: train(tmp_path, rows, build(intermediate_size=256), **options, **keys)[2]
    trainer = train_one(sequence_tiling="off")
    assert trainer.sequential and not trainer.tiled
    trainer = train_one(sequential_backward="off")
    assert trainer.tiled and not trainer.sequential


def test_where_no_prediction_can_be_made_the_pass_is_joint(tmp_path, monkeypatch, caplog):
    def unknown(*args, **options):
        raise KeyError("model_type")

    monkeypatch.setattr(tspin.trainer, "gpu_memory", lambda device: 1)
    monkeypatch.setattr(MemoryCheck, "of_model", unknown)
    _, _, trainer = train(tmp_path, triplets(4))
    assert (
        not trainer.sequential
        and not trainer.tiled
        and "cannot be predicted for LlamaForCausalLM: 'model_type'" in caplog.text
    )


def out_of_memory(*args):
    raise torch.OutOfMemoryError("CUDA out of memory.")


def once(monkeypatch, owner, name):
    """Let the next call of owner.name run out of memory; a prediction takes steps of its own."""
    real = getattr(owner, name)

    def first(*args):
        monkeypatch.setattr(owner, name, real)
        out_of_memory()

    monkeypatch.setattr(owner, name, first)


@pytest.mark.parametrize("size", [None, 2**30])
@pytest.mark.parametrize("where", [(Trainer, "training_step"), (torch.optim.SGD, "step")], ids=["step", "optimizer"])
def test_a_step_without_memory_names_the_remedies_where_they_are_known(tmp_path, monkeypatch, size, where):
    once(monkeypatch, *where)
    monkeypatch.setattr(tspin.trainer, "gpu_memory", lambda device: size)
    with pytest.raises(torch.OutOfMemoryError) as caught:
        train(tmp_path, triplets(4), sequence_tiling="off", sequential_backward="off")
    assert isinstance(caught.value, StepTooLargeError) == (size is not None)
    if size:
        assert re.match(
            r"out of memory in step 1; predicted [\d.]+ MiB for a prompt of 4 and 3 responses of 3 to 4 tokens, one row "
            r"a triplet, with the next longest, 4 in all; what would help, each with those before it: "
            r"per_device_train_batch_size: 1, ",
            str(caught.value),
        )


@pytest.mark.parametrize("amid_training", [False, True])
def test_an_evaluation_without_memory_names_its_own_key(tmp_path, monkeypatch, amid_training):
    monkeypatch.setattr(tspin.trainer, "gpu_memory", lambda device: 2**40)
    args = TSPINConfig(
        output_dir=str(tmp_path), **QUIET, eval_strategy="steps", eval_steps=1, per_device_eval_batch_size=3
    )
    trainer = TSPINTrainer(build(), args, triplets(4), triplets(4))
    with pytest.raises(
        BatchTooLargeError, match=r"^per_device_eval_batch_size: want batches that fit .* evaluation of 3 rows"
    ):
        if amid_training:
            monkeypatch.setattr(TSPINTrainer, "_prepare_inputs", failing_in_evaluation)
            trainer.train()
        else:
            monkeypatch.setattr(TSPINTrainer, "_prepare_inputs", out_of_memory)
            trainer.evaluate()


def failing_in_evaluation(trainer, inputs):
    return inputs if trainer.model.training else out_of_memory()


def test_a_sharded_step_without_memory_names_keys_without_a_prediction(tmp_path, monkeypatch):
    class Sharded(TSPINTrainer):
        is_fsdp_enabled = True

    monkeypatch.setattr(Trainer, "train", out_of_memory)
    trainer = Sharded.__new__(Sharded)
    trainer.args = TSPINConfig(output_dir=str(tmp_path), **QUIET, sequence_tiling="off", sequential_backward="off")
    trainer.state, trainer._sharing, trainer.is_deepspeed_enabled = TrainerState(), None, False
    trainer.tiled = trainer.sequential = False
    with pytest.raises(
        StepTooLargeError, match=r"out of memory in step 1; what sharding saves .*sequential_backward: on"
    ):
        trainer.train()
