"""SQLite itself: the file, the settings of every connection, one statement at a time, and what its errors mean.

A session is one connection and its thread. A statement costs one hop to that thread and back, so statements go
to the driver's connection directly; SQLAlchemy makes the connections, and the tables.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import sqlite3
import threading
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, cast

import aiosqlite
from sqlalchemy import Table, event
from sqlalchemy.dialects import sqlite
from sqlalchemy.engine import URL, Dialect
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine
from sqlalchemy.pool import ConnectionPoolEntry, NullPool

from sync_engine.errors import ConfigError, DiskFull, StoreError, SyncEngineError, TierUnavailable
from sync_engine.storage.sql import tables
from sync_engine.storage.sql.dialect import Held, RowRefused, Session, beside, nothing
from sync_engine.storage.sql.rows import Row
from sync_engine.storage.sql.sqlite_words import BEGIN, COMMIT, ROLLBACK, SqliteWords
from sync_engine.storage.sql.words import Said

__all__ = ["Sqlite", "SqliteSession"]

SETTINGS: Final[tuple[tuple[str, str | int], ...]] = (
    ("journal_mode", "wal"),  # readers never wait for the writer
    ("synchronous", 2),  # FULL: the log forgets what was committed here, so it must survive a power loss
    ("foreign_keys", 1),
    ("cache_size", -16_384),  # KiB per connection; ids arrive in random order and touch pages all over the index
    ("wal_autocheckpoint", 4_000),  # pages (16 MiB): fewer rewrites of the same page than at the default 1,000
    ("journal_size_limit", 67_108_864),  # bytes that a log swollen by a long read may keep afterwards
)


NAMES: Final = "SELECT name FROM sqlite_master WHERE type IN ('table', 'index')"

CHECKPOINT: Final = "PRAGMA wal_checkpoint(TRUNCATE)"

CRAMPED_COMMITS: Final = 100
"""For how long a disk that was full counts as nearly full: each of them costs two syncs more."""

WORD: Final = Said("SELECT 1")

COLUMNS: Final = "SELECT name, pk > 0 FROM pragma_table_info(?) ORDER BY cid"


class NotADatabase(TierUnavailable):
    """The file is none of SQLite's."""


class Sqlite:
    """A database in a file."""

    dialect: Dialect = sqlite.dialect()
    owned_tables: Sequence[Table] = tuple(tables.metadata.sorted_tables)
    one_writer = True

    def __init__(self, path: Path, timeout_ms: int) -> None:
        self._path = path
        self._timeout_ms = timeout_ms
        self._engine: AsyncEngine | None = None
        self._was_a_database = False

    def words(self, *tables: str) -> SqliteWords:
        """The statements about tables of items."""
        return SqliteWords(*tables)

    async def open(self) -> SqliteSession:
        """A new connection with its settings made and read back; the first makes the file."""
        if self._engine is None:
            await asyncio.to_thread(make_file, self._path)
            self._engine = make_engine(self._path, self._timeout_ms)
        try:
            session = await SqliteSession.open(self._engine)
        except NotADatabase as other:
            if self._was_a_database:  # a damage, which may pass
                raise
            raise StoreError("l3", f"{self._path} is not an SQLite database") from other
        self._was_a_database = True
        return session

    async def names(self, session: Session) -> set[str]:
        """Names of the tables and indexes that there are."""
        return {name for (name,) in await session.rows(Said(NAMES))}

    async def columns(self, session: Session, table: str) -> list[Held]:
        """The columns of a table."""
        return [Held(name, bool(in_key), None) for name, in_key in await session.rows(Said(COLUMNS, (table,)))]

    def options(self, table: Table) -> str:
        """Nothing stands behind CREATE TABLE (...)."""
        return ""

    async def adapt(self, session: Session, table: Table) -> None:
        """Ids are compared by bytes whatever the table."""

    async def close(self) -> None:
        """Let go of the engine."""
        if self._engine is not None:
            await self._engine.dispose()

    def __repr__(self) -> str:
        return f"sqlite {self._path.name!r}"


class SqliteSession:
    """One connection. Statements run in call order; a caller that goes away does not stop its statement."""

    bytes_max = 4 * 1024 * 1024  # SQLite copies every bound value
    broken = False

    def __init__(self, connection: AsyncConnection, driver: aiosqlite.Connection) -> None:
        self._connection = connection
        self._driver = driver
        self._cramped = 0  # so many more commits empty SQLite's own log at once, since the disk was full
        self.running = 0

    @classmethod
    async def open(cls, engine: AsyncEngine) -> SqliteSession:
        """A new connection with its settings made."""
        try:
            connection = await engine.connect()
            raw = await connection.get_raw_connection()
        except (DBAPIError, *DRIVER_ERRORS) as error:
            raise meaning(error) from error
        driver = raw.driver_connection
        if not isinstance(driver, aiosqlite.Connection):
            raise ConfigError(f"SQLite is reached through aiosqlite, not through {type(driver).__name__}")
        return cls(connection, driver)

    async def rows(self, said: Said) -> list[Row]:
        """Run one statement; all its rows."""
        self.running += 1
        try:
            return cast(list[Row], await self._driver.execute_fetchall(said.text, said.values))
        except DRIVER_ERRORS as error:
            raise meaning(error) from error
        finally:
            self.running -= 1

    async def run(self, said: Said) -> int:
        """Run one statement that changes rows; how many it changed."""
        try:
            return (await self._driver.execute(said.text, said.values)).rowcount
        except DRIVER_ERRORS as error:
            told = meaning(error)
            if isinstance(told, DiskFull):
                self._cramped = CRAMPED_COMMITS
            raise told from error

    async def attempt(self, said: Said, meanwhile: Callable[[], Awaitable[None]] = nothing) -> int:
        """The same: an error undoes its own statement and no other, unless a trigger says otherwise."""
        if meanwhile is nothing:
            return await self.run(said)
        # To have sent a statement is not to have begun it: the connection's thread needs the GIL for that, and would
        # wait for all that is done meanwhile. It comes to the statement right behind its answer to a word sent ahead,
        # and gives the GIL away inside of it.
        word = asyncio.ensure_future(self.rows(WORD))
        return await beside(self.run(said), meanwhile, word)

    @property
    def in_transaction(self) -> bool:
        """Whether a transaction is open; SQLite ends one by itself when a trigger or a full disk says so."""
        return self._driver.in_transaction

    async def begin(self) -> None:
        """Open a transaction that may write, waiting for other writers as long as the settings allow."""
        await self.run(Said(BEGIN))

    async def lock(self, buckets: Sequence[int]) -> None:
        """There is one writer at a time already."""

    async def commit(self) -> None:
        """Make the transaction durable."""
        await self.run(Said(COMMIT))
        if self._cramped:
            self._cramped -= 1
            await self._checkpoint()

    async def rollback(self) -> None:
        """Undo the transaction; a connection that cannot even do that is given up, and its end does it."""
        try:
            await self.run(Said(ROLLBACK))
        except SyncEngineError:
            if self.in_transaction:
                self.broken = True
                with suppress(SyncEngineError):
                    await self.close()
                return
        if self._cramped:
            await self._checkpoint()

    async def _checkpoint(self) -> None:
        """Empty SQLite's own log: it never shrinks by itself.

        What it takes may be all that the next attempt needs, or the file itself to grow; and once it has taken the last
        block it cannot even be emptied into the file any more.
        """
        with suppress(SyncEngineError):
            await self.rows(Said(CHECKPOINT))

    async def begin_migration(self) -> None:
        """Tables are made in a transaction like any other."""
        await self.begin()

    async def end_migration(self, done: bool) -> None:
        """Keep or undo what was made."""
        await (self.commit() if done else self.rollback())

    async def close(self) -> None:
        """Close the connection after what it is doing."""
        try:
            await self._connection.close()
        except (DBAPIError, *DRIVER_ERRORS) as error:
            raise meaning(error) from error


_MAKING: Final = threading.Lock()


def make_file(path: Path) -> None:
    """Make the folder (mode 0700) and the file (0600) where they are missing; what exists keeps its mode.

    A file that is there is not opened: closing it would end every lock that this process holds on it, SQLite's too
    (fcntl(2); "How To Corrupt An SQLite Database File", 2.2), and the next process to go would take the log along.

    Raises ``StoreError`` naming the path and what stands in the way, ``TierUnavailable`` where that may pass.
    """
    try:
        path = Path(os.path.realpath(path))
        missing = [folder for folder in path.parents if not folder.exists()]
        for folder in reversed(missing):
            folder.mkdir(mode=0o700, exist_ok=True)
        with _MAKING:  # until it is closed nobody here may think that it is there, and have SQLite open it
            if path.is_dir():
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
            if path.is_symlink():  # resolved, it is one of a circle
                raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
            if not path.exists():
                # SQLite gives its -wal and -shm files the mode of the database.
                with suppress(FileExistsError):  # another process was first
                    os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
            elif not os.access(path, os.R_OK | os.W_OK):
                code = errno.EROFS if os.statvfs(path).f_flag & os.ST_RDONLY else errno.EACCES
                raise OSError(code, os.strerror(code))
    except OSError as error:
        told = f"cannot open {path}: {error.strerror or error}"
        raise TierUnavailable("l3", told) if error.errno in _PASSING_OF_DISKS else StoreError("l3", told) from error


def make_engine(path: Path, timeout_ms: int) -> AsyncEngine:
    """Connections to the file, each with the settings made and read back."""
    # aiosqlite writes bound values, which are the users' data, to its log at DEBUG.
    driver_log = logging.getLogger("aiosqlite")
    if driver_log.level == logging.NOTSET:
        driver_log.setLevel(logging.INFO)
    engine = create_async_engine(
        URL.create("sqlite+aiosqlite", database=str(path)),
        poolclass=NullPool,  # the store keeps its few connections itself
        connect_args={"isolation_level": None, "timeout": timeout_ms / 1000},
        hide_parameters=True,
    )

    @event.listens_for(engine.sync_engine, "connect")
    def settle(connection: DBAPIConnection, _record: ConnectionPoolEntry) -> None:
        connection.run_async(lambda driver: _settle(driver, timeout_ms))

    return engine


async def _settle(driver: aiosqlite.Connection, timeout_ms: int) -> None:
    """Make the settings of one connection and read each back. SQLite ignores what it does not know."""
    try:
        for name, value in (("busy_timeout", timeout_ms), *SETTINGS):
            # PRAGMA takes no bound values; these are constants of this file and a checked number.
            await driver.execute_fetchall(f"PRAGMA {name} = {value}")
            held = [row[0] for row in await driver.execute_fetchall(f"PRAGMA {name}")]
            if held != [value]:
                raise StoreError("l3", f"SQLite keeps {name} at {held} where {value!r} is needed")
        ((encoding,),) = await driver.execute_fetchall("PRAGMA encoding")
        if encoding != "UTF-8":
            raise StoreError("l3", f"the file stores text as {encoding}; ids are ordered as UTF-8")
    except BaseException:  # cancelled or failed alike
        await driver.close()  # the pool has not taken it yet and would leave its thread running
        raise


DRIVER_ERRORS: Final = (sqlite3.Error, sqlite3.Warning, OverflowError, UnicodeError, ValueError)

_PASSING: Final = {
    sqlite3.SQLITE_BUSY: "the database is locked by another writer",
    sqlite3.SQLITE_LOCKED: "the database is locked",
    sqlite3.SQLITE_FULL: "the disk is full",
    sqlite3.SQLITE_IOERR: "the disk answers with an error",
    sqlite3.SQLITE_CANTOPEN: "the file cannot be opened",
    sqlite3.SQLITE_PROTOCOL: "the locks of the file are held by others",
    sqlite3.SQLITE_NOMEM: "memory is exhausted",
    sqlite3.SQLITE_INTERRUPT: "the statement was interrupted",
    sqlite3.SQLITE_READONLY: "the file is read-only",
    # Not the items' fault either: were these refusals, the whole log would end in the quarantine, one by one.
    sqlite3.SQLITE_CORRUPT: "the file is damaged",
    sqlite3.SQLITE_NOTADB: "the file is not a database any more",
    sqlite3.SQLITE_SCHEMA: "a table was changed meanwhile",
}
"""Troubles of the moment or of the machine: nothing is known of the items, and asking later can help."""

_PASSING_OF_DISKS: Final = frozenset({errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EMFILE, errno.ENFILE})

_MISSING: Final = ("no such table", "no such column", "has no column named", "no such index")
"""Somebody changed the tables, as the other databases say with a code of its own."""


_NO_ROOM: Final = frozenset({sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR_SHMSIZE, sqlite3.SQLITE_IOERR_WRITE})
"""The second is said by a connection that cannot make the index of SQLite's log, the third beyond a quota."""


def meaning(error: BaseException) -> SyncEngineError:
    """What a driver's error means, decided in this one place."""
    if isinstance(error, DBAPIError) and error.orig is not None:
        error = error.orig
    if isinstance(error, SyncEngineError):
        return error
    code: Any = getattr(error, "sqlite_errorcode", None)
    if isinstance(code, int) and code & 0xFF in _PASSING:
        kind = DiskFull if code in _NO_ROOM else NotADatabase if code == sqlite3.SQLITE_NOTADB else TierUnavailable
        return kind("l3", f"{_PASSING[code & 0xFF]} ({getattr(error, 'sqlite_errorname', code)})")
    if code == sqlite3.SQLITE_ERROR and any(missing in str(error) for missing in _MISSING):
        return TierUnavailable("l3", str(error))
    if isinstance(error, UnicodeError):
        return RowRefused("l3", "a text is not valid Unicode")
    if isinstance(error, ValueError) and str(error) in ("Connection closed", "no active connection"):
        return TierUnavailable("l3", "the store is closed")
    if isinstance(
        error, sqlite3.IntegrityError | sqlite3.DataError | sqlite3.ProgrammingError | sqlite3.InterfaceError
    ):
        return RowRefused("l3", str(error))
    if isinstance(error, OverflowError | ValueError):
        return RowRefused("l3", str(error))
    return StoreError("l3", str(error))
