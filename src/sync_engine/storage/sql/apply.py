"""One batch of operations inside one transaction: what each meets, what is written, what is told back.

The caller opens and ends the transaction. Before anything is read the buckets of the ids are locked, so that what was
read still holds when it is written, however many engines write. Decisions follow the stamps: the newer one wins, a
tombstone is a stamp too, stamp 0 is unordered and always wins. Ids go in order, so that writers who know no buckets
take locks alike.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from itertools import zip_longest
from typing import Final, NamedTuple

from sync_engine.clock import COUNTER_BITS
from sync_engine.errors import StoreError, SyncEngineError, VersionConflict
from sync_engine.item import Op, SyncItem
from sync_engine.ports import Applied
from sync_engine.storage.sql.buckets import bucket_of, buckets_of
from sync_engine.storage.sql.dialect import BUCKETS, RowRefused, Session, nothing
from sync_engine.storage.sql.moving import bring, learn_if_new
from sync_engine.storage.sql.routing import DEFAULT, Router, Routes
from sync_engine.storage.sql.rows import Value, item_of, row_of
from sync_engine.storage.sql.tables import TOMBSTONE_LIFE_MS
from sync_engine.storage.sql.words import FORGOTTEN, Said, Words
from sync_engine.turns import at_once, give_way

__all__ = ["apply_ops", "shared_out"]

SHARE_MIN: Final = 250
"""Operations that are worth a transaction of their own: below, its commit costs more than is gained."""

LOOKED_AT_MAX: Final = 4_000
"""Outdated tombstones among which those of a few buckets are looked for."""

ROW_BYTES: Final = 512
"""About what a row binds beside its content."""


class _Held(NamedTuple):
    stamp: int
    version: int
    payload_hash: str
    state: str


_NOTHING: Final = _Held(0, 0, "", "")


async def apply_ops(
    session: Session, router: Router, ops: Sequence[Op], now_ms: int, batch_id: str | None = None
) -> Applied:
    """Apply the newest operation of each id. Raises ``TierUnavailable`` or ``StoreError`` about the whole batch."""
    newest = _newest_per_id(ops)
    words = router.words()
    locked = buckets_of(op.object_id for op in newest)
    await session.lock(locked)
    outdated = await _outdated(session, words, newest, now_ms, locked)
    ((any_buried, version),) = await session.rows(words.before_writing)
    routes = await learn_if_new(session, router, int(version))
    if routes.moving:
        await bring(session, router, routes, [op.object_id for op in newest])
    batch = _Batch(session, words, now_ms, bool(any_buried), batch_id)
    for table, its in _by_table(routes, newest).items():
        batch.words = router.words(table)
        chunks = list(_chunks(its, words.rows_max, session.bytes_max))
        for chunk, following in zip_longest(chunks, chunks[1:], fillvalue=()):
            await batch.apply(chunk, following)
    for start in range(0, len(outdated), words.ids_max):
        await session.run(words.prune(outdated[start : start + words.ids_max], now_ms - TOMBSTONE_LIFE_MS))
    if outdated:
        await session.run(words.note_most(FORGOTTEN, now_ms - TOMBSTONE_LIFE_MS))
    # Last: all writers meet at this row, and the next one waits there until this one has committed.
    if stamp := max((op.stamp for op in newest), default=0):
        await session.run(words.note_most("newest_stamp", stamp))
    return Applied(
        superseded=frozenset(batch.superseded),
        refused=batch.refused,
        restated=batch.restated,
        existed=frozenset(batch.existed),
        spared=frozenset(batch.spared),
    )


async def _outdated(session: Session, words: Words, ops: Sequence[Op], now_ms: int, locked: Sequence[int]) -> list[str]:
    """Tombstones to prune, if this batch may add any: twice as many, so that those of a steady stream stay bounded.

    Of the locked buckets alone: a statement that found and removed them in one would take the rows in an order of its
    own, and on MySQL end in deadlocks with those who bury.
    """
    may_bury = sum(op.kind == "delete" or not op.sql for op in ops)
    if not may_bury:
        return []
    most = 2 * may_bury
    # Twice as many as have them on average.
    looked_at = min(2 * most * BUCKETS // len(locked), LOOKED_AT_MAX)
    oldest = await session.rows(words.outdated(now_ms - TOMBSTONE_LIFE_MS, max(most, looked_at)))
    ours = frozenset(locked)
    return [id_ for (id_,) in oldest if bucket_of(id_) in ours][:most]


def shared_out(ops: Sequence[Op], writers: int) -> list[Sequence[Op]]:
    """The operations for so many writers at most, none of which has to wait for a bucket of another one.

    What is answered by what the table holds stays in one transaction: were it in one that stood beside another that
    failed, all would be sent again, and the answer be of what others have written since.
    """
    count = min(writers, len(ops) // SHARE_MIN)
    if count < 2 or any(op.if_version is not None or op.only_in_state is not None for op in ops):
        return [ops]
    shares: list[list[Op]] = [[] for _ in range(count)]
    for op in ops:
        shares[bucket_of(op.object_id) * count // BUCKETS].append(op)
    return [share for share in shares if share]


class _Batch:
    """The outcome so far."""

    def __init__(self, session: Session, words: Words, now_ms: int, any_buried: bool, batch_id: str | None) -> None:
        self.words = words
        """About the table in question."""
        self._session = session
        self._now_ms = now_ms
        self._any_buried = any_buried
        self._batch_id = batch_id
        self.superseded: set[str] = set()
        self.refused: dict[str, SyncEngineError] = {}
        self.restated: dict[str, SyncItem] = {}
        self.existed: set[str] = set()
        self.spared: set[str] = set()
        self._following: Sequence[Op] = ()
        self._rows: dict[str, tuple[Value, ...]] = {}
        """Made, and not sent yet."""

    async def apply(self, ops: Sequence[Op], following: Sequence[Op]) -> None:
        """One chunk: at most ``rows_max`` operations, one per id, in order of ids."""
        session, words = self._session, self.words
        self._following = following
        ids = [op.object_id for op in ops]
        buried: dict[str, int] = {}
        if self._any_buried:
            buried = dict(await session.rows(words.buried(ids)))
        held: dict[str, _Held] = {}
        if any(op.kind != "put" or not op.sql or op.if_version is not None for op in ops):
            held = {id_: _Held(*facts) for id_, *facts in await session.rows(words.held(ids))}
        puts, deletes, restates = [], [], []
        for op in ops:
            if op.if_version is not None and self._conflicts(op, held.get(op.object_id), buried.get(op.object_id, 0)):
                continue
            if op.only_in_state is not None and _is_spared(op, held.get(op.object_id), buried.get(op.object_id, 0)):
                self.spared.add(op.object_id)
                continue
            if 0 < op.stamp < buried.get(op.object_id, 0):
                self.superseded.add(op.object_id)
            elif op.kind == "put" and op.sql:
                puts.append(op)
            elif op.kind == "restate":
                restates.append(op)
            else:  # a put that SQL does not keep removes the older copy here
                deletes.append(op)
        if puts:
            await self._put(puts, buried)
        if deletes:
            await self._delete(deletes, held, buried)
        if restates:
            await self._restate(restates, held)

    def _conflicts(self, op: Op, held: _Held | None, buried: int) -> bool:
        expected = op.if_version or 0
        matches = held.version == expected > 0 if held is not None else expected == 0
        newest = max(held.stamp if held is not None else 0, buried)
        # Of the very stamp: this operation was applied before, and is being replayed. Of an older one, from a clock
        # that is behind: it could not be written over what stands, and must not be said to have been.
        if 0 < op.stamp == newest or (matches and not 0 < op.stamp < newest):
            return False
        self.refused[op.object_id] = VersionConflict(op.object_id, expected, held.version if held else 0)
        return True

    async def _put(self, puts: Sequence[Op], buried: dict[str, int]) -> None:
        written = 0
        for part in self.words.parts(puts):
            written += await self._isolating(part, self._upsert)
        accepted = [op for op in puts if op.object_id not in self.refused]
        if accepted and (written != len(accepted) or not self.words.counts_writes):
            # Fewer rows changed than were sent: some were newer. Which ones, the table knows.
            held = await self._session.rows(self.words.held([op.object_id for op in accepted]))
            stands = {id_: _Held(*facts) for id_, *facts in held}
            self.superseded.update(op.object_id for op in accepted if _is_newer(stands.get(op.object_id), op))
        if buried:
            # The row's own stamp says more now. An unordered put has none, so there the tombstone keeps its watch.
            outlived = [op.object_id for op in accepted if op.stamp >= buried.get(op.object_id, 0) > 0 and op.stamp > 0]
            await self._by_ids(self.words.exhume, outlived)

    async def _upsert(self, ops: Sequence[Op]) -> int:
        await self._make(ops)
        rows = [self._rows.pop(op.object_id) for op in ops]
        return await self._session.attempt(self.words.upsert(rows), self._look_ahead if self._following else nothing)

    async def _look_ahead(self) -> None:
        """Hash and make the rows of the next chunk while the database writes this one: two thirds of the time each."""
        following, self._following = [op for op in self._following if op.kind == "put" and op.sql], ()
        await self._make(following)

    async def _make(self, ops: Sequence[Op]) -> None:
        rows, batch_id = self._rows, self._batch_id
        start = 0
        while start < len(ops):
            if start:
                await give_way()
            end = start + at_once()
            for op in ops[start:end]:
                if op.object_id not in rows and op.item is not None:
                    rows[op.object_id] = row_of(op.item, op.stamp, batch_id)
            start = end

    async def _delete(self, deletes: Sequence[Op], held: dict[str, _Held], buried: dict[str, int]) -> None:
        losing = {op.object_id for op in deletes if op.stamp and held.get(op.object_id, _NOTHING).stamp > op.stamp}
        self.superseded |= losing
        winning = [op for op in deletes if op.object_id not in losing]
        present = [op for op in winning if op.object_id in held]
        if present:
            await self._isolating(
                present, lambda part: self._session.attempt(self.words.delete([op.object_id for op in part]))
            )
        done = [op for op in winning if op.object_id not in self.refused]
        self.existed.update(op.object_id for op in done if op.object_id in held)
        for part in self.words.parts([op for op in done if op.stamp]):
            rows = [(op.object_id, op.stamp, max(self._now_ms, op.stamp >> COUNTER_BITS)) for op in part]
            await self._session.run(self.words.bury(rows))
        # An unordered delete starts the id afresh.
        await self._by_ids(self.words.exhume, [op.object_id for op in done if not op.stamp and op.object_id in buried])

    async def _restate(self, restates: Sequence[Op], held: dict[str, _Held]) -> None:
        changing, told = [], []
        for op in restates:
            facts = held.get(op.object_id)
            if facts is None or op.state is None:
                continue
            if not op.stamp or op.stamp > facts.stamp:
                changing.append(op)
            elif op.stamp == facts.stamp and op.state == facts.state:
                told.append(op.object_id)  # applied before, and being replayed: the caller still needs the row
            else:
                self.superseded.add(op.object_id)
        for part in self.words.parts(changing):
            await self._isolating(
                part,
                lambda part: self._session.attempt(
                    self.words.restate([(op.object_id, op.state, op.stamp) for op in part])
                ),
            )
        told += [op.object_id for op in changing if op.object_id not in self.refused]
        if told:
            for row in await self._session.rows(self.words.fetch(told)):
                if isinstance(item := item_of(row), SyncItem):
                    self.restated[item.object_id] = item

    async def _by_ids(self, verb: Callable[[Sequence[str]], Said], ids: Sequence[str]) -> None:
        if ids:
            await self._session.run(verb(ids))

    async def _isolating(self, ops: Sequence[Op], run: Callable[[Sequence[Op]], Awaitable[int]]) -> int:
        """Run a statement about some operations; halve it on refusal until what is refused stands alone (Q9, I7).

        Answers how many rows changed.
        """
        try:
            return await run(ops)
        except RowRefused as refusal:
            if not self._session.in_transaction:  # a trigger may roll everything back; then nothing is written
                raise StoreError(refusal.tier, f"{refusal.reason} (the whole batch was rolled back)") from refusal
            if len(ops) == 1:
                self.refused[ops[0].object_id] = StoreError(refusal.tier, refusal.reason)
                return 0
        # Half of a power of two is one again, as some texts need it.
        middle = 1 << (len(ops) - 1).bit_length() - 1
        return await self._isolating(ops[:middle], run) + await self._isolating(ops[middle:], run)


def _newest_per_id(ops: Iterable[Op]) -> list[Op]:
    """One operation per id in id order; the port promises no more than one, and two would be applied in any order."""
    newest: dict[str, Op] = {}
    for op in ops:
        held = newest.get(op.object_id)
        if held is None or op.stamp >= held.stamp or not op.stamp:
            newest[op.object_id] = op
    return [newest[id_] for id_ in sorted(newest)]


def _by_table(routes: Routes, ops: Sequence[Op]) -> dict[str, Sequence[Op]]:
    """The operations by the table that their ids belong to, in an order of tables that is every writer's."""
    if not routes.by_prefix:
        return {DEFAULT: ops}
    by_id = {op.object_id: op for op in ops}
    return {table: [by_id[id_] for id_ in ids] for table, ids in routes.by_home(by_id).items()}


def _chunks(ops: Sequence[Op], rows_max: int, bytes_max: int) -> Iterator[Sequence[Op]]:
    """Runs of at most so many operations and, beyond the first of each, about so many bytes."""
    start = size = 0
    for end, op in enumerate(ops):
        more = ROW_BYTES + (len(op.item.content) if op.item is not None else 0)
        if end > start and (end - start == rows_max or size + more > bytes_max):
            yield ops[start:end]
            start, size = end, 0
        size += more
    if start < len(ops):
        yield ops[start:]


def _is_spared(op: Op, held: _Held | None, buried: int) -> bool:
    if held is None:
        return buried != op.stamp  # equal: it was applied before, and is being replayed
    return max(held.stamp, buried) > op.stamp or op.only_in_state not in ("", held.state)


def _is_newer(held: _Held | None, op: Op) -> bool:
    if held is None or not op.stamp or op.item is None:
        return False
    return held.stamp > op.stamp or (held.stamp == op.stamp and held.payload_hash > op.item.content_hash)
