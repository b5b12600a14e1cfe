"""Values from Redis: one round trip per shard and 500 ids, either form of value in one step, checked and decoded."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence

from sync_engine.coalesce import Coalescer
from sync_engine.codec import Read, Unverified, read_document, read_string
from sync_engine.errors import Corruption
from sync_engine.item import SyncItem
from sync_engine.ports import Fetched
from sync_engine.storage.redis.scripts import EXISTS, FETCH
from sync_engine.storage.redis.shards import Servers, Shard

__all__ = ["Values"]

READ_IDS_MAX = 500
"""Ids per read: 1-2 ms of the server."""

Found = Mapping[str, SyncItem | Unverified | Corruption]


class Values:
    """Point reads of a store."""

    def __init__(self, servers: Servers) -> None:
        self._servers = servers
        self._coalescer: Coalescer[SyncItem | Unverified | Corruption] = Coalescer(self._read, READ_IDS_MAX)

    async def one(self, object_id: str) -> SyncItem | Unverified | Corruption | None:
        """What is held of one id; calls of one event-loop tick share a round trip."""
        return await self._coalescer.get(object_id)

    async def fetch(self, ids: Sequence[str]) -> Fetched:
        """Everything held of these distinct ids."""
        fetched = Fetched()
        for start in range(0, len(ids), READ_IDS_MAX):
            chunk = ids[start : start + READ_IDS_MAX]
            for object_id, found in (await asyncio.shield(self._servers.own(self._read(chunk)))).items():
                if isinstance(found, SyncItem):
                    fetched.items[object_id] = found
                elif isinstance(found, Unverified):
                    fetched.unverified[object_id] = found.item
                else:
                    fetched.corrupt[object_id] = found
        return fetched

    async def exists(self, ids: Sequence[str]) -> list[bool]:
        """Whether each item is there, in input order."""
        json = int((await self._servers.capabilities()).json)
        there: dict[str, bool] = {}
        for shard, own in self._servers.by_shard(ids).items():
            for start in range(0, len(own), READ_IDS_MAX):
                chunk = own[start : start + READ_IDS_MAX]
                keys = [shard.prefix + object_id for object_id in chunk]
                answers = await self._servers.run(shard, EXISTS, keys, (shard.prefix, json))
                there.update(zip(chunk, map(bool, answers), strict=True))
        return [there[object_id] for object_id in ids]

    async def aclose(self) -> None:
        """Let shared reads under way finish."""
        await self._coalescer.aclose()

    async def _read(self, ids: Sequence[str]) -> Found:
        # In the caller's own task: who calls this owns one.
        servers = self._servers
        if servers.single:
            return await self._read_shard(servers.shards[0], ids)
        found: dict[str, SyncItem | Unverified | Corruption] = {}
        parts = servers.by_shard(ids)
        for part in await asyncio.gather(*(self._read_shard(shard, own) for shard, own in parts.items())):
            found.update(part)
        return found

    async def _read_shard(self, shard: Shard, ids: Sequence[str]) -> Found:
        prefix = shard.prefix
        keys = [prefix + object_id for object_id in ids] if prefix else ids
        if (await self._servers.capabilities()).json:
            documents, strings = await self._servers.evaluate(shard, FETCH, keys, ())
        else:
            documents, strings = [None] * len(keys), await self._servers.exchange(shard, "MGET", *keys)
        found: dict[str, SyncItem | Unverified | Corruption] = {}
        rest = iter(strings)
        for object_id, document in zip(ids, documents, strict=True):
            read: Read
            if document is not None:
                read = read_document(object_id, document)
            else:
                string = next(rest)
                if string is None:
                    continue
                read = read_string(object_id, string)
            if read is not None:
                found[object_id] = read
        return found
