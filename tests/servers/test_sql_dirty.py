"""Dirty rows on every database: who is listed, what calls them clean, and whether the tables hold what they should."""

from __future__ import annotations

import asyncio
import hashlib
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sync_engine.errors import Corruption, InvalidItem, TierUnavailable
from sync_engine.item import Op, SyncItem
from sync_engine.storage.sql import SqlStore, Verification, dirty
from sync_engine.storage.sql.routing import Routes
from sync_engine.storage.sql.words import Said
from sync_engine.testing.contract import put
from sync_engine.testing.databases import ask


@pytest.fixture
async def stores(sql_url: str) -> AsyncIterator[list[SqlStore]]:
    stores = [await SqlStore.connect(sql_url, timeout_ms=60_000) for _ in range(2)]
    yield stores
    for store in stores:
        await store.close()


@pytest.fixture
def store(stores: list[SqlStore]) -> SqlStore:
    return stores[0]


@pytest.fixture(params=["sorted", "along the ids"])
def either_way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dirty rows are found by their flag and sorted, or, as if there were too many, along the ids."""
    if request.param != "sorted":
        monkeypatch.setattr(dirty, "SORTED_MAX", -1)


async def all_clean(store: SqlStore) -> None:
    await store.mark_clean([item for item in await store.get_dirty(5000) if isinstance(item, SyncItem)])
    assert await store.count_dirty() == 0


async def processed(store: SqlStore, id_: str) -> SyncItem:
    """What somebody has read who will call it clean."""
    item = await store.get(id_)
    assert item is not None
    return item


async def rows_of_the_original(sql_url: str, **contents: str) -> None:
    """Without a hash and without a stamp."""
    for id_, content in contents.items():
        await ask(sql_url, "INSERT INTO sync_items (id, timestamp, payload) VALUES (?, 5, ?)", id_, content)


# Who is dirty.


@pytest.mark.usefixtures("either_way")
async def test_M10_a_row_is_dirty_when_new_and_when_content_or_version_change_and_not_of_its_state(
    store: SqlStore,
) -> None:
    await store.apply([put(id_, 1) for id_ in ("content", "same", "state", "version", "restated")])
    assert await store.list_dirty_ids() == ["content", "restated", "same", "state", "version"]
    await all_clean(store)
    await store.apply(
        [
            put("content", 2, b"y"),
            put("same", 2),
            put("state", 2, state="s"),
            put("version", 2, version=2),
            Op(kind="restate", object_id="restated", stamp=2, state="s"),
            put("new", 2),
        ]
    )
    assert await store.list_dirty_ids() == ["content", "new", "version"]
    await store.apply([put("content", 1, b"older"), Op(kind="delete", object_id="version", stamp=3)])
    assert await store.list_dirty_ids() == ["content", "new"]
    await store.apply([put("content", 3, b"y")])
    assert await store.list_dirty_ids() == ["content", "new"]  # nobody has processed it yet


@pytest.mark.usefixtures("either_way")
async def test_the_flag_moves_with_its_row(store: SqlStore, sql_url: str) -> None:
    await store.apply([put(f"{letter}{n}", 1) for letter in "ab" for n in range(4)])
    await store.mark_clean([await processed(store, id_) for id_ in ("a1", "a3", "b0")])
    await store.register_schema("as", ["a"])
    assert await store.list_dirty_ids() == ["a0", "a2", "b1", "b2", "b3"]
    assert await ask(sql_url, "SELECT count(*) FROM as_items WHERE merkle_dirty = 1") == [(2,)]
    await store.apply([put("a1", 2, b"y"), put("a2", 2, b"y")])
    assert await store.list_dirty_ids(prefix="a") == ["a0", "a1", "a2"]
    assert [await store.count_dirty(prefix) for prefix in ("", "a", "b", "a1", "c")] == [6, 3, 3, 1, 0]


hostile = st.text(st.sampled_from("aAáß%_\\'.-. ,/!\t😀\ud7ff\ue000\uffff\U0010ffff\x01\xff"), min_size=1, max_size=5)


@pytest.mark.usefixtures("either_way")
@settings(max_examples=40)
@given(
    st.dictionaries(hostile, st.booleans(), max_size=25),
    hostile | st.just(""),
    st.none() | hostile,
    st.integers(1, 6),
)
async def test_Q12_Q18_dirty_rows_are_listed_in_order_page_by_page(
    store: SqlStore,
    monkeypatch: pytest.MonkeyPatch,
    ids: dict[str, bool],
    prefix: str,
    after: str | None,
    limit: int,
) -> None:
    monkeypatch.setattr(dirty, "SEEN_IDS", 3)
    if not store._router.routes.tables[1:]:
        await store.register_schema("some", ["a", "\ue000", "a."])
    await store.delete_many(await store.list_prefix_ids("", 5000))
    await store.apply([put(id_, 0) for id_ in ids])
    flagged = sorted(id_ for id_, is_dirty in ids.items() if is_dirty)
    clean = [item async for item in store.iter_prefix("") if item.object_id not in flagged]
    assert await store.mark_clean(clean) == len(clean) == len(ids) - len(flagged)
    mine = [id_ for id_ in flagged if id_.startswith(prefix)]
    assert await store.list_dirty_ids(prefix=prefix) == mine
    assert await store.count_dirty(prefix) == len(mine)
    assert [found.object_id async for found in store.iter_dirty(prefix)] == mine
    assert (
        await store.list_dirty_ids(limit, prefix=prefix, after=after)
        == [id_ for id_ in mine if after is None or id_ > after][:limit]
    )
    found: list[str] = []
    while page := await store.get_dirty(limit, prefix=prefix, after=found[-1] if found else None):
        assert len(page) <= limit
        found += [item.object_id for item in page]
    assert found == mine
    segments = sorted({id_.partition(".")[0] for id_ in flagged})
    assert (
        await store.list_dirty_prefixes(limit, after=after)
        == [each for each in segments if after is None or each > after][:limit]
    )
    told: list[str] = []
    while some := await store.list_dirty_prefixes(limit, after=told[-1] if told else None):
        told += some
    assert told == segments


async def test_prefixes_are_found_without_reading_the_rows_of_each(
    store: SqlStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = [f"{prefix}.{n:04}" for prefix in ("user", "user-1", "user-2", "order") for n in range(500)]
    await store.apply([put(id_, 1) for id_ in [*ids, "user", "zebra"]])
    asked: list[Said] = []
    rows = store._questions.rows

    async def counted(said: Said) -> list[Any]:
        asked.append(said)
        return await rows(said)

    monkeypatch.setattr(store._questions, "rows", counted)
    assert await store.list_dirty_prefixes() == ["order", "user", "user-1", "user-2", "zebra"]
    assert len(asked) <= 2 * 6  # each with the version of the routes behind it
    asked.clear()
    assert await store.list_dirty_prefixes(2) == ["order", "user"]
    assert len(asked) <= 2 * 3


@pytest.mark.usefixtures("either_way")
async def test_pages_are_complete_and_in_order_while_others_write(stores: list[SqlStore]) -> None:
    still = [f"still{n:04}" for n in range(600)]
    await stores[0].apply([put(id_, 1) for id_ in still])
    reading = True

    async def write() -> None:
        rng, stamp = random.Random(3), 10
        while reading:
            stamp += 1
            ids = [f"{rng.choice(['a', 'still0', 'still9', 'z'])}-{rng.randrange(50)}" for _ in range(40)]
            await stores[1].apply([put(id_, stamp, b"%d" % stamp) for id_ in dict.fromkeys(ids)])
            some = await stores[1].get_dirty(20, prefix="still0-")
            await stores[1].mark_clean([item for item in some if isinstance(item, SyncItem)])

    async def read() -> None:
        nonlocal reading
        for turn in range(3):
            if turn == 1:
                await stores[1].register_schema("still", ["still01", "still03"])
            found: list[str] = []
            while page := await stores[0].list_dirty_ids(70, after=found[-1] if found else None):
                found += page
            assert found == sorted(set(found))
            assert [id_ for id_ in found if "-" not in id_] == still
        reading = False

    async with asyncio.TaskGroup() as group:
        group.create_task(write())
        group.create_task(read())


@pytest.mark.usefixtures("either_way")
async def test_Q3_a_damaged_row_hides_none_of_its_neighbours(store: SqlStore, sql_url: str) -> None:
    """A thousand rows that could not be processed stood before all others, for ever."""
    await store.apply([put(f"i{n}", 1, b"[%d]" % n) for n in range(9)])
    await ask(sql_url, "UPDATE sync_items SET payload = '[9]' WHERE id IN ('i0', 'i1', 'i5', 'i8')")
    await ask(sql_url, "UPDATE sync_items SET payload = NULL WHERE id = 'i2'")
    found: list[SyncItem | Corruption] = []
    while page := await store.get_dirty(2, after=found[-1].object_id if found else None):
        found += page
    assert [each.object_id for each in found] == [f"i{n}" for n in range(9)]
    assert [each.object_id for each in found if isinstance(each, SyncItem)] == ["i3", "i4", "i6", "i7"]
    assert await store.mark_clean([each for each in found if isinstance(each, SyncItem)]) == 4
    assert await store.list_dirty_ids() == ["i0", "i1", "i2", "i5", "i8"]
    await store.apply([put("i1", 2, b"sound")])  # which is how such a row is repaired
    assert [each.object_id for each in await store.get_dirty() if isinstance(each, SyncItem)] == ["i1"]


# Who is called clean.


@pytest.mark.parametrize("routed", [False, True], ids=["one table", "schema"])
async def test_Q4_what_was_written_since_it_was_read_stays_dirty(store: SqlStore, sql_url: str, routed: bool) -> None:
    if routed:
        await store.register_schema("some", ["content", "d", "version", "restated"])
    ids = ["content", "deleted", "moment", "restated", "same", "twice", "version"]
    await store.apply([put(id_, 5) for id_ in ids])
    items = [await processed(store, id_) for id_ in ids]
    await store.apply(
        [
            put("content", 6, b"y"),
            Op(kind="delete", object_id="deleted", stamp=6),
            Op(kind="restate", object_id="restated", stamp=6, state="s"),
            put("moment", 6),
            put("version", 6, version=2),
        ]
    )
    assert await store.mark_clean([*items, SyncItem("nowhere", b"x"), SyncItem("twice", b"another")]) == 2
    assert await store.list_dirty_ids() == ["content", "moment", "restated", "version"]
    assert await store.mark_clean(items) == 0  # and what is clean already does not count
    assert await store.mark_clean([await processed(store, id_) for id_ in await store.list_dirty_ids()]) == 4
    assert await store.count_dirty() == 0


async def test_Q4_without_stamps_hash_and_version_tell_what_was_written_since(store: SqlStore) -> None:
    await store.put_batch([SyncItem(id_, b"1") for id_ in "abc"])
    items = [await processed(store, id_) for id_ in "abc"]
    await store.put_batch([SyncItem("a", b"2"), SyncItem("b", b"1"), SyncItem("c", b"1", version=2)])
    assert await store.mark_clean(items) == 1  # b is what it was, though it was written again
    assert await store.list_dirty_ids() == ["a", "c"]


async def test_many_rows_are_called_clean_at_once(store: SqlStore) -> None:
    await store.register_schema("even", [f"i{n}" for n in range(0, 10, 2)])
    await store.apply([put(f"i{n:04}"[::-1], 1) for n in range(2500)])
    await store.apply([put(f"i{n}", 1) for n in range(2500)])
    items = [item async for item in store.iter_dirty() if isinstance(item, SyncItem)]
    assert len(items) == 5000
    random.Random(1).shuffle(items)
    assert await store.mark_clean(iter(items[:4990])) == 4990
    assert await store.list_dirty_ids() == sorted(item.object_id for item in items[4990:])
    assert await store.mark_clean([]) == 0


async def test_rows_of_the_original_are_compared_by_their_content(store: SqlStore, sql_url: str) -> None:
    """It leaves the hash out, so a row that it has written since looks the same but for what is in it."""
    await rows_of_the_original(sql_url, changed="[1]", hashed="[1]", kept="[1]", none="[1]")
    items = [await processed(store, id_) for id_ in ("changed", "hashed", "kept", "none")]
    await ask(sql_url, "UPDATE sync_items SET payload = '[2]' WHERE id = 'changed'")
    await ask(sql_url, "UPDATE sync_items SET payload = NULL WHERE id = 'none'")
    digest = hashlib.sha256(b"[1]").hexdigest()
    await ask(sql_url, "UPDATE sync_items SET payload_hash = ? WHERE id = 'hashed'", digest)
    assert (await store.verify_batch(items)).differing == {"changed", "none"}
    assert await store.mark_clean(items) == 2
    assert await store.list_dirty_ids() == ["changed", "none"]
    await ask(sql_url, "UPDATE sync_items SET merkle_dirty = 1")
    await ask(sql_url, "UPDATE sync_items SET payload_hash = ? WHERE id = 'kept'", "0" * 64)
    assert await store.mark_clean(items) == 1  # a wrong hash is that of another content
    assert await store.list_dirty_ids() == ["changed", "kept", "none"]


async def test_Q4_who_takes_no_locks_of_ours_waits_between_the_look_and_the_mark(
    store: SqlStore, sql_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The original writes without them: what it writes after the row was compared is dirty behind the mark."""
    await store.apply([put("a", 5, b"[1]"), put("b", 5)])
    items = [await processed(store, id_) for id_ in "ab"]
    session = await store._writers[0].session()
    rows, writes = session.rows, "UPDATE sync_items SET payload = '[2]', merkle_dirty = 1 WHERE id = 'a'"
    foreign: list[asyncio.Future[Any]] = []

    async def interrupted(said: Said) -> list[Any]:
        found = await rows(said)
        if "merkle_dirty FROM" in said.text:
            foreign.append(asyncio.ensure_future(asyncio.to_thread(asyncio.run, ask(sql_url, writes))))
            await asyncio.wait(foreign, timeout=0.2)  # long enough for one that does not wait
        return found

    monkeypatch.setattr(session, "rows", interrupted)
    assert await store.mark_clean(items) == 2
    await asyncio.gather(*foreign)
    assert await store.list_dirty_ids() == ["a"]


async def test_mark_clean_takes_home_what_is_being_moved(store: SqlStore, sql_url: str) -> None:
    await store.apply([put(f"a{n}", 1) for n in range(4)])
    items = [await processed(store, f"a{n}") for n in range(3)]
    await store.register_schema("as", ["a"])
    # As in the middle of a move: the route is there, two of the rows are not yet.
    columns = ("id, version, timestamp, payload_hash, payload, payload_blob, audit, merkle_dirty, state, access_count, "
               "last_accessed, stamp")  # fmt: skip
    await ask(sql_url, f"INSERT INTO sync_items ({columns}) SELECT {columns} FROM as_items WHERE id IN ('a0', 'a3')")
    await ask(sql_url, "DELETE FROM as_items WHERE id IN ('a0', 'a3')")
    await ask(sql_url, "UPDATE sync_routes SET phase = 1")
    await ask(sql_url, "UPDATE sync_meta SET value = value + 1 WHERE name = 'routes'")
    assert await store.mark_clean(items) == 3
    assert await store.list_dirty_ids() == ["a3"]
    assert await ask(sql_url, "SELECT id FROM sync_items") == [("a3",)]


@pytest.mark.usefixtures("either_way")
async def test_Q4_nothing_is_lost_while_rows_are_written_processed_and_moved(sql_url: str) -> None:
    """Two processors note what they have read, then call it clean: the last state of every id is among it."""
    stores = [await SqlStore.connect(sql_url, timeout_ms=60_000, write_concurrency=count) for count in (1, 3, 2, 1)]
    ids = [f"{letter}{n:02}" for letter in "abc" for n in range(20)]
    last: dict[str, tuple[int, bytes, int]] = {}
    seen: set[tuple[str, tuple[int, bytes, int]]] = set()
    writing = True

    async def write(store: SqlStore, mine: list[str], seed: int) -> None:
        rng, stamp = random.Random(seed), 10
        for _ in range(12):
            ops = []
            for id_ in rng.sample(mine, 15):
                stamp += 1
                ops.append(put(id_, stamp, rng.choice([b"x", b"y", b"z"]), version=rng.randrange(1, 3)))
            assert not (await store.apply(ops)).refused
            last.update({op.object_id: (op.stamp, op.item.content, op.item.version) for op in ops if op.item})

    async def process(store: SqlStore) -> None:
        more = True
        while more:
            more = writing
            items = [item async for item in store.iter_dirty() if isinstance(item, SyncItem)]
            seen.update((item.object_id, (item.stamp, item.content, item.version)) for item in items)
            await store.mark_clean(items)

    async def work() -> None:
        nonlocal writing
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(write(stores[0], ids[::2], 1))
                group.create_task(write(stores[1], ids[1::2], 2))
                group.create_task(stores[2].register_schema("as", ["a", "b1"]))
                group.create_task(stores[3].register_schema("bs", ["b"]))
        finally:
            writing = False

    async with asyncio.TaskGroup() as group:
        group.create_task(work())
        for store in stores[2:]:
            group.create_task(process(store))
    assert await stores[0].count_dirty() == 0
    # A row written again as it was processed is no change: its stamp alone is newer then.
    contents = {(id_, *facts[1:]) for id_, facts in seen}
    assert {(id_, *facts[1:]) for id_, facts in last.items()} <= contents
    for store in stores:
        await store.close()


async def test_who_gives_up_waiting_leaves_the_rows_called_clean_or_dirty_and_nothing_locked(store: SqlStore) -> None:
    await store.apply([put(f"i{n:03}", 1) for n in range(300)])
    items = [item for item in await store.get_dirty() if isinstance(item, SyncItem)]
    for turns in range(4):
        marking = asyncio.ensure_future(store.mark_clean(items[: 100 * turns]))
        for _ in range(turns):
            await asyncio.sleep(0)
        marking.cancel()
        await asyncio.gather(marking, return_exceptions=True)
    await store.apply([put("j", 1)])
    await store._writing.running.over()
    assert await store.list_dirty_ids() == ["j"]


# Verification.


async def test_Q8_a_batch_is_verified_by_what_the_rows_hold_and_not_by_their_being_there(
    stores: list[SqlStore],
) -> None:
    store = stores[0]
    kept = [SyncItem(id_, b'{"a": 1}', version=2, state="s", stamp=5) for id_ in ("a", "ab", "moved", "x ", "x")]
    await store.put_batch(kept)
    assert await store.verify_batch(kept) == Verification(verified=frozenset({"a", "ab", "moved", "x", "x "}))
    await store.register_schema("ms", ["m"])
    await store.apply(
        [
            put("newer", 9),
            put("same", 9, b"y"),
            put("content", 5, b"x"),
            put("state", 4),
            put("version", 4),
            put("unordered", 4),
            Op(kind="delete", object_id="deleted", stamp=9),
        ]
    )
    larger, smaller = sorted([b"1", b"2"], key=lambda content: SyncItem("tie", content).content_hash, reverse=True)
    await store.apply([put("tie", 5, larger), put("tie2", 5, smaller)])
    asked = [
        *kept,
        SyncItem("X", b'{"a": 1}', version=2, state="s", stamp=5),
        SyncItem("newer", b"y", stamp=5),
        SyncItem("same", b"y", stamp=5),  # a newer stamp of the very same
        SyncItem("content", b"y", stamp=6),
        SyncItem("state", b"{}", state="other", stamp=5),
        SyncItem("version", b"{}", version=2, stamp=5),
        SyncItem("unordered", b"y"),
        SyncItem("tie", smaller, stamp=5),
        SyncItem("tie2", larger, stamp=5),
        SyncItem("deleted", b"x", stamp=5),
        SyncItem("never", b"x", stamp=5),
    ]
    for each in stores:
        assert await each.verify_batch(asked) == Verification(
            verified=frozenset({"a", "ab", "moved", "x", "x ", "same"}),
            missing=frozenset({"X", "never"}),
            differing=frozenset({"content", "state", "version", "unordered", "tie2"}),
            superseded=frozenset({"newer", "tie", "deleted"}),
        )
    assert await store.verify_batch([]) == Verification()


async def test_many_items_are_verified_in_one_call(store: SqlStore) -> None:
    items = [SyncItem(f"i{n:04}", b"%d" % n, stamp=1) for n in range(1500)]
    await store.put_batch(items[:1400])
    verification = await store.verify_batch(iter([*items, items[0].replace(content=b"x", stamp=2)]))
    assert verification.differing == {"i0000"}
    assert len(verification.verified) == 1399
    assert verification.missing == {item.object_id for item in items[1400:]}


async def test_a_scrub_finds_exactly_the_damaged_rows(store: SqlStore, sql_url: str) -> None:
    await store.apply([put(f"{letter}{n:03}", 1, b"[%d]" % n) for letter in "ab" for n in range(600)])
    await store.register_schema("bs", ["b0", "b5"])
    await rows_of_the_original(sql_url, unchecked="[1]")
    assert [found async for found in store.iter_corrupt()] == []
    damaged = {"sync_items": ["a000", "a499", "a500", "b300"], "bs_items": ["b000", "b599"]}
    for table, ids in damaged.items():
        for id_ in ids:
            await ask(sql_url, f"UPDATE {table} SET payload = '[-1]' WHERE id = '{id_}'")
    await ask(sql_url, "UPDATE sync_items SET payload = NULL WHERE id = 'b301'")
    await ask(sql_url, "UPDATE sync_items SET payload_hash = ? WHERE id = 'b302'", "0" * 64)
    found = [each async for each in store.iter_corrupt()]
    assert [each.object_id for each in found] == ["a000", "a499", "a500", "b000", "b300", "b301", "b302", "b599"]
    assert found[0].actual == hashlib.sha256(b"[-1]").hexdigest()
    assert [each.object_id async for each in store.iter_corrupt("b5")] == ["b599"]


# All of them.

ASKED: dict[str, Callable[[SqlStore], Awaitable[Any]]] = {
    "list_dirty_ids": lambda store: store.list_dirty_ids(),
    "ids of a prefix": lambda store: store.list_dirty_ids(prefix="user.", limit=2),
    "get_dirty": lambda store: store.get_dirty(),
    "count_dirty": lambda store: store.count_dirty("u"),
    "list_dirty_prefixes": lambda store: store.list_dirty_prefixes(),
    "verify_batch": lambda store: store.verify_batch([SyncItem("user.1", b"{}"), SyncItem("user.9", b"{}")]),
}


@pytest.mark.usefixtures("either_way")
async def test_Q7_a_store_that_does_not_know_the_routes_yet_answers_as_if_it_did(stores: list[SqlStore]) -> None:
    first, second = stores
    await first.apply([put(id_, 1) for id_ in ("user.1", "user.2", "user.3", "x")])
    before = {verb: await ask_it(second) for verb, ask_it in ASKED.items()}
    items = [item for item in before["get_dirty"] if isinstance(item, SyncItem)]
    await first.register_schema("users", ["user."])
    for verb, ask_it in ASKED.items():
        second._router.routes = Routes()
        assert await ask_it(second) == before[verb] == await ask_it(first), verb
    second._router.routes = Routes()
    assert [found async for found in second.iter_corrupt()] == []
    second._router.routes = Routes()
    assert await second.mark_clean(items) == 4
    assert await first.count_dirty() == 0


async def test_bad_arguments_are_refused_before_any_io_and_a_closed_store_is_unavailable(store: SqlStore) -> None:
    await store.apply([put("a", 1)])
    item = await processed(store, "a")
    await store.close()
    for limit in (-1, 1.5, True, None):
        for listing in (store.list_dirty_ids, store.get_dirty, store.list_dirty_prefixes):
            with pytest.raises(InvalidItem, match="limit"):
                await listing(limit)  # type: ignore[operator]  # that is the point
    for refused in (
        store.list_dirty_ids(prefix="\ud800"),
        store.get_dirty(prefix=5),  # type: ignore[arg-type]
        store.count_dirty("\ud800"),
        anext(store.iter_dirty("\ud800")),
        anext(store.iter_corrupt("\ud800")),
    ):
        with pytest.raises(InvalidItem, match="prefix"):
            await refused
    for refused in (store.count_dirty("a\0"), store.get_dirty(prefix="\0"), store.scan_prefix("a\0b")):
        with pytest.raises(InvalidItem, match=r"prefix: .* NUL"):
            await refused
    for refused in (
        store.list_dirty_ids(after="\0"),
        store.list_dirty_prefixes(after="\0"),
        store.list_prefix_ids("", after="\0"),
    ):
        with pytest.raises(InvalidItem, match=r"after: .* NUL"):
            await refused
    for refused in (store.list_dirty_ids(after="\ud800"), store.list_dirty_prefixes(after="\ud800")):
        with pytest.raises(InvalidItem, match="after"):
            await refused
    for late in (
        store.list_dirty_ids(),
        store.get_dirty(),
        store.count_dirty(),
        store.list_dirty_prefixes(),
        store.mark_clean([item]),
        store.verify_batch([item]),
        anext(store.iter_dirty()),
        anext(store.iter_corrupt()),
    ):
        with pytest.raises(TierUnavailable, match="closed"):
            await late


async def test_many_dirty_rows_are_listed_like_few(
    store: SqlStore, sql_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Few are found by their flag and sorted, many are read along the ids; both say the same."""
    items = [SyncItem(f"{letter}.{n:03}", b"x", updated_at=1) for letter in "abc" for n in range(40)]
    await store.register_schema("bees", ["b"])
    await store.put_batch(items)
    await ask(sql_url, "INSERT INTO sync_items (id, timestamp, payload) VALUES ('state:x', 1, '1')")  # can be no item
    assert await store.mark_clean(items[1::2]) == 60
    wanted = sorted([item.object_id for item in items[::2]] + ["state:x"])
    for few in (20_000, 61, 60, 7, 0):
        monkeypatch.setattr(dirty, "SORTED_MAX", few)
        assert await store.list_dirty_ids() == wanted
        assert [found.object_id for found in await store.get_dirty()] == wanted
        assert [found.object_id async for found in store.iter_dirty()] == wanted
        assert await store.list_dirty_ids(3, prefix="b.", after="b.010") == ["b.012", "b.014", "b.016"]
        assert [found.object_id for found in await store.get_dirty(2, prefix="c", after="b")] == ["c.000", "c.002"]
        assert await store.list_dirty_prefixes() == ["a", "b", "c", "state:x"]
        assert await store.list_dirty_prefixes(2, after="a") == ["b", "c"]
        assert await store.count_dirty() == 61


async def test_dirty_rows_that_come_between_the_count_and_the_page_leave_no_gap_in_it(
    store: SqlStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is cut before it is sorted would have lost ids that were dirty all the time."""
    monkeypatch.setattr(dirty, "SORTED_MAX", 5)
    await store.register_schema("bees", ["b"])
    await store.put_batch([SyncItem(f"{letter}{n}", b"x") for n in range(4) for letter in "cba"])
    number = store._questions.number

    async def before_the_others(ask_it: Any) -> int:
        return min(await number(ask_it), 5)

    monkeypatch.setattr(store._questions, "number", before_the_others)
    assert await store.list_dirty_ids(5) == ["a0", "a1", "a2", "a3", "b0"]
    assert await store.list_dirty_ids(5, prefix="b") == ["b0", "b1", "b2", "b3"]
    assert await store.list_dirty_prefixes(2, after="a2") == ["a3", "b0"]


COLUMNS = (
    "id, version, timestamp, payload_hash, payload, payload_blob, audit, merkle_dirty, state, access_count, "
    "last_accessed, stamp"
)


@pytest.mark.parametrize("moving", [False, True], ids=["", "while rows are moved"])
@pytest.mark.usefixtures("either_way")
async def test_Q7_an_id_in_two_tables_is_listed_once_and_read_where_it_belongs(
    store: SqlStore, sql_url: str, moving: bool
) -> None:
    """A program that knows no routes has left older copies of two rows where they do not belong, and a row alone."""
    await store.apply([put(f"{letter}{n}", 1, b"[1]") for letter in "az" for n in range(3)])
    await store.register_schema("as", ["a"])
    await store.register_schema("zs", ["z"])
    for home, other, letter in (("as", "zs", "a"), ("zs", "sync", "z")):
        copies = f"SELECT {COLUMNS} FROM {home}_items WHERE id IN ('{letter}0', '{letter}1')"
        await ask(sql_url, f"INSERT INTO {other}_items ({COLUMNS}) {copies}")
    await store.apply([put("a1", 2, b"[2]"), put("z1", 2, b"[2]")])
    await ask(sql_url, f"INSERT INTO zs_items ({COLUMNS}) SELECT 'a9', {COLUMNS[4:]} "
                       "FROM as_items WHERE id = 'a2'")  # fmt: skip
    if moving:
        await ask(sql_url, "UPDATE sync_routes SET phase = 1")
        await ask(sql_url, "UPDATE sync_meta SET value = value + 1 WHERE name = 'routes'")
        await store._router.learn(store._questions.rows)
    there = ["a0", "a1", "a2", "z0", "z1", "z2"]
    read = [*there[:3], "a9", *there[3:]] if moving else there  # it will be brought home
    found = [item for item in await store.get_dirty() if isinstance(item, SyncItem)]
    assert {item.object_id: item.content for item in found} == {
        id_: b"[2]" if id_ in ("a1", "z1") else b"[1]" for id_ in read
    }
    assert [item.object_id for item in found] == read
    assert await processed(store, "a1") == found[1]
    assert await store.list_dirty_ids(prefix="z") == ["z0", "z1", "z2"]
    assert await store.mark_clean(found) == len(read)


async def test_a_flag_without_its_index_is_a_trouble_of_the_moment(store: SqlStore, sql_url: str) -> None:
    """It is named in questions: an index that somebody has dropped is made again at the next start."""
    await store.apply([put("a", 1)])
    await ask(sql_url, f"DROP INDEX idx_merkle_dirty{' ON sync_items' * sql_url.startswith('mysql')}")
    if sql_url.startswith("postgresql"):
        assert await store.list_dirty_ids() == ["a"]  # slowly
        return
    with pytest.raises(TierUnavailable, match="no such index" if sql_url.startswith("sqlite") else "1176"):
        await store.list_dirty_ids()
    again = await SqlStore.connect(sql_url)
    await again.close()
    assert await store.list_dirty_ids() == ["a"]


async def test_many_dirty_rows_elsewhere_do_not_make_a_prefix_of_few_pass_its_clean_ones(
    store: SqlStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With 1,001 of them anywhere, every listing went along all ids of its prefix."""
    await store.put_batch([SyncItem(f"a{n:04}", b"x") for n in range(1200)])
    await store.put_batch([SyncItem(f"b{n}", b"x") for n in range(3)])
    said: list[str] = []
    rows = store._questions.rows

    async def noted(asked: Said) -> list[Any]:
        said.append(asked.text)
        return await rows(asked)

    monkeypatch.setattr(store._questions, "rows", noted)
    assert await store.list_dirty_ids(prefix="b") == ["b0", "b1", "b2"]
    words = store._router.words()
    along_the_ids = words.ids_dirty((False, True), ("b", "c"), 1000).text
    assert (along_the_ids in said) == words.dirty_in_order  # there it is along the index


@pytest.mark.parametrize("at_once", [4, 20_000])
@pytest.mark.usefixtures("either_way")
async def test_rows_that_are_deleted_while_others_are_read_end_no_listing(
    store: SqlStore, monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    monkeypatch.setattr(dirty, "PAGE_ROWS", 4)
    monkeypatch.setattr(dirty, "IDS_AT_ONCE", at_once)
    await store.put_batch([SyncItem(f"k{n}", b"x") for n in range(12)])
    seen = []
    async for found in store.iter_dirty():
        seen.append(found.object_id)
        if len(seen) == 4:
            await store.delete_many(["k4", "k5", "k6"])
    assert sorted(seen) == sorted(f"k{n}" for n in range(12) if n not in (4, 5, 6))


async def test_what_is_no_item_is_refused_before_anything_is_called_clean(store: SqlStore, sql_url: str) -> None:
    await store.put_batch([SyncItem("a", b"x"), SyncItem("b", b"y")])
    await ask(sql_url, "UPDATE sync_items SET payload_hash = 'f' WHERE id = 'b'")
    found = await store.get_dirty()
    with pytest.raises(InvalidItem, match="items: a Corruption"):
        await store.mark_clean(found)  # type: ignore[arg-type]  # which is what is asked
    with pytest.raises(InvalidItem, match="items: a Corruption"):
        await store.verify_batch(found)  # type: ignore[arg-type]  # the same
    assert await store.count_dirty() == 2


async def test_many_are_called_clean_in_several_transactions(store: SqlStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sync_engine.storage.sql.store.CLEANED_AT_ONCE", 7)
    items = [SyncItem(f"k{n:02}", b"x") for n in range(30)]
    await store.put_batch(items)
    assert await store.mark_clean(items) == 30
    assert await store.count_dirty() == 0


async def test_a_limit_of_zero_asks_for_nothing(store: SqlStore) -> None:
    await store.apply([put("a", 1)])
    assert await store.list_dirty_ids(0) == await store.get_dirty(0) == await store.list_dirty_prefixes(0) == []


async def test_a_row_is_dirty_whose_flag_is_1_and_no_other(store: SqlStore, sql_url: str) -> None:
    """Lists, counts and ``mark_clean`` called other flags of other programs dirty by turns."""
    items = [SyncItem(id_, b"x") for id_ in ("dirty", "none", "strange", "negative")]
    await store.put_batch(items)
    for id_, flag in {"none": 0, "strange": 2, "negative": -1}.items():
        await ask(sql_url, "UPDATE sync_items SET merkle_dirty = ? WHERE id = ?", flag, id_)
    for most in (20_000, -1):
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(dirty, "SORTED_MAX", most)
            assert await store.list_dirty_ids() == await store.list_dirty_prefixes() == ["dirty"]
            assert [found.object_id for found in await store.get_dirty()] == ["dirty"]
    assert await store.count_dirty() == 1
    assert await store.mark_clean(items) == 1


@pytest.mark.parametrize("tables", [1, 3])
async def test_Q17_dirty_rows_are_found_through_an_index_however_many_are_clean(
    store: SqlStore, sql_url: str, tables: int
) -> None:
    """Also where the planner believes that all of them are dirty, as they were when it last looked."""
    spread = [hashlib.sha256(b"%d" % n).hexdigest()[:12] for n in range(1000)]  # not written in the order of their ids
    for start in range(0, 1000, 100):
        await store.put_batch([SyncItem(letter + n, b"x") for letter in "abc" for n in spread[start : start + 100]])
    if tables == 3:
        await store.register_schema("one", ["a"])
        await store.register_schema("two", ["b"])
    words = store._router.every(store._router.routes)
    assert len(words.tables) == tables
    shapes = {(False, True): ("a", "b"), (True, True): ("a", "b"), (False, False): ("",), (True, False): ("a",)}
    pages = [words.ids_dirty(shape, bounds, 500) for shape, bounds in shapes.items()]
    counts = [words.count_dirty(shape, bounds) for shape, bounds in shapes.items()]
    some = [words.flags_set(10), *(words.ids_sorted(shape, bounds, 500, 10) for shape, bounds in shapes.items())]
    if words.dirty_in_order:
        some = []
    kind = sql_url.partition(":")[0]
    for table in words.tables:
        await ask(sql_url, f"ANALYZE {'TABLE ' * (kind == 'mysql')}{table}")
    session = await store._readers[0].session()
    for _ in range(2):
        for said in (*pages, *counts, *some):
            plan = await session.rows(Said("EXPLAIN " + "QUERY PLAN " * (kind == "sqlite") + said.text, said.values))
            if kind == "sqlite":
                steps = [row[3] for row in plan if "_items" in row[3]]
                assert len(steps) == tables, plan
                assert all("SEARCH" in step for step in steps), plan
                if said in pages:  # along the ids, which are in order
                    assert all("(id>" in step for step in steps), plan
                elif said in some:
                    assert all("_merkle_dirty (" in step for step in steps), plan
                    assert "COVERING" in str(plan) or said != some[0], plan  # a count needs no row
                sorts = [row[3] for row in plan if "TEMP B-TREE" in row[3]]
                assert len(sorts) == (said in some[1:]) or (tables > 1 and said in pages), plan
            elif kind == "mysql":
                steps = [row for row in plan if str(row[2]).endswith("_items")]
                assert len(steps) == tables, plan
                assert all(row[5].endswith("_merkle_dirty") for row in steps), plan
                if said in pages:  # a count may as well read everything where everything is dirty
                    assert all(row[3] == "range" for row in steps), plan
                    assert all(int(row[6]) > 255 for row in steps), plan  # bytes of the key: the id is part of it
                assert not [row for row in steps if "filesort" in str(row[-1])], plan
            elif said in some or (said in pages and tables == 1):  # it may read a small table of which it wants all
                # A table that has next to nothing of the range is asked for that.
                found = str(plan).count("_merkle_dirty") + str(plan).count("_items_pkey")
                assert found == tables, plan
                assert "_merkle_dirty" in str(plan) if said in some else "_items_pkey" in str(plan), plan
                assert "Seq Scan" not in str(plan), plan
                assert said in some[1:] or "Sort" not in str(plan), plan
            assert "LIKE" not in said.text
            assert "OFFSET" not in said.text
        for table in words.tables:
            await ask(sql_url, f"UPDATE {table} SET merkle_dirty = 0 WHERE id NOT LIKE '%9'")
