"""A tier around a tier: what every wrapper of one is built from."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Iterable, Sequence
from typing import Any, ParamSpec, TypeVar, cast

from sync_engine.item import Op, SyncItem
from sync_engine.ports import Applied, Cache, CacheFacts, Changes, Fetched, Mark, Tier, Truth

__all__ = ["Forwarding"]

P = ParamSpec("P")
R = TypeVar("R")


class Forwarding:
    """A tier around a tier: every verb goes through ``_through``, which a subclass overrides.

    It has the verbs of a truth and of a cache; each works only where the tier inside has it.
    """

    def __init__(self, tier: Tier) -> None:
        self.tier = tier
        self.name = tier.name

    async def _through(self, verb: Callable[P, Coroutine[Any, Any, R]], *args: P.args, **kwargs: P.kwargs) -> R:
        return await verb(*args, **kwargs)

    async def fetch(self, ids: Sequence[str], /) -> Fetched:
        return await self._through(self.tier.fetch, ids)

    async def exists_batch(self, ids: Sequence[str], /) -> list[bool]:
        return await self._through(self.tier.exists_batch, ids)

    async def apply(self, ops: Sequence[Op], /) -> Applied:
        return await self._through(self.tier.apply, ops)

    async def list_state_ids(self, state: str, limit: int = 1000, *, after: str | None = None) -> list[str]:
        return await self._through(self.tier.list_state_ids, state, limit, after=after)

    async def count_by_state(self, state: str, /) -> int:
        return await self._through(self.tier.count_by_state, state)

    async def scan_prefix(self, prefix: str, limit: int = 1000, *, after: str | None = None) -> list[SyncItem]:
        return await self._through(self._truth.scan_prefix, prefix, limit, after=after)

    async def list_prefix_ids(self, prefix: str, limit: int = 1000, *, after: str | None = None) -> list[str]:
        return await self._through(self._truth.list_prefix_ids, prefix, limit, after=after)

    async def get_by_state(self, state: str, limit: int = 1000, *, after: str | None = None) -> list[SyncItem]:
        return await self._through(self._truth.get_by_state, state, limit, after=after)

    async def count_prefix(self, prefix: str, /) -> int:
        return await self._through(self._truth.count_prefix, prefix)

    async def newest_stamp(self) -> int:
        return await self._through(self._truth.newest_stamp)

    async def held_stamps(self, ids: Sequence[str], /) -> dict[str, int]:
        return await self._through(self._truth.held_stamps, ids)

    async def buried_stamps(self, ids: Sequence[str], /) -> dict[str, int]:
        return await self._through(self._truth.buried_stamps, ids)

    async def changed_since(self, stamp: int, after: tuple[int, str] | None = None, limit: int = 500) -> Changes:
        return await self._through(self._truth.changed_since, stamp, after, limit)

    async def forgotten(self) -> int:
        return await self._through(self._truth.forgotten)

    async def note_late(self, at_ms: int, stamp: int, /) -> None:
        return await self._through(self._truth.note_late, at_ms, stamp)

    async def late_since(self, at_ms: int, /) -> int | None:
        return await self._through(self._truth.late_since, at_ms)

    async def register_schema(self, name: str, prefixes: Iterable[str], /) -> int:
        return await self._through(self._truth.register_schema, name, prefixes)

    async def marks(self, newest: int = 0, /) -> Sequence[Mark]:
        return await self._through(self._cache.marks, newest)

    async def healed(self, marks: Sequence[Mark], /) -> None:
        return await self._through(self._cache.healed, marks)

    async def evict(self, copies: Sequence[tuple[str, int]], /, *, bury: bool = False) -> int:
        return await self._through(self._cache.evict, copies, bury=bury)

    async def tell(self, ops: Sequence[Op], /) -> None:
        return await self._through(self._cache.tell, ops)

    async def facts(self) -> CacheFacts:
        return await self._through(self._cache.facts)

    async def coldest(self, place: int, picked: int, most: int, /) -> list[tuple[str, int]]:
        return await self._through(self._cache.coldest, place, picked, most)

    async def close(self) -> None:
        await self.tier.close()

    @property
    def _truth(self) -> Truth:
        return cast(Truth, self.tier)

    @property
    def _cache(self) -> Cache:
        return cast(Cache, self.tier)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.tier!r}>"
