"""Which stages of a run are done, the hashes of what they wrote, and the config that they stem from: its state.json.

A stage holds while its files are still what it wrote, so that nothing lost or altered is taken for done. Deliberately knows no
stage; `tspin.loop` names them.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from tspin import storage

logger = logging.getLogger(__name__)


class Ledger:
    """state.json of a run directory.

    done: for each finished stage, the paths that it wrote, relative to the directory, with their hashes.
    origin: what the stages to come stem from (config, data, processes), as JSON, entered with each of them: that of the process
        that began last; empty where an older state.json does not say.
    """

    def __init__(self, directory: Path):
        self.directory, self.path = directory, directory / "state.json"
        self.done: dict[str, dict[str, str | None]] = {}
        self.origin: dict[str, Any] = {}
        self._origins: list[dict[str, Any]] = []
        # Index of each stage's origin.
        self._origin_of: dict[str, int] = {}

    def begin(self, origin: dict[str, Any]) -> None:
        """Bind the directory to an origin, before any stage is done with it."""
        if self.path.exists():
            self.read()
        if self.origin != origin:
            self.origin = origin
            self._origins += [origin] if origin not in self._origins else []
            self._write()

    def read(self) -> None:
        """Take over what the main process has written. Raises ValueError where the file is damaged."""
        record = storage.read_record(self.path)
        # An older state.json has no origins.
        self.done, self._origins = record["done"], record.get("origins", [])
        self._origin_of = record.get("origin_of", {})
        self.origin = self._origins[record["origin"]] if "origin" in record else {}

    def _write(self) -> None:
        record = {"done": self.done, "origins": self._origins, "origin_of": self._origin_of}
        storage.write_record(self.path, {**record, "origin": self._origins.index(self.origin)})

    def origin_of(self, name: str) -> dict[str, Any] | None:
        """What a finished stage stems from; None where that is not known."""
        return self._origins[self._origin_of[name]] if name in self._origin_of else None

    def holds(self, name: str, *paths: Path) -> bool:
        """Whether the stage is done, wrote these paths and no others, and they are what it wrote."""
        return name in self.done and self.done[name] == self.hashes(*paths)

    def hashes(self, *paths: Path) -> dict[str, str | None]:
        """The entry of a stage that wrote these paths, as they are now."""
        return {str(path.relative_to(self.directory)): storage.content_hash(path) for path in paths}

    def hash_of(self, name: str) -> str:
        """The hash of the first that a finished stage wrote."""
        made = next(iter(self.done[name].values()))
        assert made is not None, "a stage is recorded after its files are there"
        return made

    def record(self, name: str, *paths: Path) -> None:
        """Enter what a stage has written. A stage that was done before and now gives other bits is named in the log."""
        made = self.hashes(*paths)
        if self.done.get(name, made) != made:
            logger.warning("%s came out with other bits than before; what later stages made stems from those", name)
        self._origin_of = {**self._origin_of, name: self._origins.index(self.origin)}
        self.done = {**self.done, name: made}
        self._write()

    def name_damage(self) -> None:
        """Name what was altered and is not made again, because nothing reads it any more."""
        for name, record in self.done.items():
            for path, made in record.items():
                if storage.content_hash(self.directory / path) != made:
                    logger.warning(
                        "%s is missing or altered since %s made it; nothing that is left to do reads it, so it stays as it is: "
                        "restore it from a copy if you need it",
                        *(self.directory / path, name),
                    )
