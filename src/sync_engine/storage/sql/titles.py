"""The texts of the statements, each with a title and its reason; texts.py puts names into them."""

from __future__ import annotations

from typing import Final

__all__ = [
    "AGES",
    "ARRIVED",
    "BEFORE_WRITING",
    "BURIED",
    "CHANGED_DELETES",
    "CHANGED_ORDER",
    "CHANGED_ROWS",
    "CLEAN",
    "COUNT",
    "COUNT_DIRTY",
    "COUNT_OF",
    "COUNT_RANGE",
    "COUNT_STATE",
    "DELETE",
    "EXHUME",
    "EXISTING",
    "FETCH",
    "FLAGGED",
    "FLAGS",
    "FLAGS_SET",
    "FORGET_LATE",
    "HELD",
    "IDS_DIRTY",
    "IDS_IN_RANGE",
    "IDS_IN_STATE",
    "IN_STATE",
    "LATE",
    "NEWEST_BURIED",
    "NEWEST_STAMP",
    "NOTE",
    "OUTDATED",
    "PRUNE",
    "RANGE",
    "RANGES",
    "READ_META",
    "ROUTE",
    "ROUTES",
    "SORTED",
    "STAMPS",
    "TAKE",
    "UNROUTE",
    "UNSTAMPED",
    "WEIGHED",
]

FETCH: Final = "SELECT $columns FROM $items WHERE id $among"
"""Whole rows of these ids."""

EXISTING: Final = "SELECT id FROM $items WHERE id $among"
"""Which of these ids have a row."""

HELD: Final = "SELECT id, coalesce(stamp, 0), version, coalesce(payload_hash, ''), state FROM $items WHERE id $among"
"""What decides about an operation on these ids."""

FLAGS: Final = """\
SELECT id, coalesce(stamp, 0), version, coalesce(payload_hash, ''), merkle_dirty FROM $items WHERE id $among"""
"""What decides about calling these rows clean; with ``for_update`` they stay so until the transaction ends."""

CLEAN: Final = "UPDATE $items SET merkle_dirty = 0 WHERE id $among"
"""Call rows clean, after FLAGS was read in the same transaction."""

STAMPS: Final = "SELECT id, coalesce(stamp, 0) FROM $items WHERE id $among"
"""Stamps of these ids."""

DELETE: Final = "DELETE FROM $items WHERE id $among"
"""Remove rows, after HELD was read in the same transaction."""

BEFORE_WRITING: Final = """\
SELECT EXISTS (SELECT 1 FROM sync_tombstones),
  coalesce((SELECT value FROM sync_meta WHERE name = 'routes'), 0)"""
"""Whether there is any tombstone, and the version of the routes.

Asking for the tombstones of 256 ids costs 0.4 ms even where there is none."""

BURIED: Final = "SELECT id, stamp FROM sync_tombstones WHERE id $among"
"""Tombstones of these ids."""

EXHUME: Final = "DELETE FROM sync_tombstones WHERE id $among"
"""Forget tombstones whose id carries a newer stamp in its row."""

OUTDATED: Final = "SELECT id FROM sync_tombstones WHERE deleted_at_ms < ? ORDER BY deleted_at_ms LIMIT ?"
"""The oldest tombstones, of before a moment."""

PRUNE: Final = "DELETE FROM sync_tombstones WHERE id $among AND deleted_at_ms + 0 < ?"
"""Forget those of them that nobody has buried anew; said so that no index leads to others' rows, to wait there."""

NOTE: Final = """\
INSERT INTO sync_meta (name, value) VALUES (?, ?)
ON CONFLICT (name) DO UPDATE SET value = $best(sync_meta.value, excluded.value)"""
"""Raise or lower one number of sync_meta, or make it."""

LATE: Final = "SELECT min(value) FROM sync_meta WHERE name >= ? AND name < 'late;'"
"""The oldest stamp noted as late from a moment on; moments have as many digits as sort like numbers."""

FORGET_LATE: Final = "DELETE FROM sync_meta WHERE name >= 'late:' AND name < ?"
"""Forget notes of older moments."""

READ_META: Final = "SELECT value FROM sync_meta WHERE name = ?"
"""One number of sync_meta."""

NEWEST_STAMP: Final = "SELECT max(stamp) FROM $items"
"""The newest stamp the slow way, for tables that do not note it yet."""

NEWEST_BURIED: Final = "SELECT max(stamp) FROM sync_tombstones"
"""The same of the tombstones."""

CHANGED_ROWS: Final = "SELECT $columns, 0 FROM $items WHERE (stamp, id) > (?, ?)"
"""Rows from a stamp and id on; among them, marked, the tombstones:"""

CHANGED_DELETES: Final = """\
SELECT id, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, stamp, 1
FROM sync_tombstones WHERE (stamp, id) > (?, ?)"""

CHANGED_ORDER: Final = " ORDER BY 11, 1 LIMIT ?"
"""A page of them, by stamp and id."""

ROUTES: Final = """\
SELECT prefix, table_name, phase FROM sync_routes
UNION ALL SELECT name, NULL, value FROM sync_meta WHERE name = 'routes' OR (name >= 'table:' AND name < 'table;')"""
"""All that is known of the routes: each of them, their version and their tables, as of one moment."""

ROUTE: Final = "INSERT INTO sync_routes (prefix, table_name, phase) VALUES (?, ?, 1)"
"""A new route, whose rows are still to be moved."""

UNROUTE: Final = "DELETE FROM sync_routes WHERE prefix = ?"
"""Forget a route, to make another one."""

ARRIVED: Final = "UPDATE sync_routes SET phase = 0 WHERE phase = 1"
"""All rows of all routes are where they belong."""

WEIGHED: Final = """\
SELECT id, coalesce(length(payload), 0) + coalesce(length(payload_blob), 0) FROM $items
WHERE $range ORDER BY id LIMIT ?"""
"""A page of ids to be moved, and about how many bytes each has."""

AGES: Final = "SELECT id, coalesce(stamp, 0), timestamp FROM $items WHERE id $among"
"""Which of two rows of one id is the newer one."""

TAKE: Final = """\
INSERT INTO $items (id, version, timestamp, payload_hash, payload, payload_blob, audit, merkle_dirty,
  state, access_count, last_accessed, stamp)
SELECT id, version, timestamp, payload_hash, payload, payload_blob, audit, merkle_dirty,
  state, access_count, last_accessed, stamp FROM $source WHERE id $among"""
"""Copy rows as they are into another table, before DELETE removes them from the one they were in."""

UNSTAMPED: Final = "SELECT $columns, 0 FROM $items WHERE stamp IS NULL AND id > ? ORDER BY id LIMIT ?"
"""A page of the rows that were written without a stamp."""

COUNT: Final = "SELECT count(*) FROM $items"
"""How many rows there are."""

IN_STATE: Final = "SELECT $columns FROM $items WHERE state = ? AND id > ? ORDER BY id LIMIT ?"
"""A page of the rows in a state."""

IDS_IN_STATE: Final = "SELECT id FROM $items WHERE state = ? AND id > ? ORDER BY id LIMIT ?"
"""A page of the ids in a state."""

COUNT_STATE: Final = "SELECT count(*) FROM $items WHERE state = ?"
"""How many rows are in a state."""

# By (lower bound exclusive, upper bound there).
RANGES: Final = {
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

# A row is dirty where its flag is 1. Each database says so in its way to its index ($dirty) or past it ($dirty_along).

IDS_DIRTY: Final = "SELECT id FROM $items$dirty_hint WHERE $dirty_along AND $range ORDER BY $dirty_order LIMIT ?"
"""A page of the ids of dirty rows, along whatever has ids in order."""

FLAGGED: Final = "SELECT id FROM $items$flag_hint WHERE $dirty AND $range ORDER BY merkle_dirty LIMIT ?"
"""Ids of dirty rows in a range, as the index of the flag has them. Ordered by what all have alike, for its sake."""

SORTED: Final = """\
WITH found AS ($found)
SELECT NULL, count(*) FROM found UNION ALL SELECT id, 0 FROM (SELECT id FROM found ORDER BY id LIMIT ?) AS page"""
"""A page of these, and without an id how many they were: a page of too many would have gaps."""

FLAGS_SET: Final = "SELECT merkle_dirty FROM $items$flag_hint WHERE $dirty ORDER BY merkle_dirty LIMIT ?"
"""As many flags as are set, up to a limit; the index knows them without the rows."""

COUNT_OF: Final = "SELECT count(*) FROM ($found) AS found"
"""How many these are."""

COUNT_DIRTY: Final = "SELECT count(*) FROM $items$dirty_hint WHERE $dirty AND $range"
"""How many dirty rows are in a range of ids."""
