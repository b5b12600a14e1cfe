"""State sets: who is in a state, and bulk changes of those who are.

Membership is written by the apply script together with the value, so a set equals the states of the live
items; members whose values expire are swept before every answer.
"""

from __future__ import annotations

import heapq
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from typing import Any

from sync_engine.errors import InvalidItem
from sync_engine.item import Op, check_id, check_state
from sync_engine.storage.redis.scripts import STATES
from sync_engine.storage.redis.shards import Arg, Servers

__all__ = ["StateSets"]

PAGE_MEMBERS = 1_000
"""Members that one SSCAN step aims at: below 1 ms of the server."""

Change = Callable[[Sequence[Op], str], Awaitable[int]]
"""Apply operations to the items that are in a state; how many of them it changed."""


class StateSets:
    """The state calls of a store, on the sets ``{prefix}state:{state}`` of ids without prefix."""

    def __init__(self, servers: Servers, change: Change) -> None:
        self._servers = servers
        self._change = change

    async def ids(self, state: str, limit: int, after: str | None) -> list[str]:
        """Ids in the state, ascending, those greater than ``after``. Reads the whole set, in pages."""
        if type(limit) is not int or limit < 0:
            raise InvalidItem("limit", repr(limit), "must be an integer of at least 0")
        smallest: list[str] = []
        cursor = b"0"
        while limit:
            cursor, page = await self._page(state, cursor)
            # A scan may name a member twice.
            new = {object_id for object_id in page if after is None or object_id > after}
            smallest = heapq.nsmallest(limit, new.union(smallest))
            if cursor == b"0":
                break
        return smallest

    async def count(self, state: str) -> int:
        """How many items are in the state."""
        return int(await self._ask(state, "count"))

    async def has(self, object_id: str, state: str) -> bool:
        """Whether the item is in the state."""
        return bool(await self._ask(state, "has", check_id(object_id)))

    async def move(self, object_id: str, from_state: str, to_state: str) -> bool:
        """Change the state of an item that is in ``from_state``; False if it is not."""
        check_state(from_state)
        op = Op(kind="restate", object_id=check_id(object_id), stamp=0, state=check_state(to_state))
        return await self._change((op,), from_state) == 1

    async def delete_all(self, state: str) -> int:
        """Delete the items that are in the state when their turn comes; how many that were."""
        deleted = 0
        cursor = b"0"
        while True:
            cursor, page = await self._page(state, cursor)
            ops = [Op(kind="delete", object_id=object_id, stamp=0) for object_id in dict.fromkeys(page)]
            deleted += await self._change(ops, state)
            if cursor == b"0":
                return deleted

    async def _page(self, state: str, cursor: bytes) -> tuple[bytes, list[str]]:
        following, members = await self._ask(state, "page", cursor, PAGE_MEMBERS)
        ids = []
        for member in members:
            with suppress(UnicodeDecodeError):  # no id of anybody
                ids.append(member.decode())
        return following, ids

    async def _ask(self, state: str, *question: Arg) -> Any:
        shard = self._servers.shards[0]
        keys = (f"{shard.prefix}state:{check_state(state)}",)
        return await self._servers.run(shard, STATES, keys, (shard.prefix, 0, *question))
