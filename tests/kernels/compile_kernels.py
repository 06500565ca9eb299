"""Compiles every Triton kernel for one target and prints what each spills and shares, in bytes, as JSON; no GPU needed.

Run by test_compile_targets.py in a process of its own: `python compile_kernels.py '["cuda", 90, 32]'`; with `all` behind it,
for every combination of flags and dtypes that the launcher can produce.
"""

import itertools
import json
import re
import subprocess
import sys
import tempfile

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel
from triton.runtime.jit import JITFunction

from tspin_kernels import _rows_triton as rows

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# dtype of the logits, dtype of the bias, flags as bits, columns of a block of logits: all, none, and some mixtures
CASES = [
    ("bf16", "bf16", 0b11111, 200_000),
    ("bf16", "bf16", 0b00000, 200_000),
    ("fp32", "bf16", 0b10101, 200_000),
    ("fp16", "fp32", 0b01010, 100),
    ("bf16", "fp32", 0b00110, 1000),
    ("fp16", "fp16", 0b11001, 200_000),
]
ALL_CASES = [
    (logits, bias, flags, width)
    for logits, bias in (("bf16", "bf16"), ("fp16", "fp16"), ("fp32", "fp32"), ("fp32", "bf16"))
    for flags in range(32)
    for width in (100, 200_000)
]


def compile_kernel(
    kernel: JITFunction, target: GPUTarget, logits: str, bias: str, flags: int, width: int
) -> CompiledKernel:
    """The kernel as the launcher would configure it for a block of `width` columns."""
    launch = rows._launch_options(torch.empty(2, width, dtype=DTYPES[logits], device="meta"))
    pointers = {"logits_ptr": "*" + logits, "bias_ptr": "*" + bias, "target_ptr": "*i64"}
    signature, constants, bit = {}, {}, itertools.count()
    for param in kernel.params:
        name = param.name
        if param.is_constexpr:
            signature[name] = "constexpr"
            constants[name] = launch[name] if name in launch else bool(flags >> next(bit) & 1)
        elif name.endswith("_ptr"):
            signature[name] = pointers.get(name, "*fp32")
        else:
            signature[name] = "i32" if name == "V" else "i64" if name.startswith("stride") else "fp32"
    source = ASTSource(kernel, signature, constants)
    return triton.compile(source, target=target, options={"num_warps": launch["num_warps"]})


def spilled(compiled: CompiledKernel) -> int:
    """Bytes of stack and local memory on NVIDIA, spilled registers on AMD."""
    if "cubin" not in compiled.asm:
        counts = re.findall(r"\.[sv]gpr_spill_count:\s*(\d+)", compiled.asm["amdgcn"])
        assert counts, "no spill counts in the metadata"
        return sum(map(int, counts))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        output = subprocess.run(command, capture_output=True, text=True, check=True)
    usage = re.search(r"STACK:(\d+) .*LOCAL:(\d+)", output.stdout + output.stderr)
    assert usage, output.stdout + output.stderr
    return int(usage[1]) + int(usage[2])


def measure(target: GPUTarget, cases: list[tuple[str, str, int, int]]) -> dict[str, tuple[int, int]]:
    """Of each kernel and case what it spills and what it takes of shared memory, bytes."""
    found = {}
    for name, kernel in vars(rows).items():
        if isinstance(kernel, JITFunction) and name.endswith("_kernel"):
            for case in cases:
                compiled = compile_kernel(kernel, target, *case)
                found[f"{name} {case}"] = (spilled(compiled), compiled.metadata.shared)
    return found


if __name__ == "__main__":
    print(json.dumps(measure(GPUTarget(*json.loads(sys.argv[1])), ALL_CASES if sys.argv[2:] else CASES)))
