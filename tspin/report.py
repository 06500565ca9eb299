"""What runs show a person: tables of iterations and of methods, and the report that holds them with pictures and samples.

Made from the files the loop writes and nothing else, so it works on an unfinished run and needs neither model nor data. What the
tables say is in tspin.tables, the pictures are tspin.figures, the page is tspin.report_html; this file is what others call.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.console import Group as Together
from rich.markup import escape
from rich.table import Table

from tspin import storage
from tspin.comparison import Group, group_runs
from tspin.run_files import Run
from tspin.tables import Quantity, asked_of, comparison_cells, iteration_cells, score_of, scores_of, settings_cells


def iteration_table(run_dir: str | Path, width: int = 80) -> Together:
    """The table shown after each iteration: scores of the policy it ended with, training means on the way.

    Columns that `width` characters have no room for, and single benchmarks, stand in further tables below it.
    """
    (group,) = group_runs([run_dir])
    tables = []
    for headers, rows in (part for cells in iteration_cells(group) for part in cells.split(width)):
        title = None if tables else f"{Path(run_dir).name}: log-probs in nats per response"
        tables.append(table := Table(title=title, box=box.SIMPLE, padding=(0, 1, 0, 0)))
        table.add_column("iter.", no_wrap=True)
        for header in headers[1:]:
            table.add_column(header.replace(" ", "\n"), justify="right", no_wrap=True)
        for row in rows:
            table.add_row(*row)
    return Together(*tables)


def comparison_table(runs: Sequence[str | Path], key: str | None = None) -> Table:
    """Methods by iterations: a row for each group of runs that differ in their seed alone, in the order in which they came.

    Args:
        runs: run directories, finished or not.
        key: of eval.json; default: the first of `scores_of`.
    Returns:
        Columns: n seeds; for each iteration the mean over seeds and the standard deviation; at the last iteration that all groups
        have reached, the mean of the differences from the first group, seed by seed, with its 95 % confidence interval.
    Raises:
        ValueError: a directory holds no run, or two runs are the same sample.
    """
    groups = group_runs(runs)
    return _comparison_table(groups, score_of(groups, key))


def comparison_tables(runs: Sequence[str | Path]) -> list[Table]:
    """`comparison_table` of every score that the runs were asked for: exact match where an answer_pattern says what the answer is,
    accuracy, and benchmarks with their average. Where they were asked for none of these, of the first score that they hold. Last
    comes a table of the keys in which the groups differ."""
    groups = group_runs(runs)
    tables = [*(_comparison_table(groups, score) for score in asked_of(groups)), _settings_table(groups)]
    return [table for table in tables if table.row_count]


def _settings_table(groups: Sequence[Group]) -> Table:
    headers, rows = settings_cells(groups)
    table = Table(*map(escape, headers), title="what differs", box=box.SIMPLE, padding=(0, 1, 0, 0))
    for row in rows:
        table.add_row(*map(escape, row))
    return table


def _comparison_table(groups: Sequence[Group], score: Quantity) -> Table:
    headers, rows = comparison_cells(groups, score.key)
    table = Table(title=score.title, box=box.SIMPLE, padding=(0, 1, 0, 0), show_lines=True)
    for header in headers:
        is_number = header not in ("run",)
        table.add_column(header.replace(" (", "\n("), justify="right" if is_number else "left")
    for row in rows:
        table.add_row(escape(row[0]), *(cell.replace(" ±", "\n±").replace(" [", "\n[") for cell in row[1:]))
    return table


def comparison_markdown(runs: Sequence[str | Path], key: str | None = None) -> str:
    """`comparison_table` in markdown."""
    groups = group_runs(runs)
    return comparison_cells(groups, score_of(groups, key).key).markdown()


def write_report(
    runs: str | Path | Sequence[str | Path], folder: str | Path | None = None, note: str | None = None
) -> Path:
    """Write `report.html`, which needs no other file and no network, its pictures as PNGs beside it, and `table.md`.

    Args:
        runs: a run directory, finished or not, or several, which are compared.
        folder: default `<run>/report` for one run, `tspin-report` in the working directory for several.
        note: a sentence for the head of the page.
    Returns:
        The path of report.html. The same files give the same bytes.
    Raises:
        ValueError: a directory holds no run, a file is damaged, or two runs are the same sample.
    """
    from tspin.figures import draw
    from tspin.report_html import render

    directories = [Path(runs)] if isinstance(runs, (str, Path)) else [Path(run) for run in runs]
    if not directories:
        raise ValueError("runs: want at least one run directory, got none")
    groups = group_runs([Run.read(directory) for directory in directories])
    default = directories[0] / "report" if len(directories) == 1 else Path("tspin-report")
    folder = default if folder is None else Path(folder)
    pictures = draw(groups)
    for name, picture in pictures.items():
        storage.write_atomic(folder / f"{name}.png", picture.png)
    storage.write_atomic(folder / "table.md", _markdown(groups).encode("utf-8", "backslashreplace"))
    path = folder / "report.html"
    storage.write_atomic(path, render(groups, pictures, note).encode("utf-8", "backslashreplace"))
    return path


def _markdown(groups: Sequence[Group]) -> str:
    if len(groups) == 1 and len(groups[0].runs) == 1:
        return "\n".join(cells.markdown() for cells in iteration_cells(groups[0]))
    tables = [(score.title, comparison_cells(groups, score.key)) for score in scores_of(groups)]
    tables.append(("what differs", settings_cells(groups)))
    return "\n".join(f"{title}\n\n{cells.markdown()}" for title, cells in tables if cells.rows)
