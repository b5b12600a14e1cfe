"""``sync-engine quarantine``: what was refused is listed, shown, sent again and dropped, whatever its id."""

from __future__ import annotations

import asyncio
import sqlite3
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import typer

from sync_engine import SyncEngine, SyncEngineConfig, SyncItem
from sync_engine.testing.tiers import Refusing

if TYPE_CHECKING:
    from tests.cli.conftest import Run

HOSTILE = "a\x1b[2J\n[bold]x"
DASHED = "--yes"


@pytest.fixture
def here(tmp_path: Path) -> tuple[str, str]:
    """A folder in which SQL has refused a few items."""
    data = tmp_path / "data"
    ids = ["a", "b", HOSTILE, DASHED]

    async def fill() -> None:
        config = SyncEngineConfig(data_dir=data, redis_url=None)
        async with SyncEngine(config, around=lambda tier: Refusing(tier, ids, "not [red]here\nbecause")) as engine:
            await engine.submit_many([SyncItem(object_id, b"secret bytes") for object_id in ids])
            await engine.flush()

    asyncio.run(fill())
    return "--data-dir", str(data)


def test_the_list_tells_everything_but_the_content(run: Run, here: tuple[str, str]) -> None:
    told = run("quarantine", "list", "--json", *here)
    assert told.code == 0
    assert [each["object_id"] for each in told.json["quarantined"]] == ["a", "b", HOSTILE, DASHED]
    first = told.json["quarantined"][0]
    assert (first["kind"], first["tier"], first["reason"]) == ("put", "l3", "l3 refused: not [red]here\nbecause")
    assert first["stamp"] > 0
    assert first["since"].startswith("20")
    shown = run("quarantine", "list", *here)
    assert b"\x1b" not in shown.out
    assert b"[bold]x" in shown.out
    assert b"4 refused operations" in shown.out
    assert b"secret" not in told.out + shown.out
    assert run("quarantine", "list", "--data-dir", f"{here[1]}-empty", "--json").json == {"quarantined": []}


def test_one_is_shown_by_its_id(run: Run, here: tuple[str, str]) -> None:
    assert run("quarantine", "show", "a", "--json", *here).json["object_id"] == "a"
    shown = run("quarantine", "show", HOSTILE, *here)
    assert (shown.code, b"\x1b" in shown.out) == (0, False)
    assert run("quarantine", "show", *here, "--", DASHED).code == 0
    nobody = run("quarantine", "show", "nobody", *here)
    assert (nobody.code, nobody.out) == (1, b"")
    assert nobody.err == "sync-engine: nobody: nothing of it is quarantined\n"
    assert run("quarantine", "show", "nobody", "--json", *here).json == {"not_quarantined": ["nobody"]}
    assert run("get", "a", *here).out == b"secret bytes", "it was acknowledged"


def test_a_retry_stores_what_was_refused(run: Run, here: tuple[str, str]) -> None:
    assert run("quarantine", "retry", "a", HOSTILE, "--json", *here).json == {"sent": 2, "still_refused": []}
    assert run("quarantine", "retry", "a", "b", *here).code == 1, "of a there is nothing left, and b is left alone"
    assert [each["object_id"] for each in run("quarantine", "list", "--json", *here).json["quarantined"]] == [
        "b",
        DASHED,
    ]
    assert run("quarantine", "retry", *here).out == b"2 sent again, 0 still refused\n"
    assert run("scan", "", "--json", *here).json["total"] == 4
    assert run("quarantine", "retry", *here).code == 0


def test_what_is_refused_again_is_told_and_the_exit_code_says_so(run: Run, here: tuple[str, str]) -> None:
    with sqlite3.connect(Path(here[1]) / "truth.db") as database:
        database.execute(
            "CREATE TRIGGER no BEFORE INSERT ON sync_items WHEN NEW.id = 'a' BEGIN SELECT RAISE(ABORT, 'not a'); END"
        )
    database.close()
    told = run("quarantine", "retry", "--json", *here)
    assert told.code == 4
    assert told.json["sent"] == 4
    assert [each["object_id"] for each in told.json["still_refused"]] == ["a"]
    assert "not a" in told.json["still_refused"][0]["reason"]
    assert b"still refused" in run("quarantine", "retry", "a", *here).out


def test_a_drop_needs_a_yes_and_is_final(run: Run, here: tuple[str, str]) -> None:
    refused = run("quarantine", "drop", "a", *here)
    assert (refused.code, "--yes" in refused.err) == (2, True)
    assert run("quarantine", "drop", "a", "nobody", "--yes", *here).code == 1, "nothing was done to a either"
    dropped = run("quarantine", "drop", "a", "a", HOSTILE, "--yes", "--json", *here)
    assert (dropped.code, dropped.json) == (0, {"dropped": 2})
    assert "dropped for good" in dropped.err
    assert "\x1b" not in dropped.err
    assert "secret" not in dropped.err
    assert run("get", "a", *here).code == 1
    assert run("quarantine", "drop", "--yes", *here, "--", DASHED).code == 0
    assert [each["object_id"] for each in run("quarantine", "list", "--json", *here).json["quarantined"]] == ["b"]


def test_at_a_terminal_a_drop_asks(run: Run, here: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for answer, code in ((False, 130), (True, 0)):

        def confirm(question: str, *, abort: bool, err: bool, answer: bool = answer) -> bool:
            assert "1 refused operations" in question
            assert err
            if abort and not answer:
                raise typer.Abort
            return answer

        monkeypatch.setattr("typer.confirm", confirm)
        monkeypatch.setattr("sync_engine.cli.command.at_a_terminal", lambda: True)
        assert run("quarantine", "drop", "a", *here).code == code


@pytest.mark.parametrize("name", ["", "state:x", "x" * 256, "\udcff"])
def test_ids_that_break_a_rule_are_refused(run: Run, here: tuple[str, str], name: str) -> None:
    for words in (("show", name), ("retry", name), ("drop", name, "--yes")):
        told = run("quarantine", *words, *here)
        assert told.code == 3
        assert told.err.count("\n") == 1


def test_usage(run: Run, here: tuple[str, str]) -> None:
    assert run("quarantine", "drop", "--yes", *here).code == 2
    assert run("quarantine", "show", *here).code == 2
    assert run("quarantine", "what", *here).code == 2
    assert "drop" in run("quarantine").err + run("quarantine").out.decode()
