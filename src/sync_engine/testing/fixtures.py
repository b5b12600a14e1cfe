"""Fixtures for pytest: real servers, Redis of every kind and databases, some to be killed; names nobody shares.

Use them with ``pytest_plugins = ["sync_engine.testing.fixtures"]`` in the top ``conftest.py``. They need no plugin
for asyncio, and a server started here serves any event loop. Where what a server needs is missing, every test that
asks for one fails and says what to install; none is skipped.

Servers of the session (one per pytest-xdist worker, started when first asked for) are shared: put ``redis_prefix``
before every key, and neither kill nor flush them. What begins with ``own_`` belongs to one test.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar
from uuid import uuid4

import pytest

from sync_engine._server_process import Startable
from sync_engine.embedded import EmbeddedRedis
from sync_engine.errors import ConfigError
from sync_engine.testing.clusters import ClusterSet
from sync_engine.testing.databases import RunningDatabase, RunningMariaDB, RunningPostgres
from sync_engine.testing.sentinels import SentinelSet
from sync_engine.testing.servers import KINDS, RedisKind, RunningRedis, acl_rule, tls_files

__all__ = [
    "StartCluster",
    "StartDatabase",
    "StartKind",
    "StartRedis",
    "StartSentinel",
    "kind_server",
    "kind_servers",
    "kind_url",
    "mariadb_server",
    "own_cluster",
    "own_database",
    "own_kind",
    "own_redis",
    "own_sentinel",
    "postgres_server",
    "redis_acl",
    "redis_cluster",
    "redis_prefix",
    "redis_sentinel",
    "redis_server",
    "redis_tls",
    "redis_url",
    "server_kind",
    "sql_url",
    "sqlite_url",
]

StartRedis = Callable[..., Coroutine[Any, Any, EmbeddedRedis]]
"""``server = await own_redis(**arguments of EmbeddedRedis)``."""
StartKind = Callable[..., Coroutine[Any, Any, RunningRedis]]
"""``server = await own_kind(kind, **arguments of RunningRedis)``; the kind may be given by its name."""
StartSentinel = Callable[..., Coroutine[Any, Any, SentinelSet]]
"""``servers = await own_sentinel(**arguments of SentinelSet)``."""
StartCluster = Callable[..., Coroutine[Any, Any, ClusterSet]]
"""``cluster = await own_cluster(**arguments of ClusterSet)``."""

StartDatabase = Callable[..., Coroutine[Any, Any, RunningDatabase]]
"""``server = await own_database("mariadb", **arguments of RunningMariaDB)``, or ``"postgresql"``."""

DATABASES = {"mariadb": RunningMariaDB, "postgresql": RunningPostgres}

PREFIX = "t"
"""What every ``redis_prefix`` begins with."""


S = TypeVar("S", bound=Startable)
R = TypeVar("R")


@pytest.fixture(scope="session")
def redis_server() -> Iterator[EmbeddedRedis]:
    """The session's Redis 8.2 with modules, on a Unix socket. Not to be killed: see ``own_redis``."""
    yield from _for_the_session(EmbeddedRedis(extra_args=("--enable-debug-command", "yes")))


@pytest.fixture
def redis_url(redis_server: EmbeddedRedis) -> str:
    """The session server's URL. Other tests write there too: put ``redis_prefix`` before every key."""
    return redis_server.url


@pytest.fixture
def redis_prefix() -> str:
    """A key prefix that no other test has; nothing has to be cleaned up behind it."""
    return f"{PREFIX}{uuid4().hex}:"


@pytest.fixture
def own_redis() -> Iterator[StartRedis]:
    """Starts servers that belong to this test alone, to be killed, paused, emptied; all end with the test."""
    debug = {"extra_args": ("--enable-debug-command", "yes")}
    yield from _starter(lambda modules=True, **arguments: EmbeddedRedis(modules, **debug | arguments))


@pytest.fixture(scope="session", params=KINDS.values(), ids=str)
def server_kind(request: pytest.FixtureRequest) -> RedisKind:
    """Every kind of server that users run, one after the other."""
    kind: RedisKind = request.param
    return kind


@pytest.fixture(scope="session")
def kind_servers() -> Iterator[Callable[[RedisKind], RunningRedis]]:
    """The session's server of a kind: ``kind_servers(KINDS["valkey-9"])``."""
    servers: dict[RedisKind, RunningRedis] = {}

    def of(kind: RedisKind) -> RunningRedis:
        if kind not in servers:
            server = RunningRedis(kind)
            _run(_started(server))
            servers[kind] = server
        return servers[kind]

    yield of
    for server in servers.values():
        _run(server.stop())


@pytest.fixture
def kind_server(server_kind: RedisKind, kind_servers: Callable[[RedisKind], RunningRedis]) -> RunningRedis:
    """The session's server of each kind."""
    return kind_servers(server_kind)


@pytest.fixture
def kind_url(kind_server: RunningRedis) -> str:
    """Its URL."""
    return kind_server.url


@pytest.fixture
def own_kind() -> Iterator[StartKind]:
    """Starts servers of a kind that belong to this test alone; all end with the test."""
    yield from _starter(lambda kind, **arguments: RunningRedis(KINDS.get(kind, kind), **arguments))


@pytest.fixture(scope="session")
def redis_acl() -> Iterator[RunningRedis]:
    """The session's server with a user who may do little, and that on keys of ``redis_prefix`` alone.

    ``url_as(*ACL_USER)`` is that user's URL, ``url`` that of one who may do everything.
    """
    yield from _for_the_session(RunningRedis(KINDS["redis-8-modules"], users=[acl_rule(f"{PREFIX}*")]))


@pytest.fixture(scope="session")
def redis_tls(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningRedis]:
    """The session's server with TLS, at ``tls_url``; its certificate is for 127.0.0.1 and localhost."""
    yield from _for_the_session(RunningRedis(KINDS["redis-7"], tls=tls_files(tmp_path_factory.mktemp("tls"))))


@pytest.fixture(scope="session")
def redis_sentinel() -> Iterator[SentinelSet]:
    """The session's primary, replica and sentinels; a stall of the machine is no reason for them to fail over."""
    yield from _for_the_session(SentinelSet(down_after_ms=20_000))


@pytest.fixture
def own_sentinel() -> Iterator[StartSentinel]:
    """Starts sentinels and what they watch, to fail over as a test likes."""
    yield from _starter(SentinelSet)


@pytest.fixture(scope="session")
def redis_cluster() -> Iterator[ClusterSet]:
    """The session's cluster of 3 primaries and 3 replicas; a stall of the machine is no reason to fail over."""
    yield from _for_the_session(ClusterSet(node_timeout_ms=20_000))


@pytest.fixture
def own_cluster() -> Iterator[StartCluster]:
    """Starts clusters whose slots are moved and whose nodes are killed by this test; 2 s each."""
    yield from _starter(ClusterSet)


@pytest.fixture
def sqlite_url(tmp_path: Path) -> str:
    """URL of a SQLite file that does not exist yet."""
    return f"sqlite:///{tmp_path / 'truth.db'}"


@pytest.fixture(scope="session")
def mariadb_server() -> Iterator[RunningMariaDB]:
    """The session's MariaDB. Not to be killed: see ``own_database``."""
    yield from _for_the_session(RunningMariaDB())


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[RunningPostgres]:
    """The session's PostgreSQL. Not to be killed: see ``own_database``."""
    yield from _for_the_session(RunningPostgres())


@pytest.fixture(params=["sqlite", *DATABASES])
def sql_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """URL of an empty database of this test's own, in each kind that there is."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path / 'truth.db'}"
        return
    server: RunningDatabase = request.getfixturevalue(
        {"mariadb": "mariadb_server"}.get(request.param, "postgres_server")
    )
    url = _run(server.database())
    yield url
    _run(server.drop(url))


@pytest.fixture
def own_database() -> Iterator[StartDatabase]:
    """Starts database servers that belong to this test alone, to be killed and paused; all end with the test."""
    yield from _starter(lambda kind, **arguments: DATABASES[kind](**arguments))


def _for_the_session(server: S) -> Iterator[S]:
    _run(_started(server))
    yield server
    _run(server.stop())


def _starter(make: Callable[..., S]) -> Iterator[Callable[..., Coroutine[Any, Any, S]]]:
    servers: list[S] = []

    async def start(*arguments: Any, **named: Any) -> S:
        server = make(*arguments, **named)
        servers.append(server)
        await _started(server)
        return server

    yield start
    for server in servers:
        _run(server.stop())


async def _started(server: Startable) -> None:
    try:
        await server.start()
    except ConfigError as error:
        pytest.fail(str(error), pytrace=False)


def _run(work: Coroutine[Any, Any, R]) -> R:
    # On a thread of its own: what asks for a server may do so within a test, whose loop is running on this one.
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(_run_here, work).result()


def _run_here(work: Coroutine[Any, Any, R]) -> R:
    with asyncio.Runner(loop_factory=asyncio.new_event_loop) as runner:
        return runner.run(work)
