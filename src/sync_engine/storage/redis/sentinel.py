"""The primary of a replicated Redis, found by asking the sentinels that watch it; nobody else follows a failover."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from redis.asyncio.connection import AbstractConnection
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import AuthenticationError, RedisError, ResponseError
from redis.exceptions import ConnectionError as RedisConnectionError

from sync_engine.owned import outlasting
from sync_engine.storage.redis.connection import TcpConnection, TlsConnection
from sync_engine.storage.redis.pool import Pool, ask, dirty, tls_context

__all__ = ["SentinelPool", "Sentinels"]

LOOK_EVERY_S = 1.0
"""Between two looks at the sentinels while connections work: a primary that they have replaced may still answer."""

Address = tuple[str, int]


class Sentinels:
    """Those that watch ``service``. ``options`` are redis-py's for a connection to them, beside them ``ssl``."""

    def __init__(
        self, addresses: Sequence[Address], service: str, options: Mapping[str, Any], *, timeout_ms: int
    ) -> None:
        options = dict(options)
        kind = TlsConnection if options.pop("ssl", False) else TcpConnection
        self._service = service
        # Half of what connecting may take: one that is silent must not keep us from those that are not.
        self._patience_s = timeout_ms / 1000 / 2
        self._connections = [
            kind(
                host=host,
                port=port,
                **options,
                protocol=2,
                driver_info=None,
                socket_connect_timeout=self._patience_s,
                socket_timeout=self._patience_s,
                retry=Retry(NoBackoff(), 0),
            )
            for host, port in addresses
        ]
        for connection in self._connections:
            if isinstance(connection, TlsConnection):
                connection.ssl_context.context = tls_context(connection.ssl_context)
        self._asking: asyncio.Task[Address] | None = None

    async def primary(self) -> Address:
        """Where the primary is, by the newest of what most of them say. Raises redis-py's errors.

        Callers at the same time share one look.
        """
        if self._asking is None or self._asking.done():
            self._asking = asyncio.get_running_loop().create_task(self._ask_them())
            self._asking.add_done_callback(lambda asked: asked.cancelled() or asked.exception())  # all may be gone
        return await outlasting(self._asking)

    async def close(self) -> None:
        """Close the connections to them."""
        await _ended(self._asking)
        for connection in self._connections:
            with suppress(RedisError, OSError):
                await connection.disconnect()

    async def _ask_them(self) -> Address:
        asked = [asyncio.ensure_future(self._ask(connection)) for connection in self._connections]
        answers: list[_Answer] = []
        refused = False
        try:
            for answer in asyncio.as_completed(asked):
                try:
                    answers.append(await answer)
                except (RedisError, OSError) as failed:
                    refused |= isinstance(failed, AuthenticationError)
                if len(answers) > len(asked) // 2:
                    break
        finally:
            for late in asked:
                late.cancel()
            await asyncio.gather(*asked, return_exceptions=True)
        if not answers:
            raise RedisConnectionError(f"no sentinel {'takes the credentials' if refused else 'answers'}")
        newest = max(answers, key=lambda answer: answer.epoch)
        if newest.address is None:
            raise RedisConnectionError("the sentinels know no primary of that name")
        if newest.down:
            raise RedisConnectionError("the sentinels say that the primary is down")
        return newest.address

    async def _ask(self, connection: AbstractConnection) -> _Answer:
        try:
            async with asyncio.timeout(self._patience_s):
                if connection.is_connected and await dirty(connection):
                    await connection.disconnect(nowait=True)
                await connection.connect()  # type: ignore[no-untyped-call]
                # The first follows a failover sooner, the second says how much it is worth, to those who may ask.
                address, state = await ask(
                    connection,
                    ("SENTINEL", "GET-MASTER-ADDR-BY-NAME", self._service),
                    ("SENTINEL", "MASTER", self._service),
                )
        except BaseException:  # failed or cancelled alike: no reply is left for the next look
            await connection.disconnect(nowait=True)
            raise
        if isinstance(address, ResponseError):
            raise address
        if address is None:
            return _Answer(-1, None, False)
        found = (address[0].decode(), int(address[1]))
        said = {} if isinstance(state, ResponseError) else dict(zip(state[::2], state[1::2], strict=False))
        down = b"o_down" in said.get(b"flags", b"").split(b",")
        same = (said.get(b"ip", b"").decode(), int(said.get(b"port", 0))) == found
        return _Answer(int(said.get(b"config-epoch", 0)), found, down and same)


@dataclass(frozen=True, slots=True)
class _Answer:
    epoch: int
    address: Address | None
    down: bool


class SentinelPool(Pool):
    """A pool whose connections go where the sentinels say that the primary is, if it says so itself."""

    def __init__(self, options: Mapping[str, Any], sentinels: Sentinels, **bounds: Any) -> None:
        super().__init__(options, **bounds)
        self._sentinels = sentinels
        self._address: Address | None = None
        self._looked = 0.0
        self._looking: asyncio.Task[None] | None = None

    async def aim(self, connection: AbstractConnection) -> None:
        """Set the address to the primary's."""
        assert isinstance(connection, TcpConnection | TlsConnection), "sentinels know of TCP only"
        self._address = connection.host, connection.port = await self._sentinels.primary()

    def accept(self, replication: Mapping[str, str]) -> None:
        """Refuse a replica: what it would say may be old."""
        if replication.get("role", "master") != "master":
            raise RedisConnectionError("the server that the sentinels name is a replica")

    async def ensure_connection(self, connection: AbstractConnection) -> None:
        """Beside what the pool does, look now and then whether the primary is still the one."""
        now = asyncio.get_running_loop().time()
        due = connection.is_connected and now - self._looked > LOOK_EVERY_S
        if due and (self._looking is None or self._looking.done()):
            self._looked = now
            self._looking = asyncio.get_running_loop().create_task(self._look())
        await super().ensure_connection(connection)

    async def aclose(self) -> None:
        """Close every connection, those to the sentinels too."""
        await _ended(self._looking)
        await self._sentinels.close()
        await super().aclose()

    async def _look(self) -> None:
        with suppress(RedisError, OSError):  # without sentinels the primary that answers has to do
            if await self._sentinels.primary() != self._address:
                self.renew()


async def _ended(task: asyncio.Task[Any] | None) -> None:
    if task is not None:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
