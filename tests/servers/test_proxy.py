"""The fault tools do exactly what they say, to the byte, in front of a real Redis."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import urlsplit

import pytest
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError, TimeoutError

from sync_engine.testing.fixtures import StartRedis
from sync_engine.testing.proxy import CuttingProxy

PING = b"*1\r\n$4\r\nPING\r\n"
PONG = b"+PONG\r\n"
ONCE = Retry(NoBackoff(), 0)
NO_ANSWER = (ConnectionError, TimeoutError)
"""redis-py says the one when the time ran out in the handshake, the other later."""


@pytest.fixture
async def proxy(redis_url: str) -> AsyncIterator[CuttingProxy]:
    async with CuttingProxy(redis_url) as running:
        yield running


class Line:
    """A raw connection through the proxy, logged in, so that every byte is ours to count."""

    def __init__(self, proxy: CuttingProxy, url: str) -> None:
        self._proxy = proxy
        self._password = (urlsplit(url).password or "").encode()

    async def __aenter__(self) -> Line:
        self.reader, self.writer = await asyncio.open_connection("127.0.0.1", self._proxy.port)
        self.writer.write(b"*2\r\n$4\r\nAUTH\r\n$%d\r\n%b\r\n" % (len(self._password), self._password))
        assert await self.reader.readline() == b"+OK\r\n"
        return self

    async def __aexit__(self, *_: object) -> None:
        self.writer.close()

    def send(self, request: bytes) -> None:
        self.writer.write(request)

    async def until_reset(self) -> bytes:
        """Everything that arrives until the connection is reset; an orderly end fails."""
        got = bytearray()
        while True:
            try:
                piece = await self.reader.read(65536)
            except ConnectionResetError:
                return bytes(got)
            assert piece, "the connection was closed in order"
            got += piece


async def ask(url: str, *command: str, **options: Any) -> Any:
    async with Redis.from_url(url, retry=ONCE, **options) as redis:
        return await redis.execute_command(*command)


async def test_a_healthy_proxy_changes_nothing_and_counts(
    proxy: CuttingProxy, redis_url: str, redis_prefix: str
) -> None:
    value = os.urandom(1_000_000)
    async with Redis.from_url(proxy.url_for(redis_url), retry=ONCE) as redis:
        await redis.set(f"{redis_prefix}big", value)
        assert await redis.get(f"{redis_prefix}big") == value
    assert proxy.connections >= 1
    assert proxy.bytes_up > 1_000_000
    assert proxy.bytes_down > 1_000_000
    assert proxy.cuts == 0


@pytest.mark.parametrize("unix_socket", [True, False])
async def test_it_stands_before_sockets_and_ports(own_redis: StartRedis, unix_socket: bool) -> None:
    server = await own_redis(False, unix_socket=unix_socket, password="a/b@c")
    async with CuttingProxy(server.url) as proxy:
        assert await ask(proxy.url_for(server.url), "PING")
        assert "a/b@c" not in repr(proxy)


def test_a_url_keeps_credentials_database_and_options() -> None:
    proxy = CuttingProxy("unix:/tmp/s")
    assert proxy.url_for("redis://me:p%40@host:1/3?protocol=3") == "redis://me:p%40@127.0.0.1:0/3?protocol=3"
    assert proxy.url_for("unix://:p%40@/tmp/s?db=2") == "redis://:p%40@127.0.0.1:0?db=2"
    with pytest.raises(ValueError, match="TLS"):
        proxy.url_for("rediss://host")


async def test_refusing_resets_what_is_open_and_keeps_its_port(proxy: CuttingProxy, redis_url: str) -> None:
    port = proxy.port
    async with Line(proxy, redis_url) as line:
        proxy.refuse()
        assert await line.until_reset() == b""
    with pytest.raises(ConnectionRefusedError):
        await asyncio.open_connection("127.0.0.1", port)
    proxy.refuse()
    proxy.heal()
    proxy.heal()
    assert proxy.port == port
    assert await ask(proxy.url_for(redis_url), "PING")


async def test_a_blackhole_accepts_and_never_answers_and_what_fell_in_is_reset(
    proxy: CuttingProxy, redis_url: str
) -> None:
    async with Line(proxy, redis_url) as fell_in, Line(proxy, redis_url) as idle:
        proxy.blackhole()
        fell_in.send(PING)
        with pytest.raises(NO_ANSWER, match=r"[Tt]imeout"):
            await ask(proxy.url_for(redis_url), "PING", socket_timeout=0.05)
        proxy.heal()
        assert await fell_in.until_reset() == b""
        idle.send(PING)
        assert await idle.reader.readline() == PONG


async def test_a_server_may_stand_at_its_door_while_it_answers_whom_it_knows(
    proxy: CuttingProxy, redis_url: str
) -> None:
    async with Line(proxy, redis_url) as known:
        proxy.ignore_new()
        with pytest.raises(NO_ANSWER, match=r"[Tt]imeout"):
            await ask(proxy.url_for(redis_url), "PING", socket_timeout=0.05)
        known.send(PING)
        assert await known.reader.readline() == PONG
        proxy.heal()
        assert await ask(proxy.url_for(redis_url), "PING")


@pytest.mark.parametrize("count", range(len(PONG) + 1))
async def test_a_reply_is_cut_after_so_many_bytes_and_only_once(
    proxy: CuttingProxy, redis_url: str, count: int
) -> None:
    async with Line(proxy, redis_url) as line:
        proxy.cut_after_reply_bytes(count)
        line.send(PING)
        assert await line.until_reset() == PONG[:count]
    assert proxy.cuts == 1
    assert await ask(proxy.url_for(redis_url), "PING")


async def test_the_command_whose_reply_was_cut_has_happened(
    proxy: CuttingProxy, redis_url: str, redis_prefix: str
) -> None:
    async with Line(proxy, redis_url) as line:
        proxy.cut_after_reply_bytes(0)
        line.send(f"INCR {redis_prefix}n\r\n".encode())
        await line.until_reset()
    assert await ask(redis_url, "GET", f"{redis_prefix}n") == b"1"


async def test_a_request_is_cut_after_so_many_bytes_and_then_has_not_happened(
    proxy: CuttingProxy, redis_url: str, redis_prefix: str
) -> None:
    request = f"INCR {redis_prefix}n\r\n".encode()
    for count in (0, 1, len(request) - 1):
        async with Line(proxy, redis_url) as line:
            before = proxy.bytes_up
            proxy.cut_after_request_bytes(count)
            line.send(request)
            assert await line.until_reset() == b""
            assert proxy.bytes_up - before == count
    assert await ask(redis_url, "EXISTS", f"{redis_prefix}n") == 0


async def test_a_delayed_reply_arrives_complete(proxy: CuttingProxy, redis_url: str) -> None:
    proxy.delay(0.2)
    with pytest.raises(NO_ANSWER, match=r"[Tt]imeout"):
        await ask(proxy.url_for(redis_url), "PING", socket_timeout=0.05)
    proxy.delay(0.01)
    assert await ask(proxy.url_for(redis_url), "PING")


async def test_it_holds_back_no_small_piece_by_itself(proxy: CuttingProxy, redis_url: str) -> None:
    """Until the one before is acknowledged, which may be 40 ms: more than the delays that benchmarks ask for."""
    async with Line(proxy, redis_url):
        sides = [side for link in proxy._links for side in (link.client, link.server)]
        over_tcp = [side for side in sides if side.family == socket.AF_INET]
        assert over_tcp
        assert all(side.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) for side in over_tcp)


async def test_the_server_is_killed_in_the_middle_of_a_batch(own_redis: StartRedis) -> None:
    server = await own_redis(False, persistent=True)
    commands = [f"SET k{n:03} {n}\r\n".encode() for n in range(100)]
    half = sum(map(len, commands[:50])) + 3
    async with CuttingProxy(server.url) as proxy:
        async with Line(proxy, server.url) as line:
            before = proxy.bytes_up
            proxy.call_after_request_bytes(half, lambda: os.kill(server.pid, signal.SIGKILL))
            line.send(b"".join(commands))
            with pytest.raises((ConnectionResetError, asyncio.IncompleteReadError)):
                await line.reader.readexactly(100 * len(b"+OK\r\n"))
            assert proxy.bytes_up - before >= half
        with pytest.raises(ConnectionError):
            await ask(proxy.url_for(server.url), "PING")
        await server.kill()
        await server.start()
        assert await ask(proxy.url_for(server.url), "DBSIZE") <= 50


async def test_the_callback_stands_between_two_bytes(proxy: CuttingProxy, redis_url: str) -> None:
    seen: list[int] = []
    async with Line(proxy, redis_url) as line:
        before = proxy.bytes_up
        proxy.call_after_request_bytes(5, lambda: seen.append(proxy.bytes_up - before))
        line.send(PING * 2)
        assert await line.reader.readexactly(2 * len(PONG)) == PONG * 2
    assert seen == [5]


async def test_closing_the_proxy_ends_every_connection(redis_url: str) -> None:
    async with CuttingProxy(redis_url) as proxy, Line(proxy, redis_url) as line:
        await proxy.__aexit__(None, None, None)
        assert await line.until_reset() == b""
