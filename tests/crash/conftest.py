"""Fixtures of the crash tests: the program to kill, and one scenario's folder, journal and account."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from sync_engine.testing.fixtures import StartKind
from sync_engine.testing.servers import RedisKind, RunningRedis

from .rig import Drivers, MakeRig, Rig


@pytest.fixture(scope="session")
def drivers() -> Iterator[Drivers]:
    """The process whose forks are killed, for all tests of this session."""
    running = Drivers()
    yield running
    running.close()


@pytest.fixture
def make_rig(tmp_path: Path, drivers: Drivers, redis_url: str, redis_prefix: str) -> Iterator[MakeRig]:
    """Makes scenarios; without ``redis_url`` on the session's Redis, with ``redis_url=None`` on none."""
    made: list[Rig] = []

    def make(seed: int = 1, **redis: str | None) -> Rig:
        url = redis.get("redis_url", redis_url)
        path = tmp_path / f"rig{len(made)}"
        path.mkdir()
        made.append(Rig(path, drivers, url, f"{redis_prefix}{len(made)}:", seed))
        return made[-1]

    yield make
    for rig in made:
        rig.close()


@pytest.fixture
async def server(server_kind: RedisKind, own_kind: StartKind) -> RunningRedis:
    """A server of each kind that this test alone has, to be killed, paused, emptied."""
    return await own_kind(server_kind)
