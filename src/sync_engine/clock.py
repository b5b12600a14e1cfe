"""Time and stamps: the system clock, and the hybrid logical clock that orders operations.

A stamp is 64 bits, 48 of epoch milliseconds and 16 of counter (S. Kulkarni et al., "Logical Physical
Clocks", 2014). It is strictly increasing per engine and above every stamp the engine has read, so a
wall clock that jumps back cannot make a new write look old. The counter begins at a random number in
each millisecond, and a little above what was read: two engines must not give out one stamp, since
nothing could then say which of two writes is the newer.
"""

from __future__ import annotations

import asyncio
import random
import time

from sync_engine.ports import Clock

__all__ = ["Stamps", "SystemClock"]

COUNTER_BITS = 16
APART_BITS = 13
"""Of the counter, what chance decides. The rest is room for the operations of one millisecond."""
STAMP_MAX = 2**62
"""The year 4199. SQL keeps stamps in signed 64-bit columns: one near their end is damage, and not to be followed."""


class SystemClock:
    """The real clock."""

    def now_ms(self) -> int:
        return time.time_ns() // 1_000_000

    def monotonic(self) -> float:
        return time.monotonic()

    async def sleep(self, seconds: float, /) -> None:
        await asyncio.sleep(seconds)


class Stamps:
    """Hands out strictly increasing stamps."""

    def __init__(self, clock: Clock, rng: random.Random, after: int = 0) -> None:
        self._clock = clock
        self._rng = rng
        self.last = after

    def next(self) -> int:
        """A stamp greater than every one handed out or observed."""
        wall = self._clock.now_ms() << COUNTER_BITS
        # The counter overflows into the milliseconds, which only runs the stamp ahead of the wall clock.
        self.last = wall + self._apart() if wall > self.last else self.last + 1
        return self.last

    def observe(self, stamp: int) -> None:
        """Never hand out a stamp at or below this one."""
        if self.last < stamp < STAMP_MAX:
            self.last = stamp + self._apart()

    def _apart(self) -> int:
        return self._rng.getrandbits(APART_BITS)

    def __repr__(self) -> str:
        return f"<Stamps last {self.last} ({self.last >> COUNTER_BITS} ms)>"
