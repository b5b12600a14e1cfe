"""What L3 does, whatever the database: the verbs. Who answers them is in the files beside this one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Sequence
from functools import partial
from typing import Final
from uuid import uuid4

from sync_engine.clock import SystemClock
from sync_engine.errors import ConfigError, Corruption, InvalidItem
from sync_engine.item import Op, SyncItem, check_id, check_state
from sync_engine.owned import outlasting
from sync_engine.ports import Applied, BatchWriteResult, Changes, Clock, Fetched
from sync_engine.schema import check_schema
from sync_engine.storage.sql import history
from sync_engine.storage.sql.connect import database_of
from sync_engine.storage.sql.dialect import Database, Session
from sync_engine.storage.sql.dirty import call_clean, count_dirty, dirty_ids, dirty_prefixes, dirty_rows
from sync_engine.storage.sql.lanes import Lane
from sync_engine.storage.sql.migrate import prepare
from sync_engine.storage.sql.pages import PAGE_ROWS, check_limit, check_text, range_of, sound
from sync_engine.storage.sql.questions import Questions
from sync_engine.storage.sql.routing import Router
from sync_engine.storage.sql.rows import item_of
from sync_engine.storage.sql.schemas import Schemas
from sync_engine.storage.sql.verify import Verification, verify
from sync_engine.storage.sql.words import Words
from sync_engine.storage.sql.writers import Writers

__all__ = ["SqlStore"]

CLEANED_AT_ONCE: Final = 1_000
"""Rows that one transaction calls clean: it holds what writers wait for."""

READERS: Final = 2
"""Connections for reading: one may be busy with a long scan while the other answers single gets."""


class SqlStore:
    """Items in a SQL database. Made by ``SqlStore.connect``.

    Every method raises ``TierUnavailable`` where the database cannot be asked (locked, full, gone), ``StoreError``
    where it refuses the call, and ``InvalidItem`` for an argument that breaks a rule, before anything is asked.
    Reads never wait for writers. A transaction runs in a task of the store: cancelling the caller leaves it to
    finish, never open.
    """

    name = "l3"

    def __init__(
        self,
        database: Database,
        first: Session,
        clock: Clock,
        router: Router,
        tables_made: bool = False,
        writers: int = 1,
    ) -> None:
        self.tables_made = tables_made
        """Whether connecting has made the tables, or changed them."""
        self._database = database
        # The connections there will ever be, but for one while rows are moved. The first is there; the others are
        # opened when they have something to do.
        self._writers = [Lane(database, first), *(Lane(database) for _ in range(writers - 1))]
        self._readers = [Lane(database) for _ in range(READERS)]
        self._questions = Questions(self._readers, router)
        self._rows = self._questions.rows
        self._router = router
        self._writing = Writers(self._writers, router, clock)
        self._schemas = Schemas(database, router, clock)
        self._words = router.words()
        self._closing: asyncio.Task[None] | None = None

    @classmethod
    async def connect(
        cls, url: str, *, timeout_ms: int = 5000, clock: Clock | None = None, write_concurrency: int = 1
    ) -> SqlStore:
        """Open the database that the URL names (SQLite: or make it), and make its tables.

        ``sqlite:///path``, ``mysql://user:password@host/database`` (or ``mariadb://``) and
        ``postgresql://user:password@host/database``; options and TLS in docs/operations.md. ``timeout_ms`` is how long
        a write waits for the lock of another one. ``write_concurrency`` (1 to 64) is into how many transactions, each
        on a connection of its own, a large batch is split; SQLite has one writer and ignores it. Raises
        ``ConfigError`` for a URL that is not supported or a driver that is missing, ``StoreError`` for a database that
        is not ours to use, ``TierUnavailable`` for one that cannot be reached or is locked.
        """
        if type(timeout_ms) is not int or not 1 <= timeout_ms <= 600_000:
            raise ConfigError(f"timeout_ms = {timeout_ms!r}: must be an integer from 1 to 600000")
        if type(write_concurrency) is not int or not 1 <= write_concurrency <= 64:
            raise ConfigError(f"write_concurrency = {write_concurrency!r}: must be an integer from 1 to 64")
        clock = clock or SystemClock()
        database = database_of(url, timeout_ms)
        session = None
        try:
            session = await database.open()
            tables_made = await prepare(database, session, clock.now_ms())
            router = Router(database)
            routes = await router.learn(session.rows)
        except BaseException:  # cancelled or failed alike: the caller has no store to close
            if session is not None:
                await session.close()
            await database.close()
            raise
        writers = 1 if database.one_writer else write_concurrency
        store = cls(database, session, clock, router, tables_made, writers)
        if routes.moving:
            store._writing.running.alone(store._schemas.resume())
        return store

    # The port: many ids first, facts back.

    async def fetch(self, ids: Sequence[str], /) -> Fetched:
        """Everything held of these ids, each content checked against its SHA-256."""
        fetched = Fetched()
        for row in await self._questions.by_ids(Words.fetch, ids):
            item = item_of(row)
            if isinstance(item, SyncItem):
                fetched.items[item.object_id] = item
            else:
                fetched.corrupt[item.object_id] = item
        return fetched

    async def exists_batch(self, ids: Sequence[str], /) -> list[bool]:
        """Whether each id is held, in input order."""
        held = {id_ for (id_,) in await self._questions.by_ids(Words.existing, ids)}
        return [id_ in held for id_ in ids]

    async def apply(self, ops: Sequence[Op], /) -> Applied:
        """Apply at most one operation per id, durably when this returns: in one transaction, or one per writer.

        Per item: an older stamp than the table's is superseded, a row that the database refuses or a version
        that differs from ``if_version`` is refused, and the rest goes through. If this raises, the outcome is
        unknown; applying the batch again is safe.
        """
        return await self._writing.apply(ops)

    async def list_state_ids(self, state: str, limit: int = 1000, *, after: str | None = None) -> list[str]:
        """Ids in the state, ascending, those greater than ``after``."""
        values = (check_state(state), check_text("after", after or ""), check_limit(limit))
        rows = await self._questions.told(lambda routes: self._router.every(routes).ids_in_state(*values))
        return [id_ for (id_,) in rows]

    async def count_by_state(self, state: str, /) -> int:
        """How many items are in the state."""
        check_state(state)
        return await self._questions.number(lambda routes: self._router.every(routes).count_state(state))

    async def get_by_state(self, state: str, limit: int = 1000, *, after: str | None = None) -> list[SyncItem]:
        """Items in the state, ascending by id, those greater than ``after``. Raises ``Corruption``."""
        return [item async for item in self._questions.in_state(state, after, check_limit(limit))]

    async def scan_prefix(self, prefix: str, limit: int = 1000, *, after: str | None = None) -> list[SyncItem]:
        """Items whose id starts with the prefix, ascending by code point, those greater than ``after``.

        The empty prefix means all items. Raises ``Corruption``.
        """
        return [item async for item in self._questions.in_range(prefix, after, check_limit(limit))]

    async def list_prefix_ids(self, prefix: str, limit: int = 1000, *, after: str | None = None) -> list[str]:
        """Ids that start with the prefix, ascending by code point, those greater than ``after``."""
        shape, bounds = range_of(check_text("prefix", prefix), check_text("after", after or ""))
        check_limit(limit)
        rows = await self._questions.told(
            lambda routes: self._router.under(routes, prefix).ids_in_range(shape, bounds, limit)
        )
        return [id_ for (id_,) in rows]

    async def count_prefix(self, prefix: str, /) -> int:
        """How many ids start with the prefix; the empty prefix counts all."""
        shape, bounds = range_of(check_text("prefix", prefix), "")
        return await self._questions.number(
            lambda routes: self._router.under(routes, prefix).count_range(shape, bounds)
        )

    async def newest_stamp(self) -> int:
        """A stamp that no write this store has accepted exceeds; 0 when it never accepted one."""
        ((stamp,),) = await self._rows(self._words.meta("newest_stamp"))
        return int(stamp)

    async def held_stamps(self, ids: Sequence[str], /) -> dict[str, int]:
        """The stamps of the rows that there are."""
        return dict(await self._questions.by_ids(Words.stamps, ids))

    async def buried_stamps(self, ids: Sequence[str], /) -> dict[str, int]:
        """The stamps of the tombstones that there are."""
        wanted = [check_id(id_) for id_ in dict.fromkeys(ids)]
        parts = [wanted[at : at + self._words.ids_max] for at in range(0, len(wanted), self._words.ids_max)]
        return dict([row for part in parts for row in await self._rows(self._words.buried(part))])

    async def changed_since(self, stamp: int, after: tuple[int, str] | None = None, limit: int = PAGE_ROWS) -> Changes:
        """Rows and tombstones of that stamp or newer, page by page, ascending by stamp and id."""
        check_limit(limit)
        return await history.changed_since(self._questions.told, self._router.every, stamp, after, limit)

    async def forgotten(self) -> int:
        """A stamp below which tombstones may have been removed."""
        return await history.forgotten(self._rows, self._words)

    async def note_late(self, at_ms: int, stamp: int, /) -> None:
        """Remember durably that from this moment on a cache is given an operation of this old stamp."""
        await self._writing.transaction(lambda own: history.note_late(own, self._words, at_ms, stamp))

    async def late_since(self, at_ms: int, /) -> int | None:
        """The oldest stamp noted as late at that moment or after it."""
        return await history.late_since(self._rows, self._words, at_ms)

    async def register_schema(self, name: str, prefixes: Iterable[str], /) -> int:
        """Keep the ids that begin with one of these prefixes in a table of their own, ``{name}_items``.

        Returns how many rows were moved there, once all are; meanwhile everything is served. Of several prefixes the
        longest counts; one that belongs to another schema comes to this one. Remembered by the database: every store
        on it knows, and a call that is repeated does nothing, or goes on where an earlier one ended. Cancelling the
        caller leaves it to finish. Raises ``InvalidItem``, ``ConfigError`` at a bound, ``StoreError`` where a table
        of this name is none of items.
        """
        checked = check_schema(name, prefixes)
        return await self._writing.owned(lambda: self._schemas.register(name, checked))

    async def close(self) -> None:
        """Finish what runs, then close the connections. Safe to call twice."""
        if self._closing is None:
            self._writing.stop()
            self._questions.stop()
            self._schemas.stop()
            self._closing = asyncio.get_running_loop().create_task(self._close())
        await outlasting(self._closing)

    # The same in the words of RedisStore, for one item or for items without operations around them.

    async def get(self, object_id: str) -> SyncItem | None:
        """The item, or None where there is none. Raises ``Corruption`` where its content fails its SHA-256."""
        rows = await self._questions.by_ids(Words.fetch, [object_id])
        return sound(item_of(rows[-1])) if rows else None

    async def get_many(self, ids: Sequence[str]) -> dict[str, SyncItem]:
        """The items held of these ids. Raises ``Corruption``; ``fetch`` tells of bad ones beside the good."""
        fetched = await self.fetch(ids)
        for corruption in fetched.corrupt.values():
            raise corruption
        return fetched.items

    async def put(self, item: SyncItem) -> None:
        """Store one item, unless the table holds a newer stamp of it; stamp 0 always replaces."""
        applied = await self.apply([_put(item)])
        for refusal in applied.refused.values():
            raise refusal

    async def put_batch(self, items: Iterable[SyncItem]) -> BatchWriteResult:
        """Store items as ``apply`` does; of several with one id the last counts. ``failed`` maps id to reason."""
        batch_id = str(uuid4())
        ops = {item.object_id: _put(item) for item in items}
        applied = await self._writing.apply(list(ops.values()), batch_id)
        return BatchWriteResult(
            batch_id=batch_id,
            written=len(ops) - len(applied.superseded) - len(applied.refused),
            verified=not applied.refused,
            failed={id_: str(refusal) for id_, refusal in applied.refused.items()},
            superseded=applied.superseded,
        )

    async def delete(self, object_id: str) -> bool:
        """Remove an item whatever its stamp; whether there was one."""
        return await self.delete_many([object_id]) == 1

    async def delete_many(self, ids: Sequence[str]) -> int:
        """Remove items whatever their stamps, as ``apply`` does; how many there were."""
        ops = [Op(kind="delete", object_id=check_id(id_), stamp=0) for id_ in dict.fromkeys(ids)]
        applied = await self.apply(ops)
        for refusal in applied.refused.values():
            raise refusal
        return len(applied.existed)

    async def exists(self, object_id: str) -> bool:
        """Whether the id is held."""
        return (await self.exists_batch([object_id]))[0]

    async def count(self) -> int:
        """How many items there are."""
        return await self._questions.number(lambda routes: self._router.every(routes).count)

    async def iter_prefix(self, prefix: str) -> AsyncIterator[SyncItem]:
        """All items whose id starts with the prefix, page by page; writes in between may or may not be seen."""
        async for item in self._questions.in_range(prefix, None, None):
            yield item

    async def iter_by_state(self, state: str) -> AsyncIterator[SyncItem]:
        """All items in the state, page by page; writes in between may or may not be seen."""
        async for item in self._questions.in_state(state, None, None):
            yield item

    # What has changed since somebody processed it, and whether all is as it should be.

    async def list_dirty_ids(self, limit: int = 1000, *, prefix: str = "", after: str | None = None) -> list[str]:
        """Ids of dirty rows that start with the prefix, ascending by code point, those greater than ``after``.

        A row is dirty from any write that changed its content or version until ``mark_clean``. Go on with ``after``
        until none comes: more than 20,000 dirty rows are found by passing the clean ones between them (docs/limits.md).
        """
        check_text("prefix", prefix)
        after = check_text("after", after or "")
        return await dirty_ids(self._questions, self._router, check_limit(limit), prefix, after)

    async def get_dirty(
        self, limit: int = 1000, *, prefix: str = "", after: str | None = None
    ) -> list[SyncItem | Corruption]:
        """The dirty rows behind ``list_dirty_ids``: each an item or, where it can be none, its ``Corruption``.

        Not raised, so that it hides none of its neighbours: both have an ``object_id`` to go on behind (Q3).
        """
        return [found async for found in self._dirty(prefix, after, check_limit(limit))]

    async def iter_dirty(self, prefix: str = "") -> AsyncIterator[SyncItem | Corruption]:
        """All of ``get_dirty``, page by page; writes in between may or may not be seen."""
        async for found in self._dirty(prefix, None, None):
            yield found

    async def count_dirty(self, prefix: str = "") -> int:
        """How many dirty rows start with the prefix, damaged ones included."""
        return await count_dirty(self._questions, self._router, check_text("prefix", prefix))

    async def list_dirty_prefixes(self, limit: int = 1000, *, after: str | None = None) -> list[str]:
        """What dirty ids have before their first dot, or are where they have none: each once, ascending, > ``after``.

        Over 20,000 dirty rows cost a short statement per prefix, or per hundred of them, past the clean ones.
        """
        after = None if after is None else check_text("after", after)
        return await dirty_prefixes(self._questions, self._router, check_limit(limit), after)

    async def mark_clean(self, items: Iterable[SyncItem]) -> int:
        """Call rows clean that are still what was processed: by SHA-256, version and stamp. How many were dirty.

        What has been written since stays dirty, a stamped change of state included (Q4). Each ``CLEANED_AT_ONCE`` in a
        transaction of their own, so that other writers do not wait for all; a row without a hash (the original writes
        such) is read, and compared by its content. Raises ``InvalidItem`` for what is no item, before anything is done.
        """
        processed = _items(items)
        cleaned = 0
        for start in range(0, len(processed), CLEANED_AT_ONCE):
            some = processed[start : start + CLEANED_AT_ONCE]
            cleaned += await self._writing.transaction(partial(call_clean, router=self._router, processed=some))
        return cleaned

    async def verify_batch(self, items: Iterable[SyncItem]) -> Verification:
        """Whether the rows hold these items: hash, version and state, as recorded beside the contents, which are not
        read; but those of rows that have no hash are. Of several items with one id the last counts."""
        return await verify(self._questions, self.buried_stamps, _items(items))

    async def iter_corrupt(self, prefix: str = "") -> AsyncIterator[Corruption]:
        """Every damaged row, and every one that can be no item. Reads all contents, a page of rows at a time.

        A row without a hash cannot be checked and counts as sound.
        """
        async for found in self._questions.each_in_range(prefix):
            if isinstance(found, Corruption):
                yield found

    def __repr__(self) -> str:
        condition = "open" if self._closing is None else "closed"
        return f"<SqlStore {self._database!r} {condition} | {len(self._writing.running)} writes running>"

    # How.

    def _dirty(self, prefix: str, after: str | None, limit: int | None) -> AsyncIterator[SyncItem | Corruption]:
        after = check_text("after", after or "")
        return dirty_rows(self._questions, self._router, check_text("prefix", prefix), after, limit)

    async def _close(self) -> None:
        await self._writing.close()
        for lane in self._readers:
            await lane.close()
        await self._database.close()


def _items(given: Iterable[SyncItem]) -> list[SyncItem]:
    items = list(given)
    for each in items:
        if not isinstance(each, SyncItem):  # get_dirty tells of damaged rows as well
            raise InvalidItem("items", f"a {type(each).__name__}", "must be items")
    return items


def _put(item: SyncItem) -> Op:
    return Op(kind="put", object_id=item.object_id, stamp=item.stamp, item=item)
