"""I6: state sets equal the states of the live items, whatever happens to them; and the calls that rest on it."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from redis.asyncio import Redis

from sync_engine.codec import to_text
from sync_engine.errors import InvalidItem, InvalidState
from sync_engine.item import Op, SyncItem
from sync_engine.storage.redis import RedisStore

STATES = ("default", "hot", 'odd "é"/\\')


@pytest.fixture
async def store(redis_url: str, redis_prefix: str) -> AsyncIterator[RedisStore]:
    store = await RedisStore.connect(redis_url, redis_prefix)
    yield store
    await store.close()


@pytest.fixture
async def each(kind_url: str, redis_prefix: str) -> AsyncIterator[RedisStore]:
    """On every kind of server."""
    store = await RedisStore.connect(kind_url, redis_prefix)
    yield store
    await store.close()


async def members(store: RedisStore) -> dict[str, set[str]]:
    """What the sets themselves hold, asked of Redis and not of the store."""
    keys = await store.client.keys(f"{store.prefix}state:*")
    return {
        key.decode().removeprefix(f"{store.prefix}state:"): {
            member.decode() for member in await store.client.smembers(key)
        }
        for key in keys
    }


async def gone(store: RedisStore, object_id: str) -> None:
    """Wait until a deadline of a few milliseconds has passed at the server."""
    while await store.client.exists(store.prefix + object_id):  # noqa: ASYNC110  nothing announces it
        await asyncio.sleep(0.001)


def now_ms() -> int:
    return time.time_ns() // 1_000_000


async def test_R6_an_item_is_in_one_state_after_every_kind_of_change(store: RedisStore) -> None:
    await store.put_batch([SyncItem("a", b"{}", state="one"), SyncItem("b", b"\x00", state="one")])
    assert await members(store) == {"one": {"a", "b"}}
    await store.put(SyncItem("a", b"\x00", state="two"))
    assert await members(store) == {"one": {"b"}, "two": {"a"}}
    assert await store.move_state("b", "one", "two")
    assert not await store.move_state("b", "one", "three")
    assert not await store.move_state("none", "one", "three")
    assert await members(store) == {"two": {"a", "b"}}
    assert (await store.get_many(["a", "b"]))["b"].state == "two"
    assert await store.is_in_state("b", "two")
    assert not await store.is_in_state("b", "one")
    assert await store.remove_from_state("b", "two")
    assert not await store.remove_from_state("b", "two")
    assert await members(store) == {"two": {"a"}, "default": {"b"}}
    await store.delete_many(["a", "b"])
    assert await members(store) == {}


async def test_R6_an_expired_item_is_in_no_state(store: RedisStore) -> None:
    puts = [
        Op(kind="put", object_id=i, stamp=0, item=SyncItem(i, b"{}", state="hot"), redis_expires_at=now_ms() + 5)
        for i in ("a", "b", "c")
    ]
    await store.apply(puts)
    await store.put(SyncItem("stays", b"{}", state="hot"))
    await gone(store, "c")
    assert await store.count_by_state("hot") == 1
    assert await store.list_state_ids("hot") == ["stays"]
    assert not await store.is_in_state("a", "hot")
    assert await members(store) == {"hot": {"stays"}}
    assert await store.client.exists(f"{store.prefix}__local__:expiring") == 0


async def test_R6_a_put_over_an_expired_item_leaves_nothing_in_its_old_state(store: RedisStore) -> None:
    old = SyncItem("a", b"{}", state="old")
    await store.apply([Op(kind="put", object_id="a", stamp=0, item=old, redis_expires_at=now_ms() + 5)])
    await gone(store, "a")
    await store.put(SyncItem("a", b"{}", state="new"))
    assert await members(store) == {"new": {"a"}}


async def test_R6_an_item_that_lost_its_deadline_is_not_swept_at_it(store: RedisStore) -> None:
    item = SyncItem("a", b"{}", state="hot")
    deadline = now_ms() + 40
    await store.apply([Op(kind="put", object_id="a", stamp=0, item=item, redis_expires_at=deadline)])
    await store.client.persist(store.prefix + "a")  # behind the store's back
    while now_ms() <= deadline:  # noqa: ASYNC110  nothing announces it
        await asyncio.sleep(0.01)
    assert await store.list_state_ids("hot") == ["a"]


async def test_R7_delete_by_state_spares_what_has_moved_on(store: RedisStore) -> None:
    await store.put_batch([SyncItem(f"i{n}", b"{}" if n % 2 else b"\x00", state="old") for n in range(1_500)])
    await store.put(SyncItem("moved", b"{}", state="new"))
    # Stale members, as the original leaves them; one whose value is somebody else's; one that is no id.
    await store.client.set(store.prefix + "foreign", "x")
    await store.client.sadd(f"{store.prefix}state:old", "moved", "never-there", "foreign", b"\xff")
    assert await store.delete_by_state("old") == 1_500
    assert await store.client.smembers(f"{store.prefix}state:old") == set()
    assert await store.list_state_ids("old") == []
    assert await store.list_state_ids("new") == ["moved"]
    assert await store.get("moved") is not None
    assert await store.client.get(store.prefix + "foreign") == b"x"


async def test_R7_items_that_move_during_delete_by_state_are_deleted_or_kept_whole(store: RedisStore) -> None:
    ids = [f"i{n}" for n in range(800)]
    await store.put_batch([SyncItem(i, b"{}", state="old") for i in ids])
    moved: set[str] = set()

    async def move() -> None:
        for object_id in random.Random(3).sample(ids, 60):
            if await store.move_state(object_id, "old", "new"):
                moved.add(object_id)

    _, deleted = await asyncio.gather(move(), store.delete_by_state("old"))
    assert deleted == 800 - len(moved)
    assert set(await store.get_many(ids)) == moved
    assert await members(store) == ({"new": moved} if moved else {})


async def test_ids_of_a_state_come_in_pages_ordered_by_code_point(store: RedisStore) -> None:
    ids = ["a", "A", "é", "z", "\U0001f600", "\uffff", "a b", "10", "9", *(f"n{n:05d}" for n in range(2_500))]
    await store.put_batch([SyncItem(i, b"{}", state="s") for i in ids])
    wanted = sorted(ids)
    assert await store.list_state_ids("s", limit=10_000) == wanted
    seen: list[str] = []
    while page := await store.list_state_ids("s", 700, after=seen[-1] if seen else None):
        seen += page
    assert seen == wanted
    assert await store.list_state_ids("s", 0) == []
    assert await store.list_state_ids("nobody") == []
    assert await store.count_by_state("s") == len(ids)


@pytest.mark.parametrize("bad", ["", "x" * 33, "a\0b", 5])
async def test_a_state_that_breaks_a_rule_is_refused(store: RedisStore, bad: Any) -> None:
    for call in (
        store.count_by_state(bad),
        store.list_state_ids(bad),
        store.is_in_state("a", bad),
        store.move_state("a", bad, "x"),
        store.move_state("a", "x", bad),
        store.delete_by_state(bad),
    ):
        with pytest.raises(InvalidState):
            await call


async def test_a_negative_limit_is_refused(store: RedisStore) -> None:
    with pytest.raises(InvalidItem, match="limit"):
        await store.list_state_ids("a", -1)


async def test_R6_an_item_that_somebody_else_took_comes_back_in_one_state(each: RedisStore) -> None:
    for content in (b"{}", b"\x00"):
        await each.put_batch([SyncItem("a", content, state="old"), SyncItem("b", content, state="old")])
        await each.client.delete(each.prefix + "a")
        await each.put(SyncItem("a", content, state="new"))
        assert await members(each) == {"old": {"b"}, "new": {"a"}}
        assert await each.list_state_ids("old") == ["b"]
        assert await each.count_by_state("old") == 1
        await each.delete_many("ab")
        assert await members(each) == {}


async def test_R6_an_item_that_somebody_else_took_is_in_no_state_once_it_is_deleted(each: RedisStore) -> None:
    await each.reindex()  # or the first listing would
    await each.put_batch([SyncItem(i, b"{}", state=f"of {i}") for i in "abc"])
    await each.client.delete(each.prefix + "a", each.prefix + "b")
    assert await each.delete_many("a") == 0
    assert await each.delete_prefix("b") == 0
    assert await members(each) == {"of c": {"c"}}
    assert [await each.count_by_state(f"of {i}") for i in "abc"] == [0, 0, 1]


async def test_R6_an_item_that_the_original_moved_is_in_one_state_once_it_is_written(each: RedisStore) -> None:
    await each.put_batch([SyncItem(i, b"\x00", state="one") for i in "abcd"])
    for i, state in (("a", "one"), ("b", "two"), ("c", "two")):
        await each.client.set(each.prefix + i, to_text(SyncItem(i, b"\x01", state=state)))
    await each.put_batch([SyncItem("a", b"{}", state="three"), SyncItem("b", b"{}", state="three")])
    await each.delete("c")
    assert await members(each) == {"one": {"d"}, "three": {"a", "b"}}
    assert await each.list_state_ids("one") == ["d"]


@pytest.mark.parametrize("count", [300, 1_100])
async def test_R6_an_item_that_somebody_else_took_comes_back_in_one_state_of_many(
    store: RedisStore, count: int
) -> None:
    await store.put_batch([SyncItem(f"i{n}", b"\x00", state=f"s{n}") for n in range(count)])
    await store.reindex()
    taken = [f"i{n}" for n in range(0, count, 2)]
    await store.client.delete(*(store.prefix + i for i in taken))
    await store.put_batch([SyncItem(i, b"\x00", state="new") for i in taken])
    assert await store.list_state_ids("s0") == []
    assert await store.list_state_ids("new", count) == sorted(taken)
    assert await store.count_by_state("new") == len(taken)
    assert {state: len(ids) for state, ids in (await members(store)).items()} == {
        "new": len(taken),
        **{f"s{n}": 1 for n in range(1, count, 2)},
    }


# At scale.


def many(count: int, state: str, **told: Any) -> list[SyncItem]:
    return [SyncItem(f"i{n:05}", b"{}" if n % 2 else b"\x00", state=state, updated_at=1, **told) for n in range(count)]


async def test_items_of_a_state_come_once_and_in_order(each: RedisStore) -> None:
    await each.put_batch([*many(1_300, "s"), SyncItem("other", b"{}", state="t")])
    assert [item async for item in each.iter_by_state("s")] == many(1_300, "s")
    assert await each.get_by_state("s", 700, after="i00599") == many(1_300, "s")[600:]


async def test_an_item_that_stays_in_the_state_comes_once_whatever_moves_meanwhile(store: RedisStore) -> None:
    await store.put_batch(many(1_500, "s"))
    seen: list[str] = []
    async for item in store.iter_by_state("s"):
        assert item.state == "s"
        seen.append(item.object_id)
        if len(seen) % 100 == 1:
            n = len(seen) - 1
            await store.move_state(f"i{n:05}", "s", "left")  # behind the reader
            await store.move_state(f"i{n + 51:05}", "s", "left")  # before it, or where it has read ahead
    moved = {f"i{n + more:05}" for n in range(0, 1_500, 100) for more in (0, 51)}
    assert seen == sorted(set(seen))
    assert {f"i{n:05}" for n in range(1_500)} - moved <= set(seen)
    assert set(await store.list_state_ids("left")) <= moved


async def test_no_call_asks_for_a_whole_set(store: RedisStore) -> None:
    async def asked() -> dict[str, int]:
        told = await store.client.info("commandstats")
        return {name: told.get(f"cmdstat_{name}", {"calls": 0})["calls"] for name in ("smembers", "keys", "sort")}

    await store.put_batch(many(1_200, "s"))
    before = await asked()
    await store.reindex()
    assert len(await store.list_state_ids("s")) == 1_000
    assert len([item async for item in store.iter_by_state("s")]) == await store.count_by_state("s") == 1_200
    assert await store.move_state("i00000", "s", "t")
    assert await store.remove_from_state("i00000", "t")
    assert await store.delete_by_state("s") == 1_199
    assert await asked() == before


async def test_no_step_of_a_call_is_longer_than_a_page(store: RedisStore, redis_url: str) -> None:
    await store.put_batch(many(2_600, "s"))
    await store.reindex()
    steps: list[tuple[str, int]] = []
    async with Redis.from_url(redis_url) as watcher, watcher.monitor() as monitor:
        await store.list_state_ids("s", 2_600)
        await store.get_by_state("s", 2_600)
        await store.delete_by_state("s")
        await store.client.echo(store.prefix)
        async for told in monitor.listen():
            words = told["command"].split(" ")
            if words[:2] == ["ECHO", store.prefix]:
                break
            if words[0] == "ZRANGE" and words[1].startswith(store.prefix) and "LIMIT" in words:
                steps.append(("page", int(words[words.index("LIMIT") + 2])))
            elif words[0] == "EVALSHA" and words[3].startswith(f"{store.prefix}i"):
                steps.append(("delete", int(words[2])))
            else:
                assert words[0] not in ("ZRANGE", "SMEMBERS") or not words[1].startswith(store.prefix), words
    assert {name for name, _ in steps} == {"page", "delete"}
    assert max(count for name, count in steps if name == "page") <= 1_000
    assert max(count for name, count in steps if name == "delete") <= 250
    assert sum(count for name, count in steps if name == "delete") == 2_600


async def test_I6_a_count_is_right_as_soon_as_many_have_expired(each: RedisStore) -> None:
    await each.put_batch([SyncItem(f"stays{n}", b"{}", state="hot") for n in range(3)])
    deadline = now_ms() + 60
    await each.apply(
        [
            Op(kind="put", object_id=item.object_id, stamp=0, item=item, redis_expires_at=deadline)
            for item in many(2_600, "hot")
        ]
    )
    await gone(each, "i02599")
    assert await each.count_by_state("hot") == 3
    assert await members(each) == {"hot": {"stays0", "stays1", "stays2"}}


async def test_R7_what_moves_in_and_out_while_a_state_is_deleted_is_deleted_or_kept_whole(each: RedisStore) -> None:
    await each.put_batch([*many(1_200, "old"), *(SyncItem(f"n{n}", b"{}", state="new") for n in range(60))])
    moves: list[tuple[str, bool]] = []

    async def move(turn: random.Random) -> None:
        for n in turn.sample(range(60), 30):
            moves.append(("out", await each.move_state(f"i{n * 20:05}", "old", "new")))
            moves.append(("in", await each.move_state(f"n{n}", "new", "old")))

    *_, deleted = await asyncio.gather(*(move(random.Random(seed)) for seed in range(3)), each.delete_by_state("old"))
    moved_out, moved_in = moves.count(("out", True)), moves.count(("in", True))
    left = {state: set(await each.list_state_ids(state, 2_000)) for state in ("old", "new")}
    assert len(left["new"]) == 60 + moved_out - moved_in
    assert len(left["old"]) == 1_200 - moved_out + moved_in - deleted
    assert {i: item.state for i, item in (await each.get_many(left["old"] | left["new"])).items()} == {
        i: state for state, ids in left.items() for i in ids
    }
    assert await members(each) == {state: ids for state, ids in left.items() if ids}
    assert await each.delete_by_state("old") == len(left["old"])


ids = st.sampled_from(["a", "b", "c", "d"])
states = st.sampled_from(STATES)
values = st.sampled_from([b"{}", b"[1.50]", b"\x00"])
changes = st.one_of(
    st.tuples(st.just("put"), st.lists(st.tuples(ids, values, states, st.sampled_from([None, 60])), max_size=4)),
    st.tuples(st.just("delete"), ids),
    st.tuples(st.just("restate"), ids, states),
    st.tuples(st.just("move"), ids, states, states),
    st.tuples(st.just("expire"), ids, values, states),
    st.tuples(st.just("take"), ids),
    st.tuples(st.just("delete state"), states),
)


@settings(max_examples=60)
@given(steps=st.lists(changes, max_size=12), ordered=st.booleans(), binary_format=st.sampled_from(["compact", "json"]))
@example(
    steps=[("put", [("a", b"{}", "hot", None)]), ("take", "a"), ("put", [("a", b"{}", "default", None)])],
    ordered=True,
    binary_format="json",
)
async def test_I6_sets_equal_the_states_of_the_live_items(
    kind_url: str, redis_prefix: str, binary_format: Any, steps: list[Any], ordered: bool
) -> None:
    store = await RedisStore.connect(kind_url, redis_prefix, binary_format=binary_format)
    await store.reindex()  # or the first listing would, and hide what went wrong before it
    await store.delete_many(["a", "b", "c", "d"])
    await store.client.delete(*[f"{redis_prefix}__local__:tomb:{i}" for i in "abcd"])
    model: dict[str, str] = {}
    stamp = 0

    async def apply(kind: Any, object_id: str, item: SyncItem | None = None, **told: Any) -> None:
        nonlocal stamp
        stamp += ordered
        await store.apply([Op(kind=kind, object_id=object_id, stamp=stamp, item=item, **told)])

    for step in steps:
        match step:
            case ("put", puts):
                stamp += ordered
                last = {i: (SyncItem(i, value, state=state, stamp=stamp), ttl) for i, value, state, ttl in puts}
                await store.apply(
                    [
                        Op(
                            kind="put",
                            object_id=i,
                            stamp=stamp,
                            item=item,
                            redis_expires_at=None if ttl is None else now_ms() + ttl * 1000,
                        )
                        for i, (item, ttl) in last.items()
                    ]
                )
                model |= {i: item.state for i, (item, _) in last.items()}
            case ("delete", i):
                await apply("delete", i)
                model.pop(i, None)
            case ("restate", i, state):
                await apply("restate", i, state=state)
                if i in model:
                    model[i] = state
            case ("move", i, old, new):
                assert await store.move_state(i, old, new) == (model.get(i) == old)
                if model.get(i) == old:
                    model[i] = new
            case ("expire", i, value, state):
                await apply("put", i, SyncItem(i, value, state=state), redis_expires_at=now_ms() + 3)
                await gone(store, i)
                model.pop(i, None)
            case ("take", i):  # what an eviction by the server does, or somebody with redis-cli
                await store.client.delete(redis_prefix + i)
                model.pop(i, None)
            case ("delete state", state):
                held = {i for i in model if model[i] == state}
                assert await store.delete_by_state(state) == len(held)
                for i in held:
                    del model[i]
    for state in STATES:
        wanted = sorted(i for i in model if model[i] == state)
        assert await store.list_state_ids(state) == wanted
        assert await store.count_by_state(state) == len(wanted)
    sets = await members(store)
    assert sets == {state: {i for i in model if model[i] == state} for state in set(model.values())}
    assert {i: item.state for i, item in (await store.get_many("abcd")).items()} == model
    await store.close()
