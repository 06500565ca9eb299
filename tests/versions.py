"""The suite on other versions of what it stands on: `python tests/versions.py lowest|pinned|newest [options] [pytest arguments]`.

lowest: torch, triton and transformers at the lower bounds of pyproject.toml, the rest as pip resolves it.
pinned: constraints.txt.
newest: constraints.txt, but the newest transformers, and of what it depends on whatever it asks for.

Each has a virtual environment of its own, made once. No version but numpy's is stated here. torch's build for CUDA takes about
5 GB on disk; `--reuse` tells the versions of an environment that stands and runs the suite in it.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LOWERED = ("torch", "triton", "transformers")
# Triton 3.6's interpreter makes numbers of arrays with one element, which numpy 2.4 refuses.
BESIDE_THEM = ("numpy<2.4",)
# What comes with a transformers and cannot be held at the pin of another.
RAISED = ("transformers", "tokenizers", "safetensors", "huggingface_hub", "hf-xet", "peft")
TOLD = (
    "torch",
    "triton",
    "transformers",
    "tokenizers",
    "huggingface_hub",
    "accelerate",
    "datasets",
    "peft",
    "trl",
    "numpy",
    "pyarrow",
)


def lowest() -> list[str]:
    """name==bound for each package that is lowered, from pyproject.toml, and what they want beside them."""
    bounds = dict(re.findall(r'"([\w-]+)>=([\d.]+)', (ROOT / "pyproject.toml").read_text()))
    return [*(f"{name}=={bounds[name]}" for name in LOWERED), *BESIDE_THEM]


def newest() -> list[str]:
    """The lines of constraints.txt that bind neither transformers nor what must follow it."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return [line for line in lines if line.partition("==")[0] not in RAISED]


def pinned() -> list[str]:
    return (ROOT / "constraints.txt").read_text().splitlines()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("versions", choices=("lowest", "pinned", "newest"))
    parser.add_argument("--python", default=sys.executable, help="that makes the environment (default: this one)")
    parser.add_argument("--directory", type=Path, default=ROOT / ".versions", help="where environments are kept")
    parser.add_argument("--reuse", action="store_true", help="install nothing into an environment that stands")
    args, pytest_arguments = parser.parse_known_args()
    where = args.directory.resolve() / args.versions
    python = where / "bin" / "python"
    if not (args.reuse and python.exists()):
        constraints = {"lowest": lowest, "pinned": pinned, "newest": newest}[args.versions]()
        subprocess.run([args.python, "-m", "venv", where], check=True)
        (where / "constraints.txt").write_text("\n".join(constraints) + "\n")
        install = [
            python,
            "-m",
            "pip",
            "install",
            "--upgrade",
            "--upgrade-strategy",
            "eager",
            "-c",
            where / "constraints.txt",
        ]
        subprocess.run([*install, "-e", f"{ROOT}[test]"], check=True)
    listing = subprocess.run(
        [python, "-m", "pip", "list", "--format", "freeze"], check=True, capture_output=True, text=True
    )
    found = dict(line.split("==", 1) for line in listing.stdout.splitlines() if "==" in line)
    interpreter = subprocess.run([python, "-V"], check=True, capture_output=True, text=True).stdout.strip()
    print(
        f"{args.versions}: {interpreter}, " + ", ".join(f"{name} {found.get(name, 'none')}" for name in TOLD),
        flush=True,
    )
    # Not the checkout of whoever called: PYTHONPATH would win over the environment's own.
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return subprocess.run([python, "-m", "pytest", *pytest_arguments], cwd=ROOT, env=environment).returncode


if __name__ == "__main__":
    sys.exit(main())
