"""The ways in which rows can reach a database server, beside the one that was chosen: why asyncpg, why those sizes."""

from __future__ import annotations

from typing import Any

from bench.data import batches, places
from bench.harness import Answer, Stage, compared
from bench.sql_writes import NAMES, TYPES, CopyMerge, Driven, MariaMany, MultiRow, Unnest, mariadb, postgresql
from bench.upserts import insert_or_update, told, unnest

__all__ = ["ask"]

ITEMS = 20_000


async def ask(stage: Stage) -> list[Answer]:
    """The same rows, made beforehand, half of them over older ones, in one transaction: no store of ours is in it."""
    data = places(stage.sized(ITEMS, 1_000))
    answers: list[Answer] = []
    for what, opened, chosen, others in (
        ("MariaDB", mariadb, Prepared512, (Prepared256, Prepared1024, Text500, MultiRow, MariaMany)),
        ("PostgreSQL", postgresql, Unnest, (Unnest256, Unnest4000, CopyMerge, PsycopgUnnest, PsycopgCopyMerge)),
    ):
        async with opened(stage) as (url, pids):
            contenders: list[Driven] = [kind(f"a driver, {what}", url, data) for kind in (chosen, *others)]
            with stage.watching(*pids):
                times = await stage.race(*contenders)
        ours, *rest = times
        answers += [
            compared(f"upsert of {len(data):,} rows, the driver alone: {what}", times, ours, [way], None)
            for way in rest
        ]
    return answers


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
