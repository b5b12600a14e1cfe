"""L1: items in process memory, bounded in bytes.

Synchronous and confined to the event loop: a hit is a dict look-up and three stores. Whom to evict is
the lowest base score in a random sample; how hard is the tan curve of pressure: a pass frees the share
``1 - curve(pressure)`` of what exceeds three quarters of the bound, so that the cache settles a little
above them, and always what exceeds the bound itself. The two are apart on purpose: the curve is the
same for all entries, so multiplied into the scores it could only flatten them.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from operator import itemgetter

import msgspec

from sync_engine.errors import ConfigError
from sync_engine.item import SyncItem
from sync_engine.ports import Clock

__all__ = ["L1Cache", "L1Stats", "base_score", "curve"]

EVICT_FROM = 0.75
"""Pressure at which eviction begins; below it nothing is freed."""
EVICT_ALL_FROM = 0.95
"""Pressure from which a pass frees everything above ``EVICT_FROM``."""
PASS_BYTES = 64 * 1024
"""Bytes that arrive between two passes: small beside a cache, large beside an item, so passes are rare and short."""
PASS_ITEMS_MAX = 512
"""Victims of one pass beyond what the bound itself demands: about 2 ms on the event loop (2-core VM)."""
SAMPLE = 16
VICTIMS_PER_SAMPLE = 4
TICK_HITS = 256
"""Hits between two looks at the clock; a power of two. One look costs as much as half the hit."""

RECENCY_S = 3600.0
COUNT_MAX = 1000
SIZE_UNIT_BYTES = 1024 * 1024


def base_score(idle_s: float, count: int, size_bytes: int) -> float:
    """Worth of an entry, 0 to 1: 0.4 recency + 0.4 frequency + 0.2 smallness."""
    frequency = math.log1p(min(count, COUNT_MAX)) / math.log1p(COUNT_MAX)
    smallness = 1 / (1 + size_bytes / SIZE_UNIT_BYTES)
    return 0.4 * math.exp(-idle_s / RECENCY_S) + 0.4 * frequency + 0.2 * smallness


def curve(pressure: float) -> float:
    """The tan curve: 1 (keep all) up to a pressure of 0.75, falling to 0 (free all the excess) towards 0.95."""
    if pressure <= EVICT_FROM:
        return 1.0
    if pressure >= EVICT_ALL_FROM:
        return 0.0
    across = (pressure - EVICT_FROM) / (EVICT_ALL_FROM - EVICT_FROM)
    return min(1.0, max(0.0, 1 - (math.tan((across - 0.5) * math.pi / 1.2) + 2) / 4))


@dataclass(frozen=True, slots=True)
class L1Stats:
    """Counters since the start; ``items`` and ``bytes`` are of now."""

    items: int
    bytes: int
    bytes_max: int
    hits: int
    misses: int
    evicted: int
    expired: int


class _Entry(msgspec.Struct, eq=False, gc=False):  # many, long-lived, in no cycle: not worth a look of the collector
    """One item and what is known of its use; ``place`` is its index in the list that samples are drawn from."""

    item: SyncItem
    size: int
    deadline_ms: int | None
    used_s: float
    hits: int
    place: int


class L1Cache:
    """Items by id, never more than ``max_bytes`` of them (``SyncItem.size`` each); 0 keeps nothing.

    An offer never replaces a newer stamp. Past its deadline (``deadline_ms`` or the item's own
    ``expires_at``, whichever is sooner) an item is not served. Expired entries are removed when they
    are met: by a read, or first of all by eviction.
    """

    def __init__(self, max_bytes: int, *, clock: Clock, rng: random.Random) -> None:
        if max_bytes < 0:
            raise ConfigError(f"l1_max_bytes = {max_bytes}: must be 0 (off) or more")
        self._bytes_max = max_bytes
        self._evict_from_bytes = int(max_bytes * EVICT_FROM)
        self._pass_at_bytes = self._evict_from_bytes
        self._clock = clock
        self._rng = rng
        self._entries: dict[str, _Entry] = {}
        self._places: list[_Entry] = []
        self._bytes = 0
        self._now_s = clock.monotonic()
        self._hits = self._misses = self._evicted = self._expired = 0

    def get(self, object_id: str) -> SyncItem | None:
        """The live item, counted as a use."""
        entry = self._entries.get(object_id)
        if entry is None:
            self._misses += 1
            return None
        if entry.deadline_ms is not None and entry.deadline_ms <= self._clock.now_ms():
            self._expire(entry)
            self._misses += 1
            return None
        self._hits = hits = self._hits + 1
        if not hits & (TICK_HITS - 1):
            self._now_s = self._clock.monotonic()
        entry.hits += 1
        entry.used_s = self._now_s
        return entry.item

    def peek(self, object_id: str) -> SyncItem | None:
        """The live item, without counting a use."""
        entry = self._entries.get(object_id)
        if entry is None:
            return None
        if entry.deadline_ms is not None and entry.deadline_ms <= self._clock.now_ms():
            self._expire(entry)
            return None
        return entry.item

    def offer(self, item: SyncItem, deadline_ms: int | None = None) -> bool:
        """Keep the item unless a copy of a newer stamp is held; True if it is kept.

        An item that is newer but cannot be kept (larger than the cache, past its deadline) still
        removes the older copy.
        """
        object_id = item.object_id
        held = self._entries.get(object_id)
        if held is not None and item.stamp < held.item.stamp:
            return False
        if item.expires_at is not None and (deadline_ms is None or item.expires_at < deadline_ms):
            deadline_ms = item.expires_at
        hits = 1
        if held is not None:
            hits = held.hits
            self._remove(held)
        size = item.size
        if size > self._bytes_max or (deadline_ms is not None and deadline_ms <= self._clock.now_ms()):
            return False
        self._now_s = self._clock.monotonic()
        # Just used and used once: the newest data must not look like the oldest.
        entry = _Entry(item, size, deadline_ms, self._now_s, hits, len(self._places))
        self._places.append(entry)
        self._entries[object_id] = entry
        self._bytes += size
        if self._bytes > self._pass_at_bytes:
            self._relieve(entry)
        return True

    def resize(self, max_bytes: int) -> None:
        """Hold at most so many bytes from now on; 0 keeps nothing.

        Where that is less than is held, what was taken in the longest ago goes: 300,000 items leave in 0.4 s, and would
        in 4 s by their worth (2-core VM), while the event loop stands still.
        """
        if max_bytes < 0:
            raise ConfigError(f"l1_max_bytes = {max_bytes}: must be 0 (off) or more")
        self._bytes_max = max_bytes
        self._pass_at_bytes = self._evict_from_bytes = int(max_bytes * EVICT_FROM)
        if self._bytes <= max_bytes:
            return
        for entry in list(self._entries.values()):
            if self._bytes <= self._evict_from_bytes:
                break
            self._remove(entry)
            self._evicted += 1

    def drop(self, object_id: str, stamp: int | None = None) -> None:
        """Remove what is held of the id, unless it is newer than ``stamp`` (None or 0: whatever is held)."""
        held = self._entries.get(object_id)
        if held is not None and (not stamp or held.item.stamp <= stamp):
            self._remove(held)

    def clear(self) -> None:
        """Hold nothing."""
        self._entries.clear()
        self._places.clear()
        self._bytes = 0
        self._pass_at_bytes = self._evict_from_bytes

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def bytes(self) -> int:
        """What is held, at most ``max_bytes`` after every call."""
        return self._bytes

    @property
    def pressure(self) -> float:
        """Share of the bytes in use, 0 to 1; 0 while the cache is off."""
        return self._bytes / self._bytes_max if self._bytes_max else 0.0

    def stats(self) -> L1Stats:
        """How it is doing."""
        return L1Stats(
            items=len(self._entries),
            bytes=self._bytes,
            bytes_max=self._bytes_max,
            hits=self._hits,
            misses=self._misses,
            evicted=self._evicted,
            expired=self._expired,
        )

    def verify(self) -> None:
        """Recount everything; raises ``AssertionError`` where the books are wrong. Costs a pass over all entries."""
        counted = sum(entry.item.size for entry in self._entries.values())
        wrong = [id_ for id_, entry in self._entries.items() if self._places[entry.place] is not entry]
        if counted != self._bytes or counted > self._bytes_max or wrong or len(self._places) != len(self._entries):
            raise AssertionError(
                f"{self!r} holds {counted} bytes in {len(self._entries)} entries and {len(self._places)} places, "
                f"{len(wrong)} of them misplaced"
            )

    def __repr__(self) -> str:
        return f"<L1Cache {len(self._entries)} items | {self._bytes}/{self._bytes_max} bytes>"

    def _expire(self, entry: _Entry) -> None:
        self._expired += 1
        self._remove(entry)

    def _remove(self, entry: _Entry) -> None:
        del self._entries[entry.item.object_id]
        last = self._places.pop()
        if last is not entry:
            self._places[entry.place] = last
            last.place = entry.place
        self._bytes -= entry.size

    def _relieve(self, newest: _Entry) -> None:
        """One pass: free what the curve asks for, and always down to the bound; never the entry just offered."""
        excess = self._bytes - self._evict_from_bytes
        wanted_bytes = self._bytes - int(excess * (1 - curve(self.pressure)))
        victims_left = PASS_ITEMS_MAX
        now_ms = self._clock.now_ms()
        # An item that alone exceeds what is wanted stays: it fits the bound, or it would not have been taken in.
        while len(self._places) > 1 and (
            self._bytes > self._bytes_max or (self._bytes > wanted_bytes and victims_left > 0)
        ):
            for victim in self._worst_of_sample(newest, now_ms):
                if self._bytes <= wanted_bytes:
                    break
                self._remove(victim)
                self._evicted += 1
                victims_left -= 1
        # A pass that ended early continues with the next insert; the bound itself always starts one.
        pause = PASS_BYTES if self._bytes <= wanted_bytes else 0
        self._pass_at_bytes = min(self._bytes_max, max(self._evict_from_bytes, self._bytes + pause))

    def _worst_of_sample(self, newest: _Entry, now_ms: int) -> list[_Entry]:
        now_s = self._now_s
        scored = [
            (
                -1.0
                if entry.deadline_ms is not None and entry.deadline_ms <= now_ms
                else base_score(now_s - entry.used_s, entry.hits, entry.size),
                entry,
            )
            for entry in dict.fromkeys(self._rng.choices(self._places, k=SAMPLE))
            if entry is not newest
        ]
        scored.sort(key=itemgetter(0))
        return [entry for _, entry in scored[:VICTIMS_PER_SAMPLE]]
