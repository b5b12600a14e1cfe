"""Schemas on every database: ids in tables of their own, rows on the move while everybody works, a kill in between."""

from __future__ import annotations

import asyncio
import os
import random
import re
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from typing import Any

import pytest

from sync_engine.clock import SystemClock
from sync_engine.errors import InvalidItem, StoreError, TierUnavailable
from sync_engine.item import Op, SyncItem
from sync_engine.storage.sql import SqlStore, apply
from sync_engine.storage.sql.words import Said
from sync_engine.testing.contract import put
from sync_engine.testing.databases import ask


@pytest.fixture
async def stores(sql_url: str, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[list[SqlStore]]:
    monkeypatch.setattr(apply, "SHARE_MIN", 5)  # so that the small batches of these tests are shared out too
    stores = [await SqlStore.connect(sql_url, timeout_ms=60_000, write_concurrency=count) for count in (1, 3, 2)]
    yield stores
    for store in stores:
        await store.close()


@pytest.fixture
def store(stores: list[SqlStore]) -> SqlStore:
    return stores[0]


def delete(id_: str, stamp: int) -> Op:
    return Op(kind="delete", object_id=id_, stamp=stamp)


async def ids_in(sql_url: str, schema: str) -> list[str]:
    return sorted(id_ for (id_,) in await ask(sql_url, f"SELECT id FROM {schema}_items"))


async def routes(sql_url: str) -> list[tuple[str, str, int]]:
    return sorted(await ask(sql_url, "SELECT prefix, table_name, phase FROM sync_routes"))


# Where ids are.


async def test_the_longest_prefix_has_its_ids(store: SqlStore, sql_url: str) -> None:
    assert await store.register_schema("users", ["user.", "u"]) == 0
    assert await store.register_schema("admins", ["user.admin."]) == 0
    ids = ["user.1", "user.admin.1", "user.admin", "ufo", "x", "User.1", "t"]
    await store.apply([put(id_, 1) for id_ in ids])
    assert await ids_in(sql_url, "users") == ["ufo", "user.1", "user.admin"]
    assert await ids_in(sql_url, "admins") == ["user.admin.1"]
    assert await ids_in(sql_url, "sync") == ["User.1", "t", "x"]
    assert sorted(await store.get_many(ids)) == sorted(ids)
    assert [item.object_id for item in await store.scan_prefix("")] == sorted(ids)
    assert await store.list_prefix_ids("user.") == ["user.1", "user.admin", "user.admin.1"]
    assert await store.list_prefix_ids("user.admin") == ["user.admin", "user.admin.1"]
    assert (await store.count(), await store.count_prefix("u"), await store.count_by_state("default")) == (7, 4, 7)


async def test_G61_schemas_are_known_after_a_restart_and_registered_again_they_move_nothing(sql_url: str) -> None:
    store = await SqlStore.connect(sql_url)
    await store.apply([put("user.1", 5)])
    assert await store.register_schema("users", ["user."]) == 1
    await store.close()
    store = await SqlStore.connect(sql_url)
    assert not store.tables_made
    assert await store.exists("user.1")
    await store.apply([put("user.2", 6), put("x", 7)])
    assert await store.register_schema("users", ["user."]) == 0
    assert await ids_in(sql_url, "users") == ["user.1", "user.2"]
    assert await ids_in(sql_url, "sync") == ["x"]
    await store.close()


async def changes(store: SqlStore, stamp: int) -> list[tuple[Any, ...]]:
    return [(op.kind, op.object_id, op.stamp, op.item) for op in (await store.changed_since(stamp)).ops]


ASKED: dict[str, Callable[[SqlStore], Awaitable[Any]]] = {
    "fetch": lambda store: store.get_many(["user.1", "x"]),
    "exists": lambda store: store.exists_batch(["user.1", "x"]),
    "held_stamps": lambda store: store.held_stamps(["user.1", "x"]),
    "get": lambda store: store.get("user.1"),
    "scan": lambda store: store.scan_prefix("user"),
    "ids": lambda store: store.list_prefix_ids(""),
    "count": lambda store: store.count(),
    "count_prefix": lambda store: store.count_prefix("user."),
    "count_by_state": lambda store: store.count_by_state("s"),
    "state_ids": lambda store: store.list_state_ids("s"),
    "by_state": lambda store: store.get_by_state("s"),
    "changed_since": lambda store: changes(store, 1),
    "unstamped": lambda store: changes(store, 0),
}


@pytest.mark.parametrize("verb", ASKED)
async def test_Q7_I4_a_store_that_does_not_know_yet_answers_as_if_it_did(stores: list[SqlStore], verb: str) -> None:
    """Each verb is the first thing that the other store does after the rows have moved."""
    ask_it = ASKED[verb]
    first, second, _ = stores
    await first.apply([put("user.1", 5, state="s"), put("x", 6, state="s"), put("user.0", 0, state="s")])
    before = await ask_it(second)
    assert await first.register_schema("users", ["user."]) == 2
    assert await ask_it(second) == before == await ask_it(first)


@pytest.mark.parametrize("kind", ["put", "older put", "delete", "restate", "conditional", "compare and set"])
async def test_Q7_I1_a_store_that_does_not_know_yet_writes_as_if_it_did(
    stores: list[SqlStore], sql_url: str, kind: str
) -> None:
    first, second, _ = stores
    await first.apply([put("user.1", 5, b"1", state="s"), put("x", 5, b"1", state="s")])
    await first.register_schema("users", ["user."])
    op = {
        "put": put("user.1", 9, b"2"),
        "older put": put("user.1", 4, b"2"),
        "delete": delete("user.1", 9),
        "restate": Op(kind="restate", object_id="user.1", stamp=9, state="t"),
        "conditional": Op(kind="delete", object_id="user.1", stamp=9, only_in_state="s"),
        "compare and set": Op(
            kind="put", object_id="user.1", stamp=9, item=SyncItem("user.1", b"2", version=2, stamp=9), if_version=1
        ),
    }[kind]
    applied = await second.apply([op, put("x", 9, b"2")])
    assert (applied.superseded, dict(applied.refused)) == ({"user.1"} if kind == "older put" else set(), {})
    there = [] if kind in ("delete", "conditional") else ["user.1"]
    assert (await ids_in(sql_url, "users"), await ids_in(sql_url, "sync")) == (there, ["x"])
    item = await first.get("user.1")
    assert (item and item.stamp) == {"older put": 5}.get(kind, 9 if there else None)


HARD = ["%", "a%b", "_", "a_", "'", "''; DROP TABLE sync_items; --", "\\", '"', "\U0010ffff", "\ud7ff", "ä", "😀", "a "]


async def test_Q12_G61_a_prefix_is_plain_text(store: SqlStore, sql_url: str) -> None:
    ids = [prefix + tail for prefix in HARD for tail in ("", "x", "\U0010ffff")] + [
        "a",
        "ax",
        "axb",
        "A%b",
        "a",
        "Ä",
        "-",
    ]
    ids = list(dict.fromkeys(ids))
    await store.apply([put(id_, 1) for id_ in ids])
    mine = sorted(id_ for id_ in ids if id_.startswith(tuple(HARD)))
    assert await store.register_schema("hard", HARD) == len(mine)
    assert await ids_in(sql_url, "hard") == mine
    assert await store.list_prefix_ids("") == sorted(ids)
    for prefix in HARD:
        assert await store.list_prefix_ids(prefix) == sorted(id_ for id_ in ids if id_.startswith(prefix))
        assert await store.count_prefix(prefix) == sum(id_.startswith(prefix) for id_ in ids)


async def test_a_prefix_goes_over_to_another_schema_with_its_rows(stores: list[SqlStore], sql_url: str) -> None:
    first, second, _ = stores
    await first.apply([put(id_, 1) for id_ in ("a1", "ab1", "ac1", "b1")])
    assert await first.register_schema("one", ["a", "ab"]) == 3
    assert await second.register_schema("two", ["a"]) == 2
    assert (await ids_in(sql_url, "one"), await ids_in(sql_url, "two")) == (["ab1"], ["a1", "ac1"])
    assert await first.register_schema("three", ["ac", "b", "ab"]) == 3
    assert (await ids_in(sql_url, "one"), await ids_in(sql_url, "three")) == ([], ["ab1", "ac1", "b1"])
    assert [await store.list_prefix_ids("") for store in stores] == [["a1", "ab1", "ac1", "b1"]] * 3
    assert await routes(sql_url) == [
        ("a", "two_items", 0), ("ab", "three_items", 0), ("ac", "three_items", 0), ("b", "three_items", 0)
    ]  # fmt: skip


async def test_rows_arrive_as_they_were(store: SqlStore, sql_url: str) -> None:
    columns = ("id, version, timestamp, payload_hash, payload, payload_blob, audit, merkle_dirty, state, access_count, "
               "last_accessed, stamp")  # fmt: skip
    items = [
        SyncItem("a1", b'{ "x": 1.0 }', version=7, state="s", home_instance_id="h", access_count=3, last_accessed=4),
        SyncItem("a2", bytes(range(256)), updated_at=5, trace_parent="p", priority_score=0.5),
    ]
    await store.put_batch(items)
    await store.apply([put("a3", 77, b"")])
    await ask(sql_url, "UPDATE sync_items SET merkle_dirty = 0 WHERE id = 'a2'")
    before = await ask(sql_url, f"SELECT {columns} FROM sync_items ORDER BY id")
    assert await store.register_schema("a", ["a"]) == 3
    assert await ask(sql_url, f"SELECT {columns} FROM a_items ORDER BY id") == before


async def test_pages_go_through_all_tables_in_order(store: SqlStore) -> None:
    """The cut of a page is right wherever it falls: by id, and by stamp with the tombstones."""
    rng = random.Random(7)
    ids = sorted({f"{rng.choice('abcd')}{rng.randrange(1000):03}" for _ in range(300)})
    stamps = rng.sample(range(1, 10_000), len(ids))
    await store.apply([put(id_, stamp, state=rng.choice("st")) for id_, stamp in zip(ids, stamps, strict=True)])
    gone = set(rng.sample(ids, 40))
    await store.apply([delete(id_, 20_000 + n) for n, id_ in enumerate(sorted(gone))])
    await store.apply([put(f"{letter}-unstamped{n}", 0, state="u") for letter in "abcd" for n in range(5)])
    await store.register_schema("one", ["a", "c"])
    await store.register_schema("two", ["b"])
    for most in (1, 7, 100):
        found: list[Any] = []
        after: Any = None
        while page := await store.scan_prefix("", most, after=after):
            found += [item.object_id for item in page]
            after = found[-1]
        assert found == sorted((set(ids) - gone) | {f"{letter}-unstamped{n}" for letter in "abcd" for n in range(5)})
        found, after = [], None
        while page := await store.list_state_ids("u", most, after=after):
            found += page
            after = found[-1]
        assert found == [f"{letter}-unstamped{n}" for letter in "abcd" for n in range(5)]
        found, after = [], None
        while True:
            changes = await store.changed_since(0, after, most)
            found += [(op.stamp, op.object_id) for op in changes.ops]
            if (after := changes.after) is None:
                break
        wanted = [(stamp, id_) for id_, stamp in zip(ids, stamps, strict=True) if id_ not in gone]
        wanted += [(20_000 + n, id_) for n, id_ in enumerate(sorted(gone))]
        assert found == [(0, f"{letter}-unstamped{n}") for letter in "abcd" for n in range(5)] + sorted(wanted)


async def test_Q17_what_asks_several_tables_goes_through_an_index_of_each(store: SqlStore, sql_url: str) -> None:
    await store.put_batch([SyncItem(f"{letter}{n:04}", b"x") for letter in "abc" for n in range(1500)])
    await store.register_schema("one", ["a"])
    await store.register_schema("two", ["b"])
    words = store._router.every(store._router.routes)
    assert len(words.tables) == 3
    asked = [
        words.range((False, True), ("a", "b"), 10),
        words.ids_in_range((True, False), ("a",), 10),
        words.count_range((False, True), ("a01", "a02")),
        words.ids_in_state("none", "", 10),
        words.count_state("none"),
        words.fetch(["a0001", "b0002"]),
        words.changed(2**60, "", 10),
    ]
    for table in words.tables:
        await ask(sql_url, f"ANALYZE {'TABLE ' * sql_url.startswith('mysql')}{table}")
    session = await store._writers[0].session()
    for said in asked:
        if sql_url.startswith("sqlite"):
            steps = [row[3] for row in await session.rows(Said("EXPLAIN QUERY PLAN " + said.text, said.values))]
            assert not [step for step in steps if "_items" in step and "INDEX" not in step], (said.text, steps)
            continue
        plan = await session.rows(Said("EXPLAIN " + said.text, said.values))
        if sql_url.startswith("mysql"):
            steps = [row for row in plan if str(row[2]).endswith("_items")]
            assert steps, said.text
            assert all(row[3] != "ALL" and row[5] for row in steps), (said.text, plan)
        else:
            assert "Index" in str(plan), said.text
            assert "Seq Scan on" not in re.sub("Seq Scan on sync_(meta|tombstones)", "", str(plan)), (said.text, plan)


# While everybody works.


async def test_I1_I4_rows_move_while_others_write_delete_restate_and_read_them(
    stores: list[SqlStore], sql_url: str
) -> None:
    """A model of every acknowledged operation is what the tables hold in the end; on the way nobody hears a lie."""
    rng = random.Random(11)
    still = [f"{letter}-still{n:04}" for letter in ("a", "ab", "b") for n in range(300)]
    await stores[0].apply([put(id_, 1, b"still", state="still") for id_ in still])
    model: dict[str, tuple[int, bytes, str] | None] = {}
    moving = True

    async def write(store: SqlStore, mine: list[str]) -> None:
        stamp = 10
        while moving or stamp < 60:
            ops, told = [], {}
            for id_ in rng.sample(mine, rng.randrange(1, len(mine))):
                stamp += 1
                kind, held = rng.random(), model.get(id_)
                if kind < 0.6:
                    ops.append(put(id_, stamp, b"%d" % stamp, state="s"))
                    told[id_] = (stamp, b"%d" % stamp, "s")
                elif kind < 0.8:
                    ops.append(delete(id_, stamp))
                    told[id_] = None
                else:
                    ops.append(Op(kind="restate", object_id=id_, stamp=stamp, state="t"))
                    told[id_] = held and (stamp, held[1], "t")
            applied = await store.apply(ops)
            assert (applied.superseded, dict(applied.refused)) == (set(), {})
            model.update(told)
            some = rng.sample(mine, 5)
            found = await store.get_many(some)
            wanted = {id_: held for id_ in some if (held := model.get(id_)) is not None}
            assert {id_: (item.stamp, item.content, item.state) for id_, item in found.items()} == wanted

    async def read(store: SqlStore) -> None:
        while moving:
            some = rng.sample(still, 20)
            assert all(await store.exists_batch(some))
            assert len((await store.fetch(some)).items) == 20
            assert await store.count_by_state("still") == len(still)
            prefix = rng.choice(["a-", "ab", "b-still", "a-still01"])
            wanted = [id_ for id_ in still if id_.startswith(prefix)]
            assert [id_ for id_ in await store.list_prefix_ids(prefix, 5000) if "still" in id_] == wanted
            assert await store.list_state_ids("still", 5000) == sorted(still)
            assert await store.held_stamps(some) == dict.fromkeys(some, 1)

    async def register() -> int:
        nonlocal moving
        moved = await stores[2].register_schema("one", ["a", "b-"])
        moved += await stores[1].register_schema("two", ["ab"])
        moved += await stores[0].register_schema("three", ["b-", "a-still01"])
        moving = False
        return moved

    async with asyncio.TaskGroup() as group:
        for store, letter in zip(stores[:2], "xy", strict=True):
            group.create_task(write(store, [f"{p}-{letter}{n}" for p in ("a", "ab", "b", "c") for n in range(30)]))
            group.create_task(read(store))
        registering = group.create_task(register())
    assert registering.result() >= len(still)
    held = {id_: facts for id_, facts in model.items() if facts is not None}
    every = {item.object_id: (item.stamp, item.content, item.state) async for item in stores[1].iter_prefix("")}
    assert every == held | dict.fromkeys(still, (1, b"still", "still"))
    tables: dict[str, list[str]] = {"one": [], "two": [], "three": [], "sync": []}
    for id_ in sorted(every):
        three, two = id_.startswith(("b-", "a-still01")), id_.startswith("ab")
        tables["three" if three else "two" if two else "one" if id_.startswith("a") else "sync"].append(id_)
    assert {schema: await ids_in(sql_url, schema) for schema in tables} == tables
    assert {phase for _, _, phase in await routes(sql_url)} == {0}


async def test_two_that_register_the_same_at_once_do_each_other_no_harm(stores: list[SqlStore], sql_url: str) -> None:
    ids = [f"a{n:04}" for n in range(1000)]
    await stores[0].apply([put(id_, 1) for id_ in ids])
    moved = await asyncio.gather(*[store.register_schema("one", ["a"]) for store in stores])
    assert sum(moved) == 1000
    assert await ids_in(sql_url, "one") == ids
    assert await ids_in(sql_url, "sync") == []


async def test_a_page_that_was_read_by_older_routes_is_not_moved(stores: list[SqlStore], sql_url: str) -> None:
    """It would take rows to where they no longer belong, behind the mover who has already been there."""
    first, second, _ = stores
    await first.register_schema("one", ["a"])
    known = first._router.routes
    await second.register_schema("two", ["a"])
    await first.apply([put("a1", 1)])
    mover = first._schemas._mover(first._writers[0])
    turn = partial(mover._move, known.version, ["a1"], "two_items", "one_items")
    assert await first._writers[0].transaction(turn) is None
    assert (await ids_in(sql_url, "one"), await ids_in(sql_url, "two")) == ([], ["a1"])


# Ends in between.

REGISTERS = """
import asyncio, sys
from sync_engine.storage.sql import SqlStore

async def main(url):
    store = await SqlStore.connect(url, timeout_ms=60000)
    print("here", flush=True)
    await store.register_schema("one", ["a"])
    print("done", flush=True)
    await store.close()

asyncio.run(main(sys.argv[1]))
"""


async def test_a_kill_in_the_middle_of_a_move_loses_nothing_and_the_next_start_goes_on(sql_url: str) -> None:
    """SIGKILL at any moment: each id is in one table and is found; a start, which registers nothing, finishes it."""
    ids = [f"a{n:04}" for n in range(3000)]
    store = await SqlStore.connect(sql_url, timeout_ms=60_000)
    for at in range(0, 3000, 1000):
        await store.apply([put(id_, 1) for id_ in ids[at : at + 1000]])
    environment: dict[str, Any] = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    for wait_s in (0.0, 0.03, 0.08, 0.02, 0.05):
        child = await asyncio.create_subprocess_exec(
            sys.executable, "-c", REGISTERS, sql_url, env=environment, stdout=asyncio.subprocess.PIPE
        )
        assert child.stdout is not None
        assert await child.stdout.readline() == b"here\n"
        await asyncio.sleep(wait_s)  # another moment each time; nothing is asserted of how far it has come
        child.send_signal(signal.SIGKILL)
        await child.wait()
        assert await store.list_prefix_ids("", 5000) == ids
        assert sum(await store.exists_batch(ids)) == 3000
    await store.close()
    store = await SqlStore.connect(sql_url, timeout_ms=60_000)
    assert await store.count() == 3000
    assert await store.register_schema("one", ["a"]) <= 3000  # waits for what the start has begun
    await store.close()
    assert await ids_in(sql_url, "one") == ids
    assert await ids_in(sql_url, "sync") == []
    assert await routes(sql_url) == [("a", "one_items", 0)]


class Stuck(SystemClock):
    """Stands still at the first pause of a move."""

    def __init__(self) -> None:
        self.moved = asyncio.Event()
        self.on = asyncio.Event()

    async def sleep(self, seconds: float, /) -> None:
        self.moved.set()
        await self.on.wait()


async def test_a_store_that_is_closed_in_the_middle_goes_on_at_the_next_start(sql_url: str) -> None:
    clock = Stuck()
    store = await SqlStore.connect(sql_url, clock=clock)
    await store.apply([put(f"a{n:04}", 1) for n in range(500)])
    registering = asyncio.ensure_future(store.register_schema("one", ["a"]))
    await clock.moved.wait()
    closing = asyncio.ensure_future(store.close())
    await asyncio.sleep(0)
    clock.on.set()
    await closing
    with pytest.raises(TierUnavailable, match="next start"):
        await registering
    assert 0 < len(await ids_in(sql_url, "one")) < 500
    assert await routes(sql_url) == [("a", "one_items", 1)]
    store = await SqlStore.connect(sql_url)
    await store._writing.running.over()
    assert await routes(sql_url) == [("a", "one_items", 0)]
    assert (len(await ids_in(sql_url, "one")), await ids_in(sql_url, "sync")) == (500, [])
    await store.close()


async def test_who_gives_up_waiting_leaves_the_move_to_finish(sql_url: str) -> None:
    clock = Stuck()
    store = await SqlStore.connect(sql_url, clock=clock)
    await store.apply([put(f"a{n:04}", 1) for n in range(500)])
    registering = asyncio.ensure_future(store.register_schema("one", ["a"]))
    await clock.moved.wait()
    registering.cancel()
    clock.on.set()
    await store._writing.running.over()
    assert await routes(sql_url) == [("a", "one_items", 0)]
    await store.close()


# What stands in the way.


@pytest.mark.parametrize("name", ["", "sync", "users\n", "users; DROP TABLE sync_items", "Users", "u" * 42])
async def test_G61_a_hostile_name_is_refused_before_anything_is_written(
    store: SqlStore, sql_url: str, name: str
) -> None:
    with pytest.raises(InvalidItem, match="name"):
        await store.register_schema(name, ["a"])
    with pytest.raises(InvalidItem, match="prefixes"):
        await store.register_schema("users", [""])
    assert await routes(sql_url) == []
    assert await ask(sql_url, "SELECT name FROM sync_meta WHERE name LIKE 'table%' OR name = 'routes'") == []


async def test_the_longest_name_is_a_table_whose_indexes_are_found_again(sql_url: str) -> None:
    store = await SqlStore.connect(sql_url)
    await store.register_schema("u" * 41, ["a"])
    await store.register_schema("u" * 40 + "v", ["b"])
    await store.apply([put("a", 1), put("b", 1)])
    await store.close()
    store = await SqlStore.connect(sql_url)
    assert not store.tables_made
    assert await store.list_prefix_ids("") == ["a", "b"]
    await store.close()


@pytest.mark.parametrize("where", ["sync_routes", "sync_meta"])
async def test_a_table_name_that_is_none_of_a_schema_is_refused_loudly_wherever_it_comes_from(
    store: SqlStore, sql_url: str, where: str
) -> None:
    await store.apply([put("a", 1)])
    if where == "sync_routes":
        await ask(sql_url, "INSERT INTO sync_routes VALUES ('a', 'x_items; DROP TABLE sync_items', 0)")
    else:
        await ask(sql_url, "INSERT INTO sync_meta VALUES ('table:x; DROP TABLE sync_items', 1)")
    await ask(sql_url, "INSERT INTO sync_meta VALUES ('routes', 5)")
    for refused in (store.fetch(["a", "b"]), store.count(), store.apply([put("a", 2)])):
        with pytest.raises(TierUnavailable, match="none of a schema"):  # which no item is to blame for: writes wait
            await refused
    with pytest.raises(StoreError, match="none of a schema"):
        await SqlStore.connect(sql_url)
    assert await ids_in(sql_url, "sync") == ["a"]


@pytest.mark.parametrize("kind", ["TABLE", "VIEW"])
async def test_a_table_of_somebody_else_is_left_alone(store: SqlStore, sql_url: str, kind: str) -> None:
    await store.apply([put("a", 1)])
    if kind == "TABLE":
        await ask(sql_url, "CREATE TABLE order_items (id VARCHAR(9) PRIMARY KEY, price INTEGER)")
    else:
        await ask(sql_url, "CREATE VIEW order_items AS SELECT * FROM sync_items")
    with pytest.raises(StoreError, match="order_items exists"):
        await store.register_schema("order", ["a"])
    assert await routes(sql_url) == []
    assert await store.exists("a")


async def test_a_start_gives_a_schemas_table_the_columns_and_indexes_that_it_lacks(sql_url: str) -> None:
    store = await SqlStore.connect(sql_url)
    await store.register_schema("users", ["u"])
    await store.apply([put("u1", 5)])
    await store.close()
    index = "idx_users_items_stamp"
    await ask(sql_url, f"DROP INDEX {index}" + (" ON users_items" if sql_url.startswith("mysql") else ""))
    await ask(sql_url, "ALTER TABLE users_items DROP COLUMN stamp")
    store = await SqlStore.connect(sql_url)
    assert store.tables_made
    assert await store.held_stamps(["u1"]) == {"u1": 0}
    assert [op.object_id for op in (await store.changed_since(0)).ops] == ["u1"]
    await store.close()
    store = await SqlStore.connect(sql_url)
    assert not store.tables_made
    await store.close()


async def test_rows_of_the_originals_own_schema_are_taken_over(store: SqlStore, sql_url: str) -> None:
    """It kept no routes and moved no rows: its table may hold newer copies, and ids of other prefixes."""
    clob = "LONGTEXT" if sql_url.startswith("mysql") else "TEXT"
    blob = "BYTEA" if sql_url.startswith("postgres") else "BLOB"
    await ask(
        sql_url,
        f"CREATE TABLE users_items (id VARCHAR(255) PRIMARY KEY, version BIGINT NOT NULL DEFAULT 1, timestamp BIGINT "
        f"NOT NULL, payload_hash VARCHAR(64), payload {clob}, payload_blob {blob}, audit TEXT, "
        "merkle_dirty SMALLINT NOT NULL DEFAULT 1, "
        "state VARCHAR(32) NOT NULL DEFAULT 'default', access_count BIGINT NOT NULL DEFAULT 0, "
        "last_accessed BIGINT NOT NULL DEFAULT 0)",
    )
    for id_, timestamp in (("u1", 5), ("u2", 5), ("u3", 5), ("u4", 5), ("u6", 7), ("x1", 5), ("y1", 5)):
        await ask(sql_url, f"INSERT INTO users_items (id, timestamp, payload) VALUES ('{id_}', {timestamp}, '[1]')")
    for id_, timestamp in (("u1", 4), ("u2", 6), ("u5", 1)):
        await ask(sql_url, f"INSERT INTO sync_items (id, timestamp, payload) VALUES ('{id_}', {timestamp}, '[2]')")
    # A row of the original has no stamp, and its time says whether it came before the delete or after it.
    await store.apply([delete("u3", 6 << 16), delete("u6", 6 << 16)])
    assert await store.register_schema("users", ["u"]) == 5
    assert await ids_in(sql_url, "users") == ["u1", "u2", "u4", "u5", "u6"]
    assert await ids_in(sql_url, "sync") == ["x1", "y1"]
    held = await store.get_many(["u1", "u2", "u3", "u4", "u5", "u6", "x1"])
    assert {id_: item.json() for id_, item in held.items()} == {
        "u1": [1], "u2": [2], "u4": [1], "u5": [2], "u6": [1], "x1": [1]
    }  # fmt: skip
