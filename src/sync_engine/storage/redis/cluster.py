"""A Redis Cluster as ``Servers``: one line to each primary, and calls that find the node which has their shard.

A node that has a shard no longer, or not now, says so and does nothing; the call is then sent again, for as long as a
reply may take. While a slot is on its way from node to node our calls wait at its old owner and never follow an ASK: a
script on the other side would make keys of which the rest of the shard knows nothing.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping, Sequence, Set
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any, cast

import hiredis
from redis.asyncio.cluster import ClusterNode, RedisCluster
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.maint_notifications import MaintNotificationsConfig

from sync_engine.errors import ConfigError, NotRunning, TierUnavailable
from sync_engine.storage.redis.calls import Calls
from sync_engine.storage.redis.capabilities import Capabilities
from sync_engine.storage.redis.connect import Line, checked_options
from sync_engine.storage.redis.pipe import Pipe
from sync_engine.storage.redis.pool import Pool
from sync_engine.storage.redis.refusals import CLOSED, NotHere
from sync_engine.storage.redis.shards import Arg, Listening, Shard
from sync_engine.storage.redis.slots import TAGS, Node, reached_at, shard_number
from sync_engine.storage.redis.topology import Topology

__all__ = ["Cluster"]

PAUSE_MIN_S, PAUSE_MAX_S = 0.01, 0.25
"""Before a call that no node would serve is sent again."""

LOOKED_S_AGO_MAX = 1.0
"""What is asked of every primary is asked of one that joined this long ago, though no call of ours went astray."""


class Cluster(Calls):
    """``Servers`` that are many. Opens no connection before the first call."""

    single = False

    def __init__(
        self,
        nodes: Sequence[Node],
        prefix: str,
        *,
        timeout_ms: int,
        response_timeout_ms: int,
        options: Mapping[str, Any],
        on_new_server: Callable[[], None] | None = None,
    ) -> None:
        """``nodes``: some to begin with. ``options``: redis-py's for a connection, such as ``username`` or ``ssl``.

        ``on_new_server`` is called before anything is read from a primary that may not hold all that the one before
        it confirmed: a replica that took over, a server that was started again.
        """
        if not nodes:
            raise ConfigError("redis_url: names no node of a cluster")
        if "{" in prefix or "}" in prefix:
            raise ConfigError(f"redis_prefix {prefix!r}: no braces on a cluster, where they would be a hash tag")
        super().__init__(on_new_server)
        self.shards: Sequence[Shard] = tuple(Shard(n, f"{prefix}{{{tag}}}") for n, tag in enumerate(TAGS))
        self._seeds = tuple(nodes)
        self._timeout_ms = timeout_ms
        self._response_timeout_ms = response_timeout_ms
        self._patience_s = response_timeout_ms / 1000
        self._options = dict(options)
        self._lines: dict[Node, Line] = {}
        self._pipes: dict[Node, Pipe] = {}
        self._listeners: Counter[Node] = Counter()
        self._topology = Topology(nodes, ask=self._slots, own=self.own, on_new=self._new_primaries)
        self._client: RedisCluster | None = None
        self._line(self._seeds[0])  # opens nothing, but refuses bad options

    @property
    def client(self) -> RedisCluster:
        """A redis-py client with connections of its own, made when first asked for."""
        if self._client is None:
            options: dict[str, Any] = {"protocol": 3, "client_name": "sync-engine"} | self._options
            with checked_options():  # it knows fewer than a connection does
                self._client = RedisCluster(
                    startup_nodes=[ClusterNode(host, port) for host, port in self._seeds],
                    socket_connect_timeout=self._timeout_ms / 1000,
                    socket_timeout=self._response_timeout_ms / 1000,
                    retry=Retry(NoBackoff(), 0),
                    maint_notifications_config=MaintNotificationsConfig(enabled=False),
                    **options,
                )
        return self._client

    def shard_of(self, object_id: str) -> Shard:
        """The shard of one item."""
        return self.shards[shard_number(object_id)]

    def by_shard(self, ids: Sequence[str]) -> dict[Shard, Sequence[str]]:
        """The ids parted by shard, each part in input order."""
        parts: dict[int, list[str]] = {}
        for object_id in ids:
            parts.setdefault(shard_number(object_id), []).append(object_id)
        return {self.shards[number]: part for number, part in parts.items()}

    async def primaries(self) -> list[tuple[Shard, ...]]:
        """For each primary that has any of our shards, those; a call for one of them reaches it."""
        await self._topology.known(LOOKED_S_AGO_MAX)
        return [tuple(self.shards[n] for n in part) for part in self._topology.primaries.values()]

    async def exchange(self, shard: Shard, *args: Arg) -> Any:
        """One command and its reply in the caller's own task, which must be one that nobody cancels."""
        if self._closed:
            raise NotRunning(CLOSED)
        packed = hiredis.pack_command(args)  # type: ignore[arg-type]  # its stub forgets that it takes str
        node = self._topology.owners[shard.number] or await self._owner(shard)
        try:
            return await self._pipe(node).send(packed)
        except NotHere as refused:
            return await self._send_again(shard, packed, node, refused)
        except TierUnavailable:
            self._topology.look()  # it may be dead, and another in its place
            raise

    @asynccontextmanager
    async def listen(self, shard: Shard) -> AsyncIterator[Listening]:
        """A connection of its own to the shard's node, for commands that wait, such as XREAD BLOCK."""
        node = await self._owner(shard)
        if self._closed:
            raise NotRunning(CLOSED)
        self._listeners[node] += 1
        try:
            async with self._line(node).listen(shard) as listener:
                yield listener
        except TierUnavailable as failed:
            if isinstance(failed, NotHere):
                self._heed(shard, node, failed)
            self._topology.look()
            raise
        finally:
            self._listeners[node] -= 1

    async def close(self) -> None:
        """Let calls under way finish, then close every connection. Safe to call twice."""
        await self._finish()
        for line in self._lines.values():
            await line.close()
        if self._client is not None:
            await self._client.aclose()

    async def _owner(self, shard: Shard) -> Node:
        await self._topology.known()
        node = self._topology.owners[shard.number]
        if node is None:
            self._topology.look()
            raise TierUnavailable("l2", f"no node of the cluster serves shard {shard.number}")
        return node

    async def _send_again(self, shard: Shard, packed: bytes, node: Node, refused: NotHere) -> Any:
        clock = asyncio.get_running_loop()
        until = clock.time() + self._patience_s
        pause = 0.0
        while True:
            self._topology.look()
            if not self._heed(shard, node, refused) or pause:
                # A slot on its way takes its time, and nodes that send us to and fro do not agree yet.
                pause = min(PAUSE_MAX_S, pause * 2 or PAUSE_MIN_S)
                if clock.time() + pause > until:
                    raise refused
                await asyncio.sleep(pause * random.uniform(0.5, 1))  # noqa: S311 - no secret
            pause = pause or PAUSE_MIN_S
            node = self._topology.owners[shard.number] or node
            try:
                return await self._pipe(node).send(packed)
            except NotHere as again:
                refused = again

    def _heed(self, shard: Shard, node: Node, refused: NotHere) -> bool:
        """Note where a node says that the shard has gone; whether it says."""
        if refused.moved_to is None:
            return False
        host, port = refused.moved_to
        self._topology.take_over({shard.number: (reached_at(host, node), port)})
        return True

    def _new_primaries(self, nodes: Set[Node]) -> None:
        self._new_server()
        for node in nodes & self._lines.keys():  # as a replica it may have told us who serves what
            self._lines[node].begin_anew()

    # Lines

    def _pipe(self, node: Node) -> Pipe:
        pipe = self._pipes.get(node)
        if pipe is None:
            pool = cast(Pool, self._line(node).client.connection_pool)
            pipe = self._pipes[node] = Pipe(pool, self.own)
        return pipe

    def _line(self, node: Node) -> Line:
        line = self._lines.get(node)
        if line is None:
            self._drop_idle()
            options = self._options | {"host": node[0], "port": node[1]}
            line = self._lines[node] = Line(
                options,
                self.shards[0].prefix,
                timeout_ms=self._timeout_ms,
                response_timeout_ms=self._response_timeout_ms,
                on_new_server=self._new_server,
            )
        return line

    def _drop_idle(self) -> None:
        """Close lines to nodes that have no shard any more: over the years a cluster may have many."""
        kept = {*self._topology.primaries, *self._seeds, *+self._listeners}
        for node in self._lines.keys() - kept:
            pipe = self._pipes.get(node)
            if pipe is None or pipe.idle:
                self._pipes.pop(node, None)
                self.own(self._lines.pop(node).close())

    async def _slots(self, node: Node) -> Any:
        return await self._line(node).exchange(self.shards[0], "CLUSTER", "SLOTS")

    async def _find_out(self) -> Capabilities:
        await self._topology.known()
        lines = [self._line(node) for node in self._topology.primaries]
        told = await asyncio.gather(*(line.capabilities() for line in lines))
        found = _common(told)
        if asyncio.current_task() is self._finding:  # no other server was met meanwhile
            self._capabilities = found
        return found

    def __repr__(self) -> str:
        primaries, calls = len(self._topology.primaries), len(self._owned)
        return f"<Cluster {primaries} primaries, {calls} calls under way{', closed' if self._closed else ''}>"


def _common(told: Sequence[Capabilities]) -> Capabilities:
    modules = set.intersection(*(set(one.modules) for one in told))
    policies = sorted(one.maxmemory_policy for one in told if one.maxmemory_policy)
    return replace(
        told[0],
        json=all(one.json for one in told),
        search=all(one.search for one in told),
        modules={name: version for name, version in told[0].modules.items() if name in modules},
        maxmemory_policy=policies[0] if policies else None,  # allkeys-…, the kind to warn of, comes first
    )
