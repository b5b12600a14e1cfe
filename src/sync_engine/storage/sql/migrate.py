"""Makes the tables, and takes over those of the original engine and of older versions of ours.

One migration at a time, whatever the number of engines that start: the others wait, and find everything made. Each
step can be taken twice, because MySQL keeps what a migration had done before it was killed.
"""

from __future__ import annotations

import logging
from typing import Final

from sqlalchemy import Column, Table
from sqlalchemy.schema import CreateColumn, CreateIndex, CreateTable

from sync_engine.errors import InvalidItem, StoreError
from sync_engine.item import SyncItem
from sync_engine.storage.sql.dialect import Database, Session
from sync_engine.storage.sql.routing import routes_of
from sync_engine.storage.sql.rows import row_of
from sync_engine.storage.sql.tables import (
    ADOPTABLE,
    SCHEMA_VERSION,
    TOMBSTONE_LIFE_MS,
    item_table,
    items,
    meta,
    routes,
    tombstones,
)
from sync_engine.storage.sql.words import FORGOTTEN, Said, Words

__all__ = ["make_items", "prepare"]

FIRST: Final = "sync_items_of_0_1"
"""What becomes of a table of the original's first releases, which called the content ``content``."""

PAGE_ROWS: Final = 500

_log = logging.getLogger(__name__)


async def prepare(database: Database, session: Session, now_ms: int) -> bool:
    """Make what is missing. Up-to-date tables are only read, so no lock is asked for; whether anything was made.

    Raises ``StoreError`` where a table is newer than this library or cannot be adopted, ``TierUnavailable``
    where another one is at it, or writes, for too long.
    """
    words = database.words(items.name)
    if await _is_current(database, session, words):
        return False
    await session.begin_migration()
    done = made = False
    try:
        if not await _is_current(database, session, words):  # another process may have been first
            await _make(database, session, words, now_ms)
            made = True
        done = True
    finally:  # cancelled or failed alike: an open transaction keeps others out
        await session.end_migration(done)
    return made


async def make_items(database: Database, session: Session, name: str) -> None:
    """Make a table of items, or take over the one that there is. Raises as ``prepare`` does, before it is changed."""
    table = item_table(name)
    if await _stands(database, session, table, await database.names(session)):
        return
    await session.begin_migration()
    done = False
    try:
        await _make_table(database, session, table, await database.names(session))
        done = True
    finally:
        await session.end_migration(done)


async def _is_current(database: Database, session: Session, words: Words) -> bool:
    names = await database.names(session)
    version = None
    if "sync_meta" in names:
        version = next((value for (value,) in await session.rows(words.meta("schema_version"))), None)
        if version is not None and version > SCHEMA_VERSION:
            raise StoreError("l3", f"the tables are of version {version}; this library knows up to {SCHEMA_VERSION}")
    wanted = {table.name for table in database.owned_tables}
    wanted |= {str(index.name) for table in database.owned_tables for index in table.indexes}
    if version != SCHEMA_VERSION or not wanted <= names or await _missing(database, session, items):
        return False
    routed = await _routed(session, words)
    return all([await _stands(database, session, table, names) for table in routed])


async def _make(database: Database, session: Session, words: Words, now_ms: int) -> None:
    names = await database.names(session)
    had_tombstones = tombstones.name in names
    if await _is_of_the_first(database, session):
        if FIRST in names:
            raise StoreError("l3", f"{items.name} cannot be adopted: there is already a table {FIRST}")
        await session.run(Said(f"ALTER TABLE {items.name} RENAME TO {FIRST}"))
        names.add(FIRST)
    # In the order in which questions name them: the tables of items one after the other, then the tombstones.
    for table in (known := (items, routes, meta)):
        await _make_table(database, session, table, names)
    routed = await _routed(session, words)
    for table in (*routed, *(table for table in database.owned_tables if table not in known)):
        await _make_table(database, session, table, names)
    if FIRST in names:
        await _copy_the_first(database, session, words)
    every = database.words(items.name, *(table.name for table in routed))
    stamps = [int(stamp) for (stamp,) in await session.rows(every.newest_stamps) if stamp is not None]
    await session.run(words.note_most("newest_stamp", max(stamps, default=0)))
    if had_tombstones and not await session.rows(words.meta(FORGOTTEN)):
        # An older version of ours removed them without a note.
        await session.run(words.note_most(FORGOTTEN, now_ms - TOMBSTONE_LIFE_MS))
    await session.run(words.note_most("schema_version", SCHEMA_VERSION))  # last: until here all of it is done again


async def _routed(session: Session, words: Words) -> list[Table]:
    """The tables of schemas that were registered here."""
    return [item_table(name) for name in routes_of(await session.rows(words.routes)).tables if name != items.name]


async def _stands(database: Database, session: Session, table: Table, names: set[str]) -> bool:
    wanted = {table.name, *(str(index.name) for index in table.indexes)}
    return wanted <= names and not await _missing(database, session, table)


async def _make_table(database: Database, session: Session, table: Table, names: set[str]) -> None:
    missing = await _missing(database, session, table)
    await session.run(Said(_text(database, CreateTable(table, if_not_exists=True)) + database.options(table)))
    for column in missing:
        told = _text(database, CreateColumn(column))
        await session.run(Said(f"ALTER TABLE {table.name} ADD COLUMN {told}"))
    if not await database.columns(session, table.name):
        raise StoreError("l3", f"{table.name} exists and is no table")
    await database.adapt(session, table)
    for index in sorted(table.indexes, key=lambda index: str(index.name)):
        if index.name not in names:
            await session.run(Said(_text(database, CreateIndex(index))))


def _text(database: Database, element: CreateTable | CreateIndex | CreateColumn) -> str:
    return str(element.compile(dialect=database.dialect)).strip()


async def _missing(database: Database, session: Session, table: Table) -> list[Column[object]]:
    """Columns of the definition that the table lacks; raises where it is not the kind of table we know."""
    held = {column.name: column for column in await database.columns(session, table.name)}
    key = next(iter(table.primary_key)).name
    missing = [column for column in table.c if column.name not in held]
    if not held:
        return []
    strange = [column.name for column in missing if column.name not in ADOPTABLE]
    if key in held and not held[key].in_key:
        raise StoreError("l3", f"{table.name} exists without its primary key and cannot be adopted")
    if strange:
        raise StoreError("l3", f"{table.name} exists without {', '.join(strange)} and cannot be adopted")
    return missing


# The original's first releases: id, version, content, updated_at, batch_id.


async def _is_of_the_first(database: Database, session: Session) -> bool:
    held = {column.name for column in await database.columns(session, items.name)}
    return {"id", "content", "updated_at"} <= held and not {"payload", "timestamp"} & held


async def _copy_the_first(database: Database, session: Session, words: Words) -> None:
    """Copy every row into our table. The old table stays, whatever becomes of it."""
    held = {column.name for column in await database.columns(session, FIRST)}
    optional = [name if name in held else "NULL" for name in ("version", "batch_id")]
    bound, limit = words.mark(1), words.mark(2)
    page = (
        f"SELECT id, content, updated_at, {', '.join(optional)} FROM {FIRST} "  # noqa: S608 - constants
        f"WHERE id > {bound} ORDER BY id LIMIT {limit}"
    )
    copied, left, after = 0, 0, ""
    while rows := await session.rows(Said(page, (after, PAGE_ROWS))):
        after = rows[-1][0]
        written = []
        for id_, content, updated_at, version, batch_id in rows:
            try:
                item = SyncItem(
                    id_,
                    content if isinstance(content, bytes) else str(content).encode(),
                    version=1 if version is None else int(version),
                    updated_at=int(updated_at),
                    batch_id=batch_id,
                )
            except (InvalidItem, ValueError, TypeError) as bad:
                _log.warning("left in %s: %r (%s)", FIRST, id_, getattr(bad, "rule", type(bad).__name__))
                left += 1
                continue
            written.append(row_of(item, 0))
        for part in words.parts(written):
            await session.attempt(words.upsert(part))
        copied += len(written)
    _log.warning(
        "copied %d items of an early release into %s, left %d; %s can be dropped", copied, items.name, left, FIRST
    )
