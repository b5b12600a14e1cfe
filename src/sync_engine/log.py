"""The write-ahead log: the only keeper of what is not settled.

A folder of segment files, one writer thread, group commit. This module is the side of the event
loop: it numbers what is settled and decides which segments may go. docs/log.md tells the format, the
recovery rules, and why this is not SQLite.
"""

from __future__ import annotations

import asyncio
import logging
import os
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
from pathlib import Path

from sync_engine.errors import NotRunning, StoreError, TierUnavailable
from sync_engine.item import Op
from sync_engine.log_folder import Folder, Recovery, frame_place, unavailable
from sync_engine.log_record import FRAME_BYTES, BadRecord, decode_op, encode_op, read_frame
from sync_engine.log_segment import Segment
from sync_engine.log_writer import Append, Outcome, Unheard, Work, Writer
from sync_engine.owned import outlasting
from sync_engine.ports import Logged
from sync_engine.turns import WAITED_FOR

__all__ = ["WriteAheadLog"]

logger = logging.getLogger(__name__)

SEGMENT_BYTES = 16 * 1024 * 1024
MARKS_AFTER_S = 0.05
"""How long settled marks wait for a group to ride with; a crash before only replays what is in every tier."""


class WriteAheadLog:
    """A journal in a folder. Make it with ``open``; every call belongs to the event loop that opened it."""

    def __init__(self, folder: Folder, found: Recovery, segment_bytes: int) -> None:
        self._reserve = folder.reserve
        self.recovered: list[Logged] = found.records
        """What the last run left unsettled, in order. Clear it once it is taken over: it holds whole items."""
        self.damage: list[str] = found.damage
        """What was found broken at start: file, place and record numbers. Empty is the normal case."""
        self.last_stamp: int = found.last_stamp
        """No operation this log has ever held has a greater stamp."""
        self._path = folder.path
        newest = found.segments[-1].first_seq if found.segments else 0
        if found.segments and not found.segments[-1].settled:
            # It was begun, and has no record yet: the next segment gets its name and replaces it. Were it kept here
            # as well, it would be deleted as settled, and the records of its successor with it.
            found.segments.pop()
        self._segments = found.segments
        self._unsettled = len(found.records)
        self._bytes = sum(segment.bytes for segment in found.segments)
        self._segment_bytes = segment_bytes
        self._loop = asyncio.get_running_loop()
        self._work = Work()
        self._scheduled: asyncio.Handle | None = None
        self._rotating = False
        self._starved = False
        self._cramped = False
        self._closing: asyncio.Future[None] | None = None
        self._awaited = 0  # appends without an answer
        self._writer = Writer(
            folder,
            last_seq=found.last_seq,
            last_stamp=found.last_stamp,
            oldest=self._segments[0].first_seq if self._segments else 0,
            newest=newest,
            segment_bytes=segment_bytes,
            tell=self._hear,
        )
        self._writer.start()
        self._tidy()

    @classmethod
    async def open(cls, path: Path, *, segment_bytes: int = SEGMENT_BYTES, reserve_bytes: int = 0) -> WriteAheadLog:
        """Lock the folder ``path`` (made with mode 0700) and read what is in it.

        ``reserve_bytes`` of its disk are kept free for who needs them to drain it (``relieve_until_settled``).

        Raises ``ConfigError`` if it is no folder, belongs to another process or has a newer format;
        ``TierUnavailable`` if it cannot be read or repaired. Damage is no error: see ``damage``.
        """
        loop = asyncio.get_running_loop()
        opening = loop.run_in_executor(None, _open, path, reserve_bytes)
        try:
            folder, found = await outlasting(opening)
        except asyncio.CancelledError:
            # Given back before the caller goes on, who may want to open it again.
            try:
                await asyncio.wait({opening})
            finally:
                opening.add_done_callback(_give_back)
            raise
        return cls(folder, found, segment_bytes)

    def append(
        self,
        ops: Sequence[Op],
        on_durable: Callable[[Sequence[Logged]], None],
        on_failed: Callable[[Exception], None],
    ) -> None:
        """Queue records for the next group commit; exactly one of the callbacks is called, on the loop.

        Callbacks come in append order. ``on_failed`` gets ``TierUnavailable``: the records will usually
        not come back after a restart, but may. Raises ``NotRunning`` once closed.
        """
        if self._closing is not None:
            raise NotRunning("the log is closed")
        self._work.appends.append(Append(ops, list(map(encode_op, ops)), on_durable, on_failed))
        self._awaited += 1
        WAITED_FOR.add(self._writer)
        # All appends of one tick travel together: a group of 200 instead of one of 1 and one of 199.
        self._schedule(soon=True)

    def settle(self, seqs: Iterable[int], /) -> None:
        """These records are in every tier they asked for, or given up. Saying it twice changes nothing.

        Not synced: after a crash they may be replayed.
        """
        segment: Segment | None = None
        for seq in seqs:
            if segment is None or not segment.holds(seq):
                segment = self._segment_of(seq)
            if segment is not None and segment.settle(seq):
                self._unsettled -= 1
                self._work.settled.append(seq)
        self._tidy()
        if self._work.settled:
            self._schedule()

    async def read(self, records: Sequence[Logged], /) -> list[Op]:
        """Operations of unsettled records, read back from disk, in input order.

        Raises ``StoreError`` for a record that is damaged or gone, ``TierUnavailable`` for a disk that
        does not answer.
        """
        places = []
        for record in records:
            segment = self._segment_of(record.seq)
            if segment is None:
                raise StoreError("log", f"record {record.seq} is settled and gone")
            places.append((segment.path, segment.first_seq, record))
        return await asyncio.to_thread(_read, places)

    def relieve_until_settled(self) -> None:
        """Somebody on this disk, without whom a record is not settled, has no room: give up the reserve.

        Nothing is accepted from then on until it is back, which is tried with whatever else there is to do.
        """
        self._work.relieve = True
        self._schedule(soon=True)

    def relieve_until_drained(self) -> None:
        """The same for a tier, which may need it for what no record waits for as well: until ``drained``."""
        self._cramped = True
        self.relieve_until_settled()

    def drained(self) -> None:
        """What that tier had no room for has passed."""
        if self._cramped:
            self._cramped = False
            self._schedule()

    @property
    def full(self) -> bool:
        """Whether the disk is too full to accept anything. Asking has it looked at again."""
        if self._reserve.held:
            return False
        self._schedule()
        return True

    async def close(self) -> None:
        """Write what was appended, the marks included, and give the folder back. Safe to call twice."""
        if self._closing is None:
            self._hand_over()
            self._writer.stop()
            self._closing = self._loop.run_in_executor(None, self._writer.join)
        await outlasting(self._closing)

    @property
    def unsettled(self) -> int:
        """How many durable records are not settled."""
        return self._unsettled

    @property
    def bytes(self) -> int:
        """Bytes of all segments."""
        return self._bytes

    def __repr__(self) -> str:
        state = "closed" if self._closing is not None else "open"
        return (
            f"<WriteAheadLog {self._path} {state} | {self._unsettled} unsettled, {len(self._segments)} segments, "
            f"{self._bytes} bytes, {len(self.damage)} damages>"
        )

    def _schedule(self, *, soon: bool = False) -> None:
        waiting = self._scheduled
        if soon and isinstance(waiting, asyncio.TimerHandle):
            waiting.cancel()
            waiting = None
        if waiting is None and self._closing is None:
            call = self._hand_over
            self._scheduled = self._loop.call_soon(call) if soon else self._loop.call_later(MARKS_AFTER_S, call)

    def _hand_over(self) -> None:
        if self._scheduled is not None:
            self._scheduled.cancel()
            self._scheduled = None
        work, self._work = self._work, Work()
        work.oldest = self._segments[0].first_seq if self._segments else 0
        work.draining = self._cramped or self._unsettled > 0
        self._writer.submit(work)

    def _hear(self, outcome: Outcome) -> None:
        """Called by the writer thread."""
        try:
            self._loop.call_soon_threadsafe(self._take, outcome)
        except RuntimeError:
            raise Unheard from None

    def _take(self, outcome: Outcome) -> None:
        if outcome.opened is not None:
            self._segments.append(outcome.opened)
            self._bytes += outcome.opened.bytes
        segment = self._segments[-1] if self._segments else None
        if segment is not None:
            count = sum(len(records) for _, records in outcome.committed)
            segment.grow(count)
            segment.grow(outcome.lost_seqs, settled=True)
            size = segment.bytes if outcome.segment_bytes is None else outcome.segment_bytes
            self._bytes += size - segment.bytes
            segment.bytes = size
            self._unsettled += count
        self._rotating = self._rotating and not outcome.rotated
        self._starved = outcome.starved or (self._starved and not outcome.committed)
        for append, records in outcome.committed:
            for record in records:
                if record.op.stamp > self.last_stamp:
                    self.last_stamp = record.op.stamp
            self._call(append.on_durable, records)
        self._awaited -= len(outcome.committed) + len(outcome.failed)
        if not self._awaited:
            WAITED_FOR.discard(self._writer)
        for append in outcome.failed:
            # One of their own for each: an error that several callers raise gathers all their tracebacks.
            reason = outcome.reason or TierUnavailable("log", "")
            self._call(append.on_failed, type(reason)("log", reason.reason))
        if not outcome.rotated or outcome.opened is not None:
            # A new segment that could not be had is asked for again by the next call, not at once and for ever.
            self._tidy()

    def _call(self, callback: Callable[..., None], told: object) -> None:
        try:
            callback(told)
        except Exception as bug:  # noqa: BLE001 - one caller's bug must not keep the next caller from its answer
            self._loop.call_exception_handler({"message": "a callback of the log failed", "exception": bug})

    def _segment_of(self, seq: int) -> Segment | None:
        place = bisect_right(self._segments, seq, key=lambda segment: segment.first_seq) - 1
        return self._segments[place] if place >= 0 and self._segments[place].holds(seq) else None

    def _tidy(self) -> None:
        """Let settled segments go, oldest first, so that no replay puts an old value above a deleted delete."""
        segments = self._segments
        while len(segments) > 1 and not segments[0].live:
            gone = segments.pop(0)
            self._bytes -= gone.bytes
            self._work.doomed.append(gone.path)
        large = self._starved or (segments and segments[-1].bytes > self._segment_bytes // 4)
        if large and segments and not self._unsettled and not self._rotating and len(segments[-1].settled):
            # The segment that is written to holds nothing any more: begin another, so that it can go.
            self._work.rotate = self._rotating = True
        if self._work.doomed or self._work.rotate:
            self._schedule(soon=True)


def _open(path: Path, reserve_bytes: int) -> tuple[Folder, Recovery]:
    folder = Folder(path, reserve_bytes=reserve_bytes)
    try:
        return folder, folder.recover()
    except BaseException:  # failed in any way: the folder's lock must not stay with us
        folder.close()
        raise


def _give_back(opening: asyncio.Future[tuple[Folder, Recovery]]) -> None:
    if not opening.cancelled() and opening.exception() is None:
        opening.result()[0].close()


def _read(places: Sequence[tuple[Path, int, Logged]]) -> list[Op]:
    ops: list[Op] = []
    for (path, first_seq), group in groupby(places, key=lambda place: place[:2]):
        try:
            fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                ops += [_read_one(fd, first_seq, record) for _, _, record in group]
            finally:
                os.close(fd)
        except FileNotFoundError:
            raise StoreError("log", f"{path.name} is settled and gone") from None
        except OSError as failed:
            raise unavailable(failed) from failed
    return ops


def _read_one(fd: int, first_seq: int, record: Logged) -> Op:
    offset, length = frame_place(record.position)
    data = memoryview(os.pread(fd, FRAME_BYTES + length, offset))
    found = read_frame(data, 0, first_seq, base=offset)
    if found is None or found.seq != record.seq or found.length != length:
        raise StoreError("log", f"record {record.seq} is damaged on disk")
    try:
        return decode_op(data[found.start :])
    except BadRecord as bad:
        raise StoreError("log", f"record {record.seq} cannot be read: {bad}") from bad
