"""Every database keeps the same contract, bare and behind a breaker."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from sync_engine.clock import SystemClock
from sync_engine.resilience import Breaker, Guarded
from sync_engine.storage.sql import SqlStore, apply
from sync_engine.testing.contract import TruthContract
from sync_engine.testing.fixtures import DATABASES


@pytest.fixture
async def store(sql_url: str) -> AsyncIterator[SqlStore]:
    store = await SqlStore.connect(sql_url)
    yield store
    await store.close()


class TestSqlStore(TruthContract):
    @pytest.fixture
    def tier(self, store: SqlStore) -> SqlStore:
        return store


@pytest.mark.slow
@pytest.mark.parametrize("sql_url", DATABASES, indirect=True)  # SQLite has one writer, whatever it is told
class TestSqlStoreWithThreeWriters(TruthContract):
    @pytest.fixture
    async def tier(self, sql_url: str, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[SqlStore]:
        monkeypatch.setattr(apply, "SHARE_MIN", 2)  # so that the small batches of the suite are shared out too
        store = await SqlStore.connect(sql_url, write_concurrency=3)
        yield store
        await store.close()


class TestGuardedSqlStore(TruthContract):
    @pytest.fixture
    async def tier(self, sqlite_url: str) -> AsyncIterator[Guarded]:
        clock = SystemClock()
        guarded = Guarded(await SqlStore.connect(sqlite_url), Breaker("l3", clock), clock, deadline_s=60)
        yield guarded
        await guarded.close()
