"""Cards, uploads and trackers: they tell what the run recorded, alter none of it, and leak neither paths nor tokens."""

import json
import shutil
import socket

import pyarrow.parquet as pq
import pytest
from datasets import load_dataset
from huggingface_hub import DatasetCard, HfApi, ModelCard
from huggingface_hub.errors import OfflineModeIsEnabled
from huggingface_hub.utils import filter_repo_objects
from test_loop import make_toy, toy_config

from tspin import cards, cli, storage
from tspin.cards import write_cards
from tspin.config import SelfPlayConfig
from tspin.loop import SelfPlay
from tspin.push import push
from tspin.training_args import TSPINConfig

SHORT = {"num_train_epochs": 1, "beta_first_iteration": 0.2, "temperature": 0.9}


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    root = tmp_path_factory.mktemp("of-this-machine")
    make_toy(root)
    return root


@pytest.fixture(scope="module")
def run(toy):
    """A finished run that reports to tensorboard. Not to be altered."""
    pytest.importorskip("tensorboard", reason="the extra tensorboard is not installed")
    return SelfPlay(toy_config(toy, toy / "run", report_to="tensorboard", **SHORT)).run().output_dir


@pytest.fixture
def mine(run, tmp_path):
    return shutil.copytree(run, tmp_path / "mine")


def change(run, **keys):
    """As if the run had been made with these keys."""
    config = SelfPlayConfig.from_file(run / "config.yaml", keys)
    config.save(run / "config.yaml")
    state = storage.read_record(run / "state.json")
    for origin in state["origins"]:
        origin["config"] = config.to_dict()
    storage.write_record(run / "state.json", state)


def card_of(path):
    return (ModelCard if path.parent.name == "model" else DatasetCard).load(path)


def test_the_model_card_tells_model_method_data_iteration_evaluation_and_versions(run):
    for t in range(2):
        path = run / f"iter_{t:02d}" / "model" / "README.md"
        card, text = card_of(path), path.read_text()
        assert card.data.library_name == "transformers" and card.data.license == "unknown"
        assert card.data.get("base_model") is None and card.data.get("datasets") is None
        record, scores = storage.read_json(run / "run.json"), storage.read_json(run / f"iter_{t:02d}" / "eval.json")
        weights = storage.hash_json(storage.hash_files(run.parent / "model", "*.safetensors"))
        assert f"`model`, SHA-256 of its weights `{weights}`" in text
        assert (
            f"| T-SPIN, iteration {t} of 0 to 1 |" in text and f"alpha 1, beta {(0.2, 0.1)[t]}; logistic loss" in text
        )
        assert f"`train.jsonl`, 24 rows, SHA-256 of their token ids `{record['data']['sha256']}`" in text
        assert "| at temperature 0.9, at most 6 tokens |" in text and "0.001, 1 epochs, rmsprop" in text
        assert f"`{storage.content_hash(path.parent)}`" in text
        row = next(line for line in text.splitlines() if line.startswith(f"| {t} |"))
        # No answer_pattern: whole texts, last.
        wanted = [f"{scores['logprob']:.2f}", f"{scores['fresh_share']:.3f}"]
        assert row.split(" | ")[1:] == [
            *wanted,
            f"{scores['exact_match']:.3f}",
            f"{scores['exact_match_sampled']:.3f} |",
        ]
        assert "Eval logp: log-prob of an annotated response, nats." in text and "Accuracy" not in text
        assert f"| {t + 1} |" not in text and "| initial |" in text and "6 held-out rows of `test.jsonl`" in text
        for name, version in record["versions"].items():
            assert version is None or f"{name} {version}" in text
        assert "keep the terms of its licence" in text and "arXiv:2601.08198" in text


def test_the_data_card_makes_what_is_uploaded_a_data_set(run, tmp_path):
    card, repository = card_of(run / "README.md"), tmp_path / "repository"
    for name in push(run, "me/x", triplets=True, dry_run=True):
        (repository / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(run / name, repository / name)
    assert [part["config_name"] for part in card.data.configs] == ["iter_00", "iter_01"]
    assert card.data.task_categories == ["text-generation"]
    for name in ("iter_00", "iter_01"):
        rows = load_dataset(str(repository), name, split="train", cache_dir=tmp_path)
        table = pq.read_table(run / name / "triplets.parquet")
        assert rows.to_list() == table.to_pylist()
        cut = table["rejected_finish_reason"].to_pylist().count("length") / 24
        assert f"| {name} | 24 | {cut:.3f} |" in card.text
    for column in table.column_names:
        assert f"| `{column}` | " in card.text
    assert load_dataset(str(repository), split="train", cache_dir=tmp_path).to_list() == table.to_pylist(), (
        "the last by default"
    )


def test_cards_hold_no_path_of_this_machine(run, toy):
    for path in run.rglob("README.md"):
        assert str(toy) not in path.read_text() and toy.parent.name not in path.read_text()


def test_hub_names_become_links(mine):
    record = storage.read_record(mine / "run.json") | {"model": {"name": "Qwen/Qwen2.5-1.5B", "commit": "abc"}}
    storage.write_record(mine / "run.json", record)
    change(mine, dataset="openai/gsm8k")
    write_cards(mine)
    card = card_of(mine / "iter_01" / "model" / "README.md")
    assert card.data.base_model == "Qwen/Qwen2.5-1.5B" and card.data.datasets == ["openai/gsm8k"]
    assert "(https://huggingface.co/Qwen/Qwen2.5-1.5B), commit `abc`" in card.text
    assert "Qwen/Qwen2.5-1.5B" in card_of(mine / "README.md").text


@pytest.mark.parametrize("method, told", [
    ("spin", "| lam 0.1; logistic loss"),
    ("sft", "Fine-tuned by supervised fine-tuning"),
    ("tspin_ref", "T-SPIN with a reference"),
])  # fmt: skip
def test_cards_of_other_methods(mine, method, told):
    change(mine, method=method)
    write_cards(mine)
    text = (mine / "iter_01" / "model" / "README.md").read_text()
    assert told in text and ("Coefficients" in text) == ("| Samples |" in text) == (method != "sft")
    path = mine / "iter_01" / "triplets.parquet"
    if method == "sft":
        storage.write_parquet(path, pq.read_table(path).select(["row", "prompt", "chosen", "prompt_ids", "chosen_ids"]))
        write_cards(mine)
    assert ("trl dpo" in (mine / "README.md").read_text()) == (method != "sft")


def test_a_damaged_table_is_left_out_of_the_card_and_named(mine, caplog):
    (mine / "iter_00" / "triplets.parquet").write_bytes(b"PAR1")
    write_cards(mine)
    assert [part["config_name"] for part in card_of(mine / "README.md").data.configs] == ["iter_01"]
    assert "iter_00/triplets.parquet is not a whole parquet file" in caplog.text


def test_a_card_changes_no_hash_and_is_the_same_wherever_it_is_made(mine, toy, caplog):
    written = {path.relative_to(mine): path.read_bytes() for path in mine.rglob("README.md")}
    assert len(written) == 3
    for path in written:
        (mine / path).unlink()
    stages = lambda: [storage.read_json(mine / "state.json")[key] for key in ("done", "origin_of")]
    before = stages()
    SelfPlay(toy_config(toy, mine, report_to="tensorboard", **SHORT)).run()
    assert stages() == before and "altered" not in caplog.text, "no stage is done again"
    assert {path.relative_to(mine): path.read_bytes() for path in mine.rglob("README.md")} == written


def test_a_card_that_somebody_changed_stays_and_is_named_once(mine, caplog):
    changed, other = mine / "iter_01" / "model" / "README.md", mine / "README.md"
    text, wanted = changed.read_text().replace("license: unknown", "license: mit"), other.read_bytes()
    changed.write_text(text)
    other.write_bytes(cards._marked(b"an earlier card"))
    for _ in range(2):
        write_cards(mine)
    assert changed.read_text() == text and other.read_bytes() == wanted
    assert caplog.text.count("was changed since it was written and stays as it is") == 1 and str(changed) in caplog.text


def test_a_card_shows_no_setting_that_may_hold_a_path(mine):
    path = mine / "acc.json"
    path.write_text('{"split_batches": false}')
    change(mine, accelerator_config=str(path), weight_decay=0.125)
    write_cards(mine)
    text = (mine / "iter_01" / "model" / "README.md").read_text()
    assert "`weight_decay: 0.125`" in text and "`per_device_train_batch_size: 4`" in text and str(mine) not in text


def test_a_card_tells_the_settings_that_its_iteration_was_made_with(mine, toy):
    before = (mine / "iter_00" / "model" / "README.md").read_text()
    more = {"iterations": 3, "learning_rate": 1e-2, "temperature": 0.5, "allow_config_change": True}
    SelfPlay(toy_config(toy, mine, report_to="tensorboard", **SHORT | more)).run()
    texts = [(mine / f"iter_0{t}" / "model" / "README.md").read_text() for t in range(3)]
    told, mark, _ = before.replace("0 of 0 to 1", "0 of 0 to 2").rpartition("\n<!-- ")
    assert texts[0].startswith(told + mark)
    for card, rate, temperature in zip(texts, ("0.001", "0.001", "0.01"), ("0.9", "0.9", "0.5"), strict=True):
        assert f"| Learning rate | {rate}, " in card and f"| at temperature {temperature}, " in card
    told = [f"iter_0{t} at temperature {temperature}, " for t, temperature in enumerate(("0.9", "0.9", "0.5"))]
    assert all(text in (mine / "README.md").read_text() for text in told)


class Hub:
    """HfApi as it is called, with what it would upload; `error` is raised in its place."""

    calls: list
    error: Exception | None = None

    def create_repo(self, repo_id, **options):
        Hub.calls.append((repo_id, options))

    def upload_folder(self, *, folder_path, allow_patterns, **options):
        if Hub.error is not None:
            raise Hub.error
        files = [path.relative_to(folder_path).as_posix() for path in folder_path.rglob("*") if path.is_file()]
        kept = sorted(filter_repo_objects(files, allow_patterns=allow_patterns))
        Hub.calls.append((kept, options))
        return type("Commit", (), {"commit_url": "https://huggingface.co/me/x/commit/1"})


@pytest.fixture
def hub(monkeypatch):
    Hub.calls, Hub.error = [], None
    for name in ("create_repo", "upload_folder"):
        monkeypatch.setattr(HfApi, name, getattr(Hub, name))
    return Hub


@pytest.mark.parametrize("words, kind, files", [
    ([], "model", ["README.md", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
                   "tokenizer_config.json"]),
    (["--triplets", "--private"], "dataset", ["README.md", "iter_00/triplets.parquet", "iter_01/triplets.parquet"]),
])  # fmt: skip
def test_the_dry_run_lists_what_the_upload_takes_and_opens_no_connection(
    run, hub, monkeypatch, capsys, words, kind, files
):
    words = ["push", str(run), "--repo_id", "me/x", *words]
    with monkeypatch.context() as patch:
        patch.setattr(socket, "socket", None)
        assert cli.main([*words, "--dry_run"]) == 0
    listed = capsys.readouterr().out
    assert [line.split()[-1] for line in listed.splitlines()[1:-2]] == files and hub.calls == []
    assert listed.startswith(f"{kind} me/x, from ") and "nothing was uploaded" in listed
    assert cli.main(words) == 0
    (repo_id, made), (uploaded, options) = hub.calls
    assert (repo_id, made["repo_type"], made["exist_ok"], uploaded) == ("me/x", kind, True, files)
    assert bool(made["private"]) == ("--private" in words)
    assert (options["repo_id"], options["repo_type"]) == ("me/x", kind) and "token" not in options
    assert "uploaded: https://huggingface.co/me/x/commit/1" in capsys.readouterr().out


def test_what_is_not_as_the_run_recorded_it_is_not_uploaded(mine, hub):
    with pytest.raises(ValueError, match=r"--iteration: want a finished one of \[0, 1\], got 2"):
        push(mine, "me/x", iteration=2)
    assert "iter_00/model" in storage.read_json(mine / "state.json")["done"]["iter_00/model"]
    push(mine, "me/x", iteration=0)
    assert len(hub.calls) == 2
    (mine / "iter_00" / "model" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="iter_00/model is not what the run recorded"):
        push(mine, "me/x", iteration=0)
    (mine / "iter_01" / "model" / "README.md").unlink()
    with pytest.raises(ValueError, match=r"want README.md in .*the same `tspin run` command writes it"):
        push(mine, "me/x", dry_run=True)
    (mine / "iter_01" / "triplets.parquet").write_bytes(b"")
    with pytest.raises(ValueError, match=r"iter_01/triplets.parquet is not what"):
        push(mine, "me/x", triplets=True, dry_run=True)
    with pytest.raises(ValueError, match="want a run directory"):
        push(mine / "iter_00", "me/x")
    with pytest.raises(ValueError, match="bad name"):
        push(mine, "bad name", dry_run=True)
    assert len(hub.calls) == 2


def test_a_card_shows_accuracy_and_benchmarks(mine):
    path = mine / "iter_01" / "eval.json"
    storage.write_json(path, storage.read_json(path) | {"accuracy": 0.25, "tasks/average": 0.5, "tasks/sums": 0.75})
    (mine / "iter_01" / "model" / "README.md").unlink()
    write_cards(mine)
    text = (mine / "iter_01" / "model" / "README.md").read_text()
    assert "| iteration | accuracy | tasks average | eval logp |" in text and text.count("| 0.250 | 0.500 |") == 1
    assert "| sums |" in text and "| 0.750 |" in text and "Tasks: lm-evaluation-harness." in text


def test_hidden_files_are_not_uploaded(mine):
    for name in (".env", ".cache/token"):
        path = mine / "iter_01" / "model" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("secret")
    assert not [name for name in push(mine, "me/x", dry_run=True) if name.startswith(".")]


def test_the_last_model_is_the_one_with_the_highest_number(mine, capsys):
    record = storage.read_record(mine / "state.json")
    moved = {name.replace("iter_01", "iter_101"): made for name, made in record["done"].items()}
    for name, made in moved.items():
        moved[name] = {path.replace("iter_01", "iter_101"): digest for path, digest in made.items()}
    (mine / "iter_01").rename(mine / "iter_101")
    storage.write_record(mine / "state.json", record | {"done": moved})
    push(mine, "me/x", dry_run=True)
    assert "iter_101/model" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"want a finished one of \[0, 101\], got 10"):
        push(mine, "me/x", iteration=10)


def test_tokens_are_nowhere(run, hub, monkeypatch, capsys, caplog):
    secret = "hf_" + "A" * 34
    monkeypatch.setenv("HF_TOKEN", secret)
    words = ["push", str(run), "--repo_id", "me/x"]
    assert cli.main(words) == 0
    hub.error = OfflineModeIsEnabled("403 Forbidden")
    assert cli.main(words) == 2
    for more in (["--token", secret], [f"--token={secret}"]):
        assert cli.main([*words[:2], *more, *words[2:]]) == 2
    assert cli.main(["run", "--hub_token", secret, "--output_dir", str(run)]) == 2
    said = capsys.readouterr()
    assert "403 Forbidden; log in with `hf auth login`" in said.err and "unrecognised: --token" in said.err
    assert secret not in said.out + said.err + caplog.text
    held = [path for path in run.rglob("*") if path.is_file() and secret.encode() in path.read_bytes()]
    assert held == []


def test_tensorboard_has_the_names_and_values_of_the_metrics(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for t in range(2):
        (events,) = (run / f"iter_{t:02d}").rglob("events.out.tfevents.*")
        accumulator = EventAccumulator(str(events)).Reload()
        told = {(tag, e.step): e.value for tag in accumulator.Tags()["scalars"] for e in accumulator.Scalars(tag)}
        lines = [json.loads(line) for line in (run / f"iter_{t:02d}" / "metrics.jsonl").read_text().splitlines()]
        logged = {
            (f"train/{key}", line["step"]): value for line in lines for key, value in line.items() if key != "step"
        }
        assert len(logged) > 50 and ("train/logps/proto", 2) in logged
        # The summary of a training comes after its last checkpoint, from which metrics.jsonl is made.
        summary = {key for key in told if key not in logged}
        assert {name for name, _ in summary} <= {"train/total_flos", "train/train_loss"} | {
            f"train/train_{name}" for name in ("runtime", "samples_per_second", "steps_per_second")
        }
        assert {key: told[key] for key in logged} == pytest.approx(logged, rel=1e-6, nan_ok=True)


def test_a_tracker_that_is_not_installed_is_refused_at_once(tmp_path, monkeypatch):
    assert TSPINConfig(str(tmp_path), use_cpu=True, report_to="all").report_to is not None
    monkeypatch.setattr("tspin.training_args.get_available_reporting_integrations", lambda: ["wandb"])
    with pytest.raises(ValueError, match=r"report_to: .*got \['tensorboard'\]; pip install 'tspin\[tensorboard\]'"):
        TSPINConfig(str(tmp_path), use_cpu=True, report_to="tensorboard")
    with pytest.raises(ValueError, match=r"the packages of \['ledger'\]"):
        TSPINConfig(str(tmp_path), use_cpu=True, report_to=["ledger", "wandb"])
