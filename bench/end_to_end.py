"""Question 6: 100,000 places from ``submit`` until Redis and SQLite have them, beside code written for just that."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import aiosqlite
import orjson
from redis.asyncio import Redis

from bench.data import SETTINGS, Place, batches, fresh, made_table, places, table_is
from bench.harness import Answer, Contender, Stage, Target, check, compared
from sync_engine import SyncEngine, SyncEngineConfig, SyncItem

__all__ = ["ask"]

ITEMS = 100_000
BATCH = 1_000
AT_ONCE = 200

UPSERT = """\
INSERT INTO sync_items (id, version, timestamp, payload_hash, payload, payload_blob, audit, merkle_dirty, state,
  access_count, last_accessed, stamp)
VALUES (?, ?, ?, NULL, ?, NULL, NULL, 1, ?, ?, ?, ?)
ON CONFLICT (id) DO UPDATE SET
  version = excluded.version, timestamp = excluded.timestamp, payload = excluded.payload, state = excluded.state,
  access_count = excluded.access_count, last_accessed = excluded.last_accessed, stamp = excluded.stamp"""


async def ask(stage: Stage) -> list[Answer]:
    """Submitted singly by 200 tasks and by the thousand; the baseline in the faster of its two forms."""
    data = places(stage.sized(ITEMS, 200))
    contenders = (Singly(stage, data), ByTheThousand(stage, data), ByHand(stage, data), ByHandAtOnce(stage, data))
    times = await stage.race(*contenders, rounds=stage.rounds)  # seconds each: what is cold at first is soon warm
    singly, thousand, *by_hand = times
    asked = f"`submit` → all stored, {len(data):,} places, Redis + SQLite"
    return [
        compared(f"{asked}: `submit_many` of {BATCH:,}", times, thousand, by_hand, Target(0.6)),
        compared(f"{asked}: `submit`, {AT_ONCE} concurrent", times, singly, by_hand, Target(0.6)),
    ]


class Storing(Contender):
    """Starts on an empty Redis and an empty table; ends when both have everything."""

    def __init__(self, stage: Stage, data: Sequence[Place]) -> None:
        super().__init__(len(data))
        self._stage = stage
        self._data = data
        self._file = Path()

    async def prepare(self) -> None:
        await self._stage.empty_redis()
        self._folder = self._stage.new_folder()
        self._items = fresh(self._data)

    async def verify(self) -> None:
        check(table_is(self._file, self._data), f"{self.name}: the table differs")
        async with Redis.from_url(self._stage.url) as client:
            members = await client.scard("e:state:default")
            check(members == self.units, f"{self.name}: {members} members in Redis")
            for batch in batches(self._data, BATCH):
                found = await client.execute_command("JSON.MGET", *("e:" + id_ for id_, _ in batch), "$.payload")  # type: ignore[no-untyped-call]  # redis-py
                wanted = [[orjson.loads(content)] for _, content in batch]
                check([orjson.loads(text) for text in found] == wanted, f"{self.name}: Redis differs")
        self._stage.drop_folder(self._folder)


class ByTheThousand(Storing):
    """Ours: checked, logged and synced, hashed, visible to readers at once, then stored."""

    name = f"submit_many of {BATCH}, flush"

    async def prepare(self) -> None:
        await super().prepare()
        self._file = self._folder / "truth.db"
        config = SyncEngineConfig(data_dir=self._folder, redis_url=self._stage.url, redis_prefix="e:")
        self._engine = SyncEngine(config)
        await self._engine.start()

    async def run(self) -> None:
        for batch in batches(self._items, BATCH):
            await self._engine.submit_many(batch)
        await self._engine.flush()

    async def verify(self) -> None:
        await self._engine.stop()
        await super().verify()


class Singly(ByTheThousand):
    """The same through as many tasks as would serve requests."""

    name = f"submit, {AT_ONCE} concurrent, flush"

    async def run(self) -> None:
        await asyncio.gather(*(self._some(first) for first in range(AT_ONCE)))
        await self._engine.flush()

    async def _some(self, first: int) -> None:
        submit = self._engine.submit
        for item in self._items[first::AT_ONCE]:
            await submit(item)


class ByHand(Storing):
    """Batch after batch: a pipeline into Redis, then ``executemany`` and a commit. No log, no hashes, no stamps."""

    name = "by hand, Redis then SQL"

    async def prepare(self) -> None:
        await super().prepare()
        self._file = await made_table(self._folder)
        self._client = Redis.from_url(self._stage.url)
        await self._client.ping()
        self._sql = await aiosqlite.connect(self._file)
        for setting in SETTINGS:
            await self._sql.execute(setting)

    async def run(self) -> None:
        for batch in batches(self._items, BATCH):
            await self._into_redis(batch)
            await self._into_sql(batch)

    async def verify(self) -> None:
        await self._client.aclose()
        await self._sql.close()
        await super().verify()

    async def _into_redis(self, batch: Sequence[SyncItem]) -> None:
        pipe = self._client.pipeline(transaction=False)
        for item in batch:
            document: dict[str, Any] = {
                "payload": orjson.Fragment(item.content),
                "state": item.state,
                "timestamp": item.updated_at,
                "version": item.version,
            }
            pipe.execute_command("JSON.SET", "e:" + item.object_id, "$", orjson.dumps(document))
            pipe.sadd("e:state:" + item.state, item.object_id)
        await pipe.execute()

    async def _into_sql(self, batch: Sequence[SyncItem]) -> None:
        stamp = time.time_ns() // 1_000_000 << 16
        await self._sql.executemany(
            UPSERT,
            [
                (
                    item.object_id,
                    item.version,
                    item.updated_at,
                    item.content.decode(),
                    item.state,
                    item.access_count,
                    item.last_accessed,
                    stamp,
                )
                for item in batch
            ],
        )
        await self._sql.commit()


class ByHandAtOnce(ByHand):
    """The same with both halves of a batch under way together."""

    name = "by hand, Redis and SQL at once"

    async def run(self) -> None:
        for batch in batches(self._items, BATCH):
            await asyncio.gather(self._into_redis(batch), self._into_sql(batch))
