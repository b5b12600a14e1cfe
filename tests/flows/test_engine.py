"""The engine from the outside: one item's whole life through memory, log, SQL and Redis."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from sync_engine import (
    Ack,
    ContentType,
    InvalidId,
    InvalidItem,
    NotRunning,
    PayloadTooLarge,
    SubmitOptions,
    SyncEngine,
    SyncEngineConfig,
    SyncItem,
    TierNotConfigured,
    VersionConflict,
)
from sync_engine.storage.redis import RedisStore
from sync_engine.storage.sql import SqlStore

Make = Callable[..., SyncEngine]


@pytest.fixture
def make(tmp_path: Path, redis_url: str, redis_prefix: str) -> Make:
    """Engines on one data folder and one Redis prefix; ``redis=False`` leaves Redis out."""

    def made(*, redis: bool = True, **settings: object) -> SyncEngine:
        if redis:
            settings = {"redis_url": redis_url, "redis_prefix": redis_prefix, **settings}
        return SyncEngine(SyncEngineConfig(data_dir=tmp_path / "data", **settings))

    return made


@pytest.fixture
async def l2(redis_url: str, redis_prefix: str) -> AsyncIterator[RedisStore]:
    store = await RedisStore.connect(redis_url, redis_prefix)
    yield store
    await store.close()


@pytest.fixture
async def l3(tmp_path: Path) -> AsyncIterator[SqlStore]:
    (tmp_path / "data").mkdir(exist_ok=True)
    store = await SqlStore.connect(f"sqlite:///{tmp_path / 'data' / 'truth.db'}")
    yield store
    await store.close()


async def test_one_items_whole_life(make: Make, l2: RedisStore, l3: SqlStore) -> None:
    item = SyncItem("user.1", b'{"b": 1.50, "a": "\xc3\xa9"}', state="new", home_instance_id="here")
    async with make() as engine:
        await engine.submit(item)
        assert await engine.get("user.1") == item
        await engine.flush()
        assert await l2.get("user.1") == item
        assert await l3.get("user.1") == item
        assert await engine.count_by_state("new") == 1
        assert await engine.set_state("user.1", "old")
        assert (await engine.get("user.1")).state == "old"
        assert await engine.count_by_state("new") == 0
        assert [found.object_id for found in await engine.get_by_state("old")] == ["user.1"]
        await engine.flush()
        assert await l2.is_in_state("user.1", "old")
        assert not await l2.is_in_state("user.1", "new")
        assert await l2.get("user.1") == item.with_state("old")
        assert await l3.get("user.1") == item.with_state("old")
        assert await engine.delete("user.1")
        assert await engine.get("user.1") is None
        assert not await engine.contains("user.1")
        await engine.flush()
        assert await l2.get("user.1") is None
        assert await l3.get("user.1") is None
        assert not await engine.delete("user.1")
        report = await engine.stop()
    assert (report.left_in_log, report.lost) == (0, 0)


async def test_a_new_engine_reads_what_the_last_one_stored(make: Make) -> None:
    items = [SyncItem.from_json(f"k.{n:03}", {"n": n}) for n in range(250)]
    async with make() as engine:
        await engine.submit_many(items)
    async with make() as engine:
        assert engine.stats().recovered == 0
        assert engine.peek("k.000") is None
        assert await engine.get_many([item.object_id for item in items] + ["ghost"]) == {
            item.object_id: item for item in items
        }
        assert engine.peek("k.000") == items[0]
    async with make(redis=False) as engine:
        assert [found async for found in engine.iter_prefix("k.")] == items
        assert await engine.get("k.007") == items[7]


async def test_stored_means_in_every_tier(make: Make, l2: RedisStore, l3: SqlStore) -> None:
    async with make(batch_flush_ms=60_000) as engine:
        await engine.submit(SyncItem("a", b"one"), ack=Ack.STORED)
        assert await l2.exists("a")
        assert await l3.exists("a")
        receipt = await engine.submit(SyncItem("b", b"two"))
        await receipt.stored()
        assert await l2.exists("b")
        assert await l3.exists("b")


async def test_cache_only_items_never_reach_sql_and_durable_ones_never_redis(
    make: Make, l2: RedisStore, l3: SqlStore
) -> None:
    async with make() as engine:
        await engine.submit(SyncItem("c", b"cached"), SubmitOptions.cache(60))
        await engine.submit(SyncItem("d", b"kept"), SubmitOptions.durable())
        await engine.flush()
        assert await l2.exists_batch(["c", "d"]) == [True, False]
        assert await l3.exists_batch(["c", "d"]) == [False, True]
    async with make() as engine:
        assert (await engine.get("c")).content == b"cached"
        assert (await engine.get("d")).content == b"kept"
    assert not await l2.exists("d")


async def test_a_write_that_leaves_a_tier_out_takes_its_older_copy_away(
    make: Make, l2: RedisStore, l3: SqlStore
) -> None:
    async with make() as engine:
        for options in (SubmitOptions.cache(60), SubmitOptions.durable()):
            await engine.submit(SyncItem("x", b"everywhere"), ack=Ack.STORED)
            await engine.submit(SyncItem("x", b"narrower"), options)
            await engine.flush()
            assert (await engine.get("x")).content == b"narrower"
            assert await l2.exists("x") == options.redis
            assert await l3.exists("x") == options.sql


async def test_compare_and_set(make: Make) -> None:
    async with make() as engine:
        new = SyncItem("v", b"1", version=1)
        await engine.submit(new, SubmitOptions(if_version=0))
        await engine.submit(new.replace(content=b"2", version=2), SubmitOptions(if_version=1))
        with pytest.raises(VersionConflict) as conflict:
            await engine.submit(new.replace(content=b"3", version=2), SubmitOptions(if_version=1), ack=Ack.STORED)
        assert (conflict.value.expected, conflict.value.actual) == (1, 2)
        assert (await engine.get("v")).content == b"2"
        with pytest.raises(InvalidItem):
            await engine.submit(new, SubmitOptions(if_version=2), ack=Ack.LOGGED)
        assert engine.stats().quarantined == 0


async def test_scans_see_what_is_not_flushed(make: Make) -> None:
    async with make(batch_flush_ms=60_000) as engine:
        await engine.submit_many([SyncItem(f"p.{n}", b"x", state="s") for n in range(5)])
        await engine.delete("p.3")
        assert [item.object_id for item in await engine.scan_prefix("p.")] == ["p.0", "p.1", "p.2", "p.4"]
        assert await engine.count_prefix("p.") == 4
        assert await engine.list_state_ids("s") == ["p.0", "p.1", "p.2", "p.4"]
        assert await engine.count_by_state("s") == 4


async def test_an_engine_on_a_folder_alone(make: Make) -> None:
    async with make(redis=False) as engine:
        await engine.submit(SyncItem("a", b"{}"))
        await engine.flush()
        status = await engine.status("a")
        assert (status.l1, status.l2, status.l3, status.pending) == (True, None, True, False)
        with pytest.raises(TierNotConfigured):
            await engine.submit(SyncItem("a", b"{}"), SubmitOptions.cache(60))


async def test_an_engine_without_a_truth_takes_cache_items_alone(make: Make) -> None:
    async with make(sql_url=None) as engine:
        with pytest.raises(TierNotConfigured):
            await engine.submit(SyncItem("a", b"{}"))
        await engine.submit(SyncItem("a", b"{}", state="s"), SubmitOptions.cache(60))
        assert await engine.count_by_state("s") == 1
        assert await engine.set_state("a", "t")
        assert await engine.list_state_ids("t") == ["a"]
        assert await engine.delete("a")
        assert await engine.get("a") is None


async def test_bad_input_is_refused_before_anything_is_written(make: Make) -> None:
    async with make(max_payload_bytes=10) as engine:
        await engine.submit(SyncItem("ok", b"x" * 10))
        with pytest.raises(PayloadTooLarge):
            await engine.submit(SyncItem("big", b"x" * 11))
        with pytest.raises(InvalidItem):
            await engine.submit_many([SyncItem("fine", b""), SyncItem("big", b"x" * 11)])
        with pytest.raises(InvalidId):
            await engine.get("state:x")
        assert await engine.get("fine") is None
        assert engine.stats().pending <= 1


async def test_an_engine_that_is_not_running_says_so(make: Make) -> None:
    engine = make()
    with pytest.raises(NotRunning, match="not been started"):
        await engine.get("a")
    async with engine:
        await engine.submit(SyncItem("a", b"1"))
    with pytest.raises(NotRunning, match="stopped"):
        await engine.submit(SyncItem("a", b"2"))
    await engine.stop()
    await engine.start()
    await engine.start()
    assert (await engine.get("a")).content == b"1"
    await engine.stop()


async def test_many_submitters_at_once(make: Make, l3: SqlStore) -> None:
    async with make() as engine:

        async def submitter(who: int) -> None:
            for n in range(20):
                await engine.submit(SyncItem.from_json(f"m.{who}", {"n": n}, version=n))
                assert (await engine.get(f"m.{who}")).version == n

        await asyncio.gather(*(submitter(who) for who in range(50)))
        await engine.flush()
        assert {item.version for item in await l3.scan_prefix("m.", 100)} == {19}
        assert (await engine.get("m.0")).content_type is ContentType.JSON


async def test_I1_a_state_change_brings_redis_what_the_truth_holds(make: Make, l2: RedisStore, l3: SqlStore) -> None:
    """Another engine has written to SQL and not yet to Redis: changing the state there must not bless the old copy."""
    async with make() as engine:
        await engine.submit(SyncItem("a", b"old"), ack=Ack.STORED)
        held = await l3.get("a")
        assert held is not None
        await l3.put(held.replace(content=b"new", stamp=held.stamp + 1))
        assert await engine.set_state("a", "s")
        await engine.flush()
        for store in (l2, l3):
            assert (await store.get("a")).content == b"new"
            assert (await store.get("a")).state == "s"
