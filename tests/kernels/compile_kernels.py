"""Compiles what the launchers of the row kernels would launch on one GPU, and prints what each spills and shares as JSON.

No GPU is needed: Triton is told which one there is, and every launch compiles in place of running. So the kernels have the
flags, blocks, warps and specializations (a stride that 16 divides, a size of one) of real calls.
Run by test_compile_targets.py in a process of its own: `python compile_kernels.py '["cuda", 90, 32]'`; with `all` behind it,
for every combination of flags and dtypes that the launchers can produce.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from tspin_kernels import _rows_triton as rows
from tspin_kernels._inputs import LogitTransform

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# dtypes of the logits, their gradient and the bias; flags as bits (bias, transform, entropy or its gradient, g, q); V
CASES = [
    (BF16, BF16, BF16, 0b00000, 151936),
    (BF16, BF16, BF16, 0b01100, 151936),
    (BF16, BF16, BF16, 0b11111, 50257),
    (FP32, BF16, BF16, 0b10101, 128256),
    (FP32, FP32, FP32, 0b01110, 4097),
    (FP16, FP16, FP32, 0b01010, 100),
    (BF16, BF16, FP32, 0b00110, 1000),
    (FP16, FP16, FP16, 0b11001, 1),
]
ALL_CASES = [
    (*dtypes, flags, V)
    for dtypes in ((BF16, BF16, BF16), (FP16, FP16, FP16), (FP32, FP32, FP32), (FP32, BF16, FP32), (FP32, FP16, FP16))
    for flags in range(32)
    for V in (100, 50257, 151936)
]


def launch(logits: torch.dtype, dlogits: torch.dtype, bias: torch.dtype, flags: int, V: int) -> None:
    """Every launcher once, on tensors without data."""
    with torch.device("meta"):
        has = [bool(flags >> bit & 1) for bit in range(5)]
        row = torch.empty(8192)
        products, gradient = torch.empty(8192, V, dtype=logits), torch.empty(8192, V, dtype=dlogits)
        common = torch.empty(V, dtype=bias) if has[0] else None, torch.empty(8192, dtype=torch.int64)
        transform = LogitTransform(0.5, 30.0, 0.7) if has[1] else LogitTransform()
        entropy, g, q = (row if flag else None for flag in has[2:])
        rows.row_stats_(products, *common, row, row, entropy, row, transform)
        into = products if logits == dlogits else gradient
        rows.dlogits_(products, into, *common, row, row, entropy, g, entropy, q, transform)
        rows.scale_(gradient, row[0])


def usage(compiled: CompiledKernel) -> tuple[int, int]:
    """Spilled (bytes of stack and local memory on NVIDIA, registers on AMD), and registers."""
    if "cubin" not in compiled.asm:
        text = compiled.asm["amdgcn"]
        spilled = re.findall(r"\.[sv]gpr_spill_count:\s*(\d+)", text)
        assert spilled, "no spill counts in the metadata"
        return sum(map(int, spilled)), int(re.findall(r"\.vgpr_count:\s*(\d+)", text)[0])
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        output = subprocess.run(command, capture_output=True, text=True, check=True)
    found = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", output.stdout + output.stderr)
    assert found, output.stdout + output.stderr
    return int(found[2]) + int(found[3]), int(found[1])


def compile_launches(target: GPUTarget, run: Callable[[], Any]) -> list[CompiledKernel]:
    """What the launches inside `run` would have run on `target`."""
    compiled = []
    stub = {"get_current_device": lambda: 0, "get_current_stream": lambda _: 0, "get_current_target": lambda: target}
    driver.set_active(SimpleNamespace(**stub))
    before = JITFunction.__getitem__
    JITFunction.__getitem__ = lambda self, grid: lambda *a, **k: compiled.append(self.warmup(*a, grid=grid, **k))
    try:
        run()
    finally:
        JITFunction.__getitem__ = before
    return compiled


def measure(target: GPUTarget, cases: list[tuple]) -> dict[str, tuple[int, int, int]]:
    """Of each kernel and case what it spills, its shared memory in bytes, and the registers of a warp's worth of its threads."""
    found = {}
    for case in cases:
        for kernel in compile_launches(target, lambda case=case: launch(*case)):
            spilled, registers = usage(kernel)
            name = f"{kernel.metadata.name} {[str(part).removeprefix('torch.') for part in case]}"
            found[name] = spilled, kernel.metadata.shared, registers * kernel.metadata.num_warps
    return found


if __name__ == "__main__":
    print(json.dumps(measure(GPUTarget(*json.loads(sys.argv[1])), ALL_CASES if sys.argv[2:] else CASES)))
