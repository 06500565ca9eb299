"""The benchmarks: `python -m benchmarks NAME`, where NAME is one of

logprobs, row_kernels, attention, train_step, memory, longest, prediction; and of their rows: plots, table, summary.
"""

import argparse
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks import attention, logprobs, long_context, measure, plots, prediction, row_kernels, tables, training
from benchmarks.workloads import select_cases

RESULTS = Path(__file__).parent / "results"
GOALS = [("qwen2.5-1.5b", "full"), ("llama-3.1-8b", "lora")]


def main(arguments: list[str] | None = None) -> int:
    """Run one command. Returns 1 where one of our own implementations could not be measured."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("logprobs", help="measure log-prob ops and append rows")
    run.add_argument("--peers", default="all", help="all, none, or names")
    run.add_argument("--cases", help="names or groups of cases; goals on a GPU, cpu without one")
    run.add_argument("--data", default="random,peaked", help="random, peaked or both")
    _add_common(run, 300)
    run.add_argument("--exclude", action="append", default=[], help="an implementation to leave out")
    run.add_argument("--skip", type=int, default=0, help="workloads that an earlier process has done")
    kernels = commands.add_parser("row_kernels", help="time the Triton row kernels at each launch configuration")
    kernels.add_argument("--shape", default="8192x151936", help="rows x columns of the logits")
    _add_common(kernels, 60)
    _add_common(commands.add_parser("attention", help="ways to attend to a prompt that responses share"), 30)
    step = _add_training(commands, "train_step", "time and peak memory of a training step")
    step.add_argument("--lengths", help="PROMPTxRESPONSE or PROMPTxRESPONSExTRIPLETS, separated by commas")
    memory = _add_training(commands, "memory", "the longest triplet that fits, and the peak against length")
    memory.add_argument("--caps", help="GiB, or none for the whole GPU, separated by commas")
    longest = commands.add_parser("longest", help="the longest triplet that is predicted to fit; no GPU is needed")
    _add_models(longest, "those of the picture")
    longest.add_argument("--caps", default="24,80", help="GiB of the GPU, separated by commas")
    longest.add_argument("--out", type=Path, default=RESULTS, help="folder of the rows, in predicted.jsonl")
    for each in (memory, longest):
        each.add_argument("--ratios", default="8,1", help="tokens of the prompt by tokens of each response")
    _add_common(
        commands.add_parser("prediction", help="peaks that `tspin check` predicts, beside a GPU's own count"), 60
    )
    texts = {
        "plots": "draw rows as PNG beside them",
        "table": "print every row",
        "summary": "print ours against the goals",
    }
    for name, text in texts.items():
        commands.add_parser(name, help=text).add_argument("path", type=Path, nargs="?", default=RESULTS)
    given = sys.argv[1:] if arguments is None else arguments
    options = parser.parse_args(given)
    if options.command == "logprobs":
        return _logprobs(options, given)
    if options.command == "row_kernels":
        return _row_kernels(options)
    if options.command == "attention":
        device = torch.device(options.device)
        rows = attention.run(device, options.seconds, _rows_path(options.out, device), options.commit)
        print(attention.table(rows))
        return int(any(row["missing"] for row in rows))
    if options.command == "prediction":
        device = torch.device(options.device)
        rows = prediction.run(device, _rows_path(options.out, device), options.commit)
        print(prediction.table(rows))
        return int(any(row["missing"] for row in rows))
    if options.command == "longest":
        ratios, caps = ([float(n) for n in text.split(",")] for text in (options.ratios, options.caps))
        pairs = _pairs(options, [*GOALS, ("qwen3-30b-a3b", "lora")])
        print(prediction.longest_table(prediction.longest(pairs, ratios, caps, options.out / "predicted.jsonl")))
        return 0
    if options.command in ("train_step", "memory"):
        return _training(options)
    rows = measure.read_rows(options.path)
    if options.command == "plots":
        for path in plots.draw_all(rows, options.path if options.path.is_dir() else options.path.parent):
            print(path)
    else:
        logprob_rows = [row for row in rows if row["benchmark"] == "logprobs"]
        print(tables.table(logprob_rows) if options.command == "table" else tables.summary(logprob_rows))
        print(tables.training_table(rows))
    return 0


def _add_training(commands: Any, name: str, text: str) -> argparse.ArgumentParser:
    run = commands.add_parser(name, help=text)
    _add_models(run, "the two of the goals on a GPU, a small one without")
    run.add_argument("--implementations", help="only these, separated by commas")
    _add_common(run, 300)
    return run


def _add_models(run: argparse.ArgumentParser, usual: str) -> None:
    run.add_argument("--models", help=f"names of benchmarks.training, separated by commas; {usual}")
    run.add_argument("--methods", help="full, lora or both; where no model is named those that are usual")


def _pairs(options: argparse.Namespace, usual: list[tuple[str, str]]) -> list[tuple[str, str]]:
    if not (options.models or options.methods):
        return usual
    models = options.models.split(",") if options.models else [model for model, _ in usual]
    methods = options.methods.split(",") if options.methods else list(training.METHODS)
    return [(model, method) for model in models for method in methods]


def _add_common(run: argparse.ArgumentParser, seconds: float) -> None:
    run.add_argument("--seconds", type=float, default=seconds, help="time for all together, about")
    run.add_argument(
        "--out", type=Path, default=RESULTS, help="folder of the rows; their file is named after the device"
    )
    run.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    run.add_argument("--commit", help="what rows call the code, where git cannot tell")


def _row_kernels(options: argparse.Namespace) -> int:
    device = torch.device(options.device)
    N, V = (int(size) for size in options.shape.split("x"))
    out = _rows_path(options.out, device)
    rows = row_kernels.run(N, V, device=device, seconds=options.seconds, out=out, commit=options.commit)
    print(row_kernels.table(rows))
    return int(all(row["refused"] for row in rows))


def _training(options: argparse.Namespace) -> int:
    device = torch.device(options.device)
    gpu = device.type == "cuda"
    pairs = _pairs(options, GOALS if gpu else [("llama-4-layers", "full")])
    common = {"device": device, "out": _rows_path(options.out, device), "commit": options.commit}
    common["seconds"] = options.seconds
    names = options.implementations.split(",") if options.implementations else list(training.IMPLEMENTATIONS)
    if options.command == "train_step":
        usual = "16384x512,512x512,512x512x8" if gpu else "1024x256,1024x128,256x256"
        # One triplet where no number is given.
        texts = [f"{text}x1" for text in (options.lengths or usual).split(",")]
        lengths = [tuple(int(size) for size in text.split("x")[:3]) for text in texts]
        rows = long_context.train_step(pairs, lengths, names, **common)
    else:
        caps = [
            None if cap == "none" else float(cap) for cap in (options.caps or ("24,none" if gpu else "0.25")).split(",")
        ]
        ratios = [float(ratio) for ratio in options.ratios.split(",")]
        rows = long_context.memory(pairs, ratios, caps, names, **common)
    print(tables.training_table(rows))
    ours = [row for row in rows if row["implementation"] == "tspin"]
    return int(any(row["refused"] for row in ours))


def _rows_path(folder: Path, device: torch.device) -> Path:
    name = measure.environment(device)["device"] if device.type == "cuda" else "cpu"
    return folder / f"{re.sub(r'[^a-z0-9]+', '-', name.lower()).strip('-')}.jsonl"


def _logprobs(options: argparse.Namespace, given: list[str]) -> int:
    device = torch.device(options.device)
    start = time.monotonic()
    out = _rows_path(options.out, device)
    try:
        rows = logprobs.run(
            select_cases(options.cases or ("goals" if device.type == "cuda" else "cpu")),
            data=options.data.split(","),
            peers=options.peers,
            device=device,
            seconds=options.seconds,
            out=out,
            commit=options.commit,
            excluded=tuple(options.exclude),
            skip=options.skip,
        )
    except measure.PoisonedDevice as error:
        if not isinstance(error.culprit, str):
            raise
        print(f"{error.culprit} left the device unusable ({error}); going on without it in a fresh process", flush=True)
        left = options.seconds - (time.monotonic() - start)
        again = [*given, "--exclude", error.culprit, "--skip", str(error.done), "--seconds", f"{left:.0f}"]
        os.execv(sys.executable, [sys.executable, "-m", "benchmarks", *again])
    print(tables.table(rows))
    ours = [row for row in rows if row["implementation"] == "tspin"]
    return int(any(row.get("refused") or row.get("missing") not in (None, "out of time") for row in ours))


if __name__ == "__main__":
    sys.exit(main())
