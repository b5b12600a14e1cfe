"""The connections to a real server: TLS, users, databases, sockets; which server it is; bounds, cancels, what waits."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any, cast

import pytest

from sync_engine.errors import ConfigError, NotRunning, StoreError, SyncEngineError, TierUnavailable
from sync_engine.item import SyncItem
from sync_engine.storage.redis import RedisStore
from sync_engine.storage.redis.address import servers_of
from sync_engine.storage.redis.connect import CONNECTIONS_MAX, Line
from sync_engine.storage.redis.pool import Pool
from sync_engine.testing.fixtures import StartKind
from sync_engine.testing.proxy import CuttingProxy
from sync_engine.testing.servers import ACL_USER, KINDS, RunningRedis, ask, tls_files

CANARY = "canary-31c8"
PLAIN = "valkey-9"
WITHOUT_INFO = "ada on >pw ~p:* +@read +@write +@scripting +@connection"


def line_to(url: str, on_new_server: Callable[[], None] | None = None, timeout_ms: int = 5_000, **named: Any) -> Line:
    bounds = {"timeout_ms": timeout_ms, "response_timeout_ms": 5_000} | named
    line = cast(Line, servers_of(url, "p:", on_new_server=on_new_server, **bounds))
    opened.append(line)
    return line


opened: list[Line] = []


@pytest.fixture(autouse=True)
async def _lines_of_a_failed_test_are_closed_as_well() -> AsyncIterator[None]:
    yield
    while opened:
        await opened.pop().close()


def pool_of(line: Line) -> Pool:
    return cast(Pool, line.client.connection_pool)


def hurry(pool: Pool, *, answers: bool = True) -> None:
    """From now on wait for 100 ms where all was given its time before: no working server has to be that fast."""
    pool._wait_s = 0.1
    if answers:
        for connection in pool._available_connections:
            connection.socket_timeout = connection.socket_connect_timeout = 0.1


def in_use(store: RedisStore) -> int:
    return len(cast(Pool, store.client.connection_pool)._in_use_connections)


async def call(line: Line, *args: str | int | bytes) -> Any:
    return await line.call(line.shards[0], *args)


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not holds():  # noqa: ASYNC110  nothing announces it
            await asyncio.sleep(0.005)


async def clients(server: RunningRedis) -> list[dict[str, str]]:
    """Who is connected, the one who asks included."""
    told = await server.ask("CLIENT", "LIST")
    return [dict(pair.split("=", 1) for pair in line.split()) for line in told.splitlines()]


# TLS


async def test_tls_with_the_right_authority(redis_tls: RunningRedis, redis_prefix: str) -> None:
    url, ca_file = redis_tls.tls_url.split("?ssl_ca_certs=")
    for told, named in ((redis_tls.tls_url, {}), (url, {"ca_file": Path(ca_file)})):
        store = await RedisStore.connect(told, redis_prefix, **named)
        assert await store.put(SyncItem("a", b"{}"))
        assert (await store.get("a")) is not None
        connection = cast(Pool, store.client.connection_pool).make_connection()
        context = cast(Any, connection).ssl_context.get()
        assert len(context.get_ca_certs()) == 1, "the one that was named, and none of the system's beside it"
        await store.close()


@pytest.mark.parametrize("how", ["another authority", "no authority", "another host name"])
async def test_tls_does_not_connect_to_whom_it_cannot_verify(own_kind: StartKind, tmp_path: Path, how: str) -> None:
    folders = [tmp_path / "one", tmp_path / "other"]
    for folder in folders:
        folder.mkdir()
    names = ("redis.example",) if how == "another host name" else ()
    server = await own_kind("redis-7", tls=tls_files(folders[0], *names))
    url = server.tls_url.split("?")[0]
    ca_file = {"another authority": tls_files(folders[1]).ca, "another host name": folders[0] / "ca.pem"}.get(how)
    with pytest.raises(TierUnavailable, match="CERTIFICATE_VERIFY_FAILED"):
        await RedisStore.connect(url, ca_file=ca_file)
    store = await RedisStore.connect(f"{url}?ssl_cert_reqs=none")
    assert await store.get("a") is None
    await store.close()


async def test_tls_without_looking_at_the_name_still_looks_at_the_authority(
    own_kind: StartKind, tmp_path: Path
) -> None:
    server = await own_kind("redis-7", tls=tls_files(tmp_path, "redis.example"))
    store = await RedisStore.connect(f"{server.tls_url}&ssl_check_hostname=false")
    await store.close()
    with pytest.raises(TierUnavailable, match="CERTIFICATE_VERIFY_FAILED"):
        await RedisStore.connect(server.tls_url)
    with pytest.raises(TierUnavailable, match="CERTIFICATE_VERIFY_FAILED"):
        await RedisStore.connect(f"{server.tls_url.split('?')[0]}?ssl_check_hostname=false")


async def test_tls_with_a_certificate_of_our_own(own_kind: StartKind, tmp_path: Path) -> None:
    files = tls_files(tmp_path)
    server = await own_kind("redis-7", tls=files)
    await server.ask("CONFIG", "SET", "tls-auth-clients", "yes")
    with pytest.raises(TierUnavailable):
        await RedisStore.connect(server.tls_url)
    store = await RedisStore.connect(f"{server.tls_url}&ssl_certfile={files.certificate}&ssl_keyfile={files.key}")
    await store.close()


@pytest.mark.parametrize("to", ["tls", "plain"])
async def test_tls_and_plain_text_do_not_mix(redis_tls: RunningRedis, to: str) -> None:
    plain = redis_tls.url.replace("redis://", "rediss://") + "?ssl_cert_reqs=none"
    tls = f"redis://127.0.0.1:{redis_tls.tls_port}"
    with pytest.raises(TierUnavailable):
        await RedisStore.connect(tls if to == "tls" else plain, timeout_ms=500, response_timeout_ms=500)


async def test_a_store_on_tls_closes_though_the_server_says_nothing_any_more(redis_tls: RunningRedis) -> None:
    ca = redis_tls.tls_url.split("?")[1]
    async with CuttingProxy(("127.0.0.1", redis_tls.tls_port)) as proxy:
        url = f"rediss://127.0.0.1:{proxy.port}?{ca}"
        store = await RedisStore.connect(url)
        hurry(cast(Pool, store.client.connection_pool))
        proxy.blackhole()
        for _ in range(3):
            with pytest.raises(TierUnavailable):
                await store.get("a")
        await store.close()
    await asyncio.sleep(0)


# Users, databases, sockets, names


async def test_a_user_and_a_password(redis_acl: RunningRedis, redis_prefix: str) -> None:
    store = await RedisStore.connect(redis_acl.url_as(*ACL_USER), redis_prefix)
    assert await store.client.execute_command("ACL", "WHOAMI") == ACL_USER[0].encode()
    assert await store.put(SyncItem("a", b"{}"))
    await store.close()
    elsewhere = await RedisStore.connect(redis_acl.url_as(*ACL_USER), redis_prefix)
    with pytest.raises((TierUnavailable, StoreError)):
        await cast(Any, elsewhere)._servers.call(elsewhere._servers.shards[0], "GET", "somewhere else")
    await elsewhere.close()


@pytest.mark.parametrize("protocol", [2, 3])
@pytest.mark.parametrize("unix", [False, True], ids=["tcp", "unix"])
async def test_a_refused_password_is_told_to_nobody(
    own_kind: StartKind, caplog: pytest.LogCaptureFixture, protocol: int, unix: bool
) -> None:
    server = await own_kind(PLAIN, unix_socket=unix, users=["ada on >right ~* +@all"])
    with caplog.at_level(logging.DEBUG):
        url = server.url_as("ada", CANARY)
        with pytest.raises(TierUnavailable, match="refused the credentials") as refused:
            await RedisStore.connect(f"{url}{'&' if '?' in url else '?'}protocol={protocol}")
        store = await RedisStore.connect(server.url_as("ada", "right"))
        await store.close()
    assert CANARY not in f"{refused.value!r} {refused.value.__cause__!r} {caplog.text}"
    assert "right" not in caplog.text


@pytest.mark.parametrize("unix", [False, True], ids=["tcp", "unix"])
async def test_a_server_that_wants_a_password_and_gets_none(own_kind: StartKind, unix: bool) -> None:
    server = await own_kind(PLAIN, unix_socket=unix)
    await server.ask("CONFIG", "SET", "requirepass", "right")
    with pytest.raises(TierUnavailable, match="credentials"):
        await RedisStore.connect(server.url)
    store = await RedisStore.connect(server.url.replace("//", "//:right@"))
    await store.close()


async def test_the_database_of_the_url_is_the_one(own_kind: StartKind) -> None:
    server = await own_kind(PLAIN)
    for url in (server.url.removesuffix("/0") + "/5", server.url.removesuffix("/0") + "?db=6"):
        store = await RedisStore.connect(url, "p:")
        await store.put(SyncItem("a", b"{}"))
        await store.close()
    for database, there in ((0, 0), (5, 1), (6, 1)):
        assert await ask(f"{server.url.removesuffix('0')}{database}", "EXISTS", "p:a") == there


async def test_a_unix_socket(own_kind: StartKind) -> None:
    server = await own_kind(PLAIN, unix_socket=True)
    store = await RedisStore.connect(server.url, "p:")
    assert await store.put(SyncItem("a", b"{}"))
    await store.close()
    with pytest.raises(TierUnavailable):
        await RedisStore.connect("unix:///nowhere/redis.sock")


@pytest.mark.parametrize("unix", [False, True], ids=["tcp", "unix"])
async def test_who_connects_is_greeted_once(own_kind: StartKind, unix: bool) -> None:
    server = await own_kind(PLAIN, unix_socket=unix)
    line = line_to(server.url)
    await call(line, "PING")
    assert (await server.ask("INFO", "commandstats"))["cmdstat_client|setname"]["calls"] == 1
    await line.close()


async def test_the_client_has_a_name(own_kind: StartKind) -> None:
    server = await own_kind(PLAIN)
    one, other = line_to(server.url), line_to(f"{server.url}?client_name=stock")
    await call(one, "PING")
    await call(other, "PING")
    assert {client["name"] for client in await clients(server)} >= {"sync-engine", "stock"}
    await one.close()
    await other.close()


async def test_a_bad_prefix_of_the_scheme_is_refused() -> None:
    with pytest.raises(ConfigError, match="scheme"):
        await RedisStore.connect("valkey://h")


# What the server can do


async def test_what_a_server_can_do_is_found_out(kind_server: RunningRedis, caplog: pytest.LogCaptureFixture) -> None:
    kind = kind_server.kind
    with caplog.at_level(logging.WARNING, "sync_engine"):
        for protocol in (2, 3):
            store = await RedisStore.connect(f"{kind_server.url}?protocol={protocol}")
            found = await store.capabilities()
            await store.close()
            assert (found.json, found.search) == (kind.modules, kind.modules)
            assert found.server == kind.name.split("-")[0]
            assert found.version.startswith(kind.version + ".")
            assert ("ReJSON" in found.modules, "search" in found.modules) == (kind.modules, kind.modules)
            assert found.maxmemory_policy == "noeviction"
            assert f"{found.server} {found.version}" in str(found)
            assert ("no search" in str(found)) is not kind.modules
    assert len(caplog.records) == (0 if kind.modules else 2), "once per store"


@pytest.mark.parametrize(
    ("rights", "json", "search"),
    [
        ("", False, False),
        ("+json.mget", True, False),
        ("+json.mget +ft.search", True, True),
        ("+info +config +json.mget +ft.search", True, True),
    ],
)
async def test_what_a_user_may_not_do_the_server_cannot(
    own_kind: StartKind, rights: str, json: bool, search: bool
) -> None:
    server = await own_kind("redis-8-modules", users=[f"{WITHOUT_INFO} -@all +@connection +@read +@scripting {rights}"])
    line = line_to(server.url_as("ada", "pw"))
    found = await line.capabilities()
    assert (found.json, found.search, found.server) == (json, search, "redis")
    assert found.maxmemory_policy == ("noeviction" if "info" in rights else None)
    await line.close()


async def test_what_a_server_can_do_is_asked_once_however_many_want_to_know(own_kind: StartKind) -> None:
    # Otherwise who comes after a failover finds every connection busy with this question.
    server = await own_kind(PLAIN)
    line = line_to(server.url)
    for _ in range(2):
        found = await asyncio.gather(*(line.capabilities() for _ in range(200)))
        assert len(pool_of(line)._available_connections) == 1
        assert {one.version for one in found} == {found[0].version}
        await server.restart(empty=True)
        await until_answered(line)
    await line.close()


async def test_what_a_server_can_do_is_found_out_anew_on_another(own_kind: StartKind) -> None:
    with_modules, without = await own_kind("redis-8-modules"), await own_kind("redis-7")
    async with Switch(with_modules) as switch:
        line = line_to(switch.url)
        assert (await line.capabilities()).json
        switch.to(without)
        await until_answered(line)
        found = await line.capabilities()
        assert (found.json, found.version[:2]) == (False, "7.")
        await line.close()


# Which server it is


class Switch:
    """An address behind which servers change, as a name in DNS or a balancer: new connections go to the new one."""

    def __init__(self, server: RunningRedis) -> None:
        self._server = server
        self._pumps: set[asyncio.Task[None]] = set()

    def to(self, server: RunningRedis, cut: bool = True) -> None:
        self._server = server
        if cut:
            for pump in self._pumps:
                pump.cancel()

    async def __aenter__(self) -> Switch:
        self._listener = await asyncio.start_server(self._serve, "127.0.0.1")
        return self

    async def __aexit__(self, *_: object) -> None:
        self._listener.close()
        for pump in self._pumps:
            pump.cancel()
        await asyncio.gather(*self._pumps, return_exceptions=True)

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self._listener.sockets[0].getsockname()[1]}/0"

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        async def pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
            try:
                while chunk := await source.read(65_536):
                    sink.write(chunk)
                    await sink.drain()
            except OSError:
                pass
            finally:
                sink.close()

        up_reader, up_writer = await asyncio.open_connection("127.0.0.1", self._server.port)
        for way in (pump(reader, up_writer), pump(up_reader, writer)):
            task = asyncio.create_task(way)
            self._pumps.add(task)
            task.add_done_callback(self._pumps.discard)


async def until_answered(line: Line) -> None:
    async with asyncio.timeout(20):
        while True:
            try:
                await call(line, "PING")
                return
            except TierUnavailable:
                await asyncio.sleep(0.01)


@pytest.mark.parametrize("user", ["default", "ada"], ids=["who may ask", "who may not ask"])
async def test_a_restart_is_told_once_and_before_any_reply(own_kind: StartKind, user: str) -> None:
    server = await own_kind(PLAIN, users=[WITHOUT_INFO])
    url = server.url if user == "default" else server.url_as("ada", "pw")
    told: list[Any] = []
    line = line_to(url, lambda: told.append("new"))

    async def hear() -> None:
        try:
            told.append(await call(line, "EXISTS", "p:a"))
        except TierUnavailable:
            await asyncio.sleep(0.01)

    await call(line, "SET", "p:a", "1")
    for _ in range(5):  # every connection of the pool is used, broken and made again
        await asyncio.gather(*(hear() for _ in range(40)))
    assert set(told) == {1}
    for _ in range(3):
        told.clear()
        restart = asyncio.create_task(server.restart(empty=True))
        while not told or told[-1] != 0:
            await asyncio.gather(*(hear() for _ in range(40)))
        await restart
        await asyncio.gather(*(hear() for _ in range(40)))
        assert told.count("new") == 1
        before, after = told[: told.index("new")], told[told.index("new") + 1 :]
        assert set(before) <= {1}, "the old one's replies, up to its end"
        assert set(after) == {0}, "and then the new one's alone"
        await call(line, "SET", "p:a", "1")
    await line.close()


async def test_a_restart_while_nobody_asks_is_told_before_the_next_reply(own_kind: StartKind) -> None:
    server = await own_kind(PLAIN, users=[WITHOUT_INFO])
    for url in (server.url, server.url_as("ada", "pw")):
        told: list[Any] = []
        line = line_to(url, lambda told=told: told.append("new"))
        await call(line, "SET", "p:a", "1")
        for _ in range(2):
            await server.restart(empty=True)
            told.append(await call(line, "EXISTS", "p:a"))
        assert told == ["new", 0, "new", 0]
        await line.close()


async def test_the_first_server_and_a_second_connection_are_nothing_new(own_kind: StartKind) -> None:
    server = await own_kind(PLAIN, users=[WITHOUT_INFO])
    for url in (server.url, server.url_as("ada", "pw")):
        told: list[str] = []
        line = line_to(url, lambda told=told: told.append("new"))
        waiting = [asyncio.create_task(call(line, "BLPOP", "p:none", 0.2)) for _ in range(5)]
        await asyncio.gather(*waiting, *(call(line, "EXISTS", "p:a") for _ in range(5)))
        assert len(pool_of(line)._available_connections) > 5
        assert told == []
        await line.close()


async def test_who_may_ask_loses_a_connection_without_alarm(own_kind: StartKind) -> None:
    server = await own_kind(PLAIN, users=[WITHOUT_INFO])
    told: list[str] = []
    for user, url in (("default", server.url), ("ada", server.url_as("ada", "pw"))):
        line = line_to(url, lambda user=user: told.append(user))
        await call(line, "EXISTS", "p:a")
        await server.ask("CLIENT", "KILL", "USER", user, "SKIPME", "yes")
        await call(line, "EXISTS", "p:a")
        await line.close()
    assert told == ["ada"], "without the right to ask, any loss may have been a restart"


async def test_a_server_that_followed_another_and_leads_again_is_another(own_kind: StartKind) -> None:
    server, other = await own_kind(PLAIN), await own_kind(PLAIN)
    told: list[str] = []
    line = line_to(server.url, lambda: told.append("new"))
    await call(line, "SET", "p:a", "1")
    run_id = (await info(server, "server")).partition("run_id:")[2][:40]
    await server.ask("REPLICAOF", "127.0.0.1", other.port)
    while "master_link_status:up" not in await info(server, "replication"):  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    await server.ask("REPLICAOF", "NO", "ONE")
    await server.ask("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
    assert await call(line, "EXISTS", "p:a") == 0
    assert told == ["new"]
    assert run_id in await info(server, "server"), "the same process, and not the same data"
    await line.close()


async def info(server: RunningRedis, section: str) -> str:
    said = await server.ask("INFO", section)
    return "\n".join(f"{name}:{value}" for name, value in said.items()) if isinstance(said, dict) else str(said)


async def test_what_the_one_before_still_says_counts_for_nothing(own_kind: StartKind) -> None:
    old, new = await own_kind(PLAIN), await own_kind(PLAIN)
    told: list[str] = []
    async with Switch(old) as switch:
        line = line_to(switch.url, lambda: told.append("new"))
        await asyncio.gather(*(call(line, "SET", "p:a", "old") for _ in range(5)))
        await old.pause()
        late = [asyncio.create_task(call(line, "GET", "p:a")) for _ in range(5)]
        await until(lambda: len(pool_of(line)._in_use_connections) == 5)
        switch.to(new, cut=False)
        assert await call(line, "GET", "p:a") is None
        assert told == ["new"]
        await old.resume()
        for outcome in await asyncio.gather(*late, return_exceptions=True):
            assert isinstance(outcome, TierUnavailable), outcome
        assert [await call(line, "GET", "p:a") for _ in range(10)] == [None] * 10
        assert told == ["new"]
        await line.close()


async def test_connections_to_a_server_that_became_a_replica_are_given_up(own_kind: StartKind) -> None:
    old, new = await own_kind(PLAIN), await own_kind(PLAIN)
    told: list[str] = []
    async with Switch(old) as switch:
        line = line_to(switch.url, lambda: told.append("new"))
        await asyncio.gather(*(call(line, "SET", "p:a", "old") for _ in range(5)))
        switch.to(new, cut=False)
        await old.ask("REPLICAOF", "127.0.0.1", new.port)
        with pytest.raises(TierUnavailable, match="ReadOnly"):
            await call(line, "SET", "p:a", "again")
        assert await call(line, "SET", "p:a", "again") == b"OK"
        assert await new.ask("GET", "p:a") == "again"
        assert told == ["new"]
        await line.close()


async def test_a_callback_that_fails_is_called_again(own_kind: StartKind) -> None:
    server = await own_kind(PLAIN)
    told: list[str] = []

    def notice() -> None:
        told.append("new")
        if len(told) == 1:
            raise RuntimeError("not ready")

    line = line_to(server.url, notice)
    await call(line, "PING")
    await server.restart(empty=True)
    with pytest.raises(RuntimeError, match="not ready"):
        await call(line, "PING")
    assert await call(line, "PING") == b"PONG"
    assert await call(line, "PING") == b"PONG"
    assert told == ["new", "new"]
    await line.close()


async def test_the_log_tells_of_another_server_and_not_of_the_first(
    own_kind: StartKind, caplog: pytest.LogCaptureFixture
) -> None:
    server = await own_kind(PLAIN)
    with caplog.at_level(logging.INFO, "sync_engine.storage.redis"):
        line = line_to(server.url)
        await call(line, "PING")
        assert caplog.records == []
        await server.restart(empty=True)
        await asyncio.gather(*(call(line, "PING") for _ in range(10)))
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "another server" in caplog.text
    await line.close()


# Bounds


async def test_who_waits_too_long_for_a_connection_is_told_that(own_kind: StartKind) -> None:
    server = await own_kind(PLAIN)
    line = line_to(server.url)
    await asyncio.gather(*(call(line, "PING") for _ in range(100)))
    hurry(pool_of(line), answers=False)
    await server.pause()
    calls = [asyncio.create_task(call(line, "GET", "p:a")) for _ in range(CONNECTIONS_MAX + 3)]
    _, *outcomes = await asyncio.gather(_resumed(server, calls[CONNECTIONS_MAX:]), *calls, return_exceptions=True)
    assert outcomes[:CONNECTIONS_MAX] == [None] * CONNECTIONS_MAX
    for refused in outcomes[CONNECTIONS_MAX:]:
        assert isinstance(refused, TierUnavailable)
        assert "all 16 connections were busy for 100 ms" in str(refused)
    assert await call(line, "PING") == b"PONG"
    await line.close()


async def _resumed(server: RunningRedis, after: list[asyncio.Task[Any]]) -> None:
    await asyncio.wait(after)
    await server.resume()


async def test_a_connection_is_made_in_time_or_not_at_all(own_kind: StartKind) -> None:
    server = await own_kind(PLAIN)
    async with CuttingProxy(server.url) as proxy:
        proxy.blackhole()
        line = line_to(proxy.url_for(server.url), timeout_ms=50)
        with pytest.raises(TierUnavailable, match="not connected within 50 ms"):
            await call(line, "PING")
        proxy.heal()
        await until_answered(line)
        await line.close()


async def test_what_could_not_be_sent_in_time_is_not_sent_later(own_kind: StartKind) -> None:
    server = await own_kind(PLAIN)
    line = line_to(server.url)
    await call(line, "PING")
    hurry(pool_of(line))
    await server.pause()
    with pytest.raises(TierUnavailable, match="Timeout writing"):
        await call(line, "SET", "p:a", bytes(64 * 1024 * 1024))  # more than the kernel keeps for a silent server
    await server.resume()
    await until_answered(line)
    await asyncio.sleep(0.1)
    assert await server.ask("EXISTS", "p:a") == 0
    await line.close()


async def test_no_server_may_send_us_elsewhere(redis_url: str) -> None:
    line = line_to(redis_url)
    assert not pool_of(line).maint_notifications_enabled()
    await line.close()


# Cancelled calls


@pytest.fixture(params=["tcp", "unix", "tls", "sentinel", "acl"])
def address(request: pytest.FixtureRequest) -> str:
    # Not in the test: a server is started with a loop of its own, which cannot be within another.
    match request.param:
        case "tcp":
            return request.getfixturevalue("kind_servers")(KINDS[PLAIN]).url
        case "unix":
            return request.getfixturevalue("redis_url")
        case "tls":
            return request.getfixturevalue("redis_tls").tls_url
        case "sentinel":
            return request.getfixturevalue("redis_sentinel").url
        case _:
            return request.getfixturevalue("redis_acl").url_as(*ACL_USER)


async def test_300_cancelled_calls_leave_no_wrong_reply_and_no_connection_behind(
    redis_prefix: str, address: str
) -> None:
    store = await RedisStore.connect(address, redis_prefix)
    items = {f"i{n}": SyncItem(f"i{n}", b"%d" % n) for n in range(100)}
    await store.put_batch(items.values())
    rng = random.Random(1)
    for n in range(300):
        one = f"i{rng.randrange(100)}"
        kinds: list[Coroutine[Any, Any, Any]] = [store.get(one), store.put(items[one]), store.exists(one)]
        task = asyncio.create_task(kinds.pop(n % 3))
        for unused in kinds:
            unused.close()
        for _ in range(rng.randrange(8)):
            await asyncio.sleep(0)
        task.cancel()
        wanted = f"i{rng.randrange(100)}"
        assert await store.get(wanted) == items[wanted]
        await asyncio.gather(task, return_exceptions=True)
    await until(lambda: not in_use(store))
    assert len(cast(Pool, store.client.connection_pool)._available_connections) <= CONNECTIONS_MAX
    await store.close()


async def test_users_of_the_client_share_the_bounds(own_kind: StartKind) -> None:
    server = await own_kind(PLAIN)
    line = line_to(server.url)
    await asyncio.gather(*(line.client.set(f"k{n}", n) for n in range(100)), *(call(line, "PING") for _ in range(100)))
    assert await line.client.get("k7") == b"7"
    assert len(await clients(server)) <= CONNECTIONS_MAX + 1
    assert f"{CONNECTIONS_MAX}" in repr(line.client)
    await line.close()


# Several connections


async def test_I2_a_read_does_not_join_one_that_left_before_the_last_write(own_kind: StartKind) -> None:
    server = await own_kind(PLAIN)
    async with CuttingProxy(server.url) as proxy:
        store = await RedisStore.connect(proxy.url_for(server.url))
        await asyncio.gather(*(store.exists(f"{n}") for n in range(4)))  # there are connections to choose from
        await store.put(SyncItem("a", b"old"))
        sent = proxy.bytes_up
        proxy.delay(0.3)
        early = asyncio.create_task(store.get("a"))
        await until(lambda: proxy.bytes_up > sent)
        await asyncio.sleep(0.05)  # its reply is on its way, and held back
        proxy.delay(0)
        await store.put(SyncItem("a", b"new"))
        late = await store.get("a")
        assert late is not None
        assert late.content == b"new"
        assert (await early) is not None
        await store.close()


# What waits


async def test_what_waits_takes_no_connection_of_the_pool(own_kind: StartKind) -> None:
    server = await own_kind(PLAIN)
    line = line_to(server.url)
    async with line.listen(line.shards[0]) as listener:
        waiting = asyncio.create_task(listener.exchange("BLPOP", "p:queue", 0, timeout_s=None))
        await until_blocked(server)
        assert not pool_of(line)._in_use_connections
        await call(line, "RPUSH", "p:queue", "x")
        assert await waiting == [b"p:queue", b"x"]
    assert "blpop" not in [client["cmd"] for client in await clients(server)]
    await line.close()


async def until_blocked(server: RunningRedis) -> None:
    async with asyncio.timeout(20):
        while not any("b" in client["flags"] for client in await clients(server)):  # noqa: ASYNC110  nobody announces it
            await asyncio.sleep(0.005)


async def test_a_cancelled_wait_ends_and_leaves_no_reply_for_the_next(own_kind: StartKind) -> None:
    # On Python 3.11 asyncio.wait_for, in which redis-py sends, forgets a cancel that comes when it is done.
    server = await own_kind(PLAIN)
    line = line_to(server.url)
    async with line.listen(line.shards[0]) as listener:
        for n in range(40):
            waiting = asyncio.create_task(listener.exchange("BLPOP", "p:queue", 0, timeout_s=None))
            for _ in range(n):
                await asyncio.sleep(0)
            waiting.cancel()
            ended, _ = await asyncio.wait({waiting}, timeout=10)
            assert ended, f"cancelled after {n} steps it still waits"
            assert waiting.cancelled()
            assert await listener.exchange("ECHO", f"{n}", timeout_s=5) == b"%d" % n
        with pytest.raises(TierUnavailable, match=r"within 0\.01 s"):
            await listener.exchange("BLPOP", "p:queue", 0, timeout_s=0.01)
        assert await listener.exchange("ECHO", "x", timeout_s=5) == b"x"
        with pytest.raises(StoreError):
            await listener.exchange("NONSENSE", timeout_s=5)
    await line.close()


async def test_what_waits_ends_with_the_store(own_kind: StartKind) -> None:
    server = await own_kind(PLAIN)
    line = line_to(server.url)
    outcome: list[SyncEngineError] = []

    async def wait() -> None:
        async with line.listen(line.shards[0]) as listener:
            for _ in range(2):
                try:
                    await listener.exchange("BLPOP", "p:queue", 0, timeout_s=None)
                except NotRunning as ended:
                    outcome.append(ended)

    waiting = asyncio.create_task(wait())
    await until_blocked(server)
    await line.close()
    await waiting
    assert len(outcome) == 2
    with pytest.raises(NotRunning):
        async with line.listen(line.shards[0]):
            pass


async def test_what_waits_outlives_a_restart_and_tells_of_it(own_kind: StartKind) -> None:
    server = await own_kind(PLAIN)
    told: list[str] = []
    line = line_to(server.url, lambda: told.append("new"))
    async with line.listen(line.shards[0]) as listener:
        waiting = asyncio.create_task(listener.exchange("BLPOP", "p:queue", 0, timeout_s=None))
        await until_blocked(server)
        await server.restart(empty=True)
        with pytest.raises(TierUnavailable):
            await waiting
        assert await listener.exchange("EXISTS", "p:a", timeout_s=5) == 0
        assert told == ["new"]
    await line.close()


async def test_what_waits_at_a_server_that_becomes_a_replica_can_be_tried_again(own_kind: StartKind) -> None:
    # The reader of the change stream waits so, and must outlive a failover.
    server, other = await own_kind(PLAIN), await own_kind(PLAIN)
    line = line_to(server.url)
    async with line.listen(line.shards[0]) as listener:
        waiting = asyncio.create_task(listener.exchange("BLPOP", "p:queue", 0, timeout_s=None))
        await until_blocked(server)
        await server.ask("REPLICAOF", "127.0.0.1", other.port)
        with pytest.raises(TierUnavailable, match="UNBLOCKED"):
            await waiting


# What is said


async def test_what_a_server_refuses_is_said_without_what_it_was_asked_to_store(own_kind: StartKind) -> None:
    server = await own_kind(PLAIN)
    line = line_to(server.url)
    with pytest.raises(StoreError, match=r"unknown command 'JSON\.SET'") as refused:
        await call(line, "JSON.SET", f"p:{CANARY}", "$", f'"{CANARY}"')
    assert CANARY not in f"{refused.value} {refused.value!r} {refused.value.__cause__!r}"
    await line.close()
