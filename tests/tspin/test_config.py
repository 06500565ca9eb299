"""The config: round trips, coercion by type, per-iteration lists, differences, and errors that name the key."""

import dataclasses
import string

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from tspin.config import SelfPlayConfig, loop_fields, read_values, training_fields
from tspin.training_args import TSPINConfig

BASE = {"model_name_or_path": "model", "dataset": "rows.jsonl"}


def make(**values) -> SelfPlayConfig:
    return SelfPlayConfig.from_dict(BASE | values)


# Words that YAML 1.1 or 1.2 reads as something else, or that need quoting.
TRAPS = [
    "5e-7",
    "1e5",
    "1234e56",
    "0123",
    "on",
    "off",
    "no",
    "null",
    "~",
    "12:30",
    "2024-01-01",
    "0x1F",
    "1_000",
    "a: b",
]
TRAPS += [
    "",
    " x ",
    "# x",
    "- x",
    "[x]",
    "{x}",
    "*a",
    "&a",
    "!a",
    "=",
    "<<",
    "'",
    '"',
    "x\n",
    "\n\n",
    "\x85",
    "\u2028",
    "\t",
]
words = st.text(st.characters(codec="utf-8"), min_size=1).filter(lambda text: text.strip() and text != "null")
texts = st.sampled_from([trap for trap in TRAPS if trap.strip() and trap != "null"]) | words
reals = st.floats(0, 1e6)

loop_values = st.fixed_dictionaries(
    {"model_name_or_path": texts, "dataset": texts},
    optional={
        "model_revision": st.none() | texts,
        "torch_dtype": st.sampled_from(["float32", "bfloat16"]),
        "trust_remote_code": st.booleans(),
        "lora_target_modules": st.lists(texts) | texts.filter(lambda text: text[0] not in "[{"),
        "dataset_split": texts,
        "max_rows": st.none() | st.integers(1, 10**6),
        "prompt_template": texts.filter(lambda text: "{prompt}" not in text).map(lambda text: text + "{prompt}" + text),
        "top_p": st.floats(1e-9, 1),
        "temperature": reals,
        "seed": st.integers(0, 2**32 - 1),
        "iterations": st.integers(1, 9),
        "output_dir": texts,
    },
)
training_values = st.fixed_dictionaries(
    {},
    optional={
        "method": st.sampled_from(["tspin", "spin", "sft"]),
        "alpha": reals | st.lists(reals, min_size=1),
        "learning_rate": reals | st.lists(reals, min_size=1),
        "fused": st.sampled_from(["on", "off", "auto"]),
        "memory_budget": st.none() | st.integers(1, 2**40),
        "spin_mix_previous": st.booleans() | st.lists(st.booleans(), min_size=1),
        "max_length": st.integers(2, 9999),
        "report_to": st.lists(words),
        "lr_scheduler_kwargs": st.dictionaries(words, reals | words | st.booleans()),
    },
)


@settings(deadline=None)
@given(loop_values, training_values)
def test_saved_config_reads_back_equal(tmp_path_factory, loop, training):
    config = SelfPlayConfig(**loop, training=training)
    path = tmp_path_factory.getbasetemp() / "config.yaml"
    config.save(path)
    again = SelfPlayConfig.from_file(path)
    assert again == config
    assert config.diff(again) == []
    assert SelfPlayConfig.from_dict(config.to_dict()) == config
    assert {key: config.to_dict()[key] for key in loop} == loop
    assert config.training == training
    assert list(config.to_dict()) == [*loop_fields(), *sorted(training)]


@settings(deadline=None)
@given(loop_values, training_values)
def test_saved_text_means_the_same_to_any_yaml_1_1_reader_but_for_numbers_as_text(tmp_path_factory, loop, training):
    config = SelfPlayConfig(**loop, training=training)
    path = tmp_path_factory.getbasetemp() / "config.yaml"
    config.save(path)
    assert yaml.safe_load(path.read_bytes()) == config.to_dict()


@settings(deadline=None)
@given(loop_values.map(lambda values: {key: v for key, v in values.items() if not isinstance(v, list)}))
def test_overrides_as_words_equal_values(loop):
    one_word = [f"--{key}={'null' if value is None else value}" for key, value in loop.items()]
    assert SelfPlayConfig.from_file(None, one_word) == SelfPlayConfig.from_dict(loop)
    if not any(str(value).startswith("--") for value in loop.values()):
        two = [
            word for key, v in loop.items() for word in (f"--{key.replace('_', '-')}", "null" if v is None else str(v))
        ]
        assert SelfPlayConfig.from_file(None, two) == SelfPlayConfig.from_dict(loop)


@settings(deadline=None)
@given(st.lists(reals, min_size=1), st.integers(0, 12))
def test_a_list_gives_each_iteration_its_entry_and_the_last_one_ever_after(values, t):
    config = make(learning_rate=values, alpha=0.5, report_to=["none"])
    expected = values[t] if t < len(values) else values[-1]
    assert config.training_at(t) == {"learning_rate": expected, "alpha": 0.5, "report_to": ["none"]}
    assert make(learning_rate=str(values)).training == {"learning_rate": values}


@settings(deadline=None)
@given(loop_values, loop_values)
def test_diff_names_exactly_the_keys_that_differ_and_flips_with_its_sides(ours, theirs):
    ours, theirs = SelfPlayConfig.from_dict(ours), SelfPlayConfig.from_dict(theirs)
    keys = [k for k in loop_fields() if k != "output_dir" and getattr(ours, k) != getattr(theirs, k)]
    assert [key for key, _, _ in ours.diff(theirs)] == keys
    assert [(key, b, a) for key, a, b in ours.diff(theirs)] == theirs.diff(ours)


def test_diff_takes_a_training_key_left_out_as_its_default():
    assert make(beta=0.1).diff(make()) == []
    assert make(beta=0.2).diff(make()) == [("beta", 0.2, 0.1)]
    assert make(allow_config_change=True, output_dir="elsewhere").diff(make()) == []
    assert make(max_length=7).training_value("max_length") == 7
    assert make().training_value("max_length") == TSPINConfig.max_length


@settings(deadline=None, max_examples=300)
@given(
    st.binary()
    | st.text(string.printable).map(str.encode)
    | st.sampled_from(TRAPS).map(lambda t: f"seed: {t}".encode())
)
def test_any_file_is_a_config_or_a_value_error(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "fuzz.yaml"
    path.write_bytes(content)
    try:
        values = read_values(path, BASE)
    except ValueError:
        return
    assert values.keys() >= BASE.keys()
    try:
        SelfPlayConfig.from_dict(values)
    except ValueError as error:
        assert str(error)


@pytest.mark.parametrize(
    "text",
    [
        "!!python/object/apply:os.system [true]",
        "a: &x [1]\nb: *x",
        "a: 1\na: 2",
        "a: !!int 5",
        "[" * 5000,
        "[a, b]",
        "? [x]\n: 1",
    ],
)
def test_what_is_no_flat_yaml_is_refused(tmp_path, text):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=str(path)):
        read_values(path)


@pytest.mark.parametrize(
    "key, given, wanted",
    [
        ("learning_rate", "5e-7", 5e-7),
        ("learning_rate", 1, 1.0),
        ("iterations", "3", 3),
        ("iterations", 3.0, 3),
        ("seed", "1e3", 1000),
        ("max_rows", "null", None),
        ("answer_pattern", "null", None),
        ("answer_pattern", "none", "none"),
        ("eval_sampled", "off", False),
        ("eval_sampled", "Yes", True),
        ("lora_target_modules", "[q_proj, v_proj]", ["q_proj", "v_proj"]),
        ("prompt_template", "[INST] {prompt} [/INST]", "[INST] {prompt} [/INST]"),
        ("lr_scheduler_type", "[linear, cosine]", ["linear", "cosine"]),
        ("lr_scheduler_kwargs", "{min_lr: 1e-8}", {"min_lr": 1e-8}),
        ("report_to", "none", "none"),
        ("memory_budget", 1e9, 10**9),
    ],
)
def test_values_are_read_by_the_type_of_their_field(key, given, wanted):
    read = make(**{key: given}).to_dict()[key]
    assert read == wanted
    assert type(read) is type(wanted)


def test_yaml_numbers_without_a_dot_and_words_that_1_1_takes_for_booleans(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("model_name_or_path: 0123\ndataset: on\nlearning_rate: 5e-7\nfused: off\nseed: 12\n")
    config = SelfPlayConfig.from_file(path, ["--trust_remote_code", "--seed", "1", "--seed=2"])
    assert (config.model_name_or_path, config.dataset, config.seed) == ("0123", "on", 2)
    assert config.training == {"learning_rate": 5e-7, "fused": "off"}
    assert config.trust_remote_code is True


@pytest.mark.parametrize(
    "values, pieces",
    [
        ({"learning_rat": 1}, ["learning_rat", "did you mean learning_rate"]),
        ({"iteration": 1}, ["iteration", "did you mean iterations"]),
        ({"xyzzy": 1}, ["xyzzy", "--help"]),
        ({"training": {}}, ["unknown key 'training'"]),
        ({"iterations": "many"}, ["iterations", "want int", "'many'"]),
        ({"iterations": True}, ["iterations", "want int", "True"]),
        ({"iterations": 2.5}, ["iterations", "2.5"]),
        ({"iterations": 0}, ["iterations", "1 or more", "0"]),
        ({"iterations": [1, 2]}, ["iterations", "want int"]),
        ({"learning_rate": float("nan")}, ["learning_rate", "nan"]),
        ({"learning_rate": []}, ["learning_rate", "one value or more"]),
        ({"learning_rate": ["x"]}, ["learning_rate", "'x'"]),
        ({"max_length": [1, 2]}, ["max_length", "one value"]),
        ({"model_revision": 1234}, ["model_revision", "1234", "quotes"]),
        ({"dataset": ""}, ["dataset", "not empty"]),
        ({"dataset": "\ud800"}, ["dataset"]),
        ({"method": "dpo"}, ["method", "tspin or", "'dpo'"]),
        ({"overlong": "keep"}, ["overlong", "drop or cut or error"]),
        ({"temperature": -1}, ["temperature", "-1"]),
        ({"top_p": 0}, ["top_p", "more than 0"]),
        ({"seed": -1}, ["seed"]),
        ({"prompt_template": "no place"}, ["prompt_template", "{prompt}"]),
        ({"prompt_template": "{prompt}{prompt}"}, ["prompt_template", "once"]),
        ({"prompt_column": "question"}, ["prompt_column", "response_column"]),
        ({"answer_pattern": "("}, ["answer_pattern", "regular expression"]),
        ({"hub_token": "secret"}, ["hub_token", "may not be set"]),
        *(
            ({key: 1}, [key, "may not be set"])
            for key in ("data_seed", "run_name", "resume_from_checkpoint", "do_train", "eval_on_start")
        ),
    ],
)
def test_errors_name_the_key_and_what_was_wanted(values, pieces):
    with pytest.raises(ValueError) as caught:
        make(**values)
    assert all(piece in str(caught.value) for piece in pieces), caught.value


def test_required_keys_and_missing_files(tmp_path):
    with pytest.raises(ValueError, match="dataset is required"):
        SelfPlayConfig.from_dict({"model_name_or_path": "m"})
    with pytest.raises(FileNotFoundError, match=r"absent\.yaml"):
        SelfPlayConfig.from_file(tmp_path / "absent.yaml")


@pytest.mark.parametrize("words", [["seed"], ["seed", "1"], ["--seed", "1", "2"], ["--"], ["-s", "1"]])
def test_words_that_form_no_override_are_refused(words):
    with pytest.raises(ValueError, match="--key value"):
        read_values(None, words)


def test_loop_and_trainer_share_no_other_keys_than_the_two_the_loop_passes_on():
    trainer = {f.name for f in dataclasses.fields(TSPINConfig)}
    assert trainer & loop_fields().keys() == {"output_dir", "seed"}
    assert not training_fields().keys() & loop_fields().keys()
    assert "learning_rate" in training_fields() and "hub_token" not in training_fields()
