"""From a URL to the database that it names. Drivers of others than SQLite are imported when they are asked for."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

from sync_engine.errors import ConfigError
from sync_engine.storage.sql.address import address_of
from sync_engine.storage.sql.dialect import Database
from sync_engine.storage.sql.mysql import Mysql
from sync_engine.storage.sql.postgresql import Postgresql
from sync_engine.storage.sql.sqlite import Sqlite

__all__ = ["database_of"]

SUPPORTED: Final = (
    "sqlite:///relative/path, sqlite:////absolute/path, mysql://user:password@host/database (or mariadb://) "
    "or postgresql://user:password@host/database"
)


def database_of(url: str, timeout_ms: int) -> Database:
    """The database that a URL names; nothing is asked of it yet.

    Raises ``ConfigError``, which never quotes the URL: it may hold a password.
    """
    parsed = re.fullmatch(r"([A-Za-z][\w+.-]*)://(.*)", url, re.DOTALL)
    if parsed is None:
        raise ConfigError(f"sql_url: not a URL; give {SUPPORTED}")
    scheme, rest = parsed.groups()
    match scheme.lower():
        case "sqlite" | "sqlite+aiosqlite":
            return Sqlite(_file(rest), timeout_ms)
        case "mysql" | "mariadb" | "mysql+asyncmy" | "mariadb+asyncmy":
            return Mysql(address_of(url), timeout_ms)
        case "postgresql" | "postgres" | "postgresql+asyncpg":
            return Postgresql(address_of(url), timeout_ms)
        case _:
            raise ConfigError(f"sql_url: {scheme[:32]} is not supported; give {SUPPORTED}")


def _file(rest: str) -> Path:
    # Not by SQLAlchemy, whose versions differ in whether they decode %xx in a path. Here a path is what it says.
    if not rest.startswith("/") or "?" in rest:
        raise ConfigError(f"sql_url: SQLite takes a path and nothing else; give {SUPPORTED}")
    path = rest[1:]
    if path in ("", ":memory:") or path.startswith("file:") or "\0" in path:
        raise ConfigError(f"sql_url: the truth needs a file that outlives the process; give {SUPPORTED}")
    return Path(path).absolute()
