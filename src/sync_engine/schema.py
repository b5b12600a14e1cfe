"""What may be a schema: its name, the only text of a caller that ever becomes part of SQL, and its prefixes of ids."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final

from sync_engine.errors import InvalidItem
from sync_engine.item import RESERVED_PREFIXES

__all__ = ["PREFIXES_MAX", "check_schema", "is_schema_name"]

PREFIXES_MAX: Final = 1000
"""Most prefixes of one call: they are announced in one transaction, for which every writer waits."""

PREFIX_CHARS_MAX: Final = 255
"""As many as an id has."""


def check_schema(name: object, prefixes: object) -> tuple[str, ...]:
    """The prefixes, each once, or ``InvalidItem`` naming the rule that is broken."""
    if not is_schema_name(name):
        shape = repr(name[:60]) if isinstance(name, str) else f"a {type(name).__name__}"
        rule = "must be a-z, then up to 40 of a-z, 0-9 and _, and not begin with sync_ or sqlite_"
        raise InvalidItem("name", shape, rule)
    if isinstance(prefixes, str | bytes) or not isinstance(prefixes, Iterable):
        raise InvalidItem("prefixes", f"a {type(prefixes).__name__}", "must be several prefixes")
    checked = tuple(dict.fromkeys(_prefix(prefix) for prefix in prefixes))
    if not 1 <= len(checked) <= PREFIXES_MAX:
        raise InvalidItem("prefixes", f"{len(checked)} of them", f"must be 1 to {PREFIXES_MAX}")
    return checked


def is_schema_name(name: object) -> bool:
    """Whether this may be a schema; its table is called ``{name}_items``.

    Names that begin with ``sync`` are for tables of ours; those that begin with ``sqlite_`` are SQLite's own.
    """
    if not isinstance(name, str) or re.fullmatch(r"[a-z][a-z0-9_]{0,40}", name) is None:
        return False
    return name != "sync" and not name.startswith(("sync_", "sqlite_")) and name != "sqlite"


def _prefix(prefix: object) -> str:
    if not isinstance(prefix, str):
        raise InvalidItem("prefixes", f"a {type(prefix).__name__} among them", "must be of str")
    if not 1 <= len(prefix) <= PREFIX_CHARS_MAX:
        raise InvalidItem("prefixes", f"one of {len(prefix)} characters", f"must have 1 to {PREFIX_CHARS_MAX} each")
    if "\0" in prefix:
        raise InvalidItem("prefixes", "one with NUL", "must be plain text")
    try:
        prefix.encode()
    except UnicodeEncodeError:
        raise InvalidItem("prefixes", "one with a surrogate", "must be valid UTF-8 text") from None
    if prefix.startswith(RESERVED_PREFIXES):
        raise InvalidItem("prefixes", repr(prefix), "is reserved: no id begins so")
    return prefix
