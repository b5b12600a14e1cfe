"""Faults of the original between its tiers: what an outage costs, what a write forgets to tell (FAULTS.md Q, W, G)."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from sync_engine import Ack, SyncEngineConfig, SyncItem
from sync_engine.resilience import BreakerPolicy
from sync_engine.testing.clock import VirtualClock
from sync_engine.testing.tiers import Breaking, Counting, Refusing

from ..flows.rig import CACHE, Held, Rig, on, until

LABELLED = {
    item.object_id: item
    for item in (
        SyncItem(
            object_id,
            content,
            version=7,
            state="delta",
            updated_at=3,
            home_instance_id="node-a",
            trace_parent="00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
            trace_state="vendor=1",
            access_count=5,
            last_accessed=1_700_000_001_000,
        )
        for object_id, content in (("json", b'{"b": 1.50, "a": "\xc3\xa9"}'), ("binary", b"\x00\xff\x80"))
    )
}


def _down(tier: Any) -> Breaking:
    return Breaking(tier, times=None)


# Outages


async def test_Q2_what_an_outage_left_in_the_log_is_drained_with_its_type_and_every_label(rig: Rig) -> None:
    broken: list[Breaking] = []
    async with rig.engine(around=on("l3", _down, broken)) as engine:
        await engine.submit_many(LABELLED.values())
        await until(lambda: broken[0].broken > 2)
        await engine.stop(timeout=0)
    async with rig.engine() as engine:
        await engine.flush()
        held = await (await rig.l3()).get_many(list(LABELLED))
        assert held == LABELLED
        assert {id_: item.content_type for id_, item in held.items()} == {
            id_: item.content_type for id_, item in LABELLED.items()
        }


async def test_G41_what_may_pass_is_tried_again_what_will_not_is_refused_and_a_dead_tier_is_spared(rig: Rig) -> None:
    """The original tried everything again by one profile, a syntax error too, and had no breaker around Redis."""
    passing: list[Breaking] = []
    refusing: list[Refusing] = []

    def around(tier: Any) -> Any:
        return on("l3", lambda t: Breaking(t, times=3, verbs=("apply",)), passing)(
            on("l3", lambda t: Refusing(t, {"never"}), refusing)(tier)
        )

    async with rig.engine(redis=False, around=around) as engine:
        await engine.submit_many([SyncItem("soon", b"1"), SyncItem("never", b"2")])
        await engine.flush()
        assert passing[0].broken == 3
        assert [each.object_id for each in await engine.quarantine()] == ["never"]
    dead: list[Counting] = []
    # Around the tier is within the breaker: what is counted reached it. Time stands still, so no circuit rests.
    wrap = on("l2", lambda t: Counting(Breaking(t, times=None, verbs=("fetch",))), dead)
    # Eviction would ask Redis other things, and be answered.
    alone = rig.engine(data="other", clock=VirtualClock(), around=wrap, redis_eviction_enabled=False)
    async with alone as engine:
        for _ in range(50):
            assert await engine.get("soon") is not None, "SQL answers"
            engine._running.l1.drop("soon")
        assert dead[0].calls["fetch"] == BreakerPolicy().failures_max


@pytest.mark.parametrize("tier", ["l2", "l3"])
async def test_G42_a_tier_that_is_back_takes_its_work_without_anybody_asking(rig: Rig, tier: str) -> None:
    broken: list[Breaking] = []
    async with rig.engine(around=on(tier, _down, broken)) as engine:
        item = SyncItem("a", b"1")
        await engine.submit(item)
        await until(lambda: broken[0].broken > 3)
        broken[0].heal()
        await until(lambda: engine.stats().pending == 0)  # no call on the engine but this look at its figures
        assert await rig.in_tiers("a") == (item, item)


async def test_G43_a_start_waits_for_nothing_that_the_log_holds_and_serves_meanwhile(rig: Rig) -> None:
    items = {f"k.{n:04}": SyncItem(f"k.{n:04}", b"%d" % n) for n in range(2_000)}
    async with rig.engine(around=on("l3", _down)) as engine:
        await engine.submit_many(items.values())
        await engine.stop(timeout=0)
    new = SyncItem("new", b"!")
    held: list[Held] = []

    def closed(tier: Any) -> Held:
        made = Held(tier)
        made.hold()
        return made

    async with rig.engine(redis=False, around=on("l3", closed, held)) as engine:
        await until(lambda: held[0].waiting == 1)
        assert engine.stats().log_records == 2_000, "nothing of it has reached SQL"
        assert await engine.get_many(list(items)) == items
        await engine.submit(new)
        assert await engine.get("new") == new
        held[0].release()
        await engine.flush()
        assert await (await rig.l3()).count() == 2_001


async def test_G67_health_has_an_end_and_tells_what_is_queued_refused_and_not_answering(rig: Rig) -> None:
    deaf: list[Held] = []
    clock = VirtualClock()
    wrap = on("l3", lambda t: Held(t, ("newest_stamp", "apply")), deaf)
    async with rig.engine(redis=False, clock=clock, around=wrap) as engine:
        deaf[0].hold()
        await engine.submit_many([SyncItem("a", b"1"), SyncItem("b", b"2")])
        asked = asyncio.create_task(engine.health())
        while not asked.done():
            await clock.run_for(1)
        health = asked.result()
        assert not health.ok
        assert (health.tiers["l3"].answers, health.tiers["l3"].waiting) == (False, 2)
        assert "no answer within" in str(health.tiers["l3"].trouble)
        deaf[0].release()


# What a write tells, and what a setting does


async def test_Q14_G56_a_change_of_state_is_a_write_that_every_tier_and_every_reader_sees(rig: Rig) -> None:
    item = SyncItem("a", b'{"v":1}', state="old")
    async with rig.engine() as engine:
        await engine.submit(item, ack=Ack.STORED)
        copy = await engine.get("a")
        assert copy is not None
        await engine.set_state("a", "new")
        assert engine.peek("a") == item.with_state("new")
        await rig.check(engine, {"a": item.with_state("new")})
        assert await rig.l2.list_state_ids("old") == []
        assert [each.object_id for each in await engine.get_by_state("new", 10)] == ["a"]
        # Only a caller who submits his older copy himself takes it back, as any write would.
        await engine.submit(copy)
        await rig.check(engine, {"a": item})


async def test_E5_counters_are_the_callers_and_no_read_changes_them(rig: Rig) -> None:
    """In the original a read counted in L1 alone, and a write took back what had been counted."""
    item = SyncItem("a", b"1", access_count=5, last_accessed=1_700_000_001_000)
    async with rig.engine() as engine:
        await engine.submit(item, ack=Ack.STORED)
        for _ in range(3):
            assert await engine.get("a") == item
        for held in (engine.peek("a"), *await rig.in_tiers("a")):
            assert held is not None
            assert (held.access_count, held.last_accessed) == (5, 1_700_000_001_000)


async def test_W8_zero_turns_off_or_makes_immediate_and_never_stops_the_engine(rig: Rig) -> None:
    fields = SyncEngineConfig.model_fields.items()
    zero = {name: 0 for name, field in fields if any(getattr(bound, "ge", None) == 0 for bound in field.metadata)}
    assert {"batch_flush_ms", "l1_max_bytes", "pending_max_bytes"} <= zero.keys()
    async with rig.engine(**zero) as engine:
        item = SyncItem("a", b"1")
        await engine.submit(item)
        assert await engine.get("a") == item, "nothing may stay in memory"
        await rig.check(engine, {"a": item})
        cached = SyncItem("b", b"2")
        await engine.submit(cached, CACHE)  # no log holds it: one at a time
        await rig.check(engine, {"a": item, "b": cached}, options={"b": CACHE})
