"""Question 9: what ``count_prefix`` costs at 1,010,000 items, beside the same count at 10,000."""

from __future__ import annotations

from bench.crowd import PREFIX, crowd_of
from bench.data import fresh
from bench.harness import Answer, Contender, Stage, Target, Unit, check, compared
from sync_engine.storage.redis import RedisStore

__all__ = ["ask"]

COUNTS = 1_000


async def ask(stage: Stage) -> list[Answer]:
    """Each level on a server of its own; the matches are the same items on both."""
    crowd = await crowd_of(stage)
    await stage.empty_redis()
    few = await RedisStore.connect(stage.url, PREFIX)
    try:
        await few.put_batch(fresh(crowd.wanted.items(), stamp=1))
        stored = await few.count_prefix("", allow_all=True)  # what a store does before its first listing, it does here
        check(stored == len(crowd.wanted), f"{stored} items instead of {len(crowd.wanted)}")
        prefix = crowd.wanted_prefix + "0"
        matches = sum(object_id.startswith(prefix) for object_id in crowd.wanted)
        levels = {f"at {held:,} items": store for held, store in ((crowd.others + stored, crowd.store), (stored, few))}
        counts = stage.sized(COUNTS, 20)
        with stage.watching(crowd.server.pid):
            times = await stage.race(*(Count(name, levels[name], prefix, matches, counts) for name in levels))
    finally:
        await few.close()
    many, less = times
    asked = f"`count_prefix` of {matches:,} matches {many}, against {less}"
    return [compared(asked, times, many, [less], Target(2, at_most=True), unit=Unit.TIME)]


class Count(Contender):
    """One count after the other."""

    def __init__(self, name: str, store: RedisStore, prefix: str, matches: int, counts: int) -> None:
        super().__init__(counts)
        self.name = name
        self._store = store
        self._prefix = prefix
        self._matches = matches
        self._found: set[int] = set()

    async def run(self) -> None:
        count = self._store.count_prefix
        self._found = {await count(self._prefix) for _ in range(self.units)}

    async def verify(self) -> None:
        check(self._found == {self._matches}, f"{self.name}: counted {self._found} instead of {self._matches}")
