"""Indexes of ids for what was there before them: found by one walk over the keyspace, put where it belongs.

A place that is not known to be indexed, or has lost an index since, is walked before the next question about ids or
states. What other programs write later is met by point reads at once, by the indexes after the next walk.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence

from sync_engine.errors import InvalidId
from sync_engine.item import check_id
from sync_engine.owned import outlasting
from sync_engine.storage.redis.scripts import INDEX
from sync_engine.storage.redis.shards import Arg, Servers, Shard

__all__ = ["Indexer"]

log = logging.getLogger(__name__)

SCAN_KEYS = 1_000
CHUNK_KEYS_MAX = 250
"""Keys per script call: 1-2 ms of the server."""

_GLOB = str.maketrans({character: f"\\{character}" for character in "*?[]^-\\"})


class Indexer:
    """Makes the indexes of a store right, one walk at a time for each shard."""

    def __init__(self, servers: Servers) -> None:
        self._servers = servers
        self._walks: dict[Shard, asyncio.Task[int]] = {}

    async def reindex(self) -> int:
        """``RedisStore.reindex``."""
        tasks = [self._walk(shard) for shard in self._servers.shards]
        return sum([await outlasting(task) for task in tasks])

    async def index(self, shard: Shard) -> None:
        """Walk the shard once, however many ask."""
        await outlasting(self._walk(shard))

    def _walk(self, shard: Shard) -> asyncio.Task[int]:
        walk = self._walks.get(shard)
        if walk is None:
            walk = self._walks[shard] = self._servers.own(self._put_right(shard))
            walk.add_done_callback(lambda _: self._walks.pop(shard))
        return walk

    async def _put_right(self, shard: Shard) -> int:
        changed, states = await self._add(shard)
        for name in ("__local__:by_state", "__local__:ids"):
            changed += await self._check(shard, name, "check", b"")
        changed += await self._check(shard, "__local__:expiring", "ends", b"0")
        for state in states:
            changed += await self._check(shard, f"state:{state}", "set", b"0")
        await self._run(shard, [f"{shard.prefix}__local__:indexed"], "done")
        if changed:
            log.info("put %d entries of the indexes under %r right", changed, shard.prefix)
        return changed

    async def _add(self, shard: Shard) -> tuple[int, set[str]]:
        """Enter the items that are there; how many entries that changed, and whose sets were seen."""
        prefix = shard.prefix.encode()
        pattern = shard.prefix.translate(_GLOB) + "*"
        changed = 0
        states: set[str] = set()
        keys: dict[bytes, None] = {}  # a scan may name a key twice
        cursor: bytes = b"0"
        while True:
            cursor, page = await self._servers.exchange(shard, "SCAN", cursor, "MATCH", pattern, "COUNT", SCAN_KEYS)
            for key in page:
                rest = _text(key[len(prefix) :])
                if rest is not None and rest.startswith("state:"):
                    states.add(rest.removeprefix("state:"))
                elif rest is not None and _is_id(rest):
                    keys[key] = None
            at_end = cursor == b"0"
            while len(keys) >= CHUNK_KEYS_MAX or (at_end and keys):
                chunk = list(keys)[:CHUNK_KEYS_MAX]
                changed += (await self._run(shard, chunk, "add"))[0]
                for key in chunk:
                    del keys[key]
            if at_end:
                return changed, states

    async def _check(self, shard: Shard, name: str, part: str, start: bytes) -> int:
        # Both walks end where they start: at no entry, and at the cursor 0.
        changed, place = 0, start
        while True:
            dropped, place = await self._run(shard, [shard.prefix + name], part, place, CHUNK_KEYS_MAX)
            changed += dropped
            if place == start:
                return changed

    async def _run(self, shard: Shard, keys: Sequence[Arg], *args: Arg) -> tuple[int, bytes]:
        # In the caller's own task, which is one of ours.
        json = int((await self._servers.capabilities()).json)
        changed, place = await self._servers.evaluate(shard, INDEX, keys, (shard.prefix, json, *args))
        return changed, place


def _text(raw: bytes) -> str | None:
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return None


def _is_id(text: str) -> bool:
    try:
        check_id(text)
    except InvalidId:
        return False
    return True
