"""The change stream of an engine: every applied change once or more, per id in order, after SQL has it."""

from __future__ import annotations

import asyncio
import time

import pytest

from sync_engine import Ack, ConfigError, StoreError, SubmitOptions, SyncEngine, SyncItem
from sync_engine.storage.redis import CdcEntry
from sync_engine.testing.fixtures import StartRedis
from sync_engine.testing.tiers import Breaking

from .rig import CACHE, DURABLE, Rig, on, until

ITEM = SyncItem.from_json("x", {"n": 1}, state="new", updated_at=1, home_instance_id="node-a")


def telling(rig: Rig, **settings: object) -> SyncEngine:
    return rig.engine(enable_cdc_stream=True, **settings)


async def told(rig: Rig) -> list[CdcEntry]:
    return [entry async for entry in rig.l2.iter_cdc()]


async def test_I8_puts_states_and_deletes_are_told_in_order_with_everything(rig: Rig) -> None:
    async with telling(rig) as engine:
        await engine.submit(ITEM, ack=Ack.STORED)
        await engine.set_state("x", "done", ack=Ack.STORED)
        await engine.delete("x", ack=Ack.STORED)
    put, moved, deleted = await told(rig)
    assert (put.op, put.item()) == ("PUT", ITEM)
    assert (put.state, put.home_instance_id, put.expires_at) == ("new", "node-a", None)
    assert (moved.op, moved.state, moved.content) == ("PUT", "done", ITEM.content)
    assert (deleted.op, deleted.object_id) == ("DEL", "x")
    assert 0 < put.stamp < moved.stamp < deleted.stamp
    assert [entry.seq for entry in (put, moved, deleted)] == [1, 2, 3]
    assert {entry.gap for entry in (put, moved, deleted)} == {None}


async def test_C2_what_sql_alone_keeps_is_told_and_is_not_put_into_redis(rig: Rig) -> None:
    async with telling(rig) as engine:
        await engine.submit(ITEM, ack=Ack.STORED)
        await engine.submit(SyncItem("x", b"durable"), DURABLE, ack=Ack.STORED)
        await engine.set_state("x", "t", ack=Ack.STORED)
    entries = await told(rig)
    assert [(entry.op, entry.content, entry.state) for entry in entries] == [
        ("PUT", ITEM.content, "new"),
        ("PUT", b"durable", "default"),
        ("PUT", b"durable", "t"),
    ]
    assert not await rig.l2.exists("x")
    assert await rig.l2.count_by_state("t") == 0


async def test_C4_what_redis_alone_keeps_is_told_with_the_end_of_its_life(rig: Rig) -> None:
    before = time.time_ns() // 1_000_000
    async with telling(rig) as engine:
        await engine.submit(SyncItem("c", b"cached"), CACHE, ack=Ack.STORED)
        await engine.submit(SyncItem("d", b"bounded"), SubmitOptions(redis_ttl=60), ack=Ack.STORED)
    cached, bounded = await told(rig)
    assert cached.expires_at is not None
    assert before + 3_500_000 < cached.expires_at < before + 3_700_000
    assert bounded.expires_at is None, "the TTL bounds the copy in Redis alone"


async def test_C5_a_delete_of_nothing_and_a_read_tell_nothing(rig: Rig) -> None:
    async with rig.engine() as engine:
        await engine.submit(ITEM, ack=Ack.STORED)
    await rig.l2.delete("x")
    async with telling(rig) as engine:
        assert not await engine.delete("nobody")
        assert (await engine.get("x")) == ITEM
        await until(lambda: engine.stats().pending == 0)
        await engine.stop()
    assert await told(rig) == []


async def test_C1_what_sql_refuses_is_not_told(rig: Rig) -> None:
    def refusing(tier: object) -> object:
        from sync_engine.testing.tiers import Refusing

        return Refusing(tier, {"bad"})  # type: ignore[arg-type]  # the rig hands tiers over

    async with telling(rig, around=on("l3", refusing)) as engine:  # type: ignore[arg-type]  # as above
        receipts = await engine.submit_many([SyncItem("bad", b"1"), SyncItem("good", b"2")])
        await receipts[1].stored()
        with pytest.raises(StoreError):
            await receipts[0].stored()
    assert [entry.object_id for entry in await told(rig)] == ["good"]


async def test_C2_what_was_accepted_while_redis_was_away_is_told_when_it_is_back(rig: Rig) -> None:
    broken: list[Breaking] = []
    wrap = on("l2", lambda tier: Breaking(tier, times=None, verbs=("apply",)), broken)
    async with telling(rig, around=wrap) as engine:
        for n in range(5):
            await engine.submit(SyncItem(f"i{n}", b"%d" % n))
        await engine.submit(SyncItem("i0", b"again"))
        await asyncio.sleep(0.05)
        assert await told(rig) == []
        broken[0].heal()
        await engine.flush()
    entries = await told(rig)
    last = {entry.object_id: entry.content for entry in entries}
    assert last == {"i0": b"again", **{f"i{n}": b"%d" % n for n in range(1, 5)}}


async def test_an_engine_keeps_its_name_and_counts_on(rig: Rig) -> None:
    for n in range(3):
        async with telling(rig) as engine:
            await engine.submit(SyncItem(f"i{n}", b"v"), ack=Ack.STORED)
    async with telling(rig, data="other") as engine:
        await engine.submit(SyncItem("o", b"v"), ack=Ack.STORED)
    entries = await told(rig)
    assert [entry.seq for entry in entries] == [1, 2, 3, 1]
    assert len({entry.writer for entry in entries}) == 2


async def test_its_key_and_its_length_are_settings(rig: Rig) -> None:
    key = f"{rig.redis_prefix}cdc"
    async with telling(rig, cdc_stream_key=key, cdc_stream_maxlen=100) as engine:
        await engine.submit_many([SyncItem(f"i{n}", b"v") for n in range(500)], ack=Ack.STORED)
    assert 100 <= await rig.key("XLEN", key) < 300
    assert await rig.key("EXISTS", f"{rig.redis_prefix}__local__:cdc") == 0


async def test_a_stream_without_redis_or_at_the_key_of_an_item_is_refused(rig: Rig) -> None:
    with pytest.raises(ConfigError, match="enable_cdc_stream"):
        telling(rig, redis=False)
    with pytest.raises(ConfigError, match="cdc_stream_key"):
        async with telling(rig, cdc_stream_key=f"{rig.redis_prefix}user.1"):
            pass


async def test_a_policy_that_may_drop_the_stream_is_a_warning(
    rig: Rig, own_redis: StartRedis, caplog: pytest.LogCaptureFixture
) -> None:
    server = await own_redis(extra_args=("--maxmemory", "100mb", "--maxmemory-policy", "allkeys-lru"))
    async with telling(rig, redis_url=server.url) as engine:
        assert any("allkeys" in warning for warning in (await engine.health()).warnings)
    assert "allkeys" in caplog.text
    async with rig.engine(redis_url=server.url) as engine:
        assert not any("allkeys" in warning for warning in (await engine.health()).warnings)
