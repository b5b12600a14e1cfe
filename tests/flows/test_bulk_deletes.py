"""``delete_by_state`` and ``delete_prefix``: exact, logged, told, sparing what moved on (R7, R10, R11, Q21, C2)."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import sqlite3
import subprocess
import sys
from contextlib import closing

import pytest

from sync_engine import (
    Ack,
    Backpressure,
    InvalidItem,
    InvalidState,
    NotRunning,
    SyncItem,
    TierNotConfigured,
    TierUnavailable,
)
from sync_engine.testing.tiers import Breaking, Counting, Refusing

from .rig import CACHE, DURABLE, Held, Hurried, Rig, on, soon, until


def item(object_id: str, state: str = "s", content: bytes = b"x", version: int = 1) -> SyncItem:
    return SyncItem(object_id, content, state=state, version=version, updated_at=1)


def some(prefix: str, count: int, state: str = "s") -> list[SyncItem]:
    return [item(f"{prefix}{n:04}", state, b"{}" if n % 2 else b"\x00") for n in range(count)]


async def test_I6_Q21_a_state_is_emptied_in_every_tier_and_nothing_else_is_touched(rig: Rig) -> None:
    gone, kept = some("a.", 25), some("b.", 5, "t")
    async with rig.engine() as engine:
        await engine.submit_many([*gone[:10], *kept], ack=Ack.STORED)
        await engine.submit_many(gone[10:20])  # not flushed when the call comes
        await engine.submit_many(gone[20:], DURABLE)
        assert await engine.delete_by_state("s") == 25
        assert await engine.count_by_state("s") == 0
        assert await engine.get_many([each.object_id for each in gone]) == {}
        await rig.check(
            engine, dict.fromkeys(each.object_id for each in gone) | {each.object_id: each for each in kept}
        )
        assert await engine.delete_by_state("s") == 0
        assert engine.stats().l1.items == len(kept)


async def test_R10_R11_G55_a_prefix_is_plain_text_and_its_neighbours_stay(rig: Rig) -> None:
    ids = ["a%", "a%b", "A%", "aXb", "a*", "a[b]", "a", "state", "merkle", "cd", "b"]
    async with rig.engine(enable_cdc_stream=True) as engine:
        await engine.submit_many([item(each) for each in ids], ack=Ack.STORED)
        assert await engine.delete_prefix("a%") == 2
        assert await engine.delete_prefix("a[") == 1
        assert await engine.delete_prefix("a*") == 1
        assert await engine.delete_prefix("s") == 1
        left = ["A%", "a", "aXb", "b", "cd", "merkle"]
        assert [each.object_id for each in await engine.scan_prefix("")] == left
        await rig.check(engine, {each: item(each) if each in left else None for each in ids})
        assert await engine.delete_prefix("", allow_all=True) == len(left)
        await rig.check(engine, dict.fromkeys(ids))
        assert await rig.key("EXISTS", f"{rig.redis_prefix}__local__:cdc") == 1, "the stream is no item"


async def test_I8_C2_C5_every_bulk_delete_is_told_once_and_none_that_did_not_happen(rig: Rig) -> None:
    async with rig.engine(enable_cdc_stream=True) as engine, rig.engine(data="other") as other:
        await engine.submit_many([*some("a.", 5), item("b", "t")], ack=Ack.STORED)
        await other.set_state("a.0003", "t", ack=Ack.STORED)
        assert await engine.delete_by_state("s") == 4
        assert await engine.delete_by_state("s") == 0
        assert await engine.delete_prefix("nothing") == 0
        await engine.flush()
    entries = await rig.key("XRANGE", f"{rig.redis_prefix}__local__:cdc", "-", "+")
    told = [fields for _, fields in entries]
    deleted = [entry[b"key"].decode() for entry in told if entry[b"op"] == b"DEL"]
    assert sorted(deleted) == ["a.0000", "a.0001", "a.0002", "a.0004"]


async def test_bad_arguments_delete_nothing(rig: Rig) -> None:
    async with rig.engine(redis=False) as engine:
        await engine.submit(item("a"))
        for prefix, allow_all in (("", False), (None, True), (b"a", False), ("", 1)):
            with pytest.raises(InvalidItem, match="prefix") as refused:
                await engine.delete_prefix(prefix, allow_all=allow_all)
            assert refused.value.field == "prefix"
        with pytest.raises(InvalidItem):
            await engine.delete_prefix("\ud800")
        for state in ("", "s" * 33, "a\0"):
            with pytest.raises(InvalidState):
                await engine.delete_by_state(state)
        assert await engine.count_prefix("") == 1
    with pytest.raises(NotRunning):
        await engine.delete_by_state("s")


async def test_without_sql_there_is_nobody_to_decide(rig: Rig) -> None:
    async with rig.engine(sql_url=None) as engine:
        await engine.submit(item("a"), CACHE)
        for call in (engine.delete_by_state("s"), engine.delete_prefix("a"), engine.delete_prefix("", allow_all=True)):
            with pytest.raises(TierNotConfigured):
                await call
        assert await engine.get("a") == item("a")


async def test_what_redis_alone_keeps_is_not_listed_and_not_deleted(rig: Rig) -> None:
    async with rig.engine() as engine:
        await engine.submit(item("cached"), CACHE)
        await engine.submit(item("stored"))
        assert await engine.delete_by_state("s") == 1
        await rig.check(engine, {"cached": item("cached"), "stored": None}, options={"cached": CACHE})


async def test_R7_what_leaves_the_state_before_its_turn_is_spared_whoever_moved_it(rig: Rig) -> None:
    listed: list[Held] = []
    wrap = on("l3", lambda tier: Held(tier, verbs=("list_state_ids",), after=True), listed)
    async with rig.engine(around=wrap) as engine, rig.engine(data="other") as other:
        await engine.submit_many(some("a.", 6), ack=Ack.STORED)
        await engine.get("a.0000")
        listed[0].hold()
        deleting = asyncio.create_task(engine.delete_by_state("s"))
        await until(lambda: listed[0].waiting)
        await engine.set_state("a.0000", "t")
        await other.set_state("a.0001", "t", ack=Ack.STORED)
        await engine.submit(item("a.0002", "s", b"rewritten"))
        await other.submit(item("a.0003", "s", b"rewritten"), ack=Ack.STORED)
        await engine.submit(item("a.9", "s"))
        await engine.delete("a.0004")
        listed[0].release()
        assert await deleting == 1, "of a.0005 alone it is true that this call deleted it"
        expected = {
            "a.0000": some("a.", 1)[0].with_state("t"),
            "a.0001": some("a.", 2)[1].with_state("t"),
            "a.0002": item("a.0002", "s", b"rewritten"),
            "a.0003": item("a.0003", "s", b"rewritten"),
            "a.0004": None,
            "a.0005": None,
            "a.9": item("a.9", "s"),
        }
        await rig.check(engine, expected)
        assert await other.get_many(list(expected)) == {i: each for i, each in expected.items() if each is not None}


async def test_R7_a_clock_that_is_behind_does_not_make_a_moved_item_look_old(rig: Rig) -> None:
    behind = Hurried()
    behind.now_ms = lambda: Hurried().now_ms() - 60_000  # type: ignore[method-assign]  # a clock of its own
    listed: list[Held] = []
    wrap = on("l3", lambda tier: Held(tier, verbs=("list_state_ids",), after=True), listed)
    async with rig.engine(data="slow", clock=behind) as slow:
        await slow.submit_many(some("a.", 2), ack=Ack.STORED)
        async with rig.engine(around=wrap) as engine:
            listed[0].hold()
            deleting = asyncio.create_task(engine.delete_by_state("s"))
            await until(lambda: listed[0].waiting)
            assert await slow.set_state("a.0000", "t", ack=Ack.STORED)
            listed[0].release()
            assert await deleting == 1
            assert (await engine.get("a.0000")).state == "t"
            assert await engine.get("a.0001") is None


async def test_a_clock_that_is_ahead_does_not_protect_what_it_wrote(rig: Rig) -> None:
    ahead = Hurried()
    ahead.now_ms = lambda: Hurried().now_ms() + 60_000  # type: ignore[method-assign]  # a clock of its own
    async with rig.engine(redis=False, data="ahead", clock=ahead) as fast, rig.engine(redis=False) as engine:
        await fast.submit_many(some("a.", 3), ack=Ack.STORED)
        assert await engine.delete_by_state("s") == 3
        assert await engine.count_prefix("") == 0


async def test_R7_a_change_of_state_waits_for_the_truth_to_decide(rig: Rig) -> None:
    applied: list[Held] = []
    async with rig.engine(around=on("l3", lambda tier: Held(tier, after=True), applied)) as engine:
        await engine.submit(item("a"), ack=Ack.STORED)
        applied[0].hold()
        deleting = asyncio.create_task(engine.delete_by_state("s"))
        await until(lambda: applied[0].waiting)  # deleted in SQL, and nobody here knows
        assert await engine.get("a") == item("a")
        moving = asyncio.create_task(engine.set_state("a", "t"))
        rewritten = await engine.submit(item("b", "s"))
        await soon()
        assert not moving.done()
        applied[0].release()
        assert await deleting == 1
        assert await moving is False, "it was deleted before"
        await rewritten.stored()
        await rig.check(engine, {"a": None, "b": item("b", "s")})


async def test_a_put_during_the_decision_stays(rig: Rig) -> None:
    applied: list[Held] = []
    async with rig.engine(around=on("l3", Held, applied)) as engine:
        await engine.submit(item("a"), ack=Ack.STORED)
        applied[0].hold()
        deleting = asyncio.create_task(engine.delete_by_state("s"))
        await until(lambda: applied[0].waiting)
        await engine.submit(item("a", "s", b"new"))
        assert await engine.get("a") == item("a", "s", b"new")
        applied[0].release()
        assert await deleting == 1
        await rig.check(engine, {"a": item("a", "s", b"new")})


async def test_I1_a_cache_only_write_after_the_call_began_stays(rig: Rig) -> None:
    applied: list[Held] = []
    async with rig.engine(around=on("l3", Held, applied), batch_flush_ms=0) as engine:
        await engine.submit(item("a"), ack=Ack.STORED)
        applied[0].hold()
        deleting = asyncio.create_task(engine.delete_prefix("a"))
        await until(lambda: applied[0].waiting)
        await engine.submit(item("a", "s", b"new"), CACHE)
        applied[0].release()
        assert await deleting == 1
        await rig.check(engine, {"a": item("a", "s", b"new")}, options={"a": CACHE})


async def test_a_lost_answer_of_sql_does_not_change_the_count(rig: Rig) -> None:
    lost: list[Breaking] = []
    wrap = on("l3", lambda tier: Breaking(tier, at=10**9, when="after", verbs=("apply",)), lost)
    async with rig.engine(around=wrap, redis=False) as engine:
        await engine.submit_many(some("a.", 5), ack=Ack.STORED)
        lost[0]._first, lost[0]._end = lost[0].calls + 1, lost[0].calls + 2
        assert await engine.delete_by_state("s") == 5
        assert lost[0].broken == 1
        assert await engine.count_prefix("") == 0
        assert engine.stats().quarantined == 0


async def test_sql_that_is_down_is_told_and_the_call_goes_on_when_it_is_made_again(rig: Rig) -> None:
    broken: list[Breaking] = []
    wrap = on("l3", lambda tier: Breaking(tier, at=10**9, times=None, verbs=("apply",)), broken)
    async with rig.engine(around=wrap, batch_flush_count=10, wal_max_items=10, backpressure_wait_ms=50) as engine:
        await engine.submit_many(some("a.", 35), ack=Ack.STORED)
        broken[0]._first, broken[0]._end = broken[0].calls + 3, None  # after two pages
        with pytest.raises((TierUnavailable, Backpressure)):
            await engine.delete_by_state("s")
        with pytest.raises(TierUnavailable):  # the truth has not decided about it
            await engine.set_state("a.0025", "t")
        broken[0].heal()
        await engine.flush()
        left = await engine.count_by_state("s")
        assert left == 5
        assert await engine.delete_by_state("s") == left
        await rig.check(engine, dict.fromkeys(each.object_id for each in some("a.", 35)))


async def test_I10_pages_are_bounded_by_the_log_and_redis_may_lag(rig: Rig) -> None:
    counting: list[Counting] = []
    held: list[Held] = []

    def wrap(tier: object) -> object:
        if tier.name == "l2":  # type: ignore[attr-defined]  # a tier
            held.append(Held(tier))  # type: ignore[arg-type]  # a tier
            return held[-1]
        counting.append(Counting(tier))  # type: ignore[arg-type]  # a tier
        return counting[-1]

    async with rig.engine(around=wrap, wal_max_items=20, backpressure_wait_ms=50) as engine:
        await engine.submit_many(some("a.", 50), ack=Ack.STORED)
        held[0].hold()
        with pytest.raises(Backpressure):
            await engine.delete_prefix("a.")
        assert counting[0].calls["list_prefix_ids"] <= 3
        assert engine.stats().log_records <= 20
        held[0].release()
        await engine.flush()
        assert await engine.delete_prefix("a.") == 30
        await rig.check(engine, dict.fromkeys(each.object_id for each in some("a.", 50)))


async def test_I7_a_delete_that_sql_refuses_is_quarantined_and_the_others_go_through(rig: Rig) -> None:
    kept: list[Refusing] = []
    async with rig.engine(around=on("l3", lambda tier: Refusing(tier, ()), kept)) as engine:
        await engine.submit_many(some("a.", 5), ack=Ack.STORED)
        kept[0].ids |= {"a.0001", "a.0003"}
        assert await engine.delete_by_state("s") == 3
        await engine.flush()
        assert [(each.object_id, each.kind) for each in await engine.quarantine()] == [
            ("a.0001", "delete"),
            ("a.0003", "delete"),
        ]
        kept[0].ids.clear()
        await (await rig.l3()).put(some("a.", 2)[1].replace(state="t", stamp=0))
        assert await engine.retry_quarantined() == 2
        await engine.flush()
        assert await engine.quarantine() == []
        assert [each.object_id for each in await engine.scan_prefix("a.")] == ["a.0001"], "it has left the state"
    async with rig.engine() as engine:
        assert engine.stats().quarantined == 0
        assert [each.object_id for each in await engine.scan_prefix("a.")] == ["a.0001"]


async def test_cancelled_in_mid_page_nothing_is_half_done(rig: Rig) -> None:
    for n in range(12):
        steps: list[Held] = []
        data = f"d{n}"
        async with rig.engine(around=on("l3", lambda tier: Held(tier), steps), data=data, wal_max_items=4) as engine:
            await engine.submit_many(some("a.", 10), ack=Ack.STORED)
            deleting = asyncio.create_task(engine.delete_by_state("s"))
            for _ in range(n * 3):
                await asyncio.sleep(0)
            deleting.cancel()
            await asyncio.wait({deleting})
            await engine.flush()
            rig.at_rest(engine)
            assert not engine._running.writes._shown.sweeping
            await engine.delete_by_state("s")
            await rig.check(engine, dict.fromkeys(each.object_id for each in some("a.", 10)))


async def test_rows_of_others_that_are_no_items_are_left_alone(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    async with rig.engine(redis=False) as engine:
        await engine.submit_many(some("a.", 3), ack=Ack.STORED)
        with closing(sqlite3.connect(rig.path / "truth.db")) as other:
            other.execute("UPDATE sync_items SET id = 'state:x' WHERE id = 'a.0001'")
            other.commit()
        assert await engine.delete_by_state("s") == 2
        assert await engine.delete_prefix("", allow_all=True) == 0
        assert "left alone" in caplog.text


@pytest.mark.parametrize("seed", range(4))
async def test_R7_random_moves_beside_bulk_deletes_never_lose_what_left_in_time(rig: Rig, seed: int) -> None:
    """Every mover knows when it was told that its item exists in another state; from then on it must not vanish."""
    rng = random.Random(seed)
    ids = [f"i.{n:02}" for n in range(24)]
    async with (
        rig.engine(batch_flush_ms=0, batch_flush_count=5, wal_max_items=1_000) as engine,
        rig.engine(data="other", l1_max_bytes=0, batch_flush_ms=0) as other,
    ):
        await engine.submit_many([item(each) for each in ids], ack=Ack.STORED)

        async def move(mine: list[str], by: object) -> set[str]:
            safe: set[str] = set()
            for each in mine:
                await asyncio.sleep(rng.random() * 0.01)
                # With STORED the answer is that of SQL; what is there afterwards has left the state for good.
                if await by.set_state(each, "t", ack=Ack.STORED) and await by.get(each) is not None:  # type: ignore[attr-defined]  # an engine
                    safe.add(each)
            return safe

        async def sweep() -> int:
            deleted = 0
            for _ in range(3):
                await asyncio.sleep(rng.random() * 0.03)
                deleted += await engine.delete_by_state("s")
            return deleted

        one, two, deleted = await asyncio.gather(move(ids[::2], engine), move(ids[1::2], other), sweep())
        await engine.flush()
        await other.flush()
        found = set(await (await rig.l3()).get_many(ids))
        assert one | two <= found
        assert deleted == len(ids) - len(found)
        assert {each.state for each in (await rig.l2.get_many(ids)).values()} <= {"t"}
        assert await engine.count_by_state("s") == 0


PROGRAM = """
import asyncio, os, random, signal, sys, threading
from sync_engine import SyncEngine, SyncEngineConfig

async def main(folder, after_s):
    async with SyncEngine(SyncEngineConfig(data_dir=folder, wal_max_items=50)) as engine:
        threading.Timer(after_s, os.kill, (os.getpid(), signal.SIGKILL)).start()
        await engine.delete_by_state("s")
        await asyncio.sleep(60)

asyncio.run(main(sys.argv[1], float(sys.argv[2])))
"""


async def test_I3_a_kill_in_the_middle_leaves_every_item_whole_or_gone_and_another_call_goes_on(rig: Rig) -> None:
    settings = {"redis": False, "sql_url": f"sqlite:///{rig.path / 'data' / 'truth.db'}"}
    kept = some("z.", 20, "t")
    async with rig.engine(**settings) as engine:
        await engine.submit_many([*some("a.", 1_000), *kept], ack=Ack.STORED)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    for after_s in (0.001, 0.02, 0.05):
        command = [sys.executable, "-c", PROGRAM, str(rig.path / "data"), str(after_s)]
        died = await asyncio.to_thread(subprocess.run, command, env=environment, check=False)
        assert died.returncode == -signal.SIGKILL
    async with rig.engine(**settings) as engine:
        before = await engine.count_by_state("s")
        assert await engine.delete_by_state("s") == before
        assert await engine.scan_prefix("") == kept
        await engine.flush()
        rig.at_rest(engine)
