"""Files refused operations in the quarantine, and takes out what has ended; what cannot be filed stays in the log."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable

from sync_engine.errors import StoreError
from sync_engine.item import Op
from sync_engine.ports import Journal, Logged
from sync_engine.write.pending import Entry
from sync_engine.write.quarantine import Quarantine

__all__ = ["Filing"]

log = logging.getLogger(__name__)


class Filing:
    """Keeps the files of the quarantine and the log in step: one of them has every refused operation."""

    def __init__(self, quarantine: Quarantine, journal: Journal | None) -> None:
        self._quarantine = quarantine
        self._journal = journal
        self._unfiled: list[tuple[Op, Logged]] = []  # refused, and the quarantine could not be written
        self._asked = asyncio.Event()

    async def refused(self, entry: Entry, tier: str, reason: str) -> None:
        """File this operation, for later if it must be."""
        op, logged = entry.spoken(), entry.logged
        if not await self._done(entry, self._quarantine.keep(op, tier, reason)) and logged:
            self._unfiled.append((op, logged))
            self._relieve()

    def followed(self, restate: Op) -> Entry | None:
        """The refused put that a restate follows, if it is on file and in no tier; None where there is none."""
        refused = self._quarantine.get(restate.object_id)
        if refused is None or not refused.nowhere_else or refused.op.stamp >= restate.stamp:
            return None
        return Entry(refused.op, settled=True, error=StoreError(refused.tier, refused.reason))

    async def answered(self, entry: Entry) -> None:
        """The truth has said that it does not happen: if it is on file, it leaves."""
        await self._done(entry, self._quarantine.forget(entry.op.object_id, entry.op.stamp))

    def ends_with(self, entry: Entry) -> bool:
        """Whether something refused is on file that the entry, now stored, may have overtaken."""
        refused = self._quarantine.get(entry.op.object_id)
        # A change of the state of what no tier holds has changed nothing.
        return refused is not None and not (entry.op.kind == "restate" and refused.nowhere_else)

    async def stored(self, entry: Entry) -> None:
        """Take out what was refused before this entry, which is stored."""
        logged = entry.logged
        if not await self._done(entry, self._quarantine.overtaken(entry.op.object_id, entry.op.stamp)) and logged:
            self._unfiled.append((entry.op, logged))  # the older one's file is still there

    async def again(self) -> None:
        """Write what the quarantine could not, and let the log go of it.

        A record that is never settled holds its segment, and with it every later one: the log would only grow.
        """
        while self._unfiled:
            assert self._journal is not None, "what no log holds is not kept by it either"
            op, logged = self._unfiled[0]
            try:
                await self._quarantine.again(op)
            except OSError:
                self._relieve()
                return
            if (op, logged) in self._unfiled:  # the other lane may have been here meanwhile
                self._unfiled.remove((op, logged))
                self._journal.settle([logged.seq])

    def soon(self) -> None:
        """``again``, by ``run``: whose writes are refused come in crowds, do not wait for it, and may give up."""
        self._asked.set()

    async def run(self) -> None:
        """``again`` whenever it was asked for, until cancelled."""
        while True:
            await self._asked.wait()
            self._asked.clear()
            await self.again()

    def _relieve(self) -> None:
        """The disk has no room; it may be the log's, which has some left for whoever lets it settle."""
        if self._journal is not None:
            self._journal.relieve_until_settled()

    async def _done(self, entry: Entry, change: Awaitable[object]) -> bool:
        try:
            await change
        except OSError as failed:
            log.error("the quarantine cannot be written (%s): the log keeps the operation", failed.strerror)  # noqa: TRY400 - the place in the code says nothing
            entry.logged = None
            return False
        return True

    def __repr__(self) -> str:
        return f"<Filing {len(self._unfiled)} not on file>"
