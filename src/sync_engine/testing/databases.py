"""Real database servers for tests: MariaDB and PostgreSQL, started from what Debian installs.

``async with RunningMariaDB() as server: url = await server.database()``. A server has its own data folder, port and
Unix socket, lives as long as this process at most and leaves nothing behind. PostgreSQL does not run as root: where
the tests do, it runs as ``nobody``.
"""

from __future__ import annotations

import asyncio
import os
import pwd
import re
import shutil
import signal
import sqlite3
import subprocess
import tempfile
from abc import abstractmethod
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote
from uuid import uuid4

from sync_engine._child import Child
from sync_engine._server_process import ENDED_WITHIN_S, LOG_TAIL_BYTES, ServerProcess, free_port
from sync_engine.errors import ConfigError, StoreError, TierUnavailable
from sync_engine.storage.sql.connect import database_of
from sync_engine.storage.sql.words import Said
from sync_engine.testing.servers import TlsFiles

__all__ = ["PASSWORD", "RunningDatabase", "RunningMariaDB", "RunningPostgres", "ask"]

USER: Final = "ada"
PASSWORD: Final = "sécret/@:%"  # noqa: S105 - made up; what is special in a URL, and no Latin-1 only


class RunningDatabase(ServerProcess):
    """One server process on a port of 127.0.0.1 that it keeps over ``kill`` and ``restart``, and its data too.

    ``durable`` makes it sync what it commits; without, a server that is killed still keeps everything, the machine
    must not lose power. ``settings`` are more of its own options, ``tls`` is what it shows to who asks for TLS.
    ``within`` is where its folder is made: a short path, since there will be a socket in it.
    """

    scheme: str
    what: str
    _ready_within_s = 60.0

    def __init__(
        self,
        *,
        durable: bool = False,
        settings: Sequence[str] = (),
        tls: TlsFiles | None = None,
        within: Path = Path("/tmp"),  # noqa: S108 - mkdtemp makes a folder of our own there
    ) -> None:
        super().__init__()
        self.port = 0
        self._durable = durable
        self._settings = tuple(settings)
        self._tls = tls
        self._within = within

    async def start(self) -> None:
        """Start it and wait until it answers; with the data it has. Nothing if it runs.

        Raises ``ConfigError`` that says what to install, ``StoreError`` with the end of its log.
        """
        if self.running:
            return
        begun_anew = self._home is None
        self._binaries()
        try:
            if self._home is None:
                self._home = Path(tempfile.mkdtemp(prefix="sync-sql-", dir=self._within))
                await asyncio.to_thread(self._prepare, self._home)
            if trouble := await self._tried(partial(self._attempt, self._home, begun_anew)):
                raise StoreError("l3", f"{self.what} did not start: {trouble}\n{self._log_tail()}")
        except BaseException:  # cancelled or failed alike: what is half made is of no use to the next start
            if begun_anew:
                await self.stop()
            raise

    async def restart(self) -> None:
        """End it in order, which closes every connection, and start it again."""
        child = self._living()
        child.send(self._in_order)
        if not await child.gone(ENDED_WITHIN_S):
            await self.kill()
        await self.start()

    def strike(self) -> None:
        """SIGKILL for every process of it, now, for a callback in the middle of things; ``kill`` waits for the end."""
        if self.running:
            self._signal(signal.SIGKILL)

    async def pause(self) -> None:
        """SIGSTOP for every process of it: connections stay, nobody answers."""
        self._signal(signal.SIGSTOP)
        await asyncio.sleep(0)

    async def resume(self) -> None:
        """SIGCONT: the end of a pause."""
        self._signal(signal.SIGCONT)

    async def database(self) -> str:
        """Make a database that nobody else has; its URL."""
        name = f"t{uuid4().hex}"
        await ask(self.url(), f"CREATE DATABASE {name}{self._creates}")
        return self.url(name)

    async def drop(self, url: str) -> None:
        """Remove a database of ``database``, whoever is connected to it."""
        name = url.partition("?")[0].rpartition("/")[2]
        await ask(self.url(), f"DROP DATABASE IF EXISTS {name}{self._drops}")

    def url(self, database: str | None = None, *, options: str = "") -> str:
        """The URL of a database, over TCP."""
        user, password = quote(USER), quote(PASSWORD, safe="")
        name = self._first if database is None else database
        return f"{self.scheme}://{user}:{password}@127.0.0.1:{self.port}/{name}{options and f'?{options}'}"

    @abstractmethod
    def socket_url(self, database: str) -> str:
        """The URL of a database, over the Unix socket."""

    @property
    def log(self) -> str:
        """What the server has logged."""
        assert self._home is not None, "not started"
        return (self._home / "log").read_text(errors="replace")

    def __repr__(self) -> str:
        return f"<{type(self).__name__}, port {self.port}, {'running' if self.running else 'not running'}>"

    # What each server does its own way.

    _first: str
    _creates: str = ""
    _drops: str = ""
    _in_order: signal.Signals = signal.SIGTERM

    @abstractmethod
    def _binaries(self) -> Path:
        """The server's executable; ``ConfigError`` that says what to install."""

    @abstractmethod
    def _prepare(self, home: Path) -> None:
        """Make the data folder."""

    @abstractmethod
    def _argv(self, home: Path) -> list[str]:
        """How it is started."""

    # How.

    async def _attempt(self, home: Path, moves: bool) -> Child:
        if moves:
            self.port = free_port()
        return self._launch(self._argv(home), home, home / "log", log_on=True)

    async def _not_yet(self) -> str:
        try:
            await ask(self.url(), "SELECT 1")
        except TierUnavailable as down:
            return str(down)
        return ""

    def _signal(self, number: signal.Signals) -> None:
        pids = [self.pid]
        for path in Path("/proc").glob("[0-9]*/stat"):
            try:
                parent = int(path.read_text().rpartition(")")[2].split()[1])
            except (OSError, ValueError, IndexError):  # gone meanwhile
                continue
            if parent == pids[0]:
                pids.append(int(path.parent.name))
        for pid in pids:
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                continue


class RunningMariaDB(RunningDatabase):
    """A server of Debian's MariaDB."""

    scheme = "mysql"
    what = "MariaDB"
    _first = "mysql"
    # As the original's compose file has it: a store that compares ids by bytes must say so itself.
    _creates = " CHARACTER SET utf8mb4 COLLATE utf8mb4_unicode_ci"

    def socket_url(self, database: str) -> str:
        """The URL of a database, over the Unix socket."""
        assert self._home is not None, "not started"
        return self.url(database, options=f"unix_socket={quote(str(self._home / 'socket'), safe='')}")

    def _binaries(self) -> Path:
        for folder in ("", "/usr/sbin", "/usr/libexec"):
            found = shutil.which("mariadbd", path=folder or None)
            if found and shutil.which("mariadb-install-db"):
                return Path(found)
        raise ConfigError("no MariaDB: run: apt-get install mariadb-server-core mariadb-client-core")

    def _prepare(self, home: Path) -> None:
        # Not /tmp: a server that starts removes the temporary tables of every other one that it finds there.
        (home / "tmp").mkdir()
        _run(
            [
                "mariadb-install-db",
                "--no-defaults",
                f"--datadir={home / 'data'}",
                f"--tmpdir={home / 'tmp'}",
                "--skip-test-db",
                *self._user(),
            ],
            home,
        )
        told = PASSWORD.replace("'", "''")
        (home / "init.sql").write_text(
            f"CREATE USER IF NOT EXISTS '{USER}'@'%' IDENTIFIED BY '{told}';\n"
            f"GRANT ALL PRIVILEGES ON *.* TO '{USER}'@'%' WITH GRANT OPTION;\n"
        )

    def _argv(self, home: Path) -> list[str]:
        return [
            str(self._binaries()),
            "--no-defaults",
            *self._user(),
            f"--datadir={home / 'data'}",
            # One that starts removes temporary tables it finds there, those of another one that is starting too.
            f"--tmpdir={home / 'tmp'}",
            f"--socket={home / 'socket'}",
            f"--pid-file={home / 'pid'}",
            f"--init-file={home / 'init.sql'}",
            f"--port={self.port}",
            "--bind-address=127.0.0.1",
            "--skip-name-resolve",
            "--character-set-server=utf8mb4",
            "--innodb-buffer-pool-size=64M",
            "--innodb-log-file-size=48M",
            "--innodb-flush-log-at-trx-commit=1",
            *([] if self._durable else ["--innodb-flush-method=nosync", "--innodb-doublewrite=0"]),
            *self._tls_settings(),
            *self._settings,
        ]

    def _tls_settings(self) -> list[str]:
        if self._tls is None:
            return []
        return [f"--ssl-ca={self._tls.ca}", f"--ssl-cert={self._tls.certificate}", f"--ssl-key={self._tls.key}"]

    @staticmethod
    def _user() -> list[str]:
        return ["--user=root"] if os.getuid() == 0 else []


class RunningPostgres(RunningDatabase):
    """A server of Debian's PostgreSQL, the newest that is installed."""

    scheme = "postgresql"
    what = "PostgreSQL"
    _first = "postgres"
    # Neither collation nor locale of the machine: a store that compares ids by bytes must say so itself.
    _creates = " TEMPLATE template0 ENCODING 'UTF8' LOCALE_PROVIDER icu ICU_LOCALE 'en-US' LOCALE 'C'"
    _drops = " WITH (FORCE)"
    _in_order = signal.SIGINT

    def socket_url(self, database: str) -> str:
        """The URL of a database, over the Unix socket."""
        assert self._home is not None, "not started"
        return self.url(database, options=f"host={quote(str(self._home), safe='')}")

    def _binaries(self) -> Path:
        found = [path for path in Path("/usr/lib/postgresql").glob("*/bin/postgres") if path.parts[-3].isdigit()]
        if on_path := shutil.which("postgres"):
            found = found or [Path(on_path)]
        if not found:
            raise ConfigError("no PostgreSQL: run: apt-get install postgresql-15")
        return max(found, key=lambda path: int(path.parts[-3]) if path.parts[-3].isdigit() else 0)

    def _prepare(self, home: Path) -> None:
        (home / "password").write_text(PASSWORD)
        for path in (home, home / "password"):
            _give_to_nobody(path)
        told = ["--auth=scram-sha-256", f"--pwfile={home / 'password'}", f"--username={USER}"]
        initdb = [
            str(self._binaries().with_name("initdb")),
            f"--pgdata={home / 'data'}",
            "--no-sync",
            "--encoding=UTF8",
        ]
        _run([*_as_nobody(), *initdb, "--locale=C", *told], home)
        if self._tls is not None:
            for name, path in (("server.crt", self._tls.certificate), ("server.key", self._tls.key)):
                copy = home / "data" / name
                shutil.copyfile(path, copy)
                copy.chmod(0o600)
                _give_to_nobody(copy)

    def _argv(self, home: Path) -> list[str]:
        settings = {
            "listen_addresses": "127.0.0.1",
            "port": self.port,
            "unix_socket_directories": home,
            "shared_buffers": "64MB",
            "max_connections": 200,
            "max_wal_size": "512MB",
            "fsync": "on" if self._durable else "off",
            "full_page_writes": "on" if self._durable else "off",
            "ssl": "on" if self._tls is not None else "off",
        }
        told = [text for name, value in settings.items() for text in ("-c", f"{name}={value}")]
        return [*_as_nobody(), str(self._binaries()), "-D", str(home / "data"), *told, *self._settings]


async def ask(url: str, statement: str, *values: Any) -> list[tuple[Any, ...]]:
    """What another program sees in, or does to, a database: the rows of one statement; ``?`` stands for a value."""
    if url.startswith("sqlite:"):
        connection = sqlite3.connect(url.removeprefix("sqlite:///"), isolation_level=None)
        try:
            return connection.execute(statement, values).fetchall()
        finally:
            connection.close()
    postgresql = url.startswith("postgres")
    numbers = iter(range(1, len(values) + 1))
    text = re.sub(r"\?", lambda _: f"${next(numbers)}" if postgresql else "%s", statement)
    session = await database_of(url, 10_000).open()
    try:
        return await session.rows(Said(text, values))
    finally:
        await session.close()


def _as_nobody() -> list[str]:
    if os.getuid() != 0:
        return []
    if shutil.which("setpriv") is None:
        raise ConfigError("PostgreSQL does not run as root, and setpriv is missing. Run: apt-get install util-linux")
    nobody = pwd.getpwnam("nobody")
    # The wish to die with the parent is lost with the user, so it is said again.
    return [
        str(shutil.which("setpriv")),
        f"--reuid={nobody.pw_uid}",
        f"--regid={nobody.pw_gid}",
        "--clear-groups",
        "--pdeathsig=KILL",
    ]


def _give_to_nobody(path: Path) -> None:
    if os.getuid() == 0:
        nobody = pwd.getpwnam("nobody")
        os.chown(path, nobody.pw_uid, nobody.pw_gid)


def _run(argv: Sequence[str], home: Path) -> None:
    done = subprocess.run(argv, cwd=home, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise StoreError("l3", f"{argv[0]}: {(done.stdout + done.stderr)[-LOG_TAIL_BYTES:]}")
