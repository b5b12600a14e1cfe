"""Trust in Redis, lost when it may hold an older state than it had confirmed, regained when SQL has made up for that.

    another server ─► distrust ─► what SQL accepted since ─► over whatever is older ─► trust

A Redis that was restarted from a snapshot, or whose replica took over, has forgotten writes that the log no longer
holds, deletes among them. Until they are there again its reads raise ``TierUnavailable``, so that SQL answers; what
it alone keeps is unknown for so long, which is not absent. Writes go through: stamps decide.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from sync_engine.clock import COUNTER_BITS
from sync_engine.errors import StoreError, SyncEngineError, TierUnavailable
from sync_engine.item import Op, SyncItem
from sync_engine.ports import Cache, Clock, Mark, Truth
from sync_engine.resilience import Retries, RetryPolicy, retrying
from sync_engine.trust import MARGIN_MS, Trust

__all__ = ["Healing"]

log = logging.getLogger(__name__)

PAGE: Final = 500
"""Changes per page: one call to each tier, a few milliseconds of Redis."""

RECENT_MS: Final = 300_000
"""Changes so young are brought even where Redis holds nothing of the id: an older one may be on its way there."""

LOOK_S: Final = 60.0
"""How often Redis is asked for its marks, which then show that no write up to now is still missing there."""

RETRY: Final = RetryPolicy(cap_s=1.0)

Runs = Mapping[int, str]
"""The run of each place of a cache, as last trusted."""


@dataclass(frozen=True, slots=True)
class _Way:
    """From which stamp on there is something to make up for, since when that is valid, how far it has come."""

    epoch: int
    stamp: int
    after: tuple[int, str] | None = None


class Healing:
    """Makes up from the truth for what a cache lost, and keeps its marks young."""

    def __init__(
        self,
        trust: Trust,
        cache: Cache,
        truth: Truth,
        clock: Clock,
        *,
        retries: Mapping[str, Retries],
        promotion_ttl_ms: int,
        runs: Runs,
        keep_runs: Callable[[Runs], Awaitable[None]],
        coming: Callable[[str], int] = lambda _: 0,
    ) -> None:
        """``cache`` is asked beside the doubt in it. ``runs``: as ``keep_runs`` was last told, by an earlier engine.

        ``retries``: of each tier by name; an attempt that failed is charged to the tier that the failure names.
        ``coming`` tells the newest stamp of ours for an id, 0 if nothing of ours is under way.
        """
        self._trust = trust
        self._cache = cache
        self._truth = truth
        self._clock = clock
        self._retries = retries
        self.promotion_ttl_ms = promotion_ttl_ms
        self._runs = runs
        self._keep_runs = keep_runs
        self._coming = coming
        self._way: _Way | None = None
        self._told = ""
        self._failed = ""  # the tier that the last failure named

    async def run(self) -> None:
        """Heal whenever it is needed, until cancelled."""
        while True:
            await retrying(RETRY, self._wait, on=self._passing)(self.heal)
            await self._look_on()

    async def heal(self) -> None:
        """Make up for what was lost. Raises ``SyncEngineError`` where that cannot be done now; another call goes on."""
        trust = self._trust
        while trust.doubt is not None:
            epoch = trust.epoch
            # What was read before the loss must be in Redis before that is looked at, or nowhere.
            await trust.fills_over()
            marks = await self._cache.marks()
            stamp = await self._lost_from(marks)
            if stamp is not None:
                await self._make_up(epoch, stamp)
            if trust.epoch != epoch:
                continue
            await self._cache.healed(marks)
            self._retries["l2"].answered()
            if trust.epoch == epoch:
                self._runs, self._way, self._told = {mark.place: mark.run for mark in marks}, None, ""
                trust.regain()
                await self._note_runs()

    async def _lost_from(self, marks: Sequence[Mark]) -> int | None:
        """The stamp from which on something may be missing; None where nothing can be."""
        since = [stamp for mark in marks if (stamp := self._since(mark)) is not None]
        if not since:
            return None
        oldest = min(since)
        if not oldest:
            log.info("Redis holds items and no mark of ours: comparing it with all that SQL holds")
            return 0
        oldest = max(oldest - (MARGIN_MS << COUNTER_BITS), 1)
        late = await self._truth.late_since(oldest >> COUNTER_BITS)
        oldest = oldest if late is None else min(oldest, late)
        if oldest < (forgotten := await self._truth.forgotten()):
            days = (forgotten - oldest >> COUNTER_BITS) / 86_400_000 + 7
            raise StoreError(
                "l2",
                f"it came back as it was {days:.0f} days ago, and SQL remembers deletes for 7: deleted items may be "
                "among what it holds. It is not read until the keys of its prefix are deleted, which SQL refills",
            )
        return oldest

    def _since(self, mark: Mark) -> int | None:
        if mark.since is not None:
            return mark.since
        if not mark.run:
            return mark.newest  # nobody may ask it who it is: what was applied last could have been lost
        # Others have made up for what they knew of. What we wrote to the server before this one they may not have.
        return mark.began if self._runs and self._runs.get(mark.place) != mark.run else None

    async def _make_up(self, epoch: int, stamp: int) -> None:
        way = self._way
        if way is None or (way.epoch, way.stamp) != (epoch, stamp):
            way = _Way(epoch, stamp)
            log.warning("making up from SQL for what Redis may have lost")
        count = 0
        while self._trust.epoch == epoch:
            self._way = way
            page = await self._truth.changed_since(stamp, way.after, PAGE)
            count += await self._mend(page.ops, bring=stamp > 0)
            if page.after is None:
                log.warning("made up for %d changes that Redis had lost", count)
                return
            way = _Way(epoch, stamp, page.after)

    async def _mend(self, ops: Sequence[Op], *, bring: bool) -> int:
        """Apply what the cache holds an older copy of; ``bring``: or none. How many that were."""
        held = await self._cache.held_stamps([op.object_id for op in ops]) if ops else {}
        now_ms = self._clock.now_ms()
        recent = now_ms - RECENT_MS << COUNTER_BITS
        expires_at = now_ms + self.promotion_ttl_ms
        missing: list[Op] = []
        outdone: list[tuple[str, int]] = []
        unstamped: list[SyncItem] = []
        for op in ops:
            copy = held.get(op.object_id)
            if not op.stamp:
                if copy == 0 and op.item is not None:
                    unstamped.append(op.item)
            elif op.stamp < self._coming(op.object_id):
                # A write of ours follows. One that skips SQL may have been in the cache and be lost there: what is left
                # of it takes this row away, and a copy that is brought now would stay.
                if copy is not None and copy < op.stamp:
                    outdone.append((op.object_id, copy))
            elif copy < op.stamp if copy is not None else bring or op.stamp >= recent:
                missing.append(_as_sent(op, None if copy is not None else expires_at))
        await self._evict(outdone)
        sent = {op.object_id for op in missing}
        if missing:
            applied = await self._cache.apply(missing)
            # What it will not take must not leave the older copy standing.
            await self._evict([(id_, held[id_]) for id_ in applied.refused if id_ in held])
            sent -= applied.superseded
        # What the cache has kept, a stream on another server may have lost.
        kept = (op for op in ops if op.object_id not in sent and op.stamp >= self._coming(op.object_id))
        await self._cache.tell([op for op in kept if op.stamp])
        if unstamped:
            copies = (await self._cache.fetch([item.object_id for item in unstamped])).items
            differing = [item.object_id for item in unstamped if _differs(item, copies.get(item.object_id))]
            await self._evict([(object_id, 0) for object_id in differing])
        return len(missing)

    async def _evict(self, copies: Sequence[tuple[str, int]]) -> None:
        if copies:
            await self._cache.evict(copies)

    async def _look_on(self) -> None:
        """Until trust is lost: show the marks that nothing is missing, and see from them whether something is."""
        while await self._trust.kept_for(LOOK_S, self._clock):
            try:
                # Read first: what was accepted later may not be there yet.
                marks = await self._cache.marks(await self._truth.newest_stamp())
            except SyncEngineError as failed:
                log.debug("the marks of Redis could not be read: %s", failed)
                continue
            if any(mark.run and self._since(mark) is not None for mark in marks):
                self._trust.lose("it, or a part of it, is another server than it was a minute ago")

    async def _note_runs(self) -> None:
        try:
            await self._keep_runs(self._runs)
        except OSError as failed:
            log.warning("the servers of Redis cannot be noted (%s): the next start compares more", failed.strerror)

    def _passing(self, failed: BaseException) -> bool:
        if not isinstance(failed, SyncEngineError):
            return False
        # What an open circuit says is another text each time; why it is open is not.
        cause = str(failed).rpartition("; last: ")[2].removeprefix("l2 is unavailable: ")
        if cause != self._told:
            level = logging.ERROR if isinstance(failed, StoreError) else logging.WARNING
            log.log(level, "Redis is not read: %s", failed)
        self._told, self._trust.trouble = cause, str(failed)
        self._failed = failed.tier if isinstance(failed, (TierUnavailable, StoreError)) else ""
        return True

    async def _wait(self, seconds: float) -> None:
        # Charged to Redis whoever failed, an SQL that is down would have the lane of a Redis that is well wait.
        retries = self._retries.get(self._failed)
        await (self._clock.sleep(seconds) if retries is None else retries.wait(seconds))


def _as_sent(op: Op, expires_at: int | None) -> Op:
    """The change for a cache with an older copy; with ``expires_at`` for one that has none."""
    item = op.item
    if item is None or item.sql_only:
        # Of the very stamp of a delete there may be an item: one that Redis alone keeps, for which its row had to go.
        return Op(kind="delete", object_id=op.object_id, stamp=op.stamp - 1)
    if expires_at is None:
        return op
    return Op(kind="put", object_id=op.object_id, stamp=op.stamp, item=item, redis_expires_at=expires_at)


def _differs(item: SyncItem, copy: SyncItem | None) -> bool:
    return copy is not None and (copy.content_hash, copy.state, copy.version) != (
        item.content_hash,
        item.state,
        item.version,
    )
