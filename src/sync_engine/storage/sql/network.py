"""What sessions over a network share: statements that nobody's cancellation cuts short, and an end to all waiting.

A statement that is cut short leaves its connection in the middle of an answer, which the next caller would then
read. So each runs in a task of the session's, in turn, and ends by itself: by its answer, by an error, or because
the connection is torn down when its time is over.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable
from typing import Final, TypeVar

from sync_engine.errors import SyncEngineError, TierUnavailable
from sync_engine.owned import Owned

__all__ = ["Limits", "NetworkSession"]

T = TypeVar("T")

MIGRATION_S: Final = 24 * 3600.0
"""A statement of a migration that takes longer is given up too."""


class Limits:
    """How long what may take, from the one number that users set."""

    def __init__(self, timeout_ms: int) -> None:
        self.lock_ms = timeout_ms
        self.statement_ms = max(4 * timeout_ms, 5_000)
        """For the server: a statement that takes longer is given up."""
        self.answer_s = (self.statement_ms + max(timeout_ms, 1_000)) / 1000
        """For us: a server that has not answered by then never will."""
        self.connect_s = max(timeout_ms, 2_000) / 1000


class NetworkSession(ABC):
    """One connection and who waits for it."""

    def __init__(self, limits: Limits) -> None:
        self.running = 0
        self._limits = limits
        self._turn = asyncio.Lock()
        self._calls = Owned()
        self._in_transaction = False
        self._patient = False
        """Whether an answer may take as long as it takes: an index of a large table does."""
        self._lost = False

    @property
    def broken(self) -> bool:
        """Whether the connection is gone."""
        return self._lost or self._gone()

    @property
    def in_transaction(self) -> bool:
        """Whether a transaction is open."""
        return self._in_transaction and not self.broken

    async def rollback(self) -> None:
        """Undo the transaction; a connection that cannot even do that is given up, and the server does it."""
        self._in_transaction = False
        try:
            if not self.broken:
                await self._undo()
        except SyncEngineError:
            self._give_up()

    async def close(self) -> None:
        """Close the connection, after what it is doing."""
        try:
            if not self.broken:
                await self._whole(self._say_goodbye)
        except SyncEngineError:
            pass  # it was going anyway
        finally:
            self._lost = True
            self._tear()

    async def _whole(self, work: Callable[[], Awaitable[T]]) -> T:
        return await self._calls.whole(self._in_turn(work))

    async def _in_turn(self, work: Callable[[], Awaitable[T]]) -> T:
        self.running += 1
        try:
            async with self._turn:
                if self.broken:
                    raise TierUnavailable("l3", "the connection was lost")
                answer_s = MIGRATION_S if self._patient else self._limits.answer_s
                late = asyncio.get_running_loop().call_later(answer_s, self._give_up)
                try:
                    return await work()
                except SyncEngineError:
                    raise
                except Exception as error:
                    raise self._meaning(error) from error
                except BaseException:  # cancelled, by the end of the loop alone: half an answer may be on its way
                    self._give_up()
                    raise
                finally:
                    late.cancel()
        finally:
            self.running -= 1

    def _give_up(self) -> None:
        self._lost = True
        self._tear()

    @abstractmethod
    def _meaning(self, error: Exception) -> BaseException:
        """What an error of the driver means; anything that is none of the driver's comes back as it is."""

    @abstractmethod
    def _gone(self) -> bool:
        """Whether the driver knows that the connection is gone."""

    @abstractmethod
    def _tear(self) -> None:
        """Tear the connection down, now, without a word; who waits for an answer gets an error."""

    @abstractmethod
    async def _undo(self) -> None:
        """Say ROLLBACK."""

    @abstractmethod
    async def _say_goodbye(self) -> None:
        """Close the connection in order."""
