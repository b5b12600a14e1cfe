"""The journal of acknowledgements outlives the process whose acknowledgements it records."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path

import pytest

from sync_engine.testing import ackjournal
from sync_engine.testing.ackjournal import AckJournal, AckWriter, read_acks

WRITER = """
import importlib.util, os, signal, sys
spec = importlib.util.spec_from_file_location("ackjournal", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
acks = module.AckWriter(int(sys.argv[2]))
for n in range(int(sys.argv[3])):
    acks.write({"op": "put", "id": f"{sys.argv[4]}{n}", "hash": "ü" * 64, "version": n, "stamp": n})
os.kill(os.getpid(), signal.SIGKILL)
"""


def writer(journal: AckJournal, count: int, name: str) -> subprocess.Popen[bytes]:
    argv = [sys.executable, "-c", WRITER, ackjournal.__file__, str(journal.fd), str(count), name]
    return subprocess.Popen(argv, pass_fds=[journal.fd])


def test_every_line_of_killed_writers_is_there_in_each_ones_order(tmp_path: Path) -> None:
    path = tmp_path / "acks"
    with AckJournal.start(path) as journal:
        journal.write({"op": "begin"})
        killed = [writer(journal, 2_000, name) for name in ("a", "b")]
        assert [process.wait() for process in killed] == [-9, -9]
    first, *acks = read_acks(path)
    assert first == {"op": "begin"}
    for name in ("a", "b"):
        assert [ack["id"] for ack in acks if str(ack["id"])[0] == name] == [f"{name}{n}" for n in range(2_000)]


def test_a_second_journal_continues_the_file_behind_its_last_whole_line(tmp_path: Path) -> None:
    path = tmp_path / "acks"
    path.write_bytes(b'{"id":"a"}\n{"id":"b"}\n{"id":"torn')
    assert read_acks(path) == [{"id": "a"}, {"id": "b"}]
    with AckJournal.start(path) as journal:
        journal.write_many({"id": name} for name in "cd")
    assert [ack["id"] for ack in read_acks(path)] == ["a", "b", "c", "d"]


def test_no_file_means_no_acknowledgements_and_a_broken_line_is_an_error(tmp_path: Path) -> None:
    assert read_acks(tmp_path / "nothing") == []
    (tmp_path / "broken").write_bytes(b'{"id":\n{"id":"b"}\n')
    with pytest.raises(ValueError, match="line 1"):
        read_acks(tmp_path / "broken")


def test_a_line_that_would_not_be_atomic_is_refused(tmp_path: Path) -> None:
    with AckJournal.start(tmp_path / "acks") as journal, pytest.raises(ValueError, match="atomic"):
        journal.write({"id": "x" * 5_000})
    assert read_acks(tmp_path / "acks") == []


def test_a_journal_that_died_is_noticed_by_writer_and_by_stop(tmp_path: Path) -> None:
    journal = AckJournal.start(tmp_path / "no such folder" / "acks")
    with pytest.raises(BrokenPipeError):
        AckWriter(journal.fd).write_many({"id": "a"} for _ in itertools.count())
    with pytest.raises(RuntimeError, match="incomplete"):
        journal.stop()
