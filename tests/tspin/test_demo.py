"""The demo's task is what it says; the whole demo runs in CI, not here."""

import random
import re

from hypothesis import given, settings
from hypothesis import strategies as st

from tspin import demo
from tspin.config import SelfPlayConfig

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

    assert not first("train", 0) & first("test", 0)
    assert first("train", 1) == first("train", 1) != first("train", 2)


def test_the_tokenizer_gives_back_every_problem_character_by_character():
    tokenizer = demo.build_tokenizer()
    text = next(demo.sloppy_texts(0))
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert len(ids) == len(text) and tokenizer.decode(ids) == text
    assert tokenizer.unk_token_id not in ids


def test_the_demo_config_is_one_that_tspin_run_accepts(tmp_path):
    config = SelfPlayConfig.from_dict(demo.demo_config(tmp_path, quick=False, seed=0))
    config.save(tmp_path / "config.yaml")
    assert not SelfPlayConfig.from_file(tmp_path / "config.yaml").diff(config)
    assert config.iterations == 5 and config.training["method"] == "tspin"
