"""The engine with each database as its truth: one item's life, an outage in the middle, a start without it."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from sync_engine import Ack, SubmitOptions, SyncEngine, SyncEngineConfig, SyncItem, TierUnavailable, VersionConflict
from sync_engine.storage.sql import SqlStore
from sync_engine.testing.fixtures import StartDatabase


async def test_one_items_whole_life(sql_url: str, redis_url: str, redis_prefix: str, tmp_path: Path) -> None:
    config = SyncEngineConfig(data_dir=tmp_path, sql_url=sql_url, redis_url=redis_url, redis_prefix=redis_prefix)
    assert "sécret" not in f"{config!r}"
    assert "s%C3" not in f"{config!r}"
    async with SyncEngine(config) as engine:
        item = SyncItem("user.1", b'{"b": 1.50, "a": "\xc3\xa9"}', state="new")
        await engine.submit(item, ack=Ack.STORED)
        await engine.submit(SyncItem("user.2", b"\x00\xff"), ack=Ack.STORED)
        assert await engine.get("user.1") == item
        assert await engine.set_state("user.1", "old")
        assert [found.object_id for found in await engine.get_by_state("old")] == ["user.1"]
        assert [found.object_id for found in await engine.scan_prefix("user.")] == ["user.1", "user.2"]
        await engine.submit(item.with_version(2), SubmitOptions(if_version=1))
        with pytest.raises(VersionConflict):
            await engine.submit(item.with_version(2), SubmitOptions(if_version=1))
        assert await engine.delete("user.2") is True
        assert await engine.get("user.2") is None
        assert (await engine.health()).ok
    store = await SqlStore.connect(sql_url)
    assert [found.object_id for found in await store.scan_prefix("")] == ["user.1"]
    await store.close()


async def test_I3_an_outage_of_the_database_is_ridden_out(own_database: StartDatabase, tmp_path: Path) -> None:
    for kind in ("mariadb", "postgresql"):
        server = await own_database(kind, durable=True)
        url = await server.database()
        config = SyncEngineConfig(data_dir=tmp_path / kind, sql_url=url)
        async with SyncEngine(config) as engine:
            await engine.submit(SyncItem("before", b"1"), ack=Ack.STORED)
            await server.kill()
            for number in range(300):
                await engine.submit(SyncItem(f"during{number:03}", b"2"))  # the log takes it
            await engine.delete("before")
            assert await engine.get("before") is None
            item = await engine.get("during007")
            assert item is not None
            with pytest.raises(TierUnavailable):  # only the database could tell
                await engine.get("nobody knows")
            await server.start()
            await engine.submit(SyncItem("after", b"3"), ack=Ack.STORED)
            await engine.flush()
            assert await engine.get("nobody knows") is None
        store = await SqlStore.connect(url)
        assert await store.count_prefix("during") == 300
        assert await store.exists_batch(["before", "after"]) == [False, True]
        await store.close()
        await server.stop()


async def test_an_engine_starts_without_its_database_and_finds_it_later(
    own_database: StartDatabase, tmp_path: Path
) -> None:
    for kind in ("mariadb", "postgresql"):
        server = await own_database(kind)
        url = await server.database()
        await server.kill()
        async with SyncEngine(SyncEngineConfig(data_dir=tmp_path / kind, sql_url=url)) as engine:
            await engine.submit(SyncItem("a", b"1"))
            await server.start()
            await engine.flush()
            await asyncio.sleep(0)
        store = await SqlStore.connect(url)
        assert await store.exists("a")
        await store.close()
        await server.stop()
