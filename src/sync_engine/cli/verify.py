"""The demo's examination: what each tier returns, compared with what was acknowledged, and how fast it answers."""

from __future__ import annotations

import hashlib
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from statistics import quantiles

from sync_engine.cli.load import Acknowledged, Order
from sync_engine.cli.places import STATES
from sync_engine.config import SyncEngineConfig
from sync_engine.engine import SyncEngine
from sync_engine.errors import Corruption
from sync_engine.item import SyncItem
from sync_engine.storage.redis import RedisStore
from sync_engine.storage.sql import SqlStore

__all__ = ["Comparison", "Examination", "Latency", "Scan", "StateCount", "TierFacts", "compare", "examine"]

BATCH = 500
READS = 2_000
SCANNED = 5

Acks = Mapping[str, Acknowledged]
GetMany = Callable[[Sequence[str]], Awaitable[Mapping[str, SyncItem]]]
GetOne = Callable[[str], Awaitable[SyncItem | None]]


@dataclass(frozen=True, slots=True)
class Comparison:
    """How many acknowledged items a tier returned, and how many differ or are missing."""

    items: int
    content_bytes: int
    differ: int
    missing: int


@dataclass(frozen=True, slots=True)
class Latency:
    """Single reads, one after the other, in microseconds."""

    reads: int
    p50_us: float
    p99_us: float


@dataclass(frozen=True, slots=True)
class TierFacts:
    """One tier. ``occupied_bytes`` is what it takes up, where that is ours alone and known."""

    tier: str
    compared: Comparison
    latency: Latency
    occupied_bytes: int | None


@dataclass(frozen=True, slots=True)
class Scan:
    """One prefix scan: its first items, how many there are and how many there must be."""

    prefix: str
    count: int
    expected: int
    milliseconds: float
    first: list[SyncItem]


@dataclass(frozen=True, slots=True)
class StateCount:
    """How many items are in a state, by tier; ``redis`` is None without Redis."""

    state: str
    expected: int
    redis: int | None
    sql: int


@dataclass(frozen=True, slots=True)
class Examination:
    """All that was looked at. ``expected`` items were ordered, ``acknowledged`` of them acknowledged."""

    expected: int
    acknowledged: int
    tiers: list[TierFacts]
    scan: Scan
    states: list[StateCount]

    @property
    def differ(self) -> int:
        """Items that a tier returned with other bytes, over all tiers."""
        return sum(facts.compared.differ for facts in self.tiers)

    @property
    def missing(self) -> int:
        """Items that a tier did not return, over all tiers."""
        return sum(facts.compared.missing for facts in self.tiers)

    @property
    def counts_agree(self) -> bool:
        """Whether the scan and every state count say what was acknowledged."""
        return self.scan.count == self.scan.expected and all(
            each.sql == each.expected and each.redis in (None, each.expected) for each in self.states
        )

    @property
    def passed(self) -> bool:
        """Whether everything ordered was acknowledged, and everything acknowledged is everywhere, byte for byte."""
        whole = self.acknowledged == self.expected
        return whole and self.differ == 0 and self.missing == 0 and self.counts_agree


async def compare(acks: Acks, get_many: GetMany) -> Comparison:
    """Ask a tier for every acknowledged item and hash what it returns."""
    items = content_bytes = differ = missing = 0
    for ids in _batches(acks):
        found = await _forgiving(get_many, ids)
        for object_id in ids:
            item = found.get(object_id)
            if item is None:
                missing += 1
                continue
            if isinstance(item, Corruption):
                differ += 1
                continue
            items += 1
            content_bytes += len(item.content)
            # Hashed here: an item's own hash could have been read from where the content was.
            differ += hashlib.sha256(item.content).hexdigest() != acks[object_id].content_hash
    return Comparison(items, content_bytes, differ, missing)


async def examine(order: Order, acks: Acks, expected: int) -> Examination:
    """Open the stores directly and an engine on top of them, and look at everything. Nothing is written."""
    config = order.config()
    async with SyncEngine(config) as engine:
        tiers = [await _memory(engine, acks)]
        states = dict.fromkeys(STATES, 0) | Counter(ack.state for ack in acks.values())
        in_redis: dict[str, int] = {}
        if config.redis_url is not None:
            cache = await RedisStore.connect(config.redis_url.get_secret_value(), config.redis_prefix)
            try:
                compared = await compare(acks, cache.get_many)
                latency = await _latency(cache.get, acks)
                occupied = (await cache.client.info("memory"))["used_memory_dataset"] if order.own_redis else None
                tiers.append(TierFacts("L2 Redis", compared, latency, occupied))
                in_redis = {state: await cache.count_by_state(state) for state in states}
            finally:
                await cache.close()
        tiers.append(await _sql(order, config, acks))
        counts = [
            StateCount(state, count, in_redis.get(state), await engine.count_by_state(state))
            for state, count in states.items()
        ]
        return Examination(expected, len(acks), tiers, await _scan(engine, acks), counts)


async def _memory(engine: SyncEngine, acks: Acks) -> TierFacts:
    for ids in _batches(acks):  # a new process begins with empty memory: one pass lifts everything into it
        await _forgiving(engine.get_many, ids)
    compared = await compare(acks, engine.get_many)
    return TierFacts("L1 memory", compared, await _latency(engine.get, acks), engine.stats().l1.bytes)


async def _sql(order: Order, config: SyncEngineConfig, acks: Acks) -> TierFacts:
    assert config.sql_url is not None, "the demo never runs without SQL"
    truth = await SqlStore.connect(config.sql_url.get_secret_value())
    try:
        compared = await compare(acks, truth.get_many)
        latency = await _latency(truth.get, acks)
    finally:
        await truth.close()
    own = config.data_dir / "truth.db"
    size = own.stat().st_size if own.exists() else None
    return TierFacts("L3 SQL", compared, latency, size)


async def _scan(engine: SyncEngine, acks: Acks) -> Scan:
    countries = Counter(object_id.split(".")[1] for object_id in acks if object_id.startswith("place."))
    country = "JP" if "JP" in countries or not countries else next(iter(countries))
    prefix = f"place.{country}."
    begun = time.perf_counter()
    first = await engine.scan_prefix(prefix, SCANNED)
    count = await engine.count_prefix(prefix)
    return Scan(prefix, count, countries[country], (time.perf_counter() - begun) * 1e3, first)


async def _latency(get: GetOne, acks: Acks) -> Latency:
    ids = random.Random(0).choices(list(acks), k=READS)  # noqa: S311  # a sample, the same every time
    took_us: list[float] = []
    for object_id in ids:
        begun = time.perf_counter_ns()
        try:
            await get(object_id)
        except Corruption:
            continue  # counted by the comparison
        took_us.append((time.perf_counter_ns() - begun) / 1e3)
    if len(took_us) < 2:
        return Latency(len(took_us), 0.0, 0.0)
    cuts = quantiles(took_us, n=100, method="inclusive")
    return Latency(len(took_us), cuts[49], cuts[98])


async def _forgiving(get_many: GetMany, ids: Sequence[str]) -> Mapping[str, SyncItem | Corruption]:
    """``get_many`` raises for one bad item among many: then each is asked for alone, and the bad ones named."""
    try:
        return await get_many(ids)
    except Corruption:
        found: dict[str, SyncItem | Corruption] = {}
        for object_id in ids:
            try:
                found |= await get_many([object_id])
            except Corruption as bad:
                found[object_id] = bad
        return found


def _batches(acks: Acks) -> list[list[str]]:
    remaining = iter(acks)
    return list(iter(lambda: list(islice(remaining, BATCH)), []))
