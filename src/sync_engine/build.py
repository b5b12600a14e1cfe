"""Builds the parts of one engine from its settings: opened and connected in the order in which they need each other."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Final, cast

from sync_engine.clock import Stamps
from sync_engine.config import REDIS_CONNECTIONS, SQL_CONNECTIONS, SyncEngineConfig
from sync_engine.embedded import EmbeddedRedis
from sync_engine.errors import SyncEngineError, TierUnavailable
from sync_engine.evict import Eviction
from sync_engine.heal import Healing
from sync_engine.late import Late
from sync_engine.links import Link, Links
from sync_engine.log import WriteAheadLog
from sync_engine.notes import Notes
from sync_engine.parts import STREAM_MAY_GO, Parts
from sync_engine.ports import Cache, Clock, Tier, Truth
from sync_engine.read import Reader
from sync_engine.resilience import Breaker, Guarded, Retries
from sync_engine.storage.memory import L1Cache
from sync_engine.storage.redis import ChangeStream, RedisStore
from sync_engine.storage.sql import SqlStore
from sync_engine.storage.sql.network import Limits
from sync_engine.trust import Trust, Trusted
from sync_engine.write.pending import PendingIndex
from sync_engine.write.quarantine import Quarantine
from sync_engine.writing import writing

__all__ = ["Outside", "build"]

log = logging.getLogger(__name__)

REDIS_PATIENCE_S: Final = 2.0
"""How long a read waits for Redis where SQL can answer; after five such waits the breaker spares the next ones."""

SQL_READ_STATEMENTS: Final = 2
SQL_WRITE_STATEMENTS: Final = 10
"""How long a call on SQL may take, in statements that each take the longest they may. A store ends each by itself."""

HEALED_WITHIN_S: Final = 2.0
"""How long a start waits for a Redis that may have lost something; what is left is made up for beside the work."""


@dataclass(frozen=True, slots=True)
class Outside:
    """How ``build`` opens what lies outside of the process; a simulation has its own."""

    log: Callable[..., Awaitable[WriteAheadLog]] = field(default_factory=lambda: WriteAheadLog.open)
    notes: Callable[[Path], Awaitable[Notes]] = field(default_factory=lambda: Notes.open)
    quarantine: Callable[..., Quarantine] = Quarantine
    sql: Callable[..., Awaitable[Tier]] = field(default_factory=lambda: SqlStore.connect)
    redis: Callable[..., Awaitable[Tier]] = field(default_factory=lambda: RedisStore.connect)
    rng: Callable[[], random.Random] = random.Random


async def build(
    config: SyncEngineConfig,
    clock: Clock,
    failed: Callable[[BaseException], None],
    around: Callable[[Tier], Tier],
    outside: Outside | None = None,
) -> Parts:
    """Open and connect every part of ``config``, in the order in which they depend on each other."""
    outside = Outside() if outside is None else outside
    async with AsyncExitStack() as opened:
        await asyncio.to_thread(config.data_dir.mkdir, mode=0o700, parents=True, exist_ok=True)
        journal = None
        if config.sql_url is not None:
            # First of all: the log's lock is what keeps a second engine away from this data_dir.
            journal = await outside.log(
                config.log_dir, segment_bytes=config.wal_segment_bytes, reserve_bytes=config.wal_reserve_bytes
            )
            opened.push_async_callback(journal.close)
        stamps = Stamps(clock, outside.rng(), after=journal.last_stamp if journal is not None else 0)
        notes = await outside.notes(config.data_dir / "notes.json")
        pending = PendingIndex(config.pending_max_bytes, journal)
        truth = await _truth(config, clock, around, stamps, opened, outside)
        l3 = None if truth is None else truth.tier
        trust = Trust("l2", needed=l3 is not None)
        stream = None
        if config.enable_cdc_stream:
            stream = ChangeStream(notes.writer, config.cdc_stream_key, config.cdc_stream_maxlen)
        redis = await _cache(config, clock, around, trust, stream, opened, outside)
        links = Links([link for link in (truth, redis) if link is not None], config)
        l2 = None if redis is None else Trusted(redis.tier, trust, l3, clock, pending.newest_stamp)
        healing = eviction = None
        if redis is not None and truth is not None and l3 is not None:
            if config.redis_eviction_enabled:
                eviction = Eviction(
                    trust,
                    redis.tier,
                    l3,
                    clock,
                    start=config.redis_eviction_start,
                    target=config.redis_eviction_target,
                    rng=outside.rng(),
                )
            healing = Healing(
                trust,
                redis.tier,
                l3,
                clock,
                retries={"l2": redis.retries, "l3": truth.retries},
                promotion_ttl_ms=round(config.promotion_ttl * 1000),
                runs=notes.redis_runs,
                keep_runs=notes.keep_redis_runs,
                coming=pending.newest_stamp,
            )
            with suppress(SyncEngineError, TimeoutError):  # it is tried again, and told, beside the work
                async with asyncio.timeout(HEALED_WITHIN_S):
                    await healing.heal()

        quarantine = outside.quarantine(config.data_dir / "quarantine", clock)
        await quarantine.open()
        l1 = L1Cache(config.l1_max_bytes, clock=clock, rng=outside.rng())
        reader = Reader(
            pending=pending,
            quarantine=quarantine,
            l1=l1,
            l2=l2,
            l3=l3,
            observe=stamps.observe,
            clock=clock,
            promotion_ttl_ms=round(config.promotion_ttl * 1000),
        )
        writes, refusals = writing(
            config,
            clock,
            stamps=stamps,
            journal=journal,
            pending=pending,
            quarantine=quarantine,
            view=reader,
            sql=truth,
            redis=redis,
            l2=cast(Cache | None, l2),
            told=stream is not None,
        )
        recovered = len(journal.recovered) if journal is not None else 0
        if journal is not None and recovered:
            log.info("taking up %d operations from the log", recovered)
            writes.recover(journal.recovered)
            journal.recovered.clear()  # whole items, which the write path now keeps within its own bound
        return Parts(
            l1=l1,
            l2=l2,
            l3=l3,
            journal=journal,
            pending=pending,
            quarantine=quarantine,
            reader=reader,
            writes=writes,
            refusals=refusals,
            trust=trust,
            healing=healing,
            eviction=eviction,
            links=links,
            told=stream is not None,
            recovered=recovered,
            failed=failed,
            opened=opened.pop_all(),
        )


async def _truth(
    config: SyncEngineConfig,
    clock: Clock,
    around: Callable[[Tier], Tier],
    stamps: Stamps,
    opened: AsyncExitStack,
    outside: Outside,
) -> Link | None:
    if config.sql_url is None:
        return None
    url = config.sql_url.get_secret_value()

    async def connect(config: SyncEngineConfig) -> Tier:
        return await outside.sql(url, timeout_ms=config.sql_timeout_ms, write_concurrency=config.sql_write_concurrency)

    async def connected(store: Tier) -> None:
        # Another engine's clock may have run ahead of ours: never stamp below what the truth holds.
        stamps.observe(await cast(Truth, store).newest_stamp())

    def deadlines_s(config: SyncEngineConfig) -> tuple[float, float]:
        statement_s = Limits(config.sql_timeout_ms).statement_ms / 1000
        return SQL_READ_STATEMENTS * statement_s, SQL_WRITE_STATEMENTS * statement_s

    late = await _late("l3", partial(connect, config), connected, opened)
    guarded = Guarded(around(late), Breaker("l3", clock), clock)
    return Link(guarded, late, Retries(clock), connect, deadlines_s, SQL_CONNECTIONS)


async def _cache(
    config: SyncEngineConfig,
    clock: Clock,
    around: Callable[[Tier], Tier],
    trust: Trust,
    stream: ChangeStream | None,
    opened: AsyncExitStack,
    outside: Outside,
) -> Link | None:
    if config.redis_url is None:
        return None
    url = config.redis_url.get_secret_value()
    if url.startswith("embedded://"):
        server = EmbeddedRedis(data_dir=config.data_dir / "redis")
        await server.start()
        opened.push_async_callback(server.stop)
        url = server.url

    async def connect(config: SyncEngineConfig) -> Tier:
        return await outside.redis(
            url,
            config.redis_prefix,
            timeout_ms=config.redis_timeout_ms,
            response_timeout_ms=config.redis_response_timeout_ms,
            binary_format=config.redis_binary_format,
            ca_file=config.redis_ca_file,
            change_stream=stream,
            on_new_server=trust.lose,
        )

    async def connected(store: Tier) -> None:
        if stream is not None and (await cast(Cache, store).facts()).evicts_anything:
            log.warning(STREAM_MAY_GO)

    def deadlines_s(config: SyncEngineConfig) -> tuple[float | None, float]:
        # A read that SQL can answer does not wait out a Redis that has stopped; a write is left its full time.
        write_s = 2 * (config.redis_timeout_ms + config.redis_response_timeout_ms) / 1000
        return min(write_s, REDIS_PATIENCE_S) if config.sql_url is not None else None, write_s

    late = await _late("l2", partial(connect, config), connected, opened)
    guarded = Guarded(around(late), Breaker("l2", clock), clock)
    return Link(guarded, late, Retries(clock), connect, deadlines_s, REDIS_CONNECTIONS)


async def _late(
    name: str,
    connect: Callable[[], Awaitable[Tier]],
    connected: Callable[[Tier], Awaitable[None]],
    opened: AsyncExitStack,
) -> Late:
    late = Late(name, connect, connected)
    opened.push_async_callback(late.close)
    try:
        await late.ready()
    except TierUnavailable as down:
        log.warning("starting without %s: %s", name, down)
    return late
