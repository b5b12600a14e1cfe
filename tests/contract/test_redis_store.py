"""A real Redis keeps the contract, in both formats of binary items, bare and behind a breaker."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from sync_engine.clock import SystemClock
from sync_engine.resilience import Breaker, Guarded
from sync_engine.storage.redis import RedisStore
from sync_engine.testing.contract import CacheContract


@pytest.fixture
async def store(redis_url: str, redis_prefix: str) -> AsyncIterator[RedisStore]:
    store = await RedisStore.connect(redis_url, redis_prefix)
    yield store
    await store.close()


class TestRedisStore(CacheContract):
    @pytest.fixture
    def tier(self, store: RedisStore) -> RedisStore:
        return store


class TestRedisStoreThatKeepsBinaryItemsAsJson(CacheContract):
    @pytest.fixture
    async def tier(self, redis_url: str, redis_prefix: str) -> AsyncIterator[RedisStore]:
        store = await RedisStore.connect(redis_url, redis_prefix, binary_format="json")
        yield store
        await store.close()


class TestGuardedRedisStore(CacheContract):
    @pytest.fixture
    async def tier(self, store: RedisStore) -> AsyncIterator[Guarded]:
        clock = SystemClock()
        guarded = Guarded(store, Breaker("l2", clock), clock, deadline_s=60)
        yield guarded
        await guarded.close()
