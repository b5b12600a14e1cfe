"""The concrete parts of one running engine: built in order, owned by one task group, closed in reverse."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, cast

from sync_engine.clock import Stamps
from sync_engine.config import SyncEngineConfig
from sync_engine.embedded import EmbeddedRedis
from sync_engine.errors import NotRunning, SyncEngineError, TierNotConfigured, TierUnavailable
from sync_engine.evict import Eviction
from sync_engine.heal import Healing
from sync_engine.item import Op
from sync_engine.late import Late
from sync_engine.log import WriteAheadLog
from sync_engine.notes import Notes
from sync_engine.ports import Cache, CacheFacts, Clock, States, Tier, Truth
from sync_engine.pressure import Bands, Gate, Level
from sync_engine.read import Reader
from sync_engine.report import EngineStats, Health, LaneStats, StopReport, TierHealth
from sync_engine.resilience import Breaker, Guarded, RetryPolicy
from sync_engine.storage.memory import L1Cache
from sync_engine.storage.redis import ChangeStream, RedisStore
from sync_engine.storage.sql import SqlStore
from sync_engine.trust import Trust, Trusted
from sync_engine.write.again import Refusals
from sync_engine.write.batcher import Batcher
from sync_engine.write.flush import Lane
from sync_engine.write.path import WritePath
from sync_engine.write.pending import PendingIndex
from sync_engine.write.quarantine import Quarantine

__all__ = ["Outside", "Parts", "build"]

log = logging.getLogger(__name__)

R = TypeVar("R")

STREAM_MAY_GO = (
    "the maxmemory-policy of Redis is allkeys-*: at its limit it may drop the change stream, state sets and indexes; "
    "noeviction keeps them"
)
DELETES_MAY_COME_BACK = (
    "the maxmemory-policy of Redis is not noeviction: at its limit it may drop what keeps late writes from bringing "
    "deleted items back"
)

PRESSED: Mapping[Level, str] = {
    "warn": "writes are not held up yet",
    "hurry": "no batch waits for company any more",
    "slow": "writes are slowed",
    "refuse": "writes are slowed, and what no log holds waits",
}

REDIS_PATIENCE_S = 2.0
"""How long a read waits for Redis where SQL can answer; after five such waits the breaker spares the next ones."""

REFUSALS_AT_ONCE = 200
"""Refused operations that are sent again with one append to the log: whole items, of whatever size."""

HEALED_WITHIN_S = 2.0
"""How long a start waits for a Redis that may have lost something; what is left is made up for beside the work."""


class Parts:
    """The parts of one running engine."""

    def __init__(
        self,
        *,
        l1: L1Cache,
        l2: Tier | None,
        l3: Truth | None,
        journal: WriteAheadLog | None,
        pending: PendingIndex,
        quarantine: Quarantine,
        reader: Reader,
        writes: WritePath,
        trust: Trust,
        healing: Healing | None,
        eviction: Eviction | None,
        breakers: Mapping[str, Breaker],
        told: bool,
        recovered: int,
        failed: Callable[[BaseException], None],
        opened: AsyncExitStack,
    ) -> None:
        self.l1 = l1
        self.l2 = l2
        self.l3 = l3
        self.journal = journal
        self.pending = pending
        self.quarantine = quarantine
        self.reader = reader
        self.writes = writes
        self._trust = trust
        self._healing = healing
        self._eviction = eviction
        self._breakers = breakers
        self._told = told
        self._recovered = recovered
        self._failed = failed
        self._opened = opened
        self.refusals = Refusals(quarantine, pending, writes, l3, cast(Cache | None, l2), most=REFUSALS_AT_ONCE)
        self._lanes = [lane for lane in (writes.truth, writes.cache) if lane is not None]
        self._supervisor = asyncio.get_running_loop().create_task(self._supervise(), name="sync-engine lanes")

    async def current_truth(self) -> Truth:
        """The truth, once it has everything accepted so far. Raises ``TierUnavailable`` if it is in trouble."""
        if self.l3 is None or self.writes.truth is None:
            raise TierNotConfigured("sql_url", "None", "scans and state queries of items need a truth")
        await self.writes.queued()  # what Ack.MEMORY accepted is shown before the log has it
        # Looked up before any wait: what Redis takes meanwhile queues for the truth behind our place in its line.
        leaving = self.writes.leaving_sql()
        await self.writes.truth.current()
        if self.writes.cache is not None and leaving:
            # What Redis alone keeps goes there first; until then its older row still stands in the truth.
            try:
                await self.writes.cache.current()
            except TierUnavailable:
                if any(await self.l3.exists_batch(leaving)):
                    raise
            await self.writes.truth.current()
        return self.l3

    async def current_states(self) -> States:
        """The tier that answers for states, once it has everything accepted so far."""
        if self.l3 is not None:
            return await self.current_truth()
        assert self.l2 is not None, "the configuration has at least one tier"
        assert self.writes.cache is not None, "a tier has a lane"
        await self.writes.cache.current()
        return self.l2

    def slowest(self) -> Lane:
        """The lane with the most to do."""
        return max(self._lanes, key=lambda lane: (lane.trouble is not None, len(lane.batcher)))

    def stats(self) -> EngineStats:
        """Figures of this moment."""
        journal = self.journal
        pressure, level = self.writes.pressure
        return EngineStats(
            pressure=pressure,
            level=level,
            l1=self.l1.stats(),
            pending=len(self.pending),
            pending_bytes=self.pending.memory_bytes,
            quarantined=len(self.quarantine),
            recovered=self._recovered,
            log_records=journal.unsettled if journal else 0,
            log_bytes=journal.bytes if journal else 0,
            log_damage=tuple(journal.damage) if journal else (),
            evicted=self._eviction.evicted if self._eviction is not None else 0,
            lanes={lane.tier.name: LaneStats(len(lane.batcher), lane.trouble) for lane in self._lanes},
        )

    def retune(self, config: SyncEngineConfig) -> None:
        """Take up what may change at run time, in one step of the event loop."""
        for lane in self._lanes:
            lane.batcher.bound(
                flush_count=config.batch_flush_count,
                flush_bytes=config.batch_flush_bytes,
                flush_after_ms=config.batch_flush_ms,
            )
        self.writes.bound(
            ops_max=config.wal_max_items,
            bytes_max=config.pending_max_bytes,
            wait_ms=config.backpressure_wait_ms,
            bands=Bands(config.backpressure_warn, config.backpressure_critical),
        )
        self.reader.promotion_ttl_ms = round(config.promotion_ttl * 1000)
        if self._healing is not None:
            self._healing.promotion_ttl_ms = round(config.promotion_ttl * 1000)
        if self._eviction is not None:
            self._eviction.start, self._eviction.target = config.redis_eviction_start, config.redis_eviction_target
        self.l1.resize(config.l1_max_bytes)

    async def health(self) -> Health:
        """Ask every tier now; one that does not answer is told, not raised."""
        facts: CacheFacts | None = None
        answers: dict[str, TierUnavailable | None] = {}
        if self.l3 is not None:
            _, answers["l3"] = await _asked(self.l3.newest_stamp())
        if self.l2 is not None:
            facts, answers["l2"] = await _asked(cast(Cache, self.l2).facts())
        tiers = {lane.tier.name: self._tier_health(lane, answers[lane.tier.name], facts) for lane in self._lanes}
        ok = all(tier.answers and tier.trouble is None for tier in tiers.values())
        return Health(ok, tiers, tuple(self._warnings(facts)), self.writes.pressure[1])

    def _tier_health(self, lane: Lane, silent: TierUnavailable | None, facts: CacheFacts | None) -> TierHealth:
        name = lane.tier.name
        trouble = silent.reason if silent is not None else lane.trouble
        about, full = "", None
        if name == "l2":
            trouble = trouble or self._trust.why_not
            if facts is not None:
                about = facts.about
                full = max((memory.share for memory in facts.memory if memory.limit_bytes), default=None)
        return TierHealth(silent is None, trouble, self._breakers[name].phase, len(lane.batcher), about, full)

    def _warnings(self, facts: CacheFacts | None) -> Iterator[str]:
        if facts is not None:
            if not facts.documents:
                yield "Redis has no RedisJSON: JSON items are kept there as strings, and cannot be searched there"
            elif not facts.searchable:
                yield "Redis has no RediSearch: items cannot be searched there"
            if self._told and facts.evicts_anything:
                yield STREAM_MAY_GO
            elif facts.policies - {"noeviction"} and any(memory.limit_bytes for memory in facts.memory):
                yield DELETES_MAY_COME_BACK
        if self._eviction is not None and self._eviction.stuck:
            yield "Redis is nearly full of items that it alone keeps: nothing may leave"
        pressure, level = self.writes.pressure
        if level != "normal":
            yield f"{pressure:.0%} of what may be unsettled is: {PRESSED[level]}"
        if count := len(self.quarantine):
            yield f"{count} operations were refused by a tier and are in quarantine"
        if self.journal is not None:
            yield from self.journal.damage

    async def close(self, timeout_s: float) -> StopReport:
        """Flush for so long, then close everything; a caller who is cancelled cuts the first short, not the second."""
        self.writes.refuse()
        try:
            async with asyncio.timeout(timeout_s):
                await self.writes.drained()
        except (TimeoutError, NotRunning):
            log.warning("stopping with %d operations not in every tier", len(self.pending))
        finally:
            report = await _to_the_end(self._give_back())
        return report

    async def _give_back(self) -> StopReport:
        self._supervisor.cancel()
        await asyncio.wait({self._supervisor})
        self.writes.abandon(NotRunning("the engine was stopped before the operation was in every tier"))
        await self.reader.aclose()
        await self._opened.aclose()
        # Counted last: the log writes what it was given before it closes.
        return StopReport(self.journal.unsettled if self.journal is not None else 0, self.writes.volatile)

    async def _supervise(self) -> None:
        """Own the lanes; one that dies takes the engine down, loudly, and leaves the rest to the log."""
        try:
            async with asyncio.TaskGroup() as lanes:
                for lane in self._lanes:
                    lanes.create_task(lane.run(), name=f"sync-engine lane {lane.tier.name}")
                if self._healing is not None:
                    lanes.create_task(self._healing.run(), name="sync-engine healing")
                if self._eviction is not None:
                    lanes.create_task(self._eviction.run(), name="sync-engine eviction")
        except BaseExceptionGroup as failures:
            error = failures.exceptions[0]
            log.critical("the engine failed; what is not settled stays in the log", exc_info=error)
            self._failed(error)
            self.writes.abandon(NotRunning(f"the engine failed: {error!r}"))

    def __repr__(self) -> str:
        return " | ".join(map(repr, (self.l1, self.pending, *self._lanes)))


async def _asked(question: Awaitable[R]) -> tuple[R | None, TierUnavailable | None]:
    try:
        return await question, None
    except TierUnavailable as silent:
        return None, silent


async def _to_the_end(work: Coroutine[Any, Any, StopReport]) -> StopReport:
    """Await work that must not be left half done; a cancellation is passed on when it is over."""
    task = asyncio.get_running_loop().create_task(work, name="sync-engine close")
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError as stopped:
            cancelled = stopped
    if cancelled is not None:
        raise cancelled
    return task.result()


@dataclass(frozen=True, slots=True)
class Outside:
    """How ``build`` opens what lies outside of the process; a simulation has its own."""

    log: Callable[..., Awaitable[WriteAheadLog]] = field(default_factory=lambda: WriteAheadLog.open)
    notes: Callable[[Path], Awaitable[Notes]] = field(default_factory=lambda: Notes.open)
    quarantine: Callable[..., Quarantine] = Quarantine
    sql: Callable[..., Awaitable[Tier]] = field(default_factory=lambda: SqlStore.connect)
    redis: Callable[..., Awaitable[Tier]] = field(default_factory=lambda: RedisStore.connect)
    rng: Callable[[], random.Random] = random.Random


async def build(
    config: SyncEngineConfig,
    clock: Clock,
    failed: Callable[[BaseException], None],
    around: Callable[[Tier], Tier],
    outside: Outside | None = None,
) -> Parts:
    """Open and connect every part of ``config``, in the order in which they depend on each other."""
    outside = Outside() if outside is None else outside
    async with AsyncExitStack() as opened:
        await asyncio.to_thread(config.data_dir.mkdir, mode=0o700, parents=True, exist_ok=True)
        journal = None
        if config.sql_url is not None:
            # First of all: the log's lock is what keeps a second engine away from this data_dir.
            journal = await outside.log(config.log_dir, segment_bytes=config.wal_segment_bytes)
            opened.push_async_callback(journal.close)
        stamps = Stamps(clock, outside.rng(), after=journal.last_stamp if journal is not None else 0)
        notes = await outside.notes(config.data_dir / "notes.json")
        pending = PendingIndex(config.pending_max_bytes)
        l3 = await _truth(config, clock, around, stamps, opened, outside)
        trust = Trust("l2", needed=l3 is not None)
        stream = None
        if config.enable_cdc_stream:
            stream = ChangeStream(notes.writer, config.cdc_stream_key, config.cdc_stream_maxlen)
        cache = await _cache(config, clock, around, trust, stream, opened, outside)
        l2 = None if cache is None else Trusted(cache, trust, l3, clock, pending.newest_stamp)
        healing = eviction = None
        if cache is not None and l3 is not None and config.redis_eviction_enabled:
            eviction = Eviction(
                trust,
                cache,
                l3,
                clock,
                start=config.redis_eviction_start,
                target=config.redis_eviction_target,
                rng=outside.rng(),
            )
        if cache is not None and l3 is not None:
            healing = Healing(
                trust,
                cache,
                l3,
                clock,
                promotion_ttl_ms=round(config.promotion_ttl * 1000),
                runs=notes.redis_runs,
                keep_runs=notes.keep_redis_runs,
                coming=pending.newest_stamp,
            )
            with suppress(SyncEngineError, TimeoutError):  # it is tried again, and told, beside the work
                async with asyncio.timeout(HEALED_WITHIN_S):
                    await healing.heal()

        quarantine = outside.quarantine(config.data_dir / "quarantine", clock)
        await quarantine.open()
        l1 = L1Cache(config.l1_max_bytes, clock=clock, rng=outside.rng())
        gate = Gate(
            ops_max=config.wal_max_items,
            bytes_max=config.pending_max_bytes,
            wait_ms=config.backpressure_wait_ms,
            bands=Bands(config.backpressure_warn, config.backpressure_critical),
            sleep=clock.sleep,
        )
        writes = WritePath(stamps=stamps, gate=gate, journal=journal, pending=pending, quarantine=quarantine)
        reader = Reader(
            pending=pending,
            quarantine=quarantine,
            l1=l1,
            l2=l2,
            l3=l3,
            read_back=writes.read_back,
            observe=stamps.observe,
            clock=clock,
            promotion_ttl_ms=round(config.promotion_ttl * 1000),
        )
        writes.view = reader
        if l3 is not None:
            # A cache-only item rarely has a row: it is asked for before it is deleted.
            writes.truth = _lane(l3, config, clock, writes, _keeps_sql, erases_blindly=False)
        if l2 is not None:
            # With a change stream Redis is given what it does not keep as well: it tells of it.
            keeps = _keeps_redis if stream is None else _keeps_all
            writes.cache = _lane(l2, config, clock, writes, keeps, erases_blindly=True)
        recovered = len(journal.recovered) if journal is not None else 0
        if journal is not None and recovered:
            log.info("taking up %d operations from the log", recovered)
            writes.recover(journal.recovered)
            journal.recovered.clear()  # whole items, which the write path now keeps within its own bound
        return Parts(
            l1=l1,
            l2=l2,
            l3=l3,
            journal=journal,
            pending=pending,
            quarantine=quarantine,
            reader=reader,
            writes=writes,
            trust=trust,
            healing=healing,
            eviction=eviction,
            breakers={tier.name: tier.breaker for tier in (cache, l3) if tier is not None},
            told=stream is not None,
            recovered=recovered,
            failed=failed,
            opened=opened.pop_all(),
        )


async def _truth(
    config: SyncEngineConfig,
    clock: Clock,
    around: Callable[[Tier], Tier],
    stamps: Stamps,
    opened: AsyncExitStack,
    outside: Outside,
) -> Guarded | None:
    url = config.sql_url
    if url is None:
        return None

    async def connect() -> Tier:
        return await outside.sql(url.get_secret_value(), timeout_ms=config.sql_timeout_ms)

    async def connected(store: Tier) -> None:
        # Another engine's clock may have run ahead of ours: never stamp below what the truth holds.
        stamps.observe(await cast(Truth, store).newest_stamp())

    late = await _late("l3", connect, connected, opened)
    return Guarded(around(late), Breaker("l3", clock), clock)


async def _cache(
    config: SyncEngineConfig,
    clock: Clock,
    around: Callable[[Tier], Tier],
    trust: Trust,
    stream: ChangeStream | None,
    opened: AsyncExitStack,
    outside: Outside,
) -> Guarded | None:
    if config.redis_url is None:
        return None
    url = config.redis_url.get_secret_value()
    if url.startswith("embedded://"):
        server = EmbeddedRedis(data_dir=config.data_dir / "redis")
        await server.start()
        opened.push_async_callback(server.stop)
        url = server.url

    async def connect() -> Tier:
        return await outside.redis(
            url,
            config.redis_prefix,
            timeout_ms=config.redis_timeout_ms,
            response_timeout_ms=config.redis_response_timeout_ms,
            binary_format=config.redis_binary_format,
            ca_file=config.redis_ca_file,
            change_stream=stream,
            on_new_server=trust.lose,
        )

    async def connected(store: Tier) -> None:
        if stream is not None and (await cast(Cache, store).facts()).evicts_anything:
            log.warning(STREAM_MAY_GO)

    late = await _late("l2", connect, connected, opened)
    # A read that SQL can answer does not wait out a Redis that has stopped; a write is left its full time.
    write_s = 2 * (config.redis_timeout_ms + config.redis_response_timeout_ms) / 1000
    read_s = min(write_s, REDIS_PATIENCE_S) if config.sql_url is not None else None
    return Guarded(around(late), Breaker("l2", clock), clock, read_s, write_deadline_s=write_s)


async def _late(
    name: str,
    connect: Callable[[], Awaitable[Tier]],
    connected: Callable[[Tier], Awaitable[None]],
    opened: AsyncExitStack,
) -> Late:
    late = Late(name, connect, connected)
    opened.push_async_callback(late.close)
    try:
        await late.ready()
    except TierUnavailable as down:
        log.warning("starting without %s: %s", name, down)
    return late


def _lane(
    tier: Tier,
    config: SyncEngineConfig,
    clock: Clock,
    writes: WritePath,
    keeps: Callable[[Op], bool],
    *,
    erases_blindly: bool,
) -> Lane:
    batcher = Batcher(
        flush_count=config.batch_flush_count,
        flush_bytes=config.batch_flush_bytes,
        flush_after_ms=config.batch_flush_ms,
        clock=clock,
    )
    return Lane(tier, batcher, writes, keeps, erases_blindly=erases_blindly, retry=RetryPolicy(), clock=clock)


def _keeps_sql(op: Op) -> bool:
    return op.sql


def _keeps_redis(op: Op) -> bool:
    return op.redis


def _keeps_all(op: Op) -> bool:
    return True
