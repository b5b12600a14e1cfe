"""The databases behind an engine under test: emptied, written by hand, taken away and given back, read back.

The hand-written ways are what somebody would write who needs no log, no hashes and no guard: rows into the very table
that ours writes, with its indexes, a transaction per batch.
"""

from __future__ import annotations

import sqlite3
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import aiosqlite

from bench.data import SETTINGS, Place, made_table, table_is
from bench.harness import Stage
from bench.upserts import insert_or_update, insert_or_update_mysql, told, unnest, values
from sync_engine import SyncItem
from sync_engine.storage.sql import SqlStore
from sync_engine.testing.databases import RunningDatabase, RunningMariaDB, RunningPostgres, ask

__all__ = ["Hand", "MariaDB", "PostgreSQL", "Server", "Sqlite", "Truth", "made"]

COLUMNS = ("id", "version", "timestamp", "payload", "state", "access_count", "last_accessed", "stamp")
TYPES = ("text", "int8", "int8", "text", "text", "int8", "int8", "int8")


class Hand(ABC):
    """A connection of a driver's own, and the upsert that goes through it."""

    title: ClassVar[str]

    def __init__(self, truth: Truth, folder: Path) -> None:
        self._truth = truth
        self._folder = folder
        self._connection: Any = None

    @abstractmethod
    async def open(self) -> None:
        """Connect."""

    @abstractmethod
    async def upsert(self, items: Sequence[SyncItem]) -> None:
        """Write all of them and commit."""

    async def close(self) -> None:
        """Let go of the connection."""
        await self._connection.close()


class Truth(ABC):
    """One database. ``hands``: its hand-written ways; the fastest of them is the baseline."""

    what: ClassVar[str]
    hands: ClassVar[Sequence[type[Hand]]]

    @property
    @abstractmethod
    def settings(self) -> Mapping[str, Any]:
        """What an engine must be told to have it as its truth."""

    @abstractmethod
    async def empty(self, folder: Path) -> None:
        """No rows. ``folder`` is that of the run: SQLite's file is there."""

    @abstractmethod
    async def holds(self, folder: Path, data: Sequence[Place]) -> bool:
        """Whether the table has exactly these contents."""

    @abstractmethod
    async def take_away(self, folder: Path) -> None:
        """Begin an outage."""

    @abstractmethod
    async def give_back(self) -> None:
        """End it."""


def row_of(item: SyncItem, stamp: int) -> tuple[Any, ...]:
    """What ``COLUMNS`` get."""
    content = item.content.decode()
    return (
        item.object_id, item.version, item.updated_at, content, item.state, item.access_count, item.last_accessed, stamp
    )  # fmt: skip


def rows_of(items: Sequence[SyncItem]) -> list[tuple[Any, ...]]:
    """One stamp for all: who writes by hand has a clock at most."""
    stamp = time.time_ns() // 1_000_000 << 16
    return [row_of(item, stamp) for item in items]


# SQLite


class ExecuteMany(Hand):
    """The driver's ``executemany`` on its thread."""

    title = "executemany"

    async def open(self) -> None:
        self._connection = await aiosqlite.connect(self._folder / "truth.db")
        for setting in SETTINGS:
            await self._connection.execute(setting)

    async def upsert(self, items: Sequence[SyncItem]) -> None:
        await self._connection.executemany(insert_or_update(COLUMNS, values(COLUMNS, "?")), rows_of(items))
        await self._connection.commit()


class Sqlite(Truth):
    """A file in the folder of the run."""

    what = "SQLite"
    hands = (ExecuteMany,)
    _lock: sqlite3.Connection | None = None

    @property
    def settings(self) -> Mapping[str, Any]:
        return {}

    async def empty(self, folder: Path) -> None:
        (await made_table(folder)).rename(folder / "truth.db")

    async def holds(self, folder: Path, data: Sequence[Place]) -> bool:
        return table_is(folder / "truth.db", data)

    async def take_away(self, folder: Path) -> None:
        self._lock = sqlite3.connect(folder / "truth.db", isolation_level=None)
        self._lock.execute("BEGIN IMMEDIATE")

    async def give_back(self) -> None:
        assert self._lock is not None, "it was taken away"
        self._lock.close()


# Servers


class Server(Truth):
    """A server of its own that syncs what it commits, started once for all questions."""

    def __init__(self, server: RunningDatabase, url: str) -> None:
        self._server = server
        self.url = url

    @property
    def settings(self) -> Mapping[str, Any]:
        return {"sql_url": self.url}

    async def empty(self, folder: Path) -> None:
        store = await SqlStore.connect(self.url, timeout_ms=60_000)  # makes the tables
        await store.close()
        for table in ("sync_items", "sync_tombstones"):
            await ask(self.url, f"TRUNCATE TABLE {table}")

    async def holds(self, folder: Path, data: Sequence[Place]) -> bool:
        held = await ask(self.url, "SELECT id, payload FROM sync_items")
        return {_text(id_): _text(payload) for id_, payload in held} == {id_: text.decode() for id_, text in data}

    async def take_away(self, folder: Path) -> None:
        await self._server.kill()

    async def give_back(self) -> None:
        await self._server.start()

    async def asked(self) -> dict[str, Any]:
        """How the driver is told where the server is."""
        store = await SqlStore.connect(self.url)
        asked: dict[str, Any] = store._database._asked  # type: ignore[attr-defined]  # of a server
        await store.close()
        return asked


class ServerHand(Hand):
    """``truth`` is a server."""

    _truth: Server

    async def open(self) -> None:
        self._connection = await self._connected(await self._truth.asked())

    @abstractmethod
    async def _connected(self, asked: dict[str, Any]) -> Any: ...


class ValuesOfMany(ServerHand):
    """asyncmy's ``execute`` of one VALUES for the batch."""

    title = "asyncmy, one VALUES"

    async def _connected(self, asked: dict[str, Any]) -> Any:
        import asyncmy

        return await asyncmy.connect(**asked, charset="utf8mb4", autocommit=True)

    async def upsert(self, items: Sequence[SyncItem]) -> None:
        said = insert_or_update_mysql(COLUMNS, values(COLUMNS, "%s", len(items)))
        async with self._connection.cursor() as cursor:
            await cursor.execute(said, [value for row in rows_of(items) for value in row])

    async def close(self) -> None:
        await self._connection.ensure_closed()


class MariaMany(ValuesOfMany):
    """asyncmy's ``executemany``, which makes statements of about 1 MB."""

    title = "asyncmy, executemany"

    async def upsert(self, items: Sequence[SyncItem]) -> None:
        await self._connection.begin()
        async with self._connection.cursor() as cursor:
            await cursor.executemany(insert_or_update_mysql(COLUMNS, values(COLUMNS, "%s")), rows_of(items))
        await self._connection.commit()


class Unnest(ServerHand):
    """asyncpg and a column of arrays."""

    title = "asyncpg, unnest"

    async def _connected(self, asked: dict[str, Any]) -> Any:
        import asyncpg

        return await asyncpg.connect(**asked)

    async def upsert(self, items: Sequence[SyncItem]) -> None:
        said = insert_or_update(COLUMNS, unnest(TYPES, "${}".format))
        await self._connection.execute(said, *zip(*rows_of(items), strict=True))


class CopyMerge(Unnest):
    """asyncpg's COPY into a temporary table, and one statement that merges it."""

    title = "asyncpg, COPY and merge"

    async def upsert(self, items: Sequence[SyncItem]) -> None:
        async with self._connection.transaction():
            await self._connection.execute("CREATE TEMP TABLE told (LIKE sync_items INCLUDING DEFAULTS) ON COMMIT DROP")
            await self._connection.copy_records_to_table("told", records=rows_of(items), columns=COLUMNS)
            await self._connection.execute(insert_or_update(COLUMNS, told(COLUMNS)))


class MariaDB(Server):
    """Debian's MariaDB."""

    what = "MariaDB"
    hands = (ValuesOfMany, MariaMany)


class PostgreSQL(Server):
    """Debian's PostgreSQL."""

    what = "PostgreSQL"
    hands = (Unnest, CopyMerge)


async def made(stage: Stage, kind: type[Truth]) -> Truth:
    """The truth of that kind; a server is started for the first question that needs it and serves the others."""
    if kind is Sqlite:
        return Sqlite()
    held: Truth | None = stage.shared.get(kind.what)
    if held is None:
        server: RunningDatabase = (
            RunningMariaDB(durable=True, settings=["--innodb-buffer-pool-size=256M"])
            if kind is MariaDB
            else RunningPostgres(durable=True)
        )
        await stage.at_end.enter_async_context(server)
        assert issubclass(kind, Server)
        held = stage.shared[kind.what] = kind(server, await server.database())
    return held


def _text(value: str | bytes | bytearray) -> str:
    return value if isinstance(value, str) else bytes(value).decode()
