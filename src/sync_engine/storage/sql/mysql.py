"""MySQL and MariaDB through asyncmy: the settings of every connection, and one statement at a time.

Statements that bind values are prepared at the server and bound there in binary form. That is 1.3 times as fast as
the driver's own escaping (docs/performance.md), and values never become part of a text.
"""

from __future__ import annotations

import logging
import math
import ssl
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Final

from sqlalchemy import Table
from sqlalchemy.dialects import mysql
from sqlalchemy.engine import Dialect

from sync_engine.errors import ConfigError, StoreError, TierUnavailable
from sync_engine.storage.sql import tables
from sync_engine.storage.sql.address import Address, tls_context
from sync_engine.storage.sql.dialect import BUCKETS, Held, RowRefused, Session, beside, nothing
from sync_engine.storage.sql.mysql_errors import meaning, meaning_at_connect
from sync_engine.storage.sql.mysql_words import MysqlWords
from sync_engine.storage.sql.network import Limits, NetworkSession
from sync_engine.storage.sql.rows import Row
from sync_engine.storage.sql.texts import Said, padded, repeated

__all__ = ["Mysql"]

OPTIONS: Final = ("unix_socket", "ssl", "ssl_ca", "ssl_cert", "ssl_key", "ssl_verify_cert", "ssl_verify_identity")

COLLATIONS: Final = ("utf8mb4_nopad_bin", "utf8mb4_0900_bin")
"""MariaDB's and MySQL's that compare bytes, spaces at the end included; ``utf8mb4_bin`` takes "a" for "a "."""

SQL_MODE: Final = "STRICT_ALL_TABLES,STRICT_TRANS_TABLES,ERROR_FOR_DIVISION_BY_ZERO,NO_ENGINE_SUBSTITUTION"

STATEMENTS_KEPT: Final = 64
"""Prepared statements per connection: about 20 texts, some of them in ten sizes."""

FIND_COLLATION: Final = "SELECT collation_name FROM information_schema.collations WHERE collation_name IN (%s, %s)"

VARIABLES: Final = "SHOW SESSION VARIABLES"

LOCK: Final = "SELECT bucket FROM sync_locks WHERE bucket IN ($marks) ORDER BY bucket FOR UPDATE"

NAMES: Final = """\
SELECT table_name, '' FROM information_schema.tables WHERE table_schema = database()
UNION SELECT table_name, index_name FROM information_schema.statistics
WHERE table_schema = database() AND (right(table_name, 6) = '_items' OR table_name = 'sync_tombstones')"""
"""Of this database alone: the server has others with tables of the same names (Q19)."""

COLUMNS: Final = """\
SELECT column_name, column_key = 'PRI', collation_name FROM information_schema.columns
WHERE table_schema = database() AND table_name = %s ORDER BY ordinal_position"""

MIGRATION_LOCK: Final = "SELECT get_lock(concat('sync-engine ', left(sha1(database()), 32)), %s)"
MIGRATION_OVER: Final = "SELECT release_lock(concat('sync-engine ', left(sha1(database()), 32)))"

_log = logging.getLogger(__name__)


class Mysql:
    """A database of a MySQL or MariaDB server."""

    dialect: Dialect = mysql.dialect()
    owned_tables: Sequence[Table] = (*tables.metadata.sorted_tables, tables.locks)
    one_writer = False

    def __init__(self, address: Address, timeout_ms: int) -> None:
        self._driver = _driver()
        driver_log = logging.getLogger("asyncmy")  # the server's warnings, which quote values
        if driver_log.level == logging.NOTSET:
            driver_log.setLevel(logging.ERROR)
        self._limits = Limits(timeout_ms)
        address.allow(OPTIONS)
        self._asked = {
            "host": address.host,
            "port": address.port or 3306,
            "user": address.user,
            # As bytes: the driver would take a text for Latin-1.
            "password": (address.password or "").encode(),
            "database": address.database,
            "unix_socket": address.options.get("unix_socket"),
            "ssl": _tls(address.options),
        }
        self._collation = ""
        self._warned = False

    def words(self, *tables: str) -> MysqlWords:
        """The statements about tables of items."""
        return MysqlWords(*tables)

    async def open(self) -> MysqlSession:
        """A new connection with its settings made and read back."""
        try:
            connection = await self._driver.connect(
                **self._asked,
                charset="utf8mb4",
                autocommit=True,
                connect_timeout=math.ceil(self._limits.connect_s),
                # Beyond the time to connect the driver waits for a handshake for ever.
                read_timeout=self._limits.connect_s,
                stmt_cache_size=STATEMENTS_KEPT,
            )
        except Exception as error:
            raise meaning_at_connect(self._driver, error) from error
        connection._read_timeout = None  # from here on the session keeps the time
        session = MysqlSession(connection, self._driver, self._limits)
        try:
            await self._settle(session)
        except BaseException:  # cancelled or failed alike: nobody else would close it
            await session.close()
            raise
        return session

    async def _settle(self, session: MysqlSession) -> None:
        if not self._collation:
            found = {name for (name,) in await session.rows(Said(FIND_COLLATION, COLLATIONS))}
            if not found:
                raise StoreError("l3", "the server is too old: MariaDB 10.2 or MySQL 8.0.17 compare ids by bytes")
            self._collation = next(name for name in COLLATIONS if name in found)
        lock_s = math.ceil(self._limits.lock_ms / 1000)
        wanted: dict[str, str | float] = {
            "sql_mode": SQL_MODE,
            "time_zone": "+00:00",
            "autocommit": "ON",
            "sql_notes": "OFF",
            "innodb_lock_wait_timeout": lock_s,
            "lock_wait_timeout": lock_s,
            "collation_connection": self._collation,
        }
        held = await self._held(session)
        if "max_statement_time" in held:  # MariaDB: seconds
            wanted["max_statement_time"] = self._limits.statement_ms / 1000
        else:
            wanted["max_execution_time"] = self._limits.statement_ms
        if "idle_transaction_timeout" in held:  # MariaDB again
            # A transaction of ours never waits for us; one that does belongs to a process that stands still, and its
            # locks would keep every other engine out for as long.
            wanted["idle_transaction_timeout"] = math.ceil(self._limits.statement_ms / 1000)
        # Constants of this file and checked numbers; SET takes no bound values at every server.
        await session.run(Said(f"SET NAMES utf8mb4 COLLATE {self._collation}"))
        told = ", ".join(f"SESSION {name} = {value!r}" for name, value in wanted.items())
        await session.run(Said(f"SET {told}"))
        await session.run(Said("SET SESSION TRANSACTION ISOLATION LEVEL READ COMMITTED"))
        held = await self._held(session)
        for name, value in wanted.items():
            if not _same(value, held.get(name, "")):
                raise StoreError("l3", f"the server keeps {name} at {held.get(name)!r} where {value!r} is needed")
        isolation = held.get("transaction_isolation", held.get("tx_isolation"))
        if isolation != "READ-COMMITTED" or held["character_set_client"] != "utf8mb4":
            raise StoreError("l3", f"the server keeps transactions at {isolation!r} where READ COMMITTED is needed")
        session.limits_statements = "max_statement_time" in wanted
        session.packet_max = int(held["max_allowed_packet"])
        if held.get("innodb_flush_log_at_trx_commit", "1") != "1" and not self._warned:
            self._warned = True
            _log.warning("the server syncs commits late (innodb_flush_log_at_trx_commit): a power loss may lose some")

    async def _held(self, session: MysqlSession) -> dict[str, str]:
        return dict(await session.rows(Said(VARIABLES)))

    async def names(self, session: Session) -> set[str]:
        """Names of the tables and indexes that there are."""
        held = await session.rows(Said(NAMES))
        # An index name is of its table alone: another one's idx_state says nothing of ours.
        return {index or table for table, index in held if not index or index in tables.index_names(table)}

    async def columns(self, session: Session, table: str) -> list[Held]:
        """The columns of a table."""
        return [
            Held(str(name), bool(in_key), kept) for name, in_key, kept in await session.rows(Said(COLUMNS, (table,)))
        ]

    def options(self, table: Table) -> str:
        """What stands behind CREATE TABLE (...)."""
        return f" ENGINE=InnoDB DEFAULT CHARSET=utf8mb4 COLLATE={self._collation} ROW_FORMAT=DYNAMIC"

    async def adapt(self, session: Session, table: Table) -> None:
        """Make a table that was here before compare ids by bytes, and take contents as large as ours.

        Ids that were different stay different: no row is lost. The other way round nothing can be done: what the
        old collation took for one id has been written into one row (Q8), and that is told.
        """
        if table is tables.locks:
            marks = ", ".join(f"({bucket})" for bucket in range(BUCKETS))
            await session.run(Said(f"INSERT IGNORE INTO sync_locks (bucket) VALUES {marks}"))  # noqa: S608 - numbers
        kept = {column.collation for column in await self.columns(session, table.name)} - {None, self._collation}
        if not kept:
            return
        await session.run(Said(f"ALTER TABLE {table.name} CONVERT TO CHARACTER SET utf8mb4 COLLATE {self._collation}"))
        if "payload_blob" in table.c:
            wanted = "MODIFY payload LONGTEXT, MODIFY payload_blob LONGBLOB"
            await session.run(Said(f"ALTER TABLE {table.name} {wanted}"))
        _log.warning(
            "%s compared ids by %s and now does by bytes; every row is kept. Ids that are the same to the old "
            "collation (of other case, accents, spaces at the end) shared one row until now: write such items again",
            table.name,
            ", ".join(sorted(str(name) for name in kept)),
        )

    async def close(self) -> None:
        """There is nothing that sessions share."""

    def __repr__(self) -> str:
        return "mysql"


class MysqlSession(NetworkSession):
    """One connection."""

    packet_max = 16 * 1024 * 1024
    """The server's ``max_allowed_packet``: it closes the connection of whoever sends more."""
    limits_statements = False
    """Whether the server ends statements of every kind that take too long: MariaDB does, MySQL queries alone."""

    def __init__(self, connection: Any, driver: Any, limits: Limits) -> None:
        super().__init__(limits)
        self._connection = connection
        self._driver = driver

    @property
    def bytes_max(self) -> int:
        """Bytes that one statement should bind at most."""
        return min(4 * 1024 * 1024, self.packet_max // 2)

    async def rows(self, said: Said) -> list[Row]:
        """Run one statement; all its rows."""

        async def work() -> list[Row]:
            async with self._connection.cursor() as cursor:
                await cursor.execute(said.text, said.values or None)
                return list(await cursor.fetchall())

        return await self._whole(work)

    async def run(self, said: Said) -> int:
        """Run one statement that changes rows; how many the server says it touched."""
        return await self.attempt(said)

    async def attempt(self, said: Said, meanwhile: Callable[[], Awaitable[None]] = nothing) -> int:
        """The same: an error undoes its own statement and no other."""
        self._check_size(said)

        async def work() -> int:
            async with self._connection.cursor() as cursor:
                return int(await beside(cursor.execute(said.text, said.values or None), meanwhile))

        return await self._whole(work)

    async def begin(self) -> None:
        """Open a transaction."""
        await self.run(Said("START TRANSACTION"))
        self._in_transaction = True

    async def lock(self, buckets: Sequence[int]) -> None:
        """Be the only writer of these buckets."""
        if buckets:
            bound = padded(buckets, BUCKETS)
            await self.rows(Said(LOCK.replace("$marks", repeated("%s", len(bound))), bound))

    async def commit(self) -> None:
        """Make the transaction durable."""
        await self.run(Said("COMMIT"))
        self._in_transaction = False

    async def _undo(self) -> None:
        await self.run(Said("ROLLBACK"))

    async def begin_migration(self) -> None:
        """Keep other migrations out. Tables are made outside of transactions here: each step stands when it is done."""
        ((had,),) = await self.rows(Said(MIGRATION_LOCK, (math.ceil(self._limits.lock_ms / 1000),)))
        if had != 1:
            raise TierUnavailable("l3", "another engine is making the tables")
        await self._let_take_s(0)
        self._patient = True

    async def end_migration(self, done: bool) -> None:
        """Let others in."""
        self._patient = False
        if not self.broken:
            await self._let_take_s(self._limits.statement_ms / 1000)
            await self.rows(Said(MIGRATION_OVER))

    async def _let_take_s(self, seconds: float) -> None:
        if self.limits_statements:
            await self.run(Said(f"SET SESSION max_statement_time = {seconds}"))

    def _check_size(self, said: Said) -> None:
        values = [value for value in said.values if isinstance(value, str | bytes)]
        if sum(map(len, values)) * 4 < self.packet_max:
            return
        try:
            size = sum(len(value) if isinstance(value, bytes) else len(value.encode()) for value in values)
        except UnicodeEncodeError:
            raise RowRefused("l3", "a text is not valid Unicode") from None
        if size + 16 * len(said.values) + len(said.text) + 1024 > self.packet_max:
            raise RowRefused("l3", f"larger than the server's max_allowed_packet of {self.packet_max} bytes")

    def _meaning(self, error: Exception) -> BaseException:
        return meaning(self._driver, error)

    def _gone(self) -> bool:
        return not self._connection.connected or bool(self._connection._stream_broken)

    def _tear(self) -> None:
        transport = self._connection._transport
        if transport is not None:
            transport.abort()  # not close(), which waits for a server that may never read again

    async def _say_goodbye(self) -> None:
        await self._connection.ensure_closed()


def _driver() -> Any:
    try:
        import asyncmy
    except ImportError:
        raise ConfigError(
            "sql_url: MySQL and MariaDB need asyncmy, which is missing. Run: pip install 'sync-engine[mysql]'"
        ) from None
    return asyncmy


def _tls(options: Mapping[str, str]) -> ssl.SSLContext | None:
    """TLS with ``ssl=true`` or any ``ssl_…``; verified, name included, unless a ``ssl_verify_…`` says false."""
    flags = {"": None, "true": True, "1": True, "false": False, "0": False}
    told = {name: flags.get(options.get(name, ""), "?") for name in ("ssl", "ssl_verify_cert", "ssl_verify_identity")}
    if "?" in told.values():
        raise ConfigError("sql_url: ssl, ssl_verify_cert and ssl_verify_identity are true or false")
    if told["ssl"] is False or not any(name.startswith("ssl") for name in options):
        return None
    return tls_context(
        options.get("ssl_ca"),
        options.get("ssl_cert"),
        options.get("ssl_key"),
        verify=told["ssl_verify_cert"] is not False,
        verify_name=told["ssl_verify_identity"] is not False,
    )


def _same(wanted: str | float, kept: str) -> bool:
    if isinstance(wanted, str):
        return set(wanted.split(",")) == set(kept.split(","))
    try:
        return float(kept) == float(wanted)
    except ValueError:
        return False
