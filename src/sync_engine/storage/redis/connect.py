"""The line to one Redis: a bounded pool of connections, and calls that survive their caller.

Commands are packed by hiredis and sent over a pooled connection directly: redis-py's own asyncio packing
costs 0.5 µs per argument and its retry would send a write twice.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, contextmanager, suppress
from typing import Any

import hiredis
from redis.asyncio import Redis
from redis.exceptions import ReadOnlyError, RedisError

from sync_engine.errors import ConfigError, NotRunning, TierUnavailable
from sync_engine.storage.redis.calls import Calls
from sync_engine.storage.redis.capabilities import Capabilities, capabilities_of, questions
from sync_engine.storage.redis.listen import Listener, listening
from sync_engine.storage.redis.pool import CONNECTIONS_MAX, Pool, ask
from sync_engine.storage.redis.refusals import CLOSED, translated
from sync_engine.storage.redis.sentinel import SentinelPool, Sentinels
from sync_engine.storage.redis.shards import Arg, Shard

__all__ = ["CONNECTIONS_MAX", "Line", "checked_options"]

log = logging.getLogger(__name__)


class Line(Calls):
    """``Servers`` that are one. Opens no connection before the first call.

    ``options`` are redis-py's for a connection, as ``address.meaning_of`` finds them in a URL; with ``sentinels``
    the address among them is asked for. ``on_new_server`` is called before anything is read from a server that may
    not hold all that the one before it confirmed.
    """

    single = True

    def __init__(
        self,
        options: Mapping[str, Any],
        prefix: str,
        *,
        timeout_ms: int,
        response_timeout_ms: int,
        on_new_server: Callable[[], None] | None = None,
        sentinels: Sentinels | None = None,
    ) -> None:
        super().__init__(on_new_server)
        self.shards: Sequence[Shard] = (Shard(0, prefix),)
        bounds: dict[str, Any] = {
            "timeout_s": timeout_ms / 1000,
            "response_timeout_s": response_timeout_ms / 1000,
            "on_new_server": self._new_server,
        }
        with checked_options():
            self._pool = Pool(options, **bounds) if sentinels is None else SentinelPool(options, sentinels, **bounds)
        self.client = Redis(connection_pool=self._pool)
        self._listeners: set[Listener] = set()

    def shard_of(self, object_id: str) -> Shard:
        """The only one."""
        return self.shards[0]

    def by_shard(self, ids: Sequence[str]) -> dict[Shard, Sequence[str]]:
        """All of them in the only one."""
        return {self.shards[0]: ids} if ids else {}

    async def primaries(self) -> Sequence[tuple[Shard, ...]]:
        """The only one has the only one."""
        return ((self.shards[0],),)

    async def exchange(self, shard: Shard, *args: Arg) -> Any:
        """One command and its reply in the caller's own task, which must be one that nobody cancels."""
        if self._closed:
            raise NotRunning(CLOSED)
        packed = hiredis.pack_command(args)  # type: ignore[arg-type]  # its stub forgets that it takes str
        try:
            connection = await self._pool.get_connection()
            try:
                await connection.send_packed_command(packed, check_health=False)
                reply = await connection.read_response()
                current = self._pool.current(connection)
            finally:
                await self._pool.release(connection)
        except (RedisError, OSError) as failed:
            if isinstance(failed, ReadOnlyError):
                self._pool.renew()  # it leads no more: whoever does may be found at the same address
            raise translated(failed) from None
        if not current:
            raise TierUnavailable("l2", "the reply is of a server that is not the one any more")
        return reply

    def begin_anew(self) -> None:
        """Whoever must know has been told that this server is another: meeting it is no news, and what was said before
        counts for nothing."""
        self._capabilities = self._finding = None
        self._pool.begin_anew()

    def listen(self, shard: Shard) -> AbstractAsyncContextManager[Listener]:
        """A connection beside the pool for commands that wait, such as XREAD BLOCK."""
        if self._closed:
            raise NotRunning(CLOSED)
        return listening(self._pool, self._listeners)

    async def close(self) -> None:
        """Let calls under way finish, end what listens, close every connection. Safe to call twice."""
        await self._finish()
        for listener in list(self._listeners):
            await listener.close()
        with suppress(RedisError, OSError):  # a server that does not answer gets no farewell
            await self._pool.aclose()

    async def _find_out(self) -> Capabilities:
        if self._closed:
            raise NotRunning(CLOSED)
        try:
            connection = await self._pool.get_connection()
            try:
                found = capabilities_of(await ask(connection, *questions(self.shards[0].prefix)))
                current = self._pool.current(connection)
            finally:
                await self._pool.release(connection)
        except (RedisError, OSError) as failed:
            raise translated(failed) from None
        if current and self._capabilities is None:
            self._capabilities = found
            if not found.json:
                log.warning("this Redis has no RedisJSON: JSON items are kept as strings and cannot be searched there")
            elif not found.search:
                log.warning("this Redis has no RediSearch: items cannot be searched there")
        return found

    def __repr__(self) -> str:
        return f"<Line {len(self._owned)} calls under way{', closed' if self._closed else ''}>"


@contextmanager
def checked_options() -> Iterator[None]:
    """What a connection has against its options, as ``ConfigError``."""
    try:
        yield
    except OSError as failed:
        what = failed.strerror or type(failed).__name__
        raise ConfigError(f"redis_ca_file, or a certificate that redis_url names, is of no use: {what}") from None
    except (ValueError, TypeError, RedisError):  # the driver's text may quote a part of the URL
        raise ConfigError("redis_url: not a valid URL, it has an option of no use there") from None
