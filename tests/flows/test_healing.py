"""A Redis that came back older than it had confirmed is not believed, and made right from SQL; I4 and I1 hold."""

from __future__ import annotations

import asyncio
import sqlite3
import time

import pytest

from sync_engine import Ack, SubmitOptions, SyncEngine, SyncItem, TierUnavailable
from sync_engine.storage.redis import RedisStore
from sync_engine.storage.redis.slots import TAGS, slot_of
from sync_engine.storage.sql import SqlStore
from sync_engine.testing.fixtures import StartCluster, StartKind
from sync_engine.testing.servers import KINDS, RedisKind, RunningRedis
from sync_engine.testing.tiers import Breaking
from sync_engine.trust import MARGIN_MS

from .rig import CACHE, Rig, on

pytestmark = pytest.mark.slow  # as a whole, and no matter of the Python that runs it

OLD = [SyncItem(f"i{n}", b'{"old": %d}' % n, state="old") for n in range(20)]
NEW = [SyncItem(f"i{n}", b'{"new": %d}' % n, state="new") for n in range(10)]
NO_L1 = {"l1_max_bytes": 0}
"""Every read then asks the tiers."""


@pytest.fixture
async def server(server_kind: RedisKind, own_kind: StartKind) -> RunningRedis:
    return await own_kind(server_kind)


@pytest.fixture
async def aged(rig: Rig, server: RunningRedis) -> RunningRedis:
    """A Redis that is as it was before the newest writes and deletes, which SQL has. No engine runs."""
    async with engine_on(rig, server) as engine:
        await engine.submit_many(OLD, ack=Ack.STORED)
        await engine.submit(SyncItem("cached", b"c"), CACHE, ack=Ack.STORED)
        await server.ask("SAVE")
        await renew(engine)
    await server.kill()
    await server.start()
    return server


async def renew(engine: SyncEngine) -> None:
    await engine.submit_many(NEW, ack=Ack.STORED)
    await engine.delete_many([item.object_id for item in OLD[10:15]], ack=Ack.STORED)
    await engine.set_state("i15", "moved", ack=Ack.STORED)
    await engine.submit(SyncItem("i16", b"sql alone"), SubmitOptions.durable(), ack=Ack.STORED)


EXPECTED = {
    **{item.object_id: item.content for item in NEW},
    **{item.object_id: None for item in OLD[10:15]},
    "i15": OLD[15].content,
    "i16": b"sql alone",
    **{item.object_id: item.content for item in OLD[17:]},
    "cached": b"c",
}


def engine_on(rig: Rig, server: RunningRedis, **settings: object) -> SyncEngine:
    return rig.engine(redis_url=server.url, redis_prefix="h:", **NO_L1 | settings)


async def told(engine: SyncEngine) -> dict[str, bytes | None]:
    """What ``get`` says of every item; where it says that it does not know, it is asked again."""
    answers: dict[str, bytes | None] = {}
    for object_id in EXPECTED:
        while True:
            try:
                found = await engine.get(object_id)
            except TierUnavailable:
                await asyncio.sleep(0.002)
                continue
            answers[object_id] = None if found is None else found.content
            break
    return answers


async def believed(engine: SyncEngine) -> None:
    async with asyncio.timeout(60):
        while not (await engine.health()).ok:  # noqa: ASYNC110  # it is asked, and tells nobody by itself
            await asyncio.sleep(0.005)


async def check_redis(server: RunningRedis) -> None:
    """Redis itself holds nothing that SQL has replaced or deleted, in its values and in its sets."""

    store = await RedisStore.connect(server.url, "h:")
    held = await store.get_many(list(EXPECTED))
    assert {id_: item.content for id_, item in held.items()} == {
        id_: content for id_, content in EXPECTED.items() if content is not None and id_ != "i16"
    }
    assert await store.list_state_ids("new") == sorted(item.object_id for item in NEW)
    assert await store.list_state_ids("moved") == ["i15"]
    assert await store.list_state_ids("old") == ["i17", "i18", "i19"]
    await store.close()


async def test_I4_a_start_on_an_older_redis_reads_what_sql_has(rig: Rig, aged: RunningRedis) -> None:
    async with engine_on(rig, aged) as engine:
        assert await told(engine) == EXPECTED
        await believed(engine)
        assert await told(engine) == EXPECTED
    await check_redis(aged)


async def test_I4_a_redis_that_falls_back_under_a_working_engine_is_never_read_as_it_is(
    rig: Rig, server: RunningRedis
) -> None:
    async with engine_on(rig, server) as engine:
        await engine.submit_many(OLD, ack=Ack.STORED)
        await engine.submit(SyncItem("cached", b"c"), CACHE, ack=Ack.STORED)
        await server.ask("SAVE")
        await renew(engine)
        assert await told(engine) == EXPECTED
        await server.kill()
        await server.start()
        assert await told(engine) == EXPECTED
        await believed(engine)
        assert await told(engine) == EXPECTED
    await check_redis(server)


async def test_I4_what_redis_alone_could_know_is_unknown_until_it_is_believed(rig: Rig, aged: RunningRedis) -> None:
    broken: list[Breaking] = []
    silent = on("l3", lambda tier: Breaking(tier, times=None), broken)
    async with engine_on(rig, aged, around=silent) as engine:
        for object_id in ("cached", "i0", "i10", "nobody"):
            with pytest.raises(TierUnavailable):
                await engine.get(object_id)
        health = await engine.health()
        assert not health.ok
        assert "not been looked at" in (health.tiers["l2"].trouble or "")
        await engine.submit(SyncItem("written", b"meanwhile"))
        broken[0].heal()
        assert await told(engine) == EXPECTED
        assert (await engine.get("written")).content == b"meanwhile"
    await check_redis(aged)


async def test_an_engine_that_was_not_there_heals_too(rig: Rig, aged: RunningRedis) -> None:
    async with engine_on(rig, aged, data="another") as engine:
        assert await told(engine) == EXPECTED
        await believed(engine)
    await check_redis(aged)


async def test_the_same_server_is_believed_at_once_even_while_sql_is_down(rig: Rig, server: RunningRedis) -> None:
    async with engine_on(rig, server) as engine:
        await engine.submit_many(OLD, ack=Ack.STORED)
    silent = on("l3", lambda tier: Breaking(tier, times=None))
    async with engine_on(rig, server, around=silent) as engine:
        assert (await engine.get("i3")).content == OLD[3].content


async def test_an_emptied_redis_has_nothing_that_could_be_old(rig: Rig, server: RunningRedis) -> None:
    async with engine_on(rig, server) as engine:
        await engine.submit_many(OLD, ack=Ack.STORED)
        await server.restart(empty=True)
        for item in OLD:
            while True:
                try:
                    assert (await engine.get(item.object_id)).content == item.content
                    break
                except TierUnavailable:
                    await asyncio.sleep(0.002)
        await believed(engine)
        assert await engine.get("nobody") is None


async def test_a_loss_that_reaches_behind_what_sql_remembers_keeps_redis_unread_until_it_is_emptied(
    rig: Rig, aged: RunningRedis, caplog: pytest.LogCaptureFixture
) -> None:
    # As if SQL had forgotten what was deleted until now, as seen from the margin that is always looked back.
    with sqlite3.connect(rig.path / "truth.db") as file:
        file.execute("DELETE FROM sync_tombstones")
        file.execute(
            "INSERT OR REPLACE INTO sync_meta VALUES ('forgotten_ms', ?)", (time.time_ns() // 1_000_000 - MARGIN_MS,)
        )
    file.close()
    async with engine_on(rig, aged) as engine:
        for item in NEW:
            assert (await engine.get(item.object_id)).content == item.content  # SQL answers
        with pytest.raises(TierUnavailable):
            await engine.get("i10")  # deleted, as far as SQL knows; nobody can say what Redis alone may hold
        async with asyncio.timeout(60):
            while "keys of its prefix are deleted" not in str((await engine.health()).tiers["l2"].trouble):  # noqa: ASYNC110
                await asyncio.sleep(0.005)  # until it has been looked at once more
        await aged.ask("FLUSHALL")
        await believed(engine)
        assert await engine.get("i10") is None
        assert (await engine.get("i0")).content == NEW[0].content


async def test_why_redis_is_not_read_is_said_once_however_long_it_lasts(
    rig: Rig, server: RunningRedis, caplog: pytest.LogCaptureFixture
) -> None:
    # It was said at every attempt: what an open circuit says tells how long it stays open.
    async with engine_on(rig, server):
        pass
    await server.kill()
    async with engine_on(rig, server) as engine:
        await asyncio.sleep(0.3)  # many attempts, since the clock of these tests hurries
        assert caplog.text.count("Redis is not read") == 1
        await server.start()
        await believed(engine)


async def test_what_nobody_stamped_is_compared_with_sql(rig: Rig, server: RunningRedis) -> None:
    """Stores of the original: neither side has a stamp, and Redis has never been marked."""

    l3 = await SqlStore.connect(rig.sql_url)
    await l3.put_batch([SyncItem("same", b'{"a":1}', updated_at=1), SyncItem("differs", b'{"a":2}', updated_at=1)])
    await l3.close()
    l2 = await RedisStore.connect(server.url, "h:")
    await l2.put_batch([SyncItem("same", b'{"a":1}', updated_at=1), SyncItem("differs", b'{"a":"old"}', updated_at=1)])
    await server.ask("DEL", "h:__local__:mark")
    async with engine_on(rig, server) as engine:
        assert (await engine.get("same")).json() == {"a": 1}
        assert (await engine.get("differs")).json() == {"a": 2}
        await believed(engine)
    await l2.close()


async def test_two_engines_on_one_redis_that_fell_back_both_see_what_sql_has(rig: Rig, aged: RunningRedis) -> None:
    one, two = engine_on(rig, aged, data="one"), engine_on(rig, aged, data="two")
    async with one, two:
        answers = await asyncio.gather(told(one), told(two))
        assert answers == [EXPECTED, EXPECTED]
        await asyncio.gather(believed(one), believed(two))
        await one.submit(SyncItem("i0", b"third"), ack=Ack.STORED)
        assert (await two.get("i0")).content == b"third"


@pytest.mark.slow
async def test_I8_changes_that_a_cluster_s_stream_lost_are_told_again(rig: Rig, own_cluster: StartCluster) -> None:
    """The stream is on one primary, the items on others: one that is emptied loses the entries and not the items."""
    cluster = await own_cluster(KINDS["redis-8-modules"], replicas=0)
    settings = {"redis_url": cluster.url, "redis_prefix": "h:", "enable_cdc_stream": True}
    async with rig.engine(**settings) as engine:
        await engine.submit_many(OLD, ack=Ack.STORED)
        await engine.delete("i19", ack=Ack.STORED)
        stream = await cluster.owner(slot_of(TAGS[0].encode()))
        await stream.server.ask("DEL", f"h:{{{TAGS[0]}}}__local__:cdc", f"h:{{{TAGS[0]}}}__local__:cdc:seq")
        # What a failover to a replica that lacks the newest entries looks like.
        await stream.server.restart()
        await cluster.until_well()
        await believed(engine)
        assert (await engine.get("i3")).content == OLD[3].content
        await until_told(engine)
    store = await RedisStore.connect(cluster.url, "h:")
    told = {entry.object_id: entry.op async for entry in store.iter_cdc()}
    await store.close()
    told.pop("ping", None)
    assert told == {**{item.object_id: "PUT" for item in OLD}, "i19": "DEL"}


async def until_told(engine: SyncEngine) -> None:
    """Until the engine has noticed that a server is another one, and has made up for it."""
    trust = engine._running._trust  # type: ignore[union-attr]  # it runs
    async with asyncio.timeout(60):
        while trust.epoch == 0 or trust.doubt is not None:
            await engine.submit(SyncItem("ping", b"1"), ack=Ack.STORED)
            await engine.delete("ping", ack=Ack.STORED)
            await asyncio.sleep(0.01)
