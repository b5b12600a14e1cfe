"""Operations as arguments of the apply script, chunk by chunk. Pure: values in, values out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from sync_engine.codec import to_document, to_envelope, to_text
from sync_engine.errors import StoreError
from sync_engine.item import ContentType, Op, SyncItem

__all__ = ["CHUNK_OPS_MAX", "BinaryFormat", "Chunk", "packed", "packed_evictions", "packed_stale"]

CHUNK_OPS_MAX = 250
"""Operations per script call: 1-3 ms of the server, in which the next chunk is packed."""
CHUNK_BYTES_MAX = 4 * 1024 * 1024
VALUE_BYTES_MAX = 512 * 1024 * 1024 - 1
"""Where Redis closes the connection on a longer string (proto-max-bulk-len)."""

BinaryFormat = Literal["compact", "json"]

_OVER = {"J": "U", "S": "V"}

Group = tuple[str, str, str]
"""Kind, state and extra, as lua/apply.lua explains them."""
Args = list[bytes | str | int]
Tell = Callable[[Op], list[bytes]]
"""The fields of an operation's entry in the change stream; none where there is nothing to tell."""


@dataclass(slots=True)
class Chunk:
    """One call: the ids in the order of ``keys``, and everything from the number of groups on."""

    ids: list[str] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    args: Args = field(default_factory=list)
    writes: bool = False


def packed(
    ops: Iterable[Op],
    *,
    prefix: str,
    documents: bool,
    binary_format: BinaryFormat,
    only_in: str | None,
    refused: dict[str, StoreError],
    listed: bool = False,
    tell: Tell | None = None,
) -> Iterator[Chunk]:
    """Chunks to be sent. What Redis could never take goes into ``refused`` instead.

    What frees memory comes first, in chunks of its own, which a full Redis takes too: else the deletes of a batch
    would wait for room that its writes do not find.

    ``only_in`` limits deletes and restates to items in that state. ``listed``: an index told the ids of the deletes,
    which may be wrong about them. ``tell``: what the change stream shall say of each.
    """
    to_string = to_envelope if binary_format == "compact" else to_text
    deletes = ("D", only_in or "", "1" if listed else "")
    groups: dict[Group, tuple[list[str], Args, Args]] = {}
    count = size = 0
    writing = False
    for op in sorted(ops, key=_writes):
        item = op.item
        value = b""
        if item is not None and op.redis:
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
        elif op.kind == "restate" and item is None:
            group = ("R", op.state or "", only_in or "")
        else:
            group = deletes  # an item that Redis does not keep loses its older copy there
        weight = len(value)
        entry: list[bytes] = []
        if tell is not None:
            entry = tell(op)
            weight += sum(map(len, entry))
        if count == CHUNK_OPS_MAX or (count and (size + weight > CHUNK_BYTES_MAX or writing != _writes(op))):
            yield _chunk(groups, prefix)
            groups, count, size = {}, 0, 0
        writing = _writes(op)
        members = groups.get(group)
        if members is None:
            members = groups[group] = ([], [], [])
        ids, args, told = members
        ids.append(op.object_id)
        args.append(op.stamp)
        if value:
            args.append(value)
        if tell is not None:
            told.append(len(entry))
            told += entry
        count += 1
        size += weight
    if count:
        yield _chunk(groups, prefix)


def packed_evictions(pairs: Sequence[tuple[str, int]], prefix: str, *, bury: bool) -> Iterator[Chunk]:
    """Chunks that take out the copies of these ids that have exactly these stamps. ``bury``: older ones stay out."""
    for start in range(0, len(pairs), CHUNK_OPS_MAX):
        part = pairs[start : start + CHUNK_OPS_MAX]
        yield _chunk(
            {("E", "", "1" if bury else ""): ([object_id for object_id, _ in part], [stamp for _, stamp in part], [])},
            prefix,
        )


def packed_stale(ids: Sequence[str], state: str, prefix: str) -> Iterator[Chunk]:
    """Chunks that take entries of these ids out of the indexes, and of the state if one is given, if they are wrong."""
    for start in range(0, len(ids), CHUNK_OPS_MAX):
        yield _chunk({("F", state, ""): (list(ids[start : start + CHUNK_OPS_MAX]), [], [])}, prefix)


def _writes(op: Op) -> bool:
    return op.item is not None and op.redis


def _value(item: SyncItem, documents: bool, to_string: Callable[[SyncItem], bytes]) -> tuple[str, bytes]:
    if documents and item.content_type is ContentType.JSON:
        document = to_document(item)
        if document is not None:
            return "J", document
    return "S", to_string(item)


def _chunk(groups: dict[Group, tuple[list[str], Args, Args]], prefix: str) -> Chunk:
    chunk = Chunk(args=[len(groups)])
    for (kind, state, extra), (ids, args, _) in groups.items():
        chunk.ids += ids
        chunk.args += (kind, state, extra, len(ids))
        chunk.args += args
        chunk.writes = chunk.writes or kind not in "DREF"
    for _, _, told in groups.values():
        chunk.args += told
    chunk.keys = [prefix + object_id for object_id in chunk.ids] if prefix else chunk.ids
    return chunk
