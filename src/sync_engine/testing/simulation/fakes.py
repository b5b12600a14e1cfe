"""What lies outside of a simulated engine: a clock, two servers behind lines that fail, and a disk with a log on it.

The servers are ``MemoryTier``, so what an operation does there is what the contract asks of every store. Around it
everything takes time, gets lost on the way there or back, happens twice as late as its caller believes, or never.
"""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import Callable, Coroutine, Iterable, Sequence
from contextvars import Context
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, ParamSpec, TypeVar

import msgspec

from sync_engine.errors import NotRunning, StoreError, SyncEngineError, TierUnavailable
from sync_engine.forward import Forwarding
from sync_engine.item import Op
from sync_engine.notes import Notes, _Noted
from sync_engine.ports import Applied, Clock, Logged, Tier, together
from sync_engine.testing.simulation.loop import SimulatedLoop
from sync_engine.testing.tiers import MemoryTier
from sync_engine.write.quarantine import Quarantine, Quarantined

__all__ = ["LATEST_S", "Disk", "DiskLog", "DiskNotes", "DiskQuarantine", "Line", "Server", "SkewedClock", "Weather"]

P = ParamSpec("P")
R = TypeVar("R")

EPOCH_MS: Final = 1_700_000_000_000
RESPONSE_S: Final = 5.0
"""How long a client waits for a server. What it asked for may still happen after that."""
LATEST_S: Final = 4 * RESPONSE_S
"""After so long it will not."""


class SkewedClock:
    """One machine's idea of the time. Its wall clock may jump; the seconds pass alike everywhere."""

    def __init__(self, loop: SimulatedLoop, off_ms: int = 0) -> None:
        self._loop = loop
        self.off_ms = off_ms

    def now_ms(self) -> int:
        return self.now_us() // 1000

    def now_us(self) -> int:
        return (EPOCH_MS + self.off_ms) * 1000 + round(self._loop.time() * 1_000_000)

    def monotonic(self) -> float:
        return self._loop.time()

    async def sleep(self, seconds: float, /) -> None:
        await asyncio.sleep(seconds)


@dataclass(slots=True)
class Weather:
    """Probabilities per call, and what a call takes. ``calm`` is how it ends."""

    lost: float = 0.0
    """The request, or the connection, never gets there."""
    unheard: float = 0.0
    """It is done, and the caller does not hear of it."""
    torn: float = 0.0
    """Part of a batch is done well before the rest, or without it."""
    hung: float = 0.0
    """It takes longer than anybody waits, and is done in the end or not."""
    unsynced: float = 0.0
    """A group commit of the log fails."""
    way_s: float = 0.001

    @classmethod
    def calm(cls) -> Weather:
        return cls()


class Server:
    """A tier that others reach over lines. It may be down, cut off from some, or come back with an older state."""

    def __init__(self, tier: MemoryTier, loop: SimulatedLoop, rng: random.Random, weather: Weather) -> None:
        self.tier = tier
        self.weather = weather
        self.up = True
        self.run = 0
        self.losses = 0
        """How often it came back with less than it had confirmed."""
        self.cut_off: set[str] = set()
        self._loop = loop
        self._rng = rng
        self._own = Context()

    def stop(self) -> None:
        """End in the middle of whatever is under way."""
        self.up = False
        self.run += 1

    def start(self, state: tuple[Any, ...] | None = None) -> None:
        """Come back, with this older state if one is given."""
        if state is not None:
            self.tier.restarted(state)
            self.losses += 1
        self.up = True

    def refuses(self, client: str) -> bool:
        """Whether a connection attempt fails."""
        return not self.up or client in self.cut_off

    async def ask(self, client: str, verb: Callable[..., Coroutine[Any, Any, R]], args: Any, kwargs: Any) -> R:
        """One call over the line of that client."""
        answer: asyncio.Future[R] = self._loop.create_future()
        fate, weather = self._rng.random(), self.weather
        way_s = self._rng.expovariate(1 / weather.way_s)
        hangs = fate < weather.hung
        if hangs:
            way_s += self._rng.uniform(0, 3 * RESPONSE_S)
        call = _Call(client, self.run, answer, verb, args, kwargs)
        self._loop.call_later(way_s, self._arrives, call, context=self._own)
        late = self._loop.call_later(RESPONSE_S, self._fails, call, "no answer in time")
        try:
            return await answer
        finally:
            late.cancel()

    def _fails(self, call: _Call, reason: str) -> None:
        if not call.answer.done():
            call.answer.set_exception(TierUnavailable(self.tier.name, reason))

    def _arrives(self, call: _Call) -> None:
        if self.refuses(call.client) and self._rng.random() < 0.3:
            return  # nobody says no: the caller waits
        if self.run != call.run or self.refuses(call.client) or self._rng.random() < self.weather.lost:
            self._fails(call, "the connection was lost")
            return
        if call.answer.done() and call.conditional and self.tier.name == "l3":
            return  # those of one engine follow each other in one connection: the second waits for the end of the first
        self._loop.create_task(self._serve(call), context=self._own)

    async def _serve(self, call: _Call) -> None:
        rng, answer = self._rng, call.answer
        try:
            if call.verb.__name__ == "apply" and len(call.args[0]) > 1 and rng.random() < self.weather.torn:
                told: Any = await self._apply_in_two(call)
            else:
                told = await call.verb(*call.args, **call.kwargs)
        except SyncEngineError as failed:
            if not answer.done():
                answer.set_exception(failed)
            return
        await asyncio.sleep(rng.expovariate(1 / self.weather.way_s))
        if self.run != call.run or call.client in self.cut_off or rng.random() < self.weather.unheard:
            self._fails(call, "the connection was lost before the answer came")
        elif not answer.done():
            answer.set_result(told)

    async def _apply_in_two(self, call: _Call) -> Applied:
        ops: Sequence[Op] = call.args[0]
        half = self._rng.randrange(1, len(ops))
        one = await call.verb(ops[:half])
        await asyncio.sleep(self._rng.uniform(0, 0.05))
        if self.run != call.run or self._rng.random() < 0.5:
            raise TierUnavailable(self.tier.name, "the connection was lost in the middle of a batch")
        two = await call.verb(ops[half:])
        return together([one, two])

    def __repr__(self) -> str:
        return f"<Server {self.tier!r} run {self.run}{'' if self.up else ', down'}>"


@dataclass(slots=True)
class _Call:
    client: str
    run: int
    answer: asyncio.Future[Any]
    verb: Callable[..., Coroutine[Any, Any, Any]]
    args: Any
    kwargs: Any

    @property
    def conditional(self) -> bool:
        """Whether it changes something only if what is there allows it."""
        return self.verb.__name__ == "apply" and any(
            op.if_version is not None or op.only_in_state is not None for op in self.args[0]
        )


class Line(Forwarding):
    """One engine's connections to a server; knows, as those do, whether it is the server that it was."""

    def __init__(self, server: Server, client: str, on_new_server: Callable[[], None] | None = None) -> None:
        super().__init__(server.tier)
        self._server = server
        self._client = client
        self._run = server.run
        self._on_new_server = on_new_server

    @classmethod
    async def connect(cls, server: Server, client: str, on_new_server: Callable[[], None] | None = None) -> Tier:
        """Raises ``TierUnavailable`` where nobody answers."""
        await asyncio.sleep(0.001)
        if server.refuses(client):
            raise TierUnavailable(server.tier.name, "nobody answers there")
        return cls(server, client, on_new_server)

    async def _through(self, verb: Callable[P, Coroutine[Any, Any, R]], *args: P.args, **kwargs: P.kwargs) -> R:
        server = self._server
        if server.run != self._run:
            if server.refuses(self._client):
                await asyncio.sleep(0.001)
                raise TierUnavailable(self.name, "nobody answers there")
            self._run = server.run
            if self._on_new_server is not None:
                self._on_new_server()
        return await server.ask(self._client, verb, args, kwargs)

    async def close(self) -> None:
        """The server stays."""


@dataclass(slots=True)
class Disk:
    """What one engine's ``data_dir`` holds. It survives the engine.

    ``ghosts`` were written by a group commit that failed: nobody was told that they are durable, and they may be.
    """

    records: dict[int, Op] = field(default_factory=dict)
    ghosts: dict[int, Op] = field(default_factory=dict)
    last_seq: int = 0
    last_stamp: int = 0
    noted: bytes = b""
    refused: dict[tuple[int, str], Quarantined] = field(default_factory=dict)


@dataclass(slots=True)
class _Append:
    ops: Sequence[Op]
    on_durable: Callable[[Sequence[Logged]], None]
    on_failed: Callable[[Exception], None]
    first_seq: int = 0


class DiskLog:
    """The port ``Journal`` on a ``Disk``: group commits that take time and fail, marks that trail behind.

    ``promised`` is given the stamps of what it calls durable.
    """

    def __init__(
        self, disk: Disk, loop: SimulatedLoop, rng: random.Random, weather: Weather, promised: set[int]
    ) -> None:
        self._promised = promised
        self._disk = disk
        self._loop = loop
        self._rng = rng
        self._weather = weather
        self._waiting: list[_Append] = []
        self._writing: list[_Append] = []
        self._marks: deque[int] = deque()
        self._live = set(disk.records)
        self._busy = False
        self._marking = False
        self._closed = False
        self._quiet = asyncio.Event()
        self._quiet.set()
        self.recovered = [Logged(op, seq, None) for seq, op in sorted(disk.records.items())]
        self.last_stamp = disk.last_stamp
        self.damage: list[str] = []
        self.full = False
        self.bytes = 0

    @property
    def unsettled(self) -> int:
        return len(self._live)

    def append(
        self, ops: Sequence[Op], on_durable: Callable[[Sequence[Logged]], None], on_failed: Callable[[Exception], None]
    ) -> None:
        if self._closed:
            raise NotRunning("the log is closed")
        self._waiting.append(_Append(list(ops), on_durable, on_failed))
        if not self._busy:
            self._busy = True
            self._quiet.clear()
            self._loop.call_soon(self._begin)

    def settle(self, seqs: Iterable[int], /) -> None:
        for seq in seqs:
            if seq in self._live:
                self._live.remove(seq)
                self._marks.append(seq)
        if self._marks and not self._marking and not self._closed:
            self._marking = True
            self._loop.call_later(0.05, self._mark)

    def relieve_until_settled(self) -> None:
        """Nothing is held back: this disk is never full."""

    def relieve_until_drained(self) -> None:
        """Nothing is held back."""

    def drained(self) -> None:
        """And nothing is had back."""

    async def read(self, records: Sequence[Logged], /) -> list[Op]:
        await asyncio.sleep(self._rng.uniform(0, 0.002))
        if self._rng.random() < self._weather.unsynced:
            raise TierUnavailable("log", "the disk does not answer")
        found = []
        for record in records:
            op = self._disk.records.get(record.seq)
            if op is None or (record.seq not in self._live and self._rng.random() < 0.5):
                raise StoreError("log", f"record {record.seq} is settled and gone")
            found.append(op)
        return found

    async def close(self) -> None:
        self._closed = True
        await self._quiet.wait()
        self._mark()

    def crashed(self) -> None:
        """The process is gone. Of what it was just writing, and of its last marks, the disk has any first part."""
        disk, rng = self._disk, self._rng
        written = [(seq, op) for append in self._writing for seq, op in _numbered(append)]
        written = written[: rng.randint(0, len(written))]
        # What a later group was written behind has been marked as void.
        written = written or list(disk.ghosts.items())[: rng.randint(0, len(disk.ghosts))]
        disk.ghosts.clear()
        disk.records.update(written)
        disk.last_stamp = max([disk.last_stamp, *(op.stamp for _, op in written)])
        for _ in range(rng.randint(0, len(self._marks))):
            disk.records.pop(self._marks.popleft(), None)

    def _begin(self) -> None:
        self._writing, self._waiting = self._waiting, []
        for append in self._writing:
            append.first_seq = self._disk.last_seq + 1
            self._disk.last_seq += len(append.ops)
        self._loop.call_later(self._rng.expovariate(1 / 0.0005), self._synced)

    def _synced(self) -> None:
        disk, group = self._disk, self._writing
        self._writing = []
        if self._rng.random() < self._weather.unsynced:
            disk.ghosts.update(numbered for append in group for numbered in _numbered(append))
            for append in group:
                append.on_failed(TierUnavailable("log", "the disk is full"))
        else:
            disk.ghosts.clear()
            for append in group:
                disk.records.update(_numbered(append))
                self._live.update(seq for seq, _ in _numbered(append))
                self._promised.update(op.stamp for op in append.ops)
                disk.last_stamp = self.last_stamp = max([disk.last_stamp, *(op.stamp for op in append.ops)])
            self._mark()
            for append in group:
                append.on_durable([Logged(op, seq, None) for seq, op in _numbered(append)])
        if self._waiting:
            self._begin()
        else:
            self._busy = False
            self._quiet.set()

    def _mark(self) -> None:
        self._marking = False
        while self._marks:
            self._disk.records.pop(self._marks.popleft(), None)

    def __repr__(self) -> str:
        return f"<DiskLog {len(self._live)} unsettled>"


def _numbered(append: _Append) -> list[tuple[int, Op]]:
    return list(enumerate(append.ops, append.first_seq))


class DiskNotes(Notes):
    """Notes on a ``Disk``."""

    def __init__(self, disk: Disk, writer: str) -> None:
        noted = msgspec.json.decode(disk.noted, type=_Noted) if disk.noted else _Noted(writer=writer)
        super().__init__(Path("notes.json"), noted)
        self._disk = disk

    def _write(self) -> None:
        self._disk.noted = msgspec.json.encode(self._noted)


class DiskQuarantine(Quarantine):
    """A quarantine on a ``Disk``."""

    def __init__(self, disk: Disk, clock: Clock) -> None:
        super().__init__(Path("quarantine"), clock)
        self._disk = disk

    def _write(self, refused: Quarantined) -> None:
        self._disk.refused[refused.op.stamp, refused.op.object_id] = refused

    def _remove(self, refused: Quarantined) -> None:
        self._disk.refused.pop((refused.op.stamp, refused.op.object_id), None)

    def _read_all(self) -> dict[str, Quarantined]:
        return {refused.op.object_id: refused for _, refused in sorted(self._disk.refused.items())}
