"""What the machine of test_engine_machine.py found, each told again in the fewest steps."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from pydantic import SecretStr
from redis.asyncio import Redis

from sync_engine import (
    Ack,
    SubmitOptions,
    SyncEngine,
    SyncEngineConfig,
    SyncItem,
    TierUnavailable,
)
from sync_engine.clock import SystemClock
from sync_engine.item import Op
from sync_engine.ports import Applied
from sync_engine.resilience import Retries, RetryPolicy
from sync_engine.storage.redis import RedisStore
from sync_engine.storage.sql import SqlStore
from sync_engine.testing.fixtures import StartRedis
from sync_engine.testing.tiers import MemoryTier
from sync_engine.write.batcher import Batcher
from sync_engine.write.flush import Lane, Plan
from sync_engine.write.pending import Entry

NEVER_MS = 60_000


@pytest.fixture
def config(tmp_path, redis_url: str, redis_prefix: str) -> SyncEngineConfig:
    return SyncEngineConfig(data_dir=tmp_path, redis_url=redis_url, redis_prefix=redis_prefix)


async def test_I2_a_write_whose_value_is_left_to_the_log_replaces_the_copy_in_memory(config: SyncEngineConfig) -> None:
    """Beyond ``pending_max_bytes`` the index let go of the value before L1 had seen it: L1 kept the older item."""
    config = config.model_copy(update={"pending_max_bytes": 0, "batch_flush_ms": NEVER_MS})
    async with SyncEngine(config) as engine:
        for content in (b"one", b"two"):
            await engine.submit(SyncItem("a", content))
            assert (await engine.get("a")).content == content
            await engine.set_state("a", content.decode())
            assert (await engine.get("a")).state == content.decode()


async def test_I2_a_scan_does_not_show_the_row_of_an_item_that_has_left_sql(config: SyncEngineConfig) -> None:
    """What skips SQL goes to Redis first. Until its older row was gone, scans showed that."""
    async with SyncEngine(config.model_copy(update={"batch_flush_ms": NEVER_MS})) as engine:
        await engine.submit(SyncItem("a", b"kept", state="s"), ack=Ack.STORED)
        await engine.submit(SyncItem("a", b"cached", state="s"), SubmitOptions.cache(60))
        assert (await engine.get("a")).content == b"cached"
        assert await engine.scan_prefix("a") == []
        assert await engine.count_by_state("s") == 0


async def test_I4_such_a_scan_says_so_where_redis_cannot_be_asked(
    config: SyncEngineConfig, own_redis: StartRedis
) -> None:
    server = await own_redis()
    config = config.model_copy(update={"redis_url": SecretStr(server.url)})
    async with SyncEngine(config) as engine:
        await engine.submit(SyncItem("a", b"kept"), ack=Ack.STORED)
        await server.kill()
        await engine.submit(SyncItem("b", b"cached"), SubmitOptions.cache(60))
        assert await engine.count_prefix("") == 1, "an item that had no row does not stand in the way"
        await engine.submit(SyncItem("a", b"cached"), SubmitOptions.cache(60))
        with pytest.raises(TierUnavailable) as silent:
            await engine.count_prefix("")
        assert silent.value.tier == "l2"
        await server.start()
        await engine.flush()
        assert await engine.count_prefix("") == 0


async def test_I2_scans_see_what_was_acknowledged_in_memory(config: SyncEngineConfig) -> None:
    """A write is shown before the log has it, and reaches the lanes after: a scan in between has to wait for it."""
    async with SyncEngine(config.model_copy(update={"batch_flush_ms": NEVER_MS})) as engine:
        for n in range(5):
            await engine.submit(SyncItem(f"k.{n}", b"x", state="hot"), ack=Ack.MEMORY)
            assert await engine.count_by_state("hot") == n + 1


@pytest.mark.parametrize("options", [None, SubmitOptions.cache(60)], ids=["logged", "unlogged"])
async def test_I10_who_waits_for_room_does_not_wait_for_a_batch_to_fill(
    config: SyncEngineConfig, options: SubmitOptions | None
) -> None:
    """At the bound a write waited for a flush, which waited for more writes, until the caller got Backpressure."""
    config = config.model_copy(
        update={
            "wal_max_items": 2,
            "pending_max_bytes": 1_000,
            "batch_flush_ms": NEVER_MS,
            "backpressure_wait_ms": 20_000,
        }
    )
    async with SyncEngine(config) as engine:
        for n in range(8):
            await engine.submit(SyncItem(f"k.{n}", b"x"), options)
        await engine.flush()


async def test_I1_what_the_truth_has_passed_by_does_not_come_back_through_redis(config: SyncEngineConfig) -> None:
    """A write that SQL held to be too old went on to Redis, which may have lost the newer copy and its stamp."""
    async with SyncEngine(config) as engine:
        truth = await SqlStore.connect(config.sql_url.get_secret_value())
        cache = await RedisStore.connect(config.redis_url.get_secret_value(), config.redis_prefix)
        try:
            newer = SyncItem("a", b"of another engine", stamp=2**62)
            await truth.put(newer)
            await engine.submit(SyncItem("a", b"ours, and older"), ack=Ack.STORED)
            assert await cache.get("a") is None
            assert await engine.get("a") == newer
        finally:
            await truth.close()
            await cache.close()


async def test_I1_a_write_does_not_overtake_one_that_skipped_sql_and_that_redis_has_lost(
    config: SyncEngineConfig,
) -> None:
    """The newer one goes to Redis first. Where Redis then lost it, the older one arrived there and stayed."""
    async with SyncEngine(config.model_copy(update={"batch_flush_ms": 20})) as engine:
        for round_ in range(10):
            item = SyncItem(f"k.{round_}", b"older")
            await engine.submit(item)
            receipt = await engine.submit(item.replace(content=b"newer"), SubmitOptions.cache(60))
            async with Redis.from_url(config.redis_url.get_secret_value()) as client:
                while not await client.exists(f"{config.redis_prefix}{item.object_id}"):
                    pass
                await client.delete(f"{config.redis_prefix}{item.object_id}")
            await receipt.stored()
            await engine.flush()
            parts = engine._running
            assert parts is not None
            parts.l1.clear()
            found = await engine.get(item.object_id)
            assert found is None or found.content == b"newer"


async def test_I3_a_change_of_state_that_is_replayed_finds_its_item_in_redis(
    config: SyncEngineConfig, own_redis: StartRedis
) -> None:
    """After a restart SQL had both; the item was then kept out of Redis for being older than its own new state."""
    server = await own_redis()
    config = config.model_copy(update={"redis_url": SecretStr(server.url), "batch_flush_count": 1})
    ids = [f"k.{n}" for n in range(6)]
    async with SyncEngine(config) as engine:
        await server.kill()
        await engine.submit_many([SyncItem(object_id, b"x") for object_id in ids])
        assert await engine.count_prefix("") == 6
        for object_id in ids:
            await engine.set_state(object_id, "hot")
        assert await engine.count_by_state("hot") == 6
        report = await engine.stop(timeout=0)
    assert report.left_in_log == 12
    await server.start()
    async with SyncEngine(config) as engine:
        await engine.flush()
        cache = await RedisStore.connect(server.url, config.redis_prefix)
        try:
            assert await cache.list_state_ids("hot") == ids
        finally:
            await cache.close()


async def test_I1_a_write_left_out_for_one_that_skips_sql_leaves_a_tombstone_against_its_replay() -> None:
    """The row was never written, so there was nothing to delete; after a crash the log brought the older item back."""
    tier = MemoryTier("l3")
    lane = Lane(
        tier,
        Batcher(flush_count=9, flush_bytes=1 << 20, flush_after_ms=0, clock=SystemClock()),
        Nobody(),
        lambda op: op.sql,
        erases_blindly=False,
        retry=RetryPolicy(),
        retries=Retries(SystemClock()),
    )
    older, newer, other = (
        Entry(Op(kind="put", object_id=object_id, stamp=stamp, item=SyncItem(object_id, b"x", stamp=stamp), sql=sql))
        for object_id, stamp, sql in (("a", 1, True), ("a", 2, False), ("b", 3, False))
    )
    await lane._flush([older, newer, other])
    assert tier.tombstones == {"a": 2}, "and what never had a row costs no write"
    assert (await tier.apply([older.op])).superseded == {"a"}


class Nobody:
    """A carrier of entries that have their values and go nowhere."""

    async def load(self, batch: Sequence[Entry], /) -> None:
        pass

    async def passed(self, lane: Lane, batch: Sequence[Entry], plan: Plan, applied: Applied, /) -> None:
        pass
