"""SQLite alone: the file it makes or refuses, the settings of each connection, the plans of its statements."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from sync_engine import Ack, SyncEngine, SyncEngineConfig
from sync_engine.errors import ConfigError, StoreError
from sync_engine.item import SyncItem
from sync_engine.storage.sql import SqlStore, dirty, tables
from sync_engine.storage.sql.sqlite import SETTINGS
from sync_engine.storage.sql.sqlite_words import SqliteWords
from sync_engine.storage.sql.titles import RANGES
from sync_engine.storage.sql.words import Said
from sync_engine.testing.contract import put


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "truth.db"


@pytest.fixture
async def store(path: Path) -> AsyncIterator[SqlStore]:
    store = await SqlStore.connect(f"sqlite:///{path}", timeout_ms=200)
    yield store
    await store.close()


def sql(path: Path, statement: str, *values: object) -> list[tuple[object, ...]]:
    """What another program sees in, or does to, the file."""
    connection = sqlite3.connect(path, isolation_level=None)
    try:
        return connection.execute(statement, values).fetchall()
    finally:
        connection.close()


def another_process(path: Path) -> list[str]:
    """The ids that it sees, which closes the file behind it."""
    asks = "import sqlite3, sys; print(*sum(sqlite3.connect(sys.argv[1]).execute('SELECT id FROM sync_items'), ()))"
    done = subprocess.run([sys.executable, "-c", asks, path], check=True, capture_output=True, text=True)
    return sorted(done.stdout.split())


async def test_I3_a_second_store_of_a_process_takes_no_lock_from_the_first(store: SqlStore, path: Path) -> None:
    """It looked into the file, and closing that ended the locks of all: the next process to go took the log along.

    What was committed after that went into a file that had no name any more.
    """
    await store.put(SyncItem("a", b"x"))
    await (await SqlStore.connect(f"sqlite:///{path}")).close()
    assert another_process(path) == ["a"]
    await store.put(SyncItem("b", b"x"))
    assert another_process(path) == ["a", "b"]
    assert await store.exists("b")


async def test_I3_an_engine_that_connects_anew_keeps_what_it_stores(tmp_path: Path, path: Path) -> None:
    config = SyncEngineConfig(data_dir=tmp_path / "data", sql_url=f"sqlite:///{path}")
    async with SyncEngine(config) as engine:
        await engine.submit(SyncItem("a", b"x"), ack=Ack.STORED)
        await engine.reconfigure(sql_timeout_ms=4_000)
        assert another_process(path) == ["a"]
        await engine.submit(SyncItem("b", b"x"), ack=Ack.STORED)
        assert another_process(path) == ["a", "b"]


async def test_the_folder_and_the_file_are_private(tmp_path: Path) -> None:
    path = tmp_path / "new" / "deeper" / "truth.db"
    store = await SqlStore.connect(f"sqlite:///{path}")
    await store.put(SyncItem("a", b"x"))
    assert {file.stat().st_mode & 0o777 for file in path.parent.iterdir()} == {0o600}
    assert {folder.stat().st_mode & 0o777 for folder in (path.parent, path.parent.parent)} == {0o700}
    await store.close()
    assert [file.name for file in path.parent.iterdir()] == ["truth.db"]


@pytest.mark.parametrize(
    "url",
    [
        "",
        "truth.db",
        "sqlite://",
        "sqlite://truth.db",
        "sqlite:///:memory:",
        "sqlite:///file:x?mode=memory",
        "oracle://root:s3cret@host/db",
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


async def test_a_file_that_is_no_database_is_left_alone(path: Path) -> None:
    path.write_bytes(b"my thesis, chapter one" * 100)
    with pytest.raises(StoreError, match=r"truth\.db is not an SQLite database"):
        await SqlStore.connect(f"sqlite:///{path}")
    assert path.read_bytes().startswith(b"my thesis")


async def test_a_folder_or_a_file_in_the_way_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="Is a directory"):
        await SqlStore.connect(f"sqlite:///{tmp_path}")
    (tmp_path / "one").symlink_to(tmp_path / "two")
    (tmp_path / "two").symlink_to(tmp_path / "one")
    with pytest.raises(StoreError, match="symbolic links"):
        await SqlStore.connect(f"sqlite:///{tmp_path / 'one'}")
    with pytest.raises(StoreError, match=r"file/truth\.db"):
        await SqlStore.connect(f"sqlite:///{tmp_path / 'file' / 'truth.db'}")


async def test_Q11_the_settings_hold_on_every_connection(store: SqlStore) -> None:
    """The original set its isolation and its sync mode on one of twenty pooled connections."""
    sessions = [await lane.session() for lane in (*store._writers, *store._readers)]
    assert len(set(sessions)) > 2
    for session in sessions:
        for name, value in (*SETTINGS, ("busy_timeout", 200)):
            assert await session.rows(Said(f"PRAGMA {name}")) == [(value,)], name


async def test_Q17_every_query_goes_through_an_index(store: SqlStore) -> None:
    words = SqliteWords(tables.items.name)
    asked = [
        *(words.range(shape, ("a", "b")[: 1 + shape[1]], 10) for shape in RANGES),
        *(words.count_range(shape, ("a", "b")[: 1 + shape[1]]) for shape in RANGES),
        words.in_state("default", "", 10),
        words.ids_in_state("default", "", 10),
        words.count_state("default"),
        *(verb(["a", "b"]) for verb in (words.fetch, words.existing, words.held, words.delete, words.buried)),
        words.restate([("a", "s", 1), ("b", "s", 1)]),
        Said("SELECT id FROM sync_items WHERE merkle_dirty = 1 LIMIT 10"),
        Said("SELECT id FROM sync_items WHERE timestamp > 5 LIMIT 10"),
    ]
    session = await store._writers[0].session()
    for said in asked:
        steps = [row[3] for row in await session.rows(Said("EXPLAIN QUERY PLAN " + said.text, said.values))]
        plan = " / ".join(
            step for step in steps if step not in ("SCAN told", "SCAN 2 CONSTANT ROWS", "MATERIALIZE told")
        )
        assert "SEARCH" in plan, (said.text, steps)
        assert "SCAN" not in plan, (said.text, steps)
        assert "TEMP B-TREE" not in plan, (said.text, steps)
        assert "LIKE" not in said.text
        assert "OFFSET" not in said.text


async def test_text_that_is_not_utf8_spoils_one_row_and_no_scan(store: SqlStore, path: Path) -> None:
    await store.apply([put("a", 1, b'"a"'), put("b", 1, b'"b"')])
    sql(path, "UPDATE sync_items SET payload = CAST(x'22ff22' AS TEXT) WHERE id = 'a'")
    fetched = await store.fetch(["a", "b"])
    assert set(fetched.items) == {"b"}
    assert set(fetched.corrupt) == {"a"}


@pytest.mark.parametrize("most", [20_000, -1], ids=["sorted", "along the ids"])
async def test_an_id_that_is_no_text_ends_no_listing_of_dirty_rows(
    store: SqlStore, path: Path, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    """SQLite keeps whatever others wrote, and has all bytes behind all texts."""
    monkeypatch.setattr(dirty, "SORTED_MAX", most)
    await store.put_batch([SyncItem(f"{letter}.1", b"x") for letter in "abc"])
    sql(path, "INSERT INTO sync_items (id, timestamp, payload) VALUES (?, 1, '1')", b"blob")
    ids = ["a.1", "b.1", "c.1"]
    assert await store.list_dirty_ids() == await store.list_dirty_ids(4) == ids
    assert [found.object_id for found in await store.get_dirty(4)] == ids
    assert [found.object_id async for found in store.iter_dirty()] == ids
    assert await store.list_dirty_prefixes() == ["a", "b", "c"]
