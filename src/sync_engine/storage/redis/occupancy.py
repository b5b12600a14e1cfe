"""How full the servers are, by which rule they would make room themselves, and what would be missed the least."""

from __future__ import annotations

import asyncio

from sync_engine.ports import CacheFacts, Memory
from sync_engine.storage.redis.pool import fields
from sync_engine.storage.redis.refusals import NotPermitted
from sync_engine.storage.redis.scripts import COLDEST
from sync_engine.storage.redis.shards import Servers, Shard

__all__ = ["Occupancy"]

Part = tuple[Shard, ...]


class Occupancy:
    """The memory of every server, and the items in it that were used the longest ago."""

    def __init__(self, servers: Servers) -> None:
        self._servers = servers

    async def facts(self) -> CacheFacts:
        """``Cache.facts``."""
        capabilities = await self._servers.capabilities()
        parts = await self._servers.primaries()
        told = [each for each in await asyncio.gather(*map(self._asked, parts)) if each is not None]
        return CacheFacts(
            about=str(capabilities),
            documents=capabilities.json,
            searchable=capabilities.json and capabilities.search,
            memory=[memory for memory, _ in told],
            policies=frozenset(policy for _, policy in told if policy),
        )

    async def coldest(self, place: int, picked: int, most: int) -> list[tuple[str, int]]:
        """``Cache.coldest``. A place that was not indexed yet names only what was written since."""
        shard = self._servers.shards[place]
        json = int((await self._servers.capabilities()).json)
        keys = (f"{shard.prefix}__local__:ids",)
        told = await self._servers.run(shard, COLDEST, keys, (shard.prefix, json, picked, most))
        return [(id_.decode(), int(stamp)) for id_, stamp in zip(told[::2], told[1::2], strict=True)]

    async def _asked(self, part: Part) -> tuple[Memory, str] | None:
        try:
            told = fields(await self._servers.call(part[0], "INFO", "memory"))
        except NotPermitted:
            return None
        # What replicas and the append-only file have still to be sent is not what items can be evicted for.
        used = int(told.get("used_memory", 0)) - int(told.get("mem_not_counted_for_evict", 0))
        memory = Memory(tuple(shard.number for shard in part), used, int(told.get("maxmemory", 0)))
        return memory, told.get("maxmemory_policy", "")
