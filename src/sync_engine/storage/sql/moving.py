"""Rows on their way to the tables of new routes: a page at a time, in order of ids, while everybody reads and writes.

A page is one transaction, in which its ids are locked as a writer locks them. Whatever ends it, every row is in one
table, the next call or start goes on, and several movers do each other no harm. When a pass has met everything there
was, no row can be left behind: since a route was announced, writers put its rows into its table and nowhere else.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Final

from sync_engine.clock import COUNTER_BITS
from sync_engine.ports import Clock
from sync_engine.storage.sql.buckets import EVERY_BUCKET, buckets_of
from sync_engine.storage.sql.dialect import Session
from sync_engine.storage.sql.lanes import Lane
from sync_engine.storage.sql.pages import range_of
from sync_engine.storage.sql.routing import Router, Routes
from sync_engine.storage.sql.rows import Row
from sync_engine.storage.sql.words import ROUTES_VERSION, Said

__all__ = ["Mover", "bring", "learn_if_new"]

PAGE_ROWS: Final = 200
"""Most rows moved in one transaction: with small ones a few milliseconds of everybody's."""

PAGE_BYTES: Final = 4 * 1024 * 1024
"""About as many bytes at most, beyond the first row."""

PAUSE_S: Final = 0.005
"""Between two pages. SQLite does not queue its writers: whoever waits looks again every few milliseconds."""

TOLD_ROWS: Final = 10_000
"""Rows moved between two lines in the log."""

_log = logging.getLogger(__name__)


async def learn_if_new(session: Session, router: Router, version: int) -> Routes:
    """The routes of this version, which was read in the transaction, with a bucket locked: it cannot change in it."""
    return router.routes if version == router.routes.version else await router.learn(session.rows)


async def bring(session: Session, router: Router, routes: Routes, ids: Sequence[str]) -> int:
    """Take the rows of these ids to where they belong, if they are elsewhere; how many were.

    In a transaction, the buckets of the ids locked.
    """
    brought = 0
    for home, some in routes.by_home(ids).items():
        if moving := [id_ for id_ in some if (route := routes.route_of(id_)) is not None and route.moving]:
            for source in routes.others(home):
                brought += await _take(session, router, moving, source, home)
    return brought


class Mover:
    """Moves what is not where it belongs, on a connection of its own. ``moved`` counts rows."""

    def __init__(self, lane: Lane, router: Router, clock: Clock, stopped: Callable[[], bool]) -> None:
        self.moved = 0
        self._lane = lane
        self._router = router
        self._clock = clock
        self._stopped = stopped
        self._told = 0

    async def empty(self, table: str) -> None:
        """Before there is a route to this table: take what another program has written there to where it belongs now.

        The newer of two rows of one id stays, by stamp and then by time; what was deleted since stays deleted.
        """
        after = ""
        while not self._stopped():
            page = _cut(await self._lane.rows(self._router.words(table).weighed(*range_of("", after), PAGE_ROWS)))
            if not page or not await self._lane.transaction(partial(self._give_away, page, table)):
                return
            after = page[-1]
            await self._clock.sleep(PAUSE_S)

    async def run(self) -> bool:
        """Move the rows of all new routes, and say when all are there; whether they are. False only when stopped."""
        while not self._stopped():
            routes = await self._router.learn(self._lane.rows)
            if not routes.moving:
                return True
            if await self._pass(routes) and await self._lane.transaction(partial(self._arrive, routes)):
                _log.info("all rows of %d prefixes are where they belong", len(routes.moving))
                await self._router.learn(self._lane.rows)
                return True
        return False

    async def _pass(self, routes: Routes) -> bool:
        """Once through everything; False where the routes have changed meanwhile, or it was stopped."""
        for route in routes.moving:
            for source in routes.others(route.table):
                after = ""
                words = self._router.words(source)
                while page := _cut(await self._lane.rows(words.weighed(*range_of(route.prefix, after), PAGE_ROWS))):
                    if self._stopped():
                        return False
                    after = page[-1]
                    ids = [id_ for id_ in page if routes.route_of(id_) is route]
                    if not ids:
                        continue  # of longer prefixes
                    moved = await self._lane.transaction(partial(self._move, routes.version, ids, source, route.table))
                    if moved is None:
                        return False
                    self._count(moved, route.table)
                    await self._clock.sleep(PAUSE_S)
        return True

    async def _move(self, version: int, ids: Sequence[str], source: str, home: str, own: Session) -> int | None:
        await own.lock(buckets_of(ids))
        if await self._version(own) != version:
            return None
        return await _take(own, self._router, ids, source, home)

    async def _give_away(self, ids: Sequence[str], table: str, own: Session) -> bool:
        await own.lock(buckets_of(ids))
        routes = await learn_if_new(own, self._router, await self._version(own))
        if table in routes.tables:
            return False  # somebody has registered it
        buried: dict[str, int] = dict(await own.rows(self._router.words().buried(ids)))
        await bring(own, self._router, routes, ids)
        for home, some in routes.by_home(ids).items():
            await _take(own, self._router, some, table, home, buried)
        return True

    async def _arrive(self, routes: Routes, own: Session) -> bool:
        await own.lock(EVERY_BUCKET)
        if await self._version(own) != routes.version:
            return False
        words = self._router.words()
        await own.run(words.arrived)
        await own.run(words.note_most(ROUTES_VERSION, routes.version + 1))
        return True

    async def _version(self, own: Session) -> int:
        ((_, version),) = await own.rows(self._router.words().before_writing)
        return int(version)

    def _count(self, moved: int, table: str) -> None:
        self.moved += moved
        if self.moved - self._told >= TOLD_ROWS:
            self._told = self.moved
            _log.info("moved %d rows so far, the last of them to %s", self.moved, table)


async def _take(
    session: Session, router: Router, ids: Sequence[str], source: str, home: str, buried: dict[str, int] | None = None
) -> int:
    """Rows of one table into another, as they are; how many. Of two rows of one id the newer one stays.

    Two there are only where a program that knows no routes has written; then ``buried`` says what must not come back.
    """
    old, new = router.words(source), router.words(home)
    taken = 0
    for start in range(0, len(ids), old.ids_max):
        ages = await _ages(session, old.ages(ids[start : start + old.ids_max]))
        if not ages:
            continue
        held = await _ages(session, new.ages(list(ages)))
        if buried is None:
            winning = [id_ for id_, age in ages.items() if id_ not in held or age > held[id_]]
        else:
            moments = {id_: _moment(age) for id_, age in ages.items()}
            winning = [id_ for id_ in ages if id_ not in held or moments[id_] > _moment(held[id_])]
            winning = [id_ for id_ in winning if moments[id_] > buried.get(id_, -1)]
            if older := len(ages) - len(winning):
                _log.info("%d rows of %s are older than what stands, and are left out", older, source)
        if losing := [id_ for id_ in winning if id_ in held]:
            await session.run(new.delete(losing))
        if winning:
            await session.run(new.take(winning, source))
        await session.run(old.delete(list(ages)))
        taken += len(winning)
    return taken


def _moment(age: tuple[int, int]) -> int:
    """When a row was written, as a stamp: a program that knows no routes may know no stamps, and has a clock."""
    stamp, timestamp = age
    return stamp or timestamp << COUNTER_BITS


async def _ages(session: Session, said: Said) -> dict[str, tuple[int, int]]:
    return {id_: (int(stamp), int(timestamp)) for id_, stamp, timestamp in await session.rows(said)}


def _cut(page: Sequence[Row]) -> list[str]:
    """The first ids of a page, as many as have about ``PAGE_BYTES``."""
    ids: list[str] = []
    size = 0
    for id_, weight in page:
        size += int(weight)
        if ids and size > PAGE_BYTES:
            break
        ids.append(id_)
    return ids
