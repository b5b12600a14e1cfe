"""What PostgreSQL says in its own way: whole columns are bound as arrays, so that a text serves any number of rows.

Many small rows are copied into a temporary table and taken from there, which costs us less than arrays do: the rows
"copied beside unnest" of ``make bench ARGS=sql_drivers``. The table lives for one transaction: one that stayed would
keep the database from forgetting old transactions, and autovacuum may not touch it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from itertools import count
from typing import Final, TypeVar

from sync_engine.storage.sql.rows import Value
from sync_engine.storage.sql.words import Said, Words

__all__ = ["COPIED", "COPIES_FAILED_MAX", "EMPTY_COPIED", "MAKE_COPIED", "Copying", "PostgresqlWords"]

log = logging.getLogger(__name__)

T = TypeVar("T")

COPIED: Final = "sync_copied"

MAKE_COPIED: Final = f"""\
CREATE TEMPORARY TABLE {COPIED} (id text, version int8, timestamp int8, payload_hash text, payload text,
  payload_blob bytea, audit text, state text, access_count int8, last_accessed int8, stamp int8) ON COMMIT DROP"""
"""The columns are those of ``row_of``."""

EMPTY_COPIED: Final = f"TRUNCATE pg_temp.{COPIED}"

COPY_MIN: Final = 800
"""Rows that are worth the table, which leaves some dead rows in the catalog and takes two round trips more: what a copy
saves of our time grows with their number (the same rows of the benchmark, at 500, 1,000 and 2,000)."""

COPY_BYTES_MAX: Final = 1_500
"""Mean of their contents: a copy saves our time, of which each row takes about as much whatever its size, and that is
little beside what the server takes for large ones (the row of 3 kB), which from 2 kB on it would compress twice."""

OFF_S: Final = 600.0
"""For so long nothing is copied after it could not be done."""

COPIES_FAILED_MAX: Final = 3
"""So many that fail one after the other, though each time by what any statement might meet, are no coincidence."""

ARRAYS: Final = """\
unnest(?::text[], ?::int8[], ?::int8[], ?::text[], ?::text[], ?::bytea[], ?::text[], ?::text[],
  ?::int8[], ?::int8[], ?::int8[])"""

UPSERT: Final = """\
INSERT INTO $items AS held (id, version, timestamp, payload_hash, payload, payload_blob, audit, state,
  access_count, last_accessed, stamp, merkle_dirty)
SELECT told.id, coalesce(told.version, 1), told.timestamp, told.payload_hash, told.payload, told.payload_blob,
  told.audit, told.state, coalesce(told.access_count, 0), coalesce(told.last_accessed, 0), told.stamp, 1
FROM $source AS told (id, version, timestamp, payload_hash, payload, payload_blob, audit, state,
  access_count, last_accessed, stamp)
ON CONFLICT (id) DO UPDATE SET
  version = excluded.version, timestamp = excluded.timestamp, payload_hash = excluded.payload_hash,
  payload = excluded.payload, payload_blob = excluded.payload_blob, audit = excluded.audit,
  merkle_dirty = CASE WHEN held.payload_hash IS DISTINCT FROM excluded.payload_hash OR held.version <> excluded.version
    THEN 1 ELSE held.merkle_dirty END,
  state = excluded.state, access_count = excluded.access_count, last_accessed = excluded.last_accessed,
  stamp = excluded.stamp
WHERE excluded.stamp IS NULL
  OR excluded.stamp > coalesce(held.stamp, 0)
  OR (excluded.stamp = held.stamp AND excluded.payload_hash >= coalesce(held.payload_hash, ''))"""

USUAL: Final = {1: 1, 4: None, 5: None, 6: None, 8: 0, 9: 0, 10: None}
"""Columns that often hold one value in all rows, and that value. unnest fills a shorter array up with NULL, so an empty
one stands for them: asyncpg looks at every element of an array twice, which was a third of our time."""

RESTATE: Final = """\
UPDATE $items AS held SET state = told.state, stamp = coalesce(nullif(told.stamp, 0), held.stamp)
FROM unnest(?::text[], ?::text[], ?::int8[]) AS told (id, state, stamp) WHERE held.id = told.id"""

BURY: Final = """\
INSERT INTO sync_tombstones (id, stamp, deleted_at_ms) SELECT * FROM unnest(?::text[], ?::int8[], ?::int8[])
ON CONFLICT (id) DO UPDATE SET stamp = excluded.stamp, deleted_at_ms = excluded.deleted_at_ms
WHERE excluded.stamp > sync_tombstones.stamp"""

# Both sides cut to a page: a sort of everything newer would otherwise stand between two pages.
CHANGED_ROWS: Final = "(SELECT $columns, 0 FROM $items WHERE (stamp, id) > (?, ?) ORDER BY stamp, id LIMIT ?)"

CHANGED_DELETES: Final = """\
(SELECT id, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, stamp, 1
 FROM sync_tombstones WHERE (stamp, id) > (?, ?) ORDER BY stamp, id LIMIT ?)"""

# Not "= 1": ordered by a constant, the flags would be of no more use than the whole table, where the planner believes
# most rows to be dirty. A range of one can be ordered by.
DIRTY: Final = "merkle_dirty BETWEEN 1 AND 1"

# Likewise: "+ 0 = 1" is taken for one row in 200, and so for a reason to read and sort the whole table for every page.
DIRTY_ALONG: Final = "(merkle_dirty = 1)::int <> 0"


class Copying:
    """Whether rows can be copied: some users may make no temporary table, and there may be no room for one.

    What any statement would have met, such as a time-out or a lost connection, says nothing of that, unless copies meet
    it again and again: some poolers do not let them through, some lines are too slow for them.
    """

    def __init__(self) -> None:
        self.allowed = False
        self._off_until = 0.0
        self.failures = 0
        """Copies that failed one after the other; those that were under way together count as one."""

    @property
    def possible(self) -> bool:
        """Whether to try."""
        return self.allowed and time.monotonic() >= self._off_until

    def passed(self) -> None:
        """Rows were copied."""
        self.failures = 0

    def met(self, why: str, failures: int) -> None:
        """A copy met what any statement might have; ``failures`` is how many there were when it began."""
        if failures == self.failures:
            self.failures += 1
        if self.failures >= COPIES_FAILED_MAX:
            self.failed(why)

    def failed(self, why: str) -> None:
        """Send rows without for a while."""
        if self.possible:
            log.warning("rows are not copied to PostgreSQL for %.0f s, which is slower: %s", OFF_S, why)
        self._off_until = time.monotonic() + OFF_S
        self.failures = 0


class PostgresqlWords(Words):
    """The statements about tables of items."""

    # Copied or not, up to 2,000 rows a statement become faster, beyond 4,000 slower: docs/performance.md.
    rows_max = 2000
    ids_per_table = 1000
    columns = (
        "id, version, timestamp, payload_hash, payload, payload_blob, audit, state, access_count, last_accessed, stamp"
    )
    counts_writes = True
    changed_rows = CHANGED_ROWS
    changed_deletes = CHANGED_DELETES
    dirty = DIRTY
    dirty_along = DIRTY_ALONG

    def __init__(self, copying: Copying, *tables: str) -> None:
        super().__init__(*tables)
        self._copying = copying

    def upsert(self, rows: Sequence[Sequence[Value]]) -> Said:
        if len(rows) >= COPY_MIN and self._copying.possible and _small(rows):
            return Said(self._upsert(f"pg_temp.{COPIED}"), copied=rows)
        columns: list[Sequence[Value]] = list(zip(*rows, strict=True))
        for at, usual in USUAL.items():
            if columns[at].count(usual) == len(rows):
                columns[at] = ()
        return Said(self._upsert(ARRAYS), columns)

    def bury(self, rows: Sequence[tuple[str, int, int]]) -> Said:
        return Said(self._once(BURY, self._text), list(zip(*rows, strict=True)))

    def restate(self, rows: Sequence[tuple[str, str | None, int]]) -> Said:
        return Said(self._once(RESTATE, self._text), list(zip(*rows, strict=True)))

    def _upsert(self, source: str) -> str:
        return self._once(UPSERT, lambda title: self._text(title, source=source), source)

    def _changed_from(self, stamp: int, id_: str, limit: int) -> tuple[Value, ...]:
        return stamp, id_, limit

    def parts(self, rows: Sequence[T]) -> Iterator[Sequence[T]]:
        for start in range(0, len(rows), self.rows_max):
            yield rows[start : start + self.rows_max]

    def mark(self, number: int) -> str:
        return f"${number}"

    def _marked(self, text: str) -> str:
        numbers = count(1)
        return "".join(self.mark(next(numbers)) if char == "?" else char for char in text)

    def _among(self, title: str, ids: Sequence[str]) -> Said:
        return Said(self._once(title, self._of_any), (ids,) * self._many)

    def _of_any(self, title: str) -> str:
        return self._of_ids(title, "= ANY (?::text[])")


def _small(rows: Sequence[Sequence[Value]]) -> bool:
    """By their contents, of which a row has one: text or bytes."""
    return sum(len(row[4] or row[5] or "") for row in rows) <= len(rows) * COPY_BYTES_MAX  # type: ignore[misc,arg-type]  # both have a length
