"""Engines whose ids are in several tables: nobody can tell by the answers, whenever the schema was registered."""

from __future__ import annotations

import asyncio
import logging
import random
from pathlib import Path

import pytest

from sync_engine import (
    Ack,
    InvalidItem,
    NotRunning,
    StoreError,
    SyncEngine,
    SyncEngineConfig,
    SyncItem,
    TierNotConfigured,
    TierUnavailable,
)
from sync_engine.testing.clock import VirtualClock
from sync_engine.testing.databases import ask
from sync_engine.testing.fixtures import StartDatabase
from sync_engine.testing.tiers import Breaking

from .rig import DURABLE, Held, Rig, on, until


def item(object_id: str, content: bytes = b"x", state: str = "s") -> SyncItem:
    return SyncItem(object_id, content, state=state, updated_at=1)


async def test_Q7_every_verb_of_the_engine_honours_a_schema(
    sql_url: str, redis_url: str, redis_prefix: str, tmp_path: Path
) -> None:
    def engine(name: str) -> SyncEngine:
        redis = {"redis_url": redis_url, "redis_prefix": redis_prefix}
        return SyncEngine(SyncEngineConfig(data_dir=tmp_path / name, sql_url=sql_url, l1_max_bytes=0, **redis))

    items = [item(f"{kind}.{n}", b"%d" % n, "st"[n % 2]) for kind in ("order", "order.line", "user") for n in range(6)]
    ids = sorted(each.object_id for each in items)
    async with engine("one") as one, engine("two") as two:
        await one.submit_many(items[::2], ack=Ack.STORED)
        assert await two.count_prefix("order") == 6
        assert await one.register_schema("orders", ["order."]) == 6
        assert await one.register_schema("lines", iter(["order.line."])) == 3
        await two.submit_many(items[1::2], DURABLE, ack=Ack.STORED)
        assert await two.register_schema("orders", ["order."]) == 0
        for each in (one, two):
            assert {i: found.content for i, found in (await each.get_many(ids)).items()} == {
                i.object_id: i.content for i in items
            }
            assert [found.object_id for found in await each.scan_prefix("")] == ids
            assert [found.object_id async for found in each.iter_prefix("order")] == [i for i in ids if "order" in i]
            assert [i.object_id async for i in each.iter_by_state("t")] == await each.list_state_ids("t")
            assert (await each.count_by_state("s"), await each.count_prefix("order.line.")) == (9, 6)
            assert await each.contains("order.line.1")
            assert (await each.status("order.line.1")).l3 is True
        assert await two.set_state("order.1", "u", ack=Ack.STORED)
        assert await one.delete("order.line.3", ack=Ack.STORED) is True
        assert await one.delete("order.line.7") is False
        assert await one.delete_by_state("t") == 7
        assert await two.delete_prefix("order.") == 7
        assert [found.object_id for found in await one.scan_prefix("")] == ["user.0", "user.2", "user.4"]
        assert await ask(sql_url, "SELECT id FROM orders_items UNION ALL SELECT id FROM lines_items") == []


async def test_I2_I3_a_schema_is_registered_while_writes_flow(rig: Rig) -> None:
    rng = random.Random(3)
    model: dict[str, SyncItem | None] = {f"a{n:03}": item(f"a{n:03}", b"0") for n in range(200)}
    async with rig.engine() as engine:
        await engine.submit_many([each for each in model.values() if each is not None])
        moving = True

        async def write() -> None:
            number = 0
            while moving or number < 200:
                number += 1
                id_ = rng.choice(sorted(model))
                if rng.random() < 0.7:
                    model[id_] = item(id_, b"%d" % number, rng.choice("st"))
                    await engine.submit(model[id_])
                else:
                    model[id_] = None
                    await engine.delete(id_)
                assert await engine.get(id_) == model[id_]

        async def register() -> None:
            nonlocal moving
            await engine.register_schema("one", ["a"])
            await engine.register_schema("two", ["a1"])
            await engine.register_schema("three", ["a", "a12"])
            moving = False

        await asyncio.gather(write(), register())
        await rig.check(engine, model)
    held = sorted(id_ for id_, each in model.items() if each is not None)
    for table, prefixes in (("three", ("a0", "a12")), ("two", ("a10", "a11", "a13", "a14", "a15"))):
        found = [id_ for (id_,) in await ask(rig.sql_url, f"SELECT id FROM {table}_items ORDER BY id")]
        assert [id_ for id_ in found if id_.startswith(prefixes)] == [id_ for id_ in held if id_.startswith(prefixes)]


async def test_G61_what_cannot_be_is_said_before_anything_is_asked(rig: Rig) -> None:
    engine = rig.engine(around=on("l3", lambda tier: Breaking(tier, verbs=["register_schema"])))
    with pytest.raises(InvalidItem, match="name"):  # not only once it runs
        await engine.register_schema("sync", ["a"])
    with pytest.raises(NotRunning):
        await engine.register_schema("users", ["a"])
    async with engine:
        with pytest.raises(InvalidItem, match="prefixes"):
            await engine.register_schema("users", "a")
        with pytest.raises(TierUnavailable):
            await engine.register_schema("users", ["a"])
        assert await engine.register_schema("users", ["a"]) == 0
    async with rig.engine(data="other", sql_url=None) as alone:
        with pytest.raises(TierNotConfigured, match="schemas are tables of SQL"):
            await alone.register_schema("users", ["a"])


async def test_a_move_may_take_longer_than_a_write(rig: Rig) -> None:
    """Each of its statements has an end. All of them had one together, and a large table could never be moved."""
    held: list[Held] = []
    clock = VirtualClock()
    wrap = on("l3", lambda tier: Held(tier, ["register_schema"], after=True), held)
    async with rig.engine(around=wrap, clock=clock, redis=False) as engine:
        await engine.submit(item("a1"), ack=Ack.STORED)
        held[0].hold()
        registering = asyncio.ensure_future(engine.register_schema("users", ["a"]))
        await until(lambda: held[0].waiting)
        await clock.run_for(24 * 3600)
        held[0].release()
        assert await registering == 1


@pytest.mark.parametrize("kind", ["mariadb", "postgresql"])
async def test_I3_a_database_that_is_killed_in_the_middle_of_a_move(
    own_database: StartDatabase, tmp_path: Path, kind: str
) -> None:
    server = await own_database(kind, durable=True)
    url = await server.database()
    async with SyncEngine(SyncEngineConfig(data_dir=tmp_path, sql_url=url, l1_max_bytes=0)) as engine:
        ids = [f"a{n:04}" for n in range(5000)]
        for at in range(0, len(ids), 1000):
            await engine.submit_many([item(id_) for id_ in ids[at : at + 1000]])
        await engine.flush()
        registering = asyncio.ensure_future(engine.register_schema("one", ["a"]))
        while not await _moved(url):
            pass
        await server.kill()
        with pytest.raises(TierUnavailable):
            await registering
        await engine.submit(item("a0000", b"during"))
        await server.start()
        await engine.flush()
        assert await engine.count_prefix("a") == 5000
        assert await engine.register_schema("one", ["a"]) > 0
        assert sorted(await engine.get_many(ids)) == ids
        assert await ask(url, "SELECT count(*) FROM one_items") == [(5000,)]
        assert await ask(url, "SELECT count(*) FROM sync_items") == [(0,)]


async def _moved(url: str) -> int:
    ((number,),) = await ask(url, "SELECT count(*) FROM sync_routes")
    if number:
        ((number,),) = await ask(url, "SELECT count(*) FROM one_items")
    return int(number)


REFUSALS = {
    "sqlite": "CREATE TRIGGER no BEFORE INSERT ON users_items BEGIN SELECT RAISE(ABORT, 'refused by the test'); END",
    "mysql": "ALTER TABLE users_items ADD CONSTRAINT no CHECK (payload + 1 > 0)",  # it says what is not a number
    "postgresql": "ALTER TABLE users_items ADD CONSTRAINT no CHECK (payload = 'another')",  # whose detail is the row
}


async def test_a_move_that_a_database_refuses_is_logged_without_the_row(
    sql_url: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The driver's own error quotes it, and stood in the traceback."""
    caplog.set_level(logging.DEBUG)
    engine = SyncEngine(SyncEngineConfig(data_dir=tmp_path / "data", sql_url=sql_url, l1_max_bytes=0))
    secret = SyncItem.from_json("user.1", {"c4nary": "c4nary"})
    async with engine:
        await engine.submit(secret, ack=Ack.STORED)
        assert await engine.register_schema("users", ["nobody."]) == 0
        await ask(sql_url, REFUSALS[sql_url.partition(":")[0]])
        with pytest.raises(StoreError) as refused:
            await engine.register_schema("users", ["user."])
        assert "c4nary" not in str(refused.value)
    async with engine:  # a start goes on with it, where only the log can tell
        await until(lambda: "rows cannot be moved (l3 refused: " in caplog.text)
        assert await engine.get("user.1") == secret
    assert "c4nary" not in caplog.text
