"""The line to one Redis: the client with its bounds, calls that survive their caller, errors in our words.

Commands are packed by hiredis and sent over a pooled connection directly: redis-py's own asyncio packing
costs 0.5 µs per argument and its retry would send a write twice. Every call runs in a task owned here, so
that cancelling a caller never leaves a reply in the socket for the next one to read.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine, Sequence
from typing import Any, TypeVar
from urllib.parse import urlsplit

import hiredis
from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import (
    AskError,
    AuthenticationError,
    ClusterError,
    NoPermissionError,
    NoScriptError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisError,
    ResponseError,
    TryAgainError,
)
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

from sync_engine.errors import ConfigError, NotRunning, StoreError, SyncEngineError, TierUnavailable
from sync_engine.storage.redis.capabilities import Capabilities, json_answers
from sync_engine.storage.redis.scripts import Script
from sync_engine.storage.redis.shards import Arg, Shard

__all__ = ["Line"]

log = logging.getLogger(__name__)

R = TypeVar("R")

CONNECTIONS_MAX = 16
"""Calls to Redis at a time; one is enough to keep it busy, the rest is for stalls. Further calls wait."""

SCHEMES = ("redis", "rediss", "unix")

# The first word of errors that say "not now" rather than "not this", where redis-py has no class for them.
_NOT_NOW = ("BUSY", "LOADING", "MASTERDOWN", "MISCONF", "NOREPLICAS", "OOM", "READONLY", "UNKILLABLE")


class Line:
    """``Servers`` that are one: a bounded pool of connections. Opens no connection before the first call."""

    single = True

    def __init__(self, url: str, prefix: str, *, timeout_ms: int, response_timeout_ms: int) -> None:
        self.shards: Sequence[Shard] = (Shard(0, prefix),)
        self.client = _client(url, timeout_ms / 1000, response_timeout_ms / 1000)
        self._pool = self.client.connection_pool
        self._tasks: set[asyncio.Task[Any]] = set()
        self._closed = False
        self._capabilities: Capabilities | None = None

    async def capabilities(self) -> Capabilities:
        """What the server can do; asked once, when it first answers."""
        if self._capabilities is None:
            try:
                # Below our prefix, since an ACL may allow us no other key.
                await self.call(self.shards[0], "JSON.MGET", f"{self.shards[0].prefix}__local__:none", "$")
                found = Capabilities(json=True)
            except (StoreError, _NotPermitted) as refused:
                found = Capabilities(json=json_answers(refused.reason))
            if self._capabilities is None and not found.json:
                log.warning("this Redis has no RedisJSON: JSON items are kept as strings and cannot be searched there")
            self._capabilities = found
        return self._capabilities

    def shard_of(self, object_id: str) -> Shard:
        """The only one."""
        return self.shards[0]

    def by_shard(self, ids: Sequence[str]) -> dict[Shard, Sequence[str]]:
        """All of them in the only one."""
        return {self.shards[0]: ids} if ids else {}

    async def call(self, shard: Shard, *args: Arg) -> Any:
        """The reply to one command. Raises ``TierUnavailable`` or ``StoreError``."""
        return await asyncio.shield(self.own(self.exchange(shard, *args)))

    async def everywhere(self, *args: Arg) -> list[Any]:
        """The replies of every primary to one command: of the only one."""
        return [await self.call(self.shards[0], *args)]

    async def run(self, shard: Shard, script: Script, keys: Sequence[Arg], args: Sequence[Arg]) -> Any:
        """The reply to one script, sent by its hash and, where the server has not seen it, by its text."""
        return await asyncio.shield(self.start(shard, script, keys, args))

    def start(self, shard: Shard, script: Script, keys: Sequence[Arg], args: Sequence[Arg]) -> asyncio.Task[Any]:
        """``run`` in a task of ours; whoever awaits it does so shielded."""
        return self.own(self.evaluate(shard, script, keys, args))

    async def evaluate(self, shard: Shard, script: Script, keys: Sequence[Arg], args: Sequence[Arg]) -> Any:
        """``run`` in the caller's own task, which must be one that nobody cancels."""
        try:
            return await self.exchange(shard, "EVALSHA", script.sha, len(keys), *keys, *args)
        except _UnknownScript:
            return await self.exchange(shard, "EVAL", script.text, len(keys), *keys, *args)

    async def exchange(self, shard: Shard, *args: Arg) -> Any:
        """One command and its reply in the caller's own task, which must be one that nobody cancels."""
        if self._closed:
            raise NotRunning("the connection to Redis is closed")
        packed = hiredis.pack_command(args)  # type: ignore[arg-type]  # its stub forgets that it takes str
        try:
            connection = await self._pool.get_connection()  # type: ignore[no-untyped-call]  # redis-py leaves it out
            try:
                await connection.send_packed_command(packed, check_health=False)
                return await connection.read_response()
            finally:
                await self._pool.release(connection)
        except (RedisError, OSError) as failed:
            raise translated(failed) from None

    async def close(self) -> None:
        """Let calls under way finish, then close every connection. Safe to call twice."""
        while self._tasks:
            await asyncio.wait(self._tasks)
        self._closed = True
        await self.client.aclose(close_connection_pool=True)

    def own(self, call: Coroutine[Any, Any, R]) -> asyncio.Task[R]:
        task = asyncio.get_running_loop().create_task(call)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # a caller that was cancelled will not ask for it

    def __repr__(self) -> str:
        return f"<Line {len(self._tasks)} calls under way{', closed' if self._closed else ''}>"


class _NotPermitted(TierUnavailable):
    """The user may not run the command: nothing is known of the items, and an administrator can mend it."""


class _UnknownScript(SyncEngineError):
    """The server forgot the script, or never had it."""


def translated(failed: Exception) -> SyncEngineError:
    """The driver's error in our words. Texts come from the server and the socket, never from the URL."""
    if isinstance(failed, NoScriptError):
        return _UnknownScript(str(failed))
    if isinstance(failed, OutOfMemoryError):
        return TierUnavailable("l2", "out of memory: nothing of the call was written")
    # During a handshake redis-py tells a refusal as a plain ConnectionError.
    if isinstance(failed, AuthenticationError) or "username-password" in str(failed):
        return TierUnavailable("l2", "the server refused the credentials")
    if isinstance(failed, RedisConnectionError | RedisTimeoutError | OSError):
        return TierUnavailable("l2", f"{type(failed).__name__}: {failed}" if str(failed) else type(failed).__name__)
    if isinstance(failed, NoPermissionError):
        return _NotPermitted("l2", str(failed))
    if isinstance(failed, ReadOnlyError | ClusterError | TryAgainError | AskError):
        return TierUnavailable("l2", f"{type(failed).__name__}: {failed}")
    if isinstance(failed, ResponseError) and str(failed).startswith(_NOT_NOW):
        return TierUnavailable("l2", str(failed))
    return StoreError("l2", str(failed))


def _client(url: str, timeout_s: float, response_timeout_s: float) -> Redis:
    try:
        scheme = urlsplit(url).scheme
        if scheme not in SCHEMES:
            raise ConfigError(f"redis_url: the scheme is {scheme!r}; must be one of {', '.join(SCHEMES)}")
        pool = BlockingConnectionPool.from_url(
            url,
            max_connections=CONNECTIONS_MAX,
            timeout=timeout_s,
            protocol=3,
            decode_responses=False,
            socket_connect_timeout=timeout_s,
            socket_timeout=response_timeout_s,
            retry=Retry(NoBackoff(), 0),
            client_name="sync-engine",
            **({} if scheme == "unix" else {"socket_keepalive": True}),
        )
        # Opens nothing, but refuses options in the URL that no connection has.
        pool.make_connection()  # type: ignore[no-untyped-call]  # redis-py leaves it out
        return Redis(connection_pool=pool)
    except (ValueError, TypeError):
        # The parser's text may quote a part of the URL, and with it the password.
        raise ConfigError("redis_url: not a valid URL; like redis://user:password@host:6379/0") from None
