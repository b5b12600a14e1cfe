"""The batcher on a clock that a test moves: what makes a batch due, what it takes, who is told when it has passed."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sync_engine import SyncItem, TierUnavailable
from sync_engine.item import Op
from sync_engine.testing.clock import VirtualClock
from sync_engine.write.batcher import BACKLOG_TIMES, Batcher
from sync_engine.write.pending import Entry

BARE = SyncItem("a", b"").size


def put(object_id: str, content_bytes: int = 0, *, if_version: int | None = None, stamp: int = 1) -> Entry:
    item = SyncItem(object_id, b"x" * content_bytes, stamp=stamp)
    return Entry(Op(kind="put", object_id=object_id, stamp=stamp, item=item, if_version=if_version))


def delete(object_id: str) -> Entry:
    return Entry(Op(kind="delete", object_id=object_id, stamp=9))


def batcher(clock: VirtualClock, count: int = 3, size: int = 1 << 20, after_ms: int = 100) -> Batcher:
    return Batcher(flush_count=count, flush_bytes=size, flush_after_ms=after_ms, clock=clock)


def told(batch: Sequence[Entry]) -> list[str]:
    return [entry.op.object_id for entry in batch]


class Taker:
    """Takes batch after batch and notes when each left, in ms."""

    def __init__(self, queue: Batcher, clock: VirtualClock) -> None:
        self.left: list[tuple[int, list[str]]] = []
        self._queue, self._clock = queue, clock
        self.task = asyncio.create_task(self._take())

    async def _take(self) -> None:
        while True:
            batch = await self._queue.take()
            self.left.append((round(self._clock.monotonic() * 1000), told(batch)))
            self._queue.done(len(batch))

    async def end(self) -> None:
        self.task.cancel()
        await asyncio.wait({self.task})


async def test_the_timeline_of_its_own_documentation() -> None:
    clock = VirtualClock()
    queue = batcher(clock)
    taker = Taker(queue, clock)
    at_ms = 0
    for when_ms, name in ((0, "a"), (40, "b"), (60, "c"), (70, "d")):
        await clock.run_for((when_ms - at_ms) / 1000)
        at_ms = when_ms
        queue.put(put(name))
        await clock.run_for(0)
    assert taker.left == [(60, ["a", "b", "c"])]
    await clock.run_for(0.099)
    assert len(taker.left) == 1
    await clock.run_for(0.001)
    assert taker.left[1:] == [(170, ["d"])]
    queue.put(put("e"))
    await clock.run_for(0.010)
    queue.hurry()
    await clock.run_for(0)
    assert taker.left[2:] == [(180, ["e"])]
    assert len(queue) == 0
    await taker.end()


async def test_bytes_make_a_batch_due() -> None:
    clock = VirtualClock()
    queue = batcher(clock, count=100, size=3 * BARE)
    taker = Taker(queue, clock)
    queue.put(put("a"))
    queue.put(put("b"))
    await clock.run_for(0)
    assert taker.left == []
    queue.put(put("c"))
    await clock.run_for(0)
    assert taker.left == [(0, ["a", "b", "c"])]
    queue.put(put("d", 10 * BARE))
    await clock.run_for(0)
    assert taker.left[1:] == [(0, ["d"])], "one that is larger than the whole bound goes alone"
    await taker.end()


async def test_without_a_wait_everything_leaves_at_once() -> None:
    clock = VirtualClock()
    queue = batcher(clock, after_ms=0)
    taker = Taker(queue, clock)
    for name in "ab":
        queue.put(put(name))
        await clock.run_for(0)
    assert taker.left == [(0, ["a"]), (0, ["b"])]
    await taker.end()


async def test_a_backlog_leaves_in_larger_batches_that_are_bounded_too() -> None:
    clock = VirtualClock()
    queue = batcher(clock, count=3)
    names = [f"{number:02}" for number in range(3 * BACKLOG_TIMES + 2)]
    for name in names:
        queue.put(put(name))
    first = await queue.take()
    assert told(first) == names[: 3 * BACKLOG_TIMES]
    second = asyncio.create_task(queue.take())
    await clock.run_for(0.099)
    assert not second.done(), "the rest waits for company of its own"
    await clock.run_for(0.001)
    assert told(await second) == names[3 * BACKLOG_TIMES :]


async def test_hurry_is_for_what_is_queued_and_not_for_what_comes_later() -> None:
    clock = VirtualClock()
    queue = batcher(clock, count=100)
    queue.hurry()
    queue.put(put("a"))
    taker = Taker(queue, clock)
    await clock.run_for(0.050)
    assert taker.left == []
    queue.hurry()
    queue.put(put("b"))
    await clock.run_for(0)
    assert taker.left == [(50, ["a", "b"])], "who comes in time rides along"
    queue.put(put("c"))
    await clock.run_for(0.099)
    assert len(taker.left) == 1
    await taker.end()


async def test_drained_waits_for_what_was_queued_before_it() -> None:
    clock = VirtualClock()
    queue = batcher(clock, count=100)
    await queue.drained()
    queue.put(put("a"))
    waiter = asyncio.create_task(queue.drained())
    await clock.run_for(0)
    queue.put(put("b"))
    batch = await queue.take()
    assert told(batch) == ["a", "b"]
    queue.put(put("c"))
    assert len(queue) == 3
    queue.done(1)
    await waiter
    assert len(queue) == 2
    assert "1 queued, 1 taken" in repr(queue)


async def test_taken_is_not_yet_passed() -> None:
    clock = VirtualClock()
    queue = batcher(clock, after_ms=0)
    queue.put(put("a"))
    batch = await queue.take()
    waiter = asyncio.create_task(queue.drained())
    await clock.run_for(1)
    assert not waiter.done()
    queue.done(len(batch))
    await waiter


async def test_only_the_impatient_hear_of_trouble() -> None:
    clock = VirtualClock()
    queue = batcher(clock)
    queue.put(put("a"))
    patient = asyncio.create_task(queue.drained())
    hasty = asyncio.create_task(queue.drained(patient=False))
    gone = asyncio.create_task(queue.drained(patient=False))
    await clock.run_for(0)
    gone.cancel()
    await asyncio.wait({gone})
    queue.fail(TierUnavailable("l3", "down"))
    with pytest.raises(TierUnavailable, match="down"):
        await hasty
    assert not patient.done()
    queue.fail(TierUnavailable("l3", "ended"), everybody=True)
    with pytest.raises(TierUnavailable, match="ended"):
        await patient
    queue.done(len(await queue.take()))
    await queue.drained()


async def cut(*entries: Entry) -> list[list[str]]:
    """The batches that these entries leave in when all of them hurry."""
    clock = VirtualClock()
    queue = batcher(clock, count=100)
    for entry in entries:
        queue.put(entry)
    queue.hurry()
    batches = []
    while sum(map(len, batches)) < len(entries):
        batches.append(told(await queue.take()))
    return batches


async def test_writes_of_one_id_share_a_batch() -> None:
    assert await cut(put("a"), put("a"), delete("a"), put("b"), put("a")) == [["a", "a", "a", "b", "a"]]


async def test_a_compare_and_set_sees_what_came_before_it_applied() -> None:
    assert await cut(put("a"), put("a", if_version=1)) == [["a"], ["a"]]
    assert await cut(put("a", if_version=1), put("b", if_version=1)) == [["a", "b"]]


async def test_nothing_of_its_id_rides_behind_a_compare_and_set() -> None:
    assert await cut(put("a", if_version=1), put("b"), put("a"), put("b")) == [["a", "b"], ["a", "b"]]
    assert await cut(put("a", if_version=1), put("a", if_version=2), put("a")) == [["a"], ["a"], ["a"]]


@given(
    st.lists(
        st.tuples(
            st.sampled_from("abc"), st.integers(0, 900), st.sampled_from([None, None, 1]), st.sampled_from([0, 30, 120])
        ),
        min_size=1,
        max_size=30,
    ),
    st.integers(1, 5),
    st.integers(1, 4_000),
    st.sampled_from([0, 50]),
)
def test_every_entry_leaves_once_in_order_within_its_time_and_the_bounds(
    script: list[tuple[str, int, int | None, int]], count: int, size: int, after_ms: int
) -> None:
    async def play() -> None:
        clock = VirtualClock()
        queue = batcher(clock, count=count, size=size, after_ms=after_ms)
        put_at: dict[int, float] = {}
        left: list[Entry] = []

        async def take() -> None:
            while True:
                batch = await queue.take()
                assert batch
                assert len(batch) <= BACKLOG_TIMES * count
                assert len(batch) == 1 or sum(entry.size for entry in batch) <= BACKLOG_TIMES * size
                guarded = [entry.op.object_id for entry in batch if entry.conditional]
                for object_id in guarded:
                    assert told(batch).count(object_id) == 1
                left.extend(batch)
                queue.done(len(batch))

        taker = asyncio.create_task(take())
        entries = []
        for object_id, content_bytes, if_version, pause_ms in script:
            entry = put(object_id, content_bytes, if_version=if_version)
            put_at[id(entry)] = clock.monotonic()
            entries.append(entry)
            queue.put(entry)
            await clock.run_for(pause_ms / 1000)
            overdue = [
                entry
                for entry in entries
                if entry not in left and clock.monotonic() - put_at[id(entry)] > after_ms / 1000
            ]
            assert not overdue
        drained = asyncio.create_task(queue.drained())
        await clock.run_for(0)
        await drained
        assert left == entries
        assert len(queue) == 0
        taker.cancel()
        await asyncio.wait({taker})

    asyncio.run(play())


async def test_23_new_limits_hold_for_the_next_batch_as_a_whole() -> None:
    clock = VirtualClock()
    queue = batcher(clock, count=100)
    taker = Taker(queue, clock)
    for name in "abc":
        queue.put(put(name))
    await clock.run_for(0)
    queue.bound(flush_count=2, flush_bytes=10**6, flush_after_ms=60_000)
    await clock.run_for(0)
    assert taker.left == [(0, ["a", "b", "c"])], "more are there than make a batch, and they go as a backlog"
    queue.put(put("d"))
    await clock.run_for(1)
    assert len(taker.left) == 1, "the old wait of 100 ms is over, and does not count"
    queue.bound(flush_count=100, flush_bytes=10**6, flush_after_ms=500)
    await clock.run_for(0)
    assert taker.left[1:] == [(1000, ["d"])], "it has waited longer than it has to now"
    queue.put(put("e"))
    queue.bound(flush_count=100, flush_bytes=1, flush_after_ms=500)
    await clock.run_for(0)
    assert taker.left[2:] == [(1000, ["e"])]
    await taker.end()
