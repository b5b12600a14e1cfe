"""Room on the log's disk that is given up when others there need it: SQLite to commit, the quarantine to write.

What the log does itself needs none: its settled segments go whole, and the next one begins in a spare block. But SQLite
cannot even delete on a full disk, and then no record is ever settled and no segment goes: full for good. So the log
stops short of the last bytes. Once they are given up it accepts nothing until it has got them back, or new writes
would take what the drain was given.
"""

from __future__ import annotations

import errno
import logging
import os
from pathlib import Path
from typing import Final

__all__ = ["Reserve"]

logger = logging.getLogger(__name__)

MIB: Final = 1024 * 1024
CANNOT: Final = frozenset({errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS})
"""What file systems and C libraries say that cannot allocate."""


class Reserve:
    """A file of allocated blocks that nobody reads. ``size`` 0: there is none, and never was a need."""

    def __init__(self, path: Path, size: int) -> None:
        self._path = path
        self.size = size
        self.held = size == 0

    def make(self, *, room: int = 0) -> bool:
        """Have it, if the disk has room for it and ``room`` bytes more; whether it is there."""
        if self.held:
            return True
        try:
            # Asked before it is tried, so that a full disk is not filled to its last byte at every attempt.
            self.held = self._found() or (_free(self._path.parent) >= self.size + room and self._made(room))
        except OSError as failed:
            logger.warning("log %s: no reserve: %s", self._path.parent, failed.strerror)
        return self.held

    def give_up(self) -> bool:
        """Let others on the disk have it; whether there was something to give."""
        if not self.size or not self.held:
            return False
        try:
            self._path.unlink(missing_ok=True)
        except OSError as failed:
            logger.warning("log %s: the reserve cannot be given up: %s", self._path.parent, failed.strerror)
            return False
        self.held = False
        return True

    def _found(self) -> bool:
        """Whether an earlier run left it: a kill takes no file away. A file without its blocks is not it."""
        try:
            found = self._path.stat(follow_symlinks=False)
        except FileNotFoundError:
            return False
        if found.st_size == self.size and found.st_blocks * 512 >= self.size:
            return True
        self._path.unlink()
        return False

    def _made(self, room: int) -> bool:
        fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            # More than it keeps: a quota tells how much is free in no other way.
            _allocate(fd, self.size + room)
            os.ftruncate(fd, self.size)
        except OSError:
            self._path.unlink(missing_ok=True)
            raise
        finally:
            os.close(fd)
        return True

    def __repr__(self) -> str:
        return f"<Reserve {self.size} bytes, {'held' if self.held else 'given up'}>"


def _allocate(fd: int, size: int) -> None:
    try:
        os.posix_fallocate(fd, 0, size)
    except OSError as failed:
        if failed.errno not in CANNOT:
            raise
        zeros = bytes(MIB)
        for start in range(0, size, MIB):
            os.pwrite(fd, zeros[: size - start], start)


def _free(folder: Path) -> int:
    told = os.statvfs(folder)
    return told.f_bavail * told.f_frsize
