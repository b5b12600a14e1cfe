"""Every question of `python -m bench` runs end to end and finds that its contenders did the same work; no times."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.timeout(270)  # it starts every kind of server
def test_every_question_is_answered_in_a_quick_run() -> None:
    # The one need of the suite that the extra `test` has not: it is of a question alone, and of no other Python.
    assert find_spec("psycopg") is not None, "no psycopg, which sql_drivers asks: make .venv/ready-dev installs it"
    said = _bench("--quick")
    assert said.returncode == 0, said.stderr
    answers = [line for line in said.stdout.splitlines() if line.startswith("| ")][1:]
    assert [line.count("|") for line in answers] == [10] * len(answers), said.stdout
    for asked in (
        "put_batch",
        "own script",
        "single `RedisStore.get`",
        "`scan_prefix` of",
        "`count_prefix` of",
        "while `iter_by_state` is at work",
        "while `delete_by_state` is at work",
        "memory of an index",
        "binary items of 10 kB",
        "a cluster of 3 primaries",
        "L1 hit",
        "Ack.LOGGED",
        "submitters, p99 of the latency",
        "all stored, 500 places, Redis + SQLite",
        "all stored, 500 places, Redis + MariaDB",
        "all stored, 500 places, Redis + PostgreSQL",
        "2,000 places, Redis + MariaDB 2 ms away: 4 writers",
        "`Ack.STORED`, 200 callers, Redis + PostgreSQL: p99",
        "1,000 operations, new writes flowing, Redis + SQLite",
        "1,000 operations, new writes flowing, Redis + MariaDB",
        "1,000 operations, new writes flowing, Redis + PostgreSQL",
        "the driver alone: MariaDB",
        "the driver alone: PostgreSQL",
        "1,000 rows a transaction, PostgreSQL 2 ms away: copied beside unnest",
        "rows of 3 kB a transaction, PostgreSQL beside it: copied beside unnest",
        "a page of 500 ids",
        "cost per",
    ):
        assert any(asked in answer for answer in answers), said.stdout
    assert "written" not in said.stdout, "only a complete run at full size is a result"


def test_an_unknown_question_is_refused() -> None:
    said = _bench("--quick", "no_such_question")
    assert said.returncode == 2
    assert "no such question: no_such_question" in said.stderr


def _bench(*args: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(ROOT / "src"), str(ROOT)])
    return subprocess.run(
        [sys.executable, "-m", "bench", *args],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
