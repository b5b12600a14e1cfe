"""The read flow: pending, L1, L2, L3, each asked only for what is still unknown; finds are lifted upward.

``None`` means that every tier that could hold the item was asked and none does. A tier that cannot be
asked makes the answer unknown, which is an error and never ``None``.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import cast

from sync_engine.coalesce import Coalescer
from sync_engine.errors import StoreError, SyncEngineError, TierUnavailable
from sync_engine.item import Op, SyncItem, check_id
from sync_engine.options import ItemStatus
from sync_engine.ports import Cache, Clock, Fetched, Hot, Tier
from sync_engine.write.pending import Entry, PendingIndex, overlay
from sync_engine.write.quarantine import Quarantine, Quarantined

__all__ = ["Reader"]

log = logging.getLogger(__name__)

FILLS_MAX = 4
"""Copies upward that may be under way at once; a fill is a favour and is left out beyond that."""

LOOKS_MAX = 5
"""Times that a read looks again for an item that was written while it went from tier to tier and found it in none."""

Answer = SyncItem | SyncEngineError


class Reader:
    """Answers for items from wherever they are."""

    def __init__(
        self,
        *,
        pending: PendingIndex,
        quarantine: Quarantine,
        l1: Hot,
        l2: Tier | None,
        l3: Tier | None,
        observe: Callable[[int], None],
        clock: Clock,
        promotion_ttl_ms: int,
    ) -> None:
        self._pending = pending
        self._quarantine = quarantine
        self._l1 = l1
        self._l2 = l2
        self._l3 = l3
        self._observe = observe
        self._clock = clock
        self.promotion_ttl_ms = promotion_ttl_ms
        self._flights: Coalescer[Answer] = Coalescer(self._fetch)
        # Per running fetch: ids written since it began. By identity: two sets that are equal now are not the same.
        self._watching: dict[int, set[str]] = {}
        self._fills: set[asyncio.Task[None]] = set()

    async def get(self, object_id: str, *, stale_ok: bool = False) -> SyncItem | None:
        """One item that L1 does not have. Many callers of one id share one flight."""
        check_id(object_id)
        entry = self._pending.get(object_id)
        if entry is not None and self._decides(entry):
            decided, item = await self._from_pending(entry)
            if decided:
                return item
        # A change of state may follow what was refused.
        refused = self._quarantine.get(object_id) if entry is None or entry.op.kind == "restate" else None
        answer = await self._flights.get(object_id)
        if refused is not None:
            answer = _newer(refused, answer)
        if isinstance(answer, SyncEngineError):
            if not stale_ok or not isinstance(answer, TierUnavailable):
                raise answer.with_traceback(None)  # shared by all who waited for this flight
            answer = None
        return self._alive(overlay(entry.op, answer) if entry is not None else answer)

    async def get_many(self, ids: Sequence[str]) -> dict[str, SyncItem]:
        """The items that exist, by id. Raises if the answer for any of the ids is unknown."""
        found: dict[str, SyncItem] = {}
        overlaid: dict[str, Op] = {}
        aside: dict[str, Quarantined] = {}
        ask: list[str] = []
        for object_id in dict.fromkeys(ids):
            item = self._l1.get(check_id(object_id))
            if item is None:
                entry = self._pending.get(object_id)
                decided = False
                if entry is not None and self._decides(entry):
                    decided, item = await self._from_pending(entry)
                if not decided:
                    ask.append(object_id)
                    refused = self._quarantine.get(object_id)
                    if entry is not None:
                        overlaid[object_id] = entry.op
                    if refused is not None and (entry is None or entry.op.kind == "restate"):
                        aside[object_id] = refused
            if item is not None:
                found[object_id] = item
        if ask:
            answers: dict[str, Answer | None] = {**await self._fetch(ask)}
            for object_id, refused in aside.items():
                answers[object_id] = _newer(refused, answers.get(object_id))
            for object_id, answer in answers.items():
                if isinstance(answer, SyncEngineError):
                    raise answer.with_traceback(None)
                known = overlaid.get(object_id)
                item = self._alive(overlay(known, answer) if known is not None else answer)
                if item is not None:
                    found[object_id] = item
        return found

    async def known(self, ids: Sequence[str], *, looks: int = LOOKS_MAX) -> dict[str, bool | None]:
        """Whether each item exists, without reading it; None where a tier that could hold it is silent."""
        answers: dict[str, bool | None] = {}
        for object_id in ids:
            entry = self._pending.get(check_id(object_id))
            if entry is not None and self._decides(entry):
                answers[object_id] = not entry.deletes and not self._expired(entry)
            elif self._l1.peek(object_id) is not None or self._alive(self._quarantine.item(object_id)) is not None:
                answers[object_id] = True
            else:
                answers[object_id] = False
        ask = [object_id for object_id in answers if answers[object_id] is False and not self._is_deleted(object_id)]
        silent = False
        with self._watched() as touched:
            for tier in (self._l2, self._l3):
                if tier is not None and ask:
                    try:
                        held = await tier.exists_batch(ask)
                    except TierUnavailable:
                        silent = True
                        continue
                    answers.update((object_id, True) for object_id, there in zip(ask, held, strict=True) if there)
                    ask = [object_id for object_id, there in zip(ask, held, strict=True) if not there]
        if silent:
            answers.update(dict.fromkeys(ask))
        moved = [object_id for object_id in ask if object_id in touched]
        if moved and looks > 1:
            answers.update(await self.known(moved, looks=looks - 1))
        return answers

    async def status(self, object_id: str) -> ItemStatus:
        """Where the item is; a tier that cannot be asked is None."""
        check_id(object_id)
        entry = self._pending.get(object_id)
        refused = self._quarantine.get(object_id)
        deleted = entry is not None and entry.deletes
        l2, l3 = await asyncio.gather(_held(self._l2, object_id), _held(self._l3, object_id))
        return ItemStatus(
            object_id,
            pending=entry is not None and not deleted,
            quarantined=refused.reason if refused is not None else None,
            l1=self._l1.peek(object_id) is not None,
            l2=l2 and not deleted if l2 is not None else None,
            l3=l3 and not deleted if l3 is not None else None,
        )

    def written(self, op: Op) -> None:
        """An operation became visible: L1 shows it, and no read begun before may cache what it finds."""
        self.touch(op.object_id)
        if op.kind == "put" and op.item is not None:
            self._l1.offer(op.item, op.item.expires_at)
        elif op.kind == "delete":
            self._l1.drop(op.object_id)
        elif (held := self._l1.peek(op.object_id)) is not None and op.state is not None:
            self._l1.offer(held.replace(state=op.state, stamp=op.stamp), held.expires_at)

    def touch(self, object_id: str) -> None:
        """The id is being written: reads under way may return what they find, but nobody may join or cache them.

        Called when a write becomes visible and again when it settles, so that a read that began in
        between and found the old copy is covered too.
        """
        if self._watching:
            for touched in self._watching.values():
                touched.add(object_id)
            self._flights.forget(object_id)

    def outdone(self, object_id: str, stamp: int) -> None:
        """A newer write of another engine stands in a tier: forget our copy."""
        held = self._l1.peek(object_id)
        if held is not None and held.stamp <= stamp:
            self._l1.drop(object_id)

    def found(self, item: SyncItem) -> None:
        """A tier holds this under a change of state of ours: forget a copy of other content."""
        held = self._l1.peek(item.object_id)
        if (
            held is not None
            and held.stamp <= item.stamp
            and (held.version, held.content) != (item.version, item.content)
        ):
            self._l1.drop(item.object_id)

    async def aclose(self) -> None:
        """Wait for what is under way."""
        await self._flights.aclose()
        while self._fills:
            await asyncio.wait(self._fills)

    def _decides(self, entry: Entry) -> bool:
        """Whether what is pending alone says what the item is."""
        if entry.deletes:
            return True
        source = _source(entry)
        return source is not None and (source.value_in_memory or source.reloadable)

    async def _from_pending(self, entry: Entry) -> tuple[bool, SyncItem | None]:
        """Whether it could be told, and the item."""
        if entry.deletes:
            return True, None
        source = _source(entry)
        if source is None:
            return False, None
        item = source.op.item
        if item is None:
            try:
                item = await self._pending.read_back(source)
            except StoreError:
                if source.settled:  # it reached the tiers meanwhile, and the log let go of it
                    return False, None
                raise
        item = self._alive(overlay(entry.op, item))
        if item is not None and self._pending.get(item.object_id) is entry:
            self._l1.offer(item, item.expires_at)
        return True, item

    def _is_deleted(self, object_id: str) -> bool:
        entry = self._pending.get(object_id)
        return entry is not None and entry.deletes

    def _expired(self, entry: Entry) -> bool:
        source = _source(entry)
        op = entry.op if source is None else source.op
        return not op.sql and op.redis_expires_at is not None and op.redis_expires_at <= self._clock.now_ms()

    def _alive(self, item: SyncItem | None) -> SyncItem | None:
        if item is not None and item.expires_at is not None and item.expires_at <= self._clock.now_ms():
            return None
        return item

    async def _fetch(self, ids: Sequence[str]) -> dict[str, Answer]:
        """Ask L2, then L3 for what L2 lacks; an id in no answer is absent from both."""
        found: dict[str, Answer] = {}
        for _ in range(LOOKS_MAX):
            with self._watched() as touched:
                answers, lift, damaged = await self._ask(ids)
            self._keep(answers, touched)
            fills = [item for item in lift if item.object_id not in touched and not item.sql_only]
            if fills or damaged:
                self._fill(fills, damaged)
            found.update(answers)
            # Not there, but written meanwhile: it may have gone from where we had not looked to where we had.
            ids = [object_id for object_id in ids if object_id not in answers and object_id in touched]
            if not ids:
                break
        return found

    @contextmanager
    def _watched(self) -> Iterator[set[str]]:
        """The ids that are written while this lasts."""
        touched: set[str] = set()
        self._watching[id(touched)] = touched
        try:
            yield touched
        finally:
            del self._watching[id(touched)]

    def _keep(self, answers: Mapping[str, Answer], touched: set[str]) -> None:
        """Show in L1 what was found, unless this engine knows of something newer."""
        for object_id, answer in answers.items():
            if isinstance(answer, SyncItem):
                self._observe(answer.stamp)
                newer = object_id in touched or self._pending.get(object_id) or self._quarantine.get(object_id)
                if not newer:
                    self._l1.offer(answer, answer.expires_at)

    async def _ask(self, ids: Sequence[str]) -> tuple[dict[str, Answer], list[SyncItem], dict[str, int]]:
        """Answers, what to copy into L2, and which damaged copies have to leave it first, with their stamps."""
        answers: dict[str, Answer] = {}
        upper = Fetched()
        silent: TierUnavailable | None = None
        if self._l2 is not None:
            try:
                upper = await self._l2.fetch(ids)
            except TierUnavailable as down:
                silent = down
            answers.update(upper.items)
        missing = [object_id for object_id in ids if object_id not in answers]
        if not missing:
            return answers, [], {}
        # Before the truth is asked: what is written to L2 from then on has another stamp, and stays.
        stamps = await self._stamps(list(upper.corrupt)) if upper.corrupt else {}
        truth = Fetched()
        unknown: dict[str, SyncEngineError] = {}
        if self._l3 is not None:
            try:
                truth = await self._l3.fetch(missing)
            except TierUnavailable as down:
                unknown = dict.fromkeys(missing, down)
        lift: list[SyncItem] = []
        damaged: dict[str, int] = {}
        for object_id in missing:
            item = truth.items.get(object_id)
            if item is not None and not self._is_being_erased(item):
                answers[object_id] = item
                if self._l2 is not None and silent is None and object_id not in upper.unverified:
                    lift.append(item)
                    if object_id in stamps:
                        damaged[object_id] = stamps[object_id]
            elif object_id in truth.corrupt:
                answers[object_id] = truth.corrupt[object_id]
            elif object_id in unknown:
                answers[object_id] = unknown[object_id]
            elif object_id in upper.unverified:
                answers[object_id] = upper.unverified[object_id]
            elif object_id in upper.corrupt:
                answers[object_id] = upper.corrupt[object_id]
            elif silent is not None:
                answers[object_id] = silent
        return answers, lift, damaged

    async def _stamps(self, ids: Sequence[str]) -> dict[str, int]:
        """What L2 takes for the stamps of copies that are damaged, the stamp itself perhaps."""
        try:
            return await cast(Cache, self._l2).held_stamps(ids)
        except SyncEngineError as failed:
            log.debug("%d damaged copies cannot be mended now: %s", len(ids), failed)
            return {}

    def _is_being_erased(self, item: SyncItem) -> bool:
        """Whether a newer write that skips SQL is about to remove this row."""
        entry = self._pending.get(item.object_id)
        return entry is not None and entry.op.kind == "put" and not entry.op.sql and entry.op.stamp > item.stamp

    def _fill(self, lift: Sequence[SyncItem], damaged: Mapping[str, int]) -> None:
        """Copy upward in the background, also over what is damaged; a fill never passes a newer copy or a tombstone."""
        if len(self._fills) >= FILLS_MAX:
            return
        expires_at = self._clock.now_ms() + self.promotion_ttl_ms
        ops = [
            Op(
                kind="put",
                object_id=item.object_id,
                stamp=item.stamp,
                item=item,
                redis_expires_at=expires_at,
                fill=True,
            )
            for item in lift
        ]
        task = asyncio.get_running_loop().create_task(self._lift(ops, damaged), name="sync-engine fill")
        self._fills.add(task)
        task.add_done_callback(self._fills.discard)

    async def _lift(self, ops: Sequence[Op], damaged: Mapping[str, int]) -> None:
        assert self._l2 is not None
        try:
            if damaged:
                await cast(Cache, self._l2).evict(list(damaged.items()))
            if ops:
                await self._l2.apply(ops)
        except SyncEngineError as failed:
            log.debug("copying %d items into %s failed: %s", len(ops), self._l2.name, failed)


def _source(entry: Entry) -> Entry | None:
    """The pending put that carries the item: the entry itself, or what it restates."""
    if entry.op.kind == "put":
        return entry
    return entry.base if entry.base is not None and not entry.base.settled else None


def _newer(refused: Quarantined, answer: Answer | None) -> Answer | None:
    """What this engine acknowledged and a tier refused, unless a tier holds a newer write, of another engine."""
    op = refused.op
    if isinstance(answer, SyncItem) and answer.stamp >= op.stamp:
        return answer
    if op.kind != "restate":
        return op.item
    return overlay(op, answer) if isinstance(answer, SyncItem) else answer


async def _held(tier: Tier | None, object_id: str) -> bool | None:
    if tier is None:
        return None
    try:
        return (await tier.exists_batch([object_id]))[0]
    except TierUnavailable:
        return None
