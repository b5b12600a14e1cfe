"""The disk fails under a working engine, or memory would if nothing were bounded (fault matrix 11, 12, 13, 18)."""

from __future__ import annotations

import asyncio
import errno
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from sync_engine import SubmitOptions, SyncEngine, SyncItem, TierUnavailable
from sync_engine.item import Op
from sync_engine.log import WriteAheadLog
from sync_engine.log_folder import Folder
from sync_engine.log_record import HEADER_BYTES, Header
from sync_engine.storage.redis import RedisStore
from sync_engine.storage.sql import SqlStore
from sync_engine.testing.fixtures import StartRedis

from .driver import STORED, flood_content
from .rig import MakeRig, Rig, locked

MIB = 1024 * 1024
needs_strace = pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")


@contextmanager
def failing(rig: Rig, pid: int, calls: str, how: str) -> Iterator[None]:
    """Every such call on a file of the log fails or is slow, for as long as this lasts."""
    folder = rig.data_dir / "log"
    names = ["spare", "lock", *(path.name for path in folder.glob("*.seg"))]
    # Segments to come are named by the number of their first record, which is anything; the one in use is enough,
    # and a new one grows out of the spare file.
    paths = [word for name in names for word in ("-P", str(folder / name))]
    tracer = subprocess.Popen(
        ["strace", "-f", "-qq", "-o", "/dev/null", *paths, "-e", f"inject={calls}:{how}", "-p", str(pid)],
        stderr=subprocess.DEVNULL,
    )
    try:
        yield
    finally:
        tracer.send_signal(signal.SIGINT)  # it lets go of the process
        tracer.wait(30)


# The log's disk


@needs_strace
@pytest.mark.slow
@pytest.mark.parametrize(
    ("calls", "error"), [("pwrite64", "ENOSPC"), ("fdatasync,fsync", "EIO")], ids=["disk full", "sync fails"]
)
@pytest.mark.parametrize("killed", [False, True])
async def test_I3_a_failing_log_disk_refuses_writes_and_heals_without_a_restart(
    make_rig: MakeRig, calls: str, error: str, killed: bool
) -> None:
    rig = make_rig()
    for _ in range(2):
        # With MEMORY a write that the log refused is in a tier or two, and no more was promised.
        pid = rig.start(volatile=False)
        await rig.heard("ack", 20)
        with failing(rig, pid, calls, f"error={error}"):
            await rig.heard("failed", 5)
            rig.figures.faults += 1
            if killed:
                rig.drivers.kill()
                assert rig.drivers.ended() == -signal.SIGKILL
        if not killed:
            await rig.heard("ack", 20)  # it takes writes again, and what it acknowledged before was never lost
            rig.drivers.kill(signal.SIGTERM)
            assert rig.drivers.ended() == STORED
        await rig.check()
    rig.figures.tell(f"11, 12 {calls} of the log fail with {error}{', then kill -9' if killed else ''}")
    assert rig.figures.failed > 0


async def test_I1_after_a_write_of_unknown_outcome_a_delete_is_never_a_promise_without_a_record(
    make_rig: MakeRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Found by killing an engine whose log did not sync: the refused put was on disk all the same, and came back after
    # a delete that had answered "there is no such item" and left no record.
    rig = make_rig(redis_url=None)

    def broken(_: int) -> None:
        raise OSError(errno.EIO, "made up by the test")

    async with SyncEngine(rig.config()) as engine:
        await engine.flush()
        with monkeypatch.context() as disk:
            disk.setattr(os, "fdatasync", broken)
            for write in (engine.submit(SyncItem("a", b"1")), engine.delete("a"), engine.set_state("a", "hot")):
                with pytest.raises(TierUnavailable, match="log"):
                    await write
        assert await engine.delete("a")
        assert not await engine.delete("a")
    async with SyncEngine(rig.config()) as engine:
        assert await engine.get("a") is None


@needs_strace
@pytest.mark.slow
async def test_a_write_that_waits_for_nothing_is_in_no_tier_before_it_is_in_the_log(
    make_rig: MakeRig, own_redis: StartRedis
) -> None:
    # Otherwise a kill between two tiers leaves them different for ever: no log says that one lacks it.
    server = await own_redis()
    rig = make_rig(redis_url=server.url)
    rig.settings["batch_flush_ms"] = 0
    for _ in range(4):
        pid = rig.start(ids=24, tasks=24)
        await rig.heard("ack", 40)
        with failing(rig, pid, "pwrite64", "delay_enter=400000"):
            await server.pause()
            await asyncio.sleep(0.3)
            rig.drivers.kill()
            assert rig.drivers.ended() == -signal.SIGKILL
        await server.resume()
        rig.figures.faults += 3
        await rig.check()
    rig.figures.tell("14 killed while the log is slow and Redis stands still")


async def test_I3_a_byte_that_flipped_in_the_log_is_reported_and_costs_its_own_record_alone(make_rig: MakeRig) -> None:
    for place in (0.1, 0.35, 0.6, 0.85):
        rig = make_rig(redis_url=None)
        items = [SyncItem(f"b.{n:03}", b"content of %d " % n * 5) for n in range(60)]
        engine = SyncEngine(rig.config(sql_timeout_ms=50))
        await engine.start()
        with locked(rig):
            for item in items:
                await engine.submit(item)
                rig.journal.write({"e": "ack", "id": item.object_id})
            report = await engine.stop(timeout=0.01)
        assert report.left_in_log == len(items)
        (segment,) = (rig.data_dir / "log").glob("*.seg")
        at = HEADER_BYTES + int((segment.stat().st_size - HEADER_BYTES) * place)
        with segment.open("r+b") as file:
            file.seek(at)
            byte = file.read(1)
            file.seek(at)
            file.write(bytes([byte[0] ^ 0x10]))
        async with SyncEngine(rig.config()) as engine:
            assert len(engine.stats().log_damage) > 0
            assert segment.name in engine.stats().log_damage[0]
            await engine.flush()
            acked = {line["id"] for line in await rig.lines() if line["e"] == "ack"}
            found = await engine.get_many(sorted(acked))
        assert len(acked) == len(items)
        assert len(found) == len(items) - 1
        assert all(found[item.object_id] == item for item in items if item.object_id in found)
        assert await _of_sql(rig, sorted(acked)) == found
        rig.figures.faults, rig.figures.acked = 1, len(acked)
        damage = f"1 damaged record of {len(items)} reported"
        rig.figures.tell(f"13 a byte flipped at {place:.0%} of the log", damage)


async def test_an_item_kept_out_of_redis_stays_out_when_it_is_read_after_a_recovery(make_rig: MakeRig) -> None:
    # Found by random kills: the log forgot that the item is SQL's alone, so that a read copied it into Redis.
    rig = make_rig()
    engine = SyncEngine(rig.config(sql_timeout_ms=50))
    await engine.start()
    with locked(rig):
        await engine.submit(SyncItem("a", b"in SQL alone"), SubmitOptions.durable())
        assert (await engine.stop(timeout=0.01)).left_in_log == 1
    async with SyncEngine(rig.config()) as engine:
        await engine.flush()
    async with SyncEngine(rig.config()) as engine:
        assert (await engine.get("a")).content == b"in SQL alone"
    l2 = await RedisStore.connect(str(rig.redis_url), rig.prefix)
    assert await l2.get("a") is None
    await l2.close()


async def test_a_segment_that_a_kill_left_without_a_record_takes_no_later_one_with_it(tmp_path: Path) -> None:
    # Found by random kills: the next segment got the empty one's name, and was deleted as the empty one.
    path = tmp_path / "log"
    log = await WriteAheadLog.open(path)
    log.settle([await _logged(log, 1)])
    await log.close()
    folder = Folder(path)
    found = folder.recover()
    folder.create(Header(found.last_seq + 1, found.last_seq, last_seq=found.last_seq, last_stamp=1))
    folder.note(1, found.last_seq + 1)
    folder.close()
    log = await WriteAheadLog.open(path)
    await _logged(log, 2)
    await log.close()
    log = await WriteAheadLog.open(path)
    assert [record.op.object_id for record in log.recovered] == ["k2"]
    assert log.damage == []
    await log.close()


async def _logged(log: WriteAheadLog, number: int) -> int:
    told = asyncio.get_running_loop().create_future()
    item = SyncItem(f"k{number}", b"x", stamp=number)
    log.append([Op(kind="put", object_id=item.object_id, stamp=number, item=item)], told.set_result, told.set_exception)
    (record,) = await told
    return record.seq


async def _of_sql(rig: Rig, ids: list[str]) -> dict[str, SyncItem]:
    l3 = await SqlStore.connect(f"sqlite:///{rig.data_dir / 'truth.db'}")
    try:
        return await l3.get_many(ids)
    finally:
        await l3.close()


# Too much of everything


@pytest.mark.slow
async def test_I10_a_flood_against_a_locked_truth_stays_within_the_memory_bound_and_arrives(make_rig: MakeRig) -> None:
    rig = make_rig(redis_url=None)
    bound = 4 * MIB
    rig.settings |= {"pending_max_bytes": bound, "l1_max_bytes": bound, "sql_timeout_ms": 50}
    async with SyncEngine(rig.config()):
        pass  # makes the table that is locked below
    count, size = 800, 256 * 1024
    with locked(rig):
        rig.start(flood={"count": count, "bytes_each": size, "tasks": 20})
        (told,) = await rig.heard("flooded")
    assert rig.drivers.ended() == STORED
    (down,) = [line for line in await rig.lines() if line["e"] == "down"]
    assert told["acked"] == count, "the log has room for all of it"
    # 20 callers with an item each, the group being written and its copy, a batch on its way: a few times the bound,
    # and a fraction of the 200 MiB that were accepted.
    for peak in (told["peak"], down["peak"]):
        assert peak - told["before"] < 20 * bound, f"{told} {down}"
    items = await _of_sql(rig, [f"f.{n:05}" for n in range(0, count, 50)])
    assert [item.content for item in items.values()] == [flood_content(n, size) for n in range(0, count, 50)]
    rig.figures.faults, rig.figures.acked = 1, told["acked"]
    grown = (down["peak"] - told["before"]) / MIB
    flood = f"18 a flood of {count * size // MIB} MiB while SQL is locked, bound {bound // MIB} MiB"
    rig.figures.tell(flood, f"memory grew by {grown:.0f} MiB")


async def test_I10_a_flood_of_items_that_no_log_holds_is_refused_at_the_bound(
    make_rig: MakeRig, own_redis: StartRedis
) -> None:
    server = await own_redis()
    rig = make_rig(redis_url=server.url)
    bound, count, size = 4 * MIB, 300, 256 * 1024
    rig.settings |= {"pending_max_bytes": bound, "l1_max_bytes": bound, "backpressure_wait_ms": 20}
    rig.settings |= {"redis_response_timeout_ms": 200}
    await server.pause()
    rig.start(flood={"count": count, "bytes_each": size, "tasks": 20, "cached": True}, stop_timeout_s=60)
    (told,) = await rig.heard("flooded")
    await server.resume()
    assert rig.drivers.ended() == STORED
    assert told["acked"] <= bound // size
    assert told["acked"] + told["refused"] == count
    assert told["peak"] - told["before"] < 10 * bound, str(told)
    store = await RedisStore.connect(server.url, rig.prefix)
    assert sum(await store.exists_batch([f"f.{n:05}" for n in range(count)])) == told["acked"]
    await store.close()
    rig.figures.faults, rig.figures.acked, rig.figures.failed = 1, told["acked"], told["refused"]
    rig.figures.tell(f"18 a flood of {count * size // MIB} MiB that no log holds, bound {bound // MIB} MiB")
