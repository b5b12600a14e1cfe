"""Question 4: ``engine.get`` of what is in memory, beside the least that a coroutine can cost."""

from __future__ import annotations

import random
from collections.abc import Sequence

from bench.data import fresh, places
from bench.harness import Answer, Contender, Stage, Target, Unit, check, compared
from sync_engine import SyncEngine, SyncEngineConfig, SyncItem

__all__ = ["ask"]

ITEMS = 10_000
GETS = 200_000


async def ask(stage: Stage) -> list[Answer]:
    """Ids in random order, the same for both; one `await` each."""
    data = places(stage.sized(ITEMS, 100))
    items = fresh(data)
    ids = random.Random(4).choices([item.object_id for item in items], k=stage.sized(GETS, 1_000))
    folder = stage.new_folder()
    async with SyncEngine(SyncEngineConfig(data_dir=folder)) as engine:
        await engine.submit_many(items)
        await engine.flush()
        held = {object_id: item for object_id in dict(data) if (item := engine.peek(object_id)) is not None}
        check(len(held) == len(data), f"{len(held)} of {len(data)} items are in L1")
        times = await stage.race(EngineGets(engine, ids, held), DictGets(ids, held))
    stage.drop_folder(folder)
    ours, bare = times
    return [compared("`engine.get` on an L1 hit", times, ours, [bare], Target(4, at_most=True), unit=Unit.TIME)]


class EngineGets(Contender):
    """Ours."""

    name = "engine.get"

    def __init__(self, engine: SyncEngine, ids: Sequence[str], held: dict[str, SyncItem]) -> None:
        super().__init__(len(ids))
        self._engine = engine
        self._ids = ids
        self._held = held
        self._sum = 0

    async def run(self) -> None:
        get, found = self._engine.get, 0
        for object_id in self._ids:
            item = await get(object_id)
            found += item is not None
        self._sum = found

    async def verify(self) -> None:
        check(self._sum == self.units, f"{self.name}: found {self._sum} of {self.units}")
        for object_id in self._ids[:1_000]:
            check(await self._engine.get(object_id) == self._held[object_id], f"{self.name}: another item")


class DictGets(Contender):
    """A bare ``async def`` that returns ``dict.get``."""

    name = "async def returning dict.get"

    def __init__(self, ids: Sequence[str], held: dict[str, SyncItem]) -> None:
        super().__init__(len(ids))
        self._ids = ids
        self._held = held
        self._sum = 0

    async def run(self) -> None:
        held = self._held

        async def get(object_id: str) -> SyncItem | None:
            return held.get(object_id)

        found = 0
        for object_id in self._ids:
            item = await get(object_id)
            found += item is not None
        self._sum = found

    async def verify(self) -> None:
        check(self._sum == self.units, f"{self.name}: found {self._sum} of {self.units}")
