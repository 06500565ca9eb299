"""The command line: what each command passes on, errors in one line with exit code 2, and a quick start."""

import json
import subprocess
import sys
import types
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tspin import cli, loop
from tspin.config import SelfPlayConfig, loop_fields, training_fields
from tspin.generate import read_generations

GSM8K = Path(__file__).resolve().parents[3] / "shared" / "data" / "gsm8k"
KEYS = [
    "--max_new_tokens",
    "4",
    "--use_cpu",
    "--bf16=false",
    "--max_length",
    "64",
    "--prompt_template",
    "Q {prompt} A ",
]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("model")
    alphabet = ["<pad>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    core = Tokenizer(models.BPE({name: i for i, name in enumerate(alphabet)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(["<pad>", "<s>", "</s>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    tokenizer.save_pretrained(path)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(alphabet), max_position_embeddings=64, eos_token_id=2, **sizes)
    LlamaForCausalLM(config).save_pretrained(path)
    return path


@pytest.fixture
def rows(tmp_path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"p{i}", "response": f"r{i}"}) + "\n" for i in range(4)))
    return path


def fails(capsys, *words: str) -> str:
    """The one line that a failing command prints."""
    assert cli.main(words) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    errors = [line for line in lines if line.startswith("tspin: error: ")]
    assert len(errors) == 1 and not any("Traceback" in line for line in lines)
    return errors[0]


def test_help_and_version_import_no_torch():
    script = (
        "import sys; from tspin.cli import main\n"
        "for words in (['--help'], ['--version'], ['train', '--help']):\n"
        "    try: main(words)\n"
        "    except SystemExit as done: assert done.code == 0\n"
        "heavy = {'torch', 'transformers', 'datasets', 'pyarrow'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    for extra, code in (("", 0), ("import pyarrow\n", 1)):
        done = subprocess.run([sys.executable, "-c", extra + script], capture_output=True, text=True)
        assert done.returncode == code, done.stderr
        assert "generate" in done.stdout and "--triplets" in done.stdout


def test_help_of_run_lists_every_key_once_with_its_default(capsys):
    with pytest.raises(SystemExit):
        cli.main(["run", "--help"])
    text = capsys.readouterr().out
    listed = [line.split()[0][2:] for line in text.splitlines() if line.startswith("  --") and "(" in line]
    assert sorted(listed) == sorted([*loop_fields(), *training_fields()])
    assert "--iterations (int; default 5)" in text and "--dataset (text; required)" in text
    assert "--output_dir (text;" in text


@pytest.mark.parametrize(
    "words, pieces",
    [
        ([], ["COMMAND", "--help"]),
        (["fly"], ["fly", "demo"]),
        (["run"], ["model_name_or_path is required"]),
        (["run", "--model_name_or_path", "m", "--dataset", "d"], ["output_dir is required"]),
        (["run", "--model_nam", "m"], ["did you mean model_name_or_path"]),
        (["run", "--output_dir", "x"], ["model_name_or_path is required"]),
        (
            ["run", "--output_dir", "x", "--model_name_or_path", "m", "--dataset", "d", "--iteratons", "2"],
            ["iterations"],
        ),
        (["run", "--config", "absent.yaml"], ["absent.yaml"]),
        (["run", "stray"], ["--key value", "stray"]),
        (["run", "--conf", "x"], ["unknown key 'conf'", "config?"]),
        (["train", "--output_dir", "x"], ["--triplets"]),
        (["train", "--triplets", "t", "--iteration", "x"], ["--iteration"]),
        (["eval", "--model_name_or_path", "m"], ["eval_dataset is required, or tasks"]),
        (["eval", "--model_name_or_path", "m", "--tasks", "a,a"], ["tasks: want", "a twice"]),
        (["report"], ["RUN"]),
        (["report", "absent-run"], ["absent-run"]),
        (["env", "--seed", "1"], ["unrecognised", "--seed"]),
    ],
)
def test_wrong_words_end_in_one_line_and_exit_code_2(capsys, words, pieces):
    error = fails(capsys, *words)
    assert all(piece in error for piece in pieces), error


def test_only_user_errors_are_shortened_and_debug_shows_all(monkeypatch, capsys):
    def run(error):
        def raise_error(self):
            raise error

        monkeypatch.setattr(loop.SelfPlay, "run", raise_error)
        return cli.main(["run", "--output_dir", "x", "--model_name_or_path", "m", "--dataset", "d"])

    assert run(ValueError("two\n lines")) == 2
    assert capsys.readouterr().err == "tspin: error: two lines\n"
    assert run(KeyboardInterrupt()) == 130
    with pytest.raises(ZeroDivisionError):
        run(ZeroDivisionError())
    monkeypatch.setenv("TSPIN_DEBUG", "1")
    with pytest.raises(ValueError, match="two"):
        run(ValueError("two"))


def test_run_merges_file_and_words(monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(loop.SelfPlay, "run", lambda self: seen.append(self.config))
    path = tmp_path / "config.yaml"
    path.write_text("model_name_or_path: m\ndataset: d\noutput_dir: a\nseed: 3\nlearning_rate: [5e-7, 1e-7]\n")
    assert cli.main(["run", "--seed", "4", "--config", str(path), "--temperature=0.5", "--trust-remote-code"]) == 0
    values = {"model_name_or_path": "m", "dataset": "d", "output_dir": "a", "seed": 4, "temperature": 0.5}
    wanted = SelfPlayConfig(**values, trust_remote_code=True, training={"learning_rate": [5e-7, 1e-7]})
    assert seen == [wanted]


def test_demo_and_report_pass_their_words_on(monkeypatch, tmp_path, capsys):
    seen = []
    demo, report = types.ModuleType("tspin.demo"), types.ModuleType("tspin.report")
    demo.main = lambda argv: seen.append(argv)
    report.write_report = lambda runs, folder: seen.append((runs, folder))
    monkeypatch.setitem(sys.modules, "tspin.demo", demo)
    monkeypatch.setitem(sys.modules, "tspin.report", report)
    assert cli.main(["demo", "--config", "x", "-h", "--fast"]) == 0
    assert cli.main(["report", str(tmp_path), str(tmp_path)]) == 0
    assert cli.main(["report", str(tmp_path), "--output_dir", "there"]) == 0
    runs = [str(tmp_path)]
    assert seen == [["--config", "x", "-h", "--fast"], (2 * runs, None), (runs, "there")]


def test_env_names_every_version(capsys, monkeypatch):
    assert cli.main(["env"]) == 0
    text = capsys.readouterr().out
    for name in ("python", "torch", "triton", "transformers", "datasets", "accelerate", "peft", "CUDA device", "tspin"):
        assert any(line.startswith(name) for line in text.splitlines()), name
    assert torch.__version__ in text
    assert cli._version("no-such-package") == "not installed"


@pytest.mark.parametrize("words", [["env"], ["env", "--no_such_option"]])
def test_a_command_leaves_its_process_group(words, tmp_path, capsys):
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1
    )
    cli.main(words)
    assert not torch.distributed.is_initialized()


def test_generate_writes_one_response_per_row(model_dir, rows, tmp_path):
    out = tmp_path / "out"
    words = ["--model_name_or_path", str(model_dir), "--dataset", str(rows), "--output_dir", str(out), *KEYS]
    assert cli.main(["generate", *words]) == 0
    generations = read_generations(out)
    assert sorted(generations) == [0, 1, 2, 3]
    before = sorted((path.name, path.stat().st_mtime_ns) for path in out.glob("*.parquet"))
    assert cli.main(["generate", *words]) == 0
    assert sorted((path.name, path.stat().st_mtime_ns) for path in out.glob("*.parquet")) == before
    assert cli.main(["generate", *words, "--seed", "7"]) == 2


@pytest.mark.parametrize("more", [[], ["--use_peft", "--lora_r", "2"]])
def test_train_changes_the_weights_and_saves_a_whole_model(model_dir, tmp_path, more):
    record = {
        "row": 0,
        "prompt_ids": [3, 4],
        "chosen_ids": [5, 2],
        "rejected_ids": [6, 7],
        "rejected_finish_reason": "stop",
    }
    pq.write_table(pa.Table.from_pylist([record] * 2), tmp_path / "triplets.parquet")
    words = ["--model_name_or_path", str(model_dir), "--output_dir", str(tmp_path / "out"), "--max_steps", "2"]
    words += [
        "--iteration",
        "1",
        "--method",
        "tspin_no_history",
        "--learning_rate",
        "[0, 0.01]",
        "--save_strategy",
        "no",
        "--disable_tqdm",
        *more,
    ]
    assert cli.main(["train", "--triplets", str(tmp_path / "triplets.parquet"), *words, *KEYS]) == 0
    old = LlamaForCausalLM.from_pretrained(model_dir).state_dict()
    new = LlamaForCausalLM.from_pretrained(tmp_path / "out" / "model").state_dict()
    assert old.keys() == new.keys()
    assert any(not torch.equal(old[name], new[name]) for name in old)
    PreTrainedTokenizerFast.from_pretrained(tmp_path / "out" / "model")


def test_train_refuses_a_torn_file(capsys, tmp_path):
    (tmp_path / "t.parquet").write_bytes(b"PAR1 torn")
    words = ["--model_name_or_path", "m", "--output_dir", str(tmp_path)]
    assert "t.parquet" in fails(capsys, "train", "--triplets", str(tmp_path / "t.parquet"), *words)
    assert "absent.parquet" in fails(capsys, "train", "--triplets", str(tmp_path / "absent.parquet"), *words)
    assert "--iteration" in fails(capsys, "train", "--triplets", "t", "--iteration", "-1", *words)


def test_eval_prints_its_measures_as_json(model_dir, rows, capsys):
    words = ["--model_name_or_path", str(model_dir), "--eval_dataset", str(rows), "--eval_rows", "3"]
    assert cli.main(["eval", *words, *KEYS]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["rows"] == 3 and 0 <= result["exact_match"] <= 1 and result["logprob"] < 0


def test_check_shows_rows_with_their_special_tokens(model_dir, rows, capsys):
    words = ["--model_name_or_path", str(model_dir), "--dataset", str(rows), "--eval_dataset", str(rows), *KEYS]
    assert cli.main(["check", "--rows", "1", *words]) == 0
    text = capsys.readouterr().out
    assert [line[:2] for line in text.splitlines()[:5]] == ["ok"] * 5
    assert (
        "scores through its output head" in text
        and "data: 4 rows, prompts of 7 to 7 tokens, responses of 3 to 3" in text
    )
    assert "prompt    Q | Ġ | p | 0 | Ġ | A | Ġ\n" in text
    assert "response  r | 0 | [[</s>]]\n" in text
    assert "row 0" in text and "row 1" not in text


def test_check_says_where_prompts_cannot_be_shared(model_dir, rows, capsys, monkeypatch):
    monkeypatch.setattr("tspin.prefix.refusal", lambda model: "its layers include ['conv']")
    words = ["check", "--model_name_or_path", str(model_dir), "--dataset", str(rows), *KEYS]
    assert cli.main(words) == 0
    assert "a row of its own for every response, as its layers include ['conv']" in capsys.readouterr().out
    assert cli.main([*words, "--prefix_sharing", "off"]) == 0 and "conv" not in capsys.readouterr().out
    assert cli.main([*words, "--prefix_sharing", "on"]) == 2
    assert "NO  model: prefix_sharing: its layers include ['conv'], so its prompts cannot" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words, step, message",
    [
        (["--learning_rate", "[1e-6]", "--alpha", "-1"], "training", "alpha"),
        (["--tokenizer_name_or_path", "./absent"], "tokenizer", "absent"),
        (["--prompt_template", "chat"], "tokenizer", "chat template"),
        (["--dataset", "./absent.jsonl"], "data", "absent.jsonl"),
        (["--answer_pattern", "#### (.*)"], "eval data", "4 of 4 rows"),
        (["--max_new_tokens", "99"], "model", "64 positions"),
    ],
)
def test_check_names_what_fails_and_goes_on(model_dir, rows, capsys, words, step, message):
    base = ["--model_name_or_path", str(model_dir), "--dataset", str(rows), "--eval_dataset", str(rows), *KEYS]
    assert cli.main(["check", *base, *words]) == 2
    out, err = capsys.readouterr()
    failed = [line for line in out.splitlines() if line.startswith("NO")]
    assert len(failed) == 1 and failed[0].startswith(f"NO  {step}: ") and message in failed[0]
    assert f"check failed: {step}" in err


def test_check_for_a_gpu_that_is_elsewhere(model_dir, rows, capsys):
    words = ["--model_name_or_path", str(model_dir), "--dataset", str(rows), "--bf16", "true", "--gpu_memory", "24GB"]
    words += [word for word in KEYS if word not in ("--use_cpu", "--bf16=false")]
    assert cli.main(["check", *words]) == 0
    assert "within the 22.08 GiB that tensors get of 24.00 GiB" in capsys.readouterr().out


def test_check_of_gsm8k(model_dir, capsys):
    if not GSM8K.is_dir():
        pytest.skip(f"real data not found at {GSM8K}")
    words = ["--model_name_or_path", str(model_dir), "--dataset", str(GSM8K), "--eval_dataset", str(GSM8K)]
    words += ["--prompt_column", "question", "--response_column", "answer", "--max_rows", "50", "--eval_rows", "50"]
    words += ["--answer_pattern", r"#### (-?[0-9.,]+)", "--use_cpu", "--bf16=false", "--max_new_tokens", "8"]
    assert cli.main(["check", *words]) == 2
    out = capsys.readouterr().out
    assert "first answer '18'" in out and "NO  model: want rows of at most 64 positions" in out
