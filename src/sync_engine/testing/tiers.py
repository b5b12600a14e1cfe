"""A tier that is a dict, and wrappers that break, slow, count or refuse; all on the ports, all composable.

``MemoryTier`` is the plainest reading of what `sync_engine.ports` asks: the contract suites hold for it
as for Redis and SQL, so a flow tested on it is tested on the contract and not on a mock.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Collection, Container, Coroutine, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Literal, ParamSpec, TypeVar

from sync_engine.clock import SystemClock
from sync_engine.errors import StoreError, SyncEngineError, TierUnavailable, VersionConflict
from sync_engine.forward import Forwarding
from sync_engine.item import Op, SyncItem, check_id
from sync_engine.ports import Applied, CacheFacts, Changes, Clock, Fetched, Mark, Memory, Tier
from sync_engine.schema import check_schema

__all__ = ["UPKEEP", "Breaking", "Counting", "Deaf", "MemoryTier", "Refusing", "Slow"]

P = ParamSpec("P")
R = TypeVar("R")

UPKEEP = frozenset(
    (
        *("changed_since", "coldest", "facts", "forgotten", "healed", "held_stamps"),
        *("late_since", "marks", "newest_stamp", "tell"),
    )
)
"""What an engine asks of its tiers without anybody asking the engine."""


@dataclass(frozen=True, slots=True)
class _Row:
    item: SyncItem
    deadline_ms: int | None


class MemoryTier:
    """A truth in a dict. Named ``"l2"`` it also honours ``redis_expires_at``, as Redis does.

    ``rows``, ``tombstones``, ``applied`` (operations asked for, in order) and ``schemas`` (by prefix) are for tests to
    look at.
    """

    def __init__(self, name: str = "l3", clock: Clock | None = None) -> None:
        self.name = name
        self.applied: list[Op] = []
        self.tombstones: dict[str, int] = {}
        self.schemas: dict[str, str] = {}
        self.closed = False
        self._rows: dict[str, _Row] = {}
        self._clock = SystemClock() if clock is None else clock
        self._newest = 0
        self._late: list[tuple[int, int]] = []
        self._mark = Mark(0, "run 0", 0, 0, None)

    @property
    def rows(self) -> dict[str, SyncItem]:
        """What is held, by id ascending (code points)."""
        return {row.item.object_id: row.item for row in self._live()}

    async def fetch(self, ids: Sequence[str], /) -> Fetched:
        await asyncio.sleep(0)  # a real tier suspends here, so others run
        return Fetched(items={id_: row.item for id_ in map(check_id, ids) if (row := self._held(id_)) is not None})

    async def exists_batch(self, ids: Sequence[str], /) -> list[bool]:
        held = (await self.fetch(ids)).items
        return [id_ in held for id_ in ids]

    async def apply(self, ops: Sequence[Op], /) -> Applied:
        await asyncio.sleep(0)
        superseded: set[str] = set()
        refused: dict[str, SyncEngineError] = {}
        restated: dict[str, SyncItem] = {}
        existed: set[str] = set()
        spared: set[str] = set()
        for op in ops:
            id_ = op.object_id
            row = self._held(id_)
            self.applied.append(op)
            if self.name != "l2" and (conflict := _conflict(op, row, self.tombstones.get(id_, 0))) is not None:
                refused[id_] = conflict  # in Redis there is nothing to compare with: the truth has decided
                continue
            self._newest = max(self._newest, op.stamp)
            if op.only_in_state is not None and self._spares(op, row):
                spared.add(id_)
            elif self._passed(op, row):
                superseded.add(id_)
            elif op.kind == "put":
                self._put(op)
            elif op.kind == "delete":
                self._delete(op)
                if row is not None:
                    existed.add(id_)
            elif row is not None and op.stamp == row.item.stamp:
                restated[id_] = row.item  # applied before: the caller still needs the item
            elif row is not None and op.state is not None:
                # What brings the whole item brings what the truth holds, which takes none itself; the deadline stays.
                base = row.item if op.item is None or self.name != "l2" else op.item
                restated[id_] = base.replace(state=op.state, stamp=op.stamp)
                self._rows[id_] = replace(row, item=restated[id_])
            elif row is None and op.item is not None and self.name == "l2":
                # What is older must stay out, and what a read brings of this very item may come.
                self.tombstones[id_] = max(op.stamp - 1, self.tombstones.get(id_, 0))
        return Applied(frozenset(superseded), refused, restated, frozenset(existed), frozenset(spared))

    async def list_state_ids(self, state: str, limit: int = 1000, *, after: str | None = None) -> list[str]:
        return [item.object_id for item in await self.get_by_state(state, limit, after=after)]

    async def count_by_state(self, state: str, /) -> int:
        await asyncio.sleep(0)
        return sum(row.item.state == state for row in self._live())

    async def scan_prefix(self, prefix: str, limit: int = 1000, *, after: str | None = None) -> list[SyncItem]:
        return await self._page(lambda item: item.object_id.startswith(prefix), limit, after)

    async def get_by_state(self, state: str, limit: int = 1000, *, after: str | None = None) -> list[SyncItem]:
        return await self._page(lambda item: item.state == state, limit, after)

    async def list_prefix_ids(self, prefix: str, limit: int = 1000, *, after: str | None = None) -> list[str]:
        return [item.object_id for item in await self.scan_prefix(prefix, limit, after=after)]

    async def count_prefix(self, prefix: str, /) -> int:
        await asyncio.sleep(0)
        return sum(row.item.object_id.startswith(prefix) for row in self._live())

    async def newest_stamp(self) -> int:
        await asyncio.sleep(0)
        return self._newest

    async def held_stamps(self, ids: Sequence[str], /) -> dict[str, int]:
        return {id_: item.stamp for id_, item in (await self.fetch(ids)).items.items()}

    async def buried_stamps(self, ids: Sequence[str], /) -> dict[str, int]:
        await asyncio.sleep(0)
        return {id_: self.tombstones[id_] for id_ in ids if id_ in self.tombstones}

    async def changed_since(self, stamp: int, after: tuple[int, str] | None = None, limit: int = 500) -> Changes:
        await asyncio.sleep(0)
        found = {(at, id_): Op(kind="delete", object_id=id_, stamp=at) for id_, at in self.tombstones.items()}
        for item in self.rows.values():
            op = Op(kind="restate", object_id=item.object_id, stamp=item.stamp, item=item, state=item.state)
            found[item.stamp, item.object_id] = op
        page = [place for place in sorted(found) if place > (after or (stamp, ""))][:limit]
        return Changes([found[place] for place in page], page[-1] if len(page) == limit else None)

    async def forgotten(self) -> int:
        await asyncio.sleep(0)
        return 0

    async def note_late(self, at_ms: int, stamp: int, /) -> None:
        await asyncio.sleep(0)
        self._late.append((at_ms, stamp))

    async def late_since(self, at_ms: int, /) -> int | None:
        await asyncio.sleep(0)
        return min((stamp for at, stamp in self._late if at >= at_ms), default=None)

    async def register_schema(self, name: str, prefixes: Iterable[str], /) -> int:
        self.schemas.update(dict.fromkeys(check_schema(name, prefixes), name))
        await asyncio.sleep(0)
        return 0

    async def marks(self, newest: int = 0, /) -> Sequence[Mark]:
        await asyncio.sleep(0)
        self._mark = replace(self._mark, newest=max(self._mark.newest, newest, self._newest))
        return [self._mark]

    async def healed(self, marks: Sequence[Mark], /) -> None:
        await asyncio.sleep(0)
        if self._mark.run == marks[0].run:
            self._mark = replace(self._mark, since=None)

    async def evict(self, copies: Sequence[tuple[str, int]], /, *, bury: bool = False) -> int:
        held = await self.held_stamps([id_ for id_, _ in copies])
        gone = [id_ for id_, stamp in copies if held.get(id_) == stamp]
        for id_ in gone:
            del self._rows[id_]
            if bury and held[id_]:
                self.tombstones[id_] = max(held[id_] - 1, self.tombstones.get(id_, 0))
        return len(gone)

    async def tell(self, ops: Sequence[Op], /) -> None:
        await asyncio.sleep(0)

    async def facts(self) -> CacheFacts:
        await asyncio.sleep(0)
        return CacheFacts(repr(self), documents=True, searchable=False, memory=[Memory((0,), 0, 0)])

    async def coldest(self, place: int, picked: int, most: int, /) -> list[tuple[str, int]]:
        await asyncio.sleep(0)
        return [(id_, item.stamp) for id_, item in islice(self.rows.items(), min(picked, most))]

    async def close(self) -> None:
        self.closed = True

    # A server that was restarted

    def saved(self) -> tuple[object, ...]:
        """What is held now, for ``restarted``."""
        return dict(self._rows), dict(self.tombstones), self._newest

    def restarted(self, saved: tuple[Any, ...]) -> None:
        """Come back with an older state: another run, which does not know what it lost."""
        rows, tombstones, self._newest = saved
        self._rows, self.tombstones = dict(rows), dict(tombstones)
        since = min(self._newest, self._mark.since if self._mark.since is not None else self._newest)
        run = f"run {int(self._mark.run.split()[1]) + 1}"
        self._mark = Mark(0, run, self._newest, self._newest, since if rows else None)

    def __repr__(self) -> str:
        return f"<MemoryTier {self.name} {len(self._rows)} items, {len(self.tombstones)} tombstones>"

    async def _page(self, wanted: Callable[[SyncItem], bool], limit: int, after: str | None) -> list[SyncItem]:
        await asyncio.sleep(0)
        items = (row.item for row in self._live())
        return list(islice((i for i in items if wanted(i) and (after is None or i.object_id > after)), limit))

    def _held(self, object_id: str) -> _Row | None:
        row = self._rows.get(object_id)
        return row if row is None or row.deadline_ms is None or row.deadline_ms > self._clock.now_ms() else None

    def _live(self) -> Iterator[_Row]:
        return (row for id_ in sorted(self._rows) if (row := self._held(id_)) is not None)

    def _passed(self, op: Op, row: _Row | None) -> bool:
        """Whether something newer is here; a fill also gives way to its equal."""
        stamp, tombstone = op.stamp, self.tombstones.get(op.object_id, 0)
        if op.fill:
            return (row is not None and row.item.stamp >= stamp) or (tombstone >= stamp and tombstone > 0)
        if stamp == 0:
            return False
        return (row is not None and row.item.stamp > stamp) or tombstone > stamp

    def _spares(self, op: Op, row: _Row | None) -> bool:
        """Whether a conditional delete does not apply; one that was applied before is being repeated."""
        buried = self.tombstones.get(op.object_id, 0)
        if row is None:
            return buried != op.stamp
        return max(row.item.stamp, buried) > op.stamp or op.only_in_state not in ("", row.item.state)

    def _put(self, op: Op) -> None:
        if op.item is None:
            raise AssertionError(f"a put of {op.object_id!r} without an item")
        if self.name == "l2" and op.redis_expires_at is not None and op.redis_expires_at <= self._clock.now_ms():
            if not op.fill:
                self._delete(op)  # it has come and gone: what is older must stay out
            return
        self.tombstones.pop(op.object_id, None)
        item = op.item if op.item.stamp == op.stamp else op.item.replace(stamp=op.stamp)
        self._rows[op.object_id] = _Row(item, op.redis_expires_at if self.name == "l2" else None)

    def _delete(self, op: Op) -> None:
        self._rows.pop(op.object_id, None)
        if op.stamp:
            self.tombstones[op.object_id] = op.stamp
        else:
            self.tombstones.pop(op.object_id, None)


def _conflict(op: Op, row: _Row | None, tombstone: int) -> VersionConflict | None:
    newest = tombstone if row is None else max(row.item.stamp, tombstone)
    if op.if_version is None or 0 < op.stamp == newest:
        return None  # an equal stamp is this very operation, applied before
    actual = 0 if row is None else row.item.version
    matches = op.if_version == actual and not 0 < op.stamp < newest
    return None if matches else VersionConflict(op.object_id, op.if_version, actual)


class Breaking(Forwarding):
    """Raises ``TierUnavailable`` at the n-th call (1 is the first) and ``times`` - 1 calls after it.

    ``times`` None is for ever, until ``heal()``. ``when="after"`` lets the call take effect first: the
    reply is what was lost. ``verbs`` limits it to some verbs; others neither break nor count.
    """

    def __init__(
        self,
        tier: Tier,
        at: int = 1,
        times: int | None = 1,
        when: Literal["before", "after"] = "before",
        verbs: Collection[str] | None = None,
    ) -> None:
        super().__init__(tier)
        self.calls = 0
        self.broken = 0
        self._first = at
        self._end = None if times is None else at + times
        self._when = when
        self._verbs = verbs

    def heal(self) -> None:
        """Break no more."""
        self._end = 0

    async def _through(self, verb: Callable[P, Coroutine[Any, Any, R]], *args: P.args, **kwargs: P.kwargs) -> R:
        if self._verbs is not None and verb.__name__ not in self._verbs:
            return await verb(*args, **kwargs)
        self.calls += 1
        call = self.calls
        if call < self._first or (self._end is not None and call >= self._end):
            return await verb(*args, **kwargs)
        self.broken += 1
        if self._when == "after":
            await verb(*args, **kwargs)
        raise TierUnavailable(self.name, f"call {call} ({verb.__name__}) broken by the test")


class Slow(Forwarding):
    """Sleeps before each call, by the clock it is given."""

    def __init__(self, tier: Tier, seconds: float, clock: Clock) -> None:
        super().__init__(tier)
        self.seconds = seconds
        self._clock = clock

    async def _through(self, verb: Callable[P, Coroutine[Any, Any, R]], *args: P.args, **kwargs: P.kwargs) -> R:
        await self._clock.sleep(self.seconds)
        return await verb(*args, **kwargs)


class Deaf(Forwarding):
    """Must not be asked: every call raises ``AssertionError``, but for the verbs in ``but``. It may be closed."""

    def __init__(self, tier: Tier, but: Container[str] = ()) -> None:
        super().__init__(tier)
        self._but = but

    async def _through(self, verb: Callable[P, Coroutine[Any, Any, R]], *args: P.args, **kwargs: P.kwargs) -> R:
        if verb.__name__ in self._but:
            return await verb(*args, **kwargs)
        raise AssertionError(f"{self.name} was asked: {verb.__name__}")


class Counting(Forwarding):
    """Counts calls by verb, in ``calls``."""

    def __init__(self, tier: Tier) -> None:
        super().__init__(tier)
        self.calls: Counter[str] = Counter()

    async def _through(self, verb: Callable[P, Coroutine[Any, Any, R]], *args: P.args, **kwargs: P.kwargs) -> R:
        self.calls[verb.__name__] += 1
        return await verb(*args, **kwargs)


class Refusing(Forwarding):
    """Refuses operations on the ids in ``ids`` (change the set at will); their neighbours go through."""

    def __init__(self, tier: Tier, ids: Iterable[str], reason: str = "refused by the test") -> None:
        super().__init__(tier)
        self.ids = set(ids)
        self.reason = reason

    async def apply(self, ops: Sequence[Op], /) -> Applied:
        """Apply the others."""
        applied = await super().apply([op for op in ops if op.object_id not in self.ids])
        refused = {op.object_id: StoreError(self.name, self.reason) for op in ops if op.object_id in self.ids}
        return replace(applied, refused={**applied.refused, **refused})
