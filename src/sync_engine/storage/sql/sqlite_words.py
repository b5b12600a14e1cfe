"""What SQLite says in its own way.

Rows are written by multi-row VALUES rather than executemany: sqlite3 gives the GIL away at every step, once
per row with executemany, and with a busy event loop gets it back 5 ms later. Measured on 2 cores (Python 3.11):
about equal on an idle loop (25 % more CPU), 327 against 24,716 rows/s beside a busy one (128 rows a statement).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from sync_engine.storage.sql.rows import Value, flat
from sync_engine.storage.sql.words import Said, Words

__all__ = ["BEGIN", "COMMIT", "ROLLBACK", "SqliteWords"]

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

ROW: Final = "(?, ?, ?, ?, ?, ?, ?, 1, ?, ?, ?, ?)"

RESTATE: Final = """\
WITH told (id, state, stamp) AS (VALUES $rows)
UPDATE $items SET state = told.state, stamp = coalesce(nullif(told.stamp, 0), $items.stamp)
FROM told WHERE $items.id = told.id"""

BURY: Final = """\
INSERT INTO sync_tombstones (id, stamp, deleted_at_ms) VALUES $rows
ON CONFLICT (id) DO UPDATE SET stamp = excluded.stamp, deleted_at_ms = excluded.deleted_at_ms
WHERE excluded.stamp > sync_tombstones.stamp"""


class SqliteWords(Words):
    """The statements about tables of items."""

    rows_max = 128  # more of them are quicker, and while their rows are made and bound everybody else waits longer
    ids_per_table = 500
    # CAST: the stored bytes, also where another writer left text that is not valid UTF-8.
    columns = (
        "id, version, timestamp, payload_hash, CAST(payload AS BLOB), payload_blob, audit, state, "
        "access_count, last_accessed, stamp"
    )
    counts_writes = True
    most = "max"
    least = "min"
    # Where ANALYZE has found most rows dirty, all of them would be read rather than the flags.
    flag_hint = " INDEXED BY $index"
    for_update = ""  # who writes is alone

    def upsert(self, rows: Sequence[Sequence[Value]]) -> Said:
        return Said(self._of_rows(UPSERT, ROW, len(rows)), flat(rows))

    def bury(self, rows: Sequence[tuple[str, int, int]]) -> Said:
        return Said(self._of_rows(BURY, "(?, ?, ?)", len(rows)), flat(rows))

    def restate(self, rows: Sequence[tuple[str, str | None, int]]) -> Said:
        return Said(self._of_rows(RESTATE, "(?, ?, ?)", len(rows)), flat(rows))
