"""Operations to Redis: packed by shard into script calls, a few in flight, their outcomes put together."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

from sync_engine.errors import InvalidItem, StoreError, SyncEngineError
from sync_engine.item import Op
from sync_engine.ports import Applied
from sync_engine.storage.redis.pack import BinaryFormat, Chunk, packed
from sync_engine.storage.redis.scripts import APPLY, APPLY_AT_OOM
from sync_engine.storage.redis.shards import Servers, Shard

__all__ = ["Writer"]

TOMBSTONE_MS = 300_000
"""How long a delete keeps older writes out: far above the time that a flush or a read can be late."""

CHUNKS_IN_FLIGHT_MAX = 3
"""Per server: one is being applied and one is waiting there while the next is being packed."""


class Writer:
    """The one way to change what Redis holds."""

    def __init__(self, servers: Servers, binary_format: BinaryFormat) -> None:
        self._servers = servers
        self._binary_format = binary_format

    async def apply(self, ops: Sequence[Op]) -> Applied:
        """``RedisStore.apply``."""
        told, refused = await self._send(ops, None)
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

    async def change(self, ops: Sequence[Op], state: str | None) -> int:
        """Apply deletes or restates, to items in that state only if one is given; how many of them it changed."""
        told, refused = await self._send(ops, state)
        for object_id, outcome in told:
            if outcome not in (b"done", b"superseded"):
                refused[object_id] = StoreError("l2", outcome.decode(errors="replace"))
        for error in refused.values():
            raise error
        return sum(outcome == b"done" for _, outcome in told)

    async def _send(
        self, ops: Sequence[Op], only_in: str | None
    ) -> tuple[list[tuple[str, bytes]], dict[str, StoreError]]:
        if len({op.object_id for op in ops}) != len(ops):
            raise InvalidItem("ops", f"{len(ops)} operations", "must hold at most one per id")
        refused: dict[str, StoreError] = {}
        told: list[tuple[str, bytes]] = []
        documents = (await self._servers.capabilities()).json
        flying: deque[tuple[Chunk, asyncio.Task[Any]]] = deque()
        flying_max = CHUNKS_IN_FLIGHT_MAX if self._servers.single else len(self._servers.shards)

        async def land() -> None:
            chunk, task = flying.popleft()
            answer = await asyncio.shield(task)
            told.extend(
                (chunk.ids[cast(int, index)], cast(bytes, outcome))
                for index, outcome in zip(answer[::2], answer[1::2], strict=True)
            )

        for shard, own in self._parted(ops):
            head = (shard.prefix, int(documents), TOMBSTONE_MS)
            for chunk in packed(
                own,
                prefix=shard.prefix,
                documents=documents,
                binary_format=self._binary_format,
                only_in=only_in,
                refused=refused,
            ):
                if len(flying) == flying_max:
                    await land()
                script = APPLY if chunk.writes else APPLY_AT_OOM
                flying.append((chunk, self._servers.start(shard, script, chunk.keys, (*head, *chunk.args))))
                # The call reaches the socket in its second tick (redis-py sends in a task of its own); only then is
                # the next chunk packed, while Redis works.
                await asyncio.sleep(0)
                await asyncio.sleep(0)
        while flying:
            await land()
        return told, refused

    def _parted(self, ops: Sequence[Op]) -> Iterable[tuple[Shard, Sequence[Op]]]:
        servers = self._servers
        if servers.single:
            return ((servers.shards[0], ops),)
        parts: dict[Shard, list[Op]] = {}
        for op in ops:
            parts.setdefault(servers.shard_of(op.object_id), []).append(op)
        return parts.items()
