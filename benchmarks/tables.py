"""Rows as text: all of them, or ours against the goals, one short line each."""

from collections.abc import Iterable, Sequence
from typing import Any

Row = dict[str, Any]
BARE = ("blas", "cublas")
# Time over the floor of the same run, by plan; the row work weighs more where D is small.
FLOOR_GOALS = {"recompute": 1.05, "store": 1.05, "loss": 1.05, "loss_frozen_head": 1.05, "infer": 1.05}
_SMALL_D, _SMALL_D_GOAL = 1024, 1.08
# Over plain PyTorch's own errors; the order of a sum alone moves a mean square by 2 %.
_LOGPROB_GOAL, _GRADIENT_GOAL = 1.02, 1.5


def label(row: Row) -> str:
    """Name of a row's implementation as figures show it."""
    parts = [row["implementation"], row["plan"], "fp32 logits" if row.get("logits_dtype") == "float32" else None]
    return " ".join(part for part in parts if part)


def workload_name(row: Row) -> str:
    """Case and data of a row."""
    entropy = f" {row['mean_entropy']} nats" if row.get("mean_entropy") else ""
    return f"{row['case']} {row['data']}{entropy}"


def fullest_runs(rows: Iterable[Row]) -> list[Row]:
    """Of each workload on each device the rows of one run, the fullest, then the last: times of different runs do not compare."""
    runs: dict[tuple[str, str], dict[str, list[Row]]] = {}
    for row in rows:
        runs.setdefault((workload_name(row), row["device"]), {}).setdefault(row["time"], []).append(row)
    chosen = (
        max(run.items(), key=lambda item: (sum(bool(row["ms"]) for row in item[1]), item[0])) for run in runs.values()
    )
    return [row for _, run in chosen for row in run]


def table(rows: Sequence[Row]) -> str:
    """Rows as text: time, ratio to the floor, memory, errors and what plain PyTorch's own are."""

    def number(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    lines = []
    heading = None
    for row in rows:
        if row["implementation"] in BARE:
            continue
        if heading != (heading := (workload_name(row), row["device"])):
            lines += ["", " | ".join(heading)]
            columns = ("ms", "p80", "x floor", "MiB", "logprob", "(plain)", "dhidden", "dweight", "(plain)")
            lines.append(f"{'':32}{'pass':>6}" + "".join(f"{column:>10}" for column in columns))
        short = "fwd" if row["pass"] == "forward" else "f+b"
        why = row.get("refused") or row.get("missing")
        cells = [
            number(row["ms"], "10.2f"),
            number(row["ms_p80"], "10.2f"),
            number(row["ms"] / row["floor_ms"] if row["ms"] and row["floor_ms"] else None, "10.3f"),
            number(row["extra_mib"], "10.1f"),
            *(
                number(row.get(name), "10.2e")
                for name in (
                    *("error_logprob", "plain_logprob", "error_dhidden"),
                    *("error_dweight", "plain_dweight"),
                )
            ),
        ]
        kept = "" if why else _kept(row)
        lines.append(
            f"{label(row):32}{short:>6}" + (f"  {why}" if why else "".join(f"{cell:>10}" for cell in cells)) + kept
        )
    return "\n".join(lines)


def _kept(row: Row) -> str:
    """What filtering kept, and the worst row of its dweight, relative to that row."""
    if row.get("kept_fraction") is None:
        return ""
    worst = row.get("error_dweight_worst_row")
    return f"  kept {row['kept_fraction']:.2%}" + ("" if worst is None else f", worst row of dweight {worst:.2g}")


def summary(rows: Sequence[Row]) -> str:
    """Ours by workload: time, over its floor, over naive's; memory over naive's; errors over plain PyTorch's. `!`: misses its goal.

    Then the peers' times, forward + backward, and ours against them.
    """
    workloads: dict[tuple[str, str], list[Row]] = {}
    for row in fullest_runs(rows):
        if row["implementation"] not in BARE:
            workloads.setdefault((workload_name(row), row["device"]), []).append(row)
    lines = []
    for (name, device), found in workloads.items():
        lines.append(f"{name} | {device}")
        naive = {row["pass"]: row for row in found if row["implementation"] == "naive"}
        lines += [_summary_line(row, naive.get(row["pass"], {})) for row in found if row["plan"]]
        peers = [row for row in found if not row["plan"] and row["pass"] != "forward"]
        lines.append("  " + ", ".join(f"{row['implementation']} {_outcome(row)}" for row in peers))
        lines.append(
            "  " + ", ".join(f"{name} {value:.2f}{'!' * (value > goal)}" for name, value, goal in _goals(found))
        )
    return "\n".join(lines)


def _goals(found: Sequence[Row]) -> list[tuple[str, float, float]]:
    """Ratios of a workload's rows, and the most that each may be: time over a peer's or another of our own, memory over budget."""
    named = {label(row): row for row in found if row["ms"] and row["pass"] != "forward"}
    ms = {name: row["ms"] for name, row in named.items()}
    wanted = [("tspin recompute", peer, 1.0) for peer in ("trl", "liger_flsce", "verl")]
    wanted += [(f"tspin {plan}", "quack", 1.0) for plan in ("store", "loss")]
    for nats in {row["mean_entropy"] for row in found if row.get("mean_entropy")}:
        wanted.append(("tspin loss_filtered", *(("quack", 0.6) if nats < 2 else ("tspin loss", 1.05))))
    wanted += [(f"{name} fp32 logits", name, 1.15) for name in ms]
    ratios = [
        (f"{name} / {other}", ms[name] / ms[other], goal) for name, other, goal in wanted if {name, other} <= ms.keys()
    ]
    used = [
        row["extra_mib"] * 2**20 / row["memory_budget"]
        for row in found
        if row["plan"] and row["ms"] and row["memory_budget"]
    ]
    return ratios + ([("extra memory / budget", max(used), 1.0)] if used else [])


def _outcome(row: Row) -> str:
    if row.get("ms"):
        return f"{row['ms']:.2f}"
    return "refused" if row.get("refused") else "missing"


def _summary_line(row: Row, naive: Row) -> str:
    if not row["ms"]:
        return f"  {label(row):26} {row.get('refused') or row.get('missing')}"[:120]

    def ratio(value: float | None, other: float | None, name: str, goal: float | None = None) -> str:
        if not value or not other:
            return f"{'-':>6} {name} "
        return f"{value / other:6.2f} {name}{'!' if goal is not None and value / other > goal else ' '}"

    small = row["D"] < _SMALL_D and row["plan"] == "recompute"
    parts = [
        f"{row['ms']:8.2f} ms",
        ratio(row["ms"], row["floor_ms"], "floor", _SMALL_D_GOAL if small else FLOOR_GOALS.get(row["plan"])),
        ratio(row["ms"], naive.get("ms"), "naive"),
        f"{row['extra_mib']:7.0f} MiB",
        ratio(row["extra_mib"], naive.get("extra_mib"), "naive"),
        "err",
        *(
            ratio(row.get(f"error_{name}"), row.get(f"plain_{name}"), short, goal).replace(f" {short}", short)
            for name, short, goal in (
                ("logprob", "p", None if row["task"] == "sequences" else _LOGPROB_GOAL),
                ("dhidden", "h", _GRADIENT_GOAL),
                ("dweight", "w", _GRADIENT_GOAL),
            )
        ),
        "" if row.get("bitwise") else "not bitwise!",
    ]
    return f"  {label(row):26}" + " ".join(parts) + _kept(row)


def training_table(rows: Iterable[Row]) -> str:
    """Rows of `train_step` and `memory`: time, peak, what is above weights, gradients and states; over naive's, ours over TRL's."""
    lines, cells = [], {}
    for row in rows:
        if row["benchmark"] == "train_step" or (row["benchmark"] == "memory" and row["longest"] is not None):
            lengths = step_name(row) if row["benchmark"] == "train_step" else None
            cap = "" if row["benchmark"] == "train_step" else f"cap {row['cap_gib'] or 'none'}"
            key = (
                row["benchmark"],
                row["model"],
                row["method"],
                row["device"],
                lengths or row["prompt_per_response"],
                cap,
            )
            cell = cells.setdefault(key, {})
            cell[row["implementation"]] = _latest(cell.get(row["implementation"]), row)
    for (benchmark, model, method, device, size, cap), found in cells.items():
        ratio = "" if benchmark == "train_step" else " prompt tokens a response token"
        lines += ["", " | ".join(filter(None, (benchmark, model, method, f"{size}{ratio}", cap, device)))]
        naive, peer = found.get("naive", {}), found.get("trl_style", {})
        fields = ("ms", "peak_gib", "above_gib") if benchmark == "train_step" else ("longest", "peak_gib", "ms")
        for name, row in found.items():
            parts = [_against(row, naive, field) for field in fields]
            why = row.get("refused") or row.get("missing") or ""
            if name.startswith("tspin") and row.get(fields[0]) and peer.get(fields[0]):
                parts.append(f"  {row[fields[0]] / peer[fields[0]]:.2f}x TRL's {fields[0]}")
            lines.append(f"  {name:16}" + "".join(parts) + f"  {why}".rstrip())
    return "\n".join(lines)


def _latest(before: Row | None, row: Row) -> Row:
    """The later of two rows; but a search that was cut off, which gives a lower bound, only where it came further."""
    if before is None or not row["missing"] or row["benchmark"] != "memory":
        return row
    return row if before["missing"] and row["longest"] >= before["longest"] else before


def step_name(row: Row) -> str:
    """The tokens of a step: `512 + 3 x 512`, and how often where it has several triplets."""
    one, count = f"{row['prompt']} + 3 x {row['response']}", row.get("triplets", 1)
    return one if count == 1 else f"{count} x ({one})"


def _against(row: Row, naive: Row, field: str) -> str:
    value, other = row.get(field), naive.get(field)
    if value is None:
        return ""
    shown = f"{value:10.0f}" if field == "longest" else f"{value:10.3f}"
    return f"{shown} {field:9}" + (f" ({value / other:.2f}x)" if other else " " * 8)
