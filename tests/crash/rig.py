"""What the crash tests share: the account of what may be found, the programs to kill, the read-back of all tiers."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sync_engine import SyncEngine, SyncEngineConfig, SyncItem
from sync_engine.storage.redis import RedisStore
from sync_engine.storage.sql import SqlStore
from sync_engine.testing.ackjournal import AckJournal

from ..locks import write_locked
from .driver import STATES, State, after, expected, move, told, work
from .truths import ServerTruth, Truth

__all__ = [
    "NO_L1",
    "QUICK",
    "Drivers",
    "Figures",
    "Ledger",
    "MakeRig",
    "Rig",
    "locked",
    "timed_ms",
    "until",
    "until_well",
]

JOURNAL_WITHIN_S = 30.0
HEARD_WITHIN_S = 40.0
"""Bounds of waits for other processes; a healthy run needs a fraction of a second."""

QUICK = {"redis_response_timeout_ms": 200, "redis_timeout_ms": 500}
"""Far below the defaults, so that a silent server does not make the test long; nothing here measures time."""
NO_L1 = {"l1_max_bytes": 0}
"""Every read then asks the tiers."""


@dataclass(slots=True)
class Figures:
    """What one scenario did, and what must be 0."""

    lives: int = 0
    faults: int = 0
    begun: int = 0
    acked: int = 0
    failed: int = 0
    recovered: int = 0
    read_backs: int = 0
    acked_lost: int = 0
    stale: int = 0
    phantom: int = 0
    tiers_differ: int = 0
    lies: int = 0
    wrong: list[str] = field(default_factory=list)
    truth: str = "SQLite"

    def tell(self, scenario: str, besides: str = "") -> None:
        """One line for the record, shown by `pytest -s` and on failure; then fail if anything was wrong.

        ``besides`` is a figure of this scenario alone: printed, never asserted where it is a time.
        """
        line = " ".join(f"{name}={value}" for name, value in asdict(self).items() if isinstance(value, int))
        print(f"\nFIGURES {scenario}, {self.truth}: {line}{besides and f' | {besides}'}")
        assert not self.wrong, "\n".join(self.wrong[:10])


class Ledger:
    """For each id, the states that are allowed: that of the last acknowledged move, or of any begun since."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self.possible: dict[str, set[State]] = {}
        self._past: dict[str, set[State]] = {}
        self._begun: dict[str, dict[int, bool]] = {}

    def take(self, lines: Iterable[Mapping[str, Any]], figures: Figures) -> None:
        """Note what was begun and acknowledged, in the journal's order."""
        for line in lines:
            match line["e"]:
                case "begin":
                    figures.begun += 1
                    self._begun.setdefault(line["id"], {})[line["n"]] = False
                case "ack":
                    figures.acked += 1
                    self._begun[line["id"]][line["n"]] = True
                case "failed":
                    figures.failed += 1
                case "up":
                    figures.recovered += line["recovered"]
                case "lie":
                    figures.lies += 1
                    figures.wrong.append(f"lie: {line}")

    def settle(self) -> None:
        """Everybody who wrote is dead or done: work out what may be found now."""
        for object_id, moves in self._begun.items():
            states: set[State] = self.possible.get(object_id, {None})
            past = self._past.setdefault(object_id, set())
            for n, acked in moves.items():
                moved = move(self._seed, object_id, n)
                past |= states
                reached = {after(moved, n, state) for state in states}
                states = reached if acked else states | reached
            self.possible[object_id] = states
        self._begun.clear()

    def judge(self, object_id: str, found: SyncItem | None, figures: Figures) -> State:
        """The state that was found; counts it as lost, stale or phantom if it is none of the possible ones."""
        for state in self.possible[object_id]:
            if expected(self._seed, object_id, state) == found:
                self.possible[object_id] = {state}
                return state
        if found is None:
            kind, figures.acked_lost = "lost", figures.acked_lost + 1
        elif any(expected(self._seed, object_id, state) == found for state in self._past[object_id]):
            kind, figures.stale = "stale", figures.stale + 1
        else:
            kind, figures.phantom = "phantom", figures.phantom + 1
        figures.wrong.append(
            f"{kind}: {object_id} is {told(found)}, may be {sorted(map(str, self.possible[object_id]))}"
        )
        return None


class Drivers:
    """The process that children under test are forked from; one child at a time."""

    def __init__(self) -> None:
        source = Path(__file__).with_name("driver.py")
        self._server = subprocess.Popen([sys.executable, str(source)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.pid = 0

    def start(self, **task: object) -> int:
        """Fork a child on a task; its pid."""
        assert self._server.stdin is not None
        self._server.stdin.write(json.dumps(task).encode() + b"\n")
        self._server.stdin.flush()
        self.pid = self._number()
        return self.pid

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send a signal to the child; no error if it has just ended by itself."""
        # Not yet waited for by anybody but its parent, so at worst the pid is a stranger's for an instant: the parent
        # reports before the next child, and the kernel does not hand out a pid again that soon.
        try:
            os.kill(self.pid, number)
        except ProcessLookupError:
            return

    def ended(self) -> int:
        """Wait for the child: its exit status, negative for a signal."""
        status = self._number()
        self.pid = 0
        return status

    def close(self) -> None:
        """End the process, and the child with it."""
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.close()
        self._server.stdout.close()
        self._server.wait(30)

    def _number(self) -> int:
        assert self._server.stdout is not None
        return int(self._server.stdout.readline())


class Rig:
    """One scenario: a data folder, a Redis prefix, a journal, an account of what was promised."""

    def __init__(
        self,
        path: Path,
        drivers: Drivers,
        redis_url: str | None,
        prefix: str,
        seed: int,
        truth: Truth,
    ) -> None:
        self.path = path
        self.truth = truth
        self.drivers = drivers
        self.redis_url = redis_url
        self.prefix = prefix
        self.seed = seed
        # What is killed leaves its reserve behind.
        self.settings: dict[str, Any] = {"batch_flush_ms": 5, "wal_reserve_bytes": 65_536}
        if isinstance(truth, ServerTruth):
            self.settings["sql_url"] = truth.url
        self.figures = Figures(truth=truth.name)
        self.ledger = Ledger(seed)
        self.journal = AckJournal.start(path / "acks")
        self._read = 0
        self._renewals = 0
        self._marks = 0
        self._first = 0

    @property
    def data_dir(self) -> Path:
        """Where the engines under test live."""
        return self.path / f"data{self._renewals}"

    @property
    def sql_url(self) -> str:
        """The database, straight."""
        return self.truth.url if isinstance(self.truth, ServerTruth) else f"sqlite:///{self.data_dir / 'truth.db'}"

    def renew(self) -> None:
        """Go on in an empty folder and under a new prefix, with nothing promised. Everything must have been checked."""
        self._renewals += 1
        self.prefix = f"{self.prefix.rstrip('+')}{'+' * self._renewals}"
        self.ledger = Ledger(self.seed)

    def raw_config(self, **settings: object) -> dict[str, Any]:
        """Configuration as JSON values, for a child."""
        redis = {"redis_url": self.redis_url, "redis_prefix": self.prefix} if self.redis_url else {}
        return {"data_dir": str(self.data_dir), **redis, **self.settings, **settings}

    def config(self, **settings: object) -> SyncEngineConfig:
        """The same for an engine in this process."""
        return SyncEngineConfig(**self.raw_config(**settings))

    def task(
        self, *, ids: int = 12, tasks: int = 4, moves: int | None = None, volatile: bool = True, **more: object
    ) -> dict[str, Any]:
        """A life for ``drivers``: the numbers of its moves go on from the last one's."""
        self._first += 100_000
        self.figures.lives += 1
        work = {
            "seed": self.seed,
            "first": self._first,
            "ids": ids,
            "tasks": tasks,
            "moves": moves,
            "volatile": volatile,
        }
        config = self.raw_config()
        return {"config": config, "journal": f"/proc/{os.getpid()}/fd/{self.journal.fd}", "work": work, **more}

    async def work(self, engine: SyncEngine, *, ids: int = 12, tasks: int = 4, moves: int | None = 10) -> None:
        """The same work by an engine of this process; the journal is still another one."""
        self._first += 100_000
        await work(engine, self.journal, self.seed, self._first, ids, tasks, moves)

    def start(self, **task: Any) -> int:
        """Begin a life; its pid."""
        return self.drivers.start(**self.task(**task))

    async def lines(self) -> list[dict[str, Any]]:
        """Lines of the journal since the last call, everything written before it included."""
        self._marks += 1
        self.journal.write({"e": "mark", "n": self._marks})
        mark, text = b'{"e":"mark","n":%d}\n' % self._marks, b""
        async with asyncio.timeout(JOURNAL_WITHIN_S):
            while mark not in text:
                await asyncio.sleep(0.002)
                text += self._new_text()
        while not text.endswith(b"\n"):  # a child that goes on writing
            text += self._new_text()
        return [json.loads(line) for line in text.splitlines()]

    async def heard(self, event: str, count: int = 1) -> list[dict[str, Any]]:
        """Wait for so many further lines of this kind from a child at work; they count in the account like others."""
        heard: list[dict[str, Any]] = []
        async with asyncio.timeout(HEARD_WITHIN_S):
            while len(heard) < count:
                lines = await self.lines()
                self.ledger.take(lines, self.figures)
                heard += [line for line in lines if line["e"] == event]
        return heard

    def _new_text(self) -> bytes:
        if not self.journal.path.exists():
            return b""
        with self.journal.path.open("rb") as file:
            file.seek(self._read)
            text = file.read()
        self._read += len(text)
        return text

    async def take(self) -> list[dict[str, Any]]:
        """Bring the account up to date; nobody may be writing."""
        lines = await self.lines()
        self.ledger.take(lines, self.figures)
        self.ledger.settle()
        return lines

    async def check(self, *, l2_exact: bool = True, **settings: object) -> None:
        """Start an engine, let it recover and flush, and compare every tier with the account."""
        async with SyncEngine(self.config(**settings)) as engine:
            self.figures.recovered += engine.stats().recovered
            await engine.flush()
            await self.read_back(engine, l2_exact=l2_exact)
            assert engine.stats().pending == 0
            assert engine.stats().log_records == 0
            report = await engine.stop()
        assert (report.left_in_log, report.lost) == (0, 0)

    async def read_back(self, engine: SyncEngine, *, l2_exact: bool = True, l2_states: bool = True) -> None:
        """Compare what every tier holds with the account and with each other. The engine must have flushed."""
        await self.take()
        if self.redis_url is not None:
            await until_well(engine)  # until a Redis that was restarted is believed, what is not there is not known
        figures, ids = self.figures, sorted(self.ledger.possible)
        figures.read_backs += 1
        answers = await engine.get_many(ids[::2]) | {key: item for key in ids[1::2] if (item := await engine.get(key))}
        l3 = await SqlStore.connect(engine.config.sql_url.get_secret_value())  # type: ignore[union-attr]  # is set
        try:
            truth = await l3.get_many(ids)
            count = await l3.count_prefix("k.")
            states = {state: await l3.list_state_ids(state, 10_000) for state in STATES}
        finally:
            await l3.close()
        if count != len(truth):
            figures.phantom += 1
            figures.wrong.append(f"phantom: SQL holds {count} items, {len(truth)} of ours")
        in_redis: dict[str, SyncItem] = {}
        for object_id in ids:
            state = self.ledger.judge(object_id, truth.get(object_id), figures)
            if state is not None and move(self.seed, object_id, state[0]).redis:
                in_redis[object_id] = truth[object_id]
        self._same("engine", answers, truth)
        self._same_states("l3", states, truth)
        if self.redis_url is None:
            return
        l2 = await RedisStore.connect(self.redis_url, self.prefix)
        try:
            cached = await l2.get_many(ids)
            # Where the server evicts, an index may be lost as fast as it is made: then nobody can tell.
            members = {state: await l2.list_state_ids(state, 10_000) for state in STATES} if l2_states else {}
        finally:
            await l2.close()
        if not l2_exact:
            in_redis = {key: item for key, item in in_redis.items() if key in cached}
        self._same("l2", cached, in_redis)
        if l2_states:
            self._same_states("l2", members, cached)

    def _same(self, tier: str, found: Mapping[str, SyncItem], wanted: Mapping[str, SyncItem]) -> None:
        for object_id in found.keys() | wanted.keys():
            if found.get(object_id) != wanted.get(object_id):
                self.figures.tiers_differ += 1
                what = f"{told(found.get(object_id))}, not {told(wanted.get(object_id))}"
                self.figures.wrong.append(f"tiers differ: {object_id} in {tier} is {what}")

    def _same_states(self, tier: str, found: Mapping[str, list[str]], items: Mapping[str, SyncItem]) -> None:
        for state in STATES:
            wanted = sorted(object_id for object_id, item in items.items() if item.state == state)
            if found[state] != wanted:
                self.figures.tiers_differ += 1
                self.figures.wrong.append(f"tiers differ: {tier} lists {found[state]} in {state!r}, not {wanted}")

    def close(self) -> None:
        """End the child, if a failed test left one, and the journal."""
        if self.drivers.pid:
            self.drivers.kill()
            self.drivers.ended()
        self.journal.stop()


def locked(rig: Rig) -> AbstractContextManager[sqlite3.Connection]:
    """Somebody else holds the write lock of the truth."""
    return write_locked(rig.data_dir / "truth.db")


async def timed_ms(doing: Awaitable[object]) -> float:
    """How long it took: for the report, never to be asserted."""
    begun_s = time.monotonic()
    await doing
    return (time.monotonic() - begun_s) * 1000


async def until_well(engine: SyncEngine) -> None:
    """Wait until every tier answers and is read."""
    async with asyncio.timeout(HEARD_WITHIN_S):
        while not (await engine.health()).ok:  # noqa: ASYNC110 - it is asked, and tells nobody by itself
            await asyncio.sleep(0.01)


async def until(true: Callable[[], bool]) -> None:
    """Wait for something that another process or a server does."""
    async with asyncio.timeout(HEARD_WITHIN_S):
        while not true():  # noqa: ASYNC110 - nobody there could set an Event of ours
            await asyncio.sleep(0.002)


MakeRig = Callable[..., Rig]
"""``rig(redis_url=None, seed=7)``; by default on the session's Redis."""
