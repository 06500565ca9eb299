"""Rows, template, token ids, triplets and batches: round trips, counts, fuzzed files, and errors that name the row."""

import json
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from tspin.collator import TripletCollator
from tspin.config import SelfPlayConfig
from tspin.data import (
    MEMBERS,
    BadRow,
    DataReport,
    Encoder,
    Example,
    build_triplets,
    exchange,
    fit,
    load_examples,
    read_rows,
    stop_token_ids,
    tokenize_triplets,
)
from tspin.generate import Generation

GSM8K = Path(__file__).resolve().parents[3] / "shared" / "data" / "gsm8k"
SPECIAL = ["<pad>", "<s>", "</s>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>"]
CHAT = (
    "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + '<|end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
quick = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
texts = st.text(st.characters(codec="utf-8"), min_size=1, max_size=20).filter(
    lambda text: text.strip() and not any(token in text for token in SPECIAL)
)


def make_tokenizer(*, bos: bool = False, eos: str | None = "</s>", chat: str | None = CHAT):
    """Bytes as tokens, so that every text has ids and every id a text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({name: i for i, name in enumerate([*SPECIAL, *alphabet])}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(SPECIAL)
    if bos:
        core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token=eos, pad_token="<pad>")
    tokenizer.chat_template = chat
    return tokenizer


TOKENIZER = make_tokenizer()
END = TOKENIZER.convert_tokens_to_ids("</s>")


def ids_of(text: str) -> list[int]:
    return TOKENIZER(text, add_special_tokens=False).input_ids


def rendered(prompt: str) -> str:
    return f"### Instruction: {prompt}\n\n### Response: "


def config_for(path, **values) -> SelfPlayConfig:
    return SelfPlayConfig.from_dict({"model_name_or_path": str(Path(path).parent), "dataset": str(path), **values})


def write_jsonl(path: Path, records) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def layouts(prompt: str, response: str) -> list[dict]:
    user, assistant = {"role": "user", "content": prompt}, {"role": "assistant", "content": response}
    return [
        {"prompt": prompt, "response": response},
        {"prompt": prompt, "completion": response, "rejected": "r"},
        {"prompt": prompt, "chosen": response, "rejected": "r"},
        {"prompt": [user], "chosen": [assistant], "rejected": [assistant]},
        {"prompt": prompt, "chosen": [user, assistant]},
        {"chosen": [user, assistant], "rejected": [user, assistant]},
        {"messages": [user, assistant]},
        {"messages": [user, assistant, user], "prompt": "another"},
        {"real": [user, assistant], "generated": [user, {"role": "assistant", "content": "g"}]},
    ]


@quick
@given(texts, texts, st.booleans())
def test_every_layout_gives_the_same_example(tmp_path, prompt, response, bos):
    records = layouts(prompt, response)
    path = write_jsonl(tmp_path / "rows.jsonl", records)
    examples, report = load_examples(config_for(path), make_tokenizer(bos=bos))
    assert (report.total, report.kept, report.bad) == (len(records), len(records), 0)
    assert [e.row for e in examples] == list(range(len(records)))
    start = [1] if bos else []
    for example in examples:
        assert (example.prompt, example.response) == (rendered(prompt), response)
        assert example.prompt_ids == start + ids_of(rendered(prompt))
        assert example.response_ids == [*ids_of(response), END]
    mapped = write_jsonl(tmp_path / "mapped.jsonl", [{"question": prompt, "answer": response, "messages": 1}])
    again, _ = load_examples(config_for(mapped, prompt_column="question", response_column="answer"), TOKENIZER)
    assert again[0].response_ids == examples[0].response_ids


def test_the_first_round_of_a_conversation_ends_at_its_first_answer(tmp_path):
    def turns(*contents):
        return [{"role": role, "content": text} for role, text in zip(["user", "assistant"] * 2, contents)]

    records = [
        {"prompt": "q1", "prompt_id": "7", "messages": turns("q1", "a1", "q2", "a2")},
        {"messages": turns("q1", "a1")},
        {"chosen": turns("q1", "a1", "q2", "a2")},
    ]
    path = write_jsonl(tmp_path / "train_sft-0.jsonl", records)
    write_jsonl(tmp_path / "train_gen-0.jsonl", [{"messages": turns("x", "y")}])
    first, _ = load_examples(config_for(tmp_path, conversation_round="first", dataset_split="train_sft"), TOKENIZER)
    rendered = "### Instruction: q1\n\n### Response: "
    assert [(e.prompt, e.response) for e in first] == [(rendered, "a1")] * 3
    assert [e.response_ids for e in first] == [[*ids_of("a1"), END]] * 3
    last, report = load_examples(config_for(path, on_bad_row="skip"), TOKENIZER)
    assert [e.row for e in last] == [1] and report.bad == 2  # a plain template takes one user turn
    chat, _ = load_examples(
        config_for(path, prompt_template="chat", conversation_round="first"), make_tokenizer(eos="<|end|>")
    )
    assert chat[0].prompt == "<|user|>q1<|end|>\n<|assistant|>" and chat[0].response == "a1"


def test_choices_are_the_other_answers_of_a_held_out_row(tmp_path):
    user, answer = {"role": "user", "content": "q"}, {"role": "assistant", "content": "b"}
    records = [
        {"prompt": "q", "response": "b", "all": ["a", "b", "c", "a"]},
        {"prompt": "q", "response": "b", "all": "a"},
        {"chosen": [user, answer], "all": [user, answer | {"content": "a"}]},
    ]
    path = write_jsonl(tmp_path / "test.jsonl", records)
    options = {"eval_dataset": str(path), "choices_column": "all"}
    held_out, _ = load_examples(config_for(path, **options), TOKENIZER, split="eval")
    assert [[text for text, _ in e.choices] for e in held_out] == [["a", "c"], ["a"], ["a"]]
    assert all(ids == [*ids_of(text), END] for e in held_out for text, ids in e.choices)
    train, _ = load_examples(config_for(path, **options), TOKENIZER)
    assert [e.choices for e in train] == [()] * 3
    for wrong in (None, [], ["a", 1], ["b"], 3, ["a", " "]):
        write_jsonl(path, [{"prompt": "q", "response": "b", "all": wrong}])
        with pytest.raises(BadRow, match="column 'all': want"):
            load_examples(config_for(path, **options), TOKENIZER, split="eval")
    with pytest.raises(
        BadRow, match=r"column 'nope' is missing; got columns \['all', .*; name another --choices_column"
    ):
        load_examples(config_for(path, **options | {"choices_column": "nope"}), TOKENIZER, split="eval")


@quick
@given(st.lists(texts, min_size=2, max_size=4), st.booleans())
def test_chat_is_rendered_by_the_template_and_cut_at_its_end_token(tmp_path, contents, bos):
    roles = ["user", "assistant"] * 2
    turns = [{"role": role, "content": text} for role, text in zip(roles, contents)]
    turns = turns[: len(turns) - len(turns) % 2]
    tokenizer = make_tokenizer(eos="<|end|>", bos=bos)
    encode = Encoder(tokenizer, "chat", stop_token_ids(tokenizer))
    prompt, prompt_ids, response_ids = encode(*exchange({"messages": turns}))
    assert prompt == "".join(f"<|{t['role']}|>{t['content']}<|end|>\n" for t in turns[:-1]) + "<|assistant|>"
    assert prompt_ids == ids_of(prompt)
    assert response_ids == [*ids_of(turns[-1]["content"]), 6]


def test_end_tokens_of_the_model_count_and_a_template_without_any_is_refused(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "p", "response": "r"}])
    with pytest.raises(ValueError, match=r"line 1: want an end token, one of \['</s>'\].*<\|end\|>.*eos_token"):
        load_examples(config_for(path, prompt_template="chat"), TOKENIZER)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 6]}')
    config = config_for(path, prompt_template="chat", model_name_or_path=str(tmp_path))
    assert load_examples(config, TOKENIZER)[0][0].response_ids == [*ids_of("r"), 6]
    with pytest.raises(ValueError, match="no chat template"):
        load_examples(config, make_tokenizer(chat=None))
    with pytest.raises(ValueError, match=r"end token.*eos_token"):
        stop_token_ids(make_tokenizer(eos=None))


@pytest.mark.parametrize(
    "chat, message",
    [
        ("{{ raise_exception('alternate!') }}", "refuses the row.*alternate!"),
        ("{{ messages[0].content + 1 }}", r"fails on the row \(TypeError: .*repair the template or drop the row"),
        ("{% if add_generation_prompt %}x{% endif %}{{ messages[-1].content }}<|end|>", "begin the whole"),
    ],
)
def test_a_chat_template_that_refuses_a_row_makes_it_bad(chat, message):
    tokenizer = make_tokenizer(eos="<|end|>", chat=chat)
    with pytest.raises(BadRow, match=message):
        Encoder(tokenizer, "chat", [6])(*exchange({"prompt": "p", "response": "r"}))


def test_several_turns_need_the_chat_template():
    turn = lambda role: {"role": role, "content": role}
    with pytest.raises(BadRow, match=r"got user, assistant, user; set --prompt_template chat"):
        Encoder(TOKENIZER, "{prompt}", [END])(*exchange({"messages": list(map(turn, ["user", "assistant"] * 2))}))


def test_an_end_token_written_in_a_response_is_not_doubled_and_nothing_may_follow_it():
    encode = Encoder(TOKENIZER, "{prompt}", [END])
    assert encode(*exchange({"prompt": "p", "response": "r</s>\n"}))[2] == [*ids_of("r"), END]
    for response in ("r</s>more", "</s>"):
        with pytest.raises(BadRow, match="end token"):
            encode(*exchange({"prompt": "p", "response": response}))


def test_start_token_in_the_template_is_not_doubled():
    assert Encoder(make_tokenizer(bos=True), "<s>{prompt}", [END])(*exchange({"prompt": "p", "response": "r"}))[1] == [
        1,
        *ids_of("p"),
    ]


BAD = [
    ("{broken", "broken JSON"),
    ("[1]", "got list"),
    ("null", "got NoneType"),
    ("[" * 100_000, "broken JSON"),
    ('{"prompt": "p"}', "column 'response' is missing.*'prompt'"),
    ('{"response": "r"}', "column 'prompt' is missing"),
    ('{"prompt": null, "response": "r"}', "column 'prompt': want text .*, got null; fill it"),
    ('{"question": "q", "answer": "a"}', "missing.*--prompt_column"),
    ('{"prompt": "p", "response": "  "}', "column 'response'.*only spaces"),
    ('{"prompt": "", "response": "r"}', "column 'prompt'"),
    ('{"prompt": "p", "response": 5}', "column 'response'.*got int"),
    ('{"prompt": "p", "response": "\\ud800"}', "Unicode"),
    ('{"messages": []}', "assistant turn"),
    ('{"messages": [{"role": "user", "content": "p"}]}', "assistant turn"),
    ('{"messages": [{"role": "assistant", "content": "r"}]}', "user turn before"),
    ('{"messages": ["p", "r"]}', "role and content"),
    ('{"messages": [{"role": "user", "content": [1]}, {"role": "assistant", "content": "r"}]}', "user turn"),
    ('{"messages": [{"role": "system", "content": "s"}, {"role": "assistant", "content": "r"}]}', "system.*chat"),
    (json.dumps({"prompt": "p" * 90, "response": "r"}), "fill max_length 80.*raise max_length"),
    ('{"prompt": "p", "response": "r</s>x"}', "end token"),
]


@pytest.mark.parametrize("line, message", BAD)
def test_a_bad_row_names_file_line_column_and_remedy_or_is_counted(tmp_path, line, message):
    good = '{"prompt": "p", "response": "r"}'
    path = tmp_path / "rows.jsonl"
    path.write_text(f"{good}\n\n{line}\n{good}")
    with pytest.raises(ValueError, match=rf"rows\.jsonl, line 3: .*{message}.*--on_bad_row skip"):
        load_examples(config_for(path, max_length=80), TOKENIZER)
    examples, report = load_examples(config_for(path, max_length=80, on_bad_row="skip"), TOKENIZER)
    assert [e.row for e in examples] == [0, 2]
    assert report == DataReport(str(path), 3, 2, 1, 0, 0, report.first_bad)
    assert f"{path}: 2 of 3 rows; 1 bad and skipped, the first: {report.first_bad}" == str(report)
    assert "line 3" in report.first_bad
    path.write_text(line)
    with pytest.raises(ValueError, match=r"no row is left.*line 1"):
        load_examples(config_for(path, max_length=80, on_bad_row="skip"), TOKENIZER)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_another_encoding_is_named(tmp_path, encoding):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "p", "response": "r"}\n', encoding=encoding)
    config = config_for(path, on_bad_row="skip", eval_dataset=str(path))
    for split, key in (("train", "dataset"), ("eval", "eval_dataset")):
        with pytest.raises(ValueError, match=rf"^{key}: want UTF-8, got {encoding} in .*rows\.jsonl; convert it"):
            load_examples(config, TOKENIZER, split=split)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5) | st.sampled_from(["user", "assistant", "x"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["role", "content", "prompt", "messages", "real", "chosen", "response"]), inner
        )
    ),
    max_leaves=12,
)


@quick
@given(json_values, st.sampled_from([(None, None), ("prompt", "response"), (None, "chosen"), ("role", "content")]))
def test_any_json_value_is_an_exchange_or_a_bad_row(record, columns):
    try:
        encoded = Encoder(TOKENIZER, "{prompt}", [END])(*exchange(record, *columns))
    except BadRow as error:
        assert str(error)
        return
    assert encoded[1] and encoded[2][-1] == END and len(encoded[2]) > 1


@settings(quick, max_examples=200)
@given(st.data(), st.sampled_from([".jsonl", ".json", ".parquet"]))
def test_any_file_is_read_or_refused_with_a_value_error(tmp_path, data, suffix):
    path = tmp_path / f"rows{suffix}"
    rows = [{"prompt": "p", "response": f"r{i}"} for i in range(3)]
    if suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text(json.dumps(rows) if suffix == ".json" else "\n".join(map(json.dumps, rows)))
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(0, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))] if data.draw(st.booleans()) else content)
    try:
        examples, report = load_examples(config_for(path, on_bad_row="skip", max_length=200), TOKENIZER)
    except ValueError as error:
        assert str(path) in str(error)
        return
    assert report.total == len(examples) + report.bad + report.overlong_dropped


@quick
@given(st.lists(st.tuples(texts, texts), min_size=1, max_size=6), st.integers(40, 70), st.sampled_from(["drop", "cut"]))
def test_counts_add_up_and_no_prompt_is_ever_cut(tmp_path, pairs, max_length, overlong):
    path = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": p, "response": r} for p, r in pairs])
    config = config_for(path, max_length=max_length, overlong=overlong, on_bad_row="skip")
    whole = [(ids_of(f"### Instruction: {p}\n\n### Response: "), [*ids_of(r), END]) for p, r in pairs]
    fits = {i for i, (p, _) in enumerate(whole) if len(p) < max_length}
    long = {i for i in fits if sum(map(len, whole[i])) > max_length}
    wanted = fits - long if overlong == "drop" else fits
    if not wanted:
        with pytest.raises(ValueError, match="no row is left"):
            load_examples(config, TOKENIZER)
        return
    examples, report = load_examples(config, TOKENIZER)
    assert [e.row for e in examples] == sorted(wanted)
    dropped, cut = (len(long), 0) if overlong == "drop" else (0, len(long))
    assert (report.total, report.kept, report.bad) == (len(pairs), len(wanted), len(pairs) - len(fits))
    assert (report.overlong_dropped, report.overlong_cut) == (dropped, cut)
    for example in examples:
        prompt_ids, response_ids = whole[example.row]
        assert example.prompt_ids == prompt_ids
        assert example.response_ids == response_ids[: max_length - len(prompt_ids)]
        assert (example.response_ids[-1] == END) == (example.row not in long)
    if long:
        with pytest.raises(ValueError, match=rf"line \d+: want at most max_length {max_length}"):
            load_examples(config_for(path, max_length=max_length, overlong="error", on_bad_row="skip"), TOKENIZER)


def test_files_directories_splits_and_first_rows(tmp_path):
    rows = [{"prompt": f"p{i}", "response": "r"} for i in range(6)]
    write_jsonl(tmp_path / "train-00000-of-00002.jsonl", rows[:2])
    pq.write_table(pa.Table.from_pylist(rows[2:4]), tmp_path / "train-00001-of-00002.parquet")
    (tmp_path / "test.json").write_text(json.dumps(rows[4:5]))
    (tmp_path / "training.jsonl").write_text("not a file of the split")
    (tmp_path / "main").mkdir()
    write_jsonl(tmp_path / "main" / "a.jsonl", rows[5:])
    config = config_for(tmp_path, eval_dataset=str(tmp_path), max_rows=3)
    assert [e.prompt for e in load_examples(config, TOKENIZER)[0]] == [rendered(p) for p in ("p0", "p1", "p2")]
    assert [e.prompt for e in load_examples(config, TOKENIZER, split="eval")[0]] == [rendered("p4")]
    assert [e.prompt for e in load_examples(config_for(tmp_path, dataset_config="main"), TOKENIZER)[0]] == [
        rendered("p5")
    ]
    assert len(load_examples(config_for(tmp_path, dataset_config="absent"), TOKENIZER)[0]) == 4
    assert [where for where, _ in read_rows(str(tmp_path), None, "train")] == [
        *(f"{tmp_path}/train-00000-of-00002.jsonl, line {i}" for i in (1, 2)),
        *(f"{tmp_path}/train-00001-of-00002.parquet, row {i}" for i in (1, 2)),
    ]
    with pytest.raises(ValueError, match=r"validation\*.*got main|validation\*.*test\.json"):
        load_examples(config_for(tmp_path, dataset_split="validation"), TOKENIZER)
    with pytest.raises(ValueError, match="eval_dataset"):
        load_examples(config_for(tmp_path), TOKENIZER, split="eval")


@pytest.mark.parametrize("name", ["absent.jsonl", "./absent", "~absent/x", "/absent"])
def test_a_missing_path_is_named(name):
    with pytest.raises(FileNotFoundError, match="absent"):
        list(read_rows(name, None, "train"))


def test_held_out_rows_that_cannot_be_read_blame_their_own_key(tmp_path):
    there = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "q", "response": "b"}])
    for name in ("absent.jsonl", "rows.csv", "cut.json", "cut.parquet", "folder"):
        (tmp_path / "folder").mkdir(exist_ok=True)
        path = tmp_path / name
        if path.suffix and name != "absent.jsonl":
            path.write_text("[")
        for key in ("dataset", "eval_dataset"):
            config = config_for(there, **{"dataset": str(there), key: str(path)})
            with pytest.raises((FileNotFoundError, ValueError), match=f"^{key}: "):
                load_examples(config, TOKENIZER, split="train" if key == "dataset" else "eval")


@pytest.mark.parametrize(
    "kind", [pa.timestamp("s"), pa.timestamp("us", "Mars/Olympus"), pa.date32(), pa.duration("s")], ids=str
)
def test_values_that_python_cannot_hold_are_refused_only_in_columns_that_are_used(tmp_path, kind):
    width, path = (32 if kind == pa.date32() else 64), tmp_path / "rows.parquet"
    odd = pa.array([2**31 - 1 if width == 32 else 10**15] * 2, f"int{width}").view(kind)
    pq.write_table(pa.table({"prompt": ["p", "q"], "response": ["r", "s"], "made": odd}), path)
    examples, _ = load_examples(config_for(path), TOKENIZER)
    assert [(e.row, e.response) for e in examples] == [(0, "r"), (1, "s")]
    with pytest.raises(
        BadRow, match=r"row 1: column 'absent' is missing; got columns \['made', 'prompt', 'response'\]"
    ):
        load_examples(config_for(path, response_column="absent"), TOKENIZER)
    with pytest.raises(
        ValueError, match=r"^dataset: column 'made' of .*rows.parquet: want values that Python can hold"
    ):
        load_examples(config_for(path, response_column="made"), TOKENIZER)


def test_a_file_without_a_column_of_use_says_what_it_has(tmp_path):
    pq.write_table(pa.table({"question": ["p"], "solution": ["r"]}), tmp_path / "rows.parquet")
    with pytest.raises(BadRow, match=r"row 1: .* is missing; got columns \['question', 'solution'\]"):
        load_examples(config_for(tmp_path / "rows.parquet"), TOKENIZER)
    config = config_for(tmp_path / "rows.parquet", prompt_column="question", response_column="solution")
    assert load_examples(config, TOKENIZER)[0][0].response == "r"


def test_other_kinds_of_file_are_refused_and_a_byte_order_mark_is_not(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("a,b")
    with pytest.raises(ValueError, match=r"rows\.csv; convert it"):
        list(read_rows(str(path), None, "train"))
    for name in ("rows.jsonl", "rows.json"):
        text = '{"prompt": "p", "response": "r"}'
        (tmp_path / name).write_text(f"[{text}]" if name == "rows.json" else text, encoding="utf-8-sig")
        assert len(load_examples(config_for(tmp_path / name), TOKENIZER)[0]) == 1


def test_hub_rows_and_errors_name_the_data_set(monkeypatch):
    asked = []

    def load_dataset(*args, **kwargs):
        asked.append((args, kwargs))
        if args[0] == "no/such":
            raise RuntimeError("not there")
        return [{"question": "q", "answer": "a"}]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    columns = {"prompt_column": "question", "response_column": "answer"}
    config = config_for("some/data", dataset_config="main", dataset_split="train[:9]", **columns)
    assert load_examples(config, TOKENIZER)[0][0].response == "a"
    assert asked == [(("some/data", "main"), {"split": "train[:9]"})]
    with pytest.raises(ValueError, match="'no/such': not there"):
        load_examples(config_for("no/such"), TOKENIZER)


def test_gsm8k_is_read_whole():
    if not GSM8K.is_dir():
        pytest.skip(f"real data not found at {GSM8K}")
    columns = {"prompt_column": "question", "response_column": "answer", "dataset_config": "main", "max_length": 4096}
    config = config_for(GSM8K, eval_dataset=str(GSM8K), eval_rows=9, overlong="error", **columns)
    examples, report = load_examples(config, TOKENIZER)
    assert (report.total, report.kept) == (7473, 7473)
    source = json.loads((GSM8K / "train.jsonl").read_text().splitlines()[7472])
    assert (examples[-1].prompt, examples[-1].response) == (rendered(source["question"]), source["answer"])
    assert TOKENIZER.decode(examples[-1].response_ids) == source["answer"] + "</s>"
    assert len(load_examples(config, TOKENIZER, split="eval")[0]) == 9


@st.composite
def triplet_sources(draw):
    examples, synthetic, proto = [], {}, {}
    ids = st.lists(st.integers(0, 99), min_size=1, max_size=6)
    for row in draw(st.lists(st.integers(0, 50), unique=True, max_size=4)):
        examples.append(Example(row, "p", "r", draw(ids), draw(ids)))
        for source in (synthetic, proto):
            source[row] = Generation(draw(ids), draw(st.sampled_from(["stop", "length"])), f"text {row}")
    return examples, synthetic, proto


@quick
@given(triplet_sources(), st.integers(7, 12), st.sampled_from(["drop", "cut"]), st.booleans())
def test_triplets_hold_every_member_that_fits(sources, max_length, overlong, with_proto):
    examples, synthetic, proto = sources
    table = build_triplets(examples, synthetic, proto if with_proto else None, max_length=max_length, overlong=overlong)
    columns = [
        "row",
        "prompt",
        "chosen",
        "rejected",
        *["proto"] * with_proto,
        "prompt_ids",
        "chosen_ids",
        "rejected_ids",
    ]
    columns += [*["proto_ids"] * with_proto, "rejected_finish_reason", *["proto_finish_reason"] * with_proto]
    assert table.column_names == columns
    generated = {"rejected": synthetic} | ({"proto": proto} if with_proto else {})
    expected = []
    for e in examples:
        whole = {"chosen": e.response_ids} | {member: source[e.row].token_ids for member, source in generated.items()}
        room = max_length - len(e.prompt_ids)
        if overlong == "cut" or max(map(len, whole.values())) <= room:
            record = {"row": e.row, "prompt": "p", "chosen": "r", "prompt_ids": e.prompt_ids}
            record |= {f"{member}_ids": ids[:room] for member, ids in whole.items()}
            for member, source in generated.items():
                reason = source[e.row].finish_reason if len(whole[member]) <= room else "length"
                record |= {member: source[e.row].text, f"{member}_finish_reason": reason}
            expected.append(record)
    assert table.to_pylist() == expected
    too_long = any(
        max(len(e.response_ids), len(synthetic[e.row].token_ids)) > max_length - len(e.prompt_ids) for e in examples
    )
    if too_long:
        with pytest.raises(ValueError, match="max_length"):
            build_triplets(examples, synthetic, max_length=max_length, overlong="error")
    if examples:
        del synthetic[examples[0].row]
        with pytest.raises(ValueError, match=f"rejected: want a response for row {examples[0].row}"):
            build_triplets(examples, synthetic, max_length=max_length, overlong="cut")


@settings(quick, max_examples=20)
@given(texts, st.lists(texts, min_size=2, max_size=3))
def test_trl_rows_get_the_ids_that_the_reader_gives(prompt, responses):
    members = MEMBERS[: len(responses)]
    user = {"role": "user", "content": prompt}
    as_text = {"prompt": prompt, **dict(zip(members, responses))}
    turns = {m: [{"role": "assistant", "content": r}] for m, r in zip(members, responses)}
    chatty = make_tokenizer(eos="<|end|>")
    for record, tokenizer, template in (
        (as_text, TOKENIZER, None),
        (as_text, TOKENIZER, "Q: {prompt}"),
        ({"prompt": [user], **turns}, chatty, None),
        ({member: [user, *turn] for member, turn in turns.items()}, chatty, None),
    ):
        row = tokenize_triplets(datasets.Dataset.from_list([record]), tokenizer, template)[0]
        used = template or ("{prompt}" if tokenizer is TOKENIZER else "chat")
        encode = Encoder(tokenizer, used, stop_token_ids(tokenizer))
        for member, response in zip(members, responses):
            _, prompt_ids, response_ids = encode(*exchange({"prompt": prompt, "response": response}))
            assert (row["prompt_ids"], row[f"{member}_ids"]) == (prompt_ids, response_ids)
            assert row[f"{member}_finish_reason"] == "stop"


def test_trl_rows_that_do_not_fit_or_disagree():
    rows = datasets.Dataset.from_list([{"prompt": "p", "chosen": "c" * n, "rejected": "r"} for n in (1, 5)])
    assert tokenize_triplets(rows, TOKENIZER, max_length=4)["chosen"][:] == ["c"]
    cut = tokenize_triplets(rows, TOKENIZER, max_length=4, overlong="cut")[1]
    assert (cut["chosen_ids"], cut["chosen_finish_reason"]) == (ids_of("ccc"), "length")
    with pytest.raises(ValueError, match=r"row 1.*max_length 4"):
        tokenize_triplets(rows, TOKENIZER, max_length=4, overlong="error")
    with pytest.raises(ValueError, match="want columns prompt, chosen"):
        tokenize_triplets(rows.remove_columns("chosen"), TOKENIZER)
    turn = lambda role, text: {"role": role, "content": text}
    pair = {m: [turn("user", m), turn("assistant", "r")] for m in ("chosen", "rejected")}
    with pytest.raises(ValueError, match=r"row 0.*'rejected'.*prompt of 'chosen'"):
        tokenize_triplets(datasets.Dataset.from_list([pair]), make_tokenizer(eos="<|end|>"))


@st.composite
def features(draw):
    members = MEMBERS[: draw(st.integers(1, 3))]
    # Token 0 is the padding: real tokens are 1 and up, so that a reference to padding shows.
    ids = st.lists(st.integers(1, 9), min_size=1, max_size=5)
    rows = []
    for _ in range(draw(st.integers(1, 4))):
        row = {"prompt_ids": draw(ids)} | {f"{member}_ids": draw(ids) for member in MEMBERS}
        row["rejected_finish_reason"] = draw(st.sampled_from(["stop", "length"]))
        rows.append(row)
    return members, rows


@quick
@given(features())
def test_every_response_token_is_predicted_once_from_the_position_before_it(case):
    members, rows = case
    batch = TripletCollator(0, members)(rows)
    B, G = len(rows), len(members)
    R, T = batch["input_ids"].shape
    assert R == B * G and "labels" not in batch
    flat = batch["input_ids"].flatten()
    covered = []
    for n, (position, target, sequence) in enumerate(
        zip(*(batch[k].tolist() for k in ("rows", "targets", "sequence_ids")))
    ):
        assert position // T == sequence == (position + 1) // T, n
        assert flat[position] != 0 and flat[position + 1] == target
        covered.append(position + 1)
    wanted = []
    for b, row in enumerate(rows):
        for m, member in enumerate(members):
            whole = row["prompt_ids"] + row[f"{member}_ids"]
            start = (b * G + m) * T
            assert flat[start : start + T].tolist() == whole + [0] * (T - len(whole))
            assert batch["attention_mask"][b * G + m].tolist() == [1] * len(whole) + [0] * (T - len(whole))
            wanted += range(start + len(row["prompt_ids"]), start + len(whole))
            assert batch["lengths"][b, m] == len(row[f"{member}_ids"])
    assert covered == wanted
    assert batch["lengths"].shape == (B, G) and batch["lengths"].sum() == len(batch["rows"])
    has_rejected = "rejected" in members
    assert batch["identical"].tolist() == [has_rejected and r["chosen_ids"] == r["rejected_ids"] for r in rows]
    assert batch["truncated"].tolist() == [has_rejected and r["rejected_finish_reason"] == "length" for r in rows]
    for name, value in batch.items():
        assert value.dtype == (torch.bool if name in ("identical", "truncated") else torch.int64), name


def test_references_come_along_when_all_rows_have_them():
    row = (
        {"prompt_ids": [1]}
        | {f"{m}_ids": [2] for m in MEMBERS}
        | {f"ref_{m}_logps": -i - 0.5 for i, m in enumerate(MEMBERS)}
    )
    assert TripletCollator(0)([row, row])["ref_logps"].tolist() == [[-0.5, -1.5, -2.5]] * 2
    assert TripletCollator(0, ("chosen",))([row])["ref_logps"].dtype == torch.float32
    with pytest.raises(ValueError, match="ref_proto_logps"):
        TripletCollator(0)([row, {key: value for key, value in row.items() if key != "ref_proto_logps"}])


def test_features_and_members_that_cannot_be_stacked_are_refused():
    with pytest.raises(ValueError, match="members"):
        TripletCollator(0, ("rejected", "chosen"))
    for missing in ("prompt_ids", "rejected_ids"):
        row = {"prompt_ids": [1], "chosen_ids": [1], "rejected_ids": [1]}
        with pytest.raises(ValueError, match=f"no {missing}"):
            TripletCollator(0, MEMBERS[:2])([row | {missing: []}])
    with pytest.raises(BadRow, match="at least one token"):
        fit([], [1], 9, "drop")
