"""What the tables tell of their past: what changed since a stamp, which deletes are forgotten, what went out late.

A cache that has come back with an older state than it had is made right from this.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Final

from sync_engine.clock import COUNTER_BITS
from sync_engine.item import Op, SyncItem
from sync_engine.ports import Changes
from sync_engine.storage.sql.dialect import Session
from sync_engine.storage.sql.routing import Routes
from sync_engine.storage.sql.rows import Row, item_of
from sync_engine.storage.sql.words import FORGOTTEN, Said, Words

__all__ = ["changed_since", "forgotten", "late_since", "note_late"]

LATE_LIFE_MS: Final = 7 * 86_400_000
"""How long late deliveries are remembered: as long as deletes are."""

Rows = Callable[[Said], Awaitable[list[Row]]]

_log = logging.getLogger(__name__)


async def changed_since(
    told: Callable[[Callable[[Routes], Said]], Awaitable[list[Row]]],
    words: Callable[[Routes], Words],
    stamp: int,
    after: tuple[int, str] | None,
    limit: int,
) -> Changes:
    """``Truth.changed_since``. The page is one statement, so an id is never met as deleted and as there."""
    if stamp <= 0 and (after is None or after[0] == 0):
        page = await told(lambda routes: words(routes).unstamped(after[1] if after else "", limit))
        return Changes(_ops(page), (0, page[-1][0]) if len(page) == limit else (1, ""))
    first = after or (stamp, "")
    page = await told(lambda routes: words(routes).changed(*first, limit))
    return Changes(_ops(page), (page[-1][10], page[-1][0]) if len(page) == limit else None)


async def forgotten(rows: Rows, words: Words) -> int:
    """``Truth.forgotten``."""
    found = await rows(words.meta(FORGOTTEN))
    return int(found[0][0]) << COUNTER_BITS if found else 0


async def note_late(session: Session, words: Words, at_ms: int, stamp: int) -> None:
    """``Truth.note_late``, in a transaction of the caller's."""
    await session.run(words.note_least(_late(at_ms), stamp))
    await session.run(words.forget_late(_late(at_ms - LATE_LIFE_MS)))


async def late_since(rows: Rows, words: Words, at_ms: int) -> int | None:
    """``Truth.late_since``."""
    ((stamp,),) = await rows(words.late(_late(at_ms)))
    return None if stamp is None else int(stamp)


def _ops(page: Sequence[Row]) -> list[Op]:
    newest: dict[str, Op] = {}
    for *row, deleted in page:
        if deleted:
            newest[row[0]] = Op(kind="delete", object_id=row[0], stamp=row[10])
            continue
        item = item_of(tuple(row))
        if isinstance(item, SyncItem):
            op = Op(kind="restate", object_id=item.object_id, stamp=item.stamp, item=item, state=item.state)
            newest[item.object_id] = op
        else:
            _log.warning("left out a row that cannot be told: %s", item)
    return list(newest.values())


def _late(at_ms: int) -> str:
    return f"late:{max(at_ms, 0):020}"
