"""Every kind of real Redis keeps the contract, in both formats of binary items, bare and behind a breaker.

Redis 8 and Valkey 9 with modules, Valkey 9 and Redis 7 without; over TCP, over a socket of the machine, with TLS, as a
user with few rights, through Sentinel, and on a cluster of three primaries and their replicas.
"""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from sync_engine.clock import SystemClock
from sync_engine.resilience import Breaker, Guarded
from sync_engine.storage.redis import RedisStore
from sync_engine.testing.contract import CacheContract
from sync_engine.testing.servers import ACL_USER, KINDS


@pytest.fixture(scope="session", params=[*KINDS, "unix", "acl", "tls", "sentinel", "cluster"])
def address(request: pytest.FixtureRequest) -> str:
    """How a store is told where its Redis is, for every server there is; each is started when its turn comes."""
    match request.param:
        case "unix":
            return request.getfixturevalue("redis_server").url
        case "acl":
            return request.getfixturevalue("redis_acl").url_as(*ACL_USER)
        case "tls":
            return request.getfixturevalue("redis_tls").tls_url
        case "sentinel" | "cluster" as kind:
            return request.getfixturevalue(f"redis_{kind}").url
        case kind:
            return request.getfixturevalue("kind_servers")(KINDS[kind]).url


class TestRedisStore(CacheContract):
    @pytest.fixture
    async def tier(self, address: str, redis_prefix: str) -> AsyncIterator[RedisStore]:
        store = await RedisStore.connect(address, redis_prefix)
        yield store
        await store.close()


class TestRedisStoreThatKeepsBinaryItemsAsJson(CacheContract):
    @pytest.fixture
    async def tier(self, redis_url: str, redis_prefix: str) -> AsyncIterator[RedisStore]:
        store = await RedisStore.connect(redis_url, redis_prefix, binary_format="json")
        yield store
        await store.close()


class TestGuardedRedisStore(CacheContract):
    @pytest.fixture
    async def tier(self, redis_url: str, redis_prefix: str) -> AsyncIterator[Guarded]:
        clock = SystemClock()
        guarded = Guarded(await RedisStore.connect(redis_url, redis_prefix), Breaker("l2", clock), clock, deadline_s=60)
        yield guarded
        await guarded.close()
