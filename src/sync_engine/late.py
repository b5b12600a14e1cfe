"""A tier that need not be there yet: it is connected to when first asked, and asked for again until it answers.

This is what lets an engine start while Redis or SQL is down, and heal without a restart.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, ParamSpec, TypeVar, cast

from sync_engine.errors import ConfigError, StoreError, TierUnavailable
from sync_engine.ports import Tier
from sync_engine.resilience import Forwarding

__all__ = ["Late"]

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

    async def ready(self) -> None:
        """Connect if that has not happened; raises ``TierUnavailable`` or ``ConfigError``."""
        if self._here:
            return
        if self._closed:
            raise TierUnavailable(self.name, "closed")
        if self._attempt is None:
            self._attempt = asyncio.get_running_loop().create_task(self._try(), name=f"connect {self.name}")
            self._attempt.add_done_callback(self._tried)
        await asyncio.shield(self._attempt)

    async def close(self) -> None:
        """Close what was connected."""
        self._closed = True
        if self._attempt is not None:
            await asyncio.wait({self._attempt})
        if self._here:
            await self.tier.close()

    async def _through(self, verb: Callable[P, Coroutine[Any, Any, R]], *args: P.args, **kwargs: P.kwargs) -> R:
        if not self._here:
            try:
                await self.ready()
            except (ConfigError, StoreError) as unusable:
                # It says nothing of the items: they wait until somebody has mended it, and are not refused.
                raise TierUnavailable(self.name, str(unusable)) from unusable
            verb = getattr(self.tier, verb.__name__)
        return await verb(*args, **kwargs)

    async def _try(self) -> None:
        tier = await self._connect()
        try:
            await self._connected(tier)
        except BaseException:  # cancelled or failed alike: nobody else would close it
            await tier.close()
            raise
        self.tier = tier
        self._here = True

    def _tried(self, attempt: asyncio.Task[None]) -> None:
        self._attempt = None
        if not attempt.cancelled():
            attempt.exception()  # its callers have seen it, or are gone


class _Nowhere:
    """Stands where the tier will be."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __getattr__(self, verb: str) -> Any:
        async def unreachable(*_: object, **__: object) -> None:
            raise TierUnavailable(self.name, "not connected yet")

        unreachable.__name__ = verb
        return unreachable
