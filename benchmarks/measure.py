"""How anything is measured: the environment of a row, time by interleaved rounds, extra memory, and rows as JSON lines.

It knows nothing of log-probs.
"""

import json
import os
import platform
import random
import subprocess
import time
from collections.abc import Callable, Hashable, Mapping
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch

MIN_ROUNDS, MAX_ROUNDS, WARM_UP = 3, 100, 1
# About 2 ms of a GPU.
_QUEUED_CYCLES = 4_000_000


class PoisonedDevice(RuntimeError):
    """A CUDA error that leaves the process without a usable device."""

    culprit: Hashable = None  # key of the call that met it
    done = 0  # workloads finished before


class Times(NamedTuple):
    """Milliseconds over the rounds."""

    ms: float
    ms_p20: float
    ms_p80: float
    rounds: int


def environment(device: torch.device, commit: str | None = None) -> dict[str, Any]:
    """What every row says of where it was measured."""
    cpu = f"{_cpu_name()}, {torch.get_num_threads()} threads"
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu,
        "torch": torch.__version__,
        "triton": installed("triton"),
        "commit": commit or _commit(),
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "load": load(),
    }


def load() -> float:
    """Processes that wanted a core over the last minute."""
    return round(os.getloadavg()[0], 2)


def installed(distribution: str) -> str | None:
    """The version of an installed distribution."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _commit() -> str:
    # Of the ops that are measured; a benchmark that changed beside them does not make them others.
    def git(*arguments: str) -> str:
        root = Path(__file__).parent
        return subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", "../tspin_kernels")
        return git("rev-parse", "--short=12", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on a GPU or on the CPU."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def reason(error: BaseException, culprit: Hashable = None) -> str:
    """One line that says why nothing was measured. Raises PoisonedDevice where no further call can work either."""
    if is_out_of_memory(error):
        return "out of memory"
    line = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
    if "CUDA error" in str(error):
        poisoned = PoisonedDevice(line)
        poisoned.culprit = culprit
        raise poisoned from error
    return line[:240]


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def elapsed_ms(call: Callable[[], Any], device: torch.device) -> float:
    """Milliseconds of one call: device events on a GPU, the host's clock on the CPU. What it returns is freed outside."""
    if device.type != "cuda":
        start = time.perf_counter()
        kept = call()
        stop = time.perf_counter()
        del kept
        return (stop - start) * 1e3
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    # Work is queued before it, as the layers of a model are: what the host then does unseen counts for nobody.
    torch.cuda._sleep(_QUEUED_CYCLES)
    begin.record()
    kept = call()
    end.record()
    end.synchronize()
    del kept
    return begin.elapsed_time(end)


def timed_rounds(
    calls: Mapping[Hashable, Callable[[], Any]], device: torch.device, seconds: float, min_rounds: int = MIN_ROUNDS
) -> tuple[dict[Hashable, Times], dict[Hashable, str]]:
    """Every call once per round, in an order drawn anew, until `seconds` have gone by.

    Returns: the times of each call, and of each call that failed the reason.
    """
    deadline = time.monotonic() + seconds
    samples: dict[Hashable, list[float]] = {key: [] for key in calls}
    failed: dict[Hashable, str] = {}
    keys, order = list(calls), random.Random(0)
    for number in range(-WARM_UP, MAX_ROUNDS):
        if number >= min_rounds and time.monotonic() > deadline:
            break
        # No call always follows the same one, which may have left the device hot.
        for key in order.sample(keys, len(keys)):
            if key in failed:
                continue
            try:
                ms = elapsed_ms(calls[key], device)
            except Exception as error:
                failed[key] = reason(error, key)
                continue
            if number >= 0:
                samples[key].append(ms)
    return {key: _summary(samples[key]) for key in calls if key not in failed}, failed


def _summary(samples: list[float]) -> Times:
    p20, p50, p80 = torch.tensor(samples, dtype=torch.float64).quantile(torch.tensor([0.2, 0.5, 0.8]).double()).tolist()
    return Times(p50, p20, p80, len(samples))


def peak_bytes(call: Callable[[], Any], device: torch.device) -> tuple[int, Any]:
    """Largest growth of allocated bytes during a call, its result included: the allocator's peak, on the CPU the profiler's."""
    if device.type == "cuda":
        synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        kept = call()
        synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before, kept
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        kept = call()
    assert profile.profiler is not None and profile.profiler.kineto_results is not None
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    current = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        current += event.nbytes()
        peak = max(peak, current)
    return peak, kept


def append_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """Add rows to a file of JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a file, or of every *.jsonl in a folder."""
    files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]
