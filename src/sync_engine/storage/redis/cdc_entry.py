"""An entry of the change stream as a value: a change, where it was told, and what is missing before it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sync_engine.errors import Corruption, InvalidItem, StoreError, SyncEngineError
from sync_engine.item import ContentType, SyncItem

__all__ = ["BadEntry", "CdcEntry", "CorruptEntry", "Gap", "MalformedEntry"]


@dataclass(frozen=True, slots=True)
class Gap:
    """Entries of one writer that the reader will not see: they were trimmed, deleted, or lost with the server."""

    writer: str
    expected: int
    found: int

    @property
    def missing(self) -> int | None:
        """How many; None where the numbers began anew, which they do when Redis lost the stream."""
        return self.found - self.expected if self.found > self.expected else None


@dataclass(frozen=True, slots=True)
class CdcEntry:
    """One change: the item as it was written (``op`` is ``"PUT"``), or that it was deleted (``"DEL"``).

    ``content_hash`` is empty where the writer told none. ``expires_at`` (epoch ms) is the end of an item's life, not
    of a copy. ``writer`` and ``seq`` (1, 2, 3 … per writer) are given by the stream, as is ``position``, the entry's
    id in it; all three are empty in an entry that was not read from one. ``gap`` says what is missing before it.
    """

    op: Literal["PUT", "DEL"]
    object_id: str
    content: bytes | None = None
    content_hash: str = ""
    content_type: ContentType = ContentType.BINARY
    version: int = 1
    updated_at: int = 0
    trace_parent: str | None = None
    state: str = "default"
    home_instance_id: str | None = None
    stamp: int = 0
    expires_at: int | None = None
    writer: str = ""
    seq: int = 0
    position: str = ""
    gap: Gap | None = None

    @classmethod
    def put(cls, item: SyncItem) -> CdcEntry:
        """The entry that tells of an item."""
        return cls(
            "PUT",
            item.object_id,
            item.content,
            item.content_hash,
            item.content_type,
            item.version,
            item.updated_at,
            item.trace_parent,
            item.state,
            item.home_instance_id,
            item.stamp,
            item.expires_at,
        )

    @classmethod
    def delete(cls, object_id: str, stamp: int = 0) -> CdcEntry:
        """The entry that tells of a delete."""
        return cls("DEL", object_id, stamp=stamp)

    def item(self) -> SyncItem:
        """The item told of. Raises ``InvalidItem`` for a delete, and for what is beyond our limits."""
        if self.op != "PUT" or self.content is None:
            raise InvalidItem("op", repr(self.op), "must be 'PUT', with its content, to tell of an item")
        return SyncItem(
            self.object_id,
            self.content,
            content_type=self.content_type,
            version=self.version,
            updated_at=self.updated_at,
            state=self.state,
            home_instance_id=self.home_instance_id,
            trace_parent=self.trace_parent,
            stamp=self.stamp,
            expires_at=self.expires_at,
        )

    def __repr__(self) -> str:
        # Content may be personal data.
        content = "" if self.content is None else f" {self.content_type} {len(self.content)} bytes"
        return f"<CdcEntry {self.position or 'new'} {self.op} {self.object_id!r}{content}, {self.writer!r} {self.seq}>"


class BadEntry(SyncEngineError):
    """An entry of the stream that cannot be used; ``position`` is its id, to continue after."""

    position: str


class MalformedEntry(BadEntry, StoreError):
    """It is not written as entries are; ``field`` names the culprit."""

    def __init__(self, position: str, field: str, rule: str) -> None:
        StoreError.__init__(self, "l2", f"change stream entry {position}: {field} {rule}")
        self.position = position
        self.field = field


class CorruptEntry(BadEntry, Corruption):
    """Its content does not match its hash."""

    def __init__(self, position: str, object_id: str, expected: str, actual: str) -> None:
        Corruption.__init__(self, object_id, expected, actual)
        self.position = position
