"""A process of its own that writes down acknowledgements, so that they outlive a ``kill -9`` of whoever got them.

The process under test writes a line into a pipe after each acknowledgement; what is in the pipe no longer depends
on it. The journal's process appends to a file and syncs. Afterwards the file says what must be found in the tiers:

    with AckJournal.start(path) as journal:
        child = subprocess.Popen([..., str(journal.fd)], pass_fds=[journal.fd])   # AckWriter(int(sys.argv[-1]))
        ...
        child.kill(); child.wait()
    acknowledged = read_acks(path)                                               # everything is on disk here

Standard library only: the journal must not depend on what it watches.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType

__all__ = ["AckJournal", "AckWriter", "read_acks"]

READ_BYTES_MAX = 1024 * 1024
ENDS_WITHIN_S = 60.0
"""From the last writer's end until everything read is synced; the pipe holds at most 64 KiB then."""


class AckWriter:
    """The writing end of a journal's pipe, in whichever process has the descriptor. Any number may write."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def write(self, ack: Mapping[str, object]) -> None:
        """Hand one acknowledgement over: JSON values, by custom ``op``, ``id``, ``hash``, ``version``, ``stamp``.

        When this returns, a ``kill -9`` of the caller no longer loses the line. Blocks while the pipe is full.
        Raises ``ValueError`` for a line over PIPE_BUF (4 KiB), ``BrokenPipeError`` when the journal is gone.
        """
        self.write_many((ack,))

    def write_many(self, acks: Iterable[Mapping[str, object]]) -> None:
        """The same for several, in order, with fewer system calls."""
        waiting = bytearray()
        for ack in acks:
            line = json.dumps(ack, separators=(",", ":")).encode("ascii") + b"\n"
            if len(line) > select.PIPE_BUF:
                raise ValueError(f"a line of {len(line)} bytes; more than {select.PIPE_BUF} would not be atomic")
            if len(waiting) + len(line) > select.PIPE_BUF:
                os.write(self._fd, waiting)
                waiting.clear()
            waiting += line
        if waiting:
            os.write(self._fd, waiting)  # Up to PIPE_BUF a write to a pipe is whole or not at all (POSIX).


class AckJournal(AckWriter):
    """A running journal process. ``fd`` is what children inherit; the parent may ``write`` as well."""

    def __init__(self, process: subprocess.Popen[bytes], fd: int, path: Path) -> None:
        super().__init__(fd)
        self._process = process
        self.path = path

    @classmethod
    def start(cls, path: str | os.PathLike[str]) -> AckJournal:
        """Start a journal that appends to ``path``; it ends when the last holder of the pipe's end has ended."""
        read_fd, write_fd = os.pipe()
        try:
            # The file, not `-m`: the package under test need not be importable for its journal to work. A session of
            # its own: a signal to the process group under test, or Ctrl-C, does not reach it.
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", __file__, os.fspath(path)], stdin=read_fd, start_new_session=True
            )
        except BaseException:  # failed in any way: the pipe has no owner yet
            os.close(write_fd)
            raise
        finally:
            os.close(read_fd)
        return cls(process, write_fd, Path(path))

    @property
    def fd(self) -> int:
        """Descriptor of the writing end, for ``pass_fds`` and ``AckWriter``."""
        return self._fd

    @property
    def pid(self) -> int:
        """Process id of the journal."""
        return self._process.pid

    def stop(self) -> None:
        """Close our end and wait until everything is on disk; processes that inherited the end must have ended.

        Raises ``TimeoutError`` when one has not, ``RuntimeError`` when the journal failed.
        """
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        try:
            status = self._process.wait(ENDS_WITHIN_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            raise TimeoutError(f"after {ENDS_WITHIN_S:g} s some process still holds the journal's pipe") from None
        if status != 0:
            raise RuntimeError(f"the acknowledgement journal ended with status {status}; its record is incomplete")

    def __enter__(self) -> AckJournal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def read_acks(path: str | os.PathLike[str]) -> list[dict[str, object]]:
    """Every acknowledgement in the file, in the order of arrival; none where there is no file.

    A last line without its end was never complete and is left out. Any other unreadable line is a ``ValueError``.
    """
    try:
        *lines, _torn = Path(path).read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in lines]


def _keep(source_fd: int, path: str) -> None:
    """Append whole lines from the pipe to the file, one sync per read, until the last writer has gone."""
    file_fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
    _drop_torn_line(file_fd)
    begun = b""
    while chunk := os.read(source_fd, READ_BYTES_MAX):
        whole, end, begun = (begun + chunk).rpartition(b"\n")
        if end:
            left = memoryview(whole + end)
            while left:
                left = left[os.write(file_fd, left) :]
            os.fdatasync(file_fd)


def _drop_torn_line(file_fd: int) -> None:
    with open(file_fd, "rb", closefd=False) as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        whole = sum(len(line) for line in file if line.endswith(b"\n"))
    if whole < size:
        os.ftruncate(file_fd, whole)


if __name__ == "__main__":
    _keep(sys.stdin.fileno(), sys.argv[1])
