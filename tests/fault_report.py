"""The report of `make faults`: what the crash tests told of themselves, by row of the fault matrix and by database.

Nothing in it depends on the order in which tests ran. What belongs to a row and is tested elsewhere is named with it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import pytest

__all__ = ["BESIDE", "beside", "fault_report"]

DATABASES = ("SQLite", "MariaDB", "PostgreSQL")
REDIS = ("redis-8-modules", "valkey-9-modules", "valkey-9", "redis-7")
ZERO = ("acked_lost", "stale", "phantom", "tiers_differ", "lies")

ROWS = {
    1: "Redis killed in the middle of a batch",
    2: "Redis restarts empty",
    3: "Redis out of memory",
    4: "Redis evicts",
    5: "a tier is slow or silent",
    6: "a reply is cut in the middle",
    7: "half-open connections",
    8: "SQL killed in the middle of a batch or a commit",
    9: "SQL locked, deadlocks, serialization failures",
    10: "SQL full, read-only, another schema, small packets",
    11: "the disk of the log is full",
    12: "a sync of the log fails",
    13: "a record of the log is torn or corrupt",
    14: "the process is killed",
    15: "clocks that jump",
    16: "callers cancelled at every await",
    17: "items that a tier refuses",
    18: "huge items, floods",
    19: "damaged copies and rows",
    20: "what is delivered twice",
    21: "several engines write the same ids",
    22: "deletes against everything",
    23: "settings changed under load",
    24: "starts without a tier, tiers that flap",
    25: "a filter that forgets",
    26: "SIGTERM at any moment",
    27: "a second engine on the same log",
}

BESIDE = {
    3: ("tests/servers/test_out_of_memory.py",),
    13: ("tests/unit/test_log_record.py",),
    15: ("tests/unit/test_stamps.py", "tests/simulation/test_seeds.py"),
    16: ("tests/flows/test_cancellation.py",),
    19: ("tests/flows/test_healing.py",),
    23: ("tests/flows/test_reconfigure.py",),
}
"""Files that `make faults` runs too; they keep no journal, so that all there is to tell is whether they pass."""

OF_REDIS = "A matter of Redis and of the change stream, whatever the database."
OF_THE_LOG = "A matter of the log and its disk, whatever the database."
NOTES = {
    3: OF_REDIS,
    4: OF_REDIS,
    11: OF_THE_LOG,
    12: OF_THE_LOG,
    13: f"{OF_THE_LOG} Every byte of a log of 200 records is changed by `tests/unit/test_log_record.py`.",
    15: "The simulation gives each engine a clock of its own that jumps, stops and goes back; its seeds are run by "
    "`tests/simulation/test_seeds.py`.",
    25: "There is no filter yet: this row belongs to the issue that brings one.",
    27: "No matter of the database: the log is locked before a database is asked.",
}

INTRODUCTION = """\
What was done to working engines, on real servers, and what it cost. Written by `make faults`; a short form of the same
ends every `make test`. How much was begun before a kill struck differs from run to run, and so do the times of the last
column, which are of one run on a shared machine with 2 cores. What must be 0 does not.

A *life* is a process that ran an engine until it was killed or stopped, a *fault* a kill, cut, pause, lock or error
made on purpose. *Begun* and *acked* operations were noted by another process (`sync_engine.testing.ackjournal`); where
several engines write the same ids, with the stamp that each got. Afterwards every tier is read back: *lost*
(acknowledged and in no tier), *stale* (older than the last acknowledged), *phantom* (never was), *differ* (two tiers)
and *lies* (a read of the working engine that contradicts the writes before it) must be 0. The Redis is 8.2 with modules
where none is named."""


@dataclass(frozen=True, slots=True)
class Told:
    """One scenario's line."""

    rows: tuple[int, ...]
    what: str
    database: str
    redis: str
    figures: Mapping[str, int]
    besides: str

    @property
    def wrong(self) -> int:
        """What must be 0."""
        return sum(self.figures[name] for name in ZERO)


def beside(reporter: pytest.TerminalReporter) -> dict[str, int]:
    """How many tests of each file of ``BESIDE`` passed; a file with one that failed is not counted at all."""
    passed: dict[str, int] = {}
    for report in reporter.stats.get("passed", []):
        path = report.nodeid.partition("::")[0]
        passed[path] = passed.get(path, 0) + (report.when == "call")
    failed = {
        report.nodeid.partition("::")[0] for name in ("failed", "error") for report in reporter.stats.get(name, [])
    }
    return {path: passed.get(path, 0) * (path not in failed) for paths in BESIDE.values() for path in paths}


def fault_report(lines: Iterable[str], passed: Mapping[str, int]) -> str:
    """The whole text."""
    told = sorted(map(_parsed, lines), key=lambda each: (each.rows, each.what, _place(each)))
    text = ["# Faults", "", INTRODUCTION, "", "## At a glance", "", *_glance(told), ""]
    for number, title in ROWS.items():
        text += [f"## {number}. {title[0].upper()}{title[1:]}", ""]
        mine = [each for each in told if each.rows[0] == number]
        elsewhere = sorted({each.rows[0] for each in told if number in each.rows[1:]})
        if mine:
            text += [*_table(mine), ""]
        if elsewhere:
            text += [f"Also in the tables of {_listed(elsewhere)}.", ""]
        if number in NOTES:
            text += [NOTES[number], ""]
        for path in BESIDE.get(number, ()):
            text += [
                f"`{path}`: {passed.get(path, 0)} tests passed." if passed.get(path) else f"`{path}`: not run.",
                "",
            ]
    return "\n".join(text)


def _parsed(line: str) -> Told:
    scenario, _, rest = line.rpartition(": lives=")
    figures, _, besides = rest.partition(" | ")
    redis = database = ""
    while (last := scenario.rpartition(", "))[2] in (*DATABASES, *REDIS):
        scenario = last[0]
        redis, database = (last[2], database) if last[2] in REDIS else (redis, last[2])
    found = re.match(r"(\d+(?:, \d+)*) (.*)", scenario)
    assert found is not None, f"no row of the matrix: {line}"
    counted = dict(pair.split("=") for pair in f"lives={figures}".split())
    numbers = {name: int(value) for name, value in counted.items()}
    return Told(tuple(map(int, found[1].split(", "))), found[2], database, redis, numbers, besides)


def _place(told: Told) -> tuple[int, int]:
    return DATABASES.index(told.database), REDIS.index(told.redis) if told.redis else -1


def _glance(told: Sequence[Told]) -> list[str]:
    rows: list[tuple[object, ...]] = [("row", "fault", *DATABASES), ("--:", "---", *("---" for _ in DATABASES))]
    for number, title in ROWS.items():
        cells = []
        for database in DATABASES:
            mine = [each for each in told if number in each.rows and each.database == database]
            operations = sum(max(each.figures["begun"], each.figures["acked"]) for each in mine)
            faults, wrong = (sum(each.figures["faults"] for each in mine), sum(each.wrong for each in mine))
            cells.append(f"{operations:,} operations, {faults:,} faults, **{wrong}** wrong" if mine else "see below")
        rows.append((number, title, *cells))
    lost = sum(each.figures["acked_lost"] for each in told)
    acked = sum(each.figures["acked"] for each in told)
    return [*map(_line, rows), "", f"Acknowledged operations: {acked:,}. Acknowledged and lost: **{lost}**."]


def _table(told: Sequence[Told]) -> list[str]:
    names = [name for name in told[0].figures if name not in ZERO]
    head = ("scenario", "database", "Redis", *names, *ZERO, "besides")
    head = tuple(
        name.replace("acked_lost", "lost").replace("tiers_differ", "differ").replace("_", " ") for name in head
    )
    lines = [_line(head), _line(["---"] * 3 + ["--:"] * (len(names) + len(ZERO)) + ["---"])]
    for each in told:
        figures = [each.figures[name] for name in (*names, *ZERO)]
        rows = f" (also {_listed(each.rows[1:])})" if each.rows[1:] else ""
        lines.append(_line([each.what + rows, each.database, each.redis, *figures, each.besides]))
    return lines


def _line(cells: Iterable[object]) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def _listed(numbers: Sequence[int]) -> str:
    return ("rows " if len(numbers) > 1 else "row ") + ", ".join(map(str, numbers))


if __name__ == "__main__":  # for the Makefile
    print(*sorted({path for paths in BESIDE.values() for path in paths}))
