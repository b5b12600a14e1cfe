"""Whether a cache may be believed, and the tier that is not asked while it may not.

``Trusted`` stands between the flows and Redis: it refuses reads while there is a doubt, keeps out what is too late
to be decided by what Redis remembers, and lets everything else through. ``heal`` removes the doubt.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import replace
from typing import Any, Final, ParamSpec, TypeVar

from sync_engine.clock import COUNTER_BITS
from sync_engine.errors import TierUnavailable
from sync_engine.forward import Forwarding
from sync_engine.item import Op
from sync_engine.ports import READS, Applied, Clock, Tier, Truth

__all__ = ["MARGIN_MS", "Trust", "Trusted"]

log = logging.getLogger(__name__)

P = ParamSpec("P")
R = TypeVar("R")

MARGIN_MS: Final = 900_000
"""How much older than the newest operation that a cache has seen one can be that it has not: the way of a write
through the queues (``LATE_MS`` of it without a note) and the difference of two clocks."""

LATE_MS: Final = 120_000
"""Operations that were longer on their way are noted and compared with the truth. Less than the life of a tombstone
in Redis, which decides about the others."""

NOTE_EVERY_MS: Final = 60_000


class Trust:
    """``doubt`` says why the cache is not believed, None: it is. Every loss is a new ``epoch``.

    Where there is no truth to heal from (``needed`` False) a loss is told, and changes nothing.
    """

    def __init__(self, name: str, *, needed: bool) -> None:
        self.name = name
        self.epoch = 0
        self.doubt: str | None = "it has not been looked at since the start" if needed else None
        self.trouble: str | None = None
        """What keeps the doubt from being removed."""
        self._needed = needed
        self._lost = asyncio.Event()
        self._fills: set[asyncio.Future[None]] = set()

    def lose(self, reason: str = "another server answers than before, or it was restarted") -> None:
        """From now on nothing that is read counts, what is being read included."""
        self.epoch += 1
        if not self._needed:
            log.warning("%s: %s; without SQL nothing can make up for what it may have lost", self.name, reason)
            return
        if self.doubt is None:
            log.warning("%s is not read: %s", self.name, reason)
        self.doubt = reason
        self._lost.set()

    def regain(self) -> None:
        """Nothing is missing any more."""
        if self.epoch:
            log.warning("%s is read again", self.name)
        self.doubt = self.trouble = None
        self._lost.clear()

    @property
    def why_not(self) -> str | None:
        """Why it is not believed and what keeps that from being mended; None: it is believed."""
        return f"{self.doubt}: {self.trouble}" if self.doubt is not None and self.trouble else self.doubt

    def check(self, epoch: int | None = None) -> int:
        """The epoch of a read that may begin, or end if it began in ``epoch``; else ``TierUnavailable``."""
        if (why_not := self.why_not) is not None:
            raise TierUnavailable(self.name, why_not)
        if epoch is not None and epoch != self.epoch:
            raise TierUnavailable(self.name, "it was restarted during the call")
        return self.epoch

    async def kept_for(self, seconds: float, clock: Clock) -> bool:
        """Whether it was not lost within these seconds."""
        if self.doubt is None:
            waits = {asyncio.ensure_future(self._lost.wait()), asyncio.ensure_future(clock.sleep(seconds))}
            try:
                await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for wait in waits:
                    wait.cancel()
        return self.doubt is None

    def fill_begins(self) -> asyncio.Future[None]:
        """A copy upward is under way until the future is done."""
        over: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._fills.add(over)
        over.add_done_callback(self._fills.discard)
        return over

    async def fills_over(self) -> None:
        """Wait for the copies upward that have begun."""
        if self._fills:
            await asyncio.wait(self._fills)

    def __repr__(self) -> str:
        return f"<Trust in {self.name} {'kept' if self.doubt is None else 'lost: ' + self.doubt}>"


class Trusted(Forwarding):
    """A cache that is read only while it may be believed. ``coming`` tells the newest stamp of ours for an id."""

    def __init__(
        self, tier: Tier, trust: Trust, truth: Truth | None, clock: Clock, coming: Callable[[str], int]
    ) -> None:
        super().__init__(tier)
        self.trust = trust
        self._coming = coming
        self._truth_beside = truth
        self._clock = clock
        self._noted = (0, 0)

    async def _through(self, verb: Callable[P, Coroutine[Any, Any, R]], *args: P.args, **kwargs: P.kwargs) -> R:
        if verb.__name__ not in READS:
            return await verb(*args, **kwargs)
        epoch = self.trust.check()
        answer = await verb(*args, **kwargs)
        self.trust.check(epoch)
        return answer

    async def apply(self, ops: Sequence[Op], /) -> Applied:
        """Apply what is not outdone already. Copies upward are refused while there is a doubt: they may be as old."""
        if any(op.fill for op in ops):
            self.trust.check()
            over = self.trust.fill_begins()
            try:
                return await super().apply(ops)
            finally:
                over.set_result(None)
        truth = self._truth_beside
        if truth is not None:
            ops = await self._without_copies_of_rows(truth, ops)
            horizon = self._clock.now_ms() - LATE_MS << COUNTER_BITS
            late = [op for op in ops if 0 < op.stamp < horizon and op.sql]
            if late:
                return await self._apply_late(truth, ops, late)
        return await super().apply(ops)

    async def _without_copies_of_rows(self, truth: Truth, ops: Sequence[Op]) -> Sequence[Op]:
        """Let a change of state that the truth had no item for meet nothing here but what Redis alone keeps.

        Another engine may have deleted the item, or written it, in the truth, and its copy here is still older than
        that. A new stamp on such a copy would keep out what is on its way.
        """
        ids = [op.object_id for op in ops if op.rowless]
        if not ids:
            return ops
        held, buried = await truth.held_stamps(ids), await truth.buried_stamps(ids)
        if buried:
            # Of the very stamp of a delete there may be an item here, for which its row had to go.
            await super().apply([Op(kind="delete", object_id=id_, stamp=buried[id_] - 1) for id_ in sorted(buried)])
        return [op for op in ops if not (op.rowless and op.object_id in held)]

    async def _apply_late(self, truth: Truth, ops: Sequence[Op], late: Sequence[Op]) -> Applied:
        """A newer copy or a tombstone in Redis may have come and gone: the truth knows what is newer.

        And should Redis be restarted and lose this, what its marks say will not lead back so far: it is noted first.
        """
        ids = [op.object_id for op in late]
        held, buried = await truth.held_stamps(ids), await truth.buried_stamps(ids)
        outdone = {
            op.object_id
            for op in late
            if max(held.get(op.object_id, 0), buried.get(op.object_id, 0)) > op.stamp >= self._coming(op.object_id)
        }
        ops = [op for op in ops if op.object_id not in outdone]
        await self._note(truth, min(op.stamp for op in late))
        applied = await super().apply(ops)
        return replace(applied, superseded=applied.superseded | outdone) if outdone else applied

    async def _note(self, truth: Truth, stamp: int) -> None:
        at_ms = self._clock.now_ms()
        at_ms -= at_ms % NOTE_EVERY_MS
        noted_at_ms, noted = self._noted
        if at_ms != noted_at_ms or stamp < noted:
            await truth.note_late(at_ms, stamp)
            self._noted = (at_ms, stamp)
