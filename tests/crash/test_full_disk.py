"""A disk of a few MB that fills up under a working engine: what drains, what is refused, what resumes by itself.

Row 11 of the fault matrix with the whole engine. With SQL on another disk the log needs no room to drain; with SQLite
or the quarantine on the same one it is the reserve that they live on.
"""

from __future__ import annotations

import asyncio
import errno
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from sync_engine import Ack, DiskFull, SyncEngine, SyncEngineConfig, SyncItem, TierUnavailable
from sync_engine.item import Op
from sync_engine.storage.redis import RedisStore
from sync_engine.storage.sql import SqlStore
from sync_engine.write.quarantine import Quarantine, Quarantined

from ..locks import write_locked
from .rig import MakeRig, until

MIB = 1024 * 1024
RESERVE = MIB
IDS = 200


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 6 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    if not _run("mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(place)):
        pytest.skip("mounting needs root")
    yield place
    assert _run("umount", "-l", str(place))


def _run(*argv: str) -> bool:
    return subprocess.run(argv, capture_output=True, check=False).returncode == 0


@contextmanager
def filled(disk: Path, *, but: int = 0) -> Iterator[None]:
    """Somebody else takes the last byte of the disk, ``but`` so many, and gives it back in the end."""
    path = disk / "filler"
    with path.open("wb", buffering=0) as file:
        for size in (65_536, 4_096, 1):
            try:
                while (not but or shutil.disk_usage(disk).free > but + size) and file.write(b"x" * size):
                    pass
            except OSError:
                continue
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


class Work:
    """Overwrites a few ids, and knows for each what was acknowledged last."""

    def __init__(self, engine: SyncEngine, ids: int = IDS) -> None:
        self._engine = engine
        self._ids = ids
        self._n = 0
        self.acked: dict[str, SyncItem] = {}

    async def one(self) -> None:
        """A write, noted as what it was answered with."""
        self._n += 1
        item = SyncItem(f"k.{self._n % self._ids:03}", b"%06d" % self._n * 150)
        await self._engine.submit(item)
        self.acked[item.object_id] = item

    async def until_full(self) -> int:
        """Write until the disk has no room; how much it took."""
        for count in range(100_000):
            try:
                await self.one()
            except DiskFull:
                return count
        raise AssertionError("the disk never filled up")

    async def until_accepted(self) -> None:
        """Write until it is accepted again, without anybody's help."""
        async with asyncio.timeout(30):
            while True:
                try:
                    return await self.one()
                except DiskFull:
                    await asyncio.sleep(0.01)

    async def check(self, sql: Path) -> None:
        """Everything acknowledged is what the engine and SQL answer with."""
        await self._engine.flush()
        assert await self._engine.get_many(sorted(self.acked)) == await _of_sql(sql, sorted(self.acked))
        # What was refused is in no record: the log cut it off.
        assert await _of_sql(sql, sorted(self.acked)) == self.acked
        assert self._engine.stats().log_records == 0


async def _of_sql(path: Path, ids: list[str]) -> dict[str, SyncItem]:
    l3 = await SqlStore.connect(f"sqlite:///{path}")
    try:
        return await l3.get_many(ids)
    finally:
        await l3.close()


def config(data_dir: Path, sql: Path, **settings: object) -> SyncEngineConfig:
    quick = {"sql_timeout_ms": 50, "batch_flush_ms": 5, "wal_segment_bytes": 256 * 1024, "l1_max_bytes": 0}
    return SyncEngineConfig(data_dir=data_dir, sql_url=f"sqlite:///{sql}", **quick | settings)  # type: ignore[arg-type]  # settings of all types


async def test_with_sql_on_another_disk_the_log_drains_off_a_full_one_without_any_reserve(
    disk: Path, tmp_path: Path
) -> None:
    sql = tmp_path / "truth.db"
    async with SyncEngine(config(disk / "data", sql, wal_reserve_bytes=0)) as engine:
        work = Work(engine)
        await work.one()
        await engine.flush()
        for _ in range(3):
            with write_locked(sql):
                assert await work.until_full() > 100
                with filled(disk):
                    with pytest.raises(DiskFull):
                        await work.one()
                    for object_id, item in work.acked.items():
                        assert await engine.get(object_id) == item
            # Once more full to the last byte, and now SQL is back.
            with filled(disk):
                await engine.flush()
                await until(lambda: engine.stats().log_bytes < MIB)
                await work.until_accepted()
            await work.check(sql)


async def test_SQLite_on_the_same_full_disk_lives_on_the_reserve(disk: Path, caplog: pytest.LogCaptureFixture) -> None:
    sql = disk / "data" / "truth.db"
    async with SyncEngine(config(disk / "data", sql, wal_reserve_bytes=RESERVE)) as engine:
        work = Work(engine)
        await work.one()
        await engine.flush()
        for _ in range(3):
            with write_locked(sql):
                await work.until_full()
            with filled(disk):
                await engine.flush()
                await until(lambda: engine.stats().log_bytes < MIB)
                await work.until_accepted()
                assert not (await engine.health()).warnings
            await work.check(sql)
    assert "the reserve of 1048576 bytes is given up" in caplog.text
    assert not (disk / "data" / "log" / "reserve").exists(), "a clean end needs none"


async def test_what_was_accepted_in_memory_alone_is_given_the_reserve_too(disk: Path) -> None:
    # The log had nothing to drain, so it took the reserve back at once, and SQLite never saw it.
    sql = disk / "data" / "truth.db"
    async with SyncEngine(config(disk / "data", sql, wal_reserve_bytes=RESERVE)) as engine:
        ids = [f"k.{n:03}" for n in range(IDS)]
        await engine.submit_many([SyncItem(object_id, b"0" * 900) for object_id in ids])
        await engine.flush()
        for n in range(1, 4):
            items = [SyncItem(object_id, b"%d" % n * 900) for object_id in ids]
            with filled(disk):
                await engine.submit_many(items, ack=Ack.MEMORY)
                assert engine.stats().log_records == 0
                await engine.flush()
                assert await _of_sql(sql, ids) == {item.object_id: item for item in items}
            await engine.submit(items[0])
            await engine.flush()
            assert not (await engine.health()).warnings
        assert (disk / "data" / "log" / "reserve").exists()


async def test_without_the_reserve_SQLite_and_the_log_would_wait_for_each_other_for_ever(disk: Path) -> None:
    # Why there is one. Nothing is lost, but only room made by hand ends it.
    sql = disk / "data" / "truth.db"
    async with SyncEngine(config(disk / "data", sql, wal_reserve_bytes=0)) as engine:
        work = Work(engine)
        await work.one()
        await engine.flush()
        with write_locked(sql):
            await work.until_full()
        with filled(disk):
            with pytest.raises(TierUnavailable, match="l3"):
                await engine.flush(timeout=8)
            assert "disk is full" in str(engine.stats().lanes["l3"].trouble)
        _run("mount", "-o", "remount,size=12m", str(disk))
        await work.until_accepted()
        await work.check(sql)


async def test_while_the_reserve_is_given_up_nothing_is_accepted_and_health_says_so(disk: Path) -> None:
    # New items take more room in SQLite than their records give back: no reserve can help for ever.
    sql = disk / "data" / "truth.db"
    async with SyncEngine(config(disk / "data", sql, wal_reserve_bytes=RESERVE)) as engine:
        work = Work(engine, ids=100_000)
        await work.one()
        await engine.flush()
        reserve = disk / "data" / "log" / "reserve"
        assert reserve.stat().st_blocks * 512 >= RESERVE
        with write_locked(sql):
            await work.until_full()
            assert reserve.exists(), "the log alone has no use for it"
        with pytest.raises(TierUnavailable, match="l3"):
            await engine.flush(timeout=8)
        assert not reserve.exists()
        before = engine.stats().log_records
        for _ in range(3):
            with pytest.raises(DiskFull, match="log"):
                await work.one()
        health = await engine.health()
        assert "disk is full" in str(health.tiers["l3"].trouble)
        assert any("the disk of the log is full" in warning for warning in health.warnings)
        assert engine.stats().log_records <= before
        _run("mount", "-o", "remount,size=24m", str(disk))
        await work.until_accepted()
        await work.check(sql)
        await until(reserve.exists)
        assert not (await engine.health()).warnings


@pytest.mark.parametrize("code", [errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS], ids=errno.errorcode.get)
async def test_where_the_file_system_cannot_allocate_the_reserve_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    # Some network file systems and some C libraries cannot; there the log had no reserve and accepted nothing.
    def cannot(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "posix_fallocate", cannot)
    size = RESERVE + 4_097
    async with SyncEngine(config(tmp_path, tmp_path / "truth.db", wal_reserve_bytes=size)) as engine:
        found = (tmp_path / "log" / "reserve").stat()
        assert (found.st_size, found.st_blocks * 512 >= size) == (size, True)
        await engine.submit(SyncItem("a", b"1"))
        assert not (await engine.health()).warnings


async def test_a_reserve_that_is_no_longer_wanted_gives_its_room_back(tmp_path: Path) -> None:
    # What a kill, or a stop with records left, leaves of it. Nobody knew it any more, and it stayed for good.
    sql, reserve = tmp_path / "truth.db", tmp_path / "log" / "reserve"
    async with SyncEngine(config(tmp_path, sql, wal_reserve_bytes=RESERVE)) as engine:
        with write_locked(sql):
            await engine.submit(SyncItem("a", b"1"))
            assert (await engine.stop(timeout=0)).left_in_log == 1
    assert reserve.exists()
    async with SyncEngine(config(tmp_path, sql, wal_reserve_bytes=0)) as engine:
        assert not reserve.exists()
        await engine.flush()
        assert not (await engine.health()).warnings


async def test_SQLite_gives_back_what_its_own_log_takes_when_the_disk_is_full(disk: Path) -> None:
    # It is emptied after 16 MiB only, which a small disk does not have: every later write failed.
    store = await SqlStore.connect(f"sqlite:///{disk / 'truth.db'}")
    await store.apply([_put(n, 0) for n in range(IDS)])
    await store.close()  # now the rows are in the file, and do not need more room there
    store = await SqlStore.connect(f"sqlite:///{disk / 'truth.db'}")
    full = 0
    for round_ in range(1, 100):
        ops = [_put(n, round_) for n in range(IDS)]
        try:
            await store.apply(ops)
        except DiskFull:
            full += 1
            await store.apply(ops)
    assert full > 0
    found = await store.get_many([op.object_id for op in ops])
    assert {item.stamp for item in found.values()} == {99}
    await store.close()


BEYOND_A_LIMIT = """
import asyncio, resource, sys
from sync_engine import DiskFull
from sync_engine.item import Op, SyncItem
from sync_engine.storage.sql import SqlStore

def limit(bytes):
    resource.setrlimit(resource.RLIMIT_FSIZE, (bytes, resource.RLIM_INFINITY))  # Python ignores SIGXFSZ by itself

def puts(stamp):
    item = lambda id: SyncItem(id, bytes(900), stamp=stamp)
    return [Op(kind="put", object_id=f"k{n:03}", stamp=stamp, item=item(f"k{n:03}")) for n in range(200)]

async def main(url):
    store = await SqlStore.connect(url)
    await store.apply(puts(1))
    limit(512 * 1024)
    try:
        for stamp in range(2, 100):
            await store.apply(puts(stamp))
    except DiskFull as full:
        print(full, flush=True)
    held = {item.stamp for item in await store.scan_prefix("k")}
    assert held == {stamp - 1}, (held, stamp)
    limit(resource.RLIM_INFINITY)
    await store.apply(puts(stamp))
    assert {item.stamp for item in await store.scan_prefix("k")} == {stamp}
    await store.close()
    print("went on", flush=True)

asyncio.run(main(sys.argv[1]))
"""


async def test_a_limit_on_the_size_of_files_is_told_as_a_full_disk(tmp_path: Path) -> None:
    # A quota, or `ulimit -f`: SQLite calls it an error of the disk, and what a full disk sets off was not done.
    child = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        BEYOND_A_LIMIT,
        f"sqlite:///{tmp_path / 'truth.db'}",
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    told, failed = await child.communicate()
    assert not failed.decode()
    assert "SQLITE_IOERR_WRITE" in told.decode()
    assert told.decode().endswith("went on\n")


@pytest.mark.slow
async def test_a_batch_that_takes_more_room_than_the_reserve_goes_in_parts(disk: Path) -> None:
    # Rows spread over all that is stored: each has pages of its own, and a batch of 4,000 fills 20 MB of SQLite's log.
    _run("mount", "-o", "remount,size=24m", str(disk))
    sql = disk / "data" / "truth.db"
    ids = [f"k.{n:05}" for n in range(8_000)]
    rng = random.Random(1)
    async with SyncEngine(config(disk / "data", sql, wal_reserve_bytes=0)) as engine:
        await engine.submit_many([SyncItem(object_id, b"0" * 900) for object_id in ids])
        await engine.flush()
    settings = {"wal_reserve_bytes": 4 * MIB, "wal_segment_bytes": MIB}
    async with SyncEngine(config(disk / "data", sql, **settings)) as engine:
        await engine.flush()
        acked: dict[str, SyncItem] = {}
        with write_locked(sql):
            for n in range(1_000):
                items = [SyncItem(object_id, b"%06d" % n * 150) for object_id in rng.sample(ids, 100)]
                try:
                    await engine.submit_many(items)
                except DiskFull:
                    break
                acked |= {item.object_id: item for item in items}
        assert len(acked) > 4_000
        with filled(disk):
            await engine.flush(timeout=60)
        assert await _of_sql(sql, sorted(acked)) == acked
        await engine.submit(SyncItem("again", b"1"))


def _put(n: int, stamp: int) -> Op:
    object_id = f"k.{n:03}"
    return Op(kind="put", object_id=object_id, stamp=stamp, item=SyncItem(object_id, b"x" * 900, stamp=stamp))


async def test_a_refused_item_finds_room_in_the_quarantine_of_a_full_disk(disk: Path, tmp_path: Path) -> None:
    # Without it the record stays in the log for good, and with its segment every later one.
    sql = tmp_path / "truth.db"
    data = disk / "data"
    async with SyncEngine(config(data, sql, wal_reserve_bytes=RESERVE)) as engine:
        await engine.flush()
        _refuse_poison(sql)
        work = Work(engine)
        with write_locked(sql):
            await engine.submit(SyncItem("poison", b"1"))
            await work.until_full()
            filling = filled(disk)
            filling.__enter__()
        try:
            await engine.flush()
            await work.until_accepted()
            await until(lambda: len(list((data / "quarantine").glob("*.op"))) == 1)
            await engine.flush()
            await until(lambda: engine.stats().log_bytes < MIB)
        finally:
            filling.__exit__(None, None, None)
        await work.check(sql)
    async with SyncEngine(config(data, sql)) as engine:
        assert engine.stats().recovered == 0
        assert [refused.object_id for refused in await engine.quarantine()] == ["poison"]


async def test_what_the_quarantine_could_not_write_it_writes_once_there_is_room(disk: Path, tmp_path: Path) -> None:
    # It stayed in the log until the next start: no segment behind it could go, and the disk stayed full.
    sql = tmp_path / "truth.db"
    data = disk / "data"
    async with SyncEngine(config(data, sql, wal_reserve_bytes=0)) as engine:
        await engine.flush()
        _refuse_poison(sql)
        await engine.submit(SyncItem("first", b"1"), ack=Ack.STORED)
        with filled(disk):
            # The block that the log writes to has room for a small record, and there is none for the quarantine.
            await engine.submit(SyncItem("poison", b"1"))
            await engine.flush()
            assert (await engine.status("poison")).quarantined
            assert engine.stats().log_records == 1
        await engine.submit(SyncItem("sound", b"1"), ack=Ack.STORED)
        await until(lambda: engine.stats().log_records == 0)
        assert len(list((data / "quarantine").glob("*.op"))) == 1
    async with SyncEngine(config(data, sql)) as engine:
        assert engine.stats().recovered == 0
        assert (await engine.status("poison")).quarantined


@pytest.mark.parametrize("tiers", [("sql",), ("sql", "redis"), ("redis", "sql")], ids=" refuses, ".join)
async def test_a_refusal_that_found_no_room_once_does_not_keep_the_log_from_its_reserve(
    disk: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    redis_url: str,
    redis_prefix: str,
    tiers: tuple[str, ...],
) -> None:
    # Where Redis takes the other item, the refusal was filed when that lane came by, but the reserve counted as wanted
    # until SQL took its next batch; there was none, for nothing was accepted. Without Redis nobody came by to file it.
    sql, reserve = tmp_path / "truth.db", disk / "data" / "log" / "reserve"
    redis = {"redis_url": redis_url, "redis_prefix": redis_prefix} if "redis" in tiers else {}
    write, full = Quarantine._write, [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))]

    def full_once(quarantine: Quarantine, refused: Quarantined) -> None:
        if full:
            raise full.pop()
        write(quarantine, refused)

    monkeypatch.setattr(Quarantine, "_write", full_once)
    async with SyncEngine(config(disk / "data", sql, wal_reserve_bytes=RESERVE, **redis)) as engine:
        await engine.flush()
        if tiers[0] == "sql":
            _refuse_poison(sql)
        else:
            await _occupy(redis_url, redis_prefix + "poison")
        with filled(disk, but=RESERVE // 2):
            await engine.submit_many([SyncItem("good", b"1"), SyncItem("poison", b"1")])
            await engine.flush()
            assert not full
            async with asyncio.timeout(30):
                while True:
                    with suppress(DiskFull):
                        await engine.submit(SyncItem("next", b"1"))
                        break
                    await asyncio.sleep(0.01)
            assert reserve.exists()
            assert not any("disk" in warning for warning in (await engine.health()).warnings)
            await engine.flush()
            assert engine.stats().log_records == 0
        assert [refused.object_id for refused in await engine.quarantine()] == ["poison"]


async def _occupy(redis_url: str, key: str) -> None:
    """Somebody else's set stands where Redis is to have the item, which it therefore refuses."""
    store = await RedisStore.connect(redis_url)
    try:
        await store.client.sadd(key, "not an item")
    finally:
        await store.close()


def _refuse_poison(sql: Path) -> None:
    with sqlite3.connect(sql) as other:
        other.execute(
            "CREATE TRIGGER poison BEFORE INSERT ON sync_items WHEN NEW.id LIKE 'poison%' "
            "BEGIN SELECT RAISE(ABORT, 'refused by the test'); END"
        )
    other.close()


@pytest.mark.slow
@pytest.mark.parametrize("together", [True, False], ids=["SQLite on the same disk", "SQLite elsewhere"])
async def test_I3_killed_on_a_full_disk_nothing_acknowledged_is_lost(
    make_rig: MakeRig, disk: Path, tmp_path: Path, together: bool
) -> None:
    rig = make_rig(redis_url=None)
    sql = (disk if together else tmp_path) / "truth.db"
    rig.settings |= {"wal_path": str(disk / "log"), "sql_url": f"sqlite:///{sql}", "sql_timeout_ms": 50}
    rig.settings |= {"wal_reserve_bytes": RESERVE, "wal_segment_bytes": 256 * 1024}
    async with SyncEngine(rig.config()):
        pass  # makes the tables
    for _ in range(3):
        with write_locked(sql):
            rig.start(volatile=False, ids=64, tasks=64)  # many: those that wait for SQL write no more
            await rig.heard("ack", 20)
            filling = filled(disk)
            filling.__enter__()
            await rig.heard("failed", 5)
            rig.figures.faults += 2
            rig.drivers.kill()
            assert rig.drivers.ended() == -signal.SIGKILL
        # It starts, drains and ends on the full disk.
        try:
            async with SyncEngine(rig.config()) as engine:
                rig.figures.recovered += engine.stats().recovered
                await engine.flush()
                assert engine.stats().log_records == 0
        finally:
            filling.__exit__(None, None, None)
        await rig.check()
    where = "SQLite on it" if together else "SQLite elsewhere"
    rig.figures.tell(f"11 killed while the disk of the log is full, {where}")
    assert rig.figures.failed > 0
    assert rig.figures.recovered > 0
    assert os.listdir(disk)
