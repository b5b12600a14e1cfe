"""How an engine is connected to its tiers, and how it is connected anew while it works."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Final

from sync_engine.config import SyncEngineConfig
from sync_engine.errors import NotRunning
from sync_engine.late import Late
from sync_engine.ports import Tier
from sync_engine.resilience import Breaker, Guarded, Retries

__all__ = ["Link", "Links", "Replacements"]

LEAVING: Final = "the engine is being stopped"

ABANDONED_WITHIN_S = 1.0
"""How long a stop waits for new connections that it has cut short: usually a moment, but a server may say nothing."""


@dataclass(frozen=True, slots=True, eq=False)
class Link:
    """A tier and how it is connected to: ``settings`` are those that take new connections."""

    tier: Guarded
    late: Late
    retries: Retries
    connect: Callable[[SyncEngineConfig], Awaitable[Tier]]
    deadlines_s: Callable[[SyncEngineConfig], tuple[float | None, float]]
    """Of a read, and of a write."""
    settings: frozenset[str]


Replacements = Mapping[Link, Tier | None]
"""What takes the place of what is in use; None stands for a tier that is not connected yet."""


class Links:
    """The links of one engine. Settings change in two steps: ``reconnect`` may fail, ``retune`` cannot."""

    def __init__(self, links: Sequence[Link], config: SyncEngineConfig) -> None:
        self._links = links
        self._stopped: asyncio.Future[None] | None = None
        """Of the attempt under way: done once it is to be cut short."""
        self._abandoned: set[asyncio.Task[None]] = set()
        self._leaving = 0
        self._set_deadlines(config)

    def breaker(self, name: str) -> Breaker:
        """The breaker of the tier of that name."""
        return next(link.tier.breaker for link in self._links if link.tier.name == name)

    async def reconnect(self, config: SyncEngineConfig, changed: Set[str]) -> Replacements:
        """Connect anew where a setting that changed needs it, beside what is in use; for ``retune``.

        Raises what connecting raises, and ``NotRunning`` where the engine is stopped meanwhile; then nothing has
        changed.
        """
        links = [link for link in self._links if link.settings & changed]
        if not links:
            return {}
        if self._leaving:
            raise NotRunning(LEAVING)
        loop = asyncio.get_running_loop()
        attempt = loop.create_task(_connect_all(links, config), name="sync-engine reconnect")
        self._stopped = stopped = loop.create_future()
        wanted = False
        try:
            await asyncio.wait((attempt, stopped), return_when=asyncio.FIRST_COMPLETED)
            wanted = not stopped.done() and not attempt.cancelled()
        finally:
            self._stopped = None
            if not wanted:
                # Not awaited: what is to be closed may first have to hear from a server that says nothing.
                abandoned = loop.create_task(_abandon(attempt), name="sync-engine reconnect's end")
                self._abandoned.add(abandoned)
                abandoned.add_done_callback(self._abandoned.discard)
        if not wanted:
            raise NotRunning(LEAVING)
        return attempt.result()

    def retune(self, config: SyncEngineConfig, fresh: Replacements) -> None:
        """Use what ``reconnect`` made, and the deadlines of these settings, from this step of the event loop on."""
        for link, tier in fresh.items():
            link.late.replace(tier, partial(link.connect, config))
        self._set_deadlines(config)

    @contextmanager
    def leaving(self) -> Iterator[None]:
        """Meanwhile ``reconnect`` raises, and so does the one under way: who stops an engine waits for no server."""
        self._leaving += 1
        if self._stopped is not None and not self._stopped.done():
            self._stopped.set_result(None)
        try:
            yield
        finally:
            self._leaving -= 1

    async def aclose(self) -> None:
        """Wait a moment for new connections that were cut short."""
        if self._abandoned:
            await asyncio.wait(self._abandoned, timeout=ABANDONED_WITHIN_S)

    def _set_deadlines(self, config: SyncEngineConfig) -> None:
        for link in self._links:
            link.tier.bound(*link.deadlines_s(config))


async def _connect_all(links: Sequence[Link], config: SyncEngineConfig) -> Replacements:
    fresh: dict[Link, Tier | None] = dict.fromkeys(links)
    try:
        while waiting := [link for link in fresh if fresh[link] is None and link.late.here]:
            fresh[waiting[0]] = await waiting[0].late.another(partial(waiting[0].connect, config))
    except BaseException:  # cancelled or failed alike: nobody else would close them
        await _close_all(fresh)
        raise
    return fresh


async def _abandon(attempt: asyncio.Task[Replacements]) -> None:
    attempt.cancel()
    await asyncio.wait({attempt})
    if not attempt.cancelled() and attempt.exception() is None:
        await _close_all(attempt.result())  # it had just been made


async def _close_all(fresh: Replacements) -> None:
    for tier in fresh.values():
        if tier is not None:
            await tier.close()
