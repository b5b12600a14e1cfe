"""Start, stop and everything that can go wrong on the way: no waiter is forgotten, no tier is needed to begin with."""

from __future__ import annotations

import asyncio
from functools import partial

import pytest

from sync_engine import Ack, NotRunning, StopReport, SubmitOptions, SyncItem, TierUnavailable
from sync_engine.testing.fixtures import StartRedis
from sync_engine.testing.tiers import UPKEEP, Breaking, Deaf

from ..locks import write_locked
from .rig import CACHE, Held, Rig, on, others, soon, until

ITEM = SyncItem.from_json("x", {"n": 1}, state="s")


def _down(tier: object) -> Breaking:
    return Breaking(tier, times=None, verbs=("apply",))  # type: ignore[arg-type]  # a tier


async def test_stop_says_what_it_left_in_the_log_and_what_was_lost(rig: Rig) -> None:
    async with rig.engine(around=_down) as engine:
        await engine.submit(ITEM)
        await engine.delete("x")
        await engine.submit(SyncItem("c", b"cached"), CACHE)
        assert await engine.stop(timeout=0.01) == StopReport(left_in_log=2, lost=1)
        assert await engine.stop() == StopReport(0, 0)
    async with rig.engine() as engine:
        assert engine.stats().recovered == 2
        await rig.check(engine, {"x": None, "c": None})


async def test_stop_wakes_everybody_who_waits_for_a_tier_that_is_down(rig: Rig) -> None:
    before = others()
    engine = rig.engine(around=on("l3", _down))
    await engine.start()
    receipt = await engine.submit(SyncItem("r", b"1"))
    waiting = [
        asyncio.create_task(work)
        for work in (
            engine.submit(ITEM, ack=Ack.STORED),
            engine.submit(ITEM.with_version(2), ack=Ack.STORED),  # one id twice: neither is forgotten
            engine.submit(SyncItem("c", b"", version=3), SubmitOptions(if_version=0)),
            engine.delete("r", ack=Ack.STORED),
            receipt.stored(),
            engine.flush(),
        )
    ]
    await until(lambda: engine.stats().pending >= 4)
    await soon()
    await engine.stop(timeout=0.01)
    for outcome in await asyncio.gather(*waiting, return_exceptions=True):
        assert isinstance(outcome, NotRunning | TierUnavailable), outcome
    with pytest.raises(NotRunning):
        await receipt.stored()
    assert others() <= before


async def test_a_receipt_outlives_its_engine(rig: Rig) -> None:
    async with rig.engine() as engine:
        receipt = await engine.submit(ITEM)
    await receipt.stored()


async def test_G62_an_engine_starts_while_redis_is_down_and_takes_it_in_when_it_is_back(
    rig: Rig, own_redis: StartRedis
) -> None:
    server = await own_redis()
    rig.redis_url, was = server.url, rig.l2
    rig.l2 = type(was)(server.url, rig.redis_prefix)
    await was.close()
    await server.kill()
    async with rig.engine() as engine:
        await engine.submit(ITEM)
        assert await engine.get("x") == ITEM
        assert await engine.count_by_state("s") == 1
        with pytest.raises(TierUnavailable, match="l2"):
            await engine.get("absent")  # Redis alone might hold it
        await engine.submit(SyncItem("c", b"cached"), CACHE)
        assert (await engine.status("x")).l2 is None
        with pytest.raises(TierUnavailable, match="l2"):
            await engine.flush(timeout=0.05)
        await server.start()
        await engine.flush()
        assert await rig.in_tiers("x") == (ITEM, ITEM)
        assert await engine.get("absent") is None
        rig.at_rest(engine)


async def test_G62_an_engine_starts_and_acknowledges_while_sql_is_locked(rig: Rig) -> None:
    await rig.l3()  # makes the file
    engine = rig.engine(sql_timeout_ms=1)
    with write_locked(rig.path / "truth.db"):
        await engine.start()
        receipt = await engine.submit(ITEM)
        assert await engine.get("x") == ITEM
        with pytest.raises(TierUnavailable):
            await engine.flush(timeout=0.05)
        with pytest.raises(TierUnavailable):
            await engine.count_by_state("s")
    await receipt.stored()
    await rig.check(engine, {"x": ITEM})


async def test_what_an_engine_without_sql_left_in_the_log_is_served_before_sql_is_back(rig: Rig) -> None:
    async with rig.engine(around=_down) as engine:
        await engine.submit(ITEM)
        await engine.stop(timeout=0)
    held: list[Held] = []

    def holding(tier: object) -> Held:
        held.append(Held(tier))  # type: ignore[arg-type]  # a tier
        held[-1].hold()
        return held[-1]

    async with rig.engine(around=on("l3", holding)) as engine:
        assert await engine.get("x") == ITEM
        assert (await engine.status("x")).pending
        held[0].release()
        await rig.check(engine, {"x": ITEM})


async def test_an_engine_that_meets_a_bug_stops_loudly_and_keeps_the_log(
    rig: Rig, caplog: pytest.LogCaptureFixture
) -> None:
    before = others()
    engine = rig.engine(around=on("l3", partial(Deaf, but=UPKEEP)))
    await engine.start()
    receipt = await engine.submit(ITEM)
    with pytest.raises(NotRunning):
        await receipt.stored()
    with pytest.raises(NotRunning, match="it failed"):
        await engine.get("x")
    assert "the engine failed" in caplog.text
    assert (await engine.stop()).left_in_log == 1
    async with rig.engine() as engine:
        await rig.check(engine, {"x": ITEM})
    assert others() <= before


async def test_an_error_inside_the_block_still_stops_the_engine(rig: Rig) -> None:
    with pytest.raises(ZeroDivisionError):
        await _submit_and_fail(rig)
    assert await rig.in_tiers("x") == (ITEM, ITEM)


async def _submit_and_fail(rig: Rig) -> None:
    async with rig.engine() as engine:
        await engine.submit(ITEM)
        raise ZeroDivisionError


async def test_G63_start_and_stop_from_many_tasks_at_once_happen_once(rig: Rig) -> None:
    before = others()
    engine = rig.engine()
    for _ in range(3):
        await asyncio.gather(*(engine.start() for _ in range(5)))
        await engine.submit(ITEM)
        assert await engine.get("x") == ITEM
        reports = await asyncio.gather(*(engine.stop() for _ in range(5)))
        assert reports == [StopReport(0, 0)] * 5
    assert others() <= before
