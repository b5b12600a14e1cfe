"""Large batches on PostgreSQL, whose rows are copied: what is refused, who may not, and what a lost table leaves."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from urllib.parse import urlsplit, urlunsplit

import pytest

from sync_engine.errors import TierUnavailable
from sync_engine.item import Op, SyncItem
from sync_engine.storage.sql import SqlStore
from sync_engine.storage.sql.connect import database_of
from sync_engine.storage.sql.dialect import RowRefused
from sync_engine.storage.sql.postgresql_words import COPIED, COPIES_FAILED_MAX, COPY_MIN, PostgresqlWords
from sync_engine.storage.sql.words import Said
from sync_engine.testing.databases import RunningDatabase, ask
from sync_engine.testing.proxy import CuttingProxy

MANY = 2_500
"""More than one statement takes."""


@pytest.fixture
async def url(postgres_server: RunningDatabase) -> AsyncIterator[str]:
    url = await postgres_server.database()
    yield url
    await postgres_server.drop(url)


def put(id_: str, stamp: int, content: bytes = b"x", state: str = "default") -> Op:
    return Op(kind="put", object_id=id_, stamp=stamp, item=item(id_, stamp, content, state))


def item(id_: str, stamp: int, content: bytes = b"x", state: str = "default") -> SyncItem:
    return SyncItem(id_, content, updated_at=1, stamp=stamp, state=state)


class CopyCutter(CuttingProxy):
    """While ``cutting``, resets the connection of whoever begins a copy."""

    cutting = True
    begun: asyncio.Barrier | None = None

    async def _up(self, chunk: bytes, sink: socket.socket) -> None:
        if self.cutting and b"COPY " in chunk:
            if self.begun is not None:
                await self.begun.wait()
            raise self._cut()
        await super()._up(chunk, sink)


async def watch_copies(url: str) -> None:
    """Have the server note every statement that takes its rows from the temporary table: how many rows they were."""
    await ask(url, "CREATE TABLE copies (count int8)")
    await ask(
        url,
        "CREATE FUNCTION note() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
        f"IF to_regclass('pg_temp.{COPIED}') IS NOT NULL THEN "
        f"INSERT INTO copies SELECT count(*) FROM pg_temp.{COPIED}; END IF; RETURN NULL; END $$",
    )
    await ask(url, "CREATE TRIGGER note AFTER INSERT ON sync_items FOR EACH STATEMENT EXECUTE FUNCTION note()")


async def copies(url: str) -> list[int]:
    counts = [count for (count,) in await ask(url, "SELECT count FROM copies WHERE count > 0")]
    await ask(url, "DELETE FROM copies")
    return counts


async def refuse(url: str, state: str) -> None:
    """Have the server refuse rows of a state, as a trigger of the users' own would."""
    await ask(url, f"ALTER TABLE sync_items ADD CONSTRAINT never CHECK (state <> '{state}')")


async def forbid(url: str, statement: str) -> None:
    """Have the server run this before it makes any table."""
    await ask(url, f"CREATE FUNCTION forbid() RETURNS event_trigger LANGUAGE plpgsql AS $$ BEGIN {statement}; END $$")
    await ask(
        url, "CREATE EVENT TRIGGER forbid ON ddl_command_start WHEN TAG IN ('CREATE TABLE') EXECUTE FUNCTION forbid()"
    )


async def goes_without(store: SqlStore, caplog: pytest.LogCaptureFixture) -> None:
    """The first try is refused, once, and the next one writes all rows another way."""
    ops = [put(f"a{n:04}", 1) for n in range(MANY)]
    with pytest.raises(TierUnavailable):
        await store.apply(ops)
    assert not (await store.apply(ops)).refused
    assert await store.count() == MANY
    assert caplog.text.count("rows are not copied") == 1


async def test_many_rows_are_copied_and_few_are_not(url: str) -> None:
    store = await SqlStore.connect(url)
    await watch_copies(url)
    await store.apply([put(f"a{n}", 1) for n in range(COPY_MIN - 1)])
    assert await copies(url) == []
    await store.apply([put(f"a{n}", 2, b"%d" % n) for n in range(COPY_MIN)])
    assert await copies(url) == [COPY_MIN]
    ids = ["a0", f"a{COPY_MIN - 1}"]
    assert await store.get_many(ids) == {id_: item(id_, 2, id_[1:].encode()) for id_ in ids}
    await store.apply([put(f"a{n}", 3, bytes(3_000)) for n in range(COPY_MIN)])
    assert await copies(url) == [], "large ones would be compressed twice"
    await store.close()


async def test_each_statement_of_a_transaction_takes_its_own_rows(url: str) -> None:
    store = await SqlStore.connect(url)
    await watch_copies(url)
    ops = [put(f"a{n:04}", n + 1, b"%04d" % n) for n in range(5_000)]
    await store.apply(ops)
    assert await copies(url) == [2_000, 2_000, 1_000]
    assert await store.get_many([op.object_id for op in ops]) == {op.object_id: op.item for op in ops}
    await store.close()


async def test_no_table_outlives_its_transaction(url: str) -> None:
    """The database could forget no transaction since it was made, and would refuse all writes after 2 billion."""
    store = await SqlStore.connect(url)
    for stamp in (1, 2):
        await store.apply([put(f"a{n:04}", stamp) for n in range(MANY)])
        assert await ask(url, f"SELECT count(*) FROM pg_catalog.pg_class WHERE relname = '{COPIED}'") == [(0,)]
    await store.close()


async def test_Q1_of_many_rows_the_newer_stamp_stays(url: str) -> None:
    store = await SqlStore.connect(url)
    await store.apply([put(f"a{n:04}", 5, b"old") for n in range(0, MANY, 2)])
    applied = await store.apply([put(f"a{n:04}", 3 + n % 4 * 2, b"new") for n in range(MANY)])
    assert applied.superseded == {f"a{n:04}" for n in range(0, MANY, 4)}
    found = await store.get_many([f"a{n:04}" for n in range(MANY)])
    assert {int(id_[1:]) for id_, kept in found.items() if kept.content == b"old"} == {*range(0, MANY, 4)}
    assert len(found) == MANY
    await store.close()


async def test_I7_what_is_refused_among_many_stands_alone(url: str) -> None:
    store = await SqlStore.connect(url)
    await refuse(url, "bad")
    bad = {3, MANY // 2, MANY - 1}
    applied = await store.apply([put(f"a{n:04}", 1, state="bad" if n in bad else "good") for n in range(MANY)])
    assert set(applied.refused) == {f"a{n:04}" for n in bad}
    assert await store.count() == MANY - len(bad)
    await store.close()


async def test_what_is_refused_leaves_no_savepoint_open(url: str) -> None:
    """Beyond 64 within each other every other connection takes longer for whatever it reads."""
    store = await SqlStore.connect(url)
    await refuse(url, "bad")
    # Noted by the last statement of the transaction. An open savepoint behind which something was written has a
    # transaction id of its own, and a lock on it.
    await ask(url, "CREATE TABLE open_ids (count int8)")
    await ask(
        url,
        "CREATE FUNCTION note_ids() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN INSERT INTO open_ids SELECT count(*) "
        "FROM pg_locks WHERE pid = pg_backend_pid() AND locktype = 'transactionid'; RETURN NULL; END $$",
    )
    await ask(url, "CREATE TRIGGER note_ids AFTER INSERT OR UPDATE ON sync_meta EXECUTE FUNCTION note_ids()")
    bad = range(0, MANY, MANY // 5)
    applied = await store.apply([put(f"a{n:04}", 1, state="bad" if n in bad else "good") for n in range(MANY)])
    assert len(applied.refused) == len(bad)
    assert await ask(url, "SELECT DISTINCT count FROM open_ids") == [(1,)], "the transaction's own"
    await store.close()


@pytest.mark.parametrize(
    ("at", "value"),
    [(0, "canary\0"), (4, "canary\0"), (0, "canary\ud800"), (1, 2**63), (0, "canary" * 60), (5, "canary")],
)
async def test_I7_a_row_that_cannot_be_copied_is_refused_and_not_quoted(url: str, at: int, value: object) -> None:
    """By the driver in the middle of the copy, or by the server; the connection and the transaction go on."""
    store = await SqlStore.connect(url)
    session = await database_of(url, 5000).open()
    rows = [[f"a{n:04}", 1, 2, "h", None, b"x", None, "s", 0, 0, 1] for n in range(MANY)]
    await session.begin()
    await session.attempt(store._words.upsert(rows[:-COPY_MIN]))  # type: ignore[arg-type]  # as row_of makes them
    bad = [list(row) for row in rows[-COPY_MIN:]]
    bad[COPY_MIN // 2][at] = value
    with pytest.raises(RowRefused) as refused:
        await session.attempt(store._words.upsert(bad))  # type: ignore[arg-type]
    assert "canary" not in str(refused.value)
    assert await session.attempt(store._words.upsert(rows[-COPY_MIN:])) == COPY_MIN  # type: ignore[arg-type]
    await session.commit()
    assert await store.count() == MANY
    await session.close()
    await store.close()


async def test_who_may_make_no_temporary_table_writes_without(postgres_server: RunningDatabase, url: str) -> None:
    await (await SqlStore.connect(url)).close()
    await watch_copies(url)
    parts = urlsplit(url)
    database = parts.path[1:]
    await ask(url, f'REVOKE TEMPORARY ON DATABASE "{database}" FROM PUBLIC')
    user = f"{database}_user"
    await ask(url, f"CREATE ROLE \"{user}\" LOGIN PASSWORD 'secret'")
    try:
        await ask(url, f'GRANT ALL ON ALL TABLES IN SCHEMA public TO "{user}"')
        await ask(url, f'GRANT ALL ON SCHEMA public TO "{user}"')
        place = f"{user}:secret@{parts.hostname}:{parts.port}"
        store = await SqlStore.connect(urlunsplit(parts._replace(netloc=place)))
        ops = [put(f"a{n:04}", 1) for n in range(MANY)]
        assert not (await store.apply(ops)).refused
        assert await store.count() == MANY
        assert await copies(url) == []

        # Granted, and taken away again between the connection's beginning and its first large batch.
        await ask(url, f'GRANT TEMPORARY ON DATABASE "{database}" TO "{user}"')
        other = await SqlStore.connect(urlunsplit(parts._replace(netloc=place)))
        await ask(url, f'REVOKE TEMPORARY ON DATABASE "{database}" FROM "{user}"')
        newer = [put(f"a{n:04}", 2) for n in range(MANY)]
        with pytest.raises(TierUnavailable, match="may not do this"):
            await other.apply(newer)
        assert not (await other.apply(newer)).refused
        assert not any(await copies(url))
        await other.close()
        await store.close()
    finally:
        await ask(url, f'DROP OWNED BY "{user}"')
        await ask(url, f'DROP ROLE "{user}"')


@pytest.mark.parametrize("code", ["42000", "42501", "0A000", "P0001", "55000", "53100", "XX000"])
async def test_where_no_table_can_be_made_the_next_try_is_without(
    url: str, code: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever stands in the way, such as a rule of the users' that nobody changes a schema."""
    store = await SqlStore.connect(url)
    await forbid(url, f"RAISE EXCEPTION 'frozen' USING ERRCODE = '{code}'")
    await goes_without(store, caplog)
    await store.close()


async def test_a_server_that_knows_no_copy_is_asked_once(url: str, caplog: pytest.LogCaptureFixture) -> None:
    """As some that speak PostgreSQL's protocol: here the table to copy into is one that nothing can be copied into."""
    store = await SqlStore.connect(url)
    await ask(
        url,
        "CREATE FUNCTION instead() RETURNS event_trigger LANGUAGE plpgsql AS $$ BEGIN "
        f"IF to_regclass('pg_temp.{COPIED}') IS NOT NULL THEN DROP TABLE pg_temp.{COPIED}; "
        f"CREATE TEMPORARY VIEW {COPIED} AS SELECT {PostgresqlWords.columns} FROM sync_items; END IF; END $$",
    )
    await ask(
        url, "CREATE EVENT TRIGGER instead ON ddl_command_end WHEN TAG IN ('CREATE TABLE') EXECUTE FUNCTION instead()"
    )
    await goes_without(store, caplog)
    await store.close()


@pytest.mark.parametrize("code", ["25006", "57014", "55P03", "57P01"])
async def test_what_any_statement_would_meet_leaves_copying_on(
    url: str, code: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A server that takes no writes, a time-out: ten minutes of slower writes made it no better."""
    store = await SqlStore.connect(url)
    await watch_copies(url)
    await forbid(url, f"RAISE EXCEPTION 'not now' USING ERRCODE = '{code}'")
    ops = [put(f"a{n:04}", 1) for n in range(COPY_MIN)]
    with pytest.raises(TierUnavailable, match=code):
        await store.apply(ops)
    await ask(url, "DROP EVENT TRIGGER forbid")
    assert not (await store.apply(ops)).refused
    assert await copies(url) == [COPY_MIN]
    assert "rows are not copied" not in caplog.text
    await store.close()


async def test_a_lock_that_was_not_to_be_had_in_time_leaves_copying_on(url: str) -> None:
    store = await SqlStore.connect(url, timeout_ms=200)
    await watch_copies(url)
    await ask(url, "CREATE TABLE gate ()")
    await forbid(url, "LOCK TABLE gate")
    keeper = await database_of(url, 5000).open()
    await keeper.begin()
    await keeper.run(Said("LOCK TABLE gate"))
    ops = [put(f"a{n:04}", 1) for n in range(COPY_MIN)]
    with pytest.raises(TierUnavailable, match="not to be had in time"):
        await store.apply(ops)
    await keeper.close()
    assert not (await store.apply(ops)).refused
    assert await copies(url) == [COPY_MIN]
    await store.close()


async def test_where_connections_do_not_survive_a_copy_it_is_given_up(
    url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """As behind a pooler that does not know it. The next tries were all cut alike, and no large batch passed."""
    async with CopyCutter(url) as proxy:
        store = await SqlStore.connect(proxy.url_for(url))
        ops = [put(f"a{n:04}", 1) for n in range(MANY)]
        for _ in range(COPIES_FAILED_MAX):
            with pytest.raises(TierUnavailable):
                await store.apply(ops)
        assert not (await store.apply(ops)).refused
        assert await store.count() == MANY
        assert proxy.cuts == COPIES_FAILED_MAX
        assert caplog.text.count("rows are not copied") == 1
        await store.close()


async def test_where_a_copy_is_never_done_in_time_it_is_given_up(url: str, caplog: pytest.LogCaptureFixture) -> None:
    store = await SqlStore.connect(url)
    await forbid(url, "RAISE EXCEPTION 'too slow' USING ERRCODE = '57014'")
    ops = [put(f"a{n:04}", 1) for n in range(COPY_MIN)]
    for _ in range(COPIES_FAILED_MAX):
        with pytest.raises(TierUnavailable, match="57014"):
            await store.apply(ops)
    assert not (await store.apply(ops)).refused
    assert caplog.text.count("rows are not copied") == 1
    await store.close()


async def test_a_copy_that_passes_lets_those_before_it_be_forgotten(url: str) -> None:
    async with CopyCutter(url) as proxy:
        store = await SqlStore.connect(proxy.url_for(url))
        await watch_copies(url)
        ops = [put(f"a{n:04}", 1) for n in range(COPY_MIN)]
        for _ in range(3):
            proxy.cutting = True
            for _ in range(COPIES_FAILED_MAX - 1):
                with pytest.raises(TierUnavailable):
                    await store.apply(ops)
            proxy.cutting = False
            assert not (await store.apply(ops)).refused
            assert await copies(url) == [COPY_MIN]
        await store.close()


async def test_copies_that_fail_together_leave_copying_on(url: str) -> None:
    """A server that is restarted ends those of every writer at once."""
    async with CopyCutter(url) as proxy:
        store = await SqlStore.connect(proxy.url_for(url), write_concurrency=COPIES_FAILED_MAX)
        await watch_copies(url)
        ops = [put(f"a{n:04}", 1) for n in range(4_000)]
        # Only then are they cut, all of them.
        proxy.begun = asyncio.Barrier(COPIES_FAILED_MAX)
        with pytest.raises(TierUnavailable):
            await store.apply(ops)
        assert proxy.cuts == COPIES_FAILED_MAX
        proxy.cutting = False
        assert not (await store.apply(ops)).refused
        assert sum(await copies(url)) == len(ops)
        await store.close()


@pytest.mark.parametrize("after_bytes", [500, 50_000])
async def test_a_connection_lost_within_a_copy_leaves_copying_on(url: str, after_bytes: int) -> None:
    async with CuttingProxy(url) as proxy:
        store = await SqlStore.connect(proxy.url_for(url))
        await watch_copies(url)
        ops = [put(f"a{n:04}", 1, bytes(100)) for n in range(COPY_MIN)]
        await store.count()
        proxy.cut_after_request_bytes(after_bytes)
        with pytest.raises(TierUnavailable):
            await store.apply(ops)
        assert proxy.cuts == 1
        assert not (await store.apply(ops)).refused
        assert await copies(url) == [COPY_MIN]
        await store.close()


async def test_a_table_made_in_a_transaction_that_was_undone_is_made_again(url: str) -> None:
    store = await SqlStore.connect(url)
    ops = [put(f"a{n:04}", 1) for n in range(MANY)]
    # The last statement of a transaction notes its newest stamp: it fails with the rows and the table already made.
    await ask(
        url,
        "CREATE FUNCTION fail() RETURNS trigger LANGUAGE plpgsql AS "
        "$$ BEGIN RAISE EXCEPTION 'no' USING ERRCODE = '53100'; END $$",
    )
    await ask(url, "CREATE TRIGGER fail BEFORE INSERT OR UPDATE ON sync_meta EXECUTE FUNCTION fail()")
    with pytest.raises(TierUnavailable, match="out of resources"):
        await store.apply(ops)
    assert await store.count() == 0
    await ask(url, "DROP TRIGGER fail ON sync_meta")
    assert not (await store.apply(ops)).refused
    assert await store.count() == MANY
    await store.close()
