"""What a review of the engine's core found: each test tells one story that once ended badly."""

from __future__ import annotations

import asyncio
import errno
import os
import random
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from sync_engine import (
    Ack,
    NotRunning,
    StoreError,
    SubmitOptions,
    SyncEngine,
    SyncItem,
    TierUnavailable,
    VersionConflict,
)
from sync_engine.clock import Stamps, SystemClock
from sync_engine.forward import Forwarding
from sync_engine.item import Op
from sync_engine.late import Late
from sync_engine.ports import Applied, Tier
from sync_engine.storage.sql import store as sql_store
from sync_engine.storage.sql.sqlite import meaning
from sync_engine.testing.tiers import Refusing
from sync_engine.write.batcher import Batcher
from sync_engine.write.pending import Entry
from sync_engine.write.quarantine import Quarantine

from .rig import CACHE, DURABLE, Held, Hurried, Rig, on, soon, until

ONE = SyncItem("a", b"one", version=1, updated_at=1)
TWO = SyncItem("a", b'{"two": 2}', version=2, updated_at=2)
HOUR_MS = 3_600_000


class Ahead(Hurried):
    """A wall clock that runs ahead by ``ahead_ms``."""

    def __init__(self, ahead_ms: int = 0) -> None:
        self.ahead_ms = ahead_ms

    def now_us(self) -> int:
        return super().now_us() + self.ahead_ms * 1000


class Picky(Forwarding):
    """Refuses puts of content that contains ``bad``; their neighbours go through."""

    async def apply(self, ops: Any, /) -> Applied:
        bad = {op.object_id for op in ops if op.item is not None and b"bad" in op.item.content}
        applied = await self.tier.apply([op for op in ops if op.object_id not in bad])
        refused = {object_id: StoreError(self.name, "bad content") for object_id in bad}
        return Applied(applied.superseded, {**applied.refused, **refused}, applied.restated, applied.existed)


class Disk:
    """The disk under the log: it can be held, or fail."""

    def __init__(self) -> None:
        self.open = threading.Event()
        self.open.set()
        self.error: OSError | None = None
        self._sync = os.fdatasync

    def fdatasync(self, fd: int) -> None:
        self.open.wait(10)
        if self.error is not None:
            raise self.error
        self._sync(fd)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[Disk]:
    made = Disk()
    monkeypatch.setattr(os, "fdatasync", made.fdatasync)
    yield made
    made.open.set()
    made.error = None


# Order of what one engine does to one id


async def test_I2_a_state_change_behind_a_compare_and_set_does_not_hide_it(rig: Rig) -> None:
    held: list[Held] = []
    async with rig.engine(around=on("l3", Held, held)) as engine:
        await engine.submit(ONE, ack=Ack.STORED)
        held[0].hold()
        swapping = asyncio.create_task(engine.submit(TWO, SubmitOptions(if_version=1)))
        await until(lambda: held[0].waiting)
        await engine.set_state("a", "s")
        held[0].release()
        await swapping
        assert await engine.get("a") == TWO.with_state("s")
        await rig.check(engine, {"a": TWO.with_state("s")})


@pytest.mark.parametrize("changes", [1, 2])
async def test_I3_a_state_change_in_memory_does_not_undo_a_write_that_the_log_has_yet_to_answer(
    rig: Rig, disk: Disk, changes: int
) -> None:
    held: list[Held] = []
    # Each operation is a batch of its own.
    async with rig.engine(around=on("l3", Held, held), batch_flush_count=1) as engine:
        held[0].hold()
        first = SyncItem("z", b"first in the queue")
        await engine.submit(first)
        await engine.submit(ONE)
        disk.open.clear()
        submitting = asyncio.create_task(engine.submit(TWO))
        await soon()
        changing = [asyncio.create_task(engine.set_state("a", f"s{n}", ack=Ack.MEMORY)) for n in range(changes)]
        await soon()
        disk.open.set()
        await asyncio.gather(submitting, *changing)
        assert await engine.get("a") == TWO.with_state(f"s{changes - 1}")
        held[0].release()
        await rig.check(engine, {"z": first, "a": TWO.with_state(f"s{changes - 1}")})


async def test_I1_a_state_change_in_memory_does_not_undo_a_delete_that_the_log_has_yet_to_answer(
    rig: Rig, disk: Disk
) -> None:
    held: list[Held] = []
    async with rig.engine(around=on("l3", Held, held)) as engine:
        held[0].hold()
        await engine.submit(SyncItem("z", b""), ack=Ack.LOGGED)
        await engine.submit(ONE)
        disk.open.clear()
        deleting = asyncio.create_task(engine.delete("a"))
        await soon()
        changing = asyncio.create_task(engine.set_state("a", "s", ack=Ack.MEMORY))
        await soon()
        disk.open.set()
        await asyncio.gather(deleting, changing)
        assert await engine.get("a") is None
        held[0].release()
        await engine.flush()
        assert await rig.in_tiers("a") == (None, None)


async def test_I2_a_state_change_on_top_of_a_delete_shows_nothing(rig: Rig) -> None:
    l2: list[Held] = []
    l3: list[Held] = []
    asking = lambda tier: Held(tier, ("exists_batch",))  # noqa: E731  a wrapper
    around = lambda tier: on("l2", asking, l2)(on("l3", Held, l3)(tier))  # noqa: E731  both
    async with rig.engine(around=around, l1_max_bytes=0) as engine:
        await engine.submit(ONE, ack=Ack.STORED)
        l2[0].hold()
        l3[0].hold()
        # Both ask whether the item exists before either is accepted.
        deleting = asyncio.create_task(engine.delete("a"))
        await until(lambda: l2[0].waiting == 1)
        changing = asyncio.create_task(engine.set_state("a", "s"))
        await until(lambda: l2[0].waiting == 2)
        l2[0].release()
        assert await asyncio.gather(deleting, changing) == [True, True]
        assert await engine.get("a") is None
        assert await engine.get_many(["a"]) == {}
        assert not await engine.contains("a")
        assert not (await engine.status("a")).exists
        l3[0].release()
        await engine.flush()
        assert await rig.in_tiers("a") == (None, None)
        assert await engine.get("a") is None


async def test_I2_a_scan_does_not_show_the_row_of_an_item_that_has_left_sql(rig: Rig) -> None:
    l2: list[Held] = []
    l3: list[Held] = []
    async with rig.engine(around=lambda tier: on("l2", Held, l2)(on("l3", Held, l3)(tier))) as engine:
        await engine.submit(ONE, ack=Ack.STORED)
        l2[0].hold()
        l3[0].hold()
        await engine.submit(SyncItem("z", b""))
        await engine.submit(TWO, CACHE)
        scanning = asyncio.create_task(engine.scan_prefix("a"))
        await until(lambda: l2[0].waiting and l3[0].waiting)
        l2[0].release()
        await until(lambda: len(engine._running.writes.truth.batcher) == 2)  # type: ignore[union-attr]  # it runs
        l3[0].release()
        assert await scanning == []


# Two engines


async def test_G13_a_lost_compare_and_set_lets_the_caller_see_what_beat_it(rig: Rig) -> None:
    async with rig.engine() as engine, rig.engine(data="other") as other:
        await engine.submit(ONE, ack=Ack.STORED)
        await other.submit(TWO, ack=Ack.STORED)
        assert await engine.get("a") == ONE, "its own copy; it has not heard of the other"
        with pytest.raises(VersionConflict):
            await engine.submit(ONE.with_version(3), SubmitOptions(if_version=1))
        assert await engine.get("a") == TWO


@pytest.mark.parametrize("deleted", [False, True])
async def test_I1_a_compare_and_set_whose_stamp_is_too_old_is_not_said_to_have_happened(
    rig: Rig, deleted: bool
) -> None:
    async with rig.engine() as late, rig.engine(data="other", clock=Ahead(HOUR_MS)) as early:
        await early.submit(ONE, ack=Ack.STORED)
        if deleted:
            await early.delete("a", ack=Ack.STORED)
        version = 0 if deleted else 1
        with pytest.raises(VersionConflict):
            await late.submit(TWO, SubmitOptions(if_version=version))
        assert await late.get("a") == (None if deleted else ONE)


@pytest.mark.parametrize("options", [None, SubmitOptions(redis_ttl=3600)], ids=["default", "ttl"])
async def test_I1_a_write_that_reaches_redis_after_another_engines_state_change_is_not_served(
    rig: Rig, options: SubmitOptions | None
) -> None:
    held: list[Held] = []
    async with rig.engine(around=on("l2", Held, held)) as slow:
        async with rig.engine(data="other") as quick:
            held[0].hold()
            await slow.submit(ONE, options)
            await until(lambda: held[0].waiting)  # SQL has it, Redis has not
            await asyncio.sleep(0.002)  # another millisecond, another stamp
            assert await quick.set_state("a", "s", ack=Ack.STORED)
            held[0].release()
            await slow.flush()
        async with rig.engine(data="third") as third:
            assert await third.get("a") == ONE.with_state("s")
            assert await third.list_state_ids("default") == []
        assert await rig.l2.list_state_ids("default") == []


async def test_a_state_change_of_a_cold_item_does_not_keep_redis_from_taking_it_in(rig: Rig) -> None:
    async with rig.engine(l1_max_bytes=0) as engine:
        await engine.submit(ONE, DURABLE, ack=Ack.STORED)
        await engine.submit(TWO, ack=Ack.STORED)
        await rig.key("DEL", rig.redis_prefix + "a")
        await engine.set_state("a", "s", ack=Ack.STORED)
        assert await engine.get("a") == TWO.with_state("s")
        await until(lambda: not engine._running.reader._fills)  # type: ignore[union-attr]  # it runs
        assert await rig.l2.get("a") == TWO.with_state("s")


async def test_a_state_change_of_what_another_engine_deleted_leaves_no_copy_in_memory(rig: Rig) -> None:
    async with rig.engine() as engine, rig.engine(data="other") as other:
        await engine.submit(ONE, ack=Ack.STORED)
        await other.delete("a", ack=Ack.STORED)
        assert await engine.set_state("a", "s"), "as far as it knows"
        await engine.flush()
        assert await engine.get("a") is None


async def test_a_stamp_from_a_damaged_copy_does_not_use_up_the_clock() -> None:
    stamps = Stamps(SystemClock(), random.Random(1))
    stamps.observe(2**63 - 2)
    assert stamps.next() < stamps.next() < 2**62


# What a tier refused


async def test_I7_a_refused_write_does_not_take_the_write_before_it_along(rig: Rig) -> None:
    for name in ("l2", "l3"):
        async with rig.engine(around=on(name, Picky), data=name) as engine:
            good, bad = SyncItem(name, b"good", updated_at=1), SyncItem(name, b"bad", updated_at=2)
            await engine.submit_many([good, bad])
            await engine.flush()
            assert engine.stats().quarantined == 1
            assert await engine.get(name) == bad
            assert await (await rig.l3()).get(name) == (good if name == "l3" else bad)


async def test_I3_a_state_change_of_a_quarantined_item_writes_it_again(rig: Rig) -> None:
    refusing: list[Refusing] = []
    async with rig.engine(around=on("l3", lambda tier: Refusing(tier, ["a"]), refusing)) as engine:
        await engine.submit(ONE)
        await engine.flush()
        assert engine.stats().quarantined == 1
        refusing[0].ids.clear()
        assert await engine.set_state("a", "s")
        assert await engine.get("a") == ONE.with_state("s")
        await rig.check(engine, {"a": ONE.with_state("s")})
        assert engine.stats().quarantined == 0


async def test_I2_a_state_change_that_redis_refuses_is_what_this_engine_reads(rig: Rig) -> None:
    async with rig.engine(l1_max_bytes=0) as engine:
        await engine.submit(ONE, ack=Ack.STORED)
        await rig.key("SET", rig.redis_prefix + "state:bad", "somebody's")
        await engine.set_state("a", "bad")
        await engine.flush()
        assert engine.stats().quarantined == 1
        assert await engine.get("a") == ONE.with_state("bad")
        assert await engine.get_many(["a"]) == {"a": ONE.with_state("bad")}


async def test_I11_a_quarantined_item_ends_at_its_deadline_too(rig: Rig) -> None:
    clock = Ahead()
    async with rig.engine(clock=clock, around=on("l2", lambda tier: Refusing(tier, ["a"]))) as engine:
        await engine.submit(ONE, SubmitOptions.cache(60))
        await engine.flush()
        assert await engine.get("a") == ONE
        clock.ahead_ms = 61_000
        assert await engine.get("a") is None
        assert await engine.get_many(["a"]) == {}
        assert not await engine.contains("a")


async def test_quarantine_is_ended_by_two_lanes_at_once(tmp_path: Path) -> None:
    quarantine = Quarantine(tmp_path)
    op = Op(kind="put", object_id="a", stamp=1, item=ONE)
    await quarantine.keep(op, "l2", "bad")
    await asyncio.gather(quarantine.overtaken("a", 2), quarantine.overtaken("a", 3))
    assert len(quarantine) == 0
    newer = Op(kind="put", object_id="a", stamp=5, item=TWO)
    await quarantine.keep(op, "l2", "bad")
    await asyncio.gather(quarantine.overtaken("a", 2), quarantine.keep(newer, "l3", "bad"))
    assert quarantine.item("a") is TWO
    await asyncio.gather(quarantine.keep(op, "l2", "bad"), quarantine.keep(newer, "l3", "bad"))
    assert quarantine.item("a") is TWO


async def test_I3_what_the_quarantine_cannot_write_stays_in_the_log(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "no space left on device")

    async with rig.engine(around=on("l3", lambda tier: Refusing(tier, ["a"]))) as engine:
        with monkeypatch.context() as patched:
            patched.setattr(Quarantine, "_write", full)
            await engine.submit(ONE)
            await engine.submit(SyncItem("b", b""), ack=Ack.STORED)
            await engine.flush()
        assert await engine.get("a") == ONE
        assert (await engine.status("a")).quarantined
    async with rig.engine() as engine:
        assert engine.stats().recovered == 1
        await rig.check(engine, {"a": ONE})


async def test_what_the_quarantine_cannot_write_is_tried_again_once_for_a_batch(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = 0

    def full(*_: object) -> None:
        nonlocal tried
        tried += 1
        raise OSError(errno.ENOSPC, "no space left on device")

    async with rig.engine(redis=False, around=on("l3", lambda tier: Refusing(tier, ["a"]))) as engine:
        with monkeypatch.context() as patched:
            patched.setattr(Quarantine, "_write", full)
            await engine.submit(ONE)
            await engine.flush()
            tried = 0
            await engine.submit_many([SyncItem(f"b{n}", b"") for n in range(200)])
            await engine.flush()
            assert tried == 1


# Bounds


async def test_I10_what_the_log_has_taken_over_leaves_memory_whatever_was_waited_for(rig: Rig) -> None:
    held: list[Held] = []
    async with rig.engine(around=on("l3", Held, held), pending_max_bytes=10_000) as engine:
        held[0].hold()
        items = [SyncItem(f"m.{n:02}", bytes([n]) * 2_000) for n in range(30)]
        for item in items:
            await engine.submit(item, ack=Ack.MEMORY)
        await until(lambda: engine.stats().log_records == 30)
        assert engine.stats().pending_bytes <= 10_000 + 5_000  # one batch may be in hand
        held[0].release()
        await rig.check(engine, {item.object_id: item for item in items})


async def test_I10_what_a_failing_log_does_not_take_is_bounded_in_bytes(rig: Rig, disk: Disk) -> None:
    held: list[Held] = []
    async with rig.engine(
        around=on("l3", Held, held), pending_max_bytes=10_000, backpressure_wait_ms=10, l1_max_bytes=0
    ) as engine:
        held[0].hold()
        disk.error = OSError(errno.EIO, "input/output error")
        items = [SyncItem(f"m.{n:02}", bytes([n]) * 2_000) for n in range(30)]
        outcomes = [await asyncio.gather(engine.submit(i, ack=Ack.MEMORY), return_exceptions=True) for i in items]
        taken = [item for item, (outcome,) in zip(items, outcomes, strict=True) if not isinstance(outcome, Exception)]
        assert 0 < len(taken) <= 5
        assert engine.stats().pending_bytes <= 10_000
        disk.error = None
        held[0].release()
        await rig.check(engine, {item.object_id: item for item in taken})


# Tiers that come late, engines that end


async def test_a_tier_that_turns_out_to_be_unusable_is_waited_for_and_refuses_nothing(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcome: list[Exception] = [TierUnavailable("l3", "locked")]
    connect = sql_store.SqlStore.connect

    async def failing(*args: Any, **kwargs: Any) -> Any:
        if outcome:
            raise outcome[0]
        return await connect(*args, **kwargs)

    monkeypatch.setattr(sql_store.SqlStore, "connect", failing)
    async with rig.engine() as engine:
        await engine.submit(ONE)
        outcome[0] = StoreError("l3", "the tables are of version 9")
        lane = engine._running.writes.truth  # type: ignore[union-attr]  # it runs
        await until(lambda: lane is not None and lane.trouble is not None and "version 9" in lane.trouble)
        assert engine.stats().quarantined == 0
        outcome.clear()
        await rig.check(engine, {"a": ONE})


async def test_I7_a_user_who_may_not_write_keeps_operations_waiting_and_refuses_none(rig: Rig) -> None:
    user = "u" + rig.redis_prefix.removesuffix(":")
    await rig.key("ACL", "SETUSER", user, "on", ">secret", "~*", "+@all", "-evalsha", "-eval")
    address = urlsplit(rig.redis_url)
    host = f"@{address.netloc.rpartition('@')[2]}" if address.scheme != "unix" else "@"
    url = f"{address.scheme}://{user}:secret{host}{address.path}"
    async with rig.engine(redis_url=url, redis_prefix=rig.redis_prefix) as engine:
        await engine.submit(ONE)
        lane = engine._running.writes.cache  # type: ignore[union-attr]  # it runs
        await until(lambda: lane is not None and lane.trouble is not None)
        assert engine.stats().quarantined == 0
        await rig.key("ACL", "SETUSER", user, "+@all")
        await rig.check(engine, {"a": ONE})
    await rig.key("ACL", "DELUSER", user)


@pytest.mark.parametrize("code", [sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB])
def test_I7_a_damaged_database_file_is_not_the_fault_of_the_items(code: int) -> None:
    error = sqlite3.DatabaseError("damaged")
    error.sqlite_errorcode = code
    assert isinstance(meaning(error), TierUnavailable)


async def test_a_late_tier_tells_any_failure_to_connect_as_unavailable() -> None:
    async def connect() -> Tier:
        raise StoreError("l3", "not a database")

    async def connected(_: Tier) -> None: ...

    late = Late("l3", connect, connected)
    with pytest.raises(StoreError):
        await late.ready()
    with pytest.raises(TierUnavailable, match="not a database"):
        await late.fetch(["a"])
    await late.close()


async def test_nobody_waits_for_a_lane_that_has_ended() -> None:
    batcher = Batcher(flush_count=1, flush_bytes=1, flush_after_ms=0, clock=SystemClock())
    batcher.put(Entry(Op(kind="delete", object_id="a", stamp=1)))
    batcher.fail(NotRunning("stopped"), everybody=True)
    async with asyncio.timeout(1):
        with pytest.raises(NotRunning):
            await batcher.drained()


async def test_stop_counts_what_the_log_took_last(rig: Rig, disk: Disk) -> None:
    engine = rig.engine()
    await engine.start()
    disk.open.clear()
    submitting = asyncio.create_task(engine.submit(ONE))
    await soon()
    stopping = asyncio.create_task(engine.stop(timeout=0.01))
    await until(lambda: engine._parts is None)
    await asyncio.sleep(0.05)
    disk.open.set()
    report = await stopping
    await submitting
    assert (report.left_in_log, report.lost) == (1, 0)


async def test_I1_two_writes_that_come_too_late_leave_nothing_in_redis(rig: Rig) -> None:
    held: list[Held] = []
    third = SyncItem("a", b"three", version=3, updated_at=3)
    async with (
        rig.engine(around=on("l3", Held, held)) as late,
        rig.engine(data="other", clock=Ahead(HOUR_MS)) as early,
    ):
        held[0].hold()
        await late.submit(ONE)
        await until(lambda: held[0].waiting)
        await late.submit(TWO)
        await early.submit(third, ack=Ack.STORED)
        await rig.key("DEL", rig.redis_prefix + "a")  # as an eviction does
        held[0].release()
        await late.flush()
        assert await late.get("a") == third
        async with rig.engine(data="third") as reader:
            assert await reader.get("a") == third


# Everything at once


class Flaky(Forwarding):
    """Loses every tenth request or reply of a write."""

    def __init__(self, tier: Tier, rng: random.Random) -> None:
        super().__init__(tier)
        self._rng = rng

    async def apply(self, ops: Any, /) -> Applied:
        fate = self._rng.random()
        if fate < 0.05:
            raise TierUnavailable(self.name, "lost on the way there")
        applied = await self.tier.apply(ops)
        await asyncio.sleep(self._rng.random() * 0.003)
        if fate > 0.95:
            raise TierUnavailable(self.name, "lost on the way back")
        return applied


IDS = [f"k{n}" for n in range(4)]


async def _work(engine: SyncEngine, rng: random.Random, who: int) -> None:
    for step in range(30):
        object_id = rng.choice(IDS)
        item = SyncItem(object_id, rng.choice((b"{}", b"\x00", bytes(3_000))), version=who * 1_000 + step)
        ack = rng.choices(list(Ack), (5, 5, 1))[0]
        match rng.randrange(8):
            case 0 | 1 | 2:
                options = rng.choice((SubmitOptions(), SubmitOptions(), DURABLE))
                await engine.submit(item.with_state(f"s{step % 3}"), options, ack=ack)
            case 3 | 4:
                await engine.set_state(object_id, f"s{step % 3}", ack=ack)
            case 5:
                await engine.delete(object_id, ack=ack)
            case 6:
                held = await engine.get(object_id)
                with suppress(VersionConflict):
                    await engine.submit(item, SubmitOptions(if_version=held.version if held else 0))
            case _:
                await engine.get_many(IDS)


@pytest.mark.parametrize("seed", range(6))
async def test_I1_two_busy_engines_on_flaky_tiers_leave_redis_and_sql_alike(rig: Rig, seed: int) -> None:
    rng = random.Random(seed)
    engines = [
        rig.engine(
            data=f"d{n}",
            clock=Ahead(rng.choice((0, 40))),
            around=lambda tier: Flaky(tier, rng),
            l1_max_bytes=rng.choice((0, 10**6)),
            pending_max_bytes=rng.choice((0, 10**6)),
            batch_flush_count=rng.choice((1, 2, 100)),
            batch_flush_ms=rng.choice((0, 3)),
            backpressure_wait_ms=60_000,
        )
        for n in range(2)
    ]
    for engine in engines:
        await engine.start()
    async with asyncio.TaskGroup() as group:
        for who in range(6):
            group.create_task(_work(engines[who % 2], random.Random(f"{seed}.{who}"), who))
    for engine in engines if seed % 2 else []:  # half of them with a restart in the middle
        await engine.stop(timeout=0)
        await engine.start()
    for engine in engines:
        await engine.flush()
    for engine in engines:
        await until(lambda engine=engine: not engine._running.reader._fills)
    lower = await (await rig.l3()).get_many(IDS)
    upper = await rig.l2.get_many(IDS)
    assert upper == {object_id: lower[object_id] for object_id in upper}
    for state in ("s0", "s1", "s2", "default"):
        assert set(await rig.l2.list_state_ids(state)) == {i for i, item in upper.items() if item.state == state}
    for engine in engines:
        assert engine.stats().quarantined == 0
        engine._running.l1.clear()  # type: ignore[union-attr]  # it runs
        assert await engine.get_many(IDS) == lower
        rig.at_rest(engine)
