"""Where a search index lives: on the one server, or on each primary of a cluster for the items it has.

A server's own search knows its own keys only, and the name of an index is routed like a key. So on a cluster each
primary has an index of its own, whose name ends in the hash tag of one of its shards and which covers the items of
all shards, since slots move. What an index is stands in a hash beside the first shard: a primary that lacks it (a new
node, a replica that was promoted before it knew, a server that lost it) gets it when it is next asked.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Protocol

from sync_engine.errors import IndexConflict, IndexNotFound, SearchError, StoreError, TierUnavailable
from sync_engine.storage.redis.search_reply import read_info, shown
from sync_engine.storage.redis.search_schema import IndexDefinition
from sync_engine.storage.redis.shards import Arg, Servers, Shard

__all__ = ["EveryPrimary", "OneServer", "Place", "Places", "command", "refusals"]

TRIES_MAX = 5
"""How often a name is taken and free again, by somebody else's creating and dropping, before we give up."""

Parts = Sequence[tuple[Shard, ...]]


@dataclass(frozen=True, slots=True)
class Place:
    """One server's index: a shard that lives there, its name there, the shards whose items it answers for.

    No shards: of all, since the server asks the others itself.
    """

    shard: Shard
    name: str
    shards: tuple[Shard, ...] = ()


class Places(Protocol):
    """Makes, finds and drops indexes by name."""

    async def create(self, index: str, definition: IndexDefinition) -> bool:
        """Make it wherever it is missing; False if it was there already. Raises ``IndexConflict``, ``SearchError``."""
        ...

    async def drop(self, index: str) -> None:
        """Remove it everywhere. Raises ``IndexNotFound``."""
        ...

    async def find(self, index: str) -> Sequence[Place]:
        """Where to ask; all places together hold every item once."""
        ...

    async def mend(self, index: str) -> Sequence[Place]:
        """As ``find``, after a place said that it has no such index. Raises ``IndexNotFound`` if that is so."""
        ...

    async def names(self) -> list[str]:
        """The indexes there are, ascending."""
        ...


class OneServer:
    """``Places`` on a single server, which remembers definitions itself."""

    def __init__(self, servers: Servers, prefix: str) -> None:
        self._servers = servers
        self._shard = servers.shards[0]
        self._stem = f"{prefix}idx:"
        self._key_prefixes = (prefix,)

    async def create(self, index: str, definition: IndexDefinition) -> bool:
        return await _create(self._servers, self._place(index), index, definition, self._key_prefixes)

    async def drop(self, index: str) -> None:
        await command(self._servers, self._place(index), index, "FT.DROPINDEX")

    async def find(self, index: str) -> Sequence[Place]:
        return (self._place(index),)

    async def mend(self, index: str) -> Sequence[Place]:
        raise IndexNotFound(index)

    async def names(self) -> list[str]:
        names, stem = await _listed(self._servers, self._shard), shown(self._stem)
        return sorted(name.removeprefix(stem) for name in names if name.startswith(stem))

    def _place(self, index: str) -> Place:
        return Place(self._shard, self._stem + index, (self._shard,))


class EveryPrimary:
    """``Places`` on a cluster. A server that passes a search on to all others by itself is asked alone."""

    def __init__(self, servers: Servers, prefix: str) -> None:
        self._servers = servers
        self._prefix = prefix
        self._head = servers.shards[0]
        self._memory = f"{self._head.prefix}__local__:indexes"
        self._key_prefixes = [shard.prefix for shard in servers.shards]
        self._found: dict[str, tuple[Parts, Sequence[Place]]] = {}

    async def create(self, index: str, definition: IndexDefinition) -> bool:
        text = definition.to_json()
        for _ in range(TRIES_MAX):
            if await self._servers.call(self._head, "HSETNX", self._memory, index, text):
                try:
                    await self._first(index, definition)
                except SearchError:
                    await self._servers.call(self._head, "HDEL", self._memory, index)
                    raise
                await self.mend(index)
                return True
            held = await self._servers.call(self._head, "HGET", self._memory, index)
            if held is None:
                continue  # dropped in between
            if difference := _difference(definition, IndexDefinition.from_json(held)):
                raise IndexConflict(index, difference)
            await self.mend(index)
            return False
        raise TierUnavailable("l2", f"others keep creating and dropping the search index {index!r}")

    async def drop(self, index: str) -> None:
        # The memory first: a search under way must not find it there and make the index anew.
        known = await self._servers.call(self._head, "HDEL", self._memory, index, f"{index}{_COORDINATED}")
        self._found.pop(index, None)
        if not await self._clear(index) and not known:
            raise IndexNotFound(index)

    async def find(self, index: str) -> Sequence[Place]:
        parts = await self._parts()
        known = self._found.get(index)
        if known is not None and known[0] == parts:
            return known[1]
        for made in range(TRIES_MAX):
            text, coordinator = await self._remembered(index)
            if text is None:
                self._found.pop(index, None)
                if made:
                    await self._clear(index)
                raise IndexNotFound(index)
            places = await self._placed(index, parts, text, coordinator)
            if await self._remembered(index) == (text, coordinator):  # else it was dropped meanwhile, or made anew
                self._found[index] = (parts, places)
                return places
        raise TierUnavailable("l2", f"others keep creating and dropping the search index {index!r}")

    async def mend(self, index: str) -> Sequence[Place]:
        self._found.pop(index, None)
        return await self.find(index)

    async def names(self) -> list[str]:
        names = await self._servers.call(self._head, "HKEYS", self._memory)
        return sorted(name.decode() for name in names if not name.endswith(_COORDINATED.encode()))

    async def _first(self, index: str, definition: IndexDefinition) -> None:
        """Make it on the first server, and see whether that made it on the others."""
        first, *others = await self._parts()
        before = [await _listed(self._servers, part[0]) for part in others[:1]]
        place = await self._ensured(index, first, definition)
        after = [await _listed(self._servers, part[0]) for part in others[:1]]
        name = shown(place.name)
        if any(name in now and name not in then for then, now in zip(before, after, strict=True)):
            note = (f"{index}{_COORDINATED}", place.shard.number)
            await self._servers.call(self._head, "HSET", self._memory, *note)

    async def _remembered(self, index: str) -> tuple[bytes | None, bytes | None]:
        text, coordinator = await self._servers.call(self._head, "HMGET", self._memory, index, f"{index}{_COORDINATED}")
        return text, coordinator

    async def _placed(self, index: str, parts: Parts, text: bytes, coordinator: bytes | None) -> Sequence[Place]:
        """Where the index is, which is made where it is missing."""
        if coordinator is not None:
            shard = self._servers.shards[int(coordinator)]
            return (Place(shard, self._name(index, shard)),)
        definition = IndexDefinition.from_json(text)
        return await asyncio.gather(*(self._ensured(index, part, definition) for part in parts))

    async def _ensured(self, index: str, part: tuple[Shard, ...], definition: IndexDefinition) -> Place:
        """The index of one server, made there if it is missing."""
        kept = None
        for place in await self._there(index, part):
            # There may be others: of an earlier definition, which a drop did not reach; under the name of a slot that
            # was away and came back.
            with suppress(IndexNotFound):
                told = read_info(await command(self._servers, place, index, "FT.INFO"))
                if kept is None and not definition.difference(told, self._key_prefixes):
                    kept = place
                else:
                    await command(self._servers, place, index, "FT.DROPINDEX")
        if kept is None:
            # An index whose slot moves away stays behind, out of reach. Tools take the first slots of a server first.
            kept = Place(part[-1], self._name(index, part[-1]), part)
            await _create(self._servers, kept, index, definition, self._key_prefixes)
        return kept

    async def _clear(self, index: str) -> bool:
        """Remove it from every server; whether it was on any."""
        places = [place for part in await self._parts() for place in await self._there(index, part)]
        for place in places:
            with suppress(IndexNotFound):  # a server passed it on that we had asked before
                await command(self._servers, place, index, "FT.DROPINDEX")
        return bool(places)

    async def _there(self, index: str, part: tuple[Shard, ...]) -> list[Place]:
        """The indexes of that name on one server which a call can reach: whose slot is there too."""
        names = await _listed(self._servers, part[0])
        places = [Place(shard, self._name(index, shard), part) for shard in part]
        return [place for place in places if shown(place.name) in names]

    def _name(self, index: str, shard: Shard) -> str:
        return f"{self._prefix}idx:{index}{shard.prefix.removeprefix(self._prefix)}"

    async def _parts(self) -> Parts:
        """The primaries' shards, in the order of the shards."""
        parts = await self._servers.primaries()
        if sum(map(len, parts)) < len(self._servers.shards):
            raise TierUnavailable("l2", "some shards are served by no node of the cluster")
        return sorted((tuple(sorted(part, key=_number)) for part in parts), key=lambda part: part[0].number)


_COORDINATED = "{coordinated}"
"""Behind the name of an index in the memory, with the number of a shard: ask that shard's server alone. No index has
braces in its name."""


async def command(servers: Servers, place: Place, index: str, name: str, *args: Arg) -> Any:
    """The reply to a command on an index of one server."""
    with refusals(index):
        return await servers.call(place.shard, name, place.name, *args)


def out_of_time() -> TierUnavailable:
    """The server answers with an error or with a warning, and may with either, whatever its ON_TIMEOUT."""
    return TierUnavailable("l2", "the search did not finish in time")


@contextmanager
def refusals(index: str) -> Iterator[None]:
    """RediSearch's refusals in our words, as far as they are about the index and not about what was asked of it."""
    try:
        yield
    except StoreError as refused:
        reason = refused.reason.lower()
        if any(words in reason for words in ("no such index", "unknown index name", "index not found")):
            raise IndexNotFound(index) from None
        if "timeout limit was reached" in reason:
            raise out_of_time() from None
        raise


async def _create(
    servers: Servers, place: Place, index: str, definition: IndexDefinition, key_prefixes: Sequence[str]
) -> bool:
    words = definition.words(key_prefixes)
    for _ in range(TRIES_MAX):
        try:
            await command(servers, place, index, "FT.CREATE", *words)
            return True
        except StoreError as refused:
            if "already exists" not in refused.reason.lower():
                raise SearchError(f"the search index {index!r} was refused: {refused.reason}") from None
        try:
            told = read_info(await command(servers, place, index, "FT.INFO"))
        except IndexNotFound:
            continue  # dropped in between
        if difference := definition.difference(told, key_prefixes):
            raise IndexConflict(index, difference)
        return False
    raise TierUnavailable("l2", f"others keep creating and dropping the search index {index!r}")


async def _listed(servers: Servers, shard: Shard) -> set[str]:
    """The indexes of one server, as ``shown`` has their names."""
    return {name.decode(errors="replace") for name in await servers.call(shard, "FT._LIST")}


def _difference(wanted: IndexDefinition, held: IndexDefinition) -> str:
    fields = [{"attribute": field.alias, **field.facts()} for field in held.fields]
    told = {"index_definition": {"prefixes": held.prefixes}, "attributes": fields, "stopwords_list": []}
    return wanted.difference(told, ("",))


def _number(shard: Shard) -> int:
    return shard.number
