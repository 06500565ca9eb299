"""The loop in one process: every method end to end, refusals, and what is lost is made again."""

import errno
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Trainer, TrainerState

from tspin import checkpoints, loop, storage, trainer
from tspin.config import SelfPlayConfig
from tspin.generate import derived_seed
from tspin.loading import load_model
from tspin.loop import SelfPlay
from tspin.storage import model_hash

METHODS = ("tspin", "spin", "sft", "tspin_ref", "tspin_no_history")
TIMINGS = ("tokens_per_second", "memory/peak_gib")


def make_toy(root: Path, width: int = 16) -> None:
    """A small model, its tokenizer, and 24 training and 6 held-out sums."""
    vocabulary = {"<pad>": 0, "<eos>": 1} | {c: i + 2 for i, c in enumerate("0123456789+=")}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="="))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    shape = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 1, "num_attention_heads": 2}
    special = {"eos_token_id": 1, "pad_token_id": 0, "bos_token_id": None}
    torch.manual_seed(0)
    LlamaForCausalLM(
        LlamaConfig(vocab_size=len(vocabulary), max_position_embeddings=64, initializer_range=0.2, **shape, **special)
    ).save_pretrained(root / "model")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>").save_pretrained(
        root / "model"
    )
    pairs = [(random.Random(i).randrange(50), random.Random(-i).randrange(50)) for i in range(30)]
    lines = [json.dumps({"prompt": f"{a}+{b}=", "response": str(a + b)}) + "\n" for a, b in pairs]
    (root / "train.jsonl").write_text("".join(lines[:24]))
    (root / "test.jsonl").write_text("".join(lines[24:]))


def toy_config(root: Path, output_dir: Path, **changes) -> SelfPlayConfig:
    return SelfPlayConfig.from_dict(
        {
            "model_name_or_path": str(root / "model"),
            "dataset": str(root / "train.jsonl"),
            "eval_dataset": str(root / "test.jsonl"),
            "prompt_template": "{prompt}",
            "output_dir": str(output_dir),
            "iterations": 2,
            "max_new_tokens": 6,
            "max_length": 32,
            "generation_batch_size": 4,
            "shard_size": 8,
            "learning_rate": 1e-3,
            "num_train_epochs": 2,
            "per_device_train_batch_size": 4,
            "logging_steps": 2,
            "save_steps": 3,
            "save_total_limit": 1,
            "use_cpu": True,
            "disable_tqdm": True,
            **changes,
        }
    )


def outcome(directory: Path) -> dict:
    """All of a finished run that must not depend on interruptions."""
    metrics = {}
    for path in sorted(directory.glob("iter_*/metrics.jsonl")):
        entries = [json.loads(line) for line in path.read_text().splitlines()]
        metrics[path.parent.name] = [{k: v for k, v in e.items() if k not in TIMINGS} for e in entries]
    files = {}
    for pattern in (
        "*.json",
        "iter_*/eval.json",
        "iter_*/triplets.parquet",
        "iter_*/pairs.parquet",
        "**/shard-*.parquet",
        "iter_*/model/*",
    ):
        for path in directory.glob(pattern):
            files[str(path.relative_to(directory))] = storage.sha256(path)
    for name in ("run.json", "state.json"):
        del files[name]
    leftovers = [str(p) for p in directory.rglob(".*") if not p.name.startswith(".lock")]
    stages = sorted(storage.read_json(directory / "state.json")["done"])
    return {"metrics": metrics, "files": files, "leftovers": leftovers, "stages": stages}


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    root = tmp_path_factory.mktemp("toy")
    make_toy(root)
    return root


@pytest.fixture(scope="module")
def finished(toy, tmp_path_factory):
    """The undisturbed run of each method, made once."""
    runs = {}

    def run(method):
        if method not in runs:
            directory = tmp_path_factory.mktemp(method) / "run"
            runs[method] = SelfPlay(toy_config(toy, directory, method=method)).run()
        return runs[method]

    return run


def copy_of(result, tmp_path: Path) -> Path:
    return shutil.copytree(result.output_dir, tmp_path / "run")


def test_a_run_that_shares_prompts_is_the_run_of_separate_rows_and_saves_no_trace_of_it(toy, tmp_path):
    directories = {sharing: tmp_path / sharing for sharing in ("on", "off")}
    for sharing, directory in directories.items():
        SelfPlay(toy_config(toy, directory, method="tspin_ref", prefix_sharing=sharing)).run()
    shared, apart = (outcome(directory) for directory in directories.values())
    for t, entries in apart["metrics"].items():
        for entry, other in zip(entries, shared["metrics"][t], strict=True):
            if abs(entry["rewards/margins"]) < 1e-4:
                # The policy is its own reference yet: whose reward is higher is a matter of rounding.
                entry, other = ({k: v for k, v in log.items() if k != "rewards/accuracies"} for log in (entry, other))
            assert other == pytest.approx(entry, rel=1e-3, abs=1e-4)
    configs = [name for name in apart["files"] if name.endswith("/config.json")]
    assert len(configs) == 2 and all(shared["files"][name] == apart["files"][name] for name in configs)


@pytest.mark.parametrize("method", METHODS)
def test_a_run_leaves_the_documented_directory(finished, method):
    result = finished(method)
    directory = result.output_dir
    assert (directory / "proto").exists() == (method in ("tspin", "tspin_ref"))
    assert (directory / "config.yaml").exists() and (directory / "run.json").exists()
    assert len(result.evaluations) == 2 and result.model_dir == directory / "iter_01" / "model"
    assert result.model_hash == model_hash(result.model_dir) != model_hash(directory / "iter_00" / "model")
    initial = storage.read_json(directory / "eval_initial.json")
    assert initial["iteration"] == -1 and initial["rows"] == 6
    for t in range(2):
        here = directory / f"iter_{t:02d}"
        assert (here / "synthetic").exists() == (method != "sft")
        assert (here / "fresh").exists() == (method == "sft" or t == 1)
        assert not (here / "references").exists()
        table = pq.read_table(here / "triplets.parquet")
        members = ["chosen"] if method == "sft" else ["chosen", "rejected"]
        if t == 1 and method in ("tspin", "tspin_ref"):
            members.append("proto")
        references = [f"ref_{m}_logps" for m in members] if method in ("spin", "tspin_ref") else []
        assert {c for c in table.column_names if c.endswith("_ids")} == {f"{m}_ids" for m in ["prompt", *members]}
        assert [c for c in table.column_names if c.startswith("ref_")] == references
        assert table["row"].to_pylist() == list(range(24))
        steps = [json.loads(line)["step"] for line in (here / "metrics.jsonl").read_text().splitlines()]
        assert steps == [2, 3, 4, 6, 8, 9, 10, 12]
        evaluation = storage.read_json(here / "eval.json")
        assert evaluation["iteration"] == t and evaluation["fresh_rows"] == 24
        assert 0 <= evaluation["fresh_share"] <= 1 and evaluation["logprob"] < 0
        assert [p.name for p in (here / "checkpoints").iterdir()] == ["checkpoint-12"]
        assert not list((here / "model").glob("*.bin")) and not list((here / "model").glob("*.pt"))


def test_references_are_the_log_probs_of_the_policy_that_sampled(finished):
    from transformers import AutoModelForCausalLM

    directory = finished("spin").output_dir
    model = AutoModelForCausalLM.from_pretrained(directory / "iter_00" / "model")
    for row in pq.read_table(directory / "iter_01" / "triplets.parquet").to_pylist()[:4]:
        for member in ("chosen", "rejected"):
            prompt, response = row["prompt_ids"], row[f"{member}_ids"]
            logprobs = model(torch.tensor([prompt + response])).logits[0].log_softmax(-1)
            wanted = sum(logprobs[len(prompt) - 1 + i, token].item() for i, token in enumerate(response))
            assert row[f"ref_{member}_logps"] == pytest.approx(wanted, abs=1e-4)


def test_training_starts_from_the_policy_of_the_last_iteration(toy, tmp_path):
    config = toy_config(toy, tmp_path / "run", learning_rate=[1e-3, 1e-30])
    result = SelfPlay(config).run()
    from safetensors.torch import load_file

    before, after = (load_file(tmp_path / "run" / f"iter_0{t}" / "model" / "model.safetensors") for t in (0, 1))
    for name, tensor in after.items():
        torch.testing.assert_close(tensor, before[name])
    assert result.evaluations[0]["logprob"] == pytest.approx(result.evaluations[1]["logprob"])


def test_a_resumed_training_drops_the_log_lines_after_its_checkpoint(tmp_path):
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text('{"step": 2}\n{"step": 4}\n{"st')
    sealing, state = checkpoints.Sealing(checkpoints.Checkpoints(tmp_path), metrics, None), TrainerState()
    state.log_history = [{"step": 2}]
    sealing.on_train_begin(None, state, None)
    state.log_history.append({"step": 4})
    sealing.on_log(None, state, None)
    assert metrics.read_text() == '{"step": 2}\n{"step": 4}\n'


@pytest.mark.parametrize("method", METHODS)
def test_pairs_and_timings_tell_of_every_iteration(finished, method):
    from tspin.pairs import fresh_summary

    result = finished(method)
    for t, evaluation in enumerate(result.evaluations):
        table = pq.read_table(result.output_dir / f"iter_0{t}" / "pairs.parquet")
        assert fresh_summary(table).items() <= evaluation.items()
        pairs = table.to_pylist()
        assert [p["set"] for p in pairs] == ["trained"] * 24 + ["fresh"] * 24
        # Scored in another batch, with other padding, y of a row is as likely beside y' as beside a fresh one.
        likelihoods = {}
        for pair in pairs:
            likelihoods.setdefault(pair["row"], []).append(pair["logps/chosen"])
        assert all(one == pytest.approx(other, abs=1e-4) for one, other in likelihoods.values())
        assert (pairs[0]["logps/proto"] is None) == (method == "sft")
        if t == 0 and method != "sft":
            assert all(p["logps/proto"] == pytest.approx(p["logps/rejected"], abs=1e-4) for p in pairs[:24])
    stages = [json.loads(line)["stage"] for line in (result.output_dir / "timings.jsonl").read_text().splitlines()]
    assert sorted(stages) == sorted(storage.read_json(result.output_dir / "state.json")["done"])


def test_a_tracker_is_told_the_names_and_numbers_of_the_log(toy, tmp_path):
    pytest.importorskip("tensorboard", reason="the extra tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    SelfPlay(toy_config(toy, tmp_path / "run", report_to="tensorboard")).run()
    for t in range(2):
        here = tmp_path / "run" / f"iter_0{t}"
        wanted: dict = {}
        for entry in map(json.loads, (here / "metrics.jsonl").read_text().splitlines()):
            step = entry.pop("step")
            for name, value in entry.items():
                wanted.setdefault(f"train/{name}", []).append((step, pytest.approx(value, rel=1e-6)))
        told = EventAccumulator(str(here / "tensorboard")).Reload()
        # transformers sums up to a tracker after the last step, when the log is already sealed.
        summary = {"train_runtime", "train_samples_per_second", "train_steps_per_second", "total_flos", "train_loss"}
        assert {"train/logps/chosen", "train/weights/current"} <= wanted.keys()
        assert set(told.Tags()["scalars"]) - {f"train/{name}" for name in summary} == wanted.keys()
        for name, values in wanted.items():
            scalars = [(scalar.step, scalar.value) for scalar in told.Scalars(name)]
            # The epoch stands in the summary once more.
            assert scalars[: len(values)] == values and len(scalars) == len(values) + (name == "train/epoch"), name


def test_a_tracker_is_told_each_step_once_however_often_the_training_is_resumed(toy, tmp_path, monkeypatch):
    pytest.importorskip("tensorboard", reason="the extra tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = toy_config(toy, tmp_path / "run", report_to="tensorboard", iterations=1, save_steps=3, logging_steps=1)
    step, seen = torch.optim.RMSprop.step, []

    def dies_at_its_sixth(*args, **kwargs):
        seen.append(None)
        return step(*args, **kwargs) if len(seen) < 6 else 1 / 0

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.RMSprop, "step", dies_at_its_sixth)
        with pytest.raises(ZeroDivisionError):
            SelfPlay(config).run()
    here = tmp_path / "run" / "iter_00"
    assert [e.step for e in EventAccumulator(str(here / "tensorboard")).Reload().Scalars("train/loss")] == [
        1,
        2,
        3,
        4,
        5,
    ]
    SelfPlay(config).run()
    wanted = [
        line["step"] for line in map(json.loads, (here / "metrics.jsonl").read_text().splitlines()) if "loss" in line
    ]
    told = EventAccumulator(str(here / "tensorboard")).Reload()
    assert [event.step for event in told.Scalars("train/loss")] == wanted and len(wanted) > 6
    assert not list((here / "checkpoints").rglob("events.*"))


def test_a_report_that_fails_does_not_take_the_run_with_it(toy, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(loop, "write_report", lambda directory: 1 / 0)
    result = SelfPlay(toy_config(toy, tmp_path / "run", iterations=1)).run()
    assert result.model_dir.exists() and f"`tspin report {tmp_path / 'run'}` writes it" in caplog.text


def test_a_second_run_does_nothing(finished, toy, monkeypatch):
    result = finished("tspin")
    before = {p: p.stat().st_mtime_ns for p in result.output_dir.rglob("*.parquet")}
    monkeypatch.setattr(loop.SelfPlay, "_load", None)
    assert SelfPlay(toy_config(toy, result.output_dir, method="tspin")).run() == result
    assert {p: p.stat().st_mtime_ns for p in result.output_dir.rglob("*.parquet")} == before


def test_spin_can_mix_the_data_of_the_last_two_iterations(toy, tmp_path):
    SelfPlay(toy_config(toy, tmp_path / "run", method="spin", spin_mix_previous=True)).run()
    tables = [pq.read_table(tmp_path / "run" / f"iter_0{t}" / "triplets.parquet") for t in (0, 1)]
    assert tables[1].num_rows == 48
    assert tables[1]["rejected_ids"].to_pylist()[:24] == tables[0]["rejected_ids"].to_pylist()


@pytest.mark.parametrize("strategy, saved", [("no", [12]), ("epoch", [6, 12])])
def test_the_last_step_is_saved_whatever_the_save_strategy(finished, toy, tmp_path, strategy, saved):
    config = toy_config(toy, tmp_path / "run", method="tspin", save_strategy=strategy, save_total_limit=None)
    assert SelfPlay(config).run().model_hash == finished("tspin").model_hash
    for t in range(2):
        names = {path.name for path in (tmp_path / "run" / f"iter_0{t}" / "checkpoints").iterdir()}
        assert names == {f"checkpoint-{step}" for step in saved}


def test_adapters_are_merged_into_plain_models(toy, tmp_path):
    pytest.importorskip("peft", reason="the extra peft is not installed")
    options = {"use_peft": True, "lora_r": 2, "learning_rate": 1e-2}
    result = SelfPlay(toy_config(toy, tmp_path / "one", **options)).run()
    assert sorted(p.name for p in result.model_dir.glob("*.safetensors")) == ["model.safetensors"]
    assert model_hash(toy / "model") != model_hash(tmp_path / "one/iter_00/model") != result.model_hash
    assert SelfPlay(toy_config(toy, tmp_path / "two", **options)).run().model_hash == result.model_hash


def test_without_held_out_rows_only_fresh_pairs_are_evaluated(toy, tmp_path):
    result = SelfPlay(toy_config(toy, tmp_path / "run", eval_dataset=None, iterations=1)).run()
    assert set(result.evaluations[0]) == {"iteration", "fresh_share", "fresh_identical", "fresh_rows"}
    assert not (tmp_path / "run" / "eval_initial.json").exists()


def test_seeds_are_those_documented():
    digest = __import__("hashlib").sha256(b"42/iter_00/synthetic").hexdigest()
    assert derived_seed(42, "iter_00/synthetic") == int(digest[:8], 16) >> 1
    assert len({derived_seed(s, f"iter_{t:02d}/train") for s in range(20) for t in range(20)}) == 400


@pytest.mark.parametrize(
    "damage",
    ["proto", "iter_00/synthetic", "iter_01/triplets.parquet", "iter_01/model", "iter_01/eval.json", "iter_01"],
)
def test_what_is_deleted_or_altered_is_made_again(finished, toy, tmp_path, damage, caplog):
    result = finished("tspin")
    wanted, directory = outcome(result.output_dir), copy_of(result, tmp_path)
    # proto and triplets matter only while an iteration still has to be trained
    if damage in ("proto", "iter_01/triplets.parquet"):
        shutil.rmtree(directory / "iter_01" / "checkpoints")
        shutil.rmtree(directory / "iter_01" / "model")
    if damage == "proto":
        (directory / "iter_01" / "triplets.parquet").unlink()
    path = directory / damage
    if path.suffix:
        path.write_bytes(path.read_bytes()[:-1])
    else:
        shutil.rmtree(path)
    again = SelfPlay(toy_config(toy, directory, method="tspin")).run()
    assert again.model_hash == result.model_hash
    if damage != "iter_00/synthetic":
        assert outcome(directory) == wanted
        assert "its files are missing or altered" in caplog.text


def test_a_policy_that_is_needed_again_is_made_again_from_the_start(finished, toy, tmp_path):
    result = finished("tspin")
    directory = copy_of(result, tmp_path)
    shutil.rmtree(directory / "iter_00")
    (directory / "iter_01" / "eval.json").unlink()
    shutil.rmtree(directory / "iter_01" / "model")
    shutil.rmtree(directory / "iter_01" / "checkpoints")
    assert SelfPlay(toy_config(toy, directory, method="tspin")).run().model_hash == result.model_hash
    assert outcome(directory) == outcome(result.output_dir)


def test_an_altered_policy_is_never_loaded(finished, toy, tmp_path):
    directory = copy_of(finished("tspin"), tmp_path)
    play = SelfPlay(toy_config(toy, directory, method="tspin"))
    play.run()
    path = directory / "iter_00" / "model" / "config.json"
    path.write_text(path.read_text() + " ")
    with pytest.raises(
        ValueError, match=r"iter_00/model is missing or altered; restore it .*, or delete .*iter_00 and all"
    ):
        play._load(1)


def test_a_finished_policy_is_not_trained_again_for_files_laid_beside_it(finished, toy, tmp_path):
    """Where its checkpoints, which are scratch, are gone too."""
    result, directory = finished("tspin"), copy_of(finished("tspin"), tmp_path)
    model, play = directory / "iter_00" / "model", SelfPlay(toy_config(toy, directory, method="tspin"))
    shutil.rmtree(directory / "iter_00" / "checkpoints")
    shutil.rmtree(directory / "iter_01")
    for name in (".DS_Store", ".cache/huggingface/lock"):
        (model / name).parent.mkdir(parents=True, exist_ok=True)
        (model / name).write_text("hidden")
    (model / "LICENSE").write_text("mine")
    with pytest.raises(ValueError, match=r"iter_00/model is missing or altered; restore it and take out"):
        play.run()
    assert (model / "LICENSE").read_text() == "mine" and not (directory / "iter_01").exists()
    (model / "LICENSE").unlink()
    weights = (model / "model.safetensors").stat().st_mtime_ns
    assert play.run().model_hash == result.model_hash
    assert (model / "model.safetensors").stat().st_mtime_ns == weights and (model / ".DS_Store").exists()


def test_a_changed_config_is_refused_with_the_difference(finished, toy, tmp_path):
    directory = copy_of(finished("tspin"), tmp_path)
    changed = toy_config(toy, directory, method="tspin", iterations=3, learning_rate=2e-3)
    with pytest.raises(ValueError, match=r"another config \(.*iterations: 2 -> 3.*learning_rate: 0.001 -> 0.002"):
        SelfPlay(changed).run()
    changed = toy_config(toy, directory, method="tspin", iterations=3, allow_config_change=True)
    assert len(SelfPlay(changed).run().evaluations) == 3
    assert SelfPlayConfig.from_file(directory / "config.yaml").iterations == 3


@pytest.mark.parametrize("lost", [True, False])
def test_a_changed_config_is_refused_where_config_yaml_is_gone_or_holds_the_change(finished, toy, tmp_path, lost):
    directory = copy_of(finished("tspin"), tmp_path)
    shutil.rmtree(directory / "iter_01")
    changed = toy_config(toy, directory, method="tspin", learning_rate=2e-3)
    (directory / "config.yaml").unlink() if lost else changed.save(directory / "config.yaml")
    with pytest.raises(
        ValueError, match=r"another config \(state.json: learning_rate: 0.001 -> 0.002\); undo the change"
    ):
        SelfPlay(changed).run()
    assert SelfPlay(toy_config(toy, directory, method="tspin")).run().model_hash == finished("tspin").model_hash


def test_an_allowed_change_binds_the_directory_before_any_stage_is_done(finished, toy, tmp_path, monkeypatch):
    directory, changes = copy_of(finished("tspin"), tmp_path), {"method": "tspin", "learning_rate": 2e-3}
    shutil.rmtree(directory / "iter_01")

    def stop(self):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(SelfPlay, "_survey", stop)
        SelfPlay(toy_config(toy, directory, **changes, allow_config_change=True)).run()
    SelfPlay(toy_config(toy, directory, **changes)).refuse_changes()
    with pytest.raises(ValueError, match=r"another config \(state.json: learning_rate: 0.002 -> 0.001\)"):
        SelfPlay(toy_config(toy, directory, method="tspin")).run()


def test_a_directory_of_an_older_version_is_bound_by_its_config_yaml(finished, toy, tmp_path, caplog):
    directory = copy_of(finished("tspin"), tmp_path)
    done = storage.read_record(directory / "state.json")["done"]
    storage.write_record(directory / "state.json", {"done": done})
    changed = SelfPlay(toy_config(toy, directory, method="tspin", learning_rate=2e-3))
    with pytest.raises(ValueError, match=r"another config \(config.yaml: learning_rate: 0.001 -> 0.002\)"):
        changed.refuse_changes()
    (directory / "config.yaml").unlink()
    changed.refuse_changes()
    assert "config.yaml is missing, and " in caplog.text and "does not say by which config" in caplog.text


def test_a_checkpoint_of_another_training_is_not_exported(finished, toy, tmp_path):
    result = finished("tspin")
    directory = copy_of(result, tmp_path)
    shutil.rmtree(directory / "iter_01" / "model")
    shutil.rmtree(directory / "iter_01" / "checkpoints")
    shutil.copytree(directory / "iter_00" / "checkpoints", directory / "iter_01" / "checkpoints")
    assert SelfPlay(toy_config(toy, directory, method="tspin")).run().model_hash == result.model_hash


@pytest.mark.parametrize("what", ["model", "data"])
def test_another_model_or_other_data_under_the_same_name_is_refused(finished, toy, tmp_path, what):
    root = shutil.copytree(toy, tmp_path / "toy")
    config = toy_config(root, tmp_path / "run", iterations=1)
    SelfPlay(config).run()
    if what == "model":
        (root / "model" / "model.safetensors").write_bytes(
            (finished("tspin").model_dir / "model.safetensors").read_bytes()
        )
    else:
        (root / "train.jsonl").write_text((root / "train.jsonl").read_text().replace("1", "2", 1))
    with pytest.raises(ValueError, match="belongs to a run of another " + ("model" if what == "model" else "dataset")):
        SelfPlay(config).run()


def test_what_a_later_iteration_cannot_do_is_refused_before_the_first(toy, tmp_path, monkeypatch):
    changes = {"gradient_accumulation_steps": [1, 0]}
    with pytest.raises(ValueError, match="gradient_accumulation_steps: want 1 or more, got 0"):
        SelfPlay(toy_config(toy, tmp_path / "run", **changes)).run()
    changes = {"lr_scheduler_type": ["linear", "warmup_stable_decay"]}
    with pytest.raises(ValueError, match=r"lr_scheduler_type: 'warmup_stable_decay', .* would stop the training"):
        SelfPlay(toy_config(toy, tmp_path / "run", **changes)).run()
    with pytest.raises(ValueError, match="fsdp: want several processes, got one"):
        SelfPlay(toy_config(toy, tmp_path / "run", fsdp="full_shard")).run()
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(
        ValueError, match=r"use_peft: want the package peft, which is missing; pip install 'tspin\[peft\]'"
    ):
        SelfPlay(toy_config(toy, tmp_path / "run", use_peft=True))
    assert not (tmp_path / "run").exists()


def test_fewer_rows_than_a_batch_are_refused_before_anything_is_sampled(toy, tmp_path):
    changes = {"dataloader_drop_last": True, "per_device_train_batch_size": [4, 1000]}
    with pytest.raises(ValueError, match="dataloader_drop_last: want the 1000 rows or more of one batch"):
        SelfPlay(toy_config(toy, tmp_path / "run", **changes)).run()
    assert not list((tmp_path / "run").rglob("*.parquet"))


def test_a_pickled_model_is_refused(toy, tmp_path):
    root = shutil.copytree(toy, tmp_path / "toy")
    (root / "model" / "model.safetensors").unlink()
    torch.save({}, root / "model" / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"want safetensors.*pytorch_model.bin.*convert"):
        SelfPlay(toy_config(root, tmp_path / "run")).run()


def test_an_unknown_model_is_named(toy, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="model_name_or_path: want a directory or a hub name, got 'not/there'"):
        SelfPlay(toy_config(toy, tmp_path / "run", model_name_or_path="not/there")).run()


def test_another_number_of_processes_is_refused(finished, toy, tmp_path):
    directory = copy_of(finished("tspin"), tmp_path)
    record = storage.read_record(directory / "run.json")
    storage.write_record(directory / "run.json", {**record, "processes": 2})
    with pytest.raises(ValueError, match="of 2 processes, now there are 1"):
        SelfPlay(toy_config(toy, directory, method="tspin")).run()


@pytest.mark.parametrize("after", [3, 12, 40])
def test_a_full_disk_is_a_clear_error_and_the_run_goes_on_later(finished, toy, tmp_path, monkeypatch, after):
    config, real, calls = toy_config(toy, tmp_path / "run", method="tspin"), os.fsync, []

    def fsync(descriptor):
        calls.append(descriptor)
        if len(calls) > after:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(ValueError, match=r"no space left on the device.*run the same command again"):
        SelfPlay(config).run()
    monkeypatch.setattr(os, "fsync", real)
    SelfPlay(config).run()
    assert outcome(tmp_path / "run") == outcome(finished("tspin").output_dir)


def test_a_step_that_does_not_fit_names_the_remedies_and_the_run_goes_on_later(finished, toy, tmp_path, monkeypatch):
    config, real, calls = toy_config(toy, tmp_path / "run", method="tspin"), Trainer.training_step, []

    def training_step(*args):
        calls.append(args)
        if len(calls) == 5:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return real(*args)

    monkeypatch.setattr(Trainer, "training_step", training_step)
    monkeypatch.setattr(trainer, "gpu_memory", lambda device: 2**40)
    with pytest.raises(ValueError, match=r"^out of memory in step 5; predicted .* per_device_train_batch_size: 1, "):
        SelfPlay(config).run()
    SelfPlay(config).run()
    assert outcome(tmp_path / "run") == outcome(finished("tspin").output_dir)


def test_a_directory_in_use_is_refused(toy, tmp_path):
    hold = "import sys; from tspin.storage import run_lock\nwith run_lock(sys.argv[1]): print(1, flush=True); input()"
    command = [sys.executable, "-c", hold, str(tmp_path / "run")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "1\n"
        with pytest.raises(ValueError, match=f"in use by process {holder.pid}"):
            SelfPlay(toy_config(toy, tmp_path / "run")).run()
        holder.communicate("\n")


def test_a_step_without_memory_leaves_a_run_that_goes_on(toy, tmp_path, monkeypatch):
    steps, whole = [], tmp_path / "whole"
    SelfPlay(toy_config(toy, whole)).run()
    step = Trainer.training_step

    def full(*args):
        steps.append(args)
        if len(steps) == 5:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return step(*args)

    for name in ("same", "changed"):
        steps.clear()
        with monkeypatch.context() as patch, pytest.raises(ValueError, match="out of memory in step 5; predicted"):
            patch.setattr(Trainer, "training_step", full)
            patch.setattr(trainer, "gpu_memory", lambda device: 2**30)
            SelfPlay(toy_config(toy, tmp_path / name, sequential_backward="off")).run()
        assert len(steps) == 5 and (tmp_path / name / "iter_00/checkpoints/checkpoint-3/complete.json").exists()
    # From the last checkpoint, to bitwise the same weights; or with the keys that the message names.
    SelfPlay(toy_config(toy, tmp_path / "same", sequential_backward="off")).run()
    assert model_hash(tmp_path / "same/iter_01/model") == model_hash(whole / "iter_01/model")
    remedy = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4, "sequential_backward": "on"}
    SelfPlay(toy_config(toy, tmp_path / "changed", **remedy, allow_config_change=True)).run()
    assert (tmp_path / "changed/iter_01/model/model.safetensors").exists()


def test_adapters_over_quantized_weights(tmp_path, monkeypatch):
    pytest.importorskip("bitsandbytes", reason="the extra quantization is not installed")
    root, loaded = tmp_path / "toy", []
    make_toy(root, width=64)

    def load(*args, **options):
        loaded.append(load_model(*args, **options))
        return loaded[-1]

    monkeypatch.setattr("tspin.loading.load_model", load)
    options = {"use_peft": True, "lora_r": 2, "learning_rate": 1e-2, "quantization": "nf4"}
    result = SelfPlay(toy_config(root, tmp_path / "one", **options)).run()
    # Sampled and trained as quantized, merged into whole weights.
    kinds = [getattr(model, "is_quantized", False) for model in loaded]
    assert kinds.count(False) == 2 and kinds.count(True) >= 5
    assert {p.dtype for p in load_model(str(result.model_dir)).parameters()} == {torch.float32}
    assert model_hash(root / "model") != model_hash(tmp_path / "one/iter_00/model") != result.model_hash
    assert SelfPlay(toy_config(root, tmp_path / "two", **options)).run().model_hash == result.model_hash


def test_quantized_weights_keep_their_gradients_after_an_evaluation(tmp_path):
    pytest.importorskip("bitsandbytes", reason="the extra quantization is not installed")
    make_toy(tmp_path / "toy", width=64)
    model = load_model(str(tmp_path / "toy/model"), quantization="nf4")
    ids = torch.arange(12).view(2, 6)

    def gradient():
        embeds = model.get_input_embeddings()(ids).detach().requires_grad_()
        model.train()(inputs_embeds=embeds).logits.square().sum().backward()
        return embeds.grad

    before = gradient()
    with torch.no_grad():
        model.eval()(ids)
    torch.testing.assert_close(gradient(), before)


def test_weights_of_8_bits(toy):
    pytest.importorskip("bitsandbytes", reason="the extra quantization is not installed")
    model = load_model(str(toy / "model"), quantization="int8")
    assert model.model.layers[0].mlp.up_proj.weight.dtype == torch.int8 and model.lm_head.weight.dtype == torch.float32


def test_quantization_wants_adapters_and_its_package(toy, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="quantization: want use_peft: true beside it, got 'nf4'"):
        toy_config(toy, tmp_path, quantization="nf4")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"quantization: 'nf4' wants the package bitsandbytes.*tspin\[quantization\]"):
        load_model(str(toy / "model"), quantization="nf4")
