"""Bulk deletes: pages of ids from the truth, each a batch of conditional deletes through the log, decided by the truth.

    a moment ─► the truth is current ─► a page of ids ─► log ─► the truth decides ─► Redis, change stream
                                            ▲                        │
                                            └────────────────────────┘

All deletes of one call carry the stamp of the moment at which it began, so that stamps alone spare what was written
later, by whomever; the truth compares the state as well, since the clock of another engine may be behind.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence

from sync_engine.errors import InvalidId, InvalidItem, TierNotConfigured, TierUnavailable
from sync_engine.item import Op, check_id
from sync_engine.options import Ack
from sync_engine.ports import Truth
from sync_engine.write.flush import Lane
from sync_engine.write.path import WritePath

__all__ = ["check_prefix", "sweep"]

log = logging.getLogger(__name__)


async def sweep(
    writes: WritePath,
    truth: Truth | None,
    current: Callable[[], Awaitable[object]],
    *,
    state: str | None = None,
    prefix: str = "",
    most: int,
) -> int:
    """Delete what is in the state, or begins with the prefix; how many the truth deleted. ``most`` ids at a time.

    ``current`` waits until the truth has what was accepted before. Raises ``TierNotConfigured`` without a truth.
    """
    if truth is None:
        raise TierNotConfigured("sql_url", "None", "bulk deletes need a truth")
    # Other engines' clocks may be ahead: what the truth holds by now is older than the moment in any case.
    moment = writes.moment(await truth.newest_stamp())
    await current()
    deleted = 0
    after: str | None = None
    while True:
        if state is not None:
            page = await truth.list_state_ids(state, most, after=after)
        else:
            page = await truth.list_prefix_ids(prefix, most, after=after)
        if ids := [object_id for object_id in page if _is_ours(object_id)]:
            deleted += await _delete(writes, ids, moment, state or "")
        if len(page) < most:
            return deleted
        after = page[-1]


def check_prefix(prefix: object, *, allow_all: bool) -> None:
    """Raises ``InvalidItem`` for what would delete more than was meant."""
    if not isinstance(prefix, str):
        raise InvalidItem("prefix", f"a {type(prefix).__name__}", "must be a str")
    if not prefix and allow_all is not True:
        raise InvalidItem("prefix", "''", "is every item, which needs allow_all=True")


async def _delete(writes: WritePath, ids: Sequence[str], stamp: int, only_in: str) -> int:
    """Delete those of the items that the truth holds in that state ("": in any), no newer than ``stamp``.

    Returns once the truth has decided: how many it deleted. Raises what ``write`` does, and ``TierUnavailable``
    where the truth is in trouble for longer than a write waits for room; it decides all the same, later.
    """
    assert writes.truth is not None, "whoever sweeps has asked the truth for the ids"
    drafts = [Op(kind="delete", object_id=each, stamp=stamp, only_in_state=only_in) for each in ids]
    entries = await writes.write(drafts, Ack.LOGGED)
    await _decided(writes.truth, writes)
    return sum(not entry.spared and entry.error is None for entry in entries)


async def _decided(truth: Lane, writes: WritePath) -> None:
    """Wait for what the truth was given; a blip is waited out, for as long as a write waits for room."""
    while True:
        try:
            return await truth.current()
        except TierUnavailable:
            try:
                async with asyncio.timeout(writes.patience_s):
                    return await truth.batcher.drained()
            except TimeoutError:
                if truth.trouble is not None:
                    raise TierUnavailable(truth.tier.name, truth.trouble) from None


def _is_ours(object_id: str) -> bool:
    try:
        check_id(object_id)
    except InvalidId as bad:
        log.warning("left alone a row that is no item: %s", bad)
        return False
    return True
