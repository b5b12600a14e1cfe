"""What one Redis and many have in common: calls that survive their caller, and what the servers can do, asked once."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, TypeVar

from sync_engine.owned import Owned, outlasting
from sync_engine.storage.redis.capabilities import Capabilities
from sync_engine.storage.redis.refusals import UnknownScript
from sync_engine.storage.redis.scripts import Script
from sync_engine.storage.redis.shards import Arg, Shard

__all__ = ["Calls"]

R = TypeVar("R")


class Calls(ABC):
    """Runs every exchange in a task owned here, so that cancelling a caller never leaves its reply to the next one.

    ``on_new_server`` is called when a server was met that may not hold all that the one before it confirmed.
    """

    def __init__(self, on_new_server: Callable[[], None] | None) -> None:
        self._on_new_server = on_new_server
        self._owned = Owned()
        self._closed = False
        self._capabilities: Capabilities | None = None
        self._finding: asyncio.Task[Capabilities] | None = None

    @abstractmethod
    async def exchange(self, shard: Shard, *args: Arg) -> Any:
        """One command and its reply in the caller's own task, which must be one that nobody cancels."""

    async def call(self, shard: Shard, *args: Arg) -> Any:
        """The reply to one command. Raises ``TierUnavailable`` or ``StoreError``."""
        return await self._owned.whole(self.exchange(shard, *args))

    async def run(self, shard: Shard, script: Script, keys: Sequence[Arg], args: Sequence[Arg]) -> Any:
        """The reply to one script, sent by its hash and, where the server has not seen it, by its text."""
        return await self._owned.whole(self.evaluate(shard, script, keys, args))

    def start(self, shard: Shard, script: Script, keys: Sequence[Arg], args: Sequence[Arg]) -> asyncio.Task[Any]:
        """``run`` in a task of ours; who awaits it does so with ``outlasting``."""
        return self.own(self.evaluate(shard, script, keys, args))

    async def evaluate(self, shard: Shard, script: Script, keys: Sequence[Arg], args: Sequence[Arg]) -> Any:
        """``run`` in the caller's own task, which must be one that nobody cancels."""
        try:
            return await self.exchange(shard, "EVALSHA", script.sha, len(keys), *keys, *args)
        except UnknownScript:
            return await self.exchange(shard, "EVAL", script.text, len(keys), *keys, *args)

    async def capabilities(self) -> Capabilities:
        """What every server can do; asked when they first answer, and anew when one is another."""
        if self._capabilities is not None:
            return self._capabilities
        if self._finding is None or self._finding.done():
            self._finding = self.own(self._find_out())
        return await outlasting(self._finding)

    def own(self, call: Coroutine[Any, Any, R]) -> asyncio.Task[R]:
        """A task that ``close`` waits for."""
        return self._owned.start(call)

    @abstractmethod
    async def _find_out(self) -> Capabilities:
        """Ask for what ``capabilities`` answers, and keep it unless another server was met meanwhile."""

    async def _finish(self) -> None:
        """Let calls under way end, those too that begin meanwhile; none begins from then on."""
        await self._owned.over()
        self._closed = True

    def _new_server(self) -> None:
        self._capabilities = self._finding = None
        if self._on_new_server is not None:
            self._on_new_server()
