"""Values from Redis: one round trip per shard and 500 ids, either form of value in one step, checked and decoded."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping, Sequence

from sync_engine.coalesce import Coalescer
from sync_engine.codec import Read, Unverified, read_document, read_string
from sync_engine.errors import Corruption
from sync_engine.item import SyncItem
from sync_engine.owned import outlasting
from sync_engine.ports import Fetched
from sync_engine.storage.redis.scripts import EXISTS, FETCH, WHERE
from sync_engine.storage.redis.shards import Servers, Shard

__all__ = ["Row", "Values", "paired", "read_row"]

READ_IDS_MAX = 500
"""Ids per read: 1-2 ms of the server."""

Found = Mapping[str, SyncItem | Unverified | Corruption]

Row = tuple[str, bytes | None, bytes | None]
"""An id, the document that its key holds, the string that it holds: at most one of these two."""


def paired(ids: Sequence[bytes], documents: Sequence[bytes | None], strings: Sequence[bytes | None]) -> Iterator[Row]:
    """Rows of a script's answer: each id has a document, or its string is the next one of the strings."""
    rest = iter(strings)
    documents = documents or (None,) * len(ids)
    for raw, document in zip(ids, documents, strict=True):
        string = next(rest) if document is None else None
        try:
            yield raw.decode(), document, string
        except UnicodeDecodeError:
            continue  # no id of anybody


def read_row(row: Row) -> Read:
    """What the row holds; None where that is no item."""
    object_id, document, string = row
    if document is not None:
        return read_document(object_id, document)
    return None if string is None else read_string(object_id, string)


class Values:
    """Point reads of a store."""

    def __init__(self, servers: Servers) -> None:
        self._servers = servers
        # What was written since a read left, here or by others, must be seen by the next.
        self._coalescer: Coalescer[SyncItem | Unverified | Corruption] = Coalescer(
            self._read, READ_IDS_MAX, joins=False
        )

    async def one(self, object_id: str) -> SyncItem | Unverified | Corruption | None:
        """What is held of one id; calls of one event-loop tick share a round trip."""
        return await self._coalescer.get(object_id)

    async def fetch(self, ids: Sequence[str]) -> Fetched:
        """Everything held of these distinct ids."""
        fetched = Fetched()
        for start in range(0, len(ids), READ_IDS_MAX):
            chunk = ids[start : start + READ_IDS_MAX]
            for object_id, found in (await outlasting(self._servers.own(self._read(chunk)))).items():
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

    async def state_of(self, object_id: str) -> str | None:
        """The state of the item, as its value says it; None where there is no item."""
        shard = self._servers.shard_of(object_id)
        json = int((await self._servers.capabilities()).json)
        (state,) = await self._servers.run(shard, WHERE, (shard.prefix + object_id,), (shard.prefix, json))
        return None if state is None else state.decode(errors="replace")

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
