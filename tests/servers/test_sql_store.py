"""SqlStore on every database: its own verbs, the order of what is written, ids and bytes."""

from __future__ import annotations

import json
import logging
import random
from collections.abc import AsyncIterator
from itertools import permutations, product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sync_engine.errors import ConfigError, Corruption, InvalidId, InvalidItem, InvalidState, StoreError
from sync_engine.item import Op, SyncItem
from sync_engine.ports import Truth
from sync_engine.storage.sql import SqlStore
from sync_engine.storage.sql.words import Said
from sync_engine.testing.contract import put
from sync_engine.testing.databases import ask


@pytest.fixture
async def store(sql_url: str) -> AsyncIterator[SqlStore]:
    store = await SqlStore.connect(sql_url)
    yield store
    await store.close()


def delete(id_: str, stamp: int) -> Op:
    return Op(kind="delete", object_id=id_, stamp=stamp)


# Verbs.


async def test_the_store_is_a_truth(store: SqlStore) -> None:
    truth: Truth = store
    assert isinstance(truth, Truth)
    assert truth.name == "l3"


async def test_an_item_comes_back_and_goes(store: SqlStore) -> None:
    item = SyncItem.from_json("user.1", {"name": "Ada"}, trace_state="t", priority_score=1.5, state="new")
    await store.put(item)
    assert await store.get("user.1") == item
    assert await store.exists("user.1")
    assert await store.count() == 1
    assert await store.delete("user.1") is True
    assert await store.delete("user.1") is False
    assert await store.get("user.1") is None
    assert not await store.exists("user.1")


async def test_a_batch_is_stored_under_one_batch_id(store: SqlStore) -> None:
    items = [SyncItem(f"i{number:04}", b"%d" % number) for number in range(1200)]
    result = await store.put_batch(iter(items))
    assert (result.written, result.verified, result.failed, result.superseded) == (1200, True, {}, frozenset())
    held = await store.get_many([item.object_id for item in items])
    assert [held[item.object_id] for item in items] == items
    assert {item.batch_id for item in held.values()} == {result.batch_id}
    assert await store.delete_many([item.object_id for item in items] * 2) == 1200
    assert await store.count() == 0


async def test_of_several_items_with_one_id_in_a_batch_the_last_counts(store: SqlStore) -> None:
    result = await store.put_batch([SyncItem("a", b"1"), SyncItem("a", b"2")])
    assert result.written == 1
    assert (await store.get_many(["a"]))["a"].content == b"2"


async def test_a_batch_reports_what_was_newer(store: SqlStore) -> None:
    await store.put_batch([SyncItem("a", b"new", stamp=9)])
    result = await store.put_batch([SyncItem("a", b"old", stamp=8), SyncItem("b", b"b", stamp=8)])
    assert (result.written, result.verified) == (1, True)
    assert result.superseded == {"a"}


async def test_many_ids_take_part_in_one_call_each(store: SqlStore) -> None:
    ids = [f"id.{number}" for number in range(1500)]
    await store.apply([put(id_, 1) for id_ in ids])
    assert len((await store.fetch(ids)).items) == 1500
    assert all(await store.exists_batch(ids))
    applied = await store.apply([delete(id_, 2) for id_ in ids])
    assert applied.existed == set(ids)


async def test_iterators_walk_over_all_pages(store: SqlStore) -> None:
    ids = [f"p.{number:05}" for number in range(1234)]
    await store.apply([put(id_, 1, state="s") for id_ in ids] + [put("q", 1, state="t")])
    assert [item.object_id async for item in store.iter_prefix("p.")] == ids
    assert [item.object_id async for item in store.iter_by_state("s")] == ids
    assert [item.object_id async for item in store.iter_prefix("")] == [*ids, "q"]


async def test_bad_arguments_are_refused_before_any_io(store: SqlStore) -> None:
    await store.close()  # nothing could be asked now
    with pytest.raises(InvalidId):
        await store.get("merkle:x")
    with pytest.raises(InvalidId):
        await store.delete("")
    with pytest.raises(InvalidState):
        await store.count_by_state("")
    for limit in (-1, 1.5, True, None):
        with pytest.raises(InvalidItem, match="limit"):
            await store.scan_prefix("a", limit)  # type: ignore[arg-type]  # that is the point
    with pytest.raises(InvalidItem, match="prefix"):
        await store.count_prefix("\ud800")


async def test_a_limit_of_zero_asks_for_nothing(store: SqlStore) -> None:
    await store.put(SyncItem("a", b"x"))
    assert await store.scan_prefix("", 0) == []
    assert await store.list_state_ids("default", 0) == []


# Order.


async def test_Q5_an_older_row_never_overwrites_a_newer_one(store: SqlStore) -> None:
    """The log drained v1 over the v2 that had gone straight to SQL."""
    await store.apply([put("a", 2, b"v2")])
    applied = await store.apply([put("a", 1, b"v1"), put("b", 1, b"b")])
    assert applied.superseded == {"a"}
    assert (await store.get_many(["a", "b"]))["a"].content == b"v2"
    assert await store.exists("b")


async def test_I1_puts_and_deletes_end_alike_in_every_order(store: SqlStore) -> None:
    ops = [put("x", 1, b"1"), delete("x", 2), put("x", 3, b"3"), delete("x", 4)]
    for number, (order, last) in enumerate(product(permutations(range(4)), (3, 4))):
        id_ = f"x{number}"
        mine = [
            put(id_, op.stamp, op.item.content) if op.item else delete(id_, op.stamp)
            for op in (ops[at] for at in order)
            if op.stamp <= last
        ]
        for op in mine:
            await store.apply([op])
        item = await store.get(id_)
        assert (item.content if item else None) == (b"3" if last == 3 else None), order


@settings(max_examples=40)
@given(
    st.lists(
        st.tuples(
            st.sampled_from("abc"), st.integers(1, 2**63 - 1), st.sampled_from(["put", "delete"]), st.binary(max_size=2)
        ),
        max_size=12,
        unique_by=lambda told: told[1],
    ),
    st.randoms(use_true_random=False),
    st.integers(1, 5),
)
async def test_I1_the_newest_operation_wins_in_any_order_and_batching(
    store: SqlStore, told: list[tuple[str, int, str, bytes]], rng: random.Random, size: int
) -> None:
    await store.apply([Op(kind="delete", object_id=id_, stamp=0) for id_ in "abc"])
    expected: dict[str, bytes | None] = {}
    for id_, _, kind, content in sorted(told, key=lambda op: op[1]):
        expected[id_] = content if kind == "put" else None
    rng.shuffle(told)
    batch: dict[str, Op] = {}
    for id_, stamp, kind, content in told:
        if id_ in batch or len(batch) == size:  # the port takes one operation per id
            await store.apply(list(batch.values()))
            batch = {}
        batch[id_] = put(id_, stamp, content) if kind == "put" else delete(id_, stamp)
    await store.apply(list(batch.values()))
    held = await store.get_many("abc")
    assert {id_: item.content for id_, item in held.items()} == {k: v for k, v in expected.items() if v is not None}
    assert await store.newest_stamp() >= max((op[1] for op in told), default=0)


async def test_of_equal_stamps_the_larger_hash_wins_everywhere_alike(store: SqlStore) -> None:
    contents = sorted([b"1", b"2", b"3"], key=lambda content: SyncItem("a", content).content_hash)
    for number, order in enumerate(permutations(contents)):
        for content in order:
            await store.apply([put(f"a{number}", 5, content)])
        item = await store.get(f"a{number}")
        assert item is not None
        assert item.content == contents[-1]


async def test_a_put_that_sql_does_not_keep_removes_the_older_copy(store: SqlStore) -> None:
    await store.apply([put("a", 1), put("b", 9)])
    item = SyncItem("a", b"cache", stamp=5)
    applied = await store.apply(
        [
            Op(kind="put", object_id="a", stamp=5, item=item, sql=False),
            Op(kind="put", object_id="b", stamp=5, item=item.replace(object_id="b"), sql=False),
        ]
    )
    assert applied.existed == {"a"}
    assert applied.superseded == {"b"}
    assert await store.exists_batch(["a", "b"]) == [False, True]
    assert (await store.apply([put("a", 4)])).superseded == {"a"}


async def test_if_version_zero_does_not_replace_an_item_of_version_zero(store: SqlStore) -> None:
    await store.apply([put("a", 1, version=0)])
    compare = Op(kind="put", object_id="a", stamp=2, item=SyncItem("a", b"y", stamp=2), if_version=0)
    assert set((await store.apply([compare, put("b", 2)])).refused) == {"a"}
    assert (await store.get_many(["a", "b"]))["a"].content == b"{}"


async def test_merkle_dirty_is_raised_by_a_change_of_content_or_version_alone(store: SqlStore, sql_url: str) -> None:
    async def dirty() -> object:
        return (await ask(sql_url, "SELECT merkle_dirty FROM sync_items"))[0][0]

    await store.apply([put("a", 1)])
    assert await dirty() == 1
    await ask(sql_url, "UPDATE sync_items SET merkle_dirty = 0")
    await store.apply([put("a", 2, state="other")])
    assert await dirty() == 0
    await store.apply([put("a", 3, version=2)])
    assert await dirty() == 1
    await ask(sql_url, "UPDATE sync_items SET merkle_dirty = 0")
    await store.apply([put("a", 4, b"other", version=2)])
    assert await dirty() == 1


async def test_old_tombstones_are_forgotten_and_young_ones_kept(store: SqlStore, sql_url: str) -> None:
    await store.apply([delete(f"old{number}", 7) for number in range(5)])
    await ask(sql_url, "UPDATE sync_tombstones SET deleted_at_ms = deleted_at_ms - 8 * 86400000")
    young = [f"young{number}" for number in range(300)]  # of every bucket some: they take theirs along
    await store.apply([delete(id_, 8) for id_ in young])
    assert set(await store.buried_stamps(young)) == set(young)
    assert await ask(sql_url, "SELECT count(*) FROM sync_tombstones WHERE id LIKE 'old%'") == [(0,)]


# Ids and bytes.

hostile = st.text(st.sampled_from("aAáüß%_\\*?[]^-. \t'\"😀\ue000\U0010ffff\x01ﬀ"), min_size=1, max_size=4)


@settings(max_examples=60)
@given(st.sets(hostile, max_size=15), hostile | st.just(""), st.integers(1, 6))
async def test_Q12_Q18_scans_are_startswith_in_order_page_by_page(
    store: SqlStore, ids: set[str], prefix: str, limit: int
) -> None:
    await store.delete_many([item.object_id async for item in store.iter_prefix("")])
    await store.apply([put(id_, 0) for id_ in ids])
    expected = sorted(id_ for id_ in ids if id_.startswith(prefix))
    assert [item.object_id for item in await store.scan_prefix(prefix)] == expected
    assert await store.count_prefix(prefix) == len(expected)
    found: list[str] = []
    while page := await store.scan_prefix(prefix, limit, after=found[-1] if found else None):
        assert len(page) <= limit
        found += [item.object_id for item in page]
    assert found == expected
    listed: list[str] = []
    while ids_page := await store.list_state_ids("default", limit, after=listed[-1] if listed else None):
        listed += ids_page
    assert listed == sorted(ids)


async def test_Q8_ids_that_differ_in_case_accents_or_spaces_at_the_end_are_different(store: SqlStore) -> None:
    ids = ["a", "A", "á", "a ", "a  ", "a\t", "ß", "ss", "ﬀ", "ff", "a\u0301", "\ufeffa", "\u200da", "a\x01"]
    assert (await store.put_batch([SyncItem(id_, id_.encode(), state="s") for id_ in ids])).written == len(ids)
    held = await store.get_many(ids)
    assert {id_: item.content.decode() for id_, item in held.items()} == {id_: id_ for id_ in ids}
    assert [item.object_id for item in await store.scan_prefix("")] == sorted(ids)
    for id_ in ids:
        item = await store.get(id_)
        assert item is not None
        assert item.object_id == id_
    assert await store.delete("a ") is True
    assert await store.exists_batch(["a", "a ", "a  "]) == [True, False, True]


async def test_Q8_states_that_differ_in_case_or_spaces_are_different(store: SqlStore) -> None:
    states = ["s", "S", "s ", "ś"]
    await store.put_batch([SyncItem(f"i{number}", b"x", state=state) for number, state in enumerate(states)])
    for number, state in enumerate(states):
        assert await store.list_state_ids(state) == [f"i{number}"]
        assert await store.count_by_state(state) == 1


async def test_the_longest_id_and_state_fit(store: SqlStore) -> None:
    items = [SyncItem("\U0010ffff" * 255, b"x", state="\U0001f600" * 32), SyncItem("a" * 255, b"y", state="b" * 32)]
    await store.put_batch(items)
    assert await store.get(items[0].object_id) == items[0]
    assert await store.list_state_ids(items[0].state) == [items[0].object_id]


async def test_Q12_an_underscore_is_an_underscore(store: SqlStore) -> None:
    await store.apply([put(id_, 1) for id_ in ("user_1", "userX1", "USER_1")])
    assert [item.object_id for item in await store.scan_prefix("user_")] == ["user_1"]


json_texts = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=60)
@given(st.lists(st.binary(max_size=60), max_size=4), st.lists(json_texts, max_size=4), st.sampled_from([None, 1]))
async def test_I5_any_bytes_and_any_json_come_back(
    store: SqlStore, blobs: list[bytes], values: list[object], indent: int | None
) -> None:
    contents = list(blobs)
    for value in values:
        for plain in (True, False):
            contents.append(json.dumps(value, ensure_ascii=plain, indent=indent).encode(errors="surrogatepass"))
    items = [SyncItem(f"i{number}", content) for number, content in enumerate(contents)]
    await store.put_batch(items)
    back = await store.get_many([item.object_id for item in items])
    assert [back[item.object_id] for item in items] == items


async def test_large_contents_share_a_batch(store: SqlStore) -> None:
    items = [SyncItem(f"i{number}", bytes([number]) * 3_000_000) for number in range(4)]
    assert (await store.put_batch(items)).written == 4
    assert await store.scan_prefix("i") == items


async def test_I5_a_changed_byte_is_corruption_and_its_neighbours_are_served(store: SqlStore, sql_url: str) -> None:
    await store.apply([put("a", 1, b"[1]"), put("b", 1, b"\xff"), put("c", 1)])
    await ask(sql_url, "UPDATE sync_items SET payload = '[2]' WHERE id = 'a'")
    await ask(sql_url, "UPDATE sync_items SET payload_blob = ? WHERE id = 'b'", b"\0")
    fetched = await store.fetch(["a", "b", "c"])
    assert set(fetched.items) == {"c"}
    assert set(fetched.corrupt) == {"a", "b"}
    for reading in (store.get("a"), store.get_many(["a"]), store.scan_prefix("a"), store.get_by_state("default")):
        with pytest.raises(Corruption, match="'a'"):
            await reading


# The database.


async def test_what_was_stored_is_there_after_reopening(sql_url: str) -> None:
    for number in range(3):
        store = await SqlStore.connect(sql_url)
        assert await store.count() == number
        assert await store.newest_stamp() == number
        await store.apply([put(f"a{number}", number + 1)])
        await store.close()


@pytest.mark.parametrize("timeout_ms", [0, -1, 600_001, 1.5, True])
async def test_a_timeout_out_of_range_names_its_bounds(sql_url: str, timeout_ms: int) -> None:
    with pytest.raises(ConfigError, match=r"timeout_ms.*600000"):
        await SqlStore.connect(sql_url, timeout_ms=timeout_ms)


async def test_Q20_nothing_of_users_or_urls_is_logged_or_shown(sql_url: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    store = await SqlStore.connect(sql_url)
    await store.put(SyncItem("id.canary", b"content-canary", home_instance_id="label-canary"))
    await store.get("id.canary")
    with pytest.raises(StoreError) as refused:
        await store._writers[0].transaction(lambda own: own.rows(Said("SELECT nothing FRM nowhere", ())))
    await store.close()
    told = caplog.text + repr(store) + str(refused.value)
    password = sql_url.partition(":")[2].partition("@")[0].rpartition(":")[2]
    for secret in ("content-canary", "label-canary", "sécret", *([password] if "ada" in sql_url else [])):
        assert secret not in told
