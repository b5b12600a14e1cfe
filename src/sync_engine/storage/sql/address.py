"""A URL of a database server taken apart, and nothing of it ever told: it may hold a password."""

from __future__ import annotations

import ssl
from collections.abc import Collection
from dataclasses import dataclass, field
from urllib.parse import parse_qsl, unquote, urlsplit

from sync_engine.errors import ConfigError

__all__ = ["Address", "address_of", "tls_context"]


@dataclass(frozen=True, slots=True, repr=False)
class Address:
    """Where a server is, who asks, and what else the URL says."""

    host: str | None
    port: int | None
    user: str | None
    password: str | None
    database: str
    options: dict[str, str] = field(default_factory=dict)

    def allow(self, names: Collection[str]) -> None:
        """Raise ``ConfigError`` about an option that is none of these, without quoting it."""
        if unknown := set(self.options) - set(names):
            count = f"{len(unknown)} of them are unknown" if len(unknown) > 1 else "one is unknown"
            raise ConfigError(f"sql_url: the options after ? are {', '.join(sorted(names))}; {count}")

    def __repr__(self) -> str:
        return "<Address>"


def address_of(url: str) -> Address:
    """``scheme://user:password@host:port/database?option=value``. Raises ``ConfigError``."""
    try:
        parts = urlsplit(url)
        port = parts.port
        options = parse_qsl(parts.query, keep_blank_values=True, strict_parsing=bool(parts.query))
        database = unquote(parts.path.removeprefix("/"), errors="strict")
        user, password = (
            None if text is None else unquote(text, errors="strict") for text in (parts.username, parts.password)
        )
    except ValueError:
        raise ConfigError(
            "sql_url: not a URL; encode what is special in it (%40 for @) and give scheme://user:password@host:port/database"
        ) from None
    if parts.fragment or not database or "/" in database or "\0" in url:
        raise ConfigError("sql_url: name one database: scheme://user:password@host:port/database; %23 stands for #")
    if len(dict(options)) < len(options):
        raise ConfigError("sql_url: an option is given twice")
    return Address(parts.hostname, port, user, password, database, dict(options))


def tls_context(
    ca: str | None, certificate: str | None, key: str | None, *, verify: bool, verify_name: bool
) -> ssl.SSLContext:
    """TLS that trusts ``ca``, or the system where that is None. Raises ``ConfigError`` about files that are no good."""
    try:
        context = ssl.create_default_context(cafile=ca)
        if certificate is not None:
            context.load_cert_chain(certificate, key)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(f"sql_url: a file for TLS cannot be used: {error.strerror or type(error).__name__}") from None
    context.check_hostname = verify and verify_name
    if not verify:
        context.verify_mode = ssl.CERT_NONE
    return context
