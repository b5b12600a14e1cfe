"""The database is killed, silent, cut off or flapping under a working engine (fault matrix 5 to 8, 22, 24).

MariaDB and PostgreSQL are killed at a byte that the test chooses; SQLite has no server, there another process has the
file to itself. No time is asserted: those of the report are printed.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest

from sync_engine import Ack, SubmitOptions, SyncEngine, SyncItem, TierUnavailable
from sync_engine.resilience import BreakerPolicy, Retries, RetryBudget
from sync_engine.storage.sql.store import READERS

from .rig import NO_L1, MakeRig, Rig, timed_ms, until, until_well
from .truths import ServerTruth, Truth, each_server, each_truth

HURRIED = {"sql_timeout_ms": 100, "batch_flush_ms": 0}
BREAKER = BreakerPolicy()
BUDGET = RetryBudget()


# 8: killed


@pytest.mark.slow
@each_server
async def test_I3_the_database_is_killed_within_a_batch_wherever_it_is_cut(
    make_rig: MakeRig, truth: ServerTruth
) -> None:
    counts = (0, 1, 60, 400, 1_500, 4_000, 9_000, 20_000, 45_000) if truth.long else (700,)
    rig = make_rig()
    recovery_ms = 0.0
    async with SyncEngine(rig.config(**HURRIED, sql_url=truth.through)) as engine:
        await rig.work(engine)
        await engine.flush()
        for count in counts:
            for _ in range(3 if truth.long else 1):
                truth.proxy.call_after_request_bytes(count, truth.server.strike)
                working = asyncio.create_task(rig.work(engine, moves=25))
                await until(lambda working=working: not truth.server.running or working.done())
                await truth.vanish(rig)  # if the work was too short for so many bytes
                truth.proxy.heal()
                rig.figures.faults += 1
                await truth.come_back()
                recovery_ms = max(recovery_ms, await timed_ms(asyncio.gather(working, engine.flush())))
                await engine.flush()  # the work may have gone on behind the first
                await rig.read_back(engine)
    rig.figures.tell("8 killed after k bytes of requests", f"all stored {recovery_ms:.0f} ms after it was back at most")


async def stored(engine: SyncEngine, version: int) -> None:
    """One compare-and-set, alone in its transaction: tried again after an unknown outcome, it must see its own."""
    item = SyncItem("cas", b"%06d" % version, version=version)
    await engine.submit(item, SubmitOptions(redis=False, if_version=version - 1), ack=Ack.STORED)


@pytest.mark.slow
@each_server
@pytest.mark.parametrize("how", ["killed", "cut off"])
async def test_I3_a_commit_of_unknown_outcome_counts_once(make_rig: MakeRig, truth: ServerTruth, how: str) -> None:
    """At every byte from the last ones before COMMIT to the last one of its answer."""
    kill, proxy = how == "killed", truth.proxy
    rig = make_rig(redis_url=None)
    places = range(0, 20, 2 if kill else 1) if truth.long else (0, 9)[: 1 if kill else 2]
    version = 0
    async with SyncEngine(rig.config(**HURRIED, sql_url=truth.through)) as engine:
        for place in places:
            for _ in range(2):  # the first makes the connection anew
                before, version = (proxy.bytes_up, proxy.bytes_down), version + 1
                await stored(engine, version)
            up, down = proxy.bytes_up - before[0], proxy.bytes_down - before[1]
            if kill:
                proxy.call_after_request_bytes(up - place, truth.server.strike)
            else:
                proxy.cut_after_reply_bytes(down - place)
            version += 1
            storing = asyncio.create_task(stored(engine, version))
            if kill:
                await until(lambda: not truth.server.running)
                await truth.vanish(rig)
                await truth.come_back()
            await storing
            rig.figures.faults += 1
            item = await engine.get("cas")
            assert item is not None
            assert (item.content, item.version) == (b"%06d" % version, version)
        await rig.work(engine)
        await engine.flush()
        await rig.read_back(engine)
        assert engine.stats().quarantined == 0, "it took its own write for another's"
    rig.figures.acked += version
    assert proxy.cuts == (0 if kill else len(places))
    rig.figures.tell(f"8 {how} within a commit", f"{len(places)} commits of unknown outcome, all resolved")


# 6: cut replies


@pytest.mark.slow
@each_server
async def test_a_cut_reply_of_the_database_reaches_nobody_else(make_rig: MakeRig, truth: ServerTruth) -> None:
    counts = (*range(0, 24, 2), 50, 120, 400, 1_000, 3_000, 9_000) if truth.long else (0, 9, 400)
    rig = make_rig(redis_url=None)
    wrong = right = 0
    async with SyncEngine(rig.config(**HURRIED, **NO_L1, sql_url=truth.through)) as engine:
        await engine.submit_many([SyncItem(f"r.{n}", b"only %d" % n) for n in range(50)], ack=Ack.STORED)
        for count in counts:
            truth.proxy.cut_after_reply_bytes(count)
            working = asyncio.create_task(rig.work(engine, moves=6))
            while not working.done():
                answers = await asyncio.gather(*(engine.get(f"r.{n}") for n in range(50)), return_exceptions=True)
                for n, answer in enumerate(answers):
                    if isinstance(answer, TierUnavailable):
                        continue
                    mine = isinstance(answer, SyncItem) and answer.content == b"only %d" % n
                    wrong, right = wrong + (not mine), right + mine
            await working
        rig.figures.faults = truth.proxy.cuts
        truth.proxy.heal()
        await engine.flush()
        await rig.read_back(engine)
    rig.figures.tell("6 replies of SQL cut after j bytes", f"{right} answers right, {wrong} wrong")
    assert wrong == 0
    assert rig.figures.faults >= len(counts) // 2


# 5, 7: silent


@asynccontextmanager
async def standing_still(truth: ServerTruth) -> AsyncIterator[None]:
    await truth.server.pause()
    yield
    await truth.server.resume()


@asynccontextmanager
async def swallowed(truth: ServerTruth) -> AsyncIterator[None]:
    truth.proxy.blackhole()
    yield
    truth.proxy.heal()


@asynccontextmanager
async def slow(truth: ServerTruth) -> AsyncIterator[None]:
    truth.proxy.delay(0.2)
    yield
    truth.proxy.heal()


SILENCES = [
    pytest.param(fault, id=fault.__name__, marks=[] if fault is slow else pytest.mark.long)
    for fault in (standing_still, swallowed, slow)  # the first two cost the 6 s after which a server is taken for gone
]


@pytest.mark.slow
@each_server
@pytest.mark.parametrize("fault", SILENCES)
async def test_I4_a_silent_database_stops_no_write_and_no_read_of_what_is_nearer(
    make_rig: MakeRig, truth: ServerTruth, fault: Callable[..., AsyncIterator[None]]
) -> None:
    rig = make_rig()
    get_ms, submit_ms, unknown_ms = 0.0, 0.0, 0.0
    async with SyncEngine(rig.config(**HURRIED, **NO_L1, sql_url=truth.through)) as engine:
        await rig.work(engine)
        items = [SyncItem(f"n.{n:02}", b"in Redis too") for n in range(20)]
        await engine.submit_many(items, ack=Ack.STORED)
        await engine.flush()
        async with fault(truth):
            rig.figures.faults += 1
            unknown = asyncio.create_task(timed_ms(_unknown(engine, fault is slow)))
            for n, item in enumerate(items):
                submit_ms = max(submit_ms, await timed_ms(engine.submit(SyncItem(f"d.{n}", b"%d" % n))))
                get_ms = max(get_ms, await timed_ms(engine.get(item.object_id)))
                assert await engine.get(item.object_id) == item
                assert (await engine.get(f"d.{n}")).content == b"%d" % n
            unknown_ms = await unknown
        recovery_ms = await timed_ms(engine.flush(60))
        await until_well(engine)
        assert len(await engine.get_many([f"d.{n}" for n in range(20)])) == 20
        await rig.work(engine)
        await engine.flush()
        await rig.read_back(engine)
    told = f"get {get_ms:.0f} ms, submit {submit_ms:.0f} ms, what SQL alone knows {unknown_ms:.0f} ms at most"
    rig.figures.tell(
        f"5, 7 SQL silent: {fault.__name__.replace('_', ' ')}", f"{told}; all stored {recovery_ms:.0f} ms after it"
    )


async def _unknown(engine: SyncEngine, slow: bool) -> None:
    if slow:
        assert await engine.get("nowhere") is None
        return
    with pytest.raises(TierUnavailable):
        await engine.get("nowhere")


# 22: deletes


@pytest.mark.slow
@each_truth
async def test_I1_deletes_while_the_database_goes_are_not_undone_when_it_comes(make_rig: MakeRig, truth: Truth) -> None:
    rig = make_rig()
    rng_ids = [f"x.{n:03}" for n in range(60)]
    server = isinstance(truth, ServerTruth)
    url = {"sql_url": truth.through} if server else {}
    for round_ in range(10 if truth.long else 1):
        async with SyncEngine(rig.config(**HURRIED, **NO_L1, **url)) as engine:
            await engine.submit_many([SyncItem(each, b"%d" % round_) for each in rng_ids], ack=Ack.STORED)
            working = asyncio.create_task(rig.work(engine, moves=15))
            # Some deletes meet a put of their own id that still waits, some the end of the server on their way.
            await engine.submit_many([SyncItem(each, b"again") for each in rng_ids[::3]])
            if server:
                truth.proxy.call_after_request_bytes(500 + 700 * round_, truth.server.strike)
            assert await engine.delete_many(rng_ids[:40]) == 40
            await truth.vanish(rig)
            rig.figures.faults += 1
            assert await engine.delete_many(rng_ids[40:50]) == 10
            for each in rng_ids[:50]:
                assert await engine.get(each) is None, "a delete was undone"
            if server:
                truth.proxy.heal()  # before anything reconnects: the next start is to stand
            await truth.come_back()
            await working
            if round_ % 2:
                await engine.flush()  # otherwise the log brings the deletes at the next start
        async with SyncEngine(rig.config(**HURRIED, **NO_L1, **url)) as engine:
            rig.figures.acked += 130
            await engine.flush()
            await until_well(engine)
            assert sorted(await engine.get_many(rng_ids)) == rng_ids[50:]
            assert [item.object_id for item in await engine.scan_prefix("x.")] == rng_ids[50:]
            await rig.read_back(engine)
    rig.figures.tell("22 deletes while SQL goes and comes", "0 items came back")


# 24: flapping


@pytest.mark.slow
@each_truth
async def test_I3_a_flapping_database_costs_a_bounded_number_of_attempts(
    make_rig: MakeRig, truth: Truth, budgets: list[Retries]
) -> None:
    rig = make_rig()
    times = 12 if truth.long else 1
    url = {"sql_url": truth.through} if isinstance(truth, ServerTruth) else {}
    async with SyncEngine(rig.config(**HURRIED, **NO_L1, **url)) as engine:
        await rig.work(engine)
        await engine.flush()
        attempts, begun_s = _attempts(truth), time.monotonic()
        answers = budgets[0].answers
        working = asyncio.create_task(_busy(rig, engine))
        for _ in range(times):  # once a second
            await _away(truth, rig)
            await asyncio.sleep(0.5)
            await _there(truth)
            rig.figures.faults += 1
            await asyncio.sleep(0.5)
        attempts, lasted_s = _attempts(truth) - attempts, time.monotonic() - begun_s
        retries, answers = engine.stats().lanes["l3"].retries, budgets[0].answers - answers
        working.cancel()
        await asyncio.wait({working})
        await engine.flush()
        await until_well(engine)
        await rig.read_back(engine)
    counted = f", {attempts / lasted_s:.1f} connections" if isinstance(truth, ServerTruth) else ""
    rig.figures.tell("24 SQL flaps once a second", f"{retries / lasted_s:.1f} retries{counted} a second")
    earned = BUDGET.per_answer * answers  # which SQL gives while it is there
    assert 0 < retries <= BUDGET.burst + lasted_s * BUDGET.per_s + earned + 1  # one that waits has not been made
    # Each time the connections that there are, and what fails of them as often as a breaker allows.
    assert attempts <= times * (READERS + 1 + BREAKER.failures_max) + lasted_s / BREAKER.rest_s


async def _busy(rig: Rig, engine: SyncEngine) -> None:
    while True:
        await rig.work(engine, moves=10)
        await asyncio.gather(*(engine.get(f"nobody.{n}") for n in range(10)), return_exceptions=True)


def _attempts(truth: Truth) -> int:
    return truth.proxy.connections if isinstance(truth, ServerTruth) else 0


async def _away(truth: Truth, rig: Rig) -> None:
    if isinstance(truth, ServerTruth):
        truth.proxy.cut_now()
        truth.proxy.refuse()
    else:
        await truth.vanish(rig)


async def _there(truth: Truth) -> None:
    if isinstance(truth, ServerTruth):
        truth.proxy.heal()
    else:
        await truth.come_back()
