"""The ways in which rows can reach a database server, beside the one that was chosen: why asyncpg, why those sizes.

And from which size on it is worth while to copy them into PostgreSQL: there our own statements go through our own
session, which are what the constants in postgresql_words.py are about.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from itertools import islice
from typing import Any

from bench.data import Place, batches, places
from bench.harness import Answer, Stage, compared
from bench.sql_writes import NAMES, TYPES, CopyMerge, Driven, MariaMany, MultiRow, Unnest, Upsert, mariadb, postgresql
from bench.upserts import insert_or_update, told, unnest
from sync_engine.storage.sql.connect import database_of
from sync_engine.storage.sql.postgresql_words import COPY_MIN, Copying, PostgresqlWords
from sync_engine.storage.sql.rows import Value
from sync_engine.storage.sql.words import Said
from sync_engine.testing.proxy import CuttingProxy

__all__ = ["ask"]

ITEMS = 20_000

COPIED = 4_000
SIZES = (500, 1_000, 2_000)
FAR_S = 0.002
LARGE = 2_000
LARGE_PLACES = 12
"""So many places make 3 kB."""


async def ask(stage: Stage) -> list[Answer]:
    """The same rows, made beforehand, half of them over older ones, in one transaction: no store of ours is in it."""
    data = places(stage.sized(ITEMS, 1_000))
    answers: list[Answer] = []
    copies: list[Answer] = []
    for what, opened, chosen, others in (
        ("MariaDB", mariadb, Prepared512, (Prepared256, Prepared1024, Text500, MultiRow, MariaMany)),
        ("PostgreSQL", postgresql, Unnest, (Unnest256, Unnest4000, CopyMerge, PsycopgUnnest, PsycopgCopyMerge)),
    ):
        async with opened(stage) as (url, pids):
            contenders: list[Driven] = [kind(f"a driver, {what}", url, data) for kind in (chosen, *others)]
            with stage.watching(*pids):
                times = await stage.race(*contenders)
                if opened is postgresql:
                    copies = await _copies(stage, url)
        ours, *rest = times
        answers += [
            compared(f"upsert of {len(data):,} rows, the driver alone: {what}", times, ours, [way], None)
            for way in rest
        ]
    return answers + copies


async def _copies(stage: Stage, url: str) -> list[Answer]:
    """Rows of ours, so many a transaction, copied and by unnest."""
    data = places(stage.sized(COPIED, max(SIZES)))
    answers: list[Answer] = []
    async with CuttingProxy(url) as proxy:
        proxy.delay(FAR_S)
        for place, way in (("beside it", url), (f"{FAR_S * 1000:g} ms away", proxy.url_for(url))):
            answers += [await _copied(stage, url, way, data, size, f"{size:,} rows", place) for size in SIZES]
    large = _large(stage.sized(LARGE, 1_000))
    return [*answers, await _copied(stage, url, url, large, 1_000, "1,000 rows of 3 kB", "beside it")]


async def _copied(stage: Stage, url: str, way: str, data: Sequence[Place], size: int, rows: str, place: str) -> Answer:
    asked = f"{rows} a transaction, PostgreSQL {place}"
    copied, by_unnest = ByCopy(asked, url, way, data, size), ByUnnest(asked, url, way, data, size)
    times = await stage.race(copied, by_unnest, rounds=stage.rounds)  # on connections that are warm
    return compared(f"our upsert of {asked}: copied beside unnest", times, copied.name, [by_unnest.name], None)


def _large(count: int) -> list[Place]:
    """Contents made of several places each."""
    some = places(count + LARGE_PLACES)
    return [
        (id_, b"[%s]" % b",".join(content for _, content in islice(some, at, at + LARGE_PLACES)))
        for at, (id_, _) in enumerate(some[:count])
    ]


class Prepared512(MultiRow):
    """asyncmy and a statement of so many rows that the server has prepared; what is left over is another one."""

    title = "asyncmy, prepared, 512 rows"
    chunk = 512

    async def _connected(self, asked: dict[str, Any]) -> Any:
        import asyncmy

        return await asyncmy.connect(**asked, charset="utf8mb4", autocommit=True, stmt_cache_size=8)


class Prepared256(Prepared512):
    """The same with fewer rows."""

    title = "asyncmy, prepared, 256 rows"
    chunk = 256


class Prepared1024(Prepared512):
    """The same with more rows."""

    title = "asyncmy, prepared, 1,024 rows"
    chunk = 1_024


class Text500(MultiRow):
    """asyncmy's ``execute``, which writes the values into the text."""

    title = "asyncmy, VALUES of 500 rows"
    chunk = 500


class Unnest256(Unnest):
    """asyncpg's arrays of fewer rows."""

    title = "asyncpg, unnest of 256 rows"
    chunk = 256


class Unnest4000(Unnest):
    """asyncpg's arrays of more rows."""

    title = "asyncpg, unnest of 4,000 rows"
    chunk = 4_000


class Psycopg(Driven):
    """A connection of psycopg 3."""

    async def _connected(self, asked: dict[str, Any]) -> Any:
        import psycopg

        return await psycopg.AsyncConnection.connect(
            **{
                "dbname" if name == "database" else name: asked[name]
                for name in ("host", "port", "user", "password", "database")
            },
            autocommit=True,
        )

    async def verify(self) -> None:
        await self._connection.close()
        await super().verify()


class PsycopgUnnest(Psycopg):
    """psycopg 3 and arrays in binary form."""

    title = "psycopg, unnest of 1,000 rows"
    chunk = 1_000

    async def run(self) -> None:
        said = insert_or_update(NAMES, unnest(TYPES, lambda _: "%b"))
        async with self._connection.transaction():
            for chunk in batches(self._rows, self.chunk):
                await self._connection.execute(
                    said,
                    [list(column) for column in zip(*chunk, strict=True)],
                    prepare=True,
                )


class PsycopgCopyMerge(Psycopg):
    """psycopg's binary COPY into a temporary table, and one statement that merges it."""

    title = "psycopg, binary COPY and merge"

    async def run(self) -> None:
        async with self._connection.transaction(), self._connection.cursor() as cursor:
            await cursor.execute("CREATE TEMP TABLE told (LIKE sync_items INCLUDING DEFAULTS) ON COMMIT DROP")
            async with cursor.copy(f"COPY told ({', '.join(NAMES)}) FROM STDIN (FORMAT BINARY)") as copy:
                copy.set_types(TYPES)
                for row in self._rows:
                    await copy.write_row(row)
            await cursor.execute(insert_or_update(NAMES, told(NAMES)))


class ByUnnest(Upsert):
    """Our statement for few rows, in transactions that are nothing else, on a connection that has met it before."""

    title = "unnest"

    def __init__(self, what: str, url: str, way: str, data: Sequence[Place], size: int) -> None:
        super().__init__(what, url, data)
        self._way = way
        self._size = size
        self._words = PostgresqlWords(Copying(), "sync_items")

    async def prepare(self) -> None:
        await super().prepare()
        self._session = await database_of(self._way, 60_000).open()
        await self._session.begin()
        await self._session.attempt(self._said(self._rows[: self._size]))
        await self._session.rollback()

    async def run(self) -> None:
        for rows in batches(self._rows, self._size):
            await self._session.begin()
            await self._session.attempt(self._said(rows))
            await self._session.commit()

    async def verify(self) -> None:
        await self._session.close()
        await super().verify()

    def _said(self, rows: Sequence[Sequence[Value]]) -> Said:
        return self._words.upsert(rows)


class ByCopy(ByUnnest):
    """Our statement for many small rows, however many and however large they are."""

    title = "copied"

    def _said(self, rows: Sequence[Sequence[Value]]) -> Said:
        return self._merge._replace(copied=rows)

    @cached_property
    def _merge(self) -> Said:
        copying = Copying()
        copying.allowed = True
        small = ("", 0, 0, "", "", None, None, "", 0, 0, 0)
        return PostgresqlWords(copying, "sync_items").upsert([small] * COPY_MIN)
