"""SQL is gone for a while: what is accepted meanwhile, what is answered, and how the log drains once it is back.

Rows 8 and 9 of the fault matrix, on each database, with one engine that is never restarted.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass

import pytest

from sync_engine import Ack, Backpressure, SubmitOptions, SyncEngine, SyncItem, TierUnavailable
from sync_engine.testing.databases import RunningDatabase
from sync_engine.testing.fixtures import StartDatabase
from sync_engine.testing.proxy import CuttingProxy

from ..locks import write_locked
from .rig import NO_L1, MakeRig, Rig, locked, until


@dataclass(frozen=True)
class Sql:
    """A database behind a proxy; None of both: SQLite in the folder of the rig."""

    server: RunningDatabase | None
    proxy: CuttingProxy | None


@asynccontextmanager
async def held(rig: Rig, _: Sql) -> AsyncIterator[None]:
    with locked(rig):
        yield


@asynccontextmanager
async def killed(_: Rig, sql: Sql) -> AsyncIterator[None]:
    assert sql.server is not None
    await sql.server.kill()
    yield
    await sql.server.start()


@asynccontextmanager
async def stopped(_: Rig, sql: Sql) -> AsyncIterator[None]:
    assert sql.server is not None
    await sql.server.pause()
    yield
    await sql.server.resume()


@asynccontextmanager
async def refused(_: Rig, sql: Sql) -> AsyncIterator[None]:
    assert sql.proxy is not None
    sql.proxy.refuse()
    yield
    sql.proxy.heal()


Outage = Callable[[Rig, Sql], AbstractAsyncContextManager[None]]

OUTAGES = [
    pytest.param("sqlite", held, id="sqlite-locked"),
    *(
        pytest.param(kind, outage, id=f"{kind}-{outage.__name__}", marks=[pytest.mark.slow] if slow else [])
        for kind in ("mariadb", "postgresql")
        # One that stands still is given up after its time-out only.
        for outage, slow in ((killed, False), (refused, False), (stopped, True))
    ),
]


@asynccontextmanager
async def behind_a_proxy(rig: Rig, kind: str, start: StartDatabase) -> AsyncIterator[Sql]:
    """The rig's engines get this database as their truth."""
    rig.settings |= {"sql_timeout_ms": 50, "batch_flush_ms": 5}
    if kind == "sqlite":
        yield Sql(None, None)
        return
    server = await start(kind, durable=True)
    rig.figures.truth = {"mariadb": "MariaDB", "postgresql": "PostgreSQL"}[kind]
    async with CuttingProxy(("127.0.0.1", server.port)) as proxy:
        url = await server.database()
        rig.settings["sql_url"] = url.replace(f":{server.port}/", f":{proxy.port}/")
        yield Sql(server, proxy)


@pytest.mark.parametrize(("kind", "outage"), OUTAGES)
async def test_an_outage_of_sql_stops_no_write_and_the_log_drains_while_new_ones_flow(
    make_rig: MakeRig, own_database: StartDatabase, kind: str, outage: Outage
) -> None:
    rig = make_rig()
    async with behind_a_proxy(rig, kind, own_database) as sql, SyncEngine(rig.config(**NO_L1)) as engine:
        await rig.work(engine)
        await _submit(engine, [f"old.{n:03}" for n in range(100)], b"before", ack=Ack.STORED)
        await engine.submit(SyncItem("sql alone", b"1"), SubmitOptions.durable(), ack=Ack.STORED)
        async with outage(rig, sql):
            rig.figures.faults += 1
            working = asyncio.create_task(rig.work(engine, moves=20))  # which reads what it writes, all the time
            await _submit(engine, [f"old.{n:03}" for n in range(50)], b"during")
            await _submit(engine, [f"new.{n:03}" for n in range(400)], b"during")
            await _submit(engine, [f"new.{n:03}" for n in range(200)], b"during, again")
            assert await engine.delete_many([f"old.{n:03}" for n in range(40, 60)]) == 20
            assert await engine.delete_many([f"new.{n:03}" for n in range(100)]) == 100
            await engine.submit(SyncItem("new.050", b"deleted, and back"))
            assert await engine.set_state("old.010", "warm")
            await _is_right(engine)  # from what is pending, and from Redis
            for unknown in ("sql alone", "nowhere") if sql.server is not None else ():  # a lock stops no reader
                with pytest.raises(TierUnavailable, match="l3"):
                    await engine.get(unknown)
                with pytest.raises(TierUnavailable):
                    await engine.contains(unknown)
            assert engine.stats().log_records >= 770
            with pytest.raises(TierUnavailable, match="l3"):
                await engine.flush(timeout=0.2)
            assert not (await engine.health()).ok
        flowing = asyncio.create_task(_submit(engine, [f"flow.{n:03}" for n in range(300)], b"after", singly=True))
        await _submit(engine, ["old.001"], b"after, and newer")
        await asyncio.gather(working, flowing)
        await engine.flush()
        assert engine.stats().log_records == engine.stats().quarantined == 0
        assert (await engine.get("old.001")).content == b"after, and newer"
        await _submit(engine, ["old.001"], b"during")
        await engine.flush()
        await _is_right(engine)
        assert (await engine.get("sql alone")).content == b"1"
        assert await engine.get("nowhere") is None
        assert await engine.count_prefix("flow.") == 300
        assert await engine.count_prefix("old.") == 80
        assert await engine.count_prefix("new.") == 301
        assert "old.010" in await engine.list_state_ids("warm")
        await rig.read_back(engine)
    rig.figures.tell(f"8, 9 SQL gone while writes go on: {outage.__name__}, {kind}")


@pytest.mark.parametrize(
    ("kind", "outage"), [pytest.param("sqlite", held, id="sqlite"), pytest.param("postgresql", killed, id="postgresql")]
)
async def test_at_the_bound_of_the_log_writes_are_refused_after_a_wait_and_taken_again_by_themselves(
    make_rig: MakeRig, own_database: StartDatabase, kind: str, outage: Outage
) -> None:
    rig = make_rig()
    rig.settings |= {"wal_max_items": 200, "backpressure_wait_ms": 30}
    async with behind_a_proxy(rig, kind, own_database) as sql, SyncEngine(rig.config()) as engine:
        await engine.submit(SyncItem("first", b"1"), ack=Ack.STORED)
        accepted = []
        async with outage(rig, sql):
            for n in range(200):
                await engine.submit(SyncItem(f"b.{n:03}", b"1"))
                accepted.append(f"b.{n:03}")
            for write in (engine.submit(SyncItem("one more", b"1")), engine.delete("b.000")):
                with pytest.raises(Backpressure, match="200 of 200"):
                    await write
            assert (await engine.get("b.000")).content == b"1", "refused is not half done"
            assert await engine.get("b.199") is not None
            assert engine.stats().log_records == 200
            waiting = asyncio.create_task(_patiently(engine, "one more"))
        await waiting
        await engine.flush()
        assert await engine.list_state_ids("default", 1_000) == [*accepted, "first", "one more"]


async def test_what_was_accepted_during_an_outage_passes_nothing_newer_of_another_engine(make_rig: MakeRig) -> None:
    """Two engines on one database: what one wrote through while the other's outage lasted stands, and so do deletes."""
    rig, other = make_rig(), make_rig()
    sql = rig.path / "shared.db"
    for each in (rig, other):
        each.settings |= {"sql_url": f"sqlite:///{sql}", "sql_timeout_ms": 50, "redis_prefix": rig.prefix}
    async with SyncEngine(rig.config(**NO_L1)) as ours, SyncEngine(other.config(**NO_L1)) as theirs:
        await _submit(ours, ["a", "b", "c"], b"first", ack=Ack.STORED)
        with write_locked(sql):
            await _submit(ours, ["a", "b"], b"older, and late")
            assert await ours.delete("c")
            await asyncio.sleep(0.005)  # of two engines' writes in one millisecond either may be the newer one
            late = asyncio.create_task(_submit(theirs, ["a", "c"], b"newer", ack=Ack.STORED))
            gone = asyncio.create_task(theirs.delete("b", ack=Ack.STORED))
            await until(lambda: theirs.stats().log_records == 3)
        await asyncio.gather(late, gone)
        await asyncio.gather(ours.flush(), theirs.flush())
        for engine in (ours, theirs):
            assert (await engine.get("a")).content == (await engine.get("c")).content == b"newer"
            assert await engine.get("b") is None


async def _patiently(engine: SyncEngine, object_id: str) -> None:
    while True:
        try:
            await engine.submit(SyncItem(object_id, b"1"))
        except Backpressure:
            continue
        return


async def _submit(
    engine: SyncEngine, ids: list[str], content: bytes, *, ack: Ack = Ack.LOGGED, singly: bool = False
) -> None:
    items = [SyncItem(object_id, content) for object_id in ids]
    if not singly:
        await engine.submit_many(items, ack=ack)
        return
    for item in items:
        await engine.submit(item, ack=ack)


async def _is_right(engine: SyncEngine) -> None:
    """What the writes of the test, in their order, have left."""
    wanted: dict[str, bytes | None] = {f"old.{n:03}": b"during" if n < 50 else b"before" for n in range(100)}
    wanted |= {f"new.{n:03}": b"during, again" if n < 200 else b"during" for n in range(400)}
    wanted |= {f"old.{n:03}": None for n in range(40, 60)} | {f"new.{n:03}": None for n in range(100)}
    wanted["new.050"] = b"deleted, and back"
    found = await engine.get_many(list(wanted))
    assert {object_id: item.content for object_id, item in found.items()} == {
        object_id: content for object_id, content in wanted.items() if content is not None
    }
    for object_id in ("old.000", "old.045", "old.070", "new.000", "new.050", "new.150", "new.300"):
        item = await engine.get(object_id)
        assert (item and item.content) == wanted[object_id]
    assert found["old.010"].state == "warm"
