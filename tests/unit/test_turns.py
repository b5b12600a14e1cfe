"""Long work gives way: to a log that is waited for, between rows, and to what stops it."""

from __future__ import annotations

import asyncio
from collections import Counter
from pathlib import Path

import pytest

from sync_engine import SyncItem
from sync_engine.errors import StoreError
from sync_engine.item import Op
from sync_engine.log import WriteAheadLog
from sync_engine.storage.sql import SqlStore, apply
from sync_engine.storage.sql.dialect import beside
from sync_engine.storage.sql.rows import row_of
from sync_engine.turns import WAITED_FOR


async def test_the_thread_of_a_log_is_waited_for_as_long_as_an_append_has_no_answer(tmp_path: Path) -> None:
    log = await WriteAheadLog.open(tmp_path / "log")
    answered: asyncio.Queue[bool] = asyncio.Queue()
    for n in range(3):
        log.append(
            [Op(kind="delete", object_id=f"i{n}", stamp=n + 1)],
            lambda _: answered.put_nowait(bool(WAITED_FOR)),
            lambda failed: pytest.fail(str(failed)),
        )
    assert WAITED_FOR
    assert [await answered.get() for _ in range(3)] == [True] * 3
    assert not WAITED_FOR
    log.settle([1, 2, 3])  # nobody waits for that to be written
    assert not WAITED_FOR
    await log.close()


@pytest.mark.parametrize(("size", "count"), [(100, 300), (60_000, 300)], ids=["small", "cut by bytes"])
async def test_each_row_is_made_once(size: int, count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: Counter[str] = Counter()

    def counted(item: SyncItem, stamp: int, batch_id: str | None = None) -> object:
        made[item.object_id] += 1
        return row_of(item, stamp, batch_id)

    monkeypatch.setattr(apply, "row_of", counted)
    store = await SqlStore.connect(f"sqlite:///{tmp_path}/truth.db")
    await store.put_batch([SyncItem.from_json(f"i{n:05}", "x" * size) for n in range(count)])
    assert await store.count_prefix("i") == count
    await store.close()
    assert len(made) == count
    assert set(made.values()) == {1}


async def fails_at_last() -> None:
    for _ in range(5):
        await asyncio.sleep(0)
    raise StoreError("l3", "refused")


async def test_what_stops_the_work_beside_a_statement_is_told_even_if_that_fails_too() -> None:
    async def stopped() -> None:
        raise MemoryError

    with pytest.raises(MemoryError):
        await beside(fails_at_last(), stopped)


async def test_who_is_cancelled_beside_a_statement_that_fails_stays_cancelled() -> None:
    begun, done = asyncio.Event(), asyncio.Event()

    async def meanwhile() -> None:
        begun.set()
        await asyncio.Event().wait()

    async def work() -> None:
        try:
            await fails_at_last()
        finally:
            done.set()

    running = asyncio.create_task(beside(work(), meanwhile))
    await begun.wait()
    running.cancel()
    await asyncio.wait({running})
    assert done.is_set()
    assert running.cancelled()
