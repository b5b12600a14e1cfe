"""Tables of others: the original's of every age with their rows, older ones of ours, newer ones, strange ones."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import sys
from typing import Any

import pytest

from sync_engine.errors import StoreError
from sync_engine.item import Op, SyncItem
from sync_engine.storage.sql import SqlStore, migrate
from sync_engine.testing.contract import put
from sync_engine.testing.databases import RunningMariaDB, ask

CONTENT = b'{"role": "admin", "name": "Alice", "score": 1.50}'
HASH = "16abbfef8b4d7f5f93fab4b33fadf0634d8f80ade5661408f4edf007dac44dbf"


def create(url: str, columns: int) -> str:
    """``sync_items`` as the original made it (docs/formats.md): with so many of the later columns."""
    text, short, number, blob = {
        "sqlite": ("TEXT", "TEXT", "INTEGER", "BLOB"),
        "mysql": ("LONGTEXT", "VARCHAR(64)", "BIGINT", "MEDIUMBLOB"),
        "postgresql": ("TEXT", "VARCHAR(64)", "BIGINT", "BYTEA"),
    }[url.partition(":")[0]]
    id_ = "TEXT" if url.startswith("sqlite") else "VARCHAR(255)"
    later = [
        "merkle_dirty SMALLINT NOT NULL DEFAULT 1",
        f"state {short.replace('64', '32')} NOT NULL DEFAULT 'default'",
        f"access_count {number} NOT NULL DEFAULT 0",
        f"last_accessed {number} NOT NULL DEFAULT 0",
    ]
    told = [
        f"id {id_} PRIMARY KEY, version {number} NOT NULL DEFAULT 1, timestamp {number} NOT NULL, payload_hash {short}",
        f"payload {text}, payload_blob {blob}, audit TEXT",
        *later[:columns],
    ]
    return f"CREATE TABLE sync_items ({', '.join(told)})"


async def indexes(url: str) -> set[str]:
    asked = {
        "sqlite": "SELECT name FROM sqlite_master WHERE type = 'index'",
        "mysql": "SELECT DISTINCT index_name FROM information_schema.statistics WHERE table_schema = database()",
        "postgresql": "SELECT indexname FROM pg_indexes WHERE schemaname = current_schema()",
    }
    return {str(name) for (name,) in await ask(url, asked[url.partition(":")[0]])}


async def test_Q19_tables_of_other_databases_on_the_server_are_none_of_ours(mariadb_server: RunningMariaDB) -> None:
    """The original asked the whole server whether there is a table, and then missed the one in its own database."""
    other, ours = await mariadb_server.database(), await mariadb_server.database()
    await ask(other, "CREATE TABLE sync_items (id INT PRIMARY KEY, nothing_of_ours INT)")
    await ask(other, "CREATE TABLE sync_meta (whatever INT)")
    store = await SqlStore.connect(ours)
    try:
        assert store.tables_made
        await store.apply([put("a", 1)])
        assert await store.count() == 1
    finally:
        await store.close()
    assert await ask(other, "SELECT count(*) FROM sync_items") == [(0,)]


@pytest.mark.parametrize("columns", [0, 2, 4])
async def test_Q16_a_table_of_the_original_is_adopted_with_its_rows(sql_url: str, columns: int) -> None:
    await ask(sql_url, create(sql_url, columns))
    if columns == 4 and sql_url.startswith("mysql"):  # the original has its own there
        for name in ("timestamp", "merkle_dirty", "state"):
            await ask(sql_url, f"CREATE INDEX idx_{name} ON sync_items ({name})")
    insert = "INSERT INTO sync_items (id, version, timestamp, payload_hash, payload, payload_blob, audit) VALUES "
    audit = '{"batch":"b"}'
    await ask(sql_url, insert + "(?, 3, 1767084657058, ?, ?, NULL, ?)", "user.alice", HASH, CONTENT.decode(), audit)
    await ask(sql_url, insert + "('blob', 1, 5, NULL, NULL, ?, NULL)", b"\xff\0")
    await ask(
        sql_url, insert + "('state:x', 1, 5, NULL, NULL, ?, NULL), ('empty', 1, 5, NULL, NULL, NULL, NULL)", b"\xff"
    )
    store = await SqlStore.connect(sql_url)
    alice = await store.get("user.alice")
    assert alice == SyncItem("user.alice", CONTENT, version=3, updated_at=1_767_084_657_058)
    assert (alice.batch_id, alice.stamp, alice.state) == ("b", 0, "default")
    assert [item.object_id for item in await store.scan_prefix("", 2)] == ["blob", "user.alice"]
    assert set((await store.fetch(["empty", "blob"])).corrupt) == {"empty"}
    assert await store.newest_stamp() == 0
    assert await store.count() == 4
    await store.apply([put("blob", 5, b"new"), put("User.alice", 5, b"other")])
    assert (await store.get_many(["blob"]))["blob"].content == b"new"
    assert await store.get("user.alice") == alice
    await store.put(SyncItem("large", bytes(17_000_000) if sql_url.startswith("sqlite") else bytes(15_000_000)))
    await store.close()
    assert await indexes(sql_url) >= {"idx_timestamp", "idx_merkle_dirty", "idx_state", "idx_stamp"}


async def test_an_engine_that_is_at_work_goes_on_while_another_one_migrates(sql_url: str) -> None:
    """It was checked when it started; what changes under it is an index. Neither may be in the other's way."""
    old = await SqlStore.connect(sql_url, timeout_ms=60_000, write_concurrency=2)
    await old.register_schema("alphas", ["a"])
    await old.register_schema("users", ["u"])
    ids = [f"{letter}{n:03}" for letter in "aux" for n in range(50)]
    await old.apply([put(id_, 1) for id_ in ids])
    migrating = True

    async def work() -> None:
        stamp = 1
        while migrating:
            stamp += 1
            assert not (await old.apply([put(id_, stamp, b"%d" % stamp) for id_ in ids])).refused
            assert await old.count() == len(await old.list_prefix_ids("", 1000)) == len(ids)
            await asyncio.sleep(0.01)  # SQLite does not queue its writers

    async def migrate() -> None:
        nonlocal migrating
        for _ in range(2):
            for table in ("sync", "alphas", "users"):
                index = "idx_merkle_dirty" if table == "sync" else f"idx_{table}_items_merkle_dirty"
                dropped = f"DROP INDEX {index}" + (f" ON {table}_items" if sql_url.startswith("mysql") else "")
                # In a thread: to wait for a writer of this very loop, as SQLite would, is to wait for ever.
                await asyncio.to_thread(asyncio.run, ask(sql_url, dropped))
            new = await SqlStore.connect(sql_url, timeout_ms=60_000)
            assert new.tables_made
            assert await new.count_dirty() == len(ids)
            await new.close()
        migrating = False

    async with asyncio.TaskGroup() as group:
        group.create_task(work())
        group.create_task(migrate())
    await old.close()
    if sql_url.startswith("postgres"):  # which ends one by making somebody begin again, a second later
        asked = "SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()"
        assert await ask(sql_url, asked) == [(0,)]


async def test_Q16_a_table_of_the_originals_first_releases_is_copied_and_kept(
    sql_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """0.1.0 and 0.1.1 called the columns content, updated_at and batch_id."""
    kind = sql_url.partition(":")[0]
    id_, text = ("TEXT", "TEXT") if kind == "sqlite" else ("VARCHAR(255)", "LONGTEXT" if kind == "mysql" else "TEXT")
    await ask(
        sql_url,
        f"CREATE TABLE sync_items (id {id_} PRIMARY KEY, version BIGINT NOT NULL DEFAULT 1, content {text} NOT NULL, "
        "updated_at BIGINT NOT NULL, batch_id VARCHAR(64))",
    )
    for number in range(0, 1200, 300):
        rows = ", ".join(f"('i{n:04}', {n}, '{{\"n\": {n}}}', {n}, NULL)" for n in range(number, number + 300))
        await ask(sql_url, f"INSERT INTO sync_items (id, version, content, updated_at, batch_id) VALUES {rows}")
    await ask(sql_url, "UPDATE sync_items SET batch_id = 'b' WHERE id = 'i0007'")
    await ask(sql_url, "INSERT INTO sync_items (id, content, updated_at) VALUES ('merkle:x', '1', 1)")
    store = await SqlStore.connect(sql_url)
    assert await store.count() == 1200
    item = await store.get("i0007")
    assert item is not None
    assert (item.content, item.version, item.updated_at, item.batch_id) == (b'{"n": 7}', 7, 7, "b")
    assert item.json() == {"n": 7}
    await store.apply([put("i0007", 5, b"new")])
    await store.close()
    assert "copied 1200 items" in caplog.text
    assert "merkle:x" in caplog.text
    assert await ask(sql_url, "SELECT count(*) FROM sync_items_of_0_1") == [(1201,)]
    store = await SqlStore.connect(sql_url)  # and never again
    assert (await store.get_many(["i0007"]))["i0007"].content == b"new"
    await store.close()


async def test_a_migration_that_was_killed_half_way_is_finished_by_the_next(mariadb_server: RunningMariaDB) -> None:
    """MySQL makes tables outside of transactions, so every step may have been the last."""
    url = await mariadb_server.database()
    await ask(
        url,
        "CREATE TABLE sync_items_of_0_1 (id VARCHAR(255) PRIMARY KEY, content LONGTEXT NOT NULL, "
        "updated_at BIGINT NOT NULL)",
    )
    await ask(url, "INSERT INTO sync_items_of_0_1 VALUES ('a', '1', 1), ('b', '2', 2)")
    await ask(url, create(url, 2))
    await ask(url, "INSERT INTO sync_items (id, timestamp, payload) VALUES ('a', 1, '1')")
    await ask(url, "CREATE TABLE sync_locks (bucket INTEGER PRIMARY KEY)")
    await ask(url, "INSERT INTO sync_locks VALUES (0), (1)")
    store = await SqlStore.connect(url)
    assert [item.object_id for item in await store.scan_prefix("")] == ["a", "b"]
    assert await ask(url, "SELECT count(*) FROM sync_locks") == [(64,)]
    await store.close()
    await mariadb_server.drop(url)


async def test_Q8_a_table_that_ignores_case_is_made_exact_and_loses_no_row(
    mariadb_server: RunningMariaDB, caplog: pytest.LogCaptureFixture
) -> None:
    url = await mariadb_server.database()
    await ask(url, create(url, 4) + " CHARACTER SET latin1 COLLATE latin1_swedish_ci")
    for number, id_ in enumerate(("User.1", "ä1", "z")):
        await ask(url, "INSERT INTO sync_items (id, timestamp, payload) VALUES (?, ?, ?)", id_, number, f'"ü{number}"')
    store = await SqlStore.connect(url)
    assert "latin1_swedish_ci" in caplog.text
    assert "every row is kept" in caplog.text
    await store.put_batch([SyncItem("user.1", b"2"), SyncItem("a1", b"3"), SyncItem("z ", b"4")])
    assert [item.object_id for item in await store.scan_prefix("")] == ["User.1", "a1", "user.1", "z", "z ", "ä1"]
    assert (await store.get_many(["ä1"]))["ä1"].content == '"ü1"'.encode()
    large = SyncItem("large", bytes(16_000_000))
    await store.put(large)
    await store.close()
    types = dict(
        await ask(
            url,
            "SELECT column_name, column_type FROM information_schema.columns "
            "WHERE table_schema = database() AND table_name = 'sync_items'",
        )
    )
    assert (types["payload"], types["payload_blob"]) == ("longtext", "longblob")
    caplog.clear()
    await (await SqlStore.connect(url)).close()
    assert "collation" not in caplog.text
    await mariadb_server.drop(url)


async def test_the_original_can_write_to_our_table_and_its_row_is_unordered(sql_url: str) -> None:
    store = await SqlStore.connect(sql_url)
    await store.apply([put("a", 5)])
    await ask(sql_url, "DELETE FROM sync_items")
    await ask(sql_url, "INSERT INTO sync_items VALUES ('a', 1, 5, NULL, '[1]', NULL, NULL, 1, 's', 0, 0, NULL)")
    assert (await store.get_many(["a"]))["a"].content == b"[1]"
    assert (await store.apply([put("a", 1, b"y")])).superseded == frozenset()
    await store.close()


async def test_the_newest_stamp_of_tables_that_do_not_note_it_is_found_once(sql_url: str) -> None:
    store = await SqlStore.connect(sql_url)
    await store.apply([put("a", 5), Op(kind="delete", object_id="b", stamp=9)])
    await store.close()
    await ask(sql_url, "DROP TABLE sync_meta")
    store = await SqlStore.connect(sql_url)
    assert await store.newest_stamp() == 9
    assert await store.forgotten() > 0
    await store.close()


async def test_tables_of_a_newer_version_are_refused(sql_url: str) -> None:
    await (await SqlStore.connect(sql_url)).close()
    await ask(sql_url, "UPDATE sync_meta SET value = 2 WHERE name = 'schema_version'")
    with pytest.raises(StoreError, match="version 2; this library knows up to 1"):
        await SqlStore.connect(sql_url)


@pytest.mark.parametrize("what", ["without version", "primary key"])
async def test_a_table_that_cannot_be_adopted_is_named_and_left_alone(sql_url: str, what: str) -> None:
    if what == "primary key":
        table = create(sql_url, 4).replace(" PRIMARY KEY", "")
    else:
        table = "CREATE TABLE sync_items (id VARCHAR(255) PRIMARY KEY, name VARCHAR(9))"
    await ask(sql_url, table)
    await ask(sql_url, "INSERT INTO sync_items (id" + (", timestamp" if "key" in what else "") + ") VALUES ('a'"
              + (", 1" if "key" in what else "") + ")")  # fmt: skip
    with pytest.raises(StoreError, match=f"sync_items exists.*{what}"):
        await SqlStore.connect(sql_url)
    assert await ask(sql_url, "SELECT id FROM sync_items") == [("a",)]


CONNECTS = """
import asyncio, sys
from sync_engine.storage.sql import SqlStore

async def main(url):
    stores = await asyncio.gather(*[SqlStore.connect(url, timeout_ms=60000) for _ in range(5)])
    print(await stores[0].count())
    for store in stores:
        await store.close()

asyncio.run(main(sys.argv[1]))
"""


async def test_ten_stores_of_two_processes_that_connect_at_once_adopt_a_table_once(sql_url: str) -> None:
    await ask(sql_url, create(sql_url, 0))
    await ask(sql_url, "INSERT INTO sync_items (id, timestamp, payload) VALUES ('a', 1, '1')")
    environment: dict[str, Any] = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    children = [
        await asyncio.create_subprocess_exec(
            sys.executable, "-c", CONNECTS, sql_url, env=environment, stdout=asyncio.subprocess.PIPE
        )
        for _ in range(2)
    ]
    told = [await process.communicate() for process in children]
    assert [process.returncode for process in children] == [0, 0]
    assert [json.loads(out) for out, _ in told] == [1, 1]


async def test_up_to_date_tables_are_only_read(sql_url: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "sync_engine.storage.sql.migrate")
    first = await SqlStore.connect(sql_url)
    await first.apply([put("a", 1)])
    before = await ask(sql_url, "SELECT * FROM sync_meta ORDER BY name")
    await (await SqlStore.connect(sql_url)).close()
    assert await ask(sql_url, "SELECT * FROM sync_meta ORDER BY name") == before
    await first.close()


@pytest.mark.parametrize("sql_url", ["mariadb"], indirect=True)  # elsewhere such a table could not be beside ours
async def test_indexes_of_an_applications_own_tables_are_not_taken_for_ours(sql_url: str) -> None:
    """MySQL keeps the names of indexes per table."""
    await ask(
        sql_url,
        "CREATE TABLE order_items (id INTEGER PRIMARY KEY, state INTEGER, stamp INTEGER, "
        "INDEX idx_state (state), INDEX idx_stamp (stamp))",
    )
    store = await SqlStore.connect(sql_url)
    await store.apply([put("a", 5)])
    assert [op.object_id for op in (await store.changed_since(1)).ops] == ["a"]  # by our own idx_stamp
    told = await ask(sql_url, "SHOW INDEX FROM sync_items")
    assert {row[2] for row in told} == {"PRIMARY", "idx_timestamp", "idx_merkle_dirty", "idx_state", "idx_stamp"}
    await store.close()


async def test_a_migration_takes_tables_in_the_order_in_which_questions_name_them(
    sql_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PostgreSQL locks those of a statement in the order of its text: from the other end would be a deadlock."""
    store = await SqlStore.connect(sql_url)
    for name in ("zs", "as"):
        await store.register_schema(name, [name])
    routes = store._router.routes
    asked = store._router.every(routes).changed(1, "", 10).text
    await store.close()
    await ask(sql_url, "UPDATE sync_meta SET value = 0 WHERE name = 'schema_version'")
    made: list[str] = []
    make_table = migrate._make_table

    async def noted(database: Any, session: Any, table: Any, names: set[str]) -> None:
        made.append(table.name)
        await make_table(database, session, table, names)

    monkeypatch.setattr(migrate, "_make_table", noted)
    await (await SqlStore.connect(sql_url)).close()
    named = [name for name in made if name in asked]
    assert named == sorted(named, key=asked.index) == [*routes.tables, "sync_tombstones"]
    assert [name for name in made if name in routes.tables] == list(routes.tables)
