"""Bad input to the commands: one line that says what was wanted and what to do, never a traceback from the depths.

What the kernels refuse is in tests/kernels/test_bad_input.py, and bad rows of data, one by one, in test_data.py.
"""

import json
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_loop import make_toy, toy_config

from tspin.cli import main

SMALL = {"max_rows": 8, "eval_rows": 2, "iterations": 1}


@pytest.fixture
def toy(tmp_path):
    make_toy(tmp_path)
    return tmp_path


def refusal(toy, capsys, *words, **changes):
    """What the command says on stderr; its exit code is 2."""
    toy_config(toy, toy / "run", **SMALL | changes).save(toy / "config.yaml")
    assert main([words[0], "--config", str(toy / "config.yaml"), *words[1:]]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("tspin: error: ")]
    return line


def rewrite(path, change):
    """Change the weights of a model, or the values of a JSON file, in place."""
    if path.suffix == ".safetensors":
        values = load_file(path)
        change(values)
        save_file(values, path, {"format": "pt"})
    else:
        values = json.loads(path.read_text())
        change(values)
        path.write_text(json.dumps(values))


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"max_length": 7, "eval_dataset": None},
            "no triplet of iteration 0 is left.*max_length 7; raise it, lower max_new",
        ),
        ({"max_length": 7}, "no row is left of .*2 beyond max_length and dropped.*is max_length 7 too small"),
        (
            {"max_length": 7, "overlong": "error"},
            "train.jsonl, line 1: want at most max_length 7 tokens, got 9; raise it, or",
        ),
        ({"max_length": 4}, "the prompt's 6 tokens fill max_length 4; shorten it or raise max_length"),
        ({"prompt_column": "question", "response_column": "answer"}, "column 'question' is missing; got columns"),
        ({"answer_pattern": "zzz(.)"}, "answer_pattern: want a match in every annotated response.*correct the pattern"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_data_that_do_not_fit_the_keys(toy, capsys, changes, message):
    line = refusal(toy, capsys, "run", **changes)
    assert re.search(message, line), line


MODELS = {
    "nan_in_the_weights": (lambda w: w["model.norm.weight"].fill_(float("nan")), "NaN logits.*restore the checkpoint"),
    "wrong_shape": (lambda w: w.update({"lm_head.weight": w["lm_head.weight"][:, :8].clone()}), "cannot load .*intact"),
    "a_weight_is_missing": (
        lambda w: w.pop("lm_head.weight"),
        "lacks the weights .*lm_head.weight.*complete checkpoint",
    ),
}


@pytest.mark.parametrize("fault", MODELS)
def test_models_that_are_not_whole(toy, capsys, fault):
    change, message = MODELS[fault]
    rewrite(toy / "model" / "model.safetensors", change)
    assert re.search(message, refusal(toy, capsys, "run"))


def test_a_truncated_model_and_a_tokenizer_of_another(toy, capsys):
    def longer(values):
        values["model"]["vocab"] |= {letter: 14 + i for i, letter in enumerate("abcdefgh")}

    rewrite(toy / "model" / "tokenizer.json", longer)
    (toy / "train.jsonl").write_text(
        "".join(json.dumps({"prompt": f"a{i}=", "response": "b"}) + "\n" for i in range(8))
    )
    assert "want token ids below 14, as the model has embeddings, got 15 in row 0" in refusal(toy, capsys, "run")
    path = toy / "model" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert "intact safetensors weights" in refusal(toy, capsys, "eval")


def test_positions_that_the_model_does_not_have(toy, capsys):
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=14, n_embd=16, n_layer=1, n_head=2, n_positions=8, eos_token_id=1, bos_token_id=None)
    for file in (toy / "model").glob("*.safetensors"):
        file.unlink()
    GPT2LMHeadModel(config).save_pretrained(toy / "model")
    assert "want room in the model's positions, got 6 behind a prompt of" in refusal(
        toy, capsys, "run", eval_dataset=None
    )


@pytest.mark.parametrize("command", ["run", "generate", "train"])
def test_an_output_directory_that_is_a_file(toy, capsys, command):
    (toy / "run").write_text("")
    pq.write_table(pa.Table.from_pylist([TRIPLET]), toy / "triplets.parquet")
    words = ["--triplets", str(toy / "triplets.parquet")] if command == "train" else []
    assert "output_dir: want a directory, got" in refusal(toy, capsys, command, *words)


TRIPLET = {
    "row": 0,
    "prompt_ids": [2, 3],
    "chosen_ids": [4, 1],
    "rejected_ids": [5, 1],
    "rejected_finish_reason": "stop",
}
ROWS = {
    "text": (
        {"chosen_ids": "abc"},
        "column 'chosen_ids': want a list of token ids in each row, got string; tokenise it",
    ),
    "floats": ({"chosen_ids": [1.5, 2.0]}, "want a list of token ids in each row, got list<element: double>"),
    "beyond": ({"chosen_ids": [14, 1]}, "want token ids in [0, 14), as the model has embeddings, got 1 to 14"),
    "negative": ({"rejected_ids": [-3, 1]}, "column 'rejected_ids': want token ids in [0, 14)"),
    "empty": ({"chosen_ids": []}, "none of them empty, got no chosen_ids"),
    "null": ({"rejected_ids": None}, "none of them empty, got no rejected_ids"),
    "references": (
        {"ref_chosen_logps": "x", "ref_rejected_logps": 1.0},
        "'ref_chosen_logps': want a number in each row",
    ),
    "nan": (
        {"ref_chosen_logps": float("nan"), "ref_rejected_logps": 1.0},
        "the loss of step 1 is not finite (nan here)",
    ),
    "absent": ({}, "wants the columns ['ref_chosen_logps', 'ref_rejected_logps']"),
}


@pytest.mark.parametrize("fault", ROWS)
def test_triplets_of_the_wrong_kind(toy, capsys, fault):
    change, message = ROWS[fault]
    pq.write_table(pa.Table.from_pylist([TRIPLET | change] * 4), toy / "triplets.parquet")
    method = "spin" if fault in ("references", "nan", "absent") else "tspin"
    assert message in refusal(toy, capsys, "train", "--triplets", str(toy / "triplets.parquet"), method=method)


def test_no_triplets_and_the_last_legal_id(toy, capsys):
    pq.write_table(pa.Table.from_pylist([TRIPLET | {"chosen_ids": [13, 1]}] * 4), toy / "triplets.parquet")
    toy_config(toy, toy / "run").save(toy / "config.yaml")
    words = ["train", "--config", str(toy / "config.yaml"), "--triplets", str(toy / "triplets.parquet")]
    assert (
        main(words) == 0
        and torch.isfinite(load_file(toy / "run" / "model" / "model.safetensors")["lm_head.weight"]).all()
    )
    pq.write_table(pa.Table.from_pylist([TRIPLET]).slice(0, 0), toy / "triplets.parquet")
    assert "want at least one triplet, got none" in refusal(toy, capsys, *words[:1], *words[3:])
