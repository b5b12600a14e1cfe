"""Question 12: ``put_batch`` into a cluster of 3 primaries, beside one server of the same kind on the same machine."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import AsyncExitStack

from bench.data import Place, fresh, places
from bench.harness import Answer, Contender, Stage, Target, check, compared
from sync_engine.storage.redis import RedisStore
from sync_engine.testing.clusters import ClusterSet
from sync_engine.testing.servers import KINDS, RunningRedis

__all__ = ["ask"]

ITEMS = 20_000
KIND = KINDS["redis-8-modules"]
PREFIX = "c:"


async def ask(stage: Stage) -> list[Answer]:
    """New keys and overwriting, all of it over TCP; without replicas, which the one server has none of either."""
    data = places(stage.sized(ITEMS, 500))
    answers: list[Answer] = []
    async with AsyncExitStack() as stack:
        alone = await stack.enter_async_context(RunningRedis(KIND))
        cluster = await stack.enter_async_context(ClusterSet(KIND, replicas=0))
        one = await stack.enter_async_context(Store(alone.url, [alone]))
        three = await stack.enter_async_context(Store(cluster.url, cluster.servers))
        for case, new in (("new keys", True), ("overwriting", False)):
            contenders = (
                PutBatch(f"{case}, 3 primaries", three, data, new),
                PutBatch(f"{case}, one server", one, data, new),
            )
            with stage.watching(*(server.pid for server in (alone, *cluster.servers))):
                times = await stage.race(*contenders)
            spread, single = times
            asked = f"`put_batch` of {len(data):,} items into a cluster of 3 primaries: {case}"
            answers.append(compared(asked, times, spread, [single], Target(0.8)))
    return answers


class Store:
    """A store and the servers behind it."""

    def __init__(self, url: str, servers: Sequence[RunningRedis]) -> None:
        self._url = url
        self._servers = servers

    async def __aenter__(self) -> Store:
        self.items = await RedisStore.connect(self._url, PREFIX)
        self.stamp = 0
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.items.close()

    async def empty(self) -> None:
        """Remove everything from every server."""
        await asyncio.gather(*(server.ask("FLUSHALL") for server in self._servers))


class PutBatch(Contender):
    """Writes all items. ``new``: into empty servers."""

    def __init__(self, name: str, store: Store, data: Sequence[Place], new: bool) -> None:
        super().__init__(len(data))
        self.name = name
        self._store = store
        self._data = data
        self._new = new

    async def prepare(self) -> None:
        if self._new:
            await self._store.empty()
        self._store.stamp += 1  # each round is newer than the one before it, or overwriting would be leaving alone
        self._items = fresh(self._data, self._store.stamp)

    async def run(self) -> None:
        result = await self._store.items.put_batch(self._items)
        check(result.written == self.units, f"{self.name}: {result}")

    async def verify(self) -> None:
        found = await self._store.items.get_many(dict(self._data))
        check([(id_, item.content) for id_, item in found.items()] == self._data, f"{self.name}: not what was written")
        check({item.stamp for item in found.values()} == {self._store.stamp}, f"{self.name}: an older item is there")
        count = await self._store.items.count_by_state("default")
        check(count == self.units, f"{self.name}: {count} items in the state instead of {self.units}")
