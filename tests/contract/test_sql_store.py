"""Every database keeps the same contract, bare and behind a breaker, with its items in one table or in several."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from sync_engine.clock import SystemClock
from sync_engine.resilience import Breaker, Guarded
from sync_engine.storage.sql import SqlStore, apply
from sync_engine.testing.contract import TruthContract
from sync_engine.testing.databases import ask


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
@pytest.mark.parametrize("sql_url", ["postgresql"], indirect=True)  # sharing out is no matter of the database
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


PREFIXES = {"alpha": ("a", "größe", "\ue000"), "beta": ("ab", "b", "i00", "i002"), "alphabet": ("abc", "c", "i001")}
"""Through the middle of the ids that the contract uses."""


@pytest.fixture
async def routed(store: SqlStore) -> SqlStore:
    for name, prefixes in PREFIXES.items():
        await store.register_schema(name, prefixes)
    return store


@pytest.mark.slow
@pytest.mark.parametrize("sql_url", ["sqlite"], indirect=True)  # the class below asks the others more
class TestSqlStoreWithSchemas(TruthContract):
    @pytest.fixture
    def tier(self, routed: SqlStore) -> SqlStore:
        return routed


@pytest.mark.slow
@pytest.mark.parametrize("sql_url", ["mariadb"], indirect=True)  # tests/servers/test_sql_schemas.py asks all three
class TestSqlStoreWhoseRowsMayBeAnywhere(TruthContract):
    """As it is while rows are being moved: every table is asked, and what is written is taken home first."""

    @pytest.fixture
    async def tier(self, routed: SqlStore, sql_url: str) -> SqlStore:
        await ask(sql_url, "UPDATE sync_routes SET phase = 1")
        await ask(sql_url, "UPDATE sync_meta SET value = value + 1 WHERE name = 'routes'")
        return routed
