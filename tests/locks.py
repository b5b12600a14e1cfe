"""Another program that is in the middle of a write, as tests of every folder need it."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["write_locked"]


@contextmanager
def write_locked(path: Path, wait_s: float = 5.0) -> Iterator[sqlite3.Connection]:
    """Hold the write lock of a SQLite file; what was written meanwhile is undone, unless the test commits it.

    Others can read. Without ``wait_s`` it fails where a transaction is open anywhere.
    """
    # Any thread: who has to wait for the lock may need the loop of the one who holds it.
    other = sqlite3.connect(path, timeout=wait_s, isolation_level=None, check_same_thread=False)
    try:
        other.execute("BEGIN IMMEDIATE")
        yield other
        if other.in_transaction:
            other.execute("ROLLBACK")
    finally:
        other.close()
