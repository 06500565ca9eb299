"""Data both ways: the triplets of a run in `trl dpo`, and TRL's preference data sets in TSPINTrainer, token for token."""

import pytest

pytest.importorskip("trl", "1.16", reason="the extra trl is not installed")

import torch
import yaml
from datasets import Dataset, load_dataset
from test_trl import PLAIN, make_tokenizer, rows, save_models
from transformers import AutoModelForCausalLM
from trl import DPOConfig, DPOTrainer

from tspin import TSPINConfig, TSPINTrainer, storage
from tspin.data import Encoder, Example, build_triplets, stop_token_ids
from tspin.generate import Generation
from tspin.rows import exchange


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    save_models(root, ["llama"])
    return root


@pytest.fixture
def triplets(tmp_path):
    """triplets.parquet as the loop writes it, under a template, and the rows in it."""
    tokenizer = make_tokenizer()
    encode = Encoder(tokenizer, "ask {prompt} say ", stop_token_ids(tokenizer))
    examples, samples = [], ({}, {})
    for i, row in enumerate(rows(6)):
        prompt, prompt_ids, ids = encode(*exchange({"prompt": row["prompt"] + "x", "response": row["chosen"] + "y"}))
        examples.append(Example(i, prompt, row["chosen"] + "y", prompt_ids, ids))
        for made, said in zip(samples, (row["rejected"] + "z", row["chosen"] + "!")):
            made[i] = Generation([*tokenizer(said).input_ids, 2], "stop", said)
    path = tmp_path / "triplets.parquet"
    storage.write_parquet(path, build_triplets(examples, *samples, max_length=64))
    return path


def test_the_triplets_run_through_trl_dpo_unchanged(home, tmp_path, triplets):
    from trl.scripts.dpo import main, make_parser

    config = {"model_name_or_path": str(home / "llama"), "output_dir": str(tmp_path / "out"), **PLAIN, "max_steps": 1}
    config |= {
        "datasets": [{"path": "parquet", "data_files": str(triplets)}],
        "dtype": "float32",
        "save_strategy": "no",
    }
    (tmp_path / "dpo.yaml").write_text(yaml.safe_dump(config))
    main(*make_parser().parse_args_and_config(["--config", str(tmp_path / "dpo.yaml")]))
    trained, given = (AutoModelForCausalLM.from_pretrained(path) for path in (tmp_path / "out", home / "llama"))
    assert not torch.equal(trained.lm_head.weight, given.lm_head.weight)


def test_trl_trains_on_the_very_tokens_of_the_triplets(home, tmp_path, triplets):
    data = load_dataset("parquet", data_files=str(triplets), split="train", cache_dir=tmp_path)
    model = AutoModelForCausalLM.from_pretrained(home / "llama")
    trainer = DPOTrainer(
        model, args=DPOConfig(str(tmp_path), **PLAIN), train_dataset=data, processing_class=make_tokenizer()
    )
    ids = ["prompt_ids", "chosen_ids", "rejected_ids"]
    assert trainer.train_dataset.select_columns(ids).to_list() == data.select_columns(ids).to_list()
    assert data[0]["prompt"].startswith("ask ") and data[0]["prompt"].endswith(" say ")


def chat(role: str, text: str) -> list[dict]:
    return [{"role": role, "content": text}]


LAYOUTS = {
    "standard": lambda p, c, r: {"prompt": p, "chosen": c, "rejected": r},
    "conversational": lambda p, c, r: {
        "prompt": chat("user", p), "chosen": chat("assistant", c), "rejected": chat("assistant", r)
    },
    "implicit prompt": lambda p, c, r: {
        "chosen": chat("user", p) + chat("assistant", c), "rejected": chat("user", p) + chat("assistant", r)
    },
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_trls_preference_data_sets_feed_our_trainer_with_the_tokens_that_trl_takes(home, tmp_path, layout):
    data = Dataset.from_list(
        [LAYOUTS[layout](r["prompt"] + "x", r["chosen"] + "y", r["rejected"] + "z") for r in rows(6)]
    )
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'][0] }}? {{ m['content'] }}{% if m['role'] == 'assistant' %}<eos>{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}a? {% endif %}"
    )
    model = AutoModelForCausalLM.from_pretrained(home / "llama")
    theirs = DPOTrainer(model, args=DPOConfig(str(tmp_path), **PLAIN), train_dataset=data, processing_class=tokenizer)
    options = {"max_steps": 1, "use_cpu": True, "save_strategy": "no", "disable_tqdm": True}
    ours = TSPINTrainer(model, TSPINConfig(str(tmp_path), **options), data, processing_class=tokenizer)
    ours.train()
    ids = ["prompt_ids", "chosen_ids", "rejected_ids"]
    assert ours.train_dataset.select_columns(ids).to_list() == theirs.train_dataset.select_columns(ids).to_list()
    assert ours.state.global_step == 1 and len(ours.train_dataset) == 6
