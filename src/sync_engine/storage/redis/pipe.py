"""Calls to one server that share round trips: what arrives while others are under way goes out together.

A cluster parts every batch into many small calls, and getting a connection, a write and a read for each of them costs
more than what they do.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any

from redis.exceptions import RedisError, ResponseError

from sync_engine.errors import TierUnavailable
from sync_engine.storage.redis.pool import Pool
from sync_engine.storage.redis.refusals import translated

__all__ = ["Pipe"]

CALLS_MAX = 64
BYTES_MAX = 256 * 1024
"""Of one round trip: a few ms of the server. A call that is longer by itself goes alone."""
ROUND_TRIPS_MAX = 4
"""At a time: one is answered and one waits there, while the next is written and the last one read."""

Own = Callable[[Coroutine[Any, Any, None]], object]


class Pipe:
    """The calls to one server, packed; answers in the order of the calls that share a connection."""

    def __init__(self, pool: Pool, own: Own) -> None:
        self._pool = pool
        self._own = own
        self._waiting: deque[tuple[bytes, asyncio.Future[Any]]] = deque()
        self._under_way = 0

    @property
    def idle(self) -> bool:
        """Whether nothing is under way."""
        return not self._under_way

    def send(self, packed: bytes) -> asyncio.Future[Any]:
        """The reply to come, or the error in our words."""
        reply: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._waiting.append((packed, reply))
        if self._under_way < ROUND_TRIPS_MAX:
            self._under_way += 1
            self._own(self._work_off())
        return reply

    async def _work_off(self) -> None:
        try:
            while self._waiting:
                await self._round_trip(self._next())
        finally:
            self._under_way -= 1

    def _next(self) -> list[tuple[bytes, asyncio.Future[Any]]]:
        calls = [self._waiting.popleft()]
        size = len(calls[0][0])
        while self._waiting and len(calls) < CALLS_MAX and size + len(self._waiting[0][0]) <= BYTES_MAX:
            calls.append(self._waiting.popleft())
            size += len(calls[-1][0])
        return calls

    async def _round_trip(self, calls: list[tuple[bytes, asyncio.Future[Any]]]) -> None:
        try:
            connection = await self._pool.get_connection()
            try:
                await connection.send_packed_command([packed for packed, _ in calls], check_health=False)
                for _, reply in calls:
                    try:
                        said = await connection.read_response()
                    except ResponseError as refused:
                        _fail(reply, translated(refused))
                        continue
                    if not self._pool.current(connection):
                        _fail(reply, TierUnavailable("l2", "the reply is of a server that is not the one any more"))
                    elif not reply.done():
                        reply.set_result(said)
            finally:
                await self._pool.release(connection)
        except Exception as failed:  # noqa: BLE001 - whatever it is, it is told to those who wait
            # The connection is closed by now: no reply of these calls can reach another.
            for _, reply in calls:
                _fail(reply, translated(failed) if isinstance(failed, RedisError | OSError) else failed)


def _fail(reply: asyncio.Future[Any], failed: Exception) -> None:
    if not reply.done():
        reply.set_exception(failed)
        reply.exception()  # whoever waited may be gone
