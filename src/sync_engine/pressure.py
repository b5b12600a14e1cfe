"""Bounds on what is accepted but not settled: a gate that lets writes in, makes them wait, or refuses.

Two counts are bounded: operations (what the log may hold) and bytes of operations that no log holds.
At a bound a write waits its turn for a bounded time and then gets ``Backpressure``; waiting writes are
let in oldest first, as settled ones leave.
"""

from __future__ import annotations

import asyncio
from collections import deque

from sync_engine.errors import Backpressure

__all__ = ["Gate"]


class Gate:
    """Admission by count and bytes."""

    def __init__(self, *, ops_max: int, bytes_max: int, wait_ms: int) -> None:
        self._ops_max = ops_max
        self._bytes_max = bytes_max
        self.wait_s = wait_ms / 1000
        self._waiting: deque[tuple[int, int, asyncio.Future[None]]] = deque()
        self.ops = 0
        self.bytes = 0

    async def enter(self, ops: int, volatile_bytes: int = 0) -> None:
        """Account for a write, waiting for room if need be; raises ``Backpressure``.

        A write larger than the whole bound is let in alone, so that it is slow instead of impossible.
        """
        if self.has_room(ops, volatile_bytes):
            self.ops += ops
            self.bytes += volatile_bytes
            return
        room: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        ticket = (ops, volatile_bytes, room)
        self._waiting.append(ticket)
        try:
            async with asyncio.timeout(self.wait_s):
                await room
        except (TimeoutError, asyncio.CancelledError) as stopped:
            if room.done() and not room.cancelled():
                self.leave(ops, volatile_bytes)  # let in at the very moment the caller gave up
            else:
                if ticket in self._waiting:
                    self._waiting.remove(ticket)
                self._let_in()
            if isinstance(stopped, asyncio.CancelledError):
                raise
            raise Backpressure(
                f"{self.ops} of {self._ops_max} operations and {self.bytes} of {self._bytes_max} unlogged bytes "
                f"are not settled yet, and none were within {self.wait_s:g} s"
            ) from None

    def has_room(self, ops: int, volatile_bytes: int = 0) -> bool:
        """Whether a write of this size would be let in at once."""
        return not self._waiting and self._fits(ops, volatile_bytes)

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
            self._let_in()

    def _fits(self, ops: int, volatile_bytes: int) -> bool:
        return (self.ops == 0 or self.ops + ops <= self._ops_max) and (
            volatile_bytes == 0 or self.bytes == 0 or self.bytes + volatile_bytes <= self._bytes_max
        )

    def _let_in(self) -> None:
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
