"""What a Redis URL means: one server, sentinels that know one, or a cluster; and the ``Servers`` that it names.

``redis://`` · ``rediss://`` · ``unix://`` · ``redis+sentinel://h1,h2/service/db`` · ``redis+cluster://h1,h2``, and
``rediss+…`` for TLS. A URL is a secret: no error and no log line quotes any part of it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, unquote, urlencode, urlsplit

from redis.asyncio.connection import parse_url, to_bool

from sync_engine.errors import ConfigError
from sync_engine.storage.redis.connect import Line, checked_options
from sync_engine.storage.redis.pool import Pool
from sync_engine.storage.redis.sentinel import Address, Sentinels
from sync_engine.storage.redis.shards import Servers

__all__ = ["Meaning", "meaning_of", "servers_of"]

log = logging.getLogger(__name__)

SCHEMES = ("redis", "rediss", "unix", "redis+sentinel", "rediss+sentinel", "redis+cluster", "rediss+cluster")
PORT, SENTINEL_PORT = 6_379, 26_379

# What may stand behind the question mark. The bounds of a connection are settings of the engine, not of the URL.
_OPTIONS = frozenset({"db", "username", "password", "protocol", "client_name"})
_TLS_OPTIONS = frozenset(
    f"ssl_{name}"
    for name in (
        *("ca_certs", "ca_path", "ca_data", "cert_reqs", "check_hostname"),
        *("certfile", "keyfile", "password", "min_version", "ciphers"),
    )
)
_SENTINEL_OPTIONS = frozenset({"sentinel_username", "sentinel_password"})

_said: set[tuple[str, tuple[Address, ...]]] = set()


@dataclass(frozen=True, slots=True, repr=False)
class Meaning:
    """``kind``: ``one``, ``sentinel`` or ``cluster``; ``options``: redis-py's for a connection, beside them ``ssl``.

    ``hosts`` are those to ask where there is more than the one among the options.
    """

    kind: str
    options: Mapping[str, Any]
    hosts: tuple[Address, ...] = ()
    service: str = ""
    sentinel_options: Mapping[str, Any] | None = None


def servers_of(
    url: str,
    prefix: str,
    *,
    timeout_ms: int,
    response_timeout_ms: int,
    ca_file: Path | None = None,
    on_new_server: Callable[[], None] | None = None,
) -> Servers:
    """The servers that the URL names, none of them connected yet. Raises ``ConfigError``, which never quotes it.

    ``ca_file`` holds the authorities to trust where the URL says TLS and names none. ``on_new_server`` is called
    before anything is read from a server that may not hold all that the one before it confirmed.
    """
    meant = meaning_of(url, ca_file)
    _warn(meant)
    bounds: dict[str, Any] = {"timeout_ms": timeout_ms, "response_timeout_ms": response_timeout_ms}
    if meant.kind == "cluster":
        from sync_engine.storage.redis.cluster import Cluster

        with checked_options():
            Pool(meant.options, timeout_s=1, response_timeout_s=1, on_new_server=lambda: None)
        return Cluster(meant.hosts, prefix, **bounds, options=meant.options, on_new_server=on_new_server)
    sentinels = None
    if meant.sentinel_options is not None:
        with checked_options():
            sentinels = Sentinels(meant.hosts, meant.service, meant.sentinel_options, timeout_ms=timeout_ms)
    return Line(meant.options, prefix, **bounds, sentinels=sentinels, on_new_server=on_new_server)


def meaning_of(url: str, ca_file: Path | None = None) -> Meaning:
    """What the URL says. Raises ``ConfigError``."""
    try:
        parts = urlsplit(url)
        if parts.scheme not in SCHEMES:
            raise ConfigError(f"redis_url: its scheme must be one of {', '.join(SCHEMES)}")
        base, _, kind = parts.scheme.partition("+")
        given = _given(parts.query)
        tls = base == "rediss" or (kind != "" and to_bool(given.pop("tls", "")) is True)
        apart = {name: given.pop(name) for name in sorted(_SENTINEL_OPTIONS & given.keys()) if kind == "sentinel"}
        if not given.keys() <= (_OPTIONS | _TLS_OPTIONS if tls else _OPTIONS) or parts.fragment:
            raise _bad("an option that does not exist, or not there")
        login, at, hosts = parts.netloc.rpartition("@")
        if base == "unix":
            if hosts or not parts.path.strip("/"):
                raise _bad("no path of a socket; the path begins after two slashes, with a third")
            return Meaning("one", _options(f"unix://{login}{at}{parts.path}", given))
        path = parts.path.removeprefix("/")
        service, _, database = path.partition("/") if kind == "sentinel" else ("", "", path)
        if (kind == "sentinel") != bool(service):
            raise _bad("no name of the service behind its hosts")
        if not (database or "0").isdecimal() or (kind == "cluster" and int(database or given.get("db", "0")) != 0):
            raise _bad("a database that is no number, or a cluster's that is not 0")
        names = hosts.split(",") if kind else [hosts]
        if kind and not all(names):
            raise _bad("no host where there should be one")
        options = _options(f"redis://{login}{at}{names[0]}/{database}", given)
        if tls:
            options |= {"ssl": True} | (
                {"ssl_ca_certs": str(ca_file)} if ca_file and "ssl_ca_certs" not in given else {}
            )
        elif ca_file is not None:
            raise ConfigError("redis_ca_file: redis_url says nothing of TLS; its scheme would be rediss")
        if not kind:
            return Meaning("one", options)
        found = [parse_url(f"redis://{name}") for name in names]
        port = SENTINEL_PORT if kind == "sentinel" else PORT
        addresses = tuple((at["host"], at.get("port", port)) for at in found)
    except (ValueError, KeyError):  # the parser's text may quote a part of the URL, and with it the password
        raise _bad("a part that cannot be read") from None
    options = {name: value for name, value in options.items() if name not in ("host", "port")}
    if kind == "cluster":
        options.pop("db", None)
        return Meaning(kind, options, addresses)
    of_tls = {name: value for name, value in options.items() if name.startswith("ssl")}
    of_login = {name.removeprefix("sentinel_"): value for name, value in apart.items()}
    return Meaning(kind, options, addresses, unquote(service), of_tls | of_login)


def _options(url: str, given: Mapping[str, str]) -> dict[str, Any]:
    found = dict(parse_url(f"{url}?{urlencode(given)}"))
    found.pop("connection_class", None)
    return found


def _given(query: str) -> dict[str, str]:
    pairs = parse_qsl(query, keep_blank_values=True, strict_parsing=True) if query else []
    given = dict(pairs)
    if len(given) < len(pairs) or not all(given.values()):
        raise _bad("an option twice, or without a value")
    return given


def _bad(what: str) -> ConfigError:
    return ConfigError(f"redis_url: not a valid URL, it has {what}; like redis://user:password@host:6379/0")


def _warn(meant: Meaning) -> None:
    hosts = meant.hosts or ((str(meant.options.get("host", "")), int(meant.options.get("port", PORT))),)
    options = meant.options
    if options.get("ssl") and (options.get("ssl_cert_reqs") == "none" or options.get("ssl_check_hostname") is False):
        _say("redis_url has the server's certificate not checked: anybody on the way can pass for the server", hosts)
    encrypted = options.get("ssl") or "path" in options
    with_password = "password" in options or "password" in (meant.sentinel_options or {})
    if with_password and not encrypted and not all(_near(host) for host, _ in hosts):
        _say("redis_url sends its password unencrypted to another machine; rediss:// would encrypt it", hosts)


def _say(warning: str, hosts: tuple[Address, ...]) -> None:
    """Once: a store that cannot connect is made again and again."""
    if (warning, hosts) not in _said:
        _said.add((warning, hosts))
        log.warning(warning)


def _near(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host in ("", "localhost")
