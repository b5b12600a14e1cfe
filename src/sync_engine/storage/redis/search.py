"""Search: RediSearch's indexes over the JSON items, and queries on them.

Queries are RediSearch's own text, dialect 2. Values that others chose go through ``params`` and nowhere else: they
are then compared, never read as syntax.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from redis.exceptions import ResponseError

from sync_engine.codec import Read, Unverified, read_document
from sync_engine.errors import (
    Corruption,
    IndexNotFound,
    InvalidId,
    InvalidItem,
    InvalidQuery,
    SearchUnavailable,
    StoreError,
    TierUnavailable,
)
from sync_engine.item import SyncItem, check_id
from sync_engine.storage.redis.capabilities import Capabilities
from sync_engine.storage.redis.refusals import translated
from sync_engine.storage.redis.scripts import LAPSE, SEARCH
from sync_engine.storage.redis.search_fields import Field, Word, check_index
from sync_engine.storage.redis.search_places import (
    EveryPrimary,
    OneServer,
    Place,
    Places,
    command,
    out_of_time,
    refusals,
)
from sync_engine.storage.redis.search_reply import Found, Hit, read_info, read_search, shown
from sync_engine.storage.redis.search_request import ITEM_MARK, Param, SearchRequest
from sync_engine.storage.redis.search_schema import IndexDefinition, fields_of
from sync_engine.storage.redis.shards import Arg, Servers, Shard
from sync_engine.storage.redis.values import Values

__all__ = ["IndexInfo", "SearchHits", "SearchIndexes"]

ROUNDS_MAX = 8
"""Searches for one page: items of it may expire while it is being made, or the servers change."""
LAPSED_PER_STEP = 500
LOOK_TRUSTED_S = 1.0
"""How long an index that was complete is taken for complete without asking: somebody else may make it anew."""


@dataclass(frozen=True, slots=True)
class SearchHits:
    """One page of matches, best first or as sorted; ``ids, total = hits`` takes the two that matter most.

    ``total`` counts all matches, whatever the page. ``warnings`` is what makes the answer less than complete: empty
    means that it is complete. ``items`` and ``scores`` are in the order of ``ids``, and None unless asked for. A score
    is the relevance, or for a nearest-neighbour query the distance.
    """

    ids: list[str]
    total: int
    warnings: list[str]
    items: list[SyncItem] | None = None
    scores: list[float] | None = None

    def __iter__(self) -> Iterator[Any]:
        yield self.ids
        yield self.total


@dataclass(frozen=True, slots=True)
class IndexInfo:
    """What FT.INFO tells of an index, on a cluster of all servers together.

    While ``indexing``, searches miss items that were there before the index. ``hash_indexing_failures`` counts
    documents that the index left out, since a value in them is not of the field's type.
    """

    name: str
    num_docs: int
    indexing: bool
    percent_indexed: float
    hash_indexing_failures: int
    prefixes: list[str]
    fields: list[Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class _Look:
    """What FT.INFO said of an index, and for how long that is believed."""

    places: Sequence[Place]
    capabilities: Capabilities
    until: float
    unsortable: frozenset[str]
    warnings: list[str]


@dataclass(frozen=True, slots=True)
class _Answer:
    """What one server said to a search; no reply where it could not be asked. Shards with items to let go, and shards
    that are not there."""

    reply: Any
    due: Sequence[Shard] = ()
    away: Sequence[Shard] = ()


class SearchIndexes:
    """The search calls of a store. Every one raises ``SearchUnavailable`` where the servers have no search."""

    def __init__(self, servers: Servers, prefix: str, values: Values) -> None:
        self._servers = servers
        self._prefix = prefix
        self._values = values
        self._places: Places = OneServer(servers, prefix) if servers.single else EveryPrimary(servers, prefix)
        self._looks: dict[str, _Look] = {}

    async def ft_create(
        self,
        index: str,
        schema: Iterable[Field | Sequence[Word]] | Sequence[Word],
        *,
        prefixes: Sequence[str] = ("",),
    ) -> bool:
        """See ``RedisStore``."""
        if isinstance(prefixes, str):
            raise InvalidItem("prefixes", "one text", "must be a sequence of texts")
        definition = IndexDefinition(fields_of(schema), tuple(prefixes))
        check_index(index)
        await self._available()
        self._looks.pop(index, None)
        return await self._places.create(index, definition)

    async def ft_dropindex(self, index: str) -> None:
        """See ``RedisStore``."""
        check_index(index)
        await self._available()
        self._looks.pop(index, None)
        await self._places.drop(index)

    async def ft_list(self) -> list[str]:
        """See ``RedisStore``."""
        await self._available()
        return await self._places.names()

    async def ft_info(self, index: str) -> IndexInfo:
        """See ``RedisStore``."""
        check_index(index)
        await self._available()
        try:
            told = await self._told(index, await self._places.find(index))
        except IndexNotFound:
            told = await self._told(index, await self._places.mend(index))
        begins = {self._id_of(begin, shown(self._prefix)) for begin in told[0]["index_definition"]["prefixes"]}
        return IndexInfo(
            name=index,
            num_docs=sum(int(one["num_docs"]) for one in told),
            indexing=any(int(one["indexing"]) for one in told),
            percent_indexed=min(float(one["percent_indexed"]) for one in told),
            hash_indexing_failures=sum(int(one["hash_indexing_failures"]) for one in told),
            prefixes=sorted(begin for begin in begins if begin is not None),
            fields=told[0]["attributes"],
        )

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
        """See ``RedisStore``."""
        request = SearchRequest(
            query, limit, offset, dict(params or {}), sort_by, descending, return_items, with_scores, timeout_ms
        )
        check_index(index)
        return await self._search(index, request)

    async def _available(self) -> Capabilities:
        capabilities = await self._servers.capabilities()
        if not (capabilities.json and capabilities.search):
            raise SearchUnavailable("this Redis has no RedisJSON with RediSearch: nothing can be searched there")
        return capabilities

    async def _search(self, index: str, request: SearchRequest) -> SearchHits:
        """Ask until an answer is of servers that stayed as they were, and counts nothing that had expired."""
        found, documents = None, True
        capabilities = await self._available()
        places = await self._places.find(index)
        for _ in range(ROUNDS_MAX):
            try:
                look = await self._look(index, places, capabilities)
                answers = await self._ask(index, places, request, look)
            except IndexNotFound:
                self._looks.pop(index, None)
                places = await self._places.mend(index)
                continue
            await self._visit([shard for answer in answers for shard in answer.away])
            asked, known = places, capabilities
            capabilities = await self._available()
            places = await self._places.find(index)
            if places != asked or capabilities is not known or any(answer.reply is None for answer in answers):
                continue
            found, documents = _together(answers, request, look), self._reads_documents(places)
            due = [shard for answer in answers for shard in answer.due]
            gone = [it for hit in found.hits if documents and hit.fields is None and (it := self._item_id(hit.key))]
            if not due and not gone:
                break
            await asyncio.gather(self._lapse(due), self._touch(gone))
        else:
            if found is None:
                raise TierUnavailable("l2", "the servers of the search index keep changing")
            found.warnings.append("more had expired than could be let go: the total may count some of it")
        return await self._hits(found, request, documents)

    async def _look(self, index: str, places: Sequence[Place], capabilities: Capabilities) -> _Look:
        """What is to be known before a search: while an index is being made, the server answers as if it were whole."""
        now = asyncio.get_running_loop().time()
        held = self._looks.get(index)
        if held is not None and held.places == places and held.capabilities is capabilities and now < held.until:
            return held
        told = await self._told(index, places)
        parts = [float(one["percent_indexed"]) for one in told if int(one["indexing"])]
        look = self._looks[index] = _Look(
            places,
            capabilities,
            until=now if parts else now + LOOK_TRUSTED_S,
            unsortable=frozenset(it["attribute"] for it in told[0]["attributes"] if "SORTABLE" not in it["flags"]),
            warnings=[f"the index is being built: {min(parts):.0%} done"] if parts else [],
        )
        return look

    async def _told(self, index: str, places: Sequence[Place]) -> list[dict[str, Any]]:
        asked = (command(self._servers, place, index, "FT.INFO") for place in places)
        return [read_info(reply) for reply in await asyncio.gather(*asked)]

    async def _ask(self, index: str, places: Sequence[Place], request: SearchRequest, look: _Look) -> Sequence[_Answer]:
        documents = self._reads_documents(places)
        if not documents and request.sort_by in look.unsortable:
            raise InvalidQuery(f"on a cluster only a sortable field can be sorted by, which {request.sort_by!r} is not")
        words = request.words(alone=len(places) == 1, documents=documents)
        scripted = not documents or (self._servers.single and look.capabilities.protocol < 3)
        ask = self._ask_in_script if scripted else self._ask_directly
        return await asyncio.gather(*(ask(index, place, words) for place in places))

    def _reads_documents(self, places: Sequence[Place]) -> bool:
        """Whether a search can read the documents that it finds.

        On a node of a cluster it cannot: the server looks for every key in the slot of the command's first, and that
        is the name of the index.
        """
        return self._servers.single or not places[0].shards

    async def _ask_directly(self, index: str, place: Place, words: Sequence[Arg]) -> _Answer:
        # What has expired goes first: nobody else may let it go between our count and our look.
        lapsed = await self._lapse(place.shards)
        with _query_refusals(index):
            reply = await self._servers.call(place.shard, "FT.SEARCH", place.name, *words)
        return _Answer(reply, due=place.shards if LAPSED_PER_STEP in lapsed else ())

    async def _ask_in_script(self, index: str, place: Place, words: Sequence[Arg]) -> _Answer:
        prefixes = [shard.prefix for shard in place.shards]
        args = (len(prefixes), *prefixes, place.name, *words)
        due, away, reply = await self._servers.run(place.shard, SEARCH, (), args)
        if away:
            reply = None if isinstance(reply, bytes) else reply
        elif isinstance(reply, bytes):
            with _query_refusals(index):
                raise translated(ResponseError(reply.decode(errors="replace").removeprefix("ERR ")))
        return _Answer(reply, [place.shards[n] for n in due], [place.shards[n] for n in away])

    async def _lapse(self, shards: Sequence[Shard]) -> list[int]:
        """Let the servers forget what has expired, in a bounded step for each shard; how much that was."""
        steps = (self._servers.run(shard, LAPSE, (), (shard.prefix, 1, LAPSED_PER_STEP)) for shard in shards)
        return [int(count) for count in await asyncio.gather(*steps)]

    async def _visit(self, shards: Sequence[Shard]) -> None:
        """Call on shards that were not where we thought, so as to learn where they are."""
        calls = (self._servers.call(shard, "EXISTS", f"{shard.prefix}__local__:ids") for shard in shards)
        await asyncio.gather(*calls)

    async def _touch(self, ids: Sequence[str]) -> None:
        """Look at expired items, so that they leave the server and its indexes."""
        parts = self._servers.by_shard(ids).items()
        await asyncio.gather(
            *(self._servers.call(shard, "EXISTS", *(shard.prefix + one for one in own)) for shard, own in parts)
        )

    async def _hits(self, found: Found, request: SearchRequest, documents: bool) -> SearchHits:
        hits: dict[str, Hit] = {}
        gone = 0
        for hit in found.hits:
            fields = hit.fields or {}
            gone += documents and hit.fields is None
            object_id = self._item_id(hit.key)
            if object_id is not None and (not documents or b"$" in fields or ITEM_MARK.encode() in fields):
                hits[object_id] = hit
        items = await self._items(hits, documents) if request.return_items else None
        ids = [object_id for object_id in hits if items is None or object_id in items]
        return SearchHits(
            ids,
            found.total - gone,
            found.warnings,
            None if items is None else [items[object_id] for object_id in ids],
            [request.score(hits[object_id]) for object_id in ids] if request.with_scores else None,
        )

    async def _items(self, hits: Mapping[str, Hit], documents: bool) -> dict[str, SyncItem]:
        found: Mapping[str, Read]
        if documents:
            found = {object_id: read_document(object_id, (hit.fields or {})[b"$"]) for object_id, hit in hits.items()}
        else:
            fetched = await self._values.fetch(list(hits))
            found = {**fetched.items, **fetched.unverified, **fetched.corrupt}
        items: dict[str, SyncItem] = {}
        for object_id in hits:
            match found.get(object_id):
                case Corruption() as damaged:
                    raise damaged
                case Unverified(item) | (SyncItem() as item):
                    items[object_id] = item
        return items

    def _item_id(self, key: bytes) -> str | None:
        try:
            object_id = self._id_of(key.decode(), self._prefix)
            return None if object_id is None else check_id(object_id)
        except (UnicodeDecodeError, InvalidId):
            return None  # a document of somebody else's

    def _id_of(self, key: str, prefix: str) -> str | None:
        """What follows the prefix of the store, on a cluster of the shard."""
        if not key.startswith(prefix):
            return None
        rest = key.removeprefix(prefix)
        if self._servers.single:
            return rest
        tag, closed, object_id = rest.partition("}")
        return object_id if closed and tag.startswith("{") else None


def _together(answers: Sequence[_Answer], request: SearchRequest, look: _Look) -> Found:
    told = [read_search(answer.reply) for answer in answers]
    found = told[0] if len(told) == 1 else request.together(told)
    if any("timeout" in warning.lower() for warning in found.warnings):
        # What it found by then would look like an answer, and its total like the number of matches.
        raise out_of_time()
    return Found(found.total, found.hits, [*look.warnings, *found.warnings])


@contextmanager
def _query_refusals(index: str) -> Iterator[None]:
    try:
        with refusals(index):
            yield
    except StoreError as refused:
        raise InvalidQuery(refused.reason) from None
