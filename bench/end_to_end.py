"""Question 6: 100,000 places from ``submit`` until Redis and SQL have them, beside code written for just that."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import orjson
from redis.asyncio import Redis

from bench.data import Place, batches, fresh, places
from bench.harness import Answer, Contender, Stage, Target, check, compared
from bench.truths import Hand, MariaDB, PostgreSQL, Sqlite, Truth, made
from sync_engine import SyncEngine, SyncEngineConfig, SyncItem

__all__ = ["ByTheThousand", "Singly", "ask", "ask_mariadb", "ask_postgresql"]

ITEMS = 100_000
BATCH = 1_000
AT_ONCE = 200


async def ask(stage: Stage) -> list[Answer]:
    """Redis + SQLite."""
    return await _asked(stage, Sqlite)


async def ask_mariadb(stage: Stage) -> list[Answer]:
    """Redis + MariaDB."""
    return await _asked(stage, MariaDB)


async def ask_postgresql(stage: Stage) -> list[Answer]:
    """Redis + PostgreSQL."""
    return await _asked(stage, PostgreSQL)


async def _asked(stage: Stage, kind: type[Truth]) -> list[Answer]:
    """Submitted singly by 200 tasks and by the thousand; the baseline in the fastest of its forms."""
    data = places(stage.sized(ITEMS, 200))
    truth = await made(stage, kind)
    ours = (Singly(stage, data, truth), ByTheThousand(stage, data, truth))
    by_hand = [form(stage, data, truth, hand) for form in (ByHand, ByHandAtOnce) for hand in truth.hands]
    if kind is not Sqlite:
        by_hand = by_hand[len(truth.hands) :]  # a server is another process: at once was never the slower form
    times = await stage.race(*ours, *by_hand, rounds=stage.rounds)  # seconds each: what is cold at first is soon warm
    asked = f"`submit` → all stored, {len(data):,} places, Redis + {truth.what}"
    baselines = [each.name for each in by_hand]
    return [
        compared(f"{asked}: `submit_many` of {BATCH:,}", times, ours[1].name, baselines, Target(0.6)),
        compared(f"{asked}: `submit`, {AT_ONCE} concurrent", times, ours[0].name, baselines, Target(0.6)),
    ]


class Storing(Contender):
    """Starts on an empty Redis and an empty table; ends when both have everything."""

    title = "?"

    def __init__(self, stage: Stage, data: Sequence[Place], truth: Truth) -> None:
        super().__init__(len(data))
        self.name = f"{truth.what}: {self.title}"
        self._stage = stage
        self._data = data
        self._truth = truth
        self._folder = Path()

    async def prepare(self) -> None:
        await self._stage.empty_redis()
        self._folder = self._stage.new_folder()
        await self._truth.empty(self._folder)
        self._items = fresh(self._data)

    async def verify(self) -> None:
        check(await self._truth.holds(self._folder, self._data), f"{self.name}: the table differs")
        async with Redis.from_url(self._stage.url) as client:
            members = await client.scard("e:state:default")
            check(members == self.units, f"{self.name}: {members} members in Redis")
            for batch in batches(self._data, BATCH):
                found = await client.execute_command("JSON.MGET", *("e:" + id_ for id_, _ in batch), "$.payload")  # type: ignore[no-untyped-call]  # redis-py
                wanted = [[orjson.loads(content)] for _, content in batch]
                check([orjson.loads(text) for text in found] == wanted, f"{self.name}: Redis differs")
        self._stage.drop_folder(self._folder)


class ByTheThousand(Storing):
    """Ours: checked, logged and synced, hashed, visible to readers at once, then stored.

    ``settings`` are further ones of the engine, ``label`` says which.
    """

    title = f"submit_many of {BATCH}, flush"

    def __init__(
        self,
        stage: Stage,
        data: Sequence[Place],
        truth: Truth,
        settings: Mapping[str, Any] | None = None,
        label: str = "",
    ) -> None:
        super().__init__(stage, data, truth)
        self.name += label and f", {label}"
        self._settings = {**truth.settings, **(settings or {})}

    async def prepare(self) -> None:
        await super().prepare()
        told = {"redis_url": self._stage.url, "redis_prefix": "e:", **self._settings}
        self._engine = SyncEngine(SyncEngineConfig(data_dir=self._folder, **told))
        await self._engine.start()

    async def run(self) -> None:
        for batch in batches(self._items, BATCH):
            await self._engine.submit_many(batch)
        await self._engine.flush(timeout=120)

    async def verify(self) -> None:
        await self._engine.stop()
        await super().verify()


class Singly(ByTheThousand):
    """The same through as many tasks as would serve requests."""

    title = f"submit, {AT_ONCE} concurrent, flush"

    async def run(self) -> None:
        await asyncio.gather(*(self._some(first) for first in range(AT_ONCE)))
        await self._engine.flush(timeout=120)

    async def _some(self, first: int) -> None:
        submit = self._engine.submit
        for item in self._items[first::AT_ONCE]:
            await submit(item)


class ByHand(Storing):
    """Batch after batch: a pipeline into Redis, then the upsert and its commit. No log, no hashes, no stamps."""

    title = "by hand, Redis then SQL"

    def __init__(self, stage: Stage, data: Sequence[Place], truth: Truth, hand: type[Hand]) -> None:
        super().__init__(stage, data, truth)
        self.name += f", {hand.title}"
        self._made = hand

    async def prepare(self) -> None:
        await super().prepare()
        self._client = Redis.from_url(self._stage.url)
        await self._client.ping()
        self._hand = self._made(self._truth, self._folder)
        await self._hand.open()

    async def run(self) -> None:
        for batch in batches(self._items, BATCH):
            await self._into_redis(batch)
            await self._hand.upsert(batch)

    async def verify(self) -> None:
        await self._client.aclose()
        await self._hand.close()
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


class ByHandAtOnce(ByHand):
    """The same with both halves of a batch under way together."""

    title = "by hand, Redis and SQL at once"

    async def run(self) -> None:
        for batch in batches(self._items, BATCH):
            await asyncio.gather(self._into_redis(batch), self._hand.upsert(batch))
