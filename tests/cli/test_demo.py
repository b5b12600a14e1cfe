"""The demo: it runs from end to end, tells the truth, and its comparison sees a single wrong byte."""

from __future__ import annotations

import asyncio
import os
import signal
import sqlite3
import subprocess
import sys
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import redis

from sync_engine import Corruption, SyncEngine, SyncItem
from sync_engine.cli.demo import _lines
from sync_engine.cli.load import Acknowledged, Event, Order, parse
from sync_engine.cli.places import STATES, items_of, load_places, names_by_script
from sync_engine.cli.verify import Comparison, compare, examine
from sync_engine.storage.sql import SqlStore

pytestmark = pytest.mark.slow  # as a whole, and no matter of the Python that runs it

if TYPE_CHECKING:
    from tests.cli.conftest import Run

PLACES = 40


def in_a_process(*argv: str, temporary: Path) -> subprocess.CompletedProcess[bytes]:
    temporary.mkdir()
    env = os.environ | {"TERM": "dumb", "TMPDIR": str(temporary)}
    return subprocess.run(
        [sys.executable, "-m", "sync_engine", "demo", *argv], capture_output=True, env=env, check=False
    )


# From end to end


def test_a_small_demo_is_clean_and_leaves_nothing_behind(run: Run, redis_url: str, tmp_path: Path) -> None:
    prefix = f"{tmp_path.name}:"
    truth = tmp_path / "mine.db"
    ran = run(
        "demo",
        "--places",
        500,
        "--json",
        "--redis-url",
        redis_url,
        "--prefix",
        prefix,
        "--sql-url",
        f"sqlite:///{truth}",
    )
    assert ran.code == 0, ran.err
    told = ran.json
    assert told["verdict"] == {
        "ok": True, "expected": 550, "acknowledged": 550, "differ": 0, "missing": 0, "counts_agree": True,
    }  # fmt: skip
    first, second = told["load"]
    assert (first["killed"], second["killed"]) == (True, False)
    assert first["acknowledged"] >= 275
    assert first["acknowledged"] + second["acknowledged"] == 550
    assert [tier["tier"] for tier in told["tiers"]] == ["L1 memory", "L2 Redis", "L3 SQL"]
    assert {tier["items"] for tier in told["tiers"]} == {550}
    assert len({tier["content_bytes"] for tier in told["tiers"]}) == 1
    assert told["scan"]["prefix"] == "place.JP."
    assert told["scan"]["count"] > 0
    with sqlite3.connect(truth) as file:
        assert file.execute("SELECT count(*) FROM sync_items").fetchone() == (0,)
    file.close()
    client = redis.Redis.from_url(redis_url)
    assert list(client.scan_iter(f"{prefix}*")) == []
    client.close()


def test_the_demo_needs_nothing_and_reads_well_on_a_dumb_terminal(tmp_path: Path) -> None:
    ran = in_a_process("--places", "60", temporary=tmp_path / "t")
    assert ran.returncode == 0, ran.stderr
    text = ran.stdout.decode()
    assert b"\x1b" not in ran.stdout
    assert "kill -9 of the engine process" in text
    assert "operations recovered from the log" in text
    assert "OK: 66 of 66 items acknowledged, 0 differ, 0 missing" in text
    assert ran.stderr == b""
    assert list((tmp_path / "t").iterdir()) == []


def test_a_folder_given_by_name_stays_and_answers_commands(run: Run, tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    assert run("demo", "--places", 20, "--data-dir", kept, "--redis-url", "none").code == 0
    assert run("scan", "place.", "--json", "--data-dir", kept).json["total"] == 20
    again = run("demo", "--places", 20, "--data-dir", kept)
    assert (again.code, "not empty" in again.err) == (3, True)


def test_the_demo_does_not_touch_a_database_that_has_such_items(run: Run, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'mine.db'}"
    run("put", "place.mine", "--json-value", "1", "--sql-url", url, "--data-dir", tmp_path / "d")
    ran = run("demo", "--places", 1, "--sql-url", url)
    assert (ran.code, ran.out) == (3, b"")
    assert run("get", "place.mine", "--sql-url", url, "--data-dir", tmp_path / "d").out == b"1"


def test_the_environment_never_points_the_demo_at_a_store(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SYNC_ENGINE_SQL_URL", f"sqlite:///{tmp_path / 'production.db'}")
    monkeypatch.setenv("SYNC_ENGINE_DATA_DIR", str(tmp_path / "production"))
    assert run("demo", "--places", 1, "--redis-url", "none", "--json").json["verdict"]["ok"]
    assert list(tmp_path.iterdir()) == []


def test_a_terminated_demo_cleans_up(tmp_path: Path) -> None:
    env = os.environ | {"TMPDIR": str(tmp_path), "PYTHONUNBUFFERED": "1"}
    demo = subprocess.Popen(
        [sys.executable, "-m", "sync_engine", "demo", "--places", "3000", "--redis-url", "none"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env,
    )  # fmt: skip
    assert demo.stdout is not None
    assert b"3,000 places" in demo.stdout.readline()
    demo.send_signal(signal.SIGTERM)
    _, said = demo.communicate(timeout=60)
    assert (demo.returncode, b"Traceback" in said) == (130, False)
    assert list(tmp_path.iterdir()) == []


# The comparison


class Ten:
    """Ten items in a data_dir, their acknowledgements, and the truth to tamper with."""

    def __init__(self, data_dir: Path) -> None:
        self.items = list(items_of(load_places(9)))
        self.acks = {item.object_id: Acknowledged(item.object_id, item.content_hash, item.state) for item in self.items}
        self.truth = data_dir / "truth.db"
        self.order = Order(9, str(data_dir), None, "", False, None)

    def tamper(self, statement: str, *values: object) -> None:
        with sqlite3.connect(self.truth) as file:
            assert file.execute(statement, values).rowcount == 1
        file.close()


@pytest.fixture
async def ten(tmp_path: Path) -> Ten:
    made = Ten(tmp_path)
    async with SyncEngine(made.order.config()) as engine:
        await engine.submit_many(made.items)
    return made


async def test_an_untouched_store_passes(ten: Ten) -> None:
    found = await examine(ten.order, ten.acks, 10)
    assert found.passed
    assert [facts.compared.items for facts in found.tiers] == [10, 10]


async def test_one_changed_byte_fails_the_verdict(ten: Ten) -> None:
    binary = ten.items[1]
    changed = bytes([binary.content[0] ^ 1]) + binary.content[1:]
    ten.tamper("UPDATE sync_items SET payload_blob = ? WHERE id = ?", changed, binary.object_id)
    found = await examine(ten.order, ten.acks, 10)
    assert not found.passed
    assert found.tiers[-1].compared == Comparison(9, sum(len(i.content) for i in ten.items) - len(changed), 1, 0)


async def test_a_store_that_agrees_with_itself_and_not_with_the_acknowledgement_fails_the_verdict(ten: Ten) -> None:
    first = ten.items[0]
    async with SyncEngine(ten.order.config()) as engine:
        await engine.submit(first.replace(content=first.content + b" "))
    found = await examine(ten.order, ten.acks, 10)
    assert not found.passed
    assert (found.differ, found.missing) == (2, 0)


async def test_one_missing_item_fails_the_verdict(ten: Ten) -> None:
    ten.tamper("DELETE FROM sync_items WHERE id = ?", ten.items[3].object_id)
    found = await examine(ten.order, ten.acks, 10)
    assert not found.passed
    assert (found.differ, found.missing, found.counts_agree) == (0, 2, False)


async def test_an_item_never_acknowledged_fails_the_verdict(ten: Ten) -> None:
    del ten.acks[ten.items[1].object_id]
    found = await examine(ten.order, ten.acks, 10)
    assert (found.passed, found.differ, found.missing) == (False, 0, 0)


async def test_a_wrong_state_fails_the_verdict(ten: Ten) -> None:
    ten.tamper("UPDATE sync_items SET state = 'village' WHERE id = ?", ten.items[0].object_id)
    found = await examine(ten.order, ten.acks, 10)
    assert (found.passed, found.differ, found.counts_agree) == (False, 0, False)


async def test_a_bad_item_does_not_hide_its_neighbours_from_the_comparison() -> None:
    items = {name: SyncItem(name, name.encode()) for name in "abc"}
    acks = {name: Acknowledged(name, item.content_hash, "default") for name, item in items.items()}

    async def get_many(ids: Sequence[str]) -> Mapping[str, SyncItem]:
        if "b" in ids:
            raise Corruption("b", "", "")
        return {name: items[name] for name in ids}

    assert await compare(acks, get_many) == Comparison(2, 2, 1, 0)


async def test_what_a_killed_process_left_of_its_last_line_is_no_acknowledgement() -> None:
    pipe = asyncio.StreamReader()
    pipe.feed_data(b'+a\t00\thot\n{"name":"loaded"}\n+b\t0')
    pipe.feed_eof()
    told = [parse(line) for lines in [lines async for lines in _lines(pipe)] for line in lines]
    assert told == [Acknowledged("a", "00", "hot"), Event("loaded")]


async def test_what_the_demo_writes_is_what_the_tiers_give_back(ten: Ten) -> None:
    truth = await SqlStore.connect(f"sqlite:///{ten.truth}")
    assert await truth.get_many([item.object_id for item in ten.items]) == {item.object_id: item for item in ten.items}
    await truth.close()


# The input


def test_the_input_is_real_ordered_and_in_many_scripts() -> None:
    places = load_places(PLACES)
    items = list(items_of(places))
    assert len(items) == PLACES + PLACES // 10
    assert len({item.object_id for item in items}) == len(items)
    assert {item.state for item in items} <= set(STATES)
    tokyo = next(item for item in items if item.object_id.startswith("place.JP."))
    assert tokyo.json()["names"]["cjk"] == "東京都"
    names = next(item for item in items if item.object_id.startswith("names."))
    assert "上海" in zlib.decompress(names.content).decode()


def test_one_name_is_shown_per_script() -> None:
    assert names_by_script(["Tokyo", "Tōkyō", "Токио", "Токіо", "東京", "东京"]) == {"cyrillic": "Токіо", "cjk": "东京"}
