"""Finding the primary through real sentinels: with TLS and users, a majority, some of them dead or silent."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, cast
from urllib.parse import quote

import pytest
from redis.exceptions import RedisError

from sync_engine.errors import TierUnavailable
from sync_engine.item import SyncItem
from sync_engine.storage.redis import RedisStore
from sync_engine.testing.fixtures import StartSentinel
from sync_engine.testing.sentinels import SentinelSet
from sync_engine.testing.servers import ACL_USER, KINDS, RunningRedis, acl_rule, tls_files

QUICK = {"timeout_ms": 4_000, "response_timeout_ms": 4_000}
WATCHER = "ada on >watch resetchannels -@all +@connection +sentinel|get-master-addr-by-name +hello"


async def test_tls_and_users_at_the_sentinels_and_at_what_they_watch(
    own_sentinel: StartSentinel, tmp_path: Path
) -> None:
    group = await own_sentinel(
        KINDS["redis-7"], tls=tls_files(tmp_path), users=[acl_rule("t*")], sentinel_users=[WATCHER]
    )
    user, password = (quote(word, safe="") for word in ACL_USER)
    login = "sentinel_username=ada&sentinel_password=watch"
    store = await RedisStore.connect(f"{group.tls_url.replace('://', f'://{user}:{password}@')}&{login}", "t:", **QUICK)
    assert await store.put(SyncItem("a", b"{}"))
    assert (await store.get("a")) is not None
    before = await group.primary()
    await group.failover()
    assert (await eventually(lambda: store.get("a"))) is not None
    assert await group.primary() is not before
    await store.close()
    with pytest.raises(TierUnavailable, match="no sentinel takes the credentials"):
        await RedisStore.connect(f"{group.tls_url}&sentinel_username=ada&sentinel_password=canary-7", "t:", **QUICK)
    with pytest.raises(TierUnavailable, match="no sentinel answers"):
        await RedisStore.connect(group.tls_url.partition("?")[0], "t:", **QUICK)


async def test_one_sentinel_is_enough_whatever_the_others_do(own_sentinel: StartSentinel) -> None:
    group = await own_sentinel(down_after_ms=60_000)
    _, dead, silent = group.sentinels
    await dead.kill()
    await silent.pause()
    store = await RedisStore.connect(group.url, "t:", **QUICK)
    assert await store.put(SyncItem("a", b"{}"))
    await store.close()
    await group.sentinels[0].kill()
    with pytest.raises(TierUnavailable, match="no sentinel answers"):
        await RedisStore.connect(group.url, "t:", **QUICK)


async def test_a_working_store_does_without_sentinels(own_sentinel: StartSentinel) -> None:
    group = await own_sentinel(down_after_ms=60_000)
    store = await RedisStore.connect(group.url, "t:", **QUICK)
    for sentinel in group.sentinels:
        await sentinel.kill()
    pool = pool_of(store)
    for _ in range(3):
        pool._looked = 0  # as if it had looked long ago
        assert await store.put(SyncItem("a", b"{}"))
    await store.close()


async def test_what_no_sentinel_watches_is_said(redis_sentinel: SentinelSet) -> None:
    with pytest.raises(TierUnavailable, match="know no primary of that name"):
        await RedisStore.connect(redis_sentinel.url.replace("mymaster", "nobody"), **QUICK)


async def test_a_sentinel_that_is_behind_does_not_decide(own_sentinel: StartSentinel) -> None:
    group = await own_sentinel(down_after_ms=60_000)
    before = await group.primary()
    behind = group.sentinels[2]
    await behind.pause()
    await until(lambda: begun(group.sentinels[0]))
    await until(lambda: have_another(group.sentinels[:2], before.port))
    await behind.resume()
    # Whatever it says at first, two others say something newer.
    for _ in range(5):
        store = await RedisStore.connect(group.url, "t:", **QUICK)
        assert before.port not in {connection.port for connection in pool_of(store)._available_connections}
        await store.close()


async def test_a_replica_is_not_taken_for_the_primary(own_sentinel: StartSentinel) -> None:
    group = await own_sentinel(down_after_ms=60_000)
    primary = await group.primary()
    replica = next(server for server in group.servers if server is not primary)
    told: list[str] = []
    store = await RedisStore.connect(group.url, "t:", on_new_server=lambda: told.append("new"), **QUICK)
    # The sentinels call it the primary nevertheless, for as long as they would wait for one that is down.
    await primary.ask("REPLICAOF", "127.0.0.1", replica.port)
    with pytest.raises(TierUnavailable, match="ReadOnly"):
        await store.put(SyncItem("a", b"{}"))
    for call in (store.put(SyncItem("a", b"{}")), store.get("a")):
        with pytest.raises(TierUnavailable, match="the server that the sentinels name is a replica"):
            await call
    assert told == []
    await store.close()


async def test_a_primary_that_was_replaced_is_left_though_it_answers(own_sentinel: StartSentinel) -> None:
    group = await own_sentinel()
    told: list[str] = []
    store = await RedisStore.connect(group.url, "t:", on_new_server=lambda: told.append("new"), **QUICK)
    before = await group.primary()
    # The sentinels may not make it a replica when it is back: it leads on, for whoever stays with it.
    await before.ask("ACL", "SETUSER", "default", "-slaveof", "-replicaof")
    await before.pause()
    now = await group.failed_over(before)
    await before.resume()

    async def put_at_the_new_one() -> bool:
        await eventually(lambda: store.put(SyncItem("a", b"{}")))
        return bool(await now.ask("EXISTS", "t:a"))

    await until(put_at_the_new_one)
    assert told == ["new"]
    assert (await before.ask("ROLE"))[0] == "master"
    await store.close()


async def begun(sentinel: RunningRedis) -> bool:
    with suppress(RedisError):  # refused while no replica is known to be in step
        return bool(await sentinel.ask("SENTINEL", "FAILOVER", "mymaster"))
    return False


async def have_another(sentinels: list[RunningRedis], port: int) -> bool:
    told = [await sentinel.ask("SENTINEL", "GET-MASTER-ADDR-BY-NAME", "mymaster") for sentinel in sentinels]
    return all(int(address[1]) != port for address in told)


def pool_of(store: RedisStore) -> Any:
    return cast(Any, store.client.connection_pool)


async def until(holds: Callable[[], Any]) -> None:
    async with asyncio.timeout(40):
        while not await holds():  # noqa: ASYNC110  nobody announces it
            await asyncio.sleep(0.02)


async def eventually(call: Callable[[], Any]) -> Any:
    async with asyncio.timeout(40):
        while True:
            try:
                return await call()
            except TierUnavailable:
                await asyncio.sleep(0.02)
