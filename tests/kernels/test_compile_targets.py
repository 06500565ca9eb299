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


def assert_compiles(target, *options):
    """In a process without the interpreter, which the other tests may run under."""
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
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found) >= 12, found
    bad = {name: both for name, both in found.items() if both[0] or not 0 <= both[1] <= SHARED[target]}
    assert not bad, f"bytes spilled and shared: {bad}"


@pytest.mark.parametrize("target", TARGETS)
def test_kernels_compile_without_spills(target):
    assert_compiles(target)


@pytest.mark.soak
@pytest.mark.parametrize("target", TARGETS)
def test_every_configuration_compiles_without_spills(target):
    assert_compiles(target, "all")
