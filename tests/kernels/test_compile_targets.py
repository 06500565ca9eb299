"""Every Triton kernel compiles for the GPUs we name, on a machine that has none: no register spilled, shared memory to spare."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import tspin_kernels

TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
# Bytes that one block may have.
SHARED = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}


def compiled(target, *options):
    """What compile_kernels.py prints, in a process without the interpreter, which the other tests may run under."""
    pytest.importorskip("triton", reason="needs triton")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(Path(tspin_kernels.__file__).parent.parent)
    command = [
        sys.executable,
        str(Path(__file__).with_name("compile_kernels.py")),
        json.dumps(TARGETS[target]),
        *options,
    ]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def assert_compiles(target, *options):
    found = compiled(target, *options)
    assert len(found) >= 24, found
    # Of the kernel that reads only lists, ptxas trades two registers for more programs at once, at some widths on each target.
    may_spill = {name: 8 * name.startswith("_keep_largest_kernel") for name in found}
    bad = {
        name: (spilled, shared)
        for name, (spilled, shared) in found.items()
        if spilled > may_spill[name] or not 0 <= shared <= SHARED[target]
    }
    assert not bad, f"bytes spilled and shared: {bad}"


@pytest.mark.parametrize("target", TARGETS)
def test_kernels_compile_without_spills(target):
    assert_compiles(target)


def test_a_logit_costs_one_exponential_and_little_else():
    """On Hopper some 15 instructions a logit keep pace with the memory that it is read from; threads meet outside the loop."""
    found = compiled("sm_90", "sass")
    logits = 4096 // 256  # of a thread, in each turn
    for name, lines in found.items():
        count = {
            kind: sum(kind in text for _, text in lines) for kind in ("MUFU.EX2", "MUFU.RCP", "LDG.E.128", "STG.E.128")
        }
        if not name.startswith(("_row_stats", "_dlogits")):
            continue
        # One reciprocal may be of the rows' constants, one of the program's number.
        assert count["MUFU.EX2"] <= logits + 10 and count["MUFU.RCP"] <= 2, (name, count)
        assert count["LDG.E.128"] == logits / 8, (name, count)
        if name.startswith("_dlogits"):
            assert count["STG.E.128"] == logits / 8 and len(lines) < 26 * logits, (name, count, len(lines))
            continue
        jumps = [(at, int(text.split("0x")[-1], 16)) for at, text in lines if "BRA 0x" in text]
        ((end, start),) = [(int(at, 16), to) for at, to in jumps if to < int(at, 16) - 16]
        loop = [text for at, text in lines if start <= int(at, 16) <= end]
        assert len(loop) <= 12 * logits, (name, len(loop) / logits)
        assert not [text for text in loop if "BAR" in text or "SHFL" in text], name


def test_filtering_reads_each_logit_once():
    """Some seven instructions a logit in whole vectors, and threads meet outside the loop."""
    found = compiled("sm_90", "sass")
    (large,) = (lines for name, lines in found.items() if name == "_list_large_kernel 8")
    (sums,) = (lines for name, lines in found.items() if name == "_segment_sums_kernel 8")
    jumps = [(int(at, 16), int(text.split("0x")[-1], 16)) for at, text in large if "BRA 0x" in text]
    ((end, start),) = [(at, to) for at, to in jumps if to < at - 16]
    loop = [text for at, text in large if start <= int(at, 16) <= end]
    assert sum("LDG.E.128" in text for text in loop) == 1 and not any("LDG.E.U16" in text for text in loop)
    assert len(loop) <= 8 * 7 and not [text for text in loop if "BAR" in text or "SHFL" in text]
    assert sum("LDG.E.128" in text for _, text in sums) >= 4


@pytest.mark.soak
@pytest.mark.parametrize("target", TARGETS)
def test_every_configuration_compiles_without_spills(target):
    assert_compiles(target, "all")
