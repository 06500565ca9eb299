"""Command line of the benchmarks: `python -m benchmarks logprobs | plots | table | summary`."""

import argparse
import os
import re
import sys
import time
from pathlib import Path

import torch

from benchmarks import logprobs, measure, plots, tables
from benchmarks.workloads import select_cases

RESULTS = Path(__file__).parent / "results"


def main(arguments: list[str] | None = None) -> int:
    """Run one command. Returns 1 where one of our own implementations could not be measured."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("logprobs", help="measure log-prob ops and append rows")
    run.add_argument("--peers", default="all", help="all, none, or names")
    run.add_argument("--cases", help="names or groups of cases; goals on a GPU, cpu without one")
    run.add_argument("--data", default="random,peaked", help="random, peaked or both")
    run.add_argument("--seconds", type=float, default=300, help="time for all cases together, checks included")
    run.add_argument(
        "--out", type=Path, default=RESULTS, help="folder of the rows; their file is named after the device"
    )
    run.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    run.add_argument("--commit", help="what rows call the code, where git cannot tell")
    run.add_argument("--exclude", action="append", default=[], help="an implementation to leave out")
    run.add_argument("--skip", type=int, default=0, help="workloads that an earlier process has done")
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
    rows = measure.read_rows(options.path)
    if options.command == "plots":
        for path in plots.draw_all(rows, options.path if options.path.is_dir() else options.path.parent):
            print(path)
    else:
        print(tables.table(rows) if options.command == "table" else tables.summary(rows))
    return 0


def _logprobs(options: argparse.Namespace, given: list[str]) -> int:
    device = torch.device(options.device)
    start = time.monotonic()
    name = measure.environment(device)["device"] if device.type == "cuda" else "cpu"
    out = options.out / f"{re.sub(r'[^a-z0-9]+', '-', name.lower()).strip('-')}.jsonl"
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
