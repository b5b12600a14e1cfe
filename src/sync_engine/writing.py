"""Joins the parts of the write side, each with what it needs."""

from __future__ import annotations

from collections.abc import Callable

from sync_engine.clock import Stamps
from sync_engine.config import SyncEngineConfig
from sync_engine.item import Op
from sync_engine.links import Link
from sync_engine.ports import Cache, Clock, Journal, Tier
from sync_engine.pressure import Bands, Gate
from sync_engine.resilience import Retries, RetryPolicy
from sync_engine.write.again import Refusals
from sync_engine.write.batcher import Batcher
from sync_engine.write.commits import Commits
from sync_engine.write.filing import Filing
from sync_engine.write.flush import Carrier, Lane
from sync_engine.write.passing import Passing
from sync_engine.write.path import WritePath
from sync_engine.write.pending import PendingIndex
from sync_engine.write.quarantine import Quarantine
from sync_engine.write.route import Route
from sync_engine.write.shown import Shown, View

__all__ = ["writing"]


def writing(
    config: SyncEngineConfig,
    clock: Clock,
    *,
    stamps: Stamps,
    journal: Journal | None,
    pending: PendingIndex,
    quarantine: Quarantine,
    view: View,
    sql: Link | None,
    redis: Link | None,
    l2: Cache | None,
    told: bool,
) -> tuple[WritePath, Refusals]:
    """What takes a write from its caller through the log and both tiers, and what it leaves in the quarantine.

    ``told``: changes are told in a stream, by Redis.
    """
    gate = Gate(
        ops_max=config.wal_max_items,
        bytes_max=config.pending_max_bytes,
        wait_ms=config.backpressure_wait_ms,
        bands=Bands(config.backpressure_warn, config.backpressure_critical),
        sleep=clock.sleep,
    )
    l3 = None if sql is None else sql.tier
    shown = Shown(pending, view)
    filing = Filing(quarantine, journal)
    to_l3, to_l2 = _batcher(config, clock), _batcher(config, clock)
    route = Route(gate, truth=to_l3 if l3 is not None else None, cache=to_l2 if l2 is not None else None)
    passing = Passing(
        route=route, shown=shown, pending=pending, filing=filing, gate=gate, journal=journal, truth=l3, cache=l2
    )
    truth = cache = None
    if sql is not None:
        # A cache-only item rarely has a row: it is asked for before it is deleted.
        truth = _lane(sql.tier, to_l3, sql.retries, passing, _keeps_sql, erases_blindly=False)
    if redis is not None and l2 is not None:
        # With a change stream Redis is given what it does not keep as well: it tells of it.
        cache = _lane(l2, to_l2, redis.retries, passing, _keeps_all if told else _keeps_redis, erases_blindly=True)
    writes = WritePath(
        stamps=stamps,
        gate=gate,
        commits=Commits(journal, gate=gate, pending=pending, shown=shown, route=route),
        filing=filing,
        pending=pending,
        shown=shown,
        route=route,
        truth=truth,
        cache=cache,
    )
    return writes, Refusals(quarantine, filing, pending, shown, writes, l3, l2)


def _batcher(config: SyncEngineConfig, clock: Clock) -> Batcher:
    return Batcher(
        flush_count=config.batch_flush_count,
        flush_bytes=config.batch_flush_bytes,
        flush_after_ms=config.batch_flush_ms,
        clock=clock,
    )


def _lane(
    tier: Tier,
    batcher: Batcher,
    retries: Retries,
    carrier: Carrier,
    keeps: Callable[[Op], bool],
    *,
    erases_blindly: bool,
) -> Lane:
    return Lane(tier, batcher, carrier, keeps, erases_blindly=erases_blindly, retry=RetryPolicy(), retries=retries)


def _keeps_sql(op: Op) -> bool:
    return op.sql


def _keeps_redis(op: Op) -> bool:
    return op.redis


def _keeps_all(op: Op) -> bool:
    return True
