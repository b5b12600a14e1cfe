"""The Lua scripts as values: text with its title and flags, and the hash that Redis knows it by."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib.resources import files

__all__ = [
    "APPLY",
    "APPLY_AT_OOM",
    "CDC",
    "COLDEST",
    "COUNT",
    "EXISTS",
    "FETCH",
    "INDEX",
    "LAPSE",
    "MARKS",
    "PAGE",
    "SEARCH",
    "STAMPS",
    "WHERE",
    "Script",
]


@dataclass(frozen=True, slots=True)
class Script:
    """One script; ``sha`` is what EVALSHA takes."""

    text: str
    sha: str


def _script(flags: str, *names: str) -> Script:
    folder = files("sync_engine.storage.redis") / "lua"
    # The shebang lets Redis refuse the whole script up front: out of memory, on a replica, on a failing disk.
    text = f"#!lua{flags}\n" + "\n".join((folder / f"{name}.lua").read_text("utf-8") for name in names)
    return Script(text, hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest())


APPLY = _script("", "common", "mark", "stream", "apply")
"""Writes; refused as a whole when Redis is out of memory."""
APPLY_AT_OOM = _script(" flags=allow-oom", "common", "mark", "stream", "apply")
"""The same for chunks of deletes and state changes: what frees memory must work when there is none."""
CDC = _script("", "stream", "cdc")
FETCH = _script(" flags=no-writes", "fetch")
EXISTS = _script(" flags=no-writes", "common", "exists")
WHERE = _script(" flags=no-writes", "common", "where")
COLDEST = _script(" flags=no-writes", "common", "coldest")
STAMPS = _script(" flags=no-writes", "common", "stamps")
MARKS = _script(" flags=allow-oom", "common", "mark", "marks")
SEARCH = _script(" flags=no-writes,allow-cross-slot-keys", "search")
# The rest may sweep, or take stale entries out.
PAGE = _script(" flags=allow-oom", "common", "ready", "page")
COUNT = _script(" flags=allow-oom", "common", "ready", "count")
INDEX = _script(" flags=allow-oom", "common", "index")
LAPSE = _script(" flags=allow-oom", "common", "lapse")
