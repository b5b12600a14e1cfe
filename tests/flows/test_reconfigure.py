"""Settings changed at run time: all or nothing, at once, with nothing dropped (fault matrix 23, G65)."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from sync_engine import (
    Ack,
    Backpressure,
    ConfigError,
    NotRunning,
    PayloadTooLarge,
    StopReport,
    StoreError,
    SubmitOptions,
    SyncEngine,
    SyncEngineConfig,
    SyncItem,
    TierUnavailable,
    links,
)
from sync_engine.config import AT_RUN_TIME
from sync_engine.forward import Forwarding
from sync_engine.item import Op
from sync_engine.late import Late
from sync_engine.ports import Applied, Tier
from sync_engine.storage.sql import SqlStore
from sync_engine.testing.fixtures import DATABASES, StartKind
from sync_engine.testing.proxy import CuttingProxy
from sync_engine.testing.tiers import MemoryTier
from sync_engine.write.batcher import BACKLOG_TIMES

from ..locks import write_locked
from ..settings import BATCH_MAX, change_settings
from .rig import Held, Rig, on, others, soon, until

SERVERS = {"mariadb": "mariadb_server", "postgresql": "postgres_server"}

OTHER: dict[str, Any] = {
    "backpressure_critical": 0.8,
    "backpressure_wait_ms": 7,
    "backpressure_warn": 0.5,
    "batch_flush_bytes": 77,
    "batch_flush_count": 7,
    "batch_flush_ms": 7,
    "default_ack": Ack.STORED,
    "l1_max_bytes": 7_000,
    "max_payload_bytes": 70,
    "pending_max_bytes": 7_000,
    "promotion_ttl": 70.0,
    "redis_eviction_start": 0.7,
    "redis_eviction_target": 0.3,
    "redis_response_timeout_ms": 700,
    "redis_timeout_ms": 700,
    "sql_timeout_ms": 700,
    "sql_write_concurrency": 7,
    "wal_max_items": 7,
}


def test_every_setting_that_may_change_is_tried_here() -> None:
    assert set(OTHER) == AT_RUN_TIME


async def test_everything_that_may_change_changes_and_is_shown(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    async with rig.engine() as engine:
        before = engine.config
        with caplog.at_level(logging.INFO):
            await engine.reconfigure(**OTHER)
        for name, value in OTHER.items():
            assert getattr(engine.config, name) == value
            assert getattr(before, name) != value
            assert name in caplog.text
        assert engine.config.redis_url == before.redis_url
        assert engine.config.model_fields_set == before.model_fields_set | set(OTHER)
        assert engine.stats().l1.bytes_max == 7_000
        await engine.submit(SyncItem("a", b"x"))
        assert (await engine.status("a")).l3, "the default is Ack.STORED now"
        with pytest.raises(PayloadTooLarge):
            await engine.submit(SyncItem("a", bytes(71)))
        await engine.reconfigure()
        rig.at_rest(engine)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"batch_flush_ms": 5, "batch_flush_count": 0}, "batch_flush_count = 0: .*1"),
        ({"batch_flush_ms": "many"}, "batch_flush_ms = 'many'"),
        ({"batch_flush_ms": 5, "no_such_setting": 1}, "no_such_setting: no such setting"),
        ({"batch_flush_ms": 5, "redis_url": "redis://user:c4nary@h/0"}, "redis_url: .*restart"),
        ({"sql_url": None, "data_dir": "elsewhere"}, "data_dir, sql_url: .*restart"),
        ({"backpressure_warn": 0.95}, "backpressure_warn = 0.95"),
        ({"backpressure_critical": 0.7}, "backpressure_warn = 0.7: .* 0.7"),
        ({"redis_eviction_target": 0.75}, "redis_eviction_target"),
        ({"l1_max_bytes": -1}, "l1_max_bytes = -1"),
        ({"default_ack": "sometimes"}, "default_ack"),
        ({"_env_file": "/etc/passwd"}, "_env_file"),
    ],
)
async def test_G65_what_is_wrong_is_refused_by_name_and_nothing_changes(
    rig: Rig, changes: dict[str, Any], told: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with rig.engine() as engine:
        before = engine.config
        with pytest.raises(ConfigError, match=told) as refused:
            await engine.reconfigure(**changes)
        assert engine.config is before
        assert "c4nary" not in str(refused.value) + caplog.text


@pytest.mark.parametrize("name", sorted(set(SyncEngineConfig.model_fields) - AT_RUN_TIME))
async def test_every_other_setting_needs_a_restart(name: str) -> None:
    engine = SyncEngine(SyncEngineConfig(redis_url="redis://h/0"))
    with pytest.raises(ConfigError, match=f"^{name}: .*needs a restart"):
        await engine.reconfigure(**{name: getattr(engine.config, name)})


async def test_the_environment_and_the_file_have_no_say_any_more(
    rig: Rig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "settings.toml"
    file.write_text("batch_flush_count = 33\n")
    monkeypatch.setenv("SYNC_ENGINE_CONFIG", str(file))
    async with rig.engine(redis=False) as engine:
        assert engine.config.batch_flush_count == 33
        file.unlink()
        monkeypatch.setenv("SYNC_ENGINE_BATCH_FLUSH_COUNT", "-5")
        monkeypatch.setenv("SYNC_ENGINE_REDIS_URL", "redis://elsewhere/0")
        await engine.reconfigure(batch_flush_ms=3)
        assert (engine.config.batch_flush_count, engine.config.batch_flush_ms) == (33, 3)
        assert engine.config.redis_url is None


async def test_before_the_start_and_after_the_stop_it_is_for_the_next_start(rig: Rig) -> None:
    engine = rig.engine(redis=False)
    await engine.reconfigure(l1_max_bytes=1_000)
    async with engine:
        assert engine.stats().l1.bytes_max == 1_000
    await engine.reconfigure(l1_max_bytes=2_000, max_payload_bytes=1)
    async with engine:
        assert engine.stats().l1.bytes_max == 2_000
        with pytest.raises(PayloadTooLarge):
            await engine.submit(SyncItem("a", b"xx"))


async def test_what_waits_for_company_is_looked_at_anew(rig: Rig) -> None:
    async with rig.engine(batch_flush_ms=60_000) as engine:
        await engine.submit(SyncItem("a", b"x"))
        await engine.reconfigure(batch_flush_ms=0)
        await until(lambda: engine.stats().log_records == 0)
        await engine.reconfigure(batch_flush_ms=60_000)
        await engine.submit_many([SyncItem(f"b.{n}", b"x") for n in range(3)])
        await engine.reconfigure(batch_flush_count=3)
        await until(lambda: engine.stats().log_records == 0)


async def test_who_waits_for_room_is_let_in_by_a_wider_bound(rig: Rig) -> None:
    held: list[Held] = []
    wrap = on("l3", Held, held)
    async with rig.engine(around=wrap, wal_max_items=1, backpressure_wait_ms=60_000, redis=False) as engine:
        held[0].hold()
        await engine.submit(SyncItem("a", b"x"))
        waiting = asyncio.create_task(engine.submit(SyncItem("b", b"x")))
        await until(lambda: engine._running.writes._gate.crowded)
        await engine.reconfigure(wal_max_items=2)
        await waiting
        await engine.reconfigure(wal_max_items=1, backpressure_wait_ms=0)
        with pytest.raises(Backpressure):
            await engine.submit(SyncItem("c", b"x"))
        assert engine.stats().pressure == 2.0
        held[0].release()
        await engine.flush()
        await engine.submit(SyncItem("c", b"x"))


async def test_a_smaller_l1_gives_its_memory_back_at_once(rig: Rig) -> None:
    async with rig.engine(redis=False) as engine:
        await engine.submit_many([SyncItem(f"a.{n}", bytes(1_000)) for n in range(100)])
        for bound in (50_000, 1_500, 1_000, 0, 10**6):
            await engine.reconfigure(l1_max_bytes=bound)
            assert engine.stats().l1.bytes <= bound
            engine._running.l1.verify()
            assert await engine.get("a.7") is not None
            assert engine.stats().l1.bytes <= bound
        assert engine.peek("a.7") is not None


async def test_reads_copy_upward_for_as_long_as_the_new_ttl_says(rig: Rig) -> None:
    async with rig.engine(l1_max_bytes=0) as engine:
        await engine.submit(SyncItem("a", b"x", updated_at=1), SubmitOptions(), ack=Ack.STORED)
        await rig.key("DEL", rig.redis_prefix + "a")
        await engine.reconfigure(promotion_ttl=100)
        await engine.get("a")
        while not await rig.key("EXISTS", rig.redis_prefix + "a"):  # noqa: ASYNC110  # a copy in the background
            await asyncio.sleep(0.001)
        assert 90_000 < await rig.key("PTTL", rig.redis_prefix + "a") <= 100_000


class Batches(Forwarding):
    """Notes how many operations each call brings."""

    def __init__(self, tier: Any, sizes: list[int]) -> None:
        super().__init__(tier)
        self.sizes = sizes

    async def apply(self, ops: Sequence[Op], /) -> Applied:
        self.sizes.append(len(ops))
        return await super().apply(ops)


@pytest.mark.parametrize("seed", [1, 2])
async def test_23_a_hundred_reconfigurations_under_load_drop_nothing(rig: Rig, seed: int) -> None:
    rng = random.Random(seed)
    sizes: list[int] = []
    model: dict[str, SyncItem | None] = {}
    async with rig.engine(around=lambda tier: Batches(tier, sizes), backpressure_wait_ms=60_000) as engine:
        done = asyncio.Event()

        async def write(who: int) -> None:
            n = 0
            while not done.is_set():
                n += 1
                object_id = f"{who}.{n % 20}"
                if n % 7 == 0:
                    await engine.delete(object_id)
                    model[object_id] = None
                else:
                    model[object_id] = SyncItem(object_id, rng.randbytes(rng.randrange(200)), version=n, updated_at=1)
                    await engine.submit(model[object_id], ack=rng.choices(list(Ack), (3, 6, 1))[0])
                assert await engine.get(object_id) == model[object_id]

        async with asyncio.TaskGroup() as group:
            for who in range(8):
                group.create_task(write(who))
            for n in range(100):
                await change_settings(engine, rng, n)
                await asyncio.sleep(rng.random() * 0.01)
            done.set()
        await engine.reconfigure(pending_max_bytes=10**6, l1_max_bytes=10**6)
        await rig.check(engine, model)
        assert max(sizes) <= BATCH_MAX * BACKLOG_TIMES
        assert engine.stats().quarantined == 0


# Time-outs, which take new connections


async def test_time_outs_change_under_load_and_no_call_notices(rig: Rig) -> None:
    ids = [f"i{n}" for n in range(600)]
    async with rig.engine(l1_max_bytes=0) as engine:
        await engine.submit_many([SyncItem(object_id, b"0") for object_id in ids], ack=Ack.STORED)
        over = False

        async def read() -> None:
            while not over:
                assert len(await engine.get_many(ids)) == len(ids)
                await asyncio.sleep(0)  # what is pending is answered at once

        async def write(who: int) -> int:
            turn, ack = 0, (Ack.LOGGED, Ack.STORED)[who]
            while not over:
                turn += 1
                await engine.submit_many([SyncItem(object_id, b"%d" % turn) for object_id in ids[who::2]], ack=ack)
            return turn

        async with asyncio.TaskGroup() as group:
            group.create_task(read())
            writers = [group.create_task(write(who)) for who in range(2)]
            for ms in range(1_000, 1_008):
                await engine.reconfigure(sql_timeout_ms=ms, redis_timeout_ms=ms, redis_response_timeout_ms=ms)
            over = True
        assert engine.config.sql_timeout_ms == 1_007
        await engine.flush()
        held = await engine.get_many(ids)
        assert all(item.content == b"%d" % writers[n % 2].result() for n, item in enumerate(held.values()))
        assert held == await (await rig.l3()).get_many(ids)
        assert held == await rig.l2.get_many(ids)
        rig.at_rest(engine)


async def test_a_shorter_time_out_counts_from_the_next_call_on(rig: Rig) -> None:
    async with rig.engine(redis=False, sql_timeout_ms=600_000) as engine:
        await engine.submit(SyncItem("a", b"x"), ack=Ack.STORED)
        await engine.reconfigure(sql_timeout_ms=1)
        with write_locked(rig.path / "truth.db"):
            await engine.submit(SyncItem("a", b"y"))
            await until(lambda: engine.stats().lanes["l3"].trouble is not None)
        await engine.flush()
        assert (await engine.status("a")).l3


async def test_where_a_tier_cannot_be_connected_to_anew_nothing_changes(rig: Rig, own_kind: StartKind) -> None:
    server = await own_kind("redis-8-modules")
    async with rig.engine(redis_url=server.url, redis_prefix="r:") as engine:
        before = engine.config
        await engine.submit(SyncItem("a", b"x"), ack=Ack.STORED)
        await server.kill()
        with pytest.raises(TierUnavailable, match="l2"):
            await engine.reconfigure(sql_timeout_ms=10, redis_timeout_ms=10, batch_flush_ms=1)
        assert engine.config is before
        await engine.submit(SyncItem("b", b"y"))
        await server.start()
        await engine.flush()
        assert await server.ask("EXISTS", "r:b") == 1
        await engine.reconfigure(sql_timeout_ms=10, redis_timeout_ms=1_000, batch_flush_ms=1)
        assert (await engine.get_many(["a", "b"])).keys() == {"a", "b"}
        rig.at_rest(engine)


async def test_a_tier_that_was_never_there_is_connected_to_in_the_new_way(rig: Rig, own_kind: StartKind) -> None:
    server = await own_kind("redis-8-modules")
    await server.kill()
    async with rig.engine(redis_url=server.url, redis_prefix="r:") as engine:
        await engine.reconfigure(redis_timeout_ms=1_000)
        await server.start()
        await engine.submit(SyncItem("a", b"x"), ack=Ack.STORED)
        assert await server.ask("EXISTS", "r:a") == 1


async def test_an_attempt_under_way_does_not_bring_the_old_way_back() -> None:
    made: list[str] = []
    begun, go = asyncio.Event(), asyncio.Event()

    async def old() -> Tier:
        begun.set()
        await go.wait()
        made.append("old")
        return MemoryTier("l2")

    async def new() -> Tier:
        made.append("new")
        return MemoryTier("l2")

    async def connected(_: Tier) -> None:
        pass

    late = Late("l2", old, connected)
    call = asyncio.create_task(late.fetch(["a"]))
    await begun.wait()
    assert not late.here
    late.replace(None, new)
    go.set()
    await call
    assert made == ["old", "new"], "what was connected to in the old way is closed again"
    await late.close()


@pytest.mark.parametrize("server", ["redis", *DATABASES])
async def test_stop_does_not_wait_for_a_server_that_reconfigure_connects_to(
    rig: Rig, server: str, request: pytest.FixtureRequest
) -> None:
    """It may be ten minutes until a server that has accepted a connection is given up."""
    before = others()
    running = None if server == "redis" else request.getfixturevalue(SERVERS[server])
    url = rig.redis_url if running is None else await running.database()
    async with CuttingProxy(url) as proxy:
        through = {"redis_url" if running is None else "sql_url": proxy.url_for(url)}
        names = ("redis_timeout_ms", "redis_response_timeout_ms") if running is None else ("sql_timeout_ms",)
        change = dict.fromkeys(names, 600_000)
        engine = rig.engine(redis=running is None, **through)
        await engine.start()
        config = engine.config
        await engine.submit(SyncItem("a", b"x"), ack=Ack.STORED)
        here = proxy.connections
        proxy.ignore_new()
        changing = asyncio.create_task(engine.reconfigure(batch_flush_ms=1, **change))
        await until(lambda: proxy.connections > here)
        another = asyncio.create_task(engine.reconfigure(**change))
        await soon()
        async with asyncio.timeout(30):
            assert await engine.stop() == StopReport(0, 0)
        for told in (changing, another):
            with pytest.raises(NotRunning, match="is being stopped"):
                await told
        assert engine.config is config
        proxy.heal()
        await until(lambda: others() <= before and "| 0 connections open" in repr(proxy))
        await engine.reconfigure(**change)
        async with engine:
            assert await engine.get("a") is not None
    if running is not None:
        await running.drop(url)


async def test_what_reconfigure_connects_to_after_a_stop_is_closed_again(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(links, "ABANDONED_WITHIN_S", 0.01)
    before = others()
    begun, go = asyncio.Event(), asyncio.Event()
    made: list[SqlStore] = []
    connect = SqlStore.connect

    async def late(url: str, **options: Any) -> SqlStore:
        if options["timeout_ms"] == 700:
            begun.set()
            while not go.is_set():
                with suppress(asyncio.CancelledError):  # as a driver may that is cancelled just then
                    await go.wait()
        made.append(await connect(url, **options))
        return made[-1]

    monkeypatch.setattr(SqlStore, "connect", late)
    engine = rig.engine(redis=False)
    await engine.start()
    changing = asyncio.create_task(engine.reconfigure(sql_timeout_ms=700))
    await begun.wait()
    await engine.stop()
    with pytest.raises(NotRunning):
        await changing
    assert len(made) == 1
    go.set()
    await until(lambda: others() <= before)
    assert len(made) == 2
    for store in made:
        with pytest.raises(TierUnavailable, match="closed"):
            await store.count()


class Closing(MemoryTier):
    """A tier whose close waits to be let go, and may fail."""

    def __init__(self, failure: Exception | None = None) -> None:
        super().__init__("l2")
        self.go = asyncio.Event()
        self._failure = failure

    async def close(self) -> None:
        await self.go.wait()
        await super().close()
        if self._failure is not None:
            raise self._failure


async def test_a_tier_that_fails_to_close_is_told_once_those_before_it_are_closed() -> None:
    """Raised at once, it left their connections to a task that nobody waited for."""
    before, now = Closing(), Closing(StoreError("l2", "no"))
    tiers = iter((before, now))

    async def connect() -> Tier:
        return next(tiers)

    async def connected(_: Tier) -> None:
        pass

    late = Late("l2", connect, connected)
    await late.ready()
    late.replace(await late.another(connect), connect)
    now.go.set()
    closing = asyncio.create_task(late.close())
    await until(lambda: now.closed)
    await soon()
    assert not closing.done()
    before.go.set()
    with pytest.raises(StoreError, match="no"):
        await closing
    assert before.closed
