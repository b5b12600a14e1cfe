"""How long one of 200 submitters waits for ``Ack.LOGGED``, p99, beside the p99 of the disk's own part of that.

The disk's part is one ``pwrite`` and one ``fdatasync`` of the bytes that the 200 records of a group take in the log.
"""

from __future__ import annotations

import asyncio
import os
import random
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from bench.data import Place, fresh, places, table_is
from bench.harness import Answer, Contender, Stage, Target, Unit, check, compared
from sync_engine import Ack, SyncEngine, SyncEngineConfig
from sync_engine.item import Op
from sync_engine.log_record import FRAME_BYTES, encode_op

__all__ = ["ask"]

SUBMITS = 40_000
SYNCS = 1_000
AT_ONCE = 200
PACE_S = 0.05
"""How long a submitter of the paced rows rests between two writes, on average: together they make up to 4,000 writes/s.

By chance, as callers come who know nothing of each other: with a fixed rest those who were answered by one sync would
all be back in the same instant, and be a crowd of 200 for ever.
"""
SWITCH_S = 0.0005
"""How long a thread that wants the GIL lets another one go on: CPython's own choice is 5 ms."""

LATER = {"batch_flush_ms": 60_000, "batch_flush_count": 100_000, "batch_flush_bytes": 2**30}


async def ask(stage: Stage) -> list[Answer]:
    """As fast as they can, and at a pace; each with and without a flush beside it."""
    data = places(stage.sized(SUBMITS, AT_ONCE))
    items = fresh(data, stamp=1)
    record = sum(FRAME_BYTES + len(encode_op(Op(kind="put", object_id=i.object_id, stamp=1, item=i))) for i in items)
    syncs = stage.sized(SYNCS, 20)
    ours = Submits(stage, data, "submit, LOGGED")
    unflushed = Submits(stage, data, "submit, LOGGED, the flush put off", settings=LATER)
    quick = Submits(stage, data, "submit, LOGGED, switching every 0.5 ms", switch_s=SWITCH_S)
    fewer = data[: max(AT_ONCE, len(data) // 4)]
    paced = Submits(stage, fewer, "submit, LOGGED, at a pace", pace_s=PACE_S)
    alone = Submits(stage, fewer, "submit, LOGGED, at a pace, the flush put off", pace_s=PACE_S, settings=LATER)
    group = Syncs(stage, record * AT_ONCE // len(items), syncs)
    single = Syncs(stage, record // len(items), syncs)
    times = await stage.race(ours, quick, unflushed, paced, alone, group, single)
    asked = f"`submit` with `Ack.LOGGED`, {AT_ONCE} submitters, p99 of the latency: as fast as they can"
    pace = f"the same, each resting {PACE_S * 1e3:g} ms on average"
    answers = [
        compared(question, times, mine.name, [base.name], Target(10, at_most=True), unit=Unit.TIME)
        for question, mine, base in (
            (asked, ours, group),
            (pace, paced, group),
            ("as fast as they can, with `sys.setswitchinterval(0.0005)`", quick, group),
            ("as fast as they can, nothing flushed meanwhile", unflushed, group),
            (f"{pace}, against a sync of one record", paced, single),
            (f"{pace}, nothing flushed meanwhile", alone, group),
        )
    ]
    return [*answers[:2], *(replace(other, target=None) for other in answers[2:])]


class Submits(Contender):
    """Ours, with SQLite behind it. One unit is the whole run: its time is the p99 of what the callers waited."""

    def __init__(
        self,
        stage: Stage,
        data: Sequence[Place],
        name: str,
        *,
        settings: Mapping[str, Any] | None = None,
        pace_s: float = 0.0,
        switch_s: float = 0.0,
    ) -> None:
        super().__init__(1)
        self.name = name
        self._stage = stage
        self._data = data
        self._settings = settings or {}
        self._pace_s = pace_s
        self._switch_s = switch_s
        self._chance = random.Random(1)

    async def prepare(self) -> None:
        self._folder = self._stage.new_folder()
        self._engine = SyncEngine(SyncEngineConfig(data_dir=self._folder, **self._settings))
        await self._engine.start()
        self._items = fresh(self._data)
        self._waits: list[float] = []

    async def run(self) -> float:
        usual_s = sys.getswitchinterval()
        sys.setswitchinterval(self._switch_s or usual_s)
        try:
            await asyncio.gather(*(self._some(first) for first in range(AT_ONCE)))
        finally:
            sys.setswitchinterval(usual_s)
        return _p99(self._waits)

    async def _some(self, first: int) -> None:
        submit, clock, pace_s, chance = self._engine.submit, time.perf_counter, self._pace_s, self._chance
        for item in self._items[first::AT_ONCE]:
            if pace_s:
                await asyncio.sleep(chance.expovariate(1 / pace_s))
            start = clock()
            await submit(item, ack=Ack.LOGGED)
            self._waits.append(clock() - start)

    async def verify(self) -> None:
        check(len(self._waits) == len(self._data), f"{self.name}: {len(self._waits)} answers")
        await self._engine.stop()
        check(table_is(self._folder / "truth.db", self._data), f"{self.name}: the table differs")
        self._stage.drop_folder(self._folder)


class Syncs(Contender):
    """One writer, one file that grows: ``pwrite``, ``fdatasync``, again. Its time is the p99 of such a pair."""

    def __init__(self, stage: Stage, size: int, count: int) -> None:
        super().__init__(1)
        self.name = f"fdatasync of {size:,} B"
        self._stage = stage
        self._bytes = os.urandom(size)
        self._count = count

    async def prepare(self) -> None:
        self._folder = self._stage.new_folder()
        self._waits: list[float] = []

    async def run(self) -> float:
        await asyncio.to_thread(self._write)
        return _p99(self._waits)

    def _write(self) -> None:
        clock, at = time.perf_counter, 0
        fd = os.open(self._folder / "file", os.O_WRONLY | os.O_CREAT)
        try:
            for _ in range(self._count):
                start = clock()
                at += os.pwrite(fd, self._bytes, at)
                os.fdatasync(fd)
                self._waits.append(clock() - start)
        finally:
            os.close(fd)

    async def verify(self) -> None:
        size = (self._folder / "file").stat().st_size
        check(size == len(self._bytes) * self._count, f"{self.name}: {size} bytes")
        self._stage.drop_folder(self._folder)


def _p99(waits: Sequence[float]) -> float:
    return sorted(waits)[int(len(waits) * 0.99)]
