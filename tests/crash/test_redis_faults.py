"""Redis full, evicting, slow, damaged, flapping, or set back in time under a working engine, on every kind of server.

Rows 3, 4, 18, 19 and 24 of the fault matrix, and what row 1 leaves open: a kill tears no change out of the stream, and
a Redis that comes back older than it was is not believed. The long variant runs on one kind of server.
"""

from __future__ import annotations

import asyncio
import os
import random
import re
import signal
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import pytest
from redis.asyncio import Redis
from redis.exceptions import ResponseError

from sync_engine import Ack, ContentType, PayloadTooLarge, SubmitOptions, SyncEngine, SyncItem, TierUnavailable
from sync_engine.item import Op
from sync_engine.resilience import BreakerPolicy, Retries, RetryBudget
from sync_engine.storage.redis import CdcEntry, ChangeStream, RedisStore
from sync_engine.storage.redis.cdc import Gap
from sync_engine.storage.redis.pool import CONNECTIONS_MAX
from sync_engine.testing.fixtures import StartKind
from sync_engine.testing.proxy import CuttingProxy
from sync_engine.testing.servers import KINDS, RedisKind, RunningRedis

from .driver import STORED, flood_content, told
from .rig import NO_L1, QUICK, MakeRig, Rig, until, until_well
from .truths import NAMES, Truth, thorough
from .whole import look

KIB = 1024
MIB = 1024 * KIB


async def limit(server: RunningRedis, spare_bytes: int | None) -> None:
    """Set ``maxmemory`` so far above what is in use; None: as if there were nothing left at all."""
    used = int((await server.ask("INFO", "memory"))["used_memory"])
    await server.ask("CONFIG", "SET", "maxmemory", 1 if spare_bytes is None else used + spare_bytes)


async def unlimit(server: RunningRedis) -> None:
    await server.ask("CONFIG", "SET", "maxmemory", 0)


def noisy(object_id: str, rng: random.Random, size: int) -> SyncItem:
    """Random content: RedisJSON keeps equal strings once, and then nothing is ever full."""
    state = rng.choice(("full", "fuller"))
    if rng.random() < 0.5:
        return SyncItem(object_id, rng.randbytes(size), state=state)
    return SyncItem.from_json(object_id, {"r": rng.randbytes(size // 2).hex()}, state=state)


# 3: out of memory


async def test_I6_out_of_memory_at_any_point_of_a_batch_leaves_no_operation_half_done(
    make_rig: MakeRig, server: RunningRedis
) -> None:
    rig = make_rig(redis_url=server.url)
    rng = random.Random(5)
    whole = 0
    for step in range(10 if thorough(server.kind) else 3):
        prefix = f"{rig.prefix}{step}:"
        store = await RedisStore.connect(server.url, prefix, change_stream=ChangeStream("test"))
        before = [noisy(f"i{n:03}", rng, 500).replace(stamp=n + 1) for n in range(300)]
        await store.put_batch(before)
        ops = [Op(kind="delete", object_id=f"i{n:03}", stamp=1_000) for n in range(0, 300, 3)]
        for n in range(1, 300, 3):
            moved = before[n].with_state("emptier")
            ops.append(Op(kind="restate", object_id=moved.object_id, stamp=1_000, item=moved, state="emptier"))
        put = [noisy(f"i{n:03}", rng, 2_000) for n in (*range(2, 300, 3), *range(300, 600))]
        ops += [Op(kind="put", object_id=item.object_id, stamp=1_000, item=item) for item in put]
        rng.shuffle(ops)
        await limit(server, step * 320 * KIB)
        try:
            await store.apply(ops)
            whole += 1
        except TierUnavailable as refused:
            if "out of memory" not in refused.reason:
                raise
            rig.figures.faults += 1
        finally:
            await unlimit(server)
        (await look(server.url, prefix)).judge(rig.figures, told=True)
        await store.apply(ops)  # again, as the engine would: what was applied before changes nothing
        seen = await look(server.url, prefix)
        seen.judge(rig.figures, told=True)
        assert {item.object_id for item in put} | {f"i{n:03}" for n in range(1, 300, 3)} == seen.items.keys()
        assert {item.stamp for item in seen.items.values()} == {1_000}
        rig.figures.read_backs += 2
        await store.close()
    rig.figures.tell(f"3 out of memory at any point of a batch, {server.kind}")
    assert rig.figures.faults > 0
    assert whole > 0 or not thorough(server.kind), "the end of a batch was not tried"


async def test_I3_a_full_redis_holds_up_nothing_else_and_loses_nothing(make_rig: MakeRig, server: RunningRedis) -> None:
    rig = make_rig(redis_url=server.url)
    rig.settings |= {**QUICK, "enable_cdc_stream": True, "redis_eviction_enabled": False}
    rng = random.Random(3)
    wanted: dict[str, SyncItem] = {}
    async with SyncEngine(rig.config()) as engine:
        for spare in (32, 256, 1_024) if thorough(server.kind) else (128,):
            await limit(server, spare * KIB)
            working = asyncio.create_task(rig.work(engine, moves=15))
            receipts = []
            while "out of memory" not in (engine.stats().lanes["l2"].trouble or ""):
                item = noisy(f"o.{len(wanted):04}", rng, 4 * KIB)
                wanted[item.object_id] = item
                receipts.append(await engine.submit(item))
                await asyncio.sleep(0.001)
            await limit(server, None)  # from here on nothing gets through, whatever buffers come and go
            rig.figures.faults += 1
            (await look(server.url, rig.prefix)).judge(rig.figures, told=True)

            wanted["o.stored"] = SyncItem("o.stored", b"%d" % spare)
            storing = asyncio.create_task(engine.submit(wanted["o.stored"], ack=Ack.STORED))
            wanted["o.sql"] = SyncItem("o.sql", b"%d" % spare)
            await engine.submit(wanted["o.sql"], SubmitOptions.durable())
            gone = next(iter(wanted))
            del wanted[gone]
            assert await engine.delete(gone)
            assert await engine.get(gone) is None
            await until(lambda: engine.stats().lanes["l3"].waiting == 0)
            assert {item.object_id: item for item in await engine.scan_prefix("o.", 10_000)} == wanted
            health = await engine.health()
            assert not health.ok
            assert health.tiers["l2"].waiting > 0
            assert not storing.done(), "STORED means Redis too"

            await unlimit(server)
            await asyncio.gather(storing, *(receipt.stored() for receipt in receipts))
            await working
            await engine.flush()
            await rig.read_back(engine)
            seen = await look(server.url, rig.prefix)
            seen.judge(rig.figures, told=True)
            in_redis = {key: item for key, item in seen.items.items() if key.startswith("o.")}
            assert in_redis == {key: item for key, item in wanted.items() if key != "o.sql"}
        assert engine.stats().quarantined == 0
    rig.figures.tell(f"3 Redis out of memory under a working engine, {server.kind}")


# 4: the server drops what it likes


class Follower:
    """Somebody who keeps copies by the change stream, and fetches everything anew where he is told of a gap."""

    def __init__(self, store: RedisStore, engine: SyncEngine) -> None:
        self.copies: dict[str, bytes] = {}
        self.gaps: list[Gap] = []
        self._engine = engine
        self._reader = store.iter_cdc()

    async def catch_up(self) -> None:
        async for entry in self._reader:
            if entry.gap is not None:
                self.gaps.append(entry.gap)
                self.copies = {item.object_id: item.content for item in await self._engine.scan_prefix("", 10_000)}
            elif entry.content is not None:
                self.copies[entry.object_id] = entry.content
            else:
                self.copies.pop(entry.object_id, None)


async def evicted(server: RunningRedis, key: str) -> None:
    """Somebody else fills the server until it has dropped this key, among others."""
    async with Redis.from_url(server.url) as stranger:
        await server.ask("CONFIG", "SET", "maxmemory-policy", "allkeys-lru")
        await limit(server, 1_024 * KIB)
        while await stranger.exists(key):
            async with stranger.pipeline(transaction=False) as pipe:
                for _ in range(50):
                    pipe.set(f"stranger:{random.random()}", bytes(8 * KIB))
                await pipe.execute()
        await unlimit(server)


@pytest.mark.slow
async def test_I4_what_redis_evicts_is_read_from_sql_and_a_lost_piece_of_the_stream_is_a_gap(
    make_rig: MakeRig, server: RunningRedis
) -> None:
    rig = make_rig(redis_url=server.url)
    rig.settings |= {**NO_L1, "enable_cdc_stream": True, "redis_eviction_enabled": False}
    rig.settings["batch_flush_bytes"] = 32 * KIB  # a request takes room itself, and cannot be dropped
    rng = random.Random(4)
    await server.ask("CONFIG", "SET", "maxmemory-policy", "allkeys-lru")
    store = await RedisStore.connect(server.url, rig.prefix)
    async with SyncEngine(rig.config()) as engine:
        await rig.work(engine)
        await engine.flush()
        # From now on the server makes room for one thing by dropping another.
        await limit(server, 2_048 * KIB)
        for _ in range(4 if thorough(server.kind) else 2):
            working = asyncio.create_task(rig.work(engine, moves=15))
            await engine.submit_many([noisy(f"e.{n:03}", rng, 8 * KIB) for n in range(150)])
            await working
            await engine.flush()
            await rig.read_back(engine, l2_exact=False, l2_states=False)
        assert any("allkeys" in warning for warning in (await engine.health()).warnings)
        await unlimit(server)
        rig.figures.faults = int((await server.ask("INFO", "stats"))["evicted_keys"])
        assert rig.figures.faults > 10

        await store.client.execute_command("UNLINK", f"{rig.prefix}__local__:cdc", f"{rig.prefix}__local__:cdc:seq")
        follower = Follower(store, engine)
        numbers = [rng.randint(1, 20) for _ in range(6 if thorough(server.kind) else 3)]
        missing = []
        for round_, number in enumerate(numbers):
            await engine.submit_many([SyncItem(f"f.{n}", b"%d" % round_) for n in range(number)], ack=Ack.STORED)
            await follower.catch_up()
            # Told while he is away, and lost.
            await engine.submit_many([SyncItem(f"f.{n}", b"lost %d" % round_) for n in range(number)], ack=Ack.STORED)
            await engine.delete("f.0", ack=Ack.STORED)
            if round_ % 2:
                await store.client.execute_command("XTRIM", f"{rig.prefix}__local__:cdc", "MAXLEN", 0)
            else:
                await evicted(server, f"{rig.prefix}__local__:cdc")
            anew = not await store.client.exists(f"{rig.prefix}__local__:cdc:seq")
            missing.append(None if anew else number + 1)
            await engine.submit(SyncItem("f.next", b"%d" % round_), ack=Ack.STORED)
            await follower.catch_up()
            assert [gap.missing for gap in follower.gaps] == missing
            assert follower.copies == {item.object_id: item.content for item in await engine.scan_prefix("", 10_000)}
        rig.figures.faults += len(missing)
    await store.close()
    told = f"{len(follower.gaps)} of {len(missing)} gaps of the change stream told"
    rig.figures.tell(f"4 Redis evicts, {server.kind}", told)


# 18: too much


@pytest.mark.slow
async def test_I10_the_memory_of_a_process_that_floods_a_slow_redis_is_bounded(
    make_rig: MakeRig, own_kind: StartKind
) -> None:
    server = await own_kind("redis-8-modules")
    count, size = 1_200, 128 * KIB
    async with CuttingProxy(server.url) as proxy:
        rig = make_rig(redis_url=proxy.url_for(server.url))
        rig.settings |= {"pending_max_bytes": MIB, "l1_max_bytes": MIB}
        proxy.delay(0.02)
        rig.start(flood={"count": count, "bytes_each": size, "tasks": 20})
        (flooded,) = await rig.heard("flooded")
        assert await asyncio.to_thread(rig.drivers.ended) == STORED  # the proxy runs here
        (down,) = [line for line in await rig.lines() if line["e"] == "down"]
    assert flooded["acked"] == count
    # Batches of 4 MiB on their way to two tiers and their requests, a segment of the log: 76 MiB, whether 75 MiB or
    # 300 were accepted.
    grown = max(flooded["peak"], down["peak"]) - flooded["before"]
    assert grown < 112 * MIB, f"{flooded} {down}"
    await _arrived(server, rig, count, size)
    rig.figures.faults, rig.figures.acked = 1, count
    flood = f"18 a flood of {count * size // MIB} MiB while Redis is slow, bound 1 MiB, {server.kind}"
    rig.figures.tell(flood, f"memory grew by {grown // MIB} MiB")


async def test_I10_what_waits_for_a_slow_redis_is_bounded_and_arrives(make_rig: MakeRig, server: RunningRedis) -> None:
    count, size, batch = 160, 128 * KIB, 128 * KIB
    async with CuttingProxy(server.url) as proxy:
        rig = make_rig(redis_url=proxy.url_for(server.url))
        rig.settings |= {"pending_max_bytes": MIB, "l1_max_bytes": MIB, "batch_flush_bytes": batch}
        most = 0
        async with SyncEngine(rig.config()) as engine:
            await server.pause()
            for number in range(count):
                if number == count // 2:
                    proxy.delay(0.01)
                    await server.resume()
                await engine.submit(SyncItem(f"f.{number:05}", flood_content(number, size)))
                most = max(most, engine.stats().pending_bytes)
            await engine.flush()
            assert engine.stats().pending == engine.stats().log_records == 0
    assert MIB / 2 < most <= MIB + 2 * 4 * batch + size, "the bound, and a batch for each tier"
    await _arrived(server, rig, count, size)
    rig.figures.faults, rig.figures.acked = 2, count
    flood = f"18 {count * size // MIB} MiB while Redis stands still, then is slow, bound 1 MiB, {server.kind}"
    rig.figures.tell(flood, f"{most / MIB:.1f} MiB held at most")


@pytest.mark.slow
async def test_the_largest_item_goes_through_every_tier_and_one_byte_more_is_refused(
    make_rig: MakeRig, server_kind: RedisKind, kind_url: str
) -> None:
    rig = make_rig(redis_url=kind_url)
    largest = (16 if thorough(server_kind) else 2) * MIB
    rig.settings |= {"enable_cdc_stream": True, "max_payload_bytes": largest}
    items = [
        SyncItem("binary", b"\xff" * largest),
        SyncItem("json", b'"' + b"j" * (largest - 2) + b'"'),
        SyncItem("less", b"\xfe" * (largest - 1)),
    ]
    assert items[1].content_type is ContentType.JSON
    async with SyncEngine(rig.config()) as engine:
        for item in items:
            with pytest.raises(PayloadTooLarge):
                await engine.submit(item.replace(content=item.content.ljust(largest + 1)))
            await engine.submit(item, ack=Ack.STORED)
            rig.figures.acked += 1
        assert engine.stats().quarantined == 0
        wanted = {item.object_id: item for item in await engine.scan_prefix("")}
    l2 = await RedisStore.connect(kind_url, rig.prefix)
    assert await l2.get_many([item.object_id for item in items]) == wanted
    assert [entry.item() async for entry in l2.iter_cdc()] == list(wanted.values())
    await l2.close()
    rig.figures.faults = rig.figures.failed = rig.figures.acked
    rig.figures.tell(f"18 items of max_payload_bytes, {largest // MIB} MiB, and of a byte more, {server_kind}")


async def _arrived(server: RunningRedis, rig: Rig, count: int, size: int) -> None:
    store = await RedisStore.connect(server.url, rig.prefix)
    ids = [f"f.{n:05}" for n in range(count)]
    assert await store.exists_batch(ids) == [True] * count
    found = await store.get_many(ids[::50])
    assert [item.content for item in found.values()] == [flood_content(n, size) for n in range(0, count, 50)]
    await store.close()


# 19: damage


@pytest.mark.parametrize("binary_format", ["compact", "json"])
async def test_I5_a_damaged_copy_in_redis_is_never_served_and_is_mended_from_sql(
    make_rig: MakeRig, server_kind: RedisKind, kind_url: str, binary_format: str
) -> None:
    rig = make_rig(redis_url=kind_url)
    rig.settings |= {**NO_L1, "redis_binary_format": binary_format}
    rng = random.Random(19)
    store = await RedisStore.connect(kind_url, rig.prefix)
    documents = (await store.capabilities()).json
    # Bytes of three digits each: what is stored of one item is laid out as of another.
    contents = [bytes(rng.randrange(100, 200) for _ in range(40)) for _ in range(250)]
    items = {f"b.{n:03}": SyncItem(f"b.{n:03}", content, state="s") for n, content in enumerate(contents)}
    items |= {f"j.{n:03}": SyncItem.from_json(f"j.{n:03}", {"n": n}, state="s") for n in range(12)}
    async with SyncEngine(rig.config()) as engine:
        await engine.submit_many(items.values(), ack=Ack.STORED)
        # Newer than those in whose place they are put.
        await engine.submit_many([SyncItem("z.b", b"z"), SyncItem.from_json("z.j", {"n": "z"})], ack=Ack.STORED)
        sound = await _values(store, [*items, "z.b", "z.j"])
        for command, name, *args in _damages(sound, binary_format, documents, rng):
            await store.client.execute_command(command, rig.prefix + name, *args)
            rig.figures.faults += 1
        damaged = {name for name, value in (await _values(store, sound)).items() if value != sound[name]}
        assert len(damaged) == rig.figures.faults
        assert (await store.fetch(list(sound))).corrupt.keys() == damaged

        async with asyncio.timeout(60):
            left = damaged
            while left:  # what is not copied upward by one read is by another
                found = await engine.get_many(sorted(items)[::2])
                found |= {name: item for name in sorted(items)[1::2] if (item := await engine.get(name))}
                for name, item in items.items():
                    if found.get(name) != item:
                        rig.figures.lies += 1
                        rig.figures.wrong.append(f"lie: {told(found.get(name))}, not {told(item)}")
                left = {name for name, value in (await _values(store, damaged)).items() if value != sound[name]}
        (await look(kind_url, rig.prefix)).judge(rig.figures)

        # A copy that is damaged is in no write's way either.
        damages = list(_damages(sound, binary_format, documents, rng))
        for command, name, *args in damages:
            await store.client.execute_command(command, rig.prefix + name, *args)
        rig.figures.faults += len(damages)
        await engine.submit_many([items[name].replace(content=b"anew") for _, name, *_ in damages], ack=Ack.STORED)
        for _, name, *_ in damages:
            assert (await engine.get(name)).content == b"anew"
        assert engine.stats().quarantined == 0
    await store.close()
    kept = "text" if binary_format == "json" else "compact"
    noticed = f"{len(damaged)} of {len(damages)} noticed and mended"
    rig.figures.tell(f"19 copies damaged ({kept}), {server_kind}", noticed)


Command = tuple[Any, ...]


def _damages(sound: Mapping[str, bytes], binary_format: str, documents: bool, rng: random.Random) -> Iterator[Command]:
    """Each to an item of its own: a command, the id, further arguments."""
    binary, json = (sorted(name for name in sound if name[0] == kind) for kind in "bj")
    for at in _places(sound["b.000"], binary_format):
        name = binary.pop()
        yield "SETRANGE", name, at, _other(sound[name], at, binary_format, rng)
    name = binary.pop()
    yield "SET", name, sound["z.b"]
    if documents:
        yield "JSON.SET", json.pop(), "$", sound["z.j"]
        yield "JSON.SET", json.pop(), "$.id", '"j.nobody"'
        yield "JSON.SET", json.pop(), "$.payload", '{"n":"changed"}'
        yield "JSON.SET", json.pop(), "$.payload.n", '"changed"'
        yield "JSON.SET", json.pop(), "$.payload_hash", f'"{64 * "0"}"'
        yield "JSON.DEL", json.pop(), "$.payload.n"
    else:
        yield "SET", json.pop(), sound["z.j"]


def _places(value: bytes, binary_format: str) -> list[int]:
    """Bytes whose change is noticed: not of state, version and times, which no hash covers."""
    if binary_format == "compact":
        hash_at = value.index(b"hash")
        header_at = 25 + int(value[22:25])
        header_end = header_at + 5 + int(value[header_at : header_at + 5])
        # Without its magic a string is somebody else's.
        return [*range(2, 25), *range(header_at, hash_at + 6 + 32), *range(header_end, len(value))]
    id_at, hash_at, content_at = (value.index(name) + len(name) for name in (b'_id":"', b'_hash":"', b'"content":['))
    content_end = value.index(b"]", content_at)
    # Of each number the last digit: it is a number of 8 bits still, and the text a text.
    last = [at for at in range(content_at, content_end) if value[at + 1] in b",]" and value[at] != ord(",")]
    return [id_at, *range(hash_at, hash_at + 64), *last]


def _other(value: bytes, at: int, binary_format: str, rng: random.Random) -> bytes:
    if binary_format == "compact":
        # In front are numbers. A digit of the stamp for another digit would be another stamp, which no hash covers.
        numbers_end = 25 + int(value[22:25]) + 5
        return bytes([value[at] ^ (0x40 if at < numbers_end else rng.randrange(1, 256))])
    digit = value[at : at + 1]
    return b"1" if digit == b"0" else b"%d" % (int(digit) - 1) if digit.isdigit() else b"0"


async def _values(store: RedisStore, names: Iterable[str]) -> dict[str, bytes]:
    values = {}
    for name in names:
        try:
            values[name] = await store.client.get(store.prefix + name)
        except ResponseError:  # a document
            values[name] = await store.client.execute_command("JSON.GET", store.prefix + name)
    return values


# 24: starts without a server, and a server that comes and goes


BREAKER = BreakerPolicy()
BUDGET = RetryBudget()


ORDERS = (("redis",), ("sql",), ("redis", "sql"), ("sql", "redis"))
STARTS = [
    pytest.param(
        kind,
        name,
        order,
        id=f"{kind}-{name}-{' then '.join(order)}",
        marks=[] if name == "sqlite" or order == ("redis", "sql") else pytest.mark.long,
    )
    for kind in KINDS.values()
    for name in NAMES
    for order in ORDERS
    if (kind.name == "redis-8-modules" or name == "sqlite") and (thorough(kind) or order == ("redis", "sql"))
]


@pytest.mark.slow
@pytest.mark.parametrize(("server_kind", "truth", "order"), STARTS, indirect=["truth"])
async def test_I3_an_engine_that_starts_without_a_server_takes_writes_and_heals_in_any_order(
    make_rig: MakeRig, server: RunningRedis, truth: Truth, order: tuple[str, ...]
) -> None:
    async with CuttingProxy(server.url) as proxy:
        rig = make_rig(redis_url=proxy.url_for(server.url))
        rig.settings |= {**QUICK, **NO_L1, "sql_timeout_ms": 50}
        stored = SyncItem("stored", b"in both")
        async with SyncEngine(rig.config()) as engine:
            await rig.work(engine)
            await engine.submit(stored, ack=Ack.STORED)
            await engine.flush()
            await rig.read_back(engine)
        rig.figures.faults = len(order)
        if "redis" in order:
            await server.kill()  # the proxy goes on to listen, and counts who comes
        if "sql" in order:
            await truth.vanish(rig)
        before, begun_s, told = proxy.connections, time.monotonic(), ""
        async with SyncEngine(rig.config()) as engine:
            for n in range(40):
                await engine.submit(SyncItem(f"s.{n}", b"%d" % n))
            found = await asyncio.gather(*(engine.get(f"s.{n}") for n in range(40)))
            assert [item.content for item in found if item is not None] == [b"%d" % n for n in range(40)]
            # What is known is told, and what is not is not called absent.
            for _ in range(30):
                for name in ("stored", "nobody"):
                    try:
                        item = await engine.get(name)
                    except TierUnavailable:
                        assert name == "nobody" or "sql" in order
                    else:
                        assert item == stored
                await asyncio.sleep(0.01)
            health = await engine.health()
            silent = {"redis": not health.tiers["l2"].answers, "sql": not health.tiers["l3"].answers}
            assert silent == {tier: tier in order for tier in silent}
            assert not health.ok
            if "redis" in order:
                tries, lasted_s = proxy.connections - before, time.monotonic() - begun_s
                told = f"{tries / lasted_s:.1f} connections to Redis a second"
                # At the start, and then those that a breaker lets through, however many ask.
                assert tries <= 1 + BREAKER.failures_max + lasted_s / BREAKER.rest_s
            working = asyncio.create_task(rig.work(engine))  # some of it waits for STORED
            for tier in order:
                if tier == "redis":
                    await server.start()
                else:
                    await truth.come_back()
                await asyncio.sleep(0.1)
            await working
            await engine.flush()
            await until_well(engine)
            await rig.read_back(engine, l2_exact="redis" not in order)
            assert len(await engine.get_many([f"s.{n}" for n in range(40)])) == 40
            assert await engine.get("stored") == stored
            assert await engine.get("nobody") is None
    rig.figures.tell(f"24 start without {' and '.join(order)}, back in this order, {server.kind}", told)


@pytest.mark.slow
async def test_I3_a_flapping_redis_costs_a_bounded_number_of_connections_and_nothing_acknowledged(
    make_rig: MakeRig, server: RunningRedis, budgets: list[Retries]
) -> None:
    async with CuttingProxy(server.url) as proxy:
        rig = make_rig(redis_url=proxy.url_for(server.url))
        async with SyncEngine(rig.config(**QUICK, **NO_L1)) as engine:
            await rig.work(engine)
            await engine.flush()
            before, begun_s = proxy.connections, time.monotonic()
            answers = budgets[1].answers
            times = 5 if thorough(server.kind) else 2
            working = asyncio.create_task(rig.work(engine, moves=50 * times))
            for _ in range(times):
                proxy.refuse()
                rig.figures.faults += 1
                await asyncio.sleep(0.3)
                proxy.heal()
                await asyncio.sleep(0.5)
            opened = proxy.connections - before
            retries, lasted_s = engine.stats().lanes["l2"].retries, time.monotonic() - begun_s
            answers = budgets[1].answers - answers
            await working
            await engine.flush()
            await until_well(engine)
            await rig.read_back(engine)
    told = f"{opened / times:.1f} connections each time, {retries / lasted_s:.1f} retries a second"
    rig.figures.tell(f"24 Redis flaps, {server.kind}", told)
    earned = BUDGET.per_answer * answers  # which Redis gives while it is there
    assert retries <= BUDGET.burst + lasted_s * BUDGET.per_s + earned + 2  # lane and healing may wait for theirs
    # Each time a pool at most, and what fails of it as often as a breaker allows.
    assert opened <= times * (CONNECTIONS_MAX + BREAKER.failures_max)


# 1: what the server had promised itself


class Watched:
    """Items that nobody writes any more, and what a read may say of them: this, or that it does not know."""

    def __init__(self, rig: Rig) -> None:
        self._figures = rig.figures
        self._items: dict[str, SyncItem | None] = {}
        self.over = False

    async def written(self, engine: SyncEngine) -> None:
        self._items = {f"h.{n}": SyncItem(f"h.{n}", b"old %d" % n) for n in range(12)}
        await engine.submit_many(filter(None, self._items.values()), ack=Ack.STORED)

    async def renewed(self, engine: SyncEngine) -> None:
        for n, name in enumerate(self._items):
            self._items[name] = None if n % 3 == 0 else SyncItem(name, b"new %d" % n, updated_at=n)
        await engine.submit_many(filter(None, self._items.values()), ack=Ack.STORED)
        await engine.delete_many([name for name, item in self._items.items() if item is None], ack=Ack.STORED)

    async def read(self, engine: SyncEngine) -> None:
        """Read each at least once, and on until it is over."""
        while True:
            for name, wanted in self._items.items():
                try:
                    found = await engine.get(name)
                except TierUnavailable:
                    if wanted is None:
                        continue  # Redis alone might have it
                    raise
                if found != wanted:
                    self._figures.stale += 1
                    self._figures.wrong.append(f"stale: {told(found)}, not {told(wanted)}")
            if self.over:
                return
            await asyncio.sleep(0.001)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["under way", "between two runs"])
async def test_I4_a_redis_that_comes_back_older_than_it_was_is_not_believed(
    make_rig: MakeRig, server: RunningRedis, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    rig = make_rig(redis_url=server.url)
    rig.settings |= {**QUICK, **NO_L1}
    watched = Watched(rig)
    for _ in range(2 if thorough(server.kind) else 1):
        caplog.clear()
        async with SyncEngine(rig.config()) as engine:
            await watched.written(engine)
            await rig.work(engine)
            await engine.flush()
            await server.ask("SAVE")
            await watched.renewed(engine)
            await rig.work(engine, moves=20)
            await engine.flush()
            rig.figures.faults += 1
            if how == "under way":
                watched.over = False
                reading = asyncio.create_task(watched.read(engine))
                working = asyncio.create_task(rig.work(engine, ids=24, moves=20))
                await server.kill()
                await server.start()
                await working
                await engine.flush()
                await until_well(engine)
                watched.over = True
                await reading
            else:
                await engine.stop()
                await server.kill()
                await server.start()
                await engine.start()
                watched.over = True
                await watched.read(engine)  # at once, whether Redis is believed again or not
                await until_well(engine)
            await rig.read_back(engine)
        (await look(server.url, rig.prefix)).judge(rig.figures)
        changes = sum(int(count) for count in re.findall(r"made up for (\d+) changes", caplog.text))
        assert changes, "nothing was older: the test shows nothing"
    rig.figures.tell(f"1 Redis comes back older than it was, {how}, {server.kind}")


@pytest.mark.slow
async def test_I8_no_kill_of_redis_takes_a_stored_change_out_of_the_stream(
    make_rig: MakeRig, server_kind: RedisKind, own_kind: StartKind
) -> None:
    server = await own_kind(server_kind, extra_args=("--appendonly", "yes", "--appendfsync", "always"))
    wrote: dict[str, list[bytes | None]] = {}

    async def write(engine: SyncEngine, name: str) -> None:
        past = wrote.setdefault(name, [])
        for _ in range(8):
            n = len(past)
            if n % 4 == 3:
                await engine.delete(name, ack=Ack.STORED)
                past.append(None)
            else:
                item = SyncItem(name, b"%d" % n) if n % 2 else SyncItem.from_json(name, {"n": n})
                await engine.submit(item, ack=Ack.STORED)
                past.append(item.content)

    async with CuttingProxy(server.url) as proxy:
        rig = make_rig(redis_url=proxy.url_for(server.url))
        async with SyncEngine(rig.config(**QUICK, **NO_L1, enable_cdc_stream=True)) as engine:
            for count in (0, 100, 1_500, 4_000, 9_000) if thorough(server_kind) else (1_500, 4_000):
                pid = server.pid
                proxy.call_after_request_bytes(count, lambda pid=pid: os.kill(pid, signal.SIGKILL))
                writing = [asyncio.create_task(write(engine, f"w.{n}")) for n in range(8)]
                working = asyncio.create_task(rig.work(engine, moves=15))
                await until(lambda working=working: not server.running or working.done())
                if server.running:
                    await server.kill()
                await server.start()
                rig.figures.faults += 1
                await asyncio.gather(working, *writing)
                await engine.flush()
                await until_well(engine)
                await rig.read_back(engine)
    store = await RedisStore.connect(server.url, rig.prefix)
    said: dict[str, list[CdcEntry]] = {}
    async for entry in store.iter_cdc():
        assert entry.gap is None
        said.setdefault(entry.object_id, []).append(entry)
    await store.close()
    for name, entries in said.items():
        stamps = [entry.stamp for entry in entries]
        assert stamps == sorted(stamps), f"{name} is told in another order than it was written"
    for name, past in wrote.items():
        once = {entry.stamp: entry.content for entry in said[name]}
        assert list(once.values()) == past
        rig.figures.acked += len(past)
    (await look(server.url, rig.prefix)).judge(rig.figures, told=True)
    rig.figures.tell(f"1 Redis killed within batches, the change stream whole, {server_kind}")
