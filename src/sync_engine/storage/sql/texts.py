"""How a statement about tables of items is made of its title: a part for each table, and a text built once per size.

It is built when it is first asked for: with a hundred tables most are never asked, and all of them take 20 ms. Values
are always bound: ``?`` stands for one until the database puts its own mark there. ``$items`` and the like stand for a
table name of tables.py or of a checked schema, and for constants, the only things ever put into a text.
"""

from __future__ import annotations

from abc import ABC
from collections.abc import Callable, Sequence
from string import Template
from typing import ClassVar, NamedTuple, TypeVar

from sync_engine.storage.sql import titles
from sync_engine.storage.sql.rows import Value
from sync_engine.storage.sql.tables import index_name

__all__ = ["Said", "Texts", "padded", "power_of_two", "repeated"]

T = TypeVar("T")


class Said(NamedTuple):
    """A statement and the values bound in it; PostgreSQL binds whole columns."""

    text: str
    values: Sequence[Value | Sequence[Value]] = ()
    copied: Sequence[Sequence[Value]] = ()
    """Rows that PostgreSQL's ``attempt`` sends first, into a table of the transaction's own, where the statement finds
    them."""


class Texts(ABC):
    """The texts about some tables; what of them differs between databases stands first."""

    ids_per_table: ClassVar[int]
    """Most ids one statement asks a table for."""
    columns: ClassVar[str]
    """What a ``Row`` is made of."""
    dirty: ClassVar[str] = "merkle_dirty = 1"
    """Whether a row is dirty, as the index of the flag can answer it."""
    dirty_along: ClassVar[str] = "merkle_dirty + 0 = 1"
    """The same for pages in order of ids: said so that only an index which has that order is of use."""
    dirty_order: ClassVar[str] = "id"
    dirty_hint: ClassVar[str] = ""
    """Which index has pages and counts of dirty rows, where the database has to be told."""
    flag_hint: ClassVar[str] = ""
    """The same of the flags alone."""

    def __init__(self, *tables: str) -> None:
        self.tables = tables
        self._many = len(tables)
        self.ids_max = max(1, self.ids_per_table // self._many)
        self._texts: dict[tuple[str, object], str] = {}

    def mark(self, number: int) -> str:
        """What stands for the bound value of this number, from 1 on, in a text made elsewhere."""
        return "?"

    def _marked(self, text: str) -> str:
        return text

    def _once(self, title: str, build: Callable[[str], str], of: object = None) -> str:
        """The text of a title as ``build`` makes it, of this size or shape."""
        try:
            return self._texts[title, of]
        except KeyError:
            text = self._texts[title, of] = build(title)
            return text

    def _text(self, title: str, **parts: str) -> str:
        return self._marked(self._each(title, **parts)[-1])

    def _each(self, title: str, **parts: str) -> list[str]:
        """The text about each table."""
        return [
            Template(title).substitute(
                items=table,
                index=index_name(table, "stamp"),
                dirty=self.dirty,
                dirty_along=self.dirty_along,
                dirty_order=self.dirty_order,
                dirty_hint=self.dirty_hint.replace("$index", index_name(table, "merkle_dirty")),
                flag_hint=self.flag_hint.replace("$index", index_name(table, "merkle_dirty")),
                columns=self.columns,
                **parts,
            )
            for table in self.tables
        ]

    def _page(self, title: str, **parts: str) -> str:
        """A page of each table, merged by id; the one of a single table is said as it is."""
        return self._marked(self._merged(title, " ORDER BY 1", **parts))

    def _paged(self, text: str, values: Sequence[Value], limit: int) -> Said:
        return Said(text, self._some(values, limit))

    def _of_some(self, of: str, title: str, **parts: str) -> str:
        """A text about some rows of all tables, in whatever order: the first tables may have enough."""
        return self._marked(Template(of).substitute(found=self._merged(title, "", **parts)))

    def _merged(self, title: str, order: str, **parts: str) -> str:
        each = self._each(title, **parts)
        if len(each) == 1:
            return each[0]
        merged = " UNION ALL ".join(f"SELECT * FROM ({text}) AS page{at}" for at, text in enumerate(each))  # noqa: S608
        return f"{merged}{order} LIMIT ?"

    def _some(self, values: Sequence[Value], most: int) -> tuple[Value, ...]:
        own = (*values, most)
        return own if self._many == 1 else (*own * self._many, most)

    def _sum(self, title: str, **parts: str) -> str:
        each = self._each(title, **parts)
        return self._marked(each[0] if len(each) == 1 else f"SELECT {' + '.join(f'({text})' for text in each)}")

    def _ranged(self, title: str, build: Callable[..., str], shape: tuple[bool, bool]) -> str:
        return self._once(title, lambda title: build(title, range=titles.RANGES[shape]), shape)

    def _among(self, title: str, ids: Sequence[str]) -> Said:
        bound = padded(ids, self.ids_max)
        size = len(bound)
        text = self._once(title, lambda title: self._of_ids(title, f"IN ({repeated('?', size)})"), size)
        return Said(text, bound * self._many)

    def _of_ids(self, title: str, among: str) -> str:
        return self._marked(" UNION ALL ".join(self._each(title, among=among)))

    def _of_rows(self, title: str, row: str, size: int, between: str = ", ") -> str:
        return self._once(title, lambda title: self._text(title, rows=between.join([row] * size)), size)


def padded(values: Sequence[T], most: int) -> list[T]:
    """At most so many values, filled up to a power of two or the most by repeating the last.

    Sizes come from a short list, so that few texts exist and a driver's statement cache knows them all.
    """
    size = min(most, 1 << (len(values) - 1).bit_length())
    return [*values, *([values[-1]] * (size - len(values)))]


def power_of_two(most: int) -> int:
    """The largest that is not above ``most``."""
    return 1 << most.bit_length() - 1


def repeated(mark: str, size: int) -> str:
    """A list of so many marks."""
    return ", ".join([mark] * size)
