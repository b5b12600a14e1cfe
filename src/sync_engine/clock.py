"""Time and stamps: the system clock, and the hybrid logical clock that orders operations.

A stamp is 64 bits, 48 of epoch milliseconds and 16 of counter (S. Kulkarni et al., "Logical Physical
Clocks", 2014). It is strictly increasing per engine and above every stamp the engine has read, so a
wall clock that jumps back cannot make a new write look old.

The counter begins where the microsecond says, 64 steps for each: of two engines on one machine, the write that began
after the other had ended is the newer, though both are of one millisecond. Among the 64, and above what was read, it
begins at random: two engines must not give out one stamp, since nothing could then say which of two writes is newer.
"""

from __future__ import annotations

import asyncio
import random
import time

from sync_engine.ports import Clock

__all__ = ["Stamps", "SystemClock"]

COUNTER_BITS = 16
STEPS_BITS = 6
"""Of the counter, the steps of one microsecond: 1,000 times 64 are below 2**16."""
APART_BITS = 10
"""Of the counter, how far above a stamp that was read the next one is, by chance: 17 µs at most."""
STAMP_MAX = 2**62
"""The year 4199. SQL keeps stamps in signed 64-bit columns: one near their end is damage, and not to be followed."""


class SystemClock:
    """The real clock."""

    def now_ms(self) -> int:
        return self.now_us() // 1000

    def now_us(self) -> int:
        return time.time_ns() // 1000

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
        ms, us = divmod(self._clock.now_us(), 1000)
        wall = (ms << COUNTER_BITS) + (us << STEPS_BITS)
        # The counter overflows into the milliseconds, which only runs the stamp ahead of the wall clock.
        self.last = wall + self._rng.getrandbits(STEPS_BITS) if wall > self.last else self.last + 1
        return self.last

    def observe(self, stamp: int) -> None:
        """Never hand out a stamp at or below this one."""
        if self.last < stamp < STAMP_MAX:
            self.last = stamp + self._rng.getrandbits(APART_BITS)

    def __repr__(self) -> str:
        return f"<Stamps last {self.last} ({self.last >> COUNTER_BITS} ms)>"
