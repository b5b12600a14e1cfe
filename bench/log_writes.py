"""Question 5: many submitters that wait for the log, beside a commit of its own for each of them."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from bench.data import SETTINGS, Place, fresh, places, table_is
from bench.harness import Answer, Contender, Stage, Target, check, compared
from sync_engine import Ack, SyncEngine, SyncEngineConfig

__all__ = ["ask"]

SUBMITS = 20_000
COMMITS = 4_000
AT_ONCE = 200

CREATE = "CREATE TABLE sync_items (id TEXT PRIMARY KEY, payload TEXT NOT NULL)"
INSERT = "INSERT INTO sync_items VALUES (?, ?)"


async def ask(stage: Stage) -> list[Answer]:
    """200 tasks, each submitting one item after the other until its share is logged."""
    data = places(stage.sized(SUBMITS, AT_ONCE))
    fewer = data[: stage.sized(COMMITS, AT_ONCE)]  # a commit each takes its time, and every one costs the same
    times = await stage.race(
        Submits(stage, data), Submits(stage, data, flushing=False), Commits(stage, fewer), CommitLoop(stage, fewer)
    )
    ours, unflushed, commits, loop = times
    asked = f"`submit` with `Ack.LOGGED`, {AT_ONCE} concurrent submitters"
    return [
        compared(asked, times, ours, [commits], Target(10)),
        compared("the same, against commits in a bare loop", times, ours, [loop], None),
        compared("the same, nothing flushed meanwhile", times, unflushed, [commits], None),
    ]


class Waiters(Contender):
    """``AT_ONCE`` tasks that each wait for one write after the other."""

    def __init__(self, stage: Stage, data: Sequence[Place]) -> None:
        super().__init__(len(data))
        self._stage = stage
        self._data = data

    async def prepare(self) -> None:
        self._folder = self._stage.new_folder()

    async def run(self) -> None:
        await asyncio.gather(*(self._some(first) for first in range(AT_ONCE)))

    async def _some(self, first: int) -> None:
        raise NotImplementedError


class Submits(Waiters):
    """Ours, with SQLite behind it; ``flushing=False`` puts the flush off, to show what the log alone takes."""

    def __init__(self, stage: Stage, data: Sequence[Place], *, flushing: bool = True) -> None:
        super().__init__(stage, data)
        self.name = f"submit{'' if flushing else ', the flush put off'}"
        self._later = (
            {} if flushing else {"batch_flush_ms": 60_000, "batch_flush_count": 100_000, "batch_flush_bytes": 2**30}
        )

    async def prepare(self) -> None:
        await super().prepare()
        self._engine = SyncEngine(SyncEngineConfig(data_dir=self._folder, **self._later))
        await self._engine.start()
        self._items = fresh(self._data)

    async def _some(self, first: int) -> None:
        submit = self._engine.submit
        for item in self._items[first::AT_ONCE]:
            await submit(item, ack=Ack.LOGGED)

    async def verify(self) -> None:
        check(self._engine.stats().log_records <= self.units, f"{self.name}: more in the log than was submitted")
        await self._engine.stop()
        check(table_is(self._folder / "truth.db", self._data), f"{self.name}: the table differs")
        self._stage.drop_folder(self._folder)


class Commits(Waiters):
    """One transaction per submit, on the one thread that a SQLite connection has; submitters wait for theirs."""

    name = "a SQLite commit per submit"

    async def prepare(self) -> None:
        await super().prepare()
        self._thread = ThreadPoolExecutor(1)
        self._connection = self._thread.submit(_opened, self._folder / "commits.db").result()

    async def _some(self, first: int) -> None:
        loop = asyncio.get_running_loop()
        for place in self._data[first::AT_ONCE]:
            await loop.run_in_executor(self._thread, self._commit, place)

    def _commit(self, place: Place) -> None:
        # Autocommit: the statement is the transaction.
        self._connection.execute(INSERT, (place[0], place[1].decode()))

    async def verify(self) -> None:
        self._thread.submit(self._connection.close).result()
        self._thread.shutdown()
        check(table_is(self._folder / "commits.db", self._data), f"{self.name}: the table differs")
        self._stage.drop_folder(self._folder)


class CommitLoop(Commits):
    """The same without any submitter: what the disk and SQLite alone take."""

    name = "a SQLite commit per row in a bare loop"

    async def run(self) -> None:
        await asyncio.get_running_loop().run_in_executor(self._thread, self._commit_all)

    def _commit_all(self) -> None:
        for place in self._data:
            self._commit(place)


def _opened(path: object) -> sqlite3.Connection:
    connection = sqlite3.connect(str(path), isolation_level=None)
    for setting in SETTINGS:
        connection.execute(setting)
    connection.execute(CREATE)
    return connection
