"""What ``SqlStore.put_batch`` costs beside the driver's own upsert of rows that are made beforehand, same indexes."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any

from bench.data import SETTINGS, Place, batches, fresh, places
from bench.harness import Answer, Contender, Stage, Target, check, compared
from bench.upserts import insert_or_update, insert_or_update_mysql, told, unnest, values
from sync_engine.storage.sql import SqlStore
from sync_engine.storage.sql.rows import row_of
from sync_engine.testing.databases import RunningDatabase, RunningMariaDB, RunningPostgres, ask

__all__ = [
    "NAMES",
    "TYPES",
    "CopyMerge",
    "Driven",
    "MariaMany",
    "MultiRow",
    "Unnest",
    "ask_all",
    "mariadb",
    "postgresql",
]

ITEMS = 20_000
CHUNK = 1_000

NAMES = (
    "id", "version", "timestamp", "payload_hash", "payload", "payload_blob", "audit", "state", "access_count",
    "last_accessed", "stamp",
)  # fmt: skip
TYPES = ["text", "int8", "int8", "text", "text", "bytea", "text", "text", "int8", "int8", "int8"]


async def ask_all(stage: Stage) -> list[Answer]:
    """Half of the items new, half over older ones, in one transaction of one commit, as a flush does it."""
    data = places(stage.sized(ITEMS, CHUNK))
    answers: list[Answer] = []
    for what, opened, kinds in (
        ("SQLite", _file, (ExecuteMany,)),
        ("MariaDB", mariadb, (MultiRow, MariaMany)),
        ("PostgreSQL", postgresql, (Unnest, CopyMerge)),
    ):
        async with opened(stage) as (url, pids):
            contenders = [kind(what, url, data) for kind in (Store, *kinds)]
            with stage.watching(*pids):
                times = await stage.race(*contenders)
        ours, *baselines = times
        asked = f"`SqlStore.put_batch`, {len(data):,} JSON items of ~250 B, half of them new: {what}"
        answers.append(compared(asked, times, ours, baselines, Target(0.7)))
    return answers


class Upsert(Contender):
    """Writes all items; the older half of them is there beforehand."""

    title = "?"

    def __init__(self, what: str, url: str, data: Sequence[Place]) -> None:
        super().__init__(len(data))
        self.name = f"{what}: {self.title}"
        self._url = url
        self._data = data

    async def prepare(self) -> None:
        store = await SqlStore.connect(self._url, timeout_ms=60_000)
        await ask(
            self._url, "DELETE FROM sync_items" if self._url.startswith("sqlite") else "TRUNCATE TABLE sync_items"
        )
        if self._url.startswith("sqlite"):
            await ask(self._url, "PRAGMA wal_checkpoint(TRUNCATE)")
        await store.put_batch(fresh(self._data[::2], stamp=1))
        await store.close()
        self._items = fresh(self._data, stamp=2)
        # With the labels that put_batch adds: the very rows that ours writes.
        self._rows = [row_of(item.replace(batch_id="6f9619ff-8b86-4d01-b42d-00cf4fc964ff"), 2) for item in self._items]
        self._items = fresh(self._data, stamp=2)  # with no hash computed

    async def verify(self) -> None:
        ((count, least),) = await ask(self._url, "SELECT count(*), min(stamp) FROM sync_items")
        check((count, least) == (self.units, 2), f"{self.name}: {count} rows, the oldest of stamp {least}")


class Store(Upsert):
    """Ours: hashes, locks, guard, tombstones, the newest stamp, all in one transaction."""

    title = "put_batch"

    async def prepare(self) -> None:
        await super().prepare()
        self._store = await SqlStore.connect(self._url, timeout_ms=60_000)

    async def run(self) -> None:
        result = await self._store.put_batch(self._items)
        check(result.written == self.units, f"{self.name}: {result}")

    async def verify(self) -> None:
        await self._store.close()
        await super().verify()


class ExecuteMany(Upsert):
    """The standard library's upsert, one row after the other, in one transaction, in a thread of its own."""

    title = "sqlite3.executemany"

    async def run(self) -> None:
        await asyncio.get_running_loop().run_in_executor(self._thread, self._write)

    async def prepare(self) -> None:
        await super().prepare()
        self._thread = ThreadPoolExecutor(1)
        self._connection = self._thread.submit(self._opened).result()

    def _opened(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self._url.removeprefix("sqlite:///"), isolation_level=None)
        for setting in SETTINGS:
            connection.execute(setting)
        return connection

    def _write(self) -> None:
        self._connection.execute("BEGIN IMMEDIATE")
        self._connection.executemany(insert_or_update(NAMES, values(NAMES, "?")), self._rows)
        self._connection.execute("COMMIT")

    async def verify(self) -> None:
        self._thread.submit(self._connection.close).result()
        self._thread.shutdown()
        await super().verify()


class Driven(Upsert):
    """A baseline on a connection of a driver's own."""

    async def prepare(self) -> None:
        await super().prepare()
        store = await SqlStore.connect(self._url)
        asked: dict[str, Any] = store._database._asked  # type: ignore[attr-defined]  # of a server
        await store.close()
        self._connection = await self._connected(asked)

    async def _connected(self, asked: dict[str, Any]) -> Any:
        raise NotImplementedError


class MultiRow(Driven):
    """asyncmy's ``execute`` of a VALUES of 1,000 rows at a time."""

    title = "asyncmy, VALUES of 1,000 rows"
    chunk = CHUNK

    async def _connected(self, asked: dict[str, Any]) -> Any:
        import asyncmy

        return await asyncmy.connect(**asked, charset="utf8mb4", autocommit=True)

    async def run(self) -> None:
        await self._connection.begin()
        async with self._connection.cursor() as cursor:
            for chunk in batches(self._rows, self.chunk):
                await cursor.execute(
                    insert_or_update_mysql(NAMES, values(NAMES, "%s", len(chunk))),
                    [value for row in chunk for value in row],
                )
        await self._connection.commit()

    async def verify(self) -> None:
        await self._connection.ensure_closed()
        await super().verify()


class MariaMany(MultiRow):
    """asyncmy's ``executemany``, which makes statements of about 1 MB."""

    title = "asyncmy, executemany"

    async def run(self) -> None:
        await self._connection.begin()
        async with self._connection.cursor() as cursor:
            await cursor.executemany(insert_or_update_mysql(NAMES, values(NAMES, "%s")), self._rows)
        await self._connection.commit()


class Unnest(Driven):
    """asyncpg and a column of arrays per 1,000 rows."""

    title = "asyncpg, unnest of 1,000 rows"
    chunk = CHUNK

    async def _connected(self, asked: dict[str, Any]) -> Any:
        import asyncpg

        return await asyncpg.connect(**asked)

    async def run(self) -> None:
        said = insert_or_update(NAMES, unnest(TYPES, "${}".format))
        async with self._connection.transaction():
            for chunk in batches(self._rows, self.chunk):
                await self._connection.execute(said, *zip(*chunk, strict=True))

    async def verify(self) -> None:
        await self._connection.close()
        await super().verify()


class CopyMerge(Unnest):
    """asyncpg's COPY into a temporary table, and one statement that merges it."""

    title = "asyncpg, COPY and merge"

    async def run(self) -> None:
        async with self._connection.transaction():
            await self._connection.execute("CREATE TEMP TABLE told (LIKE sync_items INCLUDING DEFAULTS) ON COMMIT DROP")
            await self._connection.copy_records_to_table("told", records=self._rows, columns=NAMES)
            await self._connection.execute(insert_or_update(NAMES, told(NAMES)))


Opened = tuple[str, Sequence[int]]


@asynccontextmanager
async def _file(stage: Stage) -> AsyncIterator[Opened]:
    folder = stage.new_folder()
    yield f"sqlite:///{folder / 'truth.db'}", ()
    stage.drop_folder(folder)


def _server(make: Callable[[], RunningDatabase]) -> Callable[[Stage], Any]:
    @asynccontextmanager
    async def opened(stage: Stage) -> AsyncIterator[Opened]:
        async with make() as server:
            yield await server.database(), (server.pid,)

    return opened


mariadb = _server(lambda: RunningMariaDB(durable=True, settings=["--innodb-buffer-pool-size=256M"]))
postgresql = _server(lambda: RunningPostgres(durable=True))
