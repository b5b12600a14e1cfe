"""What readers are shown of writes that are not settled, and what is kept from them until the truth has decided."""

from __future__ import annotations

from collections.abc import Sequence, Set
from typing import Protocol

from sync_engine.item import Op, SyncItem
from sync_engine.write.pending import Entry, PendingIndex

__all__ = ["Shown", "View"]


class View(Protocol):
    """What shows writes to readers of this engine."""

    def written(self, op: Op, /) -> None:
        """An operation became visible."""
        ...

    def touch(self, object_id: str, /) -> None:
        """An operation on this id settles now."""
        ...

    def outdone(self, object_id: str, stamp: int, /) -> None:
        """A tier holds a newer write than this stamp."""
        ...

    def found(self, item: SyncItem, /) -> None:
        """A tier has this item in a state that we gave it."""
        ...


class Shown:
    """Puts writes into the pending index and before the readers, and takes them out again."""

    def __init__(self, pending: PendingIndex, view: View) -> None:
        self._pending = pending
        self._view = view
        self._undecided: set[Entry] = set()  # conditional ones that the truth has not decided
        self._sweeps: set[Entry] = set()  # deletes of bulk deletes from when they were stamped until it has

    def stamped(self, entries: Sequence[Entry]) -> None:
        """These have their stamps, and will be shown, or be given up as ``failed``."""
        self._sweeps.update(entry for entry in entries if entry.op.only_in_state is not None)

    def accepted(self, entries: Sequence[Entry]) -> None:
        """Show these, except for what happens only if the truth says so."""
        for entry in entries:
            if entry.conditional:
                self._undecided.add(entry)
            else:
                self.show(entry)

    def failed(self, entries: Sequence[Entry]) -> None:
        """These were not accepted after all."""
        self._sweeps.difference_update(entries)

    def decided(self, entry: Entry) -> None:
        """The truth has answered for this one; ``show`` follows if it has happened."""
        self._undecided.discard(entry)
        self._sweeps.discard(entry)

    def show(self, entry: Entry) -> None:
        """From here on every read reflects it."""
        entry.visible = True
        told = entry.op  # as it is before the index leaves its value to the log
        shown = self._pending.add(entry)
        if shown is entry:
            self._view.written(told if told.kind == "put" else entry.effective())
        elif shown is not None:
            # A change of state was shown before the write it follows: what L1 has of the id is older than both.
            self._view.touch(told.object_id)
            self._view.outdone(told.object_id, shown.op.stamp)

    def found(self, item: SyncItem) -> None:
        """A tier has answered a change of state with this item, which another engine may have written."""
        self._view.found(item)

    def settled(self, entry: Entry) -> None:
        """The tiers answer for it from here on."""
        self._view.touch(entry.op.object_id)
        if entry.visible:
            self._pending.remove(entry)
        if entry.outdone:
            self._view.outdone(entry.op.object_id, entry.op.stamp)

    def gave_up(self, op: Op) -> None:
        """A refused operation is given up: what readers have been shown of it is forgotten."""
        self._view.touch(op.object_id)
        self._view.outdone(op.object_id, op.stamp)

    @property
    def sweeping(self) -> bool:
        """Whether any bulk delete has something for the truth to decide."""
        return bool(self._sweeps)

    def sweeps(self, ids: Set[str]) -> bool:
        """Whether it is about one of these ids."""
        return any(entry.op.object_id in ids for entry in self._sweeps)

    def unseen(self) -> set[str]:
        """Ids of writes that no read shows until the truth has decided."""
        return {entry.op.object_id for entry in self._undecided if entry.op.kind != "delete"}

    def __repr__(self) -> str:
        return f"<Shown {len(self._undecided)} undecided, {len(self._sweeps)} of bulk deletes>"
