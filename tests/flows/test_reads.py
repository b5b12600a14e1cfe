"""A read never lies (I4), never returns other bytes (I5), and never serves what a newer write has passed."""

from __future__ import annotations

import asyncio
import sqlite3
from functools import partial
from typing import Any

import pytest

from sync_engine import Ack, Corruption, SyncItem, TierUnavailable
from sync_engine.clock import SystemClock
from sync_engine.testing.tiers import UPKEEP, Breaking, Counting, Deaf

from .rig import CACHE, DURABLE, Held, Rig, on, soon, until

ITEM = SyncItem.from_json("x", {"n": 1}, state="s", updated_at=1)
BINARY = SyncItem("b", b"\x00\xff" * 50, updated_at=1)


def _mute(*verbs: str) -> object:
    return lambda tier: Breaking(tier, times=None, verbs=verbs or None)


async def _stored(rig: Rig) -> None:
    async with rig.engine() as engine:
        await engine.submit_many([ITEM, BINARY], ack=Ack.STORED)
        await engine.submit(SyncItem("c", b"cached"), CACHE, ack=Ack.STORED)
        await engine.submit(SyncItem("d", b"durable"), DURABLE, ack=Ack.STORED)


# I4: None means absent from the truth


async def test_I4_G20_with_both_tiers_down_a_read_raises_and_never_says_absent(rig: Rig) -> None:
    await _stored(rig)
    async with rig.engine(around=_mute()) as engine:
        for object_id in ("x", "c", "d", "absent"):
            with pytest.raises(TierUnavailable):
                await engine.get(object_id)
            with pytest.raises(TierUnavailable):
                await engine.get_many([object_id])
            with pytest.raises(TierUnavailable):
                await engine.contains(object_id)
            status = await engine.status(object_id)
            assert (status.l1, status.l2, status.l3) == (False, None, None)
        for ask in (engine.scan_prefix, engine.count_prefix, engine.get_by_state, engine.list_state_ids):
            with pytest.raises(TierUnavailable, match="l3"):
                await ask("s")
        # What this engine knows by itself it still answers.
        await engine.submit(ITEM.with_version(2))
        assert (await engine.get("x")).version == 2
        assert await engine.contains("x")
        assert await engine.delete("x")
        assert await engine.get("x") is None
        assert await engine.get("c", stale_ok=True) is None
        await engine.stop(timeout=0)


async def test_I4_with_redis_down_the_truth_answers_for_what_it_holds_and_only_for_that(rig: Rig) -> None:
    await _stored(rig)
    async with rig.engine(around=on("l2", _mute())) as engine:
        assert await engine.get("x") == ITEM
        assert await engine.get_many(["x", "b"]) == {"x": ITEM, "b": BINARY}
        assert await engine.contains("d")
        for ask in (engine.get, engine.contains):
            with pytest.raises(TierUnavailable, match="l2"):
                await ask("c")
        with pytest.raises(TierUnavailable, match="l2"):
            await engine.get_many(["x", "c"])
        assert await engine.get("c", stale_ok=True) is None


async def test_I4_with_sql_down_redis_answers_for_what_it_holds_and_only_for_that(rig: Rig) -> None:
    await _stored(rig)
    async with rig.engine(around=on("l3", _mute())) as engine:
        assert await engine.get("x") == ITEM
        assert (await engine.get("c")).content == b"cached"
        assert await engine.contains("x")
        for ask in (engine.get, engine.contains):
            with pytest.raises(TierUnavailable, match="l3"):
                await ask("d")
        assert await engine.get("d", stale_ok=True) is None


class Impatient(SystemClock):
    async def sleep(self, seconds: float, /) -> None:
        await super().sleep(min(seconds, 0.1))


async def test_I4_a_read_ends_though_sql_never_answers(rig: Rig) -> None:
    held: list[Held] = []
    around = on("l3", lambda tier: Held(tier, ("fetch",)), held)
    async with rig.engine(around=around, clock=Impatient(), redis=False, l1_max_bytes=0) as engine:
        await engine.submit(ITEM, ack=Ack.STORED)
        held[0].hold()
        with pytest.raises(TierUnavailable, match="l3 is unavailable: no answer within 40 s"):
            await engine.get(ITEM.object_id)
        held[0].release()
        assert await engine.get(ITEM.object_id) == ITEM


async def test_I4_stale_ok_returns_the_newest_copy_that_is_known(rig: Rig) -> None:
    await _stored(rig)
    async with rig.engine(around=on("l3", _mute())) as engine:
        await rig.l2.client.delete(rig.redis_prefix + "x")
        await engine.set_state("b", "moved")  # SQL is down: it waits, over what Redis holds
        engine._running.l1.clear()
        assert (await engine.get("b", stale_ok=True)).state == "moved"
        await engine.submit(ITEM)
        engine._running.l1.clear()
        assert await engine.get("x", stale_ok=True) == ITEM
        await engine.stop(timeout=0)


async def test_I4_an_emptied_redis_hides_nothing_that_sql_holds(rig: Rig) -> None:
    await _stored(rig)
    for key in await rig.l2.client.keys(rig.redis_prefix + "*"):
        await rig.l2.client.delete(key)
    async with rig.engine() as engine:
        assert await engine.get("x") == ITEM
        assert await engine.get_many(["b", "d"]) == {"b": BINARY, "d": await engine.get("d")}
        assert await engine.get("c") is None, "a cache item may be lost with Redis, and is then absent"
        await engine.stop()
    assert await rig.l2.get("x") == ITEM, "a read has put it back"
    assert await rig.l2.is_in_state("x", "s")


# I5: bytes in, bytes out


async def test_I5_a_damaged_copy_in_redis_is_never_served_and_is_repaired_from_the_truth(rig: Rig) -> None:
    await _stored(rig)
    await rig.key("JSON.SET", rig.redis_prefix + "x", "$.payload", '{"n":2}')
    raw = await rig.key("GET", rig.redis_prefix + "b")
    await rig.key("SET", rig.redis_prefix + "b", raw.replace(b"\xff\x00", b"\xff\x01", 1))
    for object_id in ("x", "b"):
        with pytest.raises(Corruption):
            await rig.l2.get(object_id)
    async with rig.engine() as engine:
        assert await engine.get("x") == ITEM
        assert await engine.get_many(["b"]) == {"b": BINARY}
        await engine.stop()
    assert await rig.l2.get_many(["x", "b"]) == {"x": ITEM, "b": BINARY}


async def test_I5_a_damaged_row_is_never_served(rig: Rig) -> None:
    await _stored(rig)
    with sqlite3.connect(rig.path / "truth.db") as raw:
        raw.execute("UPDATE sync_items SET payload = '{\"n\":3}' WHERE id = 'x'")
        raw.execute("UPDATE sync_items SET payload_blob = X'00' WHERE id = 'd'")
    raw.close()
    async with rig.engine() as engine:
        assert await engine.get("x") == ITEM, "Redis still holds the bytes"
        with pytest.raises(Corruption) as told:
            await engine.get("d")
        assert told.value.object_id == "d"
        assert told.value.expected != told.value.actual
        with pytest.raises(Corruption):
            await engine.get_many(["x", "d"])
        with pytest.raises(Corruption):
            await engine.scan_prefix("")
        # The neighbours are fine, and a new write mends it.
        assert await engine.get_many(["x", "b"]) == {"x": ITEM, "b": BINARY}
        await engine.submit(SyncItem("d", b"anew"), ack=Ack.STORED)
        engine._running.l1.clear()
        assert (await engine.get("d")).content == b"anew"


async def test_I5_damage_in_every_tier_is_an_error_in_every_tier(rig: Rig) -> None:
    await _stored(rig)
    await rig.key("JSON.SET", rig.redis_prefix + "x", "$.payload", '{"n":2}')
    with sqlite3.connect(rig.path / "truth.db") as raw:
        raw.execute("UPDATE sync_items SET payload = '{\"n\":3}' WHERE id = 'x'")
    raw.close()
    async with rig.engine() as engine:
        with pytest.raises(Corruption):
            await engine.get("x")
    async with rig.engine(around=on("l3", _mute())) as engine:
        with pytest.raises(TierUnavailable):  # the truth may hold the bytes: unknown, not corrupt
            await engine.get("x")


async def test_I5_a_value_under_another_items_key_is_not_taken_for_it(rig: Rig) -> None:
    await _stored(rig)
    await rig.key("COPY", rig.redis_prefix + "b", rig.redis_prefix + "d")
    async with rig.engine() as engine:
        assert (await engine.get("d")).content == b"durable"


# One flight, many passengers


async def test_many_gets_of_one_id_share_one_flight(rig: Rig) -> None:
    await _stored(rig)
    counting: list[Counting] = []
    async with rig.engine(around=lambda tier: counting.append(Counting(tier)) or counting[-1]) as engine:
        found = await asyncio.gather(*(engine.get("d") for _ in range(100)))
        assert {item.content for item in found} == {b"durable"}
        assert [each.calls["fetch"] for each in counting] == [1, 1]
        # Different ids of one tick share it too.
        assert None not in await asyncio.gather(engine.get("x"), engine.get("b"), engine.get("c"))
        assert sum(each.calls["fetch"] for each in counting) == 3


async def test_a_hit_in_memory_asks_nobody(rig: Rig) -> None:
    await _stored(rig)
    async with rig.engine() as engine:
        await engine.get_many(["x", "b", "c", "d"])
    async with rig.engine(around=partial(Deaf, but=UPKEEP)) as engine:
        engine._running.l1.offer(ITEM)
        assert await engine.get("x") == ITEM
        assert await engine.get_many(["x"]) == {"x": ITEM}
        assert engine.peek("x") == ITEM
        assert await engine.contains("x")


@pytest.mark.parametrize("tier", ["l2", "l3"])
async def test_G16_a_write_during_a_read_is_what_later_reads_see(rig: Rig, tier: str) -> None:
    await _stored(rig)
    held: list[Held] = []
    around = on(tier, partial(Held, verbs=("fetch",), after=True), held)
    async with rig.engine(around=around, l1_max_bytes=0 if tier == "l3" else 1_000_000) as engine:
        await rig.l2.delete("d")
        held[0].hold()
        reading = asyncio.create_task(engine.get("d"))
        await until(lambda: held[0].waiting)  # it has read the old value already
        new = SyncItem("d", b"new, %s" % tier.encode())
        await engine.submit(new, ack=Ack.STORED)
        await soon()
        held[0].release()
        assert (await reading).content in (b"durable", new.content)
        assert await engine.get("d") == new, "nobody joins the flight that began before the write"
        await rig.check(engine, {"d": new})


async def test_a_failed_flight_is_not_remembered(rig: Rig) -> None:
    await _stored(rig)
    async with rig.engine(around=on("l3", lambda tier: Breaking(tier, verbs=("fetch",)))) as engine:
        outcomes = await asyncio.gather(*(engine.get("d") for _ in range(5)), return_exceptions=True)
        assert {type(outcome) for outcome in outcomes} == {TierUnavailable}
        assert (await engine.get("d")).content == b"durable"


class _FirstHeld(Held):
    """Holds the first call alone."""

    async def _through(self, verb: Any, *args: Any, **kwargs: Any) -> Any:
        first = verb.__name__ in self._verbs
        if first:
            self._verbs = ()
            self.waiting += 1
            await self._open.wait()
        return await verb(*args, **kwargs)


@pytest.mark.parametrize(
    "ask",
    [
        lambda engine: engine.get("d"),
        lambda engine: engine.get_many(["d", "x"]),
        lambda engine: engine.contains("d"),
        lambda engine: engine.set_state("d", "s"),
    ],
    ids=["get", "get_many", "contains", "set_state"],
)
async def test_I4_an_item_that_moves_from_sql_to_redis_during_a_read_is_not_absent(rig: Rig, ask: Any) -> None:
    await _stored(rig)
    held: list[Held] = []
    async with rig.engine(
        around=on("l3", partial(_FirstHeld, verbs=("fetch", "exists_batch")), held), l1_max_bytes=0
    ) as engine:
        held[0].hold()
        reading = asyncio.create_task(ask(engine))
        await until(lambda: held[0].waiting)  # Redis has said no
        await engine.submit(SyncItem("d", b"moved"), CACHE, ack=Ack.STORED)
        held[0].release()
        found = await reading
        assert "d" in found if isinstance(found, dict) else found
