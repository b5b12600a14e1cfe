"""Time that moves only when a test says so."""

from __future__ import annotations

import asyncio
import heapq
from itertools import count

__all__ = ["VirtualClock"]

TURNS = 20
"""Loop turns given to what a wake-up sets in motion; a chain of tasks and futures takes one turn per link."""


class VirtualClock:
    """The ``Clock`` port without a clock. It wakes its sleepers in the order of their times.

    ``advance`` moves time at once: who is due wakes when the loop next runs. ``run_for`` moves it from
    sleeper to sleeper and lets each run (and sleep again) at its own moment. ``jump_wall`` moves the
    wall clock alone, as an administrator or NTP does.
    """

    def __init__(self, now_ms: int = 1_700_000_000_000) -> None:
        self._start_ms = now_ms
        self._elapsed_s = 0.0
        self._sleepers: list[tuple[float, int, asyncio.Future[None]]] = []
        self._order = count()

    def now_ms(self) -> int:
        return self.now_us() // 1000

    def now_us(self) -> int:
        return self._start_ms * 1000 + round(self._elapsed_s * 1_000_000)

    def monotonic(self) -> float:
        return self._elapsed_s

    async def sleep(self, seconds: float, /) -> None:
        """Sleep until time has been moved that far; zero and less only give way."""
        if seconds <= 0:
            await asyncio.sleep(0)
            return
        awake: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        heapq.heappush(self._sleepers, (self._elapsed_s + seconds, next(self._order), awake))
        await awake

    @property
    def sleepers(self) -> int:
        """How many are asleep."""
        return sum(not awake.done() for _, _, awake in self._sleepers)

    def advance(self, seconds: float) -> None:
        """Move time and wake who is due, earliest first."""
        self._elapsed_s += seconds
        while self._sleepers and self._sleepers[0][0] <= self._elapsed_s:
            self._wake_first()

    async def run_for(self, seconds: float) -> None:
        """Move time step by step; whoever wakes runs before time moves on."""
        until_s = self._elapsed_s + seconds
        await self._give_way()
        while self._sleepers and self._sleepers[0][0] <= until_s:
            self._elapsed_s = max(self._elapsed_s, self._sleepers[0][0])
            self._wake_first()
            await self._give_way()
        self._elapsed_s = until_s

    def jump_wall(self, seconds: float) -> None:
        """Move the wall clock alone, forwards or back."""
        self._start_ms += round(seconds * 1000)

    def _wake_first(self) -> None:
        _, _, awake = heapq.heappop(self._sleepers)
        if not awake.done():  # a cancelled sleeper is no longer there
            awake.set_result(None)

    async def _give_way(self) -> None:
        for _ in range(TURNS):
            await asyncio.sleep(0)

    def __repr__(self) -> str:
        return f"<VirtualClock {self._elapsed_s:g}s | {self.sleepers} asleep>"
