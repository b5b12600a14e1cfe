"""The statements of the store, each a text with a title, built once per table and size.

A text is written once, for all databases, where they agree; a database says what it says differently
(``*_words.py``). Values are always bound: ``?`` stands for one until the database puts its own mark there. ``$items``
and the like stand for a table name of tables.py and for constants, the only things ever put into a text. Times are
epoch milliseconds.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from string import Template
from typing import ClassVar, Final, NamedTuple, TypeVar

from sync_engine.storage.sql.rows import Value

__all__ = ["FORGOTTEN", "Said", "Words", "padded", "power_of_two", "repeated"]

T = TypeVar("T")


class Said(NamedTuple):
    """A statement and the values bound in it; PostgreSQL binds whole columns."""

    text: str
    values: Sequence[Value | Sequence[Value]] = ()


FETCH: Final = "SELECT $columns FROM $items WHERE id $among"
"""Whole rows of these ids."""

EXISTING: Final = "SELECT id FROM $items WHERE id $among"
"""Which of these ids have a row."""

HELD: Final = "SELECT id, coalesce(stamp, 0), version, coalesce(payload_hash, ''), state FROM $items WHERE id $among"
"""What decides about an operation on these ids."""

STAMPS: Final = "SELECT id, coalesce(stamp, 0) FROM $items WHERE id $among"
"""Stamps of these ids."""

DELETE: Final = "DELETE FROM $items WHERE id $among"
"""Remove rows, after HELD was read in the same transaction."""

ANY_BURIED: Final = "SELECT EXISTS (SELECT 1 FROM sync_tombstones)"
"""Whether there is any tombstone; asking for 256 ids costs 0.4 ms even where there is none."""

BURIED: Final = "SELECT id, stamp FROM sync_tombstones WHERE id $among"
"""Tombstones of these ids."""

EXHUME: Final = "DELETE FROM sync_tombstones WHERE id $among"
"""Forget tombstones whose id carries a newer stamp in its row."""

FORGOTTEN: Final = "forgotten_ms"
"""Name of a number of sync_meta."""

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

NEWEST_STAMP: Final = """\
SELECT coalesce(max(stamp), 0) FROM
  (SELECT max(stamp) AS stamp FROM sync_items UNION ALL SELECT max(stamp) FROM sync_tombstones) AS both_tables"""
"""The newest stamp the slow way, for tables that do not note it yet."""

CHANGED: Final = """\
SELECT $columns, 0 FROM $items WHERE (stamp, id) > (?, ?)
UNION ALL
SELECT id, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, stamp, 1
FROM sync_tombstones WHERE (stamp, id) > (?, ?)
ORDER BY 11, 1 LIMIT ?"""
"""A page of rows and tombstones, the marked ones, by stamp and id."""

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


class Words(ABC):
    """The statements about one item table, with their values."""

    rows_max: ClassVar[int]
    """Most rows of one upsert."""
    ids_max: ClassVar[int]
    """Most ids one statement asks for."""
    columns: ClassVar[str]
    """What a ``Row`` is made of."""
    counts_writes: ClassVar[bool]
    """Whether the number of rows that an upsert reports is the number that it wrote."""
    most: ClassVar[str] = "GREATEST"
    least: ClassVar[str] = "LEAST"
    note: ClassVar[str] = NOTE
    changed_text: ClassVar[str] = CHANGED

    def __init__(self, table: str) -> None:
        self._table = table
        self._sized: dict[tuple[str, int], str] = {}
        self._raise = self._text(self.note, best=self.most)
        self._lower = self._text(self.note, best=self.least)
        self._read_meta = self._text(READ_META)
        self._late = self._text(LATE)
        self._forget_late = self._text(FORGET_LATE)
        self._in_state = self._text(IN_STATE)
        self._ids_in_state = self._text(IDS_IN_STATE)
        self._count_state = self._text(COUNT_STATE)
        self._changed = self._text(self.changed_text)
        self._unstamped = self._text(UNSTAMPED)
        self._range = {shape: self._text(RANGE, range=bounds) for shape, bounds in RANGES.items()}
        self._ids_in_range = {shape: self._text(IDS_IN_RANGE, range=bounds) for shape, bounds in RANGES.items()}
        self._count_range = {shape: self._text(COUNT_RANGE, range=bounds) for shape, bounds in RANGES.items()}
        self.count = Said(self._text(COUNT))
        self.any_buried = Said(ANY_BURIED)
        self.slow_newest_stamp = Said(NEWEST_STAMP)

    # Of ids.

    def fetch(self, ids: Sequence[str]) -> Said:
        return self._among(FETCH, ids)

    def existing(self, ids: Sequence[str]) -> Said:
        return self._among(EXISTING, ids)

    def held(self, ids: Sequence[str]) -> Said:
        return self._among(HELD, ids)

    def stamps(self, ids: Sequence[str]) -> Said:
        return self._among(STAMPS, ids)

    def delete(self, ids: Sequence[str]) -> Said:
        return self._among(DELETE, ids)

    def buried(self, ids: Sequence[str]) -> Said:
        return self._among(BURIED, ids)

    def exhume(self, ids: Sequence[str]) -> Said:
        return self._among(EXHUME, ids)

    # Of rows; at most as many as ``parts`` gives.

    @abstractmethod
    def upsert(self, rows: Sequence[Sequence[Value]]) -> Said:
        """Write rows of ``row_of`` unless the table holds a newer stamp; of equal stamps the larger hash wins."""

    @abstractmethod
    def bury(self, rows: Sequence[tuple[str, int, int]]) -> Said:
        """Remember deletes: id, stamp, moment. A newer one stays."""

    @abstractmethod
    def restate(self, rows: Sequence[tuple[str, str | None, int]]) -> Said:
        """Change states (id, state, stamp), after HELD was read in the same transaction; stamp 0 leaves the stamp."""

    @abstractmethod
    def prune(self, before_ms: int, most: int) -> Said:
        """Forget some tombstones older than a moment."""

    def parts(self, rows: Sequence[T]) -> Iterator[Sequence[T]]:
        """Rows cut as ``upsert``, ``bury`` and ``restate`` take them; a part halved is one again."""
        start = 0
        while start < len(rows):
            size = power_of_two(min(self.rows_max, len(rows) - start))
            yield rows[start : start + size]
            start += size

    # Of numbers.

    def note_most(self, name: str, value: int) -> Said:
        return Said(self._raise, (name, value))

    def note_least(self, name: str, value: int) -> Said:
        return Said(self._lower, (name, value))

    def meta(self, name: str) -> Said:
        return Said(self._read_meta, (name,))

    def late(self, name: str) -> Said:
        return Said(self._late, (name,))

    def forget_late(self, name: str) -> Said:
        return Said(self._forget_late, (name,))

    # Of pages.

    def in_state(self, state: str, after: str, limit: int) -> Said:
        return Said(self._in_state, (state, after, limit))

    def ids_in_state(self, state: str, after: str, limit: int) -> Said:
        return Said(self._ids_in_state, (state, after, limit))

    def count_state(self, state: str) -> Said:
        return Said(self._count_state, (state,))

    def range(self, shape: tuple[bool, bool], bounds: Sequence[str], limit: int) -> Said:
        return Said(self._range[shape], (*bounds, limit))

    def ids_in_range(self, shape: tuple[bool, bool], bounds: Sequence[str], limit: int) -> Said:
        return Said(self._ids_in_range[shape], (*bounds, limit))

    def count_range(self, shape: tuple[bool, bool], bounds: Sequence[str]) -> Said:
        return Said(self._count_range[shape], bounds)

    def changed(self, stamp: int, id_: str, limit: int) -> Said:
        return Said(self._changed, (stamp, id_, stamp, id_, limit))

    def unstamped(self, id_: str, limit: int) -> Said:
        return Said(self._unstamped, (id_, limit))

    # How.

    def _text(self, title: str, **parts: str) -> str:
        return self._marked(Template(title).substitute(items=self._table, columns=self.columns, **parts))

    def mark(self, number: int) -> str:
        """What stands for the bound value of this number, from 1 on, in a text made elsewhere."""
        return "?"

    def _marked(self, text: str) -> str:
        return text

    def _among(self, title: str, ids: Sequence[str]) -> Said:
        bound = padded(ids, self.ids_max)
        return Said(self._of_size(title, len(bound), among=f"IN ({repeated('?', len(bound))})"), bound)

    def _of_size(self, title: str, size: int, **parts: str) -> str:
        text = self._sized.get((title, size))
        if text is None:
            text = self._sized[title, size] = self._text(title, **parts)
        return text


def padded(ids: Sequence[str], most: int) -> list[str]:
    """At most so many ids, filled up to a power of two or the most by repeating the last.

    Sizes come from a short list, so that few texts exist and a driver's statement cache knows them all.
    """
    size = min(most, 1 << (len(ids) - 1).bit_length())
    return [*ids, *([ids[-1]] * (size - len(ids)))]


def power_of_two(most: int) -> int:
    """The largest that is not above ``most``."""
    return 1 << most.bit_length() - 1


def repeated(mark: str, size: int) -> str:
    """A list of so many marks."""
    return ", ".join([mark] * size)
