"""The tables of a report before they are drawn, so that a terminal, a markdown file and the page say the same in the same words."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from tspin.comparison import Estimate, Group, config_differences, last_common_iteration, paired_difference


class Quantity(NamedTuple):
    """A number of an iteration as tables and pictures show it: its key in `read_iterations`, the header of a column, its format,
    and its name above a table or a panel."""

    key: str
    header: str
    spec: str = ".3f"
    title: str = ""


# What methods are compared by, beside single benchmarks.
SCORES = (
    Quantity("exact_match", "exact match", title="held-out exact match, greedy"),
    Quantity("exact_match_sampled", "sampled match", title="held-out exact match, sampled at temperature 1"),
    Quantity("accuracy", "accuracy", title="held-out accuracy, by log-likelihood"),
    Quantity("accuracy_norm", "accuracy norm", title="held-out accuracy, by log-likelihood over characters"),
    Quantity("tasks/average", "tasks average", title="average over benchmarks"),
    Quantity("logprob", "eval logp", ".2f", "held-out log-likelihood of the annotated response, nats"),
    Quantity("fresh_share", "fresh y<y'", title="share of fresh pairs with logp(y) < logp(y')"),
)
# Means over the iteration's training log.
_TRAINING = (
    Quantity("logps/chosen", "logp real", ".1f"),
    Quantity("logps/rejected", "logp synth.", ".1f"),
    Quantity("logps/proto", "logp proto", ".1f"),
    Quantity("rewards/margins", "margin", ".1f"),
    Quantity("rewards/history_margins", "hist. margin", ".1f"),
)


class Cells(NamedTuple):
    """A table before it is drawn."""

    headers: list[str]
    rows: list[list[str]]

    def without_empty(self) -> Cells:
        """The table less its columns that are empty in every row."""
        return self._columns([i for i in range(len(self.headers)) if i == 0 or any(row[i] for row in self.rows)])

    def split(self, width: int) -> list[Cells]:
        """Tables that all begin with the first column and, headers broken at spaces and columns two apart, are at most `width`
        characters wide."""
        sizes = [
            2 + max(map(len, [*header.split(), *(row[i] for row in self.rows)]), default=0)
            for i, header in enumerate(self.headers)
        ]
        parts = [[0]]
        for i in range(1, len(sizes)):
            if len(parts[-1]) > 1 and sum(sizes[j] for j in parts[-1]) + sizes[i] > width:
                parts.append([0])
            parts[-1].append(i)
        return [self._columns(part) for part in parts]

    def _columns(self, kept: Sequence[int]) -> Cells:
        return Cells([self.headers[i] for i in kept], [[row[i] for i in kept] for row in self.rows])

    def markdown(self) -> str:
        lines = [self.headers, ["---"] * len(self.headers), *self.rows]
        cells = ([" ".join(cell.replace("|", "\\|").split()) for cell in line] for line in lines)
        return "".join("| " + " | ".join(line) + " |\n" for line in cells)


def iteration_cells(group: Group) -> list[Cells]:
    """Of a group's first run, a row an iteration and those columns that hold something: scores and means of the training log,
    and in a second table, where there are any, single benchmarks."""
    rows, scores = group.runs[0].rows, scores_of([group])
    singles = [score for score in scores if score not in SCORES]
    tables = []
    for columns in ([score for score in scores if score in SCORES] + [*_TRAINING], singles):
        shown = [column for column in columns if any(column.key in row for row in rows)]
        cells = [
            [iteration_name(row["iteration"]), *(format(row[c.key], c.spec) if c.key in row else "" for c in shown)]
            for row in rows
        ]
        tables.append(Cells(["iteration", *(column.header for column in shown)], cells))
    return tables if singles else tables[:1]


def iteration_name(t: int) -> str:
    return "initial" if t < 0 else str(t)


def scores_of(groups: Sequence[Group]) -> list[Quantity]:
    """The scores that some run holds, in the order of `scores_in`."""
    held = dict.fromkeys(key for group in groups for run in group.runs for row in run.rows for key in row)
    return scores_in(held, _has_answers(groups))


def scores_in(held: Iterable[str], has_answers: bool) -> list[Quantity]:
    """Those of the keys that are scores, single benchmarks last. Without an answer_pattern exact match is of whole texts, which of
    chat says nothing, and comes after the others of `SCORES`."""
    held = list(held)
    scores = [score for score in SCORES if score.key in held]
    if not has_answers:
        scores.sort(key=_is_match)
    names = [key.removeprefix("tasks/") for key in held if key.startswith("tasks/") and key != "tasks/average"]
    return scores + [Quantity(f"tasks/{name}", name, title=f"benchmark {name}") for name in names]


def asked_of(groups: Sequence[Group]) -> list[Quantity]:
    """Those of `scores_of` for which the runs were given answers, choices or benchmarks; where they were given none, the first."""
    scores, matches = scores_of(groups), _has_answers(groups)
    asked = [s for s in scores if s.key.startswith(("accuracy", "tasks/")) or (matches and _is_match(s))]
    return asked or scores[:1]


def _has_answers(groups: Sequence[Group]) -> bool:
    return any(group.config.get("answer_pattern") for group in groups)


def _is_match(score: Quantity) -> bool:
    return score.key.startswith("exact_match")


def score_of(groups: Sequence[Group], key: str | None) -> Quantity:
    scores = scores_of(groups)
    if key is None:
        return (scores or SCORES)[0]
    return next((score for score in scores if score.key == key), Quantity(key, key, title=key))


def comparison_cells(groups: Sequence[Group], key: str) -> Cells:
    """The cells of `comparison_table`; a mean over fewer seeds than the group has says over how many."""
    spec = score_of(groups, key).spec
    steps = sorted({row["iteration"] for group in groups for run in group.runs for row in run.rows if key in row})
    common = last_common_iteration(groups, key) if len(groups) > 1 else None
    headers = ["run", "seeds", *map(iteration_name, steps)]
    if common is not None:
        headers.append(f"less {groups[0].label} at {iteration_name(common)} (95 % interval)")
    rows = []
    for group in groups:
        estimates = [Estimate.of(list(group.values(t, key).values())) for t in steps]
        row = [group.label, str(len(group.runs))]
        row += [_spread(estimate, spec, len(group.runs)) for estimate in estimates]
        if common is not None:
            row.append("" if group is groups[0] else difference(paired_difference(groups[0], group, common, key), spec))
        rows.append(row)
    return Cells(headers, rows)


def difference_cells(groups: Sequence[Group], key: str) -> Cells:
    """The paired differences of every group from the first at every iteration; no rows where nothing can be paired."""
    spec = score_of(groups, key).spec
    first, *others = groups
    steps = sorted({row["iteration"] for run in first.runs for row in run.rows if key in row})
    table = [(group, [paired_difference(first, group, t, key) for t in steps]) for group in others]
    rows = [[group.label, *(difference(estimate, spec) for estimate in row)] for group, row in table if any(row)]
    return Cells(["run", *map(iteration_name, steps)], rows)


def settings_cells(groups: Sequence[Group]) -> Cells:
    """A row for each key whose values differ between groups; no rows where none does."""
    rows = [[key, *map(value_text, values)] for key, values in config_differences(groups)]
    return Cells(["key", *(group.label for group in groups)], rows)


def value_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _spread(estimate: Estimate | None, spec: str, seeds: int) -> str:
    if estimate is None:
        return ""
    text = format(estimate.mean, spec) + ("" if estimate.sd is None else f" ± {format(estimate.sd, spec)}")
    return text if estimate.n == seeds else f"{text} ({estimate.n} of {seeds})"


def difference(estimate: Estimate | None, spec: str) -> str:
    """A paired difference with its sign and interval; without an interval where there is but one pair."""
    if estimate is None:
        return ""
    low_high = (
        ""
        if estimate.ci is None
        else f" [{estimate.mean - estimate.ci:+{spec}}, {estimate.mean + estimate.ci:+{spec}}]"
    )
    return f"{estimate.mean:+{spec}}{low_high}"
