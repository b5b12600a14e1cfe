"""Who writes: the lanes for it, how a batch is shared out among them, and who owns a transaction.

Each runs in a task of its own, whatever becomes of the caller: half a transaction would hold its locks for ever.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from functools import partial
from typing import Any, TypeVar

from sync_engine.errors import TierUnavailable
from sync_engine.item import Op
from sync_engine.owned import Owned
from sync_engine.ports import Applied, Clock, together
from sync_engine.storage.sql.apply import apply_ops, shared_out
from sync_engine.storage.sql.dialect import Session
from sync_engine.storage.sql.lanes import Lane
from sync_engine.storage.sql.routing import Router

__all__ = ["Writers"]

T = TypeVar("T")


class Writers:
    """Cancelling a caller leaves his transaction to finish, never open. ``running`` is what is under way."""

    def __init__(self, lanes: Sequence[Lane], router: Router, clock: Clock) -> None:
        self.running = Owned()
        self._lanes = lanes
        self._router = router
        self._clock = clock
        self._closed = False

    async def apply(self, ops: Sequence[Op], batch_id: str | None = None) -> Applied:
        """``SqlStore.apply``, with the id of a batch among the labels."""
        if not ops:
            return Applied()
        now_ms, router = self._clock.now_ms(), self._router

        async def applied(lane: Lane, share: Sequence[Op]) -> Applied:
            return await lane.transaction(lambda own: apply_ops(own, router, share, now_ms, batch_id))

        shares = shared_out(ops, len(self._lanes))
        if len(shares) == 1:
            return await self.owned(lambda: applied(self._lanes[0], ops))
        work = [self.owned(partial(applied, *each)) for each in zip(self._lanes, shares, strict=False)]
        answers = await asyncio.gather(*work, return_exceptions=True)
        failures = [answer for answer in answers if isinstance(answer, BaseException)]
        for failure in sorted(failures, key=lambda each: not isinstance(each, TierUnavailable)):
            raise failure  # one that passes first: what was refused is refused again
        return together([answer for answer in answers if isinstance(answer, Applied)])

    async def transaction(self, work: Callable[[Session], Awaitable[T]]) -> T:
        """Work of one transaction, done whole or not at all."""
        return await self.owned(lambda: self._lanes[0].transaction(work))

    async def owned(self, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Run to the end whatever becomes of the caller."""
        if self._closed:
            raise TierUnavailable("l3", "the store is closed")
        return await self.running.whole(work())

    def stop(self) -> None:
        """Begin nothing more."""
        self._closed = True

    async def close(self) -> None:
        """Finish what runs, then close the lanes."""
        await self.running.over()
        for lane in self._lanes:
            await lane.close()
