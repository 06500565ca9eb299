"""Two processes that talk by gloo: a test file run as a program, with the environment that accelerate launch gives."""

import os
import socket
import subprocess
import sys
from pathlib import Path


def run_two(script: str, directory: Path, *words: str, **environment: str) -> None:
    """Run `python script directory words...` as ranks 0 and 1; AssertionError with the ends of their logs where one fails."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    world = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    world |= {"OMP_NUM_THREADS": "1"} | environment
    children = []
    for rank in range(2):
        own = {**os.environ, **world, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        with open(directory / f"{rank}.log", "w") as log:
            command = [sys.executable, script, str(directory), *words]
            children.append(subprocess.Popen(command, env=own, stdout=log, stderr=log))
    try:
        codes = [child.wait(timeout=500) for child in children]
    finally:
        for child in children:
            child.kill()
    assert codes == [0, 0], "\n".join((directory / f"{rank}.log").read_text()[-3000:] for rank in range(2))
