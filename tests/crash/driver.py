"""A program to be killed: engines under a random workload that tells a journal what it begins and what is acknowledged.

    python driver.py        reads tasks from stdin, one JSON object per line; ends with its stdin

Each task runs in a process forked from this one, because importing everything anew would take longer than most of
the lives tested here. For each task two lines come back: the child's pid at once, its exit status (negative: the
signal) at the end. `move` and `work` are also what the tests themselves run against an engine in their own process.
"""

from __future__ import annotations

import asyncio
import ctypes
import gc
import json
import os
import random
import select
import signal
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from sync_engine import Ack, ContentType, SubmitOptions, SyncEngine, SyncEngineConfig, SyncItem
from sync_engine.errors import Backpressure, ConfigError, NotRunning, SyncEngineError, TierUnavailable
from sync_engine.testing.ackjournal import AckWriter

STORED, LEFT_IN_LOG, LOST, REFUSED, LIED, HUNG = 0, 3, 4, 5, 9, 10
"""How a driver ends: what ``stop`` reported, a refused start, a read that contradicted the writes before it, no end."""

STATES = ("new", "hot", "cold")
PUTS_AT_ONCE_MAX = 4
TRACED_WITHIN_S = 20.0
DOWN_WITHIN_S = 30.0
"""Beyond the time given to ``stop``: from then on a driver counts as hung and shows where its tasks are."""


@dataclass(frozen=True, slots=True)
class Move:
    """One operation of the workload: what the ``n``-th move on an id is depends on seed, id and ``n`` alone."""

    kind: Literal["put", "delete", "restate"]
    item: SyncItem | None = None
    state: str | None = None
    redis: bool = True
    ack: Ack = Ack.LOGGED


State = tuple[int, str] | None
"""What an id may hold: the number of the put that made it and the state it is in, or nothing."""


def move(seed: int, object_id: str, n: int) -> Move:
    """Puts of JSON in several shapes and of bytes, one in six a delete, one in six a change of state."""
    rng = random.Random(f"{seed} {object_id} {n}")
    kind = rng.choice(("put", "put", "put", "put", "delete", "restate"))
    ack = rng.choices((Ack.LOGGED, Ack.STORED, Ack.MEMORY), (8, 1, 1))[0]
    state = rng.choice(STATES)
    if kind == "delete":
        return Move("delete", ack=ack)
    if kind == "restate":
        return Move("restate", state=state, ack=ack)
    shape = rng.randrange(4)
    if shape == 0:
        content = rng.randbytes(rng.choice((0, 20, 3_000)))
    elif shape == 1:
        content = b'{ "n" : %d, "x":1e2 }' % n  # valid, and not how anybody would write it again
    else:
        content = json.dumps({"n": n, "text": "ö" * rng.randrange(200)}, ensure_ascii=False).encode()
    item = SyncItem(object_id, content, version=n, updated_at=n, state=state)
    return Move("put", item, state, redis=rng.random() < 0.85, ack=ack)


def after(moved: Move, n: int, state: State) -> State:
    """What an id holds once a move has happened."""
    if moved.kind == "put":
        return (n, str(moved.state))
    if moved.kind == "delete" or state is None:
        return None
    return (state[0], str(moved.state))


def expected(seed: int, object_id: str, state: State) -> SyncItem | None:
    """The item that a state stands for."""
    if state is None:
        return None
    item = move(seed, object_id, state[0]).item
    assert item is not None, "only a put makes a state"
    return item.with_state(state[1])


class Lied(Exception):
    """A read returned something else than what the writes before it say (I2)."""


async def work(
    engine: SyncEngine,
    writer: AckWriter,
    seed: int,
    first: int,
    ids: int,
    tasks: int,
    moves: int | None = None,
    volatile: bool = True,
) -> int:
    """Run the workload until the engine stops, or for ``moves`` per task; returns how many were acknowledged.

    Every id belongs to one task, which writes down each move before it begins and again when it is acknowledged.
    Without ``volatile`` what would wait for nothing waits for the log.
    """
    workers = [
        _Worker(engine, writer, seed, first, [f"k.{n:02}" for n in range(who, ids, tasks)], who, volatile)
        for who in range(tasks)
    ]
    return sum(await asyncio.gather(*(worker.run(moves) for worker in workers)))


class _Worker:
    def __init__(
        self, engine: SyncEngine, writer: AckWriter, seed: int, first: int, ids: list[str], who: int, volatile: bool
    ) -> None:
        self._engine = engine
        self._writer = writer
        self._seed = seed
        self._next = dict.fromkeys(ids, first)
        self._rng = random.Random(f"{seed} {first} {who}")
        self._volatile = volatile
        self._known: dict[str, State] = {}  # absent here: not known, after a start or a failure
        self._acked = 0

    async def run(self, moves: int | None) -> int:
        done = 0
        try:
            while moves is None or done < moves:
                object_id = self._rng.choice(list(self._next))
                batch = self._batch(object_id)
                done += len(batch)
                if not all(await asyncio.gather(*(self._do(object_id, n) for n in batch))):
                    self._known.pop(object_id, None)  # whether it happened is not known
                if object_id in self._known and self._rng.random() < 0.3:
                    await self._read(object_id)
        except NotRunning:
            pass
        return self._acked

    def _batch(self, object_id: str) -> list[int]:
        """The next moves on an id: one, or some puts at once, whose order is that of their calls."""
        first = self._next[object_id]
        some = self._rng.randint(1, PUTS_AT_ONCE_MAX)
        batch = [first]
        while len(batch) < some and all(move(self._seed, object_id, n).kind == "put" for n in (first, batch[-1] + 1)):
            batch.append(batch[-1] + 1)
        self._next[object_id] = batch[-1] + 1
        self._writer.write_many({"e": "begin", "id": object_id, "n": n} for n in batch)
        return batch

    async def _do(self, object_id: str, n: int) -> bool:
        """Make one move; False if the engine refused it or could not say."""
        moved = move(self._seed, object_id, n)
        ack = moved.ack if self._volatile or moved.ack is not Ack.MEMORY else Ack.LOGGED
        try:
            if moved.kind == "put":
                assert moved.item is not None
                await self._engine.submit(moved.item, SubmitOptions(redis=moved.redis), ack=ack)
            else:
                if moved.kind == "delete":
                    found = await self._engine.delete(object_id, ack=ack)
                else:
                    found = await self._engine.set_state(object_id, str(moved.state), ack=ack)
                if not found:
                    # Nothing was there, perhaps for a delete that waited for nothing and goes with the process: that
                    # the item is as before is then no broken promise.
                    ack = Ack.MEMORY
        except NotRunning:
            raise
        except SyncEngineError as failed:
            self._writer.write({"e": "failed", "id": object_id, "n": n, "why": type(failed).__name__})
            return False
        if ack is not Ack.MEMORY:
            self._acked += 1
            self._writer.write({"e": "ack", "id": object_id, "n": n})
        if moved.kind != "restate":
            known = self._known.get(object_id)
            if moved.kind == "delete" or known is None or known[0] < n:
                self._known[object_id] = after(moved, n, None)
        elif object_id in self._known:
            self._known[object_id] = after(moved, n, self._known[object_id])
        return True

    async def _read(self, object_id: str) -> None:
        try:
            found = await self._engine.get(object_id)
        except NotRunning:
            raise
        except SyncEngineError:
            return  # unknown is an honest answer
        wanted = expected(self._seed, object_id, self._known[object_id])
        if found != wanted:
            self._writer.write({"e": "lie", "id": object_id, "found": told(found), "wanted": told(wanted)})
            raise Lied(f"{found!r} for {wanted!r}")


async def contend(
    engine: SyncEngine,
    writer: AckWriter,
    who: int,
    ids: int,
    rounds: int | None = None,
    seed: int = 1,
    stored: bool = True,
) -> int:
    """Put the same ids as others do, several at once, in any order, until the engine stops; how many were acked."""
    rng = random.Random(f"{seed} {who}")
    names = [f"c.{n:02}" for n in range(ids)]
    n = acked = 0
    try:
        while rounds is None or n < rounds:
            n += 1
            chosen = rng.sample(names, rng.randint(1, ids))
            content = f"{who} {n}"
            writer.write_many({"e": "trying", "id": each, "content": content} for each in chosen)
            ack = rng.choices((Ack.LOGGED, Ack.STORED), (5, stored))[0]
            options = SubmitOptions(redis=rng.random() < 0.9)
            try:
                receipts = await engine.submit_many(
                    [SyncItem(each, content.encode(), version=n, updated_at=n) for each in chosen], options, ack=ack
                )
            except (TierUnavailable, Backpressure):
                continue  # of unknown outcome, or not accepted
            acked += len(receipts)
            writer.write_many(
                {"e": "won", "id": each.object_id, "stamp": each.stamp, "content": content} for each in receipts
            )
            await asyncio.sleep(0)
    except NotRunning:
        pass
    return acked


async def flood(
    engine: SyncEngine, writer: AckWriter, count: int, bytes_each: int, tasks: int, cached: bool = False
) -> int:
    """Submit many large items as fast as they are taken, and tell what that did to the memory of this process."""
    numbers = iter(range(count))
    options = SubmitOptions.cache(600) if cached else None
    acked = refused = 0
    before = peak_bytes()

    async def submit() -> None:
        nonlocal acked, refused
        for number in numbers:
            item = SyncItem(f"f.{number:05}", flood_content(number, bytes_each), content_type=ContentType.BINARY)
            try:
                await engine.submit(item, options)
                acked += 1
            except Backpressure:
                refused += 1

    await asyncio.gather(*(submit() for _ in range(tasks)))
    writer.write({"e": "flooded", "acked": acked, "refused": refused, "before": before, "peak": peak_bytes()})
    return acked


def flood_content(number: int, size: int) -> bytes:
    """Bytes that tell the items of a flood apart."""
    return b"%08d" % number * (size // 8)


def peak_bytes() -> int:
    """The most memory that this process has had resident so far."""
    line = next(line for line in _status().splitlines() if line.startswith(b"VmHWM"))
    return int(line.split()[1]) * 1024


def told(item: SyncItem | None) -> str:
    """What tells two items apart, short enough for a line of the journal."""
    if item is None:
        return "nothing"
    return f"{item!r} updated {item.updated_at}, stamp {item.stamp}: {item.content[:40]!r}"


# One life: a forked child


async def live(task: dict[str, Any], writer: AckWriter) -> int:
    """Start an engine, work, and stop: at the end of the work or at SIGTERM. The exit status tells the truth."""
    engine = SyncEngine(SyncEngineConfig(**task["config"]))
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, stopping.set)
    try:
        await engine.start()
    except ConfigError as refused:
        writer.write({"e": "refused", "why": str(refused)})
        return REFUSED
    writer.write({"e": "up", "recovered": engine.stats().recovered})
    if task.get("fork"):
        _fork(task, writer)
    if flooding := task.get("flood"):
        doing = flood(engine, writer, **flooding)
    elif contending := task.get("contend"):
        doing = contend(engine, writer, **contending)
    else:
        doing = work(engine, writer, **task["work"])
    working = loop.create_task(doing)
    waiting = loop.create_task(stopping.wait())
    await asyncio.wait({working, waiting}, return_when=asyncio.FIRST_COMPLETED)
    stop_s = task.get("stop_timeout_s", 30.0)
    try:
        async with asyncio.timeout(stop_s + DOWN_WITHIN_S):
            report = await engine.stop(timeout=stop_s)
            writer.write({"e": "down", "left": report.left_in_log, "lost": report.lost, "peak": peak_bytes()})
            waiting.cancel()
            await asyncio.wait({working})
    except TimeoutError:
        for stuck in asyncio.all_tasks():
            stuck.print_stack()
        return HUNG
    if working.exception() is not None:
        working.print_stack()
        return LIED
    return LOST if report.lost else LEFT_IN_LOG if report.left_in_log else STORED


def _fork(task: dict[str, Any], writer: AckWriter) -> None:
    """A forked child of a running engine's process: it may not open the log, and outlives its parent."""
    if os.fork():
        return
    if task["fork"] == "idle":  # does nothing, until somebody kills it
        writer.write({"e": "forked", "pid": os.getpid()})
        time.sleep(60)
        os._exit(0)
    try:
        time.sleep(0.05)  # gives the parent a moment to be mid-work; no loop runs in this child
        asyncio.run(SyncEngine(SyncEngineConfig(**task["config"])).start())
        writer.write({"e": "forked", "why": "nothing: it started"})
    except ConfigError as refused:
        writer.write({"e": "forked", "why": str(refused)})
    finally:
        os._exit(0)


def child(task: dict[str, Any]) -> int:
    """What a forked child does; never returns into the parent's code."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: nothing is left behind by a test that died
    writer = AckWriter(os.open(task["journal"], os.O_WRONLY))
    if task.get("traced"):
        _await_tracer()
    return asyncio.run(live(task, writer))


def _await_tracer() -> None:
    ctypes.CDLL(None).prctl(0x59616D61, ctypes.c_ulong(-1))  # PR_SET_PTRACER, ANY: a sibling may attach
    until = time.monotonic() + TRACED_WITHIN_S
    while b"TracerPid:\t0\n" in _status():
        if time.monotonic() > until:
            os._exit(99)
        time.sleep(0.001)


def _status() -> bytes:
    with open("/proc/self/status", "rb") as file:
        return file.read()


def serve() -> None:
    """Fork a child per task, and report how it ended; the end of stdin ends this process and its child."""
    gc.collect()
    gc.freeze()  # what is imported stays shared between the children
    for task in _tasks():
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                status = child(task)
            except BaseException:  # noqa: BLE001 - the traceback is shown, the status says the rest
                sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]  # inside an except there is one
            finally:
                sys.stderr.flush()
                os._exit(status)
        _say(pid)
        handle = os.pidfd_open(pid)
        ended, _, _ = select.select([handle, 0], [], [])
        if handle not in ended:
            os.kill(pid, signal.SIGKILL)
        os.close(handle)
        _say(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))


def _tasks() -> Iterator[dict[str, Any]]:
    # Unbuffered: a task read ahead would look like the end of stdin to select.
    begun = b""
    while chunk := os.read(0, 65_536):
        *lines, begun = (begun + chunk).split(b"\n")
        yield from _parsed(lines)


def _parsed(lines: Iterable[bytes]) -> Iterator[dict[str, Any]]:
    for line in lines:
        yield json.loads(line)


def _say(number: int) -> None:
    os.write(1, b"%d\n" % number)


if __name__ == "__main__":
    serve()
