"""Command line of the study: `python -m benchmarks.study run | status | write`."""

import argparse
import os
from pathlib import Path

from benchmarks.study import plan
from benchmarks.study.run import read_rows, run

HERE = Path(__file__).parent


def main(arguments: list[str] | None = None) -> int:
    """Run one command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.study", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    texts = {
        "run": "run the arms that have no row yet; the same command goes on after a kill",
        "status": "how many arms of each phase have rows",
        "write": "make STUDY.md and its figures from the rows",
    }
    made = {name: commands.add_parser(name, help=text) for name, text in texts.items()}
    for command in made.values():
        command.add_argument(
            "--rows", type=Path, default=HERE / "rows.jsonl", help="file of rows (default: the committed one)"
        )
    made["run"].add_argument(
        "--directory", type=Path, required=True, help="for pupils and runs, outside the repository"
    )
    made["run"].add_argument(
        "--jobs", type=int, default=os.cpu_count() or 1, help="single-threaded processes at a time"
    )
    made["run"].add_argument("--limit", type=int, help="stop after so many arms")
    made["run"].add_argument("--commit", help="what rows call the code, where git cannot tell")
    options = parser.parse_args(arguments)
    if options.command == "run":
        run(
            options.directory.resolve(),
            options.rows.resolve(),
            jobs=options.jobs,
            commit=options.commit,
            limit=options.limit,
        )
    elif options.command == "write":
        from benchmarks.study.result import write

        print(write(read_rows(options.rows), options.rows.parent))
    if options.command != "write":
        rows = read_rows(options.rows)
        for arms in plan.phases(rows):
            print(f"{sum(arm.id in rows for arm in arms)} of {len(arms)} arms: {arms[0].split}, {arms[0].keys} ...")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
