"""What flows through the engine: the item, and the operation that writes, deletes or restates one.

Everything here is frozen. Content is bytes; its type, its SHA-256 and its size are derived from it
and can therefore never disagree with it. Field names and limits are those of docs/formats.md.
"""

from __future__ import annotations

import hashlib
import time
from enum import StrEnum
from typing import Any, Literal, cast

import msgspec
from msgspec.structs import force_setattr

from sync_engine.errors import InvalidId, InvalidItem, InvalidState, NotJson
from sync_engine.json_text import JSON_DEPTH_MAX, canonical_json, json_form, looks_like_json

__all__ = ["ContentType", "Op", "OpKind", "SyncItem", "check_id", "check_state"]

ID_CHARS_MAX = 255
STATE_CHARS_MAX = 32
LABEL_CHARS_MAX = 512
INT64_MAX = 2**63 - 1
RESERVED_PREFIXES = ("state:", "merkle:", "idx:", "__local__:")
RESERVED_IDS = frozenset({"cdc"})

_SIZE_OVERHEAD = 304 + 64
"""Bytes an item costs beside its texts and content: the struct and the hex hash (docs/formats.md)."""


class ContentType(StrEnum):
    """How content is kept: JSON can be queried, binary is opaque."""

    JSON = "json"
    BINARY = "binary"


class _Head(msgspec.Struct, frozen=True, eq=False, gc=False):
    """The two positional fields of an item."""

    object_id: str
    content: bytes


class SyncItem(_Head, frozen=True, kw_only=True, eq=False, gc=False):
    """One item: an id, bytes, and what is known about them.

    ``content_type`` is detected from the bytes unless given; JSON that is given as such must be
    valid JSON, at most 127 levels deep. ``updated_at`` is in epoch milliseconds (default: now).
    ``stamp`` orders writes of one id across engines and is set by the engine; 0 means unordered.
    ``expires_at`` (epoch milliseconds) is set by the engine on items that live in Redis alone,
    ``sql_only`` on those that are never copied there.

    Two items are equal when what the caller said of them is equal; ``stamp``, ``expires_at``,
    ``sql_only``, ``batch_id`` and the access counters are the engine's notes and are not compared.

    Raises ``InvalidItem`` (``InvalidId``, ``InvalidState``) naming the field and the rule.
    """

    content_type: ContentType = cast(ContentType, None)
    version: int = 1
    updated_at: int = cast(int, None)
    state: str = "default"
    home_instance_id: str | None = None
    trace_parent: str | None = None
    trace_state: str | None = None
    batch_id: str | None = None
    priority_score: float = 0.0
    access_count: int = 0
    last_accessed: int = 0
    stamp: int = 0
    expires_at: int | None = None
    sql_only: bool = False
    _form: int = 0  # 0 unchecked, 1 valid JSON, 2 canonical JSON: spares a second parse
    _hash: str = ""
    _size: int = 0

    def __post_init__(self) -> None:
        check_id(self.object_id)
        content = self.content
        if type(content) is not bytes:
            if not isinstance(content, bytes | bytearray | memoryview):
                raise InvalidItem("content", f"a {type(content).__name__}", "must be bytes")
            content = bytes(content)
            force_setattr(self, "content", content)
        given = self.content_type
        if given is None:
            form = looks_like_json(content)
            force_setattr(self, "content_type", ContentType.JSON if form else ContentType.BINARY)
            force_setattr(self, "_form", form)
        else:
            if type(given) is not ContentType:
                force_setattr(self, "content_type", given := _content_type(given))
            if given is ContentType.JSON and not self._form:
                form = json_form(content)
                if not form:
                    rule = f"is not valid JSON of at most {JSON_DEPTH_MAX} levels"
                    raise InvalidItem("content", f"{len(content)} bytes", rule)
                force_setattr(self, "_form", form)
        updated_at, expires_at = self.updated_at, self.expires_at
        if updated_at is None:
            force_setattr(self, "updated_at", time.time_ns() // 1_000_000)
        elif type(updated_at) is not int or not -INT64_MAX <= updated_at <= INT64_MAX:
            raise InvalidItem("updated_at", _shape(updated_at), "must be an integer of 64 bits (epoch ms)")
        if expires_at is not None and (type(expires_at) is not int or not -INT64_MAX <= expires_at <= INT64_MAX):
            raise InvalidItem("expires_at", _shape(expires_at), "must be an integer of 64 bits (epoch ms)")
        if self.state != "default":
            check_state(self.state)
        # In one condition each, because nearly every item has neither: a loop of its own costs as much as the rest.
        if (
            self.home_instance_id is not None
            or self.trace_parent is not None
            or self.trace_state is not None
            or self.batch_id is not None
        ):
            for name in ("home_instance_id", "trace_parent", "trace_state", "batch_id"):
                label = getattr(self, name)
                if label is not None:
                    _check_text(InvalidItem, name, label, LABEL_CHARS_MAX, least=0)
        if self.priority_score != 0.0 or type(self.priority_score) is not float:
            _check_score(self)
        version, stamp, access_count, last_accessed = self.version, self.stamp, self.access_count, self.last_accessed
        if not (
            type(version) is type(stamp) is type(access_count) is type(last_accessed) is int
            and 0 <= version <= INT64_MAX
            and 0 <= stamp <= INT64_MAX
            and 0 <= access_count <= INT64_MAX
            and 0 <= last_accessed <= INT64_MAX
        ):
            for name in ("version", "access_count", "last_accessed", "stamp"):
                _check_count(name, getattr(self, name))

    @classmethod
    def from_json(cls, object_id: str, value: Any, **fields: Any) -> SyncItem:
        """Build a JSON item from a Python value (dict, list, str, int, float, bool, None).

        The content is canonical JSON: compact, keys sorted by code point, shortest float digits.
        An integer beyond 64 bits becomes a float where that is exact and keeps its digits where
        it is not. NaN, infinities, lone surrogates and non-string keys raise ``InvalidItem``.
        """
        content, form = canonical_json(value)
        return cls(object_id, content, content_type=ContentType.JSON, _form=form, **fields)

    def json(self) -> Any:
        """Parse the content; integers keep all their digits. Raises ``NotJson`` for binary content."""
        if self.content_type is not ContentType.JSON:
            raise NotJson(f"{self.object_id!r} holds {len(self.content)} bytes of binary content, not JSON")
        return msgspec.json.decode(self.content)

    @property
    def content_hash(self) -> str:
        """Hex SHA-256 of ``content``, computed once."""
        if not self._hash:
            force_setattr(self, "_hash", hashlib.sha256(self.content).hexdigest())
        return self._hash

    @property
    def size(self) -> int:
        """What the item counts in every byte bound: content, texts, and a fixed overhead."""
        if self._size:
            return self._size
        size = _SIZE_OVERHEAD + len(self.content) + _width(self.object_id)
        for label in (self.trace_parent, self.trace_state, self.home_instance_id):
            if label is not None:
                size += _width(label)
        force_setattr(self, "_size", size)
        return size

    def with_state(self, state: str) -> SyncItem:
        """The same item in another state."""
        return self.replace(state=state)

    def with_version(self, version: int) -> SyncItem:
        """The same item with another version."""
        return self.replace(version=version)

    def replace(self, **changes: Any) -> SyncItem:
        """A copy with other fields. New content is detected and hashed afresh unless its type is given."""
        if "content" in changes:
            changes = {"content_type": None, "_form": 0, "_hash": "", **changes}
        elif "content_type" in changes:
            changes = {"_form": 0, **changes}
        return msgspec.structs.replace(self, _size=0, **changes)

    def _told(self) -> tuple[object, ...]:
        return (
            self.object_id,
            self.content,
            self.content_type,
            self.version,
            self.updated_at,
            self.state,
            self.home_instance_id,
            self.trace_parent,
            self.trace_state,
            self.priority_score,
        )

    def __eq__(self, other: object) -> bool:
        return self._told() == other._told() if isinstance(other, SyncItem) else NotImplemented

    def __ne__(self, other: object) -> bool:
        # msgspec.Struct brings one of its own, so that Python would not derive it from ``__eq__``.
        return not self == other

    def __hash__(self) -> int:
        return hash((self.object_id, self.version, self.content))

    def __repr__(self) -> str:
        # Content may be personal data: its length and type are enough to debug with.
        return (
            f"<SyncItem {self.object_id!r} v{self.version} {self.content_type} "
            f"{len(self.content)} bytes, state {self.state!r}>"
        )


OpKind = Literal["put", "delete", "restate"]


class Op(msgspec.Struct, frozen=True, kw_only=True, eq=False, gc=False):
    """One admitted operation on one id.

    ``put`` carries the item (its ``stamp`` equals the operation's), ``restate`` the new ``state``
    (and, on its way from the truth to Redis, the whole item as it is now).
    ``redis`` and ``sql`` say which tiers keep the item; a tier that does not keep it loses any older
    copy. ``redis_expires_at`` (epoch ms) bounds the Redis copy. ``if_version`` makes a put conditional
    on the truth holding that version (0: no such item). ``only_in_state`` makes a delete conditional on the truth
    holding the item, no newer than the operation, in that state ("": in any).
    """

    kind: OpKind
    object_id: str
    stamp: int
    item: SyncItem | None = None
    state: str | None = None
    redis: bool = True
    sql: bool = True
    redis_expires_at: int | None = None
    if_version: int | None = None
    only_in_state: str | None = None
    # A fill copies what L3 holds into L2: it never passes a copy or a tombstone of its own stamp or later.
    fill: bool = False
    # A restate that L3 had no item for: it is meant for an item that Redis alone keeps.
    rowless: bool = False

    @property
    def size(self) -> int:
        """What the operation counts in every byte bound."""
        return self.item.size if self.item is not None else _SIZE_OVERHEAD + _width(self.object_id)


def check_id(object_id: object) -> str:
    """Return the id, or raise ``InvalidId`` naming the rule it breaks."""
    if type(object_id) is not str or not object_id.isascii() or "\0" in object_id or not 1 <= len(object_id) <= 255:
        _check_text(InvalidId, "object_id", object_id, ID_CHARS_MAX)
    id_ = cast(str, object_id)
    if id_.startswith(RESERVED_PREFIXES) or id_ in RESERVED_IDS:
        raise InvalidId(
            "object_id", repr(id_), f"is reserved (begins with one of {', '.join(RESERVED_PREFIXES)}, or is 'cdc')"
        )
    return id_


def check_state(state: object) -> str:
    """Return the state, or raise ``InvalidState`` naming the rule it breaks."""
    _check_text(InvalidState, "state", state, STATE_CHARS_MAX)
    return cast(str, state)


def _content_type(given: object) -> ContentType:
    try:
        return ContentType(cast(str, given))
    except ValueError:
        raise InvalidItem("content_type", repr(given), "must be 'json' or 'binary'") from None


def _check_text(kind: type[InvalidItem], field: str, text: object, chars_max: int, least: int = 1) -> None:
    if not isinstance(text, str):
        raise kind(field, f"a {type(text).__name__}", "must be a str")
    if not least <= len(text) <= chars_max:
        raise kind(field, f"{len(text)} characters", f"must have {least} to {chars_max} characters")
    if "\0" in text:
        raise kind(field, f"{len(text)} characters", "must not contain NUL")
    try:
        text.encode()
    except UnicodeEncodeError as bad:
        raise kind(field, f"a surrogate at index {bad.start}", "must be valid UTF-8 text") from None


def _check_count(field: str, value: object) -> None:
    if type(value) is not int or not 0 <= value <= INT64_MAX:
        raise InvalidItem(field, _shape(value), "must be an integer from 0 to 2^63-1")


def _check_score(item: SyncItem) -> None:
    score = item.priority_score
    if type(score) is int and abs(score) < 2**53:
        force_setattr(item, "priority_score", float(score))
    elif type(score) is not float or score != score or abs(score) == float("inf"):
        raise InvalidItem("priority_score", _shape(score), "must be a finite float")


def _shape(value: object) -> str:
    return repr(value) if isinstance(value, int | float) and abs(value) < 1e30 else f"a {type(value).__name__}"


def _width(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode())
