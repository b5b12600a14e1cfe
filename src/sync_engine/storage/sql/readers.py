"""Questions to the tables: on the least busy connection, asked again where a schema was registered meanwhile.

An answer stands only if the routes that it was asked by were those of its moment. What asks for ids has their version
in the same statement; what asks for pages or counts reads it behind. So there is no lock, no lease and no clock in it.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from typing import Final

from sync_engine.errors import TierUnavailable
from sync_engine.item import SyncItem, check_id, check_state
from sync_engine.storage.sql.dialect import Database
from sync_engine.storage.sql.lanes import Lane
from sync_engine.storage.sql.pages import check_text, paged, range_of
from sync_engine.storage.sql.routing import Router, Routes
from sync_engine.storage.sql.rows import Row
from sync_engine.storage.sql.words import ROUTES_VERSION, Said

__all__ = ["Readers"]

READERS: Final = 2
"""Connections for reading: one may be busy with a long scan while the other answers single gets."""


class Readers:
    """The connections for reading, opened when they have something to do."""

    def __init__(self, database: Database, router: Router) -> None:
        self._lanes = [Lane(database) for _ in range(READERS)]
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
            found = await self.rows(self._router.words().meta(ROUTES_VERSION))
            if (int(found[0][0]) if found else 0) == routes.version:
                return rows
            await self._router.learn(self.rows)

    async def number(self, ask: Callable[[Routes], Said]) -> int:
        """The one number that a statement answers with."""
        ((number,),) = await self.told(ask)
        return int(number)

    async def by_ids(self, verb: Callable[..., Said], ids: Sequence[str]) -> list[Row]:
        """The rows of these ids, by a verb of ``Words`` that can be watched. Raises ``InvalidId``."""
        wanted: Sequence[str] = [check_id(id_) for id_ in dict.fromkeys(ids)]
        rows: list[Row] = []
        while wanted:
            routes = self._router.routes
            again: list[str] = []
            for places, some in routes.by_places(wanted).items():
                words = self._router.words(*places)
                for start in range(0, len(some), words.ids_max):
                    part = some[start : start + words.ids_max]
                    found = await self.rows(verb(words, part, watched=True))
                    if _version(found) != routes.version:
                        again += part
                        continue
                    rows += [row for row in found if row[0] is not None] if routes.version else found
            wanted = again
            if again:
                await self._router.learn(self.rows)
        return rows

    def in_range(self, prefix: str, after: str | None, limit: int | None) -> AsyncIterator[SyncItem]:
        """Items of a prefix behind ``after``, page by page."""
        check_text("prefix", prefix)

        async def page(after: str, size: int) -> list[Row]:
            shape, bounds = range_of(prefix, after)
            return await self.told(lambda routes: self._router.under(routes, prefix).range(shape, bounds, size))

        return paged(page, check_text("after", after or ""), limit)

    def in_state(self, state: str, after: str | None, limit: int | None) -> AsyncIterator[SyncItem]:
        """Items in a state behind ``after``, page by page."""
        check_state(state)

        async def page(after: str, size: int) -> list[Row]:
            return await self.told(lambda routes: self._router.every(routes).in_state(state, after, size))

        return paged(page, check_text("after", after or ""), limit)

    def stop(self) -> None:
        """Take no more questions."""
        self._closed = True

    async def close(self) -> None:
        """Close the connections, after what they are doing."""
        for lane in self._lanes:
            await lane.close()


def _version(rows: Sequence[Row]) -> int:
    """What the statement itself says of the routes of the very moment that it saw: a row of no id, usually the last."""
    return next((int(row[1]) for row in reversed(rows) if row[0] is None), 0)


def _running(lane: Lane) -> int:
    return lane.running
