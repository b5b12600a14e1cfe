"""Carries batches of entries into one tier: plan (pure), apply (one call), report.

One lane per tier, each with its own queue and its own pace, so that a slow Redis does not hold up SQL
and the other way round. Within a lane batches go one after the other: two flushes never write one id
at once, and for one id the highest stamp decides.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from sync_engine.errors import DiskFull, StoreError, TierUnavailable
from sync_engine.item import Op
from sync_engine.ports import Applied, Tier, together
from sync_engine.resilience import Retries, RetryPolicy, retrying
from sync_engine.turns import give_way
from sync_engine.write.batcher import Batcher
from sync_engine.write.pending import Entry

__all__ = ["Carrier", "Lane", "Plan", "plan_flush"]

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Plan:
    """What one tier is to do: ``ops`` ascending by id, at most one per id, and ``erase``: ids it no longer keeps.

    ``decides`` names the entry that speaks for each id, ``spoken`` what it says; the batch's other entries
    are older, and their ids are ``outvoted``.
    """

    ops: list[Op]
    erase: list[Op]
    decides: dict[str, Entry]
    spoken: dict[str, Op]
    outvoted: set[str]


def plan_flush(batch: Sequence[Entry], keeps: Callable[[Op], bool]) -> Plan:
    """Reduce a batch to the newest operation per id, in id order so that two writers lock rows alike."""
    decides: dict[str, Entry] = {}
    outvoted: set[str] = set()
    for entry in batch:
        held = decides.get(entry.op.object_id)
        if held is None or entry.op.stamp >= held.op.stamp:
            decides[entry.op.object_id] = entry
        if held is not None:
            outvoted.add(entry.op.object_id)
    ops: list[Op] = []
    erase: list[Op] = []
    spoken = {object_id: decides[object_id].spoken() for object_id in sorted(decides)}
    for object_id, op in spoken.items():
        if decides[object_id].barred:
            continue
        if op.kind != "delete" and not keeps(op):
            erase.append(Op(kind="delete", object_id=object_id, stamp=op.stamp))
        else:
            ops.append(op)
    return Plan(ops, erase, decides, spoken, outvoted)


def in_turn(batch: Sequence[Entry]) -> tuple[Sequence[Entry], list[Entry]]:
    """What goes now, and the changes of state that follow a write of this batch: a tier is given one thing per id."""
    if all(entry.op.kind != "restate" for entry in batch):
        return batch, []
    written: dict[str, int] = {}
    for entry in batch:
        op = entry.op
        if op.kind != "restate":
            written[op.object_id] = max(op.stamp, written.get(op.object_id, 0))
    now: list[Entry] = []
    later: list[Entry] = []
    for entry in batch:
        op = entry.op
        follows = op.kind == "restate" and op.stamp > written.get(op.object_id, op.stamp)
        (later if follows else now).append(entry)
    return now, later


class Carrier(Protocol):
    """Who owns the entries that a lane flushes."""

    async def load(self, batch: Sequence[Entry], /) -> None:
        """Bring the values of these entries into memory."""
        ...

    async def passed(self, lane: Lane, batch: Sequence[Entry], plan: Plan, applied: Applied, /) -> None:
        """Move every entry on: to the next tier, into the quarantine, or out. The plan may be of more than these.

        After ``passed_at_once`` of them others have their turn.
        """
        ...

    def cramped(self) -> None:
        """A tier has no room on its disk to take anything."""
        ...

    def drained(self, lane: Lane, /) -> None:
        """What waited for this lane's tier when it was last cramped has passed."""
        ...


class Lane:
    """The only writer of one tier.

    ``keeps`` says whether the tier keeps what an operation puts; what it does not keep it loses. Where
    ``erases_blindly`` is False the tier is asked first whether there is anything to lose.
    """

    def __init__(
        self,
        tier: Tier,
        batcher: Batcher,
        carrier: Carrier,
        keeps: Callable[[Op], bool],
        *,
        erases_blindly: bool,
        retry: RetryPolicy,
        retries: Retries,
    ) -> None:
        self.tier = tier
        self.batcher = batcher
        self.retries = retries
        self._carrier = carrier
        self._keeps = keeps
        self._erases_blindly = erases_blindly
        self._retry = retry
        self._cramped_until: int | None = None  # so many have to pass, since the tier had no room
        self.passed_at_once = 8
        """Entries that are moved on before the event loop has a turn: some 50 µs, in which nobody else has."""
        self.trouble: str | None = None
        """Why the batch at hand is being retried; None while all is well."""

    async def run(self) -> None:
        """Flush batch after batch until cancelled."""
        while True:
            left: Sequence[Entry] = await self.batcher.take()
            count = len(left)
            while left:
                batch, left = in_turn(left)
                plan, applied = await self._flush(batch)
                # What was left out in favour of an operation that is refused gets its own turn.
                spared = [
                    entry
                    for entry in batch
                    if self._is_left_out(entry, plan, applied) or self._follows_newer(entry, plan, applied)
                ]
                if spared:
                    batch = [entry for entry in batch if entry not in spared]
                await self._carrier.passed(self, batch, plan, applied)
                left = [*spared, *left]
            self.batcher.done(count)
            # Not after the next batch: what waited behind it may need as much room on the tier's disk. Nor when
            # nothing waits any more: under writes that never cease that would be never.
            if self._cramped_until is not None and self.batcher.done_ever >= self._cramped_until:
                self._cramped_until = None
                self._carrier.drained(self)

    def _is_left_out(self, entry: Entry, plan: Plan, applied: Applied) -> bool:
        object_id = entry.op.object_id
        newer = plan.decides[object_id]
        if newer is entry or object_id not in applied.refused:
            return False
        # Of two changes of state of a put that was refused, the older one has nothing to say any more.
        return plan.spoken[object_id] is newer.op

    def _follows_newer(self, entry: Entry, plan: Plan, applied: Applied) -> bool:
        """Whether it spoke for a put that was refused, and a newer one stands: that gets the state."""
        object_id = entry.op.object_id
        base = entry.base
        if plan.decides[object_id] is not entry or object_id not in applied.superseded:
            return False
        if base is None or plan.spoken[object_id] is entry.op:
            return False
        base.outdone = True
        return True

    async def _flush(self, batch: Sequence[Entry]) -> tuple[Plan, Applied]:
        """Apply one batch, as often as it takes: applying it again changes nothing."""
        answer: tuple[Plan, Applied] = await retrying(self._retry, self.retries.wait, on=self._unavailable)(
            self._attempt, batch
        )
        if self.trouble is not None:
            log.warning("%s answers again", self.tier.name)
            self.trouble = None
        return answer

    async def _attempt(self, batch: Sequence[Entry]) -> tuple[Plan, Applied]:
        large = len(batch) > self.passed_at_once  # what is stored singly waits for no turn of others
        if large:
            await give_way()
        await self._carrier.load(batch)
        plan = plan_flush(batch, self._keeps)
        if large:
            await give_way()
        return plan, await self._apply(plan)

    async def _apply(self, plan: Plan) -> Applied:
        erase = plan.erase
        if erase and not self._erases_blindly:
            # A cache-only item rarely has a row; asking is a read, a delete is a write with a tombstone. That one is
            # needed where an older write was left out for this one: a crash may replay it from the log.
            held = await self.tier.exists_batch([op.object_id for op in erase])
            erase = [op for op, there in zip(erase, held, strict=True) if there or op.object_id in plan.outvoted]
        ops = sorted(plan.ops + erase, key=lambda op: op.object_id) if erase else plan.ops
        if not ops:
            return Applied()
        applied = await self._isolating(ops)
        self.retries.answered()  # once, as a failure of the whole batch is one: halves do not earn more
        return applied

    async def _isolating(self, ops: Sequence[Op]) -> Applied:
        """Apply; where the tier refuses a batch as a whole, halve it until the refused operation is alone.

        Where its disk has no room for the batch, it may have for half of it, and for the other half after that.
        """
        try:
            return await self.tier.apply(ops)
        except DiskFull:
            # Not one whose answers depend on what is there: sent again, its first half would meet itself.
            if len(ops) == 1 or any(op.if_version is not None or op.only_in_state is not None for op in ops):
                raise
            self._cramped()
        except StoreError as refused:
            if len(ops) == 1:
                return Applied(refused={ops[0].object_id: refused})
        half = len(ops) // 2
        return together([await self._isolating(ops[:half]), await self._isolating(ops[half:])])

    async def current(self) -> None:
        """Wait until the tier has everything accepted before this call; raises if the tier is in trouble."""
        if self.trouble is not None:
            raise TierUnavailable(self.tier.name, self.trouble)
        await self.batcher.drained(patient=False)

    def _unavailable(self, exc: BaseException) -> bool:
        if not isinstance(exc, TierUnavailable):
            return False
        if isinstance(exc, DiskFull):
            self._cramped()
        if self.trouble is None:
            log.warning("%s; its %d operations wait", exc, len(self.batcher))
        self.trouble = exc.reason
        self.batcher.fail(exc)
        return True

    def _cramped(self) -> None:
        self._cramped_until = self.batcher.put_ever
        self._carrier.cramped()

    def __repr__(self) -> str:
        return f"<Lane {self.tier.name} {len(self.batcher)} waiting{', ' + self.trouble if self.trouble else ''}>"
