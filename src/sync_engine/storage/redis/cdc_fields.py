"""The fields of a change-stream entry as Redis keeps them, ours and the original's. Pure: values in, values out.

docs/formats.md 2.6 has the format. Reading is bounded: a frame of a few bytes that stands for gigabytes is refused
before they are made.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Sequence

import msgspec
import orjson
import zstandard

from sync_engine.errors import InvalidItem, PayloadTooLarge
from sync_engine.item import INT64_MAX, ContentType, Op, SyncItem, check_id, check_state
from sync_engine.storage.redis.cdc_entry import CdcEntry, CorruptEntry, MalformedEntry

__all__ = ["CONTENT_BYTES_MAX", "decode", "fields_of", "fields_of_op", "numbered"]

COMPRESSED_BYTES_MIN = 64
"""Shorter content is stored as it is, as the original does."""
COMPRESSION_LEVEL = 3
CONTENT_BYTES_MAX = 512 * 1024 * 1024
"""What a reader decompresses at most: no item in Redis can be larger."""

ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
_AT_ONCE_BYTES_MAX = 1024 * 1024
_EXPANSION_MAX = 32 * 1024
"""Four bytes of a frame stand for 128 KiB at most, the most that a block can hold."""


def fields_of(entry: CdcEntry) -> list[bytes]:
    """Names and values, flat, in their order; ``writer`` and ``seq`` are added where they are known, in the script.

    Raises ``InvalidItem``: nothing is written that a reader would refuse.
    """
    if entry.op == "PUT":
        item = entry.item()
        if entry.content_hash not in ("", item.content_hash):
            raise InvalidItem("content_hash", repr(entry.content_hash), "must be the SHA-256 of content, or empty")
        fields = _put(item, item.stamp, item.expires_at)
        if len(fields[7]) >= CONTENT_BYTES_MAX:
            raise PayloadTooLarge("content", f"{len(fields[7])} bytes as stored", f"at most {CONTENT_BYTES_MAX - 1}")
        return fields
    if entry.op != "DEL":
        raise InvalidItem("op", repr(entry.op), "must be 'PUT' or 'DEL'")
    if type(entry.stamp) is not int or not 0 <= entry.stamp <= INT64_MAX:
        raise InvalidItem("stamp", repr(entry.stamp), "must be an integer from 0 to 2^63-1")
    return _delete(check_id(entry.object_id), entry.stamp)


def fields_of_op(op: Op) -> list[bytes]:
    """``fields_of`` for an operation that Redis applied; empty where there is nothing to tell.

    That is a fill, which changes nothing, and a restate without its item, whose content is not known here.
    """
    if op.kind == "delete":
        return _delete(op.object_id, op.stamp)
    item = op.item
    if item is None or op.fill:
        return []
    expires_at = item.expires_at
    if expires_at is None and not op.sql:
        expires_at = op.redis_expires_at  # what Redis alone holds lives as long as its copy
    return _put(item, op.stamp, expires_at)


def decode(position: str, fields: Sequence[bytes | str], *, content_bytes_max: int = CONTENT_BYTES_MAX) -> CdcEntry:
    """The entry in these fields (names and values, flat), verified. Raises ``MalformedEntry`` or ``CorruptEntry``."""
    told = _Fields(position, fields)
    object_id = told.text("key")
    if not object_id:
        raise MalformedEntry(position, "key", "is empty")
    stamp = told.count("stamp", 0)
    writer, seq = told.text("writer", ""), told.count("seq", 0)
    op = told.value("op")
    if op == b"DEL":
        return CdcEntry("DEL", object_id, stamp=stamp, writer=writer, seq=seq, position=position)
    if op != b"PUT":
        raise MalformedEntry(position, "op", "is neither PUT nor DEL")
    expected = told.text("hash")
    content, actual = told.content(expected, content_bytes_max)
    if expected not in ("", actual):
        raise CorruptEntry(position, object_id, expected, actual)
    try:
        meta = _decode_meta(told.value("meta"))
    except msgspec.DecodeError as bad:
        raise MalformedEntry(position, "meta", f"cannot be read: {bad}") from None
    state = told.text("state", "default")
    try:
        check_state(state)
    except InvalidItem as bad:
        raise MalformedEntry(position, "state", bad.rule) from None
    return CdcEntry(
        "PUT",
        object_id,
        content,
        expected,
        meta.content_type,
        meta.version,
        meta.updated_at,
        meta.trace_parent,
        state,
        told.text("home", "") or None,
        stamp,
        told.integer("expires_at") if told.has("expires_at") else None,
        writer,
        seq,
        position,
    )


def numbered(fields: Sequence[bytes | str]) -> tuple[str, int]:
    """Writer and number of an entry, however bad the rest of it is; ``("", 0)`` where it has none."""
    try:
        told = _Fields("", fields)
        return told.text("writer", ""), told.count("seq", 0)
    except MalformedEntry:
        return "", 0


class _Meta(msgspec.Struct):
    content_type: ContentType
    version: int
    updated_at: int
    trace_parent: str | None = None


_decode_meta = msgspec.json.Decoder(_Meta).decode


class _OfThread(threading.local):
    """Compressors are not to be shared between threads, and cost more to make than to use."""

    def __init__(self) -> None:
        self.compress = zstandard.ZstdCompressor(level=COMPRESSION_LEVEL).compress
        self.decompress = zstandard.ZstdDecompressor().decompress


_of_thread = _OfThread()


def _delete(object_id: str, stamp: int) -> list[bytes]:
    return [b"op", b"DEL", b"key", object_id.encode(), b"stamp", b"%d" % stamp]


def _put(item: SyncItem, stamp: int, expires_at: int | None) -> list[bytes]:
    content = data = item.content
    enc = b"raw"
    if len(content) >= COMPRESSED_BYTES_MIN or content.startswith(ZSTD_MAGIC):
        frame = _of_thread.compress(content)
        # Old readers decompress whatever begins with the magic: one more frame gives them what they should have.
        if len(frame) < len(content) or content.startswith(ZSTD_MAGIC):
            data, enc = frame, b"zstd"
    trace = item.trace_parent
    fields = [
        b"op",
        b"PUT",
        b"key",
        item.object_id.encode(),
        b"hash",
        item.content_hash.encode(),
        b"data",
        data,
        b"meta",
        b'{"content_type":"%b","version":%d,"updated_at":%d%b}'
        % (
            b"json" if item.content_type is ContentType.JSON else b"binary",
            item.version,
            item.updated_at,
            b"" if trace is None else b',"trace_parent":' + orjson.dumps(trace),
        ),
        b"state",
        item.state.encode(),
    ]
    if item.home_instance_id:
        fields += (b"home", item.home_instance_id.encode())
    fields += (b"enc", enc, b"stamp", b"%d" % stamp)
    if expires_at is not None:
        fields += (b"expires_at", b"%d" % expires_at)
    return fields


class _Fields:
    """The fields of one entry, read by name; unknown ones are ignored."""

    __slots__ = ("_position", "_told")

    def __init__(self, position: str, fields: Sequence[bytes | str]) -> None:
        self._position = position
        if len(fields) % 2:
            raise MalformedEntry(position, "fields", "are not pairs of names and values")
        values = iter(fields)
        self._told: dict[bytes, bytes] = {}
        for name in values:
            # The first of several, as a reader that looks for a name would find it.
            self._told.setdefault(_bytes(name), _bytes(next(values)))

    def has(self, name: str) -> bool:
        return name.encode() in self._told

    def value(self, name: str) -> bytes:
        try:
            return self._told[name.encode()]
        except KeyError:
            raise MalformedEntry(self._position, name, "is missing") from None

    def text(self, name: str, default: str | None = None) -> str:
        if default is not None and not self.has(name):
            return default
        try:
            return self.value(name).decode()
        except UnicodeDecodeError:
            raise MalformedEntry(self._position, name, "is not UTF-8 text") from None

    def integer(self, name: str) -> int:
        value = self.value(name)
        digits = value.removeprefix(b"-")
        # Not all that int() takes is a number here: it allows underscores and spaces.
        if not (digits.isdigit() and len(digits) <= 19 and int(digits) <= INT64_MAX):
            raise MalformedEntry(self._position, name, "is not an integer of 64 bits")
        return int(value)

    def count(self, name: str, default: int) -> int:
        if not self.has(name):
            return default
        number = self.integer(name)
        if number < 0:
            raise MalformedEntry(self._position, name, "is negative")
        return number

    def content(self, expected: str, bytes_max: int) -> tuple[bytes, str]:
        """The content and its SHA-256."""
        data = self.value("data")
        enc = self.value("enc") if self.has("enc") else None
        if enc not in (None, b"raw", b"zstd"):
            raise MalformedEntry(self._position, "enc", "is neither raw nor zstd")
        if enc is None and data.startswith(ZSTD_MAGIC):
            # The original compresses without saying so, and leaves alone what looks compressed. The hash tells which.
            actual = hashlib.sha256(data).hexdigest()
            if actual == expected:
                return data, actual
            enc = b"zstd"
        content = self._decompressed(data, bytes_max) if enc == b"zstd" else data
        return content, hashlib.sha256(content).hexdigest()

    def _decompressed(self, frame: bytes, bytes_max: int) -> bytes:
        too_large = MalformedEntry(self._position, "data", f"decompresses to more than {bytes_max} bytes")
        try:
            told = zstandard.frame_content_size(frame)
            if told > bytes_max:
                raise too_large
            if 0 < told <= _AT_ONCE_BYTES_MAX:
                return _of_thread.decompress(frame, allow_extra_data=False)
            # The size is not told, or may be a lie: memory is taken only for what has come out.
            work = zstandard.ZstdDecompressor().decompressobj()
            pieces, size, at = [], 0, 0
            step = max(64, bytes_max // _EXPANSION_MAX // 8)
            while at < len(frame) and not work.eof:
                pieces.append(work.decompress(frame[at : at + step]))
                at += step
                size += len(pieces[-1])
                if size > bytes_max:
                    raise too_large
            if not work.eof or work.unused_data or at < len(frame):
                raise MalformedEntry(self._position, "data", "is not one whole zstd frame")
        except zstandard.ZstdError as bad:
            raise MalformedEntry(self._position, "data", f"is not a zstd frame: {bad}") from None
        return b"".join(pieces)


def _bytes(value: bytes | str) -> bytes:
    return value if isinstance(value, bytes) else value.encode()
