"""Many writers on flaky tiers with hardly any memory: each reads its own writes at once, and the end is the model."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Coroutine
from typing import Any, ParamSpec, TypeVar

import pytest

from sync_engine import Ack, SubmitOptions, SyncEngine, SyncItem, TierUnavailable
from sync_engine.forward import Forwarding
from sync_engine.ports import Tier

from .rig import CACHE, DURABLE, Rig

P = ParamSpec("P")
R = TypeVar("R")

WRITERS = 10
STEPS = 30
CONTENTS = (b"{}", b'{"a": 1.50}', b"\x00\xff", bytes(3_000), b"")


class Flaky(Forwarding):
    """Dawdles, and loses every tenth request or reply of a write."""

    def __init__(self, tier: Tier, rng: random.Random) -> None:
        super().__init__(tier)
        self._rng = rng

    async def _through(self, verb: Callable[P, Coroutine[Any, Any, R]], *args: P.args, **kwargs: P.kwargs) -> R:
        fate = self._rng.random() if verb.__name__ == "apply" else 1.0
        await asyncio.sleep(self._rng.random() * 0.003)
        if fate < 0.05:
            raise TierUnavailable(self.name, "lost on the way there")
        answer = await verb(*args, **kwargs)
        await asyncio.sleep(self._rng.random() * 0.003)
        if fate < 0.1:
            raise TierUnavailable(self.name, "lost on the way back")
        return answer


class Writer:
    """One task with ids of its own, and what it knows of them."""

    def __init__(self, engine: SyncEngine, who: int, rng: random.Random) -> None:
        self.engine = engine
        self.rng = rng
        self.ids = [f"w.{who:02}.{n}" for n in range(3)]
        self.model: dict[str, SyncItem | None] = dict.fromkeys(self.ids)
        self.kept: dict[str, SubmitOptions] = {}

    async def run(self) -> None:
        for step in range(STEPS):
            object_id = self.rng.choice(self.ids)
            held = self.model[object_id]
            ack = self.rng.choices(list(Ack), (5, 5, 1))[0]
            match self.rng.randrange(8):
                case 0 | 1 | 2:
                    item = SyncItem(object_id, self.rng.choice(CONTENTS), version=step, state=f"s{step % 3}")
                    options = self.rng.choice((SubmitOptions(), SubmitOptions(), CACHE, DURABLE))
                    await self.engine.submit(item, options, ack=ack)
                    self.model[object_id], self.kept[object_id] = item, options
                case 3 if held is not None:
                    assert await self.engine.set_state(object_id, f"s{step % 3}", ack=ack)
                    self.model[object_id] = held.with_state(f"s{step % 3}")
                case 4:
                    assert await self.engine.delete(object_id, ack=ack) is (held is not None)
                    self.model[object_id] = None
                case _:
                    engine = self.engine
                    assert await engine.contains(object_id) is (held is not None)
                    assert (await engine.status(object_id)).exists is (held is not None)
            await self.look(step)

    async def look(self, step: int) -> None:
        present = {object_id: item for object_id, item in self.model.items() if item is not None}
        for object_id in self.ids:
            assert await self.engine.get(object_id) == self.model[object_id]
        assert await self.engine.get_many(self.ids) == present
        if step % 8 == 0:
            in_sql = [item for object_id, item in present.items() if self.kept[object_id].sql]
            try:
                found = await self.engine.scan_prefix(self.ids[0][:-1])
            except TierUnavailable:
                return
            assert found == in_sql


@pytest.mark.parametrize("seed", range(8))
async def test_I1_I2_busy_writers_on_flaky_tiers_read_their_own_writes(rig: Rig, seed: int) -> None:
    rng = random.Random(seed)
    settings = {
        "l1_max_bytes": rng.choice((0, 2_000, 10**6)),
        "pending_max_bytes": rng.choice((0, 5_000, 10**6)),
        "batch_flush_count": rng.choice((1, 5, 100)),
        "batch_flush_ms": rng.choice((0, 3)),
        "wal_segment_bytes": 4_096,
        "backpressure_wait_ms": 60_000,
    }
    async with rig.engine(around=lambda tier: Flaky(tier, rng), **settings) as engine:
        writers = [Writer(engine, who, random.Random(f"{seed}.{who}")) for who in range(WRITERS)]
        async with asyncio.TaskGroup() as group:
            for writer in writers:
                group.create_task(writer.run())
        model = {object_id: item for writer in writers for object_id, item in writer.model.items()}
        kept = {object_id: options for writer in writers for object_id, options in writer.kept.items()}
        await rig.check(engine, model, options=kept)
        assert engine.stats().quarantined == 0
