"""The statements of the store about its tables of items, with their values.

A text is written once, for all databases, where they agree (titles.py); a database says what it says differently
(``*_words.py``). How it is made for several tables is in texts.py. Times are epoch milliseconds.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from functools import partial
from typing import ClassVar, Final, TypeVar

from sync_engine.storage.sql import titles
from sync_engine.storage.sql.rows import Value
from sync_engine.storage.sql.texts import Said, Texts, power_of_two

__all__ = ["FORGOTTEN", "ROUTES_VERSION", "Said", "Words"]

T = TypeVar("T")

FORGOTTEN: Final = "forgotten_ms"
"""Name of a number of sync_meta."""

ROUTES_VERSION: Final = "routes"
"""Name of another: it grows with every change of a route."""


class Words(Texts):
    """The statements about tables of items, usually one.

    What reads asks all of them in one statement, which sees every row once, wherever it is being moved. Writing, and
    what is not of items, takes words about one table.
    """

    rows_max: ClassVar[int]
    """Most rows of one upsert."""
    counts_writes: ClassVar[bool]
    """Whether the number of rows that an upsert reports is the number that it wrote."""
    most: ClassVar[str] = "GREATEST"
    least: ClassVar[str] = "LEAST"
    note: ClassVar[str] = titles.NOTE
    changed_rows: ClassVar[str] = titles.CHANGED_ROWS
    changed_deletes: ClassVar[str] = titles.CHANGED_DELETES
    dirty_in_order: ClassVar[bool] = False
    """Whether the index of the flag has ids in order: then a page costs the same however many clean rows there are."""
    for_update: ClassVar[str] = " FOR UPDATE"
    """Rows that are read stay as they are until the transaction ends, whoever writes."""
    before_writing: ClassVar[Said] = Said(titles.BEFORE_WRITING)
    routes: ClassVar[Said] = Said(titles.ROUTES)
    arrived: ClassVar[Said] = Said(titles.ARRIVED)

    # Of ids.

    def fetch(self, ids: Sequence[str]) -> Said:
        return self._among(titles.FETCH, ids)

    def existing(self, ids: Sequence[str]) -> Said:
        return self._among(titles.EXISTING, ids)

    def held(self, ids: Sequence[str]) -> Said:
        return self._among(titles.HELD, ids)

    def flags(self, ids: Sequence[str]) -> Said:
        return self._among(titles.FLAGS + self.for_update, ids)

    def clean(self, ids: Sequence[str]) -> Said:
        return self._among(titles.CLEAN, ids)

    def stamps(self, ids: Sequence[str]) -> Said:
        return self._among(titles.STAMPS, ids)

    def ages(self, ids: Sequence[str]) -> Said:
        return self._among(titles.AGES, ids)

    def delete(self, ids: Sequence[str]) -> Said:
        return self._among(titles.DELETE, ids)

    def take(self, ids: Sequence[str], source: str) -> Said:
        return self._among(titles.TAKE.replace("$source", source), ids)

    def buried(self, ids: Sequence[str]) -> Said:
        return self._among(titles.BURIED, ids)

    def exhume(self, ids: Sequence[str]) -> Said:
        return self._among(titles.EXHUME, ids)

    def outdated(self, before_ms: int, most: int) -> Said:
        return Said(self._once(titles.OUTDATED, self._text), (before_ms, most))

    def prune(self, ids: Sequence[str], before_ms: int) -> Said:
        among = self._among(titles.PRUNE, ids)
        return Said(among.text, (*among.values, before_ms))

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

    def parts(self, rows: Sequence[T]) -> Iterator[Sequence[T]]:
        """Rows cut as ``upsert``, ``bury`` and ``restate`` take them; a part halved is one again."""
        start = 0
        while start < len(rows):
            size = power_of_two(min(self.rows_max, len(rows) - start))
            yield rows[start : start + size]
            start += size

    # Of numbers.

    def note_most(self, name: str, value: int) -> Said:
        return Said(self._once(self.note, lambda title: self._text(title, best=self.most), "most"), (name, value))

    def note_least(self, name: str, value: int) -> Said:
        return Said(self._once(self.note, lambda title: self._text(title, best=self.least), "least"), (name, value))

    @property
    def newest_stamps(self) -> Said:
        return Said(self._once(titles.NEWEST_STAMP, self._newest))

    def meta(self, name: str) -> Said:
        return Said(self._once(titles.READ_META, self._text), (name,))

    def late(self, name: str) -> Said:
        return Said(self._once(titles.LATE, self._text), (name,))

    def forget_late(self, name: str) -> Said:
        return Said(self._once(titles.FORGET_LATE, self._text), (name,))

    # Of routes.

    def route(self, prefix: str, table: str) -> Said:
        return Said(self._once(titles.ROUTE, self._text), (prefix, table))

    def unroute(self, prefix: str) -> Said:
        return Said(self._once(titles.UNROUTE, self._text), (prefix,))

    # Of pages.

    def in_state(self, state: str, after: str, limit: int) -> Said:
        return self._paged(self._once(titles.IN_STATE, self._page), (state, after), limit)

    def ids_in_state(self, state: str, after: str, limit: int) -> Said:
        return self._paged(self._once(titles.IDS_IN_STATE, self._page), (state, after), limit)

    def count_state(self, state: str) -> Said:
        return Said(self._once(titles.COUNT_STATE, self._sum), (state,) * self._many)

    def range(self, shape: tuple[bool, bool], bounds: Sequence[str], limit: int) -> Said:
        return self._paged(self._ranged(titles.RANGE, self._page, shape), bounds, limit)

    def ids_in_range(self, shape: tuple[bool, bool], bounds: Sequence[str], limit: int) -> Said:
        return self._paged(self._ranged(titles.IDS_IN_RANGE, self._page, shape), bounds, limit)

    @property
    def count(self) -> Said:
        return Said(self._once(titles.COUNT, self._sum))

    def count_range(self, shape: tuple[bool, bool], bounds: Sequence[str]) -> Said:
        return Said(self._ranged(titles.COUNT_RANGE, self._sum, shape), tuple(bounds) * self._many)

    def ids_dirty(self, shape: tuple[bool, bool], bounds: Sequence[str], limit: int) -> Said:
        return self._paged(self._ranged(titles.IDS_DIRTY, self._page, shape), bounds, limit)

    def ids_sorted(self, shape: tuple[bool, bool], bounds: Sequence[str], limit: int, most: int) -> Said:
        """The same page from the flags, of which there should be less than ``most``: see ``titles.SORTED``."""
        text = self._ranged(titles.FLAGGED, partial(self._of_some, titles.SORTED), shape)
        return Said(text, (*self._some(bounds, most), limit))

    def flags_set(self, most: int) -> Said:
        """How many rows are dirty, if they are less than ``most``."""
        return Said(self._once(titles.FLAGS_SET, partial(self._of_some, titles.COUNT_OF)), self._some((), most))

    def count_dirty(self, shape: tuple[bool, bool], bounds: Sequence[str]) -> Said:
        return Said(self._ranged(titles.COUNT_DIRTY, self._sum, shape), tuple(bounds) * self._many)

    def weighed(self, shape: tuple[bool, bool], bounds: Sequence[str], limit: int) -> Said:
        return self._paged(self._ranged(titles.WEIGHED, self._page, shape), bounds, limit)

    def changed(self, stamp: int, id_: str, limit: int) -> Said:
        text = self._once(self.changed_rows, self._changed)
        return Said(text, (*self._changed_from(stamp, id_, limit) * (self._many + 1), limit))

    def unstamped(self, id_: str, limit: int) -> Said:
        return self._paged(self._once(titles.UNSTAMPED, self._page), (id_,), limit)

    # How.

    def _changed_from(self, stamp: int, id_: str, limit: int) -> tuple[Value, ...]:
        return stamp, id_

    def _newest(self, title: str) -> str:
        return self._marked(" UNION ALL ".join([*self._each(title), titles.NEWEST_BURIED]))

    def _changed(self, title: str) -> str:
        return self._marked(" UNION ALL ".join([*self._each(title), self.changed_deletes]) + titles.CHANGED_ORDER)
