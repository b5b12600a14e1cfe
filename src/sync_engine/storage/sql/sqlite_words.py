"""The statements of SQLite, each a text with a title, built once per table and size and executed as text.

Values are always bound. ``$items`` and ``$n`` stand for a table name of tables.py and for placeholders, the
only things ever put into a text. Sizes come from a short list, so that few texts exist and the driver's
statement cache knows them all. Times are epoch milliseconds.

Rows are written by multi-row VALUES rather than executemany: sqlite3 gives the GIL away at every step, once
per row with executemany, and with a busy event loop gets it back 5 ms later. Measured on 2 cores (Python 3.11):
about equal on an idle loop (25 % more CPU), 327 against 24,716 rows/s beside a busy one (128 rows a statement).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from string import Template
from typing import Final

from sqlalchemy import Table

__all__ = ["IDS_MAX", "ROWS_MAX", "Words", "padded", "words_of"]

ROWS_MAX: Final = 256
"""Most rows of one upsert; a power of two, like all its smaller sizes."""

IDS_MAX: Final = 500
"""Most ids one statement asks for."""

_ID_SIZES: Final = (1, 2, 4, 8, 16, 32, 64, 128, 256, IDS_MAX)

BEGIN: Final = "BEGIN IMMEDIATE"  # a deferred transaction that turns to writing fails at once if another one wrote
COMMIT: Final = "COMMIT"
ROLLBACK: Final = "ROLLBACK"

UPSERT: Final = """\
INSERT INTO $items AS held (id, version, timestamp, payload_hash, payload, payload_blob, audit, merkle_dirty,
  state, access_count, last_accessed, stamp)
VALUES $rows
ON CONFLICT (id) DO UPDATE SET
  version = excluded.version, timestamp = excluded.timestamp, payload_hash = excluded.payload_hash,
  payload = excluded.payload, payload_blob = excluded.payload_blob, audit = excluded.audit,
  merkle_dirty = CASE WHEN held.payload_hash IS NOT excluded.payload_hash OR held.version <> excluded.version
    THEN 1 ELSE held.merkle_dirty END,
  state = excluded.state, access_count = excluded.access_count, last_accessed = excluded.last_accessed,
  stamp = excluded.stamp
WHERE excluded.stamp IS NULL
  OR excluded.stamp > coalesce(held.stamp, 0)
  OR (excluded.stamp = held.stamp AND excluded.payload_hash >= coalesce(held.payload_hash, ''))"""
"""Write rows unless the table holds a newer stamp; of equal stamps the larger hash wins, in every replica alike."""

ROW: Final = "(?, ?, ?, ?, ?, ?, ?, 1, ?, ?, ?, ?)"

COLUMNS: Final = (
    # CAST: the stored bytes, also where another writer left text that is not valid UTF-8.
    "id, version, timestamp, payload_hash, CAST(payload AS BLOB), payload_blob, audit, state, "
    "access_count, last_accessed, stamp"
)

FETCH: Final = "SELECT $columns FROM $items WHERE id IN ($n)"
"""Whole rows of these ids."""

EXISTING: Final = "SELECT id FROM $items WHERE id IN ($n)"
"""Which of these ids have a row."""

HELD: Final = "SELECT id, coalesce(stamp, 0), version, coalesce(payload_hash, ''), state FROM $items WHERE id IN ($n)"
"""What decides about an operation on these ids."""

DELETE: Final = "DELETE FROM $items WHERE id IN ($n)"
"""Remove rows, after HELD was read in the same transaction."""

RESTATE: Final = "UPDATE $items SET state = ?, stamp = coalesce(nullif(?, 0), stamp) WHERE id = ?"
"""Change the state, after HELD was read in the same transaction; stamp 0 leaves the stamp."""

ANY_BURIED: Final = "SELECT EXISTS (SELECT 1 FROM sync_tombstones)"
"""Whether there is any tombstone; asking for 256 ids costs 0.4 ms even where there is none."""

BURIED: Final = "SELECT id, stamp FROM sync_tombstones WHERE id IN ($n)"
"""Tombstones of these ids."""

BURY: Final = """\
INSERT INTO sync_tombstones (id, stamp, deleted_at_ms) VALUES $rows
ON CONFLICT (id) DO UPDATE SET stamp = excluded.stamp, deleted_at_ms = excluded.deleted_at_ms
WHERE excluded.stamp > sync_tombstones.stamp"""
"""Remember deletes."""

BURY_ROW: Final = "(?, ?, ?)"

EXHUME: Final = "DELETE FROM sync_tombstones WHERE id IN ($n)"
"""Forget tombstones whose id carries a newer stamp in its row."""

PRUNE: Final = """\
DELETE FROM sync_tombstones WHERE id IN
  (SELECT id FROM sync_tombstones WHERE deleted_at_ms < ? ORDER BY deleted_at_ms LIMIT ?)"""
"""Forget some tombstones older than a moment."""

NOTE_STAMP: Final = """\
INSERT INTO sync_meta (name, value) VALUES ('newest_stamp', ?)
ON CONFLICT (name) DO UPDATE SET value = max(value, excluded.value)"""
"""Raise the newest stamp."""

FORGOTTEN: Final = "forgotten_ms"
"""Name of a number of sync_meta."""

NOTE_MOST: Final = """\
INSERT INTO sync_meta (name, value) VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET value = max(value, excluded.value)"""
"""Raise one number of sync_meta."""

NOTE_LEAST: Final = """\
INSERT INTO sync_meta (name, value) VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET value = min(value, excluded.value)"""
"""Lower one number of sync_meta."""

LATE: Final = "SELECT min(value) FROM sync_meta WHERE name >= ? AND name < 'late;'"
"""The oldest stamp noted as late from a moment on; moments have as many digits as sort like numbers."""

FORGET_LATE: Final = "DELETE FROM sync_meta WHERE name >= 'late:' AND name < ?"
"""Forget notes of older moments."""

READ_META: Final = "SELECT value FROM sync_meta WHERE name = ?"
"""One number of sync_meta."""

CHANGED: Final = """\
SELECT $columns, 0 FROM $items WHERE (stamp, id) > (?, ?)
UNION ALL
SELECT id, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, stamp, 1
FROM sync_tombstones WHERE (stamp, id) > (?, ?)
ORDER BY 11, 1 LIMIT ?"""
"""A page of rows and tombstones, the marked ones, by stamp and id."""

UNSTAMPED: Final = "SELECT $columns, 0 FROM $items WHERE stamp IS NULL AND id > ? ORDER BY id LIMIT ?"
"""A page of the rows that were written without a stamp."""

STAMPS: Final = "SELECT id, coalesce(stamp, 0) FROM $items WHERE id IN ($n)"
"""Stamps of these ids."""

COUNT: Final = "SELECT count(*) FROM $items"
"""How many rows there are."""

IN_STATE: Final = "SELECT $columns FROM $items WHERE state = ? AND id > ? ORDER BY id LIMIT ?"
"""A page of the rows in a state."""

IDS_IN_STATE: Final = "SELECT id FROM $items WHERE state = ? AND id > ? ORDER BY id LIMIT ?"
"""A page of the ids in a state."""

COUNT_STATE: Final = "SELECT count(*) FROM $items WHERE state = ?"
"""How many rows are in a state."""

# By (lower bound exclusive, upper bound there).
_RANGES: Final = {
    (False, True): "id >= ? AND id < ?",
    (True, True): "id > ? AND id < ?",
    (False, False): "id >= ?",
    (True, False): "id > ?",
}

RANGE: Final = "SELECT $columns FROM $items WHERE $range ORDER BY id LIMIT ?"
"""A page of the rows in a range of ids."""

IDS_IN_RANGE: Final = "SELECT id FROM $items WHERE $range ORDER BY id LIMIT ?"
"""A page of the ids in a range."""

COUNT_RANGE: Final = "SELECT count(*) FROM $items WHERE $range"
"""How many rows are in a range of ids."""


class Words:
    """The statements about one item table."""

    def __init__(self, table: str) -> None:
        self._table = table
        self.count = self._text(COUNT)
        self.restate = self._text(RESTATE)
        self.in_state = self._text(IN_STATE)
        self.ids_in_state = self._text(IDS_IN_STATE)
        self.count_state = self._text(COUNT_STATE)
        self.changed = self._text(CHANGED)
        self.unstamped = self._text(UNSTAMPED)
        self.range = {shape: self._text(RANGE, range=bounds) for shape, bounds in _RANGES.items()}
        self.ids_in_range = {shape: self._text(IDS_IN_RANGE, range=bounds) for shape, bounds in _RANGES.items()}
        self.count_range = {shape: self._text(COUNT_RANGE, range=bounds) for shape, bounds in _RANGES.items()}
        self.upsert = {size: self._text(UPSERT, rows=_many(ROW, size)) for size in _row_sizes()}
        self.bury = {size: self._text(BURY, rows=_many(BURY_ROW, size)) for size in _row_sizes()}
        self.fetch = self._by_ids(FETCH)
        self.existing = self._by_ids(EXISTING)
        self.held = self._by_ids(HELD)
        self.stamps = self._by_ids(STAMPS)
        self.delete = self._by_ids(DELETE)
        self.buried = self._by_ids(BURIED)
        self.exhume = self._by_ids(EXHUME)

    def _text(self, title: str, **parts: str) -> str:
        return Template(title).substitute(items=self._table, columns=COLUMNS, **parts)

    def _by_ids(self, title: str) -> dict[int, str]:
        return {size: self._text(title, n=_many("?", size)) for size in _ID_SIZES}


@cache
def words_of(table: Table) -> Words:
    """The statements about a table of tables.py."""
    return Words(table.name)


def padded(ids: Sequence[str]) -> list[str]:
    """At most ``IDS_MAX`` ids, filled up to the next size of which there are texts by repeating the last."""
    size = next(size for size in _ID_SIZES if size >= len(ids))
    return [*ids, *([ids[-1]] * (size - len(ids)))]


def _row_sizes() -> list[int]:
    return [1 << power for power in range(ROWS_MAX.bit_length())]


def _many(placeholder: str, size: int) -> str:
    return ", ".join([placeholder] * size)
