"""Rows of the database are damaged, items are huge, callers flood, settings change: over every database.

Rows 18, 19 and 23 of the fault matrix.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence

import pytest

from sync_engine import Ack, ContentType, Corruption, PayloadTooLarge, SubmitOptions, SyncEngine, SyncItem
from sync_engine.storage.sql import SqlStore
from sync_engine.testing.databases import ask

from ..settings import change_settings
from .driver import STORED, flood_content
from .rig import NO_L1, MakeRig
from .truths import ServerTruth, Truth, each_server, each_truth

MIB = 1024 * 1024


# 19: damage


@each_truth
async def test_I5_a_damaged_row_is_never_served(make_rig: MakeRig, truth: Truth) -> None:
    rig, rng = make_rig(), random.Random(19)
    count = 60 if truth.long else 12
    items = {f"b.{n:03}": SyncItem(f"b.{n:03}", rng.randbytes(40)) for n in range(count)}
    items |= {f"j.{n:03}": SyncItem.from_json(f"j.{n:03}", {"n": n, "text": "ä" * 9}) for n in range(count)}
    async with SyncEngine(rig.config(**NO_L1)) as engine:
        await rig.work(engine)
        alone, both = list(items.values())[::2], list(items.values())[1::2]
        await engine.submit_many(alone, SubmitOptions.durable(), ack=Ack.STORED)
        await engine.submit_many(both, ack=Ack.STORED)
        await engine.flush()
        for n, item in enumerate(items.values()):
            await ask(rig.sql_url, *_damage(item, n % 3, rng))
            rig.figures.faults += 1
        detected = 0
        for item in alone:
            try:
                found = await engine.get(item.object_id)
            except Corruption:
                detected += 1
                continue
            rig.figures.lies += 1
            rig.figures.wrong.append(f"lie: {item.object_id} is {found!r}")
        with pytest.raises(Corruption):
            await engine.get_many([item.object_id for item in alone])
        for item in both:  # Redis has a sound copy
            detected += await engine.get(item.object_id) == item
        assert detected == len(items)
        # A damaged row is in no write's way, and no delete's.
        await engine.submit_many([item.replace(content=b"anew", content_type=None) for item in alone], ack=Ack.STORED)
        assert await engine.delete_many([item.object_id for item in both]) == len(both)
        await engine.flush()
        anew = await engine.get_many(list(items))
        assert {item.object_id for item in alone} == anew.keys()
        assert {item.content for item in anew.values()} == {b"anew"}
        await rig.read_back(engine)
    rig.figures.acked += 2 * len(items)
    rig.figures.tell("19 rows damaged", f"{detected} of {len(items)} detected or answered with a sound copy")


def _damage(item: SyncItem, how: int, rng: random.Random) -> Sequence[object]:
    """A byte of the content, of the hash, or the content of another item."""
    json = item.content_type is ContentType.JSON
    column = "payload" if json else "payload_blob"
    if how == 0:
        at = rng.randrange(len(item.content))
        content: bytes | str = item.content[:at] + bytes([item.content[at] ^ 1]) + item.content[at + 1 :]
        if json:
            content = item.content.decode().replace('"n"', '"m"', 1)
        return f"UPDATE sync_items SET {column} = ? WHERE id = ?", content, item.object_id
    if how == 1:
        wrong = f"{int(item.content_hash[0], 16) ^ 1:x}{item.content_hash[1:]}"
        return "UPDATE sync_items SET payload_hash = ? WHERE id = ?", wrong, item.object_id
    return f"UPDATE sync_items SET {column} = ? WHERE id = ?", '{"n":-1}' if json else b"another", item.object_id


# 18: too much


@pytest.mark.slow
@each_server
async def test_the_largest_item_reaches_the_database_and_one_byte_more_is_refused(
    make_rig: MakeRig, truth: ServerTruth
) -> None:
    rig, largest = make_rig(redis_url=None), (16 if truth.long else 2) * MIB
    rig.settings["max_payload_bytes"] = largest
    if truth.name == "MariaDB":
        await ask(truth.url, f"SET GLOBAL max_allowed_packet = {64 * MIB}")
    items = [SyncItem("binary", b"\xff" * largest), SyncItem("json", b'"' + b"j" * (largest - 2) + b'"')]
    items.append(SyncItem("less", b"\xfe" * (largest - 1)))
    async with SyncEngine(rig.config()) as engine:
        for item in items:
            with pytest.raises(PayloadTooLarge):
                await engine.submit(item.replace(content=item.content.ljust(largest + 1)))
            await engine.submit(item, ack=Ack.STORED)
            rig.figures.acked += 1
        assert engine.stats().quarantined == 0
        assert [item.content for item in await engine.scan_prefix("")] == [item.content for item in items]
    rig.figures.faults = rig.figures.failed = len(items)
    rig.figures.tell(f"18 items of max_payload_bytes, {largest // MIB} MiB, and of a byte more")


@pytest.mark.slow
@pytest.mark.long
@each_server
async def test_I10_a_flood_while_the_database_stands_still_is_bounded_and_arrives(
    make_rig: MakeRig, truth: ServerTruth
) -> None:
    rig, bound, size = make_rig(redis_url=None), 4 * MIB, 256 * 1024
    count = 800
    rig.settings |= {"pending_max_bytes": bound, "l1_max_bytes": bound, "sql_timeout_ms": 100}
    async with SyncEngine(rig.config()) as engine:
        await engine.flush()
    await truth.server.pause()
    rig.start(flood={"count": count, "bytes_each": size, "tasks": 20})
    (told,) = await rig.heard("flooded")
    await truth.server.resume()
    assert await asyncio.to_thread(rig.drivers.ended) == STORED
    (down,) = [line for line in await rig.lines() if line["e"] == "down"]
    assert told["acked"] == count, "the log has room for all of it"
    grown = max(told["peak"], down["peak"]) - told["before"]
    # Twenty callers with an item each, the group being written and its copy, a batch and its statement on their way.
    assert grown < 30 * bound, f"{told} {down}"
    store = await SqlStore.connect(rig.sql_url)
    assert await store.count_prefix("f.") == count
    found = await store.get_many([f"f.{n:05}" for n in range(0, count, 50)])
    await store.close()
    assert [item.content for item in found.values()] == [flood_content(n, size) for n in range(0, count, 50)]
    rig.figures.faults, rig.figures.acked = 1, count
    flood = f"18 a flood of {count * size // MIB} MiB while SQL stands still, bound {bound // MIB} MiB"
    rig.figures.tell(flood, f"memory grew by {grown / MIB:.0f} MiB")


# 23: settings


@pytest.mark.slow
@each_truth
async def test_settings_that_change_a_hundred_times_a_second_drop_nothing(make_rig: MakeRig, truth: Truth) -> None:
    rig, rng = make_rig(), random.Random(23)
    changes = 400 if truth.long else 30
    async with SyncEngine(rig.config(backpressure_wait_ms=60_000)) as engine:
        working = asyncio.create_task(rig.work(engine, moves=changes // 2))
        while rig.figures.faults < changes or not working.done():
            rig.figures.faults += 1
            await change_settings(engine, rng, rig.figures.faults)
            await asyncio.sleep(0.01)
        await working
        await engine.flush()
        await rig.read_back(engine)
        assert engine.stats().quarantined == 0
    assert rig.figures.failed == 0
    rig.figures.tell("23 settings changed under load", "0 operations dropped")
