"""SqlStore on real SQLite files: its own verbs, the file it makes or adopts, and what its statements ask for."""

from __future__ import annotations

import json
import logging
import random
import sqlite3
from collections.abc import AsyncIterator
from itertools import permutations, product
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sync_engine.errors import ConfigError, Corruption, InvalidId, InvalidItem, InvalidState, StoreError
from sync_engine.item import Op, SyncItem
from sync_engine.ports import Truth
from sync_engine.storage.sql import SqlStore, tables
from sync_engine.storage.sql.rows import Value
from sync_engine.storage.sql.sqlite import SETTINGS
from sync_engine.storage.sql.sqlite_words import words_of


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "truth.db"


@pytest.fixture
async def store(path: Path) -> AsyncIterator[SqlStore]:
    store = await SqlStore.connect(f"sqlite:///{path}", timeout_ms=200)
    yield store
    await store.close()


def put(id_: str, stamp: int, content: bytes = b"x", **fields: object) -> Op:
    return Op(kind="put", object_id=id_, stamp=stamp, item=SyncItem(id_, content, stamp=stamp, **fields))  # type: ignore[arg-type]  # fields of SyncItem


def delete(id_: str, stamp: int) -> Op:
    return Op(kind="delete", object_id=id_, stamp=stamp)


def sql(path: Path, statement: str, *values: object) -> list[tuple[object, ...]]:
    """What another program sees in, or does to, the file."""
    connection = sqlite3.connect(path, isolation_level=None)
    try:
        return connection.execute(statement, values).fetchall()
    finally:
        connection.close()


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
    assert (await store.get_many(["a", "b"]))["a"].content == b"x"


async def test_merkle_dirty_is_raised_by_a_change_of_content_or_version_alone(store: SqlStore, path: Path) -> None:
    def dirty() -> object:
        return sql(path, "SELECT merkle_dirty FROM sync_items")[0][0]

    await store.apply([put("a", 1)])
    assert dirty() == 1
    sql(path, "UPDATE sync_items SET merkle_dirty = 0")
    await store.apply([put("a", 2, state="other")])
    assert dirty() == 0
    await store.apply([put("a", 3, version=2)])
    assert dirty() == 1
    sql(path, "UPDATE sync_items SET merkle_dirty = 0")
    await store.apply([put("a", 4, b"other", version=2)])
    assert dirty() == 1


async def test_old_tombstones_are_forgotten_and_young_ones_kept(store: SqlStore, path: Path) -> None:
    await store.apply([delete(f"old{number}", 7) for number in range(5)])
    sql(path, "UPDATE sync_tombstones SET deleted_at_ms = deleted_at_ms - 8 * 86400000")
    await store.apply([delete("young", 8)])
    await store.apply([delete("younger", 9), delete("youngest", 10)])
    assert {id_ for (id_,) in sql(path, "SELECT id FROM sync_tombstones")} >= {"young", "younger", "youngest"}
    assert sql(path, "SELECT count(*) FROM sync_tombstones WHERE id LIKE 'old%'") == [(0,)]


# Ids and bytes.

hostile = st.text(st.sampled_from("aAüß%_\\*?[]^-.'\"😀\ue000\U0010ffff\x01ﬀ"), min_size=1, max_size=4)


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


async def test_I5_a_changed_byte_is_corruption_and_its_neighbours_are_served(store: SqlStore, path: Path) -> None:
    await store.apply([put("a", 1, b"[1]"), put("b", 1, b"\xff"), put("c", 1)])
    sql(path, "UPDATE sync_items SET payload = '[2]' WHERE id = 'a'")
    sql(path, "UPDATE sync_items SET payload_blob = x'00' WHERE id = 'b'")
    fetched = await store.fetch(["a", "b", "c"])
    assert set(fetched.items) == {"c"}
    assert set(fetched.corrupt) == {"a", "b"}
    for reading in (store.get("a"), store.get_many(["a"]), store.scan_prefix("a"), store.get_by_state("default")):
        with pytest.raises(Corruption, match="'a'"):
            await reading


async def test_text_that_is_not_utf8_spoils_one_row_and_no_scan(store: SqlStore, path: Path) -> None:
    await store.apply([put("a", 1, b'"a"'), put("b", 1, b'"b"')])
    sql(path, "UPDATE sync_items SET payload = CAST(x'22ff22' AS TEXT) WHERE id = 'a'")
    fetched = await store.fetch(["a", "b"])
    assert set(fetched.items) == {"b"}
    assert set(fetched.corrupt) == {"a"}


# The file.


async def test_the_folder_and_the_file_are_private(tmp_path: Path) -> None:
    path = tmp_path / "new" / "deeper" / "truth.db"
    store = await SqlStore.connect(f"sqlite:///{path}")
    await store.put(SyncItem("a", b"x"))
    assert {file.stat().st_mode & 0o777 for file in path.parent.iterdir()} == {0o600}
    assert {folder.stat().st_mode & 0o777 for folder in (path.parent, path.parent.parent)} == {0o700}
    await store.close()
    assert [file.name for file in path.parent.iterdir()] == ["truth.db"]


async def test_what_was_stored_is_there_after_reopening(path: Path) -> None:
    for number in range(3):
        store = await SqlStore.connect(f"sqlite:///{path}")
        assert await store.count() == number
        assert await store.newest_stamp() == number
        await store.apply([put(f"a{number}", number + 1)])
        await store.close()


@pytest.mark.parametrize(
    "url",
    [
        "",
        "truth.db",
        "sqlite://",
        "sqlite://truth.db",
        "sqlite:///:memory:",
        "sqlite:///file:x?mode=memory",
        "mysql://root:s3cret@host/db",
        "postgresql+asyncpg://root:s3cret@host:bad/db",
        "sqlite://root:s3cret@/x.db",
        "sqlite:///x.db?key=s3cret",
        "s3cret",
    ],
)
async def test_Q20_a_url_that_is_not_supported_is_refused_without_being_quoted(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="sqlite:///") as refused:
        await SqlStore.connect(url)
    assert "s3cret" not in str(refused.value)
    assert list(tmp_path.iterdir()) == []


async def test_a_path_in_a_url_is_taken_as_it_is_written(tmp_path: Path) -> None:
    path = tmp_path / "100%41 #1 @:é" / "truth.db"
    await (await SqlStore.connect(f"sqlite:///{path}")).close()
    assert path.exists()


@pytest.mark.parametrize("timeout_ms", [0, -1, 600_001, 1.5, True])
async def test_a_timeout_out_of_range_names_its_bounds(path: Path, timeout_ms: int) -> None:
    with pytest.raises(ConfigError, match=r"timeout_ms.*600000"):
        await SqlStore.connect(f"sqlite:///{path}", timeout_ms=timeout_ms)


async def test_a_file_that_is_no_database_is_left_alone(path: Path) -> None:
    path.write_bytes(b"my thesis, chapter one" * 100)
    with pytest.raises(StoreError, match=r"truth\.db is not an SQLite database"):
        await SqlStore.connect(f"sqlite:///{path}")
    assert path.read_bytes().startswith(b"my thesis")


async def test_a_folder_or_a_file_in_the_way_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="Is a directory"):
        await SqlStore.connect(f"sqlite:///{tmp_path}")
    with pytest.raises(StoreError, match=r"file/truth\.db"):
        await SqlStore.connect(f"sqlite:///{tmp_path / 'file' / 'truth.db'}")


async def test_Q11_the_settings_hold_on_every_connection(store: SqlStore) -> None:
    """The original set its isolation and its sync mode on one of twenty pooled connections."""
    sessions = (store._writer, *store._readers)
    assert len(sessions) > 2
    for session in sessions:
        for name, value in (*SETTINGS, ("busy_timeout", 200)):
            assert await session.rows(f"PRAGMA {name}") == [(value,)], name


async def test_Q17_every_query_goes_through_an_index(store: SqlStore) -> None:
    words = words_of(tables.items)
    asked: dict[str, tuple[Value, ...]] = {
        **{words.range[shape]: (*("a", "b")[: 1 + shape[1]], 10) for shape in words.range},
        **{words.count_range[shape]: ("a", "b")[: 1 + shape[1]] for shape in words.range},
        words.in_state: ("default", "", 10),
        words.ids_in_state: ("default", "", 10),
        words.count_state: ("default",),
        words.fetch[2]: ("a", "b"),
        words.existing[2]: ("a", "b"),
        words.held[2]: ("a", "b"),
        words.delete[2]: ("a", "b"),
        words.restate: ("s", 1, "a"),
        words.buried[2]: ("a", "b"),
        "SELECT id FROM sync_items WHERE merkle_dirty = 1 LIMIT 10": (),
        "SELECT id FROM sync_items WHERE timestamp > 5 LIMIT 10": (),
    }
    for statement, values in asked.items():
        plan = " / ".join(row[3] for row in await store._writer.rows("EXPLAIN QUERY PLAN " + statement, values))
        assert "SEARCH" in plan, (statement, plan)
        assert "SCAN" not in plan, (statement, plan)
        assert "TEMP B-TREE" not in plan, (statement, plan)
        assert "LIKE" not in statement
        assert "OFFSET" not in statement


async def test_Q20_nothing_of_users_or_urls_is_logged_or_shown(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    store = await SqlStore.connect(f"sqlite:///{tmp_path}/private-folder/truth.db")
    await store.put(SyncItem("id.canary", b"content-canary", home_instance_id="label-canary"))
    await store.get("id.canary")
    with pytest.raises(StoreError) as refused:
        await store._writer.rows("SELECT nothing FROM nowhere WHERE a = ?", ("value-canary",))
    await store.close()
    told = caplog.text + repr(store) + str(refused.value)
    for secret in ("content-canary", "label-canary", "value-canary", "private-folder"):
        assert secret not in told


# Tables of others.

ORIGINAL_TABLE = """CREATE TABLE sync_items (id TEXT PRIMARY KEY, version INTEGER NOT NULL DEFAULT 1,
timestamp INTEGER NOT NULL, payload_hash TEXT, payload TEXT, payload_blob BLOB, audit TEXT"""
LATER_COLUMNS = [
    "merkle_dirty INTEGER NOT NULL DEFAULT 1",
    "state TEXT NOT NULL DEFAULT 'default'",
    "access_count INTEGER NOT NULL DEFAULT 0",
    "last_accessed INTEGER NOT NULL DEFAULT 0",
]


@pytest.mark.parametrize("columns", [0, 2, 4])
async def test_a_table_of_the_original_is_adopted_with_its_rows(path: Path, columns: int) -> None:
    sql(path, ", ".join([ORIGINAL_TABLE, *LATER_COLUMNS[:columns]]) + ")")
    content = b'{"role": "admin", "name": "Alice", "score": 1.50}'
    insert = "INSERT INTO sync_items (id, version, timestamp, payload_hash, payload, payload_blob, audit) VALUES "
    digest = "16abbfef8b4d7f5f93fab4b33fadf0634d8f80ade5661408f4edf007dac44dbf"
    sql(path, insert + "(?, 3, 1767084657058, ?, ?, NULL, ?)", "user.alice", digest, content.decode(), '{"batch":"b"}')
    sql(path, insert + "('blob', 1, 5, NULL, NULL, x'ff00', NULL)")
    sql(path, insert + "('state:x', 1, 5, NULL, NULL, x'ff00', NULL), ('empty', 1, 5, NULL, NULL, NULL, NULL)")
    store = await SqlStore.connect(f"sqlite:///{path}")
    alice = await store.get("user.alice")
    assert alice == SyncItem("user.alice", content, version=3, updated_at=1_767_084_657_058)
    assert (alice.batch_id, alice.stamp, alice.state) == ("b", 0, "default")
    assert [item.object_id for item in await store.scan_prefix("", 2)] == ["blob", "user.alice"]
    assert set((await store.fetch(["empty", "blob"])).corrupt) == {"empty"}
    assert await store.newest_stamp() == 0
    await store.apply([put("blob", 5, b"new")])
    assert (await store.get_many(["blob"]))["blob"].content == b"new"
    await store.close()
    named = {name for (name,) in sql(path, "SELECT name FROM sqlite_master WHERE type = 'index'")}
    assert named >= {"idx_timestamp", "idx_merkle_dirty", "idx_state"}


async def test_the_original_can_write_to_our_table_and_its_row_is_unordered(store: SqlStore, path: Path) -> None:
    await store.apply([put("a", 5)])
    sql(path, "DELETE FROM sync_items")
    sql(path, "INSERT INTO sync_items VALUES ('a', 1, 5, NULL, '[1]', NULL, NULL, 1, 's', 0, 0, NULL)")
    assert (await store.get_many(["a"]))["a"].content == b"[1]"
    assert (await store.apply([put("a", 1, b"y")])).superseded == frozenset()


async def test_the_newest_stamp_of_tables_that_do_not_note_it_is_found_once(path: Path) -> None:
    store = await SqlStore.connect(f"sqlite:///{path}")
    await store.apply([put("a", 5), delete("b", 9)])
    await store.close()
    sql(path, "DROP TABLE sync_meta")
    store = await SqlStore.connect(f"sqlite:///{path}")
    assert await store.newest_stamp() == 9
    await store.close()


async def test_tables_of_a_newer_version_are_refused(path: Path) -> None:
    await (await SqlStore.connect(f"sqlite:///{path}")).close()
    sql(path, "UPDATE sync_meta SET value = 2 WHERE name = 'schema_version'")
    with pytest.raises(StoreError, match="version 2; this library knows up to 1"):
        await SqlStore.connect(f"sqlite:///{path}")


@pytest.mark.parametrize(
    ("table", "reason"),
    [
        ("CREATE TABLE sync_items (id TEXT PRIMARY KEY, content TEXT, updated_at INTEGER)", "without version"),
        (ORIGINAL_TABLE.replace(" PRIMARY KEY", "") + ")", "primary key"),
    ],
)
async def test_a_table_that_cannot_be_adopted_is_named_and_left_alone(path: Path, table: str, reason: str) -> None:
    sql(path, table)
    with pytest.raises(StoreError, match=f"sync_items exists.*{reason}"):
        await SqlStore.connect(f"sqlite:///{path}")
    assert sql(path, "SELECT name FROM sqlite_master WHERE type = 'table'") == [("sync_items",)]
