"""Offsets beyond 2**31: row kernels on a virtual buffer whose third row starts past it; only its rows are touched."""

import pytest
import torch

from .conftest import Implementation
from .oracle import plain_logprobs

STRIDE = 2**30 + 64


@pytest.fixture
def rows(fused: Implementation):
    if fused.backend != "triton":
        pytest.skip("PyTorch's own offsets are 64 bits wide")
    if fused.device != "cpu":
        pytest.skip("memory is not virtual on a GPU; test_linear_logprobs.py covers it with real logits there")
    return pytest.importorskip("tspin_kernels._rows_triton", reason="the triton backend needs triton")


def test_rows_past_2_to_the_31(rows):
    from tspin_kernels._inputs import LogitTransform

    try:
        memory = torch.empty(2**31 + 2 * STRIDE + 256, dtype=torch.float16)
    except RuntimeError:
        pytest.skip("this machine does not overcommit 8 GiB of memory")
    # As much in front of the rows, so that an offset that wraps reads other memory of ours instead of crashing.
    logits = memory.as_strided((3, 200), (STRIDE, 1), 2**31)
    values = torch.randn(3, 200, generator=torch.Generator().manual_seed(0)).half()
    logits.copy_(values)
    targets = torch.tensor([3, 150, 199])
    m, s, u, target = torch.full((3,), -torch.inf), torch.zeros(3), torch.zeros(3), torch.full((3,), torch.nan)
    rows.row_stats_(logits, None, targets, m, s, u, target, LogitTransform())
    identity = torch.eye(200, dtype=torch.float64)
    z = values.double().requires_grad_()
    logprobs, entropy, logsumexp = plain_logprobs(z, identity, targets)
    assert torch.allclose((m + s.log()).double(), logsumexp, atol=1e-5)
    assert torch.allclose((target - m - s.log()).double(), logprobs, atol=1e-5)
    assert torch.allclose((s.log() - u / s).double(), entropy, atol=1e-5)
    g = torch.tensor([0.5, -1.0, 2.0])
    rows.dlogits_(logits, logits, None, targets, m, s.log(), s.log() - u / s, g, g, g, LogitTransform())
    (logprobs + entropy + logsumexp).mul(g).sum().backward()
    assert torch.allclose(logits.double(), z.grad, atol=2e-3)
