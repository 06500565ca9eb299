"""What stops a training that is no longer finite, what it leaves behind, and what the metrics warn of."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_loop import make_toy, outcome, toy_config
from test_trainer import BARE, QUIET, build, parameters, triplets
from transformers import TrainerCallback

from tspin import diagnostics
from tspin.collator import TripletCollator
from tspin.diagnostics import LENGTH_RATIO, SATURATED_SHARE, WATCHED_TRIPLETS, Watch
from tspin.loop import SelfPlay
from tspin.storage import model_hash
from tspin.trainer import NonFiniteLossError, TSPINTrainer
from tspin.training_args import TSPINConfig

NAN = float("nan")


def rows_of(n):
    return [row | {"row": 100 + i} for i, row in enumerate(triplets(n))]


def trainer_of(tmp_path, callback=None, **options):
    options = QUIET | BARE | {"save_strategy": "steps", "save_steps": 1, "per_device_train_batch_size": 2} | options
    args = TSPINConfig(output_dir=str(tmp_path), **options)
    return TSPINTrainer(build(), args, rows_of(16), callbacks=[callback] if callback else None, iteration=1)


class At(TrainerCallback):
    """Does something to the model before step 2, or to its gradients before they are used."""

    def __init__(self, event, work):
        def call(args, state, control, model=None, **others):
            if state.global_step == 1:
                work(model)

        setattr(self, event, call)


def poison_weight(model):
    model.model.norm.weight.data[0] = NAN


def poison_hidden(model):
    """Of the first sequence of each batch alone."""

    def hook(module, inputs, output):
        output = output.clone()
        output[0] = NAN
        return output

    model.model.norm.register_forward_hook(hook)


def poison_gradient(model):
    model.lm_head.weight.register_hook(lambda gradient: torch.full_like(gradient, float("inf")))


def stopped(trainer, match):
    with pytest.raises(NonFiniteLossError, match=match) as caught:
        trainer.train()
    folder = Path(trainer.diagnostics) / "step-2"
    assert f"rows and statistics are in {folder}" in str(caught.value)
    return json.loads((folder / "rank-0.json").read_text()), load_file(folder / "rank-0.safetensors")


@pytest.mark.parametrize("accumulate", [1, 2])
def test_nan_in_the_weights_leaves_a_bundle_and_the_last_good_checkpoint(tmp_path, accumulate):
    trainer = trainer_of(tmp_path, At("on_step_begin", poison_weight), gradient_accumulation_steps=accumulate)
    facts, batch = stopped(trainer, r"the loss of step 2 is not finite \(nan here\)")
    assert sorted(os.listdir(tmp_path)) == ["checkpoint-1", "diagnostics"]
    assert facts["step"] == 2 and facts["loss"] == "nan" and set(facts["learning_rates"]) == {0.05}
    assert facts["weights_not_finite"] == {"model.norm.weight": 1} and facts["beta_of_iteration"] == 0.1
    assert facts["keys"]["alpha"] == 1.0 and facts["versions"]["torch"]
    (only,) = facts["micro_batches"]
    assert only["loss"] == ["nan", "nan"] and only["lengths/chosen"] == [3, 3] and only["logps/proto"] == ["nan"] * 2
    again = TripletCollator(0, packed=True)([row for i in only["rows"] for row in rows_of(16) if row["row"] == i])
    assert torch.equal(batch["0/input_ids"], again["input_ids"]) and torch.equal(batch["0/targets"], again["targets"])
    assert trainer.model.lm_head.weight.isfinite().all()


def test_nan_in_one_sequence_is_told_from_the_others(tmp_path):
    trainer = trainer_of(tmp_path, At("on_step_begin", poison_hidden), prefix_sharing="off")
    facts, _ = stopped(trainer, "the loss of step 2")
    (only,) = facts["micro_batches"]
    broken = {name: [value == "nan" for value in only[f"logps/{name}"]] for name in only["members"]}
    assert broken == {"chosen": [True, False], "rejected": [False, False], "proto": [False, False]}
    assert [value == "nan" for value in only["loss"]] == [True, False] and facts["weights_not_finite"] == {}


@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_a_gradient_that_is_not_finite_touches_no_weight(tmp_path, clip):
    trainer = trainer_of(tmp_path, At("on_step_begin", poison_gradient), max_grad_norm=clip)
    before = []
    trainer.add_callback(At("on_step_begin", lambda model: before.append(parameters(model))))
    facts, _ = stopped(trainer, r"the gradient norm of step 2 is not finite \((inf|nan) here\)")
    assert facts["gradient_norm"] in ("inf", "nan") and "lm_head.weight" in facts["gradients_not_finite"]
    assert facts["micro_batches"][0]["loss"][0] > 0 and not facts["weights_not_finite"]
    assert torch.equal(parameters(trainer.model), before[0])


def test_a_gradient_scaler_may_skip_steps_until_it_has_nothing_left_to_lower(tmp_path):
    trainer, scale = trainer_of(tmp_path), 2.0**16
    trainer.accelerator.scaler = type("Scaler", (), {"get_scale": lambda self: scale})()
    trainer.model.lm_head.weight.grad = torch.full_like(trainer.model.lm_head.weight, NAN)
    assert torch.isnan(trainer._get_grad_norm(trainer.model))
    scale = 0.5
    with pytest.raises(NonFiniteLossError, match="gradient norm of step 1"):
        trainer._get_grad_norm(trainer.model)


def test_broken_weights_are_never_saved(tmp_path):
    trainer = trainer_of(tmp_path, At("on_pre_optimizer_step", lambda model: None), num_train_epochs=1)
    trainer.add_callback(At("on_optimizer_step", poison_weight))
    stopped(trainer, r"a weight after step 2 is not finite \(1 here\)")
    assert sorted(os.listdir(tmp_path)) == ["checkpoint-1", "diagnostics"]
    unsaved = trainer_of(tmp_path / "unsaved", At("on_optimizer_step", poison_weight), save_strategy="no", max_steps=2)
    stopped(unsaved, "a weight after step 2")


def test_what_cannot_be_written_does_not_hide_the_fault(tmp_path, monkeypatch, caplog):
    def full(*args):
        raise ValueError("no space left on the device")

    monkeypatch.setattr(diagnostics, "write_json", full)
    trainer = trainer_of(tmp_path, At("on_step_begin", poison_weight))
    with pytest.raises(NonFiniteLossError, match=r"loss of step 2 .*its diagnostics could not be written"):
        trainer.train()
    assert "no space left" in caplog.text


@pytest.mark.parametrize(
    "wrong, right",
    [({"learning_rate": 1e30}, {"learning_rate": 1e-3}), ({"alpha": 1e30, "loss_type": "exponential"}, {"alpha": 1.0})],
    ids=["learning_rate", "alpha"],
)
def test_a_run_that_explodes_stops_and_the_remedy_works(tmp_path, wrong, right):
    make_toy(tmp_path)
    small = {"max_rows": 8, "eval_rows": 2, "iterations": 1, "logging_steps": 1, "loss_type": "logistic"}
    for _ in range(2):
        with pytest.raises(
            NonFiniteLossError, match=r"is not finite .*iter_00/diagnostics/step-\d.*Lower alpha or learning"
        ):
            SelfPlay(toy_config(tmp_path, tmp_path / "run", **small | wrong)).run()
    config = toy_config(tmp_path, tmp_path / "run", allow_config_change=True, **small | right)
    result = SelfPlay(config).run()
    alone = SelfPlay(toy_config(tmp_path, tmp_path / "alone", **small | right)).run()
    assert result.model_hash == alone.model_hash == model_hash(result.model_dir)
    differing = {key for key in outcome(tmp_path / "run")["files"]} ^ outcome(tmp_path / "alone")["files"].keys()
    assert not differing


LOGS = {"saturated": 0.0, "truncated": 0.0, "lengths/chosen": 10.0, "lengths/rejected": 12.0}


def test_saturation_and_length_are_warned_of_once_and_over_enough_triplets():
    watch, bad = Watch(), LOGS | {"saturated": SATURATED_SHARE + 0.02, "lengths/rejected": 10 * LENGTH_RATIO + 1}
    assert watch.add(bad, WATCHED_TRIPLETS - 1, False) == []
    saturated, lengths = watch.add(bad, 1, False)
    assert "92% of the triplets are saturated" in saturated and "lower alpha" in saturated
    assert "21 tokens in the mean, annotated ones 10" in lengths and "logp_reduction: mean" in lengths
    assert watch.add(bad, 100, True) == []


def test_quiet_metrics_warn_of_nothing_and_short_iterations_count_at_their_end():
    edge = LOGS | {"saturated": SATURATED_SHARE, "lengths/rejected": 10 * LENGTH_RATIO}
    assert (
        Watch().add(edge, 1000, True)
        == []
        == Watch().add(LOGS, 1000, True)
        == Watch().add({"saturated": 1.0}, 8, False)
    )
    watch = Watch()
    assert len(watch.add({"saturated": 1.0}, 8, True)) == 1
    watch = Watch()
    watch.add(LOGS | {"saturated": 1.0}, 10, False)
    assert watch.add(LOGS, 90, False) == []


def test_a_training_warns_once(tmp_path, caplog):
    trainer = trainer_of(tmp_path, alpha=1e4, learning_rate=1e-12, save_strategy="no")
    trainer.train_dataset = [row | {"rejected_ids": row["rejected_ids"] * 9} for row in rows_of(16)]
    trainer.train()
    assert caplog.text.count("synthetic responses have") == 1 == caplog.text.count("triplets are saturated")
