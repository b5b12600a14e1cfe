"""An engine is killed at every single write, sync and send of a small run, and of the recovery after it (matrix 14).

strace counts calls per thread, so every group below names files that one thread alone writes.
"""

from __future__ import annotations

import shutil
import signal
import subprocess
from collections.abc import Callable

import pytest

from .driver import STORED
from .rig import MakeRig, Rig
from .truths import SERVERS, Truth

POINTS_MAX = 400
"""A run that is still killed here is not getting shorter: something loops."""

Where = Callable[[Rig], list[str]]


def log_files(rig: Rig) -> list[str]:
    folder = rig.data_dir / "log"
    # Named before they exist: by the number of their first record.
    segments = [folder / f"{number:020d}.seg" for number in range(1, 80)]
    return [str(path) for path in (folder / "lock", folder / "spare", folder, *segments)]


def sql_files(rig: Rig) -> list[str]:
    return [str(rig.data_dir / name) for name in ("truth.db", "truth.db-wal", "truth.db-shm", "truth.db-journal")]


def anything(_: Rig) -> list[str]:
    return []


CALLS = [
    pytest.param("pwrite64", log_files, id="writes of the log"),
    pytest.param("fdatasync,fsync", log_files, id="syncs of the log"),
    pytest.param("rename,unlink,ftruncate", log_files, id="names and lengths of the log"),
    pytest.param("pwrite64", sql_files, id="writes of SQLite"),
    pytest.param("fdatasync,fsync", sql_files, id="syncs of SQLite"),
    pytest.param("sendto,sendmsg", anything, id="sends"),
]
CASES = [
    *(pytest.param("sqlite", *call.values, id=call.id) for call in CALLS),
    *(pytest.param(name, *CALLS[-1].values, id=f"sends-{name}", marks=pytest.mark.long) for name in SERVERS),
]


async def killed_at(rig: Rig, calls: str, files: Where, number: int) -> bool:
    """One life that ends at the given call, unless it ends before; whether it did."""
    pid = rig.start(traced=True, tasks=2, ids=4, moves=4)
    paths = [word for path in files(rig) for word in ("-P", path)]
    inject = f"inject={calls}:signal=KILL:when={number}"
    tracer = subprocess.Popen(
        ["strace", "-f", "-qq", "-o", "/dev/null", *paths, "-e", f"trace={calls}", "-e", inject, "-p", str(pid)]
    )
    status = rig.drivers.ended()
    tracer.wait(30)
    assert status in (STORED, -signal.SIGKILL), f"ended with {status} at call {number} of {calls}"
    return status != STORED


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
@pytest.mark.parametrize(("truth", "calls", "files"), CASES, indirect=["truth"])
@pytest.mark.timeout(600)
async def test_I3_a_kill_at_every_call_of_a_run_and_of_its_recovery_loses_nothing(
    make_rig: MakeRig, truth: Truth, calls: str, files: Where, request: pytest.FixtureRequest
) -> None:
    rig = make_rig()
    rig.settings["wal_segment_bytes"] = 4096  # a new segment every few records, so that they are begun and deleted too
    for number in range(1, POINTS_MAX):
        # First in an empty folder, so that its making is interrupted too; then on what that left, so that it is
        # recovery which is interrupted at the same call.
        first = await killed_at(rig, calls, files, number)
        second = await killed_at(rig, calls, files, number)
        rig.figures.faults += first + second
        if not first and not second:
            break
        await rig.check()
        await truth.renewed(rig)
    else:
        pytest.fail(f"more than {POINTS_MAX} {calls}")
    await rig.check()
    rig.figures.tell(f"14 killed at each of the {request.node.callspec.id.partition('-')[0]}")
    assert rig.figures.faults > 0
