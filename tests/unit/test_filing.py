"""The quarantine's files and the log in step, where the quarantine cannot be written: one of them has every refusal."""

from __future__ import annotations

import asyncio
import errno
import os
import threading
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import pytest

from sync_engine import SyncItem
from sync_engine.item import Op
from sync_engine.ports import Logged
from sync_engine.testing.clock import VirtualClock
from sync_engine.write.filing import Filing
from sync_engine.write.pending import Entry
from sync_engine.write.quarantine import Quarantine


class Log:
    """A journal that notes what is settled, and how often somebody had no room."""

    def __init__(self) -> None:
        self.settled: list[int] = []
        self.relieved = 0

    def append(
        self, ops: Sequence[Op], on_durable: Callable[[Sequence[Logged]], None], on_failed: Callable[[Exception], None]
    ) -> None: ...

    def settle(self, seqs: Iterable[int], /) -> None:
        self.settled += seqs

    async def read(self, records: Sequence[Logged], /) -> list[Op]:
        return [record.op for record in records]

    def relieve_until_settled(self) -> None:
        self.relieved += 1

    def relieve_until_drained(self) -> None:
        raise AssertionError("no tier has asked")

    def drained(self) -> None:
        raise AssertionError("no tier has asked")


class Crowded(Quarantine):
    """Its disk has no room while ``full``, and takes its time where ``slow`` is given."""

    full = False
    slow: threading.Event | None = None

    def _write(self, refused: object) -> None:
        if self.full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if self.slow is not None:
            self.slow.wait(10)
        super()._write(refused)  # type: ignore[arg-type]  # passed on as it came


@pytest.fixture
async def quarantine(tmp_path: Path) -> Crowded:
    quarantine = Crowded(tmp_path / "quarantine", VirtualClock())
    await quarantine.open()
    return quarantine


def entry(object_id: str, stamp: int, *, kind: str = "put", logged: bool = True) -> Entry:
    item = SyncItem(object_id, b"x", stamp=stamp) if kind == "put" else None
    op = Op(kind=kind, object_id=object_id, stamp=stamp, item=item, state="s")  # type: ignore[arg-type]  # one of the kinds
    return Entry(op, Logged(op, stamp, None) if logged else None)


async def on_file(quarantine: Crowded) -> list[tuple[str, int]]:
    """What the next start finds."""
    after = Quarantine(quarantine._folder, VirtualClock())
    await after.open()
    return [(held.op.object_id, held.op.stamp) for held in after.all()]


async def test_what_is_refused_is_on_file_and_its_record_may_go(quarantine: Crowded) -> None:
    log = Log()
    refused = entry("a", 1)
    await Filing(quarantine, log).refused(refused, "l3", "no")
    assert await on_file(quarantine) == [("a", 1)]
    assert refused.logged is not None, "whoever settles the entry settles its record"
    assert (log.settled, log.relieved) == ([], 0)


async def test_what_finds_no_room_stays_in_the_log_until_it_is_on_file(quarantine: Crowded) -> None:
    log = Log()
    filing = Filing(quarantine, log)
    quarantine.full = True
    for stamp, object_id in enumerate("ab", 1):
        refused = entry(object_id, stamp)
        await filing.refused(refused, "l3", "no")
        assert refused.logged is None, "it is not settled with its batch"
        assert quarantine.get(object_id) is not None, "and answered with all the same"
    await filing.again()
    assert (await on_file(quarantine), log.settled, log.relieved) == ([], [], 3)
    assert "2 not on file" in repr(filing)
    quarantine.full = False
    await filing.again()
    assert (await on_file(quarantine), log.settled) == ([("a", 1), ("b", 2)], [1, 2])
    await filing.again()
    assert log.settled == [1, 2]


async def test_a_crowd_whose_writes_are_refused_tries_the_disk_once(quarantine: Crowded) -> None:
    log = Log()
    filing = Filing(quarantine, log)
    running = asyncio.create_task(filing.run())
    quarantine.full = True
    await filing.refused(entry("a", 1), "l3", "no")
    for _ in range(20):
        filing.soon()
    await until(lambda: log.relieved == 2)  # one has tried
    quarantine.full = False
    await asyncio.sleep(0.05)
    assert log.relieved == 2, "nobody tries before somebody asks"
    filing.soon()
    await until(lambda: log.settled == [1])
    assert await on_file(quarantine) == [("a", 1)]
    running.cancel()
    await asyncio.wait({running})


@pytest.mark.parametrize("newer", ["put", "delete"])
async def test_who_gives_up_waiting_for_a_file_leaves_no_file_behind(quarantine: Crowded, newer: str) -> None:
    """The thread wrote on, behind what was stored meanwhile: a deleted item was read again after the next start."""
    log = Log()
    filing = Filing(quarantine, log)
    quarantine.full = True
    await filing.refused(entry("a", 1), "l3", "no")
    quarantine.full, quarantine.slow = False, threading.Event()
    waiting = asyncio.create_task(filing.again())
    await asyncio.sleep(0.05)
    waiting.cancel()
    await asyncio.wait({waiting})
    later = entry("a", 2, kind=newer)
    assert filing.ends_with(later)
    stored = asyncio.create_task(filing.stored(later))
    await asyncio.sleep(0.05)
    assert not stored.done(), "one change after the other, whoever waits"
    quarantine.slow.set()
    await stored
    await filing.again()
    await quarantine.finish()
    assert (await on_file(quarantine), log.settled) == ([], [1])


async def test_an_older_file_that_cannot_be_removed_goes_later_and_holds_the_record_until_then(
    quarantine: Crowded, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Settled, it would have let an old item come back after a restart; forgotten, the log would only have grown."""
    log = Log()
    filing = Filing(quarantine, log)
    await filing.refused(entry("a", 1), "l3", "no")

    def failing(_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    newer = entry("a", 2)
    with monkeypatch.context() as broken:
        broken.setattr(quarantine, "_remove", failing)
        await filing.stored(newer)
    assert newer.logged is None
    assert await on_file(quarantine) == [("a", 1)]
    await filing.again()
    assert (await on_file(quarantine), log.settled) == ([], [2])


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not holds():  # noqa: ASYNC110 - what a thread does sets no event
            await asyncio.sleep(0.005)


async def test_what_no_log_holds_and_no_file_is_lost_with_the_process_and_not_waited_for(quarantine: Crowded) -> None:
    for log in (Log(), None):
        filing = Filing(quarantine, log)
        quarantine.full = True
        await filing.refused(entry("a", 1, logged=False), "l3", "no")
        assert "0 not on file" in repr(filing)
        quarantine.full = False
        await filing.again()
        assert await on_file(quarantine) == []


async def test_what_has_ended_before_it_was_on_file_leaves_the_log_and_no_file(quarantine: Crowded) -> None:
    log = Log()
    filing = Filing(quarantine, log)
    quarantine.full = True
    await filing.refused(entry("a", 1), "l3", "no")
    quarantine.full = False
    newer = entry("a", 2)
    assert filing.ends_with(newer)
    await filing.stored(newer)
    await filing.again()
    assert (await on_file(quarantine), log.settled) == ([], [1])
    assert newer.logged is not None


async def test_an_older_file_goes_when_the_newer_refusal_is_filed_at_last(quarantine: Crowded) -> None:
    filing = Filing(quarantine, Log())
    await filing.refused(entry("a", 1), "l3", "no")
    quarantine.full = True
    await filing.refused(entry("a", 2), "l3", "no again")
    assert await on_file(quarantine) == [("a", 1)]
    quarantine.full = False
    await filing.again()
    assert await on_file(quarantine) == [("a", 2)]


async def test_what_is_stored_ends_what_was_refused_before_it_and_nothing_newer(quarantine: Crowded) -> None:
    filing = Filing(quarantine, Log())
    assert not filing.ends_with(entry("a", 1))
    await filing.refused(entry("a", 2), "l3", "no")
    await filing.stored(entry("a", 1))
    assert await on_file(quarantine) == [("a", 2)]
    assert not filing.ends_with(entry("a", 3, kind="restate")), "no tier has what it changes the state of"
    await filing.stored(entry("a", 3))
    assert await on_file(quarantine) == []


async def test_what_the_truth_says_does_not_happen_leaves_the_quarantine_it_was_sent_again_from(
    quarantine: Crowded,
) -> None:
    filing = Filing(quarantine, Log())
    await filing.refused(entry("a", 2), "l3", "no")
    await filing.answered(entry("a", 1))
    assert await on_file(quarantine) == [("a", 2)]
    await filing.answered(entry("a", 2))
    assert await on_file(quarantine) == []
