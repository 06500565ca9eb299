"""What importing the package brings along: torch and triton only, and no triton where there is none."""

import os
import subprocess
import sys

import pytest

FOREIGN = "transformers datasets accelerate peft trl tspin matplotlib rich pandas safetensors yaml"
LIST_FOREIGN = f"import sys; print(*(name for name in {FOREIGN.split()!r} if name in sys.modules))"
HIDE_TRITON = "import sys; sys.modules['triton'] = None; sys.modules['triton.language'] = None"
CALL = """
import torch, tspin_kernels
h, w, y = torch.randn(4, 8, requires_grad=True), torch.randn(20, 8), torch.randint(20, (4,))
for backend in ('auto', 'torch', 'reference'):
    tspin_kernels.linear_logprobs(h, w, y, backend=backend).logprobs.sum().backward()
print('ok')
"""


def run(*lines: str, **variables: str) -> str:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | variables
    done = subprocess.run(
        [sys.executable, "-W", "error::ImportWarning", "-c", "\n".join(lines)],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_imports_nothing_foreign():
    assert run("import tspin_kernels", CALL, LIST_FOREIGN).splitlines() == ["ok"]


def test_the_import_check_can_fail():
    assert run("import tspin_kernels, yaml", LIST_FOREIGN) == "yaml"


def test_works_without_triton():
    assert run(HIDE_TRITON, CALL) == "ok"


def test_the_missing_triton_is_seen_missing():
    code = [
        HIDE_TRITON,
        "import torch, tspin_kernels",
        "h, w, y = torch.randn(4, 8), torch.randn(20, 8), torch.randint(20, (4,))",
        "try: tspin_kernels.linear_logprobs(h, w, y, backend='triton')",
        "except ValueError as error: print(error)",
    ]
    message = run(*code)
    assert "backend" in message and "install" in message and "torch" in message


def test_triton_on_the_cpu_is_refused_without_the_interpreter():
    pytest.importorskip("triton", reason="needs triton")
    code = [
        "import torch, tspin_kernels",
        "h, w, y = torch.randn(4, 8), torch.randn(20, 8), torch.randint(20, (4,))",
        "try: tspin_kernels.linear_logprobs(h, w, y, backend='triton')",
        "except ValueError as error: print(error)",
    ]
    message = run(*code)
    assert "backend" in message and "cpu" in message and "TRITON_INTERPRET" in message


def test_warnings_are_errors():
    assert run("import warnings; warnings.simplefilter('error')", "import torch", CALL) == "ok"


def test_public_names():
    import tspin_kernels

    assert sorted(tspin_kernels.__all__) == sorted(set(tspin_kernels.__all__))
    for name in tspin_kernels.__all__:
        assert getattr(tspin_kernels, name).__doc__, f"{name} has no docstring"


def test_no_test_class_hides_from_collection():
    """A class with __init__ collects nothing; here there are no classes of tests at all."""
    from pathlib import Path

    for path in Path(__file__).parent.glob("test_*.py"):
        text = path.read_text()
        assert "\nclass Test" not in text and "def test_" in text, path.name
        names = [line.split("(")[0] for line in text.splitlines() if line.startswith("def test_")]
        assert len(names) == len(set(names)), f"{path.name}: a test hides another of the same name"
