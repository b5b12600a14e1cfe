"""What errors of the database drivers mean: a trouble that passes, a row that is refused, a call that is."""

from __future__ import annotations

import sqlite3

import asyncmy
import asyncpg
import pytest

from sync_engine.errors import StoreError, TierUnavailable
from sync_engine.storage.sql import mysql_errors, postgresql_errors, sqlite
from sync_engine.storage.sql.dialect import Outrun, RowRefused


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        *((code, Outrun) for code in (1020, 1213)),
        *((code, TierUnavailable) for code in (1021, 1040, 1045, 1053, 1054, 1114, 1142, 1146, 1205, 1290, 1317, 1836)),
        *((code, TierUnavailable) for code in (1047, 1105, 1927, 1969, 2003, 2006, 2013, 3024)),
        *((code, RowRefused) for code in (1048, 1062, 1153, 1264, 1366, 1406, 1644, 3819, 4025)),
        (1064, StoreError),
    ],
)
def test_what_a_code_of_mysql_means(code: int, kind: type[Exception]) -> None:
    meant = mysql_errors.meaning(asyncmy, asyncmy.errors.OperationalError(code, "as the server says"))
    assert type(meant) is kind
    assert str(code) in str(meant)


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        *((code, Outrun) for code in ("40001", "40P01")),
        *((code, TierUnavailable) for code in ("08006", "0A000", "25006", "25P03", "28P01", "3D000", "42501", "42P01")),
        *((code, TierUnavailable) for code in ("53100", "53300", "55P03", "57014", "57P01", "57P03", "58030", "XX000")),
        *((code, RowRefused) for code in ("22001", "22003", "22021", "23502", "23514", "54000", "P0001")),
        ("42601", StoreError),
    ],
)
def test_what_a_code_of_postgresql_means(code: str, kind: type[Exception]) -> None:
    error = asyncpg.PostgresError("as the server says")
    error.sqlstate = code
    meant = postgresql_errors.meaning(asyncpg, error)
    assert type(meant) is kind
    assert code in str(meant)


@pytest.mark.parametrize(
    ("statement", "kind"),
    [
        ("SELECT absent FROM held", TierUnavailable),
        ("INSERT INTO held (absent) VALUES (1)", TierUnavailable),
        ("SELECT 1 FROM elsewhere", TierUnavailable),
        ("INSERT INTO held (id) VALUES (NULL)", RowRefused),
        ("SELEKT 1", StoreError),
    ],
)
def test_what_an_error_of_sqlite_means(statement: str, kind: type[Exception]) -> None:
    connection = sqlite3.connect(":memory:")
    connection.execute("CREATE TABLE held (id TEXT NOT NULL)")
    with pytest.raises(sqlite3.Error) as error:
        connection.execute(statement)
    connection.close()
    assert type(sqlite.meaning(error.value)) is kind


def test_what_is_no_error_of_a_driver_stays_what_it_is() -> None:
    for meaning, driver in ((mysql_errors.meaning, asyncmy), (postgresql_errors.meaning, asyncpg)):
        fault = KeyError("ours")
        assert meaning(driver, fault) is fault
        assert type(meaning(driver, ConnectionResetError())) is TierUnavailable
        assert type(meaning(driver, TimeoutError())) is TierUnavailable
        refused = StoreError("l3", "said already")
        assert meaning(driver, refused) is refused
