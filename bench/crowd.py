"""A Redis of its own that holds 1,010,000 small items, loaded once for all questions about so many."""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

import orjson
from redis.asyncio import Redis

from bench.data import batches, places
from bench.harness import Stage, check
from sync_engine import SyncItem
from sync_engine.embedded import EmbeddedRedis
from sync_engine.storage.redis import RedisStore

__all__ = ["PREFIX", "STATE", "Crowd", "crowd_of", "group_of"]

PREFIX = "c:"
STATE = "crowd"
"""The state of every item but those of the middle group, which are in the default state."""
GROUPS = 101
GROUP = 10_000
BATCH = 5_000
FACTS = ("countrycode", "latitude", "longitude", "name", "population")


@dataclass(slots=True)
class Crowd:
    """The server and its store, and what the middle group holds: the one that is asked for."""

    server: EmbeddedRedis
    store: RedisStore
    wanted_prefix: str
    wanted: dict[str, bytes]
    others: int

    async def close(self) -> None:
        """Give its memory back. Whoever asks for a crowd after that gets a new one."""
        await self.store.close()
        await self.server.stop()


async def crowd_of(stage: Stage) -> Crowd:
    """The crowd of this run; the first who asks waits for it."""
    held: Crowd | None = stage.shared.get("crowd")
    if held is None or not held.server.running:
        server = EmbeddedRedis()
        await stage.at_end.enter_async_context(server)
        store = await RedisStore.connect(server.url, PREFIX)
        stage.at_end.push_async_callback(store.close)
        held = stage.shared["crowd"] = await _loaded(stage, server, store)
    return held


def group_of(stage: Stage, number: int) -> tuple[str, dict[str, bytes]]:
    """The prefix of one group's ids, and its contents by id, ids ascending."""
    size = stage.sized(GROUP, 100)
    contents = _small(size)
    prefix = f"group.{number:03}."
    return prefix, {f"{prefix}{place:04}": contents[place] for place in range(size)}


async def _loaded(stage: Stage, server: EmbeddedRedis, store: RedisStore) -> Crowd:
    start = time.perf_counter()
    size, groups = stage.sized(GROUP, 100), stage.sized(GROUPS, 5)
    middle = groups // 2
    contents = _small(size)
    # In random order, as items come: an ordered index that only ever grows at its end would be spared its search.
    for batch in batches(random.Random(5).sample(range(groups * size), groups * size), BATCH):
        result = await store.put_batch(
            SyncItem(
                f"group.{number // size:03}.{number % size:04}",
                contents[number % size],
                state="default" if number // size == middle else STATE,
                stamp=1,
            )
            for number in batch
        )
        check(result.written == len(batch), f"loading: {result}")
    prefix, wanted = group_of(stage, middle)
    others = (groups - 1) * size
    # Whatever a store does before its first listing, it does here and not on anybody's clock.
    count = await store.count_prefix("", allow_all=True)
    check(count == others + size, f"{count} items were loaded")
    check(await store.count_by_state(STATE) == others, f"{await store.count_by_state(STATE)} are in the state")
    async with Redis.from_url(server.url) as client:
        used = (await client.info("memory"))["used_memory"]
    took = time.perf_counter() - start
    print(f"  loaded {count:,} items in {took:.1f} s; Redis holds {used / 1e6:,.0f} MB", file=sys.stderr, flush=True)
    return Crowd(server, store, prefix, wanted, others)


def _small(count: int) -> Sequence[bytes]:
    """Contents of some 100 bytes: the first places with a few of their facts each."""
    told = (orjson.loads(content) for _, content in places(count))
    return [orjson.dumps({fact: place[fact] for fact in FACTS}) for place in told]
