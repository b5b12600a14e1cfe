"""Every error that sync-engine raises, under one root.

    SyncEngineError
    ├── ConfigError            a setting is missing, unknown or out of range
    ├── InvalidItem            the caller's item, option or argument breaks a rule; nothing was written
    │   ├── InvalidId
    │   ├── InvalidState
    │   ├── PayloadTooLarge
    │   └── TierNotConfigured  (also a ConfigError) the options ask for a tier that this engine does not have
    ├── NotJson                (also a TypeError) parsed content was asked of a binary item
    ├── NotRunning             the engine is not started, or is stopped
    ├── Backpressure           a bound was reached and stayed reached for the agreed wait
    ├── TierUnavailable        a tier could not be asked; the outcome of a write is then unknown, not failed
    │   └── DiskFull           its disk has no room
    ├── Corruption             stored bytes do not match their SHA-256
    ├── VersionConflict        a compare-and-set met another version
    ├── SearchError            a search, or a call on a search index, cannot be done as it is
    │   ├── InvalidQuery       the server does not understand the query
    │   ├── IndexNotFound
    │   ├── IndexConflict      an index of this name exists and is another one
    │   └── SearchUnavailable  this server has no search
    └── StoreError             a tier answered, and refused this item or this call

``retryable`` says whether the same call can succeed later without anybody changing it. It is
decided where the driver is known, never guessed above.
"""

from __future__ import annotations

__all__ = [
    "Backpressure",
    "ConfigError",
    "Corruption",
    "DiskFull",
    "IndexConflict",
    "IndexNotFound",
    "InvalidId",
    "InvalidItem",
    "InvalidQuery",
    "InvalidState",
    "NotJson",
    "NotRunning",
    "PayloadTooLarge",
    "SearchError",
    "SearchUnavailable",
    "StoreError",
    "SyncEngineError",
    "TierNotConfigured",
    "TierUnavailable",
    "VersionConflict",
]


class SyncEngineError(Exception):
    """Root of all errors of this library."""

    retryable: bool = False


class ConfigError(SyncEngineError):
    """A setting is missing, unknown or out of range; the message names field, value and bound."""


class InvalidItem(SyncEngineError, ValueError):
    """The caller's input breaks a rule; raised before anything is written.

    ``field`` names the argument, ``rule`` what it must satisfy.
    """

    def __init__(self, field: str, shape: str, rule: str) -> None:
        super().__init__(f"{field}: {shape}; {rule}")
        self.field = field
        self.shape = shape
        self.rule = rule


class InvalidId(InvalidItem):
    """An object id is empty, too long, reserved, or not plain UTF-8 text."""


class InvalidState(InvalidItem):
    """A state is empty, too long, or not plain UTF-8 text."""


class PayloadTooLarge(InvalidItem):
    """The content is larger than ``max_payload_bytes``."""


class TierNotConfigured(InvalidItem, ConfigError):
    """The options ask for a tier that this engine does not have: either side can be changed."""


class NotJson(SyncEngineError, TypeError):
    """Parsed content was asked of an item whose content is not JSON."""


class NotRunning(SyncEngineError):
    """The engine is not started, or is stopped."""


class Backpressure(SyncEngineError):
    """A bound was reached and stayed reached for the agreed wait; the write was not accepted."""

    retryable = True


class TierUnavailable(SyncEngineError):
    """A tier could not be asked.

    For a read: the answer is unknown, which is not the same as absent. For a write: the outcome
    is unknown, which is not the same as failed. ``tier`` is ``"l2"``, ``"l3"``, ``"log"`` or ``"quarantine"``.
    """

    retryable = True

    def __init__(self, tier: str, reason: str) -> None:
        super().__init__(f"{tier} is unavailable: {reason}")
        self.tier = tier
        self.reason = reason


class DiskFull(TierUnavailable):
    """The disk of a tier, or of the log, has no room."""


class Corruption(SyncEngineError):
    """Stored bytes do not match their SHA-256, and no tier holds a copy that does."""

    def __init__(self, object_id: str, expected: str, actual: str) -> None:
        super().__init__(f"{object_id!r}: stored SHA-256 is {expected or 'absent'}, content has {actual}")
        self.object_id = object_id
        self.expected = expected
        self.actual = actual


class VersionConflict(SyncEngineError):
    """A compare-and-set met another version; ``actual`` is 0 where the item does not exist."""

    def __init__(self, object_id: str, expected: int, actual: int) -> None:
        super().__init__(f"{object_id!r}: expected version {expected}, the truth holds {actual or 'no such item'}")
        self.object_id = object_id
        self.expected = expected
        self.actual = actual


class SearchError(SyncEngineError):
    """A search, or a call on a search index, cannot be done as it is."""


class InvalidQuery(SearchError, ValueError):
    """The server does not understand the query; ``reason`` is in its own words."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"the query was refused: {reason}")
        self.reason = reason


class IndexNotFound(SearchError):
    """There is no search index of this name."""

    def __init__(self, index: str) -> None:
        super().__init__(f"there is no search index {index!r}")
        self.index = index


class IndexConflict(SearchError):
    """A search index of this name exists and is another one; ``difference`` says in what."""

    def __init__(self, index: str, difference: str) -> None:
        super().__init__(f"the search index {index!r} exists and is another one: {difference}")
        self.index = index
        self.difference = difference


class SearchUnavailable(SearchError):
    """This server has no search: RediSearch is not there, or RedisJSON, without which there is nothing to index."""


class StoreError(SyncEngineError):
    """A tier answered, and refused: this item, or this call, will not succeed as it is."""

    def __init__(self, tier: str, reason: str) -> None:
        super().__init__(f"{tier} refused: {reason}")
        self.tier = tier
        self.reason = reason
