"""The log on a real disk, under real faults: kills, failing syncs, full disks, damaged files.

What must hold is short: a record that was acknowledged is there after a restart or its loss is
reported, and nothing is there that was not written.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import random
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from sync_engine.errors import ConfigError, DiskFull, NotRunning, StoreError, TierUnavailable
from sync_engine.item import Op, SyncItem
from sync_engine.log import WriteAheadLog
from sync_engine.log_folder import Folder
from sync_engine.log_record import HEADER_BYTES
from sync_engine.ports import Logged

HERE = Path(__file__).parent
STRACE = shutil.which("strace")
needs_strace = pytest.mark.skipif(STRACE is None, reason="strace is not installed")


def put(number: int, size: int = 40) -> Op:
    object_id = f"k{number}"
    content = random.Random(number).randbytes(size)
    return Op(
        kind="put",
        object_id=object_id,
        stamp=number,
        item=SyncItem(object_id, content, stamp=number, updated_at=0, content_type="binary"),  # type: ignore[arg-type]  # a plain str is taken too
    )


def delete(number: int, object_id: str) -> Op:
    return Op(kind="delete", object_id=object_id, stamp=number)


async def logged(log: WriteAheadLog, *ops: Op) -> list[Logged]:
    """Append, and wait until it is durable. Raises what ``on_failed`` is given."""
    told: asyncio.Future[Sequence[Logged]] = asyncio.get_running_loop().create_future()
    log.append(ops, told.set_result, told.set_exception)
    return list(await told)


async def until(holds: Callable[[], bool]) -> None:
    """Wait for the writer thread to come round; the suite's time limit ends what never holds."""
    while not holds():  # noqa: ASYNC110 - what is waited for is a file that another thread deletes
        await asyncio.sleep(0.002)


@asynccontextmanager
async def opened(path: Path, segment_bytes: int = 1 << 20) -> AsyncIterator[WriteAheadLog]:
    log = await WriteAheadLog.open(path, segment_bytes=segment_bytes)
    try:
        yield log
    finally:
        await log.close()


def stamps(records: Iterable[Logged]) -> list[int]:
    return [record.op.stamp for record in records]


def segments(path: Path) -> list[Path]:
    return sorted(path.glob("*.seg"))


# What it keeps


async def test_what_was_not_settled_comes_back_in_order_with_every_byte(tmp_path: Path) -> None:
    async with opened(tmp_path / "log") as log:
        first = await logged(log, put(1), put(2))
        await logged(log, delete(3, "k1"), put(4))
        log.settle([first[1].seq])
        assert log.unsettled == 3
    async with opened(tmp_path / "log") as log:
        assert stamps(log.recovered) == [1, 3, 4]
        assert [record.op.item for record in log.recovered] == [put(1).item, None, put(4).item]
        assert (log.unsettled, log.last_stamp, log.damage) == (3, 4, [])
        assert [op.item for op in await log.read(log.recovered[::-1])] == [put(4).item, None, put(1).item]
        # A crash during recovery: the same again, and numbers go on.
        shutil.copytree(tmp_path / "log", tmp_path / "again")
        more = await logged(log, put(5))
        assert more[0].seq > log.recovered[-1].seq
    async with opened(tmp_path / "again") as log:
        assert stamps(log.recovered) == [1, 3, 4]
    async with opened(tmp_path / "log") as log:
        assert stamps(log.recovered) == [1, 3, 4, 5]


async def test_an_empty_log_still_knows_the_last_stamp(tmp_path: Path) -> None:
    async with opened(tmp_path / "log") as log:
        log.settle([record.seq for record in await logged(log, put(77))])
    for _ in range(3):
        async with opened(tmp_path / "log") as log:
            assert (log.recovered, log.unsettled, log.last_stamp, log.damage) == ([], 0, 77, [])


async def test_everyone_is_answered_once_in_append_order(tmp_path: Path) -> None:
    answers: list[int] = []
    async with opened(tmp_path / "log", segment_bytes=4_096) as log:
        for number in range(500):
            log.append([put(number)], lambda told: answers.extend(stamps(told)), pytest.fail)
            if number % 50 == 0:
                await asyncio.sleep(0)
    assert answers == list(range(500))
    with pytest.raises(NotRunning):
        log.append([put(1)], print, print)
    await log.close()
    assert "closed | 500 unsettled" in repr(log)


async def test_a_callback_that_raises_keeps_nobody_else_from_the_answer(tmp_path: Path) -> None:
    heard: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: heard.append(context["exception"]))

    def broken(_: Sequence[Logged]) -> None:
        raise LookupError

    async with opened(tmp_path / "log") as log:
        log.append([put(1)], broken, pytest.fail)
        assert stamps(await logged(log, put(2))) == [2]
    assert [type(bug) for bug in heard] == [LookupError]


async def test_a_log_belongs_to_one_engine(tmp_path: Path) -> None:
    """Fault matrix row 27."""
    async with opened(tmp_path / "log"):
        with pytest.raises(ConfigError, match=rf"in use by another process \(pid {os.getpid()}\)"):
            await WriteAheadLog.open(tmp_path / "log")
    async with opened(tmp_path / "log"):
        pass


async def test_G45_a_second_process_is_refused_too(tmp_path: Path) -> None:
    """Two engines shared one spill file, drained and counted each other's rows."""
    async with opened(tmp_path / "log") as log:
        child = await asyncio.to_thread(run_child, tmp_path / "log", "1")
        assert child.returncode == 3
        assert f"pid {os.getpid()}".encode() in child.stderr
        assert stamps(await logged(log, put(1))) == [1]


async def test_a_path_that_is_no_folder_is_a_mistake_in_the_configuration(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file", tmp_path / "file" / "log"):
        with pytest.raises(ConfigError, match="is not a folder"):
            await WriteAheadLog.open(path)


async def test_nobody_else_can_read_the_files(tmp_path: Path) -> None:
    async with opened(tmp_path / "log") as log:
        await logged(log, put(1))
        assert (tmp_path / "log").stat().st_mode & 0o777 == 0o700
        assert {path.stat().st_mode & 0o777 for path in (tmp_path / "log").iterdir()} == {0o600}


# What it gives back


async def test_G37_an_outage_of_many_segments_gives_its_space_back(tmp_path: Path) -> None:
    """The spill file never shrank: after one large outage it refused every write for ever."""
    async with opened(tmp_path / "log", segment_bytes=65_536) as log:
        records: list[Logged] = []
        for start in range(0, 3_000, 100):
            records += await logged(log, *[put(number, 200) for number in range(start, start + 100)])
        assert len(segments(tmp_path / "log")) > 5
        assert log.bytes == sum(path.stat().st_size for path in segments(tmp_path / "log")) > 600_000
        log.settle(record.seq for record in records)
        await until(lambda: len(segments(tmp_path / "log")) == 1 and log.bytes < 65_536)
        assert segments(tmp_path / "log")[0].stat().st_size < 65_536
        assert (log.unsettled, log.last_stamp) == (0, 2_999)


async def test_segments_go_oldest_first_so_that_no_put_outlives_its_delete(tmp_path: Path) -> None:
    async with opened(tmp_path / "log", segment_bytes=4_096) as log:
        oldest = await logged(log, put(1), put(2))
        for number in range(3, 103):
            log.settle([record.seq for record in await logged(log, put(number, 500))])
        # Everything younger is settled, but the oldest segment still holds one record: nothing may go.
        log.settle([oldest[0].seq])
        count = len(segments(tmp_path / "log"))
        assert count > 5
        await logged(log, put(103))
        assert segments(tmp_path / "log")[0].name == f"{oldest[0].seq:020d}.seg"
        log.settle([oldest[1].seq])
        await until(lambda: len(segments(tmp_path / "log")) < count - 5)


async def test_W3_G38_the_count_of_unsettled_records_is_exact(tmp_path: Path) -> None:
    """The pending counter drifted up on overwrites and could wrap below zero, which read as full."""
    rng = random.Random(3)
    unsettled: set[int] = set()
    path = tmp_path / "log"
    for _ in range(4):
        async with opened(path, segment_bytes=4_096) as log:
            assert {record.seq for record in log.recovered} == unsettled
            for _ in range(40):
                unsettled |= {record.seq for record in await logged(log, *[put(1, 100)] * rng.randrange(1, 6))}
                some = rng.sample(sorted(unsettled), rng.randrange(len(unsettled)))
                log.settle(some)
                log.settle([*some, 0, 10**9])  # again, and numbers that never were
                unsettled -= set(some)
                assert log.unsettled == len(unsettled)


async def test_W1_many_records_are_taken_up_and_settled_at_once(tmp_path: Path) -> None:
    """The drain deleted all rows with one statement and failed beyond 32,766: rows were replayed for ever."""
    path, count = tmp_path / "log", 40_000
    async with opened(path) as log:
        await logged(log, *[delete(number, "k") for number in range(count)])
    async with opened(path) as log:
        assert len(log.recovered) == log.unsettled == count
        log.settle(record.seq for record in log.recovered)
        assert log.unsettled == 0
    async with opened(path) as log:
        assert log.recovered == []


async def test_W2_a_delete_is_a_record_like_any_other(tmp_path: Path) -> None:
    """Deletes were not logged: what was deleted during an outage was resurrected by the drain."""
    async with opened(tmp_path / "log") as log:
        await logged(log, put(1), delete(2, "k1"))
    async with opened(tmp_path / "log") as log:
        assert [(record.op.kind, record.op.object_id) for record in log.recovered] == [("put", "k1"), ("delete", "k1")]


async def test_G39_a_record_leaves_only_by_its_number_and_an_unreadable_one_is_reported(tmp_path: Path) -> None:
    """Rows were deleted although their verification had failed, and unreadable ones stayed, unmentioned."""
    path = tmp_path / "log"
    async with opened(path) as log:
        records = await logged(log, put(1), put(1), put(1))
        log.settle([records[1].seq])
        assert log.unsettled == 2
    flip(segments(path)[0], places=[(records[2].position >> 32) + 5])  # type: ignore[operator]  # a number, see log_folder
    async with opened(path) as log:
        assert [record.seq for record in log.recovered] == [records[0].seq]
        assert any(f"records {records[2].seq} to {records[2].seq} are missing" in what for what in log.damage)
        assert log.unsettled == 1  # nobody could ever settle the lost one


# Damage


def flip(path: Path, places: Iterable[int]) -> None:
    data = bytearray(path.read_bytes())
    for place in places:
        data[place] ^= 0x10
    path.write_bytes(data)


async def three_segments(path: Path) -> list[Logged]:
    """Three segments; the record in the middle of the second is settled."""
    async with opened(path, segment_bytes=4_096) as log:
        records: list[Logged] = []
        while len(segments(path)) < 3:
            records += await logged(log, put(len(records) + 1, 300))
        records += await logged(log, put(len(records) + 1, 300))
    return records


async def test_damage_is_told_kept_aside_and_stepped_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "log"
    records = await three_segments(path)
    victim = segments(path)[1]
    flip(victim, [HEADER_BYTES + 100])
    broken = victim.read_bytes()
    lost = int(victim.name[:20])
    for _ in range(2):  # told at each start, for as long as the file is needed
        caplog.clear()
        async with opened(path) as log:
            assert [record.seq for record in log.recovered] == [one.seq for one in records if one.seq != lost]
            assert any(f"records {lost} to {lost} are missing" in what for what in log.damage)
            assert {record.levelname for record in caplog.records if "missing" in record.getMessage()} == {"ERROR"}
    assert victim.with_name(victim.name + ".damaged").read_bytes() == broken


@pytest.mark.parametrize("which", [0, 1, 2])
async def test_a_missing_segment_is_told(tmp_path: Path, which: int) -> None:
    path = tmp_path / "log"
    await three_segments(path)
    gone = segments(path)[which]
    gone.unlink()
    async with opened(path) as log:
        assert any("missing" in what for what in log.damage)
        assert stamps(log.recovered)
        newer = await logged(log, put(10**6))
        assert newer[0].seq > max(record.seq for record in log.recovered)


async def test_all_segments_missing_is_told(tmp_path: Path) -> None:
    path = tmp_path / "log"
    await three_segments(path)
    for last in segments(path):
        last.unlink()
    async with opened(path) as log:
        assert len(log.damage) == 1
        assert "the newest segment" in log.damage[0]
        assert (await logged(log, put(1)))[0].seq >= int(last.name[:20])


def test_a_child_forked_while_a_folder_is_being_locked_has_no_part_in_the_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Between the opening of the lock's file and the note that there is one to let go of: a child kept it for good.
    lock, forked = fcntl.flock, list[int]()

    def flock(fd: int, how: int) -> None:
        reads, writes = os.pipe()
        if not (pid := os.fork()):
            signal.alarm(60)  # should nobody be left to end it
            os.write(writes, b"!")
            signal.pause()  # it lives on with all that it was left
        forked.append(pid)
        os.read(reads, 1)
        os.close(reads)
        os.close(writes)
        lock(fd, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    folder = Folder(tmp_path / "log")
    monkeypatch.undo()
    try:
        folder.close()
        Folder(tmp_path / "log").close()
    finally:
        for pid in forked:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


async def test_a_damaged_lock_note_is_told_and_nothing_is_lost(tmp_path: Path) -> None:
    path = tmp_path / "log"
    records = await three_segments(path)
    flip(path / "lock", [1])
    async with opened(path) as log:
        assert log.damage == ["lock: the note is damaged"]
        assert len(log.recovered) == len(records)


async def test_a_segment_under_a_wrong_name_is_told_and_not_replayed(tmp_path: Path) -> None:
    path = tmp_path / "log"
    records = await three_segments(path)
    shutil.copy(segments(path)[0], path / f"{10**9:020d}.seg")
    async with opened(path) as log:
        assert [record.seq for record in log.recovered] == [record.seq for record in records]
        assert len(log.damage) == 1


@pytest.mark.parametrize("share", range(4))
async def test_flips_and_cuts_of_real_files_are_reported_and_nothing_wrong_is_served(
    tmp_path: Path, share: int
) -> None:
    """Fault matrix row 13 end to end on a log of 200 records; every byte in memory is in test_log_record.py."""
    whole = tmp_path / "whole"
    async with opened(whole) as log:
        records = await logged(log, *[put(number, 10) for number in range(200)])
        log.settle([record.seq for record in records[:5]])
    name = segments(whole)[0].name
    size = segments(whole)[0].stat().st_size
    wanted = {record.seq: record.op.item for record in records}
    rng = random.Random(share)
    for case in range(40):
        path = tmp_path / str(case)
        shutil.copytree(whole, path)
        if case % 4:
            flip(path / name, [rng.randrange(size)])
        else:
            os.truncate(path / name, rng.randrange(size))
        async with opened(path) as log:
            assert log.damage
            assert all(wanted[record.seq] == record.op.item for record in log.recovered)
            assert stamps(log.recovered) == sorted(stamps(log.recovered))
            if case % 4:
                assert len(log.recovered) >= 194


async def test_a_record_damaged_under_a_running_log_is_not_served(tmp_path: Path) -> None:
    path = tmp_path / "log"
    async with opened(path) as log:
        good, bad = await logged(log, put(1), put(2))
        flip(segments(path)[0], [segments(path)[0].stat().st_size - 1])
        assert [op.item for op in await log.read([good])] == [put(1).item]
        with pytest.raises(StoreError, match=f"record {bad.seq} is damaged"):
            await log.read([good, bad])
        with pytest.raises(StoreError, match="gone"):
            await log.read([Logged(put(3), 10**9, 0)])


def test_why_not_sqlite_a_flipped_byte_silently_drops_every_later_commit(tmp_path: Path) -> None:
    """The reason for a log of our own: SQLite takes damage in its -wal file for the end of it (docs/log.md)."""
    source = sqlite3.connect(tmp_path / "log.db", isolation_level=None)
    source.execute("PRAGMA journal_mode=WAL")
    source.execute("PRAGMA synchronous=FULL")
    source.execute("PRAGMA wal_autocheckpoint=0")
    source.execute("CREATE TABLE record (seq INTEGER PRIMARY KEY, body BLOB)")
    for seq in range(20):
        source.execute("INSERT INTO record VALUES (?, ?)", (seq, b"x" * 200))
    (tmp_path / "copy").mkdir()
    for name in ("log.db", "log.db-wal"):
        shutil.copy(tmp_path / name, tmp_path / "copy" / name)
    source.close()
    wal = tmp_path / "copy" / "log.db-wal"
    flip(wal, [wal.stat().st_size // 2])
    copy = sqlite3.connect(tmp_path / "copy" / "log.db")
    left = [seq for (seq,) in copy.execute("SELECT seq FROM record ORDER BY seq")]
    assert copy.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    copy.close()
    assert 0 < len(left) < 15
    assert left == list(range(len(left)))  # twenty were committed and synced; nobody is told of the others


# Crashes: a child writes, tells each acknowledgement through a pipe, and dies


CHILD = HERE / "log_child.py"


def child_command(path: Path, *arguments: str) -> list[str]:
    return [sys.executable, str(CHILD), str(path), *arguments]


def run_child(path: Path, *arguments: str, trace: Sequence[str] = ()) -> subprocess.CompletedProcess[bytes]:
    command = child_command(path, *arguments)
    if trace:
        assert STRACE
        command = [STRACE, "-f", "-qq", "-o", os.devnull, *trace, *command]
    return subprocess.run(command, capture_output=True, check=False, timeout=60)


def acknowledged(output: bytes) -> set[int]:
    """Numbers of whole lines, without those that were settled; a torn last line was never told."""
    lines = output.split(b"\n")[:-1]
    # What was to be settled before the end may be there or not.
    return {int(line) for line in lines if line.isdigit()} - {int(line[1:]) for line in lines if line[:1] == b"s"}


async def check_after_crash(path: Path, output: bytes, *, damage_allowed: bool = False) -> int:
    """Everything acknowledged is there, as written, in order; recovery killed half-way changes nothing."""
    acked = acknowledged(output)
    async with opened(path) as log:
        found = stamps(log.recovered)
        assert acked <= set(found), f"lost {sorted(acked - set(found))[:5]}"
        assert found == sorted(found)
        assert all(record.op.item == put(record.op.stamp).item for record in log.recovered)
        assert damage_allowed or not log.damage
    async with opened(path) as log:
        assert stamps(log.recovered) == found
        assert damage_allowed or not log.damage
    return len(acked)


async def kill_rounds(path: Path, rounds: int) -> int:
    total = 0
    rng = random.Random(rounds)
    for number in range(rounds):
        folder = path / str(number)
        child = subprocess.Popen(child_command(folder, "1000000"), stdout=subprocess.PIPE)
        assert child.stdout
        output = b""
        # Killed after a random amount of acknowledgements rather than time: no two machines are alike.
        for _ in range(rng.randrange(1, 60)):
            output += child.stdout.readline()
        child.send_signal(signal.SIGKILL)
        output += child.stdout.read()
        child.wait()
        child.stdout.close()
        total += await check_after_crash(folder, output)
        shutil.rmtree(folder)
    return total


async def test_no_kill_loses_what_was_acknowledged(tmp_path: Path) -> None:
    """Fault matrix row 14, sampled."""
    assert await kill_rounds(tmp_path, 30) > 300


@pytest.mark.slow
async def test_no_kill_of_many_loses_what_was_acknowledged(tmp_path: Path) -> None:
    assert await kill_rounds(tmp_path, 150) > 1_500


@needs_strace
async def test_a_kill_at_every_write_and_sync_loses_nothing(tmp_path: Path) -> None:
    """Fault matrix row 14, enumerated: a small run that begins segments, settles and deletes them."""

    async def run(path: Path, trace: Sequence[str]) -> bool:
        child = await asyncio.to_thread(run_child, path, "10", "small", trace=trace)
        await check_after_crash(path, child.stdout)
        return child.returncode != 0

    assert 40 < await killed_at_every_call(tmp_path, run) < 400


@needs_strace
async def test_a_kill_at_every_call_of_recovery_changes_nothing(tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    acked = await three_segments(whole)
    with segments(whole)[-1].open("ab") as torn:
        torn.write(b"half of a record")

    async def run(path: Path, trace: Sequence[str]) -> bool:
        shutil.copytree(whole, path)
        child = await asyncio.to_thread(run_child, path, "0", trace=trace)
        async with opened(path) as log:
            assert [record.op.item for record in log.recovered] == [record.op.item for record in acked]
            assert not log.damage
        return child.returncode != 0

    assert 4 <= await killed_at_every_call(tmp_path, run) < 40


async def killed_at_every_call(path: Path, run: Callable[[Path, Sequence[str]], Awaitable[bool]]) -> int:
    """Run with a kill at the n-th call of each kind, until the run gets to its end; how many points there were."""
    points = 0
    for call in ("pwrite64", "fdatasync", "fsync", "rename", "ftruncate", "unlink"):  # strace counts each by itself
        for first in range(1, 500, 4):
            outcomes = await asyncio.gather(
                *(
                    run(path / f"{call}-{n}", ["-e", f"trace={call}", "-e", f"inject={call}:signal=KILL:when={n}"])
                    for n in range(first, first + 4)
                )
            )
            points += sum(outcomes)
            if not all(outcomes):
                break
    return points


@needs_strace
async def test_nothing_is_acknowledged_after_a_failed_sync(tmp_path: Path) -> None:
    """Fault matrix row 12: each fdatasync in turn fails; that group is refused, and the next goes to a new file."""
    failures = 0
    for number in range(1, 100):
        path = tmp_path / str(number)
        inject = ["-e", "trace=fdatasync", "-e", f"inject=fdatasync:error=EIO:when={number}"]
        child = await asyncio.to_thread(run_child, path, "10", trace=inject)
        assert child.returncode == 0, child.stderr
        refused = [line for line in child.stdout.split(b"\n") if line.startswith(b"failed")]
        acked = acknowledged(child.stdout)
        assert len(acked) + len(refused) == 10
        async with opened(path) as log:
            assert acked <= set(stamps(log.recovered))
            assert not log.damage
        if not refused:
            break
        failures += len(refused)
        assert all(b"Input/output error" in line for line in refused)
        assert number > 10 or segments(path)[-1].name == f"{number + 1:020d}.seg"
    assert failures >= 10


# Full disks


async def test_a_file_that_may_not_grow_refuses_and_goes_on_in_another(tmp_path: Path) -> None:
    """Fault matrix row 11 with RLIMIT_FSIZE: no false acknowledgement, and no restart needed."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    acked: list[int] = []
    refused: list[str] = []
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        async with opened(tmp_path / "log") as log:
            for number in range(1, 200):
                try:
                    acked += stamps(await logged(log, put(number, 400)))
                except TierUnavailable as full:
                    refused.append(full.reason)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert 3 <= len(refused) <= 20
    assert set(refused) == {os.strerror(errno.EFBIG)}
    assert acked[-1] == 199
    async with opened(tmp_path / "log") as log:
        assert stamps(log.recovered) == acked
        assert not log.damage


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterable[Path]:
    """A file system of 512 KiB."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(place)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting needs root")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


async def put_or_refusal(log: WriteAheadLog, number: int) -> list[Logged]:
    try:
        return await logged(log, put(number, 900))
    except TierUnavailable:
        return []


@pytest.mark.parametrize("segment_bytes", [1 << 20, 65_536])
async def test_a_full_disk_refuses_and_settling_alone_makes_it_work_again(small_disk: Path, segment_bytes: int) -> None:
    """Fault matrix row 11 with a small disk: segments can be deleted although nothing fits any more."""
    path = small_disk / "log"
    async with opened(path, segment_bytes=segment_bytes) as log:
        last = 0
        for _ in range(3):
            records: list[Logged] = []
            while written := await put_or_refusal(log, last := last + 1):
                records += written
            assert log.unsettled == len(records) > 100
            assert (await log.read(records[-1:]))[0].item == records[-1].op.item
            log.settle(record.seq for record in records)
            await until(lambda: log.bytes < 100_000)
        await logged(log, put(last + 1))
    async with opened(path) as log:
        assert stamps(log.recovered) == [last + 1]
        assert not log.damage


RESERVE = 131_072


@asynccontextmanager
async def reserved(path: Path) -> AsyncIterator[WriteAheadLog]:
    log = await WriteAheadLog.open(path, segment_bytes=65_536, reserve_bytes=RESERVE)
    try:
        yield log
    finally:
        await log.close()


async def test_the_reserve_is_given_up_for_others_and_nothing_accepted_until_it_is_back(small_disk: Path) -> None:
    path = small_disk / "log"
    reserve = path / "reserve"
    async with reserved(path) as log:
        records: list[Logged] = []
        while written := await put_or_refusal(log, len(records) + 1):
            records += written
        assert reserve.stat().st_blocks * 512 == reserve.stat().st_size == RESERVE
        assert not log.full, "there is no more to give to the log itself"
        log.relieve_until_settled()
        await until(lambda: not reserve.exists())
        assert log.full
        for _ in range(3):
            with pytest.raises(DiskFull):
                await logged(log, put(1, 10))
        assert shutil.disk_usage(small_disk).free >= RESERVE, "it is for others"
        # As much must be free beside it as long as there is something to drain.
        log.settle(record.seq for record in records[:70])
        await until(lambda: segments(path)[0].name != f"{1:020d}.seg")
        with pytest.raises(DiskFull):
            await logged(log, put(1, 10))
        log.settle(record.seq for record in records[:240])
        await until(lambda: not log.full)
        assert reserve.stat().st_size == RESERVE
        assert stamps(await logged(log, put(999))) == [999]
    assert reserve.exists(), "what is not settled will have to be drained"
    async with reserved(path) as log:
        assert stamps(log.recovered)[-1] == 999
        log.settle(record.seq for record in log.recovered)
        await until(lambda: log.bytes < 65_536)
    assert not reserve.exists()


async def test_a_reserve_without_its_blocks_is_made_anew(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.mkdir(mode=0o700)
    (path / "reserve").touch()
    os.truncate(path / "reserve", RESERVE)
    assert (path / "reserve").stat().st_blocks == 0
    async with reserved(path) as log:
        assert (path / "reserve").stat().st_blocks * 512 >= RESERVE
        assert not log.full


async def test_a_disk_without_room_for_the_reserve_accepts_nothing_and_starts_all_the_same(small_disk: Path) -> None:
    path = small_disk / "log"
    async with opened(path) as log:
        await logged(log, put(1))
    with (small_disk / "filler").open("wb") as filler:
        os.posix_fallocate(filler.fileno(), 0, shutil.disk_usage(small_disk).free - RESERVE // 2)
    async with reserved(path) as log:
        assert stamps(log.recovered) == [1]
        assert log.full
        with pytest.raises(DiskFull):
            await logged(log, put(2))
        (small_disk / "filler").unlink()
        await logged(log, put(3))
    async with reserved(path) as log:
        assert stamps(log.recovered) == [1, 3]


async def test_a_full_disk_at_start_is_no_reason_not_to_start(small_disk: Path) -> None:
    path = small_disk / "log"
    async with opened(path) as log:
        records = await logged(log, *[put(number, 900) for number in range(200)])
    filler = os.open(small_disk / "filler", os.O_WRONLY | os.O_CREAT)
    os.posix_fallocate(filler, 0, shutil.disk_usage(small_disk).free)
    os.close(filler)
    async with opened(path) as log:
        assert len(log.recovered) == len(records)
        with pytest.raises(TierUnavailable):
            await logged(log, *[put(number, 900) for number in range(200)])
        log.settle(record.seq for record in log.recovered)
        (small_disk / "filler").unlink()
        await logged(log, put(1))
    async with opened(path) as log:
        assert stamps(log.recovered) == [1]
