"""Rows as pictures: time and memory against N and V, and each implementation beside its floor."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.tables import BARE, Row, fullest_runs, label, step_name, workload_name
from benchmarks.workloads import CASES

# Okabe and Ito's colours, which colour-blind readers tell apart; each has its own marker and hatch besides.
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000", "#8C8C00")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
_OURS = "tspin"


def draw_all(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Every figure that the rows allow, as PNG in `folder`. Returns their paths."""
    import matplotlib

    matplotlib.use("Agg")
    paths = _draw_training(rows, folder) + _draw_longest(rows, folder / "predicted.png")
    rows = [row for row in fullest_runs(row for row in rows if row["benchmark"] == "logprobs") if row["ms"]]
    for device in dict.fromkeys(row["device"] for row in rows):
        mine = [row for row in rows if row["device"] == device]
        stem = "cpu" if mine[0]["dtype"] == "float32" else device.lower().replace(" ", "-")
        for axis in ("N", "V"):
            paths += _draw_sweep(mine, axis, folder / f"{stem}-{axis.lower()}.png")
        paths += _draw_roofline(mine, folder / f"{stem}-roofline.png")
    return paths


def _draw_training(rows: Sequence[Row], folder: Path) -> list[Path]:
    # `memory`'s peak against the tokens of a triplet, `train_step`'s time over naive's; for each device, model and method a figure.
    import matplotlib.pyplot as plt

    peaks = [row for row in rows if row["benchmark"] == "memory" and row.get("longest") is None and row.get("peak_gib")]
    steps = [row for row in rows if row["benchmark"] == "train_step" and row["ms"]]
    paths = []
    for cell in dict.fromkeys((row["device"], row["model"], row["method"]) for row in [*peaks, *steps]):
        mine, timed = (
            [row for row in found if (row["device"], row["model"], row["method"]) == cell] for found in (peaks, steps)
        )
        styles = {
            name: number for number, name in enumerate(dict.fromkeys(r["implementation"] for r in [*mine, *timed]))
        }
        ratios = sorted({row["prompt_per_response"] for row in mine}, reverse=True)
        across = len(ratios) + bool(timed)
        figure, panels = plt.subplots(1, across, figsize=(5.5 * across, 4.2), layout="constrained", squeeze=False)
        for panel, ratio in zip(panels.flat, ratios, strict=False):
            lines: dict[str, dict[int, float]] = {}
            for row in mine:
                if row["prompt_per_response"] == ratio:
                    lines.setdefault(row["implementation"], {})[row["tokens"]] = row["peak_gib"]
            for name, points in lines.items():
                style = {"color": _COLOURS[styles[name] % 8], "marker": _MARKERS[styles[name] % 8], "label": name}
                panel.plot(sorted(points), [points[at] for at in sorted(points)], **style)
            title = f"prompt : response = {ratio:g} : 1"
            panel.set(xlabel="tokens of a triplet", ylabel="peak of a step, GiB", title=title)
            panel.grid(alpha=0.3)
            panel.legend(fontsize=8)
        if timed:
            _draw_steps(panels.flat[-1], timed, styles)
        figure.suptitle(f"{cell[1]}, {cell[2]} | {cell[0]}", fontsize=10)
        stem = "cpu" if "threads" in cell[0] else cell[0].lower().replace(" ", "-")
        paths.append(_save(figure, folder / f"{stem}-{cell[1]}-{cell[2]}.png"))
    return paths


def _draw_steps(panel: Any, rows: Sequence[Row], styles: dict[str, int]) -> None:
    # Bars of each length's implementations, as long as their time over naive's, or where that does not fit over the slowest's, with
    # the milliseconds beside them.
    found: dict[str, dict[str, Row]] = {}
    for row in rows:
        found.setdefault(step_name(row), {})[row["implementation"]] = row
    height = 0.8 / len(styles)
    for at, by_name in enumerate(found.values()):
        whole = by_name.get("naive", {}).get("ms") or max(row["ms"] for row in by_name.values())
        for name, row in by_name.items():
            y, over = at + (styles[name] - (len(styles) - 1) / 2) * height, row["ms"] / whole
            panel.barh(y, over, height, color=_COLOURS[styles[name] % 8], label=name if at == 0 else None)
            panel.text(over, y, f" {row['ms']:.0f} ms", va="center", fontsize=7)
    panel.set_yticks(range(len(found)), list(found), fontsize=8)
    panel.invert_yaxis()
    panel.set(
        xlabel="time over naive's, or over the slowest's where naive does not fit",
        title="one step",
        xlim=(0, 1.15 * max(panel.get_xlim()[1], 1.0)),
    )
    panel.legend(fontsize=8, ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.14))


def _draw_longest(rows: Sequence[Row], path: Path) -> list[Path]:
    # A panel for each model, a group of points for each card and ratio: the longest triplet by what saves memory.
    import matplotlib.pyplot as plt

    rows = [row for row in rows if row["benchmark"] == "longest" and row["longest"]]
    cells = list(dict.fromkeys((row["model"], row["method"]) for row in rows))
    if not cells:
        return []
    levers = list(dict.fromkeys(row["levers"] for row in rows))
    figure, panels = plt.subplots(1, len(cells), figsize=(5.5 * len(cells), 5), layout="constrained", squeeze=False)
    for panel, cell in zip(panels.flat, cells, strict=True):
        found: dict[str, dict[str, int]] = {}
        for row in rows:
            if (row["model"], row["method"]) == cell:
                name = f"{row['cap_gib']:g} GiB, {row['prompt_per_response']:g} : 1"
                found.setdefault(name, {})[row["levers"]] = row["longest"]
        height = 0.8 / len(levers)
        for at, by_lever in enumerate(found.values()):
            for lever, tokens in by_lever.items():
                y = at + (levers.index(lever) - (len(levers) - 1) / 2) * height
                number = levers.index(lever)
                style = {"color": _COLOURS[number], "marker": _MARKERS[number], "linestyle": ""}
                panel.plot(tokens, y, **style, label=lever if at == 0 else None)
                panel.text(tokens, y, f"   {tokens:,}", va="center", fontsize=7)
        panel.set_yticks(range(len(found)), list(found), fontsize=8)
        panel.invert_yaxis()
        panel.set(xlabel="tokens of the longest triplet, predicted", title=", ".join(cell), xscale="log")
        panel.set_xlim(right=3 * panel.get_xlim()[1])
        panel.grid(axis="x", alpha=0.3)
    figure.legend(*panels.flat[0].get_legend_handles_labels(), fontsize=8, ncols=3, loc="outside lower center")
    return [_save(figure, path)]


def _sweep(rows: Sequence[Row], axis: str) -> list[Row]:
    # The rows of the family of sweep cases that differ in `axis` alone and have the most values of it.
    sweeps = {case.name for case in CASES if any("sweep" in group for group in case.groups)}
    others = [name for name in ("N", "D", "V", "data", "mean_entropy") if name != axis]
    families: dict[tuple, list[Row]] = {}
    for row in rows:
        if row["implementation"] not in BARE and row["case"] in sweeps:
            families.setdefault(tuple(row[name] for name in others), []).append(row)
    return max(families.values(), key=lambda family: len({row[axis] for row in family}), default=[])


def _draw_sweep(rows: Sequence[Row], axis: str, path: Path) -> list[Path]:
    import matplotlib.pyplot as plt

    family = [row for row in _sweep(rows, axis) if row["pass"] == "forward+backward"]
    values = sorted({row[axis] for row in family})
    if len(values) < 2:
        return []
    figure, panels = plt.subplots(1, 2, figsize=(11, 4.6), constrained_layout=True)
    lines: dict[str, list[Row]] = {}
    for row in family:
        lines.setdefault(label(row), []).append(row)
    lines = {name: points for name, points in lines.items() if len({row[axis] for row in points}) > 1}
    for number, (name, points) in enumerate(lines.items()):
        points = sorted({row[axis]: row for row in points}.values(), key=lambda row: row[axis])
        style = {"color": _COLOURS[number % 8], "marker": _MARKERS[number % 8], "label": name}
        style["linewidth"] = 2.2 if name.startswith(_OURS) else 1.2
        where = [row[axis] for row in points]
        panels[0].plot(where, [row["ms"] for row in points], **style)
        panels[0].fill_between(
            where,
            [row["ms_p20"] for row in points],
            [row["ms_p80"] for row in points],
            alpha=0.15,
            color=style["color"],
        )
        panels[1].plot(where, [max(row["extra_mib"], 0.1) for row in points], **style)
    fixed = ", ".join(f"{name}={family[0][name]}" for name in ("N", "D", "V") if name != axis)
    for panel, unit in zip(panels, ("forward + backward, ms", "extra memory, MiB"), strict=True):
        panel.set(xscale="log", yscale="log", xlabel=axis, ylabel=unit, title=f"{fixed}, {family[0]['dtype']}")
        panel.set_xticks(values, [str(value) for value in values], rotation=30)
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    panels[0].legend(fontsize=8)
    figure.suptitle(family[0]["device"], fontsize=10)
    return [_save(figure, path)]


def _draw_roofline(rows: Sequence[Row], path: Path) -> list[Path]:
    import matplotlib.pyplot as plt

    workloads: dict[str, list[Row]] = {}
    for row in rows:
        if row["floor_ms"]:
            workloads.setdefault(workload_name(row), []).append(row)
    full = max((len(found) for found in workloads.values()), default=0)
    workloads = {name: found for name, found in workloads.items() if len(found) > full / 2}
    if not workloads:
        return []
    across = min(2, len(workloads))
    down = -(-len(workloads) // across)
    size = (7.5 * across, down * (1.0 + 0.27 * full))
    figure, panels = plt.subplots(down, across, figsize=size, constrained_layout=True, squeeze=False)
    for panel in list(panels.flat)[len(workloads) :]:
        panel.set_visible(False)
    for panel, (name, found) in zip(panels.flat, workloads.items(), strict=False):
        found = sorted(found, key=lambda row: -row["ms"])
        names = [f"{label(row)} {'(forward)' if row['pass'] == 'forward' else ''}" for row in found]
        colours = [_COLOURS[0] if row["implementation"] == _OURS else _COLOURS[5] for row in found]
        panel.barh(names, [row["ms"] for row in found], color=colours, edgecolor="black", linewidth=0.4)
        gemm = [row["gemm_ms"] for row in found]
        panel.barh(names, gemm, color="none", edgecolor="black", hatch="////", height=0.45, label="bare products")
        traffic = [row["traffic_ms"] for row in found]
        panel.barh(
            names, traffic, left=gemm, color="none", edgecolor=_COLOURS[3], hatch="xxxx", height=0.45, label="+ traffic"
        )
        for at, row in enumerate(found):
            panel.text(row["ms"], at, f" {row['ms'] / row['floor_ms']:.2f}x", va="center", fontsize=7)
        panel.set(xlabel="ms", title=name, xlim=(0, 1.12 * found[0]["ms"]))
        panel.tick_params(axis="y", labelsize=7)
        panel.legend(fontsize=7, loc="upper right")
    figure.suptitle(f"{rows[0]['device']}: time (bar) and its floor (hatched)", fontsize=10)
    return [_save(figure, path)]


def _save(figure: Any, path: Path) -> Path:
    import matplotlib.pyplot as plt

    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path
