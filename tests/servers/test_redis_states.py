"""I6: state sets equal the states of the live items, whatever happens to them; and the calls that rest on it."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sync_engine.errors import InvalidItem, InvalidState
from sync_engine.item import Op, SyncItem
from sync_engine.storage.redis import RedisStore

STATES = ("default", "hot", 'odd "é"/\\')


@pytest.fixture
async def store(redis_url: str, redis_prefix: str) -> AsyncIterator[RedisStore]:
    store = await RedisStore.connect(redis_url, redis_prefix)
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
    # A stale member, as the original leaves it; and one whose value is somebody else's.
    await store.client.set(store.prefix + "foreign", "x")
    await store.client.sadd(f"{store.prefix}state:old", "moved", "never-there", "foreign", b"\xff")
    assert await store.delete_by_state("old") == 1_500
    assert await store.client.smembers(f"{store.prefix}state:old") == {b"\xff"}
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


ids = st.sampled_from(["a", "b", "c", "d"])
states = st.sampled_from(STATES)
values = st.sampled_from([b"{}", b"[1.50]", b"\x00"])
changes = st.one_of(
    st.tuples(st.just("put"), st.lists(st.tuples(ids, values, states, st.sampled_from([None, 60])), max_size=4)),
    st.tuples(st.just("delete"), ids),
    st.tuples(st.just("restate"), ids, states),
    st.tuples(st.just("move"), ids, states, states),
    st.tuples(st.just("expire"), ids, values, states),
    st.tuples(st.just("delete state"), states),
)


@pytest.mark.parametrize("binary_format", ["compact", "json"])
@settings(max_examples=60)
@given(steps=st.lists(changes, max_size=12), ordered=st.booleans())
async def test_I6_sets_equal_the_states_of_the_live_items(
    redis_url: str, redis_prefix: str, binary_format: Any, steps: list[Any], ordered: bool
) -> None:
    store = await RedisStore.connect(redis_url, redis_prefix, binary_format=binary_format)
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
