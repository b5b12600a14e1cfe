"""A child process that ends with its parent, and the lock that says a folder is in use by one.

Used for the embedded server. A child lives as long as this process at most: the kernel sees to it on Linux, an
exit handler elsewhere (and there a ``kill -9`` of the parent leaves an orphan).
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path

from sync_engine.errors import ConfigError

__all__ = ["Child", "locked"]

# Runs between fork and exec in place of Popen's preexec_fn, which may deadlock in a process with threads.
# PR_SET_PDEATHSIG (1) survives the exec; a parent that died before the call is noticed by the second check.
_TIED_TO_PARENT = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)
if os.getppid() != int(sys.argv[1]):
    sys.exit("the parent is gone")
os.execv(sys.argv[2], sys.argv[2:])
"""


class Child:
    """A running process and the thread that started it, waits for it and so reaps it.

    The thread is not a convenience: the kernel sends the death signal when the *thread* that forked ends, so a
    child started by an event loop in a short-lived thread would die with that thread.
    """

    def __init__(self, argv: Sequence[str], folder: Path, out_fd: int, kept_fds: Sequence[int] = ()) -> None:
        """Start ``argv`` in ``folder``, output to ``out_fd``, ``kept_fds`` inherited. ``OSError`` if it cannot."""
        begun: Future[subprocess.Popen[bytes]] = Future()
        self._thread = threading.Thread(
            target=_live,
            args=(list(argv), folder, out_fd, tuple(kept_fds), begun),
            name=f"waits-for-{Path(argv[0]).name}",
            daemon=True,
        )
        self._thread.start()
        self._process = begun.result()  # A fork and an exec: a millisecond.

    @property
    def pid(self) -> int:
        """Process id, also of a child that has ended."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether it exists, paused or not."""
        return self._thread.is_alive()

    @property
    def status(self) -> int | None:
        """Exit status, negative for a signal; None while it lives."""
        return self._process.returncode

    def send(self, number: signal.Signals) -> None:
        """Send a signal; nothing happens if the child has ended."""
        self._process.send_signal(number)

    def stands_still(self) -> bool:
        """Whether SIGSTOP has taken effect; said once per stop."""
        try:
            return os.waitid(os.P_PID, self.pid, os.WSTOPPED | os.WNOHANG) is not None
        except ChildProcessError:
            return False

    async def gone(self, within_s: float) -> bool:
        """Wait until it has ended and is reaped, at most ``within_s``; whether that is so."""
        clock = asyncio.get_running_loop()
        end = clock.time() + within_s
        while self.alive and clock.time() < end:  # noqa: ASYNC110 - a thread ends, which sets no asyncio.Event
            await asyncio.sleep(0.005)
        return not self.alive


async def locked(path: Path, wait_s: float) -> int:
    """Open and lock the file ``path``, waiting at most ``wait_s`` for a predecessor that is dying.

    Returns the descriptor, to be inherited by a child: the lock then lives exactly as long as the child.
    Raises ``ConfigError`` when another process keeps it.
    """
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    clock = asyncio.get_running_loop()
    end = clock.time() + wait_s
    try:
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if clock.time() >= end:
                    raise ConfigError(
                        f"data_dir: {path.parent} is in use by another embedded Redis (waited {wait_s:g} s); "
                        "stop that one, or give this one a folder of its own"
                    ) from None
                await asyncio.sleep(0.05)
            else:
                return fd
    except BaseException:  # cancelled or failed alike: the lock must not stay with us
        os.close(fd)
        raise


def _live(
    argv: list[str],
    folder: Path,
    out_fd: int,
    kept_fds: tuple[int, ...],
    begun: Future[subprocess.Popen[bytes]],
) -> None:
    if sys.platform == "linux" and sys.executable:
        # -I -S: no site, no user's path; about 15 ms.
        argv = [sys.executable, "-I", "-S", "-c", _TIED_TO_PARENT, str(os.getpid()), *argv]
    try:
        process = subprocess.Popen(
            argv,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=out_fd,
            stderr=subprocess.STDOUT,
            pass_fds=kept_fds,
            start_new_session=True,  # Ctrl-C is for the engine, which still has something to flush to the server.
            umask=0o077,
        )
    except BaseException as error:  # noqa: BLE001 - handed to the caller, who waits for it in the other thread
        begun.set_exception(error)
        return
    begun.set_result(process)
    process.wait()
