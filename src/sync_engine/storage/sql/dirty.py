"""Dirty rows: those whose content or version has changed since somebody who processed them called them clean.

Every write raises the flag itself, in its own statement, where it changes one of the two (Q1, M10). Here it is asked
for, in order of ids and across all tables, and taken back, from rows alone that are still what was processed (Q4).

The index of the flag is the original's and has no ids, except on MySQL, where every index has the primary key. One in
order of ids would have to be kept in order by every write of every engine, for a question that few ask: with it a write
among 200,000 rows cost 1.6 times one among 10,000 (``make bench ARGS=growth``). So dirty rows are found by their flag,
and the server sorts them; where there are too many, the primary key is followed past the clean ones between them.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Sequence
from typing import Final

from sync_engine.errors import Corruption
from sync_engine.item import SyncItem
from sync_engine.storage.sql.buckets import buckets_of
from sync_engine.storage.sql.dialect import Session
from sync_engine.storage.sql.moving import bring, learn_if_new
from sync_engine.storage.sql.pages import PAGE_ROWS, range_of
from sync_engine.storage.sql.questions import Questions
from sync_engine.storage.sql.routing import Router
from sync_engine.storage.sql.rows import item_of
from sync_engine.storage.sql.words import Words

__all__ = ["call_clean", "count_dirty", "dirty_ids", "dirty_prefixes", "dirty_rows"]

SEEN_IDS: Final = 100
"""Ids read at a time in search of the next prefix: a few prefixes of many ids and many of one each cost alike."""

SORTED_MAX: Final = 20_000
"""Most dirty rows that are found by their flag to be sorted, anew for each page: that bounds what a page costs, however
many clean rows there are. Along the ids it costs what it passes of them (``make bench ARGS=dirty_pages``: both)."""

IDS_AT_ONCE: Final = 20_000
"""Ids that are read ahead of their rows: at 255 characters at most some megabytes, usually one."""

_Facts = tuple[int, int, str]
"""Stamp, version, SHA-256."""


async def dirty_ids(questions: Questions, router: Router, limit: int, prefix: str, after: str) -> list[str]:
    """``SqlStore.list_dirty_ids``, for checked arguments."""
    found = await _page(questions, router, prefix, after, limit)
    return list(dict.fromkeys(found))  # other programs may have written an id into two tables


async def dirty_rows(
    questions: Questions, router: Router, prefix: str, after: str, limit: int | None
) -> AsyncIterator[SyncItem | Corruption]:
    """``SqlStore.iter_dirty``, for checked arguments: what each dirty row is.

    Ids come first, so that of an id in two tables the row is read that every other question reads. One that is called
    clean between its id and its row is told all the same.
    """
    left = limit
    while left is None or left > 0:
        size = IDS_AT_ONCE if left is None else min(left, IDS_AT_ONCE)
        found = await _page(questions, router, prefix, after, size)
        ids = list(dict.fromkeys(found))
        for start in range(0, len(ids), PAGE_ROWS):
            some = ids[start : start + PAGE_ROWS]
            held = {row[0]: row for row in await questions.of_rows(Words.fetch, some)}
            for id_ in some:
                if id_ in held:  # or it was deleted meanwhile
                    yield item_of(held[id_])
            if left is not None:
                left -= len(held)
        if len(found) < size:
            return
        after = ids[-1]


async def _page(questions: Questions, router: Router, prefix: str, after: str, limit: int) -> list[str]:
    shape, bounds = range_of(prefix, after)
    found = await _sorted(questions, router, prefix, shape, bounds, limit)
    return await _walked(questions, router, prefix, shape, bounds, limit) if found is None else found


async def _sorted(
    questions: Questions, router: Router, prefix: str, shape: tuple[bool, bool], bounds: Sequence[str], limit: int
) -> list[str] | None:
    """A page found by the flags of the tables in question; None where too many are set, or the ids have an index."""
    if router.words().dirty_in_order:
        return None
    most = SORTED_MAX + 1
    # First of all, since the index of the flags has to be passed to its end, whatever the range.
    if await questions.number(lambda routes: router.under(routes, prefix).flags_set(most)) == most:
        return None
    rows = await questions.told(lambda routes: router.under(routes, prefix).ids_sorted(shape, bounds, limit, most))
    # Behind that count others may have written: what was cut has lost ids that the page should have.
    if max(count for _, count in rows) == most:
        return None
    return sorted(_texts(id_ for id_, _ in rows))  # no database promises the order of what a UNION is made of


async def _walked(
    questions: Questions, router: Router, prefix: str, shape: tuple[bool, bool], bounds: Sequence[str], limit: int
) -> list[str]:
    rows = await questions.told(lambda routes: router.under(routes, prefix).ids_dirty(shape, bounds, limit))
    return _texts(id_ for (id_,) in rows)


def _texts(ids: Iterable[object]) -> list[str]:
    """What can be the id of an item; SQLite keeps whatever others wrote, and has all bytes behind all texts."""
    return [id_ for id_ in ids if isinstance(id_, str)]


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

    some = await _sorted(questions, router, "", *range_of("", after or ""), SORTED_MAX)
    if some is not None:
        return sorted({first for first in map(_first, some) if after is None or first > after})[:limit]

    async def ids(shape: tuple[bool, bool], bounds: Sequence[str], most: int) -> list[str]:
        return await _walked(questions, router, "", shape, bounds, most)

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
    cleaned = 0
    for home, some in routes.by_home(ids).items():
        words = router.words(home)
        for start in range(0, len(some), words.ids_max):
            cleaned += await _clean(session, words, some[start : start + words.ids_max], facts)
    return cleaned


async def _clean(session: Session, words: Words, ids: Sequence[str], facts: dict[str, set[_Facts]]) -> int:
    dirty: dict[str, _Facts] = {}
    for id_, stamp, version, payload_hash, flag in await session.rows(words.flags(ids)):
        if flag == 1:
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
