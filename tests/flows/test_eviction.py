"""Redis near its ``maxmemory``: the coldest items that SQL holds too leave, and nothing else ever does."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator

import pytest

from sync_engine import Ack, SubmitOptions, SyncEngine, SyncItem, TierUnavailable
from sync_engine.clock import SystemClock
from sync_engine.evict import Eviction
from sync_engine.item import Op
from sync_engine.storage.redis import RedisStore
from sync_engine.storage.sql import SqlStore
from sync_engine.testing.fixtures import StartCluster, StartKind
from sync_engine.testing.servers import KINDS, RedisKind, RunningRedis
from sync_engine.trust import Trust

from .rig import Rig, until

pytestmark = pytest.mark.slow  # as a whole, and no matter of the Python that runs it

MIB = 1024 * 1024
CACHE = SubmitOptions.cache(3600)
NOISE = random.Random(4)


def item(object_id: str, stamp: int = 0, kilobytes: int = 2, state: str = "s") -> SyncItem:
    # Random: RedisJSON keeps equal strings once, and then nothing is ever full.
    return SyncItem(object_id, NOISE.randbytes(kilobytes * 1024), state=state, stamp=stamp, updated_at=1)


async def limited(server: RunningRedis, wanted: float) -> None:
    """Set ``maxmemory`` so that this share of it is used, also once the server has freed its buffers.

    It frees the last of them seconds later: what is to be above a share then had better be well above it now.
    """
    while True:
        used = int((await server.ask("INFO", "memory"))["used_memory"])
        await server.ask("CONFIG", "SET", "maxmemory", int(used / wanted))
        await SystemClock().sleep(0.3)
        if abs(await share(server) - wanted) < 0.01:
            return


async def share(server: RunningRedis) -> float:
    memory = await server.ask("INFO", "memory")
    return float(memory["used_memory"]) / float(memory["maxmemory"])


class Stores:
    """Both tiers, and what evicts between them."""

    def __init__(self, l2: RedisStore, l3: SqlStore, *, start: float = 0.75, target: float = 0.6) -> None:
        self.l2 = l2
        self.l3 = l3
        self.trust = Trust("l2", needed=False)
        self.eviction = Eviction(self.trust, l2, l3, SystemClock(), start=start, target=target, rng=random.Random(1))

    async def put(self, *items: SyncItem) -> None:
        await self.l3.put_batch(items)
        await self.l2.put_batch(items)


@pytest.fixture
async def l3(sqlite_url: str) -> AsyncIterator[SqlStore]:
    store = await SqlStore.connect(sqlite_url)
    yield store
    await store.close()


@pytest.fixture
async def server(server_kind: RedisKind, own_kind: StartKind) -> RunningRedis:
    return await own_kind(server_kind)


@pytest.fixture
async def stores(server: RunningRedis, l3: SqlStore) -> AsyncIterator[Stores]:
    l2 = await RedisStore.connect(server.url, "e:")
    yield Stores(l2, l3)
    await l2.close()


async def test_what_sql_holds_leaves_until_the_target_is_reached(stores: Stores, server: RunningRedis) -> None:
    await stores.put(*(item(f"i{n}", stamp=n + 1) for n in range(3_000)))
    await limited(server, 0.9)
    left = await stores.eviction.relieve()
    assert 0 < left == stores.eviction.evicted < 3_000
    assert await share(server) <= 0.62  # memory is given back a moment after a key is gone
    ids = await stores.l2.scan_ids("", 5_000, allow_all=True)
    assert len(ids) == 3_000 - left == await stores.l2.count_by_state("s")
    assert set(ids) == set(await stores.l2.list_state_ids("s", 5_000))
    assert len(await stores.l3.get_many([f"i{n}" for n in range(3_000)])) == 3_000
    assert await stores.eviction.relieve() == 0


async def test_I1_what_is_late_does_not_pass_a_copy_that_left(stores: Stores, server: RunningRedis) -> None:
    now = SystemClock().now_ms() << 16
    old, new = item("x", stamp=now - 65_536), item("x", stamp=now)
    await stores.put(new)
    assert await stores.l2.evict([("x", now)], bury=True) == 1
    for late in (Op(kind="put", object_id="x", stamp=old.stamp, item=old, fill=fill) for fill in (False, True)):
        assert (await stores.l2.apply([late])).superseded == {"x"}
    assert await stores.l2.get("x") is None
    assert not (await stores.l2.apply([Op(kind="put", object_id="x", stamp=now, item=new, fill=True)])).superseded
    assert await stores.l2.get("x") == new


async def test_below_the_start_nothing_leaves(stores: Stores, server: RunningRedis) -> None:
    await stores.put(*(item(f"i{n}", stamp=n + 1) for n in range(200)))
    await limited(server, 0.7)
    assert await stores.eviction.relieve() == 0
    await server.ask("CONFIG", "SET", "maxmemory", 0)
    assert await stores.eviction.relieve() == 0
    assert await stores.l2.count_prefix("", allow_all=True) == 200


async def test_what_redis_alone_has_stays_and_so_does_everything_that_is_no_item(
    stores: Stores, server: RunningRedis
) -> None:
    alone = [item(f"alone{n}", stamp=n + 1) for n in range(600)]
    newer = [item(f"newer{n}", stamp=5_000 + n) for n in range(200)]
    await stores.l2.put_batch(alone)
    await stores.l3.put_batch([each.replace(stamp=1, content=b"old") for each in newer])
    await stores.l2.put_batch(newer)
    await stores.put(*(item(f"both{n}", stamp=n + 1) for n in range(600)))
    await server.ask("SET", "e:foreign", "x")
    await server.ask("XADD", "e:__local__:cdc", "*", "op", "DEL")
    await limited(server, 0.9)
    await stores.eviction.relieve()
    assert stores.eviction.evicted > 0
    ids = set(await stores.l2.scan_ids("", 5_000, allow_all=True))
    assert {each.object_id for each in (*alone, *newer)} <= ids
    assert await stores.l2.get_many([each.object_id for each in alone]) == {each.object_id: each for each in alone}
    assert await server.ask("GET", "e:foreign") == "x"
    assert await server.ask("XLEN", "e:__local__:cdc") == 1
    assert set(await stores.l2.list_state_ids("s", 5_000)) == ids


async def test_where_nothing_may_leave_it_gives_up_and_says_so(stores: Stores, server: RunningRedis) -> None:
    await stores.l2.put_batch([item(f"alone{n}", stamp=n + 1) for n in range(300)])
    await limited(server, 0.9)
    assert await stores.eviction.relieve() == 0
    assert stores.eviction.stuck
    assert await stores.l2.count_prefix("", allow_all=True) == 300


async def test_an_item_without_a_stamp_is_not_known_to_be_the_one_that_sql_holds(
    stores: Stores, server: RunningRedis
) -> None:
    await stores.put(*(item(f"i{n}") for n in range(300)))
    await limited(server, 0.9)
    assert await stores.eviction.relieve() == 0


@pytest.mark.parametrize("policy", ["noeviction", "volatile-lfu"])
@pytest.mark.slow
async def test_the_coldest_leave_first(policy: str, own_kind: StartKind, l3: SqlStore) -> None:
    server = await own_kind("redis-8-modules")
    await server.ask("CONFIG", "SET", "maxmemory-policy", policy)
    await server.ask("CONFIG", "SET", "lfu-log-factor", "0")
    l2 = await RedisStore.connect(server.url, "e:")
    stores = Stores(l2, l3)
    await stores.put(*(item(f"i{n}", stamp=n + 1) for n in range(2_000)))
    # Idle time is counted in seconds, so the used ones have to be used seconds later.
    hot = [f"i{n}" for n in range(0, 2_000, 4)]
    clock = SystemClock()
    await clock.sleep(2.2)
    for _ in range(5):
        assert len(await l2.get_many(hot)) == 500
    await limited(server, 0.8)
    left = await stores.eviction.relieve()
    there = set(await l2.scan_ids("", 5_000, allow_all=True))
    gone_hot = sum(object_id not in there for object_id in hot)
    await l2.close()
    assert left > 300
    assert gone_hot <= left * 0.02, f"{gone_hot} of {left} that left were in use"


async def test_while_redis_is_not_trusted_or_sql_is_silent_nothing_leaves(stores: Stores, server: RunningRedis) -> None:
    await stores.put(*(item(f"i{n}", stamp=n + 1) for n in range(300)))
    await limited(server, 0.9)
    stores.trust.doubt = "it was restarted"
    assert await stores.eviction.relieve() == 0
    stores.trust.doubt = None
    await stores.l3.close()
    with pytest.raises(TierUnavailable):
        await stores.eviction.relieve()
    assert await stores.l2.count_prefix("", allow_all=True) == 300


@pytest.mark.slow
async def test_each_primary_of_a_cluster_has_its_own_limit(own_cluster: StartCluster, l3: SqlStore) -> None:
    cluster = await own_cluster(KINDS["redis-8-modules"], replicas=0)
    l2 = await RedisStore.connect(cluster.url, "e:")
    stores = Stores(l2, l3)
    await stores.put(*(item(f"i{n}", stamp=n + 1) for n in range(4_000)))
    full, *others = cluster.servers
    await limited(full, 0.8)
    before = [int(await other.ask("DBSIZE")) for other in others]
    assert await stores.eviction.relieve() > 0
    assert await share(full) <= 0.62
    assert [int(await other.ask("DBSIZE")) for other in others] == before
    await l2.close()


async def test_an_engine_makes_room_by_itself_and_reads_what_left_from_sql(rig: Rig, own_kind: StartKind) -> None:
    server = await own_kind("redis-8-modules")
    items = [item(f"i{n}") for n in range(1_500)]
    alone = item("alone")
    async with rig.engine(redis_url=server.url, redis_prefix="e:") as engine:
        await engine.submit(alone, CACHE, ack=Ack.STORED)
        await engine.submit_many(items, ack=Ack.STORED)
        await limited(server, 0.85)
        await until(lambda: engine.stats().evicted > 100)
        health = await engine.health()
        assert health.tiers["l2"].full is not None
    async with rig.engine(redis_url=server.url, redis_prefix="e:", l1_max_bytes=0) as engine:
        found = await engine.get_many([each.object_id for each in items])
        assert {object_id: each.content for object_id, each in found.items()} == {
            each.object_id: each.content for each in items
        }
        assert (await content(engine, "alone")) == alone.content


async def test_it_can_be_turned_off(rig: Rig, own_kind: StartKind) -> None:
    server = await own_kind("redis-8-modules")
    async with rig.engine(redis_url=server.url, redis_prefix="e:", redis_eviction_enabled=False) as engine:
        await engine.submit_many([item(f"i{n}") for n in range(300)], ack=Ack.STORED)
        await limited(server, 0.95)
        await SystemClock().sleep(0.1)
        assert engine._running._eviction is None  # type: ignore[union-attr]  # it runs
        assert int(await server.ask("DBSIZE")) >= 300


async def content(engine: SyncEngine, object_id: str) -> bytes | None:
    found = await engine.get(object_id)
    return None if found is None else found.content
