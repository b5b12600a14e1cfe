"""Collects entries until enough company has come: by count, by bytes, or by the age of the first.

Worked timeline, count 3, 100 ms: entries at 0, 40 and 60 ms leave together at 60 ms; one at 70 ms
leaves alone at 170 ms; ``hurry()`` lets whatever is there leave at once.
"""

from __future__ import annotations

import asyncio
from collections import deque

from sync_engine.ports import Clock
from sync_engine.write.pending import Entry

__all__ = ["Batcher"]

BACKLOG_TIMES = 4
"""How many times the usual batch is taken at once when more than one is waiting (bench growth: SQLite, 4 against 1)."""


class Batcher:
    """A queue that hands out batches, oldest first."""

    def __init__(self, *, flush_count: int, flush_bytes: int, flush_after_ms: int, clock: Clock) -> None:
        self._clock = clock
        self._queue: deque[Entry] = deque()
        self._bytes = 0
        self._taken = 0
        self._put = 0
        self._hurry_until = 0  # entries up to this number do not wait for company
        self._wake = asyncio.Event()
        self._done = 0
        self._drains: deque[tuple[int, asyncio.Future[None]]] = deque()
        self._hasty: set[asyncio.Future[None]] = set()
        self._ended: Exception | None = None
        self.bound(flush_count=flush_count, flush_bytes=flush_bytes, flush_after_ms=flush_after_ms)

    def bound(self, *, flush_count: int, flush_bytes: int, flush_after_ms: int) -> None:
        """Set what makes a batch, all of it at once: no batch is cut by one old and one new limit."""
        self._flush_count = flush_count
        self._flush_bytes = flush_bytes
        self._flush_after_s = flush_after_ms / 1000
        self._wake.set()  # what waits may be due by now

    def put(self, entry: Entry) -> None:
        """Queue one entry."""
        entry.queued_at = self._clock.monotonic()
        self._queue.append(entry)
        self._bytes += entry.size
        self._put += 1
        if len(self._queue) == 1 or self._full:
            self._wake.set()

    def hurry(self) -> None:
        """What is queued now leaves without waiting."""
        self._hurry_until = self._put
        self._wake.set()

    async def take(self) -> list[Entry]:
        """Wait until a batch is due, then take it; never empty."""
        while True:
            self._wake.clear()
            if not self._queue:
                await self._wake.wait()
                continue
            wait_s = self._queue[0].queued_at + self._flush_after_s - self._clock.monotonic()
            if self._full or self._hurry_until > self._taken or wait_s <= 0:
                return self._cut()
            await self._sleep(wait_s)

    @property
    def put_ever(self) -> int:
        """How many entries were queued so far."""
        return self._put

    def done(self, count: int) -> None:
        """So many of the entries taken have passed; wakes those who wait for them."""
        self._done += count
        while self._drains and self._drains[0][0] <= self._done:
            waiter = self._drains.popleft()[1]
            if not waiter.done():
                waiter.set_result(None)

    @property
    def done_ever(self) -> int:
        """How many of them have passed."""
        return self._done

    async def drained(self, *, patient: bool = True) -> None:
        """Hurry, and wait until everything queued before this call has passed.

        An impatient caller gets the error of ``fail`` instead of waiting through an outage.
        """
        if self._done >= self._put:
            return
        if self._ended is not None:
            raise self._ended
        self.hurry()
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._drains.append((self._put, waiter))
        if not patient:
            self._hasty.add(waiter)
            waiter.add_done_callback(self._hasty.discard)
        await waiter

    def fail(self, error: Exception, *, everybody: bool = False) -> None:
        """The batch at hand is in trouble: tell those who will not wait for it.

        ``everybody``: it was the last one; whoever waits, now or later, is told.
        """
        if everybody:
            self._ended = error
        for waiter in [waiter for _, waiter in self._drains] if everybody else list(self._hasty):
            if not waiter.done():
                waiter.set_exception(error)

    @property
    def _full(self) -> bool:
        return len(self._queue) >= self._flush_count or self._bytes >= self._flush_bytes

    def _cut(self) -> list[Entry]:
        """The oldest entries up to the limits, stopping before one that must see another's effect first."""
        batch: list[Entry] = []
        ids: set[str] = set()
        decided: set[str] = set()
        size = 0
        queue = self._queue
        # A backlog goes in larger batches: fewer commits, and rows that share a page are written once.
        many = BACKLOG_TIMES if len(queue) > self._flush_count or self._bytes > self._flush_bytes else 1
        count_max, bytes_max = many * self._flush_count, many * self._flush_bytes
        while queue and len(batch) < count_max:
            entry = queue[0]
            object_id = entry.op.object_id
            if batch and (size + entry.size > bytes_max or object_id in decided):
                break
            if entry.conditional:
                if object_id in ids:
                    break
                decided.add(object_id)
            batch.append(queue.popleft())
            ids.add(object_id)
            size += entry.size
        self._bytes -= size
        self._taken += len(batch)
        return batch

    async def _sleep(self, wait_s: float) -> None:
        """Sleep on the injected clock, but wake when a batch becomes due earlier."""
        sleeping = asyncio.ensure_future(self._clock.sleep(wait_s))
        waking = asyncio.ensure_future(self._wake.wait())
        try:
            await asyncio.wait((sleeping, waking), return_when=asyncio.FIRST_COMPLETED)
        finally:
            sleeping.cancel()
            waking.cancel()

    def __len__(self) -> int:
        return self._put - self._done

    def __repr__(self) -> str:
        return f"<Batcher {len(self._queue)} queued, {self._taken - self._done} taken, {self._bytes} bytes>"
