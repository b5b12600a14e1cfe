"""What is acknowledged but not yet in every tier: one entry per operation, one index of the newest per id.

Reads ask the index first, which is what makes a write visible before it is flushed. A value sits in
memory while the budget lasts and is otherwise read back from the log.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence

import msgspec
from msgspec import structs

from sync_engine.item import Op, SyncItem
from sync_engine.ports import Journal, Logged

__all__ = ["Entry", "PendingIndex", "overlay"]


class Entry(msgspec.Struct, eq=False):
    """One operation on its way to the tiers.

    A hundred thousand may be: each object here that the garbage collector has to visit makes its stops longer.
    """

    op: Op
    logged: Logged | None = None
    size: int = 0
    sql_first: bool = True  # what SQL keeps goes there first
    hop: int = 0  # how many tiers of its route it has passed
    volatile_bytes: int = 0  # what it counts at the gate: bytes that no log holds
    visible: bool = False  # whether the index knows it; a conditional one waits for the truth
    outdone: bool = False  # a tier held a newer write, of another engine
    barred: bool = False  # the truth held it: Redis may have lost it and its stamp, and must not get this one
    spared: bool = False  # a conditional delete that did not apply
    settled: bool = False
    error: Exception | None = None
    base: Entry | None = None  # the put or delete that this restate follows, while that is pending too
    waiters: list[asyncio.Future[None]] | None = None  # made for the first: few are waited for
    queued_at: float = 0.0  # when the tier's queue that it stands in took it

    def __post_init__(self) -> None:
        self.size = self.op.size
        self.sql_first = self.op.sql

    @property
    def conditional(self) -> bool:
        """Whether the truth has still to decide if this operation happens at all."""
        return (self.op.if_version is not None or self.op.only_in_state is not None) and self.hop == 0

    @property
    def deletes(self) -> bool:
        """Whether it leaves nothing to read: a delete, or a change of state on top of one that is pending."""
        base = self.base
        return self.op.kind == "delete" or (base is not None and base.op.kind == "delete" and not base.settled)

    @property
    def value_in_memory(self) -> bool:
        """Whether the put's item is at hand (and not only in the log, or in the tiers it has passed)."""
        return self.op.item is not None

    @property
    def value_in_log_only(self) -> bool:
        """Whether the put's item has to be read back from the log."""
        return self.op.kind == "put" and self.op.item is None and self.reloadable and not self.settled

    @property
    def reloadable(self) -> bool:
        """Whether the log holds the item; it holds only the state of what began as a restate."""
        return self.logged is not None and self.logged.op.kind == "put"

    def release_value(self) -> None:
        """Let go of the item; the log, or a tier already passed, holds it."""
        if self.op.item is not None:
            self.op = structs.replace(self.op, item=None)
            if self.reloadable and self.logged is not None:
                self.logged.op = self.op

    def effective(self) -> Op:
        """The operation as readers here see it: a restate of a put that no tier has is that put in the new state."""
        op = self.op
        base = self.base
        if op.kind != "restate" or base is None or base.hop or base.op.item is None:
            return op
        item = base.op.item.replace(state=op.state, stamp=op.stamp)
        return structs.replace(base.op, stamp=op.stamp, item=item, if_version=None)

    def spoken(self) -> Op:
        """The operation as a tier is to see it: itself, but for a restate of what was refused and is nowhere else.

        That one is the put in its new state, with its own stamp: what another engine has written since stays.
        """
        op, base = self.op, self.base
        if op.kind != "restate" or base is None or base.error is None or base.outdone or base.op.item is None:
            return op
        return structs.replace(base.op, item=base.op.item.replace(state=op.state), if_version=None)

    def settle(self, error: Exception | None = None) -> None:
        """Tell everybody who waits that this operation is in every tier, or was refused."""
        self.settled = True
        self.error = error
        waiters, self.waiters = self.waiters, None
        for waiter in waiters or ():
            if not waiter.done():
                waiter.set_result(None)

    def abandon(self, error: Exception) -> None:
        """Stop the wait without an answer: the operation is still in the log, or lost with this process."""
        waiters, self.waiters = self.waiters, None
        for waiter in waiters or ():
            if not waiter.done():
                waiter.set_exception(error)

    async def wait_settled(self) -> None:
        """Return when settled; raise what refused it."""
        if not self.settled:
            waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            if self.waiters is None:
                self.waiters = []
            self.waiters.append(waiter)
            try:
                await waiter
            finally:
                if self.waiters is not None and waiter in self.waiters:
                    self.waiters.remove(waiter)
        if self.error is not None:
            raise self.error

    def __repr__(self) -> str:
        return f"<Entry {self.op.kind} {self.op.object_id!r} stamp {self.op.stamp} hop {self.hop}>"


class PendingIndex:
    """id → newest unsettled operation."""

    def __init__(self, memory_bytes_max: int, journal: Journal | None) -> None:
        self._journal = journal
        self._newest: dict[str, Entry] = {}
        self.memory_bytes_max = memory_bytes_max
        self.memory_bytes = 0
        self.entries = 0

    def add(self, entry: Entry) -> Entry | None:
        """Take the entry in; the entry that now tells something new of its id, None where a newer one stands.

        That is another one where a change of state was known before the put that it follows.
        """
        self.entries += 1
        op = entry.op
        held = self._newest.get(op.object_id)
        shown: Entry | None = None
        if held is None or held.op.stamp <= op.stamp:
            shown = entry
            if op.kind == "restate" and held is not None:
                base = held.base if held.op.kind == "restate" else held
                if base is not None and not base.settled:
                    entry.base = base
                    # Behind its put in every tier: before it, it would bring an older row back to life.
                    entry.sql_first = base.sql_first
            self._newest[op.object_id] = entry
        elif op.kind == "put" and held.op.kind == "restate" and (held.base is None or held.base.op.stamp < op.stamp):
            # Only a compare-and-set is shown so late.
            held.base = entry
            shown = held
        if op.item is not None:
            if entry.reloadable and self.memory_bytes + entry.size > self.memory_bytes_max:
                entry.release_value()
            else:
                self.memory_bytes += entry.size
        return shown

    def release(self, entry: Entry) -> None:
        """Give the entry's memory back; the entry itself stays pending."""
        if entry.value_in_memory:
            self.memory_bytes -= entry.size
            entry.release_value()

    async def load(self, batch: Sequence[Entry]) -> None:
        """Read values that only the log holds back into memory, for the flush at hand."""
        if self._journal is None:
            return
        if wanted := [entry for entry in batch if entry.value_in_log_only]:
            ops = await self._journal.read([entry.logged for entry in wanted if entry.logged is not None])
            for entry, op in zip(wanted, ops, strict=True):
                if not entry.value_in_memory:
                    entry.op = op
                    self.memory_bytes += entry.size

    async def read_back(self, entry: Entry) -> SyncItem | None:
        """The item of one pending put whose value only the log holds."""
        if entry.logged is None or not entry.reloadable or self._journal is None:
            return None
        return (await self._journal.read([entry.logged]))[0].item

    def became(self, entry: Entry, op: Op) -> None:
        """A tier has applied the entry as this operation, so that is what it is from here on."""
        if entry.op is not op:
            self.release(entry)
            entry.op, entry.size = op, op.size
            if entry.value_in_memory:
                self.memory_bytes += entry.size

    def trim(self, entry: Entry) -> None:
        """Release the value if the budget is spent and the log holds it."""
        if entry.reloadable and self.memory_bytes > self.memory_bytes_max:
            self.release(entry)

    def remove(self, entry: Entry) -> None:
        """Forget a settled entry."""
        self.entries -= 1
        if entry.value_in_memory:
            self.memory_bytes -= entry.size
        if self._newest.get(entry.op.object_id) is entry:
            del self._newest[entry.op.object_id]

    def get(self, object_id: str) -> Entry | None:
        """The newest unsettled operation on this id."""
        return self._newest.get(object_id)

    def newest_stamp(self, object_id: str) -> int:
        """The stamp of that operation, 0 if there is none."""
        entry = self._newest.get(object_id)
        return entry.op.stamp if entry is not None else 0

    def __iter__(self) -> Iterator[Entry]:
        return iter(list(self._newest.values()))

    def __len__(self) -> int:
        return self.entries

    def __repr__(self) -> str:
        return f"<PendingIndex {self.entries} operations on {len(self._newest)} ids, {self.memory_bytes} bytes>"


def overlay(op: Op, base: SyncItem | None) -> SyncItem | None:
    """What a tier's copy looks like under a restate that has not reached it."""
    if base is None or op.kind != "restate" or base.stamp >= op.stamp:
        return base
    return base.replace(state=op.state, stamp=op.stamp)
