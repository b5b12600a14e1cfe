"""A primary, its replicas and three sentinels that watch them, for tests of a failover."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

from redis.exceptions import RedisError

from sync_engine._server_process import Startable
from sync_engine.testing.servers import KINDS, RedisKind, RunningRedis, TlsFiles

__all__ = ["SentinelSet"]

NAME = "mymaster"
QUORUM = 2
SETTLED_WITHIN_S = 60.0
# What the sentinels do every 1 to 10 seconds, done a few times a second; and a machine that stalls for some
# seconds, as one under a full test run does, does not send them into their 30 seconds of doing nothing (tilt).
# Four publish periods are also how long a sentinel bears a replica that calls itself primary. The one that promoted
# it asks after it once a second, and only then tells the others: with less they would undo the promotion. And a new
# primary is pinged for the first time after a ping period, which has to be well below the time to call it down; five
# of them are how old the news of a replica may be that is promoted, and they come once a second.
HURRY = (
    *("INFO-PERIOD", 300, "PUBLISH-PERIOD", 600, "MIN-LINK-RECONNECT-PERIOD", 100, "PING-PERIOD", 400),
    *("ELECTION-TIMEOUT", 2_000, "TILT-TRIGGER", 10_000, "TILT-PERIOD", 1_000),
)


class SentinelSet(Startable):
    """``async with SentinelSet() as servers: servers.url``. Ready when every sentinel knows every server.

    A primary that does not answer for ``down_after_ms`` is replaced. ``servers`` are the primary of the beginning
    and its replicas, ``sentinels`` the sentinels; each may be killed, paused and started again by itself. ``users`` are
    those of the servers.
    """

    def __init__(
        self,
        kind: RedisKind = KINDS["redis-8-modules"],
        *,
        replicas: int = 1,
        down_after_ms: int = 800,
        tls: TlsFiles | None = None,
        users: Sequence[str] = (),
        sentinel_users: Sequence[str] = (),
    ) -> None:
        # With TLS they speak it among themselves too, and tell clients its ports.
        self._config = ("tls-replication yes",) if tls is not None else ()
        self._tls = tls
        self._sentinel_users = sentinel_users
        self.servers = [RunningRedis(kind, config=self._config, tls=tls, users=users) for _ in range(1 + replicas)]
        self.sentinels: list[RunningRedis] = []
        self._kind = kind
        self._down_after_ms = down_after_ms

    async def start(self) -> None:
        """Start all of them and wait until they know one another."""
        try:
            await asyncio.gather(*(server.start() for server in self.servers))
            first, *replicas = self.servers
            await asyncio.gather(*(replica.ask("REPLICAOF", "127.0.0.1", _port(first)) for replica in replicas))
            # The third is slower to call a primary down: three that stand for election at once, each with its own
            # vote, elect nobody and try again after twice the failover time-out.
            for down_after_ms in (self._down_after_ms, self._down_after_ms, 3 * self._down_after_ms):
                config = (
                    *self._config,
                    f"sentinel monitor {NAME} 127.0.0.1 {_port(first)} {QUORUM}",
                    f"sentinel down-after-milliseconds {NAME} {down_after_ms}",
                    f"sentinel failover-timeout {NAME} 5000",
                )
                self.sentinels.append(
                    RunningRedis(self._kind, sentinel=True, config=config, tls=self._tls, users=self._sentinel_users)
                )
            await asyncio.gather(*(self._start_sentinel(sentinel) for sentinel in self.sentinels))
            await self.until_well()
        except BaseException:  # cancelled or failed alike: no server is left behind
            await self.stop()
            raise

    async def stop(self) -> None:
        """End all of them."""
        for server in (*self.sentinels, *self.servers):
            await server.stop()

    @property
    def url(self) -> str:
        """The sentinels, the name that they watch and the database."""
        return f"redis+sentinel://{','.join(f'127.0.0.1:{s.port}' for s in self.sentinels)}/{NAME}/0"

    @property
    def tls_url(self) -> str:
        """The same with TLS, trusting the authority that signed for all of them and no other."""
        hosts = ",".join(f"127.0.0.1:{sentinel.tls_port}" for sentinel in self.sentinels)
        return f"rediss+sentinel://{hosts}/{NAME}/0?{self.sentinels[0].tls_url.partition('?')[2]}"

    async def primary(self) -> RunningRedis:
        """Which server the sentinels that answer say is the primary now, by majority. Raises ``LookupError``."""
        told = [port for port in await asyncio.gather(*map(_told, self._running_sentinels())) if port]
        if not told:
            raise LookupError("no sentinel answers")
        return {_port(server): server for server in self.servers}[max(told, key=told.count)]

    async def kill_primary(self) -> RunningRedis:
        """Kill the primary and return it. Whoever wants the next one waits: ``await failed_over(it)``."""
        primary = await self.primary()
        await primary.kill()
        return primary

    async def failover(self) -> RunningRedis:
        """Let a sentinel put a replica in the primary's place, both alive; returns the new primary."""
        await self.until_well()  # else a server that came back empty and has not copied anything yet might be chosen
        before = await self.primary()

        async def begun() -> bool:  # refused while no replica is known to be in step
            return bool(await self.sentinels[0].ask("SENTINEL", "FAILOVER", NAME))

        await self._until(begun)
        return await self.failed_over(before)

    async def failed_over(self, before: RunningRedis) -> RunningRedis:
        """Wait until all sentinels say that another server than ``before`` is the primary, and so does it."""

        async def other() -> bool:
            now = await self.primary()
            agreed = len(set(await asyncio.gather(*map(_told, self._running_sentinels())))) == 1
            return agreed and now is not before and (await now.ask("ROLE"))[0] == "master"

        await self._until(other)
        return await self.primary()

    async def until_well(self) -> None:
        """Wait until the primary works, every running server copies it and every running sentinel sees just that."""
        await self._until(self._well)

    async def _start_sentinel(self, sentinel: RunningRedis) -> None:
        await sentinel.start()
        await sentinel.ask("SENTINEL", "DEBUG", *HURRY)

    def _running_sentinels(self) -> list[RunningRedis]:
        return [sentinel for sentinel in self.sentinels if sentinel.running]

    async def _well(self) -> bool:
        primary = await self.primary()
        replicas = {_port(server) for server in self.servers if server.running and server is not primary}
        for server in self.servers:
            if server.running:
                role, *told = await server.ask("ROLE")
                if (role == "master") != (server is primary):
                    return False
                if role != "master" and told[1:3] != [_port(primary), "connected"]:
                    return False
        for sentinel in self._running_sentinels():
            seen = _pairs(await sentinel.ask("SENTINEL", "MASTER", NAME))
            if (seen["flags"], seen["port"]) != ("master", str(_port(primary))):
                return False
            if int(seen["num-other-sentinels"]) != len(self.sentinels) - 1:
                return False
            known = [_pairs(replica) for replica in await sentinel.ask("SENTINEL", "REPLICAS", NAME)]
            in_step = [one for one in known if (one["flags"], one["master-link-status"]) == ("slave", "ok")]
            if {int(replica["port"]) for replica in in_step} != replicas:
                return False
        return True

    async def _until(self, holds: Callable[[], Awaitable[bool]]) -> None:
        async with asyncio.timeout(SETTLED_WITHIN_S):
            while True:
                try:
                    if await holds():
                        return
                except (RedisError, OSError, LookupError):
                    pass
                await asyncio.sleep(0.05)


def _port(server: RunningRedis) -> int:
    """Where the others reach it."""
    return server.tls_port or server.port


async def _told(sentinel: RunningRedis) -> int:
    try:
        _, port = await sentinel.ask("SENTINEL", "GET-MASTER-ADDR-BY-NAME", NAME)
    except (RedisError, OSError):
        return 0
    return int(port)


def _pairs(reply: list[str]) -> dict[str, str]:
    return dict(zip(reply[::2], reply[1::2], strict=True))
