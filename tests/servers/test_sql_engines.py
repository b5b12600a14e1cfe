"""Several stores on one database: the highest stamp wins, nothing is lost in between, no deadlock comes to light."""

from __future__ import annotations

import asyncio
import os
import random
import sys
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sync_engine.errors import TierUnavailable
from sync_engine.item import Op, SyncItem
from sync_engine.storage.sql import SqlStore, apply, mysql_words, tables
from sync_engine.storage.sql.buckets import bucket_of
from sync_engine.storage.sql.connect import database_of
from sync_engine.storage.sql.dialect import BUCKETS, Session
from sync_engine.storage.sql.rows import row_of
from sync_engine.storage.sql.words import Said
from sync_engine.testing.contract import put
from sync_engine.testing.databases import RunningMariaDB, ask


@pytest.fixture(params=[1, 3], ids=["one-writer", "three-writers"])
async def stores(
    sql_url: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[list[SqlStore]]:
    monkeypatch.setattr(apply, "SHARE_MIN", 20)  # so that the small batches of these tests are shared out too
    stores = [await SqlStore.connect(sql_url, timeout_ms=60_000, write_concurrency=request.param) for _ in range(4)]
    yield stores
    for store in stores:
        await store.close()


async def test_I1_stores_that_write_the_same_ids_at_once_end_with_the_newest_of_each(stores: list[SqlStore]) -> None:
    """Puts, deletes and restates in batches of every size, in any order: as if one had done them in order of stamps."""
    rng = random.Random(4)
    ids = [f"a{number:03}" for number in range(120)]
    stamps = iter(rng.sample(range(1, 100_000), 20_000))
    last: dict[str, Op] = {}
    batches: list[list[list[Op]]] = [[], [], [], []]
    for number in range(80):
        batch = []
        for id_ in rng.sample(ids, rng.choice([1, 7, 60, 120])):
            stamp = next(stamps)
            op = put(id_, stamp, b"%d" % stamp) if rng.random() < 0.7 else Op(kind="delete", object_id=id_, stamp=stamp)
            batch.append(op)
            if id_ not in last or last[id_].stamp < stamp:
                last[id_] = op
        batches[number % 4].append(batch)

    async def write(store: SqlStore, mine: list[list[Op]]) -> None:
        for batch in mine:
            await store.apply(batch)  # raises nothing: neither a deadlock nor a lock that was not to be had

    await asyncio.gather(*map(write, stores, batches))
    held = await stores[0].get_many(ids)
    wanted = {id_: op.item.content for id_, op in last.items() if op.item is not None}
    assert {id_: item.content for id_, item in held.items()} == wanted
    assert await stores[1].newest_stamp() == max(op.stamp for mine in batches for batch in mine for op in batch)


async def test_a_compare_and_set_is_won_by_one_of_many(stores: list[SqlStore]) -> None:
    """What was read in the transaction must still hold when it is written: no update is lost."""
    await stores[0].apply([put("counter", 1, b"0", version=1)])

    async def add(store: SqlStore, me: int) -> int:
        won = 0
        while won < 8:
            item = await store.get("counter")
            assert item is not None
            stamp = (item.stamp // 10 + 1) * 10 + me  # an equal stamp would be taken for a replay
            new = item.replace(content=b"%d" % (int(item.content) + 1), version=item.version + 1, stamp=stamp)
            op = Op(kind="put", object_id="counter", stamp=stamp, item=new, if_version=item.version)
            applied = await store.apply([op, put(f"mine{me}", stamp, b"x")])
            won += not applied.refused and not applied.superseded
        return won

    assert sum(await asyncio.gather(*map(add, stores, range(4)))) == 32
    item = await stores[0].get("counter")
    assert item is not None
    assert (item.content, item.version) == (b"32", 33)


async def test_of_equal_stamps_the_larger_hash_wins_whoever_is_first(stores: list[SqlStore]) -> None:
    ids = [f"a{number}" for number in range(60)]
    for stamp in range(1, 6):
        contents = [b"%d.%d" % (stamp, me) for me in range(4)]
        await asyncio.gather(
            *[
                store.apply([put(id_, stamp, content) for id_ in random.sample(ids, 60)])
                for store, content in zip(stores, contents, strict=True)
            ]
        )
        largest = max(contents, key=lambda content: SyncItem("a", content).content_hash)
        assert {item.content for item in await stores[0].scan_prefix("a")} == {largest}


async def test_tombstones_are_pruned_while_others_bury(stores: list[SqlStore], sql_url: str) -> None:
    await stores[0].apply([Op(kind="delete", object_id=f"a{n:03}", stamp=5) for n in range(300)])
    await ask(sql_url, "UPDATE sync_tombstones SET deleted_at_ms = deleted_at_ms - 800000000")

    async def bury(store: SqlStore, me: int) -> None:
        for turn in range(6):
            await store.apply([Op(kind="delete", object_id=f"a{n:03}", stamp=10 + turn) for n in range(me, 300, 7)])

    await asyncio.gather(*map(bury, stores, range(4)))
    buried = await stores[0].buried_stamps([f"a{n:03}" for n in range(300)])
    assert {id_: stamp for id_, stamp in buried.items() if stamp > 5} == {
        f"a{n:03}": 15 for n in range(300) if n % 7 < 4
    }


async def test_outdated_tombstones_go_faster_than_new_ones_come(stores: list[SqlStore], sql_url: str) -> None:
    """Four writers who each found what the one before had just pruned removed nothing and added theirs."""
    await stores[0].apply([Op(kind="delete", object_id=f"old{n:04}", stamp=5) for n in range(1_000)])
    await ask(sql_url, "UPDATE sync_tombstones SET deleted_at_ms = deleted_at_ms - 800000000")

    async def bury(store: SqlStore, me: int) -> None:
        for turn in range(10):
            fresh = [f"new{me}.{turn}.{n}" for n in range(10)]
            await store.apply([Op(kind="delete", object_id=id_, stamp=10) for id_ in fresh])

    await asyncio.gather(*map(bury, stores, range(4)))
    old = await stores[0].buried_stamps([f"old{n:04}" for n in range(1_000)])
    assert len(old) <= 600, "400 have come"
    assert len(await stores[0].buried_stamps([f"new0.{turn}.{n}" for turn in range(10) for n in range(10)])) == 100


async def test_an_outdated_tombstone_goes_with_single_deletes_too(stores: list[SqlStore], sql_url: str) -> None:
    await stores[0].apply([Op(kind="delete", object_id=f"old{n:03}", stamp=5) for n in range(100)])
    await ask(sql_url, "UPDATE sync_tombstones SET deleted_at_ms = deleted_at_ms - 800000000")
    for n in range(100):
        await stores[0].apply([Op(kind="delete", object_id=f"new{n}", stamp=10)])
    assert len(await stores[0].buried_stamps([f"old{n:03}" for n in range(100)])) < 40


@pytest.mark.parametrize("sql_url", ["mariadb", "postgresql"], indirect=True)
async def test_a_process_that_stands_still_in_a_transaction_keeps_the_others_out_for_seconds_only(
    sql_url: str,
) -> None:
    """On MariaDB it kept them out for as long as it stood still: a SIGSTOP of one engine stopped the flushes of all."""
    zombie, other = [await SqlStore.connect(sql_url, timeout_ms=100) for _ in range(2)]
    stopped, goes_on = asyncio.Event(), asyncio.Event()

    async def stand_still(session: Session) -> None:
        await session.lock([bucket_of("a")])
        stopped.set()
        await goes_on.wait()
        await session.run(zombie._words.note_most("newest_stamp", 9))

    standing = asyncio.create_task(zombie._writers[0].transaction(stand_still))
    await stopped.wait()
    with pytest.raises(TierUnavailable, match="lock"):
        await other.apply([put("a", 5, b"x")])
    async with asyncio.timeout(60):
        while True:
            with suppress(TierUnavailable):
                await other.apply([put("a", 5, b"x")])
                break
    goes_on.set()
    with pytest.raises(TierUnavailable):
        await standing
    await zombie.apply([put("a", 3, b"older")])
    assert (await other.get_many(["a"]))["a"].content == b"x"
    assert await other.newest_stamp() == 5
    for store in (zombie, other):
        await store.close()


def test_buckets_are_part_of_the_format() -> None:
    assert BUCKETS == 64
    assert [bucket_of(id_) for id_ in ("a", "user.1", "é", "😀")] == [3, 23, 62, 4]


# The guard itself, row against row.

facts = st.tuples(
    st.none() | st.integers(1, 3),  # stamp
    st.integers(1, 2),  # version
    st.sampled_from([b"1", b"2", b'"3"']),
    st.sampled_from(["s", "t"]),
)


@settings(max_examples=60)
@given(st.lists(facts, min_size=2, max_size=6))
async def test_Q1_Q5_a_row_is_taken_whole_or_not_at_all(stores: list[SqlStore], told: list[tuple[Any, ...]]) -> None:
    """MySQL assigns from left to right: with the columns in another order it took the stamp and left the content."""
    store = stores[0]
    words = store._words
    await store.delete("a")
    expected: tuple[Any, ...] = ()
    for stamp, version, content, state in told:
        item = SyncItem("a", content, version=version, state=state, updated_at=version, batch_id=state)
        new = row_of(item, stamp or 0)
        await store._writers[0].transaction(lambda own, new=new: own.attempt(words.upsert([new])))  # type: ignore[misc]
        old_stamp, old_hash = (expected[10] or 0, expected[3]) if expected else (0, "")
        wins = not expected or stamp is None or stamp > old_stamp or (stamp == expected[10] and new[3] >= old_hash)
        dirty = 1 if not expected or (wins and (new[3], new[1]) != (expected[3], expected[1])) else 0
        expected = new if wins else expected
        ((*row, merkle_dirty),) = await store._rows(
            Said("SELECT id, version, timestamp, payload_hash, payload, payload_blob, audit, state, access_count, "
                 "last_accessed, stamp, merkle_dirty FROM sync_items")
        )  # fmt: skip
        assert tuple(row) == expected
        assert merkle_dirty == dirty
        await store._writers[0].transaction(lambda own: own.run(Said("UPDATE sync_items SET merkle_dirty = 0")))


async def test_Q1_the_order_of_assignments_matters(
    mariadb_server: RunningMariaDB, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = await mariadb_server.database()
    await (await SqlStore.connect(url)).close()
    session = await database_of(url, 5000).open()
    old, new = (row_of(SyncItem("a", content, stamp=stamp), stamp) for content, stamp in ((b"old", 1), (b"new", 2)))
    for first in ("stamp", "version"):
        names = [first, *(name for name in mysql_words.ASSIGNED if name != first)]
        guarded = ", ".join(f"{name} = IF({mysql_words.GUARD}, VALUES({name}), {name})" for name in names)
        begin = mysql_words.UPSERT.partition("ON DUPLICATE KEY UPDATE")[0]
        monkeypatch.setattr(mysql_words, "UPSERT", f"{begin}ON DUPLICATE KEY UPDATE {guarded}")
        words = mysql_words.MysqlWords(tables.items.name)
        for row in (old, new):
            await session.run(words.upsert([row]))
        ((content, stamp),) = await session.rows(Said("SELECT payload_blob, stamp FROM sync_items"))
        assert stamp == 2
        assert (content == b"new") == (
            first != "stamp" or SyncItem("a", b"new").content_hash >= SyncItem("a", b"old").content_hash
        )
        await session.run(Said("DELETE FROM sync_items"))
    await session.close()
    await mariadb_server.drop(url)


# Processes.

WRITER = """
import asyncio, random, sys
from sync_engine.item import Op, SyncItem
from sync_engine.storage.sql import SqlStore

async def main(url, me):
    store = await SqlStore.connect(url, timeout_ms=60000)
    rng = random.Random(me)
    ids = [f"a{n:03}" for n in range(200)] + [f"only{me}.{n}" for n in range(50)]
    for round in range(12):
        stamp = round * 10 + me
        chosen = rng.sample(ids, len(ids))
        await store.apply([Op(kind="put", object_id=id, stamp=stamp, item=SyncItem(id, b"%d" % stamp, stamp=stamp))
                           for id in chosen])
    await store.close()

asyncio.run(main(sys.argv[1], int(sys.argv[2])))
"""


async def test_I1_processes_that_connect_and_write_at_once_make_the_tables_once_and_end_alike(sql_url: str) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    children = [
        await asyncio.create_subprocess_exec(sys.executable, "-c", WRITER, sql_url, str(me), env=environment)
        for me in (1, 2, 3)
    ]
    assert [await process.wait() for process in children] == [0, 0, 0]
    store = await SqlStore.connect(sql_url)
    assert {(item.content, item.stamp) for item in await store.scan_prefix("a")} == {(b"113", 113)}
    for me in (1, 2, 3):
        assert await store.count_prefix(f"only{me}.") == 50
    await store.close()
