"""A tier that need not be there yet: it is connected to when first asked, and asked for again until it answers.

This is what lets an engine start while Redis or SQL is down, and heal without a restart.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, ParamSpec, TypeVar, cast

from sync_engine.errors import ConfigError, StoreError, SyncEngineError, TierUnavailable
from sync_engine.forward import Forwarding
from sync_engine.owned import outlasting
from sync_engine.ports import Tier

__all__ = ["Late"]

log = logging.getLogger(__name__)

P = ParamSpec("P")
R = TypeVar("R")


class Late(Forwarding):
    """A tier behind its connection attempt. Concurrent callers share one attempt."""

    def __init__(
        self, name: str, connect: Callable[[], Awaitable[Tier]], connected: Callable[[Tier], Awaitable[None]]
    ) -> None:
        super().__init__(cast(Tier, _Nowhere(name)))
        self._connect = connect
        self._connected = connected
        self._here = False
        self._closed = False
        self._attempt: asyncio.Task[None] | None = None
        self._calls = 0  # on the tier as it is now
        self._replaced: dict[Tier, int] = {}  # and on those before it, which are closed after their last
        self._closing: set[asyncio.Task[None]] = set()

    async def ready(self) -> None:
        """Connect if that has not happened; raises ``TierUnavailable`` or ``ConfigError``."""
        if self._here:
            return
        if self._closed:
            raise TierUnavailable(self.name, "closed")
        if self._attempt is None:
            self._attempt = asyncio.get_running_loop().create_task(self._try(), name=f"connect {self.name}")
            self._attempt.add_done_callback(self._tried)
        await outlasting(self._attempt)

    @property
    def here(self) -> bool:
        """Whether it is connected."""
        return self._here

    async def another(self, connect: Callable[[], Awaitable[Tier]]) -> Tier:
        """A tier connected to in another way, for ``replace`` or to be closed; raises what ``ready`` does."""
        return await self._made(connect)

    def replace(self, tier: Tier | None, connect: Callable[[], Awaitable[Tier]]) -> None:
        """From now on connect so, and use this tier; calls on the one before it end there."""
        self._connect = connect
        if tier is None:
            return
        self._replaced[self.tier] = self._calls
        self._retire(self.tier)
        self.tier, self._calls = tier, 0

    async def close(self) -> None:
        """Close what was connected."""
        self._closed = True
        if self._attempt is not None:
            await asyncio.wait({self._attempt})
        failure: SyncEngineError | None = None
        for tier in (*self._replaced, *([self.tier] if self._here else [])):
            try:
                await tier.close()
            except SyncEngineError as failed:
                failure = failed  # the others are closed all the same
        if self._closing:
            await asyncio.wait(self._closing)
        if failure is not None:
            raise failure

    async def _through(self, verb: Callable[P, Coroutine[Any, Any, R]], *args: P.args, **kwargs: P.kwargs) -> R:
        if not self._here:
            try:
                await self.ready()
            except (ConfigError, StoreError) as unusable:
                # It says nothing of the items: they wait until somebody has mended it, and are not refused.
                raise TierUnavailable(self.name, str(unusable)) from unusable
            verb = getattr(self.tier, verb.__name__)
        tier = self.tier
        self._calls += 1
        try:
            return await verb(*args, **kwargs)
        finally:
            if tier is self.tier:
                self._calls -= 1
            else:
                self._replaced[tier] -= 1
                self._retire(tier)

    def _retire(self, tier: Tier) -> None:
        if not self._replaced[tier]:
            del self._replaced[tier]
            closing = asyncio.get_running_loop().create_task(_closed(tier), name=f"close {self.name}")
            self._closing.add(closing)
            closing.add_done_callback(self._closing.discard)

    async def _made(self, connect: Callable[[], Awaitable[Tier]]) -> Tier:
        tier = await connect()
        try:
            await self._connected(tier)
        except BaseException:  # cancelled or failed alike: nobody else would close it
            await tier.close()
            raise
        return tier

    async def _try(self) -> None:
        while True:
            connect = self._connect
            tier = await self._made(connect)
            if connect is self._connect:
                break
            await tier.close()  # by now it is to be connected to in another way
        self.tier, self._here = tier, True

    def _tried(self, attempt: asyncio.Task[None]) -> None:
        self._attempt = None
        if not attempt.cancelled():
            attempt.exception()  # its callers have seen it, or are gone


async def _closed(tier: Tier) -> None:
    try:
        await tier.close()
    except SyncEngineError as failed:
        log.warning("closing what %s was before: %s", tier.name, failed)


class _Nowhere:
    """Stands where the tier will be."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __getattr__(self, verb: str) -> Any:
        async def unreachable(*_: object, **__: object) -> None:
            raise TierUnavailable(self.name, "not connected yet")

        unreachable.__name__ = verb
        return unreachable
