"""The commands: what goes in comes out byte for byte, every failure is one line and an exit code, no secret is told."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import os
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import redis

from sync_engine import SyncEngine, SyncEngineConfig, SyncItem

if TYPE_CHECKING:
    from tests.cli.conftest import Run

CANARY = "c4nary-p4ss"
ALL_BYTES = bytes(range(256))
NOBODY = f"redis://user:{CANARY}@127.0.0.1:1/0"


@pytest.fixture
def here(tmp_path: Path) -> tuple[str, str]:
    return "--data-dir", str(tmp_path / "data")


def by_hand(*argv: str, env: dict[str, str] | None = None) -> list[str]:
    return [sys.executable, "-m", "sync_engine", *argv]


# What goes in comes out


@pytest.mark.parametrize("content", [ALL_BYTES, b"", b'{ "a" : 1 }\n', b"\xff\xfe", "名前".encode()])
def test_content_of_a_file_comes_back_byte_for_byte(
    run: Run, here: tuple[str, str], tmp_path: Path, content: bytes
) -> None:
    (tmp_path / "file").write_bytes(content)
    assert run("put", "a", tmp_path / "file", *here).code == 0
    got = run("get", "a", *here)
    assert (got.code, got.out, got.err) == (0, content, "")


@pytest.mark.parametrize("name", [(), ("-",)])
def test_content_of_stdin_comes_back_byte_for_byte(run: Run, here: tuple[str, str], name: tuple[str, ...]) -> None:
    assert run("put", "a", *name, *here, stdin=ALL_BYTES).code == 0
    assert run("get", "a", *here).out == ALL_BYTES


def test_put_tells_what_it_stored(run: Run, here: tuple[str, str]) -> None:
    told = run("put", "a", "--json-value", '{"n": 1}', "--state", "hot", "--ack", "stored", "--json", *here).json
    assert told["content_hash"] == hashlib.sha256(b'{"n": 1}').hexdigest()
    assert (told["object_id"], told["state"], told["ack"], told["content_type"]) == ("a", "hot", "stored", "json")
    assert told["stamp"] > 0


def test_get_as_json_carries_the_value_of_json_and_the_bytes_of_binary(run: Run, here: tuple[str, str]) -> None:
    big = "123456789012345678901234567890"
    run("put", "j", "--json-value", f'{{"n": {big}, "s": "東京"}}', *here)
    run("put", "b", *here, stdin=ALL_BYTES)
    # json, not orjson: it keeps every digit.
    assert json.loads(run("get", "j", "--json", *here).out)["content"] == {"n": int(big), "s": "東京"}
    told = run("get", "b", "--json", *here).json
    assert base64.b64decode(told["content_base64"]) == ALL_BYTES
    assert "content" not in told


def test_binary_is_kept_as_binary_where_it_looks_like_json(run: Run, here: tuple[str, str]) -> None:
    run("put", "a", "--binary", *here, stdin=b"[1]")
    assert run("get", "a", "--json", *here).json["content_type"] == "binary"


def test_a_deleted_item_is_gone(run: Run, here: tuple[str, str]) -> None:
    run("put", "a", *here, stdin=b"x")
    assert run("delete", "a", "--json", *here).json == {"object_id": "a", "deleted": True}
    assert run("delete", "a", *here).code == 1
    assert run("get", "a", *here).code == 1
    assert run("status", "a", *here).code == 1


def test_many_are_deleted_by_the_beginning_of_their_id_or_by_their_state(run: Run, here: tuple[str, str]) -> None:
    for name, state in (("u.1", "s"), ("u.2", "t"), ("v.1", "s"), ("w.1", "t")):
        run("put", name, "--json-value", "[]", "--state", state, *here)
    assert run("delete", "--under", "u.", *here).code == 2, "it has to be said"
    assert run("delete", "--under", "u.", "--yes", "--json", *here).json == {"deleted": 2}
    assert run("delete", "--in-state", "s", "--yes", *here).out == b"1 deleted\n"
    assert run("delete", "--under", "u.", "--yes", *here).code == 0
    for words in (("--under", ""), ("--in-state", "")):
        assert run("delete", *words, "--yes", *here).code == 3, "an empty variable of a script is not everything"
    for words in ((), ("w.1", "--under", "w"), ("--under", "w", "--in-state", "t")):
        assert run("delete", *words, "--yes", *here).code == 2
    assert run("scan", "", "--json", *here).json["total"] == 1


def test_what_does_not_exist_leaves_stdout_empty_or_says_so_in_json(run: Run, here: tuple[str, str]) -> None:
    got = run("get", "a", *here)
    assert (got.code, got.out, got.err) == (1, b"", "sync-engine: a: no such item\n")
    assert run("get", "a", "--json", *here).json == {"object_id": "a", "exists": False}
    assert run("status", "a", "--json", *here).json["exists"] is False


def test_a_scan_is_ordered_limited_and_knows_how_many_there_are(run: Run, here: tuple[str, str]) -> None:
    for name in ("u.2", "u.10", "u.1", "v.1"):
        run("put", name, "--json-value", "[]", *here)
    told = run("scan", "u.", "--limit", 2, "--json", *here).json
    assert ([item["object_id"] for item in told["items"]], told["total"]) == (["u.1", "u.10"], 3)
    told = run("scan", "u.", "--after", "u.10", "--json", *here).json
    assert [item["object_id"] for item in told["items"]] == ["u.2"]
    shown = run("scan", "", *here).out.decode()
    assert "v.1" in shown
    assert "4 of 4" in shown
    assert run("scan", "nothing", *here).code == 0


def test_every_tier_is_written_and_told_with_redis(
    run: Run, here: tuple[str, str], redis_url: str, redis_prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SYNC_ENGINE_REDIS_URL", redis_url)
    there = (*here, "--prefix", redis_prefix)
    run("put", "a", "--json-value", "{}", "--ttl", 60, *there)
    told = run("status", "a", "--json", *there).json
    assert (told["l1"], told["l2"], told["l3"], told["pending"]) == (False, True, True, False)
    shown = run("status", "a", *there).out.decode()
    assert "L2 Redis" in shown
    client = redis.Redis.from_url(redis_url)
    assert 0 < client.pttl(f"{redis_prefix}a") <= 60_000
    client.close()
    assert run("status", "a", "--json", *there, "--redis-url", "none").json["l2"] is None


def test_health_tells_of_every_tier_and_of_one_that_is_down(
    run: Run, here: tuple[str, str], redis_url: str, redis_prefix: str
) -> None:
    well = run("health", "--json", *here, "--redis-url", redis_url, "--prefix", redis_prefix)
    assert (well.code, well.json["ok"], set(well.json["tiers"])) == (0, True, {"l2", "l3"})
    assert "redis 8.2" in well.json["tiers"]["l2"]["about"]
    down = run("health", *here, "--redis-url", "redis://127.0.0.1:1")
    assert down.code == 4
    assert "not all is well" in down.out.decode()


# Ids from strangers


@pytest.mark.parametrize(
    "object_id",
    ["", "x" * 256, "state:a", "merkle:a", "idx:a", "__local__:a", "cdc", "a\0b", "a\udcff", "\ud800"],
    ids=ascii,
)
@pytest.mark.parametrize("command", ["put", "get", "delete", "status"])
def test_an_id_against_the_rules_is_named_in_one_line(
    run: Run, here: tuple[str, str], command: str, object_id: str
) -> None:
    ran = run(command, object_id, *here)
    assert ran.code == 3
    assert ran.out == b""
    assert ran.err.startswith("sync-engine: object_id: ")
    assert ran.err.count("\n") == 1


@pytest.mark.parametrize("object_id", ["名前🗼", "[red]x[/red]", "a\nb", "a\x1b[31mb", "\x9b31m", "x" * 255, "%s", "-"])
def test_a_strange_id_is_kept_and_never_reaches_the_terminal_as_a_command(
    run: Run, here: tuple[str, str], object_id: str
) -> None:
    assert run("put", "--json-value", "[]", *here, "--", object_id).code == 0
    assert run("scan", "", "--json", *here).json["items"][0]["object_id"] == object_id
    shown = run("scan", "", *here).out.decode() + run("status", *here, "--", object_id).out.decode()
    assert "\x1b" not in shown
    assert "\x9b" not in shown
    assert (object_id if object_id.isprintable() else ascii(object_id)[1:-1]) in shown


# Failures


@pytest.mark.parametrize(
    ("argv", "code", "said"),
    [
        (("put", "a", "--json-value", "{bad"), 3, "content: "),
        (("put", "a", "no/such/file"), 3, "file: no/such/file"),
        (("put", "a", "/"), 3, "file: /"),
        (("put", "a", "--state", ""), 3, "state: "),
        (("put", "a", "--state", "x" * 33), 3, "state: "),
        (("put", "a", "--ttl", "60"), 3, "ttl: "),
        (("put", "a", "--ttl", "0", "--redis-url", NOBODY), 3, "redis_ttl: "),
        (("put", "a", "--ttl", "nan", "--redis-url", NOBODY), 3, "redis_ttl: "),
        (("put", "a", "--json-value", "1", "--binary"), 2, "--json-value"),
        (("put", "a", "--ack", "maybe"), 2, "--ack"),
        (("put",), 2, "ID"),
        (("scan", "a", "--limit", "0"), 2, "--limit"),
        (("frobnicate",), 2, "frobnicate"),
        (("get", "a", "--sql-url", f"oracle://u:{CANARY}@h/d"), 3, "sql_url: "),
        (("get", "a", "--redis-url", f"redis://u:{CANARY}@h:{CANARY}"), 3, "redis_url: "),
        (("get", "a", "--redis-url", "none", "--sql-url", "none"), 3, "no tier"),
        (("get", "a", "--config", "no.toml"), 3, "no.toml"),
        (("get", "a", "--redis-url", NOBODY), 4, "l2 is unavailable"),
    ],
    ids=lambda value: " ".join(value)[:60] if isinstance(value, tuple) else None,
)
def test_a_failure_is_an_exit_code_and_one_line(
    run: Run, here: tuple[str, str], argv: tuple[str, ...], code: int, said: str
) -> None:
    ran = run(*argv, *here)
    assert ran.code == code
    assert ran.out == b""
    last = ran.err.splitlines()[-1]
    assert last.startswith("sync-engine: ")
    assert said in last
    assert "Traceback" not in ran.err
    assert CANARY not in ran.err


def test_content_over_the_bound_is_refused(run: Run, here: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SYNC_ENGINE_MAX_PAYLOAD_BYTES", "10")
    assert run("put", "a", *here, stdin=b"x" * 10).code == 0
    ran = run("put", "b", *here, stdin=b"x" * 11)
    assert (ran.code, ran.err.startswith("sync-engine: content: ")) == (3, True)
    assert run("get", "b", *here).code == 1


def test_a_write_during_an_outage_of_redis_is_kept_and_said_to_wait(run: Run, here: tuple[str, str]) -> None:
    ran = run("put", "a", "--json-value", "[1]", "--redis-url", NOBODY, *here)
    assert ran.code == 0
    assert "in the log" in ran.err
    assert CANARY not in ran.err
    assert run("get", "a", *here).out == b"[1]"


def test_corrupt_bytes_are_exit_code_5_and_never_printed(run: Run, here: tuple[str, str]) -> None:
    run(
        "put",
        "a",
        *here,
        stdin=b"\xffgood",
    )
    with sqlite3.connect(Path(here[1]) / "truth.db") as truth:
        assert truth.execute("UPDATE sync_items SET payload_blob = ?", (b"\xffevil",)).rowcount == 1
    truth.close()
    ran = run("get", "a", *here)
    assert (ran.code, ran.out) == (5, b"")
    assert "SHA-256" in ran.err


async def test_a_folder_in_use_by_another_engine_is_said_in_one_line(tmp_path: Path) -> None:
    async with SyncEngine(SyncEngineConfig(data_dir=tmp_path)) as engine:
        await engine.submit(SyncItem("a", b"x"))
        ran = await asyncio.to_thread(
            subprocess.run, by_hand("get", "a", "--data-dir", str(tmp_path)), capture_output=True, check=False
        )
    assert ran.returncode == 3
    assert ran.stderr.count(b"\n") == 1


def test_a_fault_of_ours_is_exit_code_70_and_shows_its_place_only_when_asked(
    run: Run, here: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(*_: object, **__: object) -> None:
        raise RuntimeError(f"redis://u:{CANARY}@h\nsecond line")

    monkeypatch.setattr(SyncEngine, "get", broken)
    ran = run("get", "a", *here)
    assert (ran.code, ran.err.count("\n")) == (70, 1)
    assert "internal error: RuntimeError" in ran.err
    traced = run("get", "a", "--debug", *here)
    assert "Traceback" in traced.err
    assert CANARY not in ran.err + traced.err


# Settings and secrets


def test_options_win_over_the_environment_and_that_over_the_file(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "c.toml").write_text(
        f'data_dir = "of-file"\nredis_prefix = "of-file:"\nbatch_flush_ms = 7\nredis_url = "{NOBODY}"\n'
    )
    monkeypatch.setenv("SYNC_ENGINE_REDIS_PREFIX", "of-env:")
    monkeypatch.setenv("SYNC_ENGINE_DATA_DIR", "of-env")
    told = run("config", "show", "--json", "--config", tmp_path / "c.toml", "--data-dir", "of-option").json
    assert (told["data_dir"], told["redis_prefix"], told["batch_flush_ms"]) == ("of-option", "of-env:", 7)
    assert told["redis_url"] == "redis://***"


URL_SHAPES = {
    "plain": f"redis://user:{CANARY}@127.0.0.1:1/0",
    "slash": f"redis://user:{CANARY}/x@127.0.0.1:1/0",
    "port": f"redis://user:p@127.0.0.1:{CANARY}",
    "no-scheme": f"user:{CANARY}@127.0.0.1",
    "http": f"http://user:{CANARY}@h/",
    "brackets": f"redis://user:{CANARY}@[::1/0",
    "query": f"redis://127.0.0.1:1/0?password={CANARY}",
}
COMMANDS = (
    ("get", "a"),
    ("scan", ""),
    ("status", "a"),
    ("health",),
    ("config", "show"),
    ("config", "show", "--json"),
    ("demo", "--places", "1"),
)
WRITES = (("put", "a", "--json-value", "1"), ("delete", "a"))  # they wait for a server that is away


@pytest.mark.parametrize("url", URL_SHAPES.values(), ids=URL_SHAPES)
def test_Q20_a_password_in_a_url_is_never_told(
    run: Run, here: tuple[str, str], url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def told(*argv: str) -> str:
        ran = run(*argv)
        return ran.err + ran.out.decode()

    for command in COMMANDS:
        assert CANARY not in told(*command, "--redis-url", url, *here)
        assert CANARY not in told(*command, "--sql-url", url, "--debug", *here)
        assert CANARY not in told(*command, url)
    assert CANARY not in told("get", "--no-such-option", url)
    monkeypatch.setenv("SYNC_ENGINE_SQL_URL", url)
    assert CANARY not in told("get", "a", "--debug", *here)


@pytest.mark.parametrize("command", WRITES, ids=" ".join)
def test_Q20_a_password_is_not_told_by_a_write_that_has_to_wait(
    run: Run, here: tuple[str, str], command: tuple[str, ...]
) -> None:
    ran = run(*command, "--redis-url", NOBODY, "--debug", *here)
    assert CANARY not in ran.err + ran.out.decode()


# As a process


def test_the_module_runs_as_a_command_in_a_c_locale(tmp_path: Path) -> None:
    env = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "TERM": "dumb"}
    ran = subprocess.run(
        by_hand("put", "名前", "--json-value", '"東京"', "--data-dir", str(tmp_path)),
        capture_output=True, check=False, env=env,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert "名前" in ran.stdout.decode()
    ran = subprocess.run(by_hand("get", "名前", "--data-dir", str(tmp_path)), capture_output=True, check=False, env=env)
    assert ran.stdout.decode() == '"東京"'


def test_a_reader_that_has_enough_is_no_failure(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    ran = subprocess.run(
        by_hand("config", "show", "--data-dir", str(tmp_path)), stdout=writing, stderr=subprocess.PIPE, check=False
    )
    os.close(writing)
    assert (ran.returncode, ran.stderr) == (0, b"")


def test_without_arguments_the_help_is_shown(run: Run) -> None:
    ran = run()
    assert ran.code == 2
    assert "Usage: sync-engine" in ran.err
    assert "Exit codes:" in run("--help").out.decode()


# Databases


def test_migrate_makes_the_tables_and_says_so_once(run: Run, tmp_path: Path, sql_url: str) -> None:
    asked = ("migrate", "--data-dir", tmp_path / "data", "--sql-url", sql_url)
    first = run(*asked)
    assert (first.code, first.err) == (0, "")
    assert b"were made" in first.out
    assert b"up to date" in run(*asked).out
    assert run(*asked, "--json").json == {"changed": False, "version": 1}
    assert run("migrate", "--data-dir", tmp_path / "data", "--sql-url", "none", "--redis-url", NOBODY).code == 3


def test_Q20_of_a_databases_url_the_scheme_alone_is_shown(run: Run, here: tuple[str, str]) -> None:
    for scheme in ("mysql", "mariadb", "postgresql", "postgres"):
        url = f"{scheme}://user:{CANARY}@127.0.0.1:1/db"
        shown = run("config", "show", "--json", "--sql-url", url, *here)
        assert shown.json["sql_url"] == f"{scheme}://***"
        failed = run("migrate", "--sql-url", url, *here)
        assert failed.code == 4
        assert CANARY not in failed.err + shown.err
        assert failed.err.count("\n") == 1
