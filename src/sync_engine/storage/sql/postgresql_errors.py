"""What errors of PostgreSQL and of asyncpg mean: a trouble of the moment, a row that is refused, something else."""

from __future__ import annotations

import ssl
from typing import Any, Final

from sync_engine.errors import ConfigError, StoreError, SyncEngineError, TierUnavailable
from sync_engine.storage.sql.dialect import Outrun, RowRefused

__all__ = ["at_connect", "meaning", "of_the_moment"]

_PASSING: Final = {
    "08": "the connection failed",
    "0A000": "a table was changed meanwhile",  # the plan of a prepared statement, which is made again
    "25": "the transaction is over",
    "25006": "the server takes no writes",
    "26": "a prepared statement is gone; is there a pooler in between?",
    "28": "the server refuses user or password",
    "3D": "there is no such database",
    "3F": "there is no such schema",
    "42501": "the user may not do this",
    "42P01": "a table is missing",
    "42703": "a column is missing",
    "53": "the server is out of resources",
    "55": "a lock was not to be had in time",
    "57": "the server stopped the statement",
    "58": "the server has trouble with its system",
    "F0": "the server has trouble with its configuration",
    "XX": "the server has trouble with itself",
}
"""Troubles of the moment or of the machine: nothing is known of the items, and asking later can help."""

_OF_THE_MOMENT: Final = ("08", "25", "26", "28", "3D", "55P03", "57")
"""Of these the ones that any statement would have met. Not 53: there may be no room for what this one makes."""

_REFUSED: Final = ("22", "23", "44", "54", "P0")
"""Data exceptions, constraints, views' checks, program limits (a row, an index entry is too large), triggers."""


def meaning(driver: Any, error: Exception) -> BaseException:
    """What an error means, decided in this one place; one that is neither the driver's nor the system's is answered."""
    if isinstance(error, SyncEngineError):
        return error
    code = getattr(error, "sqlstate", None)
    if isinstance(error, driver.PostgresError) and isinstance(code, str):
        if code in ("40001", "40P01"):
            return Outrun("l3", f"another transaction was in the way ({code})")
        if passing := _PASSING.get(code) or _PASSING.get(code[:2]):
            return TierUnavailable("l3", f"{passing} ({code})")
        told = str(error.args[0]) if error.args else type(error).__name__  # not `detail`, which quotes the row
        if told.startswith("invalid input for query argument"):  # of the driver itself, and it quotes the value
            told = "a value does not fit its column"
        return (RowRefused if code[:2] in _REFUSED else StoreError)("l3", f"{told} ({code})")
    if isinstance(error, driver.InterfaceError | driver.InternalClientError):
        if isinstance(error, ValueError):  # asyncpg's DataError on our side: a value that has no form on the wire
            return RowRefused("l3", "a value does not fit its column")
        return TierUnavailable("l3", f"the connection cannot be used ({type(error).__name__})")
    if isinstance(error, TimeoutError | OSError):
        return TierUnavailable("l3", f"the server cannot be reached ({type(error).__name__})")
    if isinstance(error, UnicodeError):
        return RowRefused("l3", "a text is not valid Unicode")
    return error


def of_the_moment(failed: SyncEngineError) -> bool:
    """Whether any statement would have failed so, as of an error of ``meaning``'s: it says nothing of this one."""
    if isinstance(failed, Outrun):
        return True
    if not isinstance(failed, TierUnavailable):
        return False
    code = getattr(failed.__cause__, "sqlstate", None)
    return code is None or code.startswith(_OF_THE_MOMENT)  # without a code there was no answer


def at_connect(driver: Any, error: Exception) -> BaseException:
    if isinstance(error, ssl.SSLError):
        return TierUnavailable("l3", f"no TLS with the server ({error.reason or type(error).__name__})")
    if isinstance(error, driver.ClientConfigurationError):
        return ConfigError("sql_url: PostgreSQL's driver does not understand it")
    meant = meaning(driver, error)
    return TierUnavailable("l3", meant.reason) if isinstance(meant, StoreError) else meant
