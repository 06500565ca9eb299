"""The page of a report: what its tables hold, put into report.html.jinja, which escapes whatever comes from data.

One file that needs no other and no network. The same run files give the same page, byte for byte; it bears no date.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined

from tspin.comparison import Group
from tspin.config import default_of, loop_fields, training_fields
from tspin.evaluate import extract_answer
from tspin.plotting import Picture, short_names
from tspin.run_files import Run
from tspin.tables import (
    SCORES,
    Cells,
    comparison_cells,
    difference_cells,
    iteration_cells,
    iteration_name,
    scores_of,
    settings_cells,
    value_text,
)

_PROMPTS = 4
_LONGEST = 4000  # characters of a text
_WIDEST = 130  # characters of a table, for which the page has room
# What a stage of the loop is for; proto and eval_initial belong to no iteration.
_KINDS = {
    "proto": "sampling",
    "synthetic": "sampling",
    "fresh": "sampling",
    "triplets": "triplets",
    "train": "training",
}
_KINDS |= {"model": "training", "pairs": "pairs", "eval": "evaluation", "eval_initial": "evaluation"}


def render(groups: Sequence[Group], pictures: Mapping[str, Picture], note: str | None = None) -> str:
    """The page as one text of HTML."""
    environment = Environment(
        loader=PackageLoader("tspin", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["data_uri"] = lambda png: "data:image/png;base64," + base64.b64encode(png).decode()
    environment.filters["cut"] = _cut
    runs = [run for group in groups for run in group.runs]
    return environment.get_template("report.html.jinja").render(
        groups=groups,
        pictures=pictures,
        title=_title(groups),
        lead=[*([note] if note else []), *_lead(groups)],
        has_seeds=any(len(group.runs) > 1 for group in groups),
        scores=_scores(groups),
        benchmarks=_scores(groups, single_benchmarks=True),
        spread_note=_spread_note(groups),
        short_names=_short_names(groups),
        differences=[
            (_sentence(score.title), cells)
            for score in scores_of(groups)
            if (cells := difference_cells(groups, score.key)).rows
        ],
        without_reference=_without_reference(groups),
        pair_shares=_pair_shares(groups),
        **_samples(groups),
        settings=settings_cells(groups),
        config=_config(groups),
        runs=_runs(groups),
        stages=_stages(runs),
        versions=_versions(runs),
        hashes=[(f"Stages of {_path(run)}", _hashes(run)) for run in runs if run.stages],
    )


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} … ({len(text) - _LONGEST} more characters)"


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:]


def _path(run: Run) -> str:
    return str(run.directory)


def _is_single(groups: Sequence[Group]) -> bool:
    return len(groups) == 1 and len(groups[0].runs) == 1


def _title(groups: Sequence[Group]) -> str:
    if len(groups) > 1:
        return f"tspin: {', '.join(group.label for group in groups[:4])}{' ...' if len(groups) > 4 else ''}"
    run, *others = groups[0].runs
    return f"tspin: {groups[0].label}, {len(others) + 1} seeds" if others else f"tspin: {run.directory.absolute().name}"


def _lead(groups: Sequence[Group]) -> list[str]:
    lines = []
    if _is_single(groups):
        run, config = groups[0].runs[0], groups[0].config
        lines.append(
            f"Method {config['method']}, seed {run.seed}, from {config.get('model_name_or_path', 'an unnamed model')}."
        )
    else:
        seeds = sorted({run.seed for group in groups for run in group.runs})
        shown = ", ".join(map(str, seeds))
        lines.append(f"{sum(len(group.runs) for group in groups)} runs in {len(groups)} groups; seeds {shown}.")
    for group in groups:
        open_runs = [run for run in group.runs if not _is_finished(run)]
        for run in open_runs:
            last = next(reversed(run.stages), "none")
            lines.append(f"Unfinished: {_path(run)}, {_progress(run)}; last stage done: {last}.")
    for key, _, spec, title in scores_of(groups)[:2] if _is_single(groups) else ():
        known = [row for row in groups[0].runs[0].rows if key in row]
        if len(known) > 1:
            names = [iteration_name(row["iteration"]) for row in (known[0], known[-1])]
            ends = f"{known[0][key]:{spec}} ({names[0]}) to {known[-1][key]:{spec}} (iteration {names[1]})"
            lines.append(f"{_sentence(title)}: {ends}.")
    return lines


def _iterations(run: Run) -> int:
    return run.config.get("iterations", 5)


def _is_finished(run: Run) -> bool:
    return f"iter_{_iterations(run) - 1:02d}/eval" in run.stages


def _progress(run: Run) -> str:
    done = sum(f"iter_{t:02d}/eval" in run.stages for t in range(_iterations(run)))
    return f"{done} of {_iterations(run)} iterations"


def _scores(groups: Sequence[Group], single_benchmarks: bool = False) -> list[tuple[str, Cells]]:
    """Tables with their titles: of single benchmarks, or of all else."""
    if _is_single(groups):
        first, *others = iteration_cells(groups[0])
        title, tables = ("Benchmarks", others) if single_benchmarks else ("", [first])
        return [(title, part) for cells in tables for part in cells.split(_WIDEST)]
    scores = [score for score in scores_of(groups) if (score not in SCORES) == single_benchmarks]
    return [(_sentence(score.title), comparison_cells(groups, score.key)) for score in scores]


def _short_names(groups: Sequence[Group]) -> Cells:
    """What those names stand for that the pictures cut."""
    labels = [group.label for group in groups]
    rows = [[name, label] for name, label in zip(short_names(labels), labels) if name != label]
    return Cells(["in the pictures", "run"], rows)


def _spread_note(groups: Sequence[Group]) -> str:
    if all(len(group.runs) == 1 for group in groups):
        text = "One seed: no spread over seeds is known. Bars are the standard error of a share over the rows it was measured on"
        text += (
            ", of benchmarks the harness's own." if any(s.key.startswith("tasks/") for s in scores_of(groups)) else "."
        )
    else:
        text = "Mean over seeds ± standard deviation over seeds, which the bars show too; thin lines are single seeds."
    if _is_single(groups):
        text += (
            " Log-likelihoods, margins and their like in the table are means over the iteration's training, in nats."
        )
    return text


def _without_reference(groups: Sequence[Group]) -> list[str]:
    return [group.label for group in groups if group.config["method"] in ("tspin", "tspin_no_history")]


def _pair_shares(groups: Sequence[Group]) -> Cells | None:
    """Shares of pairs, y' = y left out, as means over seeds."""
    rows = []
    for group in groups:
        for t in sorted({row["iteration"] for run in group.runs for row in run.rows}):
            tables = [table for run in group.runs if (table := run.pairs(t)) is not None]
            if tables:
                cells = [
                    _mean_share(tables, *request)
                    for request in (
                        ("trained", "favoured"),
                        ("trained", "misaligned"),
                        ("fresh", "misaligned"),
                        ("fresh", "below"),
                    )
                ]
                rows.append([group.label, str(t), *cells])
    headers = [
        "run",
        "iteration",
        "trained: r(y) > r(y')",
        "trained: misaligned",
        "fresh: misaligned",
        "fresh: logp(y) < logp(y')",
    ]
    return Cells(headers, rows) if rows else None


def _mean_share(tables: Sequence[Mapping[str, np.ndarray]], name: str, what: str) -> str:
    shares = []
    for table in tables:
        own = (table["set"] == name) & ~table["identical"] & ~np.isnan(table["logps/rejected"])
        below = (table["logps/chosen"] < table["logps/rejected"])[own]
        favoured = (table["rewards/chosen"] > table["rewards/rejected"])[own]
        is_known = own.any() and (what == "below" or not np.isnan(table["rewards/rejected"][own]).any())
        if is_known:
            shares.append({"below": below, "favoured": favoured, "misaligned": below & favoured}[what].mean())
    return f"{np.mean(shares):.3f}" if shares else ""


def _samples(groups: Sequence[Group]) -> dict[str, Any]:
    """Of each group's first run that has any: the same prompts, a row a run, a column a source of responses."""
    shown = [(group, run, run.prompts(_PROMPTS)) for group in groups for run in group.runs[:1]]
    prompts = next((prompts for _, _, prompts in shown if prompts), [])
    responses = [
        (group, run, run.responses([p.row for p in prompts])) for group, run, own in shown if own[:1] == prompts[:1]
    ]
    names = {name for _, _, found in responses for name in found}
    sources = sorted(names, key=lambda name: (name != "y0", int(name[1:])))
    patterns = {group.label: group.config.get("answer_pattern") for group in groups}
    samples = []
    for prompt in prompts:
        rows = []
        for group, run, found in responses:
            label = f"{group.label}, seed {run.seed}" if len(groups) > 1 else "response"
            texts = [found.get(source, {}).get(prompt.row) for source in sources]
            verdict = lambda made: _verdict(patterns[group.label], prompt.response, *made)  # noqa: B023
            cells = [made and {"text": made[0], "finish_reason": made[1], "verdict": verdict(made)} for made in texts]
            rows.append((label, cells))
        samples.append({"row": prompt.row, "prompt": prompt.text, "response": prompt.response, "rows": rows})
    return {"samples": samples if sources else [], "sources": sources, "judged": any(patterns.values())}


def _verdict(pattern: str | None, wanted: str, text: str, finish_reason: str) -> str:
    """As `tspin.evaluate.exact_match` judges; empty without a pattern or without an answer to compare with."""
    answer = extract_answer(wanted, pattern) if pattern else None
    if answer is None:
        return ""
    return "right" if finish_reason == "stop" and extract_answer(text, pattern) == answer else "wrong"


def _config(groups: Sequence[Group]) -> dict[str, list[tuple[str, str]]]:
    """The keys of the first group's first run: those that are not at their defaults, and the others."""
    fields, given, defaults = loop_fields() | training_fields(), [], []
    for key, value in groups[0].runs[0].config.items():
        is_default = key in fields and default_of(fields[key]) == value
        (defaults if is_default else given).append((key, value_text(value)))
    return {"given": given, "defaults": defaults}


def _runs(groups: Sequence[Group]) -> Cells:
    headers = [
        "run",
        "group",
        "seed",
        "iterations",
        "device",
        "processes",
        "train tokens/s",
        "GPU peak, GiB",
        "wall time",
    ]
    rows = []
    for group in groups:
        for run in group.runs:
            speeds = [row["tokens_per_second"] for row in run.rows if "tokens_per_second" in row]
            peaks = [row["memory/peak_gib"] for row in run.rows if "memory/peak_gib" in row]
            rows.append(
                [
                    _path(run),
                    group.label,
                    str(run.seed),
                    _progress(run).removesuffix(" iterations"),
                    str(run.record.get("device", "")),
                    str(run.record.get("processes", "")),
                    f"{sum(speeds) / len(speeds):.0f}" if speeds else "",
                    f"{max(peaks):.2f}" if peaks else "",
                    _duration(sum(entry["seconds"] for entry in run.timings)) if run.timings else "",
                ]
            )
    return Cells(headers, rows).without_empty()


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    hours, minutes = divmod(round(seconds) // 60, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {round(seconds) % 60:02d} s"


def _stages(runs: Sequence[Run]) -> Cells | None:
    """Wall time by kind of stage, and peaks: of one run a row an iteration, of several a row a run."""
    rows: dict[str, dict[str, float]] = {}
    for run in runs:
        for entry in run.timings:
            iteration, _, stage = str(entry["stage"]).rpartition("/")
            own = f"iteration {int(iteration[5:])}" if iteration else "initial"
            row = rows.setdefault(own if len(runs) == 1 else _path(run), {})
            kind = _KINDS.get(stage) or stage
            row[kind] = row.get(kind, 0.0) + entry["seconds"]
            row["all"] = row.get("all", 0.0) + entry["seconds"]
            row["broken off"] = row.get("broken off", 0) + (not entry["finished"])
            for peak in ("host_peak_gib", "gpu_peak_gib"):
                if peak in entry:
                    row[peak] = max(row.get(peak, 0.0), entry[peak])
    if not rows:
        return None
    kinds = [*dict.fromkeys(_KINDS.values()), "all"]
    headers = ["", *kinds, "host peak, GiB", "GPU peak, GiB", "attempts broken off"]
    lines = []
    for name, row in rows.items():
        times = [_duration(row[kind]) if kind in row else "" for kind in kinds]
        peaks = [f"{row[peak]:.2f}" if peak in row else "" for peak in ("host_peak_gib", "gpu_peak_gib")]
        lines.append([name, *times, *peaks, f"{row['broken off']:.0f}" if row["broken off"] else ""])
    if len(runs) == 1:
        lines.sort(key=lambda line: -1 if line[0] == "initial" else int(line[0].split()[1]))
    return Cells(headers, lines).without_empty()


def _versions(runs: Sequence[Run]) -> Cells:
    """What run.json records, and runs that agree in one row."""
    values: dict[str, dict[str, list[str]]] = {}
    for run in runs:
        record = run.record
        facts = {f"version of {name}": version for name, version in record.get("versions", {}).items()}
        facts |= {key: record[key] for key in ("platform", "command") if key in record}
        for key in ("data", "eval_data"):
            facts |= {f"{key}, {name}": value for name, value in record.get(key, {}).items()}
        model = record.get("model", {})
        facts |= {
            f"pi_0, {name}": value for name, value in {**model, **model.get("files", {})}.items() if name != "files"
        }
        for key, value in facts.items():
            values.setdefault(key, {}).setdefault(value_text(value), []).append(_path(run))
    rows = []
    for key, by_value in values.items():
        for value, paths in by_value.items():
            rows.append([key, value, "all" if len(paths) == len(runs) else ", ".join(paths)])
    headers = ["fact", "value", "runs"]
    if len(runs) == 1:
        headers, rows = headers[:2], [row[:2] for row in rows]
    return Cells(headers, rows)


def _hashes(run: Run) -> Cells:
    made = [[name, path, digest or ""] for name, record in run.stages.items() for path, digest in record.items()]
    return Cells(["stage", "what it made", "SHA-256"], made)
