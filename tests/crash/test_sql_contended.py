"""Several engines and strangers on the rows of one database: locks, deadlocks, serialization failures, a zombie writer.

Rows 9 and 21 of the fault matrix. Who wins is decided by stamps, whatever the order in which they arrive.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
from contextlib import AsyncExitStack

import pytest

from sync_engine import SyncEngine
from sync_engine.errors import SyncEngineError
from sync_engine.storage.sql.words import Said
from sync_engine.testing.databases import ask
from sync_engine.testing.proxy import CuttingProxy

from .driver import STORED, contend
from .rig import NO_L1, Drivers, MakeRig, Rig, until
from .stamped import Stamps
from .truths import ServerTruth, Truth, each_server, each_truth, stranger, trigger, untrigger

ENGINES = 6
IDS = 24


async def six(rig: Rig, stack: AsyncExitStack, **settings: object) -> list[SyncEngine]:
    """Engines of one database and one Redis, each with a log of its own."""
    engines = [
        SyncEngine(rig.config(**NO_L1, data_dir=str(rig.path / f"engine{n}"), sql_url=rig.sql_url, **settings))
        for n in range(ENGINES)
    ]
    for engine in engines:
        await stack.enter_async_context(engine)
    return engines


async def settled(rig: Rig, engines: list[SyncEngine], stamps: Stamps) -> None:
    """All have flushed; then every tier, and what every engine reads, agrees with the account."""
    await asyncio.gather(*(engine.flush(60) for engine in engines))
    stamps.take(await rig.lines(), rig.figures)
    await stamps.judge(rig, *engines)
    assert all(engine.stats().quarantined == 0 for engine in engines)


@pytest.mark.slow
@each_server
async def test_I1_six_engines_and_a_stranger_who_locks_rows_in_the_other_order(
    make_rig: MakeRig, truth: ServerTruth
) -> None:
    rig, rng, stamps = make_rig(), random.Random(9), Stamps()
    before = await truth.status(*DEADLOCKS)
    ended = 0
    async with AsyncExitStack() as stack:
        engines = await six(rig, stack, sql_timeout_ms=1_000)
        writing = [
            asyncio.create_task(contend(engine, rig.journal, who, IDS, 60 if truth.long else 6))
            for who, engine in enumerate(engines)
        ]
        while not all(task.done() for task in writing):
            rig.figures.faults += 1
            ended += await _in_the_other_order(truth, rng)
        await asyncio.gather(*writing)
        await settled(rig, engines, stamps)
    deadlocks = await truth.status(*DEADLOCKS) - before
    share = 1000 * deadlocks / max(rig.figures.acked, 1)
    rig.figures.tell(
        "9 six engines, and a stranger who locks their rows in descending order",
        f"{deadlocks} deadlocks, {share:.1f} per 1,000 operations ({ended} ended the stranger's), none came to light",
    )


DEADLOCKS = ("Innodb_deadlocks", "SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()")


async def _in_the_other_order(truth: ServerTruth, rng: random.Random) -> int:
    """Locks some rows one by one, from the last to the first; 1 if the database gave this up for somebody else."""
    marks = "%s" if truth.url.startswith("mysql") else "$1"
    async with stranger(truth.url) as session:
        try:
            await session.begin()
            for n in sorted(rng.sample(range(IDS), 6), reverse=True):
                await session.rows(Said(f"SELECT id FROM sync_items WHERE id = {marks} FOR UPDATE", (f"c.{n:02}",)))
                await asyncio.sleep(0.005)
            await session.rollback()
        except SyncEngineError:
            await session.rollback()
            return 1
    return 0


@pytest.mark.slow
@each_truth
async def test_I3_what_a_stranger_has_locked_waits_and_nothing_else_does(make_rig: MakeRig, truth: Truth) -> None:
    rig, stamps = make_rig(), Stamps()
    async with AsyncExitStack() as stack:
        engines = await six(rig, stack, sql_timeout_ms=100)
        for _ in range(4 if truth.long else 1):
            writing = [
                asyncio.create_task(contend(engine, rig.journal, who, IDS, 8, seed=rig.figures.faults))
                for who, engine in enumerate(engines)
            ]
            working = asyncio.create_task(rig.work(engines[0], moves=10))
            async with truth.locked(rig):
                rig.figures.faults += 1
                await until(lambda: all(engine.stats().lanes["l3"].trouble for engine in engines))
                told = {str(engine.stats().lanes["l3"].trouble) for engine in engines}
            await asyncio.gather(*writing, working)
            await asyncio.gather(*(engine.flush(60) for engine in engines))
        lines = await rig.lines()
        rig.ledger.take(lines, rig.figures)
        rig.ledger.settle()
        stamps.take(lines, rig.figures)
        await stamps.judge(rig, *engines)
        await rig.read_back(engines[0])
    assert all("l3" in each or "lock" in each or "stopped" in each for each in told), told
    rig.figures.tell("9 six engines while a stranger keeps all writers out")


@pytest.mark.slow
@each_server
async def test_I1_serialization_failures_are_tried_again_and_leave_no_half_batch(
    make_rig: MakeRig, truth: ServerTruth
) -> None:
    """Some inserts end as the database would end them for another transaction's sake."""
    mysql = truth.url.startswith("mysql")
    # What a sequence has counted is not undone by a rollback.
    chance = "rand() < 0.03 AND nextval(unlucky) > 0" if mysql else "random() < 0.03 AND nextval('unlucky') > 0"
    rig, stamps = make_rig(), Stamps()
    async with AsyncExitStack() as stack:
        engines = await six(rig, stack, sql_timeout_ms=1_000)
        rounds = 60 if truth.long else 12
        await ask(truth.url, f"CREATE SEQUENCE unlucky{' NOCACHE' if mysql else ''}")
        await trigger(rig, "bad_luck", chance, "1213" if mysql else "40001", then="serialization failure")
        writing = [contend(engine, rig.journal, who, IDS, rounds) for who, engine in enumerate(engines)]
        await asyncio.gather(rig.work(engines[0], moves=2 * rounds), *writing)
        await asyncio.gather(*(engine.flush(60) for engine in engines))
        await untrigger(rig, "bad_luck")
        ((rig.figures.faults,),) = await ask(truth.url, COUNTED[truth.name])
        lines = await rig.lines()
        rig.ledger.take(lines, rig.figures)
        rig.ledger.settle()
        stamps.take(lines, rig.figures)
        await stamps.judge(rig, *engines)
        await rig.read_back(engines[0])
    assert rig.figures.faults > 0
    rig.figures.tell("9 six engines, some transactions end with a serialization failure", "none came to light")


COUNTED = {
    "MariaDB": "SELECT next_not_cached_value - 1 FROM unlucky",
    "PostgreSQL": "SELECT CASE WHEN is_called THEN last_value ELSE 0 END FROM unlucky",
}


# 21: a zombie


@pytest.fixture
def more_drivers() -> Drivers:
    """A second process whose forks write."""
    running = Drivers()
    yield running
    if running.pid:
        running.kill(signal.SIGKILL)
        running.ended()
    running.close()


@pytest.mark.slow
@each_truth
async def test_I1_a_writer_that_stood_still_in_the_middle_of_a_flush_passes_nothing_newer(
    make_rig: MakeRig, truth: Truth, more_drivers: Drivers
) -> None:
    rig, stamps, rng = make_rig(), Stamps(), random.Random(21)
    rig.settings |= {**NO_L1, "sql_timeout_ms": 300}
    rounds = 20 if truth.long else 1
    for round_ in range(rounds):
        async with AsyncExitStack() as stack:
            through = {}
            proxy = None
            if isinstance(truth, ServerTruth):
                proxy = await stack.enter_async_context(CuttingProxy(truth.url))
                through = {"sql_url": proxy.url_for(truth.url)}
            zombie = _start(rig, rig.drivers, 1, round_, **through)
            _start(rig, more_drivers, 2, round_)
            await _won(rig, stamps, 200)
            if proxy is not None:  # within a flush, at a byte of it
                proxy.call_after_request_bytes(rng.randrange(3_000), lambda pid=zombie: os.kill(pid, signal.SIGSTOP))
                await until(lambda pid=zombie: _stands_still(pid))
            else:
                await asyncio.sleep(rng.random() * 0.05)
                os.kill(zombie, signal.SIGSTOP)
            rig.figures.faults += 1
            await _won(rig, stamps, 200)  # the other one has overtaken it
            os.kill(zombie, signal.SIGCONT)
            if round_ % 3 == 2:
                rig.drivers.kill()
                rig.figures.faults += 1
            else:
                await _won(rig, stamps, 100)
                rig.drivers.kill(signal.SIGTERM)
            status = await asyncio.to_thread(rig.drivers.ended)
            assert status == (STORED if round_ % 3 != 2 else -signal.SIGKILL)
            more_drivers.kill(signal.SIGTERM)
            assert await asyncio.to_thread(more_drivers.ended) == STORED
        engines = [
            SyncEngine(rig.config(data_dir=str(rig.path / f"contender{who}"), sql_url=rig.sql_url)) for who in (1, 2)
        ]
        for engine in engines:  # what the killed one left in its log
            await engine.start()
        await asyncio.gather(*(engine.flush(60) for engine in engines))
        stamps.take(await rig.lines(), rig.figures)
        await stamps.judge(rig, *engines)
        for engine in engines:
            await engine.stop()
    rig.figures.tell("21 two processes, one stands still in the middle of a flush", "0 updates lost")


def _start(rig: Rig, drivers: Drivers, who: int, seed: int, **settings: object) -> int:
    rig.figures.lives += 1
    told = {"data_dir": str(rig.path / f"contender{who}"), "sql_url": rig.sql_url, **settings}
    config = rig.raw_config(**told)
    # Who waits for STORED waits for locks that the zombie holds; here the other one is to go on.
    work = {"who": who, "ids": IDS, "seed": seed, "stored": False}
    return drivers.start(config=config, journal=f"/proc/{os.getpid()}/fd/{rig.journal.fd}", contend=work)


async def _won(rig: Rig, stamps: Stamps, count: int) -> None:
    before = rig.figures.acked
    async with asyncio.timeout(60):
        while rig.figures.acked - before < count:
            stamps.take(await rig.lines(), rig.figures)


def _stands_still(pid: int) -> bool:
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()[0] == "T"
