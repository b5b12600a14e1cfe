"""How an item is written in Redis, and read back: the JSON document, our envelope, the original's text.

Pure functions; docs/formats.md has the formats. A JSON item is a RedisJSON document, so that it can be
searched; where RedisJSON would not give its exact bytes back, the document also carries them as ``raw``.
Everything else is one string: our envelope, or the original's JSON text of an item.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import msgspec
import orjson

from sync_engine.errors import Corruption, SyncEngineError
from sync_engine.item import ContentType, SyncItem
from sync_engine.json_text import canonical_json, is_canonical, json_depth_within

__all__ = ["Unverified", "read_document", "read_string", "to_document", "to_envelope", "to_text"]

ENVELOPE_MAGIC = b"\xf5\x01"
"""No UTF-8 text holds the byte 0xF5, so no JSON does; the second byte is the format's version."""

DOCUMENT_DEPTH_MAX = 126
"""RedisJSON nests 127 levels, and the payload sits one below the document (measured on 2.8)."""


@dataclass(frozen=True, slots=True)
class Unverified:
    """An item of the original engine, whose document keeps no exact bytes to check a hash against."""

    item: SyncItem


Read = SyncItem | Unverified | Corruption | None
"""A verified item, one that cannot be verified, one that is damaged, or something that is no item at all."""


def to_document(item: SyncItem) -> bytes | None:
    """The RedisJSON document of a JSON item; None where RedisJSON would refuse it (too deep)."""
    content = item.content
    if len(content) > 2 * DOCUMENT_DEPTH_MAX and _too_deep(content):
        return None
    exact = (item._form == 2 or is_canonical(content)) and _floats_survive(content)
    return _write_document(
        _Written(
            item.access_count,
            _audit(item),
            msgspec.UNSET if item.expires_at is None else item.expires_at,
            item.object_id,
            item.last_accessed,
            msgspec.Raw(content),
            item.content_hash,
            msgspec.UNSET if exact else content.decode(),
            item.stamp,
            item.state,
            item.updated_at,
            item.version,
        )
    )


def to_envelope(item: SyncItem) -> bytes:
    """Our string: magic, stamp and state as text for the scripts, a msgpack header, the content verbatim."""
    state = item.state.encode()
    header = _pack_header(
        _Header(
            id=item.object_id,
            hash=bytes.fromhex(item.content_hash),
            version=item.version,
            updated_at=item.updated_at,
            json=item.content_type is ContentType.JSON,
            access_count=item.access_count,
            last_accessed=item.last_accessed,
            expires_at=item.expires_at,
            batch=item.batch_id,
            home=item.home_instance_id,
            trace=item.trace_parent,
            trace_state=item.trace_state,
            priority=item.priority_score,
        )
    )
    return b"%b%020d%03d%b%05d%b%b" % (ENVELOPE_MAGIC, item.stamp, len(state), state, len(header), header, item.content)


def to_text(item: SyncItem) -> bytes:
    """The original's JSON text of an item (docs/formats.md 1.4).

    A stamp or deadline follows at its end, where the original does not look and the scripts do.
    """
    text = orjson.dumps
    return b"".join(
        (
            b'{"object_id":%b,"version":%d,"updated_at":%d,"content_type":"%b"'
            % (text(item.object_id), item.version, item.updated_at, item.content_type.value.encode()),
            b"" if item.batch_id is None else b',"batch_id":' + text(item.batch_id),
            b',"trace_parent":%b,"trace_state":%b' % (text(item.trace_parent), text(item.trace_state)),
            b',"priority_score":%b,"content_hash":"%b"' % (text(item.priority_score), item.content_hash.encode()),
            b',"last_accessed":%d,"access_count":%d,"content":[' % (item.last_accessed, item.access_count),
            ",".join(map(str, item.content)).encode(),
            b'],"home_instance_id":%b,"state":%b' % (text(item.home_instance_id), _state(item.state)),
            b',"stamp":%d' % item.stamp if item.stamp else b"",
            b"" if item.expires_at is None else b',"expires_at":%d' % item.expires_at,
            b"}",
        )
    )


def read_document(object_id: str, document: bytes) -> Read:
    """The item in a RedisJSON document, ours or the original's (both generations); None for a foreign one."""
    told: _Document | None
    try:
        told = _decode_document(document)
    except msgspec.ValidationError:
        told = _lenient(document)
    except msgspec.DecodeError:
        return None
    if told is None or told.payload is _ABSENT or told.payload_hash is None or told.state is None:
        return None
    if told.timestamp is None or told.version is None:
        return None
    expected = told.payload_hash
    if told.id is not None and told.id != object_id:
        return Corruption(object_id, expected, "that of another id")
    content = bytes(told.payload) if told.raw is None else told.raw.encode()
    actual = hashlib.sha256(content).hexdigest()
    form = 2 if told.raw is None and told.id is not None else 1
    verified = actual == expected
    if not verified and told.raw is None:
        # The original hashed the caller's bytes and kept their meaning: the canonical text may be those bytes.
        content, form = _canonical(content)
        verified = hashlib.sha256(content).hexdigest() == expected
    if not verified and told.id is not None:
        return Corruption(object_id, expected, actual)
    audit = told.audit
    try:
        item = SyncItem(
            object_id,
            content,
            content_type=ContentType.JSON,
            version=told.version,
            updated_at=told.timestamp,
            state=told.state,
            access_count=told.access_count,
            last_accessed=told.last_accessed,
            stamp=told.stamp,
            expires_at=told.expires_at,
            _form=form,
            _hash=expected if verified else "",
        )
        if audit is not None:  # five more arguments cost every other item a third of its making
            item = item.replace(
                home_instance_id=audit.home,
                trace_parent=audit.trace,
                trace_state=audit.trace_state,
                batch_id=audit.batch,
                priority_score=float(audit.priority),
            )
    except (SyncEngineError, ValueError):
        return None  # beyond our limits: not an item of ours, nor one that the original's SQL could hold
    return item if verified else Unverified(item)


def read_string(object_id: str, value: bytes) -> Read:
    """The item in a Redis string, our envelope or the original's text; None for a foreign one."""
    if value.startswith(ENVELOPE_MAGIC):
        return _read_envelope(object_id, value)
    if value.lstrip(b" \t\r\n")[:1] in (b"{", b"["):
        return _read_text(object_id, value)
    return None


class _Audit(msgspec.Struct, frozen=True):
    batch: str | None = None
    home: str | None = None
    trace: str | None = None
    trace_state: str | None = None
    priority: float | str = 0.0


class _Written(msgspec.Struct, gc=False):
    """The document as it is written, keys in order: msgspec writes it in half the time of a bytes template."""

    access_count: int
    audit: msgspec.Raw | msgspec.UnsetType
    expires_at: int | msgspec.UnsetType
    id: str
    last_accessed: int
    payload: msgspec.Raw
    payload_hash: str
    raw: str | msgspec.UnsetType
    stamp: int
    state: str
    timestamp: int
    version: int


_ABSENT = msgspec.Raw()


class _Document(msgspec.Struct):
    payload: msgspec.Raw = _ABSENT
    payload_hash: str | None = None
    state: str | None = None
    timestamp: int | None = None
    version: int | None = None
    id: str | None = None
    stamp: int = 0
    raw: str | None = None
    audit: _Audit | None = None
    expires_at: int | None = None
    access_count: int = 0
    last_accessed: int = 0


class _Header(msgspec.Struct, omit_defaults=True):
    id: str
    hash: bytes
    version: int
    updated_at: int
    json: bool = False
    access_count: int = 0
    last_accessed: int = 0
    expires_at: int | None = None
    batch: str | None = None
    home: str | None = None
    trace: str | None = None
    trace_state: str | None = None
    priority: float = 0.0


class _Text(msgspec.Struct):
    object_id: str
    version: int
    updated_at: int
    priority_score: float
    last_accessed: int
    access_count: int
    content: msgspec.Raw
    content_type: ContentType = ContentType.BINARY
    content_hash: str | msgspec.UnsetType = msgspec.UNSET
    merkle_root: str | msgspec.UnsetType = msgspec.UNSET
    batch_id: str | None = None
    trace_parent: str | None = None
    trace_state: str | None = None
    home_instance_id: str | None = None
    state: str = "default"
    stamp: int = 0
    expires_at: int | None = None


_write_document = msgspec.json.Encoder().encode
_decode_document = msgspec.json.Decoder(_Document).decode
_decode_text = msgspec.json.Decoder(_Text).decode
_pack_header = msgspec.msgpack.Encoder().encode
_unpack_header = msgspec.msgpack.Decoder(_Header).decode

_POSITIONS = (
    "object_id",
    "version",
    "updated_at",
    "content_type",
    "batch_id",
    "trace_parent",
    "trace_state",
    "priority_score",
    "content_hash",
    "last_accessed",
    "access_count",
    "content",
    "home_instance_id",
    "state",
)
"""Declaration order of the original's item, for its positional form."""

# RedisJSON re-writes floats of more than 15 significant digits (13 % of those with 17 change) and those with an
# exponent. One C pass maps a text to digits `0`, marks `:` and letters, in which both show as fixed patterns; a
# regular expression on the text itself takes ten times as long. The same patterns inside a string cost only the
# space of `raw`.
_SHAPE = bytes.maketrans(b"123456789.+-,[]{}", b"000000000000:::::")
_LONG_NUMBER = b":" + b"0" * 17
_has_exponent = re.compile(rb"0e0{2,4}:").search


def _too_deep(content: bytes) -> bool:
    if content.count(b"[") + content.count(b"{") <= DOCUMENT_DEPTH_MAX:
        return False
    return not json_depth_within(content, orjson.loads(content), DOCUMENT_DEPTH_MAX)


def _floats_survive(content: bytes) -> bool:
    """Whether RedisJSON gives every float of this canonical text back as it is written."""
    if content[0] not in b'{["':
        content = b"[%b]" % content
    shape = content.translate(_SHAPE)
    # The canonical exponent has a sign, which hexadecimal digits in a string have not.
    if _has_exponent(shape) and (b"e-" in content or b"e+" in content):
        return False
    return _LONG_NUMBER not in shape or b"." not in content


def _audit(item: SyncItem) -> msgspec.Raw | msgspec.UnsetType:
    if (
        item.batch_id is None
        and item.home_instance_id is None
        and item.trace_parent is None
        and item.trace_state is None
        and item.priority_score == 0.0
    ):
        return msgspec.UNSET
    told: dict[str, Any] = {"batch": item.batch_id, "home": item.home_instance_id}
    if item.priority_score != 0.0:
        digits = orjson.dumps(item.priority_score)
        told["priority"] = item.priority_score if _floats_survive(digits) else digits.decode()
    told |= {"trace": item.trace_parent, "trace_state": item.trace_state}
    return msgspec.Raw(orjson.dumps({key: value for key, value in told.items() if value is not None}))


@lru_cache(maxsize=256)
def _state(state: str) -> bytes:
    return orjson.dumps(state)


def _canonical(content: bytes) -> tuple[bytes, int]:
    try:
        return canonical_json(orjson.loads(content))
    except (orjson.JSONDecodeError, SyncEngineError):
        return content, 1


def _lenient(document: bytes) -> _Document | None:
    """A document one of whose keys has another type than ours: that key counts as its default (docs/formats.md 2.3)."""
    try:
        raws = msgspec.json.decode(document, type=dict[str, msgspec.Raw])
    except msgspec.DecodeError:
        return None
    told: dict[str, Any] = {}
    for field in msgspec.structs.fields(_Document):
        if field.encode_name not in raws:
            continue
        try:
            told[field.name] = msgspec.json.decode(raws[field.encode_name], type=field.type)
        except msgspec.ValidationError:
            # The mandatory ones decide whether this is an item, so there a wrong type is not a default.
            if field.name in ("id", "raw", "stamp"):
                return None
            if field.name == "version":
                told["version"] = 1
            elif field.name == "timestamp":
                told["timestamp"] = 0
    return _Document(**told)


def _read_envelope(object_id: str, value: bytes) -> Read:
    try:
        stamp = int(value[2:22])
        state_end = 25 + int(value[22:25])
        header_end = state_end + 5 + int(value[state_end : state_end + 5])
        told = _unpack_header(value[state_end + 5 : header_end])
        content = value[header_end:]
        expected = told.hash.hex()
        if told.id != object_id:
            return Corruption(object_id, expected, "that of another id")
        actual = hashlib.sha256(content).hexdigest()
        if actual != expected:
            return Corruption(object_id, expected, actual)
        return SyncItem(
            object_id,
            content,
            content_type=ContentType.JSON if told.json else ContentType.BINARY,
            version=told.version,
            updated_at=told.updated_at,
            state=value[25:state_end].decode(),
            home_instance_id=told.home,
            trace_parent=told.trace,
            trace_state=told.trace_state,
            batch_id=told.batch,
            priority_score=told.priority,
            access_count=told.access_count,
            last_accessed=told.last_accessed,
            stamp=stamp,
            expires_at=told.expires_at,
            _form=1,
            _hash=expected,
        )
    except (ValueError, msgspec.DecodeError, SyncEngineError):
        # Only we write this magic, so what cannot be read behind it is damage and not somebody else's string.
        return Corruption(object_id, "", hashlib.sha256(value).hexdigest())


def _read_text(object_id: str, value: bytes) -> Read:
    try:
        told = _decode_text(value) if value.lstrip()[:1] == b"{" else _positional(value)
        if told.content_hash is not msgspec.UNSET and told.merkle_root is not msgspec.UNSET:
            return None
        expected = told.merkle_root if told.content_hash is msgspec.UNSET else told.content_hash
        if expected is msgspec.UNSET or told.version < 0:
            return None
        content = _content(told.content)
        actual = hashlib.sha256(content).hexdigest()
        if told.object_id != object_id:
            return Corruption(object_id, expected, "that of another id")
        if expected and actual != expected:
            return Corruption(object_id, expected, actual)
        item = SyncItem(
            object_id,
            content,
            content_type=told.content_type,
            version=told.version,
            updated_at=told.updated_at,
            state=told.state,
            home_instance_id=told.home_instance_id,
            trace_parent=told.trace_parent,
            trace_state=told.trace_state,
            batch_id=told.batch_id,
            priority_score=told.priority_score,
            access_count=told.access_count,
            last_accessed=told.last_accessed,
            stamp=told.stamp,
            expires_at=told.expires_at,
            _hash=actual,
        )
    except (ValueError, msgspec.DecodeError, SyncEngineError):
        return None
    return item if expected else Unverified(item)


def _content(told: msgspec.Raw) -> bytes:
    value = msgspec.json.decode(told, type=list[int] | str)
    return value.encode() if isinstance(value, str) else bytes(value)


def _positional(value: bytes) -> _Text:
    parts = msgspec.json.decode(value, type=list[msgspec.Raw])
    if len(parts) != len(_POSITIONS):
        raise ValueError("a positional item has 14 values")
    return _decode_text(
        b"{%b}" % b",".join(b'"%b":%b' % (n.encode(), p) for n, p in zip(_POSITIONS, parts, strict=True))
    )
