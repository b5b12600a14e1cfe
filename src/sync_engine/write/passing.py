"""What becomes of a batch that a tier has answered for: on to the next tier, into the quarantine, or settled."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from msgspec.structs import replace

from sync_engine.errors import SyncEngineError, VersionConflict
from sync_engine.item import Op
from sync_engine.ports import Applied, Cache, Journal, Truth
from sync_engine.pressure import Gate
from sync_engine.turns import give_way
from sync_engine.write.batcher import Batcher
from sync_engine.write.filing import Filing
from sync_engine.write.flush import Lane, Plan
from sync_engine.write.pending import Entry, PendingIndex
from sync_engine.write.quarantine import stands, withdraw
from sync_engine.write.route import Route
from sync_engine.write.shown import Shown

__all__ = ["Passing"]

log = logging.getLogger(__name__)


class Passing:
    """Moves entries on; the ``Carrier`` of both lanes."""

    def __init__(
        self,
        *,
        route: Route,
        shown: Shown,
        pending: PendingIndex,
        filing: Filing,
        gate: Gate,
        journal: Journal | None,
        truth: Truth | None,
        cache: Cache | None,
    ) -> None:
        self._route = route
        self._shown = shown
        self._pending = pending
        self._filing = filing
        self._gate = gate
        self._journal = journal
        self._truth = truth
        self._cache = cache

    async def load(self, batch: Sequence[Entry]) -> None:
        """Bring the values of these entries into memory. What has been overtaken since it was queued is barred.

        What could not be filed before is tried again: once for a batch, which may be of thousands.
        """
        await self._filing.again()
        for entry in batch:
            if entry.hop:
                entry.barred = entry.barred or self._overtaken(entry)
            elif entry.op.kind == "restate" and (entry.base is None or (entry.base.settled and not entry.base.outdone)):
                base = self._filing.followed(entry.op)
                entry.base = base if base is not None and await stands(base.op, self._truth, self._cache) else None
        await self._pending.load(batch)

    async def passed(self, lane: Lane, batch: Sequence[Entry], plan: Plan, applied: Applied) -> None:
        """One tier has answered for a batch: move every entry on."""
        moved: Batcher | None = None
        for start in range(0, len(batch), lane.passed_at_once):
            if start:
                await give_way()
            onward = await self._passed(lane, batch[start : start + lane.passed_at_once], plan, applied)
            if onward is not None:
                moved = onward
        if moved is not None:
            moved.hurry()  # they have waited for company once, and now for each other

    async def _passed(self, lane: Lane, part: Sequence[Entry], plan: Plan, applied: Applied) -> Batcher | None:
        """Where some have gone, if any have; the others are settled."""
        settled: list[tuple[Entry, SyncEngineError | None]] = []
        moved: Batcher | None = None
        for entry in part:
            object_id = entry.op.object_id
            decides = plan.decides[object_id] is entry
            refusal = applied.refused.get(object_id) if decides else None
            if object_id in applied.refused and not decides:  # an older change of state of what is filed in the newer
                settled.append((entry, applied.refused[object_id]))
                continue
            if refusal is not None:
                await self._refused(lane, entry, refusal)
                settled.append((entry, refusal))
                continue
            if entry.conditional:
                self._shown.decided(entry)
                if object_id in applied.spared:
                    entry.spared = entry.outdone = True  # a copy in L1 may be of before it left its state
                    await self._filing.answered(entry)
                    settled.append((entry, None))
                    continue
                self._shown.show(entry)  # it has happened: from here on reads must see it
            if decides and object_id in applied.superseded:
                entry.outdone = True  # another engine's newer write stands
            if decides and entry.op.kind == "restate":
                self._restated(lane, entry, plan, applied)
            entry.hop += 1
            onward = self._onward(lane, entry, plan, applied)
            if onward is not None:
                if entry.volatile_bytes and not entry.sql_first:
                    # Redis holds it now; only an older SQL row of it may still have to go.
                    self._gate.leave(0, entry.volatile_bytes)
                    entry.volatile_bytes = 0
                    self._pending.release(entry)
                else:
                    self._pending.trim(entry)
                onward.put(entry)
                moved = onward
            else:
                settled.append((entry, None))
                if self._filing.ends_with(entry):
                    await self._filing.stored(entry)
        if settled:
            self._settle(settled)
        return moved

    def cramped(self) -> None:
        """A tier has no room; its disk may be the log's."""
        if self._journal is not None:
            self._journal.relieve_until_drained()  # Ack.MEMORY may have sent it what the log could not take

    def drained(self, lane: Lane) -> None:
        """What waited for this tier when it had no room has passed."""
        if lane.tier is self._truth and self._journal is not None:
            self._journal.drained()

    def _restated(self, lane: Lane, entry: Entry, plan: Plan, applied: Applied) -> None:
        """A tier has applied a change of state, as the plan spoke it."""
        spoken = plan.spoken[entry.op.object_id]
        if spoken.kind == "put":  # it was refused once, and is stored with the stamp that it had: L1 has a newer one
            entry.outdone = True
            return
        if (found := applied.restated.get(spoken.object_id)) is not None:
            self._shown.found(found)
        if lane.tier is self._truth and spoken.kind == "restate" and spoken.object_id not in applied.restated:
            entry.outdone = True  # SQL has no such item: a copy in L1 is of one that another engine deleted
            spoken = replace(spoken, rowless=spoken.object_id not in applied.superseded)
        self._pending.became(entry, _as_applied(spoken, applied))

    def _onward(self, lane: Lane, entry: Entry, plan: Plan, applied: Applied) -> Batcher | None:
        """Where the entry goes from here; None if it is settled."""
        object_id = entry.op.object_id
        newest = self._pending.get(object_id)
        last = newest is plan.decides[object_id]
        # A change of state of ours that follows needs the item to be there: in Redis it changes what it finds.
        needed = newest is not None and not last and newest.op.kind == "restate"
        entry.barred = lane.tier is self._truth and object_id in applied.superseded and not needed
        # Else a newer one of ours is on its way to Redis, and this one is not stored before that is.
        overtaken = self._overtaken(entry) or (entry.barred and last)
        return None if overtaken else self._route.next(entry)

    def _overtaken(self, entry: Entry) -> bool:
        """Whether a newer write of ours, which skips SQL and so goes to Redis first, has been there already."""
        newest = self._pending.get(entry.op.object_id)
        return (
            newest is not None
            and newest.op.stamp > entry.op.stamp
            and entry.sql_first
            and not newest.sql_first
            and newest.hop > 0
        )

    async def _refused(self, lane: Lane, entry: Entry, refusal: SyncEngineError) -> None:
        self._shown.decided(entry)
        if entry.spoken() is not entry.op:
            entry.outdone = True  # L1 has the put with the stamp of the change, not its own
        if isinstance(refusal, VersionConflict):  # a lost compare-and-set is an answer, not a fault
            entry.outdone = True  # and what L1 has is not what won it
            await self._filing.answered(entry)
            return
        await self._filing.refused(entry, lane.tier.name, str(refusal))
        if self._cache is not None and lane.tier is self._cache and entry.op.sql:
            try:
                await withdraw(self._cache, entry.op)
            except SyncEngineError as failed:
                log.warning("an older copy of %r may stand in %s: %s", entry.op.object_id, lane.tier.name, failed)

    def _settle(self, entries: Sequence[tuple[Entry, SyncEngineError | None]]) -> None:
        # Those who wait are told here, in one step with the books: they may look at once.
        for entry, refusal in entries:
            entry.settle(refusal)
            self._gate.leave(1, entry.volatile_bytes)
            self._shown.settled(entry)
        if self._journal is not None:
            self._journal.settle([entry.logged.seq for entry, _ in entries if entry.logged is not None])


def _as_applied(op: Op, applied: Applied) -> Op:
    """A restate that the truth has answered carries the whole item, which is what Redis is to show."""
    restated = applied.restated.get(op.object_id)
    return op if restated is None else replace(op, item=restated, redis=not restated.sql_only)
