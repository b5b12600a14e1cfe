"""What was asked of the engines and what they said, and whether that and what the tiers end with can be true.

Of a write three things matter: its stamp, whether it *may* have happened (it was not refused), and whether it is *firm*
(acknowledged, and nothing happened that may have undone that). A read must not show less than what was firm when it
began, nor anything that cannot have happened by its end. Ticks, not times, tell what was before what: computing takes
no time here.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final, Literal

from sync_engine.item import Op, SyncItem
from sync_engine.options import Ack
from sync_engine.testing.simulation.fakes import EPOCH_MS

__all__ = ["END_MS", "History", "Read", "Violation", "Write"]

END_MS: Final = EPOCH_MS + 12 * 3_600_000
"""No run takes so long, by any clock."""

SQL_VERBS: Final = ("scan", "by state")

Outcome = Literal["open", "acked", "unknown", "refused"]


class Violation(AssertionError):
    """Something that must never happen."""


@dataclass(slots=True, eq=False)
class Write:
    """One operation of one caller. ``op`` gets its stamp while the call is under way."""

    node: str
    life: int
    op: Op
    ack: Ack
    began: int
    ended: int = 0
    outcome: Outcome = "open"

    @property
    def may_be(self) -> bool:
        """Whether it may have happened."""
        return self.op.stamp > 0 and self.outcome != "refused"

    @property
    def base(self) -> bool:
        """Whether it says what the item is, and not only its state."""
        return self.op.kind != "restate"

    @property
    def erases(self) -> bool:
        """Whether SQL holds nothing after it."""
        return self.op.kind == "delete" or (self.op.kind == "put" and not self.op.sql)

    @property
    def stays(self) -> bool:
        """Whether its deadline, if it has one, is after the end."""
        return self.op.redis_expires_at is None or self.op.redis_expires_at > END_MS

    def __repr__(self) -> str:
        op = self.op
        about = f"{op.item.content!r} v{op.item.version} {op.item.state}" if op.item is not None else op.state or ""
        where = "" if op.sql else " cache-only"
        where += "" if op.redis else " durable-only"
        where += f" ttl until {op.redis_expires_at}" if op.redis_expires_at is not None else ""
        where += f" if version {op.if_version}" if op.if_version is not None else ""
        return (
            f"{op.kind} {op.object_id} {about}{where} {self.ack.value}: {self.outcome}, stamp {op.stamp}, "
            f"{self.node}.{self.life} [{self.began}-{self.ended}]"
        )


@dataclass(frozen=True, slots=True)
class Read:
    """One answer about one id: an item, None (absent), True (there), or of a scan or listing of SQL."""

    node: str
    life: int
    verb: str
    object_id: str
    began: int
    ended: int
    found: SyncItem | bool | None

    def __repr__(self) -> str:
        found = self.found
        told = f"{found.content!r} {found.state}, stamp {found.stamp}" if isinstance(found, SyncItem) else repr(found)
        return f"{self.verb} {self.object_id} by {self.node}.{self.life} [{self.began}-{self.ended}]: {told}"


@dataclass(slots=True)
class History:
    """Everything that was asked. ``alone``: of one engine only. ``lossless``: Redis never lost anything."""

    alone: bool
    cached_in_l1: bool
    lossless: bool = True
    writes: dict[str, list[Write]] = field(default_factory=lambda: defaultdict(list))
    reads: list[Read] = field(default_factory=list)
    promised: dict[str, set[int]] = field(default_factory=lambda: defaultdict(set))
    """Stamps that the log of each node called durable."""
    last_life: dict[str, int] = field(default_factory=dict)
    ticks: int = 0

    def tick(self) -> int:
        """A moment of its own."""
        self.ticks += 1
        return self.ticks

    def begin(self, node: str, life: int, ops: Iterable[Op], ack: Ack) -> list[Write]:
        """A caller asks for these operations."""
        began = self.tick()
        writes = [Write(node, life, op, ack, began) for op in ops]
        for write in writes:
            self.writes[write.op.object_id].append(write)
        return writes

    def end(self, writes: Iterable[Write], outcome: Outcome) -> None:
        """The caller knows what became of them, or that nobody knows."""
        ended = self.tick()
        for write in writes:
            write.ended, write.outcome = ended, outcome

    def _tied(self, object_id: str) -> bool:
        """Whether two engines gave writes of this id the same stamp. Which of them wins is not promised."""
        writes = {(w.op.stamp, w.node) for w in self.writes[object_id] if w.may_be}
        return len({stamp for stamp, _ in writes}) < len(writes)

    # What reads may show

    def check_reads(self) -> None:
        """Raise ``Violation`` for the first read that cannot be true."""
        for read in self.reads:
            if self._tied(read.object_id):
                continue
            try:
                self._check(read)
            except Violation as wrong:
                raise Violation(f"{wrong}\n  {read!r}\n{self.told(read.object_id)}") from None

    def _check(self, read: Read) -> None:
        past = [w for w in self.writes[read.object_id] if w.may_be and w.began < read.ended]
        floor = self._floor(read, past)
        if read.found is None or read.found is False:
            if floor is None or floor.op.kind == "delete":
                return
            if not floor.op.sql and (read.verb in SQL_VERBS or not self._lasts(floor)):
                return
            if not any(w.erases and (w.op.stamp > floor.op.stamp or w.node == read.node != floor.node) for w in past):
                raise Violation(f"I4: an item that exists is said to be absent; it is at least {floor!r}")
        elif read.found is True:
            puts = any(w.op.kind == "put" for w in past)
            if not puts or not any(w.op.kind != "delete" and self._may_show(w, read, floor) for w in past):
                raise Violation("I4: an item that cannot exist is said to be there")
        else:
            self._check_item(read, read.found, past, floor)

    def _may_show(self, write: Write, read: Read, floor: Write | None) -> bool:
        """Whether the id may be said to be there for this write: an own one on its way hides another engine's."""
        if floor is None or write.op.stamp >= floor.op.stamp:
            return True
        stored = write.ack is Ack.STORED and write.outcome == "acked" and write.ended < read.began
        return write.node == read.node != floor.node and not stored

    def _check_item(self, read: Read, item: SyncItem, past: list[Write], floor: Write | None) -> None:
        source = _source(item, past)
        own = source.node == read.node
        if floor is None or (own and floor.node != read.node) or _forgotten(item, past):
            return
        if read.verb in SQL_VERBS and not floor.op.sql and not self.alone:
            return  # a cache-only write removes the row that is there, and not what another engine brings later
        if _less(item, floor) and not any(w.node != read.node and w.op.stamp > floor.op.stamp for w in past):
            # Else another engine's newer write was in SQL before ours, and Redis has neither: it lags behind that one.
            raise Violation(f"I2: a read shows less than {floor!r}")
        if self.alone and source.op.stamp < floor.op.stamp:
            raise Violation(f"I2: the content is older than {floor!r}")

    def _floor(self, read: Read, past: list[Write]) -> Write | None:
        """The newest put or delete that the read must know of."""
        known = [
            w
            for w in past
            if w.base and w.outcome == "acked" and w.ended < read.began and self._known(w, read.node, read.life)
        ]
        return max(known, key=lambda w: w.op.stamp, default=None)

    def _known(self, write: Write, node: str, life: int) -> bool:
        if write.node == node:
            if write.life == life:
                return self._lasts(write) if not write.op.sql else True
            return write.op.sql and (write.ack is not Ack.MEMORY or write.op.stamp in self.promised[node])
        return write.op.sql and write.ack is Ack.STORED and not self.cached_in_l1

    def _lasts(self, write: Write) -> bool:
        """Whether a cache-only write is there for as long as its engine is."""
        return self.lossless and write.stays

    # What the tiers may end with

    def firm(self, write: Write) -> bool:
        """Whether it must have had its effect once everything is flushed."""
        op = write.op
        if not write.may_be:
            return False
        if op.sql and op.if_version is None and op.stamp in self.promised[write.node]:
            return True
        if write.outcome != "acked":
            return False
        return (op.sql and write.ack is not Ack.MEMORY) or write.life == self.last_life[write.node]

    def check_tiers(self, upper: Mapping[str, SyncItem], lower: Mapping[str, SyncItem]) -> None:
        """Raise ``Violation`` unless Redis and SQL hold what they must and nothing else."""
        for object_id in sorted({*self.writes, *upper, *lower}):
            if self._tied(object_id):
                continue
            try:
                self._check_tiers(object_id, upper.get(object_id), lower.get(object_id))
            except Violation as wrong:
                held = f"  Redis holds {_shown(upper.get(object_id))}, SQL {_shown(lower.get(object_id))}"
                raise Violation(f"{wrong}\n{held}\n{self.told(object_id)}") from None

    def _check_tiers(self, object_id: str, copy: SyncItem | None, row: SyncItem | None) -> None:
        past = [w for w in self.writes[object_id] if w.may_be]
        bases = [w for w in past if w.base and self.firm(w)]
        newest = max(bases, key=lambda w: w.op.stamp, default=None)
        if row is not None:
            self._check_held("SQL", row, past, newest)
        elif newest is not None and not any(w.erases and w.op.stamp >= newest.op.stamp for w in past):
            raise Violation(f"I3: lost: {newest!r}")
        if copy is not None and _forgotten(copy, past):
            return
        if copy is not None and row is not None:
            if (copy.stamp, copy.content, copy.state) != (row.stamp, row.content, row.state):
                self._check_difference(copy, row, past)
        elif copy is not None:
            if any(w.erases and w.op.stamp > copy.stamp and self._between_tiers(w) for w in past):
                return
            # Of a cache-only write that has expired, or that Redis has lost, nothing is left to keep out what another
            # engine brings later.
            cached = [w for w in past if w.op.kind == "put" and not w.op.sql and not self._lasts(w)]
            if _source(copy, past).op.sql and (self.alone or not cached):
                raise Violation("I1: Redis holds an item that SQL does not")
            self._check_held("Redis", copy, past, newest)
        elif newest is not None and newest.op.kind == "put" and self._stays_in_redis(newest, row, past):
            raise Violation(f"I3: Redis does not hold {newest!r}")

    def _check_difference(self, copy: SyncItem, row: SyncItem, past: list[Write]) -> None:
        of_copy, of_row = _source(copy, past), _source(row, past)
        # A process that was killed after a cache-only write may have left an older row: docs/limits.md says so.
        if not of_copy.op.sql and of_copy.op.stamp > of_row.op.stamp:
            return
        # Of two engines one may also change the state of what Redis alone keeps, which SQL knows nothing of.
        if not self.alone and copy.stamp > row.stamp and any(w.op.kind == "put" and not w.op.sql for w in past):
            return
        if any(w.op.stamp == row.stamp and self._between_tiers(w) for w in past):
            return
        raise Violation("I1: the tiers differ")

    def _between_tiers(self, write: Write) -> bool:
        """Whether it may have been killed there: the log could not take it, and MEMORY promised no more (limits.md)."""
        return write.ack is Ack.MEMORY and not self.firm(write)

    def _check_held(self, where: str, item: SyncItem, past: list[Write], newest: Write | None) -> None:
        source = _source(item, past)
        if where == "SQL" and not source.op.sql:
            raise Violation("SQL holds what it was not to hold")
        if newest is not None and not newest.op.sql and not self.alone and (where == "SQL" or not self._lasts(newest)):
            # It removed the row that was there, and keeps none out that another engine brings later. So does Redis once
            # it has lost the item: another engine copies the row before it goes.
            newest = None
        if newest is not None and _less(item, newest):
            told = "a delete is undone" if newest.op.kind == "delete" else "an older write stands"
            raise Violation(f"I1: {told} in {where}: there is {newest!r}")
        if newest is not None and source.op.stamp < newest.op.stamp and self._orders(item, newest, past):
            raise Violation(f"I1: the content in {where} is older than {newest!r}")
        for late in past:
            missing = late.op.kind == "restate" and late.op.stamp > item.stamp and self.firm(late)
            if missing and self.alone and (source.op.sql or self._lasts(source)):
                raise Violation(f"I1: in {where} there is no trace of {late!r}")

    def _orders(self, item: SyncItem, newest: Write, past: list[Write]) -> bool:
        """Whether every change of state that the item may be of found what that write had left."""
        restates = [w for w in past if w.op.kind == "restate" and newest.op.stamp < w.op.stamp <= item.stamp]
        stored = newest.ack is Ack.STORED and newest.outcome == "acked"
        return all(w.node == newest.node or (stored and newest.ended < w.began) for w in restates)

    def _stays_in_redis(self, newest: Write, row: SyncItem | None, past: list[Write]) -> bool:
        if not (self.alone and self.lossless and newest.op.redis):
            return False
        if not all(w.stays for w in past):
            return False
        later = [w for w in past if w.op.stamp > newest.op.stamp and w.base]
        return not later and (row is not None or not newest.op.sql)

    def told(self, object_id: str) -> str:
        """All writes of the id, by stamp."""
        writes = sorted(self.writes[object_id], key=lambda w: (w.op.stamp, w.began))
        return "\n".join(f"    {write!r}{', firm' if self.firm(write) else ''}" for write in writes)


def _forgotten(item: SyncItem, past: list[Write]) -> bool:
    """Whether a newer copy may have expired in Redis, which leaves nothing there to keep out what is on its way."""
    return any(w.op.kind == "put" and w.op.redis and not w.stays and w.op.stamp > item.stamp for w in past)


def _less(item: SyncItem, write: Write) -> bool:
    """Whether the item is older than what the write left."""
    return item.stamp < write.op.stamp or (item.stamp == write.op.stamp and write.op.kind == "delete")


def _source(item: SyncItem, past: list[Write]) -> Write:
    """The put that the item's content is from; its stamp and state must be from there too, or of a change of state."""
    for write in past:
        made = write.op.item
        if made is not None and made.content == item.content and made.version == item.version:
            break
    else:
        raise Violation("an item that nobody wrote, or whose write was refused")
    if item.stamp == write.op.stamp:
        if item.state != made.state:
            raise Violation("an item in a state that nobody gave it")
    elif item.stamp < write.op.stamp or not any(
        w.op.kind == "restate" and w.op.stamp == item.stamp and w.op.state == item.state for w in past
    ):
        raise Violation("an item with a stamp and a state that nobody gave it")
    return write


def _shown(item: SyncItem | None) -> str:
    return "nothing" if item is None else f"{item.content!r} v{item.version} {item.state}, stamp {item.stamp}"
