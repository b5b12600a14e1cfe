"""What redis-py raises, in our words: not now, not here, never as it is."""

from __future__ import annotations

from redis.exceptions import (
    AskError,
    AuthenticationError,
    ClusterError,
    MovedError,
    NoPermissionError,
    NoScriptError,
    OutOfMemoryError,
    ReadOnlyError,
    ResponseError,
    TryAgainError,
)
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

from sync_engine.errors import StoreError, SyncEngineError, TierUnavailable

__all__ = ["CLOSED", "NotHere", "NotPermitted", "UnknownScript", "translated"]

CLOSED = "the connection to Redis is closed"

# The first word of errors that say "not now" rather than "not this", where redis-py has no class for them.
_NOT_NOW = ("BUSY", "LOADING", "MASTERDOWN", "MISCONF", "NOREPLICAS", "OOM", "READONLY", "UNBLOCKED", "UNKILLABLE")

# How a script hears of a slot that is on its way to another node, or of a cluster that is down. Ours read every key
# that they will write before their first write, so they too have done nothing then.
_NOT_HERE = ("access a non local key", "while the cluster is down")


class NotPermitted(TierUnavailable):
    """The user may not run the command: nothing is known of the items, and an administrator can mend it."""


class UnknownScript(SyncEngineError):
    """The server forgot the script, or never had it."""


class NotHere(TierUnavailable):
    """A node of a cluster does not serve these keys, or not now: it did nothing. ``moved_to``: who does."""

    def __init__(self, reason: str, moved_to: tuple[str, int] | None = None) -> None:
        super().__init__("l2", reason)
        self.moved_to = moved_to


def translated(failed: Exception) -> SyncEngineError:
    """The driver's error in our words. Texts come from the server and the socket, never from the URL."""
    # What the server then quotes are the arguments, and with them contents.
    told = str(failed).partition(", with args beginning with")[0]
    if isinstance(failed, NoScriptError):
        return UnknownScript(str(failed))
    if isinstance(failed, OutOfMemoryError):
        return TierUnavailable("l2", "out of memory: nothing of the call was written")
    if isinstance(failed, AuthenticationError):
        return TierUnavailable("l2", "the server refused the credentials")
    if isinstance(failed, RedisConnectionError | RedisTimeoutError | OSError):
        return TierUnavailable("l2", f"{type(failed).__name__}: {failed}" if str(failed) else type(failed).__name__)
    if isinstance(failed, NoPermissionError):
        return NotPermitted("l2", str(failed))
    if isinstance(failed, ReadOnlyError):
        return TierUnavailable("l2", f"{type(failed).__name__}: {failed}")
    if isinstance(failed, MovedError):
        return NotHere(f"MOVED {failed}", failed.node_addr)
    if isinstance(failed, ClusterError | TryAgainError | AskError) or any(it in str(failed) for it in _NOT_HERE):
        return NotHere(f"{type(failed).__name__}: {failed}")
    if isinstance(failed, ResponseError) and str(failed).startswith(_NOT_NOW):
        return TierUnavailable("l2", str(failed))
    return StoreError("l2", told)
