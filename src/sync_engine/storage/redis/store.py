"""RedisStore: items in Redis, one value per id beside one set per state.

Every change goes through one script (lua/apply.lua), which compares stamps, writes the value, its deadline
and its membership in one step; every read is one round trip. docs/formats.md has the formats.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable, Sequence

from redis.asyncio import Redis
from redis.asyncio.cluster import RedisCluster

from sync_engine.codec import Unverified
from sync_engine.errors import ConfigError, Corruption
from sync_engine.item import Op, SyncItem, check_id
from sync_engine.options import Ttl, ttl_ms
from sync_engine.ports import Applied, BatchWriteResult, Fetched
from sync_engine.storage.redis.apply import Writer
from sync_engine.storage.redis.connect import Line
from sync_engine.storage.redis.pack import BinaryFormat
from sync_engine.storage.redis.shards import Servers
from sync_engine.storage.redis.states import StateSets
from sync_engine.storage.redis.values import Values

__all__ = ["RedisStore"]


class RedisStore:
    """L2: a tier of items in Redis, and the direct calls on it."""

    name = "l2"

    def __init__(
        self,
        url: str,
        prefix: str = "",
        *,
        timeout_ms: int = 5_000,
        response_timeout_ms: int = 5_000,
        binary_format: BinaryFormat = "compact",
    ) -> None:
        if "\0" in prefix or binary_format not in ("compact", "json"):
            raise ConfigError(
                f"redis_prefix {prefix!r}, redis_binary_format {binary_format!r}: no NUL; compact or json"
            )
        self.prefix = prefix
        self._servers: Servers = Line(url, prefix, timeout_ms=timeout_ms, response_timeout_ms=response_timeout_ms)
        self._writer = Writer(self._servers, binary_format)
        self._values = Values(self._servers)
        self._states = StateSets(self._servers, self._writer.change)

    @classmethod
    async def connect(
        cls,
        url: str,
        prefix: str = "",
        *,
        timeout_ms: int = 5_000,
        response_timeout_ms: int = 5_000,
        binary_format: BinaryFormat = "compact",
    ) -> RedisStore:
        """A store whose server has answered. The constructor alone makes one that connects when it is first used.

        ``prefix`` is put before every key, verbatim. Raises ``ConfigError`` for a bad URL, and
        ``TierUnavailable`` if the server does not answer or refuses the credentials.
        """
        store = cls(
            url,
            prefix,
            timeout_ms=timeout_ms,
            response_timeout_ms=response_timeout_ms,
            binary_format=binary_format,
        )
        try:
            await store._servers.capabilities()
        except BaseException:  # cancelled or failed alike: the caller has no store to close
            await store.close()
            raise
        return store

    @property
    def client(self) -> Redis | RedisCluster:
        """The redis-py client, for what this class does not offer. Closed by ``close``."""
        return self._servers.client

    async def get(self, object_id: str) -> SyncItem | None:
        """The item, or None. Gets of one event-loop tick share one round trip. Raises ``Corruption``."""
        found = await self._values.one(check_id(object_id))
        if isinstance(found, Corruption):
            raise found
        return found.item if isinstance(found, Unverified) else found

    async def get_many(self, ids: Iterable[str]) -> dict[str, SyncItem]:
        """The items that are there, in the order asked for. Raises ``Corruption`` for the first damaged one."""
        ids = list(ids)
        fetched = await self.fetch(ids)
        for damaged in fetched.corrupt.values():
            raise damaged
        found = fetched.items | fetched.unverified
        return {object_id: found[object_id] for object_id in ids if object_id in found}

    async def put(self, item: SyncItem, ttl: Ttl | None = None) -> bool:
        """Store the item, for ``ttl`` (seconds or timedelta) if given; False if a newer copy was left in place.

        Raises ``StoreError`` if Redis refuses it.
        """
        applied = await self.apply(_puts((item,), ttl))
        for refused in applied.refused.values():
            raise refused
        return not applied.superseded

    async def put_batch(self, items: Iterable[SyncItem], ttl: Ttl | None = None) -> BatchWriteResult:
        """Store many items; of several with one id the last. ``failed`` says what Redis refuses; the rest is stored."""
        ops = _puts(items, ttl)
        applied = await self.apply(ops)
        return BatchWriteResult(
            batch_id=str(uuid.uuid4()),
            written=len(ops) - len(applied.refused) - len(applied.superseded),
            verified=not applied.refused,
            failed={object_id: str(error) for object_id, error in applied.refused.items()},
            superseded=applied.superseded,
        )

    async def delete(self, object_id: str) -> bool:
        """Remove the item whatever its stamp; whether it was there."""
        return await self.delete_many((object_id,)) == 1

    async def delete_many(self, ids: Iterable[str]) -> int:
        """Remove the items whatever their stamps; how many were there."""
        ops = [Op(kind="delete", object_id=object_id, stamp=0) for object_id in _checked(ids)]
        applied = await self.apply(ops)
        for refused in applied.refused.values():
            raise refused
        return len(applied.existed)

    async def exists(self, object_id: str) -> bool:
        """Whether the item is there."""
        return (await self.exists_batch((object_id,)))[0]

    async def exists_batch(self, ids: Sequence[str], /) -> list[bool]:
        """Whether each item is there, in input order."""
        for object_id in ids:
            check_id(object_id)
        return await self._values.exists(ids)

    async def list_state_ids(self, state: str, limit: int = 1_000, *, after: str | None = None) -> list[str]:
        """Ids in the state, ascending, those greater than ``after``."""
        return await self._states.ids(state, limit, after)

    async def count_by_state(self, state: str, /) -> int:
        """How many items are in the state."""
        return await self._states.count(state)

    async def is_in_state(self, object_id: str, state: str) -> bool:
        """Whether the item is in the state."""
        return await self._states.has(object_id, state)

    async def move_state(self, object_id: str, from_state: str, to_state: str) -> bool:
        """Change the state of an item that is in ``from_state``, in its value and its membership; else False."""
        return await self._states.move(object_id, from_state, to_state)

    async def remove_from_state(self, object_id: str, state: str) -> bool:
        """Put an item that is in ``state`` back into ``"default"``, since every item is in one state; else False."""
        return await self._states.move(object_id, state, "default")

    async def delete_by_state(self, state: str) -> int:
        """Delete the items in the state, each only if it is still in it when its turn comes; how many that were."""
        return await self._states.delete_all(state)

    async def fetch(self, ids: Sequence[str], /) -> Fetched:
        """Everything held of these ids, one round trip per 500."""
        return await self._values.fetch(_checked(ids))

    async def apply(self, ops: Sequence[Op], /) -> Applied:
        """Apply at most one operation per id, each chunk of up to 250 in one atomic step.

        ``existed`` names deletes that removed something; ``restated`` stays empty, the truth knows those items.
        Raises ``TierUnavailable``: then the outcome of every operation is unknown. Raises ``InvalidItem`` if an
        id comes twice.
        """
        return await self._writer.apply(ops)

    async def close(self) -> None:
        """Let calls under way finish and close the connections. Safe to call twice."""
        await self._values.aclose()
        await self._servers.close()

    def __repr__(self) -> str:
        return f"<RedisStore prefix {self.prefix!r} {self._servers!r}>"


def _checked(ids: Iterable[str]) -> list[str]:
    return [check_id(object_id) for object_id in dict.fromkeys(ids)]


def _puts(items: Iterable[SyncItem], ttl: Ttl | None) -> list[Op]:
    deadline = None if ttl is None else time.time_ns() // 1_000_000 + ttl_ms(ttl)
    newest = {item.object_id: item for item in items}
    return [
        Op(
            kind="put",
            object_id=item.object_id,
            stamp=item.stamp,
            item=item,
            redis_expires_at=item.expires_at if deadline is None else deadline,
        )
        for item in newest.values()
    ]
