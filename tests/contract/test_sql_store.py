"""Every database keeps the same contract, bare and behind a breaker."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from sync_engine.clock import SystemClock
from sync_engine.resilience import Breaker, Guarded
from sync_engine.storage.sql import SqlStore
from sync_engine.testing.contract import TruthContract


@pytest.fixture
async def store(sql_url: str) -> AsyncIterator[SqlStore]:
    store = await SqlStore.connect(sql_url)
    yield store
    await store.close()


class TestSqlStore(TruthContract):
    @pytest.fixture
    def tier(self, store: SqlStore) -> SqlStore:
        return store


class TestGuardedSqlStore(TruthContract):
    @pytest.fixture
    async def tier(self, store: SqlStore) -> AsyncIterator[Guarded]:
        clock = SystemClock()
        guarded = Guarded(store, Breaker("l3", clock), clock, deadline_s=60)
        yield guarded
        await guarded.close()
