"""What tests of flows share: engines on one folder and one Redis prefix, a hurried clock, tiers that can be held.

``Rig`` also looks behind an engine's back: it reads Redis and SQL with stores of its own.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Coroutine, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import pytest

from sync_engine import NotRunning, SubmitOptions, SyncEngine, SyncEngineConfig, SyncItem, build
from sync_engine.clock import SystemClock
from sync_engine.forward import Forwarding
from sync_engine.ports import Tier
from sync_engine.resilience import Retries, RetryBudget
from sync_engine.storage.redis import RedisStore
from sync_engine.storage.sql import SqlStore

__all__ = ["CACHE", "DURABLE", "Around", "Held", "Hurried", "Rig", "hurry_retries", "on", "others", "soon", "until"]

P = ParamSpec("P")
R = TypeVar("R")
Around = Callable[[Tier], Tier]

CACHE = SubmitOptions.cache(3600)
DURABLE = SubmitOptions.durable()
SLEEP_S_MAX = 0.002
DEADLINE_S_MIN = 1.0  # of a read; the fifth retry in a row is the first to wait longer


class Hurried(SystemClock):
    """The real time, and short sleeps cut shorter: retries and batches come at once, deadlines stay where they are."""

    async def sleep(self, seconds: float, /) -> None:
        await asyncio.sleep(seconds if seconds >= DEADLINE_S_MIN else min(seconds, SLEEP_S_MAX))


def hurry_retries(patch: pytest.MonkeyPatch) -> None:
    """Give retries a budget that cannot be used up: it counts real time, in which hurried ones come at once."""
    patch.setattr(build, "Retries", partial(Retries, budget=RetryBudget(per_s=1e6, burst=10**6)))


class Held(Forwarding):
    """A tier whose calls (of ``verbs``) wait while it is held, before or after they take effect."""

    def __init__(self, tier: Tier, verbs: Collection[str] = ("apply",), *, after: bool = False) -> None:
        super().__init__(tier)
        self._verbs = verbs
        self._after = after
        self._open = asyncio.Event()
        self._open.set()
        self.waiting = 0

    def hold(self) -> None:
        self._open.clear()

    def release(self) -> None:
        self._open.set()

    async def _through(self, verb: Callable[P, Coroutine[Any, Any, R]], *args: P.args, **kwargs: P.kwargs) -> R:
        answer = None
        if self._after:
            answer = await verb(*args, **kwargs)
        if verb.__name__ in self._verbs:
            self.waiting += 1
            await self._open.wait()
            self.waiting -= 1
        return await verb(*args, **kwargs) if answer is None else answer


def on(name: str, wrap: Around, kept: list[Any] | None = None) -> Around:
    """``wrap`` around the tier of that name alone; the wrapper is added to ``kept``."""

    def around(tier: Tier) -> Tier:
        if tier.name != name:
            return tier
        wrapped = wrap(tier)
        if kept is not None:
            kept.append(wrapped)
        return wrapped

    return around


def others() -> set[asyncio.Task[Any]]:
    """Every task but the caller's."""
    return asyncio.all_tasks() - {asyncio.current_task()}  # type: ignore[arg-type]  # a test runs in a task


async def until(reached: Callable[[], object]) -> None:
    """Let the others run until it is so; the test's own timeout bounds it."""
    while not reached():  # noqa: ASYNC110  # what is waited for has no event
        await asyncio.sleep(0.001)


async def soon() -> None:
    """A few turns of the loop: what can happen without waiting has happened."""
    for _ in range(30):
        await asyncio.sleep(0)


class Rig:
    """One data folder, one Redis prefix."""

    def __init__(self, path: Path, redis_url: str, redis_prefix: str) -> None:
        self.path = path
        self.redis_url = redis_url
        self.redis_prefix = redis_prefix
        self.sql_url = f"sqlite:///{path / 'truth.db'}"
        self.l2 = RedisStore(redis_url, redis_prefix)
        self._l3: SqlStore | None = None
        self._engines: list[SyncEngine] = []

    def engine(
        self,
        *,
        redis: bool = True,
        data: str = "data",
        clock: SystemClock | Any = None,
        around: Around = lambda tier: tier,
        **settings: Any,
    ) -> SyncEngine:
        """An engine that is not started; all share SQL and Redis, those with the same ``data`` the log too."""
        if redis:
            settings = {"redis_url": self.redis_url, "redis_prefix": self.redis_prefix, **settings}
        settings = {"sql_url": self.sql_url, "data_dir": self.path / data, **settings}
        made = SyncEngine(SyncEngineConfig(**settings), clock=clock or Hurried(), around=around)
        self._engines.append(made)
        return made

    async def l3(self) -> SqlStore:
        if self._l3 is None:
            self._l3 = await SqlStore.connect(self.sql_url)
        return self._l3

    async def in_tiers(self, object_id: str) -> tuple[SyncItem | None, SyncItem | None]:
        """What Redis and SQL hold of the id."""
        return await self.l2.get(object_id), await (await self.l3()).get(object_id)

    async def key(self, *command: str | bytes) -> Any:
        """A raw Redis command."""
        return await self.l2.client.execute_command(*command)

    async def check(
        self, engine: SyncEngine, model: Mapping[str, SyncItem | None], *, options: Mapping[str, SubmitOptions] = {}
    ) -> None:
        """Flush; then every tier, and the engine, hold exactly the model, and nothing is left of the work."""
        await engine.flush()
        ids = list(model)
        expected = {object_id: item for object_id, item in model.items() if item is not None}
        assert await engine.get_many(ids) == expected
        for object_id in ids:
            assert await engine.get(object_id) == model[object_id]
            peeked = engine.peek(object_id)
            assert peeked is None or peeked == model[object_id]
        upper = {i: item for i, item in expected.items() if i not in options or options[i].redis}
        lower = {i: item for i, item in expected.items() if i not in options or options[i].sql}
        # A read that came first may have left L2 without a copy only where L3 has it; none holds another.
        held = await self.l2.get_many(ids)
        assert held == upper
        assert await (await self.l3()).get_many(ids) == lower
        states = {item.state for item in expected.values()} | {"default"}
        for state in states:
            members = {i for i in await self.l2.list_state_ids(state) if i in model}
            assert members == {i for i, item in upper.items() if item.state == state}
        self.at_rest(engine)

    @staticmethod
    def at_rest(engine: SyncEngine) -> None:
        """Nothing is pending, logged, or counted at the gate; L1's books are right."""
        parts = engine._running
        assert parts is not None
        stats = engine.stats()
        assert (stats.pending, stats.pending_bytes, stats.log_records) == (0, 0, 0)
        gate = parts.writes._gate
        assert (gate.ops, gate.bytes, len(gate._waiting)) == (0, 0, 0)
        assert not parts.writes._awaited
        parts.l1.verify()

    async def close(self) -> None:
        for engine in self._engines:
            with suppress(NotRunning):
                await engine.stop(timeout=1)
        await self.l2.close()
        if self._l3 is not None:
            await self._l3.close()
