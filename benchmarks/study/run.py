"""Runs the arms that have no row yet, each by the project's own loop, and appends one row for each.

Everything heavy lies in a directory that may be lost: sloppy pupils by seed, data, run directories. A row holds all that STUDY.md
says, so another machine with the rows alone goes on with the arms that are missing. Arms of one seed share what they would make
alike (tspin.compare). Kill it at any moment; the same command goes on, an arm in flight from its last checkpoint.
"""

from __future__ import annotations

import functools
import json
import logging
import multiprocessing
import os
import platform
import subprocess
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any

from benchmarks.study.plan import COMMON, EVAL_ROWS, ITERATIONS, SEEDS, TRAIN_ROWS, Arm, Rows, phases, unpaired

PRETRAINING = {"steps": 220, "batch_size": 128, "learning_rate": 3e-3}
_PACKAGES = ("torch", "transformers", "accelerate", "datasets", "tokenizers", "numpy")
# Of an iteration's training log: the mean over its triplets, and the last entry.
_LOGGED = (
    *("loss", "logps/chosen", "logps/rejected", "logps/proto", "rewards/margins", "rewards/accuracies"),
    *("rewards/history_margins", "misaligned", "identical", "weights/current", "weights/history"),
    *("entropy/chosen", "entropy/rejected", "lengths/rejected", "truncated"),
)
_SCORES = ("exact_match", "exact_match_sampled", "logprob", "fresh_share", "fresh_identical", "truncated_greedy")


def read_rows(path: Path) -> dict[str, dict[str, Any]]:
    """The rows of a file by id, of one run again from another pi_0 by id and pi_0; a line torn by a kill does not count."""
    rows: dict[str, dict[str, Any]] = {}
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        first = rows.get(row["id"], row)
        is_first = first.get("pi_0_sha256") == row.get("pi_0_sha256")
        rows[row["id"] if is_first else f"{row['id']} {row['pi_0_sha256']}"] = row
    return rows


def append_row(path: Path, row: dict[str, Any]) -> None:
    """Add one line, on the disk before this returns, and a line of its own even after a torn one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torn = path.exists() and path.stat().st_size and not path.read_bytes().endswith(b"\n")
    with path.open("a") as file:
        file.write("\n" * bool(torn) + json.dumps(row) + "\n")
        file.flush()
        os.fsync(file.fileno())


def run(directory: Path, rows_path: Path, *, jobs: int, commit: str | None = None, limit: int | None = None) -> int:
    """Run what has no row, phase by phase, `jobs` single-threaded processes at a time; returns how many arms are still missing.

    limit: stop after so many arms.
    """
    commit = commit or _commit()
    # Spawned, so that each worker sets its threads before torch is there.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=_start_worker) as pool:
        while True:
            rows = read_rows(rows_path)
            missing = [[arm for arm in phase if arm.id not in rows] for phase in phases(rows)]
            todo = next((phase for phase in missing if phase), _again(rows, directory))[:limit]
            if not todo:
                return sum(map(len, missing)) + len(unpaired(rows))
            limit = None if limit is None else limit - len(todo)
            list(pool.map(make_pupil, [directory] * len(todo), sorted({arm.seed for arm in todo})))
            # On the machine that made their rows these are finished, which takes a second to see.
            starts = {arm.id: arm for arm in (Arm(arm.start, arm.seed, arm.split) for arm in todo if arm.start)}
            list(pool.map(run_arm, starts.values(), [directory] * len(starts), [commit] * len(starts)))
            # Two questions may ask for one arm, and arms of one lineage are never in one phase: no directory is used twice.
            futures = {pool.submit(run_arm, arm, directory, commit) for arm in {arm.id: arm for arm in todo}.values()}
            while futures:
                done, futures = wait(futures, return_when=FIRST_COMPLETED)
                for future in done:
                    row = future.result()
                    append_row(rows_path, row)
                    print(
                        f"{time.strftime('%H:%M:%S')} {row['keys']} {row['split']} seed {row['seed']}: "
                        f"{row['iterations'][-1]['exact_match']:.3f} in {row['cpu_s'] or 0:.0f} s, {len(futures)} to go",
                        flush=True,
                    )


def _again(rows: Rows, directory: Path) -> list[Arm]:
    # Of the arms to run again, those whose pi_0 is a pupil that lies here.
    from tspin.storage import model_hash

    pupils = {seed: directory / f"seed_{seed}" / "pupil" for seed in SEEDS}
    here = {seed: model_hash(pupil) for seed, pupil in pupils.items() if pupil.exists()}
    return [arm for arm, pi_0 in unpaired(rows) if arm.start is None and here.get(arm.seed) == pi_0]


def _start_worker() -> None:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    import torch

    torch.set_num_threads(1)
    logging.disable(logging.INFO)


def make_pupil(directory: Path, seed: int) -> None:
    """The sloppy pupil of a seed, and the problems it is taught and tested with."""
    from tspin import demo
    from tspin.storage import staged_directory

    folder = directory / f"seed_{seed}"
    if folder.exists():
        return
    with staged_directory(folder) as staged:
        for split, rows in (("train", TRAIN_ROWS), ("valid", EVAL_ROWS), ("test", EVAL_ROWS)):
            demo.write_rows(staged / f"{split}.jsonl", split, rows, seed)
        texts = demo.sloppy_texts(seed)
        demo.pretrain(staged / "pupil", demo.build_tokenizer(), texts, seed=seed, **PRETRAINING, **demo.PUPIL)


def run_directory(arm: Arm, directory: Path) -> Path:
    """Where an arm runs; another version of the program goes on in no directory of this one, so that no row is of two."""
    return directory / f"runs_{_program()[:8]}" / f"{arm.split}_{arm.seed}" / arm.lineage


@functools.cache
def _program() -> str:
    import tspin
    import tspin_kernels
    from tspin.storage import hash_files, hash_json

    return hash_json([hash_files(Path(package.__path__[0]), "*.py") for package in (tspin, tspin_kernels)])


def run_arm(arm: Arm, directory: Path, commit: str) -> dict[str, Any]:
    """Run one arm, whose start has been run, and return its row."""
    from tspin import storage
    from tspin.compare import SharingSelfPlay
    from tspin.config import SelfPlayConfig

    folder, seed_folder = run_directory(arm, directory), directory / f"seed_{arm.seed}"
    model = seed_folder / "pupil"
    if arm.start is not None:
        before = Arm(arm.start, arm.seed, arm.split)
        model = run_directory(before, directory) / f"iter_{before.iterations - 1:02d}" / "model"
    values = {
        **{"model_name_or_path": str(model), "dataset": str(seed_folder / "train.jsonl")},
        **{"eval_dataset": str(seed_folder / f"{arm.split}.jsonl"), "output_dir": str(folder), "seed": arm.seed},
        **{"iterations": ITERATIONS, "allow_config_change": True},
    }
    is_fresh = not folder.exists()
    cpu, wall = time.process_time(), time.perf_counter()
    config = SelfPlayConfig.from_dict(COMMON | values | dict(arm.keys))
    donors = [other for other in sorted(folder.parent.glob("*")) if other != folder] if folder.parent.exists() else []
    result = SharingSelfPlay(config, donors).run(report=False)
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    record = storage.read_record(folder / "run.json")
    return {
        "id": arm.id,
        "keys": dict(arm.keys),
        "seed": arm.seed,
        "split": arm.split,
        "start": None if arm.start is None else dict(arm.start),
        "iterations": _iterations(folder)[: arm.iterations + 1],
        # An arm that goes on where another run of it stopped was not timed as a whole.
        "cpu_s": round(cpu, 1) if is_fresh else None,
        "wall_s": round(wall, 1) if is_fresh else None,
        "model_sha256": result.model_hash,
        "pi_0_sha256": storage.model_hash(model),
        "data_sha256": record["data"]["sha256"],
        "eval_data_sha256": record["eval_data"]["sha256"],
        "versions": {"python": platform.python_version(), **storage.package_versions(_PACKAGES)},
        "machine": f"{_cpu()}, 1 thread",
        "commit": commit,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _iterations(folder: Path) -> list[dict[str, Any]]:
    """Scores of pi_0 and of each iteration's policy, with means and last values of its training log."""
    from tspin.run_files import read_iterations

    entries = []
    for row in read_iterations(folder):
        if "fresh_identical" in row:
            # Of all fresh pairs, those with y' = y included.
            row["fresh_share"] = row.get("fresh_share", 0.0) * (1 - row["fresh_identical"])
        entry = {"iteration": row["iteration"], **_rounded(row, _SCORES)}
        if row["log"]:
            entry |= {"mean": _rounded(row, _LOGGED), "last": _rounded(row["log"][-1], _LOGGED)}
        entries.append(entry)
    return entries


def _rounded(values: dict[str, Any], keys: Sequence[str]) -> dict[str, float]:
    return {key: float(f"{values[key]:.5g}") for key in keys if key in values}


def _cpu() -> str:
    from torch import device

    from benchmarks.measure import environment

    return environment(device("cpu"), "")["device"].split(",")[0]


def _commit() -> str:
    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        ).stdout

    try:
        changed = git("status", "--porcelain", "--", "../../tspin", "../../tspin_kernels", ".")
        return git("rev-parse", "--short=12", "HEAD").strip() + ("+changes" if changed.strip() else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
