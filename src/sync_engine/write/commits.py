"""Appends to the log and what becomes of them when it answers, in the order in which they were made.

What has to be in the log goes to the tiers when it is there, and is shown then, or at once where nobody was promised
more than memory. What no log holds goes to the tiers behind what was stamped before it.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from functools import partial

import msgspec

from sync_engine.errors import StoreError, SyncEngineError
from sync_engine.item import Op
from sync_engine.ports import Journal, Logged
from sync_engine.pressure import Gate
from sync_engine.write.pending import Entry, PendingIndex
from sync_engine.write.route import Route
from sync_engine.write.shown import Shown

__all__ = ["Commits"]


class Commits:
    """What the log was given and has not answered for."""

    def __init__(
        self, journal: Journal | None, *, gate: Gate, pending: PendingIndex, shown: Shown, route: Route
    ) -> None:
        self._journal = journal
        self._gate = gate
        self._pending = pending
        self._shown = shown
        self._route = route
        self._begun = 0  # appends, which are answered in order
        self._answered = 0
        self._answers: deque[tuple[int, asyncio.Future[None]]] = deque()
        self._open: deque[_Commit] = deque()  # those that are not answered
        self._behind: deque[tuple[int, Sequence[Entry]]] = deque()  # unlogged, shown, waiting for those
        self._doubtful: set[str] = set()  # ids of refused writes that the log may hold all the same

    def holds(self, op: Op) -> bool:
        """Whether there is a log, and the operation is one that it keeps."""
        return self._journal is not None and op.sql

    def append(self, entries: Sequence[Entry], *, in_memory: bool) -> asyncio.Future[None] | None:
        """Log these. The future ends when they are durable and shown; None where they are shown ``in_memory`` already.

        It raises ``TierUnavailable("log")`` or ``StoreError``. Who gives up waiting for it changes nothing.
        """
        assert self._journal is not None, "asked before with ``holds``"
        # A change of state tells of what is before it, and is not shown before that is.
        follows = entries[0].op.kind == "restate" and not all(commit.at_once for commit in self._open)
        commit = _Commit(entries, in_memory and not follows, asyncio.get_running_loop().create_future())
        self._journal.append(
            [entry.op for entry in entries], partial(self._durable, commit), partial(self._failed, commit)
        )
        self._begun += 1
        self._open.append(commit)
        if not commit.at_once:
            return commit.done
        self._shown.accepted(entries)
        return None

    def bypass(self, entries: Sequence[Entry]) -> None:
        """Show these, which no log holds; the tiers get them now or behind what was stamped before."""
        self._shown.accepted(entries)
        if self._open:
            # What the log is still writing was stamped before, and must not reach a tier after.
            self._behind.append((self._begun, entries))
        else:
            self._route.send(entries)

    async def answered(self) -> None:
        """Wait until the log has answered for everything given to it before this call."""
        if self._answered < self._begun:
            waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._answers.append((self._begun, waiter))
            await waiter

    def unseen(self) -> set[str]:
        """Ids of writes that no read shows before the log has answered, or that it may hold although it failed."""
        return self._doubtful | {
            entry.op.object_id
            for commit in self._open
            if not commit.at_once
            for entry in commit.entries
            if entry.op.kind != "delete"
        }

    def _durable(self, commit: _Commit, records: Sequence[Logged]) -> None:
        """Called on the loop, in append order: what is durable becomes visible even if its caller is gone."""
        self._doubtful.clear()  # with these records the log has noted which ones it refused
        for entry, record in zip(commit.entries, records, strict=True):
            entry.logged = record
            if entry.volatile_bytes:
                self._gate.leave(0, entry.volatile_bytes)
                entry.volatile_bytes = 0
                if entry.visible:
                    self._pending.trim(entry)
        if not commit.at_once:
            self._shown.accepted(commit.entries)
        # Not before: were it in one tier and killed before the next, no log would say that they differ.
        self._route.send(commit.entries)
        self._answer()
        if not commit.done.done():
            commit.done.set_result(None)

    def _failed(self, commit: _Commit, error: Exception) -> None:
        """Called on the loop: nothing of this append counts as logged."""
        if commit.at_once:
            self._route.send(commit.entries)  # accepted in memory; MEMORY promised no more
            self._answer()
            return
        self._answer()
        self._shown.failed(commit.entries)
        self._gate.leave(len(commit.entries), sum(entry.volatile_bytes for entry in commit.entries))
        self._doubtful.update(entry.op.object_id for entry in commit.entries if entry.op.kind != "delete")
        if not commit.done.done():
            commit.done.set_exception(
                error if isinstance(error, SyncEngineError) else StoreError("log", f"{type(error).__name__}: {error}")
            )

    def _answer(self) -> None:
        self._answered += 1
        self._open.popleft()
        while self._behind and self._behind[0][0] <= self._answered:
            self._route.send(self._behind.popleft()[1])
        while self._answers and self._answers[0][0] <= self._answered:
            waiter = self._answers.popleft()[1]
            if not waiter.done():
                waiter.set_result(None)

    def __repr__(self) -> str:
        return f"<Commits {len(self._open)} not answered, {len(self._behind)} behind them>"


class _Commit(msgspec.Struct, frozen=True, eq=False):
    """One append; ``at_once``: it was shown before the log answered."""

    entries: Sequence[Entry]
    at_once: bool
    done: asyncio.Future[None]
