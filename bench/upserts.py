"""The texts of hand-written upserts into ``sync_items``, for whichever columns and marks of bound values."""

from __future__ import annotations

from collections.abc import Callable, Sequence

__all__ = ["insert_or_update", "insert_or_update_mysql", "told", "unnest", "values"]


def insert_or_update(columns: Sequence[str], rows: str) -> str:
    """SQLite's and PostgreSQL's; ``rows`` is VALUES or a query. The first column is the key."""
    taken = ", ".join(f"{name} = excluded.{name}" for name in columns[1:])
    return f"INSERT INTO sync_items ({', '.join(columns)}) {rows} ON CONFLICT ({columns[0]}) DO UPDATE SET {taken}"


def insert_or_update_mysql(columns: Sequence[str], rows: str) -> str:
    """MySQL's, which finds the key by itself."""
    taken = ", ".join(f"{name} = VALUES({name})" for name in columns[1:])
    return f"INSERT INTO sync_items ({', '.join(columns)}) {rows} ON DUPLICATE KEY UPDATE {taken}"


def values(columns: Sequence[str], mark: str, count: int = 1) -> str:
    """So many rows of marks."""
    row = f"({', '.join([mark] * len(columns))})"
    return f"VALUES {', '.join([row] * count)}"


def unnest(types: Sequence[str], mark: Callable[[int], str]) -> str:
    """A row from each place of as many arrays; marks count from 1."""
    arrays = ", ".join(f"{mark(number)}::{kind}[]" for number, kind in enumerate(types, 1))
    return f"SELECT * FROM unnest({arrays})"


def told(columns: Sequence[str]) -> str:
    """The rows of a temporary table that they were copied into."""
    return f"SELECT {', '.join(columns)} FROM told"
