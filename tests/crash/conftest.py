"""Fixtures of the crash tests: the program to kill, and one scenario's folder, journal and account."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from sync_engine import build
from sync_engine.ports import Clock
from sync_engine.resilience import Retries
from sync_engine.testing.databases import RunningDatabase, RunningMariaDB, RunningPostgres
from sync_engine.testing.fixtures import StartKind
from sync_engine.testing.proxy import CuttingProxy
from sync_engine.testing.servers import RedisKind, RunningRedis

from .rig import Drivers, MakeRig, Rig
from .truths import FileTruth, ServerTruth, Truth


@pytest.fixture(scope="session")
def drivers() -> Iterator[Drivers]:
    """The process whose forks are killed, for all tests of this session."""
    running = Drivers()
    yield running
    running.close()


@pytest.fixture(scope="session")
def mortal_servers() -> Iterator[dict[str, RunningDatabase]]:
    """Databases that scenarios kill and pause one after the other; each leaves them running. They sync commits."""
    servers: dict[str, RunningDatabase] = {
        "mariadb": RunningMariaDB(durable=True),
        # A deadlock is found after that time, of which there are many.
        "postgresql": RunningPostgres(durable=True, settings=("-c", "deadlock_timeout=100ms")),
    }
    yield servers
    for server in servers.values():
        asyncio.run(server.stop())


@pytest.fixture
async def truth(request: pytest.FixtureRequest, mortal_servers: dict[str, RunningDatabase]) -> AsyncIterator[Truth]:
    """The database of this test: SQLite, unless its parameter names another."""
    name, long = getattr(request, "param", "sqlite"), bool(request.config.getoption("--long"))
    if name == "sqlite":
        yield FileTruth(long)
        return
    server = mortal_servers[name]
    await server.start()
    url = await server.database()
    async with CuttingProxy(url) as proxy:
        yield ServerTruth(long, server, url, proxy)
    if server.running:  # a scenario that failed may have left it standing still
        await server.resume()
    await server.start()
    await server.drop(url)


@pytest.fixture
def make_rig(tmp_path: Path, drivers: Drivers, redis_url: str, redis_prefix: str, truth: Truth) -> Iterator[MakeRig]:
    """Makes scenarios; without ``redis_url`` on the session's Redis, with ``redis_url=None`` on none."""
    made: list[Rig] = []

    def make(seed: int = 1, **redis: str | None) -> Rig:
        url = redis.get("redis_url", redis_url)
        path = tmp_path / f"rig{len(made)}"
        path.mkdir()
        made.append(Rig(path, drivers, url, f"{redis_prefix}{len(made)}:", seed, truth))
        return made[-1]

    yield make
    for rig in made:
        rig.close()


@pytest.fixture
async def server(server_kind: RedisKind, own_kind: StartKind) -> RunningRedis:
    """A server of each kind that this test alone has, to be killed, paused, emptied."""
    return await own_kind(server_kind)


@pytest.fixture
def budgets(monkeypatch: pytest.MonkeyPatch) -> list[Retries]:
    """The budgets of retries of the engines that are made from here on: SQL's, then Redis'."""
    made: list[Retries] = []

    def make(clock: Clock) -> Retries:
        made.append(Retries(clock))
        return made[-1]

    monkeypatch.setattr(build, "Retries", make)
    return made
