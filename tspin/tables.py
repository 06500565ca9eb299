"""The tables of a report before they are drawn, so that a terminal, a markdown file and the page say the same in the same words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from tspin.comparison import Estimate, Group, last_common_iteration, paired_difference

# Header, key, format; the value is eval.json's where the key is there, else the mean over the iteration's training log.
_COLUMNS = (
    ("exact match", "exact_match", ".3f"),
    ("sampled match", "exact_match_sampled", ".3f"),
    ("eval logp", "logprob", ".1f"),
    ("fresh y<y'", "fresh_share", ".2f"),
    ("logp real", "logps/chosen", ".1f"),
    ("logp synth.", "logps/rejected", ".1f"),
    ("logp proto", "logps/proto", ".1f"),
    ("margin", "rewards/margins", ".1f"),
    ("hist. margin", "rewards/history_margins", ".1f"),
)
# What methods are compared by: key, name, format.
SCORES = (
    ("exact_match", "held-out exact match, greedy", ".3f"),
    ("exact_match_sampled", "held-out exact match, sampled at temperature 1", ".3f"),
    ("logprob", "held-out log-likelihood of the annotated response, nats", ".2f"),
    ("fresh_share", "share of fresh pairs with logp(y) < logp(y')", ".3f"),
)


class Cells(NamedTuple):
    """A table before it is drawn."""

    headers: list[str]
    rows: list[list[str]]

    def without_empty(self) -> Cells:
        """The table less its columns that are empty in every row."""
        kept = [i for i in range(len(self.headers)) if i == 0 or any(row[i] for row in self.rows)]
        return Cells([self.headers[i] for i in kept], [[row[i] for i in kept] for row in self.rows])

    def markdown(self) -> str:
        lines = [self.headers, ["---"] * len(self.headers), *self.rows]
        cells = ([" ".join(cell.replace("|", "\\|").split()) for cell in line] for line in lines)
        return "".join("| " + " | ".join(line) + " |\n" for line in cells)


def iteration_cells(rows: list[dict[str, Any]]) -> Cells:
    """A row an iteration of `read_iterations`, with those columns that hold something."""
    columns = [column for column in _COLUMNS if any(column[1] in row for row in rows)]
    cells = [
        [iteration_name(row["iteration"]), *(format(row[key], spec) if key in row else "" for _, key, spec in columns)]
        for row in rows
    ]
    return Cells(["iteration", *(header for header, _, _ in columns)], cells)


def iteration_name(t: int) -> str:
    return "initial" if t < 0 else str(t)


def scores_of(groups: Sequence[Group]) -> list[tuple[str, str, str]]:
    """The entries of `SCORES` that some run holds."""
    return [
        score for score in SCORES if any(score[0] in row for group in groups for run in group.runs for row in run.rows)
    ]


def score_of(groups: Sequence[Group], key: str | None) -> tuple[str, str, str]:
    if key is None:
        return (scores_of(groups) or SCORES)[0]
    return next((score for score in SCORES if score[0] == key), (key, key, ".3f"))


def comparison_cells(groups: Sequence[Group], key: str) -> Cells:
    """The cells of `comparison_table`; a mean over fewer seeds than the group has says over how many."""
    _, _, spec = score_of(groups, key)
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
    _, _, spec = score_of(groups, key)
    first, *others = groups
    steps = sorted({row["iteration"] for run in first.runs for row in run.rows if key in row})
    table = [(group, [paired_difference(first, group, t, key) for t in steps]) for group in others]
    rows = [[group.label, *(difference(estimate, spec) for estimate in row)] for group, row in table if any(row)]
    return Cells(["run", *map(iteration_name, steps)], rows)


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
