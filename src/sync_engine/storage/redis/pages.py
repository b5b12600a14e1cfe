"""Ordered walks over an index of ids: pages of the shards, merged, with the values from the same step.

The entries of an index are ordered by bytes, so ids come in order of code points. A page is read while the one
before it is decoded. Entries whose item is gone without the scripts' doing are left out, and forgotten.
"""

from __future__ import annotations

import asyncio
import math
from bisect import bisect_right
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

from sync_engine.codec import Unverified
from sync_engine.errors import Corruption, InvalidItem, TierUnavailable
from sync_engine.item import Op, SyncItem, check_state
from sync_engine.owned import outlasting
from sync_engine.storage.redis.apply import Writer
from sync_engine.storage.redis.pack import CHUNK_OPS_MAX
from sync_engine.storage.redis.reindex import Indexer
from sync_engine.storage.redis.scripts import COUNT, PAGE, Script
from sync_engine.storage.redis.shards import Arg, Servers, Shard
from sync_engine.storage.redis.values import Row, paired, read_row

__all__ = ["Pages", "Span", "check_limit"]

PAGE_ITEMS_MAX = 500
PAGE_IDS_MAX = 1_000
"""Entries per page: 1-2 ms of the server."""
PAGE_BYTES_MAX = 4 * 1024 * 1024
SHARD_BYTES_MIN = 64 * 1024
"""After so many bytes of values a page ends; shards that are read at the same time divide them."""
DELETES_PER_SHARD = 32
ROWS_AHEAD = 4_000
"""Entries that a walk without a limit over many shards reads at a time."""

WALKS_MAX = 3
"""For one question. More are needed only where indexes go as soon as they are made."""

SWEEP_AGAIN, NOT_INDEXED = 0, 1


@dataclass(frozen=True, slots=True)
class Span:
    """Ids that begin with ``prefix``: all of them, or those in ``state``."""

    prefix: str = ""
    state: str | None = None

    def __post_init__(self) -> None:
        if self.state is not None:
            check_state(self.state)
        _bytes("prefix", self.prefix)

    @property
    def index(self) -> str:
        """Its key, behind the prefix of a shard."""
        return "__local__:ids" if self.state is None else "__local__:by_state"

    @property
    def head(self) -> bytes:
        """What stands before the id in an entry."""
        return b"" if self.state is None else self.state.encode() + b"\0"

    def bounds(self, after: str | None) -> tuple[bytes, bytes]:
        """First and last of the range, in Redis' words. No id holds the byte 0xFF."""
        start = self.head + self.prefix.encode()
        behind = None if after is None else self.head + _bytes("after", after)
        return b"[" + start if behind is None or behind < start else b"(" + behind, b"(" + start + b"\xff"


class Pages:
    """What the indexes of a store say, and the items they name."""

    def __init__(self, servers: Servers, writer: Writer, indexer: Indexer) -> None:
        self._servers = servers
        self._writer = writer
        self._indexer = indexer

    async def count(self, span: Span) -> int:
        """How many entries there are."""
        return sum(answer[0] for answer in await self._everywhere(COUNT, span.index, span.bounds(None)))

    async def ids(self, span: Span, limit: int | None, after: str | None) -> list[str]:
        """Ids, ascending, those greater than ``after``."""
        walk = self.walk(span, limit, after, values=False)
        found: list[str] = []
        while wanted := _rest(limit, found):
            rows = await walk.rows(wanted)
            if not rows:
                break
            found += [row[0] for row in rows]
        return found

    async def items(self, span: Span, limit: int, after: str | None) -> list[SyncItem]:
        """Items, ascending, those greater than ``after``. Raises ``Corruption`` for the first damaged one."""
        walk = self.walk(span, limit, after, values=True)
        found: list[SyncItem] = []
        while wanted := _rest(limit, found):
            rows = await walk.rows(wanted)
            if not rows:
                break
            stale: list[str] = []
            found += _decoded(rows, span, stale)
            await self._forget(stale, span)
        return found

    async def iterate(self, span: Span) -> AsyncIterator[SyncItem]:
        """All items, ascending. Raises ``Corruption`` at the first damaged one."""
        walk = self.walk(span, None, None, values=True)
        while rows := await walk.rows(ROWS_AHEAD):
            stale: list[str] = []
            for item in _decoded(rows, span, stale):
                yield item
            await self._forget(stale, span)

    async def delete(self, span: Span) -> int:
        """Delete the items, each if it is there, and in the state, when its turn comes; how many that were."""
        at_a_time = max(CHUNK_OPS_MAX, DELETES_PER_SHARD * len(self._servers.shards))
        walk = self.walk(span, None, None, values=False)
        deleted = 0
        while rows := await walk.rows(at_a_time):
            ops = [Op(kind="delete", object_id=row[0], stamp=0) for row in rows]
            deleted += await self._writer.change(ops, span.state, listed=True)
        return deleted

    def walk(self, span: Span, limit: int | None, after: str | None, *, values: bool) -> _Walk:
        """The pages themselves. ``limit``: how many rows are going to be wanted."""
        return _Walk(self, self._servers.shards, span, limit, after, values=values)

    def ask(self, shard: Shard, script: Script, name: str, args: Sequence[Arg]) -> asyncio.Task[Any]:
        """The answer of a listing script, once the place is indexed and what has expired is swept out."""
        return self._servers.own(self._answer(shard, script, name, args))

    async def forget(self, shard: Shard, ids: Sequence[str], span: Span) -> None:
        """Take wrong entries out of the shard's indexes."""
        await self._writer.forget(shard, ids, span.state or "")

    async def _answer(self, shard: Shard, script: Script, name: str, args: Sequence[Arg]) -> Any:
        head = (shard.prefix, int((await self._servers.capabilities()).json))
        walks = 0
        while True:
            answer = await self._servers.evaluate(shard, script, (shard.prefix + name,), (*head, *args))
            if answer == NOT_INDEXED:
                if walks == WALKS_MAX:
                    raise TierUnavailable("l2", "the indexes are lost as fast as they are made: something evicts them")
                walks += 1
                await self._indexer.index(shard)
            elif answer != SWEEP_AGAIN:
                return answer

    async def _everywhere(self, script: Script, name: str, args: Sequence[Arg]) -> list[Any]:
        tasks = [self.ask(shard, script, name, args) for shard in self._servers.shards]
        return [await outlasting(task) for task in tasks]

    async def _forget(self, stale: Sequence[str], span: Span) -> None:
        for shard, ids in self._servers.by_shard(stale).items():
            await self.forget(shard, ids, span)


class _Cursor:
    """One shard's part of a walk: rows that are there, and the call for more."""

    __slots__ = ("done", "low", "page", "rows", "shard", "task")

    def __init__(self, shard: Shard, low: bytes) -> None:
        self.shard = shard
        self.low = low
        self.rows: list[Row] = []
        self.task: asyncio.Task[Any] | None = None
        self.done = False
        self.page = 0


class _Walk:
    def __init__(
        self, pages: Pages, shards: Sequence[Shard], span: Span, limit: int | None, after: str | None, *, values: bool
    ) -> None:
        self._pages = pages
        self._span = span
        self._limit = limit
        low, self._high = span.bounds(after)
        self._cursors = [_Cursor(shard, low) for shard in shards]
        self._page_max = PAGE_ITEMS_MAX if values else PAGE_IDS_MAX
        self._bytes_max = max(SHARD_BYTES_MIN, PAGE_BYTES_MAX // len(shards)) if values else ""
        self._ready: list[Row] = []

    async def rows(self, wanted: int) -> list[Row]:
        """The next rows, at most ``wanted`` of them; none at the end."""
        while not self._ready:
            cursors = [cursor for cursor in self._cursors if cursor.rows or not cursor.done]
            if not cursors:
                return []
            self._start([cursor for cursor in cursors if not cursor.rows], wanted)
            for cursor in cursors:
                if not cursor.rows:
                    await self._land(cursor)
            self._ready = self._merged(cursors)
            rest = None if self._limit is None else wanted - len(self._ready)
            if rest is None or rest > sum(len(cursor.rows) for cursor in cursors):
                low = [cursor for cursor in cursors if not cursor.done and len(cursor.rows) * 2 < cursor.page]
                self._start(low, ROWS_AHEAD if rest is None else rest)
                # Until the calls are on their way: see apply.py.
                await asyncio.sleep(0)
                await asyncio.sleep(0)
        rows, self._ready = self._ready[:wanted], self._ready[wanted:]
        return rows

    def _start(self, cursors: Sequence[_Cursor], wanted: int) -> None:
        for cursor in cursors:
            if cursor.task is None:
                cursor.page = self._fair_share(wanted)
                args = (cursor.low, self._high, cursor.page, len(self._span.head), self._bytes_max)
                cursor.task = self._pages.ask(cursor.shard, PAGE, self._span.index, args)

    def _fair_share(self, wanted: int) -> int:
        if len(self._cursors) == 1:
            return min(wanted, self._page_max)
        # What is spread by a hash: only one shard in forty has more than the mean and two deviations.
        mean = wanted / len(self._cursors)
        return min(math.ceil(mean + 2 * math.sqrt(mean)), self._page_max)

    async def _land(self, cursor: _Cursor) -> None:
        assert cursor.task is not None, "what is awaited was started"
        task = cursor.task
        ids, more, *told = await outlasting(task)
        cursor.task = None
        cursor.done = not more
        if ids:
            cursor.low = b"(" + self._span.head + ids[-1]
        if self._bytes_max:
            cursor.rows = list(paired(ids, *told))
        else:
            missing = set(told[0])
            cursor.rows = [(name, None, None) for id_ in ids if id_ not in missing and (name := _text(id_))]
            if missing:
                await self._pages.forget(cursor.shard, list(filter(None, map(_text, missing))), self._span)

    def _merged(self, cursors: Sequence[_Cursor]) -> list[Row]:
        """Rows that nothing can come before: up to where the shard that is known the least far is known."""
        if len(cursors) == 1:
            rows, cursors[0].rows = cursors[0].rows, []
            return rows
        if any(not cursor.rows and not cursor.done for cursor in cursors):
            return []
        horizon = min((cursor.rows[-1][0] for cursor in cursors if not cursor.done), default=None)
        merged: list[Row] = []
        for cursor in cursors:
            end = len(cursor.rows) if horizon is None else bisect_right(cursor.rows, horizon, key=_ID)
            merged += cursor.rows[:end]
            del cursor.rows[:end]
        merged.sort(key=_ID)
        return merged


_ID = itemgetter(0)


def _decoded(rows: Sequence[Row], span: Span, stale: list[str]) -> Iterator[SyncItem]:
    prefix, state = span.prefix, span.state
    for row in rows:
        read = read_row(row)
        if isinstance(read, Corruption):
            raise read
        item = read.item if isinstance(read, Unverified) else read
        if item is None or (state is not None and item.state != state):
            stale.append(row[0])
        elif item.object_id.startswith(prefix):
            yield item


def check_limit(limit: int) -> int:
    """Return the limit, or raise ``InvalidItem``."""
    if type(limit) is not int or limit < 0:
        raise InvalidItem("limit", repr(limit), "must be an integer of at least 0")
    return limit


def _rest(limit: int | None, found: Sequence[object]) -> int:
    return ROWS_AHEAD if limit is None else limit - len(found)


def _text(raw: bytes) -> str | None:
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return None  # no id of anybody


def _bytes(field: str, text: str) -> bytes:
    try:
        return text.encode()
    except (AttributeError, UnicodeEncodeError):
        raise InvalidItem(field, f"a {type(text).__name__}", "must be text that UTF-8 can hold") from None
