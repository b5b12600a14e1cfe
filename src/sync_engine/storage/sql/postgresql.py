"""PostgreSQL through asyncpg: the settings of every connection, one statement at a time, what its errors mean."""

from __future__ import annotations

import ssl
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Final

from sqlalchemy import Table
from sqlalchemy.dialects import postgresql
from sqlalchemy.engine import Dialect

from sync_engine.errors import ConfigError, StoreError, SyncEngineError, TierUnavailable
from sync_engine.storage.sql import tables
from sync_engine.storage.sql.address import Address, tls_context
from sync_engine.storage.sql.dialect import BUCKETS, Held, RowRefused, Session, beside, nothing
from sync_engine.storage.sql.network import Limits, NetworkSession
from sync_engine.storage.sql.postgresql_errors import at_connect, meaning, of_the_moment
from sync_engine.storage.sql.postgresql_words import COPIED, EMPTY_COPIED, MAKE_COPIED, Copying, PostgresqlWords
from sync_engine.storage.sql.rows import Row, Value
from sync_engine.storage.sql.words import Said

__all__ = ["Postgresql"]

OPTIONS: Final = ("host", "sslmode", "sslrootcert", "sslcert", "sslkey")

LOCK_SPACE: Final = 0x53594E43
"""First half of our advisory locks ("SYNC"); the second is the bucket, or this for migrations."""
MIGRATING: Final = 1 << 20

LOCK: Final = "SELECT pg_advisory_xact_lock($1, bucket) FROM unnest($2::int4[]) AS bucket"
# Array order is kept: one scan, no join, nothing to sort.

NAMES: Final = """\
SELECT tablename FROM pg_catalog.pg_tables WHERE schemaname = current_schema()
UNION ALL SELECT indexname FROM pg_catalog.pg_indexes WHERE schemaname = current_schema()"""

COLUMNS: Final = """\
SELECT a.attname, coalesce(a.attnum = ANY (i.indkey), false), c.collname
FROM pg_catalog.pg_attribute a
JOIN pg_catalog.pg_class t ON t.oid = a.attrelid
JOIN pg_catalog.pg_namespace n ON n.oid = t.relnamespace AND n.nspname = current_schema()
LEFT JOIN pg_catalog.pg_index i ON i.indrelid = t.oid AND i.indisprimary
LEFT JOIN pg_catalog.pg_collation c ON c.oid = a.attcollation
WHERE t.relname = $1 AND t.relkind IN ('r', 'p') AND a.attnum > 0 AND NOT a.attisdropped
ORDER BY a.attnum"""

SERVER: Final = "SELECT current_setting('server_encoding'), has_database_privilege(current_database(), 'TEMPORARY')"

SETTING: Final = "SELECT current_setting(name) FROM unnest($1::text[]) AS name"


class Postgresql:
    """A database of a PostgreSQL server."""

    dialect: Dialect = postgresql.dialect()  # type: ignore[no-untyped-call]  # SQLAlchemy's own
    owned_tables: Sequence[Table] = tuple(tables.metadata.sorted_tables)
    one_writer = False

    def __init__(self, address: Address, timeout_ms: int) -> None:
        self._driver = _driver()
        self._limits = Limits(timeout_ms)
        address.allow(OPTIONS)
        self._asked = {
            "host": address.options.get("host") or address.host,
            "port": address.port,
            "user": address.user,
            "password": address.password,
            "database": address.database,
            "ssl": _tls(address.options),
        }
        self._settings = {
            "application_name": "sync-engine",
            "client_encoding": "UTF8",
            "TimeZone": "UTC",
            "lock_timeout": f"{self._limits.lock_ms}ms",
            "statement_timeout": f"{self._limits.statement_ms}ms",
            # A transaction of ours never waits for us; one that does belongs to a process that stands still.
            "idle_in_transaction_session_timeout": f"{self._limits.statement_ms}ms",
            "synchronous_commit": "on",  # the log forgets what was committed here, so it must survive a power loss
            "default_transaction_isolation": "read committed",
            "default_transaction_read_only": "off",
            "standard_conforming_strings": "on",
            "bytea_output": "hex",
        }
        self._copying = Copying()

    def words(self, *tables: str) -> PostgresqlWords:
        """The statements about tables of items."""
        return PostgresqlWords(self._copying, *tables)

    async def open(self) -> PostgresqlSession:
        """A new connection with its settings made and read back."""
        try:
            connection = await self._driver.connect(
                **self._asked, server_settings=self._settings, timeout=self._limits.connect_s, statement_cache_size=100
            )
        except Exception as error:
            raise at_connect(self._driver, error) from error
        session = PostgresqlSession(connection, self._driver, self._limits, self._copying)
        try:
            await self._check(session)
        except BaseException:  # cancelled or failed alike: nobody else would close it
            await session.close()
            raise
        return session

    async def _check(self, session: PostgresqlSession) -> None:
        wanted = {name: value for name, value in self._settings.items() if name != "application_name"}
        held = await session.rows(Said(SETTING, (list(wanted),)))
        for (name, value), (kept,) in zip(wanted.items(), held, strict=True):
            if not _same(value, kept):
                raise StoreError("l3", f"PostgreSQL keeps {name} at {kept!r} where {value!r} is needed")
        ((encoding, self._copying.allowed),) = await session.rows(Said(SERVER))
        if encoding != "UTF8":
            raise StoreError("l3", f"the database stores text as {encoding}; ids are ordered as UTF-8")

    async def names(self, session: Session) -> set[str]:
        """Names of the tables and indexes that there are."""
        return {name for (name,) in await session.rows(Said(NAMES))}

    async def columns(self, session: Session, table: str) -> list[Held]:
        """The columns of a table."""
        return [Held(*row) for row in await session.rows(Said(COLUMNS, (table,)))]

    def options(self, table: Table) -> str:
        """Nothing stands behind CREATE TABLE (...)."""
        return ""

    async def adapt(self, session: Session, table: Table) -> None:
        """Make a table that was here before compare its texts by bytes."""
        held = {column.name: column for column in await self.columns(session, table.name)}
        for column in table.c:
            wanted = column.type.dialect_impl(self.dialect)
            if getattr(wanted, "collation", None) and held[column.name].collation not in ("C", None):
                kind = wanted.compile(self.dialect)
                await session.run(Said(f"ALTER TABLE {table.name} ALTER COLUMN {column.name} TYPE {kind}"))

    async def close(self) -> None:
        """There is nothing that sessions share."""

    def __repr__(self) -> str:
        return "postgresql"


class PostgresqlSession(NetworkSession):
    """One connection."""

    bytes_max = 4 * 1024 * 1024

    def __init__(self, connection: Any, driver: Any, limits: Limits, copying: Copying) -> None:
        super().__init__(limits)
        self._connection = connection
        self._driver = driver
        self._copying = copying
        self._made_copied = False

    async def rows(self, said: Said) -> list[Row]:
        """Run one statement; all its rows."""

        async def work() -> list[Row]:
            return list(map(tuple, await self._connection.fetch(said.text, *said.values)))

        return await self._whole(work)

    async def run(self, said: Said) -> int:
        """Run one statement that changes rows; how many it changed."""
        return await self._change(said, nothing)

    async def attempt(self, said: Said, meanwhile: Callable[[], Awaitable[None]] = nothing) -> int:
        """The same behind a savepoint: an error would otherwise end the whole transaction."""
        made = self._made_copied
        await (self._ready_to_copy() if said.copied else self._say("SAVEPOINT here"))
        try:
            if said.copied:
                await self._copy(said.copied)
            changed = await self._change(said, meanwhile)
        except RowRefused:
            # The first alone would leave it open, and the next one would be made within it.
            await self._say("ROLLBACK TO SAVEPOINT here; RELEASE SAVEPOINT here")
            self._made_copied = made
            raise
        await self._say("RELEASE SAVEPOINT here")
        return changed

    async def begin(self) -> None:
        """Open a transaction."""
        await self._say("BEGIN")
        self._in_transaction = True
        self._made_copied = False

    async def lock(self, buckets: Sequence[int]) -> None:
        """Be the only writer of these buckets."""
        await self.rows(Said(LOCK, (LOCK_SPACE, buckets)))

    async def commit(self) -> None:
        """Make the transaction durable."""
        await self._say("COMMIT")
        self._in_transaction = False

    async def _undo(self) -> None:
        await self._say("ROLLBACK")

    async def _change(self, said: Said, meanwhile: Callable[[], Awaitable[None]]) -> int:
        async def work() -> int:
            told = await beside(self._connection.execute(said.text, *said.values), meanwhile)
            status = told.rpartition(" ")[2]
            return int(status) if status.isdigit() else 0

        return await self._whole(work)

    async def _ready_to_copy(self) -> None:
        failures = self._copying.failures
        try:
            await self._say("SAVEPOINT here; " + (EMPTY_COPIED if self._made_copied else MAKE_COPIED))
        except SyncEngineError as failed:  # by whatever rule of the users': it is not what is wrong with the rows
            self._copy_failed(failed, failures)
            raise
        self._made_copied = True

    async def _copy(self, rows: Sequence[Sequence[Value]]) -> None:
        async def work() -> None:
            try:
                await self._connection.copy_records_to_table(COPIED, schema_name="pg_temp", records=rows)
            except (OverflowError, TypeError) as unfit:
                raise RowRefused("l3", "a value does not fit its column") from unfit

        failures = self._copying.failures
        try:
            await self._whole(work)
        except RowRefused:
            raise
        except SyncEngineError as failed:
            self._copy_failed(failed, failures)
            raise
        self._copying.passed()

    def _copy_failed(self, failed: SyncEngineError, failures: int) -> None:
        """Have the next try do without a copy, if it is that which cannot be done."""
        why = failed.reason if isinstance(failed, StoreError | TierUnavailable) else str(failed)
        if self.broken or of_the_moment(failed):
            self._copying.met(why, failures)
            return
        self._copying.failed(why)
        raise TierUnavailable("l3", why) from failed

    async def begin_migration(self) -> None:
        """A transaction that no other migration shares, nor any writer: both would wait for the other's tables."""
        await self.begin()
        await self.lock([*range(BUCKETS), MIGRATING])
        await self._say("SET LOCAL statement_timeout = 0")
        self._patient = True

    async def end_migration(self, done: bool) -> None:
        """Keep or undo what was made."""
        self._patient = False
        await (self.commit() if done else self.rollback())

    async def _say(self, text: str) -> None:
        await self._whole(lambda: self._connection.execute(text))

    def _meaning(self, error: Exception) -> BaseException:
        return meaning(self._driver, error)

    def _gone(self) -> bool:
        return bool(self._connection.is_closed())

    def _tear(self) -> None:
        self._connection.terminate()

    async def _say_goodbye(self) -> None:
        await self._connection.close(timeout=self._limits.connect_s)


def _driver() -> Any:
    try:
        import asyncpg
    except ImportError:
        raise ConfigError(
            "sql_url: PostgreSQL needs asyncpg, which is missing. Run: pip install 'sync-engine[postgresql]'"
        ) from None
    return asyncpg


def _tls(options: Mapping[str, str]) -> ssl.SSLContext | str | bool | None:
    """By libpq's ``sslmode``. Without it: TLS where the server has it, as libpq does."""
    mode = options.get("sslmode", "prefer")
    if mode in ("disable", "allow", "prefer"):
        return mode
    if mode not in ("require", "verify-ca", "verify-full"):
        raise ConfigError("sql_url: sslmode must be disable, allow, prefer, require, verify-ca or verify-full")
    ca = options.get("sslrootcert")
    return tls_context(
        ca,
        options.get("sslcert"),
        options.get("sslkey"),
        verify=mode != "require" or ca is not None,
        verify_name=mode == "verify-full",
    )


def _same(wanted: str, kept: str) -> bool:
    return wanted == kept or _ms(wanted) == _ms(kept) is not None


def _ms(told: str) -> int | None:
    """Milliseconds of a setting, which PostgreSQL tells in the largest unit that fits."""
    for unit, factor in (("ms", 1), ("min", 60_000), ("s", 1000), ("h", 3_600_000)):
        if told.endswith(unit) and told[: -len(unit)].isdigit():
            return int(told[: -len(unit)]) * factor
    return None
