"""A connection of its own for commands that wait, such as XREAD BLOCK, so that they take none from the pool."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import hiredis
from redis.exceptions import RedisError

from sync_engine.errors import NotRunning, TierUnavailable
from sync_engine.storage.redis.pool import Pool
from sync_engine.storage.redis.refusals import CLOSED, translated
from sync_engine.storage.redis.shards import Arg

__all__ = ["Listener", "listening"]


class Listener:
    """One command at a time. A cancelled or failed one closes the connection, and the next opens it again."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._connection = pool.make_connection()
        self._busy = asyncio.Lock()
        self._patience: asyncio.Timeout | None = None
        self._closed = False

    async def exchange(self, *args: Arg, timeout_s: float | None) -> Any:
        """The reply to a command that may take ``timeout_s``, or None: for ever, and then the network's keepalive
        alone finds out that the server is gone. Raises ``TierUnavailable`` or ``StoreError``."""
        packed = hiredis.pack_command(args)  # type: ignore[arg-type]  # its stub forgets that it takes str
        async with self._busy:
            try:
                if not self._closed:
                    await self._pool.ensure_connection(self._connection)
                if self._closed:
                    raise NotRunning(CLOSED)
                async with asyncio.timeout(timeout_s) as self._patience:
                    await self._connection.send_packed_command(packed, check_health=False)
                    reply = await self._connection.read_response(timeout=math.inf)
            except TimeoutError:
                if self._closed:
                    raise NotRunning(CLOSED) from None
                raise TierUnavailable("l2", f"no reply within {timeout_s} s") from None
            except (RedisError, OSError) as failed:
                raise translated(failed) from None
            finally:
                self._patience = None
            if not self._pool.current(self._connection):
                raise TierUnavailable("l2", "the reply is of a server that is not the one any more")
            return reply

    async def close(self) -> None:
        """End what waits, which raises ``NotRunning``, and close the connection. Safe to call twice."""
        self._closed = True
        if self._patience is not None:
            self._patience.reschedule(asyncio.get_running_loop().time())
        async with self._busy:
            self._pool.forget(self._connection)
            with suppress(RedisError, OSError):
                await self._connection.disconnect()


@asynccontextmanager
async def listening(pool: Pool, listeners: set[Listener]) -> AsyncIterator[Listener]:
    """A listener among ``listeners`` for as long as it is used."""
    listener = Listener(pool)
    listeners.add(listener)
    try:
        yield listener
    finally:
        listeners.discard(listener)
        await listener.close()
