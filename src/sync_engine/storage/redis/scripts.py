"""The Lua scripts as values: text with its title and flags, and the hash that Redis knows it by."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib.resources import files

__all__ = ["APPLY", "APPLY_AT_OOM", "EXISTS", "FETCH", "STATES", "Script"]


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


APPLY = _script("", "common", "apply")
"""Writes; refused as a whole when Redis is out of memory."""
APPLY_AT_OOM = _script(" flags=allow-oom", "common", "apply")
"""The same for chunks of deletes and state changes: what frees memory must work when there is none."""
FETCH = _script(" flags=no-writes", "fetch")
EXISTS = _script(" flags=no-writes", "common", "exists")
STATES = _script(" flags=allow-oom", "common", "states")
