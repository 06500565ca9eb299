"""Compiles what the launchers of the row kernels would launch on one GPU, and prints what each spills and shares as JSON.

No GPU is needed: Triton is told which one there is, and every launch compiles in place of running. So the kernels have the
flags, blocks, warps and specializations (a stride that 16 divides, a size of one) of real calls.
Run by test_compile_targets.py in a process of its own: `python compile_kernels.py '["cuda", 90, 32]'`; with `all` behind it,
for every combination of flags and dtypes that the launchers can produce; with `sass`, it prints the instructions of two cases.
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
from tspin_kernels import _sparse_triton as sparse
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
        rows.move_rows_(products, common[1])
        sparse.keep_largest(products, common[1], row, max(1, V // 256))
        for index, fresh in ((torch.int32, True), (torch.int64, False)):
            entries, starts = torch.empty(900000, dtype=index), torch.empty(V + 1, dtype=torch.int64)
            factor, operand = row[0] if has[1] else None, torch.empty(8192, 896, dtype=dlogits)
            into = torch.empty(V, 896, dtype=dlogits if fresh else torch.float32)
            sparse.segment_sums(into, starts, entries, row, operand, factor, fresh)


def spilled(compiled: CompiledKernel) -> int:
    """Bytes of stack and local memory on NVIDIA, spilled registers on AMD."""
    if "cubin" not in compiled.asm:
        counts = re.findall(r"\.[sv]gpr_spill_count:\s*(\d+)", compiled.asm["amdgcn"])
        assert counts, "no spill counts in the metadata"
        return sum(map(int, counts))
    output = cuobjdump(compiled, "-res-usage")
    found = re.search(r"STACK:(\d+) .*LOCAL:(\d+)", output)
    assert found, output
    return int(found[1]) + int(found[2])


def cuobjdump(compiled: CompiledKernel, option: str) -> str:
    """What the tool that Triton ships says of a cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, option, file.name]
        output = subprocess.run(command, capture_output=True, text=True, check=True)
    return output.stdout + output.stderr


def instructions(target: GPUTarget) -> dict[str, list[tuple[str, str]]]:
    """Address and text of each instruction, of the kernels of T-SPIN's loss and of differentiable entropy."""
    found = {}
    for case in ((BF16, BF16, BF16, 0b01000, 151936), (BF16, BF16, BF16, 0b01100, 151936)):
        for kernel in compile_launches(target, lambda case=case: launch(*case)):
            lines = re.findall(r"/\*([0-9a-f]{4,5})\*/\s+(.*?)\s*;", cuobjdump(kernel, "-sass"))
            found[f"{kernel.metadata.name} {case[3]}"] = lines
    return found


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


def measure(target: GPUTarget, cases: list[tuple]) -> dict[str, tuple[int, int]]:
    """Of each kernel and case what it spills and what it takes of shared memory, bytes."""
    found = {}
    for case in cases:
        for kernel in compile_launches(target, lambda case=case: launch(*case)):
            name = f"{kernel.metadata.name} {[str(part).removeprefix('torch.') for part in case]}"
            found[name] = spilled(kernel), kernel.metadata.shared
    return found


if __name__ == "__main__":
    gpu, what = GPUTarget(*json.loads(sys.argv[1])), sys.argv[2:]
    print(json.dumps(instructions(gpu) if what == ["sass"] else measure(gpu, ALL_CASES if what else CASES)))
