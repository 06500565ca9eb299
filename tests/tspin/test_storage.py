"""Storage: what a reader sees after a write that was cut short, a file that was altered, or a disk that was full."""

import errno
import io
import os
import stat
import subprocess
import sys
from functools import partial
from pathlib import Path

import pyarrow as pa
import pytest

from tspin import storage
from tspin.checkpoints import Checkpoints

TABLE = pa.table({"row": [3, 1], "text": ["a", "b"]})


def test_write_atomic_replaces_and_leaves_no_temporary(tmp_path):
    path = tmp_path / "deep" / "file"
    storage.write_atomic(path, b"old")
    storage.write_atomic(path, b"new")
    assert path.read_bytes() == b"new"
    assert [p.name for p in path.parent.iterdir()] == ["file"]


@pytest.fixture
def disk_order(tmp_path, monkeypatch):
    """What is synced and what renamed below tmp_path, in order: "sync FILE" and "FILE -> FILE"."""
    order, real = [], {name: getattr(os, name) for name in ("fsync", "replace", "rename")}

    def name(path):
        return os.path.relpath(path, tmp_path)

    def fsync(descriptor):
        order.append(f"sync {name(os.readlink(f'/proc/self/fd/{descriptor}'))}")
        real["fsync"](descriptor)

    def rename(old, new, call):
        order.append(f"{name(old)} -> {name(new)}")
        real[call](old, new)

    monkeypatch.setattr(os, "fsync", fsync)
    for call in ("replace", "rename"):
        monkeypatch.setattr(os, call, partial(rename, call=call))
    return order


def test_a_file_is_on_the_disk_before_it_has_its_name_and_the_name_before_the_write_returns(tmp_path, disk_order):
    storage.write_atomic(tmp_path / "file", b"new")
    assert disk_order == ["sync .file.tmp", ".file.tmp -> file", "sync ."]


def test_a_staged_directory_is_on_the_disk_before_it_has_its_name(tmp_path, disk_order):
    with storage.staged_directory(tmp_path / "model") as staged:
        (staged / "sub").mkdir()
        for name in ("a", "sub/b"):
            (staged / name).write_text(name)
        assert not disk_order
    assert sorted(disk_order[:-2]) == [f"sync .model.tmp{name}" for name in ("", "/a", "/sub", "/sub/b")]
    assert disk_order[-2:] == [".model.tmp -> model", "sync ."]


def test_what_a_seal_vouches_for_is_on_the_disk_before_it(tmp_path, disk_order):
    for name in ("c/a", "c/sub/b"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    storage.seal(tmp_path / "c")
    assert sorted(disk_order[:-3]) == ["sync .", "sync c", "sync c/a", "sync c/sub", "sync c/sub/b"]
    assert disk_order[-3:] == ["sync c/.complete.json.tmp", "c/.complete.json.tmp -> c/complete.json", "sync c"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_write_cut_short_leaves_the_old_file(tmp_path, monkeypatch, call):
    path = tmp_path / "file"
    storage.write_atomic(path, b"old")

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, call, stop)
    with pytest.raises(KeyboardInterrupt):
        storage.write_atomic(path, b"new")
    assert path.read_bytes() == b"old"


def test_a_full_disk_is_a_clear_error_and_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file"
    storage.write_atomic(path, b"old")

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ValueError, match=f"no space left on the device while writing {path}.*run the same command"):
        storage.write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    "error, scarce, full",
    [
        (OSError(errno.EDQUOT, "quota"), False, True),
        (Exception("I/O error: No space left on device (os error 28)"), False, True),
        (RuntimeError("PytorchStreamWriter failed writing file"), True, True),
        (RuntimeError("PytorchStreamWriter failed writing file"), False, False),
        (OSError(errno.ECONNRESET, "broken"), False, False),
        (ValueError("other"), True, False),
    ],
)
def test_disk_errors_tells_a_full_disk_from_other_faults(tmp_path, monkeypatch, error, scarce, full):
    usage = type("usage", (), {"free": 100 if scarce else 1 << 40})
    monkeypatch.setattr(storage.shutil, "disk_usage", lambda path: usage)
    with (
        pytest.raises(type(error) if not full else ValueError) as caught,
        storage.disk_errors(tmp_path / "not" / "there"),
    ):
        raise error
    assert ("no space left on the device" in str(caught.value)) == full


@pytest.mark.parametrize("code", [errno.EROFS, errno.ENAMETOOLONG, errno.EIO, errno.EFBIG, errno.ESTALE])
def test_a_disk_that_cannot_be_written_is_named_with_a_remedy(tmp_path, monkeypatch, code):
    def refuse(*args, **kwargs):
        raise OSError(code, os.strerror(code), "there")

    remedy = f"cannot use {tmp_path}.*{os.strerror(code)}: 'there'; choose another output_dir, on a writable disk"
    for owner, name in ((os, "fsync"), (os, "replace"), (Path, "mkdir")):
        with monkeypatch.context() as patch, pytest.raises(ValueError, match=remedy):
            patch.setattr(owner, name, refuse)
            storage.write_atomic(tmp_path / "new" / "file", b"new")
    with monkeypatch.context() as patch, pytest.raises(ValueError, match=remedy), storage.run_lock(tmp_path / "run"):
        patch.setattr(os, "fsync", refuse)
        os.fsync(0)
    with monkeypatch.context() as patch, pytest.raises(ValueError, match=remedy):
        patch.setattr(Path, "mkdir", refuse)
        with storage.run_lock(tmp_path / "run"):
            pass


def test_a_name_too_long_for_the_disk_is_named(tmp_path):
    error = pytest.raises(ValueError, match=r"cannot use .*File name too long.*; choose another output_dir")
    with error, storage.run_lock(tmp_path / ("x" * 300)):
        pass


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP, errno.ENOSYS])
def test_a_disk_that_cannot_sync_directories_will_do_but_one_that_fails_to_will_not(tmp_path, monkeypatch, code):
    real = os.fsync

    def fsync(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(code, os.strerror(code))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    storage.write_atomic(tmp_path / "file", b"new")
    with storage.staged_directory(tmp_path / "model") as staged:
        (staged / "weights").write_bytes(b"whole")
    storage.seal(tmp_path / "model")
    assert storage.read_seal(tmp_path / "model") and (tmp_path / "file").read_bytes() == b"new"
    code = errno.EIO
    with pytest.raises(ValueError, match=r"cannot use .*file: .*error"):
        storage.write_atomic(tmp_path / "file", b"newer")


def test_a_shard_comes_back_and_replaces_earlier_ones(tmp_path):
    storage.write_shard(tmp_path, 0, pa.table({"row": [1]}), {"seed": 1})
    path = storage.write_shard(tmp_path, 0, TABLE, {"seed": 1})
    assert storage.read_shard(tmp_path, 0, {"seed": 1}).to_pydict() == TABLE.to_pydict()
    assert list(tmp_path.iterdir()) == [path]
    assert storage.read_shard(tmp_path, 1, {"seed": 1}) is None


@pytest.mark.parametrize("damage", ["truncate", "flip", "empty"])
def test_a_damaged_shard_does_not_count(tmp_path, damage):
    path = storage.write_shard(tmp_path, 0, TABLE, {})
    data = bytearray(path.read_bytes())
    if damage == "truncate":
        data = data[:-1]
    elif damage == "flip":
        data[len(data) // 2] ^= 1
    else:
        data = bytearray()
    path.write_bytes(data)
    assert storage.read_shard(tmp_path, 0, {}) is None
    assert storage.shard_request(tmp_path) is None


def test_shards_of_another_request_are_refused_with_the_difference(tmp_path):
    storage.write_shard(tmp_path, 0, TABLE, {"seed": 1, "top_k": 0})
    with pytest.raises(ValueError, match=r"another request \(seed: stored 1, wanted 2\); delete"):
        storage.read_shard(tmp_path, 0, {"seed": 2, "top_k": 0})


def test_equal_tables_make_equal_bytes(tmp_path):
    one = storage.write_shard(tmp_path / "a", 0, TABLE, {"x": 1, "y": 2})
    two = storage.write_shard(tmp_path / "b", 0, TABLE, {"y": 2, "x": 1})
    assert one.name == two.name and one.read_bytes() == two.read_bytes()


def test_a_staged_directory_appears_whole_or_not_at_all(tmp_path):
    final = tmp_path / "model"
    with pytest.raises(RuntimeError), storage.staged_directory(final) as staged:
        (staged / "weights").write_bytes(b"half")
        raise RuntimeError
    assert not final.exists()
    with storage.staged_directory(final) as staged:
        assert not list(staged.iterdir())
        (staged / "weights").write_bytes(b"whole")
    assert storage.hash_files(final) == {"weights": storage.sha256(final / "weights")}
    storage.remove_partial(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_remove_partial_takes_only_temporaries(tmp_path):
    (tmp_path / ".model.tmp").mkdir()
    (tmp_path / ".state.json.tmp").write_text("{")
    (tmp_path / "state.json").write_text("{}")
    storage.remove_partial(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["state.json"]


@pytest.mark.parametrize("damage", ["remove", "alter", "add", "unseal"])
def test_a_seal_breaks_with_any_change(tmp_path, damage):
    for name in ("a", "sub/b"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    storage.seal(tmp_path, step=3)
    assert storage.read_seal(tmp_path)["step"] == 3
    if damage == "remove":
        (tmp_path / "sub/b").unlink()
    elif damage == "alter":
        (tmp_path / "a").write_text("A")
    elif damage == "add":
        (tmp_path / "c").write_text("c")
    else:
        (tmp_path / "complete.json").unlink()
    assert storage.read_seal(tmp_path) is None


def test_read_json_names_the_broken_file(tmp_path):
    path = tmp_path / "state.json"
    storage.write_json(path, {"a": 1})
    assert storage.read_json(path) == {"a": 1}
    path.write_text('{"a": ')
    with pytest.raises(ValueError, match=r"state.json is not valid JSON"):
        storage.read_json(path)


HOLD = """
import sys
from tspin.storage import run_lock
with run_lock(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_the_lock_refuses_a_second_process_and_ends_with_a_killed_one(tmp_path):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match=f"in use by process {holder.pid}"), storage.run_lock(tmp_path):
            pass
    finally:
        holder.kill()
        holder.communicate()
    with storage.run_lock(tmp_path), storage.run_lock(tmp_path, process_index=1):
        pass


def test_hashes_are_those_of_sha256(tmp_path):
    (tmp_path / "file").write_bytes(b"abc" * (1 << 19))
    assert storage.sha256(tmp_path / "file") == __import__("hashlib").sha256(b"abc" * (1 << 19)).hexdigest()
    assert storage.hash_json({"b": 1, "a": 2}) == storage.hash_json({"a": 2, "b": 1}) != storage.hash_json({"a": 2})


@pytest.mark.parametrize(
    "name, counts", [("sub/b", True), (".DS_Store", False), (".cache/b", False), ("README.md", False)]
)
def test_the_hash_of_a_directory_is_of_what_a_program_reads_in_it(tmp_path, name, counts):
    (tmp_path / "a").write_text("a")
    before = storage.content_hash(tmp_path)
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("b")
    assert (storage.content_hash(tmp_path) != before) == counts


def test_parquet_is_written_whole(tmp_path):
    import pyarrow.parquet as pq

    storage.write_parquet(tmp_path / "t.parquet", TABLE)
    assert pq.read_table(io.BytesIO((tmp_path / "t.parquet").read_bytes())).equals(TABLE)


def checkpoint(directory, step, *, sealed=True, origin="a", max_steps=9):
    checkpoints = Checkpoints(directory, {"origin": origin})
    checkpoints.at(step).mkdir(parents=True)
    (checkpoints.at(step) / "weights").write_text(str(step))
    if sealed:
        checkpoints.seal(step, max_steps)
    return checkpoints


def steps_in(directory):
    return sorted(int(path.name.split("-")[1]) for path in directory.iterdir())


def test_only_sealed_checkpoints_count(tmp_path):
    assert Checkpoints(tmp_path).last() is None
    checkpoint(tmp_path, 2)
    checkpoint(tmp_path, 10, max_steps=10)
    checkpoints = checkpoint(tmp_path, 12, sealed=False)
    assert checkpoints.last() == checkpoints.final() == tmp_path / "checkpoint-10"
    (tmp_path / "checkpoint-10" / "weights").write_text("altered")
    assert checkpoints.last() == tmp_path / "checkpoint-2" and checkpoints.final() is None


def test_torn_checkpoints_and_those_of_another_origin_are_removed(tmp_path, caplog):
    checkpoint(tmp_path, 1)
    checkpoint(tmp_path, 2, origin="b")
    checkpoints = checkpoint(tmp_path, 3, sealed=False)
    checkpoints.remove_unusable()
    assert steps_in(tmp_path) == [1]
    assert "checkpoint-2 was made with other settings" in caplog.text and "checkpoint-3 is incomplete" in caplog.text


@pytest.mark.parametrize("limit, left", [(None, [2, 9, 10]), (2, [9, 10]), (1, [10]), (0, [10])])
def test_rotation_keeps_the_newest(tmp_path, limit, left):
    for step in (9, 10, 2):
        checkpoints = checkpoint(tmp_path, step)
    checkpoints.rotate(limit)
    assert steps_in(tmp_path) == left


RECORD = {"processes": 1, "device": "cpu", "platform": "p", "versions": {"torch": "1"}, "model": {"files": {}}}
RECORD |= {"data": {"rows": 1}, "eval_data": {"rows": 0}}


@pytest.mark.parametrize(
    "change, refused, allowed",
    [
        ({"model": {"files": {"a": "b"}}}, "another model_name_or_path", False),
        ({"data": {"rows": 2}}, "another dataset", True),
        ({"eval_data": {"rows": 2}}, "another eval_dataset", True),
        ({"processes": 2}, "of 1 processes, now there are 2", True),
        ({"versions": {"torch": "2"}}, None, True),
    ],
)
def test_a_run_is_bound_to_its_model_data_and_processes(tmp_path, caplog, change, refused, allowed):
    path = tmp_path / "run.json"
    storage.bind(path, RECORD)
    storage.bind(path, RECORD)
    assert storage.read_record(path) == RECORD and not caplog.text
    if refused:
        with pytest.raises(ValueError, match=refused):
            storage.bind(path, RECORD | change)
    else:
        storage.bind(path, RECORD | change)
        assert "results may differ in their bits" in caplog.text
    assert storage.read_record(path) == RECORD
    if allowed:
        storage.bind(path, RECORD | change, allow_change=True)
        assert storage.read_record(path) == (RECORD | change if refused else RECORD)
    else:
        with pytest.raises(ValueError, match=refused):
            storage.bind(path, RECORD | change, allow_change=True)


def test_the_fingerprint_of_a_directory_and_the_commit_of_a_name(tmp_path, monkeypatch):
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "README.md").write_text("text")
    found, revision = storage.fingerprint(str(tmp_path))
    assert set(found["files"]) == {"model.safetensors", "config.json"} and revision is None
    before = storage.model_hash(tmp_path)
    (tmp_path / "config.json").write_text("{ }")
    assert storage.model_hash(tmp_path) == before and storage.fingerprint(str(tmp_path))[0] != found
    cached = "/cache/models--a--b/snapshots/c0ffee/config.json"
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda name, file, revision: cached)
    found = storage.fingerprint("a/b", "main")
    assert found == ({"name": "a/b", "commit": "c0ffee"}, "c0ffee")
    monkeypatch.setattr("huggingface_hub.hf_hub_download", None)
    assert storage.fingerprint("a/b", "main", {"model": found[0]}) == found


def test_a_record_knows_every_bit_of_itself(tmp_path):
    path, value = tmp_path / "state.json", {"done": {"iter_00/train": {"a": "0f"}}, "max_steps": 9}
    storage.write_record(path, value)
    content = path.read_bytes()
    assert storage.read_record(path) == value
    for position in range(8 * len(content)):
        data = bytearray(content)
        data[position // 8] ^= 1 << position % 8
        path.write_bytes(data)
        with pytest.raises(ValueError, match=r"state\.json is damaged .*restore it, or delete"):
            assert storage.read_record(path) != value
    for text in ("", "null", "[]", "{}", '{"seal": 1}', "[" * 9999):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"state\.json is damaged"):
            storage.read_record(path)


def test_records_are_read_whatever_the_locale_says(tmp_path):
    """As they are written: in UTF-8."""
    path = tmp_path / "state.json"
    storage.write_record(path, {"prompt_template": "für {prompt}"})
    code = "import sys; from tspin import storage; print(ascii([storage.read_record(sys.argv[1]), storage.read_json(sys.argv[1])]))"
    environment = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    found = subprocess.run([sys.executable, "-c", code, path], env=environment, capture_output=True, text=True)
    assert found.stdout.count("f\\xfcr") == 2, found.stderr
