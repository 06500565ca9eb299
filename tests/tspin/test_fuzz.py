"""Whatever bytes stand in a data file, a config or a run directory: a result, or an error that says what is wrong.

A fixed-seed sample in the ordinary suite; 10,000 examples under `pytest -m soak`. The errors allowed are those of the command
line (`tspin.check.USER_ERRORS`), which it tells in one line.
"""

import io
import json
import random
import shutil
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from test_data import TOKENIZER
from test_loop import make_toy, toy_config

from tspin import figures
from tspin.check import USER_ERRORS
from tspin.checkpoints import Checkpoints
from tspin.config import SelfPlayConfig, loop_fields, training_fields
from tspin.data import load_examples
from tspin.generate import read_generations
from tspin.loop import SelfPlay
from tspin.report import iteration_table, write_report

SAMPLE = {"reader": 60, "config": 100, "run": 25}
SOAK = {"reader": 5000, "config": 4000, "run": 1000}
QUIET = {"deadline": None, "database": None, "derandomize": False, "suppress_health_check": list(HealthCheck)}


def both(name, *strategies):
    """The test twice: a fixed-seed sample, and under soak the share of `name` in the 10,000."""

    def decorate(test):
        def run(count, request):
            told = Counter()
            check = lambda drawn: test(request, told, *drawn)
            seed(0)(settings(max_examples=count, **QUIET)(given(st.tuples(*strategies))(check)))()
            total = sum(told.values())
            print(f"\nfuzz {name}: {total} examples: {dict(told)}")
            # Of both kinds there are some, or the examples are of no use.
            assert total >= count and len(told) > 1

        def sample(request):
            run(SAMPLE[name], request)

        @pytest.mark.soak
        @pytest.mark.timeout(5400)
        def soak(request):
            run(SOAK[name], request)

        globals()[f"test_{test.__name__}"], globals()[f"test_{test.__name__}_soak"] = sample, soak
        return test

    return decorate


def told_as(told, work):
    """Count what `work` comes to; only errors of the user's may come out of it, and none of them without words."""
    try:
        work()
        told["read"] += 1
    except USER_ERRORS as error:
        told["refused"] += 1
        assert str(error).strip()


def mutated(content: bytes, draw: random.Random) -> bytes:
    """Bits flipped, blocks moved, cut, doubled, zeroed, or replaced by other bytes, some of which mean something to a parser."""
    data = bytearray(content)
    for _ in range(draw.randrange(1, 5)):
        at = draw.randrange(len(data) + 1)
        size = draw.choice([1, 1, 4, 64])
        kind = draw.randrange(6)
        if kind == 0 and at < len(data):
            data[at] ^= 1 << draw.randrange(8)
        elif kind == 1:
            del data[at : at + draw.choice([1, 8, len(data)])]
        elif kind == 2:
            data[at:at] = data[:size]
        elif kind == 3:
            data[at : at + size] = bytes(len(data[at : at + size]))
        elif kind == 4:
            data[at : at + size] = draw.randbytes(size)
        else:
            data[at:at] = draw.choice(
                [b"{", b"[", b'"', b"\n", b"null", b"-1", b"1e999", b"\xff\xfe", b"\\ud800", b"NaN", b": "]
            )
    return bytes(data)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
COLUMNS = ["prompt", "response", "chosen", "messages", "real", "role", "content", "x"]
records = st.lists(st.dictionaries(st.sampled_from(COLUMNS), json_values, max_size=4) | json_values, max_size=4)


# Arrow's types hold years, time zones and texts that Python's do not.
ARROW_TYPES = [*map(pa.timestamp, ("s", "ms", "ns")), pa.timestamp("us", "Mars/Olympus"), pa.timestamp("s", "+99:99")]
ARROW_TYPES += [pa.duration("s"), pa.date64(), pa.time64("ns"), pa.float64(), pa.uint64(), pa.binary(8)]
arrow_columns = st.tuples(
    st.sampled_from(COLUMNS), st.sampled_from(ARROW_TYPES), st.integers(-(2**53), 2**53), st.booleans()
)


def with_arrow_column(table, name, kind, number, nested):
    """The table with a column of the bits of `number` as another type, or of structs of it."""
    values = pa.array([number] * table.num_rows, pa.int64())
    values = pa.Array.from_buffers(kind, len(values), values.buffers())
    values = pa.StructArray.from_arrays([values], ["content"]) if nested else values
    return table.drop_columns([name] if name in table.column_names else []).append_column(name, values)


def rows_file(suffix, rows, arrow):
    """A file of the rows, or of good ones where the format cannot hold them; a parquet one has a column of `arrow` too."""
    if suffix == ".parquet":
        try:
            table = pa.Table.from_pylist([row for row in rows if isinstance(row, dict)])
            pq.write_table(table, io.BytesIO())
        except (pa.ArrowException, TypeError, ValueError, OverflowError):
            table = pa.table({"prompt": ["p"] * 3, "response": ["r"] * 3})
        buffer = io.BytesIO()
        pq.write_table(with_arrow_column(table, *arrow), buffer)
        return buffer.getvalue()
    return (json.dumps(rows) if suffix == ".json" else "\n".join(map(json.dumps, rows))).encode()


@both(
    "reader",
    st.sampled_from([".jsonl", ".json", ".parquet"]),
    records,
    arrow_columns,
    st.none() | st.integers(0, 2**32) | st.binary(max_size=200),
    st.sampled_from(["skip", "skip", "error"]),
)
def any_data_file_is_read_or_refused(request, told, suffix, rows, arrow, how, on_bad_row):
    path = request.config._tmp_path_factory.getbasetemp() / f"fuzz{suffix}"
    good = [{"prompt": "p", "response": f"r{i}"} for i in range(2)]
    content = rows_file(suffix, [*good, *rows], arrow)
    path.write_bytes(
        how if isinstance(how, bytes) else content if how is None else mutated(content, random.Random(how))
    )
    values = {"model_name_or_path": "m", "dataset": str(path), "on_bad_row": on_bad_row, "prompt_template": "{prompt}"}
    told_as(told, lambda: load_examples(SelfPlayConfig.from_dict(values), TOKENIZER))


keys = st.sampled_from([*loop_fields(), *training_fields(), "hub_token", "training", "learning_rat"]) | st.text(
    max_size=6
)


plausible = st.sampled_from(
    [1, 2.0, 0.5, True, "no", "1e-4", None, "none", [1e-4, 1e-5], "adamw_torch", "{prompt}", "x"]
)


@both(
    "config",
    st.dictionaries(keys, plausible | json_values, max_size=3),
    st.none() | st.integers(0, 2**32) | st.binary(max_size=200),
    st.lists(st.tuples(keys, st.text(max_size=10)), max_size=2),
)
def any_config_is_read_or_refused(request, told, values, how, words):
    path = request.config._tmp_path_factory.getbasetemp() / "fuzz.yaml"
    content = json.dumps({"model_name_or_path": "m", "dataset": "d", **values}, indent=1).encode()
    path.write_bytes(
        how if isinstance(how, bytes) else content if how is None else mutated(content, random.Random(how))
    )

    def work():
        config = SelfPlayConfig.from_file(path, [f"--{key}={value}" for key, value in words])
        config.training_at(0)
        config.save(path)
        assert SelfPlayConfig.from_file(path) == config

    told_as(told, work)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run, and the contents of its files."""
    root = tmp_path_factory.mktemp("fuzz")
    make_toy(root)
    config = toy_config(root, root / "run", max_rows=8, eval_rows=2, iterations=1, method="tspin_ref")
    SelfPlay(config).run()
    return config, {path: path.read_bytes() for path in (root / "run").rglob("*") if path.is_file()}


@both("run", st.integers(0, 2**32), st.sampled_from(["bytes", "json"]), st.integers(1, 3))
def any_run_directory_is_read_or_refused(request, told, number, how, files):
    config, contents = request.getfixturevalue("finished")
    directory, draw = Path(config.output_dir), random.Random(number)
    shutil.rmtree(directory)
    for path, content in contents.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    for path in draw.sample(sorted(contents), files):
        if how == "json" and path.suffix in (".json", ".jsonl"):
            text = contents[path].splitlines()[0] if path.suffix == ".jsonl" else contents[path]
            content = json.dumps(mutated_json(json.loads(text), draw)).encode()
        else:
            content = draw.choice([b"", draw.randbytes(20), *[mutated(contents[path], draw)] * 4])
        path.write_bytes(content)
    pictures, figures.draw = figures.draw, lambda groups: {}
    try:
        told_as(told, lambda: read_run(config, directory))
    finally:
        figures.draw = pictures


def read_run(config, directory):
    """All that a run, a report or a reader of samples does with a directory before anything is computed."""
    failure = None
    for work in (
        lambda: iteration_table(directory),
        lambda: write_report(directory),
        lambda: [read_generations(path.parent) for path in directory.rglob("shard-*")],
        lambda: [(Checkpoints(at).last(), Checkpoints(at).final()) for at in directory.glob("iter_*/checkpoints")],
        lambda: opened(config),
    ):
        try:
            work()
        except USER_ERRORS as error:
            failure = failure or error
            assert str(error).strip()
    if failure:
        raise failure


def opened(config):
    play = SelfPlay(config)
    play.autocast, play.is_main, play.rank, play.world = None, True, 0, 1
    play._open()
    play._survey()
    play.ledger.name_damage()


def mutated_json(value, draw):
    """Somewhere inside, another value."""
    if isinstance(value, (dict, list)) and value and draw.random() < 0.9:
        keys = list(value) if isinstance(value, dict) else range(len(value))
        key = draw.choice(list(keys))
        if draw.random() < 0.15:
            del value[key]
        else:
            value[key] = mutated_json(value[key], draw)
        return value
    return draw.choice([None, True, -1, 0, 10**30, 1.5, "", "x", [], {}, [1], {"a": None}, float("nan")])
