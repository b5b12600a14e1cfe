"""redis-py's connections, made to end when they are told to: by a cancel, and with what they have not sent yet."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any

from redis.asyncio import Connection, SSLConnection, UnixDomainSocketConnection
from redis.asyncio.connection import AbstractConnection
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

__all__ = ["TcpConnection", "TlsConnection", "UnixConnection"]


class _Ending(AbstractConnection):
    async def send_packed_command(self, command: bytes | str | Iterable[bytes], check_health: bool = True) -> None:
        """Send as redis-py does, but without ``asyncio.wait_for``.

        Which makes a task for each call and, on Python 3.11, forgets a cancel that comes at the moment it is done:
        whoever waits without a time-out then waited for ever.
        """
        if not self.is_connected:
            await self.connect_check_health(check_health=False)
        if check_health:
            await self.check_health()  # type: ignore[no-untyped-call]
        writer = self._writer
        assert writer is not None, "connected"
        try:
            async with asyncio.timeout(self.socket_timeout):
                if isinstance(command, str):
                    command = command.encode()
                writer.writelines([command] if isinstance(command, bytes) else command)
                await writer.drain()
        except BaseException as failed:  # failed or cancelled alike: a part of it may be on its way
            await self.disconnect(nowait=True)
            if isinstance(failed, TimeoutError):
                raise RedisTimeoutError("Timeout writing to socket") from None
            if isinstance(failed, OSError):
                raise RedisConnectionError(f"Error while writing to socket: {failed.args}") from failed
            raise

    async def disconnect(self, nowait: bool = False, *args: Any, **why: Any) -> None:
        """Close it; at once (``nowait``) without what is not sent yet.

        Which would else be kept, and sent when the server takes it: long after the call has failed.
        """
        if nowait and self._writer is not None:
            self._writer.transport.abort()
        await super().disconnect(nowait, *args, **why)


class TcpConnection(_Ending, Connection):
    """To a host and port."""


class TlsConnection(_Ending, SSLConnection):
    """The same, encrypted."""


class UnixConnection(_Ending, UnixDomainSocketConnection):
    """To a socket of this machine."""

    async def _connect(self) -> None:
        # redis-py's says hello as well, and once more in ``redis_connect_func``; and hides why it was refused.
        async with asyncio.timeout(self.socket_connect_timeout):
            self._reader, self._writer = await asyncio.open_unix_connection(path=self.path)
