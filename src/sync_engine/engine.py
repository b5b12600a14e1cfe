"""The join: builds the parts, owns their tasks, and offers the public verbs.

    submit ─► admit ─► log ─► L1 and pending index ─► lanes ─┬─► L3 SQL    (truth, stamp-guarded upsert)
              size,    fsync                          batch  ├─► L2 Redis  (one atomic script per chunk)
              room     shared                                └─► settle the log records

    get ─► L1 ─► pending ─► L2 ─► L3     one flight per id, lifted upward, verified by SHA-256

What each arrow does is in the part that owns it: ``pressure`` and ``log`` admit and keep a write,
``write`` carries it to the tiers, ``read`` finds it again.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import nullcontext
from functools import partial
from types import TracebackType
from typing import Any

from msgspec.structs import replace

from sync_engine.admission import Admission
from sync_engine.build import build
from sync_engine.clock import SystemClock
from sync_engine.coalesce import Flights
from sync_engine.config import SyncEngineConfig
from sync_engine.errors import InvalidItem, NotRunning, TierNotConfigured, TierUnavailable
from sync_engine.item import Op, SyncItem, check_id, check_state
from sync_engine.options import Ack, ItemStatus, Receipt, SubmitOptions, Ttl
from sync_engine.parts import Parts
from sync_engine.ports import Clock, Tier
from sync_engine.report import EngineStats, Health, QuarantinedOp, StopReport
from sync_engine.schema import check_schema
from sync_engine.write.quarantine import Quarantined
from sync_engine.write.sweep import check_prefix, sweep

__all__ = ["SyncEngine"]

log = logging.getLogger(__name__)

Loader = Callable[[str], Awaitable[SyncItem | None]]

PAGE = 1_000
"""Items per page of the iterators, and operations per append of the bulk writes."""


class SyncEngine:
    """Keeps items in memory, Redis and SQL, and keeps the three true to each other.

    Use it as ``async with SyncEngine(config) as engine``, or call ``start`` and ``stop``. One engine
    serves one event loop; any number of tasks may use it at once.

    ``clock`` and ``around`` are for tests: time that moves when told to, and a wrapper put around each
    tier (``sync_engine.testing.tiers`` has some that break, dawdle or count).
    """

    def __init__(
        self,
        config: SyncEngineConfig | None = None,
        *,
        clock: Clock | None = None,
        around: Callable[[Tier], Tier] = lambda tier: tier,
    ) -> None:
        self.config = config if config is not None else SyncEngineConfig()
        self._clock = clock if clock is not None else SystemClock()
        self._around = around
        self._admission = Admission(self.config, self._clock)
        self._parts: Parts | None = None
        self._running: Parts | None = None
        self._why_not = "it has not been started"
        self._loads: Flights[SyncItem | None] = Flights()
        self._turn = asyncio.Lock()  # start and stop, one at a time

    # Lifecycle

    async def start(self) -> None:
        """Open the log, connect the tiers, take up what the log holds. Does nothing if running.

        A tier that cannot be reached is a warning: the engine serves what it can and connects later.
        Raises ``ConfigError`` for what waiting cannot mend (a bad URL, a log in use by another process).
        """
        async with self._turn:
            if self._running is None:
                self._parts = await build(self.config, self._clock, self._failed, self._around)
                self._running = self._parts

    async def stop(self, timeout: float = 30.0) -> StopReport:
        """Refuse new work, flush, close. What no tier took within ``timeout`` seconds stays in the log.

        The report says how many operations were left in the log, and how many that skip SQL (and are
        therefore in no log) were lost. Does nothing if not running.
        """
        with nullcontext() if self._parts is None else self._parts.links.leaving():
            async with self._turn:
                self._running, self._why_not = None, "it has been stopped"
                parts, self._parts = self._parts, None
                await self._loads.aclose()
                return await parts.close(timeout) if parts is not None else StopReport(0, 0)

    async def __aenter__(self) -> SyncEngine:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    # Writing

    async def submit(self, item: SyncItem, options: SubmitOptions | None = None, *, ack: Ack | None = None) -> Receipt:
        """Write one item; returns once ``ack`` is reached (default: ``config.default_ack``).

        From then on every read of this engine reflects it. Raises ``InvalidItem`` before anything is
        written, ``Backpressure`` at a bound, ``TierUnavailable("log")`` if the log cannot be written;
        with ``Ack.STORED`` also ``VersionConflict`` and what refused the item.
        """
        draft, ack = self._admission.put(item, options, ack)
        return (await self._write([draft], ack))[0]

    async def submit_many(
        self, items: Iterable[SyncItem], options: SubmitOptions | None = None, *, ack: Ack | None = None
    ) -> list[Receipt]:
        """Write many items with the same options. All are checked before the first is written."""
        drafts = [self._admission.put(item, options, ack) for item in items]
        return await self._write([draft for draft, _ in drafts], drafts[0][1]) if drafts else []

    async def delete(self, object_id: str, *, ack: Ack | None = None) -> bool:
        """Delete one item from every tier; False if it did not exist.

        Where a tier that could hold it cannot be asked, the delete is accepted and the answer is True.
        """
        return await self.delete_many([object_id], ack=ack) == 1

    async def delete_many(self, ids: Iterable[str], *, ack: Ack | None = None) -> int:
        """Delete items from every tier; returns how many there were."""
        parts = self._on()
        # Also what nobody has seen yet: its caller may have given up, and mean it to be gone.
        unseen = parts.writes.unseen()
        known = await parts.reader.known(list(ids))
        drafts = [
            self._admission.delete(object_id)
            for object_id, there in known.items()
            if there is not False or object_id in unseen
        ]
        await self._write(drafts, self._admission.ack(ack))
        return len(drafts)

    async def delete_by_state(self, state: str) -> int:
        """Delete every item that SQL holds in the state, from every tier; how many were deleted.

        What has left the state when its turn comes is spared, and so is whatever is written after the call began. If it
        raises or is cancelled (``Backpressure``, ``TierUnavailable``), call it again: it goes on with what is left.
        """
        check_state(state)
        parts = self._on()
        return await sweep(parts.writes, parts.l3, parts.current_truth, state=state, most=self._page)

    async def delete_prefix(self, prefix: str, *, allow_all: bool = False) -> int:
        """Delete every item that SQL holds whose id begins with ``prefix``, from every tier; how many were deleted.

        The empty prefix is every item, and needs ``allow_all=True``. Otherwise as ``delete_by_state``.
        """
        check_prefix(prefix, allow_all=allow_all)
        parts = self._on()
        return await sweep(parts.writes, parts.l3, parts.current_truth, prefix=prefix, most=self._page)

    async def set_state(self, object_id: str, state: str, *, ack: Ack | None = None) -> bool:
        """Move one item to another state, in every tier; False if it does not exist."""
        check_state(state)
        parts = self._on()
        await parts.writes.swept({object_id})
        unseen = parts.writes.unseen()
        known = await parts.reader.known([object_id])
        if known[object_id] is False and object_id not in unseen:
            return False
        draft = self._admission.restate(object_id, state)
        refused = parts.quarantine.get(object_id)
        alone = refused is not None and refused.nowhere_else and parts.pending.get(object_id) is None
        if refused is not None and alone and await parts.refusals.stands(refused):
            draft = self._admission.again(refused.op, state)
        await self._write([draft], self._admission.ack(ack))
        return True

    async def flush(self, timeout: float = 30.0) -> None:
        """Wait until everything accepted before this call is in every tier, or quarantined.

        Raises ``TierUnavailable`` naming the tier that did not take it within ``timeout`` seconds.
        """
        parts = self._on()
        try:
            async with asyncio.timeout(timeout):
                await parts.writes.drained()
        except TimeoutError:
            lane = parts.slowest()
            raise TierUnavailable(
                lane.tier.name,
                f"{len(lane.batcher)} operations not taken within {timeout:g} s: {lane.trouble or 'slow'}",
            ) from None

    # Reading

    async def get(self, object_id: str, *, stale_ok: bool = False) -> SyncItem | None:
        """One item, or None if it does not exist.

        Raises ``TierUnavailable`` where a tier that could hold it cannot be asked (with ``stale_ok`` the
        newest copy known is returned instead, None if there is none), ``Corruption`` where no tier
        holds bytes that match their hash.
        """
        parts = self._running
        if parts is not None and (item := parts.l1.get(object_id)) is not None:
            return item
        return await self._on().reader.get(object_id, stale_ok=stale_ok)

    async def get_many(self, ids: Iterable[str]) -> dict[str, SyncItem]:
        """The items that exist, by id; one round trip per tier. Raises as ``get`` does, for any of them."""
        return await self._on().reader.get_many(list(ids))

    async def get_or_load(self, object_id: str, loader: Loader, *, ttl: Ttl | None = None) -> SyncItem | None:
        """One item; where it does not exist, what ``await loader(object_id)`` returns, which is stored and returned.

        However many ask for an id at once, one loader is called, and what it raises reaches all of them and is not
        kept. Who gives up waiting takes nobody with him. ``ttl`` keeps the item in Redis alone for so long. A loader
        that returns None says that there is no such item. What is written, or deleted, after the loader was called
        stays so. Raises as ``get`` and ``submit`` do.
        """
        options = self._admission.loaded(ttl)
        item = await self.get(object_id)
        if item is not None:
            return item
        return await self._loads.get(object_id, partial(self._load, object_id, loader, options))

    def peek(self, object_id: str) -> SyncItem | None:
        """The item if it is in process memory; no I/O, and no promise that it does not exist elsewhere."""
        return self._on().l1.peek(check_id(object_id))

    async def contains(self, object_id: str) -> bool:
        """Whether the item exists. Raises ``TierUnavailable`` where that is unknown."""
        known = (await self._on().reader.known([object_id]))[object_id]
        if known is None:
            raise TierUnavailable("l2 or l3", "a tier that could hold the item cannot be asked")
        return known

    async def status(self, object_id: str) -> ItemStatus:
        """Where the item is, tier by tier."""
        return await self._on().reader.status(object_id)

    # States and prefixes: answered by the truth, once it has everything accepted before the call

    async def get_by_state(self, state: str, limit: int = PAGE, *, after: str | None = None) -> list[SyncItem]:
        """Items in the state, ascending by id, beginning after the id ``after``."""
        return await (await self._on().current_truth()).get_by_state(check_state(state), limit, after=after)

    async def iter_by_state(self, state: str) -> AsyncIterator[SyncItem]:
        """Every item in the state, ascending by id, a page at a time."""
        after: str | None = None
        while page := await self.get_by_state(state, PAGE, after=after):
            for item in page:
                yield item
            after = page[-1].object_id

    async def list_state_ids(self, state: str, limit: int = PAGE, *, after: str | None = None) -> list[str]:
        """Ids in the state, ascending. Without SQL, Redis answers."""
        return await (await self._on().current_states()).list_state_ids(check_state(state), limit, after=after)

    async def count_by_state(self, state: str) -> int:
        """How many items are in the state. Without SQL, Redis answers."""
        return await (await self._on().current_states()).count_by_state(check_state(state))

    async def scan_prefix(self, prefix: str, limit: int = PAGE, *, after: str | None = None) -> list[SyncItem]:
        """Items whose id begins with ``prefix`` (empty: all), ascending, beginning after the id ``after``."""
        return await (await self._on().current_truth()).scan_prefix(prefix, limit, after=after)

    async def iter_prefix(self, prefix: str) -> AsyncIterator[SyncItem]:
        """Every item whose id begins with ``prefix``, ascending, a page at a time."""
        after: str | None = None
        while page := await self.scan_prefix(prefix, PAGE, after=after):
            for item in page:
                yield item
            after = page[-1].object_id

    async def count_prefix(self, prefix: str) -> int:
        """How many ids begin with ``prefix``."""
        return await (await self._on().current_truth()).count_prefix(prefix)

    # Operation

    async def register_schema(self, name: str, prefixes: Iterable[str]) -> int:
        """Keep items whose id begins with one of these prefixes in a SQL table of their own, ``{name}_items``.

        Of several prefixes the longest counts; one of another schema comes over to this one. SQL remembers it: call it
        once, or at every start. Items that are there already are moved, while everything is served; returns how many
        this call moved, when all are. If it raises or is cancelled, calling it again goes on, and so does the next
        start. Raises ``InvalidItem`` for a bad name or prefix, ``TierNotConfigured`` without SQL.
        """
        checked = check_schema(name, prefixes)
        truth = self._on().l3
        if truth is None:
            raise TierNotConfigured("sql_url", "None", "schemas are tables of SQL")
        # What may take long is not what finds out whether SQL is well again: everybody would wait for that answer.
        await truth.newest_stamp()
        return await truth.register_schema(name, checked)

    async def health(self) -> Health:
        """Whether every tier answers now and takes its operations, what Redis is, and what deserves a look.

        A tier that does not answer is told in the report, not raised.
        """
        return await self._on().health()

    def stats(self) -> EngineStats:
        """Figures of this moment; no I/O."""
        return self._on().stats()

    async def reconfigure(self, **changes: Any) -> None:
        """Change settings at run time, all of them or, where it raises, none; ``config`` shows the new ones.

        docs/operations.md says which may change. The others need a restart: ``ConfigError``. Time-outs take new
        connections: ``TierUnavailable`` where they cannot be had, ``NotRunning`` where the engine is to be stopped
        meanwhile. Should that stop be cancelled before its turn, the engine works on with the settings that it had.
        An engine that does not run takes all up when it starts.
        """
        async with self._turn:  # not between a start's reading of the settings and its end
            config = self.config.changed(**changes)
            told = [f"{name} = {getattr(config, name)!r}, was {getattr(self.config, name)!r}" for name in changes]
            parts = self._parts
            fresh = {} if parts is None else await parts.links.reconnect(config, changes.keys())
            # From here on nothing waits and nothing is refused.
            self.config = config
            self._admission.bound(config)
            if parts is not None:
                parts.retune(config, fresh)
        log.info("reconfigured: %s", "; ".join(told))

    async def quarantine(self) -> list[QuarantinedOp]:
        """Every operation that a tier refused, in stamp order, each with its tier and reason, none with its content."""
        return [
            QuarantinedOp(
                each.op.object_id, each.op.kind, each.tier, each.reason, each.op.stamp, each.op.size, each.since_ms
            )
            for each in self._on().quarantine.all()
        ]

    async def retry_quarantined(self, ids: Iterable[str] | None = None) -> int:
        """Send refused operations again (None: all), in stamp order; how many. ``flush`` waits for the outcome.

        They keep their stamps: what is newer stays, and one that has been overtaken only leaves the quarantine.
        One that is refused again stays in it.
        """
        refusals = self._on().refusals
        return await refusals.retry(self._chosen(ids))

    async def drop_quarantined(self, ids: Iterable[str]) -> int:
        """Give refused operations up for good; how many. Reads are then answered with what the tiers hold."""
        refusals = self._on().refusals
        return await refusals.drop(self._chosen(ids))

    def __repr__(self) -> str:
        return f"<SyncEngine running | {self._running!r}>" if self._running else f"<SyncEngine: {self._why_not}>"

    async def _write(self, drafts: Sequence[Op], ack: Ack) -> list[Receipt]:
        receipts = []
        size = self._page
        for start in range(0, len(drafts), size):
            writes = self._on().writes
            for entry in await writes.write(drafts[start : start + size], ack):
                receipts.append(Receipt(entry.op.object_id, entry.op.stamp, ack, partial(writes.settled, [entry])))
        return receipts

    @property
    def _page(self) -> int:
        return min(PAGE, self.config.wal_max_items)

    def _chosen(self, ids: Iterable[str] | None) -> list[Quarantined]:
        if isinstance(ids, str):
            raise InvalidItem("ids", "a str", "must be several ids")
        refused = self._on().quarantine.all()
        if ids is None:
            return list(refused)
        wanted = {check_id(object_id) for object_id in ids}
        return [each for each in refused if each.op.object_id in wanted]

    async def _load(self, object_id: str, loader: Loader, options: SubmitOptions) -> SyncItem | None:
        # What is loaded is as old as the moment at which the loader was asked: by its stamp it passes nothing newer.
        moment = self._on().writes.moment(0)
        held = await self.get(object_id)
        if held is not None:
            return held  # somebody was quicker
        item = await loader(object_id)
        if item is None:
            return None
        draft, ack = self._admission.put(item, options, None)
        if item.object_id != object_id:
            raise InvalidItem("loader", f"an item of {item.object_id!r}", f"must return that of {object_id!r}")
        await self._on().writes.write([replace(draft, stamp=moment)], ack)
        return await self.get(object_id)

    def _on(self) -> Parts:
        if self._running is None:
            raise NotRunning(f"the engine cannot be used: {self._why_not}")
        return self._running

    def _failed(self, error: BaseException) -> None:
        """A part met something it has no answer to; the log keeps what is not settled."""
        self._running, self._why_not = None, f"it failed: {error!r}"
