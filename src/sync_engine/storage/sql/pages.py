"""Ordered reads: the range of ids behind a prefix, page after page by the last id seen, never by an offset."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Final

from sync_engine.errors import Corruption, InvalidItem
from sync_engine.item import SyncItem
from sync_engine.storage.sql.rows import NoItem, Row, item_of, successor

__all__ = ["PAGE_ROWS", "Page", "check_limit", "check_text", "judged", "paged", "range_of", "sound"]

PAGE_ROWS: Final = 500
"""Most rows read at a time."""

_log = logging.getLogger(__name__)


Page = Callable[[str, int], Awaitable[list[Row]]]
"""``page(after, rows)``: so many rows, ascending by id, those behind ``after``."""


async def paged(page: Page, after: str, limit: int | None) -> AsyncIterator[SyncItem]:
    """The first ``limit`` items behind ``after`` (None: all). Raises ``Corruption``."""
    async for found in judged(page, after, limit, items_only=True):
        yield sound(found)


async def judged(
    page: Page, after: str, limit: int | None, *, items_only: bool = False
) -> AsyncIterator[SyncItem | Corruption]:
    """What each of the first ``limit`` rows behind ``after`` is (None: all), a page of them in memory at a time."""
    left = limit
    while left is None or left > 0:
        size = PAGE_ROWS if left is None else min(left, PAGE_ROWS)
        rows = await page(after, size)
        for row in rows:
            found = item_of(row)
            if items_only and isinstance(found, NoItem):
                # Another writer's row with an id or a state that no item of ours may have: told, not served.
                _log.warning("skipped a row that is no item: %s", found)
                continue
            yield found
            if left is not None:
                left -= 1
        if len(rows) < size:
            return
        after = rows[-1][0]


def range_of(prefix: str, after: str) -> tuple[tuple[bool, bool], tuple[str, ...]]:
    """The ids behind ``after`` that start with a prefix: (lower bound exclusive, upper bound there), and bounds."""
    above = successor(prefix)
    # The later bound alone: given both, SQLite may start every page at the prefix again.
    later = after >= prefix and after != ""
    low = after if later else prefix
    return (later, above is not None), (low,) if above is None else (low, above)


def sound(item: SyncItem | Corruption) -> SyncItem:
    """The item, or its corruption raised."""
    if isinstance(item, Corruption):
        raise item
    return item


def check_text(field: str, text: object) -> str:
    """Text that a database can compare, or ``InvalidItem``."""
    if not isinstance(text, str):
        raise InvalidItem(field, f"a {type(text).__name__}", "must be a str")
    if "\0" in text:  # no id has it, and PostgreSQL no text
        raise InvalidItem(field, f"{len(text)} characters", "must not contain NUL")
    try:
        text.encode()
    except UnicodeEncodeError as bad:
        raise InvalidItem(field, f"a surrogate at index {bad.start}", "must be valid UTF-8 text") from None
    return text


def check_limit(limit: object) -> int:
    """A number of rows, or ``InvalidItem``."""
    if type(limit) is not int or not 0 <= limit < 2**63:
        raise InvalidItem("limit", f"{limit!r}", "must be an integer of at least 0")
    return limit
