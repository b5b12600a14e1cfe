"""The change stream in Redis: entries appended in atomic steps, and read from any place, with what is missing told.

What the store applies is told by the apply script in the same step; here is the rest: entries of a caller's own,
the cluster's second step, and the reader. docs/formats.md 2.6 has the format and what is promised.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from sync_engine.errors import ConfigError, InvalidItem
from sync_engine.item import Op
from sync_engine.storage.redis.cdc_entry import BadEntry, CdcEntry, CorruptEntry, Gap, MalformedEntry
from sync_engine.storage.redis.cdc_fields import CONTENT_BYTES_MAX, fields_of, fields_of_op
from sync_engine.storage.redis.cdc_reader import CdcReader
from sync_engine.storage.redis.scripts import CDC
from sync_engine.storage.redis.shards import Arg, Servers

__all__ = [
    "BadEntry",
    "CdcEntry",
    "CdcLog",
    "CdcReader",
    "ChangeStream",
    "CorruptEntry",
    "Gap",
    "MalformedEntry",
]

CHUNK_ENTRIES_MAX = 250
CHUNK_BYTES_MAX = 4 * 1024 * 1024
_POSITION = re.compile(r"\d{1,20}(-\d{1,20})?").fullmatch


@dataclass(frozen=True, slots=True)
class ChangeStream:
    """Where changes are told: by whom, under which key, and about how many entries are kept.

    ``writer`` names the origin and numbers its entries; writers that share a name share the numbering. ``key`` is the
    whole key of the stream, by default ``{prefix}__local__:cdc``.
    """

    writer: str
    key: str | None = None
    maxlen: int = 100_000

    def __post_init__(self) -> None:
        if (
            not isinstance(self.writer, str)
            or not 1 <= len(self.writer) <= 255
            or "\0" in self.writer
            or not _is_text(self.writer)
        ):
            raise ConfigError(f"change stream: writer {self.writer!r} must be 1 to 255 characters without NUL")
        if type(self.maxlen) is not int or self.maxlen < 1:
            raise ConfigError(f"cdc_stream_maxlen: {self.maxlen!r} must be an integer of at least 1")

    def keys(self, servers: Servers) -> tuple[str, str]:
        """The stream, and the hash of its writers' last numbers, in the slot of the first shard.

        Raises ``ConfigError`` for a key that an item could have, since the two would lock each other out.
        """
        prefix = servers.shards[0].prefix
        numbers = f"{prefix}__local__:cdc:seq"
        key = self.key
        if key is None:
            return f"{prefix}__local__:cdc", numbers
        ours = key.startswith(prefix) if _is_text(key) else True
        if ours and key != prefix + "cdc" and not str(key).startswith(prefix + "__local__:cdc"):
            rule = f"must be {prefix + 'cdc'!r}, or begin with {prefix + '__local__:cdc'!r} or with another prefix"
            raise ConfigError(f"cdc_stream_key: {key!r} {rule}")
        if not ours and not servers.single:
            raise ConfigError(f"cdc_stream_key: {key!r} must begin with {prefix!r} on a cluster, to share its slot")
        return key, f"{numbers}:{key}"


class CdcLog:
    """The change stream of a store."""

    def __init__(self, servers: Servers, prefix: str, stream: ChangeStream | None = None) -> None:
        self._servers = servers
        self._stream = stream or ChangeStream("sync-engine")
        self._keys = self._stream.keys(servers)

    @property
    def key(self) -> str:
        """The stream's key."""
        return self._keys[0]

    async def xadd_cdc(self, entry: CdcEntry, maxlen: int | None = None) -> str:
        """Append one entry and trim the stream to about ``maxlen`` (default: as configured); the entry's id.

        Raises ``InvalidItem``. After ``TierUnavailable`` nobody knows whether it was appended: it is not sent again
        by itself, and who does so may tell the change twice.
        """
        return (await self.xadd_cdc_batch((entry,), maxlen))[0]

    async def xadd_cdc_batch(self, entries: Iterable[CdcEntry], maxlen: int | None = None) -> list[str]:
        """Append entries in order, in atomic steps of up to 250 and 4 MiB; their ids. Raises as ``xadd_cdc``."""
        keep = self._stream.maxlen if maxlen is None else maxlen
        if type(keep) is not int or keep < 1:
            raise InvalidItem("maxlen", repr(maxlen), "must be an integer of at least 1")
        return await self._append([fields_of(entry) for entry in entries], keep)

    async def append(self, ops: Iterable[Op]) -> None:
        """Tell of operations that were applied, in a step of its own: for servers that do not share the items' slot."""
        await self._append(filter(None, map(fields_of_op, ops)), self._stream.maxlen)

    def iter_cdc(
        self,
        from_id: str = "0",
        block_ms: int | None = None,
        count: int = 500,
        *,
        seen: Mapping[str, int] | None = None,
        content_bytes_max: int = CONTENT_BYTES_MAX,
    ) -> CdcReader:
        """A reader of the entries after ``from_id`` (``"0"``: all; ``"$"``: only new ones), see ``CdcReader``.

        At the end of the stream it ends (``block_ms=None``), or waits that long for more before it ends (0: for
        ever). ``count`` bounds the entries per round trip. ``seen``: ``reader.seen`` of the reader to be continued.
        """
        if from_id != "$" and not (isinstance(from_id, str) and _POSITION(from_id)):
            raise InvalidItem("from_id", repr(from_id), "must be the id of an entry, '0' or '$'")
        if block_ms is not None and (type(block_ms) is not int or block_ms < 0):
            raise InvalidItem("block_ms", repr(block_ms), "must be None or an integer of at least 0")
        for name, value in (("count", count), ("content_bytes_max", content_bytes_max)):
            if type(value) is not int or value < 1:
                raise InvalidItem(name, repr(value), "must be an integer of at least 1")
        return CdcReader(self._servers, self.key, from_id, block_ms, count, seen, content_bytes_max)

    async def _append(self, told: Iterable[list[bytes]], maxlen: int) -> list[str]:
        ids: list[str] = []
        # One chunk after the other: their order is the order of the stream.
        for args in _chunks(told):
            answer = await self._servers.run(
                self._servers.shards[0], CDC, self._keys, (self._stream.writer, maxlen, *args)
            )
            ids += (entry_id.decode() for entry_id in answer)
        return ids


def _chunks(told: Iterable[list[bytes]]) -> Iterator[list[Arg]]:
    args: list[Arg] = []
    count = size = 0
    for fields in told:
        weight = sum(map(len, fields))
        if count and (count == CHUNK_ENTRIES_MAX or size + weight > CHUNK_BYTES_MAX):
            yield args
            args, count, size = [], 0, 0
        args.append(len(fields))
        args += fields
        count += 1
        size += weight
    if count:
        yield args


def _is_text(text: object) -> bool:
    if not isinstance(text, str) or not text or "\0" in text:
        return False
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
