"""A proxy between a client and its server that breaks connections on purpose, at a byte that the test chooses.

It knows nothing of the protocol inside: bytes up (requests) and bytes down (replies) are counted and forwarded in
order until a fault is set. A fault counts from the moment it is set, over all connections together, strikes once,
and is then forgotten; ``refuse``, ``blackhole``, ``ignore_new`` and ``delay`` last until ``heal``.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Final, Literal
from urllib.parse import parse_qsl, unquote, urlencode, urlsplit, urlunsplit

__all__ = ["CuttingProxy"]

CHUNK_BYTES = 64 * 1024
RESET_ON_CLOSE = struct.pack("ii", 1, 0)
"""SO_LINGER with no time to linger: close() then sends RST, as a crashed peer's kernel does."""

SQL_PORTS: Final = {"mysql": 3306, "mariadb": 3306, "postgresql": 5432}
PORTS: Final = {"redis": 6379, **SQL_PORTS}

Upstream = str | tuple[str, int]


class CuttingProxy:
    """``async with CuttingProxy(url) as proxy: client(proxy.url_for(url))``.

    ``upstream`` is the URL of a Redis (``redis://`` or ``unix://``) or of a database (``mysql://``,
    ``postgresql://``), its credentials unused, or ``unix:/path``, or ``(host, port)``. Listens on a free port of
    127.0.0.1, which stays reserved while it refuses. All methods that set a fault return at once and belong to the
    loop's thread. Counters: ``connections`` accepted, ``cuts`` made, ``bytes_up`` and ``bytes_down`` forwarded.
    """

    def __init__(self, upstream: Upstream) -> None:
        self._upstream = _address(upstream)
        self._listener: socket.socket | None = None
        self._port = 0
        self._links: set[_Link] = set()
        self._refusing = False
        self._swallowing = False
        self._ignoring = False
        self._delay_s = 0.0
        self._cut_up: int | None = None
        self._cut_down: int | None = None
        self._call_up: tuple[int, Callable[[], object]] | None = None
        self.connections = 0
        self.cuts = 0
        self.bytes_up = 0
        self.bytes_down = 0

    def refuse(self) -> None:
        """The server is down: existing connections are reset, new ones refused."""
        self._listen(False)
        self.cut_now()

    def blackhole(self) -> None:
        """The network swallows everything: connections are accepted, requests vanish, replies never come."""
        self._swallowing = True

    def ignore_new(self) -> None:
        """The server stands at its door: new connections are accepted and never answered, the others go on."""
        self._ignoring = True

    def delay(self, seconds: float) -> None:
        """Every piece of a reply is held back for ``seconds``."""
        self._delay_s = seconds

    def cut_after_reply_bytes(self, count: int) -> None:
        """Requests go through; after ``count`` more bytes of replies the connection that carried them is reset.

        0: reset when the server has begun to answer, so it did the work and the client never hears of it.
        """
        self._cut_down = count

    def cut_after_request_bytes(self, count: int) -> None:
        """After ``count`` more bytes of requests both sides of the connection are reset; 0: nothing gets through."""
        self._cut_up = count

    def call_after_request_bytes(self, count: int, callback: Callable[[], object]) -> None:
        """Call ``callback`` once ``count`` more bytes of requests have been forwarded, before any further byte is.

        For example ``lambda: os.kill(server.pid, signal.SIGKILL)``, to kill the server within a batch.
        """
        self._call_up = (count, callback)

    def cut_now(self) -> None:
        """Reset every connection there is; new ones work."""
        for link in self._links:
            link.task.cancel()

    def heal(self) -> None:
        """No fault from now on. Connections that lost bytes are reset: what they would carry on with is nonsense."""
        self._swallowing, self._ignoring, self._delay_s = False, False, 0.0
        self._cut_up = self._cut_down = self._call_up = None
        for link in self._links:
            if link.torn:
                link.task.cancel()
        self._listen(True)

    def url_for(self, original_url: str) -> str:
        """``original_url`` with this proxy's address in place of the server's; credentials, database, options kept."""
        parts = urlsplit(original_url)
        if parts.scheme not in ("redis", "unix", *SQL_PORTS):
            raise ValueError("redis://, unix:// and databases go through a proxy; TLS would notice it")
        credentials = "".join(parts.netloc.rpartition("@")[:2])
        if parts.scheme in SQL_PORTS:
            return urlunsplit(parts._replace(netloc=f"{credentials}127.0.0.1:{self._port}"))
        options = parse_qsl(parts.query, keep_blank_values=True)
        database = parts.path.strip("/") if parts.scheme == "redis" else ""
        query = f"?{urlencode(options)}" if options else ""
        return f"redis://{credentials}127.0.0.1:{self._port}{f'/{database}' if database else ''}{query}"

    @property
    def port(self) -> int:
        """The port it listens on."""
        return self._port

    async def __aenter__(self) -> CuttingProxy:
        self._listen(True)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._listen(False)
        if self._listener is not None:
            self._listener.close()
            self._listener = None
        links = list(self._links)
        self.cut_now()
        await asyncio.gather(*(link.task for link in links), return_exceptions=True)

    def __repr__(self) -> str:
        mode = "refusing" if self._refusing else "swallowing" if self._swallowing else "forwarding"
        traffic = f"{self.bytes_up} bytes up, {self.bytes_down} down, {self.cuts} cuts"
        return f"<CuttingProxy port {self._port} {mode} | {len(self._links)} connections open | {traffic}>"

    def _listen(self, listening: bool) -> None:
        loop = asyncio.get_running_loop()
        if self._listener is not None:
            if listening != self._refusing:
                return
            loop.remove_reader(self._listener)
            self._listener.close()
        # Bound but not listening refuses connections and keeps the port for us.
        self._listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._listener.bind(("127.0.0.1", self._port))
        self._port = self._listener.getsockname()[1]
        self._refusing = not listening
        if listening:
            self._listener.setblocking(False)
            self._listener.listen(512)
            loop.add_reader(self._listener, self._accept, self._listener)

    def _accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(BlockingIOError, ConnectionAbortedError):
            client, _ = listener.accept()
            client.setblocking(False)
            self.connections += 1
            server = socket.socket(socket.AF_UNIX if isinstance(self._upstream, str) else socket.AF_INET)
            server.setblocking(False)
            for side in (client, server):
                if side.family == socket.AF_INET:
                    # As clients and servers do themselves: what is held back is to be held back by ``delay`` alone.
                    side.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            link = _Link(client, server)
            link.task = asyncio.get_running_loop().create_task(self._serve(link))
            link.task.add_done_callback(lambda _: self._end(link))
            self._links.add(link)

    def _end(self, link: _Link) -> None:
        # Not in _serve itself: a task that is cancelled before its first step runs none of its code.
        self._links.discard(link)
        for side in (link.client, link.server):
            if not link.ended_in_order:
                with contextlib.suppress(OSError):
                    side.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
            side.close()

    async def _serve(self, link: _Link) -> None:
        loop = asyncio.get_running_loop()
        # OSError: the server is not there, or the client has gone, or a cut; the others find a reset connection.
        with contextlib.suppress(OSError):
            if self._swallowing or self._ignoring:
                link.torn = True
                while await loop.sock_recv(link.client, CHUNK_BYTES):
                    pass
                return
            await loop.sock_connect(link.server, self._upstream)
            pumps = [loop.create_task(self._pump(link, way)) for way in ("up", "down")]
            try:
                done, _ = await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
                link.ended_in_order = all(pump.exception() is None for pump in done)
            finally:
                for pump in pumps:
                    pump.cancel()
                await asyncio.gather(*pumps, return_exceptions=True)

    async def _pump(self, link: _Link, way: Literal["up", "down"]) -> None:
        """Forward one direction until its source ends (returns) or the connection is to be cut (``OSError``)."""
        loop = asyncio.get_running_loop()
        source, sink = (link.client, link.server) if way == "up" else (link.server, link.client)
        while chunk := await loop.sock_recv(source, CHUNK_BYTES):
            if way == "down" and self._delay_s:
                await asyncio.sleep(self._delay_s)
            if self._swallowing:
                link.torn = True
                continue
            if way == "down":
                await self._down(chunk, sink)
            else:
                await self._up(chunk, sink)

    async def _up(self, chunk: bytes, sink: socket.socket) -> None:
        left = memoryview(chunk)
        # All decisions are made before an await, so that two connections cannot spend the same budget.
        while left:
            take, cut, call = len(left), False, None
            if self._call_up is not None:
                take = min(take, self._call_up[0])
            if self._cut_up is not None:
                take = min(take, self._cut_up)
                self._cut_up -= take
                cut = self._cut_up == 0
            if self._call_up is not None:
                count, callback = self._call_up
                self._call_up, call = (None, callback) if count == take else ((count - take, callback), None)
            if cut:
                self._cut_up = None
            piece, left = left[:take], left[take:]
            self.bytes_up += take
            await asyncio.get_running_loop().sock_sendall(sink, piece)
            if call is not None:
                call()
            if cut:
                raise self._cut()

    async def _down(self, chunk: bytes, sink: socket.socket) -> None:
        piece, cut = memoryview(chunk), False
        if self._cut_down is not None:
            piece = piece[: self._cut_down]
            self._cut_down -= len(piece)
            cut = self._cut_down == 0
            if cut:
                self._cut_down = None
        self.bytes_down += len(piece)
        await asyncio.get_running_loop().sock_sendall(sink, piece)
        if cut:
            raise self._cut()

    def _cut(self) -> ConnectionResetError:
        self.cuts += 1
        return ConnectionResetError("cut by the test")


@dataclass(eq=False, slots=True)
class _Link:
    """One client's connection with its way to the server."""

    client: socket.socket
    server: socket.socket
    task: asyncio.Task[None] = field(init=False)
    torn: bool = False
    """Bytes of it were swallowed."""
    ended_in_order: bool = False
    """One side closed it; otherwise both find it reset."""


def _address(upstream: Upstream) -> Upstream:
    """A path, or host and port."""
    if isinstance(upstream, tuple):
        return upstream
    parts = urlsplit(upstream)
    if parts.scheme == "unix":
        return unquote(parts.path)
    if parts.hostname and (usual := PORTS.get(parts.scheme)):
        return parts.hostname, parts.port or usual
    raise ValueError("upstream: expected redis://host:port, the URL of a database, unix:/path or (host, port)")
