"""Files that a killed run leaves whole: atomic writes, hashed parquet shards, staged directories and the run lock.

It knows nothing of models or of training. A reader never sees half a file: every file is written under a temporary name
in its own directory, synced and renamed. A shard carries the start of its SHA-256 in its name, so that the file and the
proof that it is whole appear in one rename and no sidecar can be left behind.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import io
import json
import logging
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

logger = logging.getLogger(__name__)

_REQUEST_KEY = b"tspin.request"
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
_UNUSABLE = (errno.EROFS, errno.ENAMETOOLONG, errno.EFBIG, errno.EIO, errno.ESTALE)
_NOT_OFFERED = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS)
_SCARCE_BYTES = 1 << 20
_SEAL = "complete.json"
_CARD = "README.md"


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.tmp")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network and FUSE file systems sync files, but no directories.
        if not path.is_dir() or error.errno not in _NOT_OFFERED:
            raise
    finally:
        os.close(descriptor)


def _sync_tree(directory: Path) -> None:
    # Directories too, which hold the names of what is in them.
    for path in (*directory.rglob("*"), directory):
        if path.is_file() or path.is_dir():
            _sync(path)


def is_full(error: Exception, path: str | os.PathLike) -> bool:
    """Whether an error met while writing below `path` is that of a full disk.

    Serialisers report it differently: as an `OSError`, as text (safetensors), or as a stream that failed (torch.save);
    the last counts only when the device has less than 1 MiB left.
    """
    if (isinstance(error, OSError) and error.errno in _NO_SPACE) or "no space left" in str(error).lower():
        return True
    existing = next(p for p in (Path(path).absolute(), *Path(path).absolute().parents) if p.exists())
    return isinstance(error, (OSError, RuntimeError)) and shutil.disk_usage(existing).free < _SCARCE_BYTES


@contextlib.contextmanager
def disk_errors(path: str | os.PathLike) -> Iterator[None]:
    """Turn a full or unusable disk met while writing below `path` into a `ValueError` that says so and what to do."""
    try:
        yield
    except Exception as error:
        if isinstance(error, OSError) and error.errno in _UNUSABLE:
            # The file may be another's, of a cache say, on a disk like that.
            raise ValueError(
                f"cannot use {path}: {error}; choose another output_dir, on a writable disk, or mend the disk of that file"
            ) from error
        # A ValueError has been through here, nearer to the file.
        if isinstance(error, ValueError) or not is_full(error, path):
            raise
        raise ValueError(
            f"no space left on the device while writing {path}; "
            "free some space and run the same command again: what is finished is kept"
        ) from error


def write_atomic(path: str | os.PathLike, data: bytes) -> None:
    """Write `data` to `path` so that a reader sees the old file or the new one, never a part; parents are created.

    Raises:
        ValueError: no space is left, or the disk is unusable; the old file is untouched and no temporary file stays.
    """
    path = Path(path)
    temporary = _temporary(path)
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        _sync(path.parent)


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    write_atomic(path, (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=True) + "\n").encode())


def json_lines(entries: Iterable[Any]) -> bytes:
    """One JSON value to a line."""
    return "".join(json.dumps(entry) + "\n" for entry in entries).encode()


def read_json(path: str | os.PathLike) -> Any:
    """The value of a JSON file.

    Raises:
        ValueError: the file is not JSON, with its name.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}); restore it, or start in another output_dir") from error


def write_record(path: str | os.PathLike, value: Mapping[str, Any]) -> None:
    """Write a JSON object with its own hash as the key `seal`, atomically."""
    write_json(path, {**value, "seal": hash_json(value)})


def read_record(path: str | os.PathLike) -> dict[str, Any]:
    """What `write_record` wrote, every bit of it.

    Raises:
        ValueError: the file is not what was written, with its name.
    """
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
        if value.pop("seal") == hash_json(value):
            return value
        problem = "its contents are not those of its seal"
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        problem = f"{type(error).__name__}: {error}"
    raise ValueError(
        f"{path} is damaged ({problem}); restore it, or delete {path}, and the same command makes it anew from what is whole"
    )


def sha256(path: str | os.PathLike) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def hash_files(directory: str | os.PathLike, pattern: str = "*") -> dict[str, str]:
    """SHA-256 of each file of `directory` (not of its subdirectories) whose name matches `pattern`, sorted by name."""
    return {path.name: sha256(path) for path in sorted(Path(directory).glob(pattern)) if path.is_file()}


def hash_json(value: Any) -> str:
    """SHA-256 of `value` as JSON with sorted keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


@contextlib.contextmanager
def staged_directory(final: str | os.PathLike) -> Iterator[Path]:
    """An empty directory to fill; it takes the name `final`, replacing what stood there, when the block ends well."""
    final = Path(final)
    staged = _temporary(final)
    with disk_errors(final):
        shutil.rmtree(staged, ignore_errors=True)
        staged.mkdir(parents=True)
        yield staged
        _sync_tree(staged)
        shutil.rmtree(final, ignore_errors=True)
        os.replace(staged, final)
        _sync(final.parent)


def remove_partial(directory: str | os.PathLike, name: str = "*") -> None:
    """Delete the temporary files and directories for `name` (a glob) that a killed run left directly in `directory`."""
    for path in Path(directory).glob(f".{name}.tmp"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def seal(directory: str | os.PathLike, **facts: Any) -> None:
    """Mark `directory` as whole: sync its files and write, last and atomically, their hashes and `facts`."""
    directory = Path(directory)
    with disk_errors(directory):
        _sync_tree(directory)
        _sync(directory.parent)
    write_record(directory / _SEAL, {**facts, "files": _tree_hashes(directory)})


def read_seal(directory: str | os.PathLike) -> dict[str, Any] | None:
    """What `seal` wrote, or None where a file is missing, added or altered, or there is no whole seal."""
    try:
        facts = read_record(Path(directory) / _SEAL)
    except (FileNotFoundError, ValueError):
        return None
    return facts if facts["files"] == _tree_hashes(Path(directory)) else None


def remove_sealed(directory: str | os.PathLike) -> None:
    """Delete a directory, its seal first, so that a kill in between leaves nothing that looks whole."""
    (Path(directory) / _SEAL).unlink(missing_ok=True)
    shutil.rmtree(directory)


def _tree_hashes(directory: Path) -> dict[str, str]:
    files = (
        p for p in directory.rglob("*") if p.is_file() and p.name not in (_SEAL, _temporary(directory / _SEAL).name)
    )
    return {str(path.relative_to(directory)): sha256(path) for path in sorted(files)}


def model_hash(directory: str | os.PathLike) -> str:
    """SHA-256 over the names and hashes of the safetensors files of a directory."""
    return hash_json(hash_files(directory, "*.safetensors"))


def fingerprint(
    name: str, revision: str | None = None, known: Mapping[str, Any] | None = None
) -> tuple[dict[str, Any], str | None]:
    """What identifies a model, and the revision to load: file hashes of a directory, or the commit of a hub name.

    known: the record of an earlier run; the commit it names is kept, so that all iterations start from one model.

    Raises:
        ValueError: there is no such directory and no such name on the hub.
    """
    if Path(name).is_dir():
        return {"files": {**hash_files(name, "*.safetensors"), **hash_files(name, "*.json")}}, None
    if known is not None and known["model"].get("name") == name:
        return known["model"], known["model"]["commit"]
    from huggingface_hub import hf_hub_download

    try:
        # .../snapshots/<commit>/config.json
        commit = Path(hf_hub_download(name, "config.json", revision=revision)).parent.name
    except (OSError, ValueError) as error:
        raise ValueError(f"model_name_or_path: want a directory or a hub name, got {name!r}: {error}") from error
    return {"name": name, "commit": commit}, commit


def content_hash(path: str | os.PathLike) -> str | None:
    """SHA-256 of a file, or of the names and hashes of all files below a directory; None where there is nothing.

    A directory's card, its README.md, does not count: it tells what came after, as evaluations do. Nor do hidden files, which
    file browsers and network disks leave.
    """
    path = Path(path)
    if path.is_dir():
        files = _tree_hashes(path).items()
        return hash_json({name: digest for name, digest in files if name != _CARD and "/." not in f"/{name}"})
    return sha256(path) if path.exists() else None


def package_versions(names: Iterable[str]) -> dict[str, str | None]:
    """Installed versions; None for a package that is not installed."""
    versions: dict[str, str | None] = {}
    for name in names:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    return versions


def bind(path: str | os.PathLike, record: Mapping[str, Any], *, allow_change: bool = False) -> None:
    """Write the run's `record` (processes, device, platform, versions, model, data, eval_data), or compare with it.

    A change of device, platform or versions is logged; other data or processes pass with `allow_change`.

    Raises:
        ValueError: the directory belongs to another model, or (without `allow_change`) data or number of processes.
    """
    path = Path(path)
    known = read_record(path) if path.exists() else dict(record)
    for key, argument in (("model", "model_name_or_path"), ("data", "dataset"), ("eval_data", "eval_dataset")):
        if known[key] != record[key] and not (allow_change and key != "model"):
            raise ValueError(
                f"output_dir {path.parent} belongs to a run of another {argument}: it was {known[key]}, now it is "
                f"{record[key]}; restore it, or choose another output_dir"
            )
    if known["processes"] != record["processes"] and not allow_change:
        raise ValueError(
            f"output_dir {path.parent} belongs to a run of {known['processes']} processes, now there are "
            f"{record['processes']}; launch as many, or set allow_config_change: true and accept other bits"
        )
    for key in ("device", "platform", "versions"):
        if known[key] != record[key]:
            logger.warning("%s was %s, now %s: results may differ in their bits", key, known[key], record[key])
    if not path.exists() or any(known[key] != record[key] for key in ("data", "eval_data", "processes")):
        write_record(path, record)


def write_parquet(path: str | os.PathLike, table: pa.Table) -> None:
    """Write `table` as one parquet file, atomically."""
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    write_atomic(path, buffer.getvalue())


def write_shard(directory: str | os.PathLike, index: int, table: pa.Table, request: Mapping[str, Any]) -> Path:
    """Write shard `index` as `shard-<index>-<first 16 digits of its SHA-256>.parquet`, replacing earlier ones.

    `request` is all that determines the content (seed, settings, inputs); it is stored in the file, and
    `read_shard` refuses a shard that was made for another request.
    """
    buffer = io.BytesIO()
    metadata = {_REQUEST_KEY: json.dumps(dict(request), sort_keys=True).encode()}
    pq.write_table(table.replace_schema_metadata(metadata), buffer, compression="zstd")
    data = buffer.getvalue()
    path = Path(directory) / f"shard-{index:05d}-{hashlib.sha256(data).hexdigest()[:16]}.parquet"
    write_atomic(path, data)
    for other in Path(directory).glob(f"shard-{index:05d}-*.parquet"):
        if other != path:
            other.unlink()
    return path


def read_shard(directory: str | os.PathLike, index: int, request: Mapping[str, Any] | None = None) -> pa.Table | None:
    """Shard `index`, or None where there is no whole one; a torn one is named in the log.

    Raises:
        ValueError: the shard was made for another request; the differing keys are shown.
    """
    for path in sorted(Path(directory).glob(f"shard-{index:05d}-*.parquet")):
        if sha256(path)[:16] != path.stem.rsplit("-", 1)[1]:
            logger.warning("%s is torn or altered (its SHA-256 is not the one in its name); it does not count", path)
            continue
        table = pq.read_table(path)
        made_for = json.loads((table.schema.metadata or {}).get(_REQUEST_KEY, b"{}"))
        wanted = made_for if request is None else json.loads(json.dumps(dict(request)))
        if made_for != wanted:
            keys = sorted(k for k in {*made_for, *wanted} if made_for.get(k) != wanted.get(k))
            differences = "; ".join(f"{k}: stored {made_for.get(k)!r}, wanted {wanted.get(k)!r}" for k in keys)
            raise ValueError(f"{path} was made for another request ({differences}); delete {directory} to make it anew")
        return table
    return None


def shard_request(directory: str | os.PathLike) -> dict[str, Any] | None:
    """The request of the first whole shard in `directory`, or None."""
    for path in sorted(Path(directory).glob("shard-[0-9]*-*.parquet")):
        index = path.name.split("-")[1]
        table = read_shard(directory, int(index)) if index.isdecimal() else None
        if table is not None:
            return json.loads((table.schema.metadata or {}).get(_REQUEST_KEY, b"{}"))
    return None


@contextlib.contextmanager
def run_lock(directory: str | os.PathLike, process_index: int = 0) -> Iterator[None]:
    """Hold the run directory for this process; the system lets go of it when the process ends, however it ends.

    A POSIX record lock, so that a forked data loader worker that outlives the process does not keep it.

    Raises:
        ValueError: another process holds it; its id is named. Or, here and within, as `disk_errors`.
    """
    directory = Path(directory)
    with disk_errors(directory):
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            raise ValueError(
                f"output_dir: want a directory, got {directory}, which is a file or in one; choose another"
            ) from error
        path = directory / (".lock" if process_index == 0 else f".lock-{process_index}")
        with open(path, "a+") as file:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno not in (errno.EACCES, errno.EAGAIN):
                    raise ValueError(
                        f"cannot lock {path}: {error}; choose an output_dir on a disk that has locks"
                    ) from error
                file.seek(0)
                raise ValueError(
                    f"output_dir {directory} is in use by process {file.read().strip() or 'unknown'}; "
                    "wait for it or stop it, or choose another output_dir"
                ) from error
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
            yield
