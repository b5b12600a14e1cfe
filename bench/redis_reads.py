"""Question 3: many single ``RedisStore.get`` at a time, beside one ``JSON.GET`` each."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence

import orjson
from redis.asyncio import Redis

from bench.data import fresh, places
from bench.harness import Answer, Contender, Stage, Target, check, compared
from sync_engine.storage.redis import RedisStore

__all__ = ["ask"]

ITEMS = 20_000
GETS = 20_000
AT_ONCE = 64


async def ask(stage: Stage) -> list[Answer]:
    """64 tasks, each getting one item after the other."""
    await stage.empty_redis()
    data = dict(places(stage.sized(ITEMS, 100)))
    ids = random.Random(3).choices(list(data), k=stage.sized(GETS, AT_ONCE))
    store = await RedisStore.connect(stage.url, "r:")
    async with Redis.from_url(stage.url) as client:
        try:
            await store.put_batch(fresh(data.items(), stamp=1))
            times = await stage.race(StoreGets(store, ids, data), JsonGets(client, ids, data))
        finally:
            await store.close()
    ours, plain = times
    return [compared(f"{AT_ONCE} concurrent single `RedisStore.get`", times, ours, [plain], Target(3))]


class Gets(Contender):
    """Gets every id once, ``AT_ONCE`` at a time."""

    def __init__(self, ids: Sequence[str], data: dict[str, bytes]) -> None:
        super().__init__(len(ids))
        self._ids = ids
        self._data = data
        self._got: list[tuple[str, bytes]] = []

    async def prepare(self) -> None:
        self._got = []

    async def run(self) -> None:
        await asyncio.gather(*(self._some(self._ids[first::AT_ONCE]) for first in range(AT_ONCE)))

    async def _some(self, ids: Sequence[str]) -> None:
        raise NotImplementedError

    async def verify(self) -> None:
        check(len(self._got) == len(self._ids), f"{self.name}: {len(self._got)} answers")
        for object_id, content in self._got:
            check(self._data[object_id] == content, f"{self.name}: {object_id} is not what was stored")


class StoreGets(Gets):
    """Ours: an item, its hash checked."""

    name = "RedisStore.get"

    def __init__(self, store: RedisStore, ids: Sequence[str], data: dict[str, bytes]) -> None:
        super().__init__(ids, data)
        self._store = store

    async def _some(self, ids: Sequence[str]) -> None:
        for object_id in ids:
            item = await self._store.get(object_id)
            assert item is not None
            self._got.append((item.object_id, item.content))


class JsonGets(Gets):
    """redis-py with a connection per task; the document as it comes, neither parsed nor checked."""

    name = "redis-py JSON.GET one by one"

    def __init__(self, client: Redis, ids: Sequence[str], data: dict[str, bytes]) -> None:
        super().__init__(ids, data)
        self._client = client

    async def _some(self, ids: Sequence[str]) -> None:
        for object_id in ids:
            document = await self._client.execute_command("JSON.GET", "r:" + object_id)  # type: ignore[no-untyped-call]  # redis-py
            self._got.append((object_id, document))

    async def verify(self) -> None:
        # Parsed only now: the baseline is not charged for what it was not asked to do.
        check(len(self._got) == len(self._ids), f"{self.name}: {len(self._got)} answers")
        for object_id, document in self._got:
            payload = orjson.loads(document)["payload"]
            check(payload == orjson.loads(self._data[object_id]), f"{self.name}: {object_id} is not what was stored")
