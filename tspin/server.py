"""The process of a generation server: started for one set of weights, watched, and gone when we are gone.

Deliberately speaks no HTTP and knows no model; `tspin.remote` asks what it serves. The key of a server is read here, from
TSPIN_SERVER_KEY, and taken out of every text that may be logged, raised or stored. The command runs without a shell, in a
process group of its own, its output in a log file. Beside it runs a watcher that reads a pipe from us: when we end in any
way, kill -9 included, the pipe closes and the watcher kills the group, so that no server keeps a GPU from the next run.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from tspin.config import SelfPlayConfig

logger = logging.getLogger(__name__)

KEY_VARIABLE = "TSPIN_SERVER_KEY"
GRACE_SECONDS = 20
_WATCHER = """
import os, signal, sys
sys.stdin.buffer.read()
try:
    os.killpg(int(sys.argv[1]), signal.SIGKILL)
except ProcessLookupError:
    pass
"""
# Set by torchrun and accelerate for their own processes; a server that reads them waits for peers that never come.
_LAUNCHER = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "GROUP_RANK",
    "ROLE_RANK",
    "MASTER_ADDR",
    "MASTER_PORT",
)
_LAUNCHER_PREFIXES = ("TORCHELASTIC_", "ACCELERATE_", "FSDP_")
# But for one that a shell takes from a variable.
_KEY_IN_COMMAND = re.compile(r"api[-_]key[\s=]+(?![\s=]|['\"]?\$)", re.IGNORECASE)


def server_key() -> str:
    """The key of the environment, without the spaces and line ends around it; empty for none. Raises ValueError."""
    key = os.environ.get(KEY_VARIABLE, "").strip()
    if not all("!" <= character <= "~" for character in key):
        raise ValueError(f"{KEY_VARIABLE}: want ASCII without spaces, got other characters too; set it anew")
    return key


def without_key(text: str) -> str:
    """The text with *** in place of the key."""
    key = server_key()
    return text.replace(key, "***") if key else text


def check_settings(config: SelfPlayConfig) -> None:
    """Raise ValueError where the keys of the backend `openai` do not fit each other, or the server's key cannot be sent."""
    url, command = config.generation_url, config.generation_server_command
    server_key()
    if _KEY_IN_COMMAND.search(command or ""):
        raise ValueError(
            "generation_server_command: want no key in it, config.yaml, run.json and the log would keep it; set "
            f"{KEY_VARIABLE}, which the server finds in its environment (see docs/generation.md)"
        )
    if url is None and (command is None or "{port}" not in command):
        raise ValueError(
            f"generation_server_command: want a command with {{model}} and {{port}} in it, or generation_url, got {command!r}"
        )
    parts = urlsplit(url or "http://127.0.0.1")
    try:
        port = parts.port
    except ValueError:
        port = 0
    if port == 0:
        raise ValueError(f"generation_url: want a port of 1 to 65535, got {url!r}")
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        raise ValueError(f"generation_url: want http:// or https://, a host and mostly /v1, got {url!r}")
    if parts.username is not None or parts.password is not None:
        raise ValueError(
            f"generation_url: want no name or password in it, config.yaml would keep them; set {KEY_VARIABLE}"
        )
    try:
        parts.hostname.encode("idna")
    except UnicodeError as error:
        raise ValueError(f"generation_url: want the name of a host or its address, got {url!r}: {error}") from None
    if config.generation_protocol == "text" and config.tokenizer_name_or_path is not None:
        raise ValueError(
            "generation_protocol: want token_ids beside tokenizer_name_or_path, got text, which the server reads by its own"
        )


def command_words(command: str, model: str, port: int) -> list[str]:
    """The words of a shell-like command with `{model}` and `{port}` filled in; a path with spaces stays one word.

    Raises:
        ValueError: quotes do not match, `{model}` is missing, or there is no such program.
    """
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise ValueError(f"generation_server_command: want words as in a shell, got {command!r}: {error}") from None
    if not any("{model}" in word for word in words):
        raise ValueError(
            f"generation_server_command: want {{model}} where the server takes its weights, got {command!r}; "
            "e.g. vllm serve {model} --host 127.0.0.1 --port {port}"
        )
    if shutil.which(words[0]) is None:
        raise ValueError(f"generation_server_command: want a program that is installed, got {words[0]!r}")
    return [word.replace("{model}", model).replace("{port}", str(port)) for word in words]


def free_port() -> int:
    """A port of the loopback that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class ServerProcess:
    """One server; `start` may be called again after it has died.

    words: the command. log: takes stdout and stderr, from the first start on, so that it says what a server died of.
    """

    def __init__(self, words: list[str], log: Path):
        self.words, self.log = words, log
        self._log_mode = "wb"
        self._process: subprocess.Popen | None = None
        self._watcher: subprocess.Popen | None = None

    def start(self) -> None:
        """Start it, ending what is left of an earlier one.

        Raises:
            ValueError: the program cannot be run.
        """
        self.stop()
        environment = {
            name: value
            for name, value in os.environ.items()
            if name not in _LAUNCHER and not name.startswith(_LAUNCHER_PREFIXES)
        }
        self.log.parent.mkdir(parents=True, exist_ok=True)
        logger.info("starting %s", without_key(shlex.join(self.words)))
        try:
            with open(self.log, self._log_mode) as log:
                self._log_mode = "ab"
                self._process = subprocess.Popen(
                    self.words,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=environment,
                    start_new_session=True,
                )
        except OSError as error:
            raise ValueError(f"generation_server_command: cannot run {self.words[0]!r}: {error}") from error
        watch = [sys.executable, "-I", "-S", "-c", _WATCHER, str(self._process.pid)]
        self._watcher = subprocess.Popen(watch, stdin=subprocess.PIPE, start_new_session=True)

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    def check_alive(self) -> None:
        """Raise ChildProcessError, with the last line of the log, where the server has ended."""
        code = None if self._process is None else self._process.poll()
        if code is not None:
            raise ChildProcessError(f"the server ended with code {code}; the end of {self.log}: {self.last_words()!r}")

    def last_words(self, count: int = 200) -> str:
        """The end of the log."""
        with contextlib.suppress(OSError), open(self.log, "rb") as log:
            # More than is shown, so that no part of a key stays at the cut.
            log.seek(max(0, os.path.getsize(self.log) - count - 4096))
            return without_key(log.read().decode(errors="replace").strip())[-count:]
        return ""

    def stop(self) -> None:
        """End the server's whole process group: asked first, killed after 20 seconds."""
        process, watcher = self._process, self._watcher
        self._process = self._watcher = None
        if process is not None:
            with contextlib.suppress(ProcessLookupError):
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGTERM)
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        process.wait(GRACE_SECONDS)
                # Also what outlives its leader.
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        if watcher is not None:
            watcher.kill()
            watcher.wait()
            assert watcher.stdin is not None
            watcher.stdin.close()
