"""Which table an id belongs to, and in which ones it may be: the routes, and what a store knows of them.

An id is in one table at any moment: whoever moves a row, or writes to an id whose route is new, takes it from where
it was in the same transaction, with the id's bucket locked. The routes have a version. A writer reads it behind his
locks, a reader behind what he was answered; who has an older one learns the routes and asks again.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from sync_engine.errors import StoreError, TierUnavailable
from sync_engine.schema import is_schema_name
from sync_engine.storage.sql.dialect import Database
from sync_engine.storage.sql.rows import Row
from sync_engine.storage.sql.tables import items
from sync_engine.storage.sql.words import ROUTES_VERSION, Said, Words

__all__ = ["DEFAULT", "SUFFIX", "TABLE", "TABLES_MAX", "Route", "Router", "Routes", "routes_of"]

DEFAULT: Final = items.name
"""Where ids are that no prefix says anything of."""

SUFFIX: Final = "_items"

TABLE: Final = "table:"
"""What names of sync_meta begin with that say that there is such a table."""

TABLES_MAX: Final = 100
"""Most tables of schemas. A scan asks all of them in one statement, and SQLite takes 500 parts of one."""

WORDS_KEPT: Final = 256
"""Statements are kept for so many sets of tables; a few dozen are asked for by turns."""


@dataclass(frozen=True, slots=True)
class Route:
    """Where the ids of a prefix belong; ``moving``: rows of theirs may still be in other tables."""

    prefix: str
    table: str
    moving: bool


class Routes:
    """All routes as of one version; 0 is before the first. Never changed: a new version is another object."""

    def __init__(self, version: int = 0, routes: Iterable[Route] = (), tables: Iterable[str] = ()) -> None:
        self.version = version
        self.tables = (DEFAULT, *sorted(tables))
        self.by_prefix = {route.prefix: route for route in routes}
        self.moving = tuple(route for route in self.by_prefix.values() if route.moving)
        self._lengths = sorted({len(prefix) for prefix in self.by_prefix}, reverse=True)

    def route_of(self, text: str) -> Route | None:
        """The route of the longest prefix that the text begins with."""
        for length in self._lengths:
            route = self.by_prefix.get(text[:length])
            if route is not None:
                return route
        return None

    def home_of(self, object_id: str) -> str:
        """The table that the id belongs to."""
        route = self.route_of(object_id)
        return DEFAULT if route is None else route.table

    def places_of(self, object_id: str) -> tuple[str, ...]:
        """The tables that the id may be in, in the order of ``tables``, in which everybody locks them.

        PostgreSQL locks them in the order of a statement, and a migration that came from the other end would be a
        deadlock.
        """
        route = self.route_of(object_id)
        if route is None:
            return (DEFAULT,)
        return self.tables if route.moving else (route.table,)

    def others(self, table: str) -> tuple[str, ...]:
        """All tables but this one."""
        return tuple(other for other in self.tables if other != table)

    def places_under(self, prefix: str) -> tuple[str, ...]:
        """The tables that ids of this prefix may be in, in the same order."""
        if not self.by_prefix:
            return (DEFAULT,)
        routes = [route for route in self.by_prefix.values() if route.prefix.startswith(prefix)]
        if (above := self.route_of(prefix)) is not None:
            routes.append(above)
        if any(route.moving for route in routes):
            return self.tables
        wanted = {self.home_of(prefix), *(route.table for route in routes)}
        return tuple(table for table in self.tables if table in wanted)

    def by_places(self, ids: Sequence[str]) -> dict[tuple[str, ...], Sequence[str]]:
        """The ids by the tables that they may be in."""
        if not self.by_prefix:
            return {(DEFAULT,): ids} if ids else {}
        found: dict[tuple[str, ...], list[str]] = {}
        for id_ in ids:
            found.setdefault(self.places_of(id_), []).append(id_)
        return dict(found)

    def by_home(self, ids: Iterable[str]) -> dict[str, list[str]]:
        """The ids by the table that they belong to, in the order of ``tables``."""
        found: dict[str, list[str]] = {}
        for id_ in ids:
            found.setdefault(self.home_of(id_), []).append(id_)
        return {table: found[table] for table in self.tables if table in found}

    def __repr__(self) -> str:
        told = ", ".join(f"{r.prefix!r} -> {r.table}{' (moving)' * r.moving}" for r in self.by_prefix.values())
        return f"<Routes {self.version} | {told or 'none'}>"


def routes_of(rows: Iterable[Row]) -> Routes:
    """The routes that the database tells. Raises ``StoreError`` for a table that is not a schema's: no such name is
    ever put into a statement, whoever wrote it there."""
    version, routes, tables = 0, [], set()
    for name, table, number in rows:
        if table is not None:
            routes.append(Route(_text(name), _checked(table), number != 0))
        elif name == ROUTES_VERSION:
            version = int(number)
        else:
            tables.add(_checked(_text(name).removeprefix(TABLE)))
    return Routes(version, routes, tables | {route.table for route in routes})


class Router:
    """What a store knows of the routes, and the statements about their tables."""

    def __init__(self, database: Database) -> None:
        self.routes = Routes()
        self._database = database
        self._words: dict[tuple[str, ...], Words] = {}

    def words(self, *tables: str) -> Words:
        """The statements about these tables, or about the one of all ids without a route."""
        tables = tables or (DEFAULT,)
        words = self._words.get(tables)
        if words is None:
            if len(self._words) >= WORDS_KEPT:
                self._words.clear()
            words = self._words[tables] = self._database.words(*tables)
        return words

    def under(self, routes: Routes, prefix: str) -> Words:
        """The statements about the tables that ids of this prefix may be in."""
        return self.words(*routes.places_under(prefix))

    def every(self, routes: Routes) -> Words:
        """The statements about all tables."""
        return self.words(*routes.tables)

    async def learn(self, rows: Callable[[Said], Awaitable[list[Row]]]) -> Routes:
        """The routes as the database tells them now.

        Raises ``TierUnavailable`` where they cannot be followed: that is no fault of the items, which wait.
        """
        try:
            self.routes = routes_of(await rows(self.words().routes))
        except StoreError as foreign:
            raise TierUnavailable("l3", foreign.reason) from foreign
        return self.routes


def _checked(table: object) -> str:
    if isinstance(table, str) and table.endswith(SUFFIX) and is_schema_name(table[: -len(SUFFIX)]):
        return table
    told = repr(table)[:60]
    raise StoreError(
        "l3", f"sync_routes or sync_meta names the table {told}, which is none of a schema: remove that row"
    )


def _text(name: object) -> str:
    if not isinstance(name, str) or not name:
        raise StoreError("l3", f"sync_routes has a row for {repr(name)[:60]}, which is no prefix: remove it")
    return name
