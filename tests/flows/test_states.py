"""States through every tier: membership follows put, re-put, change, type change, delete and expiry (I6)."""

from __future__ import annotations

import asyncio
import random

import pytest

from sync_engine import Ack, InvalidState, SubmitOptions, SyncItem, TierNotConfigured
from sync_engine.testing.tiers import Breaking, Refusing

from .rig import CACHE, DURABLE, Held, Rig, on, until

A = SyncItem.from_json("a", {"n": 1}, state="s", updated_at=1)
B = SyncItem("b", b"\x00", state="s", updated_at=1)


async def _members(rig: Rig, state: str) -> tuple[list[str], list[str]]:
    return await rig.l2.list_state_ids(state), await (await rig.l3()).list_state_ids(state)


async def test_I6_membership_follows_whatever_is_written(rig: Rig) -> None:
    async with rig.engine() as engine:
        await engine.submit_many([A, B], ack=Ack.STORED)
        assert await _members(rig, "s") == (["a", "b"], ["a", "b"])
        await engine.submit(A.with_state("t"), ack=Ack.STORED)  # re-put
        await engine.submit(B.replace(content=b"{}", state="t"), ack=Ack.STORED)  # another type too
        assert await _members(rig, "s") == ([], [])
        assert await _members(rig, "t") == (["a", "b"], ["a", "b"])
        assert await engine.set_state("a", "u", ack=Ack.STORED)
        assert await engine.delete("b", ack=Ack.STORED)
        assert await _members(rig, "t") == ([], [])
        assert await _members(rig, "u") == (["a"], ["a"])
        await engine.submit(A, SubmitOptions(state="override"), ack=Ack.STORED)
        assert (await engine.get("a")).state == "override"
        assert await _members(rig, "override") == (["a"], ["a"])
        assert list(await rig.l2.client.keys(rig.redis_prefix + "state:*")) == [
            (rig.redis_prefix + "state:override").encode()
        ]


async def test_I6_an_item_that_leaves_redis_leaves_its_set_and_one_that_leaves_sql_its_index(rig: Rig) -> None:
    async with rig.engine() as engine:
        await engine.submit_many([A, B], ack=Ack.STORED)
        await engine.submit(A, DURABLE, ack=Ack.STORED)
        await engine.submit(B, CACHE, ack=Ack.STORED)
        await engine.flush()
        assert await _members(rig, "s") == (["b"], ["a"])
        assert await engine.list_state_ids("s") == ["a"], "the truth answers"


async def test_I6_an_expired_item_is_in_no_state(rig: Rig) -> None:
    async with rig.engine(sql_url=None) as engine:
        await engine.submit(A, SubmitOptions.cache(60), ack=Ack.STORED)
        assert await engine.count_by_state("s") == 1
        await rig.key("PEXPIRE", rig.redis_prefix + "a", "1")
        await until(lambda: engine._running.l1.drop("a") is None)
        # The engine tells Redis the deadline itself; moved by hand, it is swept at the time that was promised.
        await rig.key("ZADD", rig.redis_prefix + "__local__:expiring", "XX", "1", "s\0a")
        while await rig.key("EXISTS", rig.redis_prefix + "a"):  # noqa: ASYNC110  # Redis expires it by itself
            await asyncio.sleep(0.001)
        assert await engine.count_by_state("s") == 0
        assert await engine.list_state_ids("s") == []


async def test_a_state_change_says_whether_there_was_something_to_change(rig: Rig) -> None:
    async with rig.engine() as engine:
        assert not await engine.set_state("ghost", "s")
        await engine.submit(A)
        assert await engine.set_state("a", "s"), "also to the state it is in"
        assert await engine.set_state("a", "t")
        await engine.delete("a")
        assert not await engine.set_state("a", "s")
        for bad in ("", "s" * 33, "a\0b"):
            with pytest.raises(InvalidState):
                await engine.set_state("a", bad)
            with pytest.raises(InvalidState):
                await engine.count_by_state(bad)
        await rig.check(engine, {"a": None, "ghost": None})


async def test_a_state_change_keeps_bytes_version_and_deadline(rig: Rig) -> None:
    ugly = SyncItem("u", b'{"b": 1.50,\n "a": 1e400}', state="s", version=9, trace_parent="t", updated_at=7)
    async with rig.engine() as engine:
        await engine.submit(ugly, ack=Ack.STORED)
        await engine.submit(B, CACHE, ack=Ack.STORED)
        engine._running.l1.clear()
        assert await engine.set_state("u", "Zustand ß", ack=Ack.STORED)
        assert await engine.set_state("b", "t", ack=Ack.STORED)
        await rig.check(engine, {"u": ugly.with_state("Zustand ß"), "b": B.with_state("t")}, options={"b": CACHE})
        assert await rig.key("PTTL", rig.redis_prefix + "b") > 0
        assert await rig.key("PTTL", rig.redis_prefix + "u") == -1


async def test_state_changes_of_what_is_not_flushed_meet_the_put_they_follow(rig: Rig) -> None:
    held: list[Held] = []
    async with rig.engine(around=lambda tier: held.append(Held(tier)) or held[-1], batch_flush_count=1) as engine:
        for options in (SubmitOptions(), CACHE, DURABLE):
            for each in held:
                each.hold()
            await engine.submit(A, options)
            await engine.set_state("a", "t")
            await engine.submit(A.with_version(2), options)
            await engine.set_state("a", "u")
            await engine.set_state("a", "v")
            expected = A.with_version(2).with_state("v")
            assert await engine.get("a") == expected
            for each in held:
                each.release()
            await rig.check(engine, {"a": expected}, options={"a": options})
            await engine.delete("a")
            await rig.check(engine, {"a": None})


async def test_state_changes_survive_a_restart_with_and_without_their_put(rig: Rig) -> None:
    down = lambda tier: Breaking(tier, times=None, verbs=("apply",))  # noqa: E731  # one line, used below
    async with rig.engine() as engine:
        await engine.submit(B, ack=Ack.STORED)
    async with rig.engine(around=down) as engine:
        await engine.submit(A)
        await engine.set_state("a", "t")
        await engine.set_state("b", "t")
        await engine.stop(timeout=0)
    async with rig.engine(around=down) as engine:  # and once more on top of what was recovered
        assert (await engine.get("a")).state == "t"
        assert (await engine.get("b")).state == "t"
        await engine.set_state("b", "u")
        await engine.stop(timeout=0)
    async with rig.engine() as engine:
        assert engine.stats().recovered == 4
        await rig.check(engine, {"a": A.with_state("t"), "b": B.with_state("u")})


async def test_a_state_change_during_another_engines_delete_does_not_bring_the_item_back(rig: Rig) -> None:
    held: list[Held] = []
    async with rig.engine(around=on("l3", Held, held)) as slow, rig.engine(data="other") as quick:
        await quick.submit(A, ack=Ack.STORED)
        held[0].hold()
        assert await slow.set_state("a", "t")
        assert await quick.delete("a", ack=Ack.STORED)
        held[0].release()
        await slow.flush()
        assert await rig.in_tiers("a") == (None, None)
        assert await _members(rig, "t") == ([], [])


async def test_random_walks_over_states_leave_exact_sets(rig: Rig) -> None:
    rng = random.Random(7)
    model: dict[str, SyncItem | None] = {}
    async with rig.engine(batch_flush_ms=0, batch_flush_count=5) as engine:
        for n in range(300):
            object_id = f"i.{rng.randrange(12)}"
            held = model.get(object_id)
            match rng.randrange(4):
                case 0 | 1:
                    content = rng.choice([b"{}", b"\x00", b"[1.0]"])
                    model[object_id] = SyncItem(object_id, content, state=f"s{rng.randrange(3)}", version=n)
                    await engine.submit(model[object_id], ack=rng.choice(list(Ack)))
                case 2:
                    state = f"s{rng.randrange(3)}"
                    assert await engine.set_state(object_id, state) is (held is not None)
                    model[object_id] = held.with_state(state) if held is not None else None
                case 3:
                    assert await engine.delete(object_id) is (held is not None)
                    model[object_id] = None
            if n % 50 == 0:
                for state in ("s0", "s1", "s2"):
                    ids = sorted(i for i, item in model.items() if item is not None and item.state == state)
                    assert await engine.list_state_ids(state) == ids
                    assert await engine.count_by_state(state) == len(ids)
        await rig.check(engine, model)


async def test_without_sql_redis_answers_for_states_and_nobody_for_scans(rig: Rig) -> None:
    async with rig.engine(sql_url=None, batch_flush_ms=60_000) as engine:
        await engine.submit(A, CACHE)
        assert await engine.list_state_ids("s") == ["a"]
        assert await engine.set_state("a", "t")
        assert (await engine.count_by_state("s"), await engine.count_by_state("t")) == (0, 1)
        for ask in (engine.scan_prefix, engine.count_prefix, engine.get_by_state):
            with pytest.raises(TierNotConfigured):
                await ask("t")


async def test_I1_a_state_change_of_a_cache_item_does_not_bring_its_older_row_back(rig: Rig) -> None:
    held: list[Held] = []
    async with rig.engine(around=lambda tier: held.append(Held(tier)) or held[-1], batch_flush_ms=0) as engine:
        l3, l2 = held
        await engine.submit(A, ack=Ack.STORED)
        for first in (l2, l3):
            l3.hold()
            l2.hold()
            await engine.submit(A.with_version(2), CACHE)
            await engine.set_state("a", "t")
            first.release()  # one tier runs ahead of the other
            await asyncio.sleep(0.02)
            assert await engine.get("a") == A.with_version(2).with_state("t")
            l3.release()
            l2.release()
            await rig.check(engine, {"a": A.with_version(2).with_state("t")}, options={"a": CACHE})
            await engine.submit(A, ack=Ack.STORED)


# A change of state changes the state alone


@pytest.mark.parametrize("where", ["l2", "l3"])
@pytest.mark.parametrize("options", [None, CACHE], ids=["kept by both", "cache-only"])
async def test_I1_a_change_of_state_does_not_lift_an_older_write_above_a_newer_one_of_another_engine(
    rig: Rig, where: str, options: SubmitOptions | None
) -> None:
    older, newer = SyncItem("x", b"older", state="s1"), SyncItem("x", b"newer", state="s2", version=2)
    held: list[Held] = []
    async with rig.engine(around=on(where, Held, held)) as slow, rig.engine(data="other") as quick:
        held[0].hold()
        await slow.submit(older, options)
        await quick.submit(newer, ack=Ack.STORED)
        await slow.set_state("x", "s3")
        held[0].release()
        await slow.flush()
        copy, row = await rig.in_tiers("x")
        assert row is not None
        assert (row.content, row.state) == (b"newer", "s3")
        assert copy == row, "in Redis"
        assert await slow.get("x") == row, "in L1"


async def test_I3_the_state_of_a_refused_write_is_changed_where_it_is_kept(rig: Rig) -> None:
    held: list[Held] = []
    refusing = on("l3", lambda tier: Held(Refusing(tier, ["x"])), held)
    async with rig.engine(redis=False, around=refusing) as engine:
        held[0].hold()
        await engine.submit(SyncItem("x", b"bad", state="s1"))
        await engine.set_state("x", "s2")
        held[0].release()
        await engine.flush()
        assert (await engine.status("x")).quarantined
        found = await engine.get("x")
        assert found is not None
        assert (found.content, found.state) == (b"bad", "s2")
    async with rig.engine(redis=False) as engine:
        await engine.retry_quarantined(["x"])
        await engine.flush()
        found = await engine.get("x")
        assert found is not None
        assert (found.content, found.state) == (b"bad", "s2")
