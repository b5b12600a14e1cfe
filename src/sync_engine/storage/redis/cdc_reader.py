"""Reading the change stream: from any place, across outages, with what is missing told."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

from sync_engine.errors import TierUnavailable
from sync_engine.storage.redis.cdc_entry import BadEntry, CdcEntry, Gap
from sync_engine.storage.redis.cdc_fields import decode, numbered
from sync_engine.storage.redis.shards import Arg, Servers

__all__ = ["CdcReader"]

log = logging.getLogger(__name__)

PAGE_ENTRIES_FIRST = 10
PAGE_BYTES_AIM = 4 * 1024 * 1024
"""What a page of entries should weigh; how many those are is learned from the pages before."""

WAIT_SLICE_S = 5.0
"""A wait at the end of the stream is renewed this often, so that a connection that has silently died is noticed."""
ANSWER_S = 5.0
"""What an answer may take beyond the wait."""
PAUSE_S = 0.05
PAUSE_MAX_S = 5.0

_BEGINNING = ("0", "0-0")


Ask = Callable[..., Awaitable[Any]]
"""The reply to a command; ``wait_s`` is how long the server may take on purpose."""


class CdcReader:
    """Entries in order, by ``async for``; each run goes on where the last one ended.

    A bad entry raises ``MalformedEntry`` or ``CorruptEntry`` (both ``BadEntry``), and the next run continues behind it.
    An outage raises ``TierUnavailable`` without ``block_ms``; with it the reader connects again and continues, as
    long as it would have waited. Delivery is at least once: a change whose outcome its writer did not learn may be
    told again, with the same stamp, and an older stamp is never a newer state of its id.

    ``position`` is the id of the last entry that was handed out, ``seen`` the last number of each writer: keep both to
    continue elsewhere. Where numbers are missing, ``entry.gap`` says so, and what they told must be had from the truth.
    Started from ``"0"`` or with ``seen``, a writer's first number must be 1; otherwise it may be any.
    """

    def __init__(
        self,
        servers: Servers,
        key: str,
        from_id: str,
        block_ms: int | None,
        count: int,
        seen: Mapping[str, int] | None,
        content_bytes_max: int,
    ) -> None:
        self.position = from_id
        self.seen = dict(seen or {})
        self._seen_all = seen is not None or from_id in _BEGINNING
        self._servers = servers
        self._key = key
        self._block_s = None if block_ms is None else block_ms / 1000 or float("inf")
        self._count_max = count
        self._count = min(count, PAGE_ENTRIES_FIRST)
        self._content_bytes_max = content_bytes_max
        self._ahead: deque[tuple[str, Sequence[bytes]]] = deque()
        self._read_to = from_id
        self._wait_until: float | None = None

    async def __aiter__(self) -> AsyncGenerator[CdcEntry]:
        self._wait_until = None
        pause = PAUSE_S
        outage: TierUnavailable | None = None
        while True:
            try:
                async with self._line() as ask:
                    if outage is not None:
                        await self._rewind(ask)
                        outage, pause = None, PAUSE_S
                    while self._ahead or await self._filled(ask):
                        yield self._take()
                    return
            except TierUnavailable as failed:
                if self._left_s() <= pause:
                    raise
                if outage is None:
                    log.warning("the change stream cannot be read, trying again: %s", failed.reason)
                outage = failed
            await asyncio.sleep(pause)
            pause = min(2 * pause, PAUSE_MAX_S)

    @asynccontextmanager
    async def _line(self) -> AsyncIterator[Ask]:
        """How to ask Redis: over a connection of our own if we wait, since a waiting one is of no use to others."""
        shard = self._servers.shards[0]
        if self._block_s is None:

            async def ask(*args: Arg, wait_s: float = 0.0) -> Any:
                return await self._servers.call(shard, *args)

            yield ask
        else:
            async with self._servers.listen(shard) as listener:

                async def listened(*args: Arg, wait_s: float = 0.0) -> Any:
                    return await listener.exchange(*args, timeout_s=wait_s + ANSWER_S)

                yield listened

    def _left_s(self) -> float:
        """How long to wait from now on, counted from the first time this is asked after an entry was had."""
        if self._block_s is None:
            return 0.0
        now = asyncio.get_running_loop().time()
        if self._wait_until is None:
            self._wait_until = now + self._block_s
        return max(0.0, self._wait_until - now)

    async def _filled(self, ask: Ask) -> bool:
        """Read the next page, waiting for it as agreed; False where none came."""
        if self._read_to == "$":
            self.position = self._read_to = await self._newest(ask)
        while True:
            left_s = self._left_s()
            wait_s = min(left_s, WAIT_SLICE_S)
            wait = ("BLOCK", max(1, int(wait_s * 1000))) if wait_s else ()
            reply = await ask("XREAD", "COUNT", self._count, *wait, "STREAMS", self._key, self._read_to, wait_s=wait_s)
            entries = _entries(reply)
            if entries:
                self._wait_until = None
                self._ahead.extend(entries)
                self._read_to = entries[-1][0]
                weight = sum(len(value) for _, fields in entries for value in fields) // len(entries)
                self._count = min(self._count_max, 4 * self._count, max(1, PAGE_BYTES_AIM // max(1, weight)))
                return True
            if not left_s:
                return False

    def _take(self) -> CdcEntry:
        self.position, fields = self._ahead.popleft()
        try:
            entry = decode(self.position, fields, content_bytes_max=self._content_bytes_max)
        except BadEntry:
            writer, seq = numbered(fields)
            # Counted only where it leaves no gap behind: else the next good one tells of the gap, this one included.
            if seq and seq == self._expected(writer, seq):
                self.seen[writer] = seq
            raise
        if not entry.seq:
            return entry
        expected = self._expected(entry.writer, entry.seq)
        self.seen[entry.writer] = entry.seq
        return entry if entry.seq == expected else replace(entry, gap=Gap(entry.writer, expected, entry.seq))

    def _expected(self, writer: str, seq: int) -> int:
        last = self.seen.get(writer)
        if last is None:
            return 1 if self._seen_all else seq
        return last + 1

    async def _rewind(self, ask: Ask) -> None:
        """After an outage: a server that lost the end of the stream, its clock behind, goes on below our position.

        What of it is new cannot be told, so all of it is read again.
        """
        if self._read_to != "$" and not self._ahead and _order(await self._newest(ask)) < _order(self._read_to):
            self._read_to = _BEGINNING[0]

    async def _newest(self, ask: Ask) -> str:
        found = await ask("XREVRANGE", self._key, "+", "-", "COUNT", 1)
        return found[0][0].decode() if found else "0-0"


def _entries(reply: Any) -> list[tuple[str, Sequence[bytes]]]:
    """Ids and fields in a reply to XREAD of one stream: a map (RESP3), a list of pairs (RESP2), or nothing."""
    if not reply:
        return []
    entries = next(iter(reply.values())) if isinstance(reply, Mapping) else reply[0][1]
    return [(entry_id.decode(), fields or ()) for entry_id, fields in entries]


def _order(position: str) -> tuple[int, int]:
    milliseconds, _, number = position.partition("-")
    return int(milliseconds), int(number or 0)
