"""Makes the tables, and takes over those of the original engine and of older versions of ours."""

from __future__ import annotations

from typing import Final

from sqlalchemy import Column, Table
from sqlalchemy.dialects import sqlite
from sqlalchemy.schema import CreateColumn, CreateIndex, CreateTable

from sync_engine.errors import StoreError
from sync_engine.storage.sql.sqlite import Session
from sync_engine.storage.sql.sqlite_words import FORGOTTEN, NOTE_MOST, NOTE_STAMP, READ_META
from sync_engine.storage.sql.tables import (
    ADOPTABLE,
    SCHEMA_VERSION,
    TOMBSTONE_LIFE_MS,
    items,
    metadata,
    tombstones,
)

__all__ = ["prepare"]

NAMES: Final = "SELECT name FROM sqlite_master WHERE type IN ('table', 'index')"

TABLE_COLUMNS: Final = "SELECT name, pk FROM pragma_table_info(?)"

NEWEST_STAMP: Final = """\
SELECT max((SELECT coalesce(max(stamp), 0) FROM sync_items), (SELECT coalesce(max(stamp), 0) FROM sync_tombstones))"""
"""The newest stamp the slow way, for tables that do not note it yet."""

NOTE_VERSION: Final = """\
INSERT INTO sync_meta (name, value) VALUES ('schema_version', ?)
ON CONFLICT (name) DO UPDATE SET value = excluded.value"""

_DIALECT: Final = sqlite.dialect()


async def prepare(session: Session, now_ms: int) -> None:
    """Make what is missing, in one transaction. Up-to-date tables are only read, so no lock is asked for.

    Raises ``StoreError`` where a table is newer than this library or cannot be adopted, ``TierUnavailable``
    where another writer holds the database.
    """
    if await _is_current(session):
        return
    await session.begin()
    try:
        if not await _is_current(session):  # another process may have been first
            await _make(session, now_ms)
        await session.commit()
    except BaseException:  # cancelled or failed alike: an open transaction keeps others out
        await session.rollback()
        raise


async def _is_current(session: Session) -> bool:
    names = {name for (name,) in await session.rows(NAMES)}
    version = None
    if "sync_meta" in names:
        version = next((value for (value,) in await session.rows(READ_META, ("schema_version",))), None)
        if version is not None and version > SCHEMA_VERSION:
            raise StoreError("l3", f"the tables are of version {version}; this library knows up to {SCHEMA_VERSION}")
    wanted = {table.name for table in metadata.sorted_tables}
    wanted |= {str(index.name) for table in metadata.sorted_tables for index in table.indexes}
    return version == SCHEMA_VERSION and wanted <= names and not await _missing(session, items)


async def _make(session: Session, now_ms: int) -> None:
    had_tombstones = tombstones.name in {name for (name,) in await session.rows(NAMES)}
    for table in metadata.sorted_tables:
        await session.run(str(CreateTable(table, if_not_exists=True).compile(dialect=_DIALECT)))
        for column in await _missing(session, table):
            await _add(session, table, column)
        for index in sorted(table.indexes, key=lambda index: str(index.name)):
            await session.run(str(CreateIndex(index, if_not_exists=True).compile(dialect=_DIALECT)))
    ((stamp,),) = await session.rows(NEWEST_STAMP)
    await session.run(NOTE_STAMP, (stamp,))
    await session.run(NOTE_VERSION, (SCHEMA_VERSION,))
    if had_tombstones:  # an older version of ours removed them without a note
        await session.run(NOTE_MOST, (FORGOTTEN, now_ms - TOMBSTONE_LIFE_MS))


async def _missing(session: Session, table: Table) -> list[Column[object]]:
    """Columns of the definition that the table lacks; raises where it is not the kind of table we know."""
    held: dict[str, int] = dict(await session.rows(TABLE_COLUMNS, (table.name,)))
    if held and not held.get("id" if "id" in table.c else "name"):
        raise StoreError("l3", f"{table.name} exists without its primary key and cannot be adopted")
    missing = [column for column in table.c if column.name not in held]
    strange = [column.name for column in missing if column.name not in ADOPTABLE]
    if held and strange:
        raise StoreError("l3", f"{table.name} exists without {', '.join(strange)} and cannot be adopted")
    return missing


async def _add(session: Session, table: Table, column: Column[object]) -> None:
    name = _DIALECT.identifier_preparer.format_table(table)
    await session.run(f"ALTER TABLE {name} ADD COLUMN {CreateColumn(column).compile(dialect=_DIALECT)}")
