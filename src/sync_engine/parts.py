"""The concrete parts of one running engine: owned by one task group, told of in one place, closed in reverse."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping
from contextlib import AsyncExitStack
from typing import Any, TypeVar, cast

from sync_engine.config import SyncEngineConfig
from sync_engine.errors import NotRunning, TierNotConfigured, TierUnavailable
from sync_engine.evict import Eviction
from sync_engine.heal import Healing
from sync_engine.links import Links, Replacements
from sync_engine.log import WriteAheadLog
from sync_engine.ports import Cache, CacheFacts, States, Tier, Truth
from sync_engine.pressure import Bands, Level
from sync_engine.read import Reader
from sync_engine.report import EngineStats, Health, LaneStats, StopReport, TierHealth
from sync_engine.storage.memory import L1Cache
from sync_engine.trust import Trust
from sync_engine.write.again import Refusals
from sync_engine.write.flush import Lane
from sync_engine.write.path import WritePath
from sync_engine.write.pending import PendingIndex
from sync_engine.write.quarantine import Quarantine

__all__ = ["STREAM_MAY_GO", "Parts"]

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

LOG_IS_FULL = (
    "the disk of the log is full: what was held back there is given up, so that the log can drain, and writes of items "
    "that SQL keeps are refused until there is room"
)

PRESSED: Mapping[Level, str] = {
    "warn": "writes are not held up yet",
    "hurry": "no batch waits for company any more",
    "slow": "writes are slowed",
    "refuse": "writes are slowed, and what no log holds waits",
}


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
        refusals: Refusals,
        trust: Trust,
        healing: Healing | None,
        eviction: Eviction | None,
        links: Links,
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
        self.refusals = refusals
        self._trust = trust
        self._healing = healing
        self._eviction = eviction
        self.links = links
        self._told = told
        self._recovered = recovered
        self._failed = failed
        self._opened = opened
        self._lanes = [lane for lane in (writes.truth, writes.cache) if lane is not None]
        self._supervisor = asyncio.get_running_loop().create_task(self._supervise(), name="sync-engine lanes")

    async def current_truth(self) -> Truth:
        """The truth, once it has everything accepted so far. Raises ``TierUnavailable`` if it is in trouble."""
        if self.l3 is None or self.writes.truth is None:
            raise TierNotConfigured("sql_url", "None", "scans and state queries of items need a truth")
        await self.writes.queued()  # what Ack.MEMORY accepted is shown before the log has it
        # Looked up before any wait: what Redis takes meanwhile queues for the truth behind our place in its link.
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
            lanes={
                lane.tier.name: LaneStats(len(lane.batcher), lane.trouble, lane.retries.count) for lane in self._lanes
            },
        )

    def retune(self, config: SyncEngineConfig, fresh: Replacements) -> None:
        """Take up what may change at run time, and what ``Links.reconnect`` made, in one step of the event loop."""
        self.links.retune(config, fresh)
        for link, tier in fresh.items():
            if link.tier.name == "l2" and tier is not None and self._healing is not None:
                # Whether it was restarted meanwhile only the connections before could have noticed.
                self._trust.lose("it is connected to anew")
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
        return TierHealth(silent is None, trouble, self.links.breaker(name).phase, len(lane.batcher), about, full)

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
            if self.journal.full:
                yield LOG_IS_FULL
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
        await self.links.aclose()
        await self.quarantine.finish()  # its folder is somebody else's after this
        await self._opened.aclose()
        # Counted last: the log writes what it was given before it closes.
        return StopReport(self.journal.unsettled if self.journal is not None else 0, self.writes.volatile)

    async def _supervise(self) -> None:
        """Own the lanes; one that dies takes the engine down, loudly, and leaves the rest to the log."""
        try:
            async with asyncio.TaskGroup() as lanes:
                for lane in self._lanes:
                    lanes.create_task(lane.run(), name=f"sync-engine lane {lane.tier.name}")
                lanes.create_task(self.writes.file(), name="sync-engine filing")
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
