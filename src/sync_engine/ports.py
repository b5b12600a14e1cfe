"""What the flows ask of the outside, cut by ability; adapters implement, flows import only this.

Verbs take many ids first. A method raises ``TierUnavailable`` when the tier could not be asked: then
nothing is known, neither that an item is absent nor that a write failed. Answers about single items
are in the returned facts, never exceptions, so that one bad item cannot hide its neighbours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Protocol, runtime_checkable

import msgspec

from sync_engine.errors import Corruption, SyncEngineError
from sync_engine.item import Op, SyncItem

__all__ = [
    "PATIENT",
    "READS",
    "WRITES",
    "Applied",
    "BatchWriteResult",
    "Cache",
    "Changes",
    "Clock",
    "Fetched",
    "Hot",
    "Journal",
    "Logged",
    "Mark",
    "Reads",
    "Scans",
    "States",
    "Tier",
    "Truth",
    "Writes",
    "together",
]


@dataclass(frozen=True, slots=True)
class Fetched:
    """What a tier holds of the ids it was asked for; an id in none of the three is absent there.

    ``items`` passed their SHA-256. ``unverified`` were written without our exact bytes by the original
    engine, whose documents cannot match their hash. ``corrupt`` did not match.
    """

    items: dict[str, SyncItem] = field(default_factory=dict)
    unverified: dict[str, SyncItem] = field(default_factory=dict)
    corrupt: dict[str, Corruption] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Applied:
    """What became of a batch of operations that the tier answered.

    An id that is named nowhere was applied. ``superseded``: the tier already held a newer stamp (or a
    tombstone of one) and kept it. ``refused``: the tier will not take this operation as it is; the
    rest went through. ``restated``: the whole items after their state changed. ``existed``: ids of
    deletes that removed something. ``spared``: ids of conditional deletes that did not apply.
    """

    superseded: frozenset[str] = frozenset()
    refused: Mapping[str, SyncEngineError] = field(default_factory=dict)
    restated: Mapping[str, SyncItem] = field(default_factory=dict)
    existed: frozenset[str] = frozenset()
    spared: frozenset[str] = frozenset()


def together(parts: Sequence[Applied]) -> Applied:
    """What became of a batch that was applied in parts."""
    nothing: frozenset[str] = frozenset()
    return Applied(
        superseded=nothing.union(*(part.superseded for part in parts)),
        refused={id_: refusal for part in parts for id_, refusal in part.refused.items()},
        restated={id_: item for part in parts for id_, item in part.restated.items()},
        existed=nothing.union(*(part.existed for part in parts)),
        spared=nothing.union(*(part.spared for part in parts)),
    )


@dataclass(frozen=True, slots=True)
class BatchWriteResult:
    """Outcome of ``put_batch``: ``failed`` maps id to reason, everything else is stored.

    ``written`` counts the items now stored as given. ``verified`` says that the store confirmed each of
    them. ``superseded`` are ids whose newer copy was left in place.
    """

    batch_id: str
    written: int
    verified: bool
    failed: Mapping[str, str] = field(default_factory=dict)
    superseded: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Mark:
    """What one place of a cache (a server, or a shard of a cluster) knows of its own past, in stamps.

    ``run`` names the server process, empty where it may not be asked. ``newest`` is the highest stamp applied there,
    ``began`` what that was when this run was first called. What the place may have lost is newer than ``since``; None
    once somebody has made up for it.
    """

    place: int
    run: str
    newest: int
    began: int
    since: int | None


@dataclass(frozen=True, slots=True)
class Changes:
    """A page of what a truth accepted: whole items as restates, deletes with their stamps, each id once.

    ``after`` is where the next page begins, None after the last.
    """

    ops: Sequence[Op]
    after: tuple[int, str] | None


@dataclass(frozen=True, slots=True)
class Memory:
    """One server of a cache: the places that it has, the bytes that it uses, and its limit, 0 where it has none."""

    places: tuple[int, ...]
    used_bytes: int
    limit_bytes: int

    @property
    def share(self) -> float:
        """How full it is: from 0 on, 1 at its limit."""
        return self.used_bytes / self.limit_bytes if self.limit_bytes else 0.0


@dataclass(frozen=True, slots=True)
class CacheFacts:
    """What a cache is at this moment.

    ``about`` describes it in a line. ``memory`` is empty, and ``policies`` too, where that may not be asked.
    ``policies`` are what its servers do at their limit, in Redis' words.
    """

    about: str
    documents: bool
    searchable: bool
    memory: Sequence[Memory] = ()
    policies: frozenset[str] = frozenset()

    @property
    def evicts_anything(self) -> bool:
        """Whether a server may drop any key at its limit, a change stream among them."""
        return any(policy.startswith("allkeys-") for policy in self.policies)


class Reads(Protocol):
    """Point reads."""

    async def fetch(self, ids: Sequence[str], /) -> Fetched:
        """Everything held of these ids, in one round trip per chunk. No order is promised."""
        ...

    async def exists_batch(self, ids: Sequence[str], /) -> list[bool]:
        """Whether each id is held, in input order."""
        ...


class Writes(Protocol):
    """The one way to change a tier."""

    async def apply(self, ops: Sequence[Op], /) -> Applied:
        """Apply at most one operation per id. Applying the same batch again changes nothing.

        Guarantees: an older stamp never replaces a newer one; stamp 0 is unordered and always
        replaces. Does not promise: order between ids, or atomicity beyond one chunk.
        """
        ...


class States(Protocol):
    """Which items are in a state."""

    async def list_state_ids(self, state: str, limit: int = ..., *, after: str | None = ...) -> list[str]:
        """Ids in the state, ascending, those greater than ``after``."""
        ...

    async def count_by_state(self, state: str, /) -> int:
        """How many items are in the state."""
        ...


class Scans(Protocol):
    """Ordered ranges. Ids ascend by code point (= UTF-8 byte order)."""

    async def scan_prefix(self, prefix: str, limit: int = ..., *, after: str | None = ...) -> list[SyncItem]:
        """Items whose id starts with the prefix, ascending, those greater than ``after``."""
        ...

    async def list_prefix_ids(self, prefix: str, limit: int = ..., *, after: str | None = ...) -> list[str]:
        """Ids that start with the prefix, ascending, those greater than ``after``."""
        ...

    async def get_by_state(self, state: str, limit: int = ..., *, after: str | None = ...) -> list[SyncItem]:
        """Items in the state, ascending by id, those greater than ``after``."""
        ...

    async def count_prefix(self, prefix: str, /) -> int:
        """How many ids start with the prefix."""
        ...


@runtime_checkable
class Tier(Reads, Writes, States, Protocol):
    """A place that keeps items: Redis, SQL, or a test's dict."""

    name: str

    async def close(self) -> None:
        """Let go of connections and threads; pending calls finish first. Safe to call twice."""
        ...


@runtime_checkable
class Truth(Tier, Scans, Protocol):
    """The tier that is right when tiers differ."""

    async def newest_stamp(self) -> int:
        """A stamp that no write this tier has accepted exceeds; 0 when it never accepted one."""
        ...

    async def held_stamps(self, ids: Sequence[str], /) -> dict[str, int]:
        """The stamps of the items that are held."""
        ...

    async def buried_stamps(self, ids: Sequence[str], /) -> dict[str, int]:
        """The stamps of the deletes that are remembered."""
        ...

    async def changed_since(self, stamp: int, after: tuple[int, str] | None = ..., limit: int = ...) -> Changes:
        """Items and deletes of that stamp or newer, ascending by stamp; from stamp 0 the unstamped items first.

        What changes while the pages are read moves ahead, so that the last page ends with what stands then.
        """
        ...

    async def forgotten(self) -> int:
        """A stamp below which deletes may have been forgotten."""
        ...

    async def note_late(self, at_ms: int, stamp: int, /) -> None:
        """Remember durably that from this moment on a cache is given an operation of this old stamp."""
        ...

    async def late_since(self, at_ms: int, /) -> int | None:
        """The oldest stamp that a cache was given at that moment or after it, as far as noted."""
        ...

    async def register_schema(self, name: str, prefixes: Iterable[str], /) -> int:
        """Keep ids that begin with one of these prefixes apart, under that name; how many items were moved for it.

        Changes where items are kept, and no answer to anything else. Calling it again goes on where it was stopped.
        """
        ...


@runtime_checkable
class Cache(Tier, Protocol):
    """A tier that may forget: by restart, by eviction."""

    async def marks(self, newest: int = ..., /) -> Sequence[Mark]:
        """What each place knows of its past. ``newest``: no operation older than that was still to come.

        Asking is what makes a place notice that it was restarted, unless an operation was first.
        """
        ...

    async def healed(self, marks: Sequence[Mark], /) -> None:
        """What these places had lost was made up for; does nothing where a place has been restarted since."""
        ...

    async def held_stamps(self, ids: Sequence[str], /) -> dict[str, int]:
        """The stamps of the items that are held, in one round trip per chunk. Counts as no use of them."""
        ...

    async def evict(self, copies: Sequence[tuple[str, int]], /, *, bury: bool = ...) -> int:
        """Forget copies of exactly these stamps; how many there were.

        Without ``bury`` no trace of it is left; with it what is older than they were stays out, as after a delete.
        """
        ...

    async def tell(self, ops: Sequence[Op], /) -> None:
        """Tell again of changes that hold here, where the change stream may have lost what it was told of them.

        Does nothing where a change and its entry cannot be lost apart from each other, or without a stream.
        """
        ...

    async def facts(self) -> CacheFacts:
        """What it is and how full. One round trip per server."""
        ...

    async def coldest(self, place: int, picked: int, most: int, /) -> list[tuple[str, int]]:
        """Of so many items of a place, picked at random, at most so many that were used the longest ago.

        Ids with their stamps, coldest first. Which of those that nobody has used for a second comes first is not
        promised.
        """
        ...


# What the wrappers of a tier have to know of its verbs, by name.

READS: Final = frozenset(
    {"fetch", "exists_batch", "list_state_ids", "count_by_state", "scan_prefix", "get_by_state", "list_prefix_ids"}
    | {"count_prefix"}
)
"""Verbs that tell readers what a tier holds: of a cache that is not believed their answers do not count."""

WRITES: Final = frozenset({"apply", "evict", "healed", "marks", "note_late", "tell"})
"""Verbs of a tier that no reader waits for: they are left more time than the others."""

PATIENT: Final = frozenset({"register_schema"})
"""Verbs that take as long as there is to do; a tier ends each step of theirs by itself."""


class Logged(msgspec.Struct, eq=False, gc=False):
    """One log record as its keeper sees it: the operation, and where the log holds it."""

    op: Op
    seq: int
    position: object


class Journal(Protocol):
    """The write-ahead log: the only keeper of what is not settled.

    ``append`` never blocks the event loop. A record that ``on_durable`` was told of survives process
    and machine crashes until it is settled.
    """

    def append(
        self, ops: Sequence[Op], on_durable: Callable[[Sequence[Logged]], None], on_failed: Callable[[Exception], None]
    ) -> None:
        """Queue records for the next group commit; exactly one of the callbacks is called, on the loop.

        Callbacks come in append order.
        """
        ...

    def settle(self, seqs: Iterable[int], /) -> None:
        """These records are in every tier they asked for. Not synced: after a crash they may be replayed."""
        ...

    async def read(self, records: Sequence[Logged], /) -> list[Op]:
        """Operations of unsettled records, read back from disk, in input order."""
        ...

    def relieve_until_settled(self) -> None:
        """Somebody without whom a record is not settled has no room on his disk: give up what is held back for him."""
        ...

    def relieve_until_drained(self) -> None:
        """The same for a tier, which may need it for what no record waits for as well: until ``drained``."""
        ...

    def drained(self) -> None:
        """What that tier had no room for has passed: what is held back is wanted only for what is not settled."""
        ...


class Hot(Protocol):
    """L1: items in process memory, no I/O. Keeps what it likes, never more than its bound."""

    def get(self, object_id: str, /) -> SyncItem | None:
        """The live copy, noted as used."""
        ...

    def peek(self, object_id: str, /) -> SyncItem | None:
        """The live copy, not noted as used."""
        ...

    def offer(self, item: SyncItem, deadline_ms: int | None = ..., /) -> bool:
        """Take the item unless a newer stamp is held; it is not served past the deadline (epoch ms)."""
        ...

    def drop(self, object_id: str, /) -> None:
        """Forget the item."""
        ...


class Clock(Protocol):
    """Time as a parameter: wall clock for stamps and deadlines, monotonic for intervals."""

    def now_ms(self) -> int:
        """Wall clock, epoch milliseconds."""
        ...

    def now_us(self) -> int:
        """The same, epoch microseconds."""
        ...

    def monotonic(self) -> float:
        """Seconds that never go back."""
        ...

    async def sleep(self, seconds: float, /) -> None:
        """Suspend the caller."""
        ...
