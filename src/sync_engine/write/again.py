"""What becomes of refused operations when somebody has looked at them: sent again, or given up.

Sent again, an operation keeps the stamp it had. It takes the way of every write, and whatever is newer than it, in
the log or in a tier, stays; it leaves the quarantine only once a tier holds it or something newer.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TypeVar

from msgspec.structs import replace

from sync_engine.errors import TierUnavailable
from sync_engine.item import Op
from sync_engine.options import Ack
from sync_engine.ports import Cache, Truth
from sync_engine.write.filing import Filing
from sync_engine.write.path import WritePath
from sync_engine.write.pending import PendingIndex
from sync_engine.write.quarantine import Quarantine, Quarantined, newest_stamps, stands, withdraw
from sync_engine.write.shown import Shown

__all__ = ["Refusals"]

log = logging.getLogger(__name__)

T = TypeVar("T")

AT_ONCE = 200
"""Refused operations that are sent again with one append to the log: whole items, of whatever size."""


@dataclass(frozen=True, slots=True)
class Refusals:
    """The quarantine, and what it takes to empty it."""

    quarantine: Quarantine
    filing: Filing
    pending: PendingIndex
    shown: Shown
    writes: WritePath
    truth: Truth | None
    cache: Cache | None

    async def retry(self, chosen: Sequence[Quarantined]) -> int:
        """Send these again, in stamp order; how many were sent.

        Left out is what a newer operation has overtaken, which also leaves the quarantine, what is on its way already,
        and what needs a tier that is not configured. Raises ``TierUnavailable`` where a tier cannot say whether it
        holds something newer, and what ``WritePath.write`` raises; what was sent by then is on its way.
        """
        sent = 0
        for start in range(0, len(chosen), AT_ONCE):
            page = [each for each in chosen[start : start + AT_ONCE] if self._has_its_tiers(each.op)]
            newest = await newest_stamps([each.op for each in page], self.truth, self.cache)
            for each in page:
                if newest.get(each.op.object_id, 0) > each.op.stamp:
                    log.warning("%r is not sent again: a newer write of its id is stored", each)
                    await _on_file(self.quarantine.overtaken(each.op.object_id, each.op.stamp))
                    self.shown.gave_up(each.op)
            for _, run in groupby(page, key=lambda each: each.op.sql):
                unseen = self.writes.unseen()
                ops = [_as_sent(each.op) for each in run if self._is_at_rest(each, unseen)]
                if ops:
                    sent += len(await self.writes.write(ops, Ack.LOGGED))
        return sent

    async def drop(self, chosen: Sequence[Quarantined]) -> int:
        """Give these up for good; how many. What is being sent again is left alone.

        From then on reads are answered with what the tiers hold.
        """
        dropped = 0
        for each in chosen:
            op = each.op
            if not self._is_at_rest(each, self.writes.unseen()):
                continue
            if each.tier == "l2" and op.sql and self.cache is not None:
                await withdraw(self.cache, op)
            if await _on_file(self.quarantine.forget(op.object_id, op.stamp)) is not None:
                log.warning("dropped for good: %r, stamp %d, %d bytes", each, op.stamp, op.size)
                self.shown.gave_up(op)
                dropped += 1
        if dropped:
            await self.filing.again()  # or the log would still have what could not be filed, and replay it
        return dropped

    async def stands(self, each: Quarantined) -> bool:
        """Whether no tier knows anything newer of its id. Raises ``TierUnavailable`` where that cannot be asked."""
        return await stands(each.op, self.truth, self.cache)

    def _has_its_tiers(self, op: Op) -> bool:
        if (self.truth if op.sql else self.cache) is not None:
            return True
        log.warning("%s of %r is not sent again: the tier that keeps it is not configured", op.kind, op.object_id)
        return False

    def _is_at_rest(self, each: Quarantined, unseen: set[str]) -> bool:
        """Whether it is still here and nothing of its id is on its way."""
        object_id = each.op.object_id
        held = self.quarantine.get(object_id)
        return (
            held is not None
            and held.op.stamp == each.op.stamp
            and self.pending.get(object_id) is None
            and object_id not in unseen
        )


def _as_sent(op: Op) -> Op:
    # What a change of state met in the truth may be another item by now: it is asked for anew.
    return replace(op, item=None, redis=True) if op.kind == "restate" else op


async def _on_file(change: Awaitable[T]) -> T:
    try:
        return await change
    except OSError as failed:
        raise TierUnavailable("quarantine", f"its folder cannot be written: {failed.strerror}") from failed
