"""Every Triton kernel compiles for the GPUs we name, on a machine that has none, without spilling a register."""

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


@pytest.mark.parametrize("target", TARGETS)
def test_kernels_compile_without_spills(target):
    """In a process without the interpreter, which the other tests may run under."""
    pytest.importorskip("triton", reason="needs triton")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(Path(tspin_kernels.__file__).parent.parent)
    command = [sys.executable, str(Path(__file__).with_name("compile_kernels.py")), json.dumps(TARGETS[target])]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    spilled = json.loads(done.stdout.splitlines()[-1])
    assert len(spilled) >= 8, spilled
    assert not any(spilled.values()), {k: v for k, v in spilled.items() if v}
