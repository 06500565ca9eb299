"""The trainer: losses, steps and metrics against formulas, references, checkpoints, models, and what it refuses."""

import copy
import logging
import math
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback, TrainingArguments
from transformers.trainer_utils import SchedulerType

from tspin.collator import TripletCollator
from tspin.scoring import score_references
from tspin.trainer import NonFiniteLossError, TSPINTrainer, method_loss_fn
from tspin.training_args import TSPINConfig
from tspin_kernels import SequenceStats

V = 53
METHODS = ("tspin", "tspin_no_history", "tspin_ref", "spin", "sft")
QUIET = {"save_strategy": "no", "use_cpu": True, "disable_tqdm": True, "num_train_epochs": 2}
# Plain gradient descent without clipping: nothing hides a loss that is scaled wrongly.
BARE = {"optim": "sgd", "max_grad_norm": 0.0, "warmup_steps": 0, "lr_scheduler_type": "constant", "learning_rate": 0.05}


def build(seed=0, **changes):
    torch.manual_seed(seed)
    sizes = {"vocab_size": V, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1, "pad_token_id": 0, "eos_token_id": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes | changes))
    with torch.no_grad():
        model.lm_head.weight.mul_(5)
    return model


def triplets(n, seed=0, identical=(), references=False):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda k: torch.randint(3, V, (k,), generator=generator).tolist()
    rows = []
    for i in range(n):
        row = {"prompt_ids": draw(2 + i % 3), "chosen_ids": draw(3), "rejected_ids": draw(2 + i % 4)}
        row |= {"proto_ids": draw(3), "rejected_finish_reason": "length" if i % 3 == 0 else "stop"}
        if i in identical:
            row["rejected_ids"] = list(row["chosen_ids"])
        if references:
            row |= {f"ref_{member}_logps": -10.0 - i - m for m, member in enumerate(("chosen", "rejected", "proto"))}
        rows.append(row)
    return rows


def parameters(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


class Trajectory(TrainerCallback):
    """The parameters after every optimizer step."""

    def __init__(self):
        self.points = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.points.append(parameters(model))


def train(tmp_path, rows, model=None, iteration=1, resume=None, **options):
    """(parameters after every step [steps, P], the step logs, the trainer)."""
    recorder = Trajectory()
    args = TSPINConfig(output_dir=str(tmp_path), **QUIET | BARE | options)
    trainer = TSPINTrainer(model or build(), args, rows, callbacks=[recorder], iteration=iteration)
    trainer.train(resume_from_checkpoint=resume)
    return torch.stack(recorder.points), [log for log in trainer.state.log_history if "loss" in log], trainer


def logps_of(model, rows, members=("chosen", "rejected", "proto")):
    """[B, G] log-probs and entropies, from the logits of one unpadded row at a time."""
    logps, entropies = [], []
    for row in rows:
        for member in members:
            ids, start = row["prompt_ids"] + row[f"{member}_ids"], len(row["prompt_ids"])
            every = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)[start - 1 : -1]
            logps.append(every[range(len(ids) - start), ids[start:]].sum())
            entropies.append(-(every.exp() * every).sum())
    return torch.stack(logps).view(-1, len(members)), torch.stack(entropies).view(-1, len(members))


def assert_close(a, b, tolerance=2e-5):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def test_defaults_are_the_papers_and_spins(tmp_path):
    args = TSPINConfig(output_dir=str(tmp_path), use_cpu=True)
    assert (args.alpha, args.beta, args.beta_first_iteration, args.lam) == (1.0, 0.1, 0.0, 0.1)
    assert (str(args.optim.value), args.weight_decay, args.learning_rate) == ("rmsprop", 0.0, 5e-7)
    assert args.get_warmup_steps(200) == 20 and args.report_to == [] and args.bf16 is False
    # YAML 1.1 reads on and off as booleans.
    for name in ("fused", "prefix_sharing", "sequence_tiling", "sequential_backward"):
        for given, wanted in ((True, "on"), (False, "off"), ("auto", "auto")):
            assert getattr(TSPINConfig(output_dir=str(tmp_path), use_cpu=True, **{name: given}), name) == wanted


WRONG = {"method": "dpo", "loss_type": "hinge", "logp_reduction": "max", "fused": "maybe", "alpha": 0.0, "beta": -0.1}
WRONG |= {
    "prefix_sharing": "maybe",
    "sequence_tiling": "maybe",
    "sequential_backward": "maybe",
    "lam": math.nan,
    "max_length": 0,
    "sft_coef": -1.0,
    "per_device_train_batch_size": 0,
    "gradient_accumulation_steps": 0,
    "dataloader_num_workers": -1,
    "num_train_epochs": 0,
    "save_strategy": "best",
    "label_smoothing_factor": 0.1,
    "entropy_coef": math.inf,
    "learning_rate": math.inf,
    "warmup_steps": math.inf,
    "train_sampling_strategy": "group_by_length",
}


def test_a_model_in_shares_is_refused(tmp_path):
    model = build()
    model.lm_head.weight.ds_id = 0
    with pytest.raises(ValueError, match="model: want whole weights, got one that DeepSpeed has divided"):
        TSPINTrainer(model, TSPINConfig(output_dir=str(tmp_path), use_cpu=True), triplets(2))


@pytest.mark.parametrize("name", WRONG)
def test_wrong_values_are_named(tmp_path, name):
    with pytest.raises(ValueError, match=rf"{name}: want .*, got {WRONG[name]!r}"):
        TSPINConfig(output_dir=str(tmp_path), use_cpu=True, **{name: WRONG[name]})


@pytest.mark.parametrize("name", ["alpha", "beta", "lam", "sft_coef", "num_train_epochs"])
def test_no_coefficient_is_infinite(tmp_path, name):
    with pytest.raises(ValueError, match=rf"{name}: want a finite number.*, got inf"):
        TSPINConfig(output_dir=str(tmp_path), use_cpu=True, **{name: math.inf})


LATE = {
    "lr_scheduler_type: 'warmup_stable_decay', lr_scheduler_kwargs: None .*num_decay_steps": {
        "lr_scheduler_type": "warmup_stable_decay"
    },
    "lr_scheduler_type: 'linear', lr_scheduler_kwargs: {'foo': 1} .*'foo'": {"lr_scheduler_kwargs": {"foo": 1}},
    "lr_scheduler_type: 'cosine', .*'few'": {
        "lr_scheduler_type": "cosine",
        "lr_scheduler_kwargs": {"num_cycles": "few"},
    },
    "lr_scheduler_type: 'cosine_with_min_lr', .*min_lr": {"lr_scheduler_type": "cosine_with_min_lr"},
    "optim: 'rmsprop', optim_args: 'nonsense' ": {"optim_args": "nonsense"},
    "optim: 'rmsprop', optim_args: 'momentum=-1' .*momentum": {"optim_args": "momentum=-1"},
    "optim: 'adamw_torch_npu_fused', .*torch_npu": {"optim": "adamw_torch_npu_fused"},
    "gradient_checkpointing_kwargs: {'nope': 1} .*nope": {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"nope": 1},
    },
    "torch_compile_backend: 'inductor', torch_compile_mode: 'nope' .*max-autotune": {"torch_compile_mode": "nope"},
    "torch_compile_backend: 'nope', ": {"torch_compile_backend": "nope"},
}


@pytest.mark.parametrize("message", LATE)
def test_what_would_stop_the_training_at_its_start_is_named(tmp_path, message):
    args = TSPINConfig(output_dir=str(tmp_path), use_cpu=True, **LATE[message])
    with pytest.raises(ValueError, match=f"^{message}") as caught:
        args.rehearse()
    assert " would stop the training at its start: " in str(caught.value)


def test_what_is_not_installed_is_named(tmp_path, monkeypatch):
    for name, package in (("galore_adamw", "galore_torch"), ("lomo", "lomo"), ("apollo_adamw", "apollo_torch")):
        monkeypatch.setattr(f"transformers.trainer_optimizer.is_{package}_available", lambda: False)
        with pytest.raises(ValueError, match=rf"^optim: '{name}', .* would stop .* `{package}\w*`"):
            TSPINConfig(output_dir=str(tmp_path), use_cpu=True, optim=name).rehearse()
    monkeypatch.setattr("tspin.training_args.is_liger_kernel_available", lambda: False)
    with pytest.raises(ValueError, match=r"^use_liger_kernel: want the package liger-kernel, which is missing"):
        TSPINConfig(output_dir=str(tmp_path), use_cpu=True, use_liger_kernel=True)


def test_what_can_be_trained_by_is_rehearsed_without_a_word(tmp_path, recwarn):
    for name in SchedulerType:
        keys = {"reduce_lr_on_plateau": {"eval_strategy": "steps"}, "greedy": {"eval_strategy": "steps"}}.get(name, {})
        given = {"warmup_stable_decay": {"num_decay_steps": 5}}.get(name) or (
            {"min_lr": 1e-9} if "min" in name else None
        )
        keys |= {"lr_scheduler_type": name, "lr_scheduler_kwargs": given, "learning_rate": 1e-3}
        TSPINConfig(output_dir=str(tmp_path), use_cpu=True, **keys).rehearse()
    for keys in (
        *({"optim": name} for name in ("rmsprop", "adamw_torch", "adamw_torch_fused", "sgd", "adagrad", "adafactor")),
        {"gradient_checkpointing": True},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True, "every_n_layers": 2}},
    ):
        TSPINConfig(output_dir=str(tmp_path), use_cpu=True, **keys).rehearse()
    assert [str(warning.message) for warning in recwarn if "gradient_checkpointing" not in str(warning.message)] == []


def test_a_package_that_wants_the_names_of_layers_is_rehearsed_without_them(tmp_path, monkeypatch):
    package = SimpleNamespace(APOLLOAdamW=type("APOLLOAdamW", (torch.optim.AdamW,), {}))
    monkeypatch.setattr("transformers.trainer_optimizer.is_apollo_torch_available", lambda: True)
    monkeypatch.setitem(sys.modules, "apollo_torch", package)
    keys = {"optim": "apollo_adamw", "optim_target_modules": ["attn", "mlp"]}
    TSPINConfig(output_dir=str(tmp_path), use_cpu=True, **keys).rehearse()
    with pytest.raises(ValueError, match=r"^optim: 'apollo_adamw'.*optim_target_modules"):
        TSPINConfig(output_dir=str(tmp_path), use_cpu=True, optim="apollo_adamw").rehearse()


def test_batches_that_triplets_do_not_allow_are_refused(tmp_path):
    with pytest.raises(ValueError, match="accelerator_config: want dispatch_batches false, got true"):
        TSPINConfig(output_dir=str(tmp_path), use_cpu=True, accelerator_config={"dispatch_batches": True})
    keys = {"dataloader_drop_last": True, "per_device_train_batch_size": 4}
    args = TSPINConfig(output_dir=str(tmp_path), **QUIET | keys)
    with pytest.raises(ValueError, match=r"dataloader_drop_last: want the 4 rows or more of one batch .*, got 3"):
        TSPINTrainer(build(), args, triplets(3))
    TSPINTrainer(build(), args, triplets(4))


def test_an_optimizer_that_is_not_installed_is_refused_at_once(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    for name in ("adamw_8bit", "paged_lion_32bit", "rmsprop_bnb", "ademamix"):
        with pytest.raises(ValueError, match=rf"optim: '{name}\w*' wants the package bitsandbytes.*pip install 'tspin"):
            TSPINConfig(output_dir=str(tmp_path), use_cpu=True, optim=name)
    for name in ("adamw_torch_8bit", "rmsprop", "stable_adamw"):
        TSPINConfig(output_dir=str(tmp_path), use_cpu=True, optim=name)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("iteration", [0, 1, 4])
def test_proto_is_scored_only_where_its_coefficient_is_not_zero(tmp_path, method, iteration):
    args = TSPINConfig(output_dir=str(tmp_path), use_cpu=True, method=method, beta=0.3)
    historical = method in ("tspin", "tspin_ref") and iteration > 0
    assert args.beta_at(iteration) == (0.3 if historical else 0.0)
    assert len(args.members_at(iteration)) == (1 if method == "sft" else 3 if historical else 2)
    args.beta_first_iteration = 0.2
    assert args.beta_at(0) == (0.2 if method in ("tspin", "tspin_ref") else 0.0)


def softplus(z):
    return math.log1p(math.exp(-abs(z))) + max(z, 0.0)


def expected_loss(args, beta, logps, entropies, lengths, refs):
    """One triplet's loss, from the formulas of the papers, on Python floats."""
    decreasing = (lambda z: math.exp(-z)) if args.loss_type == "exponential" else (lambda z: softplus(-z))
    by = [1] * 3 if args.logp_reduction == "sum" else lengths
    (y, s, o), (ry, rs, ro) = ([value / n for value, n in zip(values, by)] for values in (logps, refs))
    if args.method == "spin":
        loss = decreasing(args.lam * ((y - ry) - (s - rs)))
    elif args.method == "sft":
        loss = -y
    else:
        if args.method != "tspin_ref":
            ry = rs = ro = 0.0
        history = beta and beta * decreasing(args.alpha * ((s - rs) - (o - ro)))
        loss = decreasing(args.alpha * ((y - ry) - (s - rs))) + history
    members = 1 if args.method == "sft" else 3 if beta else 2
    entropy = sum(e / n for e, n in zip(entropies[:members], lengths)) / members
    return loss - args.sft_coef * logps[0] / lengths[0] - args.entropy_coef * entropy


@pytest.mark.parametrize(
    "extra", [{}, {"sft_coef": 0.3, "entropy_coef": 0.2}, {"logp_reduction": "mean", "alpha": 3.0}]
)
@pytest.mark.parametrize("loss_type", ["logistic", "exponential"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("iteration", [0, 1])
def test_the_loss_is_the_papers_formula(tmp_path, method, loss_type, extra, iteration):
    args = TSPINConfig(output_dir=str(tmp_path), use_cpu=True, method=method, loss_type=loss_type, beta=0.4, **extra)
    beta, members = args.beta_at(iteration), len(args.members_at(iteration))
    torch.manual_seed(1)
    logps, refs = -3 * torch.rand(5, 3, dtype=torch.float64), -3 * torch.rand(5, 3, dtype=torch.float64)
    entropies, lengths = torch.rand(5, 3, dtype=torch.float64), torch.randint(1, 5, (5, 3))
    stats = SequenceStats(*(t[:, :members] for t in (logps, entropies, lengths)))
    got = method_loss_fn(args, beta)(stats, torch.ones(5, dtype=torch.bool), refs[:, :members])
    rows = zip(*(t.tolist() for t in (logps, entropies, lengths, refs)))
    assert_close(got, torch.tensor([expected_loss(args, beta, *row) for row in rows], dtype=torch.float64), 1e-12)


def test_left_out_triplets_have_no_loss_and_no_gradient_however_extreme(tmp_path):
    args = TSPINConfig(output_dir=str(tmp_path), use_cpu=True, loss_type="exponential", sft_coef=1.0)
    logps = torch.tensor([[-1.0, -2.0, -3.0], [-9e4, -1.0, -9e9]], requires_grad=True)
    stats = SequenceStats(logps, torch.ones(2, 3), torch.ones(2, 3, dtype=torch.int64))
    loss = method_loss_fn(args, 0.1)(stats, torch.tensor([True, False]))
    loss.sum().backward()
    assert loss[1] == 0 and loss[0].isfinite() and logps.grad[0].all() and not logps.grad[1].any()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "extra", [{}, {"entropy_coef": 0.3, "sft_coef": 0.2, "logp_reduction": "mean"}], ids=["", "extra"]
)
def test_fused_and_plain_training_agree(tmp_path, method, extra):
    rows = triplets(5, references=True)
    fused, logs, trainer = train(tmp_path, rows, method=method, fused="on", **extra)
    plain, plain_logs, _ = train(tmp_path, rows, method=method, fused="off", **extra)
    assert trainer.scoring["fused"] and (fused[-1] - parameters(build())).abs().max() > 1e-3
    assert_close(fused, plain)
    for log, plain_log in zip(logs, plain_logs, strict=True):
        same = set(log) - {"tokens_per_second"}
        assert {k: log[k] for k in same} == pytest.approx({k: plain_log[k] for k in same}, rel=1e-4, abs=1e-4)


def test_a_step_is_gradient_descent_on_the_mean_loss(tmp_path):
    rows, model = triplets(6), build()
    reference = copy.deepcopy(model)
    options = {"per_device_train_batch_size": 6, "num_train_epochs": 1, "beta": 0.5}
    points, logs, _ = train(tmp_path, rows, model, **options, entropy_coef=0.3, sft_coef=0.2)
    logps, entropies = logps_of(reference, rows)
    lengths = torch.tensor([[len(row[f"{m}_ids"]) for m in ("chosen", "rejected", "proto")] for row in rows])
    losses = torch.nn.functional.softplus(logps.diff(dim=1)) @ torch.tensor([1.0, 0.5])
    loss = (losses - 0.2 * logps[:, 0] / lengths[:, 0] - 0.3 * (entropies / lengths).mean(1)).mean()
    loss.backward()
    want = torch.cat([(p - 0.05 * p.grad).flatten() for p in reference.parameters()])
    assert_close(points[-1], want.detach())
    assert logs[0]["loss"] == pytest.approx(loss.item(), rel=1e-5)


def test_without_history_proto_is_neither_needed_nor_scored(tmp_path):
    rows = [{k: v for k, v in row.items() if "proto" not in k} for row in triplets(4)]
    first, logs, trainer = train(tmp_path, rows, iteration=0)
    assert trainer.members == ("chosen", "rejected") and "logps/proto" not in logs[0]
    assert_close(first, train(tmp_path, triplets(4), iteration=3, beta=0.0)[0], 0)
    assert_close(first, train(tmp_path, triplets(4), iteration=3, method="tspin_no_history")[0], 0)
    with pytest.raises(ValueError, match="proto_ids"):
        train(tmp_path, rows, iteration=1)


@pytest.mark.parametrize("options", [{"gradient_checkpointing": True}, {"memory_budget": 40_000}], ids=str)
def test_memory_options_change_nothing(tmp_path, options):
    rows = triplets(5)
    assert_close(train(tmp_path, rows, **options)[0], train(tmp_path, rows)[0])


@pytest.mark.parametrize("method", ["tspin", "tspin_ref", "spin"])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_metrics_are_means_over_the_steps_triplets(tmp_path, method, reduction):
    rows = triplets(7, identical=(2,), references=True)
    model = build()
    reference = copy.deepcopy(model)
    options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "num_train_epochs": 1}
    _, logs, trainer = train(tmp_path, rows, model, method=method, logp_reduction=reduction, alpha=0.7, **options)
    members = trainer.members
    with torch.no_grad():
        logps, entropies = (t.tolist() for t in logps_of(reference, rows, members))
    lengths = [[len(row[f"{m}_ids"]) for m in members] for row in rows]
    refs = [[row[f"ref_{m}_logps"] for m in members] for row in rows]
    scale = 0.1 if method == "spin" else 0.7
    reduced, rewards = [], []
    for i in range(7):
        by = lengths[i] if reduction == "mean" else [1] * len(members)
        reduced.append([x / n for x, n in zip(logps[i], by)])
        ref = [0.0] * len(members) if method == "tspin" else [x / n for x, n in zip(refs[i], by)]
        rewards.append([scale * (x - r) for x, r in zip(reduced[i], ref)])
    mean, sigmoid = lambda values: sum(values) / len(values), lambda z: 1 / (1 + math.exp(-z))
    pairs = [i for i in range(7) if i != 2]
    us = [r[0] - r[1] for r in rewards]
    want = {
        "rewards/margins": mean(us),
        "rewards/accuracies": mean([float(us[i] > 0) for i in pairs]),
        "misaligned": mean([float(us[i] > 0 and reduced[i][0] < reduced[i][1]) for i in pairs]),
        "saturated": mean([float(sigmoid(-us[i]) < 0.01) for i in pairs]),
        "weights/current": mean([sigmoid(-u) for u in us]),
        "truncated": 3 / 7,
        "identical": 1 / 7,
    }
    for m, member in enumerate(members):
        want[f"rewards/{member}"] = mean([r[m] for r in rewards])
        want[f"logps/{member}"] = mean([x[m] for x in logps])
        want[f"lengths/{member}"] = mean([n[m] for n in lengths])
        want[f"entropy/{member}"] = sum(e[m] for e in entropies) / sum(n[m] for n in lengths)
    if vs := [r[1] - r[2] for r in rewards if "proto" in members]:
        want |= {"rewards/history_margins": mean(vs), "weights/history": mean([sigmoid(-v) for v in vs])}
    assert {k: logs[0][k] for k in want} == pytest.approx(want, rel=1e-4, abs=1e-5)
    usual = {"loss", "grad_norm", "learning_rate", "epoch", "step", "tokens_per_second", "memory/peak_gib"}
    assert set(logs[0]) - usual == set(want) and logs[0]["tokens_per_second"] > 0


def test_misaligned_and_saturated_can_be_seen(tmp_path):
    rows = triplets(7, identical=(2,), references=True)
    with torch.no_grad():
        logps, _ = logps_of(build(), rows, ("chosen", "rejected"))
    for i, (row, (chosen, rejected)) in enumerate(zip(rows, logps.tolist())):
        row["ref_chosen_logps"], row["ref_rejected_logps"] = chosen - (100.0 if i != 2 else 0.0), rejected
    _, logs, _ = train(tmp_path, rows, method="spin", per_device_train_batch_size=7)
    # The pair of one response twice counts in none of the shares.
    share = (logps[:, 0] < logps[:, 1]).sum().item() / 6
    assert 0 < share < 1 and logs[0]["misaligned"] == pytest.approx(share)
    assert logs[0]["saturated"] == 1 and logs[0]["rewards/accuracies"] == 1


def test_metrics_cover_all_steps_since_the_last_log(tmp_path):
    rows = triplets(4)
    _, every, _ = train(tmp_path, rows, per_device_train_batch_size=2)
    _, paired, _ = train(tmp_path, rows, per_device_train_batch_size=2, logging_steps=2)
    for log, first, second in zip(paired, every[::2], every[1::2], strict=True):
        for name in ("loss", "logps/chosen", "rewards/margins", "lengths/rejected"):
            assert log[name] == pytest.approx((first[name] + second[name]) / 2, rel=1e-5)


def test_evaluation_weighs_every_row_the_same(tmp_path):
    rows = triplets(5, identical=(1,))
    args = TSPINConfig(output_dir=str(tmp_path), **QUIET | BARE, per_device_eval_batch_size=2, drop_identical=True)
    trainer = TSPINTrainer(build(), args, rows, rows, iteration=1)
    before, metrics = parameters(trainer.model), trainer.evaluate()
    _, logs, _ = train(tmp_path, rows, per_device_train_batch_size=5, drop_identical=True)
    same = [k for k in logs[0] if f"eval_{k}" in metrics and k != "epoch"]
    assert {"loss", "misaligned", "logps/proto"} <= set(same)
    assert {k: metrics[f"eval_{k}"] for k in same} == pytest.approx({k: logs[0][k] for k in same}, rel=1e-4, abs=1e-5)
    assert torch.equal(before, parameters(trainer.model)) and all(p.grad is None for p in trainer.model.parameters())


@pytest.mark.parametrize("method", ["spin", "tspin_ref"])
def test_reference_methods_ask_for_references(tmp_path, method):
    with pytest.raises(ValueError, match=r"ref_chosen_logps.*score_references"):
        train(tmp_path, triplets(2), method=method)


def test_against_its_own_references_a_policy_has_no_margin(tmp_path):
    rows, model = triplets(4), build()
    collator = TripletCollator(pad_token_id=0, members=("chosen", "rejected"))
    for name, values in score_references(model, rows, collator, batch_size=3).items():
        rows = [row | {name: value} for row, value in zip(rows, values, strict=True)]
    _, logs, _ = train(tmp_path, rows, model, method="spin", per_device_train_batch_size=4)
    assert logs[0]["loss"] == pytest.approx(math.log(2), rel=1e-5)
    assert logs[0]["rewards/chosen"] == pytest.approx(0, abs=1e-5)


class Poison(TrainerCallback):
    """Puts nan into the weights before step 2."""

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == 1:
            model.model.norm.weight.data[0] = float("nan")


def test_a_loss_that_is_not_finite_stops_the_run_before_its_step(tmp_path):
    args = TSPINConfig(output_dir=str(tmp_path), **QUIET | BARE | {"save_strategy": "steps", "save_steps": 1})
    trainer = TSPINTrainer(build(), args, triplets(16), callbacks=[Poison()], iteration=1)
    with pytest.raises(NonFiniteLossError, match="step 2"):
        trainer.train()
    assert isinstance(NonFiniteLossError(""), ValueError) and sorted(os.listdir(tmp_path)) == [
        "checkpoint-1",
        "diagnostics",
    ]
    assert trainer.model.lm_head.weight.isfinite().all()


def test_arguments_of_another_class_are_refused(tmp_path):
    with pytest.raises(ValueError, match="want a TSPINConfig, got TrainingArguments"):
        TSPINTrainer(build(), TrainingArguments(output_dir=str(tmp_path), use_cpu=True), triplets(1))


def test_auto_takes_the_logits_where_the_head_is_not_exact_and_says_so(tmp_path, caplog):
    rows, halve = triplets(3), lambda module, args: (args[0] / 2,)
    models = [build() for _ in range(3)]
    for model in models:
        model.lm_head.register_forward_pre_hook(halve)
    with pytest.raises(ValueError, match="fused='off'"):
        train(tmp_path, rows, models[0], fused="on")
    with caplog.at_level(logging.WARNING, logger="tspin.scoring"):
        points, _, trainer = train(tmp_path, rows, models[1])
    assert not trainer.scoring["fused"] and "takes the model's logits" in caplog.text
    assert_close(points, train(tmp_path, rows, models[2], fused="off")[0], 0)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_lora_trains_the_adapter_alone(tmp_path, checkpointing):
    base = build()
    frozen = parameters(base)
    args = TSPINConfig(output_dir=str(tmp_path), **QUIET | BARE, gradient_checkpointing=checkpointing)
    adapter = LoraConfig(r=2, target_modules=["q_proj", "lm_head"], lora_dropout=0.5, task_type="CAUSAL_LM")
    trainer = TSPINTrainer(base, args, triplets(5), peft_config=adapter, iteration=1)
    trainer.train()
    trained = {n: p for n, p in trainer.model.named_parameters() if p.requires_grad}
    assert all("lora" in name for name in trained)
    assert all(p.any() for n, p in trained.items() if "lora_B" in n), "the adapter of every target must have moved"
    kept = [p.detach().flatten() for n, p in trainer.model.named_parameters() if not p.requires_grad]
    assert torch.equal(torch.cat(kept), frozen)


def test_weights_stay_float32_under_bf16_autocast(tmp_path):
    rows = triplets(4)
    mixed, logs, trainer = train(tmp_path, rows, bf16=True, per_device_train_batch_size=4)
    exact, exact_logs, _ = train(tmp_path, rows, per_device_train_batch_size=4)
    assert all(p.dtype == torch.float32 for p in trainer.model.parameters())
    assert not torch.equal(mixed, exact) and logs[0]["loss"] == pytest.approx(exact_logs[0]["loss"], rel=0.05)


@pytest.mark.parametrize("optim, warned", [("rmsprop", True), ("stable_adamw", False)])
def test_bf16_weights_are_warned_of(tmp_path, caplog, optim, warned):
    for dtype, expected in ((torch.bfloat16, warned), (torch.float32, False)):
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="tspin.loading"):
            args = TSPINConfig(output_dir=str(tmp_path), **QUIET, optim=optim)
            TSPINTrainer(build().to(dtype), args, triplets(2))
        assert ("load them as float32" in caplog.text) == expected


def test_text_rows_are_tokenised_and_need_a_tokenizer(tmp_path):
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({"<pad>": 0, "x": 1, "<eos>": 2, "yes": 3, "no": 4, "why": 5}, unk_token="x"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="x")
    texts = Dataset.from_list([{"prompt": "why", "chosen": "yes yes", "rejected": "no"}] * 2)
    ids = [{"prompt_ids": [5], "chosen_ids": [3, 3, 2], "rejected_ids": [4, 2]}] * 2
    args = TSPINConfig(output_dir=str(tmp_path), **QUIET | BARE)
    trainer = TSPINTrainer(build(), args, texts, processing_class=tokenizer)
    trainer.train()
    assert torch.equal(parameters(trainer.model), train(tmp_path, ids, iteration=0)[0][-1])
    with pytest.raises(ValueError, match="processing_class: want the tokenizer"):
        TSPINTrainer(build(), args, texts)


def test_trl_is_not_imported():
    code = "import sys, tspin.trainer, tspin.model; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=300)
    assert "tspin.trainer" in run.stdout.split() and "trl" not in run.stdout.split()
