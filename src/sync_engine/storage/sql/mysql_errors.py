"""What errors of asyncmy and of its servers mean: a trouble that passes, a row that is refused, or anything else."""

from __future__ import annotations

import ssl
from typing import Any, Final

from sync_engine.errors import StoreError, SyncEngineError, TierUnavailable
from sync_engine.storage.sql.dialect import Outrun, RowRefused

__all__ = ["meaning", "meaning_at_connect"]

_PASSING: Final = {
    1016: "the table cannot be opened",
    1021: "the disk is full",
    1030: "the storage engine has trouble",
    1037: "the server is out of memory",
    1038: "the server is out of memory",
    1040: "the server has too many connections",
    1041: "the server is out of memory",
    1044: "the user may not do this",
    1045: "the server refuses user or password",
    1047: "the node is not ready",  # Galera
    1049: "there is no such database",
    1053: "the server is shutting down",
    1054: "a column is missing",
    1105: "the server does not say why",  # what proxies tell of their own troubles
    1114: "the table is full",
    1129: "the server blocks this host",
    1130: "the server does not let this host in",
    1142: "the user may not do this",
    1143: "the user may not do this",
    1146: "a table is missing",
    1158: "the connection failed",
    1159: "the connection failed",
    1160: "the connection failed",
    1161: "the connection failed",
    1176: "an index is missing",
    1180: "the commit failed",
    1194: "the table is damaged",
    1195: "the table is damaged",
    1203: "the user has too many connections",
    1205: "a lock was not to be had in time",
    1206: "the server is out of locks",
    1226: "the user has used up what it may",
    1243: "a prepared statement is gone; is there a pooler in between?",
    1290: "the server takes no writes",
    1317: "the statement was stopped",
    1412: "a table was changed meanwhile",
    1461: "the server has too many prepared statements",
    1615: "a table was changed meanwhile",
    1637: "the server has too many transactions",
    1684: "a table is being changed",
    1712: "an index is damaged",
    1792: "the server takes no writes",
    1836: "the server takes no writes",
    1877: "the table is damaged",
    1927: "the connection was ended at the server",
    1932: "a table is missing",
    1969: "the server stopped the statement",
    3024: "the server stopped the statement",
    3032: "the server is offline",
    4031: "the connection was ended at the server",
}
"""Troubles of the moment or of the machine: nothing is known of the items, and asking later can help."""

_OUTRUN: Final = frozenset({1020, 1213, 3101, 3572})

_REFUSED: Final = frozenset({
    1048, 1062, 1118, 1153, 1216, 1217, 1242, 1264, 1265, 1292, 1300, 1364, 1366, 1406, 1418, 1451, 1452, 1644,
    1690, 3140, 3819, 4025,
})  # fmt: skip
"""Null, duplicate, too large, out of range, truncated, not text, a foreign key, SIGNAL of a trigger, a check."""

_SERVER_FAULTS: Final = range(2000, 3000)
"""The driver's own codes: the connection."""


def meaning(driver: Any, error: Exception) -> BaseException:
    """What an error means, decided in this one place."""
    if isinstance(error, SyncEngineError):
        return error
    if isinstance(error, driver.errors.MySQLError):
        code = error.args[0] if error.args else 0
        if code in _OUTRUN:
            return Outrun("l3", f"another transaction was in the way ({code})")
        if code in _PASSING:
            return TierUnavailable("l3", f"{_PASSING[code]} ({code})")
        if code in _SERVER_FAULTS or isinstance(error, driver.errors.InterfaceError | driver.errors.InternalError):
            return TierUnavailable("l3", f"the connection was lost ({code})")
        told = error.args[1] if len(error.args) > 1 else type(error).__name__
        if code in (1292, 1366):  # these quote the value
            told = "a value does not fit its column"
        return (RowRefused if code in _REFUSED else StoreError)("l3", f"{told} ({code})")
    if isinstance(error, TimeoutError | OSError):
        return TierUnavailable("l3", f"the server cannot be reached ({type(error).__name__})")
    if isinstance(error, UnicodeError):
        return RowRefused("l3", "a text is not valid Unicode")
    if isinstance(error, OverflowError):
        return RowRefused("l3", "a number is too large")
    return error


def meaning_at_connect(driver: Any, error: Exception) -> BaseException:
    """The same before there is a connection: whatever is refused then is no fault of the items."""
    if isinstance(error, ssl.SSLError) or isinstance(error.__cause__, ssl.SSLError):
        return TierUnavailable("l3", "no TLS with the server that can be trusted")
    meant = meaning(driver, error)
    return TierUnavailable("l3", meant.reason) if isinstance(meant, StoreError) else meant
