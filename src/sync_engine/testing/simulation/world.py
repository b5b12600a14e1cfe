"""One run: engines over two servers, callers who write and read, faults in between, an end at which all must be well.

Everything that varies comes from the seed: how many engines, their settings and clocks, what callers do and when, who
crashes, which calls are lost.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

from pydantic import SecretStr

from sync_engine.build import Outside, build
from sync_engine.config import SyncEngineConfig
from sync_engine.engine import SyncEngine
from sync_engine.errors import SyncEngineError, TierUnavailable, VersionConflict
from sync_engine.item import Op, SyncItem
from sync_engine.options import Ack, Receipt, SubmitOptions
from sync_engine.parts import Parts
from sync_engine.ports import Tier
from sync_engine.testing.simulation.fakes import (
    EPOCH_MS,
    LATEST_S,
    Disk,
    DiskLog,
    DiskNotes,
    DiskQuarantine,
    Line,
    Server,
    SkewedClock,
    Weather,
)
from sync_engine.testing.simulation.history import END_MS, History, Read, Violation
from sync_engine.testing.simulation.loop import Process, SimulatedLoop, Stuck
from sync_engine.testing.tiers import MemoryTier

__all__ = ["Failed", "Node", "Run", "World", "simulate"]

T = TypeVar("T")

IDS: Final = ("a", "a.1", "a.2", "b")
STATES: Final = ("default", "hot", "cold")
DAY_S: Final = 86_400
PATIENCE_S_MAX: Final = 20.0
HEALED_WITHIN_S: Final = 300.0
"""How long an engine may take to be well again once its surroundings are: the longest rest between two attempts is 5 s,
and a look at the marks of Redis is taken every minute."""


@dataclass(frozen=True, slots=True)
class Run:
    """A run that ended well. Two runs of a seed have equal traces."""

    seed: int
    trace: int
    steps: int
    seconds: float
    writes: int
    reads: int
    faults: int


class Failed(AssertionError):
    """A run that did not; ``story`` is what happened, line by line."""

    def __init__(self, seed: int, reason: str, story: Sequence[str]) -> None:
        super().__init__(f"seed {seed}: {reason}\nreplay it: python -m sync_engine.testing.simulation {seed}")
        self.seed = seed
        self.reason = reason
        self.story = story


Script = Callable[["World"], Awaitable[None]]


def simulate(seed: int, script: Script | None = None, *, engines: int | None = None) -> Run:
    """Run one seed to its end; raises ``Failed``.

    With a ``script`` that is what happens between start and end, in place of what the seed would have chosen.
    """
    loop = SimulatedLoop(random.Random(f"{seed} loop"))
    world = World(seed, loop, engines)
    # What the engine leaves to chance (how long to wait before it tries again) is asked of this module.
    chance = random.getstate()
    random.seed(seed)
    try:
        loop.run_until_complete(world.live(script))
        if loop.problems:
            raise Violation("raised where nobody listens: " + "; ".join(loop.problems))
    except (Violation, Stuck) as wrong:
        raise Failed(seed, str(wrong), world.story) from wrong
    except Exception as wrong:
        raise Failed(seed, repr(wrong), world.story) from wrong
    finally:
        random.setstate(chance)
        loop.abandon()
    history = world.history
    writes = sum(map(len, history.writes.values()))
    return Run(seed, loop.trace, loop.steps, loop.time(), writes, len(history.reads), world.faults)


class Killed(Exception):
    """The engine that was to answer is gone."""


class _Engine(SyncEngine):
    """An engine over fakes, whose writes are noted."""

    def __init__(self, config: SyncEngineConfig, node: Node) -> None:
        super().__init__(config, clock=node.clock)
        self._node = node

    async def start(self) -> None:
        async with self._turn:
            self._parts = await build(self.config, self._clock, self._failed, self._around, self._node.outside)
            self._running = self._parts
            for lane in filter(None, (self._parts.writes.truth, self._parts.writes.cache)):
                lane.passed_at_once = self._node.world.passed_at_once

    def _failed(self, error: BaseException) -> None:
        super()._failed(error)
        self._node.world.loop.problems.append(f"{self._node.name} failed: {error!r}")

    async def _write(self, drafts: Sequence[Op], ack: Ack) -> list[Receipt]:
        node = self._node
        history = node.world.history
        noted = history.begin(node.name, node.life, drafts, ack)
        try:
            receipts = await super()._write(drafts, ack)
        except VersionConflict:
            history.end(noted, "refused" if len(noted) == 1 else "unknown")
            raise
        except BaseException:  # cancelled or failed alike: what has a stamp by now may come about
            history.end(noted, "unknown")
            raise
        history.end(noted, "acked")
        return receipts


class Node:
    """One machine: a disk, a clock, and the engine that runs there now."""

    def __init__(self, name: str, world: World, config: SyncEngineConfig, clock: SkewedClock) -> None:
        self.name = name
        self.world = world
        self.config = config
        self.clock = clock
        self.disk = Disk()
        self.life = 0
        self.engine: _Engine | None = None
        self.process = Process(name)
        self.gone: asyncio.Future[None] = world.loop.create_future()
        self.log: DiskLog | None = None
        self.turn = asyncio.Lock()  # one start, stop or crash at a time
        self.outside = Outside(
            log=self._open_log,
            notes=self._open_notes,
            quarantine=lambda _, clock: DiskQuarantine(self.disk, clock),
            sql=self._connect_sql,
            redis=self._connect_redis,
            rng=lambda: random.Random(self.world.rng.random()),
        )

    @property
    def parts(self) -> Parts:
        assert self.engine is not None
        assert self.engine._running is not None
        return self.engine._running

    async def start(self) -> None:
        """Begin another life on the same disk."""
        self.life += 1
        self.world.history.last_life[self.name] = self.life
        self.process, self.gone = Process(f"{self.name}.{self.life}"), self.world.loop.create_future()
        engine = _Engine(self.config, self)
        self.world.tell(f"{self.name} starts: {len(self.disk.records)} in its log")
        await self.within(engine.start())
        self.engine = engine

    def crash(self) -> None:
        """``kill -9``, or the power goes."""
        self.engine = None
        self.world.loop.kill(self.process)
        if self.log is not None:
            self.log.crashed()
            self.log = None
        if not self.gone.done():
            self.gone.set_result(None)

    async def stop(self) -> None:
        """Stop as users do, and see that nothing is left running."""
        engine, self.engine = self.engine, None
        assert engine is not None
        report = await self.within(engine.stop(timeout=self.world.rng.choice((0.0, 1.0, 30.0))))
        await asyncio.sleep(PATIENCE_S_MAX * self.world.pace)  # whoever called it has given up
        left = self.world.loop.running(self.process)
        if left:
            raise Violation(f"{self.name} was stopped, and {len(left)} of its tasks run on: {left[:3]}")
        if report.left_in_log > len(self.disk.records):
            raise Violation(f"{self.name} says that it left {report.left_in_log} in its log: {self.disk.records}")
        self.log = None

    async def within(self, work: Coroutine[Any, Any, T], patience_s: float | None = None) -> T:
        """Do it in the engine's process; who has no patience any more cancels it. Raises ``Killed``."""
        task = self.world.loop.create_task(work, context=self.process.context)
        gone = self.gone
        await asyncio.wait((task, gone), timeout=patience_s, return_when=asyncio.FIRST_COMPLETED)
        if not task.done() and not gone.done():
            task.cancel()
            await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise Killed
        return task.result()

    async def _open_log(self, *_: object, **__: object) -> Any:
        await asyncio.sleep(0.001)
        world = self.world
        self.log = DiskLog(self.disk, world.loop, world.rng, world.weather, world.history.promised[self.name])
        return self.log

    async def _open_notes(self, _: Path) -> DiskNotes:
        return DiskNotes(self.disk, self.name)

    async def _connect_sql(self, *_: object, **__: object) -> Tier:
        return await Line.connect(self.world.l3, self.name)

    async def _connect_redis(self, *_: object, on_new_server: Callable[[], None], **__: object) -> Tier:
        return await Line.connect(self.world.l2, self.name, on_new_server)


class World:
    """Everything there is."""

    def __init__(self, seed: int, loop: SimulatedLoop, engines: int | None) -> None:
        self.loop = loop
        self.rng = rng = random.Random(f"{seed} world")
        self.passed_at_once = random.Random(f"{seed} lanes").choice((1, 2, 256))
        self.story: list[str] = []
        self.faults = 0
        self.weather = Weather(way_s=rng.choice((0.0005, 0.005)))
        self.pace = rng.choice((1.0, 1.0, 1.0, 1.0, 30.0))
        """How slowly everything goes: at the larger one outages last for minutes, and clocks matter."""
        l1_max_bytes = rng.choice((0, 0, 1_500, 1 << 20))
        by_chance = rng.choice((1, 1, 1, 2, 3))
        engines = by_chance if engines is None else engines
        self.history = History(alone=engines == 1, cached_in_l1=l1_max_bytes > 0)
        clock = SkewedClock(loop)
        self.l2 = Server(MemoryTier("l2", clock), loop, rng, self.weather)
        self.l3 = Server(MemoryTier("l3", clock), loop, rng, self.weather)
        config = _configured(rng, l1_max_bytes)
        self.nodes: list[Node] = []
        for name in "ABC"[:engines]:
            off_ms = 0 if engines == 1 else rng.choice((0, -3, 250, -5_000, 600_000))
            self.nodes.append(Node(name, self, config, SkewedClock(loop, off_ms)))
        self._contents = 0
        self._backups = [self.l2.tier.saved()]
        self._storms = 0

    def tell(self, what: str) -> None:
        self.story.append(f"{self.loop.time():12.6f} {self.history.ticks:5} {what}")

    async def live(self, script: Script | None) -> None:
        """From the first start to the last stop."""
        self.tell(f"{len(self.nodes)} engines, pace {self.pace:g}, {self.nodes[0].config!r}")
        for node in self.nodes:
            await node.start()
        await (script or World._live_by_chance)(self)
        await self._end_well()

    async def _live_by_chance(self) -> None:
        rng = self.rng
        callers = [self.loop.create_task(self._call(rng.randint(4, 14))) for _ in range(rng.randint(1, 4))]
        faults = self.loop.create_task(self._go_wrong(rng.choice((0, 1, 3, 8))))
        for task in (*callers, faults):
            await task

    # What callers do

    async def _call(self, calls: int) -> None:
        rng = self.rng
        for _ in range(calls):
            await asyncio.sleep(self.pace * rng.choice((0, 0, 0.001, 0.02, 0.2, 1.0)) * rng.random())
            node = rng.choice(self.nodes)
            if node.engine is None:
                continue
            patience_s = self.pace * (rng.uniform(0, 0.01) if rng.random() < 0.15 else rng.uniform(1, PATIENCE_S_MAX))
            verb = rng.choices(VERBS, WEIGHTS)[0]
            with suppress(Killed, SyncEngineError, asyncio.CancelledError):
                await node.within(verb(self, node, node.engine), patience_s)

    def _item(self) -> SyncItem:
        rng = self.rng
        self._contents += 1
        content = b"%d" % self._contents + b"." * rng.choice((0, 0, 300))
        return SyncItem(
            rng.choice(IDS), content, version=rng.randint(1, 3), state=rng.choice(STATES), updated_at=EPOCH_MS
        )

    def _options(self) -> SubmitOptions | None:
        rng = self.rng
        ttl = rng.choice((DAY_S, DAY_S, 2))
        return rng.choice(
            (
                None,
                None,
                None,
                SubmitOptions.cache(ttl),
                SubmitOptions.durable(),
                SubmitOptions(redis_ttl=ttl),
                SubmitOptions(state=rng.choice(STATES)),
            )
        )

    def _ack(self) -> Ack | None:
        return self.rng.choice((None, None, Ack.LOGGED, Ack.MEMORY, Ack.STORED))

    async def _submit(self, node: Node, engine: SyncEngine) -> None:
        receipt = await engine.submit(self._item(), self._options(), ack=self._ack())
        if self.rng.random() < 0.2:
            await receipt.stored()

    async def _submit_many(self, node: Node, engine: SyncEngine) -> None:
        items = [self._item() for _ in range(self.rng.randint(2, 6))]
        await engine.submit_many(items, self._options(), ack=self._ack())

    async def _compare_and_set(self, node: Node, engine: SyncEngine) -> None:
        await engine.submit(self._item(), SubmitOptions(if_version=self.rng.randint(0, 3)))

    async def _delete(self, node: Node, engine: SyncEngine) -> None:
        await engine.delete_many(self._some_ids(), ack=self._ack())

    async def _set_state(self, node: Node, engine: SyncEngine) -> None:
        await engine.set_state(self.rng.choice(IDS), self.rng.choice(STATES), ack=self._ack())

    async def _get(self, node: Node, engine: SyncEngine) -> None:
        object_id = self.rng.choice(IDS)
        await self._read(node, "get", [object_id], _one(engine.get(object_id)))

    async def _get_many(self, node: Node, engine: SyncEngine) -> None:
        ids = self._some_ids()
        await self._read(node, "get_many", ids, _by_id(ids, engine.get_many(ids)))

    async def _contains(self, node: Node, engine: SyncEngine) -> None:
        object_id = self.rng.choice(IDS)
        await self._read(node, "contains", [object_id], _one(engine.contains(object_id)))

    async def _scan(self, node: Node, engine: SyncEngine) -> None:
        await self._read(node, "scan", IDS, _listed(engine.scan_prefix("")))

    async def _by_state(self, node: Node, engine: SyncEngine) -> None:
        state = self.rng.choice(STATES)
        began = self.history.tick()
        for item in await engine.get_by_state(state):
            if item.state != state:
                raise Violation(f"I6: {item!r} is listed under {state!r}")
            self._noted(node, "by state", item.object_id, began, item)

    async def _flush(self, node: Node, engine: SyncEngine) -> None:
        await engine.flush(timeout=self.pace)

    def _some_ids(self) -> list[str]:
        return self.rng.sample(IDS, self.rng.randint(1, len(IDS)))

    async def _read(
        self, node: Node, verb: str, ids: Sequence[str], answer: Awaitable[dict[str, SyncItem | bool | None]]
    ) -> None:
        began = self.history.tick()
        life = node.life
        found = await answer
        assert life == node.life
        for object_id in ids:
            self._noted(node, verb, object_id, began, found.get(object_id) if len(ids) > 1 else found.popitem()[1])

    def _noted(self, node: Node, verb: str, object_id: str, began: int, found: SyncItem | bool | None) -> None:
        read = Read(node.name, node.life, verb, object_id, began, self.history.tick(), found)
        self.history.reads.append(read)

    # What goes wrong

    async def _go_wrong(self, times: int) -> None:
        rng = self.rng
        for _ in range(times):
            await asyncio.sleep(self.pace * rng.choice((0.005, 0.1, 1.0)) * rng.random())
            self.faults += 1
            await rng.choice(FAULTS)(self, self.pace * rng.choice((0.01, 0.3, 3.0, 10.0)) * rng.random())

    async def _engine_crashes(self, seconds: float) -> None:
        node = self.rng.choice(self.nodes)
        async with node.turn:
            self.tell(f"{node.name} crashes")
            node.crash()
            await asyncio.sleep(seconds)
            starting = self.loop.create_task(node.start())
            if self.rng.random() < 0.3:  # and once more, while it takes up its log
                await asyncio.wait((starting,), timeout=self.rng.uniform(0, 0.02))
                self.tell(f"{node.name} crashes")
                node.crash()
                with suppress(Killed):
                    await starting
                await node.start()
            else:
                await starting

    async def _engine_stops(self, seconds: float) -> None:
        node = self.rng.choice(self.nodes)
        async with node.turn:
            self.tell(f"{node.name} is stopped")
            await node.stop()
            await asyncio.sleep(seconds)
            await node.start()

    async def _redis_crashes(self, seconds: float) -> None:
        rng = self.rng
        state: tuple[Any, ...] = rng.choice((({}, {}, 0), rng.choice(self._backups), self.l2.tier.saved()))
        self.tell(f"Redis crashes, and comes back with {sorted(state[0])}")
        self.l2.stop()
        self.history.lossless = False
        await asyncio.sleep(seconds)
        self.l2.start(state)
        self.tell("Redis is back")

    async def _redis_is_saved(self, _: float) -> None:
        self._backups.append(self.l2.tier.saved())

    async def _sql_crashes(self, seconds: float) -> None:
        self.tell("SQL crashes")
        self.l3.stop()
        await asyncio.sleep(seconds)
        self.l3.start()
        self.tell("SQL is back")

    async def _line_is_cut(self, seconds: float) -> None:
        server = self.rng.choice((self.l2, self.l3))
        names = {node.name for node in self.rng.sample(self.nodes, self.rng.randint(1, len(self.nodes)))}
        self.tell(f"{server.tier.name} cannot be reached by {sorted(names)} for {seconds:g} s")
        server.cut_off |= names
        await asyncio.sleep(seconds)
        server.cut_off -= names

    async def _clock_jumps(self, _: float) -> None:
        node = self.rng.choice(self.nodes)
        by_ms = self.rng.choice((-3_600_000, -1_000, -20, 1_000, 3_600_000))
        self.tell(f"the clock of {node.name} jumps by {by_ms} ms")
        node.clock.off_ms += by_ms

    async def _it_storms(self, seconds: float) -> None:
        rng, weather = self.rng, self.weather
        self._storms += 1
        for what in ("lost", "unheard", "torn", "hung", "unsynced"):
            setattr(weather, what, rng.choice((0.0, 0.1, 0.5)))
        self.tell(f"it storms for {seconds:g} s: {weather!r}")
        await asyncio.sleep(seconds)
        self._storms -= 1
        if not self._storms:
            self._calm()

    def _calm(self) -> None:
        for what in ("lost", "unheard", "torn", "hung", "unsynced"):
            setattr(self.weather, what, 0.0)

    # How it ends

    async def _end_well(self) -> None:
        self._calm()
        self.tell("all is well from here on")
        for node in self.nodes:
            await node.within(self._healed(node))
        for node in self.nodes:
            await node.within(_flushed(node))
        await asyncio.sleep(LATEST_S)  # what was sent long ago arrives, and reads that began in a storm are over
        for node in self.nodes:
            await node.within(self._all_read(node))
            _at_rest(node)
        self.history.check_reads()
        # A read may have copied something upward meanwhile.
        self.history.check_tiers(self.l2.tier.rows, self.l3.tier.rows)
        for node in self.nodes:
            await node.stop()

    async def _healed(self, node: Node) -> None:
        assert node.engine is not None
        until_s = self.loop.time() + HEALED_WITHIN_S
        while not (health := await node.engine.health()).ok:
            if self.loop.time() > until_s:
                raise Violation(f"{node.name} did not heal: {health!r}")
            await asyncio.sleep(1)

    async def _all_read(self, node: Node) -> None:
        engine = node.engine
        assert engine is not None
        if not self.history.alone:
            node.parts.l1.clear()
        for object_id in IDS:
            await self._read(node, "get", [object_id], _one(engine.get(object_id)))
            await self._read(node, "contains", [object_id], _one(engine.contains(object_id)))
        node.parts.l1.clear()
        lower = self.l3.tier.rows
        wanted = {**lower, **self.l2.tier.rows}
        found = await engine.get_many(IDS)
        for object_id in IDS:
            item = wanted.get(object_id)
            passing = item is not None and item.expires_at is not None and item.expires_at < END_MS
            if found.get(object_id) != item and not passing:
                raise Violation(f"I4: {node.name} reads {found.get(object_id)!r}, and the tiers hold {item!r}")
        if await engine.scan_prefix("") != list(lower.values()):
            raise Violation(f"{node.name} does not list what SQL holds: {lower}")
        for state in STATES:
            ids = [object_id for object_id, item in lower.items() if item.state == state]
            if await engine.list_state_ids(state) != ids or await engine.count_by_state(state) != len(ids):
                raise Violation(f"I6: {node.name} does not list {ids} under {state!r}")


async def _flushed(node: Node) -> None:
    assert node.engine is not None
    try:
        await node.engine.flush(timeout=60)
    except TierUnavailable as late:
        raise Violation(f"{node.name} does not flush, and all is well: {late}") from late


def _at_rest(node: Node) -> None:
    parts, log = node.parts, node.log
    assert log is not None
    stats = parts.stats()
    gate = parts.writes._gate
    left = (stats.pending, stats.pending_bytes, stats.log_records, stats.quarantined, gate.ops, gate.bytes)
    if any(left) or gate.crowded or parts.writes._awaited:
        raise Violation(
            f"{node.name} is at rest, and has {parts.pending!r}, {gate!r}, {log!r}, {stats.quarantined} refused"
        )
    parts.l1.verify()


async def _one(answer: Awaitable[SyncItem | bool | None]) -> dict[str, SyncItem | bool | None]:
    return {"": await answer}


async def _by_id(ids: Sequence[str], answer: Awaitable[dict[str, SyncItem]]) -> dict[str, SyncItem | bool | None]:
    found = await answer
    return {object_id: found.get(object_id) for object_id in ids}


async def _listed(answer: Awaitable[list[SyncItem]]) -> dict[str, SyncItem | bool | None]:
    return {item.object_id: item for item in await answer}


def _configured(rng: random.Random, l1_max_bytes: int) -> SyncEngineConfig:
    return SyncEngineConfig(
        data_dir=Path("/"),
        redis_url=SecretStr("redis://simulated"),
        sql_url=SecretStr("sqlite:////simulated"),
        redis_eviction_enabled=False,
        l1_max_bytes=l1_max_bytes,
        batch_flush_ms=rng.choice((0, 5, 100)),
        batch_flush_count=rng.choice((1, 3, 1_000)),
        pending_max_bytes=rng.choice((0, 1_000, 1 << 20)),
        wal_max_items=rng.choice((5, 1_000, 1_000)),
        backpressure_wait_ms=rng.choice((0, 200)),
    )


VERBS: Final = (
    World._submit,
    World._submit_many,
    World._compare_and_set,
    World._delete,
    World._set_state,
    World._get,
    World._get_many,
    World._contains,
    World._scan,
    World._by_state,
    World._flush,
)
WEIGHTS: Final = (10, 2, 2, 4, 4, 5, 2, 2, 1, 1, 1)
FAULTS: Final = (
    World._engine_crashes,
    World._engine_crashes,
    World._engine_stops,
    World._redis_crashes,
    World._redis_is_saved,
    World._sql_crashes,
    World._line_is_cut,
    World._clock_jumps,
    World._it_storms,
    World._it_storms,
)
