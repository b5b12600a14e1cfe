"""Bytes of the log: operations, settled marks, record frames and segment headers.

Pure functions over bytes; no file is touched here. The layout is told in docs/log.md.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, NamedTuple
from zlib import crc32

import msgspec

from sync_engine.errors import ConfigError, InvalidItem
from sync_engine.item import ContentType, Op, OpKind, SyncItem

__all__ = [
    "FRAME_BYTES",
    "HEADER_BYTES",
    "BadRecord",
    "Frame",
    "Header",
    "decode_op",
    "decode_settled",
    "encode_op",
    "encode_settled",
    "frame",
    "is_settled_mark",
    "read_frame",
]

SECTOR_BYTES = 512
HEADER_BYTES = 2 * SECTOR_BYTES
"""Two copies of the header, a sector each: one damaged sector loses nothing."""
FRAME_BYTES = 16
"""CRC-32 (4), payload length (4), sequence number (8), little endian; the payload follows."""
RANGES_PER_MARK_MAX = 4_096

_MAGIC = b"syncelog"
_FORMAT = 1
_HEADER = struct.Struct("<8sQQQQQQ")
_TAIL = struct.Struct("<IQ")
_FRAME = struct.Struct("<IIQ")
_U32 = struct.Struct("<I")
_SPREAD = 0x9E3779B1

_KINDS: tuple[OpKind, ...] = ("put", "delete", "restate")
_KIND_CODES = {kind: code for code, kind in enumerate(_KINDS)}
_TYPES = (ContentType.JSON, ContentType.BINARY)
_REDIS, _SQL, _FILL, _BINARY, _ONLY_IN = 1, 2, 4, 8, 16
_MAP_OF_ONE = 0x81  # a mark is a msgpack map, an operation a msgpack array: the first byte tells them apart

_encode = msgspec.msgpack.Encoder().encode


class BadRecord(ValueError):
    """A record with a right checksum whose payload is not what this version writes."""


class Frame(NamedTuple):
    """One record in a segment: its number, and its payload's place."""

    seq: int
    start: int
    length: int

    @property
    def end(self) -> int:
        return self.start + self.length


@dataclass(frozen=True, slots=True)
class Header:
    """What a segment says of itself, rewritten with every group.

    Records up to byte ``durable_upto`` may have been acknowledged; ``last_seq`` is the last of them.
    ``previous_seq`` is the last acknowledged record before this segment. ``last_stamp`` is the
    greatest stamp the log has ever held.
    """

    first_seq: int
    previous_seq: int
    durable_upto: int = HEADER_BYTES
    last_seq: int = 0
    last_stamp: int = 0

    def grown(self, durable_upto: int, last_seq: int, last_stamp: int) -> Header:
        """The header after another group."""
        return replace(self, durable_upto=durable_upto, last_seq=last_seq, last_stamp=last_stamp)

    def encode(self) -> bytes:
        """Both copies; the checksum covers every byte of a sector, so no byte can change unnoticed."""
        facts = _HEADER.pack(
            _MAGIC, _FORMAT, self.first_seq, self.previous_seq, self.durable_upto, self.last_seq, self.last_stamp
        ).ljust(SECTOR_BYTES - 4, b"\0")
        return (facts + _U32.pack(crc32(facts))) * 2

    @classmethod
    def decode(cls, sector: bytes) -> Header | None:
        """The header in one sector; None where it is damaged. Raises ``ConfigError`` for a format from the future."""
        facts = sector[:-4]
        if len(sector) != SECTOR_BYTES or _U32.unpack(sector[-4:])[0] != crc32(facts):
            return None
        magic, version, *numbers = _HEADER.unpack_from(facts)
        if magic != _MAGIC:
            return None
        if version != _FORMAT:
            raise ConfigError(f"the log has format {version}; this version of sync-engine reads format {_FORMAT}")
        return cls(*numbers)


class _Entry(msgspec.Struct, array_like=True, gc=False):
    """An operation as a msgpack array; one without an item ends after ``if_version``."""

    kind: Annotated[int, msgspec.Meta(ge=0)]
    object_id: str
    stamp: int
    flags: int
    state: str | None
    redis_expires_at: int | None
    if_version: int | None
    content: bytes | None = None
    form: int = 0
    version: int = 1
    updated_at: int = 0
    item_state: str = "default"
    home_instance_id: str | None = None
    trace_parent: str | None = None
    trace_state: str | None = None
    batch_id: str | None = None
    priority_score: float = 0.0
    access_count: int = 0
    last_accessed: int = 0
    expires_at: int | None = None


_decode_entry = msgspec.msgpack.Decoder(_Entry).decode
_decode_settled = msgspec.msgpack.Decoder(dict[str, list[int]]).decode


def encode_op(op: Op) -> bytes:
    """Payload of an operation. The item's stamp is the operation's and is kept once."""
    flags = (_REDIS if op.redis else 0) | (_SQL if op.sql else 0) | (_FILL if op.fill else 0)
    state = op.state
    if op.only_in_state is not None:
        flags, state = flags | _ONLY_IN, op.only_in_state
    item = op.item
    if item is None:
        return _encode((_KIND_CODES[op.kind], op.object_id, op.stamp, flags, state, op.redis_expires_at, op.if_version))
    if item.content_type is ContentType.BINARY:
        flags |= _BINARY
    return _encode(
        (
            _KIND_CODES[op.kind],
            op.object_id,
            op.stamp,
            flags,
            state,
            op.redis_expires_at,
            op.if_version,
            item.content,
            item._form,
            item.version,
            item.updated_at,
            item.state,
            item.home_instance_id,
            item.trace_parent,
            item.trace_state,
            item.batch_id,
            item.priority_score,
            item.access_count,
            item.last_accessed,
            item.expires_at,
        )
    )


def decode_op(payload: bytes | memoryview) -> Op:
    """The operation of a payload. Raises ``BadRecord``."""
    try:
        entry = _decode_entry(payload)
        conditional = bool(entry.flags & _ONLY_IN)
        return Op(
            kind=_KINDS[entry.kind],
            object_id=entry.object_id,
            stamp=entry.stamp,
            item=None if entry.content is None else _item(entry, entry.content),
            state=entry.state if not conditional else None,
            only_in_state=entry.state if conditional else None,
            redis=bool(entry.flags & _REDIS),
            sql=bool(entry.flags & _SQL),
            redis_expires_at=entry.redis_expires_at,
            if_version=entry.if_version,
            fill=bool(entry.flags & _FILL),
        )
    except (msgspec.DecodeError, InvalidItem, IndexError) as bad:
        raise BadRecord(str(bad)) from bad


def _item(entry: _Entry, content: bytes) -> SyncItem:
    binary = bool(entry.flags & _BINARY)
    return SyncItem(
        entry.object_id,
        content,
        content_type=_TYPES[binary],
        version=entry.version,
        updated_at=entry.updated_at,
        state=entry.item_state,
        home_instance_id=entry.home_instance_id,
        trace_parent=entry.trace_parent,
        trace_state=entry.trace_state,
        batch_id=entry.batch_id,
        priority_score=entry.priority_score,
        access_count=entry.access_count,
        last_accessed=entry.last_accessed,
        stamp=entry.stamp,
        expires_at=entry.expires_at,
        sql_only=not entry.flags & _REDIS,  # or a read of the recovered row would copy it into Redis
        # What was logged as JSON had been parsed before: form 1 spares recovery a second parse.
        _form=entry.form if binary else entry.form or 1,
    )


def encode_settled(seqs: Iterable[int]) -> Iterator[bytes]:
    """Payloads of marks that say these records are settled, as ranges: first, count, first, count, …"""
    flat: list[int] = []
    for first, count in _ranges(sorted(seqs)):
        flat += (first, count)
        if len(flat) >= 2 * RANGES_PER_MARK_MAX:
            yield _encode({"settled": flat})
            flat = []
    if flat:
        yield _encode({"settled": flat})


def _ranges(seqs: Sequence[int]) -> Iterator[tuple[int, int]]:
    start = 0
    for end in range(1, len(seqs) + 1):
        if end == len(seqs) or seqs[end] != seqs[end - 1] + 1:
            yield seqs[start], end - start
            start = end


def is_settled_mark(payload: bytes | memoryview) -> bool:
    """Whether the payload is a mark; otherwise it is an operation."""
    return payload[0] == _MAP_OF_ONE


def decode_settled(payload: bytes | memoryview) -> list[range]:
    """The record numbers a mark names. Raises ``BadRecord``."""
    try:
        flat = _decode_settled(payload)["settled"]
        return [range(first, first + count) for first, count in zip(flat[::2], flat[1::2], strict=True)]
    except (msgspec.DecodeError, KeyError, ValueError) as bad:
        raise BadRecord(str(bad)) from bad


def frame(payload: bytes, seq: int, first_seq: int, offset: int) -> tuple[bytes, bytes, bytes]:
    """The record to be written at ``offset`` of the segment that begins with ``first_seq``, in pieces."""
    tail = _TAIL.pack(len(payload), seq)
    return _U32.pack(crc32(payload, crc32(tail, _seed(first_seq, offset)))), tail, payload


def read_frame(data: memoryview, offset: int, first_seq: int, base: int = 0) -> Frame | None:
    """The record at ``offset`` of ``data``, None where there is no whole and right one.

    ``base`` is where ``data`` begins in the segment; the frame's ``start`` counts within ``data``.
    """
    start = offset + FRAME_BYTES
    if start >= len(data):
        return None
    checksum, length, seq = _FRAME.unpack_from(data, offset)
    if not 0 < length <= len(data) - start:
        return None
    found = crc32(data[start : start + length], crc32(data[offset + 4 : start], _seed(first_seq, base + offset)))
    return Frame(seq, start, length) if found == checksum else None


def _seed(first_seq: int, offset: int) -> int:
    # A checksum that knows its place: a log kept as content inside a log never looks like a record of it.
    return (first_seq * _SPREAD + offset) & 0xFFFFFFFF
