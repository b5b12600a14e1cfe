"""What Redis knows of its own past: whether it was restarted, and from which stamp on it may have lost something.

lua/mark.lua says how it is kept. A shard is asked in one script call, all shards at once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any, Final

from sync_engine.owned import outlasting
from sync_engine.ports import Mark
from sync_engine.storage.redis.scripts import MARKS, STAMPS
from sync_engine.storage.redis.shards import Servers, Shard

__all__ = ["Marks"]

IDS_MAX: Final = 500
"""Ids per call: about 1 ms of the server."""


class Marks:
    """The marks of every shard, and the stamps of items."""

    def __init__(self, servers: Servers) -> None:
        self._servers = servers

    async def read(self, newest: int = 0) -> list[Mark]:
        """``Cache.marks``."""
        told = str(newest) if newest else ""
        return await self._each(dict.fromkeys(self._servers.shards, (told, "", "")))

    async def healed(self, marks: Sequence[Mark]) -> None:
        """``Cache.healed``."""
        shards = self._servers.shards
        await self._each({shards[m.place]: ("", m.run, str(m.since)) for m in marks if m.since is not None})

    async def stamps(self, ids: Sequence[str]) -> dict[str, int]:
        """``Cache.held_stamps``."""
        json = int((await self._servers.capabilities()).json)
        asked: list[tuple[Sequence[str], asyncio.Task[Any]]] = []
        for shard, own in self._servers.by_shard(ids).items():
            for start in range(0, len(own), IDS_MAX):
                chunk = own[start : start + IDS_MAX]
                keys = [shard.prefix + object_id for object_id in chunk]
                asked.append((chunk, self._servers.start(shard, STAMPS, keys, (shard.prefix, json))))
        found: dict[str, int] = {}
        for chunk, call in asked:
            for object_id, stamp in zip(chunk, await outlasting(call), strict=True):
                if stamp is not None:
                    found[object_id] = int(stamp)
        return found

    async def _each(self, asked: Mapping[Shard, Sequence[str]]) -> list[Mark]:
        calls = [
            (shard, self._servers.start(shard, MARKS, (f"{shard.prefix}__local__:mark",), (shard.prefix, 0, *words)))
            for shard, words in asked.items()
        ]
        marks = []
        for shard, call in calls:
            run, newest, began, since = (word.decode() for word in await outlasting(call))
            marks.append(Mark(shard.number, run, int(newest), int(began), int(since) if since else None))
        return marks
