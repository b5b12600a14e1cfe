"""The folder of the log: its lock, its segment files, and recovery of what they hold.

Everything here blocks and runs in a thread. What the bytes mean is decided in log_segment.py.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import re
import shutil
import weakref
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from zlib import crc32

from sync_engine.errors import ConfigError, DiskFull, TierUnavailable
from sync_engine.log_record import FRAME_BYTES, HEADER_BYTES, BadRecord, Header, decode_op
from sync_engine.log_reserve import Reserve
from sync_engine.log_segment import Scan, Segment, gaps, scan
from sync_engine.ports import Logged

__all__ = ["NO_SPACE", "Folder", "Recovery", "frame_place", "position", "unavailable", "write_all"]

logger = logging.getLogger(__name__)

NO_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT})
SPARE_BYTES = 4_096
_NAME = re.compile(r"(\d{20})\.seg")
_FLAGS = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC


@dataclass(frozen=True, slots=True)
class Recovery:
    """What was found: unsettled records in order, the numbers to go on from, and every damage."""

    segments: list[Segment]
    records: list[Logged]
    last_seq: int
    last_stamp: int
    damage: list[str]


@dataclass(frozen=True, slots=True)
class _Note:
    """Text of the lock file: who owns the log, and the first and last segment that must exist (0: none yet)."""

    pid: int = 0
    oldest: int = 0
    newest: int = 0


_locked: weakref.WeakSet[Folder] = weakref.WeakSet()


def _let_go() -> None:
    # A lock belongs to all who inherited its file. The parent keeps it, and the child must not keep it any longer.
    for folder in _locked:
        folder.disown()
    _locked.clear()


os.register_at_fork(after_in_child=_let_go)


class Folder:
    """An owned log folder. One ``Folder`` per path at a time, across processes."""

    def __init__(self, path: Path, *, reserve_bytes: int = 0) -> None:
        """Make the folder if need be and lock it. Raises ``ConfigError`` and ``TierUnavailable``."""
        self.path = path
        self.reserve = Reserve(path / "reserve", reserve_bytes)
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            raise ConfigError(f"log {path} is not a folder") from None
        except PermissionError as refused:
            raise ConfigError(f"log {path} cannot be made: {refused.strerror}") from refused
        except OSError as failed:
            raise unavailable(failed) from failed
        self._lock = -1
        self._folder = -1
        self._has_spare = False
        try:
            self._folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            _locked.add(self)  # before there is anything to inherit: a child of a fork in between would keep the lock
            self._lock = os.open(path / "lock", _FLAGS | os.O_CREAT, 0o600)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._found = os.pread(self._lock, 256, 0)
        except BlockingIOError:
            owner = _parse_note(os.pread(self._lock, 256, 0)) or _Note()
            self.close()
            raise ConfigError(f"log {path} is in use by another process (pid {owner.pid or 'unknown'})") from None
        except PermissionError as refused:
            self.close()
            raise ConfigError(f"log {path} cannot be opened: {refused.strerror}") from refused
        except OSError as failed:
            self.close()
            raise unavailable(failed) from failed

    def recover(self) -> Recovery:
        """Read every segment, repair what a crash left half done, and set aside a copy of what is damaged.

        Raises ``TierUnavailable`` when a file cannot be read or written at all.
        """
        try:
            found = self._recover()
        except OSError as failed:
            raise unavailable(failed) from failed
        if not self.reserve.size:
            (self.path / "reserve").unlink(missing_ok=True)  # of an earlier run that had one, and was killed
        if not self.reserve.make(room=self.reserve.size if found.records else 0):
            logger.warning("log %s: the disk is full; nothing is accepted until it has room", self.path)
        return found

    def create(self, header: Header) -> tuple[int, Path]:
        """A new segment, on disk before anything is written to it. Raises ``OSError``.

        It grows out of the spare file, whose block was taken in better times: on a full disk a new
        segment can still begin, and then the old ones be deleted.
        """
        spare, path = self.path / "spare", self.path / f"{header.first_seq:020d}.seg"
        fd = os.open(spare, _FLAGS | os.O_CREAT, 0o600)
        try:
            write_all(fd, header.encode(), 0)
            os.ftruncate(fd, HEADER_BYTES)
            os.fsync(fd)
            os.rename(spare, path)
            os.fsync(self._folder)
        except OSError:
            os.close(fd)
            spare.unlink(missing_ok=True)
            raise
        self._has_spare = False
        self.keep_spare()
        return fd, path

    def note(self, oldest: int, newest: int, *, sync: bool = False) -> None:
        """Write down which segments must exist. Raises ``OSError``."""
        facts = f"{os.getpid()} {oldest} {newest}"
        write_all(self._lock, f"{facts} {crc32(facts.encode()):08x}\n".encode().ljust(80), 0)
        if sync:
            os.fdatasync(self._lock)

    def remove(self, path: Path) -> None:
        """Delete a settled segment, and make sure it stays deleted before a younger one is. Raises ``OSError``."""
        path.unlink(missing_ok=True)
        os.fsync(self._folder)

    def disown(self) -> None:
        """In a forked child: forget the lock, which stays with the parent."""
        lock, self._lock = self._lock, -1
        if lock >= 0:
            with suppress(OSError):
                os.close(lock)

    def close(self) -> None:
        """Give the lock back."""
        held, self._lock, self._folder = (self._lock, self._folder), -1, -1  # first: a fork may come in between
        for fd in held:
            if fd >= 0:
                os.close(fd)

    def keep_spare(self) -> None:
        """See to it that there is a spare file, unless the disk is too full even for that."""
        if self._has_spare:
            return
        try:
            fd = os.open(self.path / "spare", _FLAGS | os.O_CREAT, 0o600)
            try:
                write_all(fd, bytes(SPARE_BYTES), 0)
            finally:
                os.close(fd)
            self._has_spare = True
        except OSError as failed:
            logger.warning("log %s: no spare file: %s", self.path, failed.strerror)

    def _recover(self) -> Recovery:
        damage: list[str] = []
        note = _parse_note(self._found)
        if note is None:
            damage.append("lock: the note is damaged")
            note = _Note()
        names = sorted(name for name in os.listdir(self.path) if _NAME.fullmatch(name))
        firsts = [int(name[:20]) for name in names]
        if note.newest > (firsts[-1] if firsts else 0):
            damage.append(f"{note.newest:020d}.seg is missing, the newest segment")
        if names and note.oldest and note.oldest < firsts[0]:
            damage.append(f"{note.oldest:020d}.seg to {names[0]} are missing, the oldest segments")

        segments: list[Segment] = []
        records: list[Logged] = []
        settled: set[int] = set()
        acked_upto: int | None = None  # the last acknowledged record before the segment read last
        last_seq, last_stamp = max(0, note.newest - 1), 0
        # Youngest first: what is settled is then known before the record it settles is read.
        for name, first_seq in zip(reversed(names), reversed(firsts), strict=True):
            path = self.path / name
            data = _read(path)
            read = scan(data, first_seq)
            damaged = list(read.damage)
            header = read.header
            if header and header.first_seq != first_seq:
                damage.append(f"{name}: begins with record {header.first_seq}, so this is not its name; set aside")
                os.rename(path, _aside(path))
                continue
            for mark in read.settled:
                settled.update(mark)
            found_upto = read.frames[-1].seq if read.frames else first_seq - 1
            own_upto = max(found_upto, header.last_seq if header else 0)
            if acked_upto is None:
                acked_upto = own_upto if header is None else header.last_seq
            damaged += [
                f"records {gap.start} to {gap.stop - 1} are missing" for gap in gaps(read.frames, first_seq, acked_upto)
            ]
            segment = Segment(path, first_seq, bytes=max(read.end, HEADER_BYTES))
            segment.grow(own_upto - first_seq + 1, settled=True)
            mine, stamp = _unsettled(data, read, settled, damaged)
            for record in mine:
                segment.settled[record.seq - first_seq] = 0
            segment.live = len(mine)
            last_stamp = max(last_stamp, stamp, header.last_stamp if header else 0)
            last_seq = max(last_seq, own_upto)
            if damaged:
                damage += [f"{name}: {what}" for what in damaged]
                _copy_aside(path)
            _seal(path, data, read, first_seq, own_upto, stamp, newest=not segments)
            segments.insert(0, segment)
            records += reversed(mine)
            acked_upto = header.previous_seq if header else first_seq - 1
        for what in damage:
            logger.error("log %s: %s", self.path, what)
        records.reverse()
        if segments:
            self.note(segments[0].first_seq, segments[-1].first_seq)
        else:
            self.note(0, 0)
        return Recovery(segments, records, last_seq, last_stamp, damage)


def position(start: int, length: int) -> int:
    """Where a payload lies, in one number: a million of them are kept in memory."""
    return start << 32 | length


def frame_place(place: object) -> tuple[int, int]:
    """Offset of the whole record and length of its payload, from a ``position``."""
    if not isinstance(place, int):
        raise TypeError(f"a position is a number, not a {type(place).__name__}")
    return (place >> 32) - FRAME_BYTES, place & 0xFFFFFFFF


def write_all(fd: int, data: bytes, offset: int) -> None:
    """Write all of it. Raises ``OSError``."""
    view = memoryview(data)
    while view:
        written = os.pwrite(fd, view, offset)
        view, offset = view[written:], offset + written


def unavailable(failed: OSError) -> TierUnavailable:
    """An I/O error in the words of this library."""
    kind = DiskFull if failed.errno in NO_SPACE else TierUnavailable
    return kind("log", failed.strerror or type(failed).__name__)


def _parse_note(text: bytes) -> _Note | None:
    """The note; an empty one where there is none yet, None where it is damaged."""
    if not text:
        return _Note()
    try:
        facts, _, checksum = text.decode("ascii").rstrip().rpartition(" ")
        if int(checksum, 16) != crc32(facts.encode()):
            return None
        return _Note(*map(int, facts.split()))
    except (ValueError, TypeError):
        return None


def _read(path: Path) -> bytes:
    fd = os.open(path, _FLAGS)
    with os.fdopen(fd, "rb") as file:
        return file.read()


def _unsettled(data: bytes, read: Scan, settled: set[int], damaged: list[str]) -> tuple[list[Logged], int]:
    """Unsettled records of a segment, and the greatest stamp among all that were looked at."""
    view = memoryview(data)
    records: list[Logged] = []
    last_stamp = 0
    for found in read.frames:
        open_ = found.seq not in settled
        # Without a header the greatest stamp is known to the records alone, settled ones included.
        if open_ or read.header is None:
            try:
                op = decode_op(view[found.start : found.end])
            except BadRecord as bad:
                damaged.append(f"record {found.seq} cannot be read: {bad}")
                continue
            last_stamp = max(last_stamp, op.stamp)
            if open_:
                records.append(Logged(op, found.seq, position(found.start, found.length)))
    return records, last_stamp


def _seal(path: Path, data: bytes, read: Scan, first_seq: int, last_seq: int, last_stamp: int, *, newest: bool) -> None:
    """Make what was read of a segment final: cut the unacknowledged rest, restate the header, sync.

    Records beyond ``durable_upto`` are about to be replayed, so from now on they have to stay.
    """
    header = read.header or Header(first_seq, first_seq - 1)
    final = header.grown(max(read.end, HEADER_BYTES), last_seq, max(header.last_stamp, last_stamp))
    if final.encode() == data[:HEADER_BYTES] and read.end == len(data) and not newest:
        return
    fd = os.open(path, _FLAGS)
    try:
        if read.end < len(data):
            os.ftruncate(fd, read.end)
        write_all(fd, final.encode(), 0)
        os.fsync(fd)
    finally:
        os.close(fd)


def _copy_aside(path: Path) -> None:
    aside = _aside(path)
    try:
        if not aside.exists():
            shutil.copyfile(path, aside)
            aside.chmod(0o600)
    except OSError as failed:
        logger.warning("log: no copy of the damaged %s could be kept: %s", path, failed.strerror)


def _aside(path: Path) -> Path:
    return path.with_name(path.name + ".damaged")
