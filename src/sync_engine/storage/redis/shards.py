"""Where an item's keys live: shards, each a complete small layout under its own prefix, and the servers that hold them.

A script call touches one shard only. A single server has one shard, whose prefix is the user's; on a cluster each
shard's prefix carries a hash tag, so that an item, its state set and everything else about it share a slot.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from redis.asyncio import Redis
from redis.asyncio.cluster import RedisCluster

from sync_engine.storage.redis.capabilities import Capabilities
from sync_engine.storage.redis.scripts import Script

__all__ = ["Arg", "Listening", "Servers", "Shard"]

Arg = bytes | str | int
R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class Shard:
    """Keys that share a slot; every one of them begins with ``prefix``."""

    number: int
    prefix: str


class Listening(Protocol):
    """A connection beside the pool. One command at a time, which may be cancelled; it reconnects by itself."""

    async def exchange(self, *args: Arg, timeout_s: float | None) -> Any:
        """The reply to a command that may take ``timeout_s``, None: as long as it takes.

        Raises ``TierUnavailable`` or ``StoreError``, and ``NotRunning`` when the servers are closed meanwhile.
        """
        ...


class Servers(Protocol):
    """One server, or a cluster of them. Calls run in tasks owned here: cancelling a caller leaves no reply behind.

    Every call raises ``TierUnavailable`` (nothing is known, neither that it was done nor that it was not) or
    ``StoreError`` (the server refuses it as it is).
    """

    single: bool
    shards: Sequence[Shard]

    @property
    def client(self) -> Redis | RedisCluster:
        """The redis-py client beneath."""
        ...

    def shard_of(self, object_id: str, /) -> Shard:
        """The shard of one item."""
        ...

    def by_shard(self, ids: Sequence[str], /) -> dict[Shard, Sequence[str]]:
        """The ids parted by shard, each part in input order; shards without one are left out."""
        ...

    async def primaries(self) -> Sequence[tuple[Shard, ...]]:
        """For each primary the shards that it has now."""
        ...

    async def capabilities(self) -> Capabilities:
        """What the servers can do; asked when they first answer, and anew when they are others."""
        ...

    async def call(self, shard: Shard, /, *args: Arg) -> Any:
        """The reply to one command on the shard's server."""
        ...

    async def run(self, shard: Shard, script: Script, keys: Sequence[Arg], args: Sequence[Arg], /) -> Any:
        """The reply to one script."""
        ...

    def start(self, shard: Shard, script: Script, keys: Sequence[Arg], args: Sequence[Arg], /) -> asyncio.Task[Any]:
        """``run`` in a task owned here; who awaits it does so with ``outlasting``."""
        ...

    async def evaluate(self, shard: Shard, script: Script, keys: Sequence[Arg], args: Sequence[Arg], /) -> Any:
        """``run`` in the caller's own task, which must be one that nobody cancels."""
        ...

    async def exchange(self, shard: Shard, /, *args: Arg) -> Any:
        """``call`` in the caller's own task, which must be one that nobody cancels."""
        ...

    def listen(self, shard: Shard, /) -> AbstractAsyncContextManager[Listening]:
        """A connection of its own to the shard's server, for commands that wait, such as XREAD BLOCK."""
        ...

    def own(self, call: Coroutine[Any, Any, R], /) -> asyncio.Task[R]:
        """A task that ``close`` waits for."""
        ...

    async def close(self) -> None:
        """Let calls under way finish, then close every connection. Safe to call twice."""
        ...
