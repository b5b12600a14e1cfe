"""What MySQL and MariaDB say in their own way.

Both evaluate the assignments of an upsert from left to right, each seeing those before it. So the columns that the
guard asks come last, first the hash and then the stamp: with the hash taken over the guard still says the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from sync_engine.storage.sql.rows import Value, flat
from sync_engine.storage.sql.words import Said, Words

__all__ = ["ASSIGNED", "GUARD", "MysqlWords"]

GUARD: Final = """\
VALUES(stamp) IS NULL OR VALUES(stamp) > coalesce(stamp, 0)
  OR (VALUES(stamp) = stamp AND VALUES(payload_hash) >= coalesce(payload_hash, ''))"""
"""Whether a row may be written over the one that is there."""

ASSIGNED: Final = (
    "version",
    "timestamp",
    "payload",
    "payload_blob",
    "audit",
    "state",
    "access_count",
    "last_accessed",
    "payload_hash",
    "stamp",
)
"""The order of the assignments; ``merkle_dirty``, which asks for the old hash and version, is before them (Q1)."""

UPSERT: Final = f"""\
INSERT INTO $items (id, version, timestamp, payload_hash, payload, payload_blob, audit, merkle_dirty,
  state, access_count, last_accessed, stamp)
VALUES $rows
ON DUPLICATE KEY UPDATE
  merkle_dirty = IF(({GUARD})
    AND (NOT (VALUES(payload_hash) <=> payload_hash) OR VALUES(version) <> version), 1, merkle_dirty),
  {", ".join(f"{name} = IF({GUARD}, VALUES({name}), {name})" for name in ASSIGNED)}"""  # noqa: S608 - constants

ROW: Final = "(?, ?, ?, ?, ?, ?, ?, 1, ?, ?, ?, ?)"

RESTATE: Final = """\
UPDATE $items JOIN ($rows) AS told ON $items.id = told.id
SET $items.state = told.state, $items.stamp = coalesce(nullif(told.stamp, 0), $items.stamp)"""

TOLD: Final = "SELECT ? AS id, ? AS state, ? AS stamp"

BURY: Final = """\
INSERT INTO sync_tombstones (id, stamp, deleted_at_ms) VALUES $rows
ON DUPLICATE KEY UPDATE
  deleted_at_ms = IF(VALUES(stamp) > stamp, VALUES(deleted_at_ms), deleted_at_ms),
  stamp = IF(VALUES(stamp) > stamp, VALUES(stamp), stamp)"""

NOTE: Final = """\
INSERT INTO sync_meta (name, value) VALUES (?, ?) ON DUPLICATE KEY UPDATE value = $best(value, VALUES(value))"""

# A comparison of pairs does not go through the index here, hence stamp and id apart; and with whole rows MariaDB 10.11
# rather sorts a third of the table for every page than to go along the index, hence FORCE.
CHANGED_ROWS: Final = """\
(SELECT $columns, 0 FROM $items FORCE INDEX ($index)
 WHERE stamp >= ? AND (stamp > ? OR id > ?) ORDER BY stamp, id LIMIT ?)"""

# InnoDB keeps the primary key in every index, so that of the flag has the ids in order. FORCE, since a planner that
# believes most rows to be dirty, as they are until somebody calls them clean, would read along the primary key, past
# all that have become clean since; and IN, since at a plain "= 1" MariaDB 10.11 sometimes goes by the flag alone and
# leaves the id to be compared row by row.
DIRTY: Final = "merkle_dirty IN (1, 2) AND merkle_dirty < 2"
DIRTY_HINT: Final = " FORCE INDEX ($index)"

CHANGED_DELETES: Final = """\
(SELECT id, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, stamp, 1
 FROM sync_tombstones WHERE stamp >= ? AND (stamp > ? OR id > ?) ORDER BY stamp, id LIMIT ?)"""


class MysqlWords(Words):
    """The statements about tables of items."""

    # 65,535 values are the most of a prepared statement; 256 to 1,024 rows are equally fast (docs/performance.md).
    rows_max = 512
    ids_per_table = 512
    # CAST: bytes as they are stored, instead of a text that would be encoded again to be hashed.
    columns = (
        "id, version, timestamp, payload_hash, CAST(payload AS BINARY), payload_blob, audit, state, "
        "access_count, last_accessed, stamp"
    )
    counts_writes = False
    note = NOTE
    changed_rows = CHANGED_ROWS
    changed_deletes = CHANGED_DELETES
    dirty = dirty_along = DIRTY
    dirty_hint = DIRTY_HINT
    dirty_order = "merkle_dirty, id"
    dirty_in_order = True

    def upsert(self, rows: Sequence[Sequence[Value]]) -> Said:
        return Said(self._of_rows(UPSERT, ROW, len(rows)), flat(rows))

    def bury(self, rows: Sequence[tuple[str, int, int]]) -> Said:
        return Said(self._of_rows(BURY, "(?, ?, ?)", len(rows)), flat(rows))

    def restate(self, rows: Sequence[tuple[str, str | None, int]]) -> Said:
        return Said(self._of_rows(RESTATE, TOLD, len(rows), " UNION ALL "), flat(rows))

    def _changed_from(self, stamp: int, id_: str, limit: int) -> tuple[Value, ...]:
        return stamp, stamp, id_, limit

    def mark(self, number: int) -> str:
        return "%s"

    def _marked(self, text: str) -> str:
        return text.replace("?", "%s")
