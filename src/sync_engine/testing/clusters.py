"""A Redis Cluster of real servers, for tests: formed in two seconds, its slots moved, its primaries killed."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final

from redis.exceptions import RedisError, ResponseError

from sync_engine._server_process import Startable
from sync_engine.testing.servers import KINDS, RedisKind, RunningRedis

__all__ = ["ClusterNode", "ClusterSet"]

SLOTS = 16_384
ASKED_EVERY: Final = 60
"""Looks at a failover after which it is asked for again: about 3 s."""
SETTLED_WITHIN_S = 60.0
KEYS_PER_MIGRATE = 20


@dataclass(frozen=True, slots=True)
class ClusterNode:
    """A line of CLUSTER NODES: which server, and what the cluster takes it for."""

    server: RunningRedis
    id: str
    primary: bool
    failed: bool
    primary_id: str
    """Of a replica; "-" of a primary."""
    slots: tuple[range, ...]


class ClusterSet(Startable):
    """``async with ClusterSet() as cluster: cluster.url``. Ready when every node says that all is well.

    A primary that does not answer for ``node_timeout_ms`` is replaced by its replica. ``servers`` are all processes,
    the primaries of the beginning first; each may be killed, paused and started again by itself. ``named`` are the
    arguments of ``RunningRedis``, for each of them.
    """

    def __init__(
        self,
        kind: RedisKind = KINDS["redis-8-modules"],
        *,
        primaries: int = 3,
        replicas: int = 3,
        node_timeout_ms: int = 1_000,
        config: Sequence[str] = (),
        **named: Any,
    ) -> None:
        config = (
            "cluster-enabled yes",
            f"cluster-node-timeout {node_timeout_ms}",
            # A replica that was cut off too long would not stand for election, and a set without it would stay down.
            "cluster-replica-validity-factor 0",
            # Else the nodes would tell clients on TLS each other's plain ports.
            *(("tls-cluster yes", "tls-replication yes") if "tls" in named else ()),
            *config,
        )
        self.servers = [RunningRedis(kind, config=config, **named) for _ in range(primaries + replicas)]
        self._primaries = primaries

    async def start(self) -> None:
        """Start the nodes, form the cluster and wait until it is well."""
        try:
            await asyncio.gather(*(server.start() for server in self.servers))
            await self._form()
            await self.until_well()
        except BaseException:  # cancelled or failed alike: no server is left behind
            await self.stop()
            raise

    async def stop(self) -> None:
        """End all of them."""
        for server in self.servers:
            await server.stop()

    @property
    def url(self) -> str:
        """All nodes, as the addresses to begin with."""
        return f"redis+cluster://{','.join(f'127.0.0.1:{server.port}' for server in self.servers)}"

    @property
    def tls_url(self) -> str:
        """The same with TLS, trusting the authority that signed for the nodes and no other."""
        hosts = ",".join(f"127.0.0.1:{server.tls_port}" for server in self.servers)
        return f"rediss+cluster://{hosts}?{self.servers[0].tls_url.partition('?')[2]}"

    async def nodes(self) -> list[ClusterNode]:
        """The nodes as the first server that answers sees them, in the order of ``servers``."""
        for server in self.servers:
            try:
                return await self._seen_by(server)
            except (RedisError, OSError):
                continue
        raise ConnectionError("no node of the cluster answers")

    async def primaries(self) -> list[ClusterNode]:
        """The working primaries in the order of their slots; those without any last."""
        found = [node for node in await self.nodes() if node.primary and not node.failed]
        return sorted(found, key=lambda node: node.slots[0].start if node.slots else SLOTS)

    async def owner(self, slot: int) -> ClusterNode:
        """The primary that has the slot. Raises ``LookupError`` where none has."""
        for node in await self.primaries():
            if any(slot in part for part in node.slots):
                return node
        raise LookupError(f"no working primary has slot {slot}")

    async def replica_of(self, primary: ClusterNode) -> ClusterNode:
        """A working replica of it. Raises ``LookupError`` where there is none."""
        for node in await self.nodes():
            if node.primary_id == primary.id and not node.failed:
                return node
        raise LookupError(f"no working replica of {primary.server!r}")

    async def kill_primary(self, number: int = 0) -> ClusterNode:
        """Kill the ``number``-th of ``primaries()`` and return what it was; ``until_well`` waits for its successor."""
        node = (await self.primaries())[number]
        await node.server.kill()
        return node

    async def failover(self, number: int = 0) -> ClusterNode:
        """Let a replica of the ``number``-th primary take its place, both alive; returns the new primary."""
        before = (await self.primaries())[number]
        replica = await self.replica_of(before)
        asked = 0

        async def done() -> bool:
            nonlocal asked
            if asked % ASKED_EVERY == 0:
                # One that cannot begin yet, since the nodes have just met, is refused, or ends without a word.
                with suppress(ResponseError):
                    await replica.server.ask("CLUSTER", "FAILOVER")
            asked += 1
            return all([(await self.owner(before.slots[0].start)).id == replica.id, await self._well()])

        await _until(done)
        return await self.owner(before.slots[0].start)

    async def move_slot(self, slot: int, to: int, between: Callable[[str], Awaitable[object]] | None = None) -> None:
        """Move a slot and its keys to the ``to``-th primary as redis-cli does, a few keys at a time.

        ``between`` is called after each step with its name: importing, migrating, moved (once per few keys),
        assigned (the new owner knows; the old one does not yet), known (to everybody).
        """

        async def told(step: str) -> None:
            if between is not None:
                await between(step)

        primaries = await self.primaries()
        source, target = await self.owner(slot), primaries[to]
        if source.id == target.id:
            return
        await target.server.ask("CLUSTER", "SETSLOT", slot, "IMPORTING", source.id)
        await told("importing")
        await source.server.ask("CLUSTER", "SETSLOT", slot, "MIGRATING", target.id)
        await told("migrating")
        while keys := await source.server.ask("CLUSTER", "GETKEYSINSLOT", slot, KEYS_PER_MIGRATE):
            await source.server.ask("MIGRATE", "127.0.0.1", _port(target.server), "", 0, 10_000, "KEYS", *keys)
            await told("moved")
        await target.server.ask("CLUSTER", "SETSLOT", slot, "NODE", target.id)
        await told("assigned")
        for node in (source, *primaries):
            await node.server.ask("CLUSTER", "SETSLOT", slot, "NODE", target.id)
        await told("known")

    async def until_well(self) -> None:
        """Wait until every running node sees every slot served, and as many nodes as run, each replica in step."""
        await _until(self._well)

    async def _form(self) -> None:
        ids = [await server.ask("CLUSTER", "MYID") for server in self.servers]
        first, *others = self.servers
        for number, server in enumerate(self.servers):
            # Two nodes with one epoch would argue about slots first.
            await server.ask("CLUSTER", "SET-CONFIG-EPOCH", number + 1)
            if number < self._primaries:
                start, end = (SLOTS * part // self._primaries for part in (number, number + 1))
                await server.ask("CLUSTER", "ADDSLOTSRANGE", start, end - 1)
        await asyncio.gather(*(first.ask("CLUSTER", "MEET", "127.0.0.1", _port(other)) for other in others))

        async def acquainted() -> bool:
            seen = [set(await _lines_of(server)) for server in self.servers]
            return all(nodes == set(ids) for nodes in seen)

        await _until(acquainted)
        for number, server in enumerate(self.servers[self._primaries :]):
            await server.ask("CLUSTER", "REPLICATE", ids[number % self._primaries])

    async def _well(self) -> bool:
        alive = [server for server in self.servers if server.running]
        for server in alive:
            if "cluster_state:ok" not in await server.ask("CLUSTER", "INFO"):
                return False
            nodes = await self._seen_by(server)
            if sum(len(part) for node in nodes if node.primary and not node.failed for part in node.slots) != SLOTS:
                return False
            if {node.server for node in nodes if not node.failed} != set(alive):
                return False
            role = await server.ask("ROLE")
            if role[0] != "master" and role[3] != "connected":
                return False
            if (role[0] == "master") != {node.server: node.primary for node in nodes}[server]:
                return False
        return True

    async def _seen_by(self, server: RunningRedis) -> list[ClusterNode]:
        by_port = {port: one for one in self.servers for port in (one.port, one.tls_port)}
        nodes = []
        for id_, (address, flags, primary_id, *rest) in (await _lines_of(server)).items():
            port = int(address.partition("@")[0].rpartition(":")[2])
            ranges = (part.split("-") for part in rest[4:] if not part.startswith("["))
            slots = tuple(range(int(ends[0]), int(ends[-1]) + 1) for ends in ranges)
            failed = "fail" in flags.split(",")  # not "fail?", which is one node's suspicion
            nodes.append(ClusterNode(by_port[port], id_, "master" in flags, failed, primary_id, slots))
        return sorted(nodes, key=lambda node: self.servers.index(node.server))


def _port(server: RunningRedis) -> int:
    """Where the other nodes reach it."""
    return server.tls_port or server.port


async def _lines_of(server: RunningRedis) -> dict[str, list[str]]:
    """CLUSTER NODES: the words after the id, by id."""
    reply = await server.ask("CLUSTER", "NODES")
    return {words[0]: words[1:] for line in reply.splitlines() if (words := line.split())}


async def _until(holds: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(SETTLED_WITHIN_S):
        while True:
            try:
                if await holds():
                    return
            except (RedisError, OSError, LookupError):
                pass
            await asyncio.sleep(0.05)
