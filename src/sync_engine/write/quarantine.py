"""Operations that a tier refused: kept on disk with the reason, out of the way of everything else.

One file per operation, named by its stamp, written whole and synced before the log may forget it.
"""

from __future__ import annotations

import asyncio
import logging
import os
from dataclasses import dataclass
from pathlib import Path

import msgspec

from sync_engine.item import Op, SyncItem
from sync_engine.log_record import decode_op, encode_op

__all__ = ["Quarantine", "Quarantined"]

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Quarantined:
    """One refused operation, which tier refused it, and why."""

    op: Op
    tier: str
    reason: str

    def __repr__(self) -> str:
        return f"<Quarantined {self.op.kind} {self.op.object_id!r} by {self.tier}: {self.reason}>"


class Quarantine:
    """The refused operations of one engine, newest per id."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._held: dict[str, Quarantined] = {}

    async def open(self) -> None:
        """Read what earlier runs left."""
        for refused in await asyncio.to_thread(self._read_all):
            known = self._held.get(refused.op.object_id)
            if known is None or known.op.stamp <= refused.op.stamp:
                self._held[refused.op.object_id] = refused

    async def keep(self, op: Op, tier: str, reason: str) -> None:
        """Store one refused operation; on return it survives a crash."""
        log.error("%s refused %s of %r: %s; it is quarantined", tier, op.kind, op.object_id, reason)
        refused = Quarantined(op, tier, reason)
        # Writing is finished even if the engine is being stopped: the log forgets the record next.
        await asyncio.shield(asyncio.ensure_future(asyncio.to_thread(self._write, refused)))
        self._held[op.object_id] = refused

    async def overtaken(self, object_id: str, stamp: int) -> None:
        """A newer operation on this id is stored: the refused one has no effect any more."""
        held = self._held.get(object_id)
        if held is not None and held.op.stamp < stamp:
            await asyncio.to_thread(self._path(held.op.stamp).unlink, missing_ok=True)
            del self._held[object_id]

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
        folder = os.open(self._folder, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def _read_all(self) -> list[Quarantined]:
        found = []
        for path in sorted(self._folder.glob("*.op")):
            tier, reason, record = msgspec.msgpack.decode(path.read_bytes(), type=tuple[str, str, bytes])
            found.append(Quarantined(decode_op(record), tier, reason))
        return found
