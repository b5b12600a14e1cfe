"""A lane on its own: when it says that nothing waits for its tier, and what it brings there before what."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from sync_engine import DiskFull, SyncItem
from sync_engine.item import Op
from sync_engine.ports import Applied
from sync_engine.resilience import Retries, RetryPolicy
from sync_engine.testing.clock import VirtualClock
from sync_engine.testing.tiers import MemoryTier
from sync_engine.write.batcher import Batcher
from sync_engine.write.flush import Lane, Plan, in_turn
from sync_engine.write.pending import Entry


def put(object_id: str, stamp: int = 1) -> Entry:
    return Entry(Op(kind="put", object_id=object_id, stamp=stamp, item=SyncItem(object_id, b"x", stamp=stamp)))


def restate(object_id: str, stamp: int) -> Entry:
    return Entry(Op(kind="restate", object_id=object_id, stamp=stamp, state="s"))


class Cramped(MemoryTier):
    """Its disk has no room the first time."""

    async def apply(self, ops: Sequence[Op], /) -> Applied:
        if not self.told:
            self.told = True
            raise DiskFull(self.name, "the disk is full")
        return await super().apply(ops)

    told = False


class Notes:
    """A carrier that notes what it is told."""

    def __init__(self) -> None:
        self.told: list[str] = []

    async def load(self, batch: Sequence[Entry], /) -> None: ...

    async def passed(self, lane: Lane, batch: Sequence[Entry], plan: Plan, applied: Applied, /) -> None:
        self.told += [entry.op.object_id for entry in batch]

    def cramped(self) -> None:
        self.told.append("cramped")

    def drained(self, lane: Lane, /) -> None:
        self.told.append("drained")


def lane_of(clock: VirtualClock, queue: Batcher, notes: Notes) -> Lane:
    return Lane(
        Cramped("l3", clock),
        queue,
        notes,
        lambda op: op.sql,
        erases_blindly=False,
        retry=RetryPolicy(),
        retries=Retries(clock),
    )


async def test_a_tier_without_room_is_given_it_until_all_that_waits_has_passed() -> None:
    # It was taken back after one batch, and what waited behind that met a full disk again.
    clock, notes = VirtualClock(), Notes()
    queue = Batcher(flush_count=1, flush_bytes=put("a").size, flush_after_ms=0, clock=clock)
    lane = lane_of(clock, queue, notes)
    ids = [f"{n}" for n in range(9)]
    for object_id in ids:
        queue.put(put(object_id))
    running = asyncio.create_task(lane.run())
    await clock.run_for(1)
    assert notes.told == ["cramped", *ids, "drained"]
    running.cancel()
    await asyncio.wait({running})


async def test_what_comes_afterwards_does_not_keep_what_was_given() -> None:
    """Under writes that never cease the queue was never empty, the log kept without its reserve, and took nothing."""
    clock = VirtualClock()

    class Busy(Notes):
        async def load(self, batch: Sequence[Entry], /) -> None:
            if len(self.told) < 50:
                queue.put(put(f"later {len(self.told)}"))

    notes = Busy()
    queue = Batcher(flush_count=1, flush_bytes=put("a").size, flush_after_ms=0, clock=clock)
    lane = lane_of(clock, queue, notes)
    for object_id in ("a", "b", "c"):
        queue.put(put(object_id))
    running = asyncio.create_task(lane.run())
    await clock.run_for(1)
    running.cancel()
    await asyncio.wait({running})
    assert notes.told.count("drained") == 1
    assert notes.told.index("c") < notes.told.index("drained") < 10 < len(notes.told)


def test_I1_a_change_of_state_goes_behind_the_write_that_it_follows_and_holds_up_no_other() -> None:
    put_a, put_b, again_a = put("a", 1), put("b", 2), put("a", 5)
    between, last_a, last_b, of_c = restate("a", 3), restate("a", 6), restate("b", 4), restate("c", 7)
    now, later = in_turn([put_a, put_b, between, last_b, again_a, last_a, of_c])
    assert now == [put_a, put_b, between, again_a, of_c]
    assert later == [last_b, last_a]
    assert in_turn(later) == (later, [])
