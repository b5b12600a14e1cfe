"""The life of a server process of our own: its private folder, the wait until it answers, signals, its end.

What is common to the embedded Redis and to the servers of tests; how each is set up and asked is with it. A server
lives as long as this process at most, and its folder goes with it: at ``stop``, at garbage collection, at Python's
exit. Nothing here holds on to an event loop.
"""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import signal
import socket
import weakref
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from sync_engine._child import Child
from sync_engine.errors import NotRunning

__all__ = ["ENDED_WITHIN_S", "LOG_TAIL_BYTES", "ServerProcess", "Startable", "free_port"]

STARTS_MAX = 5
"""A free port can be taken by somebody else between our look and the server's bind."""
ENDED_WITHIN_S = 20.0
LOG_TAIL_BYTES = 4096
PORTS = range(10_000, 22_000)
"""Below the ports that the kernel gives to clients, also with the 10,000 that a cluster node adds for its bus: a
server that was killed finds its port free again."""

_CHANCE = random.SystemRandom()  # two processes with one seed would look for the same ports


class Startable(ABC):
    """What is started and stopped: by calls, or by ``async with``."""

    @abstractmethod
    async def start(self) -> None:
        """Start it and wait until it answers; nothing happens if it runs."""

    @abstractmethod
    async def stop(self) -> None:
        """End it and remove what it kept for itself."""

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()


class ServerProcess(Startable):
    """One server, which may be killed and started again; it listens where it did as long as its folder is there."""

    _ready_within_s: float

    def __init__(self) -> None:
        self._home: Path | None = None
        self._log = Path()
        self._log_start = 0  # of what this start has logged
        self._child: Child | None = None
        self._clean_up: weakref.finalize[..., ServerProcess] | None = None

    async def stop(self) -> None:
        """End it and remove its private folder."""
        try:
            await self._end()
        finally:
            self._discard()

    async def kill(self) -> None:
        """SIGKILL, and wait until the process is gone. ``start`` brings it back at the same address."""
        if self._child is not None:
            self._child.send(signal.SIGKILL)
            await self._child.gone(ENDED_WITHIN_S)

    async def pause(self) -> None:
        """SIGSTOP: the kernel still accepts connections, nobody answers. Returns when the server stands still."""
        child = self._living()
        child.send(signal.SIGSTOP)
        while child.alive and not child.stands_still():  # noqa: ASYNC110 - the kernel's news, no asyncio.Event
            await asyncio.sleep(0.001)

    async def resume(self) -> None:
        """SIGCONT: the end of a pause."""
        self._living().send(signal.SIGCONT)

    @property
    def pid(self) -> int:
        """Process id of the server; raises ``NotRunning`` where there is none."""
        return self._living().pid

    @property
    def running(self) -> bool:
        """Whether the process exists (a paused one does)."""
        return self._child is not None and self._child.alive

    @abstractmethod
    async def _not_yet(self) -> str:
        """Why it does not answer; empty if it does."""

    async def _end(self) -> None:
        await self.kill()

    async def _tried(self, attempt: Callable[[], Awaitable[Child]], pause_s: float = 0.0) -> str:
        """Launch it, again where its port was taken; empty once it answers, else what is wrong."""
        trouble = ""
        for _ in range(STARTS_MAX):
            trouble = await self._until_ready(await attempt())
            if not trouble or "ddress already in use" not in self._log_tail():
                break
            await asyncio.sleep(pause_s)
        return trouble

    def _launch(
        self, argv: Sequence[str], home: Path, log: Path, *, log_on: bool, kept_fds: Sequence[int] = ()
    ) -> Child:
        """Start the process in its folder; what it says goes behind what is in the log (``log_on``) or replaces it."""
        self._log, self._log_start = log, log.stat().st_size if log_on and log.exists() else 0
        with log.open("ab" if log_on else "wb") as out:
            self._child = Child(argv, home, out.fileno(), kept_fds)
        if self._clean_up is not None:
            self._clean_up.detach()
        self._clean_up = weakref.finalize(self, _clean_up, os.getpid(), home, self._child)
        return self._child

    async def _until_ready(self, child: Child) -> str:
        clock = asyncio.get_running_loop()
        begin, silent = clock.time(), "not asked"
        while child.alive:
            silent = await self._not_yet()
            if not silent:
                return ""
            if clock.time() - begin > self._ready_within_s:
                await self.kill()
                return f"it was not ready within {self._ready_within_s:g} s ({silent})"
            await asyncio.sleep(0.01)
        return f"it ended while starting (exit status {child.status}; {silent})"

    def _log_tail(self) -> str:
        with self._log.open("rb") as log:
            log.seek(max(self._log_start, log.seek(0, os.SEEK_END) - LOG_TAIL_BYTES))
            return log.read().decode(errors="replace")

    def _living(self) -> Child:
        if self._child is None or not self._child.alive:
            raise NotRunning(f"{type(self).__name__} is not running")
        return self._child

    def _discard(self) -> None:
        if self._clean_up is not None:
            self._clean_up()
        elif self._home is not None:
            shutil.rmtree(self._home, ignore_errors=True)
        self._clean_up = self._child = self._home = None


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on, nor on the one 10,000 above it."""
    while True:
        port = _CHANCE.choice(PORTS)
        try:
            for probed in (port, port + 10_000):
                with socket.socket() as probe:
                    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                    probe.bind(("127.0.0.1", probed))
        except OSError:
            continue
        return port


def _clean_up(owner_pid: int, home: Path, child: Child) -> None:
    """What must not stay behind, also when nobody called ``stop``."""
    if os.getpid() != owner_pid:
        return  # A forked child of ours: server and folder belong to its parent.
    child.send(signal.SIGKILL)
    shutil.rmtree(home, ignore_errors=True)
