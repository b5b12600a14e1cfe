"""Whether the tables hold what somebody believes they hold: by the recorded hashes, or byte for byte.

That a row is there says nothing of what is in it (Q8), and a recorded hash nothing of the bytes beside it: hence two
questions, a cheap one about given items and a thorough one about every row.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from sync_engine.item import SyncItem
from sync_engine.storage.sql.questions import Questions
from sync_engine.storage.sql.rows import item_of
from sync_engine.storage.sql.words import Words

__all__ = ["Verification", "verify"]


@dataclass(frozen=True, slots=True)
class Verification:
    """What the tables hold of the items asked about; each id is in one of the four.

    ``verified``: the row has the item's SHA-256, version and state. ``superseded``: it has others and a newer stamp, or
    was deleted with one. ``differing``: it has others, and no newer stamp explains it. ``missing``: there is no row.
    """

    verified: frozenset[str] = frozenset()
    missing: frozenset[str] = frozenset()
    differing: frozenset[str] = frozenset()
    superseded: frozenset[str] = frozenset()


class _Held(NamedTuple):
    stamp: int
    version: int
    payload_hash: str
    state: str


async def verify(
    questions: Questions,
    buried_stamps: Callable[[Sequence[str]], Awaitable[dict[str, int]]],
    items: Iterable[SyncItem],
) -> Verification:
    """``SqlStore.verify_batch``.

    Tombstones are asked for behind the rows, of what has none: usually nothing, and in one statement with the rows a
    tombstone would look like the row of an id whose table is not known yet (``Questions.of_rows``).
    """
    wanted = {item.object_id: item for item in items}
    held = {id_: _Held(*facts) for id_, *facts in await questions.by_ids(Words.held, list(wanted))}
    if hashless := [id_ for id_, facts in held.items() if not facts.payload_hash]:
        # The original leaves the hash out: these rows are read whole, and theirs is computed.
        for id_ in hashless:
            del held[id_]
        for row in await questions.by_ids(Words.fetch, hashless):
            found = item_of(row)
            if isinstance(found, SyncItem):
                held[row[0]] = _Held(found.stamp, found.version, found.content_hash, found.state)
            else:
                held[row[0]] = _Held(0, 0, "", "")  # no item at all: like none that is asked about
    absent = [id_ for id_ in wanted if id_ not in held]
    buried = await buried_stamps(absent) if absent else {}
    answers: dict[str, set[str]] = {"verified": set(), "missing": set(), "differing": set(), "superseded": set()}
    for id_, item in wanted.items():
        facts = held.get(id_)
        answers[_missed(item, buried.get(id_, 0)) if facts is None else _compared(item, facts)].add(id_)
    return Verification(**{name: frozenset(ids) for name, ids in answers.items()})


def _missed(item: SyncItem, buried: int) -> str:
    return "superseded" if 0 < item.stamp < buried else "missing"


def _compared(item: SyncItem, held: _Held) -> str:
    if (item.version, item.content_hash, item.state) == held[1:]:
        return "verified"
    # As the upsert decides: of equal stamps the larger hash stands, and without a stamp there is no order.
    if item.stamp > 0 and (item.stamp, item.content_hash) < (held.stamp, held.payload_hash):
        return "superseded"
    return "differing"
