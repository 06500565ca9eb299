"""The comparison of methods on word problems, with a model from scratch: of 26M parameters, for a GPU that is lent for minutes, or
of 0.8M for two CPU cores (`--size small`).

    python -m benchmarks.study.word_problems run --directory SCRATCH --out FOLDER --seconds 560 --jobs 5
    python -m benchmarks.study.word_problems table FOLDER/rows.jsonl

Each call makes the initial policy of a seed, finishes whole arms of it while there is time, and leaves rows and pictures only; the
next call goes on after the arms that have a row. Rates are tuned per method on validation numbers of a seed of its own, on a grid
of half decades that grows while its first or last rate is the best; then other seeds are run once. The initial policy is
made anew by each call: rows carry its hash, and arms are compared within one.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.study.problems import ANSWER, distinct
from benchmarks.study.word_pupil import SIZES, Size, make_pupil
from tspin import storage

TUNING_SEED = 100
RATES = {
    "tspin": (1e-6, 3e-6, 1e-5),
    "spin": (3e-7, 1e-6, 3e-6),
    "sft": (3e-5, 1e-4, 3e-4),
    "tspin_no_history": (1e-5, 3e-5, 1e-4),
    "tspin_ref": (1e-5, 3e-5, 1e-4),
}
METHODS = tuple(RATES)
_HALF_DECADES = (1e-8, 3e-8, 1e-7, 3e-7, 1e-6, 3e-6, 1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3)
HERE = Path(__file__).parent
_PACKAGES = ("tspin", "torch", "triton", "transformers", "accelerate", "datasets")


@dataclass(frozen=True)
class Arm:
    """One run: `tune` is measured on validation numbers, `test` on unseen numbers and on unseen templates."""

    phase: str
    method: str
    rate: float
    seed: int

    @property
    def name(self) -> str:
        return f"{self.phase}-{self.method}-{self.rate:g}-seed{self.seed}"

    @property
    def splits(self) -> tuple[str, ...]:
        return ("val",) if self.phase == "tune" else ("test", "templates")

    def iterations(self, size: Size) -> int:
        return min(size.iterations, 3) if self.phase == "tune" else size.iterations


def scores(rows: Sequence[dict[str, Any]], method: str) -> dict[float, float]:
    """By rate, greedy exact match on validation numbers at the last iteration."""
    return {row["rate"]: row["iterations"][-1]["val"]["greedy"] for row in rows if is_of(row, "tune", method)}


def grid(rows: Sequence[dict[str, Any]], method: str) -> list[float]:
    """The rates to try: the first three, and what is next to an end that is the best of those tried."""
    found = scores(rows, method)
    rates = sorted({*RATES[method], *found})
    for end, inner, step in ((rates[0], rates[1], -1), (rates[-1], rates[-2], 1)):
        place = _HALF_DECADES.index(end) + step
        is_best = found.keys() == set(rates) and found[end] == max(found.values()) > found[inner]
        if is_best and 0 <= place < len(_HALF_DECADES):
            return sorted([*rates, _HALF_DECADES[place]])
    return rates


def tuned(rows: Sequence[dict[str, Any]], method: str) -> float | None:
    """The rate with the highest score, the lowest of equals; None before all are run."""
    found = scores(rows, method)
    return max(found, key=lambda rate: (found[rate], -rate)) if found.keys() == set(grid(rows, method)) else None


def is_of(row: dict[str, Any], phase: str, method: str) -> bool:
    return (row["phase"], row["method"]) == (phase, method)


def plan(rows: Sequence[dict[str, Any]], size: Size) -> list[Arm]:
    """The arms without a row that can be run now, those of one seed together."""
    arms = [Arm("tune", method, rate, TUNING_SEED) for method in RATES for rate in grid(rows, method)]
    for seed in range(size.seeds):
        rates = [(method, tuned(rows, method)) for method in METHODS]
        arms += [Arm("test", method, rate, seed) for method, rate in rates if rate is not None]
    done = {row["arm"] for row in rows}
    return [arm for arm in arms if arm.name not in done]


def run_arm(arm: Arm, size: Size, directory: Path, commit: str | None) -> dict[str, Any]:
    """Run one arm from the pupil of its seed in `directory`, and return its row."""
    import torch

    from tspin.config import SelfPlayConfig
    from tspin.loop import SelfPlay

    start, folder = time.monotonic(), directory / arm.name
    folder.mkdir(parents=True, exist_ok=True)
    on_gpu = torch.cuda.is_available()
    _write_rows(folder / "train.jsonl", [("train", size.rows)], arm.seed)
    _write_rows(folder / "held_out.jsonl", [(split, size.held_out) for split in arm.splits], arm.seed)
    pupil = directory / f"pupil_{size.name}_{arm.seed}"
    values = {
        "model_name_or_path": str(pupil),
        "dataset": str(folder / "train.jsonl"),
        "eval_dataset": str(folder / "held_out.jsonl"),
        "answer_pattern": ANSWER,
        "prompt_template": "{prompt}\n",
        "output_dir": str(folder / "run"),
        "iterations": arm.iterations(size),
        "max_new_tokens": 64,
        "generation_batch_size": size.generation_batch,
        "shard_size": 2048,
        "seed": arm.seed,
        "method": arm.method,
        "learning_rate": arm.rate,
        "num_train_epochs": 2,
        "per_device_train_batch_size": min(64, size.rows // 2),
        "per_device_eval_batch_size": 64,
        "max_length": 192,
        "gradient_checkpointing": False,  # models this small fit without
        "save_strategy": "no",
        "logging_steps": 8,
        "disable_tqdm": True,
        "use_cpu": not on_gpu,
    }
    run = Path(SelfPlay(SelfPlayConfig.from_dict(values)).run().output_dir)
    iterations = [_scores(run / "eval_initial.json", arm, size, folder)]
    for t in range(arm.iterations(size)):
        scores = _scores(run / f"iter_{t:02d}" / "eval.json", arm, size, folder)
        iterations.append({**scores, "training": _training(run / f"iter_{t:02d}" / "metrics.jsonl")})
    shutil.rmtree(run)  # the disk would not hold the weights of all arms
    return {
        "arm": arm.name,
        **asdict(arm),
        "size": size.name,
        "pupil": storage.model_hash(pupil),
        "iterations": iterations,
        "seconds": round(time.monotonic() - start, 1),
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "versions": storage.package_versions(_PACKAGES),
        "commit": commit,
    }


def _write_rows(path: Path, splits: Sequence[tuple[str, int]], seed: int) -> None:
    lines = [
        json.dumps({"prompt": problem.prompt, "completion": problem.answer}) + "\n"
        for split, count in splits
        for problem in distinct(split, f"rows/{seed}", count)
    ]
    storage.write_atomic(path, "".join(lines).encode())


def _scores(path: Path, arm: Arm, size: Size, folder: Path) -> dict[str, Any]:
    """Of one policy: what the loop measured on its own samples, and exact match on each held-out split."""
    from tspin.evaluate import extract_answer
    from tspin.generate import read_generations

    measured = storage.read_json(path)
    answers = {mode: read_generations(path.with_suffix("") / mode) for mode in ("greedy", "sampled")}
    wanted = [
        extract_answer(json.loads(line)["completion"], ANSWER)
        for line in (folder / "held_out.jsonl").read_text().splitlines()
    ]
    kept = ("iteration", "logprob", "fresh_share", "fresh_identical", "fresh_rows")
    scores: dict[str, Any] = {key: measured[key] for key in kept if key in measured}
    for number, split in enumerate(arm.splits):
        rows = range(number * size.held_out, (number + 1) * size.held_out)
        scores[split] = {
            mode: sum(
                given[row].finish_reason == "stop" and extract_answer(given[row].text, ANSWER) == wanted[row]
                for row in rows
            )
            / len(rows)
            for mode, given in answers.items()
        }
    return scores


def _training(path: Path) -> dict[str, float]:
    """Means over one iteration's log."""
    entries = [entry for entry in map(json.loads, path.read_text().splitlines()) if "loss" in entry]
    keys = [key for key in entries[0] if key.startswith(("logps/", "entropy/")) or key in ("saturated", "misaligned")]
    return {key: sum(entry[key] for entry in entries) / len(entries) for key in keys}


def read_rows(path: Path, size: str = "full") -> list[dict[str, Any]]:
    """The rows of one size; of an arm that was run twice the first."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    rows = [row for row in map(json.loads, filter(str.strip, lines)) if row["size"] == size]
    return list({row["arm"]: row for row in reversed(rows)}.values())[::-1]


def run(directory: Path, path: Path, size: Size, *, seconds: float, jobs: int, commit: str | None) -> int:
    """Finish as many arms as there is time for, `jobs` at a time, and append their rows to `path`. Returns how many failed.

    An arm is begun only if the longest so far would still end in time; what runs at the end of the time is stopped.
    """
    deadline, failed = time.monotonic() + seconds, 0
    longest = max((row["seconds"] for row in read_rows(path, size.name)), default=0.0)
    running: dict[Arm, tuple[subprocess.Popen, float]] = {}
    tried: set[str] = set()

    def start(log: Path, *words: str) -> subprocess.Popen:
        command = [sys.executable, "-m", "benchmarks.study.word_problems", *words, "--size", size.name]
        command += ["--directory", str(directory), *(["--commit", commit] if commit else [])]
        with log.open("wb") as file:
            return subprocess.Popen(command, cwd=HERE.parents[1], stdout=file, stderr=subprocess.STDOUT)

    try:
        while True:
            pending = [arm for arm in plan(read_rows(path, size.name), size) if arm.name not in tried]
            left = deadline - time.monotonic()
            while pending and len(running) < jobs and 1.15 * longest < left:
                arm = pending.pop(0)
                if not (directory / f"pupil_{size.name}_{arm.seed}").exists():
                    if running:
                        break  # a pupil has the device for itself
                    log = directory / f"pupil_{arm.seed}.log"
                    ended = _ends(start(log, "pupil", "--seed", str(arm.seed)), left)
                    print(_tail(log, 3 if ended else 40), flush=True)
                    if not ended:
                        return failed + 1
                    left = deadline - time.monotonic()
                tried.add(arm.name)
                words = [arm.phase, arm.method, f"{arm.rate:g}", str(arm.seed)]
                running[arm] = start(directory / f"{arm.name}.log", "arm", *words), time.monotonic()
            if not running:
                return failed
            time.sleep(0.2)
            for arm, (process, begun) in list(running.items()):
                if process.poll() is None:
                    continue
                del running[arm]
                took = time.monotonic() - begun
                longest = max(longest, took)
                row = directory / arm.name / "row.json"
                if process.returncode or not row.exists():
                    failed += 1
                    print(
                        f"{arm.name} failed with {process.returncode}:\n{_tail(directory / f'{arm.name}.log', 40)}",
                        flush=True,
                    )
                else:
                    with path.open("ab") as file:
                        file.write(json.dumps(storage.read_json(row)).encode() + b"\n")
                    print(f"{arm.name} done in {took:.0f} s", flush=True)
            if time.monotonic() > deadline:
                print(f"time is up; stopped {', '.join(arm.name for arm in running)}", flush=True)
                return failed
    finally:
        for process, _ in running.values():
            process.kill()
            process.wait()


def _tail(log: Path, lines: int) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])


def _ends(process: subprocess.Popen, seconds: float) -> bool:
    """Whether a process ends well in so many seconds; else it is stopped."""
    try:
        return process.wait(timeout=max(1.0, seconds)) == 0
    except subprocess.TimeoutExpired:
        print("time is up in a pupil", flush=True)
        return False
    finally:
        process.kill()
        process.wait()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.study.word_problems", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    made = {name: commands.add_parser(name) for name in ("run", "pupil", "arm", "table")}
    for name in made:
        made[name].add_argument("--size", choices=SIZES, default="full")
    for name in ("run", "pupil", "arm"):
        made[name].add_argument("--directory", type=Path, required=True, help="for pupils and runs")
        made[name].add_argument("--commit", help="what rows call the code")
    made["run"].add_argument("--out", type=Path, required=True, help="folder of rows.jsonl, the table and the figure")
    made["run"].add_argument("--seconds", type=float, default=560)
    made["run"].add_argument("--jobs", type=int, default=1, help="arms at a time")
    made["pupil"].add_argument("--seed", type=int, required=True)
    for word, kind in (("phase", str), ("method", str), ("rate", float), ("seed", int)):
        made["arm"].add_argument(word, type=kind)
    made["table"].add_argument("rows", type=Path)
    options = parser.parse_args(arguments)
    if options.command == "table":
        from benchmarks.study.word_results import write

        print(write(read_rows(options.rows, options.size), options.rows.parent))
        return 0
    size, directory = SIZES[options.size], options.directory.resolve()
    directory.mkdir(parents=True, exist_ok=True)
    if options.command == "pupil":
        make_pupil(size, options.seed, directory / f"pupil_{size.name}_{options.seed}")
    elif options.command == "arm":
        arm = Arm(options.phase, options.method, options.rate, options.seed)
        storage.write_json(directory / arm.name / "row.json", run_arm(arm, size, directory, options.commit))
    else:
        from benchmarks.study.word_results import write

        out = options.out.resolve()
        out.mkdir(parents=True, exist_ok=True)
        rows = out / "rows.jsonl"
        settings = {"seconds": options.seconds, "jobs": options.jobs, "commit": options.commit}
        failed = run(directory, rows, size, **settings)
        text = write(read_rows(rows, size.name), out)
        (out / "table.md").write_text(text, encoding="utf-8")
        print(text)
        print(f"{len(plan(read_rows(rows, size.name), size))} arms can be run next", flush=True)
        return 1 if failed else 0
    return 0


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    raise SystemExit(main())
