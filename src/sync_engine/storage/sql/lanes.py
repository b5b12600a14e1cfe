"""A place for one connection: opened when it is needed, and again after it was lost."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any, Final, TypeVar

from sync_engine.errors import SyncEngineError, TierUnavailable
from sync_engine.owned import outlasting
from sync_engine.storage.sql.dialect import Database, Outrun, Session
from sync_engine.storage.sql.rows import Row
from sync_engine.storage.sql.words import Said

__all__ = ["Lane"]

T = TypeVar("T")

TURNS_MAX: Final = 6
"""How often a transaction is tried that the database gives up in favour of another one: each time one of them ends."""


class Lane:
    """One connection. Reads may share it; a transaction has it to itself, so give it a lane of its own."""

    def __init__(self, database: Database, session: Session | None = None) -> None:
        self._database = database
        self._session = session
        self._opening: asyncio.Task[Session] | None = None
        self._writing = asyncio.Lock()
        self._closed = False

    @property
    def running(self) -> int:
        """Statements on their way."""
        return self._session.running if self._session is not None else 0

    async def session(self) -> Session:
        """The connection, a new one where it was lost."""
        if self._session is not None and not self._session.broken:
            return self._session
        if self._closed:
            raise TierUnavailable("l3", "the store is closed")
        if self._opening is None:
            self._opening = asyncio.get_running_loop().create_task(self._open())
            self._opening.add_done_callback(self._opened)
        return await outlasting(self._opening)

    async def rows(self, said: Said) -> list[Row]:
        """All rows of a statement that changes nothing; asked again if the connection had died in between."""
        session = await self.session()
        try:
            return await session.rows(said)
        except TierUnavailable:
            if not session.broken or self._closed:
                raise
        return await (await self.session()).rows(said)

    async def transaction(self, work: Callable[[Session], Awaitable[T]]) -> T:
        """Work done whole or not at all. Not to be cancelled: run it in a task that nobody cancels."""
        async with self._writing:
            for _ in range(TURNS_MAX - 1):
                with suppress(Outrun):  # nothing of it stands
                    return await self._try(work)
            return await self._try(work)

    async def close(self) -> None:
        """Close the connection after what it is doing; nothing opens another."""
        self._closed = True
        if self._opening is not None:
            await asyncio.wait({self._opening})
        if self._session is not None:
            await self._session.close()

    async def _try(self, work: Callable[[Session], Awaitable[T]]) -> T:
        session = await self._begun()
        async with _undone_unless_done(session):
            done = await work(session)
            await session.commit()
        return done

    async def _begun(self) -> Session:
        session = await self.session()
        try:
            await _begin(session)
        except SyncEngineError:
            if not session.broken:
                raise
            session = await self.session()  # it had died in between; nothing was begun
            await _begin(session)
        return session

    async def _open(self) -> Session:
        if self._session is not None:
            await self._session.close()
        self._session = await self._database.open()
        return self._session

    def _opened(self, opening: asyncio.Task[Any]) -> None:
        self._opening = None
        if not opening.cancelled():
            opening.exception()  # its callers have seen it, or are gone


async def _begin(session: Session) -> None:
    async with _undone_unless_done(session):  # who is cancelled meanwhile may have begun it all the same
        await session.begin()


@asynccontextmanager
async def _undone_unless_done(session: Session) -> AsyncIterator[None]:
    try:
        yield
    except BaseException:  # cancelled or failed alike: an open transaction would take in the next writes
        await session.rollback()
        raise
