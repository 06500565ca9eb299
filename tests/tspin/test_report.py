"""The table and the picture come from the files of a run, finished or not."""

import io
import json

import pytest
from rich.console import Console

from tspin.report import iteration_table, read_iterations, write_report


def _write_run(directory, iterations):
    directory.mkdir()
    (directory / "config.yaml").write_text("method: tspin\n")
    (directory / "eval_initial.json").write_text(json.dumps({"iteration": -1, "exact_match": 0.125}))
    for t in range(iterations):
        here = directory / f"iter_{t:02d}"
        here.mkdir()
        log = [{"step": s, "loss": 0.5 + s, "logps/chosen": -2.0 - s, "logps/rejected": -4.0} for s in (1, 2)]
        (here / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in [*log, {"train_runtime": 3}]))
        (here / "eval.json").write_text(json.dumps({"iteration": t, "exact_match": 0.5, "fresh_share": 0.25}))
    return directory


def _text(table):
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(table)
    return console.export_text()


def test_rows_join_evaluation_and_the_mean_of_the_training_log(tmp_path):
    first, second = read_iterations(_write_run(tmp_path / "run", 1))
    assert first["iteration"] == -1 and first["exact_match"] == 0.125 and first["log"] == []
    assert second["logps/chosen"] == -3.5 and second["loss"] == 2.0 and len(second["log"]) == 2
    assert "train_runtime" not in second


def test_table_has_a_row_an_iteration_and_only_columns_that_hold_something(tmp_path):
    text = _text(iteration_table(_write_run(tmp_path / "run", 2)))
    assert [line.split()[0] for line in text.splitlines() if line.split()[1:2] in (["0.125"], ["0.500"])] == [
        "initial",
        "0",
        "1",
    ]
    assert "exact" in text and "proto" not in text
    assert max(map(len, text.splitlines())) <= 80


def test_an_unfinished_iteration_shows_what_is_there(tmp_path):
    run = _write_run(tmp_path / "run", 2)
    (run / "iter_01" / "eval.json").unlink()
    last = read_iterations(run)[-1]
    assert "exact_match" not in last and last["loss"] == 2.0
    (run / "iter_01" / "metrics.jsonl").unlink()
    assert [row["iteration"] for row in read_iterations(run)] == [-1, 0]


def test_the_report_holds_a_picture_and_the_table(tmp_path):
    folder = write_report(_write_run(tmp_path / "run", 2))
    assert (folder / "report.png").read_bytes().startswith(b"\x89PNG")
    header, rule, *rows = (folder / "table.md").read_text().splitlines()
    assert len(rows) == 3 and header.count("|") == rule.count("|") == rows[0].count("|")


def test_a_directory_without_a_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"run: want a run directory, got .* no config.yaml"):
        write_report(tmp_path)
