"""Redis and SQLite fail under a working engine: killed, emptied, stopped, cut off, locked.

Rows 1, 2, 5 to 8, 16, 17, 20 and 22 of the fault matrix, those about Redis on every kind of server: the long variant
on one of them, on the others enough to show that they are no different.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest

from sync_engine import Ack, StoreError, SubmitOptions, SyncEngine, SyncItem, TierUnavailable
from sync_engine.storage.redis import RedisStore
from sync_engine.testing.fixtures import StartKind
from sync_engine.testing.proxy import CuttingProxy
from sync_engine.testing.servers import KINDS, RedisKind, RunningRedis

from .rig import NO_L1, QUICK, MakeRig, locked, timed_ms, until
from .truths import NAMES, Truth, each_kind_and_truth, thorough, trigger

# Redis killed, emptied


@pytest.mark.slow
@pytest.mark.parametrize("keeps_data", [True, False])
@each_kind_and_truth
async def test_I3_redis_is_killed_within_a_batch_wherever_it_is_cut(
    make_rig: MakeRig, server_kind: RedisKind, own_kind: StartKind, truth: Truth, keeps_data: bool
) -> None:
    server = await own_kind(server_kind, extra_args=("--appendonly", "yes") if keeps_data else ())
    counts = (
        (0, 1, 100, 1_000, 3_000, 8_000) if thorough(server_kind, truth) else (100, 3_000) if keeps_data else (1_000,)
    )
    heal_ms = 0.0
    async with CuttingProxy(server.url) as proxy:
        rig = make_rig(redis_url=proxy.url_for(server.url))
        async with SyncEngine(rig.config(**QUICK, **NO_L1)) as engine:
            for count in counts:
                pid = server.pid
                proxy.call_after_request_bytes(count, lambda pid=pid: os.kill(pid, signal.SIGKILL))
                working = asyncio.create_task(rig.work(engine, moves=25))
                await until(lambda working=working: not server.running or working.done())
                if server.running:
                    await server.kill()  # the work was too short for so many bytes
                await server.start()
                rig.figures.faults += 1
                heal_ms = max(heal_ms, await timed_ms(asyncio.gather(working, engine.flush())))
                await engine.flush()
                await rig.read_back(engine, l2_exact=keeps_data)
    end = "with its data" if keeps_data else "empty"
    rig.figures.tell(
        f"1 Redis killed after k bytes of requests, comes back {end}, {server_kind}",
        f"all stored after {heal_ms:.0f} ms",
    )


@each_kind_and_truth
async def test_I4_an_emptied_redis_is_a_miss_and_never_an_absence(
    make_rig: MakeRig, server: RunningRedis, truth: Truth
) -> None:
    rig = make_rig(redis_url=server.url)
    store = await RedisStore.connect(server.url)
    async with SyncEngine(rig.config(**QUICK, **NO_L1)) as engine:
        for _ in range(5 if thorough(server.kind, truth) else 2):
            working = asyncio.create_task(rig.work(engine, moves=15))
            for _ in range(4):
                await asyncio.sleep(0.01)
                await store.client.execute_command("FLUSHALL")
                rig.figures.faults += 1
            await working
            await engine.flush()
            await store.client.execute_command("FLUSHALL", "SYNC")
            await store.client.execute_command("SCRIPT", "FLUSH")
            await rig.read_back(engine, l2_exact=False)  # every item is found, and copied into Redis again
        await store.close()
        await server.kill()
        await server.start()
        rig.figures.faults += 1
        await rig.work(engine)
        await engine.flush()
        await rig.read_back(engine, l2_exact=False)
    rig.figures.tell(f"2 Redis emptied, {server.kind}")


# Redis silent


@asynccontextmanager
async def standing_still(server: RunningRedis, _: CuttingProxy) -> AsyncIterator[None]:
    await server.pause()
    yield
    await server.resume()


@asynccontextmanager
async def swallowed(_: RunningRedis, proxy: CuttingProxy) -> AsyncIterator[None]:
    proxy.blackhole()
    yield
    proxy.heal()


@asynccontextmanager
async def refused(_: RunningRedis, proxy: CuttingProxy) -> AsyncIterator[None]:
    proxy.refuse()
    yield
    proxy.heal()


SILENCES = [
    pytest.param(
        kind,
        name,
        fault,
        id=f"{kind}-{name}-{fault.__name__}",
        marks=[] if name == "sqlite" else pytest.mark.long,
    )
    for kind in KINDS.values()
    for name in NAMES
    for fault in (standing_still, swallowed, refused)
    if (name == "sqlite" and thorough(kind))
    or (name == "sqlite" and fault is not refused)  # which is the proxy's doing, whatever is behind it
    or (kind.name == "redis-8-modules" and fault is swallowed)
]


@pytest.mark.parametrize(("server_kind", "truth", "fault"), SILENCES, indirect=["truth"])
async def test_I4_a_silent_redis_delays_reads_by_its_timeout_and_stops_no_write(
    make_rig: MakeRig, server: RunningRedis, truth: Truth, fault: Callable[..., AsyncIterator[None]]
) -> None:
    async with CuttingProxy(server.url) as proxy:
        rig = make_rig(redis_url=proxy.url_for(server.url))
        async with SyncEngine(rig.config(**QUICK, **NO_L1)) as engine:
            await rig.work(engine)
            await engine.submit(SyncItem("c", b"in Redis alone"), SubmitOptions.cache(60))
            await engine.flush()
            await rig.read_back(engine)
            items = {key: item for key in sorted(rig.ledger.possible) if (item := await engine.get(key)) is not None}
            get_ms = 0.0
            async with fault(server, proxy):
                rig.figures.faults += 1
                for key, item in list(items.items())[: None if thorough(server.kind, truth) else 2]:
                    async with asyncio.timeout(5):  # its bound is 0.2 s; the default client's is a minute
                        begun_s = time.monotonic()
                        assert await engine.get(key) == item
                    get_ms = max(get_ms, (time.monotonic() - begun_s) * 1000)
                for unknown in ("c", "nowhere"):
                    with pytest.raises(TierUnavailable):
                        await engine.get(unknown)
                    with pytest.raises(TierUnavailable):
                        await engine.contains(unknown)
                begun_s = time.monotonic()
                acked = [await engine.submit(SyncItem(f"d.{n}", b"%d" % n)) for n in range(20)]
                submit_ms = (time.monotonic() - begun_s) * 1000 / len(acked)
                assert (await engine.get("d.7")).content == b"7"
                await until(lambda: engine.stats().lanes["l3"].waiting == 0)  # SQL does not wait for Redis
                with pytest.raises(TierUnavailable, match="l2"):
                    await engine.flush(timeout=0.2)
            await asyncio.gather(*(receipt.stored() for receipt in acked))
            assert (await engine.get("c")).content == b"in Redis alone"
            await rig.work(engine)
            await engine.flush()
            await rig.read_back(engine)
    told = f"get {get_ms:.0f} ms at most, submit {submit_ms:.1f} ms"
    rig.figures.tell(f"5, 7 Redis silent: {fault.__name__.replace('_', ' ')}, {server.kind}", told)


@pytest.mark.slow
@each_kind_and_truth
async def test_a_cut_reply_reaches_nobody_else_and_its_operation_counts_once(
    make_rig: MakeRig, server: RunningRedis, truth: Truth
) -> None:
    counts = (*range(0, 24, 3), 50, 120, 400, 1_000, 3_000)
    async with CuttingProxy(server.url) as proxy:
        rig = make_rig(redis_url=proxy.url_for(server.url))
        async with SyncEngine(rig.config(**QUICK, **NO_L1)) as engine:
            await engine.submit_many([SyncItem(f"r.{n}", b"only %d" % n) for n in range(50)], ack=Ack.STORED)
            wrong = 0
            for count in counts if thorough(server.kind, truth) else counts[::2]:
                proxy.cut_after_reply_bytes(count)
                working = asyncio.create_task(rig.work(engine, moves=6))
                while not working.done():
                    # Many single reads in one tick share a reply: a wrong one would go to several callers.
                    answers = await asyncio.gather(*(engine.get(f"r.{n}") for n in range(50)), return_exceptions=True)
                    for n, answer in enumerate(answers):
                        wrong += isinstance(answer, SyncItem) and answer.content != b"only %d" % n
                        wrong += answer is None
                await working
            rig.figures.faults = proxy.cuts
            await engine.flush()
            await rig.read_back(engine)
    rig.figures.tell(f"6 replies cut after j bytes, {server.kind}")
    assert wrong == 0
    assert rig.figures.faults > 3


# SQLite locked


async def test_I3_a_locked_truth_stops_no_write_and_what_it_missed_is_flushed_afterwards(make_rig: MakeRig) -> None:
    rig = make_rig()
    async with SyncEngine(rig.config(sql_timeout_ms=50)) as engine:
        await rig.work(engine)
        with locked(rig):
            rig.figures.faults += 1
            await engine.submit(SyncItem("d", b"1"))
            assert await engine.delete("d")
            assert await engine.get("d") is None
            with pytest.raises(TierUnavailable, match="l3"):
                await engine.flush(timeout=0.3)
            with pytest.raises(TierUnavailable):
                await engine.count_prefix("k.")
            assert engine.stats().log_records > 0
        await rig.work(engine)
        await engine.flush()
        await rig.read_back(engine)
    rig.figures.tell("8 SQLite locked by another process")


async def test_an_engine_killed_while_its_truth_is_locked_brings_everything_later(make_rig: MakeRig) -> None:
    rig = make_rig()
    rig.settings["sql_timeout_ms"] = 50
    for _ in range(3):
        async with SyncEngine(rig.config()) as engine:
            await rig.work(engine)
        with locked(rig):
            rig.start()
            await asyncio.sleep(0.4)
            rig.drivers.kill()
            assert rig.drivers.ended() == -signal.SIGKILL
            rig.figures.faults += 2
        await rig.check()
    rig.figures.tell("8, 14, 22 killed while SQLite is locked")
    assert rig.figures.recovered > 0


# What arrives twice, late, or in the wrong order


@each_kind_and_truth
async def test_I1_a_log_that_is_replayed_late_changes_nothing(
    make_rig: MakeRig, server_kind: RedisKind, kind_url: str, truth: Truth
) -> None:
    rig = make_rig(redis_url=kind_url)
    old = rig.path / "old log"
    for _ in range(3 if thorough(server_kind, truth) else 1):
        async with SyncEngine(rig.config(sql_timeout_ms=50)) as engine:
            async with truth.locked(rig):
                # Nothing is settled meanwhile; what waits for STORED ends with the lock.
                working = asyncio.create_task(rig.work(engine, moves=20))
                await asyncio.sleep(0.2)
                shutil.copytree(rig.data_dir / "log", old)
            await working
            await rig.work(engine)  # newer states, deletes among them, than the copied log knows
            await engine.flush()
            await rig.read_back(engine)
        shutil.rmtree(rig.data_dir / "log")
        shutil.move(old, rig.data_dir / "log")
        rig.figures.faults += 1
        before = rig.figures.recovered
        await rig.check()
        assert rig.figures.recovered > before, "the old log held nothing: the test shows nothing"
    rig.figures.tell(f"20 the log of an earlier moment replayed, {server_kind}")


@each_kind_and_truth
async def test_I1_a_delete_is_not_undone_by_reads_that_copy_upward(
    make_rig: MakeRig, server_kind: RedisKind, kind_url: str, truth: Truth
) -> None:
    rig = make_rig(redis_url=kind_url)
    store = await RedisStore.connect(kind_url, rig.prefix)
    async with SyncEngine(rig.config(**NO_L1)) as engine:
        for _ in range(6 if thorough(server_kind, truth) else 2):
            working = asyncio.create_task(rig.work(engine, ids=6, tasks=6, moves=30))
            while not working.done():
                # Every read finds Redis without a copy, and copies what the truth held a moment ago.
                await store.client.execute_command("UNLINK", *(f"{rig.prefix}k.{n:02}" for n in range(6)))
                rig.figures.faults += 1
                await asyncio.gather(*(engine.get(f"k.{n:02}") for n in range(6)))
            await working
            await engine.flush()
            # Keys that vanish behind the script's back stay in their state sets.
            await rig.read_back(engine, l2_exact=False, l2_states=False)
    await store.close()
    rig.figures.tell(f"22 deletes against reads that fill Redis, {server_kind}")


async def test_an_item_kept_out_of_redis_stays_out_when_its_state_changes_before_the_older_copy_is_gone(
    make_rig: MakeRig, server: RunningRedis
) -> None:
    # Both writes wait for Redis and reach it in one batch, where the change of state speaks for the id.
    rig = make_rig(redis_url=server.url)
    async with SyncEngine(rig.config(redis_response_timeout_ms=200)) as engine:
        await engine.submit(SyncItem("a", b"in both"), ack=Ack.STORED)
        await server.pause()
        await engine.submit(SyncItem("a", b"in SQL alone"), SubmitOptions.durable())
        await until(lambda: engine.stats().lanes["l3"].waiting == 0)
        await engine.set_state("a", "hot")
        await until(lambda: engine.stats().lanes["l3"].waiting == 0)
        await server.resume()
        await engine.flush()
    store = await RedisStore.connect(server.url, rig.prefix)
    assert await store.get("a") is None
    await store.close()


# Callers that go away


@each_kind_and_truth
async def test_callers_cancelled_at_any_step_leave_nothing_half_done(
    make_rig: MakeRig, server_kind: RedisKind, kind_url: str, truth: Truth
) -> None:
    rig = make_rig(redis_url=kind_url)
    async with SyncEngine(rig.config()) as engine:
        await rig.work(engine, moves=1)
        await engine.flush()
        await asyncio.sleep(0.05)
        idle = len(asyncio.all_tasks())
        for steps in range(0, 80, 1 if thorough(server_kind, truth) else 3):
            working = asyncio.create_task(rig.work(engine, moves=None))
            for _ in range(steps):
                await asyncio.sleep(0)
            working.cancel()
            await asyncio.wait({working})
            rig.figures.faults += 1
        await engine.flush()
        await rig.read_back(engine)
        assert engine.stats().pending == engine.stats().log_records == 0
        await until(lambda: len(asyncio.all_tasks()) <= idle)
    rig.figures.tell(f"16 callers cancelled after k steps, {server_kind}")


# What a tier refuses


REFUSALS = [
    *(pytest.param(kind, "sqlite", "l2", id=f"{kind}-l2") for kind in KINDS.values()),
    *(pytest.param(KINDS["redis-8-modules"], name, "l3", id=f"{name}-l3") for name in NAMES),
]


@pytest.mark.parametrize(("server_kind", "truth", "tier"), REFUSALS, indirect=["truth"])
async def test_I7_a_refused_item_is_set_aside_and_its_neighbours_go_through(
    make_rig: MakeRig, server_kind: RedisKind, kind_url: str, truth: Truth, tier: str
) -> None:
    rig = make_rig(redis_url=kind_url)
    async with SyncEngine(rig.config()) as engine:
        await engine.flush()
        if tier == "l3":
            await trigger(rig, "poison", "{id} LIKE 'poison%'", then="refused by the test")
        else:
            l2 = await RedisStore.connect(kind_url, rig.prefix)
            for n in range(3):
                await l2.client.execute_command("RPUSH", f"{rig.prefix}poison.{n}", "not an item")
            await l2.close()
        working = asyncio.create_task(rig.work(engine))
        bad = [await engine.submit(SyncItem(f"poison.{n}", b"%d" % n)) for n in range(3)]
        with pytest.raises(StoreError):
            await engine.submit(SyncItem("poison.0", b"again"), ack=Ack.STORED)
        await working
        await engine.flush()
        for receipt in bad[1:]:
            with pytest.raises(StoreError):
                await receipt.stored()
        rig.figures.faults = engine.stats().quarantined
        assert rig.figures.faults == 3
        assert engine.stats().pending == engine.stats().log_records == 0
        await rig.read_back(engine)
    async with SyncEngine(rig.config()) as engine:
        for n in range(3):
            assert (await engine.status(f"poison.{n}")).quarantined
            assert (await engine.get(f"poison.{n}")).content == (b"%d" % n if n else b"again")
        await rig.work(engine)
        await engine.flush()
        await rig.read_back(engine)
    rig.figures.tell(f"17 items that {tier} refuses, {server_kind}")
