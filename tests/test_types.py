"""The types hold, and reach the user: pyright, in basic mode, on both packages and on a program that uses the public names.

Marked soak: the wrapper `pyright` fetches a Node.js where there is none.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROGRAM = """
import torch
from tspin import SelfPlayConfig, TSPINConfig
from tspin_kernels import linear_logprobs

hidden, weight, targets = torch.randn(4, 8), torch.randn(20, 8), torch.randint(20, (4,))
total: torch.Tensor = linear_logprobs(hidden, weight, targets).logsumexp.sum()
beta: float = TSPINConfig("out").beta_at(1)
config: SelfPlayConfig = SelfPlayConfig.from_dict({})
linear_logprobs(hidden, weight, 3)
TSPINConfig("out", method="ppo")
SelfPlayConfig.from_fiel("x")
"""

pytestmark = [
    pytest.mark.soak,
    pytest.mark.skipif(shutil.which("pyright") is None, reason="pyright is not installed"),
]


def errors(*arguments: str | Path) -> list[tuple[str, int, str]]:
    """(file, line from 1, rule) of each error and warning that pyright reports."""
    command = ["pyright", "--outputjson", "--pythonpath", sys.executable, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    found = json.loads(done.stdout)["generalDiagnostics"]
    return [(Path(f["file"]).name, f["range"]["start"]["line"] + 1, f.get("rule", "")) for f in found]


def test_both_packages_are_clean():
    assert errors("tspin", "tspin_kernels") == []


def test_a_users_program_sees_the_types(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    assert [line for _, line, _ in errors(program)] == [10, 11, 12]
