"""Questions to the tables: on the least busy connection, asked again where a schema was registered meanwhile.

An answer stands only if the routes that it was asked by were those of its moment. Their version only grows, so it is
enough to read it behind the answer: what it is then, it was before. What was found by its id needs not even that. So
there is no lock, no lease and no clock in it, and the questions are those of a store without routes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence

from sync_engine.errors import Corruption, TierUnavailable
from sync_engine.item import SyncItem, check_id, check_state
from sync_engine.storage.sql.lanes import Lane
from sync_engine.storage.sql.pages import Page, check_text, judged, paged, range_of
from sync_engine.storage.sql.routing import Router, Routes
from sync_engine.storage.sql.rows import Row
from sync_engine.storage.sql.words import ROUTES_VERSION, Said, Words

__all__ = ["Questions"]


class Questions:
    """What readers ask, on lanes of their own, by the routes that a router knows."""

    def __init__(self, lanes: Sequence[Lane], router: Router) -> None:
        self._lanes = lanes
        self._router = router
        self._closed = False

    async def rows(self, said: Said) -> list[Row]:
        """The rows of a statement that no route has a part in."""
        if self._closed:
            raise TierUnavailable("l3", "the store is closed")
        return await min(self._lanes, key=_running).rows(said)

    async def told(self, ask: Callable[[Routes], Said]) -> list[Row]:
        """The rows of a statement made by the routes, made again where those have changed meanwhile."""
        while True:
            routes = self._router.routes
            rows = await self.rows(ask(routes))
            if await self._hold(routes):
                return rows

    async def number(self, ask: Callable[[Routes], Said]) -> int:
        """The one number that such a statement answers with."""
        ((number,),) = await self.told(ask)
        return int(number)

    async def by_ids(self, verb: Callable[[Words, Sequence[str]], Said], ids: Sequence[str]) -> list[Row]:
        """The rows of these ids, by a verb of ``Words``. Raises ``InvalidId``."""
        return await self.of_rows(verb, [check_id(id_) for id_ in dict.fromkeys(ids)])

    async def of_rows(self, verb: Callable[[Words, Sequence[str]], Said], ids: Sequence[str]) -> list[Row]:
        """The same for ids that a table told, which others may have written into it. Each id once."""
        wanted = list(ids)
        rows: list[Row] = []
        while wanted:
            routes = self._router.routes
            fresh: list[Row] = []
            for places, some in routes.by_places(wanted).items():
                words = self._router.words(*places)
                for start in range(0, len(some), words.ids_max):
                    fresh += await self.rows(verb(words, some[start : start + words.ids_max]))
            fresh = await self._without_copies(verb, routes, fresh)
            rows += fresh
            if len(fresh) == len(wanted) and not routes.moving:
                break
            # A row that was found is the only one of its id, whatever the routes are now. Where none was, they decide.
            found = {row[0] for row in fresh}
            wanted = [id_ for id_ in wanted if id_ not in found]
            if not wanted or await self._hold(routes):
                break
        return rows

    def in_range(self, prefix: str, after: str | None, limit: int | None) -> AsyncIterator[SyncItem]:
        """Items of a prefix behind ``after``, page by page."""
        return paged(self._under(prefix, Words.range), check_text("after", after or ""), limit)

    def each_in_range(self, prefix: str) -> AsyncIterator[SyncItem | Corruption]:
        """What every row of a prefix is, page by page."""
        return judged(self._under(prefix, Words.range), "", None)

    def in_state(self, state: str, after: str | None, limit: int | None) -> AsyncIterator[SyncItem]:
        """Items in a state behind ``after``, page by page."""
        check_state(state)

        async def page(after: str, size: int) -> list[Row]:
            return await self.told(lambda routes: self._router.every(routes).in_state(state, after, size))

        return paged(page, check_text("after", after or ""), limit)

    def _under(self, prefix: str, verb: Callable[[Words, tuple[bool, bool], Sequence[str], int], Said]) -> Page:
        check_text("prefix", prefix)

        async def page(after: str, size: int) -> list[Row]:
            shape, bounds = range_of(prefix, after)
            return await self.told(lambda routes: verb(self._router.under(routes, prefix), shape, bounds, size))

        return page

    async def _without_copies(
        self, verb: Callable[[Words, Sequence[str]], Said], routes: Routes, rows: list[Row]
    ) -> list[Row]:
        """One row of each id: of several, which only programs that know no routes leave, that of the table where it
        belongs."""
        by_id = {row[0]: row for row in rows}
        if len(by_id) == len(rows):
            return rows
        copied = [id_ for id_, count in Counter(row[0] for row in rows).items() if count > 1]
        for home, some in routes.by_home(copied).items():
            words = self._router.words(home)
            for start in range(0, len(some), words.ids_max):
                at_home = await self.rows(verb(words, some[start : start + words.ids_max]))
                by_id.update((row[0], row) for row in at_home)
        return list(by_id.values())

    async def _hold(self, routes: Routes) -> bool:
        """Whether the routes are those of this moment, and so were those of every question before; else learn them."""
        found = await self.rows(self._router.words().meta(ROUTES_VERSION))
        if (int(found[0][0]) if found else 0) == routes.version:
            return True
        await self._router.learn(self.rows)
        return False

    def stop(self) -> None:
        """Take no more questions."""
        self._closed = True


def _running(lane: Lane) -> int:
    return lane.running
