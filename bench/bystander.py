"""Another client, in a process of its own: one small read every 2 ms, and how long each took.

It has its own process because a client that shares the event loop with ours would time our Python, not the server.
"""

from __future__ import annotations

import asyncio
import gc
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from statistics import quantiles
from threading import Event

import orjson
from redis import Redis

from bench.harness import check

__all__ = ["Bystander", "Waits"]

EVERY_S = 0.002
BEGUN_WITHIN_S = 10


@dataclass(frozen=True, slots=True)
class Waits:
    """Of so many reads, in seconds."""

    count: int
    p99: float
    most: float


class Bystander:
    """``async with Bystander(url, key) as other: await other.begin(); ...; waits = await other.end()``."""

    def __init__(self, url: str, key: str) -> None:
        self._url = url
        self._key = key

    async def __aenter__(self) -> Bystander:
        pipe = asyncio.subprocess.PIPE
        self._process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "bench.bystander", stdin=pipe, stdout=pipe
        )
        # The URL holds the server's password, so it goes in by the pipe and not by the command line.
        assert self._process.stdin is not None
        self._process.stdin.write(f"{self._url}\n{self._key}\n".encode())
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        await self._process.wait()

    async def begin(self) -> None:
        """Return when it is reading."""
        await self._asked("begin")

    async def end(self) -> Waits:
        """Let it stop, and what it saw since ``begin``."""
        return Waits(**orjson.loads(await self._asked("end")))

    async def _asked(self, what: str) -> bytes:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(what.encode() + b"\n")
        await self._process.stdin.drain()
        answer = await self._process.stdout.readline()
        check(bool(answer), "the bystander's process ended")
        return answer


def _serve() -> None:
    url, key = sys.stdin.readline().strip(), sys.stdin.readline().strip()
    gc.disable()  # a pause of our own would look like one of the server
    with Redis.from_url(url) as client, ThreadPoolExecutor(1) as thread:
        while sys.stdin.readline():
            reading, over = Event(), Event()
            reader = thread.submit(_read, client, key, reading, over)
            reading.wait(BEGUN_WITHIN_S)
            print("reading", flush=True)
            sys.stdin.readline()
            over.set()
            waits = reader.result()
            figures = Waits(len(waits), quantiles(waits, n=100, method="inclusive")[-1], max(waits))
            print(orjson.dumps(figures).decode(), flush=True)


def _read(client: Redis, key: str, reading: Event, over: Event) -> list[float]:
    waits: list[float] = []
    client.ping()  # connects
    while not over.is_set() or len(waits) < 2:
        start = time.perf_counter()
        found = client.execute_command("JSON.GET", key)  # type: ignore[no-untyped-call]  # redis-py
        wait = time.perf_counter() - start
        check(found is not None, "the bystander's item is gone")
        # Who waits asks less often. The reads that would have come meanwhile would have waited too: they count.
        while wait > 0:
            waits.append(wait)
            wait -= EVERY_S
        reading.set()
        time.sleep(EVERY_S)  # a process of its own, without an event loop
    return waits


if __name__ == "__main__":
    _serve()
