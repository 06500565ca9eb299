"""Timings tell of every attempt, and never stand in the way of a run."""

import errno
import os

import pytest

from tspin.run_files import read_json_lines
from tspin.timings import timed


def test_an_attempt_leaves_a_line_whether_it_ends_well_or_not(tmp_path):
    path = tmp_path / "timings.jsonl"
    with pytest.raises(KeyboardInterrupt), timed(path, "train"):
        raise KeyboardInterrupt
    with timed(path, "train"):
        pass
    first, second = read_json_lines(path)
    assert (first["stage"], first["finished"]) == ("train", False)
    assert (second["stage"], second["finished"]) == ("train", True)
    assert all(entry["seconds"] >= 0 and 0.01 < entry["host_peak_gib"] < 1000 for entry in (first, second))


def test_a_full_disk_costs_the_line_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "timings.jsonl"
    with timed(path, "train"):
        pass
    lines = path.read_bytes()

    def fsync(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fsync)
    with timed(path, "eval"):
        pass
    assert path.read_bytes() == lines
