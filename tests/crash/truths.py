"""The databases that scenarios run on, and what happens to them: gone, locked, held by a stranger, refusing rows.

The same verbs for all three. SQLite has no server: it is gone where another process has the file to itself.
"""

from __future__ import annotations

import asyncio
import sqlite3
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import pytest

from sync_engine.storage.sql.connect import database_of
from sync_engine.storage.sql.dialect import Session
from sync_engine.storage.sql.words import Said
from sync_engine.testing.databases import RunningDatabase, ask
from sync_engine.testing.proxy import CuttingProxy
from sync_engine.testing.servers import KINDS, RedisKind

from ..locks import write_locked

if TYPE_CHECKING:
    from .rig import Rig

__all__ = [
    "NAMES",
    "SERVERS",
    "FileTruth",
    "ServerTruth",
    "Truth",
    "each_kind_and_truth",
    "each_server",
    "each_truth",
    "stranger",
    "thorough",
    "trigger",
    "untrigger",
]

NAMES = {"sqlite": "SQLite", "mariadb": "MariaDB", "postgresql": "PostgreSQL"}
SERVERS = ("mariadb", "postgresql")
LOCK_S = 30.0

each_truth = pytest.mark.parametrize("truth", NAMES, indirect=True)
each_server = pytest.mark.parametrize("truth", SERVERS, indirect=True)
each_kind_and_truth = pytest.mark.parametrize(
    ("server_kind", "truth"),
    [
        *(pytest.param(kind, "sqlite", id=str(kind)) for kind in KINDS.values()),
        *(pytest.param(KINDS["redis-8-modules"], name, id=name) for name in SERVERS),
    ],
    indirect=["truth"],
)
"""Every kind of Redis over SQLite, and one over each other database."""


def thorough(kind: RedisKind, truth: Truth | None = None) -> bool:
    """Whether this pair gets the long variant of a scenario; over servers of SQL in `make faults` alone."""
    return kind.name == "redis-8-modules" and (truth is None or truth.long or truth.name == "SQLite")


class Truth(ABC):
    """One database of a scenario's own. ``long``: this is `make faults`, and there is time."""

    name: str

    def __init__(self, long: bool) -> None:
        self.long = long

    @abstractmethod
    async def vanish(self, rig: Rig) -> None:
        """Nobody can read or write any more, until ``come_back``."""

    @abstractmethod
    async def come_back(self) -> None:
        """With everything that was committed."""

    @asynccontextmanager
    async def gone(self, rig: Rig) -> AsyncIterator[None]:
        """Gone for so long."""
        await self.vanish(rig)
        try:
            yield
        finally:
            await self.come_back()

    @abstractmethod
    def locked(self, rig: Rig) -> AsyncIterator[None]:
        """An async context: somebody else keeps every writer out; reads go on."""

    async def renewed(self, rig: Rig) -> None:
        """An empty one for the next round."""
        rig.renew()

    def __repr__(self) -> str:
        return self.name


class FileTruth(Truth):
    """SQLite, in the data folder of the rig."""

    name = "SQLite"
    _other: sqlite3.Connection | None = None

    async def vanish(self, rig: Rig) -> None:
        """Where an engine has the file open already, it can still read."""
        try:
            self._other = _connected(rig)
            self._other.execute("PRAGMA locking_mode = EXCLUSIVE")
            self._other.execute("BEGIN IMMEDIATE")
        except sqlite3.OperationalError:
            await self.come_back()
            self._other = _connected(rig, LOCK_S)
            # On a thread: whose lock it waits for may need this loop to end.
            await asyncio.to_thread(self._other.execute, "BEGIN IMMEDIATE")

    async def come_back(self) -> None:
        if self._other is not None:
            self._other.close()
            self._other = None

    @asynccontextmanager
    async def locked(self, rig: Rig) -> AsyncIterator[None]:
        holding = write_locked(rig.data_dir / "truth.db", LOCK_S)
        await asyncio.to_thread(holding.__enter__)
        try:
            yield
        finally:
            holding.__exit__(None, None, None)


def _connected(rig: Rig, lock_s: float = 0) -> sqlite3.Connection:
    path = rig.data_dir / "truth.db"
    return sqlite3.connect(path, timeout=lock_s, isolation_level=None, check_same_thread=False)


class ServerTruth(Truth):
    """A database of a server that may be killed. ``through`` goes by the proxy, ``url`` straight."""

    def __init__(self, long: bool, server: RunningDatabase, url: str, proxy: CuttingProxy) -> None:
        super().__init__(long)
        self.name = server.what
        self.server = server
        self.url = url
        self.proxy = proxy

    @property
    def through(self) -> str:
        """What an engine connects to whose connections are cut, and counted."""
        return self.proxy.url_for(self.url)

    async def vanish(self, rig: Rig) -> None:
        self.server.strike()
        await self.server.kill()

    async def come_back(self) -> None:
        await self.server.start()

    @asynccontextmanager
    async def locked(self, rig: Rig) -> AsyncIterator[None]:
        async with stranger(self.url) as session:
            mysql = self.url.startswith("mysql")
            if not mysql:
                await session.begin()
            await session.run(
                Said("LOCK TABLES sync_items WRITE" if mysql else "LOCK TABLE sync_items IN EXCLUSIVE MODE")
            )
            yield
            await session.run(Said("UNLOCK TABLES" if mysql else "ROLLBACK"))

    async def renewed(self, rig: Rig) -> None:
        rig.renew()
        rig.settings["sql_url"] = self.url = await self.server.database()

    async def status(self, mysql: str, postgresql: str) -> int:
        """A number that the server counts."""
        if self.url.startswith("mysql"):
            ((_, number),) = await ask(self.url, f"SHOW GLOBAL STATUS LIKE '{mysql}'")
            return int(number)
        ((number,),) = await ask(self.url, postgresql)
        return int(number)


@asynccontextmanager
async def stranger(url: str) -> AsyncIterator[Session]:
    """A connection of somebody else, with a transaction that lasts as long as he likes."""
    session = await database_of(url, 10_000).open()
    try:
        yield session
    finally:
        await session.close()


async def trigger(rig: Rig, name: str, when: str, code: str = "", *, then: str = "not here") -> None:
    """From now on the database refuses an insert of a row of which ``when`` is true; ``{id}`` in it is the row's id.

    ``code`` is what it says of servers: an error number for MariaDB, an SQLSTATE for PostgreSQL.
    """
    url = rig.sql_url
    if url.startswith("sqlite"):
        told = f"CREATE TRIGGER {name} BEFORE INSERT ON sync_items WHEN {when.format(id='NEW.id')} "
        await ask(url, f"{told} BEGIN SELECT RAISE(ABORT, '{then}'); END")
        return
    if url.startswith("mysql"):
        number = f", MYSQL_ERRNO = {code}" if code else ""
        signal = f"SIGNAL SQLSTATE '45000' SET MESSAGE_TEXT = '{then}'{number}"
        body = f"BEGIN IF {when.format(id='NEW.id')} THEN {signal}; END IF; END"
        await ask(url, f"CREATE TRIGGER {name} BEFORE INSERT ON sync_items FOR EACH ROW {body}")
        return
    using = f" USING ERRCODE = '{code}'" if code else ""
    body = f"BEGIN IF {when.format(id='NEW.id')} THEN RAISE EXCEPTION '{then}'{using}; END IF; RETURN NEW; END"
    await ask(url, f"CREATE FUNCTION {name}() RETURNS trigger LANGUAGE plpgsql AS $$ {body} $$")
    await ask(url, f"CREATE TRIGGER {name} BEFORE INSERT ON sync_items FOR EACH ROW EXECUTE FUNCTION {name}()")


async def untrigger(rig: Rig, name: str) -> None:
    """The end of a ``trigger``."""
    on = " ON sync_items" if rig.sql_url.startswith("postgres") else ""
    await ask(rig.sql_url, f"DROP TRIGGER {name}{on}")
