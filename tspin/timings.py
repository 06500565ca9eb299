"""How long each stage of a run took, in how much memory: a file that is neither hashed nor read by the loop."""

from __future__ import annotations

import contextlib
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from tspin import storage

_UNITS_PER_GIB = 2**30 if sys.platform == "darwin" else 2**20  # of ru_maxrss


@contextlib.contextmanager
def timed(path: Path, stage: str) -> Iterator[None]:
    """Append a line to `path` when the block ends: `stage`, `seconds`, `finished` (False after an error), `host_peak_gib` of the
    process so far, and on CUDA `gpu_peak_gib` of the stage. A kill leaves no line; a full disk loses the line and nothing else.
    """
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    entry = {"stage": stage, "seconds": 0.0, "finished": False}
    start = time.perf_counter()
    try:
        yield
        entry["finished"] = True
    finally:
        entry["seconds"] = round(time.perf_counter() - start, 3)
        entry["host_peak_gib"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / _UNITS_PER_GIB, 3)
        if torch.cuda.is_available():
            entry["gpu_peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 3)
        with contextlib.suppress(ValueError, OSError):
            lines = path.read_bytes() if path.exists() else b""
            storage.write_atomic(path, lines + storage.json_lines([entry]))
