"""What the simulation found, each told again in the fewest steps, and the seeds that once failed.

A seed is another run once the workload changes, so the story is what stays.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from sync_engine.item import SyncItem
from sync_engine.options import Ack, SubmitOptions
from sync_engine.testing.simulation import World, simulate


async def until(reached: Callable[[], bool]) -> None:
    """Let the others run until it is so; virtual time costs nothing."""
    while not reached():  # noqa: ASYNC110  # what is waited for has no event
        await asyncio.sleep(0.01)


SMALL_BATCHES = 19  # a seed whose engines flush every operation by itself

SEEDS = {
    346: "a change of state hid that a newer write, which skips SQL, had been in Redis before the older one",
    2079: "healing brought a row to Redis that a write which skips SQL was about to take away",
    2153: "a change of state blessed a copy in Redis of what another engine had deleted in SQL",
    3228: "a change of state that SQL had no item for met an older item of another engine in Redis alone",
    2401: "a truth of the simulation buried what it had no row of, as Redis does",
    3132: "contains showed an own write on its way beside another engine's newer delete, as get may",
    5109: "a put whose Ack.STORED was never answered was taken for stored before another engine's change of state",
    6350: "a change of state took the row of another engine's newer put away, with the cache-only put that it followed",
    8889: "a compare-and-set that its client had given up and sent again arrived after the answer to the second",
    32: "a first version of the fix for 2153 forgot that of the very stamp of a delete there may be an item in Redis",
}


@pytest.mark.parametrize("seed", SEEDS)
def test_a_seed_that_once_failed(seed: int) -> None:
    simulate(seed)


def test_I1_a_write_does_not_overtake_one_that_skipped_sql_whose_state_was_changed() -> None:
    """While SQL was away the newer write was in Redis, and expired there. The older one then came to stay."""

    async def script(world: World) -> None:
        (node,) = world.nodes
        engine = node.engine
        world.l3.cut_off.add(node.name)
        await node.within(engine.submit(SyncItem("a", b"older", updated_at=0)))
        receipt = await node.within(engine.submit(SyncItem("a", b"newer", updated_at=0), SubmitOptions.cache(2)))
        await until(lambda: "a" in world.l2.tier.rows)
        await node.within(engine.set_state("a", "hot"))
        await until(lambda: world.l2.tier.rows["a"].state == "hot")
        await asyncio.sleep(3)
        world.l3.cut_off.clear()
        await node.within(receipt.stored())
        await node.within(engine.flush())
        assert not world.l2.tier.rows

    simulate(1, script, engines=1)


def test_I1_a_write_that_waits_behind_one_that_skipped_sql_is_left_out_where_redis_has_lost_that() -> None:
    """Both were in Redis' queue, the newer one first; whether it had been there was asked when the older one came."""

    async def script(world: World) -> None:
        (node,) = world.nodes
        engine = node.engine
        world.l3.cut_off.add(node.name)
        world.l2.cut_off.add(node.name)
        await node.within(engine.submit(SyncItem("a", b"older", updated_at=0)))
        await node.within(engine.submit(SyncItem("a", b"newer", updated_at=0), SubmitOptions.cache(86_400)))
        await asyncio.sleep(1)
        world.l3.cut_off.clear()
        await until(lambda: "a" in world.l3.tier.rows)
        await asyncio.sleep(0.1)
        world.l3.cut_off.add(node.name)
        world.l2.cut_off.clear()
        while not node.parts.pending.get("a").hop:  # noqa: ASYNC110  # what is waited for has no event
            await asyncio.sleep(0.000_05)
        world.l2.stop()
        world.history.lossless = False
        world.l2.start(({}, {}, 0))
        await asyncio.sleep(20)
        assert [op.item.content for op in world.l2.tier.applied if op.kind == "put"] == [b"newer"]
        world.l3.cut_off.clear()

    simulate(SMALL_BATCHES, script, engines=1)


@pytest.mark.parametrize("backup", [True, False], ids=["older", "empty"])
def test_I1_healing_does_not_bring_back_a_row_that_a_write_of_ours_takes_away(backup: bool) -> None:
    """Redis lost an item that it alone keeps, and got the older row in its place; then the row went, from SQL."""

    async def script(world: World) -> None:
        (node,) = world.nodes
        engine = node.engine
        await node.within(engine.submit(SyncItem("a", b"old", updated_at=0), ack=Ack.STORED))
        state = world.l2.tier.saved() if backup else ({}, {}, 0)
        await node.within(engine.submit(SyncItem("a", b"row", updated_at=0), ack=Ack.STORED))
        world.l3.cut_off.add(node.name)
        await node.within(engine.submit(SyncItem("a", b"cached", updated_at=0), SubmitOptions.cache(86_400)))
        await until(lambda: world.l2.tier.rows["a"].content == b"cached")
        world.l2.stop()
        world.history.lossless = False
        world.l2.start(state)
        await asyncio.sleep(20)  # the lane to SQL tries again less often than healing does
        world.l3.cut_off.clear()

    for seed in range(20):
        simulate(seed, script, engines=1)


def test_I1_a_change_of_state_does_not_bless_a_copy_of_what_another_engine_deleted() -> None:
    """SQL knew of the delete and Redis not yet; with a new stamp the copy there withstood it for ever."""

    async def script(world: World) -> None:
        one, other = world.nodes
        await one.within(one.engine.submit(SyncItem("a", b"x", updated_at=0), ack=Ack.STORED))
        world.l2.cut_off.add(one.name)
        await one.within(one.engine.delete("a"))
        await until(lambda: not world.l3.tier.rows)
        other.clock.off_ms = one.clock.off_ms + 5_000
        await other.within(other.engine.set_state("a", "hot", ack=Ack.STORED))
        world.l2.cut_off.clear()

    simulate(1, script, engines=2)


def test_I1_a_change_of_state_of_what_redis_alone_keeps_still_reaches_it() -> None:
    """The row that it took the place of was deleted with the very stamp of the item."""

    async def script(world: World) -> None:
        (node,) = world.nodes
        engine = node.engine
        await node.within(engine.submit(SyncItem("a", b"row", updated_at=0), ack=Ack.STORED))
        cached = SyncItem("a", b"cached", updated_at=0)
        await node.within(engine.submit(cached, SubmitOptions.cache(86_400), ack=Ack.STORED))
        await node.within(engine.set_state("a", "hot", ack=Ack.STORED))
        assert world.l2.tier.rows["a"].content == b"cached"
        assert world.l2.tier.rows["a"].state == "hot"

    simulate(1, script, engines=1)
