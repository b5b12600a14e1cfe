"""How fast the log drains after an outage of 200,000 operations, new writes flowing, beside the usual speed of a flush.

The clock starts when SQL has taken its first batch after its return: until then the engine only waits for its next
attempt, at most 5 s, and no speed can be told. Everything that arrives in every tier meanwhile counts, new writes too.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from typing import Any

import orjson

from bench.data import Place, batches, fresh, places
from bench.harness import Answer, Contender, Stage, Target, check, compared
from bench.truths import MariaDB, PostgreSQL, Sqlite, Truth, made
from sync_engine import SyncEngine, SyncEngineConfig, SyncItem

__all__ = ["ask", "ask_servers"]

PLACES = 100_000
BATCH = 1_000
DELETED = 50
"""Every so manieth place is deleted in the second half."""
NEW_AT_ONCE = 10
NEW_EVERY_S = 0.01
"""New writes while the log drains: 1,000/s."""
ROUNDS = 3
OUTAGE: Mapping[str, Any] = {"sql_timeout_ms": 250}
"""Of SQLite a held lock is noticed as soon as of a server that it refuses connections."""


async def ask(stage: Stage) -> list[Answer]:
    """Redis + SQLite."""
    return await _asked(stage, Sqlite)


async def ask_servers(stage: Stage) -> list[Answer]:
    """Redis + MariaDB, Redis + PostgreSQL."""
    return [*await _asked(stage, MariaDB), *await _asked(stage, PostgreSQL)]


async def _asked(stage: Stage, kind: type[Truth]) -> list[Answer]:
    data = places(stage.sized(PLACES, 400))
    truth = await made(stage, kind)
    drain, usual = Drain(stage, data, truth), Usual(stage, data, truth)
    times = await stage.race(drain, usual, rounds=ROUNDS)
    asked = f"drain after an outage of {drain.units:,} operations, new writes flowing, Redis + {truth.what}"
    return [compared(asked, times, drain.name, [usual.name], Target(0.8))]


class Operations(Contender):
    """Every place twice, the second time changed or deleted. Ends when Redis and SQL have all of it."""

    title = "?"

    def __init__(self, stage: Stage, data: Sequence[Place], truth: Truth) -> None:
        super().__init__(2 * len(data))
        self.name = f"{truth.what}: {self.title}"
        self._stage = stage
        self._truth = truth
        self._first = data
        self._deleted = [id_ for id_, _ in data[::DELETED]]
        self._second = [
            (id_, orjson.dumps({"place": orjson.Fragment(text), "seen": 2}))
            for number, (id_, text) in enumerate(data)
            if number % DELETED
        ]

    async def prepare(self) -> None:
        await self._stage.empty_redis()
        self._folder = self._stage.new_folder()
        await self._truth.empty(self._folder)
        told = {"redis_url": self._stage.url, "redis_prefix": "d:", **OUTAGE, **self._truth.settings}
        self._engine = SyncEngine(SyncEngineConfig(data_dir=self._folder, **told))
        await self._engine.start()
        self._items = [fresh(self._first), fresh(self._second)]
        self._added: list[Place] = []

    async def verify(self) -> None:
        stats = self._engine.stats()
        check(stats.log_records == stats.quarantined == 0, f"{self.name}: {stats}")
        await self._engine.stop()
        wanted = [*self._second, *self._added]
        check(await self._truth.holds(self._folder, wanted), f"{self.name}: the table differs")
        self._stage.drop_folder(self._folder)

    async def _submit_all(self) -> None:
        for items in self._items:
            for batch in batches(items, BATCH):
                await self._engine.submit_many(batch)
        for ids in batches(self._deleted, BATCH):
            await self._engine.delete_many(ids)


class Usual(Operations):
    """Nothing is down."""

    title = "submit_many, flush, nothing down"

    async def run(self) -> None:
        await self._submit_all()
        await self._engine.flush(timeout=300)


class Drain(Operations):
    """All of it is in the log when SQL comes back."""

    title = "drain"

    async def prepare(self) -> None:
        await super().prepare()
        await self._truth.take_away(self._folder)
        await self._submit_all()
        stats = self._engine.stats()
        check(stats.log_records == self.units, f"{self.name}: {stats.log_records} operations wait")
        await self._truth.give_back()
        while self._engine.stats().lanes["l3"].waiting == self.units:  # noqa: ASYNC110 - nobody tells
            await asyncio.sleep(0.001)

    async def run(self) -> float:
        start, waiting = time.perf_counter(), self._engine.stats().log_records
        while self._engine.stats().log_records > NEW_AT_ONCE * 20:
            first = len(self._added)
            new = [(f"new.{number}", b'{"n":%d}' % number) for number in range(first, first + NEW_AT_ONCE)]
            await self._engine.submit_many([SyncItem(*place) for place in new])
            self._added += new
            await asyncio.sleep(NEW_EVERY_S)
        await self._engine.flush(timeout=300)
        took = time.perf_counter() - start
        return took * self.units / max(1, waiting + len(self._added))
