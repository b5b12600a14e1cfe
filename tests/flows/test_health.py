"""``engine.health()``: what answers, what does not and why, and what deserves a look."""

from __future__ import annotations

import pytest

from sync_engine import Ack, NotRunning, SyncItem
from sync_engine.testing.fixtures import StartKind, StartRedis
from sync_engine.testing.tiers import Breaking, Refusing

from .rig import Rig, on, until


async def test_all_is_well_and_redis_says_what_it_is(rig: Rig) -> None:
    async with rig.engine() as engine:
        await engine.submit(SyncItem("a", b"1"), ack=Ack.STORED)
        health = await engine.health()
    assert health.ok
    assert set(health.tiers) == {"l2", "l3"}
    assert health.warnings == ()
    l2 = health.tiers["l2"]
    assert (l2.answers, l2.trouble, l2.circuit, l2.waiting, l2.full) == (True, None, "closed", 0, None)
    assert "redis 8.2" in l2.about
    assert "JSON documents" in l2.about


async def test_a_server_without_modules_is_well_and_a_warning(rig: Rig, own_kind: StartKind) -> None:
    server = await own_kind("valkey-9")
    async with rig.engine(redis_url=server.url) as engine:
        health = await engine.health()
    assert health.ok
    assert any("no RedisJSON" in warning for warning in health.warnings)
    assert "valkey 9.1" in health.tiers["l2"].about


@pytest.mark.parametrize("policy", ["allkeys-lru", "volatile-ttl"])
async def test_a_policy_that_may_drop_tombstones_is_a_warning(rig: Rig, own_redis: StartRedis, policy: str) -> None:
    server = await own_redis(extra_args=("--maxmemory", "100mb", "--maxmemory-policy", policy))
    async with rig.engine(redis_url=server.url) as engine:
        assert any("not noeviction" in warning for warning in (await engine.health()).warnings)


async def test_a_redis_that_is_down_is_told_and_not_raised(rig: Rig, own_redis: StartRedis) -> None:
    server = await own_redis()
    async with rig.engine(redis_url=server.url) as engine:
        assert (await engine.health()).ok
        await server.stop()
        await engine.submit(SyncItem("a", b"1"))
        health = await engine.health()
        assert not health.ok
        assert not health.tiers["l2"].answers
        assert health.tiers["l2"].trouble
        assert health.tiers["l3"].answers
        await engine.stop(timeout=0.1)


async def test_a_truth_that_does_not_answer_is_told(rig: Rig) -> None:
    wrap = on("l3", lambda tier: Breaking(tier, times=None))
    async with rig.engine(around=wrap) as engine:
        health = await engine.health()
        assert not health.ok
        assert "broken by the test" in (health.tiers["l3"].trouble or "")
        # Nobody vouches for what Redis holds.
        assert health.tiers["l2"].answers
        assert health.tiers["l2"].trouble


async def test_what_is_refused_is_counted(rig: Rig) -> None:
    async with rig.engine(around=on("l3", lambda tier: Refusing(tier, {"bad"}))) as engine:
        await engine.submit(SyncItem("bad", b"1"))
        await until(lambda: engine.stats().quarantined)
        health = await engine.health()
        assert health.ok
        assert any("1 operations were refused" in warning for warning in health.warnings)


async def test_without_redis_there_is_one_tier(rig: Rig) -> None:
    async with rig.engine(redis=False) as engine:
        assert set((await engine.health()).tiers) == {"l3"}


async def test_an_engine_that_does_not_run_has_no_health(rig: Rig) -> None:
    with pytest.raises(NotRunning):
        await rig.engine().health()
