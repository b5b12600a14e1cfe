"""What a database has to be for the store: its words, its sessions, and where its tables are looked up.

One store, one body of behaviour; each database has its own small files behind these protocols. Errors are
translated there, where the driver is known: a session raises ``TierUnavailable`` for troubles of the moment or of
the machine (nothing is known of the items), ``RowRefused`` for a statement that is refused for what is in a row,
and ``StoreError`` for anything else.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from typing import NamedTuple, Protocol, TypeVar

from sqlalchemy import Table
from sqlalchemy.engine import Dialect

from sync_engine.errors import StoreError, TierUnavailable
from sync_engine.storage.sql.rows import Row
from sync_engine.storage.sql.words import Said, Words

__all__ = ["BUCKETS", "Database", "Held", "Outrun", "RowRefused", "Session", "beside", "nothing"]

T = TypeVar("T")

BUCKETS = 64
"""Into so many buckets ids fall by their CRC-32; writers of one bucket take turns. Part of the format."""


class RowRefused(StoreError):
    """The database refused a row of the statement, for what is in it; other rows may be fine."""


class Outrun(TierUnavailable):
    """The transaction was given up in favour of another one (deadlock, serialization): nothing of it stands."""


async def nothing() -> None:
    """What there is to do meanwhile by default."""


async def beside(
    work: Awaitable[T], meanwhile: Callable[[], Awaitable[None]], word: Awaitable[object] | None = None
) -> T:
    """Begin the work, do something else until it is done; what stops that is raised when the work is over.

    ``word``: what was sent ahead of it, where only the answer to that tells that it is begun.
    """
    if meanwhile is nothing:
        return await work
    begun = asyncio.ensure_future(work)
    try:
        await (word or asyncio.sleep(0))  # it is on its way now
        await meanwhile()
    except BaseException:  # cancelled or failed alike, and said whatever becomes of the work
        with suppress(Exception):
            await begun
        raise
    return await begun


class Held(NamedTuple):
    """What the catalog says of a column."""

    name: str
    in_key: bool
    collation: str | None


class Session(Protocol):
    """One connection, its settings made.

    Statements run in call order, one at a time. A caller that goes away does not stop its statement.
    """

    running: int
    """Statements on their way."""

    @property
    def bytes_max(self) -> int:
        """Bytes that one statement should bind at most, beyond its first row."""
        ...

    @property
    def broken(self) -> bool:
        """Whether the connection is gone; it does not come back."""
        ...

    @property
    def in_transaction(self) -> bool:
        """Whether a transaction is open; some errors end one."""
        ...

    async def rows(self, said: Said) -> list[Row]:
        """Run one statement; all its rows."""
        ...

    async def run(self, said: Said) -> int:
        """Run one statement that changes rows; how many it changed, where ``Words.counts_writes``."""
        ...

    async def attempt(self, said: Said, meanwhile: Callable[[], Awaitable[None]] = ...) -> int:
        """The same; ``RowRefused`` undoes this statement alone, and the transaction goes on.

        ``meanwhile`` is called while the database works, if that gains time.
        """
        ...

    async def begin(self) -> None:
        """Open a transaction that may write. Every statement in it sees what others committed before it began."""
        ...

    async def lock(self, buckets: Sequence[int]) -> None:
        """Until the end of the transaction, be the only writer of these buckets, which ascend."""
        ...

    async def commit(self) -> None:
        """Make the transaction durable."""
        ...

    async def rollback(self) -> None:
        """Undo the transaction; that there is none is no error."""
        ...

    async def begin_migration(self) -> None:
        """Keep every other migration of this database out; a transaction too, where tables can be made in one."""
        ...

    async def end_migration(self, done: bool) -> None:
        """Let others in; keep or undo what was made, where that can be."""
        ...

    async def close(self) -> None:
        """Close the connection, after what it is doing."""
        ...


class Database(Protocol):
    """A database that a URL names."""

    dialect: Dialect
    """SQLAlchemy's, which turns tables.py into CREATE TABLE."""
    owned_tables: Sequence[Table]
    """All tables to be made."""
    one_writer: bool
    """Whether only one transaction at a time may write, whatever it writes."""

    def words(self, *tables: str) -> Words:
        """The statements about tables of items."""
        ...

    async def open(self) -> Session:
        """A new connection with its settings made and read back.

        Raises ``TierUnavailable``, or ``StoreError`` where the server is not one that can be used.
        """
        ...

    async def names(self, session: Session) -> set[str]:
        """Names of the tables and indexes that there are."""
        ...

    async def columns(self, session: Session, table: str) -> list[Held]:
        """The columns of a table; none where there is no such table."""
        ...

    def options(self, table: Table) -> str:
        """What stands behind CREATE TABLE (...)."""
        ...

    async def adapt(self, session: Session, table: Table) -> None:
        """Make a table that was here before compare ids by bytes, and hold what ours holds."""
        ...

    async def close(self) -> None:
        """Let go of what the sessions shared."""
        ...

    def __repr__(self) -> str:
        """What it is, without anything of the URL that could be a secret."""
        ...
