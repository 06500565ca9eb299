"""A finished run on the hub: its last model, or its triplets, exactly as the run recorded them, with their cards.

Knows no token: huggingface_hub takes its own, from `hf auth login` or the environment variable HF_TOKEN.
"""

from __future__ import annotations

import glob
from pathlib import Path

from tspin import storage


def push(
    run_dir: str | Path,
    repo_id: str,
    *,
    triplets: bool = False,
    iteration: int | None = None,
    private: bool = False,
    dry_run: bool = False,
) -> list[str]:
    """Upload the model of a run, or its triplets as a data set, in one commit, and print what is uploaded.

    Args:
        run_dir: the run directory.
        repo_id: owner/name on the hub; made where it is not there.
        triplets: the triplets of all iterations in place of a model.
        iteration: which model; default the last that is finished.
        private: whether a repository that is made is private.
        dry_run: list the files and open no connection.
    Returns:
        Paths of the files in the repository, sorted.
    Raises:
        ValueError: there is no such run, model or card; a file is not what the run recorded; the hub refuses.
    """
    from huggingface_hub.utils import validate_repo_id

    validate_repo_id(repo_id)
    run, kind = Path(run_dir), "dataset" if triplets else "model"
    if not (run / "state.json").is_file():
        raise ValueError(f"RUN: want a run directory, got {run}, which has no state.json")
    done = storage.read_record(run / "state.json")["done"]
    if triplets:
        folder, stages = run, [name for name in sorted(done) if name.endswith("/triplets")]
    else:
        trained = sorted(int(name[len("iter_") : -len("/model")]) for name in done if name.endswith("/model"))
        iteration = max(trained, default=-1) if iteration is None else iteration
        if iteration not in trained:
            raise ValueError(f"--iteration: want a finished one of {trained}, got {iteration}; `tspin run` finishes it")
        stages = [f"iter_{iteration:02d}/model"]
        folder = run / next(iter(done[stages[0]]))
    made = {run / path: digest for name in stages for path, digest in done[name].items()}
    for path, digest in made.items():
        if storage.content_hash(path) != digest:
            raise ValueError(f"{path} is not what the run recorded; `tspin run` makes it again")
    if not stages or not (folder / "README.md").is_file():
        raise ValueError(f"want README.md in {folder}, got none; the same `tspin run` command writes it")
    paths = made if triplets else (path for path in folder.rglob("*") if path.is_file())
    names = {"README.md", *(path.relative_to(folder).as_posix() for path in paths)}
    # The hashes do not cover hidden files, which are nobody's to publish.
    files = sorted(name for name in names if "/." not in f"/{name}")
    sizes = {name: (folder / name).stat().st_size for name in files}
    print(f"{kind} {repo_id}, from {folder}:")
    print(*(f"{size:>15,} bytes  {name}" for name, size in sizes.items()), sep="\n")
    print(f"{sum(sizes.values()):>15,} bytes in {len(sizes)} files")
    if dry_run:
        print("dry run: nothing was uploaded")
        return files
    print(_upload(repo_id, kind, folder, files, private))
    return files


def _upload(repo_id: str, kind: str, folder: Path, files: list[str], private: bool) -> str:
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        api.create_repo(repo_id, repo_type=kind, private=private or None, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo_id,
            repo_type=kind,
            folder_path=folder,
            allow_patterns=[glob.escape(name) for name in files],
            commit_message="Upload by tspin push",
        )
    except OSError as error:  # as are all of huggingface_hub's
        raise ValueError(
            f"repo_id: want a repository that you may write to, got {repo_id!r}: {error}; log in with `hf auth login`"
        ) from error
    return f"uploaded: {commit.commit_url}"
