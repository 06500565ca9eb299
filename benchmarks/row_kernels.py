"""The Triton row kernels alone, at each launch configuration, beside a copy: what to choose for `_launch_options` on a card.

It measures nothing of the products; a configuration that gives other results than the PyTorch twin is not timed.
"""

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks import measure
from tspin_kernels import _rows_torch
from tspin_kernels._inputs import LogitTransform

# Columns that a program takes at once, and warps.
BLOCKS = ((1024, 4), (2048, 4), (2048, 8), (4096, 4), (4096, 8), (4096, 16), (8192, 8), (8192, 16), (16384, 16))
CONFIGURATIONS = [
    *(("row_stats", block_v, warps) for block_v, warps in BLOCKS),
    *(("dlogits", block_v, warps) for block_v, warps in BLOCKS[:7]),
]
# dtypes of the logits and of their gradient
DTYPES = ((torch.bfloat16, torch.bfloat16), (torch.float32, torch.bfloat16))
_CHECKED_ROWS = 64


class _Inputs:
    """Logits [N, V], their gradient's memory, and the vectors of the rows."""

    def __init__(self, N: int, V: int, dtypes: tuple[torch.dtype, torch.dtype], device: torch.device):
        generator = torch.Generator(device).manual_seed(0)

        def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.randn(*shape, generator=generator, device=device, dtype=dtype)

        self.logits = normal(N, V, dtype=dtypes[0])
        self.dlogits = torch.empty(N, V, dtype=dtypes[1], device=device)
        self.targets = torch.randint(V, (N,), generator=generator, device=device)
        self.g, self.h = normal(N), normal(N)
        self.stats = self.fresh()
        self.row_stats(_rows_torch, self.stats)
        _, s, u, _ = self.stats
        self.log_s, self.entropy = s.log(), s.log() - u / s

    def fresh(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        zeros = torch.zeros(len(self.targets), device=self.logits.device)
        return torch.full_like(zeros, -torch.inf), zeros, zeros.clone(), torch.full_like(zeros, torch.nan)

    def row_stats(self, module: Any, into: tuple[Tensor, ...]) -> None:
        m, s, u, target_logit = into
        module.row_stats_(self.logits, None, self.targets, m, s, u, target_logit, LogitTransform())

    def form_dlogits(self, module: Any, into: Tensor) -> None:
        rows = slice(0, into.shape[0])
        vectors = (self.targets, self.stats[0], self.log_s, self.entropy, self.g, self.h)
        module.dlogits_(self.logits[rows], into, None, *(v[rows] for v in vectors), None, LogitTransform())


def _configured(configuration: tuple[str, int, int], inputs: _Inputs) -> Callable[[], Any]:
    from tspin_kernels import _rows_triton

    kernel, block_v, warps = configuration
    options = {"BLOCK_V": block_v, "num_warps": warps}

    def call() -> Any:
        with mock.patch.object(_rows_triton, "_launch_options", lambda _: options):
            if kernel == "dlogits":
                inputs.form_dlogits(_rows_triton, inputs.dlogits)
                return inputs.dlogits
            found = inputs.fresh()
            inputs.row_stats(_rows_triton, found)
            return found

    return call


def _refused(kernel: str, found: Any, inputs: _Inputs, expected: Tensor) -> str | None:
    # Against the twin in float32: a sum in another order, and for dlogits one rounding.
    if kernel == "row_stats":
        close = all(torch.allclose(a, b, rtol=1e-5, atol=1e-5) for a, b in zip(found, inputs.stats, strict=True))
    else:
        rounding = torch.finfo(found.dtype).eps
        close = torch.allclose(found[: len(expected)].float(), expected.float(), rtol=2 * rounding, atol=1e-9)
    return None if close else "other results than the PyTorch twin"


def run(
    N: int, V: int, *, device: torch.device, seconds: float, out: Path, commit: str | None = None
) -> list[dict[str, Any]]:
    """Check and time every configuration within about `seconds`, adding rows to `out`. Returns the rows."""
    deadline, rows = time.monotonic() + seconds, []
    for number, dtypes in enumerate(DTYPES):
        common = {"benchmark": "row_kernels", "N": N, "V": V} | measure.environment(device, commit)
        common |= dict(zip(("dtype", "dlogits_dtype"), (str(d).removeprefix("torch.") for d in dtypes), strict=True))
        inputs = _Inputs(N, V, dtypes, device)
        expected = torch.empty_like(inputs.dlogits[:_CHECKED_ROWS])
        inputs.form_dlogits(_rows_torch, expected)
        copy = torch.empty_like(inputs.logits)
        calls: dict[Any, Callable[[], Any]] = {"copy": partial(copy.copy_, inputs.logits)}
        found: dict[Any, dict[str, Any]] = {}
        for configuration in CONFIGURATIONS:
            kernel, block_v, warps = configuration
            row = {"kernel": kernel, "block_v": block_v, "num_warps": warps}
            read, written = (
                t.nbytes if kernel == "dlogits" or t is inputs.logits else 0 for t in (inputs.logits, inputs.dlogits)
            )
            found[configuration] = row | {"bytes": read + written}
            call = _configured(configuration, inputs)
            try:
                refused = _refused(kernel, call(), inputs, expected)
            except Exception as error:
                refused = measure.reason(error)
            found[configuration]["refused"] = refused
            if refused is None:
                calls[configuration] = call
        left = (deadline - time.monotonic()) / (len(DTYPES) - number)
        times, failed = measure.timed_rounds(calls, device, max(0.0, left))
        copied = 2 * inputs.logits.nbytes / times["copy"].ms
        for key, row in found.items():
            row["refused"] = failed.get(key, row["refused"])
            if key in times:
                rate = row["bytes"] / times[key].ms
                row |= {"ms": times[key].ms, "ms_p20": times[key].ms_p20, "ms_p80": times[key].ms_p80}
                row |= {"tb_per_s": rate / 1e9, "of_copy": rate / copied}
        rows += [common | row for row in found.values()]
        del inputs, expected, copy, calls
    measure.append_rows(out, rows)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """The rows, fastest first."""
    lines = [f"{'kernel':10} {'dtype':9} {'block':>6} {'warps':>5} {'ms':>9} {'TB/s':>6} {'of copy':>7}"]
    for row in sorted(rows, key=lambda row: (row["kernel"], row["dtype"], row.get("ms") or 1e9)):
        start = f"{row['kernel']:10} {row['dtype']:9} {row['block_v']:6} {row['num_warps']:5} "
        shown = f"{row['ms']:9.3f} {row['tb_per_s']:6.2f} {row['of_copy']:7.2f}" if "ms" in row else row["refused"]
        lines.append(start + shown)
    return "\n".join(lines)
