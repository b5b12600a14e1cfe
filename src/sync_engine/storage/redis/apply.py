"""Operations to Redis: packed by shard into script calls, a few in flight, their outcomes put together."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar, cast

from sync_engine.errors import InvalidItem, StoreError, SyncEngineError
from sync_engine.item import Op
from sync_engine.owned import outlasting
from sync_engine.ports import Applied
from sync_engine.storage.redis.cdc import CdcLog, ChangeStream
from sync_engine.storage.redis.cdc_fields import fields_of_op
from sync_engine.storage.redis.pack import BinaryFormat, Chunk, packed, packed_evictions, packed_stale
from sync_engine.storage.redis.scripts import APPLY, APPLY_AT_OOM
from sync_engine.storage.redis.shards import Arg, Servers, Shard

__all__ = ["Writer"]

TOMBSTONE_MS = 300_000
"""How long a delete keeps older writes out: far above the time that a flush or a read can be late."""

CHUNKS_IN_FLIGHT_MAX = 3
"""Per server: one is being applied and one is waiting there while the next is being packed."""

NO_STREAM = ("", "", "", 0)

T = TypeVar("T")

Outcomes = list[tuple[str, bytes]]
"""The exceptions: an id and what the script says of it."""

PACKING_S = 0.001
"""How long others on the event loop wait while chunks are packed; a full chunk takes longer."""


class Writer:
    """The one way to change what Redis holds."""

    def __init__(
        self,
        servers: Servers,
        binary_format: BinaryFormat,
        stream: ChangeStream | None = None,
        log: CdcLog | None = None,
    ) -> None:
        """``stream``: tell of what is applied, in the same step; on a cluster right after it, through ``log``."""
        self._servers = servers
        self._binary_format = binary_format
        self._stream: tuple[Arg, ...] | None = None
        self._log: CdcLog | None = None
        if stream is not None and servers.single:
            self._stream = (*stream.keys(servers), stream.writer, stream.maxlen)
        elif stream is not None:
            self._log = log

    async def apply(self, ops: Sequence[Op]) -> Applied:
        """``RedisStore.apply``."""
        told, refused = await self._send_ops(ops, None)
        kinds = {op.object_id: op.kind for op in ops} if told else {}
        superseded, existed = set[str](), set[str]()
        for object_id, outcome in told:
            if outcome == b"superseded":
                superseded.add(object_id)
            elif outcome != b"done":
                refused[object_id] = StoreError("l2", outcome.decode(errors="replace"))
            elif kinds[object_id] == "delete":
                existed.add(object_id)
        return Applied(
            superseded=frozenset(superseded),
            refused=cast(Mapping[str, SyncEngineError], refused),
            existed=frozenset(existed),
        )

    async def change(self, ops: Sequence[Op], state: str | None, *, listed: bool = False) -> int:
        """Apply deletes or restates, to items in that state only if one is given; how many of them it changed.

        ``listed``: an index told the ids; those that are no items are not refused but taken out of it.
        """
        told, refused = await self._send_ops(ops, state, listed)
        for object_id, outcome in told:
            if outcome not in (b"done", b"superseded"):
                refused[object_id] = StoreError("l2", outcome.decode(errors="replace"))
        for error in refused.values():
            raise error
        return sum(outcome == b"done" for _, outcome in told)

    async def tell(self, ops: Sequence[Op]) -> None:
        """``RedisStore.tell``: on one server the script that changes an item tells of it, so neither is lost alone."""
        if self._log is not None:
            await self._log.append(ops)

    async def evict(self, pairs: Sequence[tuple[str, int]], *, bury: bool = False) -> int:
        """``RedisStore.evict``."""
        parts = self._parted(pairs, lambda pair: pair[0])
        told = await self._send((shard, packed_evictions(own, shard.prefix, bury=bury)) for shard, own in parts)
        return len(told)

    async def forget(self, shard: Shard, ids: Sequence[str], state: str = "") -> None:
        """Take ids out of the shard's indexes that have no item, or none in that state, if one is given."""
        await self._send([(shard, packed_stale(ids, state, shard.prefix))])

    async def _send_ops(
        self, ops: Sequence[Op], only_in: str | None, listed: bool = False
    ) -> tuple[Outcomes, dict[str, StoreError]]:
        if len({op.object_id for op in ops}) != len(ops):
            raise InvalidItem("ops", f"{len(ops)} operations", "must hold at most one per id")
        refused: dict[str, StoreError] = {}
        documents = (await self._servers.capabilities()).json
        stream = self._stream
        told = await self._send(
            (
                (
                    shard,
                    packed(
                        own,
                        prefix=shard.prefix,
                        documents=documents,
                        binary_format=self._binary_format,
                        only_in=only_in,
                        refused=refused,
                        listed=listed,
                        tell=None if stream is None else fields_of_op,
                    ),
                )
                for shard, own in self._parted(ops, lambda op: op.object_id)
            ),
            stream or NO_STREAM,
        )
        if self._log is not None:
            await self._log.append(_applied(ops, told, refused))
        return told, refused

    async def _send(
        self, parts: Iterable[tuple[Shard, Iterator[Chunk]]], stream: tuple[Arg, ...] = NO_STREAM
    ) -> Outcomes:
        servers = self._servers
        documents = int((await servers.capabilities()).json)
        told: Outcomes = []
        flying: deque[tuple[Chunk, asyncio.Task[Any]]] = deque()
        flying_max = CHUNKS_IN_FLIGHT_MAX if servers.single else len(servers.shards)
        clock = asyncio.get_running_loop()
        pause_at = clock.time() + PACKING_S

        async def land() -> None:
            chunk, task = flying.popleft()
            answer = await outlasting(task)
            told.extend(
                (chunk.ids[cast(int, index)], cast(bytes, outcome))
                for index, outcome in zip(answer[::2], answer[1::2], strict=True)
            )

        for shard, chunks in parts:
            head = (shard.prefix, documents, TOMBSTONE_MS, *stream)
            for chunk in chunks:
                if len(flying) == flying_max:
                    await land()
                script = APPLY if chunk.writes else APPLY_AT_OOM
                flying.append((chunk, servers.start(shard, script, chunk.keys, (*head, *chunk.args))))
                # The call reaches the socket in its second tick (redis-py sends in a task of its own); only then is
                # the next chunk packed, while Redis works.
                # Small chunks, which a cluster's shards make of a batch, go out together.
                if clock.time() >= pause_at:
                    await asyncio.sleep(0)
                    await asyncio.sleep(0)
                    pause_at = clock.time() + PACKING_S
        while flying:
            await land()
        return told

    def _parted(self, things: Sequence[T], id_of: Callable[[T], str]) -> Iterable[tuple[Shard, Sequence[T]]]:
        servers = self._servers
        if servers.single:
            return ((servers.shards[0], things),)
        parts: dict[Shard, list[T]] = {}
        for thing in things:
            parts.setdefault(servers.shard_of(id_of(thing)), []).append(thing)
        return parts.items()


def _applied(ops: Sequence[Op], told: Outcomes, refused: Mapping[str, StoreError]) -> list[Op]:
    outcomes = dict(told)
    return [
        op
        for op in ops
        if op.object_id not in refused
        and (
            (outcome := outcomes.get(op.object_id)) == b"done"
            # An unordered delete of nothing tells nothing; what else goes without a word was applied.
            or (outcome is None and (op.kind != "delete" or op.stamp != 0))
        )
    ]
