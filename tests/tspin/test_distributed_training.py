"""Training is the same however it is cut up: over micro-batches, over two processes that talk by gloo, over restarts.

Run as a program, this file is one of the two processes: it trains every scenario and saves what it saw.
"""

import os
import sys

import pytest
import torch
from accelerate import PartialState
from peft import LoraConfig
from processes import run_two
from test_trainer import BARE, QUIET, assert_close, build, parameters, train, triplets

from tspin import tiling
from tspin.trainer import NonFiniteLossError, TSPINTrainer
from tspin.training_args import TSPINConfig

# Rows and the options of two processes, which share prompts; one process gets batches twice as large, of separate rows.
# Ten rows in rounds of four leave two for the last one, so that the second process only repeats rows there.
SCENARIOS = {
    "uneven_tail": (triplets(10), {"per_device_train_batch_size": 2}),
    "drop_identical": (
        triplets(11, identical=(0, 1, 4, 7), references=True),
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "method": "spin", "drop_identical": True},
    ),
    "regularised": (
        triplets(5),
        {"per_device_train_batch_size": 3, "entropy_coef": 0.3, "sft_coef": 0.2, "logp_reduction": "mean"},
    ),
    "lora": (triplets(6), {"per_device_train_batch_size": 1, "lora": True}),
    "sequential": (
        triplets(7, identical=(0, 3)),
        {"per_device_train_batch_size": 2, "sequential_backward": "on", "drop_identical": True, "entropy_coef": 0.1},
    ),
    "tiled": (triplets(6), {"per_device_train_batch_size": 1, "sequence_tiling": "on", "gradient_checkpointing": True}),
    "plain": (triplets(6), {"per_device_train_batch_size": 1, "fused": "off"}),
    "separate": (triplets(6), {"per_device_train_batch_size": 1, "prefix_sharing": "off"}),
}
VOLATILE = {"tokens_per_second", "epoch"}


def run_scenario(directory, rows, options, resume=None):
    """(parameters after every step, step logs, evaluation) of one process."""
    options = dict(options)
    model = build()
    if options.pop("lora", False):
        from tspin.loading import add_adapter

        adapter = LoraConfig(r=2, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM", init_lora_weights=False)
        model = add_adapter(model, adapter, seed=0)
    points, logs, trainer = train(directory, rows, model, resume=resume, per_device_eval_batch_size=2, **options)
    metrics = trainer.evaluate(rows[:5])
    return points, logs, {k: v for k, v in metrics.items() if "per_second" not in k and "runtime" not in k}


def main(directory):
    rank, results = int(os.environ["RANK"]), {}
    assert PartialState(cpu=True).num_processes == 2
    tiling.MLP_TILE = tiling.NORM_TILE = 3  # of one process, all rows are shorter than a tile
    for name, (rows, options) in SCENARIOS.items():
        results[name] = run_scenario(f"{directory}/{name}", rows, options)
    rows, options = SCENARIOS["uneven_tail"]
    options = options | {"save_strategy": "steps", "save_steps": 1}
    results["whole"] = run_scenario(f"{directory}/whole", rows, options)
    results["resumed"] = run_scenario(f"{directory}/whole", rows, options, resume=f"{directory}/whole/checkpoint-4")
    results["failure"] = failure_on_one_rank(directory, rank)
    results["mismatch"] = mismatch_on_one_rank(directory, rank)
    torch.save(results, f"{directory}/{rank}.pt")


def failure_on_one_rank(directory, rank):
    """What a rank raises when the loss of rank 1 alone is nan, and whether its weights were touched."""

    class Broken(TSPINTrainer):
        def compute_loss(self, *args, **kwargs):
            return super().compute_loss(*args, **kwargs) * (float("nan") if rank == 1 else 1.0)

    args = TSPINConfig(output_dir=f"{directory}/failure", **QUIET | BARE)
    trainer = Broken(build(), args, triplets(4), iteration=1)
    try:
        trainer.train()
    except NonFiniteLossError:
        return torch.equal(parameters(trainer.model), parameters(build()))


def mismatch_on_one_rank(directory, rank):
    """What a rank raises when the model of rank 1 alone mixes neighbours in a row."""
    model = build()
    if rank == 1:
        model.model.embed_tokens.register_forward_hook(lambda module, args, x: x + x.roll(1, dims=1))
    try:
        train(f"{directory}/mismatch", triplets(4), model)
    except ValueError as error:
        return str(error), torch.equal(parameters(model), parameters(build()))


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """What ranks 0 and 1 saw, started with the environment that accelerate launch gives its processes."""
    directory = tmp_path_factory.mktemp("ranks")
    run_two(__file__, directory, ACCELERATE_USE_CPU="true")
    return [torch.load(directory / f"{rank}.pt", weights_only=False) for rank in range(2)]


def same_logs(logs, others):
    for log, other in zip(logs, others, strict=True):
        assert set(log) == set(other)
        shared = set(log) - VOLATILE
        assert {k: log[k] for k in shared} == pytest.approx({k: other[k] for k in shared}, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("name", SCENARIOS)
def test_two_processes_train_as_one(tmp_path, two_processes, name):
    rows, options = SCENARIOS[name]
    doubled = options | {"per_device_train_batch_size": 2 * options["per_device_train_batch_size"]}
    doubled |= {"prefix_sharing": "off"}
    points, logs, metrics = run_scenario(tmp_path, rows, doubled)
    for rank in range(2):
        got_points, got_logs, got_metrics = two_processes[rank][name]
        assert_close(got_points, points)
        same_logs(got_logs, logs)
        same_logs([got_metrics], [metrics])
    assert torch.equal(two_processes[0][name][0], two_processes[1][name][0])
    assert (points[-1] - points[0]).abs().max() > 1e-4


def test_two_processes_resume_bitwise(two_processes):
    whole, resumed = two_processes[0]["whole"], two_processes[0]["resumed"]
    assert len(whole[0]) == 6 and len(resumed[0]) == 2
    assert torch.equal(whole[0][-2:], resumed[0])


def test_a_loss_that_is_not_finite_on_one_rank_stops_both_before_the_step(two_processes):
    assert [results["failure"] for results in two_processes] == [True, True]


def test_a_shared_row_that_differs_on_one_rank_stops_both_at_the_first_batch(two_processes):
    for results in two_processes:
        message, untouched = results["mismatch"]
        assert "here or on another process" in message and "prefix_sharing='off'" in message and untouched


CUTS = [(1, 4), (2, 2), (4, 1)]


@pytest.mark.parametrize("drop_identical", [False, True])
@pytest.mark.parametrize("method", ["tspin", "spin", "sft"])
def test_accumulating_gradients_changes_no_trajectory(tmp_path, method, drop_identical):
    # Ten rows in steps of four leave a tail of two; one micro-batch may hold only identical pairs.
    rows, runs = triplets(10, identical=(1, 2, 5, 8), references=True), []
    for size, steps in CUTS:
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps}
        options["prefix_sharing"] = "off" if size == 2 else "on"
        model = build()
        # transformers divides the loss of such a model once more, unless it is told not to.
        model.accepts_loss_kwargs = False
        runs.append(train(tmp_path, rows, model, method=method, drop_identical=drop_identical, **options))
    assert [len(points) for points, _, _ in runs] == [6, 6, 6]
    for points, logs, _ in runs[1:]:
        assert_close(points, runs[0][0])
        same_logs(logs, runs[0][1])


def test_dropping_identical_pairs_is_training_without_them(tmp_path):
    rows = triplets(6, identical=(0, 3))
    whole = {"per_device_train_batch_size": 6}
    dropped, logs, _ = train(tmp_path, rows, drop_identical=True, **whole)
    without, _, _ = train(tmp_path, [row for i, row in enumerate(rows) if i not in (0, 3)], **whole)
    kept, _, _ = train(tmp_path, rows, **whole)
    assert_close(dropped, without)
    assert (dropped - kept).abs().max() > 1e-4
    assert [log["identical"] for log in logs] == [pytest.approx(1 / 3)] * 2


def test_a_step_of_identical_pairs_only_leaves_the_weights(tmp_path):
    points, logs, _ = train(tmp_path, triplets(4, identical=range(4)), drop_identical=True, num_train_epochs=1)
    assert torch.equal(points[-1], parameters(build())) and logs[0]["loss"] == 0
    assert not {"misaligned", "rewards/accuracies"} & set(logs[0])


@pytest.mark.parametrize("interrupted_after", [1, 3])
def test_a_resumed_run_ends_bitwise_equal(tmp_path, interrupted_after):
    rows = triplets(5)
    options = {"optim": "rmsprop", "per_device_train_batch_size": 2, "num_train_epochs": 2, "learning_rate": 1e-3}
    options |= {"save_strategy": "steps", "save_steps": 1, "lr_scheduler_type": "linear"}
    whole, logs, _ = train(tmp_path, rows, **options)
    checkpoint = str(tmp_path / f"checkpoint-{interrupted_after}")
    resumed, relogs, _ = train(tmp_path, rows, build(seed=9), resume=checkpoint, **options)
    assert len(whole) == 6 and torch.equal(resumed, whole[interrupted_after:])
    for log in (*logs, *relogs):
        del log["tokens_per_second"]
    assert logs == relogs


def test_no_batch_has_labels_and_the_trainer_never_divides_the_loss_again(tmp_path, monkeypatch):
    seen = []
    compute_loss = TSPINTrainer.compute_loss

    def spy(self, model, inputs, **kwargs):
        seen.append((set(inputs), float(kwargs["num_items_in_batch"])))
        return compute_loss(self, model, inputs, **kwargs)

    monkeypatch.setattr(TSPINTrainer, "compute_loss", spy)
    train(tmp_path, triplets(5), per_device_train_batch_size=1, gradient_accumulation_steps=3, num_train_epochs=1)
    assert [count for _, count in seen] == [3, 3, 3, 2, 2]
    assert not any("labels" in name for names, _ in seen for name in names)


if __name__ == "__main__":
    main(sys.argv[1])
