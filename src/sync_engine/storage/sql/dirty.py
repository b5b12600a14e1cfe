"""Dirty rows: those whose content or version has changed since somebody who processed them called them clean.

Every write raises the flag itself, in its own statement, where it changes one of the two (Q1, M10). Here it is asked
for, in order of ids and across all tables, and taken back, from rows alone that are still what was processed (Q4).

The index of the flag is the original's and has no ids, except on MySQL, where every index has the primary key. One in
order of ids would have to be kept in order by every write of every engine, for a question that few ask: with it a write
among 200,000 rows cost 1.6 times one among 10,000 (``make bench ARGS=growth``). So few dirty rows are all found by
their flag and sorted here; where there are many, the primary key is followed past the clean ones between them.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Sequence
from typing import Final

from sync_engine.errors import Corruption
from sync_engine.item import SyncItem
from sync_engine.storage.sql.buckets import buckets_of
from sync_engine.storage.sql.dialect import Session
from sync_engine.storage.sql.moving import bring, learn_if_new
from sync_engine.storage.sql.pages import judged, range_of
from sync_engine.storage.sql.questions import Questions
from sync_engine.storage.sql.routing import Router
from sync_engine.storage.sql.rows import Row, item_of
from sync_engine.storage.sql.words import Words

__all__ = ["call_clean", "count_dirty", "dirty_ids", "dirty_prefixes", "dirty_rows"]

SEEN_IDS: Final = 100
"""Ids read at a time in search of the next prefix: a few prefixes of many ids and many of one each cost alike."""

FEW: Final = 1_000
"""Dirty rows that are read by their flag alone to be sorted: a millisecond or two."""

_Facts = tuple[int, int, str]
"""Stamp, version, SHA-256."""


async def dirty_ids(questions: Questions, router: Router, limit: int, prefix: str, after: str) -> list[str]:
    """``SqlStore.list_dirty_ids``, for checked arguments."""
    few = await _few(questions, router, prefix)
    if few is not None:
        return [id_ for id_ in few if id_ > after][:limit]
    return await _walked(questions, router, prefix, range_of(prefix, after), limit)


def dirty_rows(
    questions: Questions, router: Router, prefix: str, after: str, limit: int | None
) -> AsyncIterator[SyncItem | Corruption]:
    """``SqlStore.iter_dirty``, for checked arguments: what each dirty row is, page by page."""
    many = False

    async def page(after: str, size: int) -> list[Row]:
        nonlocal many
        few = None if many else await _few(questions, router, prefix)
        if few is not None:
            return await _rows_of(questions, [id_ for id_ in few if id_ > after], size)
        many = True
        shape, bounds = range_of(prefix, after)
        return await questions.told(lambda routes: router.under(routes, prefix).dirty(shape, bounds, size))

    return judged(page, after, limit)


async def _few(questions: Questions, router: Router, prefix: str) -> list[str] | None:
    """All dirty ids of a prefix in order, if there are few in its tables and their index has not got them in order."""
    if router.words().dirty_in_order:
        return None
    rows = await questions.told(lambda routes: router.under(routes, prefix).any_dirty(FEW + 1))
    return (
        None
        if len(rows) > FEW
        else sorted(
            id_
            for (id_,) in rows
            if isinstance(id_, str) and id_.startswith(prefix)  # SQLite keeps whatever others wrote
        )
    )


async def _walked(
    questions: Questions, router: Router, prefix: str, within: tuple[tuple[bool, bool], Sequence[str]], limit: int
) -> list[str]:
    shape, bounds = within
    rows = await questions.told(lambda routes: router.under(routes, prefix).ids_dirty(shape, bounds, limit))
    return [id_ for (id_,) in rows]


async def _rows_of(questions: Questions, ids: Sequence[str], size: int) -> list[Row]:
    """The rows of the first ids that have one; what was deleted meanwhile must not make a page look like the last."""
    rows: list[Row] = []
    for start in range(0, len(ids), size):
        rows += await questions.of_rows(Words.fetch, ids[start : start + size])
        if len(rows) >= size:
            break
    return sorted(rows, key=lambda row: str(row[0]))[:size]


async def count_dirty(questions: Questions, router: Router, prefix: str) -> int:
    """``SqlStore.count_dirty``, for checked arguments."""
    shape, bounds = range_of(prefix, "")
    return await questions.number(lambda routes: router.under(routes, prefix).count_dirty(shape, bounds))


async def dirty_prefixes(questions: Questions, router: Router, limit: int, after: str | None) -> list[str]:
    """``SqlStore.list_dirty_prefixes``, for checked arguments.

    Reads some ids, jumps behind all others of the last one's prefix, and so on: a statement and at most ``SEEN_IDS``
    ids per prefix, however many rows it has. In order of ids a prefix may come behind others that it is the beginning
    of: "a-1.x" is before "a.x", as the dash is before the dot, though "a" is before "a-1". So where ids are left in the
    end, each beginning of the last one that may still be a prefix is looked up: a statement for every such character.
    """

    few = await _few(questions, router, "")
    if few is not None:
        return sorted({first for first in map(_first, few) if after is None or first > after})[:limit]

    async def ids(shape: tuple[bool, bool], bounds: Sequence[str], most: int) -> list[str]:
        return await _walked(questions, router, "", (shape, bounds), most)

    def wanted(prefix: str) -> bool:
        return prefix not in found and (after is None or prefix > after)

    if not limit:
        return []
    found: set[str] = set()
    low, exclusive = after or "", after is not None
    while True:
        seen = await ids((exclusive, False), (low,), SEEN_IDS)
        found.update(filter(wanted, map(_first, seen)))
        if len(seen) < SEEN_IDS:
            return sorted(found)[:limit]
        last = _first(seen[-1])
        if len(found) >= limit:
            break
        # The slash is the character behind the dot.
        low, exclusive = (last, True) if last == seen[-1] else (last + "/", False)
    for end in (at for at, char in enumerate(last) if char < "."):
        before = last[:end]
        if wanted(before) and await ids((False, True), (before + ".", before + "/"), 1):
            found.add(before)
    return sorted(found)[:limit]


async def call_clean(session: Session, router: Router, processed: Iterable[SyncItem]) -> int:
    """``SqlStore.mark_clean``, in a transaction. A row is compared and then stays as it is until the end of it."""
    facts: dict[str, set[_Facts]] = {}
    for item in processed:
        facts.setdefault(item.object_id, set()).add(_facts_of(item))
    ids = sorted(facts)
    await session.lock(buckets_of(ids))
    ((_, version),) = await session.rows(router.words().before_writing)
    routes = await learn_if_new(session, router, int(version))
    if routes.moving:
        await bring(session, router, routes, ids)
    by_home: dict[str, list[str]] = {}
    for id_ in ids:
        by_home.setdefault(routes.home_of(id_), []).append(id_)
    cleaned = 0
    for home in sorted(by_home):
        words, some = router.words(home), by_home[home]
        for start in range(0, len(some), words.ids_max):
            cleaned += await _clean(session, words, some[start : start + words.ids_max], facts)
    return cleaned


async def _clean(session: Session, words: Words, ids: Sequence[str], facts: dict[str, set[_Facts]]) -> int:
    dirty: dict[str, _Facts] = {}
    for id_, stamp, version, payload_hash, flag in await session.rows(words.flags(ids)):
        if flag:
            dirty[id_] = (int(stamp), int(version), payload_hash)
    if hashless := [id_ for id_, (_, _, payload_hash) in dirty.items() if not payload_hash]:
        # The original leaves the hash out. Then only the content itself tells whether it is the one processed.
        for row in await session.rows(words.fetch(hashless)):
            if isinstance(item := item_of(row), SyncItem):
                dirty[item.object_id] = _facts_of(item)
    done = [id_ for id_, its in dirty.items() if its in facts[id_]]
    if done:
        await session.run(words.clean(done))
    return len(done)  # not what the driver says: MySQL's counts mean something else


def _facts_of(item: SyncItem) -> _Facts:
    return item.stamp, item.version, item.content_hash


def _first(object_id: str) -> str:
    return object_id.partition(".")[0]
