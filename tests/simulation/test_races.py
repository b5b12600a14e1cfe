"""That the simulation finds what it is there for: five races of the original, planted one at a time.

The seeds are the first that find it; they change with the workload, so a test asks only that one of the first does.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import pytest

from sync_engine.item import Op
from sync_engine.ports import Logged
from sync_engine.testing.simulation import Failed, simulate
from sync_engine.testing.simulation.fakes import Disk, DiskLog
from sync_engine.testing.tiers import MemoryTier
from sync_engine.write import flush
from sync_engine.write.flush import Plan, plan_flush
from sync_engine.write.path import WritePath
from sync_engine.write.pending import Entry

SEEDS_MAX = 400


def no_stamp_guard(patch: pytest.MonkeyPatch) -> None:
    """Q5: whatever arrives last replaces what is there."""
    patch.setattr(MemoryTier, "_passed", lambda self, op, row: False)


def any_of_a_window_wins(patch: pytest.MonkeyPatch) -> None:
    """C8: of two operations on one id in one window, chance decides."""
    _plan(patch, lambda entries: random.choice(entries))


def queued_writes_outlive_a_delete(patch: pytest.MonkeyPatch) -> None:
    """C9: a delete does not take the write out of the queue, which comes after it then."""
    _plan(patch, lambda entries: max(entries, key=lambda entry: (entry.op.kind != "delete", entry.op.stamp)))


def replayed_rows_win(patch: pytest.MonkeyPatch) -> None:
    """W1: what a start finds in the log, settled or not, is written over whatever the tiers have."""
    replayed: set[int] = set()
    recover, passed = WritePath.recover, MemoryTier._passed

    def noted(self: WritePath, records: Sequence[Logged]) -> None:
        replayed.update(record.op.stamp for record in records)
        recover(self, records)

    patch.setattr(WritePath, "recover", noted)
    patch.setattr(MemoryTier, "_passed", lambda self, op, row: op.stamp not in replayed and passed(self, op, row))


def deletes_are_not_logged(patch: pytest.MonkeyPatch) -> None:
    """W2: after a crash the log knows nothing of the deletes that it had acknowledged."""
    opened = DiskLog.__init__

    def without(self: DiskLog, disk: Disk, *others: object) -> None:
        disk.records = {seq: op for seq, op in disk.records.items() if op.kind != "delete"}
        opened(self, disk, *others)

    patch.setattr(DiskLog, "__init__", without)


def _plan(patch: pytest.MonkeyPatch, choose: Callable[[list[Entry]], Entry]) -> None:
    def plan(batch: Sequence[Entry], keeps: Callable[[Op], bool]) -> Plan:
        by_id: dict[str, list[Entry]] = {}
        for entry in batch:
            by_id.setdefault(entry.op.object_id, []).append(entry)
        chosen = plan_flush([choose(entries) for entries in by_id.values()], keeps)
        return replace(chosen, outvoted={id_ for id_, entries in by_id.items() if len(entries) > 1})

    patch.setattr(flush, "plan_flush", plan)


RACES: Iterable[tuple[Callable[[pytest.MonkeyPatch], None], str]] = (
    (no_stamp_guard, "Q5"),
    (any_of_a_window_wins, "C8"),
    (queued_writes_outlive_a_delete, "C9"),
    (replayed_rows_win, "W1"),
    (deletes_are_not_logged, "W2"),
)


@pytest.mark.parametrize(("plant", "fault"), RACES, ids=[fault for _, fault in RACES])
def test_a_planted_race_is_found(
    plant: Callable[[pytest.MonkeyPatch], None], fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch)
    found = next(filter(None, map(failure_of, range(SEEDS_MAX))), None)
    assert found is not None, f"{fault} is not found by {SEEDS_MAX} seeds"
    print(f"{fault} is found by seed {found.seed}: {found.reason.splitlines()[0]}")
    assert f"python -m sync_engine.testing.simulation {found.seed}" in str(found)


def failure_of(seed: int) -> Failed | None:
    try:
        simulate(seed)
    except Failed as found:
        return found
    return None
