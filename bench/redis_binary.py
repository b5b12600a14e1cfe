"""Question 11: binary items of 10 kB in our own format, beside the original's JSON text (``redis_binary_format``)."""

from __future__ import annotations

import random
import statistics
from collections.abc import Mapping

from redis.asyncio import Redis

from bench.data import fresh
from bench.harness import Answer, Contender, Stage, Target, Unit, check, compared
from sync_engine.storage.redis import RedisStore

__all__ = ["ask"]

ITEMS = 500
SIZE = 10_000


async def ask(stage: Stage) -> list[Answer]:
    """Random bytes, which no format can shorten."""
    rng = random.Random(6)
    data = {f"blob.{number:03}": rng.randbytes(SIZE) for number in range(stage.sized(ITEMS, 20))}
    await stage.empty_redis()
    compact = await RedisStore.connect(stage.url, "compact:", binary_format="compact")
    text = await RedisStore.connect(stage.url, "json:", binary_format="json")
    try:
        puts = await stage.race(Put("put, compact", compact, data), Put("put, json", text, data))
        gets = await stage.race(Get("get, compact", compact, data), Get("get, json", text, data))
        async with Redis.from_url(stage.url) as client:
            sizes = [await _held(client, store, data) for store in (compact, text)]
    finally:
        await compact.close()
        await text.close()
    small, large = sizes
    what = f"{len(data)} binary items of {SIZE // 1000} kB"
    return [
        compared(f"`put_batch` of {what}: compact against `json`", puts, "put, compact", ["put, json"], Target(5)),
        compared(f"`get_many` of {what}: compact against `json`", gets, "get, compact", ["get, json"], Target(5)),
        Answer(
            "the same, memory of one item in Redis",
            "compact",
            "json",
            small,
            large,
            [large / small],
            None,
            Target(3),
            Unit.BYTES,
        ),
    ]


class Put(Contender):
    """Writes all items, new ones first and then over themselves."""

    def __init__(self, name: str, store: RedisStore, data: Mapping[str, bytes]) -> None:
        super().__init__(len(data))
        self.name = name
        self._store = store
        self._data = data
        self._stamp = 0

    async def prepare(self) -> None:
        self._stamp += 1
        self._items = fresh(self._data.items(), self._stamp)

    async def run(self) -> None:
        result = await self._store.put_batch(self._items)
        check(result.written == self.units, f"{self.name}: {result}")

    async def verify(self) -> None:
        found = await self._store.get_many(self._data)
        check({id_: item.content for id_, item in found.items()} == self._data, f"{self.name}: not what was written")
        check({item.stamp for item in found.values()} == {self._stamp}, f"{self.name}: an older item is there")


class Get(Contender):
    """Reads all items, hashes checked."""

    def __init__(self, name: str, store: RedisStore, data: Mapping[str, bytes]) -> None:
        super().__init__(len(data))
        self.name = name
        self._store = store
        self._data = data

    async def run(self) -> None:
        self._found = await self._store.get_many(self._data)

    async def verify(self) -> None:
        found = {object_id: item.content for object_id, item in self._found.items()}
        check(found == self._data, f"{self.name}: not what was written")
        self._found = {}


async def _held(client: Redis, store: RedisStore, data: Mapping[str, bytes]) -> float:
    pipe = client.pipeline(transaction=False)
    for object_id in data:
        pipe.memory_usage(store.prefix + object_id, samples=0)
    sizes: list[int] = await pipe.execute()
    return statistics.mean(sizes)
