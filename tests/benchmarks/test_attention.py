"""The attentions that are compared on a GPU are one function: here with plain PyTorch in place of the varlen kernel."""

import pytest
import torch
from varlen import stand_in

from benchmarks import attention

CPU = torch.device("cpu")


@pytest.fixture
def small(monkeypatch):
    stand_in(monkeypatch)
    monkeypatch.setattr(attention, "HEADS", {"tiny": (4, 2, 8)})
    monkeypatch.setattr(attention, "LENGTHS", ((9, 4), (1, 1)))


@pytest.mark.parametrize("name", attention.IMPLEMENTATIONS)
def test_all_are_one_function(small, name):
    P, L = 7, 3
    inputs = [torch.randn(1, heads, P + 3 * L, 8, requires_grad=True) for heads in (4, 2, 2)]
    grad = torch.randn(P + 3 * L, 4, 8)
    got = attention._call(attention.IMPLEMENTATIONS[name], inputs, grad, P)
    want = attention._call(attention.exact, inputs, grad.double(), P)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=1e-5, atol=1e-5)


def test_rows_and_what_is_wrong_or_missing(small, monkeypatch, tmp_path):
    def absent(*_):
        raise RuntimeError("no kernel")

    wrong = {"wrong": lambda q, k, v, P: attention.separate(q, k, v, P) * 1.1, "absent": absent}
    monkeypatch.setattr(attention, "IMPLEMENTATIONS", attention.IMPLEMENTATIONS | wrong)
    rows = attention.run(CPU, 0.2, tmp_path / "rows.jsonl")
    assert len(rows) == 12 and attention.measure.read_rows(tmp_path / "rows.jsonl") == rows
    missing = {row["implementation"]: row["missing"] for row in rows if row["missing"]}
    assert missing == {"wrong": "another result than float64", "absent": "RuntimeError: no kernel"}
    assert all(row["ms"] > 0 and row["error"] < 1e-5 for row in rows if not row["missing"])
    assert "no kernel" in attention.table(rows) and attention.table(rows).count("ms") == 8
