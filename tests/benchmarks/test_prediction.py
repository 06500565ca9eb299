"""The benchmark that sets predicted memory beside a GPU's own count, with an allocator that counts nothing standing in for it."""

import pytest
import torch

from benchmarks import prediction
from benchmarks.__main__ import main
from tspin import tiling

CELLS = [("tiny", "full", 20, 5, {"gradient_checkpointing": True}), ("tiny", "lora", 20, 5, {"prefix_sharing": "off"})]


class Gpu:
    """A device that is the CPU by another name."""

    type = "cuda"


@pytest.fixture
def count(monkeypatch):
    monkeypatch.setattr(prediction, "CELLS", CELLS)
    calls = {"reset_peak_memory_stats": lambda *_: None, "empty_cache": lambda: None}
    for name, call in calls.items():
        monkeypatch.setattr(torch.cuda, name, call)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda *_: 2**21)


def test_a_cell_trains_and_predicts(count):
    for cell in CELLS:
        found = prediction._cell(*cell, torch.device("cpu"), 1)
        assert found["measured_gib"] == 2**21 / 2**30
        assert found["predicted_gib"] == pytest.approx(sum(found["terms"].values()))
        assert found["ratio"] == pytest.approx(found["predicted_gib"] / found["measured_gib"]) and found["ratio"] > 0


def test_a_cell_that_fails_is_a_row(count, monkeypatch, tmp_path):
    cell = iter([RuntimeError("no room"), {"predicted_gib": 1.0, "measured_gib": 2.0, "ratio": 0.5, "terms": {}}])

    def found(*_):
        result = next(cell)
        if isinstance(result, Exception):
            raise result
        return result

    monkeypatch.setattr(prediction, "_cell", found)
    monkeypatch.setattr(prediction.measure, "environment", lambda *_: {"device": "a GPU"})
    rows = prediction.run(Gpu(), tmp_path / "rows.jsonl")  # type: ignore[arg-type]
    assert [row["missing"] for row in rows] == ["RuntimeError: no room", None]
    assert prediction.measure.read_rows(tmp_path / "rows.jsonl") == rows
    assert "no room" in prediction.table(rows) and "0.500" in prediction.table(rows)


def test_a_cpu_is_refused(tmp_path):
    with pytest.raises(ValueError, match="device: want a GPU, whose allocator counts bytes, got cpu"):
        main(["prediction", "--device", "cpu", "--out", str(tmp_path)])


def test_the_longest_triplets_are_rows_that_grow_with_what_saves_memory(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(tiling, "MLP_TILE", 64)
    monkeypatch.setattr(tiling, "NORM_TILE", 64)
    assert main(["longest", "--models", "tiny", "--caps", "0.01", "--ratios", "8", "--out", str(tmp_path)]) == 0
    rows = prediction.measure.read_rows(tmp_path / "predicted.jsonl")
    assert [row["levers"] for row in rows] == 2 * list(prediction.LEVERS)
    for method in ("full", "lora"):
        found = [row["longest"] for row in rows if row["method"] == method]
        assert 0 < found[0] < found[1] < found[2] < max(found[3:])
    assert "tiny, lora, 0.01 GiB, 8 : 1" in capsys.readouterr().out
    assert main(["plots", str(tmp_path)]) == 0
    assert (tmp_path / "predicted.png").read_bytes().startswith(b"\x89PNG")
