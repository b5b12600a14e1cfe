"""Healing on a clock that a test moves: whose budget its attempts are charged to."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

import pytest

from sync_engine.heal import Healing
from sync_engine.item import Op, SyncItem
from sync_engine.resilience import Retries
from sync_engine.testing.clock import VirtualClock
from sync_engine.testing.tiers import Breaking, MemoryTier
from sync_engine.trust import Trust

STAMP = 1_700_000_000_000 << 20


@pytest.mark.parametrize("sick", ["l2", "l3"])
async def test_an_attempt_that_failed_is_charged_to_the_tier_that_failed(sick: str) -> None:
    # Charged to Redis whoever failed, an SQL that was down had the lane of a Redis that was well wait.
    clock = VirtualClock()
    retries = {"l2": Retries(clock), "l3": Retries(clock)}
    cache, truth = MemoryTier("l2", clock), MemoryTier("l3", clock)
    await cache.apply([Op(kind="put", object_id="a", stamp=STAMP, item=SyncItem("a", b"1", stamp=STAMP))])
    cache.restarted(cache.saved())  # with what it had, and another run: who knows what that lacks
    tiers = {
        "l2": Breaking(cache, times=None if sick == "l2" else 0),
        "l3": Breaking(truth, times=None if sick == "l3" else 0),
    }
    trust = Trust("l2", needed=True)
    healing = asyncio.create_task(_healing(clock, trust, tiers, retries).run())
    await clock.run_for(10)
    assert trust.doubt is not None
    assert retries[sick].count > 5
    assert [each.count for name, each in retries.items() if name != sick] == [0]
    assert [each.answers for each in retries.values()] == [0, 0]
    tiers[sick].heal()
    await clock.run_for(2)
    assert trust.doubt is None
    assert [each.answers for each in retries.values()] == [1, 0]
    healing.cancel()
    await asyncio.wait({healing})


def _healing(
    clock: VirtualClock, trust: Trust, tiers: Mapping[str, Breaking], retries: Mapping[str, Retries]
) -> Healing:
    async def keep_runs(runs: Mapping[int, str]) -> None: ...

    return Healing(
        trust,
        tiers["l2"],
        tiers["l3"],
        clock,
        retries=retries,
        promotion_ttl_ms=60_000,
        runs={},
        keep_runs=keep_runs,
    )
