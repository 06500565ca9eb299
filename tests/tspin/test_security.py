"""No foreign code runs, no secret is written down, and an offline run opens no socket."""

import inspect
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from test_data import make_tokenizer
from test_loop import make_toy, toy_config

from tspin import loop
from tspin.checkpoints import Checkpoints
from tspin.cli import main
from tspin.config import SelfPlayConfig, loop_fields, training_fields
from tspin.data import Encoder
from tspin.loading import load_model, load_tokenizer
from tspin.loop import SelfPlay
from tspin.rows import BadRow
from tspin.storage import content_hash

SMALL = {"max_rows": 8, "eval_rows": 2, "iterations": 1}


class Planted:
    """Makes a directory when it is unpickled without care."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)


@pytest.fixture
def toy(tmp_path):
    make_toy(tmp_path)
    return tmp_path


@pytest.fixture
def marker(tmp_path):
    yield tmp_path / "code-has-run"
    assert not (tmp_path / "code-has-run").exists()


def test_the_plant_works(tmp_path):
    torch.save({"x": Planted(tmp_path / "code-has-run")}, tmp_path / "file")
    torch.load(tmp_path / "file", weights_only=False)
    assert (tmp_path / "code-has-run").exists()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "adapter_model.bin"])
@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside_safetensors"])
def test_a_planted_pickle_is_refused_or_left_alone(toy, marker, name, beside):
    path = toy / "model"
    torch.save({"x": Planted(marker)}, path / name)
    if name.startswith("adapter"):
        (path / "adapter_config.json").write_text(
            json.dumps({"peft_type": "LORA", "base_model_name_or_path": str(path)})
        )
    if not beside:
        (path / "model.safetensors").unlink()
    if beside and not name.startswith("adapter"):
        assert load_model(str(path)).num_parameters() > 0
    else:
        with pytest.raises(ValueError, match=r"want (safetensors, got the pickled|a whole model, got the adapter)"):
            load_model(str(path))


def test_an_adapter_and_an_index_do_not_lead_to_other_files(toy):
    peft = pytest.importorskip("peft", reason="the extra peft is not installed")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    peft.get_peft_model(load_model(str(toy / "model")), config).save_pretrained(toy / "adapter")
    with pytest.raises(ValueError, match=r"got the adapter .*merge the two"):
        load_model(str(toy / "adapter"))
    os.rename(toy / "model" / "model.safetensors", toy / "outside.safetensors")
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "../outside.safetensors"}}
    (toy / "model" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"index of files beside it.*names \.\./outside\.safetensors"):
        load_model(str(toy / "model"))


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"])
def test_a_checkpoint_with_a_forged_seal_runs_no_code(toy, marker, monkeypatch, name):
    config, step = toy_config(toy, toy / "run", save_steps=1, **SMALL), torch.optim.RMSprop.step
    steps = []

    def interrupted(*args, **kwargs):
        steps.append(args)
        if len(steps) == 3:
            raise KeyboardInterrupt
        return step(*args, **kwargs)

    monkeypatch.setattr(torch.optim.RMSprop, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        SelfPlay(config).run()
    checkpoints = Checkpoints(toy / "run" / "iter_00" / "checkpoints")
    last = checkpoints.last()
    assert last.name == "checkpoint-2" and not (last / "training_args.bin").exists()
    facts = json.loads((last / "complete.json").read_text())
    torch.save({"x": Planted(marker)}, last / name)
    # The seal of whoever may write here, with the origin that the run expects.
    monkeypatch.setattr("tspin.checkpoints.hash_json", lambda value: facts["origin"])
    checkpoints.seal(2, facts["max_steps"])
    monkeypatch.undo()
    assert checkpoints.last() == last
    if name == "training_args.bin":
        assert SelfPlay(config).run().model_hash
        return
    with pytest.raises(
        ValueError, match=r"checkpoint-2 holds more than tensors and numbers.*delete .*checkpoint-2, and"
    ):
        SelfPlay(config).run()
    shutil.rmtree(last)
    assert (
        SelfPlay(config).run().model_hash
        == SelfPlay(toy_config(toy, toy / "alone", save_steps=1, **SMALL)).run().model_hash
    )


def test_code_beside_a_checkpoint_does_not_run_by_default(toy, marker):
    for function in (load_model, load_tokenizer):
        assert inspect.signature(function).parameters["trust_remote_code"].default is False
    assert loop_fields()["trust_remote_code"].default is False
    path, code = toy / "model", f"import os; os.mkdir({str(marker)!r})\n"
    (path / "code.py").write_text(code)
    for file, key in (("config.json", "AutoModelForCausalLM"), ("tokenizer_config.json", "AutoTokenizer")):
        values = json.loads((path / file).read_text())
        values |= {"auto_map": {key: "code.X", "AutoConfig": "code.X"}, "model_type": "x", "tokenizer_class": "X"}
        (path / file).write_text(json.dumps(values))
    for load in (load_model, load_tokenizer):
        with pytest.raises(ValueError, match="custom code"):
            load(str(path))


def test_values_and_templates_are_text_and_not_code(tmp_path, marker):
    call = f"__import__('os').mkdir({str(marker)!r})"
    words = [
        f"--{key}={call}"
        for key in ("prompt_template", "dataset_split", "model_revision", "learning_rate", "optim_args")
    ]
    for word in words:
        try:
            SelfPlayConfig.from_file(None, ["--model_name_or_path=m", "--dataset=d", word])
        except ValueError as error:
            assert word[2:].split("=")[0] in str(error)
    escape = (
        "{{ messages.__class__.__mro__[1].__subclasses__() }}"
        + "{{ cycler.__init__.__globals__.os.mkdir('"
        + f"{marker}')"
        + " }}"
    )
    encode = Encoder(make_tokenizer(chat=escape), "chat", [2])
    with pytest.raises(BadRow, match="chat template refuses the row"):
        encode([{"role": "user", "content": "p"}], {"role": "assistant", "content": "r"})


def test_no_key_of_a_config_holds_a_secret():
    keys = loop_fields() | training_fields()
    assert not [
        key for key in keys if key.startswith("hub_") or key.endswith(("_token", "password", "secret", "api_key"))
    ]


WATCHED = """
import socket, sys

def watch(event, args):
    inet = event == "socket.__new__" and args[1] in (socket.AF_INET, socket.AF_INET6)
    if inet or event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.bind", "socket.sendto"):
        raise SystemExit(f"SOCKET {event} {args[1:]}")

sys.addaudithook(watch)
"""
RUN = "import tspin.cli; sys.exit(tspin.cli.main(sys.argv[1:]))"
EACH = "import json, tspin.cli; sys.exit(max(tspin.cli.main(words) for words in json.loads(sys.argv[1])))"
DOWNLOAD = "import huggingface_hub; huggingface_hub.hf_hub_download('some/model', 'config.json')"
SECRET = "hf_ThisIsASecretOfTheEnvironment"


def watched(code, *words, cwd, **environment):
    command = [sys.executable, "-c", WATCHED + code, *words]
    secrets = {"HF_TOKEN": SECRET, "HUGGING_FACE_HUB_TOKEN": SECRET, "OMP_NUM_THREADS": "1"}
    environment = {**os.environ, **secrets, "HF_HOME": str(cwd / "hub"), **environment}
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment)


def test_the_watch_sees_a_download(tmp_path):
    done = watched(DOWNLOAD, cwd=tmp_path, HF_HUB_OFFLINE="0")
    assert "SOCKET socket." in done.stderr and done.returncode != 0


def test_offline_no_command_opens_a_socket_or_writes_a_secret(toy):
    """A model of the hub's cache by its name, and a data set on the disk."""
    commit, cache = "c0ffee" + "0" * 34, toy / "hub" / "hub" / "models--some--model"
    shutil.copytree(toy / "model", cache / "snapshots" / commit)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text(commit)
    config = toy_config(toy, toy / "run", **SMALL | {"model_name_or_path": "some/model", "disable_tqdm": False})
    config.save(toy / "config.yaml")
    done = watched(RUN, "run", "--config", str(toy / "config.yaml"), cwd=toy, HF_HUB_OFFLINE="1")
    assert done.returncode == 0 and "SOCKET" not in done.stderr, done.stderr[-3000:]
    assert json.loads((toy / "run" / "run.json").read_text())["model"] == {"name": "some/model", "commit": commit}
    assert (toy / "run" / "report" / "table.md").exists() and content_hash(toy / "run" / "iter_00" / "model")
    given = ["--config", str(toy / "config.yaml")]
    others = [
        ["report", str(toy / "run")],
        ["check", *given],
        ["eval", *given, "--save", str(toy / "scores.json")],
        ["generate", *given, "--output_dir", str(toy / "samples")],
        ["compare", *given, "--output_dir", str(toy / "arms"), "--methods", "spin,sft", "--seeds", "0"],
        ["push", str(toy / "run"), "--repo_id", "me/x", "--dry_run"],
    ]
    done = watched(EACH, json.dumps(others), cwd=toy, HF_HUB_OFFLINE="1")
    assert done.returncode == 0 and "SOCKET" not in done.stderr, done.stderr[-3000:]
    assert (toy / "scores.json").exists() and (toy / "arms" / "report" / "table.md").exists()
    written = [path for path in toy.rglob("*") if path.is_file()]
    assert not [path for path in written if SECRET.encode() in path.read_bytes()]
    assert SECRET not in done.stdout + done.stderr


def test_a_token_is_refused_as_a_key_and_not_repeated(toy, capsys):
    toy_config(toy, toy / "run").save(toy / "config.yaml")
    for words in (["--hub_token", SECRET], [f"--hub_token={SECRET}"], [f"--hf_token={SECRET}"]):
        assert main(["run", "--config", str(toy / "config.yaml"), *words]) == 2
        printed = capsys.readouterr()
        assert "token" in printed.err and SECRET not in printed.out + printed.err
    assert not (toy / "run").exists()


@pytest.mark.parametrize(
    ("program", "is_ours"),
    [
        ("/env/bin/tspin", True),
        ("/env/site-packages/tspin/__main__.py", True),
        ("tspin/train.py", False),
        ("-c", False),
    ],
)
def test_a_run_records_no_words_of_another_program(program, is_ours, monkeypatch):
    monkeypatch.setattr(sys, "argv", [program, "run", "--hf_token", SECRET])
    assert loop._own_command() == (sys.argv if is_ours else [program])
