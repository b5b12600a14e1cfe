"""Fixtures for pytest: a real Redis for the session, one to be killed, and addresses that no two tests share.

Use them with ``pytest_plugins = ["sync_engine.testing.fixtures"]`` in the top ``conftest.py``. They need no plugin
for asyncio, and a server started here serves any event loop. Where the server's packages are missing, every test
that asks for one fails and says what to install; none is skipped.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from sync_engine.embedded import EmbeddedRedis
from sync_engine.errors import ConfigError

__all__ = ["StartRedis", "own_redis", "redis_prefix", "redis_server", "redis_url", "sqlite_url"]

StartRedis = Callable[..., Coroutine[Any, Any, EmbeddedRedis]]
"""``server = await own_redis(**arguments of EmbeddedRedis)``."""


@pytest.fixture(scope="session")
def redis_server() -> Iterator[EmbeddedRedis]:
    """One Redis with modules for the whole session (per pytest-xdist worker). Not to be killed: see ``own_redis``."""
    server = EmbeddedRedis(extra_args=("--enable-debug-command", "yes"))
    _run(_started(server))
    yield server
    _run(server.stop())


@pytest.fixture
def redis_url(redis_server: EmbeddedRedis) -> str:
    """The session server's URL. Other tests write there too: put ``redis_prefix`` before every key."""
    return redis_server.url


@pytest.fixture
def redis_prefix() -> str:
    """A key prefix that no other test has; nothing has to be cleaned up behind it."""
    return f"t{uuid4().hex}:"


@pytest.fixture
def own_redis() -> Iterator[StartRedis]:
    """Starts servers that belong to this test alone, to be killed, paused, emptied; all end with the test."""
    servers: list[EmbeddedRedis] = []

    async def start(modules: bool = True, **arguments: Any) -> EmbeddedRedis:
        server = EmbeddedRedis(modules, **{"extra_args": ("--enable-debug-command", "yes")} | arguments)
        servers.append(server)
        await _started(server)
        return server

    yield start
    for server in servers:
        _run(server.stop())


@pytest.fixture
def sqlite_url(tmp_path: Path) -> str:
    """URL of a SQLite file that does not exist yet."""
    return f"sqlite:///{tmp_path / 'truth.db'}"


async def _started(server: EmbeddedRedis) -> None:
    try:
        await server.start()
    except ConfigError as error:
        pytest.fail(str(error), pytrace=False)


def _run(work: Coroutine[Any, Any, None]) -> None:
    # A loop of its own that is never made the thread's current one, so that no other plugin's loop is displaced.
    with asyncio.Runner(loop_factory=asyncio.new_event_loop) as runner:
        runner.run(work)
