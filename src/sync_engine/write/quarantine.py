"""Operations that a tier refused: kept on disk with the reason, out of the way of everything else.

One file per operation, named by its stamp, written whole and synced before the log may forget it. Of several
refused operations on one id the newest counts, as everywhere.
"""

from __future__ import annotations

import asyncio
import logging
import os
from dataclasses import dataclass
from pathlib import Path

import msgspec

from sync_engine.item import Op, SyncItem
from sync_engine.log_record import BadRecord, decode_op, encode_op

__all__ = ["Quarantine", "Quarantined"]

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Quarantined:
    """One refused operation, which tier refused it, and why."""

    op: Op
    tier: str
    reason: str

    @property
    def nowhere_else(self) -> bool:
        """Whether no tier holds the item: then a later change of its state cannot bring it about."""
        return self.op.kind == "put" and self.tier == ("l3" if self.op.sql else "l2")

    def __repr__(self) -> str:
        return f"<Quarantined {self.op.kind} {self.op.object_id!r} by {self.tier}: {self.reason}>"


class Quarantine:
    """The refused operations of one engine, newest per id."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._held: dict[str, Quarantined] = {}
        self._turn = asyncio.Lock()  # two lanes, and each change is a step in memory and a step on disk

    async def open(self) -> None:
        """Read what earlier runs left."""
        self._held = await asyncio.to_thread(self._read_all)

    async def keep(self, op: Op, tier: str, reason: str) -> None:
        """Store one refused operation; on return it survives a crash. It replaces an older one of its id.

        Raises ``OSError`` where the disk does not take it; readers are answered with it all the same.
        """
        log.error("%s refused %s of %r: %s; it is quarantined", tier, op.kind, op.object_id, reason)
        async with self._turn:
            older = self._held.get(op.object_id)
            if older is not None and older.op.stamp > op.stamp:
                return  # refused late by another tier: the newer one is what readers are answered with
            self._held[op.object_id] = refused = Quarantined(op, tier, reason)
            # Writing is finished even if the engine is being stopped: the log forgets the record next.
            await asyncio.shield(asyncio.ensure_future(asyncio.to_thread(self._write, refused)))
            if older is not None and older.op.stamp < op.stamp:
                await asyncio.to_thread(self._remove, older)

    async def overtaken(self, object_id: str, stamp: int) -> None:
        """A newer operation on this id is stored: the refused one has no effect any more."""
        async with self._turn:
            held = self._held.get(object_id)
            if held is not None and held.op.stamp < stamp:
                del self._held[object_id]
                await asyncio.to_thread(self._remove, held)

    def get(self, object_id: str) -> Quarantined | None:
        """The refused operation on this id, if any."""
        return self._held.get(object_id)

    def item(self, object_id: str) -> SyncItem | None:
        """The refused item, which this engine has acknowledged and therefore still answers with."""
        held = self._held.get(object_id)
        return held.op.item if held is not None else None

    def __len__(self) -> int:
        return len(self._held)

    def __repr__(self) -> str:
        return f"<Quarantine {len(self._held)} operations>"

    def _path(self, stamp: int) -> Path:
        return self._folder / f"{stamp:020d}.op"

    def _write(self, refused: Quarantined) -> None:
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        text = msgspec.msgpack.encode((refused.tier, refused.reason, encode_op(refused.op)))
        path = self._path(refused.op.stamp)
        draft = path.with_suffix(".new")
        with draft.open("wb") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
        self._sync_folder()

    def _remove(self, refused: Quarantined) -> None:
        self._path(refused.op.stamp).unlink(missing_ok=True)
        # A file that a power failure brought back would answer reads with an old item.
        self._sync_folder()

    def _sync_folder(self) -> None:
        folder = os.open(self._folder, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def _read_all(self) -> dict[str, Quarantined]:
        newest: dict[str, Quarantined] = {}
        for path in sorted(self._folder.glob("*.op")):  # by stamp ascending
            try:
                tier, reason, record = msgspec.msgpack.decode(path.read_bytes(), type=tuple[str, str, bytes])
                op = decode_op(record)
            except (msgspec.DecodeError, BadRecord) as damaged:
                log.error("%s cannot be read: %s", path, damaged)  # noqa: TRY400 - the place in the decoder says nothing
                continue
            if (older := newest.get(op.object_id)) is not None:
                self._remove(older)  # a crash came between the newer file and this removal
            newest[op.object_id] = Quarantined(op, tier, reason)
        return newest
