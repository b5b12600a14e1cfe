"""Which node of a cluster has which shard: learnt from whichever node answers, corrected by every MOVED."""

from __future__ import annotations

import asyncio
import logging
import math
import random
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence, Set
from typing import Any

from sync_engine.errors import SyncEngineError, TierUnavailable
from sync_engine.owned import outlasting
from sync_engine.storage.redis.slots import SHARDS, Node, owners_of

__all__ = ["Topology"]

log = logging.getLogger(__name__)

ASKED_AT_ONCE = 3
"""Nodes that are asked together; the first answer counts, since one of them may be silent."""
LOOK_EVERY_S = 0.25
"""Between two looks: what is wrong is corrected call by call until then."""

Own = Callable[[Coroutine[Any, Any, Any]], "asyncio.Task[Any]"]


class Topology:
    """``ask`` puts CLUSTER SLOTS to a node. ``on_new`` is called with nodes that have a shard and had none before.

    Such a node may be a replica which lacks some of what its primary confirmed, so it is called before anybody is told
    of the node. (A primary that is given further slots receives all of their keys first.)
    """

    def __init__(
        self,
        seeds: Sequence[Node],
        *,
        ask: Callable[[Node], Awaitable[Any]],
        own: Own,
        on_new: Callable[[Set[Node]], None],
    ) -> None:
        self._seeds = tuple(seeds)
        self._ask = ask
        self._own = own
        self._on_new = on_new
        self._looking: asyncio.Task[None] | None = None
        self._looked_at = 0.0
        self._trouble = ""
        self.owners: list[Node | None] = [None] * SHARDS

    @property
    def primaries(self) -> dict[Node, list[int]]:
        """The shards of each node that has any."""
        parts: dict[Node, list[int]] = {}
        for number, node in enumerate(self.owners):
            if node is not None:
                parts.setdefault(node, []).append(number)
        return parts

    async def known(self, looked_s_ago_max: float = math.inf) -> None:
        """Return once there has been an answer, and not too long ago. Raises ``TierUnavailable`` where none comes."""
        if not any(self.owners) or asyncio.get_running_loop().time() - self._looked_at > looked_s_ago_max:
            await outlasting(self.look())
        if not any(self.owners):
            raise TierUnavailable("l2", f"no node of the cluster says who serves what: {self._trouble or 'no slots'}")

    def look(self) -> asyncio.Task[None]:
        """Ask around, soon; who comes while that is under way joins."""
        if self._looking is None or self._looking.done():
            self._looking = self._own(self._look())
        return self._looking

    def take_over(self, owners: Mapping[int, Node]) -> None:
        """Note who has these shards now."""
        before = self.primaries.keys()
        new = set(owners.values()) - before
        if before and new:
            log.warning("the cluster has other primaries: %s", ", ".join(f"{host}:{port}" for host, port in new))
            self._on_new(new)
        for number, node in owners.items():
            self.owners[number] = node

    async def _look(self) -> None:
        clock = asyncio.get_running_loop()
        if any(self.owners):
            await asyncio.sleep(self._looked_at + LOOK_EVERY_S - clock.time())
        self._looked_at = clock.time()
        nodes = list(dict.fromkeys([*self.primaries, *self._seeds]))
        random.shuffle(nodes)  # an outdated view of one node must not be the only one we ever see
        while nodes:
            asked, nodes = nodes[:ASKED_AT_ONCE], nodes[ASKED_AT_ONCE:]
            for answer in asyncio.as_completed([self._own(self._told_by(node)) for node in asked]):
                if owners := await answer:
                    self.take_over(owners)
                    return

    async def _told_by(self, node: Node) -> dict[int, Node]:
        try:
            return owners_of(await self._ask(node), node)
        except SyncEngineError as failed:
            self._trouble = failed.reason if isinstance(failed, TierUnavailable) else str(failed)
            return {}
