"""The page, its pictures and its tables come from the files of runs, finished or not, and hold nothing that they do not."""

import base64
import io
import itertools
import json
import math
import re
from html.parser import HTMLParser

import pyarrow as pa
import pytest
from matplotlib import rc_context
from matplotlib.figure import Figure
from rich.console import Console

from tspin import cli, figures, pair_figures, plotting, storage
from tspin.comparison import Estimate, group_runs
from tspin.harness import task_scores
from tspin.report import (
    comparison_markdown,
    comparison_table,
    comparison_tables,
    iteration_table,
    write_report,
)
from tspin.run_files import Run, iteration_folders, read_iterations
from tspin.tables import scores_of

VOID = {"meta", "img", "br", "hr", "link", "input"}


@pytest.fixture(autouse=True)
def _small_pictures(monkeypatch):
    monkeypatch.setitem(plotting.LOOK, "savefig.dpi", 30)


@pytest.fixture
def undrawn(monkeypatch):
    """The page without the time that its pictures take."""
    monkeypatch.setattr(figures, "draw", lambda groups: {})


def shard(directory, texts, finish="stop"):
    columns = {"row": list(range(len(texts))), "token_ids": [[1]] * len(texts), "finish_reason": [finish] * len(texts)}
    request = {"rows": len(texts), "shard_size": 8}
    storage.write_shard(directory, 0, pa.table(columns | {"text": texts}), request)


def pairs_of(t, rows=4, method="tspin"):
    """Rows 1 and up; in row 0, y' is y. The fresh pair of row 1 is the one out of order."""
    made = []
    for name in ("trained", "fresh"):
        for row in range(rows):
            real, synthetic = (
                -1.0 - row,
                (-1.0 if row == 0 else -0.5 if name == "fresh" and row == 1 else -3.0 - row - t),
            )
            made.append(
                {"set": name, "row": row, "identical": row == 0, "logps/chosen": real, "logps/rejected": synthetic}
                | {"logps/proto": -5.0 - t if name == "trained" else None}
                | {
                    "rewards/chosen": None if method == "sft" else real,
                    "rewards/rejected": None if method == "sft" else synthetic,
                }
            )
    schema = [("set", pa.string()), ("row", pa.int64()), ("identical", pa.bool_())]
    schema += [(name, pa.float64()) for name in list(made[0])[3:]]
    return pa.Table.from_pylist(made, schema=pa.schema(schema))


def log_of(t, steps=3):
    entries = []
    for step in range(1, steps + 1):
        entry = {
            "step": step,
            "epoch": step / steps,
            "loss": 0.5 + step,
            "logps/chosen": -2.0 - step,
            "logps/rejected": -4.0,
        }
        entry |= {"rewards/margins": step / 2, "weights/current": 0.25, "entropy/chosen": 0.5, "lengths/chosen": 3.0}
        entries.append(entry | ({"logps/proto": -5.0, "rewards/history_margins": 1.0} if t else {}))
    return entries


def writers(directory, *, prompt="1+1=", answer="#2", sampled="#3", **config):
    """What the loop writes, in its order, as functions to be called."""
    values = {
        "method": "tspin",
        "iterations": 2,
        "seed": 0,
        "answer_pattern": r"#(\d)",
        "num_train_epochs": 1.0,
        **config,
    }
    done = {}

    def stage(name, path):
        done[name] = {str(path.relative_to(directory)): f"hash of {name}"}
        storage.write_json(directory / "state.json", {"done": done})
        with open(directory / "timings.jsonl", "a") as file:
            file.write(json.dumps({"stage": name, "seconds": 2.0, "finished": True, "host_peak_gib": 1.5}) + "\n")

    def staged(name, path, write):
        return [lambda: write(path), lambda: stage(name, path)]

    def triplets(path):
        storage.write_parquet(path, pa.table({"row": range(4), "prompt": [prompt] * 4, "chosen": [answer] * 4}))

    def scores(t):
        return {"iteration": t, "exact_match": 0.125 * (t + 2) + 0.01 * values["seed"], "rows": 40} | (
            {"fresh_share": 0.25, "fresh_rows": 4} if t >= 0 else {}
        )

    record = {"processes": 1, "device": "cpu", "versions": {"tspin": "0.1.0"}, "data": {"rows": 4, "sha256": "d" * 64}}
    steps = [
        lambda: storage.write_json(directory / "run.json", record),
        lambda: storage.write_atomic(directory / "config.yaml", json.dumps(values).encode()),
        *staged("eval_initial", directory / "eval_initial.json", lambda path: storage.write_json(path, scores(-1))),
    ]
    for t in range(values["iterations"]):
        here = directory / f"iter_{t:02d}"
        lines = storage.json_lines(log_of(t))
        steps += staged(f"{here.name}/synthetic", here / "synthetic", lambda path: shard(path, [sampled] * 4))
        steps += staged(f"{here.name}/triplets", here / "triplets.parquet", triplets)
        # The log of a training under way ends in the middle of a line.
        steps.append(lambda here=here, lines=lines: storage.write_atomic(here / "metrics.jsonl", lines[:-20]))
        steps += staged(
            f"{here.name}/train",
            here / "metrics.jsonl",
            lambda path, lines=lines: storage.write_atomic(path, lines + b'{"train_runtime": 3}\n'),
        )
        table = pairs_of(t, method=values["method"])
        steps += staged(
            f"{here.name}/pairs", here / "pairs.parquet", lambda path, t=table: storage.write_parquet(path, t)
        )
        steps += staged(f"{here.name}/eval", here / "eval.json", lambda path, t=t: storage.write_json(path, scores(t)))
    return steps


def make_run(directory, **options):
    for write in writers(directory, **options):
        write()
    return directory


PAPER = ("GSM8K", "MATH", "MuSR", "MMLU", "MMLU-Pro", "GPQA", "HellaSwag", "WinoGrande", "BBH", "IFEval")


def make_evaluated(directory, scores, keeps=("iteration",), **config):
    """A run whose evaluations hold these scores, and of those of `make_run` the ones to keep."""
    make_run(directory, **config)
    for path in directory.glob("**/eval*.json"):
        own = storage.read_json(path)
        storage.write_json(path, {key: own[key] for key in keeps if key in own} | scores)
    return directory


def of_benchmarks(names=PAPER, lift=0.0):
    scores = {f"tasks/{name}": 0.101 * (i + 1) - 0.1 + lift for i, name in enumerate(names)}
    return scores | {"tasks/average": 0.456 + lift}


class Page(HTMLParser):
    """Elements with their attributes and texts; fails where tags do not balance."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.elements, self.texts, self.rows = [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        assert not self.open or self.open[-1] != "script"
        self.texts.append(data)
        if "td" in self.open or "th" in self.open:
            self.rows[-1][-1] += data

    def row(self, *start):
        found = [row for row in self.rows if [cell.strip() for cell in row[: len(start)]] == list(start)]
        assert found, (start, self.rows)
        return [cell.strip() for cell in found[0]]


def page_of(*args):
    path = write_report(*args)
    return Page(path.read_text(encoding="utf-8"))


def text_of(table, width=80):
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(table)
    return console.export_text()


def test_rows_join_evaluation_and_the_mean_of_the_training_log(tmp_path):
    first, second, _ = read_iterations(make_run(tmp_path / "run"))
    assert first["iteration"] == -1 and first["exact_match"] == 0.125 and first["log"] == []
    assert second["logps/chosen"] == -4.0 and second["loss"] == 2.5 and len(second["log"]) == 3
    assert "train_runtime" not in second


def test_table_has_a_row_an_iteration_and_only_columns_that_hold_something(tmp_path):
    text = text_of(iteration_table(make_run(tmp_path / "run", iterations=1)))
    assert [line.split()[:2] for line in text.splitlines() if "0." in line] == [["initial", "0.125"], ["0", "0.250"]]
    assert "exact" in text and "proto" not in text
    assert max(map(len, text.splitlines())) <= 80


CHAT = {"exact_match": 0.0, "accuracy": 0.625, "accuracy_norm": 0.75, "logprob": -9.5, "rows": 40}


def test_every_score_of_a_run_is_in_its_tables_and_pictures(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(figures, "finish", lambda figure, *_: drawn.append(figure) or plotting.finish(figure, [], ""))
    run = make_evaluated(tmp_path / "run", {**CHAT, **of_benchmarks()}, answer_pattern=None)
    page = page_of(run)
    head = page.row("iteration")
    assert head[1:6] == ["accuracy", "accuracy norm", "tasks average", "eval logp", "exact match"]
    assert page.row("initial")[1:6] == ["0.625", "0.750", "0.456", "-9.50", "0.000"]
    (single,) = (row for row in page.rows if row[1:] == [*PAPER])
    assert page.rows[page.rows.index(single) + 1][1:] == [f"{0.101 * (i + 1) - 0.1:.3f}" for i in range(10)]
    texts = (run / "report" / "table.md").read_text(), text_of(iteration_table(run))
    for name, value in {**CHAT, **of_benchmarks()}.items():
        held = f"{value:.2f}" if name == "logprob" else f"{value:.3f}"
        assert name == "rows" or all(held in text for text in texts), name
    assert "…" not in texts[1] and max(map(len, texts[1].splitlines())) <= 80
    titles = [axis._left_title for axis in drawn[0].axes]
    assert [title.get_text() for title in titles][-10:] == [f"Benchmark {name}" for name in PAPER]
    assert titles[0].get_text() == "Held-out accuracy, by log-likelihood" and len(titles) == 15
    drawn[0].draw_without_rendering()
    boxes = [title.get_window_extent() for title in titles]
    assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))
    assert max(box.x1 for box in boxes) <= drawn[0].bbox.x1


def test_a_run_with_benchmarks_alone_is_evaluated(tmp_path):
    run = make_evaluated(tmp_path / "run", of_benchmarks(["sums"]), iterations=1)
    page = page_of(run)
    assert "Nothing is evaluated yet." not in page.texts and (run / "report" / "scores.png").exists()
    assert any(text.startswith("Average over benchmarks: 0.456 (initial)") for text in page.texts)
    assert any("of benchmarks the harness's own." in text for text in page.texts)
    assert page.row("initial")[:2] == ["initial", "0.456"] and ["initial", "0.001"] in page.rows


def test_a_comparison_begins_with_what_its_runs_were_asked_for(tmp_path, undrawn):
    def titles(name, scores, **config):
        runs = [
            make_evaluated(tmp_path / name / m, scores, ("iteration", "fresh_share"), method=m, **config)
            for m in ("tspin", "spin")
        ]
        page = page_of(runs, tmp_path / name)
        headings = [text for text in page.texts if text.startswith(("Held-out", "Average", "Share of", "Benchmark"))]
        assert len(headings) == 2 * len({*scores, "fresh_share"} - {"rows"}), "scores and differences"
        assert len((tmp_path / name / "table.md").read_text().split("| run |")) == len(headings) // 2 + 1
        *scores, settings = [table.title for table in comparison_tables(runs)]
        assert settings == "what differs"
        return headings[0], scores

    first, shown = titles("chat", CHAT | of_benchmarks(["a", "b"]), answer_pattern=None)
    accuracy = ["held-out accuracy, by log-likelihood", "held-out accuracy, by log-likelihood over characters"]
    benchmarks = ["average over benchmarks", "benchmark a", "benchmark b"]
    assert first == "Held-out accuracy, by log-likelihood" and shown == accuracy + benchmarks
    first, shown = titles("sums", CHAT | of_benchmarks(["a", "b"]))
    assert first == "Held-out exact match, greedy"
    assert shown == ["held-out exact match, greedy", *accuracy, *benchmarks]
    free = {key: CHAT[key] for key in ("exact_match", "logprob")}
    first, shown = titles("free", free, answer_pattern=None)
    assert shown == ["held-out log-likelihood of the annotated response, nats"] and first.startswith("Held-out log-l")


def test_a_line_of_the_log_that_is_being_written_does_not_count_and_a_damaged_one_is_named(tmp_path, undrawn):
    run = make_run(tmp_path / "run", iterations=1)
    metrics = run / "iter_00" / "metrics.jsonl"
    lines = metrics.read_text().splitlines()
    metrics.write_text("\n".join([*lines[:2], lines[2][:-5]]))
    assert len(read_iterations(run)[1]["log"]) == 2
    metrics.write_text("\n".join([lines[0][:-5], *lines[1:]]))
    with pytest.raises(ValueError, match=r"metrics.jsonl, line 1 is damaged: .*; restore it, or delete the file"):
        write_report(run)


def test_a_report_can_be_made_after_every_file_that_the_loop_writes(tmp_path, monkeypatch):
    run, known, draw = tmp_path / "run", 0, figures.draw
    steps = writers(run, iterations=1)
    # How many pictures there are once this many files are written; they are drawn only there.
    pictures = {3: 1, 9: 2, 12: 4}
    for count, write in enumerate(steps, 1):
        write()
        if count == 1:  # run.json, which makes no run without config.yaml
            continue
        monkeypatch.setattr(figures, "draw", draw if count in pictures else lambda groups: {})
        page = page_of(run)
        assert any(text.startswith("Unfinished") for text in page.texts) == (count < len(steps))
        # What is written once stays in the page.
        shown = sum(
            any(part in text for text in page.texts) for part in ("0.1.0", "0.125", "π0", "#3", "-4.0", "0.333")
        )
        assert shown >= known
        known = shown
        assert count not in pictures or sum(tag == "img" for tag, _ in page.elements) == pictures[count]
    assert known == 6


def test_the_page_needs_nothing_but_itself_and_its_pictures_are_the_pngs(tmp_path):
    run = make_run(tmp_path / "run")
    page = page_of(run, tmp_path / "there")
    held = {path.name for path in (tmp_path / "there").iterdir()}
    assert held == {"report.html", "table.md", "scores.png", "dynamics.png", "rewards.png", "likelihoods.png"}
    text = (tmp_path / "there" / "report.html").read_text()
    links = [value for _, attributes in page.elements for name, value in attributes.items() if name in ("src", "href")]
    assert all(value.startswith(("data:image/png;base64,", "#")) for value in links)
    targets = {attributes["id"] for _, attributes in page.elements if "id" in attributes}
    assert {value[1:] for value in links if value.startswith("#")} <= targets
    for word in ("http:", "https:", "//", "url(", "@import", "<script", "<link"):
        assert word not in "".join(part for part in text.split('"') if not part.startswith("data:image")), word
    images = [attributes for tag, attributes in page.elements if tag == "img"]
    embedded = {base64.b64decode(attributes["src"].partition(",")[2]) for attributes in images}
    assert embedded == {path.read_bytes() for path in (tmp_path / "there").glob("*.png")}
    assert all(len(attributes["alt"]) > 40 for attributes in images)


def test_the_same_files_give_the_same_bytes(tmp_path):
    run = make_run(tmp_path / "run", iterations=1)
    for folder in ("one", "two"):
        write_report(run, tmp_path / folder)
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes(), path.name


EVIL = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)> {{ 7*7 }} &amp; \ud800"


@pytest.mark.parametrize("several", [False, True])
def test_what_comes_from_data_is_shown_and_not_obeyed(tmp_path, several):
    evil = EVIL.replace("\ud800", "")
    options = {"prompt": evil, "answer": evil + "#2", "sampled": evil + "#4", "prompt_template": evil, "iterations": 1}
    runs = [make_run(tmp_path / "run<b>", **options)]
    if several:
        runs.append(make_run(tmp_path / "other", **options, dataset=evil))
    page = page_of(runs, tmp_path / "out")
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"script", "b", "iframe"}
    assert not [name for _, attributes in page.elements for name in attributes if name.startswith("on")]
    assert len([tag for tag, _ in page.elements if tag == "img"]) == 4
    assert sum(text == evil for text in page.texts) >= 2 and evil + "#4" in page.texts
    assert (tmp_path / "out" / "table.md").read_text().count("\n") < 20


def test_the_page_bears_a_note_and_says_what_figure_3_leaves_out(tmp_path, undrawn):
    text = " ".join(page_of(make_run(tmp_path / "run", iterations=1), None, "<b> a note").texts)
    assert "<b> a note" in text and "leave out the outermost points" in " ".join(text.split())


def test_half_a_character_in_a_response_does_not_stop_the_page(tmp_path, undrawn):
    run = make_run(tmp_path / "run", iterations=1)
    (run / "config.yaml").write_text(json.dumps({"method": "tspin", "iterations": 1, "dataset": EVIL}))
    assert "\\ud800" in write_report(run).read_text(encoding="utf-8")


def test_the_numbers_of_the_page_are_those_of_the_files(tmp_path, undrawn):
    run = make_run(tmp_path / "run")
    page = page_of(run)
    header, rule, *rows = (run / "report" / "table.md").read_text().splitlines()
    assert len(rows) == 3 and header.count("|") == rule.count("|") == rows[0].count("|")
    for t, name in ((-1, "initial"), (0, "0"), (1, "1")):
        path = run / ("eval_initial.json" if t < 0 else f"iter_{t:02d}/eval.json")
        row = page.row(name)
        assert row[1] == f"{storage.read_json(path)['exact_match']:.3f}"
        assert [cell.strip() for cell in rows[t + 1].strip("|").split("|")] == row
        if t >= 0:
            assert row[page.row("iteration").index("logp real")] == "-4.0"
            # One of three pairs with y' other than y is out of order; for a reward that is the log-prob none is misaligned.
            assert page.row("tspin", str(t))[2:] == ["1.000", "0.000", "0.000", "0.333"]
            assert page.row(f"iteration {t}")[1:] == ["2.0 s", "2.0 s", "2.0 s", "2.0 s", "2.0 s", "10.0 s", "1.50"]
    assert page.row("iter_01/eval") == ["iter_01/eval", "iter_01/eval.json", "hash of iter_01/eval"]
    assert page.row("data, sha256")[1] == "d" * 64 and page.row("version of tspin")[1] == "0.1.0"


def test_samples_stand_side_by_side_and_are_judged(tmp_path, undrawn):
    run = make_run(tmp_path / "run", sampled="so #2")
    shard(run / "iter_01" / "synthetic", ["#2", "#7", "#2", "#2"], finish="length")
    shard(run / "proto", ["a #2", "b #9", "c", "d"])
    page = page_of(run)
    assert page.row("", "y0, proto") == ["", "y0, proto", "y' from π0", "y' from π1"]
    cells = [[" ".join(cell.split()) for cell in row] for row in page.rows if row[0].strip() == "response"]
    assert cells[0] == ["response", "a #2 stop, right", "so #2 stop, right", "#2 length, wrong"]
    assert cells[1][1] == "b #9 stop, wrong"


def test_a_torn_shard_of_samples_is_left_out(tmp_path):
    run = make_run(tmp_path / "run", iterations=1)
    (path,) = (run / "iter_00" / "synthetic").iterdir()
    path.write_bytes(path.read_bytes()[:100])
    assert "No triplets are built yet." in page_of(run).texts


@pytest.mark.parametrize(
    "alter",
    [
        lambda path: path.write_bytes(b"PAR1"),
        lambda path: path.write_bytes(path.read_bytes()[:-9]),
        lambda path: storage.write_parquet(path, pa.table({"row": [1, 2]})),
        lambda path: storage.write_parquet(path, pairs_of(0).drop_columns(["logps/proto"])),
        lambda path: storage.write_parquet(
            path, pairs_of(0).set_column(2, "identical", pa.array([None] * 8, pa.bool_()))
        ),
        lambda path: storage.write_parquet(path, pairs_of(0).set_column(3, "logps/chosen", pa.array(["x"] * 8))),
    ],
)
def test_damaged_pairs_are_named(tmp_path, alter):
    run = make_run(tmp_path / "run", iterations=1)
    alter(run / "iter_00" / "pairs.parquet")
    with pytest.raises(ValueError, match=r"pairs.parquet is damaged: want .*; restore it, or delete the file"):
        write_report(run)


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("iterations", "two", "iterations: want int, got 'two'"),
        ("seed", None, "seed: want int, got None"),
        ("max_steps", [3, "x"], "max_steps: want int, got 'x'"),
        ("answer_pattern", "(", "missing"),
    ],
)
def test_a_value_that_a_report_computes_with_is_checked(tmp_path, undrawn, key, value, message):
    run = make_run(tmp_path / "run", iterations=1)
    (run / "config.yaml").write_text(json.dumps({"method": "tspin", key: value}))
    with pytest.raises(ValueError, match=rf"config.yaml is damaged: {message}.*; restore it, or correct the line"):
        write_report(run)


def test_numbers_that_are_not_finite_stop_no_picture(tmp_path):
    run = make_run(tmp_path / "run", iterations=1)
    entries = [entry | {"loss": math.nan, "rewards/margins": math.inf} for entry in log_of(0)]
    (run / "iter_00" / "metrics.jsonl").write_bytes(storage.json_lines(entries))
    table = pairs_of(0).to_pylist()
    table[1]["logps/chosen"] = table[2]["rewards/rejected"] = -math.inf
    storage.write_parquet(run / "iter_00" / "pairs.parquet", pa.Table.from_pylist(table, schema=pairs_of(0).schema))
    assert sum(tag == "img" for tag, _ in page_of(run).elements) == 4


def test_several_runs_are_compared_by_method_with_spread_over_seeds(tmp_path):
    runs = [
        make_run(tmp_path / f"{method}-{seed}", method=method, seed=seed)
        for method in ("tspin", "spin", "sft")
        for seed in (0, 1, 2)
    ]
    # SPIN is better by 0.1, 0.2 and 0.3 at the last iteration.
    for seed in range(3):
        path = tmp_path / f"spin-{seed}" / "iter_01" / "eval.json"
        scores = storage.read_json(path)
        storage.write_json(path, scores | {"exact_match": scores["exact_match"] + 0.1 * (seed + 1)})
    (tmp_path / "sft-2" / "iter_01" / "eval.json").unlink()
    page = page_of(runs, tmp_path / "out")
    head, tspin, spin, sft = (
        page.row(name, *rest) for name, *rest in (["run", "seeds"], ["tspin", "3"], ["spin", "3"], ["sft", "3"])
    )
    assert head[2:] == ["initial", "0", "1", "less tspin at 1 (95 % interval)"]
    assert tspin[2:] == ["0.135 ± 0.010", "0.260 ± 0.010", "0.385 ± 0.010", ""]
    half = 4.302653 * 0.1 / math.sqrt(3)
    assert spin[-1] == f"+0.200 [{0.2 - half:+.3f}, {0.2 + half:+.3f}]"
    assert sft[-2:] == ["0.380 ± 0.007 (2 of 3)", "+0.000 [+0.000, +0.000]"]
    assert page.row("method") == ["method", "tspin", "spin", "sft"]
    labels = [row[0] for row in page.rows if row[0].endswith(", seed 0")]
    assert set(labels) == {"tspin, seed 0", "spin, seed 0", "sft, seed 0"}
    text = text_of(comparison_table(runs), width=100)
    assert "0.585" in text and "± 0.110" in text and f"[{0.2 - half:+.3f}" in text
    assert comparison_markdown(runs) in (tmp_path / "out" / "table.md").read_text()
    assert "| spin | 3 |" in comparison_markdown(runs)


def test_arms_go_by_their_names_and_what_differs_is_told(tmp_path, undrawn):
    arms = {
        "spin": {},
        "gentle": {"lam": 1.0, "sft_coef": 0.5, "spin_mix_previous": True},
        "brave": {"lam": 1.0, "sft_coef": 0.5, "logp_reduction": "mean"},
    }
    runs = [make_run(tmp_path / f"{name}_seed_0", **{"method": "spin", **keys}) for name, keys in arms.items()]
    page = page_of(runs, tmp_path / "out")
    settings = {row[0]: row[1:] for row in page.rows}
    assert "tspin: spin, gentle, brave" in page.texts and page.row("gentle", "1") and page.row("key")[1:] == [*arms]
    assert settings["sft_coef"] == ["0.0", "0.5", "0.5"] and settings["spin_mix_previous"] == ["false", "true", "false"]
    assert settings["lam"] == ["0.1", "1.0", "1.0"] and settings["logp_reduction"] == ["sum", "sum", "mean"]
    shown = text_of(comparison_tables(runs)[-1])
    for text in ((tmp_path / "out" / "table.md").read_text(), shown):
        assert all(word in text for word in ("what differs", "gentle", "brave", "sft_coef", "spin_mix_previous"))
    # Nothing to tell where nothing differs, and no markup in what is told.
    assert "what differs" not in [table.title for table in comparison_tables(runs[:1])]
    other = make_run(tmp_path / "other", answer_pattern="#([0-9])[/x]")
    assert "[/x]" in "".join(text_of(table, 200) for table in comparison_tables([runs[0], other]))


def test_a_name_that_pictures_cut_keeps_what_parts_it_and_the_page_tells_it(tmp_path, undrawn):
    reductions = ("sum", "mean")
    runs = [make_run(tmp_path / name, learning_rate=1e-5, logp_reduction=name, method="spin") for name in reductions]
    runs.append(make_run(tmp_path / "other", learning_rate=1e-6, method="spin"))
    labels = [f"learning_rate=1e-05, logp_reduction={name}" for name in reductions] + ["learning_rate=1e-06"]
    assert plotting.short_names(labels) == ["1e-05, sum", "1e-05, mean", "learning_rate=1e-06"]
    page = page_of(runs, tmp_path / "out")
    assert page.row("in the pictures") == ["in the pictures", "run"]
    assert page.row("1e-05, mean")[1] == labels[1] and not any(row[0] == labels[2] == row[1] for row in page.rows)


def test_names_too_long_for_their_values_alone_are_cut_where_they_part():
    start, end = "a name that is long from the start", "and goes on for long"
    names = plotting.short_names([f"{start}, {word}, {end}" for word in ("one", "two")] + ["short", "1e-6", "x" * 40])
    assert all(len(name) <= 28 for name in names) and names[2:4] == ["short", "1e-6"]
    assert "one" in names[0] and "two" in names[1] and names[4] == f"5: {'x' * 22}…"
    # Values alone that are those of another, or its whole name, would mislead.
    alike = [
        "learning_rate_of_the_first=1e-6",
        "learning_rate_of_another=1e-6",
        "learning_rate_of_the_third=3e-6",
        "3e-6",
    ]
    names = plotting.short_names(alike)
    assert len({*names}) == 4 and all(name[:2] == f"{i}:" for i, name in enumerate(names[:3], 1))


def test_characters_without_a_font_are_escaped_and_no_box_is_drawn(tmp_path, monkeypatch, recwarn):
    templates = ("问题:{prompt} 回答:", "質問:{prompt}", "\n\n{prompt} 😀")
    scores = of_benchmarks(["数学"])
    runs = [make_evaluated(tmp_path / str(i), scores, prompt_template=t) for i, t in enumerate(templates)]
    page = page_of(runs, tmp_path / "out")
    assert not [str(w.message) for w in recwarn if "Glyph" in str(w.message)]
    assert all(page.row(f"prompt_template={' '.join(t.split())}") for t in templates[:2])
    monkeypatch.setattr(plotting, "_FAMILIES", ["DejaVu Sans"])
    assert plotting.drawable("é π₀ … 请\n") == "é π₀ … \\u8bf7\\n"
    first, second = plotting.short_names(["请{prompt}", "问{prompt}"])
    assert (first, second) == ("\\u8bf7{prompt}", "\\u95ee{prompt}")


def test_the_last_of_five_iterations_is_on_the_page_and_long_names_wrap(tmp_path, undrawn):
    runs = [
        make_run(tmp_path / f"{method}-{seed}", method=method, seed=seed)
        for method in ("tspin", "spin")
        for seed in (0, 1)
    ]
    style, _, body = write_report(runs, tmp_path / "out").read_text().partition("</style>")
    assert re.search(r'<td>\+0.000<span class="line"> \[\+0.000, \+0.000\]</span></td>', body)
    sizes = [
        ("body", "max-width"),
        (r"\.samples td", "min-width"),
        (r"\.samples td", "padding-right"),
        ("tbody th", "min-width"),
    ]
    width, least, gap, label = (
        float(re.search(rf"{name} {{[^}}]*{key}: ([\d.]+)rem", style)[1]) for name, key in sizes
    )
    assert label + 7 * (least + gap) < width, "y0 and y' of pi_0 to pi_5"
    assert re.search(r"\nh1, [^}]*overflow-wrap: anywhere", style)


def test_the_command_writes_where_it_is_told(tmp_path, monkeypatch, capsys, undrawn):
    run = make_run(tmp_path / "run", iterations=1)
    other = make_run(tmp_path / "other", iterations=1, seed=1)
    monkeypatch.chdir(tmp_path)
    for words, path in (
        ([str(run)], run / "report" / "report.html"),
        ([str(run), str(other)], tmp_path / "tspin-report" / "report.html"),
        ([str(run), "--output_dir", "here"], tmp_path / "here" / "report.html"),
    ):
        assert cli.main(["report", *words]) == 0 and path.exists()
        assert path.parent.name in capsys.readouterr().out


@pytest.mark.parametrize(
    "name, content",
    [
        ("run.json", "7"),
        ("run.json", '{"versions": 7}'),
        ("state.json", "[]"),
        ("state.json", '{"done": 7}'),
    ],
)
def test_a_damaged_record_is_named(tmp_path, undrawn, name, content):
    (tmp_path / "config.yaml").write_text("model_name_or_path: m\ndataset: d\n")
    (tmp_path / "run.json").write_text("{}")
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=f"{name}.* is damaged: .*restore it, or delete the file"):
        write_report(tmp_path)


def test_iterations_are_folders_with_a_number_in_its_order(tmp_path):
    for name in ("iter_100", "iter_11", "iter_02", "iter_02.bak", "iter_x"):
        (tmp_path / name).mkdir()
    (tmp_path / "iter_3").write_text("")
    assert [(t, path.name) for t, path in iteration_folders(tmp_path)] == [
        (2, "iter_02"),
        (11, "iter_11"),
        (100, "iter_100"),
    ]


@pytest.mark.parametrize(
    "line", ["{", '{"stage": "pairs", "finished": true}', '{"stage": "pairs", "finished": true, "seconds": "7"}']
)
def test_damaged_timings_are_named_and_left_out(tmp_path, undrawn, caplog, line):
    (tmp_path / "config.yaml").write_text("model_name_or_path: m\ndataset: d\n")
    (tmp_path / "run.json").write_text("{}")
    (tmp_path / "timings.jsonl").write_text(line + "\n")
    assert write_report(tmp_path).exists()
    assert "timings.jsonl" in caplog.text and "is damaged" in caplog.text and "the report has no times" in caplog.text


def test_a_directory_without_a_run_is_refused(tmp_path, undrawn):
    with pytest.raises(ValueError, match=r"run: want a run directory, got .* no config.yaml"):
        write_report(tmp_path)
    (tmp_path / "config.yaml").write_text("output_dir: runs/tspin_seed_0")
    with pytest.raises(ValueError, match=r"which has no run.json; give the output_dir of `tspin run`"):
        write_report(tmp_path)
    for seed in (0, 1):
        make_run(tmp_path / "runs" / f"tspin_seed_{seed}", iterations=1, seed=seed)
    with pytest.raises(ValueError, match=r"no run.json; give the runs below it: .*runs/tspin_seed_0 .*tspin_seed_1$"):
        write_report(tmp_path)
    with pytest.raises(
        ValueError, match=r"no config.yaml; give the runs below it: .*runs/tspin_seed_0 .*tspin_seed_1$"
    ):
        write_report(tmp_path / "runs")
    with pytest.raises(ValueError, match="runs: want at least one run directory, got none"):
        write_report([])


def test_titles_of_five_iterations_of_several_methods_keep_off_each_other(tmp_path, monkeypatch):
    figures_drawn = []
    monkeypatch.setattr(pair_figures, "finish", lambda figure, labels, alt: figures_drawn.append(figure))
    methods = ("tspin", "tspin_no_history")
    runs = [make_run(tmp_path / method, method=method, iterations=5) for method in methods]
    with rc_context(plotting.LOOK):
        pair_figures.rewards(group_runs(runs))
    (figure,) = figures_drawn
    figure.draw_without_rendering()
    titles = [axis._left_title for axis in figure.axes if axis._left_title.get_text()]
    assert [title.get_text() for title in titles] == [
        f"{method}\n" * (t == 0) + f"iteration {t}" for method in methods for t in range(5)
    ]
    boxes = [title.get_window_extent() for title in titles]
    # A method's line lies above those of the iterations, whose lines keep off each other.
    lower = [box if i % 5 else box.from_extents(box.x0, box.y0, box.x0 + 1, box.y1) for i, box in enumerate(boxes)]
    assert not any(one.overlaps(other) for one, other in itertools.combinations(lower, 2))
    assert boxes[0].y0 == pytest.approx(boxes[1].y0, abs=3) and boxes[0].x1 < figure.bbox.x1


def test_many_groups_have_a_legend_and_points_that_stay_at_their_iterations(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(figures, "finish", lambda figure, labels, alt: drawn.append((figure, labels)))
    rows = [{"iteration": t, "exact_match": 0.5, "log": []} for t in (-1, 0)]
    runs = [Run(tmp_path / str(i), {"method": "tspin", "seed": 0, "alpha": 1.0 + i}, rows) for i in range(29)]
    for count in (plotting.CROWDED, 29):
        figures._scores(group_runs(runs[:count]))
    (_, few), (figure, many) = drawn
    assert [len(texts) for _, texts in few] == [plotting.CROWDED] and [len(texts) for _, texts in many] == [0]
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [f"alpha={1.0 + i}" for i in range(29)]
    xs = [x for line in figure.axes[0].lines for x in line.get_xdata()]
    assert all(abs(x - round(x)) < 0.25 for x in xs) and len({*map(str, map(plotting.style_of, range(48)))}) == 48
    figure.draw_without_rendering()
    assert figure.axes[0].get_window_extent().height > 150
    plotting.finish(figure, many, "")


def test_the_error_of_the_fresh_share_counts_the_pairs_that_it_counts(tmp_path):
    scores = {"fresh_share": 0.5, "fresh_identical": 0.75, "fresh_rows": 16, "exact_match": 0.5, "rows": 16}
    run = Run(tmp_path, {"method": "tspin"}, [{"iteration": 0, "log": [], **scores}])
    (group,) = group_runs([run])
    bar = lambda key: figures._bar(group, key, 0, Estimate.of([0.5]))
    assert bar("fresh_share") == pytest.approx(0.5 / math.sqrt(4)) and bar("exact_match") == pytest.approx(0.5 / 4)


def test_the_bar_of_one_seed_of_a_benchmark_is_the_error_that_the_harness_gives(tmp_path):
    result = {"benchmarks": [{"name": n, "score": 0.5, "stderr": e} for n, e in (("a", 0.03), ("b", 0.04))]}
    scores = task_scores(result | {"average": 0.5})
    unknown = {"name": "c", "score": 0.5, "stderr": None}
    unknown = task_scores({"benchmarks": [*result["benchmarks"], unknown], "average": 0.5})
    groups = [
        group_runs([Run(tmp_path, {"method": "tspin"}, [{"iteration": 0, "log": [], **found}])])[0]
        for found in (scores, unknown)
    ]
    bar = lambda key, group=groups[0]: figures._bar(group, key, 0, Estimate.of([0.5]))
    assert bar("tasks/a") == 0.03 and bar("tasks/average") == pytest.approx(0.025)
    assert bar("tasks/c", groups[1]) == bar("tasks/average", groups[1]) == 0.0
    assert [score.key for score in scores_of(groups)] == ["tasks/average", "tasks/a", "tasks/b", "tasks/c"]


def test_labels_at_the_ends_of_lines_do_not_overlap():
    figure = Figure(figsize=(6, 2), layout="constrained")
    axis = figure.subplots()
    axis.plot([0, 1], [0, 1])
    texts = [plotting.end_label(axis, y, f"line {y}", "#0072B2") for y in (0.5, 0.5, 0.51, 0.97, 0.98, 0.99, 1.0)]
    plotting.finish(figure, [(axis, texts)], "")
    boxes = sorted((text.get_window_extent() for text in texts), key=lambda box: box.y0)
    assert all(below.y1 <= above.y0 + 0.5 for below, above in itertools.pairwise(boxes))
    assert boxes[-1].y1 <= figure.bbox.y1 and boxes[-1].x1 <= figure.bbox.x1


@pytest.mark.parametrize("colour", [colour for *_, colour in plotting.ROLES] + list(plotting._GROUPS))
def test_text_has_the_contrast_that_wcag_asks_for(colour):
    red, green, blue = (x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in plotting.ink(colour))
    assert 1.05 / (0.2126 * red + 0.7152 * green + 0.0722 * blue + 0.05) >= 4.5
