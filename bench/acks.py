"""What a caller waits for each acknowledgement, alone and as one of 200: the costs in docs/durability.md.

All against ``Ack.MEMORY`` of the same engine, which waits for neither disk nor tier. No targets: the price of a
promise is that of the disk and the databases.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import replace

from bench.data import Place, fresh, places
from bench.harness import Answer, Contender, Stage, Target, Unit, check, compared
from bench.truths import MariaDB, PostgreSQL, Sqlite, Truth, made
from sync_engine import Ack, SyncEngine, SyncEngineConfig

__all__ = ["ask"]

ALONE = 200
AT_ONCE = 200
EACH = 10
"""Writes of each of the 200, one after the other."""
ROUNDS = 3


async def ask(stage: Stage) -> list[Answer]:
    """Medians and p99; Redis is there in every case."""
    answers: list[Answer] = []
    for kind, acks in ((Sqlite, (Ack.LOGGED, Ack.STORED)), (MariaDB, (Ack.STORED,)), (PostgreSQL, (Ack.STORED,))):
        truth = await made(stage, kind)
        for callers, each in ((1, stage.sized(ALONE, 100)), (AT_ONCE, stage.sized(EACH, 2))):
            runs = {
                (ack, share): Waits(stage, truth, ack, callers, each, share)
                for ack in (Ack.MEMORY, *acks)
                for share in (0.5, 0.99)
            }
            times = await stage.race(*runs.values(), rounds=ROUNDS)
            who = "one caller" if callers == 1 else f"{callers} callers"
            for ack in acks:
                for share in (0.5, 0.99):
                    asked = f"`submit` with `Ack.{ack.name}`, {who}, Redis + {truth.what}: p{share * 100:g}"
                    mine, base = runs[ack, share].name, runs[Ack.MEMORY, share].name
                    # A ratio of times, as with an upper bound; there is none.
                    answer = compared(asked, times, mine, [base], Target(1, at_most=True), unit=Unit.TIME)
                    answers.append(replace(answer, target=None))
    return answers


class Waits(Contender):
    """Callers who write one item after the other. Its time is what the given share of the writes waited at most."""

    def __init__(self, stage: Stage, truth: Truth, ack: Ack, callers: int, each: int, share: float) -> None:
        super().__init__(1)
        self.name = f"{truth.what}: {ack.name}, {callers} at once, p{share * 100:g}"
        self._share = share
        self._stage = stage
        self._truth = truth
        self._ack = ack
        self._callers = callers
        self._data: Sequence[Place] = places(callers * each)

    async def prepare(self) -> None:
        await self._stage.empty_redis()
        self._folder = self._stage.new_folder()
        await self._truth.empty(self._folder)
        told = {"redis_url": self._stage.url, "redis_prefix": "a:", **self._truth.settings}
        self._engine = SyncEngine(SyncEngineConfig(data_dir=self._folder, **told))
        await self._engine.start()
        self._items = fresh(self._data)
        self._waits: list[float] = []

    async def run(self) -> float:
        await asyncio.gather(*(self._some(first) for first in range(self._callers)))
        return _at(self._waits, self._share)

    async def _some(self, first: int) -> None:
        submit, clock = self._engine.submit, time.perf_counter
        for item in self._items[first :: self._callers]:
            start = clock()
            await submit(item, ack=self._ack)
            self._waits.append(clock() - start)

    async def verify(self) -> None:
        await self._engine.stop()
        check(await self._truth.holds(self._folder, self._data), f"{self.name}: the table differs")
        self._stage.drop_folder(self._folder)


def _at(waits: Sequence[float], share: float) -> float:
    return sorted(waits)[int(len(waits) * share)]
