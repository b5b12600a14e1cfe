"""Faults of the original's stores, seen through the engine (FAULTS.md R, Q); the stores alone are in tests/servers."""

from __future__ import annotations

import pytest

from sync_engine import Ack, InvalidId, SyncItem, TierUnavailable
from sync_engine.testing.databases import ask
from sync_engine.testing.fixtures import StartRedis
from sync_engine.testing.tiers import Deaf

from ..flows.rig import CACHE, Rig, on

UGLY = SyncItem("u", b'{"z": 1.50, "a": 123456789012345678901234567890, "a": "\\u00e9"}', updated_at=1)


async def test_R1_bytes_that_are_not_canonical_come_back_from_redis_alone(rig: Rig) -> None:
    async with rig.engine() as engine:
        await engine.submit(UGLY, ack=Ack.STORED)
    async with rig.engine(around=on("l3", Deaf)) as engine:
        assert (await engine.get("u")).content == UGLY.content
        assert (await engine.get("u")).content_hash == UGLY.content_hash


async def test_R3_R6_a_change_of_type_is_an_ordinary_write(rig: Rig) -> None:
    async with rig.engine() as engine:
        for n, content in enumerate((b"{}", b"\x00", b"[1]", b"\xff")):
            item = SyncItem("x", content, state=f"s{n}", updated_at=n)
            await engine.submit(item, CACHE if n % 2 else None, ack=Ack.STORED)
            await engine.flush()
            assert await rig.l2.get("x") == item
            assert [await rig.l2.count_by_state(f"s{m}") for m in range(4)] == [int(m == n) for m in range(4)]
        rig.at_rest(engine)


async def test_R9_a_scan_meets_binaries_and_foreign_keys_without_stumbling(rig: Rig) -> None:
    """Scans are answered by the truth, in pages; no key of Redis is walked. Scans of Redis come with a later issue."""
    items = [SyncItem(f"p.{n:04}", b"\x00" if n % 2 else b"{}") for n in range(1_200)]
    await rig.key("SADD", rig.redis_prefix + "p.foreign", "x")
    async with rig.engine() as engine:
        await engine.submit_many(items)
        assert [item async for item in engine.iter_prefix("p.")] == items
        assert await engine.scan_prefix("p.", 3, after="p.0001") == items[2:5]
        assert await engine.count_prefix("p.0") == 1_000


async def test_R11_R12_no_id_reaches_a_key_that_is_ours(rig: Rig) -> None:
    """There is no `delete_prefix` yet; what an id can name is checked in one place, for every verb."""
    async with rig.engine() as engine:
        await engine.submit(SyncItem("m", b"1", state="s"), ack=Ack.STORED)
        for name in ("state:s", "merkle:h:", "cdc", "__local__:expiring", "idx:x"):
            with pytest.raises(InvalidId, match="reserved"):
                SyncItem(name, b"")
            for verb in (engine.get, engine.delete, engine.contains, engine.status):
                with pytest.raises(InvalidId):
                    await verb(name)
        for item in (SyncItem("CDC", b"1"), SyncItem("cdc.1", b"1"), SyncItem("state", b"1")):
            await engine.submit(item, ack=Ack.STORED)
            assert await rig.in_tiers(item.object_id) == (item, item)
        assert await engine.delete_many(["m", "CDC", "cdc.1", "state", "s", ""[:0] or "c"]) == 4
        await engine.flush()
    left = await rig.l2.client.keys(rig.redis_prefix + "*")
    assert [key for key in left if not key.startswith(f"{rig.redis_prefix}__local__:".encode())] == []


async def test_R13_the_engine_waits_for_redis_as_long_as_it_is_configured_to(rig: Rig, own_redis: StartRedis) -> None:
    server = await own_redis()
    async with rig.engine(redis=False, sql_url=None, redis_url=server.url, redis_response_timeout_ms=50) as engine:
        await engine.submit(SyncItem("c", b"1"), CACHE, ack=Ack.STORED)
        await server.pause()
        with pytest.raises(TierUnavailable, match="l2"):
            await engine.get("absent")
        assert (await engine.get("c")).content == b"1"
        await server.resume()
        assert await engine.get("absent") is None


async def test_R16_a_foreign_document_is_no_item_and_is_not_written_over(rig: Rig) -> None:
    for object_id in ("f", "g"):
        await rig.key("JSON.SET", rig.redis_prefix + object_id, "$", '{"name": "not ours"}')
    async with rig.engine() as engine:
        assert await engine.get("f") is None
        assert not await engine.contains("f")
        item = SyncItem("g", b"{}", updated_at=1)
        await engine.submit(item)
        await engine.flush()
        assert (await engine.status("g")).quarantined
        engine._running.l1.clear()
        assert await engine.get("g") == item, "the truth has it"
    assert await rig.key("JSON.GET", rig.redis_prefix + "g") == b'{"name":"not ours"}'


async def test_Q15_G61_a_schema_is_a_table_on_sqlite_too_and_known_at_the_next_start(rig: Rig) -> None:
    """The original forgot it with the process, moved no rows, and on SQLite asked for a table that was never made."""
    async with rig.engine() as engine:
        await engine.submit(SyncItem("user.1", b"1"), ack=Ack.STORED)
        assert await engine.register_schema("users", ["user."]) == 1
    async with rig.engine(redis=False) as engine:
        await engine.submit(SyncItem("user.2", b"2"), ack=Ack.STORED)
        assert sorted(await engine.get_many(["user.1", "user.2"])) == ["user.1", "user.2"]
    assert await ask(rig.sql_url, "SELECT id FROM users_items ORDER BY id") == [("user.1",), ("user.2",)]


async def test_Q7_G31_a_walk_through_all_ids_meets_those_of_every_schema(rig: Rig) -> None:
    """A filter that was filled from the default table alone called every other item absent."""
    items = [SyncItem(f"{kind}.{n:03}", b"x") for kind in ("a", "b", "c") for n in range(400)]
    async with rig.engine(l1_max_bytes=0) as engine:
        await engine.register_schema("as", ["a."])
        await engine.register_schema("bs", ["b."])
        await engine.submit_many(items)
        assert [item.object_id async for item in engine.iter_prefix("")] == [item.object_id for item in items]
        assert await engine.count_prefix("") == 1200
        assert len(await engine.get_many([item.object_id for item in items])) == 1200
