"""README.md and docs/ hold: every python block runs, links lead somewhere, keys exist, every public name is described.

The `python` blocks of a page run top to bottom in one namespace, in a fresh directory. Set-up and checks that a reader
need not see stand between them in comments, `<!-- python` to `-->`, and run in their place. Of bash and yaml blocks, which
want a hub, a server or many GPUs, the words and keys are read as the command reads them.
"""

import importlib.util
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

import tspin
import tspin_kernels
from tspin import cli
from tspin.compare import read_comparison
from tspin.config import SelfPlayConfig, default_of, loop_fields, read_values, training_fields

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^(?:```python\n(.*?)^```|<!-- python\n(.*?)^-->)$", re.M | re.S)


def run_blocks(text: str, name: str) -> int:
    """Run the blocks of a page in order and return their number; tracebacks carry the page's own line numbers."""
    namespace = {"__name__": name}
    blocks = list(BLOCK.finditer(text))
    for block in blocks:
        body = block[1] if block[1] is not None else block[2]
        blank = "\n" * (text.count("\n", 0, block.start()) + 1)
        exec(compile(blank + body, name, "exec"), namespace)
    return len(blocks)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_python_block_runs(page, tmp_path, monkeypatch):
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes")
    monkeypatch.chdir(tmp_path)
    text = page.read_text()
    for package, least in re.findall("^<!-- needs (\\S+) (\\S+) -->$", text, re.M):
        pytest.importorskip(package, least, reason=f"{page.name} needs {package} {least}")
    assert run_blocks(text, page.name) == text.count("```python") + text.count("<!-- python")


def test_a_wrong_block_fails_at_its_line():
    with pytest.raises(AssertionError) as caught:
        run_blocks("# Page\n\n<!-- python\nx = 1\n-->\n\n```python\nx += 1\nassert x == 3\n```\n", "page")
    assert caught.traceback[-1].lineno + 1 == 9


def commands(text: str) -> Iterator[list[str]]:
    """The words of each `tspin` command in the bash blocks of a page."""
    for body in re.findall("^```bash\n(.*?)^```$", text, re.M | re.S):
        for line in body.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            while "tspin" in words:
                words = words[words.index("tspin") + 1 :]
                yield words[: words.index("&&")] if "&&" in words else words


def understand(command: list[str], files: dict[str, str]) -> None:
    """Read a command's words and its config, one of `files` or of the repository, up to where it would begin."""
    args, words = cli._parser().parse_known_args(command)
    assert args.takes_words or not words, command
    values = {"model_name_or_path": "m", "dataset": "d", "output_dir": "o"}
    config = getattr(args, "config", None)
    if config in files:
        values |= yaml.safe_load(files[config])
    elif config and (ROOT / config).exists():
        values |= read_values(ROOT / config)
    values |= read_values(None, words)
    if args.name == "compare":
        read_comparison(values, args.methods, args.arm, args.seeds)
    elif args.takes_words and args.name != "demo":
        SelfPlayConfig.from_dict(values)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_and_config_is_understood(page):
    text = page.read_text()
    blocks = re.findall("^```yaml\n(.*?)^```$", text, re.M | re.S)
    files = {match[1]: block for block in blocks if (match := re.match(r"# (\w+\.yaml)", block))}
    found = list(commands(text))
    assert len(found) >= len(re.findall("^```bash$", text, re.M)) - text.count("&& pytest\n")
    for command in found:
        understand(command, files)
    for block in blocks:
        if block not in files.values() and "datasets:" not in block:  # TRL's
            understand(["check", "--config", "block"], {"block": block})


@pytest.mark.parametrize(
    "command",
    ["run --learning_rat 1", "run --learning_rate fast", "compare --methods tspin,spam", "push RUN --repo me/x"],
)
def test_a_wrong_command_is_found(command):
    with pytest.raises(ValueError):
        for words in commands(f"```bash\npip install x && tspin {command}\n```\n"):
            understand(words, {})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_and_headings(page):
    for link in re.findall(r"\]\(([^)#\s]*(?:#[^)\s]*)?)\)", page.read_text()):
        path, _, anchor = link.partition("#")
        if "://" in path:
            continue
        target = (page.parent / path) if path else page
        assert target.exists(), f"{page.name}: {link}"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", target.read_text(), re.M)
            assert anchor in {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings}, link


def test_the_keys_of_the_method_page_exist_and_have_the_defaults_it_states():
    table = (ROOT / "docs" / "method.md").read_text().partition("\n## Keys\n")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)` \|[^\n]*\| ([^|]+) \| [^|]+ \|$", table, re.M)
    fields = loop_fields() | training_fields()
    assert len(rows) == table.count("\n| `") > 20
    for key, stated in rows:
        default = default_of(fields[key])
        expected = default if stated == "the same" else yaml.safe_load(stated)
        assert (float(expected) if isinstance(default, float) else expected) == default, (key, stated, default)


def test_the_messages_that_are_explained_are_still_raised():
    table = (ROOT / "docs" / "troubleshooting.md").read_text().partition("\n## Messages\n")[2]
    messages = re.findall(r"^\| `([^`]+)` \|", table, re.M)
    sources = "".join(path.read_text() for name in ("tspin", "tspin_kernels") for path in (ROOT / name).rglob("*.py"))
    assert len(messages) == table.count("\n| `") > 5
    assert [message for message in messages if message not in sources] == []


def test_the_reference_page_is_what_the_sources_say():
    spec = importlib.util.spec_from_file_location("make_api", ROOT / "docs" / "make_api.py")
    assert spec is not None and spec.loader is not None
    make_api = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make_api)
    written = (ROOT / "docs" / "api.md").read_text()
    for name in (*tspin_kernels.__all__, *tspin.__all__):
        assert f"\n### {name}\n\n```py\n" in written, name
    assert written == make_api.page(), "stale: python docs/make_api.py > docs/api.md"
