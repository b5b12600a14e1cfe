"""RedisStore: items in Redis, one value per id beside one set per state.

Every change goes through one script (lua/apply.lua), which compares stamps, writes the value, its deadline and
its index entries in one step; every read is one round trip. docs/formats.md has the formats.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from redis.asyncio import Redis
from redis.asyncio.cluster import RedisCluster

from sync_engine.codec import Unverified
from sync_engine.errors import ConfigError, Corruption
from sync_engine.item import Op, SyncItem, check_id
from sync_engine.options import Ttl, ttl_ms
from sync_engine.ports import Applied, BatchWriteResult, CacheFacts, Fetched, Mark
from sync_engine.storage.redis.address import servers_of
from sync_engine.storage.redis.apply import Writer
from sync_engine.storage.redis.capabilities import Capabilities
from sync_engine.storage.redis.cdc import CdcEntry, CdcLog, CdcReader, ChangeStream
from sync_engine.storage.redis.marks import Marks
from sync_engine.storage.redis.occupancy import Occupancy
from sync_engine.storage.redis.pack import BinaryFormat
from sync_engine.storage.redis.pages import Pages
from sync_engine.storage.redis.reindex import Indexer
from sync_engine.storage.redis.scan import Prefixes
from sync_engine.storage.redis.search import IndexInfo, SearchHits, SearchIndexes
from sync_engine.storage.redis.search_fields import Field, Word
from sync_engine.storage.redis.search_request import Param
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
        ca_file: Path | None = None,
        change_stream: ChangeStream | None = None,
        on_new_server: Callable[[], None] | None = None,
    ) -> None:
        """See ``connect``."""
        if "\0" in prefix or binary_format not in ("compact", "json"):
            raise ConfigError(
                f"redis_prefix {prefix!r}, redis_binary_format {binary_format!r}: no NUL; compact or json"
            )
        self.prefix = prefix
        self._servers = servers = servers_of(
            url,
            prefix,
            timeout_ms=timeout_ms,
            response_timeout_ms=response_timeout_ms,
            ca_file=ca_file,
            on_new_server=on_new_server,
        )
        self._cdc = CdcLog(servers, prefix, change_stream)
        self._writer = Writer(servers, binary_format, change_stream, self._cdc)
        self._values = Values(servers)
        self._marks = Marks(servers)
        self._occupancy = Occupancy(servers)
        self._indexer = Indexer(servers)
        pages = Pages(servers, self._writer, self._indexer)
        self._prefixes = Prefixes(pages)
        self._states = StateSets(pages, self._values, self._writer)
        self._search = SearchIndexes(servers, prefix, self._values)

    @classmethod
    async def connect(cls, url: str, prefix: str = "", **options: Any) -> RedisStore:
        """A store whose server has answered. The constructor alone makes one that connects when it is first used.

        ``prefix`` is put before every key, verbatim. ``options`` are the constructor's: ``change_stream`` tells every
        change that is applied to a stream, ``on_new_server`` is called when another server than before answers,
        before it is asked anything. Raises ``ConfigError`` for a bad URL, and ``TierUnavailable`` if the server does
        not answer or refuses the credentials.
        """
        store = cls(url, prefix, **options)
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

    async def capabilities(self) -> Capabilities:
        """What the server offers beyond plain Redis."""
        return await self._servers.capabilities()

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

    async def exists_batch(self, ids: Sequence[str]) -> list[bool]:
        """Whether each item is there, in input order."""
        for object_id in ids:
            check_id(object_id)
        return await self._values.exists(ids)

    async def list_state_ids(self, state: str, limit: int = 1_000, *, after: str | None = None) -> list[str]:
        """Ids in the state, ascending, those greater than ``after``."""
        return await self._states.ids(state, limit, after)

    async def get_by_state(self, state: str, limit: int = 1_000, *, after: str | None = None) -> list[SyncItem]:
        """Items in the state, ascending by id, those greater than ``after``. Raises ``Corruption``."""
        return await self._states.items(state, limit, after)

    def iter_by_state(self, state: str) -> AsyncIterator[SyncItem]:
        """All items in the state, ascending by id, each as it is when its page is read. Raises ``Corruption``."""
        return self._states.iterate(state)

    async def count_by_state(self, state: str) -> int:
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

    async def scan_prefix(
        self, prefix: str, limit: int = 1_000, *, after: str | None = None, allow_all: bool = False
    ) -> list[SyncItem]:
        """Items whose id begins with the prefix, ascending, those greater than ``after``. Raises ``Corruption``.

        An empty prefix is every item, and must be meant: ``allow_all=True``, here and in the four calls below.
        """
        return await self._prefixes.items(prefix, limit, after, allow_all=allow_all)

    async def scan_ids(
        self, prefix: str, limit: int = 1_000, *, after: str | None = None, allow_all: bool = False
    ) -> list[str]:
        """The same, their ids alone."""
        return await self._prefixes.ids(prefix, limit, after, allow_all=allow_all)

    def iter_prefix(self, prefix: str, *, allow_all: bool = False) -> AsyncIterator[SyncItem]:
        """All of them, each as it is when its page is read. Raises ``Corruption``."""
        return self._prefixes.iterate(prefix, allow_all=allow_all)

    async def count_prefix(self, prefix: str, *, allow_all: bool = False) -> int:
        """How many there are."""
        return await self._prefixes.count(prefix, allow_all=allow_all)

    async def delete_prefix(self, prefix: str, *, allow_all: bool = False) -> int:
        """Delete them, each if it is there when its turn comes; how many that were. Called again, it goes on."""
        return await self._prefixes.delete_all(prefix, allow_all=allow_all)

    async def reindex(self) -> int:
        """Put the indexes right after others wrote here: the original engine, redis-cli, an eviction by the server.

        Walks the keyspace once. How many entries were added or dropped.
        """
        return await self._indexer.reindex()

    async def ft_create(
        self,
        index: str,
        schema: Iterable[Field | Sequence[Word]] | Sequence[Word],
        *,
        prefixes: Sequence[str] = ("",),
    ) -> bool:
        """Index the JSON items whose ids begin with one of ``prefixes``; False if this very index is there already.

        ``schema``: ``Field`` values, or fields in FT.CREATE's words. Items that are there are indexed in the
        background: see ``ft_info``. Raises ``IndexConflict`` where another index has this name. This and the four
        calls below raise ``SearchUnavailable`` where the servers have no search.
        """
        return await self._search.ft_create(index, schema, prefixes=prefixes)

    async def ft_dropindex(self, index: str) -> None:
        """Remove an index; the items stay. Raises ``IndexNotFound``."""
        await self._search.ft_dropindex(index)

    async def ft_list(self) -> list[str]:
        """The names of the indexes of this prefix, ascending."""
        return await self._search.ft_list()

    async def ft_info(self, index: str) -> IndexInfo:
        """What the index covers and how far it is. Raises ``IndexNotFound``."""
        return await self._search.ft_info(index)

    async def ft_search(
        self,
        index: str,
        query: str,
        limit: int = 10,
        offset: int = 0,
        params: Mapping[str, Param] | None = None,
        *,
        sort_by: str | None = None,
        descending: bool = False,
        return_items: bool = False,
        with_scores: bool = False,
        timeout_ms: int | None = None,
    ) -> SearchHits:
        """The matches from ``offset`` on, at most ``limit`` of them; with a limit of 0 the total alone.

        ``query`` is RediSearch's own text, dialect 2. Values that others chose belong in ``params``, which ``$name``
        stands for in the query: they are then one word or tag, whatever they contain. Without ``sort_by``, a field
        best made sortable, the most relevant come first, or the nearest. With ``return_items`` the items come along
        and are verified; documents that are no items are left out. Raises ``InvalidQuery``, ``IndexNotFound``,
        ``Corruption``, and ``TierUnavailable`` where the search took longer than ``timeout_ms`` (default: the
        server's own bound).
        """
        return await self._search.ft_search(
            index,
            query,
            limit,
            offset,
            params,
            sort_by=sort_by,
            descending=descending,
            return_items=return_items,
            with_scores=with_scores,
            timeout_ms=timeout_ms,
        )

    async def xadd_cdc(self, entry: CdcEntry, maxlen: int | None = None) -> str:
        """Append an entry to the change stream; its id there. See ``CdcLog``."""
        return await self._cdc.xadd_cdc(entry, maxlen)

    async def xadd_cdc_batch(self, entries: Iterable[CdcEntry], maxlen: int | None = None) -> list[str]:
        """Append entries to the change stream, in order; their ids there."""
        return await self._cdc.xadd_cdc_batch(entries, maxlen)

    def iter_cdc(self, from_id: str = "0", block_ms: int | None = None, count: int = 500, **options: Any) -> CdcReader:
        """A reader of the change stream, and of what is missing in it. See ``CdcLog``."""
        return self._cdc.iter_cdc(from_id, block_ms, count, **options)

    async def evict(self, copies: Sequence[tuple[str, int]], /, *, bury: bool = False) -> int:
        """Take out the copies of these ids that have exactly these stamps, as if never written; how many had.

        ``bury``: what is older than them stays out, for as long as it could be late.
        """
        return await self._writer.evict(copies, bury=bury)

    async def tell(self, ops: Sequence[Op], /) -> None:
        """Tell again of changes, where the change stream is on another server than they are."""
        await self._writer.tell(ops)

    async def facts(self) -> CacheFacts:
        """What the servers are, and how full."""
        return await self._occupancy.facts()

    async def coldest(self, place: int, picked: int, most: int, /) -> list[tuple[str, int]]:
        """Of ``picked`` items of a shard, picked at random, the ``most`` that were used the longest ago."""
        return await self._occupancy.coldest(place, picked, most)

    async def held_stamps(self, ids: Sequence[str], /) -> dict[str, int]:
        """The stamps of the items that are there."""
        return await self._marks.stamps(_checked(ids))

    async def marks(self, newest: int = 0, /) -> list[Mark]:
        """What each shard knows of its past; ``newest`` is a stamp that ``Mark.newest`` is to reach."""
        return await self._marks.read(newest)

    async def healed(self, marks: Sequence[Mark], /) -> None:
        """What these shards had lost was made up for."""
        await self._marks.healed(marks)

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
