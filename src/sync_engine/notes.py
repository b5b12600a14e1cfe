"""Small facts that one engine keeps from start to start, in one file of its ``data_dir``: facts, no items."""

from __future__ import annotations

import asyncio
import logging
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

__all__ = ["Notes"]

log = logging.getLogger(__name__)


class _Noted(msgspec.Struct):
    writer: str = ""
    redis_runs: dict[str, str] = {}


class Notes:
    """``writer`` names this engine in the change stream; ``redis_runs`` are the servers that it last trusted."""

    def __init__(self, path: Path, noted: _Noted) -> None:
        self._path = path
        self._noted = noted

    @classmethod
    async def open(cls, path: Path) -> Notes:
        """Read the file, or begin it. One that cannot be understood is begun anew."""
        return await asyncio.to_thread(cls._open, path)

    @property
    def writer(self) -> str:
        """The same for every start of this engine."""
        return self._noted.writer

    @property
    def redis_runs(self) -> dict[int, str]:
        """The run of each place of Redis."""
        return {int(place): run for place, run in self._noted.redis_runs.items()}

    async def keep_redis_runs(self, runs: Mapping[int, str]) -> None:
        """Note them. Raises ``OSError``."""
        told = {str(place): run for place, run in runs.items()}
        if told != self._noted.redis_runs:
            self._noted.redis_runs = told
            await asyncio.to_thread(self._write)

    @classmethod
    def _open(cls, path: Path) -> Notes:
        noted = _Noted()
        try:
            noted = msgspec.json.decode(path.read_bytes(), type=_Noted)
        except FileNotFoundError:
            pass
        except msgspec.DecodeError as bad:
            log.warning("%s is begun anew: %s", path, bad)
        notes = cls(path, noted)
        if not noted.writer:
            noted.writer = uuid.uuid4().hex
            notes._write()
        return notes

    def _write(self) -> None:
        # Whole or not at all: the new file takes the place of the old one.
        beside = self._path.with_suffix(".new")
        content: Any = msgspec.json.encode(self._noted)
        with os.fdopen(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600), "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(self._path)

    def __repr__(self) -> str:
        return f"<Notes {self._path.name!r} of writer {self.writer}>"
