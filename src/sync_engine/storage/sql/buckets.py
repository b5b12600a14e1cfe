"""The buckets of ids whose writers take turns. Pure; part of the format: every engine on a database must agree."""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from typing import Final

from sync_engine.storage.sql.dialect import BUCKETS

__all__ = ["EVERY_BUCKET", "bucket_of", "buckets_of"]

EVERY_BUCKET: Final = tuple(range(BUCKETS))


def bucket_of(object_id: str) -> int:
    """The bucket of an id."""
    return zlib.crc32(object_id.encode()) % BUCKETS


def buckets_of(ids: Iterable[str]) -> list[int]:
    """The buckets of ids, ascending, which is how all lock them."""
    found: set[int] = set()
    for id_ in ids:
        found.add(bucket_of(id_))
        if len(found) == BUCKETS:  # as it is after some 300 ids
            break
    return sorted(found)
