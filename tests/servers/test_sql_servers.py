"""SqlStore and a database server: addresses, settings, TLS, connections that are lost, packets that are too large."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from urllib.parse import quote

import pytest

from sync_engine.errors import ConfigError, StoreError, TierUnavailable
from sync_engine.item import Op, SyncItem
from sync_engine.storage.sql import SqlStore
from sync_engine.storage.sql.connect import database_of
from sync_engine.storage.sql.words import Said
from sync_engine.testing.contract import put
from sync_engine.testing.databases import PASSWORD, RunningDatabase, RunningMariaDB, ask
from sync_engine.testing.fixtures import StartDatabase
from sync_engine.testing.servers import tls_files

KINDS = ("mariadb", "postgresql")


@pytest.fixture(params=KINDS)
def server(request: pytest.FixtureRequest) -> RunningDatabase:
    """The session's server of each kind."""
    fixture = "mariadb_server" if request.param == "mariadb" else "postgres_server"
    running: RunningDatabase = request.getfixturevalue(fixture)
    return running


@pytest.fixture
async def url(server: RunningDatabase) -> AsyncIterator[str]:
    url = await server.database()
    yield url
    await server.drop(url)


async def connections(url: str) -> int:
    """How many there are to this database, besides the one that asks."""
    if url.startswith("postgres"):
        asked = "SELECT count(*) - 1 FROM pg_stat_activity WHERE datname = current_database()"
    else:
        asked = "SELECT count(*) - 1 FROM information_schema.processlist WHERE db = database()"
    return int((await ask(url, asked))[0][0])


async def settled(url: str, most: int) -> int:
    """The number of connections, once the server has noticed which are gone."""
    for _ in range(500):
        if (count := await connections(url)) <= most:
            break
        await asyncio.sleep(0.02)
    return count


# Where it is, and who asks.


async def test_a_unix_socket_will_do(server: RunningDatabase, url: str) -> None:
    store = await SqlStore.connect(server.socket_url(url.rpartition("/")[2]))
    await store.put(SyncItem("a", b"x"))
    assert await store.exists("a")
    await store.close()


@pytest.mark.parametrize(
    "url",
    [
        "mysql://root:s3cret@host",
        "mysql://root:s3cret@host:bad/db",
        "mysql://root:s3cret@host/db?ssl_ca=/s3cret.pem",
        "mysql://root:s3cret@host/db?s3cret=1",
        "mariadb://root:s3cret@host/db?ssl=s3cret",
        "postgres://root:s3cret@[host/db",
        "postgresql://root:s3cret@host/db?sslmode=s3cret",
        "postgresql://root:s3cret@host/db?sslmode=require&sslrootcert=/s3cret.pem",
        "postgresql://root:s3cret@host/db#s3cret",
        "postgresql://root:s3cret@host/db?a=s3cret&a=b",
        "postgresql://root:s3cret@/",
    ],
)
async def test_Q20_a_url_that_cannot_be_understood_is_refused_without_being_quoted(url: str) -> None:
    with pytest.raises(ConfigError, match="sql_url") as refused:
        await SqlStore.connect(url)
    assert "s3cret" not in f"{refused.value!r} {refused.value.__cause__!r}"


async def test_Q20_who_is_refused_or_finds_nobody_is_told_so_without_the_password(server: RunningDatabase) -> None:
    secret = quote(PASSWORD, safe="")
    for url in (
        server.url("nowhere"),
        server.url().replace(secret, "s3cret"),
        server.url().replace(str(server.port), "1"),
        server.url().replace("ada:", "eve:"),
        server.url().replace("127.0.0.1", "s3cret.invalid"),
    ):
        with pytest.raises(TierUnavailable) as refused:
            await SqlStore.connect(url)
        told = f"{refused.value} {refused.value!r}"
        for canary in ("s3cret", secret, PASSWORD):
            assert canary not in told


@pytest.mark.parametrize(
    ("scheme", "driver", "extra"), [("mysql", "asyncmy", "mysql"), ("postgres", "asyncpg", "postgresql")]
)
async def test_a_missing_driver_is_named_with_the_extra(
    scheme: str, driver: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, driver, None)
    with pytest.raises(ConfigError, match=rf"{driver}.*pip install 'sync-engine\[{extra}\]'"):
        await SqlStore.connect(f"{scheme}://u:p@127.0.0.1/db")


async def test_tls_is_verified_as_the_url_says(own_database: StartDatabase, tmp_path: Path) -> None:
    ours, others = tmp_path / "ours", tmp_path / "others"
    ours.mkdir()
    others.mkdir()
    files, foreign = tls_files(ours), tls_files(others)
    named = tmp_path / "named"
    named.mkdir()
    for kind in KINDS:
        server = await own_database(kind, tls=files)
        name = (await server.database()).rpartition("/")[2]
        if kind == "mariadb":
            good = f"ssl_ca={quote(str(files.ca))}"
            bad = [f"ssl_ca={quote(str(foreign.ca))}", "ssl=true"]
            lax = "ssl=true&ssl_verify_cert=false"
            asked = "SHOW SESSION STATUS LIKE 'Ssl_cipher'"
        else:
            good = f"sslmode=verify-full&sslrootcert={quote(str(files.ca))}"
            bad = [f"sslmode=verify-ca&sslrootcert={quote(str(foreign.ca))}", "sslmode=verify-full"]
            lax = "sslmode=require"
            asked = "SELECT 'x', version FROM pg_stat_ssl WHERE pid = pg_backend_pid() AND ssl"
        for options in (good, lax):
            store = await SqlStore.connect(server.url(name, options=options))
            ((_, cipher),) = await store._rows(Said(asked))
            assert cipher
            await store.put(SyncItem("a", b"x" * 100_000))
            item = await store.get("a")
            assert item is not None
            assert item.size > 100_000
            await store.close()
        for options in bad:
            with pytest.raises(TierUnavailable, match="TLS"):
                await SqlStore.connect(server.url(name, options=options))
        await server.stop()


# Settings.


async def test_Q11_the_settings_hold_on_every_connection_and_after_it_was_lost(url: str) -> None:
    """The original set its isolation on one of twenty pooled connections."""
    store = await SqlStore.connect(url, timeout_ms=2500)
    for _ in range(2):
        sessions = [await lane.session() for lane in (*store._writers, *store._readers)]
        assert len(set(sessions)) > 2
        for session in sessions:
            if url.startswith("mysql"):
                held = dict(await session.rows(Said("SHOW SESSION VARIABLES")))
                assert "STRICT_ALL_TABLES" in held["sql_mode"]
                assert held["time_zone"] == "+00:00"
                assert held["tx_isolation"] == "READ-COMMITTED"
                assert held["innodb_lock_wait_timeout"] == "3"
                assert held["character_set_client"] == held["character_set_connection"] == "utf8mb4"
                assert held["collation_connection"] == "utf8mb4_nopad_bin"
            else:
                names = "lock_timeout statement_timeout synchronous_commit client_encoding transaction_isolation"
                told = [(await session.rows(Said(f"SHOW {name}")))[0][0] for name in names.split()]
                assert told == ["2500ms", "10s", "on", "UTF8", "read committed"]
            session._give_up()  # type: ignore[attr-defined]  # of a session over a network
    await store.close()


async def test_a_database_that_does_not_store_utf8_is_refused(postgres_server: RunningDatabase) -> None:
    await ask(postgres_server.url(), "CREATE DATABASE latin TEMPLATE template0 ENCODING 'LATIN1' LOCALE 'C'")
    with pytest.raises(StoreError, match="LATIN1"):
        await SqlStore.connect(postgres_server.url("latin"))
    await postgres_server.drop(postgres_server.url("latin"))


# Connections come and go.


async def test_a_server_that_was_restarted_is_used_again_without_a_word(own_database: StartDatabase) -> None:
    for kind in KINDS:
        server = await own_database(kind)
        url = await server.database()
        store = await SqlStore.connect(url)
        await store.apply([put("a", 1)])
        assert await asyncio.gather(*[store.exists("a") for _ in range(9)]) == [True] * 9
        for stamp in (2, 3):
            await server.restart()
            if stamp == 2:
                await store.apply([put("a", stamp)])  # the write is the first to notice
            assert await asyncio.gather(*[store.exists("a") for _ in range(9)]) == [True] * 9
            await store.apply([put("a", stamp)])
        assert await settled(url, 3) <= 3
        await store.close()
        assert await settled(url, 0) == 0
        await server.stop()


async def test_I3_a_server_killed_at_any_moment_loses_no_batch_and_shows_no_half(own_database: StartDatabase) -> None:
    """Mid-statement, mid-commit, between two: what apply has said is there, and what it has not is whole or absent."""
    for kind in KINDS:
        server = await own_database(kind, durable=True)
        store = await SqlStore.connect(await server.database(), timeout_ms=1000)
        stamp = done = 0
        for number in range(5):
            killed = asyncio.create_task(_killed_after(server, 0.03 + 0.04 * number))
            try:
                while True:
                    stamp += 1
                    await store.apply([put(f"a{n:03}", stamp, b"%d" % stamp) for n in range(600)])
                    done = stamp
            except TierUnavailable:
                await killed
            with pytest.raises(TierUnavailable):
                await store.get("a000")
            await server.start()
            items = await store.scan_prefix("a", 700)
            assert len(items) in ((0, 600) if done == 0 else (600,))
            assert len({item.stamp for item in items}) <= 1, "half a batch is visible"
            if items:
                assert stamp >= items[0].stamp >= done
                assert await store.newest_stamp() == items[0].stamp
            await store.apply([put(f"a{n:03}", stamp, b"%d" % stamp) for n in range(600)])  # again is safe
            assert {item.stamp for item in await store.scan_prefix("a", 700)} == {stamp}
            done = stamp
        await store.close()
        await server.stop()


async def _killed_after(server: RunningDatabase, seconds: float) -> None:
    await asyncio.sleep(seconds)
    await server.kill()


async def test_connections_that_are_cut_one_by_one_are_made_again(server: RunningDatabase, url: str) -> None:
    store = await SqlStore.connect(url)
    await store.apply([put("a", 1)])
    for _ in range(5):
        await asyncio.gather(*[store.exists("a") for _ in range(5)])
        if url.startswith("mysql"):
            asked = "SELECT id FROM information_schema.processlist WHERE db = database() AND id <> connection_id()"
            for (id_,) in await ask(url, asked):
                await ask(url, f"KILL {id_}")
        else:
            told = "pid <> pg_backend_pid() AND datname = current_database()"
            await ask(url, f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE {told}")
        assert await asyncio.gather(*[store.exists("a") for _ in range(5)]) == [True] * 5
        await store.apply([put("a", 1)])
    assert await settled(url, 3) <= 3
    await store.close()


@pytest.mark.slow
async def test_a_server_that_stands_still_is_unavailable_and_comes_back(own_database: StartDatabase) -> None:
    for kind in KINDS:
        server = await own_database(kind)
        store = await SqlStore.connect(await server.database(), timeout_ms=100)
        await store.apply([put("a", 1)])
        assert await store.exists("a")
        await server.pause()
        calls = [store.get("a"), store.get("a"), store.apply([put("a", 2)]), store.count()]
        answers = await asyncio.gather(*calls, return_exceptions=True)
        assert [type(answer) for answer in answers] == [TierUnavailable] * 4, answers
        await server.resume()
        await store.apply([put("a", 3)])
        item = await store.get("a")
        assert item is not None
        assert item.stamp == 3
        await store.close()
        await server.stop()


async def test_a_cancelled_caller_costs_no_connection_and_gets_nobody_elses_answer(url: str) -> None:
    store = await SqlStore.connect(url)
    ids = [f"a{number}" for number in range(50)]
    await store.apply([put(id_, 1, id_.encode()) for id_ in ids])
    await asyncio.gather(*[store.exists("a1") for _ in range(5)])
    before = {id(await lane.session()) for lane in (*store._writers, *store._readers)}
    for number in range(300):
        work = (
            store.get(ids[number % 50])
            if number % 3
            else store.apply([put(ids[number % 50], 1, ids[number % 50].encode())])
        )
        task: asyncio.Task[object] = asyncio.create_task(work)
        await asyncio.sleep(0 if number % 2 else number / 100_000)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        item = await store.get(ids[(number + 7) % 50])
        assert item is not None
        assert item.content.decode() == ids[(number + 7) % 50]
    assert {id(await lane.session()) for lane in (*store._writers, *store._readers)} == before
    assert await connections(url) <= 3
    await store.close()
    assert await settled(url, 0) == 0


async def test_a_connect_that_is_cancelled_leaves_no_connection(url: str) -> None:
    await (await SqlStore.connect(url)).close()
    for number in range(40):
        task = asyncio.create_task(SqlStore.connect(url))
        await asyncio.sleep(number / 2000)
        task.cancel()
        for store in await asyncio.gather(task, return_exceptions=True):
            if isinstance(store, SqlStore):
                await store.close()
    assert await settled(url, 0) == 0


# What does not fit.


async def test_Q9_I7_an_item_larger_than_a_packet_stands_alone(own_database: StartDatabase) -> None:
    """The server closes the connection of whoever sends more; in the original that failed the group, over and over."""
    server = await own_database("mariadb", settings=["--max-allowed-packet=4M"])
    store = await SqlStore.connect(await server.database())
    ops = [put(f"a{n:03}", 1, bytes(40_000)) for n in range(300)] + [put("large", 1, bytes(5_000_000))]
    applied = await store.apply(ops)
    assert set(applied.refused) == {"large"}
    assert "max_allowed_packet" in str(applied.refused["large"])
    assert await store.count() == 300
    await store.close()
    await server.stop()


async def test_contents_beyond_the_protocols_own_packets_come_back(own_database: StartDatabase) -> None:
    """16 MiB is where MySQL cuts its packets, and what the original's MEDIUMBLOB ends at."""
    for kind, settings in (("mariadb", ["--max-allowed-packet=128M"]), ("postgresql", [])):
        server = await own_database(kind, settings=settings)
        store = await SqlStore.connect(await server.database(), timeout_ms=20_000)
        items = [SyncItem("b", bytes(range(256)) * 80_000), SyncItem("j", b'"' + b"a" * 17_000_000 + b'"')]
        for item in items:
            await store.put(item)
            assert await store.get(item.object_id) == item
        await store.close()
        await server.stop()


async def test_I7_values_that_a_column_cannot_hold_are_refused_and_not_quoted(url: str) -> None:
    session = await database_of(url, 5000).open()
    store = await SqlStore.connect(url)
    words = store._words
    row = ["a", 1, 2, "h", None, b"x", None, "s", 0, 0, 1]
    hostile: list[tuple[int, object]] = [(0, "canary" * 60), (7, "canary" * 9), (3, "canary" * 20)]
    if url.startswith("postgres"):
        hostile += [(0, "canary\0"), (4, "canary\0"), (1, 2**63), (0, "canary\ud800")]
    for at, value in hostile:
        bad = [*row[:at], value, *row[at + 1 :]]
        await session.begin()
        await session.attempt(words.upsert([row]))  # type: ignore[list-item]  # a row as row_of makes them
        with pytest.raises(StoreError) as refused:
            await session.attempt(words.upsert([bad]))  # type: ignore[list-item]
        assert type(refused.value).__name__ == "RowRefused", (at, refused.value)
        assert "canary" not in str(refused.value)
        await session.commit()
        assert await store.exists("a"), "the rest of the transaction went through"
        await store.delete("a")
    await session.close()
    await store.close()


async def test_a_table_that_is_missing_is_a_trouble_of_the_server_and_refuses_no_item(url: str) -> None:
    """Were it a refusal, everything in the log would end in the quarantine, one by one."""
    store = await SqlStore.connect(url)
    await ask(url, "ALTER TABLE sync_items RENAME TO elsewhere")
    with pytest.raises(TierUnavailable, match="table is missing"):
        await store.apply([put("a", 1)])
    with pytest.raises(TierUnavailable, match="table is missing"):
        await store.get("a")
    await ask(url, "ALTER TABLE elsewhere RENAME TO sync_items")
    await store.apply([put("a", 1)])
    assert await store.exists("a")
    await store.close()


async def test_a_lock_that_is_not_to_be_had_is_unavailable_and_passes(url: str) -> None:
    store = await SqlStore.connect(url, timeout_ms=1000)
    await store.apply([put("a", 1)])
    session = await database_of(url, 5000).open()
    await session.begin()
    await session.lock(range(64))
    with pytest.raises(TierUnavailable, match="lock"):
        await store.apply([put("a", 2)])
    assert await store.exists("a")  # reads wait for nobody
    await session.rollback()
    await session.close()
    await store.apply([put("a", 2)])
    await store.close()


async def test_Q17_every_query_goes_through_an_index(server: RunningDatabase, url: str) -> None:
    store = await SqlStore.connect(url)
    await store.apply([put(f"i{n:05}", n + 1) for n in range(3000)])
    await store.apply([Op(kind="delete", object_id=f"j{n:05}", stamp=n + 1) for n in range(3000)])
    await ask(url, "ANALYZE TABLE sync_items" if isinstance(server, RunningMariaDB) else "ANALYZE")
    words = store._words
    asked = [
        words.range((False, True), ("i00100", "i00101"), 10),
        words.range((True, True), ("i00100", "i00101"), 10),
        words.range((True, False), ("i00100",), 10),
        words.count_range((False, True), ("i00100", "i00101")),
        words.in_state("default", "i02000", 10),
        words.ids_in_state("default", "i02000", 10),
        words.fetch(["i00001", "i00002"]),
        words.held(["i00001", "i00002"]),
        words.delete(["i00001", "i00002"]),
        words.buried(["j00001", "j00002"]),
        words.changed(2000, "i", 10),
    ]
    session = await store._readers[0].session()
    for said in asked:
        plan = await session.rows(Said("EXPLAIN " + said.text, said.values))
        if isinstance(server, RunningMariaDB):
            steps = [row for row in plan if row[2] not in (None, "<union2,3>", "<union1,2>")]
            assert all(row[3] != "ALL" and row[5] for row in steps), (said.text, plan)
        else:
            assert "Seq Scan" not in str(plan), (said.text, plan)
        assert "LIKE" not in said.text
        assert "OFFSET" not in said.text
    await store.close()
