"""What may be a schema: its name, the only text of a caller that ever becomes part of SQL, and its prefixes of ids."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final

from sync_engine.errors import InvalidId, InvalidItem
from sync_engine.item import RESERVED_IDS, check_id

__all__ = ["PREFIXES_MAX", "check_schema", "is_schema_name"]

PREFIXES_MAX: Final = 1000
"""Most prefixes of one call: they are announced in one transaction, for which every writer waits."""


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
    if isinstance(prefix, str) and prefix in RESERVED_IDS:
        return prefix  # it is no id, but many may begin so
    try:
        return check_id(prefix)
    except InvalidId as bad:
        raise InvalidItem("prefixes", f"among them {bad.shape}", bad.rule) from None
