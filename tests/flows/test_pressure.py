"""What is accepted and not settled, and what it means for writes as it nears its bounds (G47, I10)."""

from __future__ import annotations

import pytest

from sync_engine import Ack, Backpressure, SyncItem

from .rig import CACHE, Held, Hurried, Rig, on, until


def items(count: int) -> list[SyncItem]:
    return [SyncItem(f"i.{n:03}", b"x", updated_at=1) for n in range(count)]


class Noting(Hurried):
    """Keeps how long somebody was asked to sleep, and does not."""

    def __init__(self) -> None:
        self.slept: list[float] = []

    async def sleep(self, seconds: float, /) -> None:
        self.slept.append(seconds)
        await super().sleep(seconds)


async def test_G47_every_level_is_told_by_stats_and_health(rig: Rig) -> None:
    held: list[Held] = []
    async with rig.engine(around=on("l3", Held, held), wal_max_items=100, backpressure_wait_ms=20) as engine:
        assert (engine.stats().pressure, engine.stats().level) == (0.0, "normal")
        held[0].hold()
        ops = items(100)
        seen = []
        for upto in (69, 70, 80, 90, 95, 100):
            await engine.submit_many(ops[engine.stats().log_records : upto])
            stats, health = engine.stats(), await engine.health()
            assert stats.pressure == upto / 100
            assert health.level == stats.level
            warned = any(f"{upto}% of what may be unsettled" in warning for warning in health.warnings)
            assert warned is (stats.level != "normal")
            seen.append(stats.level)
        assert seen == ["normal", "warn", "hurry", "slow", "refuse", "refuse"]
        with pytest.raises(Backpressure):
            await engine.submit(SyncItem("one more", b"x"))
        held[0].release()
        await engine.flush()
        assert (engine.stats().pressure, engine.stats().level) == (0.0, "normal")
        assert (await engine.health()).warnings == ()


async def test_from_the_second_band_on_nothing_waits_for_company(rig: Rig) -> None:
    async with rig.engine(wal_max_items=10, batch_flush_ms=60_000, redis=False) as engine:
        await engine.submit_many(items(7))
        assert (engine.stats().log_records, engine.stats().level) == (7, "warn")
        await engine.submit_many(items(8)[7:])
        assert engine.stats().level == "hurry"
        await engine.submit(SyncItem("one more", b"x"))
        await until(lambda: engine.stats().log_records == 1)  # the eight have gone; the new one is alone again


async def test_writes_are_slowed_near_the_bound_and_deletes_and_reads_are_not(rig: Rig) -> None:
    held: list[Held] = []
    clock = Noting()
    async with rig.engine(around=on("l3", Held, held), wal_max_items=100, redis=False, clock=clock) as engine:
        await engine.submit(SyncItem("old", b"x"), ack=Ack.STORED)
        held[0].hold()
        await engine.submit_many(items(95))
        clock.slept.clear()
        assert await engine.delete("old")
        assert await engine.get("i.000") is not None
        assert 0.05 not in clock.slept
        await engine.submit(SyncItem("new", b"x"))
        assert pytest.approx(0.06) in clock.slept
        held[0].release()


async def test_what_no_log_holds_is_refused_first(rig: Rig) -> None:
    held: list[Held] = []
    around = lambda tier: held.append(Held(tier)) or held[-1]  # noqa: E731  # one line
    async with rig.engine(around=around, wal_max_items=100, backpressure_wait_ms=20) as engine:
        for each in held:
            each.hold()
        await engine.submit_many(items(95))
        for options, ack in ((CACHE, None), (None, Ack.MEMORY)):
            with pytest.raises(Backpressure):
                await engine.submit(SyncItem("v", b"x"), options, ack=ack)
        await engine.submit_many([SyncItem(f"n.{n}", b"x") for n in range(5)])
        assert engine.stats().log_records == 100
        for each in held:
            each.release()


async def test_the_edges_are_settings(rig: Rig) -> None:
    held: list[Held] = []
    settings = {"wal_max_items": 100, "backpressure_warn": 0.1, "backpressure_critical": 0.3}
    async with rig.engine(around=on("l3", Held, held), redis=False, **settings) as engine:
        held[0].hold()
        levels = []
        for _ in range(8):
            await engine.submit_many([SyncItem(f"{len(levels)}.{n}", b"x") for n in range(10)])
            levels.append(engine.stats().level)
        assert levels == ["warn", "hurry", "slow", "slow", "slow", "slow", "refuse", "refuse"]
        held[0].release()
