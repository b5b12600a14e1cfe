"""Items that the database refuses, and items that look as if it should (fault matrix 17)."""

from __future__ import annotations

import asyncio
import random
import time

import pytest

from sync_engine import Ack, InvalidId, InvalidItem, StoreError, SyncEngine, SyncItem
from sync_engine.testing.databases import ask

from .rig import MakeRig
from .truths import Truth, each_truth, trigger, untrigger

MIB = 1024 * 1024


@pytest.mark.slow
@each_truth
async def test_I7_poison_among_many_is_set_aside_delays_little_and_can_be_sent_again(
    make_rig: MakeRig, truth: Truth
) -> None:
    """Larger than MariaDB's packet, or refused by a trigger; among hundreds of healthy items of the same batch."""
    mysql = truth.name == "MariaDB"
    rig = make_rig()
    poison = [SyncItem(f"p.{n}", b"%d" % n * (3 * MIB if mysql else 10)) for n in range(3 if mysql else 9)]
    healthy = [SyncItem(f"h.{n:03}", b"%d" % n) for n in range(400)]
    async with SyncEngine(rig.config()) as engine:
        await engine.flush()
    if mysql:
        await ask(truth.url, f"SET GLOBAL max_allowed_packet = {MIB}")
    else:
        await trigger(rig, "poison", "{id} LIKE 'p.%'")
    try:
        async with SyncEngine(rig.config(batch_flush_ms=50)) as engine:
            without_ms = await _stored_ms(engine, healthy)
            rng = random.Random(17)
            both = rng.sample([*healthy, *poison], len(healthy) + len(poison))
            refused = await engine.submit_many(both)
            begun_s = time.monotonic()
            ids = {item.object_id for item in poison}
            await asyncio.gather(*(each.stored() for each in refused if each.object_id not in ids))
            with_ms = (time.monotonic() - begun_s) * 1000
            for each in refused:
                if each.object_id in ids:
                    with pytest.raises(StoreError):
                        await each.stored()
            await rig.work(engine)
            await engine.flush()
            rig.figures.faults = engine.stats().quarantined
            assert rig.figures.faults == len(poison)
            for item in poison:
                assert await engine.get(item.object_id) == item
            assert await engine.count_prefix("p.") == 0
            await rig.read_back(engine)
    finally:
        if mysql:
            await ask(truth.url, f"SET GLOBAL max_allowed_packet = {16 * MIB}")
        else:
            await untrigger(rig, "poison")
    async with SyncEngine(rig.config()) as engine:  # with connections that know the larger packet
        assert await engine.retry_quarantined() == len(poison)
        await engine.flush()
        assert engine.stats().quarantined == 0
        assert [item.content for item in await engine.scan_prefix("p.")] == [item.content for item in poison]
        await rig.read_back(engine)
    rig.figures.acked += 2 * len(healthy) + len(poison)
    what = "larger than a packet" if mysql else "refused by a trigger"
    rig.figures.tell(
        f"17 {len(poison)} items {what} among 400",
        f"the healthy ones stored after {with_ms:.0f} ms, without the others after {without_ms:.0f} ms",
    )


async def _stored_ms(engine: SyncEngine, items: list[SyncItem]) -> float:
    begun_s = time.monotonic()
    await asyncio.gather(*(receipt.stored() for receipt in await engine.submit_many(items)))
    return (time.monotonic() - begun_s) * 1000


@each_truth
async def test_what_looks_like_poison_is_stored_or_refused_at_the_door(make_rig: MakeRig, truth: Truth) -> None:
    """NUL, which PostgreSQL's text cannot hold; surrogates; what is deep; what quotes, ends statements, or is huge."""
    rig = make_rig()
    contents = [
        b"\0",
        b"a\0b",
        b'"\\u0000"',
        b'{"a":"\\u0000"}',
        b'"\\ud800"',
        b"[" * 127 + b"]" * 127,
        b"'; DROP TABLE sync_items",
    ]
    contents += [b"[" * 200 + b"]" * 200, b"\xff\xfe", b"%s %% ? $1 :x", b"-0", b"1e400", b'"\xf0\x9f\x98\x80"', b""]
    async with SyncEngine(rig.config()) as engine:
        items = [SyncItem(f"q.{n:02}'\"\\%_😀", content) for n, content in enumerate(contents)]
        await engine.submit_many(items, ack=Ack.STORED)
        for bad in ("", "a\0b", "\ud800", "x" * 256):
            with pytest.raises(InvalidId):
                await engine.submit(SyncItem(bad, b"x"))
            rig.figures.failed += 1
        with pytest.raises(InvalidItem):
            await engine.submit(SyncItem("a", b"x", state="a\0b"))
        rig.figures.failed += 1
        await rig.work(engine)
        await engine.flush()
        assert engine.stats().quarantined == 0
        assert {item.object_id: item.content for item in await engine.scan_prefix("q.")} == {
            item.object_id: item.content for item in items
        }
        await rig.read_back(engine)
    rig.figures.acked, rig.figures.faults = rig.figures.acked + len(items), len(items) + rig.figures.failed
    rig.figures.tell("17 NUL, surrogates, deep JSON, quotes: stored byte by byte or refused at the door")
