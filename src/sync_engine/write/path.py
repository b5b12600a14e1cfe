"""The life of one write: stamp, log, make visible, hand to the lanes, settle.

Nothing here is done in a caller's task except waiting: a caller that is cancelled has either written
nothing, or written what the log will carry through.
"""

from __future__ import annotations

import asyncio
import copy
import logging
from collections import deque
from collections.abc import Awaitable, Sequence, Set
from typing import Protocol, cast

from msgspec.structs import force_setattr, replace

from sync_engine.clock import Stamps
from sync_engine.errors import NotRunning, StoreError, SyncEngineError, TierUnavailable, VersionConflict
from sync_engine.item import Op, SyncItem
from sync_engine.options import Ack
from sync_engine.ports import Applied, Cache, Journal, Logged
from sync_engine.pressure import Bands, Gate, Level
from sync_engine.write.flush import Lane, Plan
from sync_engine.write.pending import Entry, PendingIndex
from sync_engine.write.quarantine import Quarantine, withdraw

__all__ = ["WritePath"]

log = logging.getLogger(__name__)


class View(Protocol):
    """What shows writes to readers of this engine."""

    def written(self, op: Op, /) -> None:
        """An operation became visible."""
        ...

    def touch(self, object_id: str, /) -> None:
        """An operation on this id settles now."""
        ...

    def outdone(self, object_id: str, stamp: int, /) -> None:
        """A tier holds a newer write than this stamp."""
        ...


class WritePath:
    """Takes drafts of operations to the tiers, in stamp order per id."""

    def __init__(
        self,
        *,
        stamps: Stamps,
        gate: Gate,
        journal: Journal | None,
        pending: PendingIndex,
        quarantine: Quarantine,
    ) -> None:
        self._stamps = stamps
        self._gate = gate
        self._journal = journal
        self._pending = pending
        self._quarantine = quarantine
        self.view: View | None = None
        self.truth: Lane | None = None
        self.cache: Lane | None = None
        self._closed = False
        self._ended: Exception | None = None  # set once nobody works on what is pending any more
        self._awaited: set[Entry] = set()
        self._begun = 0  # appends to the log, which are answered in order
        self._answered = 0
        self._answers: deque[tuple[int, asyncio.Future[None]]] = deque()
        self._commits: deque[_Commit] = deque()  # those that are not answered
        self._behind: deque[tuple[int, Sequence[Entry]]] = deque()  # unlogged, shown, waiting for those commits
        self._conditional: set[Entry] = set()  # those that the truth has not decided
        self._sweeps: set[Entry] = set()  # deletes of bulk deletes that the truth has not decided
        self._unfiled: list[tuple[Op, Logged]] = []  # refused, and the quarantine could not be written
        self._doubtful: set[str] = set()  # ids of refused writes that the log may hold all the same

    async def write(self, drafts: Sequence[Op], ack: Ack) -> list[Entry]:
        """Accept drafts that all go to the same tiers; return once ``ack`` is reached. They get their stamps here.

        Raises ``Backpressure`` at a bound, ``TierUnavailable("log")`` when the log cannot be written,
        and with ``Ack.STORED`` whatever refused an operation. Before ``STORED`` nothing is half done:
        either all drafts are accepted or none.
        """
        logged = self._journal is not None and drafts[0].sql
        volatile_bytes = 0 if logged and ack is not Ack.MEMORY else sum(op.size for op in drafts)
        if self._gate.presses or not self._gate.has_room(len(drafts), volatile_bytes):
            self.hurry()  # what gives room back must not itself wait for company
        await self._gate.enter(len(drafts), volatile_bytes, slowed=drafts[0].kind != "delete")
        if self._sweeps:
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
        self._note_sweeps(entries)
        if volatile_bytes:
            for entry in entries:
                entry.volatile_bytes = entry.size
        if not logged:
            self._show(entries)
            if self._commits:
                # What the log is still writing was stamped before, and must not reach a tier after.
                self._behind.append((self._begun, entries))
            else:
                self._send(entries)
        else:
            assert self._journal is not None
            # A change of state tells of what is before it, and is not shown before that is.
            follows = drafts[0].kind == "restate" and not all(commit.at_once for commit in self._commits)
            commit = _Commit(self, entries, at_once=ack is Ack.MEMORY and not follows)
            self._journal.append([entry.op for entry in entries], commit.durable, commit.failed)
            self._begun += 1
            self._commits.append(commit)
            if commit.at_once:
                self._show(entries)
            else:
                await commit.done
        if ack is Ack.STORED:
            await self.settled(entries)
        return entries

    async def settled(self, entries: Sequence[Entry]) -> None:
        """Hurry these entries through and wait for them; raise what refused the first refused one."""
        await self.queued()
        self.hurry()
        for entry in entries:
            if self._ended is not None and not entry.settled:
                raise self._ended
            self._awaited.add(entry)
            try:
                await entry.wait_settled()
            finally:
                if not entry.waiters:
                    self._awaited.discard(entry)

    def moment(self, observed: int) -> int:
        """A stamp newer than ``observed`` and than everything accepted so far, and older than all that follows."""
        self._stamps.observe(observed)
        return self._stamps.next()

    async def sweep(self, ids: Sequence[str], stamp: int, only_in: str) -> int:
        """Delete those of the items that the truth holds in that state ("": in any), no newer than ``stamp``.

        Returns once the truth has decided: how many it deleted. Raises what ``write`` does, and ``TierUnavailable``
        where the truth is in trouble for longer than a write waits for room; it decides all the same, later.
        """
        assert self.truth is not None, "whoever sweeps has asked the truth for the ids"
        drafts = [Op(kind="delete", object_id=each, stamp=stamp, only_in_state=only_in) for each in ids]
        entries = await self.write(drafts, Ack.LOGGED)
        await self._decided(self.truth)
        return sum(not entry.spared and entry.error is None for entry in entries)

    async def _decided(self, truth: Lane) -> None:
        """Wait for what the truth was given; a blip is waited out, for as long as a write waits for room."""
        while True:
            try:
                return await truth.current()
            except TierUnavailable:
                try:
                    async with asyncio.timeout(self._gate.wait_s):
                        return await truth.batcher.drained()
                except TimeoutError:
                    if truth.trouble is not None:
                        raise TierUnavailable(truth.tier.name, truth.trouble) from None

    async def swept(self, ids: Set[str]) -> None:
        """Wait until the truth has decided about these ids in every bulk delete; raises if it is in trouble.

        Were a change of state shown before that, it could be of an item that is being deleted from the state it had.
        """
        while any(entry.op.object_id in ids for entry in self._sweeps):
            assert self.truth is not None, "it decides about bulk deletes"
            await self.queued()
            await self.truth.current()

    def gave_up(self, op: Op) -> None:
        """A refused operation is given up: what readers have been shown of it is forgotten."""
        self._seen.touch(op.object_id)
        self._seen.outdone(op.object_id, op.stamp)

    def unseen(self) -> set[str]:
        """Ids of writes that no read shows and that may yet happen: the log, or the truth, has still to answer.

        Or the log could not: then a restart may find them, and undo what said that there was nothing to do.
        """
        unseen = [entry for commit in self._commits if not commit.at_once for entry in commit.entries]
        return self._doubtful | {
            entry.op.object_id for entry in (*unseen, *self._conditional) if entry.op.kind != "delete"
        }

    def bound(self, *, ops_max: int, bytes_max: int, wait_ms: int, bands: Bands) -> None:
        """Set the bounds of what is not settled. Values that are over a lower one leave memory as they move on."""
        self._pending.memory_bytes_max = bytes_max
        self._gate.bound(ops_max=ops_max, bytes_max=bytes_max, wait_ms=wait_ms, bands=bands)

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

    def abandon(self, error: Exception) -> None:
        """The lanes are gone: nobody must wait for them any longer."""
        self._ended = error
        for entry in list(self._awaited):
            entry.abandon(error)
        for lane in (self.truth, self.cache):
            if lane is not None:
                lane.batcher.fail(error, everybody=True)

    def recover(self, records: Sequence[Logged]) -> None:
        """Take in what the log of an earlier run still holds."""
        self._gate.readmit(len(records))
        for record in records:
            entry = Entry(record.op, record)
            self._note_sweeps([entry])
            self._accept([entry])

    def hurry(self) -> None:
        """Let nothing that is queued now wait for company."""
        for lane in (self.truth, self.cache):
            if lane is not None:
                lane.batcher.hurry()

    def refuse(self) -> None:
        """Accept nothing more, not even from callers who wait for room."""
        self._closed = True

    async def queued(self) -> None:
        """Wait until the log has answered for everything written before this call, which is then with the lanes."""
        if self._answered < self._begun:
            waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._answers.append((self._begun, waiter))
            await waiter

    async def drained(self) -> None:
        """Wait until everything written before this call is settled or quarantined."""
        await self.queued()
        # An operation passes each lane once, in either order.
        for lane in (self.truth, self.cache, self.truth):
            if lane is not None:
                await lane.batcher.drained()

    async def load(self, batch: Sequence[Entry]) -> None:
        """Read values that only the log holds back into memory, for the flush at hand.

        What has been overtaken since it was queued is barred from it.
        """
        for entry in batch:
            if entry.hop and self._overtaken(entry):
                entry.barred = True
        if self._journal is None:
            return
        sources = {id(source): source for entry in batch for source in (entry, entry.base) if source is not None}
        while wanted := [source for source in sources.values() if source.value_in_log_only]:
            records = [source.logged for source in wanted if source.logged is not None]
            try:
                ops = await self._journal.read(records)
            except StoreError:
                # A base may have settled, and its record gone, while it was being read. Anything else is damage.
                if all(source.value_in_log_only for source in wanted):
                    raise
                continue
            for source, op in zip(wanted, ops, strict=True):
                self._pending.restore(source, op)

    async def read_back(self, entry: Entry) -> SyncItem | None:
        """The item of one pending put whose value only the log holds."""
        if entry.logged is None or not entry.reloadable or self._journal is None:
            return None
        return (await self._journal.read([entry.logged]))[0].item

    async def passed(self, lane: Lane, batch: Sequence[Entry], plan: Plan, applied: Applied) -> None:
        """One tier has answered for a batch: move every entry on."""
        if lane is self.truth and self._journal is not None:
            self._journal.relieved()
        await self.file_again()
        settled: list[tuple[Entry, SyncEngineError | None]] = []
        moved: Lane | None = None
        for entry in batch:
            object_id = entry.op.object_id
            decides = plan.decides[object_id] is entry
            refusal = applied.refused.get(object_id) if decides else None
            if refusal is not None:
                await self._refused(lane, entry, refusal)
                settled.append((entry, refusal))
                continue
            if entry.conditional:
                self._conditional.discard(entry)
                self._sweeps.discard(entry)
                if object_id in applied.spared:
                    entry.spared = entry.outdone = True  # a copy in L1 may be of before it left its state
                    await self._on_file(entry, self._quarantine.forget(object_id, entry.op.stamp))
                    settled.append((entry, None))
                    continue
                self._make_visible(entry)  # it has happened: from here on reads must see it
            if decides and object_id in applied.superseded:
                entry.outdone = True  # another engine's newer write stands
            if decides and entry.op.kind == "restate":
                spoken = plan.spoken[object_id]
                if lane is self.truth and spoken.kind == "restate" and object_id not in applied.restated:
                    entry.outdone = True  # SQL has no such item: a copy in L1 is of one that another engine deleted
                    spoken = replace(spoken, rowless=object_id not in applied.superseded)
                self._pending.became(entry, _as_applied(spoken, applied))
            entry.hop += 1
            newest = self._pending.get(object_id)
            last = newest is plan.decides[object_id]
            # A change of state of ours that follows needs the item to be there: in Redis it changes what it finds.
            needed = newest is not None and not last and newest.op.kind == "restate"
            entry.barred = lane is self.truth and object_id in applied.superseded and not needed
            # Else a newer one of ours is on its way to Redis, and this one is not stored before that is.
            overtaken = self._overtaken(entry) or (entry.barred and last)
            onward = None if overtaken else self._next_lane(entry)
            if onward is not None:
                if entry.volatile_bytes and not entry.sql_first:
                    # Redis holds it now; only an older SQL row of it may still have to go.
                    self._gate.leave(0, entry.volatile_bytes)
                    entry.volatile_bytes = 0
                    self._pending.release(entry)
                else:
                    self._pending.trim(entry)
                onward.batcher.put(entry)
                moved = onward
            else:
                settled.append((entry, None))
                refused = self._quarantine.get(object_id)
                if refused is not None and not (entry.op.kind == "restate" and refused.nowhere_else):
                    await self._on_file(entry, self._quarantine.overtaken(object_id, entry.op.stamp))
        if moved is not None:
            moved.batcher.hurry()  # they have waited for company once
        if settled:
            self._settle(settled)

    def cramped(self) -> None:
        """A tier has no room; its disk may be the log's, which has some left for it."""
        if self._journal is not None:
            self._journal.relieve()

    async def file_again(self) -> None:
        """Write what the quarantine could not, and let the log go of it.

        A record that is never settled holds its segment, and with it every later one: the log would only grow.
        """
        while self._unfiled:
            assert self._journal is not None, "what no log holds is not kept by it either"
            op, logged = self._unfiled[0]
            try:
                await self._quarantine.again(op)
            except OSError:
                self.cramped()
                return
            if (op, logged) in self._unfiled:  # the other lane may have been here meanwhile
                self._unfiled.remove((op, logged))
                self._journal.settle([logged.seq])

    @property
    def _seen(self) -> View:
        assert self.view is not None, "parts are joined before the first write"
        return self.view

    async def _refused(self, lane: Lane, entry: Entry, refusal: SyncEngineError) -> None:
        self._conditional.discard(entry)
        self._sweeps.discard(entry)
        if isinstance(refusal, VersionConflict):  # a lost compare-and-set is an answer, not a fault
            entry.outdone = True  # and what L1 has is not what won it
            await self._on_file(entry, self._quarantine.forget(entry.op.object_id, entry.op.stamp))
        else:
            op, logged = entry.effective(), entry.logged
            if not await self._on_file(entry, self._quarantine.keep(op, lane.tier.name, str(refusal))) and logged:
                self._unfiled.append((op, logged))
                self.cramped()
            if lane is self.cache and entry.op.sql:
                try:
                    await withdraw(cast(Cache, lane.tier), entry.op)
                except SyncEngineError as failed:
                    log.warning("an older copy of %r may stand in %s: %s", entry.op.object_id, lane.tier.name, failed)

    async def _on_file(self, entry: Entry, change: Awaitable[object]) -> bool:
        try:
            await change
        except OSError as failed:
            log.error("the quarantine cannot be written (%s): the log keeps the operation", failed.strerror)  # noqa: TRY400 - the place in the code says nothing
            entry.logged = None
            return False
        return True

    def _settle(self, entries: Sequence[tuple[Entry, SyncEngineError | None]]) -> None:
        # Those who wait are told here, in one step with the books: they may look at once.
        for entry, refusal in entries:
            entry.settle(refusal)
            self._gate.leave(1, entry.volatile_bytes)
            self._seen.touch(entry.op.object_id)
            if entry.visible:
                self._pending.remove(entry)
            if entry.outdone:
                self._seen.outdone(entry.op.object_id, entry.op.stamp)
        if self._journal is not None:
            self._journal.settle([entry.logged.seq for entry, _ in entries if entry.logged is not None])

    def _answer(self) -> None:
        self._answered += 1
        self._commits.popleft()
        while self._behind and self._behind[0][0] <= self._answered:
            self._send(self._behind.popleft()[1])
        while self._answers and self._answers[0][0] <= self._answered:
            waiter = self._answers.popleft()[1]
            if not waiter.done():
                waiter.set_result(None)

    def _accept(self, entries: Sequence[Entry]) -> None:
        self._show(entries)
        self._send(entries)

    def _note_sweeps(self, entries: Sequence[Entry]) -> None:
        self._sweeps.update(entry for entry in entries if entry.op.only_in_state is not None)

    def _show(self, entries: Sequence[Entry]) -> None:
        for entry in entries:
            if entry.conditional:
                self._conditional.add(entry)
            else:
                self._make_visible(entry)

    def _send(self, entries: Sequence[Entry]) -> None:
        for entry in entries:
            onward = self._next_lane(entry)
            assert onward is not None, "admission lets nothing in that no tier would take"
            onward.batcher.put(entry)
            if entry.waiters:
                onward.batcher.hurry()
        if self._gate.crowded:
            self.hurry()

    def _make_visible(self, entry: Entry) -> None:
        entry.visible = True
        told = entry.op  # as it is before the index leaves its value to the log
        shown = self._pending.add(entry)
        if shown is entry:
            self._seen.written(told if told.kind == "put" else entry.effective())
        elif shown is not None:
            # A change of state was shown before the write it follows: what L1 has of the id is older than both.
            self._seen.touch(told.object_id)
            self._seen.outdone(told.object_id, shown.op.stamp)

    def _next_lane(self, entry: Entry) -> Lane | None:
        # What SQL keeps goes there first; what Redis alone keeps must be readable before its row goes.
        route = (self.truth, self.cache) if entry.sql_first else (self.cache, self.truth)
        lanes = [lane for lane in route if lane is not None]
        return lanes[entry.hop] if entry.hop < len(lanes) else None

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


def _as_applied(op: Op, applied: Applied) -> Op:
    """A restate that the truth has answered carries the whole item, which is what Redis is to show."""
    restated = applied.restated.get(op.object_id)
    return op if restated is None else replace(op, item=restated, redis=not restated.sql_only)


class _Commit:
    """One append to the log, until the log answers."""

    __slots__ = ("_path", "at_once", "done", "entries")

    def __init__(self, path: WritePath, entries: Sequence[Entry], *, at_once: bool) -> None:
        self._path = path
        self.entries = entries
        self.at_once = at_once
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def durable(self, records: Sequence[Logged]) -> None:
        """Called on the loop, in append order: what is durable becomes visible even if its caller is gone."""
        path = self._path
        path._doubtful.clear()  # with these records the log has noted which ones it refused
        for entry, record in zip(self.entries, records, strict=True):
            entry.logged = record
            if entry.volatile_bytes:
                path._gate.leave(0, entry.volatile_bytes)
                entry.volatile_bytes = 0
                if entry.visible:
                    path._pending.trim(entry)
        if self.at_once:
            # Not before: were it in one tier and killed before the next, no log would say that they differ.
            path._send(self.entries)
        else:
            path._accept(self.entries)
        path._answer()
        if not self.done.done():
            self.done.set_result(None)

    def failed(self, error: Exception) -> None:
        """Called on the loop: nothing of this append counts as logged."""
        path = self._path
        if self.at_once:
            path._send(self.entries)  # accepted in memory; MEMORY promised no more
            path._answer()
            return
        path._answer()
        path._sweeps.difference_update(self.entries)
        path._gate.leave(len(self.entries), sum(entry.volatile_bytes for entry in self.entries))
        path._doubtful.update(entry.op.object_id for entry in self.entries if entry.op.kind != "delete")
        if not self.done.done():
            self.done.set_exception(
                error if isinstance(error, SyncEngineError) else StoreError("log", f"{type(error).__name__}: {error}")
            )
