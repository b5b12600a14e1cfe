"""SqlStore when things go wrong: locks, a full disk, refused rows, cancelled callers, killed processes."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import sqlite3
import sys
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from sync_engine.errors import StoreError, TierUnavailable
from sync_engine.item import Op, SyncItem
from sync_engine.storage.sql import SqlStore, apply
from sync_engine.storage.sql.buckets import bucket_of
from sync_engine.storage.sql.dialect import BUCKETS
from sync_engine.storage.sql.sqlite import SqliteSession
from sync_engine.storage.sql.words import Said
from sync_engine.testing.contract import put
from sync_engine.testing.databases import ask
from sync_engine.testing.fixtures import DATABASES

from ..locks import write_locked


@pytest.fixture(params=[1, 3], ids=["one-writer", "three-writers"])
def writers(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture
async def store(sql_url: str, writers: int, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[SqlStore]:
    monkeypatch.setattr(apply, "SHARE_MIN", 2)
    store = await SqlStore.connect(sql_url, write_concurrency=writers)
    yield store
    await store.close()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "truth.db"


@pytest.fixture
async def in_file(path: Path) -> AsyncIterator[SqlStore]:
    """SQLite, which knows one writer at a time."""
    store = await SqlStore.connect(f"sqlite:///{path}", timeout_ms=50)
    yield store
    await store.close()


async def trigger(url: str, event: str, action: str = "ABORT") -> None:
    """Have the database refuse rows whose id begins with "bad"."""
    row = "old" if event == "DELETE" else "new"
    told = f"CREATE TRIGGER no_{event} BEFORE {event} ON sync_items"
    match url.partition(":")[0]:
        case "sqlite":
            told += f" WHEN {row}.id LIKE 'bad%' BEGIN SELECT RAISE({action}, 'not here'); END"
        case "mysql":
            told += f" FOR EACH ROW BEGIN IF {row}.id LIKE 'bad%' THEN"
            told += " SIGNAL SQLSTATE '45000' SET MESSAGE_TEXT = 'not here'; END IF; END"
        case _:
            body = f"BEGIN IF {row}.id LIKE 'bad%' THEN RAISE EXCEPTION 'not here'; END IF; RETURN {row}; END"
            await ask(url, f"CREATE FUNCTION no_{event}() RETURNS trigger LANGUAGE plpgsql AS $$ {body} $$")
            told += f" FOR EACH ROW EXECUTE FUNCTION no_{event}()"
    await ask(url, told)


async def test_while_another_writes_reads_go_on_and_writes_are_unavailable(in_file: SqlStore, path: Path) -> None:
    await in_file.apply([put("a", 1)])
    with write_locked(path, wait_s=0) as other:
        other.execute("DELETE FROM sync_items")
        with pytest.raises(TierUnavailable, match="locked") as unavailable:
            await in_file.apply([put("a", 2, b"y")])
        assert unavailable.value.tier == "l3"
        assert unavailable.value.retryable
        assert await in_file.exists("a")
        assert await in_file.count() == 1
    await in_file.apply([put("a", 2, b"y")])
    assert (await in_file.get_many(["a"]))["a"].content == b"y"


async def test_connecting_needs_no_lock_where_the_tables_are_there(in_file: SqlStore, path: Path) -> None:
    with write_locked(path, wait_s=0):
        second = await SqlStore.connect(f"sqlite:///{path}", timeout_ms=50)
        assert await second.count() == 0
        await second.close()


async def test_a_new_file_that_another_holds_is_unavailable_and_leaks_no_thread(path: Path) -> None:
    sqlite3.connect(path).execute("PRAGMA journal_mode = wal").connection.close()
    await asyncio.to_thread(int)  # starts the thread of the loop's own executor
    before = set(threading.enumerate())
    with write_locked(path, wait_s=0), pytest.raises(TierUnavailable, match="locked"):
        await SqlStore.connect(f"sqlite:///{path}", timeout_ms=50)
    for thread in set(threading.enumerate()) - before:
        thread.join(10)
    assert set(threading.enumerate()) <= before


async def test_Q9_I7_refused_rows_stand_alone_and_the_rest_goes_through(store: SqlStore, sql_url: str) -> None:
    await trigger(sql_url, "INSERT")
    ops = [put(f"good{number:03}", 1) for number in range(700)] + [put(f"bad{number}", 1) for number in (1, 2, 3)]
    applied = await store.apply(ops)
    assert set(applied.refused) == {"bad1", "bad2", "bad3"}
    for refusal in applied.refused.values():
        assert isinstance(refusal, StoreError)
        assert "not here" in str(refusal)
    assert applied.superseded == frozenset()
    assert await store.count() == 700
    result = await store.put_batch([SyncItem("bad1", b"x"), SyncItem("good", b"x")])
    assert (result.written, result.verified, set(result.failed)) == (1, False, {"bad1"})
    with pytest.raises(StoreError, match="not here"):
        await store.put(SyncItem("bad1", b"x"))


async def test_I7_a_refused_row_beside_a_superseded_one_is_not_mistaken_for_it(store: SqlStore, sql_url: str) -> None:
    await store.apply([put("newer", 9)])
    await trigger(sql_url, "INSERT")
    applied = await store.apply([put("bad", 5), put("newer", 5), put("other", 5)])
    assert set(applied.refused) == {"bad"}
    assert applied.superseded == {"newer"}
    assert await store.exists("other")


async def test_I7_refused_deletes_and_restates_stand_alone(store: SqlStore, sql_url: str) -> None:
    await store.apply([put(id_, 1) for id_ in ("a", "bad", "c")])
    await trigger(sql_url, "DELETE")
    await trigger(sql_url, "UPDATE")
    applied = await store.apply([Op(kind="restate", object_id=id_, stamp=2, state="s") for id_ in ("a", "bad", "c")])
    assert set(applied.refused) == {"bad"}
    assert set(applied.restated) == {"a", "c"}
    applied = await store.apply([Op(kind="delete", object_id=id_, stamp=3) for id_ in ("a", "bad", "c")])
    assert set(applied.refused) == {"bad"}
    assert applied.existed == {"a", "c"}
    assert await store.exists("bad")


async def test_Q10_a_batch_that_fails_midway_leaves_nothing_behind(in_file: SqlStore, path: Path) -> None:
    """The original wrote the first chunks and sent all of them to the log again."""
    await trigger(f"sqlite:///{path}", "INSERT", "ROLLBACK")
    with pytest.raises(StoreError, match="rolled back"):
        await in_file.apply([put(f"a{number:04}", 1) for number in range(1000)] + [put("bad", 1)])
    assert await in_file.count() == 0
    assert await in_file.newest_stamp() == 0
    await in_file.apply([put("a", 1)])
    assert await in_file.count() == 1


async def test_Q10_a_full_disk_is_unavailable_leaves_nothing_behind_and_passes(in_file: SqlStore) -> None:
    await (await in_file._writers[0].session()).rows(Said("PRAGMA max_page_count = 40"))
    ops = [put(f"a{number}", 1, bytes(20_000)) for number in range(100)]
    with pytest.raises(TierUnavailable, match="disk is full"):
        await in_file.apply(ops)
    assert await in_file.count() == 0
    await (await in_file._writers[0].session()).rows(Said("PRAGMA max_page_count = 100000"))
    await in_file.apply(ops)
    assert await in_file.count() == 100


async def test_a_cancelled_caller_leaves_no_open_transaction(store: SqlStore) -> None:
    for steps in range(60):
        ops = [put(f"a{number}", steps + 1, b"%d" % steps) for number in range(300)]
        task = asyncio.create_task(store.apply(ops))
        for _ in range(steps):
            await asyncio.sleep(0 if steps % 2 else 0.0001)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await store.apply([put("next", steps + 1)])  # waits for what the cancelled caller left running
        await store.apply([put(f"next{n}", steps + 1) for n in range(50)])  # with every writer
        assert not any([(await writer.session()).in_transaction for writer in store._writers])
        contents = {item.content for item in await store.scan_prefix("a")}
        assert len(contents) <= len(store._writers), "half a transaction is visible"


async def test_a_program_that_cancels_all_its_tasks_leaves_no_open_transaction(store: SqlStore) -> None:
    """As some do when they are told to stop. What the store owns goes too, in the middle of any statement."""
    others = asyncio.all_tasks()
    for steps in range(60):
        task = asyncio.create_task(store.apply([put(f"a{number}", steps + 1, b"%d" % steps) for number in range(300)]))
        for _ in range(steps):
            await asyncio.sleep(0 if steps % 2 else 0.0001)
        ours = asyncio.all_tasks() - others
        for each in ours:
            each.cancel()
        await asyncio.gather(task, *ours, return_exceptions=True)
        await store.apply([put(f"next{n}", steps + 1) for n in range(50)])  # with every writer
        assert not any([(await writer.session()).in_transaction for writer in store._writers])
        contents = {item.content for item in await store.scan_prefix("a")}
        assert len(contents) <= len(store._writers), "half a transaction is visible"


async def test_a_transaction_that_is_cancelled_while_it_begins_is_undone(path: Path) -> None:
    """The connection's thread begins it all the same, once it may."""
    store = await SqlStore.connect(f"sqlite:///{path}")
    others = asyncio.all_tasks()
    with write_locked(path, wait_s=0):
        task = asyncio.create_task(store.apply([put("a", 1)]))
        await asyncio.sleep(0.01)
        for each in asyncio.all_tasks() - others:
            each.cancel()
        await asyncio.sleep(0.01)
    await asyncio.gather(task, return_exceptions=True)
    await store.apply([put("b", 2)])
    assert set(await store.get_many(["a", "b"])) == {"b"}
    await store.close()


async def test_a_connection_that_cannot_undo_its_transaction_is_given_up_for_a_new_one(
    in_file: SqlStore, path: Path
) -> None:
    """What it writes next would all be refused, and end in the quarantine; and it keeps others from writing."""
    session = await in_file._writers[0].session()
    assert isinstance(session, SqliteSession)

    def no_rollback(action: int, told: str | None, *_: str | None) -> int:
        refused = action == sqlite3.SQLITE_TRANSACTION and told == "ROLLBACK"
        return sqlite3.SQLITE_DENY if refused else sqlite3.SQLITE_OK

    await session._driver.set_authorizer(no_rollback)
    await ask(f"sqlite:///{path}", "ALTER TABLE sync_tombstones RENAME TO gone")
    with pytest.raises(TierUnavailable, match="no such table"):
        await in_file.apply([put("a", 1)])
    await ask(f"sqlite:///{path}", "ALTER TABLE gone RENAME TO sync_tombstones")
    await in_file.apply([put("b", 2)])
    assert set(await in_file.get_many(["a", "b"])) == {"b"}


async def test_the_failure_of_a_cancelled_write_is_not_reported_by_asyncio(in_file: SqlStore, path: Path) -> None:
    """With its traceback, in which a driver may quote a row."""
    complaints: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
    with write_locked(path, wait_s=0):
        task = asyncio.create_task(in_file.apply([put("a", 1)]))
        await asyncio.sleep(0.01)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        while "0 writes running" not in repr(in_file):  # noqa: ASYNC110  nothing announces it
            await asyncio.sleep(0.01)
    gc.collect()
    assert await in_file.count() == 0
    assert not complaints


async def test_cancelled_reads_never_give_another_call_their_answer(store: SqlStore) -> None:
    ids = [f"a{number}" for number in range(50)]
    await store.apply([put(id_, 1, id_.encode()) for id_ in ids])
    for number in range(300):
        task = asyncio.create_task(store.get(ids[number % 50]))
        for _ in range(number % 4):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        item = await store.get(ids[(number + 7) % 50])
        assert item is not None
        assert item.content.decode() == ids[(number + 7) % 50]
    while any(lane.running for lane in store._readers):  # noqa: ASYNC110 - the last cancelled one's statement ends by itself
        await asyncio.sleep(0.01)


async def test_close_finishes_what_runs_and_later_calls_say_why(store: SqlStore, sql_url: str) -> None:
    writes = [asyncio.create_task(store.apply([put(f"a{number}", 1)])) for number in range(20)]
    await asyncio.sleep(0)
    await asyncio.gather(store.close(), store.close())
    await asyncio.gather(*writes)
    for call in (store.get("a"), store.apply([put("a", 1)]), store.count(), store.newest_stamp()):
        with pytest.raises(TierUnavailable, match="closed"):
            await call
    second = await SqlStore.connect(sql_url)
    assert await second.count() == 20
    await second.close()


# Processes. Each child says what it did on its standard output.

WRITER = """
import asyncio, sys
from sync_engine.item import Op, SyncItem
from sync_engine.storage.sql import SqlStore
from sync_engine.storage.sql.sqlite import SqliteSession
from sync_engine.storage.sql.words import Said
from sync_engine.testing.databases import ask

async def main(url, me, rounds):
    store = await SqlStore.connect(url)
    for round in range(rounds):
        stamp = round * 10 + me
        item = lambda id: SyncItem(id, f"{stamp}".encode(), stamp=stamp)
        await store.apply([Op(kind="put", object_id=f"a{n}", stamp=stamp, item=item(f"a{n}")) for n in range(50)])
        print(stamp, flush=True)
    if "leave" not in sys.argv:
        await store.close()

asyncio.run(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
"""


async def child(*arguments: object) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        WRITER,
        *map(str, arguments),
        stdout=asyncio.subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )


async def test_I1_processes_that_write_the_same_ids_end_with_the_newest(store: SqlStore, sql_url: str) -> None:
    children = [await child(sql_url, me, 20) for me in (1, 2)]
    assert [await process.wait() for process in children] == [0, 0]
    assert {(item.content, item.stamp) for item in await store.scan_prefix("a")} == {(b"192", 192)}
    assert await store.newest_stamp() == 192


async def test_a_store_that_nobody_closed_does_not_hold_up_the_end_of_the_process(sql_url: str) -> None:
    process = await child(sql_url, 1, 1, "leave")
    assert await asyncio.wait_for(process.wait(), 30) == 0


async def test_I3_what_was_applied_survives_kill_9_and_batches_are_whole(sql_url: str) -> None:
    for _ in range(5):
        process = await child(sql_url, 1, 100_000)
        assert process.stdout is not None
        told = [await process.stdout.readline() for _ in range(25)]
        process.send_signal(signal.SIGKILL)
        told += (await process.stdout.read()).splitlines(keepends=True)
        await process.wait()
        applied = max(int(line) for line in told if line.endswith(b"\n"))
        store = await SqlStore.connect(sql_url)
        items = await store.scan_prefix("a")
        assert len(items) == 50
        assert len({item.content for item in items}) == 1, "half a batch is visible"
        assert items[0].stamp >= applied
        assert await store.newest_stamp() == items[0].stamp
        await store.delete_many([item.object_id for item in items])
        await ask(sql_url, "UPDATE sync_meta SET value = 0 WHERE name = 'newest_stamp'")
        await store.close()


@pytest.mark.parametrize("sql_url", DATABASES, indirect=True)  # SQLite has one writer
async def test_a_compare_and_set_that_stands_is_not_called_lost_when_its_batch_is_sent_again(
    sql_url: str,
) -> None:
    """Its share must not stand where another one failed: by then somebody else may have written over it."""
    store = await SqlStore.connect(sql_url, timeout_ms=1_000, write_concurrency=2)
    other = await SqlStore.connect(sql_url)
    bucket = lambda half: next(f"k{n}" for n in range(999) if bucket_of(f"k{n}") * 2 // BUCKETS == half)  # noqa: E731
    counter, locked = bucket(0), bucket(1)
    first = SyncItem(counter, b"1", version=1, stamp=5)
    batch = [Op(kind="put", object_id=counter, stamp=5, item=first, if_version=0), put(locked, 5)]
    batch += [put(f"x{n}", 5) for n in range(600)]
    stranger = await other._writers[0].session()
    await stranger.begin()
    await stranger.lock([bucket_of(locked)])
    with pytest.raises(TierUnavailable):
        await store.apply(batch)
    await stranger.rollback()
    assert await other.get(counter) is None, "nothing of the batch stands"
    assert not (await store.apply(batch)).refused
    assert await other.get(counter) == first
    await other.close()
    await store.close()
