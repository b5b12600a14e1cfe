"""Which tier an operation goes to next: the queues of both lanes, in the order that is right for it."""

from __future__ import annotations

from collections.abc import Sequence

from sync_engine.pressure import Gate
from sync_engine.write.batcher import Batcher
from sync_engine.write.pending import Entry

__all__ = ["Route"]


class Route:
    """The queues before the tiers; None stands for a tier that there is not."""

    def __init__(self, gate: Gate, *, truth: Batcher | None, cache: Batcher | None) -> None:
        self._gate = gate
        # What SQL keeps goes there first; what Redis alone keeps must be readable before its row goes.
        self._sql_first = [queue for queue in (truth, cache) if queue is not None]
        self._redis_first = self._sql_first[::-1]

    def next(self, entry: Entry) -> Batcher | None:
        """The queue of the next tier; None where the entry has passed all of them."""
        route = self._sql_first if entry.sql_first else self._redis_first
        return route[entry.hop] if entry.hop < len(route) else None

    def send(self, entries: Sequence[Entry]) -> None:
        """Queue what has just been accepted."""
        for entry in entries:
            queue = self.next(entry)
            assert queue is not None, "admission lets nothing in that no tier would take"
            queue.put(entry)
            if entry.waiters:
                queue.hurry()
        if self._gate.crowded:
            self.hurry()

    def hurry(self) -> None:
        """Let nothing that is queued now wait for company."""
        for queue in self._sql_first:
            queue.hurry()

    async def drained(self) -> None:
        """Wait until everything that is queued now has passed both tiers."""
        # An operation passes each once, in either order.
        for queue in (*self._sql_first, *self._sql_first[:-1]):
            await queue.drained()

    def fail(self, error: Exception) -> None:
        """Nobody empties the queues any more: tell whoever waits for that, now or later."""
        for queue in self._sql_first:
            queue.fail(error, everybody=True)

    def __repr__(self) -> str:
        return f"<Route {' '.join(map(repr, self._sql_first))}>"
