"""Accepts a write: room at the gate, stamp, log, and the wait for as much as the caller asked for.

Nothing here is done in a caller's task except waiting: a caller that is cancelled has either written
nothing, or written what the log will carry through.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence, Set

from msgspec.structs import force_setattr

from sync_engine.clock import Stamps
from sync_engine.errors import DiskFull, NotRunning
from sync_engine.item import Op
from sync_engine.options import Ack
from sync_engine.ports import Logged
from sync_engine.pressure import Bands, Gate, Level
from sync_engine.write.commits import Commits
from sync_engine.write.filing import Filing
from sync_engine.write.flush import Lane
from sync_engine.write.pending import Entry, PendingIndex
from sync_engine.write.route import Route
from sync_engine.write.shown import Shown

__all__ = ["WritePath"]


class WritePath:
    """The entrance of the write side: it admits, stamps and hands over, and waits for callers who want to.

    The log's answers are for ``Commits``, the order of tiers for ``Route``, what readers see for ``Shown``; the lanes
    ``truth`` and ``cache`` empty the route, and ``Passing`` and ``Filing`` see to what their tiers answer.
    """

    def __init__(
        self,
        *,
        stamps: Stamps,
        gate: Gate,
        commits: Commits,
        filing: Filing,
        pending: PendingIndex,
        shown: Shown,
        route: Route,
        truth: Lane | None,
        cache: Lane | None,
    ) -> None:
        self._stamps = stamps
        self._gate = gate
        self._commits = commits
        self._filing = filing
        self._pending = pending
        self._shown = shown
        self._route = route
        self.truth = truth
        self.cache = cache
        self._closed = False
        self._ended: Exception | None = None  # set once nobody works on what is pending any more
        self._awaited: dict[Entry, None] = {}  # in order, where a set has the order of addresses: a seed replays

    async def write(self, drafts: Sequence[Op], ack: Ack) -> list[Entry]:
        """Accept drafts that all go to the same tiers; return once ``ack`` is reached. They get their stamps here.

        Raises ``Backpressure`` at a bound, ``TierUnavailable("log")`` when the log cannot be written,
        and with ``Ack.STORED`` whatever refused an operation. Before ``STORED`` nothing is half done:
        either all drafts are accepted or none.
        """
        logged = self._commits.holds(drafts[0])
        volatile_bytes = 0 if logged and ack is not Ack.MEMORY else sum(op.size for op in drafts)
        if not self._gate.let_in(len(drafts), volatile_bytes):
            self.hurry()  # what gives room back must not itself wait for company
            await self._gate.enter(len(drafts), volatile_bytes, slowed=drafts[0].kind != "delete")
        if self._shown.sweeping:
            try:
                await self.swept({op.object_id for op in drafts if op.kind == "restate"})
            except BaseException:
                self._gate.leave(len(drafts), volatile_bytes)
                raise
        if self._closed:
            self._gate.leave(len(drafts), volatile_bytes)
            raise NotRunning("the engine is being stopped")
        # Stamped after the gate and logged in the same step, so that stamp order is log order.
        entries = [Entry(self._stamped(op)) for op in drafts]
        self._shown.stamped(entries)
        if volatile_bytes:
            for entry in entries:
                entry.volatile_bytes = entry.size
        if not logged:
            self._commits.bypass(entries)
        elif (durable := self._commits.append(entries, in_memory=ack is Ack.MEMORY)) is not None:
            try:
                await durable
            except DiskFull:
                # While nothing is accepted no batch comes by to file what found no room in the quarantine; and as long
                # as its record stays, the log wants twice the room to accept anything.
                self._filing.soon()
                raise
        if ack is Ack.STORED:
            await self.settled(entries)
        return entries

    async def file(self) -> None:
        """File what found no room in the quarantine, whenever a write was refused for that; until cancelled."""
        await self._filing.run()

    def recover(self, records: Sequence[Logged]) -> None:
        """Take in what the log of an earlier run still holds."""
        self._gate.readmit(len(records))
        entries = [Entry(record.op, record) for record in records]
        self._shown.stamped(entries)
        self._shown.accepted(entries)
        self._route.send(entries)

    async def settled(self, entries: Sequence[Entry]) -> None:
        """Hurry these entries through and wait for them; raise what refused the first refused one."""
        await self.queued()
        self.hurry()
        for entry in entries:
            if self._ended is not None and not entry.settled:
                raise self._ended
            self._awaited[entry] = None
            try:
                await entry.wait_settled()
            finally:
                if not entry.waiters:
                    self._awaited.pop(entry, None)

    async def swept(self, ids: Set[str]) -> None:
        """Wait until the truth has decided about these ids in every bulk delete; raises if it is in trouble.

        Were a change of state shown before that, it could be of an item that is being deleted from the state it had.
        """
        while self._shown.sweeps(ids):
            assert self.truth is not None, "it decides about bulk deletes"
            await self.queued()
            await self.truth.current()

    async def queued(self) -> None:
        """Wait until the log has answered for everything written before this call, which is then with the lanes."""
        await self._commits.answered()

    async def drained(self) -> None:
        """Wait until everything written before this call is settled or quarantined."""
        await self.queued()
        await self._route.drained()

    def hurry(self) -> None:
        """Let nothing that is queued now wait for company."""
        self._route.hurry()

    def refuse(self) -> None:
        """Accept nothing more, not even from callers who wait for room."""
        self._closed = True

    def abandon(self, error: Exception) -> None:
        """The lanes are gone: nobody must wait for them any longer."""
        self._ended = error
        for entry in list(self._awaited):
            entry.abandon(error)
        self._route.fail(error)

    def moment(self, observed: int) -> int:
        """A stamp newer than ``observed`` and than everything accepted so far, and older than all that follows."""
        self._stamps.observe(observed)
        return self._stamps.next()

    def unseen(self) -> set[str]:
        """Ids of writes that no read shows and that may yet happen: the log, or the truth, has still to answer.

        Or the log could not: then a restart may find them, and undo what said that there was nothing to do.
        """
        return self._commits.unseen() | self._shown.unseen()

    def bound(self, *, ops_max: int, bytes_max: int, wait_ms: int, bands: Bands) -> None:
        """Set the bounds of what is not settled. Values that are over a lower one leave memory as they move on."""
        self._pending.memory_bytes_max = bytes_max
        self._gate.bound(ops_max=ops_max, bytes_max=bytes_max, wait_ms=wait_ms, bands=bands)

    @property
    def patience_s(self) -> float:
        """How long a write waits for room."""
        return self._gate.wait_s

    @property
    def pressure(self) -> tuple[float, Level]:
        """How near the bounds what is not settled has come, and what that means."""
        return self._gate.pressure, self._gate.level

    @property
    def volatile(self) -> int:
        """Operations that no log holds and no tier has yet."""
        return sum(1 for entry in self._pending if entry.volatile_bytes)

    def leaving_sql(self) -> list[str]:
        """Ids of pending items that skip SQL; an older row of theirs is still to go. Free where no log is skipped."""
        if not self._gate.bytes:
            return []
        return [
            entry.op.object_id
            for entry in self._pending
            if any(each is not None and each.volatile_bytes and not each.op.sql for each in (entry, entry.base))
        ]

    def _stamped(self, draft: Op) -> Op:
        # A draft that has a stamp is of that moment, and must not look newer: refused, deleted or loaded then.
        stamp = draft.stamp or self._stamps.next()
        # A draft is ours alone. The item is the caller's: a copy of it gets the engine's notes, and no second check.
        force_setattr(draft, "stamp", stamp)
        if draft.item is not None:
            item = copy.copy(draft.item)
            force_setattr(item, "stamp", stamp)
            force_setattr(item, "expires_at", None if draft.sql else draft.redis_expires_at)
            force_setattr(item, "sql_only", not draft.redis)
            force_setattr(draft, "item", item)
        return draft
