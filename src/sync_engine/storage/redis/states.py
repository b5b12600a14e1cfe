"""State sets: who is in a state, and bulk changes of those who are.

Membership is written by the apply script together with the value, so a set equals the states of the live
items, and so does the ordered index beside it; members whose values expire are swept before every answer.
"""

from __future__ import annotations

from collections.abc import AsyncIterator

from sync_engine.item import Op, SyncItem, check_id, check_state
from sync_engine.storage.redis.apply import Writer
from sync_engine.storage.redis.pages import Pages, Span, check_limit
from sync_engine.storage.redis.values import Values

__all__ = ["StateSets"]


class StateSets:
    """The state calls of a store."""

    def __init__(self, pages: Pages, values: Values, writer: Writer) -> None:
        self._pages = pages
        self._values = values
        self._writer = writer

    async def ids(self, state: str, limit: int, after: str | None) -> list[str]:
        """Ids in the state, ascending, those greater than ``after``."""
        return await self._pages.ids(Span(state=state), check_limit(limit), after)

    async def items(self, state: str, limit: int, after: str | None) -> list[SyncItem]:
        """Items in the state, ascending by id, those greater than ``after``."""
        return await self._pages.items(Span(state=state), check_limit(limit), after)

    def iterate(self, state: str) -> AsyncIterator[SyncItem]:
        """All items in the state, ascending by id."""
        return self._pages.iterate(Span(state=state))

    async def count(self, state: str) -> int:
        """How many items are in the state."""
        return await self._pages.count(Span(state=state))

    async def has(self, object_id: str, state: str) -> bool:
        """Whether the item is in the state: its value knows."""
        check_state(state)
        return await self._values.state_of(check_id(object_id)) == state

    async def move(self, object_id: str, from_state: str, to_state: str) -> bool:
        """Change the state of an item that is in ``from_state``; False if it is not."""
        check_state(from_state)
        op = Op(kind="restate", object_id=check_id(object_id), stamp=0, state=check_state(to_state))
        return await self._writer.change((op,), from_state) == 1

    async def delete_all(self, state: str) -> int:
        """Delete the items that are in the state when their turn comes; how many that were."""
        return await self._pages.delete(Span(state=state))
