"""The demo's task is what it says, and the demo runs at a tiny size; at its own it runs in CI, not here."""

import random
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tspin import demo
from tspin.config import SelfPlayConfig
from tspin.loop import SelfPlay
from tspin.storage import model_hash

numbers = st.integers(100, 999)


@settings(derandomize=True, max_examples=200)
@given(numbers, numbers)
def test_a_clean_solution_ends_in_the_sum_and_its_columns_hold(a, b):
    text = demo.solve(a, b)
    assert int(re.search(r"#(\d+)$", text).group(1)) == a + b
    carry = 0
    for x, y, c, total in re.findall(r"(\d)\+(\d)\+(\d)=(\d\d)", text):
        assert int(x) + int(y) + carry == int(total) and int(c) == carry
        carry = int(total) // 10


def test_a_sloppy_pupil_is_right_only_without_carries():
    rng = random.Random(0)
    answers = [int(demo.solve(816, 318, rng).split("#")[1]) for _ in range(200)]
    assert 1134 not in answers[:1] and sum(answer == 1124 for answer in answers) > 150


def test_splits_share_no_problem_and_are_reproducible():
    def first(split, seed):
        source = demo.problems(split, seed)
        return {next(source)[0] for _ in range(2000)}

    for one, other in (("train", "test"), ("train", "valid"), ("valid", "test")):
        assert not first(one, 0) & first(other, 0)
    assert first("train", 1) == first("train", 1) != first("train", 2)


def test_the_tokenizer_gives_back_every_problem_character_by_character():
    tokenizer = demo.build_tokenizer()
    text = next(demo.sloppy_texts(0))
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert len(ids) == len(text) and tokenizer.decode(ids) == text
    assert tokenizer.unk_token_id not in ids


@pytest.fixture
def tiny(monkeypatch):
    """A demo of a few seconds."""
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    monkeypatch.setattr(demo, "PUPIL", demo.PUPIL | sizes)
    small = demo.Size(steps=2, train_rows=8, test_rows=4, iterations=1)
    monkeypatch.setattr(demo, "FULL", small)
    monkeypatch.setattr(demo, "QUICK", small)
    real = demo.demo_config
    monkeypatch.setattr(demo, "demo_config", lambda *args: real(*args) | {"max_new_tokens": 3})


def test_the_demo_compares_and_leaves_a_config_that_gives_the_same_weights(tiny, tmp_path, capsys):
    directory = tmp_path / "demo"
    assert demo.main(["--output_dir", str(directory)]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    runs = sorted(path.name for path in (directory / "runs").glob("*_seed_0"))
    assert runs == ["sft_seed_0", "spin_seed_0", "tspin_seed_0"]
    assert "greedy greedy greedy sampled sampled sampled" in shown and "4 held-out sums" in shown
    assert "does not show" in shown and "mean nothing" not in shown
    assert "mean nothing" not in (directory / "runs" / "report" / "report.html").read_text()
    config = SelfPlayConfig.from_file(directory / "config.yaml", {"output_dir": str(tmp_path / "again")})
    again = SelfPlay(config).run(report=False)
    assert again.model_hash == model_hash(directory / "runs" / "tspin_seed_0" / "iter_00" / "model")

    stages = (directory / "runs" / "spin_seed_0" / "timings.jsonl").read_text()
    assert demo.main(["--output_dir", str(directory)]) == 0, "a second call finds it done"
    assert (directory / "runs" / "spin_seed_0" / "timings.jsonl").read_text() == stages
    with pytest.raises(ValueError, match=r"output_dir: want a directory for .*'seed': 3.* got .* 'seed': 0"):
        demo.main(["--output_dir", str(directory), "--seed", "3"])


def test_the_quick_demo_is_one_arm_and_says_that_it_means_nothing(tiny, tmp_path, capsys):
    assert demo.main(["--quick", "--output_dir", str(tmp_path)]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert [path.name for path in (tmp_path / "runs").glob("*_seed_*")] == ["tspin_seed_0"]
    assert "Its numbers mean nothing" in shown and "does not show" not in shown
    page = (tmp_path / "runs" / "report" / "report.html").read_text()
    assert "Its numbers mean nothing" in page.partition("<main>")[0]
