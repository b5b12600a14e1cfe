"""Bounds on what is accepted but not settled: a gate that lets writes in, slows them, makes them wait, or refuses.

Two counts are bounded: operations (what the log may hold) and bytes of operations that no log holds. *Pressure* is the
fuller of the two, 1 at the bound. Bands of it, with the defaults of the settings:

    0        0.7 warn      0.8            0.9 critical       0.95                      1
    │ normal │ told        │ lanes hurry  │ writes are slowed │ unlogged ones wait      │ all wait
                                            more and more       for it to fall

At a bound a write waits its turn for a bounded time and then gets ``Backpressure``; waiting writes are let in oldest
first, as settled ones leave. Deletes are never slowed. Memory above the bounds is no matter of this: what the log
holds leaves memory by itself, and L1 evicts by its own fullness.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final, Literal

from sync_engine.errors import Backpressure

__all__ = ["Bands", "Gate", "Level", "pressure_of"]

Level = Literal["normal", "warn", "hurry", "slow", "refuse"]

SLOWED_S_MAX: Final = 0.1
"""Longest delay of a write that is let in, where it would wait as long at the bound: felt, and no outage."""


@dataclass(frozen=True, slots=True)
class Bands:
    """Where pressure begins to matter. Two edges are set, the others lie in the middle of what they part."""

    warn: float = 0.7
    critical: float = 0.9

    @property
    def hurry(self) -> float:
        """From here on no batch waits for company."""
        return (self.warn + self.critical) / 2

    @property
    def refuse(self) -> float:
        """From here on writes that no log holds wait: they cannot leave memory, and the last room is for others."""
        return (self.critical + 1) / 2

    def level(self, pressure: float) -> Level:
        """The band; each begins at its edge."""
        if pressure < self.warn:
            return "normal"
        if pressure < self.hurry:
            return "warn"
        if pressure < self.critical:
            return "hurry"
        return "slow" if pressure < self.refuse else "refuse"

    def delay_s(self, pressure: float, longest_s: float) -> float:
        """How long a write is held up: nothing at ``critical``, growing in proportion to ``longest_s`` at 1."""
        if pressure <= self.critical:
            return 0.0
        return longest_s * min(1.0, (pressure - self.critical) / (1 - self.critical))


def pressure_of(used: int, most: int) -> float:
    """How full: 0 while nothing is used, 1 at the bound and above it where one large write was let in alone."""
    return 0.0 if not used else used / most if most else 1.0


class Gate:
    """Admission by count and bytes."""

    def __init__(
        self,
        *,
        ops_max: int,
        bytes_max: int,
        wait_ms: int,
        bands: Bands = Bands(),
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._sleep = sleep
        self._waiting: deque[tuple[int, int, asyncio.Future[None]]] = deque()
        self.ops = 0
        self.bytes = 0
        self.bound(ops_max=ops_max, bytes_max=bytes_max, wait_ms=wait_ms, bands=bands)

    def bound(self, *, ops_max: int, bytes_max: int, wait_ms: int, bands: Bands) -> None:
        """Set every bound at once. Who waits goes on waiting for as long as it was told when it came."""
        self._ops_max = ops_max
        self._bytes_max = bytes_max
        self.wait_s = wait_ms / 1000
        self._bands = bands
        self._hurry_ops = ops_max * bands.hurry
        self._hurry_bytes = bytes_max * bands.hurry
        self._seat()

    def let_in(self, ops: int, volatile_bytes: int = 0) -> bool:
        """Account for a write if nothing speaks against it; else ``enter`` is to be waited for."""
        if self.presses or not self.has_room(ops, volatile_bytes):
            return False
        self.ops += ops
        self.bytes += volatile_bytes
        return True

    async def enter(self, ops: int, volatile_bytes: int = 0, *, slowed: bool = True) -> None:
        """Account for a write, waiting for room if need be; raises ``Backpressure``.

        A write larger than the whole bound is let in alone, so that it is slow instead of impossible. ``slowed``:
        whether pressure holds it up although there is room.
        """
        if slowed and self.presses and self.has_room(ops, volatile_bytes):
            # A write that the log holds takes no part in what the others' bytes do.
            pressure = self.pressure if volatile_bytes else pressure_of(self.ops, self._ops_max)
            if delay_s := self._bands.delay_s(pressure, min(SLOWED_S_MAX, self.wait_s)):
                await self._sleep(delay_s)
        if self.has_room(ops, volatile_bytes):
            self.ops += ops
            self.bytes += volatile_bytes
            return
        room: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        ticket = (ops, volatile_bytes, room)
        wait_s = self.wait_s
        self._waiting.append(ticket)
        try:
            async with asyncio.timeout(wait_s):
                await room
        except (TimeoutError, asyncio.CancelledError) as stopped:
            if room.done() and not room.cancelled():
                self.leave(ops, volatile_bytes)  # let in at the very moment the caller gave up
            else:
                if ticket in self._waiting:
                    self._waiting.remove(ticket)
                self._seat()
            if isinstance(stopped, asyncio.CancelledError):
                raise
            raise Backpressure(
                f"{self.ops} of {self._ops_max} operations and {self.bytes} of {self._bytes_max} unlogged bytes "
                f"are not settled yet, and too few were within {wait_s:g} s"
            ) from None

    def has_room(self, ops: int, volatile_bytes: int = 0) -> bool:
        """Whether a write of this size would be let in at once."""
        return not self._waiting and self._fits(ops, volatile_bytes)

    @property
    def pressure(self) -> float:
        """The fuller of the two bounds."""
        return max(pressure_of(self.ops, self._ops_max), pressure_of(self.bytes, self._bytes_max))

    @property
    def level(self) -> Level:
        """Its band."""
        return self._bands.level(self.pressure)

    @property
    def presses(self) -> bool:
        """Whether nothing should wait for company any more."""
        # Asked at every write: the two comparisons, not the two divisions.
        return self.ops >= self._hurry_ops or 0 < self.bytes >= self._hurry_bytes

    @property
    def crowded(self) -> bool:
        """Whether anybody waits for room."""
        return bool(self._waiting)

    def readmit(self, ops: int, volatile_bytes: int = 0) -> None:
        """Account for what a recovered log already holds, bound or no bound."""
        self.ops += ops
        self.bytes += volatile_bytes

    def leave(self, ops: int, volatile_bytes: int = 0) -> None:
        """Give room back."""
        self.ops -= ops
        self.bytes -= volatile_bytes
        if self._waiting:
            self._seat()

    def _fits(self, ops: int, volatile_bytes: int) -> bool:
        if not volatile_bytes:
            return self.ops == 0 or self.ops + ops <= self._ops_max
        share = self._bands.refuse
        return (self.ops == 0 or self.ops + ops <= self._ops_max * share) and (
            self.bytes == 0 or self.bytes + volatile_bytes <= self._bytes_max * share
        )

    def _seat(self) -> None:
        while self._waiting:
            ops, volatile_bytes, room = self._waiting[0]
            if not room.done():  # done here: cancelled, and about to remove itself
                if not self._fits(ops, volatile_bytes):
                    return
                self.ops += ops
                self.bytes += volatile_bytes
                room.set_result(None)
            self._waiting.popleft()

    def __repr__(self) -> str:
        return f"<Gate {self.ops}/{self._ops_max} operations, {self.bytes}/{self._bytes_max} unlogged bytes>"
