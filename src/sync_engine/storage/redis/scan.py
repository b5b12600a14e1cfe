"""Prefix work: the items whose ids begin with a text, ordered by id, at a cost that follows the matches.

It rests on the index of ids that the apply script keeps, so that nothing but items is ever met, whatever else
the prefix of the store covers.
"""

from __future__ import annotations

from collections.abc import AsyncIterator

from sync_engine.errors import InvalidItem
from sync_engine.item import SyncItem
from sync_engine.storage.redis.pages import Pages, Span, check_limit

__all__ = ["Prefixes"]


class Prefixes:
    """The prefix calls of a store. Each raises ``InvalidItem`` for an empty prefix without ``allow_all``."""

    def __init__(self, pages: Pages) -> None:
        self._pages = pages

    async def items(self, prefix: str, limit: int, after: str | None, *, allow_all: bool) -> list[SyncItem]:
        """Items whose id begins with the prefix, ascending, those greater than ``after``."""
        return await self._pages.items(_span(prefix, allow_all), check_limit(limit), after)

    async def ids(self, prefix: str, limit: int, after: str | None, *, allow_all: bool) -> list[str]:
        """The same, their ids alone."""
        return await self._pages.ids(_span(prefix, allow_all), check_limit(limit), after)

    def iterate(self, prefix: str, *, allow_all: bool) -> AsyncIterator[SyncItem]:
        """All of them."""
        return self._pages.iterate(_span(prefix, allow_all))

    async def count(self, prefix: str, *, allow_all: bool) -> int:
        """How many there are."""
        return await self._pages.count(_span(prefix, allow_all))

    async def delete_all(self, prefix: str, *, allow_all: bool) -> int:
        """Delete them, each if it is there when its turn comes; how many that were."""
        return await self._pages.delete(_span(prefix, allow_all))


def _span(prefix: str, allow_all: bool) -> Span:
    if prefix == "" and not allow_all:
        raise InvalidItem("prefix", "''", "would be every item: say allow_all=True if that is meant")
    return Span(prefix)
