"""Operations that a tier refused: kept on disk with the reason, out of the way of everything else.

One file per operation, named by its stamp and its id, written whole and synced before the log may forget it. Of
several refused operations on one id the newest counts, as everywhere.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from sync_engine.clock import COUNTER_BITS, SystemClock
from sync_engine.errors import NotRunning
from sync_engine.item import Op, SyncItem
from sync_engine.log_record import BadRecord, decode_op, encode_op
from sync_engine.owned import Owned
from sync_engine.ports import Cache, Clock, Truth

__all__ = ["Quarantine", "Quarantined", "newest_stamps", "stands", "withdraw"]

log = logging.getLogger(__name__)

R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class Quarantined:
    """One refused operation, which tier refused it, why, and since when (epoch ms)."""

    op: Op
    tier: str
    reason: str
    since_ms: int

    @property
    def nowhere_else(self) -> bool:
        """Whether no tier holds the item: then a later change of its state cannot bring it about."""
        return self.op.kind == "put" and self.tier == ("l3" if self.op.sql else "l2")

    def __repr__(self) -> str:
        return f"<Quarantined {self.op.kind} {self.op.object_id!r} by {self.tier}: {self.reason}>"


class Quarantine:
    """The refused operations of one engine, newest per id."""

    def __init__(self, folder: Path, clock: Clock | None = None) -> None:
        self._folder = folder
        self._clock = clock if clock is not None else SystemClock()
        self._held: dict[str, Quarantined] = {}
        self._turn = asyncio.Lock()  # two lanes, and each change is a step in memory and a step on disk
        self._changes = Owned()
        self._finished = False

    async def open(self) -> None:
        """Read what earlier runs left."""
        self._held = await asyncio.to_thread(self._read_all)

    async def keep(self, op: Op, tier: str, reason: str) -> None:
        """Store one refused operation; on return it survives a crash. It replaces an older one of its id.

        Raises ``OSError`` where the disk does not take it; readers are answered with it all the same.
        """
        log.error("%s refused %s of %r: %s; it is quarantined", tier, op.kind, op.object_id, reason)
        await self._whole(self._keep(op, tier, reason))

    async def again(self, op: Op) -> None:
        """Store what could not be stored when it was kept, unless it has ended meanwhile. Raises ``OSError``."""
        await self._whole(self._again(op))

    async def overtaken(self, object_id: str, stamp: int) -> None:
        """An operation of this stamp is stored: one refused before it has no effect any more.

        Of the very stamp it is the refused one itself, which was sent again. Raises ``OSError``.
        """
        await self._whole(self._overtaken(object_id, stamp))

    async def forget(self, object_id: str, stamp: int) -> Quarantined | None:
        """Give up this very operation, and answer with it; None where it is not here. Raises ``OSError``."""
        return await self._whole(self._forget(object_id, stamp))

    async def finish(self) -> None:
        """Wait for the changes under way; there are no others from then on."""
        self._finished = True
        await self._changes.over()

    def get(self, object_id: str) -> Quarantined | None:
        """The refused operation on this id, if any."""
        return self._held.get(object_id)

    def all(self) -> Sequence[Quarantined]:
        """Every refused operation, in stamp order."""
        return sorted(self._held.values(), key=lambda held: (held.op.stamp, held.op.object_id))

    def item(self, object_id: str) -> SyncItem | None:
        """The refused item, which this engine has acknowledged and therefore still answers with."""
        held = self._held.get(object_id)
        return held.op.item if held is not None else None

    def __len__(self) -> int:
        return len(self._held)

    def __repr__(self) -> str:
        return f"<Quarantine {len(self._held)} operations>"

    async def _whole(self, change: Coroutine[Any, Any, R]) -> R:
        """The change to its end, whoever gives up waiting: its thread would write on, behind what others do then."""
        if self._finished:
            change.close()
            raise NotRunning("the quarantine is closed")
        return await self._changes.whole(change)

    async def _keep(self, op: Op, tier: str, reason: str) -> None:
        async with self._turn:
            older = self._held.get(op.object_id)
            if older is not None and older.op.stamp > op.stamp:
                return  # refused late by another tier: the newer one is what readers are answered with
            again = older is not None and older.op.stamp == op.stamp
            since_ms = older.since_ms if older is not None and again else self._clock.now_ms()
            self._held[op.object_id] = refused = Quarantined(op, tier, reason, since_ms)
            await asyncio.to_thread(self._write, refused)
            if older is not None and older.op.stamp < op.stamp:
                await asyncio.to_thread(self._remove, older)

    async def _again(self, op: Op) -> None:
        async with self._turn:
            held = self._held.get(op.object_id)
            standing = held if held is not None and held.op.stamp == op.stamp else None
            await asyncio.to_thread(self._write_again, op, standing)

    async def _overtaken(self, object_id: str, stamp: int) -> None:
        async with self._turn:
            held = self._held.get(object_id)
            if held is not None and held.op.stamp <= stamp:
                del self._held[object_id]
                await asyncio.to_thread(self._remove, held)

    async def _forget(self, object_id: str, stamp: int) -> Quarantined | None:
        async with self._turn:
            held = self._held.get(object_id)
            if held is None or held.op.stamp != stamp:
                return None
            # The file first: while it is there, the next start would answer with it.
            await asyncio.to_thread(self._remove, held)
            del self._held[object_id]
            return held

    def _path(self, op: Op) -> Path:
        # The deletes of one bulk delete share their stamp. An id may hold what a file system does not take.
        return self._folder / f"{op.stamp:020d}-{hashlib.sha256(op.object_id.encode()).hexdigest()[:16]}.op"

    def _write(self, refused: Quarantined) -> None:
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        text = msgspec.msgpack.encode(_File(refused.tier, refused.reason, encode_op(refused.op), refused.since_ms))
        path = self._path(refused.op)
        draft = path.with_suffix(".new")
        try:
            with draft.open("wb") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
        except OSError:
            draft.unlink(missing_ok=True)  # on a full disk every block counts
            raise
        draft.replace(path)
        self._sync_folder()

    def _write_again(self, op: Op, standing: Quarantined | None) -> None:
        if standing is not None:
            self._write(standing)
        # The file of an older one was left where this one could not be written, or its own where it has ended.
        name = self._path(op).name
        for path in self._folder.glob(f"*{name[20:]}"):
            if path.name < name or (path.name == name and standing is None):
                path.unlink(missing_ok=True)
                self._sync_folder()

    def _remove(self, refused: Quarantined) -> None:
        self._path(refused.op).unlink(missing_ok=True)
        # A file that a power failure brought back would answer reads with an old item.
        self._sync_folder()

    def _sync_folder(self) -> None:
        try:
            folder = os.open(self._folder, os.O_RDONLY)
        except FileNotFoundError:  # somebody has removed it with all that was in it
            return
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def _read_all(self) -> dict[str, Quarantined]:
        newest: dict[str, Quarantined] = {}
        for path in sorted(self._folder.glob("*.op")):  # by stamp ascending
            try:
                told = _decode_file(path.read_bytes())
                op = decode_op(told.record)
            except (msgspec.DecodeError, BadRecord) as damaged:
                log.error("%s cannot be read: %s", path, damaged)  # noqa: TRY400 - the place in the decoder says nothing
                continue
            if path != self._path(op):
                path.replace(self._path(op))  # named by its stamp alone, as it was at first
            if (older := newest.get(op.object_id)) is not None:
                self._remove(older)  # a crash came between the newer file and this removal
            since_ms = told.since_ms or op.stamp >> COUNTER_BITS
            newest[op.object_id] = Quarantined(op, told.tier, told.reason, since_ms)
        return newest


async def newest_stamps(ops: Sequence[Op], truth: Truth | None, cache: Cache | None) -> dict[str, int]:
    """Of each id the newest stamp that a tier knows, deletes included. Raises ``TierUnavailable``."""
    ids = [op.object_id for op in ops]
    cached = [op.object_id for op in ops if not op.sql]
    known: list[dict[str, int]] = []
    if truth is not None and ids:
        known += [await truth.held_stamps(ids), await truth.buried_stamps(ids)]
    if cache is not None and cached:
        known.append(await cache.held_stamps(cached))
    return {object_id: max(stamps.get(object_id, 0) for stamps in known) for object_id in ids if known}


async def stands(op: Op, truth: Truth | None, cache: Cache | None) -> bool:
    """Whether no tier knows anything newer of its id. Raises ``TierUnavailable`` where that cannot be asked."""
    return (await newest_stamps([op], truth, cache)).get(op.object_id, 0) <= op.stamp


async def withdraw(cache: Cache, op: Op) -> None:
    """Take out the older copy of what a cache refused: the truth holds the newer one, and others read the cache first.

    Raises ``SyncEngineError`` where the cache cannot be asked.
    """
    held = (await cache.held_stamps([op.object_id])).get(op.object_id)
    if held is not None and held < op.stamp:
        await cache.evict([(op.object_id, held)])


class _File(msgspec.Struct, array_like=True):
    """What a file holds; the moment is missing in the oldest ones."""

    tier: str
    reason: str
    record: bytes
    since_ms: int = 0


_decode_file = msgspec.msgpack.Decoder(_File).decode
