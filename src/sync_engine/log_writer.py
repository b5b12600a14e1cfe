"""The thread that writes the log: group commit, rotation, and what a failing disk leads to.

Everything that waits while one commit runs shares the next one: one write, one ``fdatasync``, one
call back to the event loop. Which records are settled is known to log.py, on the loop; this thread
only writes it down.
"""

from __future__ import annotations

import logging
import os
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty, SimpleQueue

import msgspec

from sync_engine.errors import DiskFull, TierUnavailable
from sync_engine.item import Op
from sync_engine.log_folder import NO_SPACE, Folder, position, unavailable, write_all
from sync_engine.log_record import FRAME_BYTES, HEADER_BYTES, Header, encode_settled, frame
from sync_engine.log_segment import Segment
from sync_engine.ports import Logged
from sync_engine.turns import WAITED_FOR

__all__ = ["Append", "Outcome", "Unheard", "Work", "Writer"]

logger = logging.getLogger(__name__)

GROUP_BYTES_MAX = 4 * 1024 * 1024
"""One write takes no more than this beyond its first append; it bounds the copy that is made of it."""


class Append(msgspec.Struct, eq=False):
    """Operations that become durable together, with whom to tell."""

    ops: Sequence[Op]
    payloads: list[bytes]
    on_durable: Callable[[Sequence[Logged]], None]
    on_failed: Callable[[Exception], None]


@dataclass(slots=True)
class Work:
    """What the loop hands over in one tick. ``oldest`` is the first record of the oldest segment that stays.

    ``draining``: somebody has still to take something, from the log or past it; ``relieve``: he needs the reserve.
    """

    appends: list[Append] = field(default_factory=list)
    settled: list[int] = field(default_factory=list)
    doomed: list[Path] = field(default_factory=list)
    oldest: int = 0
    rotate: bool = False
    draining: bool = False
    relieve: bool = False


@dataclass(slots=True)
class Outcome:
    """What became of it. ``lost_seqs`` are numbers of a group that may or may not be on disk after a failed sync."""

    opened: Segment | None = None
    committed: list[tuple[Append, list[Logged]]] = field(default_factory=list)
    failed: list[Append] = field(default_factory=list)
    reason: TierUnavailable | None = None
    lost_seqs: int = 0
    segment_bytes: int | None = None
    starved: bool = False
    rotated: bool = False


class Unheard(Exception):
    """The event loop is closed, and with it everybody is gone who could be told of an outcome."""


class Writer(threading.Thread):
    """Owns the active segment. ``tell`` is called in this thread with every outcome, in order."""

    def __init__(
        self,
        folder: Folder,
        *,
        last_seq: int,
        last_stamp: int,
        oldest: int,
        newest: int,
        segment_bytes: int,
        tell: Callable[[Outcome], None],
    ) -> None:
        # A daemon, for a program that forgets to close the log must still be able to end; what it was told
        # is durable is on disk by then.
        super().__init__(name=f"sync-engine-log {folder.path}", daemon=True)
        self._folder = folder
        self._last_seq = last_seq
        self._acked_seq = last_seq
        self._last_stamp = last_stamp
        self._oldest = oldest
        self._newest = newest
        self._segment_bytes = segment_bytes
        self._tell = tell
        self._queue: SimpleQueue[Work | None] = SimpleQueue()
        self._waiting: deque[Append] = deque()
        self._settled: list[int] = []
        self._doomed: deque[Path] = deque()
        self._rotate = False
        self._relieve = False
        self._draining = False
        self._trouble = ""  # why groups are not written, as it was logged
        self._stopping = False
        # The active segment: -1 while there is none, which is how a run begins and what a failed sync leaves.
        self._fd = -1
        self._header = Header(last_seq + 1, last_seq)
        self._end = HEADER_BYTES

    def submit(self, work: Work) -> None:
        """Hand over work; never blocks."""
        self._queue.put(work)

    def stop(self) -> None:
        """Finish what was handed over, then end."""
        self._queue.put(None)

    def run(self) -> None:
        try:
            while not self._stopping or self._waiting:
                self._receive()
                if self._relieve:
                    self._give_up_reserve()
                # Room is made first: the group that waits may need it.
                if self._rotate:
                    self._rotate_settled()
                if self._doomed:
                    self._remove_doomed()
                if not self._has_reserve():
                    self._refuse()
                if self._waiting or self._settled:
                    self._commit(self._group())
            self._finish()
        except Unheard:
            logger.warning("log %s: its event loop was closed before it was", self._folder.path)
        finally:
            WAITED_FOR.discard(self)
            if self._fd >= 0:
                os.close(self._fd)
            self._folder.close()

    def _receive(self) -> None:
        """Take over all that was handed over; wait only if there is nothing to do."""
        block = not self._waiting and not self._stopping
        while True:
            try:
                work = self._queue.get(block)
            except Empty:
                return
            block = False
            if work is None:
                self._stopping = True
                continue
            self._waiting.extend(work.appends)
            self._settled += work.settled
            self._doomed.extend(work.doomed)
            self._oldest = max(self._oldest, work.oldest)
            self._rotate |= work.rotate
            self._relieve |= work.relieve
            self._draining = work.draining

    def _group(self) -> list[Append]:
        group: list[Append] = []
        size, limit = 0, min(GROUP_BYTES_MAX, self._segment_bytes)
        while self._waiting and size < limit:
            append = self._waiting.popleft()
            size += sum(map(len, append.payloads))
            group.append(append)
        return group

    def _give_up_reserve(self) -> None:
        self._relieve = False
        if self._folder.reserve.give_up():
            logger.warning(
                "log %s: the disk is full, the reserve of %d bytes is given up; nothing is accepted until it is back",
                self._folder.path,
                self._folder.reserve.size,
            )

    def _has_reserve(self) -> bool:
        """Have it, or get it back: while something is to be drained only with as much beside it, for the drain."""
        reserve = self._folder.reserve
        if reserve.held:
            return True
        if not reserve.make(room=reserve.size if self._draining else 0):
            return False
        logger.warning("log %s: the disk has room again", self._folder.path)
        return True

    def _refuse(self) -> None:
        """What is written now would take from the drain what it was given."""
        group = list(self._waiting)
        self._waiting.clear()
        if group:
            reason = DiskFull("log", "the disk is full")
            self._tell(Outcome(failed=group, reason=reason, starved=True))

    def _commit(self, group: list[Append]) -> None:
        """Write and sync a group, or fail it as a whole."""
        outcome = Outcome()
        had_file = self._fd >= 0
        upto = self._last_seq + sum(len(append.ops) for append in group)
        try:
            if self._fd < 0 or self._end >= self._segment_bytes:
                outcome.opened = self._open()
            parts, last_stamp = self._lay_out(group, outcome.committed)
            self._write(b"".join(parts))
            self._settled.clear()
            if group:
                self._sync(self._header.grown(self._end, upto, last_stamp))
                self._last_seq = self._acked_seq = upto
                self._last_stamp = last_stamp
                if self._trouble:
                    logger.warning("log %s: groups are written again", self._folder.path)
                    self._trouble = ""
        except OSError as failed:
            outcome = self._failed(group, outcome.opened, unavailable(failed))
            outcome.starved = failed.errno in NO_SPACE
        except Exception as bug:
            # No memory for the group, or a bug: its callers must hear of it, not hang.
            logger.exception("log %s: a group was not written", self._folder.path)
            self._abandon()
            outcome = self._failed(group, outcome.opened, TierUnavailable("log", type(bug).__name__))
        if self._fd >= 0:
            outcome.segment_bytes = self._end
        elif outcome.failed and (had_file or outcome.opened):
            # The file was left with the group in an unknown shape: its records may or may not be on disk. Their
            # numbers are spent, and marked settled so that a restart rather forgets them.
            outcome.lost_seqs = upto - self._last_seq
            self._settled.extend(range(self._last_seq + 1, upto + 1))
            self._last_seq = upto
        self._tell(outcome)

    def _failed(self, group: list[Append], opened: Segment | None, reason: TierUnavailable) -> Outcome:
        if reason.reason != self._trouble:  # once: a full disk refuses thousands, and may be that of the logger too
            self._trouble = reason.reason
            logger.error("log %s: a group was not written: %s", self._folder.path, reason.reason)
        return Outcome(opened, failed=group, reason=reason)

    def _lay_out(self, group: list[Append], committed: list[tuple[Append, list[Logged]]]) -> tuple[list[bytes], int]:
        """The bytes of a group, marks first and then its operations in order; and the greatest stamp."""
        first_seq, seq, offset, last_stamp = self._header.first_seq, self._last_seq, self._end, self._last_stamp
        parts: list[bytes] = []
        # A mark about a segment that is gone would say nothing.
        for payload in encode_settled(seq for seq in self._settled if seq >= self._oldest):
            parts += frame(payload, seq, first_seq, offset)
            offset += FRAME_BYTES + len(payload)
        for append in group:
            records = []
            for op, payload in zip(append.ops, append.payloads, strict=True):
                seq += 1
                length = len(payload)
                parts += frame(payload, seq, first_seq, offset)
                offset += FRAME_BYTES
                records.append(Logged(op, seq, position(offset, length)))
                offset += length
                if op.stamp > last_stamp:
                    last_stamp = op.stamp
            committed.append((append, records))
        return parts, last_stamp

    def _write(self, data: bytes) -> None:
        try:
            write_all(self._fd, data, self._end)
        except OSError as failed:
            try:
                os.ftruncate(self._fd, self._end)
            except OSError as uncut:
                logger.warning("log %s: a half written group was not cut off: %s", self._folder.path, uncut.strerror)
                self._abandon()
            if failed.errno not in NO_SPACE:
                # A file that is as large as it may be, or a bad place on the disk: another file may do better.
                self._abandon()
            raise
        self._end += len(data)

    def _sync(self, header: Header) -> None:
        """Make the group durable. The header goes to disk with the records that it vouches for."""
        before = self._header
        try:
            write_all(self._fd, header.encode(), 0)
            os.fdatasync(self._fd)
        except OSError:
            # After a failed fsync the kernel forgets which pages are dirty: another one would succeed and mean
            # nothing. So this file is left for good.
            try:
                write_all(self._fd, before.encode(), 0)
            except OSError as failed:
                logger.warning("log %s: a header was not put back: %s", self._folder.path, failed.strerror)
            self._abandon()
            raise
        self._header = header

    def _open(self) -> Segment:
        header = Header(
            self._last_seq + 1,
            self._acked_seq,
            last_seq=self._last_seq,
            last_stamp=self._last_stamp,
        )
        fd, path = self._folder.create(header)
        self._abandon()
        self._fd, self._header, self._end = fd, header, HEADER_BYTES
        self._newest = header.first_seq
        self._oldest = self._oldest or header.first_seq
        self._note()
        return Segment(path, header.first_seq)

    def _note(self, *, sync: bool = False) -> None:
        try:
            self._folder.note(self._oldest, self._newest, sync=sync)
        except OSError as failed:
            # Worst case is a false alarm about a missing segment; going on matters more.
            logger.warning("log %s: the note was not written: %s", self._folder.path, failed.strerror)

    def _abandon(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = -1

    def _rotate_settled(self) -> None:
        """Begin a new segment, so that the settled one can be deleted."""
        self._rotate = False
        outcome = Outcome(rotated=True, segment_bytes=HEADER_BYTES)
        if self._last_seq >= self._header.first_seq or self._fd < 0:
            try:
                outcome.opened = self._open()
            except OSError as failed:
                logger.warning("log %s: no new segment: %s", self._folder.path, failed.strerror)
                outcome.segment_bytes = None
        self._tell(outcome)

    def _remove_doomed(self) -> None:
        """Delete settled segments, oldest first: a younger delete never goes before the put that it undoes."""
        self._note(sync=True)
        while self._doomed:
            try:
                self._folder.remove(self._doomed[0])
            except OSError as failed:
                logger.warning("log %s: a settled segment was not deleted: %s", self._folder.path, failed.strerror)
                return
            self._doomed.popleft()
        self._folder.keep_spare()

    def _finish(self) -> None:
        """Write the last marks, and sync them: a clean end leaves nothing to replay, and needs no reserve."""
        if not self._draining:
            self._folder.reserve.give_up()
        if self._fd < 0 or self._header.durable_upto == self._end:
            return
        try:
            self._sync(self._header.grown(self._end, self._last_seq, self._last_stamp))
        except OSError as failed:
            logger.warning("log %s: the last marks were not synced: %s", self._folder.path, failed.strerror)
