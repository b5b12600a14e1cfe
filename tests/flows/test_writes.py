"""Order, visibility and bounds of writes: I1, I2, I3, I10, I11 of the parts that exist.

Two engines here share one Redis and one SQL file and have a log each, as two processes would.
"""

from __future__ import annotations

import asyncio
import itertools

import pytest

from sync_engine import Ack, Backpressure, SubmitOptions, SyncEngine, SyncItem, TierUnavailable
from sync_engine.testing.clock import VirtualClock
from sync_engine.testing.tiers import Breaking

from .rig import CACHE, DURABLE, Held, Hurried, Rig, on, soon, until

V1 = SyncItem("x", b"one", state="s1", version=1, updated_at=1)
V2 = SyncItem("x", b'{"two": 2}', state="s2", version=2, updated_at=2)


def _down(tier: object) -> Breaking:
    return Breaking(tier, times=None, verbs=("apply",))  # type: ignore[arg-type]  # a tier


# I1: the highest stamp wins, whoever delivers it late


@pytest.mark.parametrize("tier", ["l2", "l3"])
async def test_I1_G8_an_older_write_of_another_engine_that_comes_late_changes_nothing(rig: Rig, tier: str) -> None:
    held: list[Held] = []
    async with rig.engine(around=on(tier, Held, held)) as slow, rig.engine(data="other") as quick:
        held[0].hold()
        await slow.submit(V1)
        await until(lambda: held[0].waiting or slow._running.writes.hurry())
        await quick.submit(V2, ack=Ack.STORED)
        held[0].release()
        await slow.flush()
        assert await rig.in_tiers("x") == (V2, V2)
        assert await slow.get("x") == V2, "the copy in L1 was outdone"
        assert await quick.get("x") == V2
        rig.at_rest(slow)


async def test_I1_a_delete_is_not_undone_by_another_engines_older_put(rig: Rig) -> None:
    held: list[Held] = []
    async with rig.engine(around=on("l3", Held, held)) as slow, rig.engine(data="other") as quick:
        await quick.submit(V1, ack=Ack.STORED)
        held[0].hold()
        await slow.submit(V2)
        assert await quick.delete("x", ack=Ack.STORED)
        held[0].release()
        await slow.flush()
        assert await rig.in_tiers("x") == (None, None)
        assert await slow.get("x") is None


async def test_I1_G10_a_write_is_not_undone_by_what_another_engines_log_replays(rig: Rig) -> None:
    async with rig.engine(around=_down) as engine:
        await engine.submit(V1)
        await engine.submit(SyncItem("d", b"old"))
        await engine.delete("k")
        await engine.submit(SyncItem("k", b"older"))
        await engine.stop(timeout=0)
    async with rig.engine(data="other") as engine:
        await engine.submit(V2)
        await engine.submit(SyncItem("d", b"new"), ack=Ack.STORED)
        await engine.delete("d", ack=Ack.STORED)
        await engine.submit(SyncItem("k", b"newer", updated_at=1), ack=Ack.STORED)
    async with rig.engine() as engine:
        assert engine.stats().recovered == 3
        await rig.check(engine, {"x": V2, "d": None, "k": SyncItem("k", b"newer", updated_at=1)})


@pytest.mark.parametrize("acks", list(itertools.product([Ack.MEMORY, Ack.LOGGED], repeat=2)))
async def test_I1_C9_G12_a_delete_is_not_undone_by_a_queued_put(rig: Rig, acks: tuple[Ack, Ack]) -> None:
    held: list[Held] = []
    async with rig.engine(around=lambda tier: held.append(Held(tier)) or held[-1]) as engine:
        await engine.submit(V1, ack=Ack.STORED)
        for each in held:
            each.hold()
        await engine.submit(V2, ack=acks[0])
        await until(lambda: any(each.waiting for each in held) or engine._running.writes.hurry())
        await engine.submit(V1, ack=acks[0])
        assert await engine.delete("x", ack=acks[1])
        for each in held:
            each.release()
        await rig.check(engine, {"x": None})


@pytest.mark.parametrize("after", [False, True])
async def test_I1_G18_a_delete_is_not_undone_by_a_read_that_lifts_a_copy(rig: Rig, after: bool) -> None:
    held: list[Held] = []
    async with rig.engine(around=on("l3", lambda tier: Held(tier, ("fetch",), after=after), held)) as reader:
        await reader.submit(V1, DURABLE, ack=Ack.STORED)
        await reader.submit(V1, ack=Ack.STORED)
        await rig.l2.delete("x")
        reader._running.l1.clear()
        held[0].hold()
        reading = asyncio.create_task(reader.get("x"))
        await until(lambda: held[0].waiting)
        assert await reader.delete("x", ack=Ack.STORED)
        held[0].release()
        assert await reading in (V1, None)  # it began before the delete
        assert await reader.get("x") is None
        await rig.check(reader, {"x": None})


async def test_I1_a_copy_that_is_lifted_late_does_not_pass_another_engines_delete(rig: Rig) -> None:
    held: list[Held] = []
    async with rig.engine(around=on("l2", Held, held)) as reader, rig.engine(data="other") as other:
        await other.submit(V1, ack=Ack.STORED)
        await rig.l2.delete("x")
        held[0].hold()
        assert await reader.get("x") == V1
        await until(lambda: held[0].waiting)
        assert await other.delete("x", ack=Ack.STORED)
        held[0].release()
        await reader.stop()
        assert await rig.in_tiers("x") == (None, None)


async def test_I1_many_writers_of_one_id_on_two_engines_end_alike_in_every_tier(rig: Rig) -> None:
    async with rig.engine(batch_flush_ms=0) as one, rig.engine(data="other", batch_flush_ms=0) as two:

        async def busy(n: int) -> None:
            engine = (one, two)[n % 2]
            if n % 7 == 0:
                await engine.delete("x")
            else:
                await engine.submit(SyncItem("x", b"%d" % n, state=f"s{n % 3}"), ack=list(Ack)[n % 3])

        await asyncio.gather(*(busy(n) for n in range(200)))
        await one.flush()
        await two.flush()
        upper, lower = await rig.in_tiers("x")
        assert upper == lower
        last = SyncItem("x", b"last")
        await two.submit(last, ack=Ack.STORED)
        assert await rig.in_tiers("x") == (last, last)


async def test_I1_an_engine_whose_clock_is_behind_still_writes_after_what_it_has_read(rig: Rig) -> None:
    async with rig.engine() as engine:
        await engine.submit(V1, ack=Ack.STORED)
    # This clock stands still, in 2023.
    async with rig.engine(clock=VirtualClock(), data="behind", batch_flush_ms=0) as behind:
        await behind.submit(V2)
        await behind.flush()
        assert await rig.in_tiers("x") == (V2, V2)


# I2: a write is seen from the moment it returned


@pytest.mark.parametrize("acks", list(itertools.product([Ack.MEMORY, Ack.LOGGED], repeat=2)))
async def test_I2_G19_G26_reads_see_what_is_not_flushed_in_memory_or_not(rig: Rig, acks: tuple[Ack, Ack]) -> None:
    held: list[Held] = []
    # No L1 and no memory for values: what is pending has to come from the log.
    for n, settings in enumerate(({}, {"l1_max_bytes": 0}, {"l1_max_bytes": 0, "pending_max_bytes": 0})):
        held.clear()
        around = lambda tier: held.append(Held(tier)) or held[-1]  # noqa: E731  # once, here
        async with rig.engine(around=around, data=f"d{n}", **settings) as engine:
            await engine.submit(V1, ack=Ack.STORED)
            for each in held:
                each.hold()
            await engine.submit(V2, ack=acks[0])
            assert await engine.get("x") == V2
            await engine.submit(V1.with_version(3), ack=acks[1])
            assert await engine.get("x") == V1.with_version(3)
            assert await engine.get_many(["x"]) == {"x": V1.with_version(3)}
            assert await engine.contains("x")
            assert (await engine.status("x")).pending
            assert await engine.set_state("x", "moved", ack=acks[0])
            assert (await engine.get("x")).state == "moved"
            assert await engine.delete("x", ack=acks[1])
            assert await engine.get("x") is None
            assert await engine.get_many(["x"]) == {}
            assert engine.peek("x") is None
            assert not await engine.contains("x")
            assert not (await engine.status("x")).exists
            assert not await engine.delete("x")
            assert not await engine.set_state("x", "nowhere")
            await engine.submit(V2, ack=acks[0])
            assert await engine.get("x") == V2
            for each in held:
                each.release()
            await rig.check(engine, {"x": V2})


@pytest.mark.parametrize("ack", [Ack.MEMORY, Ack.LOGGED])
async def test_I2_scans_and_state_queries_see_what_is_not_flushed(rig: Rig, ack: Ack) -> None:
    async with rig.engine(batch_flush_ms=60_000) as engine:
        await engine.submit_many([V1, SyncItem("y", b"", state="s1")], ack=ack)
        assert await engine.list_state_ids("s1") == ["x", "y"]
        await engine.submit(V2, ack=ack)
        assert await engine.scan_prefix("x") == [V2]
        assert (await engine.count_by_state("s1"), await engine.count_by_state("s2")) == (1, 1)
        await engine.set_state("y", "s2", ack=ack)
        assert [item.object_id for item in await engine.get_by_state("s2")] == ["x", "y"]
        await engine.delete("y", ack=ack)
        assert [item.object_id async for item in engine.iter_by_state("s2")] == ["x"]
        # In Redis alone from now on: the truth has nothing of it to show.
        await engine.submit(V1, CACHE, ack=ack)
        assert await engine.scan_prefix("") == []
        assert await engine.count_prefix("x") == 0
        assert await engine.get("x") == V1


async def test_I2_a_delete_reaches_a_write_whose_caller_gave_up(rig: Rig) -> None:
    async with rig.engine() as engine:
        for _ in range(20):
            submitting = asyncio.create_task(engine.submit(V1))
            await asyncio.sleep(0)
            submitting.cancel()
            await asyncio.wait({submitting})
            await engine.delete("x")
            assert await engine.get("x") is None
            await engine.flush()
            assert await engine.get("x") is None


# I3: what was acknowledged is in every tier in the end


async def test_I3_everything_acknowledged_is_in_every_tier_after_a_restart_in_the_middle(rig: Rig) -> None:
    model: dict[str, SyncItem | None] = {}
    for round_ in range(3):
        held: list[Held] = []
        async with rig.engine(around=on("l3" if round_ % 2 else "l2", Held, held), batch_flush_count=7) as engine:
            held[0].hold()
            for n in range(50):
                item = SyncItem.from_json(f"k.{n * (round_ + 1) % 60}", {"n": n, "round": round_})
                if n % 9 == 8:
                    model[item.object_id] = None
                    await engine.delete(item.object_id)
                else:
                    model[item.object_id] = item
                    await engine.submit(item)
            stopping = asyncio.create_task(engine.stop(timeout=0.02))
            await asyncio.sleep(0.03)  # past the time it has, while a call to the tier is under way
            held[0].release()
            await stopping
    async with rig.engine() as engine:
        await rig.check(engine, model)


# I10: every bound is a wait and then an error


async def test_I10_G48_a_full_log_makes_writes_wait_and_then_refuses_them(rig: Rig) -> None:
    held: list[Held] = []
    async with rig.engine(around=on("l3", Held, held), wal_max_items=3, backpressure_wait_ms=20) as engine:
        held[0].hold()
        for n in range(3):
            await engine.submit(SyncItem(f"k.{n}", b""))
        for ack in (Ack.MEMORY, Ack.LOGGED):
            with pytest.raises(Backpressure, match="3 of 3 operations") as full:
                await engine.submit(V1, ack=ack)
            assert full.value.retryable
        with pytest.raises(Backpressure):
            await engine.delete("k.0")
        assert await engine.get("x") is None
        assert await engine.get("k.0") is not None
        held[0].release()
        await engine.flush()
        await engine.submit_many([SyncItem(f"m.{n}", b"") for n in range(10)])  # more than the bound: piece by piece
        await engine.flush()
        assert await engine.count_prefix("") == 13
        rig.at_rest(engine)


async def test_I10_a_waiting_write_goes_through_when_room_is_made(rig: Rig) -> None:
    held: list[Held] = []
    async with rig.engine(around=on("l3", Held, held), wal_max_items=1, backpressure_wait_ms=60_000) as engine:
        held[0].hold()
        await engine.submit(V1)
        waiting = [asyncio.create_task(engine.submit(V2.with_version(n))) for n in range(5)]
        await soon()
        assert not any(task.done() for task in waiting)
        held[0].release()
        await asyncio.gather(*waiting)
        await rig.check(engine, {"x": V2.with_version(4)})  # first come, first served


async def test_I10_unlogged_bytes_are_bounded_too(rig: Rig) -> None:
    held: list[Held] = []
    async with rig.engine(around=on("l2", Held, held), pending_max_bytes=10_000, backpressure_wait_ms=20) as engine:
        held[0].hold()
        with pytest.raises(Backpressure, match="unlogged bytes"):
            await _fill(engine)
        assert 5 < engine.stats().pending < 10
        assert await engine.get("c.0") is not None
        held[0].release()
        await engine.flush()
        rig.at_rest(engine)


async def _fill(engine: SyncEngine) -> None:
    for n in range(100):
        await engine.submit(SyncItem(f"c.{n}", bytes(1_000)), CACHE)


async def test_I10_W5_G44_values_beyond_the_bound_are_read_back_from_the_log_while_sql_is_down(rig: Rig) -> None:
    items = {f"k.{n}": SyncItem(f"k.{n}", bytes([n]) * 5_000) for n in range(40)}
    held: list[Held] = []
    async with rig.engine(around=on("l3", Held, held), pending_max_bytes=20_000, l1_max_bytes=20_000) as engine:
        held[0].hold()
        await engine.submit_many(items.values())
        assert engine.stats().pending_bytes <= 20_000 + 5_500 * 40  # what a flush at hand has read back included
        assert engine.stats().l1.bytes <= 20_000
        for object_id, item in items.items():
            assert await engine.get(object_id) == item
        assert await engine.get_many(items) == items
        held[0].release()
        await engine.flush()
        assert await (await rig.l3()).get_many(list(items)) == items
        assert await rig.l2.get_many(list(items)) == items
        rig.at_rest(engine)


# I11: one absolute deadline


async def test_I11_a_cache_item_ends_at_its_deadline_in_every_place(rig: Rig) -> None:
    clock = _Jumping()
    held: list[Held] = []
    async with rig.engine(clock=clock, around=on("l2", Held, held)) as engine:
        await engine.submit(V1, SubmitOptions.cache(60))
        await engine.flush()
        assert (await engine.get("x")).content == b"one"
        held[0].hold()
        await engine.submit(V2.replace(object_id="y"), SubmitOptions.cache(60))  # pending
        clock.ahead_ms = 60_001
        for object_id in ("x", "y"):
            assert engine.peek(object_id) is None
            assert await engine.get(object_id) is None or object_id == "x"
            assert object_id not in await engine.get_many([object_id]) or object_id == "x"
        assert not await engine.contains("y")
        held[0].release()
        await engine.flush()


async def test_I11_the_deadline_in_redis_is_the_one_that_was_promised_and_reads_do_not_move_it(rig: Rig) -> None:
    async with rig.engine() as engine:
        await engine.submit(V1, SubmitOptions.cache(60), ack=Ack.STORED)
        deadline = await rig.key("PEXPIRETIME", rig.redis_prefix + "x")
    async with rig.engine(promotion_ttl=7_200) as engine:
        item = await engine.get("x")
        assert item.expires_at == deadline
        assert engine._running.l1._entries["x"].deadline_ms == deadline
        await engine.set_state("x", "moved", ack=Ack.STORED)
        assert await rig.key("PEXPIRETIME", rig.redis_prefix + "x") == deadline
        assert (await engine.get("x")).expires_at == deadline
        # A write without a TTL removes it.
        await engine.submit(V2, ack=Ack.STORED)
        assert await rig.key("PEXPIRETIME", rig.redis_prefix + "x") == -1
        assert (await engine.get("x")).expires_at is None
        await engine.submit(V1, SubmitOptions(redis_ttl=60), ack=Ack.STORED)
        assert await rig.key("PEXPIRETIME", rig.redis_prefix + "x") > deadline - 60_000
        assert (await engine.get("x")).expires_at is None, "SQL holds it: the TTL is the Redis copy's alone"


async def test_I11_a_copy_that_a_read_lifts_lives_for_promotion_ttl(rig: Rig) -> None:
    async with rig.engine(promotion_ttl=100) as engine:
        await engine.submit(V1, ack=Ack.STORED)
        await rig.l2.delete("x")
        engine._running.l1.clear()
        assert await engine.get("x") == V1
        await engine.stop()  # waits for the copy
        left_ms = await rig.key("PTTL", rig.redis_prefix + "x")
        assert 0 < left_ms <= 100_000


async def test_I11_a_cache_item_whose_deadline_passes_in_the_queue_is_never_stored(rig: Rig) -> None:
    held: list[Held] = []
    clock = _Jumping()
    clock.ahead_ms = -3_600_000  # this engine believes it is an hour ago: for Redis the deadline has passed
    async with rig.engine(clock=clock, around=on("l2", Held, held)) as engine:
        await rig.l2.put(SyncItem("x", b"older", stamp=1))
        await engine.submit(V1, SubmitOptions.cache(60))
        await engine.flush()
        assert await rig.in_tiers("x") == (None, None)
        rig.at_rest(engine)


class _Jumping(Hurried):
    """The real clock, with a wall clock that the test sets ahead."""

    ahead_ms = 0

    def now_us(self) -> int:
        return super().now_us() + self.ahead_ms * 1000


async def test_I10_an_empty_engine_lets_in_what_is_larger_than_the_whole_bound(rig: Rig) -> None:
    async with rig.engine(pending_max_bytes=0, wal_max_items=1) as engine:
        await engine.submit(SyncItem("big", bytes(100_000)), CACHE)
        await engine.submit_many([V1, V2])
        await rig.check(engine, {"x": V2})


async def test_a_write_to_a_tier_that_never_answers_is_acknowledged_by_the_log_alone(rig: Rig) -> None:
    async with rig.engine(around=_down) as engine:
        await engine.submit(V1)
        assert await engine.get("x") == V1
        with pytest.raises(TierUnavailable, match="l3"):
            await engine.flush(timeout=0.01)
        report = await engine.stop(timeout=0)
        assert report.left_in_log == 1


# Mixed acknowledgements: what is acknowledged early was still stamped late


class _SlowLog:
    """Stands before an engine's log and keeps appends back until released."""

    def __init__(self, engine: SyncEngine) -> None:
        commits = engine._running.writes._commits
        self._log = commits._journal
        self._kept: list[tuple[object, ...]] = []
        commits._journal = self

    def append(self, *call: object) -> None:
        self._kept.append(call)

    def release(self) -> None:
        self.append = self._log.append
        for call in self._kept:
            self._log.append(*call)

    def __getattr__(self, name: str) -> object:
        return getattr(self._log, name)


@pytest.mark.parametrize(
    ("later", "options", "result"),
    [
        (lambda engine: engine.submit(V2, ack=Ack.MEMORY), None, V2),
        (lambda engine: engine.submit(V2, CACHE), CACHE, V2),
        (lambda engine: engine.delete("x", ack=Ack.MEMORY), None, None),
        (lambda engine: engine.set_state("x", "moved", ack=Ack.MEMORY), None, V1.with_state("moved")),
    ],
    ids=["put", "cache", "delete", "set_state"],
)
async def test_I1_I2_what_is_acknowledged_in_memory_does_not_overtake_what_the_log_still_writes(
    rig: Rig, later: object, options: SubmitOptions | None, result: SyncItem | None
) -> None:
    async with rig.engine(batch_flush_ms=0) as engine:
        await engine.submit(V1.replace(content=b"zero"), ack=Ack.STORED)
        log = _SlowLog(engine)
        earlier = asyncio.create_task(engine.submit(V1))
        await soon()
        early = asyncio.create_task(later(engine))
        assert (await engine.get("x")) != V1
        await asyncio.sleep(0.05)  # room for a flush that would come too early
        log.release()
        await earlier
        await early
        assert await engine.get("x") == result
        engine._running.l1.clear()
        assert await engine.get("x") == result
        await rig.check(engine, {"x": result}, options={"x": options or SubmitOptions()})
    async with rig.engine() as engine:
        assert await engine.get("x") == result


async def test_I2_a_write_whose_value_only_the_log_keeps_replaces_the_copy_in_memory(rig: Rig) -> None:
    held: list[Held] = []
    async with rig.engine(around=on("l3", Held, held), pending_max_bytes=0) as engine:
        await engine.submit(V1, ack=Ack.STORED)
        assert await engine.get("x") == V1
        held[0].hold()
        await engine.submit(V2)
        assert await engine.get("x") == V2
        await engine.set_state("x", "moved")
        assert await engine.get("x") == V2.with_state("moved")
        held[0].release()
        await rig.check(engine, {"x": V2.with_state("moved")})


# What is many at once


async def test_a_large_batch_is_settled_in_parts_between_which_others_have_their_turn(rig: Rig) -> None:
    held: list[Held] = []
    turns = 0
    at: list[int] = []

    async def count() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    async def stored(engine: SyncEngine, item: SyncItem) -> None:
        await engine.submit(item, ack=Ack.STORED)
        at.append(turns)

    async with rig.engine(redis=False, around=on("l3", Held, held)) as engine, asyncio.TaskGroup() as tasks:
        held[0].hold()
        tasks.create_task(stored(engine, V1))
        await until(lambda: held[0].waiting)
        for n in range(100):
            tasks.create_task(stored(engine, SyncItem(f"i{n}", b"x")))
        await until(lambda: engine.stats().pending == 101)
        counting = tasks.create_task(count())
        held[0].release()
        await until(lambda: len(at) == 101)
        counting.cancel()
    assert len(set(at)) > 100 / 20
