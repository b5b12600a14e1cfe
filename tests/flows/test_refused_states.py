"""A change of state behind a put that SQL refuses: read, repeated, replayed, and beside another engine's newer write.

Both are in one batch. The put is refused and on file before its change of state has its turn; ``Parted`` stops there.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace

import pytest

from sync_engine import Ack, StoreError, SyncEngine, SyncItem
from sync_engine.forward import Forwarding
from sync_engine.item import Op
from sync_engine.ports import Applied, Tier

from .rig import Held, Rig, on, soon, until

STORED = SyncItem("x", b"stored", state="s0")
BAD = SyncItem("x", b"bad", state="s1", version=2)
NEWER = SyncItem("x", b"newer", state="s2", version=3)


class Choosy(Forwarding):
    """Refuses some content, as a CHECK or a trigger does, until ``mended``."""

    def __init__(self, tier: Tier) -> None:
        super().__init__(tier)
        self.mended = False

    async def apply(self, ops: Sequence[Op], /) -> Applied:
        bad = [op for op in ops if op.item is not None and op.item.content == BAD.content and not self.mended]
        applied = await super().apply([op for op in ops if op not in bad])
        refused = {op.object_id: StoreError("l3", "refused by the test") for op in bad}
        return replace(applied, refused={**applied.refused, **refused})


async def to_between(engine: SyncEngine, held: Held) -> None:
    """Let the put be refused, and what follows it wait."""
    put = engine._running.pending.get("x").base
    held.release()
    while not put.settled:  # noqa: ASYNC110  # it settles in a turn of the loop, and the next call must not begin
        await asyncio.sleep(0)
    held.hold()
    await soon()


async def refused(engine: SyncEngine, held: Held, *, row: bool) -> None:
    if row:
        await engine.submit(STORED, ack=Ack.STORED)
    held.hold()
    await engine.submit(BAD)
    assert await engine.set_state("x", "s3")
    await to_between(engine, held)


async def seen(engine: SyncEngine) -> tuple[bytes, str] | None:
    found = await engine.get("x")
    return None if found is None else (found.content, found.state)


@pytest.mark.parametrize("row", [False, True], ids=["no row", "an older row"])
async def test_I2_it_is_read_as_it_was_acknowledged(rig: Rig, row: bool) -> None:
    held: list[Held] = []

    async def loader(_: str) -> SyncItem:
        pytest.fail("there is an item")

    choosy = on("l3", lambda tier: Held(Choosy(tier)), held)
    async with rig.engine(redis=False, around=choosy, l1_max_bytes=0) as engine:
        await refused(engine, held[0], row=row)
        assert await seen(engine) == (b"bad", "s3")
        assert (await engine.get_many(["x"]))["x"].state == "s3"
        assert await engine.contains("x")
        assert (await engine.get_or_load("x", loader)).content == b"bad"
        held[0].release()
        await engine.flush()
        assert await seen(engine) == (b"bad", "s3")


@pytest.mark.parametrize("row", [False, True], ids=["no row", "an older row"])
async def test_I3_neither_is_lost_by_a_stop_between_them(rig: Rig, row: bool) -> None:
    held: list[Held] = []
    async with rig.engine(redis=False, around=on("l3", lambda tier: Held(Choosy(tier)), held)) as engine:
        await refused(engine, held[0], row=row)
        await engine.stop(timeout=0)
        held[0].release()
    kept: list[Choosy] = []
    async with rig.engine(redis=False, around=on("l3", Choosy, kept)) as engine:
        await engine.flush()
        assert await seen(engine) == (b"bad", "s3")
        kept[0].mended = True
        assert await engine.retry_quarantined() == 1
        await engine.flush()
        assert await engine.quarantine() == []
        assert (await rig.in_tiers("x"))[1] == await engine.get("x")
        assert await seen(engine) == (b"bad", "s3")


@pytest.mark.parametrize("row", [False, True], ids=["no row", "an older row"])
async def test_I3_another_change_between_them_counts(rig: Rig, row: bool) -> None:
    held: list[Held] = []
    async with rig.engine(redis=False, around=on("l3", lambda tier: Held(Choosy(tier)), held)) as engine:
        await refused(engine, held[0], row=row)
        assert await engine.set_state("x", "s4")
        assert await engine.set_state("x", "s5")
        held[0].release()
        await engine.flush()
        assert await seen(engine) == (b"bad", "s5")
        assert [each.op.state for each in engine._running.quarantine.all()] == [None]
        assert engine.stats().quarantined == 1


@pytest.mark.parametrize("mended", ["never", "between", "later"])
async def test_I1_it_lifts_nothing_above_what_another_engine_has_stored(rig: Rig, mended: str) -> None:
    kept: list[Choosy] = []
    held: list[Held] = []

    def choosy(tier: Tier) -> Held:
        kept.append(Choosy(tier))
        return Held(kept[-1])

    async with rig.engine(around=on("l3", choosy, held)) as slow, rig.engine(data="other") as quick:
        held[0].hold()
        await slow.submit(BAD)
        await until(lambda: held[0].waiting or slow._running.writes.hurry())
        await quick.submit(NEWER, ack=Ack.STORED)
        await slow.set_state("x", "s3")
        held[0].release()
        if mended == "between":
            await until(lambda: slow.stats().quarantined)
            kept[0].mended = True
        await slow.flush()
        if mended == "later":
            kept[0].mended = True
            await slow.retry_quarantined()
            await slow.flush()
        copy, row = await rig.in_tiers("x")
        assert row is not None
        assert (row.content, row.state) == (b"newer", "s3")
        assert copy == row == await slow.get("x")


async def test_I1_l1_forgets_content_that_another_engine_has_written_over(rig: Rig) -> None:
    held: list[Held] = []
    async with rig.engine(around=on("l3", Held, held), batch_flush_ms=0) as slow, rig.engine(data="other") as quick:
        held[0].hold()
        await slow.submit(STORED)
        await quick.submit(NEWER, ack=Ack.STORED)
        await slow.set_state("x", "s3")
        await to_between(slow, held[0])
        await slow.set_state("x", "s4")
        held[0].release()
        await slow.flush()
        assert await seen(slow) == (b"newer", "s4")
