"""The connections to one server: bounded, each made within the configured time, and never to a server we do not know.

A connection learns whose it is before its first command. Where that is another server than the one known so far (it
was restarted, or another took its place), whoever asked for it is told, before anything is read through it; what was
connected to the one before is closed at its next use, and a reply that comes from it after that counts for nothing.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import hiredis
from redis.asyncio import BlockingConnectionPool
from redis.asyncio.connection import AbstractConnection, RedisSSLContext
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import MaxConnectionsError, ResponseError
from redis.exceptions import TimeoutError as RedisTimeoutError
from redis.maint_notifications import MaintNotificationsConfig

from sync_engine.storage.redis.connection import TcpConnection, TlsConnection, UnixConnection

__all__ = ["CONNECTIONS_MAX", "Pool", "ask", "dirty", "fields", "tls_context"]

log = logging.getLogger(__name__)

CONNECTIONS_MAX = 16
"""Calls to Redis at a time; one is enough to keep it busy, the rest is for stalls. Further calls wait."""


class Pool(BlockingConnectionPool):
    """``options`` are redis-py's for a connection, beside them ``ssl``: whether it is to be encrypted.

    ``on_new_server`` is called synchronously, in the task that makes a connection. ``epoch`` counts the servers: a
    reply means something only while the epoch of its connection lasts.
    """

    def __init__(
        self,
        options: Mapping[str, Any],
        *,
        timeout_s: float,
        response_timeout_s: float,
        on_new_server: Callable[[], None],
    ) -> None:
        told: dict[str, Any] = {"protocol": 3, "client_name": "sync-engine"} | dict(options)
        encrypted = told.pop("ssl", False)
        super().__init__(
            connection_class=TlsConnection if encrypted else UnixConnection if "path" in options else TcpConnection,
            max_connections=CONNECTIONS_MAX,
            timeout=timeout_s,
            # Their MOVING would lead us to an address that nobody configured, and with them on redis-py lends out
            # connections that hold a reply nobody fetched.
            maint_notifications_config=MaintNotificationsConfig(enabled=False),
            **told,
            decode_responses=False,
            socket_connect_timeout=timeout_s,
            socket_timeout=response_timeout_s,
            retry=Retry(NoBackoff(), 0),
            redis_connect_func=self._greet,
        )
        self._wait_s = timeout_s
        self._on_new_server = on_new_server
        self._turns = asyncio.Semaphore(CONNECTIONS_MAX)
        self._tls: ssl.SSLContext | None = None
        self.epoch = 0
        # The epoch in which a connection was made, or in which making it began.
        self._epochs: dict[AbstractConnection, int] = {}
        self._identity = ""
        self._lost = False
        self._losses = 0
        self.make_connection()  # opens nothing, but refuses options that no connection has, and certificates

    # redis-py's own, in fewer steps: it takes its locks five times per call

    async def get_connection(self, command_name: Any = None, *keys: Any, **options: Any) -> AbstractConnection:
        """A connection that is ready to send. Raises redis-py's errors."""
        if self._turns.locked():
            try:
                async with asyncio.timeout(self._wait_s):
                    await self._turns.acquire()
            except TimeoutError:
                busy = f"all {CONNECTIONS_MAX} connections were busy for {self._wait_s * 1000:.0f} ms"
                raise MaxConnectionsError(busy) from None
        else:
            await self._turns.acquire()
        connection: AbstractConnection = self.get_available_connection()  # type: ignore[no-untyped-call]
        try:
            await self.ensure_connection(connection)
        except BaseException:  # failed or cancelled alike, it goes back
            await self.release(connection)
            raise
        return connection

    async def release(self, connection: AbstractConnection) -> None:
        """Give a connection back; a closed one is opened again when it is next wanted."""
        if not connection.is_connected:
            self._part(connection)
        self._in_use_connections.remove(connection)
        self._available_connections.append(connection)
        self._turns.release()

    async def ensure_connection(self, connection: AbstractConnection) -> None:
        """Have it connected to the server of this epoch, with nothing left in it to read."""
        if connection.is_connected:
            if self.current(connection) and not await dirty(connection):
                return
            await connection.disconnect(nowait=True)
        self._part(connection)
        self._epochs[connection] = self.epoch
        try:
            async with asyncio.timeout(self._wait_s):
                await self.aim(connection)
                await connection.connect()  # type: ignore[no-untyped-call]
        except BaseException as failed:
            self._epochs.pop(connection, None)
            self._lost = True
            await connection.disconnect(nowait=True)
            if isinstance(failed, TimeoutError):
                raise RedisTimeoutError(f"not connected within {self._wait_s * 1000:.0f} ms") from None
            raise

    def make_connection(self) -> AbstractConnection:
        """A connection that is not opened yet; one set of certificates serves all."""
        connection: AbstractConnection = super().make_connection()  # type: ignore[no-untyped-call]
        if isinstance(connection, TlsConnection):
            self._tls = connection.ssl_context.context = self._tls or tls_context(connection.ssl_context)
        return connection

    # Which server it is

    async def aim(self, connection: AbstractConnection) -> None:
        """Set the address to connect to, where it is not always the same."""

    def accept(self, replication: Mapping[str, str]) -> None:
        """Raise where a server in this role is not the one that is wanted."""

    def current(self, connection: AbstractConnection) -> bool:
        """Whether what this connection says still counts: no other server has been met since it was made."""
        return self._epochs.get(connection) == self.epoch

    def renew(self) -> None:
        """Close every connection at its next use and connect anew: the server is not what it was."""
        self.epoch += 1
        self._lost = True

    def begin_anew(self) -> None:
        """Renew, for a server that has been told of already: meeting it is no news."""
        self.renew()
        self._identity = ""

    def forget(self, connection: AbstractConnection) -> None:
        """Drop what is known of a connection of ``make_connection`` that is not used any more."""
        self._epochs.pop(connection, None)

    async def _greet(self, connection: AbstractConnection) -> None:
        """Log on, then learn whose connection it is. redis-py calls it for every connection it has opened."""
        try:
            await connection.on_connect()
            self._learn(connection, *await ask(connection, ("INFO", "server"), ("INFO", "replication")))
        except BaseException:  # redis-py would keep it open after an error that is not its own
            await connection.disconnect(nowait=True)
            raise

    def _learn(self, connection: AbstractConnection, server: Any, replication: Any) -> None:
        if isinstance(server, ResponseError) or isinstance(replication, ResponseError):
            # Without the right to ask: whatever is reached after a loss may be another server.
            self._losses += self._lost
            identity = f"{self._losses} {getattr(connection, 'host', '')}:{getattr(connection, 'port', '')}"
        else:
            role = fields(replication)
            self.accept(role)
            # A server that followed another for a while and leads again has the same run_id and other data.
            identity = f"{fields(server).get('run_id', '')} {role.get('master_replid', '')}"
        if identity != self._identity:
            if self._epochs.get(connection) != self.epoch:
                raise RedisConnectionError("another server was met while this connection was made")
            if self._identity:
                log.warning("Redis is another server than before, or was restarted")
                self._on_new_server()  # before anything is noted: if it fails, the next connection calls it again
                self.epoch += 1
        self._identity, self._lost = identity, False
        self._epochs[connection] = self.epoch

    def _part(self, connection: AbstractConnection) -> None:
        """Note that a connection is closed. One of this epoch was not closed by us."""
        self._lost |= self._epochs.pop(connection, None) == self.epoch

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {len(self._in_use_connections)} of {CONNECTIONS_MAX} connections in use>"


async def ask(connection: AbstractConnection, *commands: Sequence[str]) -> list[Any]:
    """The replies to several commands in one round trip; the server's refusals among them are returned."""
    packed = [hiredis.pack_command(tuple(command)) for command in commands]  # type: ignore[arg-type]
    await connection.send_packed_command(packed, check_health=False)
    replies = []
    for _ in packed:
        try:
            replies.append(await connection.read_response())
        except ResponseError as refused:
            replies.append(refused)
    return replies


def fields(info: bytes | str) -> dict[str, str]:
    """What a reply to INFO says."""
    text = info if isinstance(info, str) else bytes(info).decode(errors="replace")
    return dict(line.split(":", 1) for line in text.splitlines() if ":" in line)


def tls_context(told: RedisSSLContext) -> ssl.SSLContext:
    """Where an authority is named, that one alone is trusted; redis-py would trust the system's beside it."""
    if not (told.ca_certs or told.ca_path or told.ca_data):
        return told.get()
    context = ssl.create_default_context(cafile=told.ca_certs, capath=told.ca_path, cadata=told.ca_data)
    context.check_hostname = told.check_hostname
    context.verify_mode = told.cert_reqs
    if told.certfile:
        context.load_cert_chain(told.certfile, told.keyfile, told.password)
    if told.min_version is not None:
        context.minimum_version = told.min_version
    if told.ciphers is not None:
        context.set_ciphers(told.ciphers)
    return context


async def dirty(connection: AbstractConnection) -> bool:
    """Whether an open connection holds something to read, which nobody waits for, or was closed by the server."""
    try:
        return bool(await connection.can_read())
    except (RedisConnectionError, OSError):
        return True
