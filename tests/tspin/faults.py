"""Faults done to a run of the loop, and what the same command makes of them. Not a test: test_faults.py chooses the faults.

A job is a run directory, a list of faults, and the same command after each of them. Every command is a child forked from
one process that has its imports done, so that a thousand of them are affordable; what dies is the process that works.
Nothing in the packages knows of this file.

As a script: `faults.py ROOT DIRECTORY JOBS CHANGES` runs the jobs and prints one line of JSON for each.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import random
import re
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import transformers.modeling_utils
from test_loop import TIMINGS, toy_config

from tspin import figures, generate, storage
from tspin.check import USER_ERRORS, one_line
from tspin.config import SelfPlayConfig
from tspin.loop import SelfPlay

HOWS = ("truncate", "empty", "flip", "zero", "append", "delete")
# What no stage reads once its iteration is trained; a run that throws it away need not say so.
SCRATCH = ("/checkpoints/", ".lock", "report/", "timings.jsonl")


class Events:
    """Counts what a run does, and kills the process at one of these events.

    fatal: [name, number, moment]; moment is "before" the event, "torn" (with half of the file written) or "after" it.
    """

    def __init__(self, fatal: list | None, log: Path):
        self.fatal, self.log, self.counts = fatal, log, Counter()

    def watch(self, owner: Any, name: str, target: int | None = None) -> None:
        """Make each call of owner.name an event; argument `target` is the file, or descriptor, that it writes."""
        real = getattr(owner, name)

        def call(*args, **kwargs):
            moment = self.fatal[2] if self.fatal and self.fatal[:2] == [name, self.counts[name]] else None
            self.counts[name] += 1
            with open(self.log, "a") as file:
                file.write(name + "\n")
            if moment == "before":
                os.kill(os.getpid(), signal.SIGKILL)
            result = real(*args, **kwargs)
            if moment == "torn" and target is not None:
                path = args[target] if len(args) > target else kwargs["filename"]
                path = os.readlink(f"/proc/self/fd/{path}") if isinstance(path, int) else path
                if os.path.isfile(path):
                    os.truncate(path, os.path.getsize(path) // 2)
            if moment is not None:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        setattr(owner, name, call)


def killable_run(config: SelfPlayConfig, fatal: list | None, log: Path) -> None:
    """SelfPlay(config).run(), killed at the event `fatal`."""
    events = Events(fatal, log)
    for name in ("replace", "unlink", "rmtree"):
        events.watch(shutil if name == "rmtree" else os, name)
    events.watch(os, "fsync", target=0)
    events.watch(generate, "next_tokens")
    events.watch(torch.optim.RMSprop, "step")
    events.watch(torch, "save", target=1)
    events.watch(transformers.modeling_utils, "safe_save_file", target=1)
    SelfPlay(config).run()


def outcome(directory: Path) -> dict[str, Any]:
    """All of a finished run that must not depend on what happened to it on the way, by file."""
    found: dict[str, Any] = {}
    for path in sorted(directory.rglob("*")):
        name = str(path.relative_to(directory))
        if path.is_dir() or any(part in f"/{name}" for part in SCRATCH):
            continue
        if path.name == "metrics.jsonl":
            try:
                entries = map(json.loads, path.read_text().splitlines())
                found[name] = [{k: v for k, v in entry.items() if k not in TIMINGS} for entry in entries]
            except ValueError:
                found[name] = "broken"
        elif path.name == "config.yaml":
            found[name] = path.read_bytes().replace(str(directory).encode(), b"")
        elif path.name == "state.json":
            done = json.loads(path.read_text())["done"]
            # Timings are part of the log.
            found[name] = {stage: record for stage, record in done.items() if not stage.endswith("/train")}
        elif path.name == "run.json":
            record = json.loads(path.read_text())
            found[name] = {key: value for key, value in record.items() if key not in ("command", "seal")}
        else:
            found[name] = storage.sha256(path)
    return found


def kind(name: str) -> str:
    """A file's name with the numbers of iteration, step and shard taken out."""
    return re.sub(r"(iter_|checkpoint-|shard-)\d+(-[0-9a-f]{16})?", r"\1N", name)


def damage(path: Path, how: str, draw: random.Random) -> None:
    """Do one fault to a file behind the back of the run."""
    data = bytearray(path.read_bytes())
    if how == "delete":
        return path.unlink()
    if how == "stray":
        path = path.with_name("stray" + path.suffix)
    elif how == "truncate":
        del data[draw.randrange(len(data) or 1) :]
    elif how == "empty":
        data.clear()
    elif how == "append":
        data += draw.randbytes(draw.randrange(1, 40))
    elif data:
        start = draw.randrange(len(data))
        if how == "flip":
            data[start] ^= 1 << draw.randrange(8)
        else:
            data[start : start + 64] = bytes(len(data[start : start + 64]))
    path.write_bytes(data)


class Warm:
    """Runs commands in forks of this process.

    root, changes: of `toy_config`.
    """

    def __init__(self, root: Path, changes: dict[str, Any]):
        self.root, self.changes = root, changes
        torch.set_num_threads(1)
        # The picture is not what is tested.
        figures.draw = lambda groups: {}
        # What a run imports only when it comes to it, imported here, by a child that says so; nothing has run in this process.
        with tempfile.TemporaryDirectory() as scratch:
            self.command(Path(scratch) / "run", modules=Path(scratch) / "modules")
            for name in (Path(scratch) / "modules").read_text().split():
                with contextlib.suppress(Exception):
                    importlib.import_module(name)
        # And what the imports left need not be collected in every child.
        gc.collect()
        gc.freeze()

    def command(
        self, directory: Path, fatal: list | None = None, after: float | None = None, modules: Path | None = None
    ) -> tuple[int, str]:
        """The exit code of a run (1: no error of the user's) and what it printed; killed at `fatal` or `after` seconds."""
        log, began = directory.with_suffix(".log"), time.perf_counter()
        child = os.fork()
        if child == 0:
            try:
                with open(log, "wb") as file:
                    os.dup2(file.fileno(), 1)
                    os.dup2(file.fileno(), 2)
                killable_run(toy_config(self.root, directory, **self.changes), fatal, directory.with_suffix(".events"))
            except USER_ERRORS as error:
                print(f"tspin: error: {one_line(error)}", file=sys.stderr, flush=True)
                os._exit(2)
            except BaseException:
                traceback.print_exc()
                sys.stderr.flush()
                os._exit(1)
            sys.stdout.flush()
            if modules is not None:
                modules.write_text("\n".join(sys.modules))
            os._exit(0)
        if after is not None:
            time.sleep(after)
            os.kill(child, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        self.seconds = time.perf_counter() - began
        return status, log.read_text(errors="replace")

    def job(self, directory: Path, faults: list[dict], start: str | None, leave: bool) -> dict[str, Any]:
        """Do the faults, each followed by the same command; it is left alone in the end, unless all is to be left as it is."""
        if start is not None:
            shutil.copytree(start, directory, symlinks=True)
            path, here, there = directory / "config.yaml", str(directory).encode(), str(start).encode()
            path.write_bytes(path.read_bytes().replace(there, here))
        statuses, printed = [], ""
        for fault in faults:
            if "damage" in fault:
                damage(directory / fault["damage"], fault["how"], random.Random(fault["seed"]))
            else:
                statuses.append(self.command(directory, fault.get("fatal"), fault.get("after"))[0])
        status, printed = (statuses.pop(), "") if leave else self.command(directory)
        events = directory.with_suffix(".events")
        counts = Counter(events.read_text().split()) if events.exists() else Counter()
        return {"statuses": [*statuses, status], "printed": printed, "counts": counts, "seconds": self.seconds}


def verdict(result: dict[str, Any], directory: Path, fault: dict, wanted: dict[str, Any]) -> str:
    """What became of a damaged file: "same", "named" or "refused" are right; "scratch" was of no use any more.

    Anything else, which begins with a capital, is a defect.
    """
    name, status, printed = fault["damage"], result["statuses"][-1], result["printed"]
    if status == 2:
        message = printed.rpartition("tspin: error: ")[2]
        if name not in message and str(Path(name).parent) not in message.replace(str(directory), ""):
            return "Unnamed error: " + message
        return "refused" if re.search("restore|delete|undo|choose", message) else "Error without remedy: " + message
    if status != 0:
        return f"Crash {status}: {printed[-2000:]}"
    found = outcome(directory)
    differing = sorted(key for key in {*found, *wanted} if found.get(key) != wanted.get(key))
    if not differing:
        return "scratch" if any(part in f"/{name}" for part in SCRATCH) else "same"
    stray = str(Path(name).with_name("stray" + Path(name).suffix))
    # The card of the run's data leaves out triplets that cannot be read.
    card = ["README.md"] if Path(name).name == "triplets.parquet" else []
    if all(key in (name, stray, "state.json", *card) for key in differing):
        # By itself, or by the directory that a stage wrote: "iter_00/eval is done, but its files are missing or altered".
        above = [f"{parent} " for parent in Path(name).parents if parent.name]
        named = any(word in printed for word in (name, stray, *above))
        return "named" if named else f"Silent: {differing}"
    return f"Lost: {differing}"


def undo(result: dict[str, Any], directory: Path, start: Path, fault: dict) -> None:
    """Follow the remedy of a refusal: delete what it says to delete, or restore the file."""
    advice = re.search(r"delete (/\S+?)[,;:.]?(?: |$)", result["printed"].rpartition("tspin: error: ")[2])
    if advice and Path(advice[1]).exists():
        target = Path(advice[1])
        shutil.rmtree(target) if target.is_dir() else target.unlink()
        return
    target, path = directory / fault["damage"], start / fault["damage"]
    data = path.read_bytes().replace(str(start).encode(), str(directory).encode())
    target.write_bytes(data)


def files_of(directory: Path, one_of_a_kind: bool = True) -> list[str]:
    """The files of a run directory; of each kind, only the last."""
    names = [str(p.relative_to(directory)) for p in sorted(directory.rglob("*")) if stat.S_ISREG(p.lstat().st_mode)]
    return list({kind(name): name for name in names}.values()) if one_of_a_kind else names


def main(root: str, directory: str, jobs: str, changes: str) -> None:
    warm = Warm(Path(root), json.loads(changes))
    wanted = None
    for number, job in enumerate(json.loads(Path(jobs).read_text())):
        here = Path(directory) / f"job_{number}"
        result = warm.job(here, job["faults"], job.get("start"), job.get("leave", False))
        if job.get("wanted") and wanted is None:
            wanted = outcome(Path(job["wanted"]))
        if job.get("wanted"):
            fault = job["faults"][-1]
            result["verdict"] = verdict(result, here, fault, wanted)
            if result["verdict"] == "refused":
                undo(result, here, Path(job["start"]), fault)
                again, printed = warm.command(here)
                same = again == 0 and outcome(here) == wanted
                result["verdict"] = "refused" if same else f"Remedy does not help ({again}): {printed[-1500:]}"
        result["run"] = str(here)
        print("JOB " + json.dumps(result | {"faults": job["faults"]}), flush=True)
        if not job.get("keep", False):
            for path in (here, here.with_suffix(".log"), here.with_suffix(".events")):
                shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def run_jobs(root: Path, directory: Path, jobs: list[dict], **changes) -> list[dict]:
    """The results of `main`, in a process of its own."""
    directory.mkdir(parents=True, exist_ok=True)
    plan = directory / "jobs.json"
    plan.write_text(json.dumps(jobs))
    command = [sys.executable, __file__, str(root), str(directory), str(plan), json.dumps(changes)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    results = [json.loads(line[4:]) for line in done.stdout.splitlines() if line.startswith("JOB ")]
    assert len(results) == len(jobs)
    return results


if __name__ == "__main__":
    main(*sys.argv[1:])
