"""The wheel as a user gets it: what is in it, and that it works installed, with the checkout out of sight.

The ordinary tests install it into a new virtual environment that borrows this one's dependencies; the soak test takes
them from the package index, into an environment that has nothing.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOREIGN = ("transformers", "datasets", "accelerate", "peft", "trl", "tspin", "matplotlib", "pandas", "yaml")
HIDE_FOREIGN = f"import sys; sys.modules.update(dict.fromkeys({FOREIGN!r}))"
CALL = """
import torch, tspin_kernels
h, w, y = torch.randn(4, 8, requires_grad=True), torch.randn(20, 8), torch.randint(20, (4,))
tspin_kernels.linear_logprobs(h, w, y).logprobs.sum().backward()
print(tspin_kernels.__file__)
"""


def run(*command: str | Path, cwd: Path) -> str:
    """What the command prints, run in `cwd` without this checkout on its path."""
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME", "TRITON_INTERPRET")}
    done = subprocess.run([str(word) for word in command], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="session")
def wheel(tmp_path_factory) -> Path:
    """The wheel as `python -m build` makes it, from the source archive of a copy that no earlier build can lend a file."""
    source = tmp_path_factory.mktemp("source")
    for name in ("tspin", "tspin_kernels"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    run(sys.executable, "-c", "from setuptools.build_meta import build_sdist; build_sdist('.')", cwd=source)
    (archive,) = source.glob("*.tar.gz")
    shutil.unpack_archive(archive, source, filter="data")
    unpacked = source / archive.name.removesuffix(".tar.gz")
    run(sys.executable, "-c", "from setuptools.build_meta import build_wheel; build_wheel('.')", cwd=unpacked)
    (made,) = unpacked.glob("*.whl")
    return made


@pytest.fixture(scope="session")
def installed(wheel, tmp_path_factory) -> Path:
    """The bin directory of a new environment with the wheel installed and this one's dependencies borrowed."""
    home = tmp_path_factory.mktemp("installed")
    run(sys.executable, "-m", "venv", "--without-pip", home / "venv", cwd=home)
    python = home / "venv" / "bin" / "python"
    install = ("install", "--quiet", "--no-deps", "--no-index", "--disable-pip-version-check", wheel)
    run(sys.executable, "-m", "pip", "--python", python, *install, cwd=home)
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=home).strip())
    (site / "borrowed.pth").write_text(f"{sysconfig.get_path('purelib')}\n{sysconfig.get_path('platlib')}\n")
    return python.parent


def test_it_is_pure_and_holds_every_module_and_nothing_else(wheel):
    assert wheel.name.endswith("-py3-none-any.whl")
    kinds = (".py", ".typed", ".jinja")
    wanted = {
        path.relative_to(ROOT).as_posix()
        for name in ("tspin", "tspin_kernels")
        for path in (ROOT / name).rglob("*")
        if path.suffix in kinds
    }
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert held == wanted
    assert {"tspin/py.typed", "tspin_kernels/py.typed"} <= held


def test_tspin_kernels_works_without_transformers_and_its_kin(installed, tmp_path):
    where = run(installed / "python", "-c", HIDE_FOREIGN + CALL, cwd=tmp_path).strip()
    assert Path(where).is_relative_to(installed.parent)


def test_the_hidden_transformers_are_seen_missing(installed, tmp_path):
    code = HIDE_FOREIGN + "\ntry:\n    import transformers\nexcept ImportError:\n    print('missing')"
    assert run(installed / "python", "-c", code, cwd=tmp_path).strip() == "missing"


@pytest.mark.parametrize("words", [["--help"], ["run", "--help"], ["demo", "--help"], ["--version"]], ids=" ".join)
def test_the_command_is_there(installed, tmp_path, words):
    assert run(installed / "tspin", *words, cwd=tmp_path).strip()


def test_the_public_names_come_from_the_wheel(installed, tmp_path):
    code = "import sys, tspin\nfor name in tspin.__all__: print(sys.modules[getattr(tspin, name).__module__].__file__)"
    for line in run(installed / "python", "-c", code, cwd=tmp_path).splitlines():
        assert Path(line).is_relative_to(installed.parent)


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_the_demo_runs_in_an_empty_environment(wheel, tmp_path):
    run(sys.executable, "-m", "venv", tmp_path / "venv", cwd=tmp_path)
    python = tmp_path / "venv" / "bin" / "python"
    run(python, "-m", "pip", "install", "--quiet", "-c", ROOT / "constraints.txt", wheel, cwd=tmp_path)
    run(python.parent / "python", "-c", "import tspin_kernels", cwd=tmp_path)
    assert "sha256" in run(python.parent / "tspin", "demo", "--quick", "--output_dir", "demo", cwd=tmp_path)
