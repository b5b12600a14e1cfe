"""The files of the quarantine: one refused operation per id, the newest, and none that a newer write has overtaken."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from sync_engine.item import Op, SyncItem
from sync_engine.testing.clock import VirtualClock
from sync_engine.write.quarantine import Quarantine


def put(object_id: str, stamp: int) -> Op:
    item = SyncItem(object_id, b"%d" % stamp, stamp=stamp)
    return Op(kind="put", object_id=object_id, stamp=stamp, item=item)


async def reopened(folder: Path) -> Quarantine:
    quarantine = Quarantine(folder, VirtualClock())
    await quarantine.open()
    return quarantine


async def test_an_id_refused_twice_and_then_stored_does_not_come_back_with_the_next_start(tmp_path: Path) -> None:
    quarantine = await reopened(tmp_path)
    await quarantine.keep(put("a", 1), "l3", "no")
    await quarantine.keep(put("a", 2), "l3", "no again")
    await quarantine.overtaken("a", 3)
    assert len(await reopened(tmp_path)) == 0
    assert list(tmp_path.iterdir()) == []


async def test_an_older_operation_refused_later_does_not_hide_the_newer_one(tmp_path: Path) -> None:
    quarantine = await reopened(tmp_path)
    await quarantine.keep(put("a", 2), "l3", "newer")
    await quarantine.keep(put("a", 1), "l2", "older")
    for each in (quarantine, await reopened(tmp_path)):
        held = each.get("a")
        assert held is not None
        assert (held.op.stamp, held.reason) == (2, "newer")


async def test_what_a_crash_left_beside_the_newest_is_removed_at_the_next_start(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    await (await reopened(first)).keep(put("a", 1), "l3", "no")
    await (await reopened(second)).keep(put("a", 2), "l3", "no")
    for path in first.iterdir():
        path.rename(second / path.name)
    quarantine = await reopened(second)
    await quarantine.overtaken("a", 3)
    assert list(second.iterdir()) == []


async def test_one_that_could_not_be_written_at_first_leaves_nothing_older_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "no space left on device")

    quarantine = await reopened(tmp_path)
    await quarantine.keep(put("a", 1), "l3", "no")
    with monkeypatch.context() as patched:
        patched.setattr(Quarantine, "_write", full)
        with pytest.raises(OSError, match="no space"):
            await quarantine.keep(put("a", 2), "l3", "no again")
    await quarantine.again(put("a", 2))
    held = (await reopened(tmp_path)).get("a")
    assert held is not None
    assert held.op.stamp == 2
    assert len(list(tmp_path.iterdir())) == 1
    await quarantine.overtaken("a", 3)
    await quarantine.again(put("a", 2))
    assert list(tmp_path.iterdir()) == []


async def test_a_damaged_file_is_told_and_left_aside(tmp_path: Path) -> None:
    quarantine = await reopened(tmp_path)
    await quarantine.keep(put("a", 1), "l3", "no")
    await quarantine.keep(put("b", 2), "l3", "no")
    (path,) = [path for path in tmp_path.iterdir() if path.name.startswith("00000000000000000001")]
    path.write_bytes(b"\xc1" + path.read_bytes()[1:])
    quarantine = await reopened(tmp_path)
    assert quarantine.get("a") is None
    assert quarantine.get("b") is not None
    assert path.exists()
