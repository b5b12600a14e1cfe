"""Room in Redis before it runs out: the coldest items that SQL holds too leave, step by step.

    a server at `start` ─► pick some items ─► the coldest of them ─► those that SQL has ─► out, until `target`

What Redis alone keeps never leaves, and neither does anything that is no item. At its limit a server would drop
items, sets and streams alike, or refuse every write; this is to happen before.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Sequence
from typing import Final

from sync_engine.errors import SyncEngineError
from sync_engine.ports import Cache, Clock, Memory, Truth
from sync_engine.trust import Trust

__all__ = ["Eviction"]

log = logging.getLogger(__name__)

LOOK_S: Final = 1.0
"""How often the servers are asked how full they are."""

PICKED: Final = 200
LEAVE_MAX: Final = 50
"""Items per step, of so many picked: about 1 ms of the server. The coldest quarter of a sample is colder than three
quarters of all items, whatever their number."""

REST: Final = 4.0
"""A step is followed by a rest so many times as long: never more than a fifth of one connection's time."""
REST_MIN_S: Final = 0.002

FRUITLESS_MAX: Final = 50
"""After so many steps in a row without an item that may leave, a server is left alone for a while."""
GIVEN_UP_S: Final = 30.0


class Eviction:
    """Keeps every server of a cache below its limit, as far as the truth can vouch for what leaves."""

    def __init__(
        self,
        trust: Trust,
        cache: Cache,
        truth: Truth,
        clock: Clock,
        *,
        start: float,
        target: float,
        rng: random.Random,
    ) -> None:
        """``start`` and ``target`` are shares of a server's limit: where items begin to leave, and where that ends."""
        self._trust = trust
        self._cache = cache
        self._truth = truth
        self._clock = clock
        self.start = start
        self.target = target
        self._rng = rng
        self.evicted = 0
        """Items that have left so far."""
        self.stuck = False
        """Whether a server is too full and nothing was found that may leave it."""

    async def run(self) -> None:
        """Look and make room, until cancelled."""
        while True:
            try:
                await self.relieve()
            except SyncEngineError as failed:
                log.debug("no room can be made in Redis now: %s", failed)
            await self._clock.sleep(GIVEN_UP_S if self.stuck else LOOK_S)

    async def relieve(self) -> int:
        """Bring every server that has come to ``start`` down to ``target``; how many items left.

        Raises ``TierUnavailable`` where either tier cannot be asked; what has left by then has left.
        """
        before = self.evicted
        fruitless = 0
        full = [server for server in await self._memory() if server.share >= self.start]
        self.stuck = False
        while full and self._trust.doubt is None:
            places = {place for server in full for place in server.places}
            for server in full:
                began = self._clock.monotonic()
                left = await self._step(self._rng.choice(server.places))
                fruitless = 0 if left else fruitless + 1
                await self._clock.sleep(max(REST_MIN_S, REST * (self._clock.monotonic() - began)))
            if fruitless >= FRUITLESS_MAX:
                self._give_up(full)
                break
            full = [
                server
                for server in await self._memory()
                if server.share > self.target and not places.isdisjoint(server.places)
            ]
        if count := self.evicted - before:
            log.info("%d items have left Redis, which SQL holds: it was above %.0f %%", count, self.start * 100)
        return self.evicted - before

    async def _memory(self) -> Sequence[Memory]:
        return (await self._cache.facts()).memory

    async def _step(self, place: int) -> int:
        coldest = await self._cache.coldest(place, PICKED, LEAVE_MAX)
        held = await self._truth.held_stamps([object_id for object_id, _ in coldest]) if coldest else {}
        # What SQL has of an item without a stamp need not be what Redis has of it.
        leaving = [(object_id, stamp) for object_id, stamp in coldest if 0 < stamp <= held.get(object_id, 0)]
        left = await self._cache.evict(leaving, bury=True) if leaving else 0
        self.evicted += left
        return left

    def _give_up(self, full: Sequence[Memory]) -> None:
        self.stuck = True
        worst = max(server.share for server in full)
        log.warning(
            "Redis is %.0f %% full, and nothing was found in it that SQL holds too and that may leave", worst * 100
        )
