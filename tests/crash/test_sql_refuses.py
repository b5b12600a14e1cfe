"""The database has no room, takes no writes, or has another schema (fault matrix 10)."""

from __future__ import annotations

import asyncio
import random
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from sync_engine import SubmitOptions, SyncEngine, SyncItem, TierUnavailable
from sync_engine.testing.databases import PASSWORD, RunningDatabase, ask
from sync_engine.testing.fixtures import StartDatabase

from .rig import MakeRig, Rig, until, until_well
from .truths import SERVERS, ServerTruth, Truth, each_truth

KIB = 1024
DISK_MIB = 320
"""Room for an empty MariaDB with its files for the log, and for PostgreSQL."""
HURRIED = {"sql_timeout_ms": 200, "batch_flush_ms": 2}


@pytest.fixture
def small_disk() -> Iterator[Path]:
    """A file system in memory that is soon full."""
    path = Path(tempfile.mkdtemp(prefix="sync-disk-", dir="/tmp"))
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_MIB}m,mode=755", "none", path]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        path.rmdir()
        pytest.skip("mounting needs root")
    yield path
    subprocess.run(["umount", "--lazy", path], check=True)
    path.rmdir()


async def on_disk(rig: Rig, name: str, disk: Path, own_database: StartDatabase) -> RunningDatabase | None:
    """Put the truth of this rig on that disk; its server."""
    if name == "sqlite":
        rig.settings["sql_url"] = f"sqlite:///{disk / 'truth.db'}"
        return None
    server = await own_database(name, durable=True, within=disk)
    rig.settings["sql_url"] = await server.database()
    rig.figures.truth = server.what
    return server


def fill(disk: Path) -> Path:
    """Take what room there is."""
    ballast = disk / "ballast"
    with ballast.open("wb", buffering=0) as file:
        try:
            while file.write(bytes(64 * KIB)):
                pass
        except OSError:
            pass
    return ballast


async def flushed(engine: SyncEngine, server: RunningDatabase | None) -> float:
    """Flush; a server that gave up for want of room is started again. The milliseconds that it took."""
    begun_s = time.monotonic()
    async with asyncio.timeout(90):
        while True:
            if server is not None and not server.running:
                await server.start()
            try:
                await engine.flush(2)
            except TierUnavailable:
                continue
            return (time.monotonic() - begun_s) * 1000


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sqlite", *(pytest.param(name, marks=pytest.mark.long) for name in SERVERS)])
async def test_I3_a_full_disk_of_the_database_refuses_no_write_and_loses_none(
    make_rig: MakeRig, name: str, small_disk: Path, own_database: StartDatabase
) -> None:
    rig, rng = make_rig(), random.Random(10)
    server = await on_disk(rig, name, small_disk, own_database)
    recovery_ms, n = 0.0, 0
    async with SyncEngine(rig.config(**HURRIED)) as engine:
        await rig.work(engine)
        await engine.flush()
        for _ in range(3 if server is not None else 2):
            ballast = fill(small_disk)
            rig.figures.faults += 1
            working = asyncio.create_task(rig.work(engine, moves=10))
            async with asyncio.timeout(60):
                while engine.stats().lanes["l3"].trouble is None:
                    n += 1
                    await engine.submit(SyncItem(f"o.{n:05}", rng.randbytes(64 * KIB)), SubmitOptions.durable())
                    await asyncio.sleep(0.001)
            told = str(engine.stats().lanes["l3"].trouble)
            for _ in range(20):
                n += 1
                await engine.submit(SyncItem(f"o.{n:05}", b"while it is full"), SubmitOptions.durable())
            assert (await engine.get(f"o.{n:05}")).content == b"while it is full"
            ballast.unlink()
            recovery_ms = max(recovery_ms, await flushed(engine, server))
            await working
            await engine.flush()
            await until_well(engine)
            assert engine.stats().quarantined == 0, "a full disk is no item's fault"
            assert await engine.count_prefix("o.") == n
            await rig.read_back(engine)
    rig.figures.acked += n
    rig.figures.tell("10 SQL's disk is full", f"{told}; all stored {recovery_ms:.0f} ms after there was room at most")


@asynccontextmanager
async def no_writes(rig: Rig, truth: ServerTruth) -> AsyncIterator[None]:
    """To all but its administrator the server is read-only; or, PostgreSQL, the rights to write are taken away."""
    mysql = truth.url.startswith("mysql")
    try:
        if mysql:
            await ask(truth.url, "SET GLOBAL read_only = 1")
        else:
            await ask(truth.url, "REVOKE INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA public FROM eve")
        yield
    finally:
        if mysql:
            await ask(truth.url, "SET GLOBAL read_only = 0")
        else:
            await ask(truth.url, "GRANT INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA public TO eve")


async def eve(truth: ServerTruth) -> str:
    """The URL of a user who may use the tables that there are, and no more."""
    if truth.url.startswith("mysql"):
        database = truth.url.rpartition("/")[2]
        await ask(truth.server.url(), f"CREATE USER IF NOT EXISTS 'eve'@'%' IDENTIFIED BY '{PASSWORD}'")
        await ask(truth.server.url(), f"GRANT ALL PRIVILEGES ON {database}.* TO 'eve'@'%'")
    else:
        await ask(truth.url, "DROP ROLE IF EXISTS eve")
        await ask(truth.url, f"CREATE ROLE eve LOGIN PASSWORD '{PASSWORD}'")
        await ask(truth.url, "GRANT ALL ON ALL TABLES IN SCHEMA public TO eve")
    return truth.url.replace("://ada:", "://eve:")


@pytest.mark.slow
@pytest.mark.parametrize("truth", SERVERS, indirect=True)
async def test_I3_a_database_that_takes_no_writes_for_a_while_gets_them_later(
    make_rig: MakeRig, truth: ServerTruth
) -> None:
    rig = make_rig()
    async with SyncEngine(rig.config()) as engine:
        await engine.flush()  # there are tables now
    async with SyncEngine(rig.config(**HURRIED, sql_url=await eve(truth))) as engine:
        await rig.work(engine)
        await engine.flush()
        for _ in range(3 if truth.long else 1):
            async with no_writes(rig, truth):
                rig.figures.faults += 1
                working = asyncio.create_task(rig.work(engine, moves=15))
                await until(lambda: engine.stats().lanes["l3"].trouble is not None)
                told = str(engine.stats().lanes["l3"].trouble)
            await working
            await engine.flush()
            await until_well(engine)
            assert engine.stats().quarantined == 0
            await rig.read_back(engine)
    await ask(truth.url, "DROP OWNED BY eve" if truth.name == "PostgreSQL" else "SELECT 1")
    rig.figures.tell("10 SQL takes no writes", told)


async def test_I3_an_engine_that_starts_on_a_read_only_file_stores_once_it_may(
    make_rig: MakeRig, small_disk: Path, own_database: StartDatabase
) -> None:
    rig = make_rig()
    await on_disk(rig, "sqlite", small_disk, own_database)
    async with SyncEngine(rig.config(**HURRIED)) as engine:
        await rig.work(engine)
        await engine.flush()
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    async with SyncEngine(rig.config(**HURRIED)) as engine:
        rig.figures.faults += 1
        working = asyncio.create_task(rig.work(engine))
        await until(lambda: engine.stats().lanes["l3"].trouble is not None)
        told = str(engine.stats().lanes["l3"].trouble).rpartition(": ")[2]
        subprocess.run(["mount", "-o", "remount,rw", small_disk], check=True)
        await working
        await engine.flush()
        await until_well(engine)
        assert engine.stats().quarantined == 0
        await rig.read_back(engine)
    rig.figures.tell("10 SQL takes no writes", told)


@each_truth
async def test_I3_a_table_that_somebody_changes_costs_nothing_once_it_is_changed_back(
    make_rig: MakeRig, truth: Truth
) -> None:
    rig = make_rig()
    async with SyncEngine(rig.config(**HURRIED)) as engine:
        await rig.work(engine)
        await engine.flush()
        for _ in range(4 if truth.long else 1):
            await ask(rig.sql_url, "ALTER TABLE sync_items RENAME COLUMN payload TO somebody_elses")
            rig.figures.faults += 1
            working = asyncio.create_task(rig.work(engine, moves=10))
            await until(lambda: engine.stats().lanes["l3"].trouble is not None)
            told = str(engine.stats().lanes["l3"].trouble)
            await ask(rig.sql_url, "ALTER TABLE sync_items RENAME COLUMN somebody_elses TO payload")
            await working
            await engine.flush()
            await until_well(engine)
            assert engine.stats().quarantined == 0, "another schema is no item's fault"
            await rig.read_back(engine)
    rig.figures.tell("10 SQL has another schema for a while", told)
