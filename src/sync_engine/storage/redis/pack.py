"""Operations as arguments of the apply script, chunk by chunk. Pure: values in, values out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal

from sync_engine.codec import to_document, to_envelope, to_text
from sync_engine.errors import StoreError
from sync_engine.item import ContentType, Op, SyncItem

__all__ = ["CHUNK_OPS_MAX", "BinaryFormat", "Chunk", "packed"]

CHUNK_OPS_MAX = 250
"""Operations per script call: 1-3 ms of the server, in which the next chunk is packed."""
CHUNK_BYTES_MAX = 4 * 1024 * 1024
VALUE_BYTES_MAX = 512 * 1024 * 1024 - 1
"""Where Redis closes the connection on a longer string (proto-max-bulk-len)."""

BinaryFormat = Literal["compact", "json"]

_OVER = {"J": "U", "S": "V"}

Group = tuple[str, str, str]
"""Kind, state and extra, as lua/apply.lua explains them."""


@dataclass(slots=True)
class Chunk:
    """One call: the ids in the order of ``keys``, and everything that follows the keys."""

    ids: list[str] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    args: list[bytes | str | int] = field(default_factory=list)
    writes: bool = False


def packed(
    ops: Iterable[Op],
    *,
    prefix: str,
    documents: bool,
    binary_format: BinaryFormat,
    only_in: str | None,
    refused: dict[str, StoreError],
) -> Iterator[Chunk]:
    """Chunks to be sent. What Redis could never take goes into ``refused`` instead.

    ``only_in`` limits deletes and restates to items in that state.
    """
    to_string = to_envelope if binary_format == "compact" else to_text
    groups: dict[Group, tuple[list[str], list[bytes | str | int]]] = {}
    count = size = 0
    for op in ops:
        item = op.item
        value = b""
        if item is not None and (op.kind == "restate" or (op.kind == "put" and op.redis)):
            if item.stamp != op.stamp:
                item = item.replace(stamp=op.stamp)
            kind, value = _value(item, documents, to_string)
            if len(value) > VALUE_BYTES_MAX:
                refused[op.object_id] = StoreError("l2", f"{len(value)} bytes as stored; at most {VALUE_BYTES_MAX}")
                continue
            if op.kind == "restate":
                # The truth told what it holds now: an older copy is replaced whole, since its content may be older too.
                group = (_OVER[kind], item.state, "")
            else:
                deadline = op.redis_expires_at
                group = (kind.lower() if op.fill else kind, item.state, "" if deadline is None else str(deadline))
        elif op.kind == "restate":
            group = ("R", op.state or "", only_in or "")
        else:
            group = ("D", only_in or "", "")  # a put that Redis does not keep loses its older copy there
        if count == CHUNK_OPS_MAX or (size + len(value) > CHUNK_BYTES_MAX and count):
            yield _chunk(groups, prefix)
            groups, count, size = {}, 0, 0
        members = groups.get(group)
        if members is None:
            members = groups[group] = ([], [])
        ids, args = members
        ids.append(op.object_id)
        args.append(op.stamp)
        if value:
            args.append(value)
        count += 1
        size += len(value)
    if count:
        yield _chunk(groups, prefix)


def _value(item: SyncItem, documents: bool, to_string: Callable[[SyncItem], bytes]) -> tuple[str, bytes]:
    if documents and item.content_type is ContentType.JSON:
        document = to_document(item)
        if document is not None:
            return "J", document
    return "S", to_string(item)


def _chunk(groups: dict[Group, tuple[list[str], list[bytes | str | int]]], prefix: str) -> Chunk:
    chunk = Chunk()
    for (kind, state, extra), (ids, args) in groups.items():
        chunk.ids += ids
        chunk.args += (kind, state, extra, len(ids))
        chunk.args += args
        chunk.writes = chunk.writes or kind not in "DR"
    chunk.keys = [prefix + object_id for object_id in chunk.ids] if prefix else chunk.ids
    return chunk
