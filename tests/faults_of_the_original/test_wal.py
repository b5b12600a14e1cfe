"""Faults of the original's log, through the engine (FAULTS.md W, C12, G1); the log alone is in tests/crash."""

from __future__ import annotations

import shutil
from typing import Any

import pytest

from sync_engine import Ack, SyncItem
from sync_engine.testing.clock import VirtualClock
from sync_engine.testing.tiers import Breaking, Counting

from ..flows.rig import DURABLE, Held, Rig, on

ITEM = SyncItem("x", b"\x00bytes", state="s", updated_at=1)


def _down(tier: Any) -> Breaking:
    return Breaking(tier, times=None, verbs=("apply",))


async def test_G1_C12_what_was_acknowledged_as_logged_survives_the_process(rig: Rig) -> None:
    held: list[Held] = []
    async with rig.engine(around=lambda tier: held.append(Held(tier)) or held[-1], data="dies") as engine:
        for each in held:
            each.hold()
        await engine.submit(ITEM)
        await engine.submit(ITEM.replace(object_id="y"), DURABLE)
        await engine.set_state("x", "t")
        # What a kill -9 at this moment leaves: the disk, as it is.
        shutil.copytree(rig.path / "dies" / "log", rig.path / "data" / "log")
        for each in held:
            each.release()
        await engine.delete_many(["x", "y"])  # those of the process that lived on
    for key in await rig.l2.client.keys(rig.redis_prefix + "*"):
        await rig.l2.client.delete(key)
    async with rig.engine(sql_url=f"sqlite:///{rig.path / 'elsewhere.db'}") as engine:
        assert engine.stats().recovered == 3
        assert await engine.get("x") == ITEM.with_state("t")
        await engine.flush()
        assert await rig.l2.get("x") == ITEM.with_state("t")
        assert not await rig.l2.exists("y")
        assert await engine.count_prefix("") == 2


async def test_W4_a_long_log_is_drained_batch_after_batch_and_not_by_a_timer(rig: Rig) -> None:
    items = {f"k.{n:04}": SyncItem(f"k.{n:04}", b"%d" % n) for n in range(2_500)}
    async with rig.engine(around=_down) as engine:
        await engine.submit_many(items.values())
        await engine.stop(timeout=0)
    counting: list[Counting] = []
    # Time stands still: whatever waits for a timer waits for ever.
    wrap = on("l3", Counting, counting)
    async with rig.engine(clock=VirtualClock(), around=wrap, redis=False, batch_flush_bytes=10**9) as engine:
        assert engine.stats().recovered == 2_500
        assert await engine.get("k.2499") == items["k.2499"], "served while it drains"
        await engine.flush()
        assert counting[0].calls["apply"] <= 3
        assert await (await rig.l3()).get_many(list(items)) == items
        assert engine.stats().log_records == 0


async def test_W2_a_delete_during_an_outage_stays_a_delete(rig: Rig) -> None:
    async with rig.engine() as engine:
        await engine.submit(ITEM, ack=Ack.STORED)
    async with rig.engine(around=_down) as engine:
        await engine.submit(ITEM.with_version(2))
        assert await engine.delete("x")
        await engine.stop(timeout=0)
    async with rig.engine() as engine:
        assert engine.stats().recovered == 2
        assert await engine.get("x") is None
        await rig.check(engine, {"x": None})


async def test_W3_overwrites_during_an_outage_are_counted_exactly(rig: Rig) -> None:
    async with rig.engine(around=on("l3", _down), wal_max_items=20, backpressure_wait_ms=0) as engine:
        for n in range(20):
            await engine.submit(ITEM.with_version(n))
        assert (engine.stats().log_records, engine.stats().pending) == (20, 20)
        await engine.stop(timeout=0)
    async with rig.engine(wal_max_items=20) as engine:
        await engine.flush()
        for n in range(50):
            await engine.submit(ITEM.with_version(n))
        await rig.check(engine, {"x": ITEM.with_version(49)})


async def test_W1_more_records_than_a_statement_takes_parameters_are_replayed_and_settled_once(rig: Rig) -> None:
    count = 35_000  # SQLite takes 32,766 parameters
    async with rig.engine(around=_down, redis=False, l1_max_bytes=0) as engine:
        await engine.submit_many([SyncItem(f"k.{n}", b"") for n in range(count)])
        await engine.stop(timeout=0)
    async with rig.engine(redis=False, l1_max_bytes=0, batch_flush_count=100_000, batch_flush_bytes=10**9) as engine:
        assert engine.stats().recovered == count
        await engine.flush()
        assert await engine.count_prefix("k.") == count
        assert engine.stats().log_records == 0
    async with rig.engine(redis=False) as engine:
        assert engine.stats().recovered == 0


@pytest.mark.parametrize("pending_max_bytes", [0, 10**6])
async def test_W5_what_only_the_log_holds_is_read_from_it_after_a_restart(rig: Rig, pending_max_bytes: int) -> None:
    items = {f"k.{n}": SyncItem.from_json(f"k.{n}", {"n": n}) for n in range(50)}
    async with rig.engine(around=_down) as engine:
        await engine.submit_many(items.values())
        await engine.stop(timeout=0)
    async with rig.engine(around=_down, l1_max_bytes=0, pending_max_bytes=pending_max_bytes) as engine:
        assert await engine.get("k.7") == items["k.7"]
        assert await engine.get_many(items) == items
        await engine.stop(timeout=0)
