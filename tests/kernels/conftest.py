"""Which implementations the kernel tests run over: every backend on the device where it can run on this machine.

Without CUDA the Triton backend runs under Triton's interpreter (tests/conftest.py).
"""

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch


@dataclass(frozen=True)
class Implementation:
    """A backend and the device that its tensors live on."""

    backend: str
    device: str

    @property
    def interpreted(self) -> bool:
        """A kernel's program costs a millisecond here, and stores to bfloat16 truncate instead of rounding."""
        return self.backend == "triton" and self.device == "cpu"

    def __str__(self) -> str:
        return f"{self.backend}-{self.device}"


REFERENCE = Implementation("reference", "cpu")
FUSED = [Implementation("torch", "cpu"), Implementation("triton", "cuda" if torch.cuda.is_available() else "cpu")]
if torch.cuda.is_available():
    FUSED.append(Implementation("torch", "cuda"))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Under the interpreter only the extremes of the budget run: between them only PyTorch code differs."""
    slow = []
    for item in items:
        params = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
        implementation = params.get("implementation", params.get("fused"))
        if isinstance(implementation, Implementation) and implementation.interpreted and params.get("budget") in (2, 4):
            slow.append(item)
    if slow:
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if item not in slow]


def _require(implementation: Implementation) -> Implementation:
    if implementation.backend == "triton":
        pytest.importorskip("triton", reason="the triton backend needs triton, which this machine lacks")
    return implementation


@pytest.fixture(params=[REFERENCE, *FUSED], ids=str)
def implementation(request: pytest.FixtureRequest) -> Implementation:
    """Every implementation, the plain reference included."""
    return _require(request.param)


@pytest.fixture(params=FUSED, ids=str)
def fused(request: pytest.FixtureRequest) -> Implementation:
    """The implementations with a custom backward and bounded memory."""
    return _require(request.param)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Tiny products run fastest on one thread, and always in the same order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
