"""The change stream on a real Redis: what is appended and when not, who reads what, and what is missing."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from typing import Any

import pytest
from redis.asyncio import Redis

from sync_engine.errors import ConfigError, Corruption, InvalidItem, NotRunning, StoreError, TierUnavailable
from sync_engine.item import Op, SyncItem
from sync_engine.storage.redis.address import servers_of
from sync_engine.storage.redis.cdc import (
    BadEntry,
    CdcEntry,
    CdcLog,
    CdcReader,
    ChangeStream,
    CorruptEntry,
    Gap,
    MalformedEntry,
)
from sync_engine.storage.redis.shards import Servers
from sync_engine.testing.clusters import ClusterSet
from sync_engine.testing.fixtures import StartRedis
from sync_engine.testing.proxy import CuttingProxy

Connect = Callable[..., Servers]


@pytest.fixture
async def connect(redis_url: str, redis_prefix: str) -> AsyncIterator[Connect]:
    opened: list[Servers] = []

    def connect(url: str = redis_url, prefix: str = redis_prefix, timeout_ms: int = 5_000) -> Servers:
        opened.append(servers_of(url, prefix, timeout_ms=timeout_ms, response_timeout_ms=timeout_ms))
        return opened[-1]

    yield connect
    for servers in opened:
        await servers.close()


@pytest.fixture
def stream(connect: Connect, redis_prefix: str) -> CdcLog:
    return CdcLog(connect(), redis_prefix, ChangeStream("w"))


@pytest.fixture
async def plain(redis_url: str) -> AsyncIterator[Redis]:
    async with Redis.from_url(redis_url, decode_responses=False) as client:
        yield client


def put(object_id: str, content: bytes = b"content", **told: Any) -> CdcEntry:
    return CdcEntry.put(SyncItem(object_id, content, **told))


def deletes(count: int, start: int = 0) -> list[CdcEntry]:
    return [CdcEntry.delete(f"id.{n}", n) for n in range(start, start + count)]


async def read(reader: CdcReader) -> list[CdcEntry]:
    return [entry async for entry in reader]


async def ids(reader: CdcReader) -> list[str]:
    return [entry.object_id async for entry in reader]


# Appending.


async def test_an_entry_is_what_the_original_reads_and_then_ours(
    stream: CdcLog, plain: Redis, redis_prefix: str
) -> None:
    item = SyncItem("k", b'{"a":1}', stamp=7, state="new", updated_at=1)
    position = await stream.xadd_cdc(CdcEntry.put(item))
    await stream.xadd_cdc(CdcEntry.delete("k", 8))
    told = await plain.xrange(redis_prefix + "__local__:cdc")
    assert told[0][0].decode() == position
    assert list(told[0][1].items()) == [
        (b"op", b"PUT"),
        (b"key", b"k"),
        (b"hash", item.content_hash.encode()),
        (b"data", b'{"a":1}'),
        (b"meta", b'{"content_type":"json","version":1,"updated_at":1}'),
        (b"state", b"new"),
        (b"enc", b"raw"),
        (b"stamp", b"7"),
        (b"writer", b"w"),
        (b"seq", b"1"),
    ]
    deleted = [(b"op", b"DEL"), (b"key", b"k"), (b"stamp", b"8"), (b"writer", b"w"), (b"seq", b"2")]
    assert list(told[1][1].items()) == deleted
    assert await plain.hgetall(redis_prefix + "__local__:cdc:seq") == {b"w": b"2"}


async def test_a_batch_keeps_its_order_over_many_steps(stream: CdcLog) -> None:
    entries = deletes(613)
    positions = await stream.xadd_cdc_batch(entries)
    assert len(set(positions)) == 613
    told = await read(stream.iter_cdc())
    assert [entry.object_id for entry in told] == [entry.object_id for entry in entries]
    assert [entry.position for entry in told] == positions
    assert [entry.seq for entry in told] == list(range(1, 614))
    assert {entry.gap for entry in told} == {None}


async def test_a_batch_is_bounded_in_bytes_too(connect: Connect, redis_url: str, redis_prefix: str) -> None:
    async with CuttingProxy(redis_url) as proxy:
        stream = CdcLog(connect(proxy.url_for(redis_url)), redis_prefix)
        await stream.xadd_cdc(CdcEntry.delete("first"))  # so that the script is known
        noise = random.Random(1)
        entries = [put(f"{n}", noise.randbytes(3 * 1024 * 1024)) for n in range(4)]
        before = proxy.bytes_up
        proxy.cut_after_request_bytes(5 * 1024 * 1024)
        with pytest.raises(TierUnavailable):
            await stream.xadd_cdc_batch(entries)
        assert proxy.bytes_up - before <= 5 * 1024 * 1024
        proxy.heal()
        assert await ids(stream.iter_cdc()) == ["first", "0"]


async def test_nothing_is_appended_for_no_entries(stream: CdcLog, plain: Redis) -> None:
    assert await stream.xadd_cdc_batch([]) == []
    await stream.append([])
    assert await plain.exists(stream.key) == 0


async def test_one_bad_entry_of_a_batch_keeps_all_of_it_out(stream: CdcLog, plain: Redis) -> None:
    with pytest.raises(InvalidItem):
        await stream.xadd_cdc_batch([*deletes(300), CdcEntry.delete("")])
    assert await plain.exists(stream.key) == 0


@pytest.mark.parametrize("maxlen", [0, -1, True, 1.5, "10"])
async def test_a_bad_maxlen_is_refused(stream: CdcLog, maxlen: Any) -> None:
    with pytest.raises(InvalidItem):
        await stream.xadd_cdc(CdcEntry.delete("k"), maxlen)
    with pytest.raises(ConfigError):
        ChangeStream("w", maxlen=maxlen)


async def test_the_stream_is_trimmed_about_where_it_should_be(
    connect: Connect, redis_prefix: str, plain: Redis
) -> None:
    stream = CdcLog(connect(), redis_prefix, ChangeStream("w", maxlen=500))
    await stream.xadd_cdc_batch(deletes(2_000))
    assert 500 <= await plain.xlen(stream.key) < 700
    await stream.xadd_cdc_batch(deletes(100), maxlen=100)
    assert 100 <= await plain.xlen(stream.key) < 300


async def test_operations_are_told_like_entries(stream: CdcLog) -> None:
    item = SyncItem("a", b"x" * 100, state="s")
    await stream.append(
        [
            Op(kind="put", object_id="a", stamp=5, item=item),
            Op(kind="put", object_id="filled", stamp=5, item=item, fill=True),
            Op(kind="delete", object_id="b", stamp=6),
            Op(kind="restate", object_id="c", stamp=7, state="new"),
        ]
    )
    told = await read(stream.iter_cdc())
    assert [(entry.op, entry.object_id, entry.stamp, entry.seq) for entry in told] == [
        ("PUT", "a", 5, 1),
        ("DEL", "b", 6, 2),
    ]
    assert told[0].item() == item


async def test_numbers_are_per_writer_whoever_appends_at_a_time(connect: Connect, redis_prefix: str) -> None:
    streams = [CdcLog(connect(), redis_prefix, ChangeStream(writer)) for writer in ("a", "b", "a")]
    await asyncio.gather(*(stream.xadd_cdc_batch(deletes(300)) for stream in streams for _ in range(2)))
    told = await read(streams[0].iter_cdc())
    assert len(told) == 1_800
    assert {entry.gap for entry in told} == {None}
    for writer, count in (("a", 1_200), ("b", 600)):
        assert [entry.seq for entry in told if entry.writer == writer] == list(range(1, count + 1))


async def test_it_works_on_every_kind_of_server(connect: Connect, kind_url: str, redis_prefix: str) -> None:
    stream = CdcLog(connect(kind_url), redis_prefix)
    await stream.xadd_cdc_batch([put("a", b"x" * 1_000), CdcEntry.delete("a")])
    assert [entry.op for entry in await read(stream.iter_cdc(block_ms=1))] == ["PUT", "DEL"]


async def test_resp2_works_as_well(connect: Connect, redis_url: str, redis_prefix: str) -> None:
    stream = CdcLog(connect(redis_url + "?protocol=2"), redis_prefix)
    await stream.xadd_cdc_batch(deletes(3))
    assert await ids(stream.iter_cdc()) == ["id.0", "id.1", "id.2"]
    assert await ids(stream.iter_cdc(block_ms=1)) == ["id.0", "id.1", "id.2"]


# The key.


@pytest.mark.parametrize(
    ("key", "numbers"),
    [
        pytest.param(None, "app:__local__:cdc:seq", id="default"),
        pytest.param("app:__local__:cdc", "app:__local__:cdc:seq:app:__local__:cdc", id="default-said"),
        pytest.param("app:cdc", "app:__local__:cdc:seq:app:cdc", id="the-original-s"),
        pytest.param("fleet", "app:__local__:cdc:seq:fleet", id="outside"),
    ],
)
async def test_the_stream_and_its_numbers_are_where_no_item_can_be(
    connect: Connect, key: str | None, numbers: str
) -> None:
    stream = ChangeStream("w", key)
    assert stream.keys(connect(prefix="app:")) == (key or "app:__local__:cdc", numbers)


@pytest.mark.parametrize(
    "key", ["", "app:", "app:changes", "app:cdc:x", "app:state:x", "app:__local__:ids", "a\0", "\ud800"]
)
async def test_a_key_that_an_item_or_an_index_could_have_is_refused(connect: Connect, key: str) -> None:
    with pytest.raises(ConfigError, match="cdc_stream_key"):
        CdcLog(connect(prefix="app:"), "app:", ChangeStream("w", key))


@pytest.mark.parametrize("writer", ["", "a\0b", "\ud800", "x" * 256, None])
def test_a_bad_writer_is_refused(writer: Any) -> None:
    with pytest.raises(ConfigError, match="writer"):
        ChangeStream(writer)


@pytest.mark.parametrize("which", ["stream", "numbers", "number", "number-too-large"])
async def test_a_foreign_key_in_the_way_is_told_before_anything_is_written(
    stream: CdcLog, plain: Redis, which: str
) -> None:
    numbers = stream.key + ":seq"
    if which == "stream":
        await plain.set(stream.key, "x")
    elif which == "numbers":
        await plain.rpush(numbers, "x")
    else:
        await plain.hset(numbers, "w", "x" if which == "number" else 10**15)
    with pytest.raises(StoreError, match="change stream"):
        await stream.xadd_cdc(CdcEntry.delete("k"))
    assert await plain.type(stream.key) == (b"string" if which == "stream" else b"none")
    assert await plain.exists(numbers) == (which != "stream")


# Failures.


async def test_C7_an_entry_whose_reply_is_lost_is_not_sent_again(
    connect: Connect, redis_url: str, redis_prefix: str, plain: Redis
) -> None:
    async with CuttingProxy(redis_url) as proxy:
        stream = CdcLog(connect(proxy.url_for(redis_url)), redis_prefix)
        await stream.xadd_cdc(CdcEntry.delete("first"))
        proxy.cut_after_reply_bytes(0)
        with pytest.raises(TierUnavailable):
            await stream.xadd_cdc(CdcEntry.delete("lost"))
        proxy.heal()
        assert await plain.xlen(stream.key) == 2
        assert await ids(stream.iter_cdc()) == ["first", "lost"]


async def test_out_of_memory_appends_nothing_of_a_step(own_redis: StartRedis, connect: Connect) -> None:
    server = await own_redis()
    servers = connect(server.url, "p:")
    stream = CdcLog(servers, "p:")
    await stream.xadd_cdc_batch(deletes(10))
    shard = servers.shards[0]
    await servers.call(shard, "CONFIG", "SET", "maxmemory", "1")
    with pytest.raises(TierUnavailable, match="out of memory"):
        await stream.xadd_cdc_batch(deletes(10, start=10))
    await servers.call(shard, "CONFIG", "SET", "maxmemory", "0")
    await stream.xadd_cdc(CdcEntry.delete("after"))
    told = await read(stream.iter_cdc())
    assert [entry.seq for entry in told] == list(range(1, 12))
    assert told[-1].object_id == "after"


# Reading.


async def test_reading_starts_after_the_given_place(stream: CdcLog) -> None:
    positions = await stream.xadd_cdc_batch(deletes(5))
    assert await ids(stream.iter_cdc(positions[2])) == ["id.3", "id.4"]
    assert await ids(stream.iter_cdc(positions[4])) == []
    assert await ids(stream.iter_cdc("0-0", count=1)) == [f"id.{n}" for n in range(5)]
    assert await ids(stream.iter_cdc("$")) == []


async def test_reading_what_does_not_exist_ends_at_once(stream: CdcLog) -> None:
    assert await ids(stream.iter_cdc()) == []
    assert await ids(stream.iter_cdc("$")) == []
    assert await ids(stream.iter_cdc(block_ms=1)) == []


async def test_a_reader_goes_on_where_its_last_run_ended(stream: CdcLog) -> None:
    await stream.xadd_cdc_batch(deletes(3))
    reader = stream.iter_cdc()
    async for entry in reader:
        assert reader.position == entry.position
        break
    assert await ids(reader) == ["id.1", "id.2"]
    assert await ids(reader) == []
    await stream.xadd_cdc(CdcEntry.delete("later"))
    assert await ids(reader) == ["later"]
    assert reader.seen == {"w": 4}


@pytest.mark.parametrize(
    "arguments",
    [
        {"from_id": "x"},
        {"from_id": "-"},
        {"from_id": "1-2-3"},
        {"from_id": "1\n"},
        {"from_id": None},
        {"block_ms": -1},
        {"block_ms": True},
        {"block_ms": 0.5},
        {"count": 0},
        {"content_bytes_max": 0},
    ],
    ids=str,
)
async def test_a_bad_argument_is_refused(stream: CdcLog, arguments: dict[str, Any]) -> None:
    with pytest.raises(InvalidItem) as refused:
        stream.iter_cdc(**arguments)
    assert refused.value.field in arguments


async def test_large_entries_come_in_smaller_pages(
    connect: Connect, redis_url: str, redis_prefix: str, stream: CdcLog
) -> None:
    noise = random.Random(1)
    contents = [noise.randbytes(1_000_000) for _ in range(60)]
    await stream.xadd_cdc_batch([put(f"{n}", content) for n, content in enumerate(contents)])
    async with CuttingProxy(redis_url) as proxy:
        reader = CdcLog(connect(proxy.url_for(redis_url)), redis_prefix).iter_cdc()
        seen: list[tuple[int, bytes | None]] = []
        async for entry in reader:
            seen.append((proxy.bytes_down, entry.content))
    assert [content for _, content in seen] == contents
    # The first page is blind; those that follow, a round trip each, hold the 4 MiB that a page should.
    assert list(Counter(bytes_down for bytes_down, _ in seen).values()) == [10, *[4] * 12, 2]


async def test_waiting_sees_what_comes(stream: CdcLog) -> None:
    await stream.xadd_cdc(CdcEntry.delete("before"))
    started = asyncio.Event()

    async def consume() -> list[str]:
        seen = []
        async with aclosing(aiter(stream.iter_cdc(block_ms=0))) as entries:
            async for entry in entries:
                seen.append(entry.object_id)
                started.set()
                if entry.object_id == "last":
                    return seen
        return seen

    consumer = asyncio.create_task(consume())
    await started.wait()
    await stream.xadd_cdc(CdcEntry.delete("one"))
    await stream.xadd_cdc_batch([CdcEntry.delete("two"), CdcEntry.delete("last")])
    assert await consumer == ["before", "one", "two", "last"]


async def test_only_what_is_new_is_seen_from_the_end(stream: CdcLog, plain: Redis) -> None:
    await stream.xadd_cdc(CdcEntry.delete("before"))
    reader = stream.iter_cdc("$", block_ms=10_000)
    first = asyncio.ensure_future(anext(aiter(reader)))
    while not any(client["cmd"] == "xread" for client in await plain.client_list()):  # noqa: ASYNC110  nobody announces it
        await asyncio.sleep(0.01)
    await stream.xadd_cdc(CdcEntry.delete("new"))
    assert (await first).object_id == "new"


async def test_a_wait_ends_after_its_time_without_an_entry(stream: CdcLog) -> None:
    await stream.xadd_cdc(CdcEntry.delete("k"))
    reader = stream.iter_cdc(block_ms=30)
    assert await ids(reader) == ["k"]
    assert await ids(reader) == []


async def test_waiting_readers_leave_the_pool_alone_and_end_with_the_store(connect: Connect, redis_prefix: str) -> None:
    servers = connect()
    stream = CdcLog(servers, redis_prefix)
    readers = [asyncio.create_task(ids(stream.iter_cdc(block_ms=0))) for _ in range(20)]
    for n in range(20):
        await stream.xadd_cdc(CdcEntry.delete(f"{n}"))
    await servers.close()
    ended = await asyncio.gather(*readers, return_exceptions=True)
    assert {type(end) for end in ended} == {NotRunning}


async def test_300_cancelled_waits_leave_no_connection_and_no_wrong_reply(
    own_redis: StartRedis, connect: Connect, redis_prefix: str
) -> None:
    server = await own_redis()
    stream = CdcLog(connect(server.url), redis_prefix)
    await stream.xadd_cdc_batch(deletes(5))
    chance = random.Random(1)
    for _ in range(15):
        waiting = [asyncio.create_task(ids(stream.iter_cdc(block_ms=0))) for _ in range(20)]
        await asyncio.sleep(chance.random() * 0.02)
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        assert await ids(stream.iter_cdc()) == [f"id.{n}" for n in range(5)]
    async with Redis.from_url(server.url) as plain:
        for _ in range(200):
            if len(await plain.client_list()) <= 2 + 16:
                break
            await asyncio.sleep(0.02)
        assert not [
            client for client in await plain.client_list() if client["cmd"] == "xread" and "b" in client["flags"]
        ]


# What is missing.


async def test_a_trimmed_beginning_is_a_gap_for_who_reads_from_there(stream: CdcLog, plain: Redis) -> None:
    positions = await stream.xadd_cdc_batch(deletes(10))
    await plain.xtrim(stream.key, maxlen=4, approximate=False)
    told = await read(stream.iter_cdc())
    assert [entry.gap for entry in told] == [Gap("w", 1, 7), None, None, None]
    assert told[0].gap is not None
    assert told[0].gap.missing == 6
    # Who starts elsewhere cannot know, unless told what was seen.
    assert {entry.gap for entry in await read(stream.iter_cdc(positions[2]))} == {None}
    resumed = await read(stream.iter_cdc(positions[2], seen={"w": 3}))
    assert resumed[0].gap == Gap("w", 4, 7)
    assert [entry.gap for entry in await read(stream.iter_cdc(positions[6], seen={"w": 7}))] == [None] * 3


async def test_a_deleted_entry_is_a_gap(stream: CdcLog, plain: Redis) -> None:
    positions = await stream.xadd_cdc_batch(deletes(5))
    await plain.xdel(stream.key, positions[2], positions[3])
    told = await read(stream.iter_cdc())
    assert [(entry.seq, entry.gap) for entry in told] == [(1, None), (2, None), (5, Gap("w", 3, 5))]


async def test_a_new_writer_is_no_gap_and_a_late_one_is(connect: Connect, redis_prefix: str, plain: Redis) -> None:
    first, second = (CdcLog(connect(), redis_prefix, ChangeStream(writer)) for writer in ("a", "b"))
    reader = first.iter_cdc()
    await first.xadd_cdc_batch(deletes(2))
    assert len(await read(reader)) == 2
    await second.xadd_cdc(CdcEntry.delete("new"))
    assert [entry.gap for entry in await read(reader)] == [None]
    third = CdcLog(connect(), redis_prefix, ChangeStream("c"))
    lost = await third.xadd_cdc(CdcEntry.delete("lost"))
    await plain.xdel(first.key, lost)
    await third.xadd_cdc(CdcEntry.delete("found"))
    assert [entry.gap for entry in await read(reader)] == [Gap("c", 1, 2)]
    assert reader.seen == {"a": 2, "b": 1, "c": 2}


async def test_a_stream_that_begins_anew_is_a_gap_of_unknown_size(stream: CdcLog, plain: Redis) -> None:
    await stream.xadd_cdc_batch(deletes(5))
    reader = stream.iter_cdc()
    await read(reader)
    await plain.delete(stream.key, stream.key + ":seq")
    await stream.xadd_cdc(CdcEntry.delete("again"))
    (entry,) = await read(reader)
    assert entry.gap == Gap("w", 6, 1)
    assert entry.gap.missing is None


async def test_entries_of_the_original_have_no_numbers_and_no_gaps(stream: CdcLog, plain: Redis) -> None:
    meta = '{"content_type":"binary","version":2,"updated_at":1000}'
    for _ in range(2):
        await plain.xadd(stream.key, {"op": "DEL", "key": "k"})
        await plain.xadd(stream.key, {"op": "PUT", "key": "k", "hash": "", "data": "data", "meta": meta})
    told = await read(stream.iter_cdc())
    assert [(entry.op, entry.seq, entry.gap) for entry in told] == [("DEL", 0, None), ("PUT", 0, None)] * 2


# What is bad.


async def test_a_bad_entry_raises_once_and_the_reader_goes_on_behind_it(stream: CdcLog, plain: Redis) -> None:
    await stream.xadd_cdc(put("a"))
    bad = [
        await plain.xadd(stream.key, {"op": "NOP", "key": "b"}),
        await plain.xadd(stream.key, {"op": "PUT", "key": "c", "hash": "hash123", "data": "data", "meta": "{}"}),
    ]
    await stream.xadd_cdc(put("d"))
    reader, seen, raised = stream.iter_cdc(), list[str](), list[BadEntry]()
    while True:
        try:
            async for entry in reader:
                seen.append(entry.object_id)
                assert entry.gap is None
            break
        except BadEntry as error:
            raised.append(error)
    assert seen == ["a", "d"]
    assert [error.position.encode() for error in raised] == bad
    assert [type(error) for error in raised] == [MalformedEntry, CorruptEntry]
    assert isinstance(raised[1], Corruption)
    assert await ids(stream.iter_cdc(raised[1].position)) == ["d"]


async def test_a_bad_entry_with_a_number_leaves_no_gap_unless_one_was_there(stream: CdcLog, plain: Redis) -> None:
    async def numbered(seq: int, op: str = "DEL") -> None:
        await plain.xadd(stream.key, {"op": op, "key": "k", "writer": "v", "seq": str(seq)})

    async def gaps() -> list[Gap | None]:
        try:
            return [entry.gap async for entry in reader]
        except MalformedEntry:
            return [entry.gap async for entry in reader]

    reader = stream.iter_cdc()
    for seq, op in ((1, "DEL"), (2, "NOP"), (3, "DEL")):
        await numbered(seq, op)
    assert await gaps() == [None]
    assert reader.seen == {"v": 3}
    await numbered(7, "NOP")
    await numbered(8)
    assert await gaps() == [Gap("v", 4, 8)]


async def test_C3_a_bomb_is_refused_and_what_follows_is_read(stream: CdcLog) -> None:
    await stream.xadd_cdc_batch([put("bomb", bytes(10_000_000)), put("small")])
    reader = stream.iter_cdc(content_bytes_max=1_000_000)
    with pytest.raises(MalformedEntry, match="more than 1000000 bytes"):
        await read(reader)
    assert await ids(reader) == ["small"]


async def test_a_key_that_is_no_stream_is_said(stream: CdcLog, plain: Redis) -> None:
    await plain.set(stream.key, "x")
    with pytest.raises(StoreError):
        await read(stream.iter_cdc(block_ms=0))


# Outages.


async def test_an_outage_without_waiting_raises_and_the_reader_continues(
    connect: Connect, redis_url: str, redis_prefix: str
) -> None:
    async with CuttingProxy(redis_url) as proxy:
        stream = CdcLog(connect(proxy.url_for(redis_url)), redis_prefix)
        await stream.xadd_cdc_batch(deletes(3))
        reader = stream.iter_cdc(count=1)
        async for _ in reader:
            break
        proxy.refuse()
        with pytest.raises(TierUnavailable):
            await read(reader)
        proxy.heal()
        assert await ids(reader) == ["id.1", "id.2"]


async def test_a_waiting_reader_outlives_outages_and_misses_nothing(
    connect: Connect, redis_url: str, redis_prefix: str, stream: CdcLog, caplog: pytest.LogCaptureFixture
) -> None:
    async with CuttingProxy(redis_url) as proxy:
        reader = CdcLog(connect(proxy.url_for(redis_url)), redis_prefix).iter_cdc(block_ms=0)
        seen: asyncio.Queue[CdcEntry] = asyncio.Queue()

        async def consume() -> None:
            async for entry in reader:
                seen.put_nowait(entry)

        consumer = asyncio.create_task(consume())
        for n in range(12):
            await stream.xadd_cdc(CdcEntry.delete(f"{n}"))
            if n % 3 == 0:
                proxy.cut_now()
            if n % 3 == 1:
                proxy.refuse()
                await stream.xadd_cdc(CdcEntry.delete(f"{n} meanwhile"))
                proxy.heal()
            await asyncio.sleep(0.02)
        told = [await seen.get() for _ in range(16)]
        consumer.cancel()
        await asyncio.gather(consumer, return_exceptions=True)
    assert [entry.seq for entry in told] == list(range(1, 17))
    assert {entry.gap for entry in told} == {None}
    assert "trying again" in caplog.text


async def test_an_outage_as_long_as_the_wait_raises(connect: Connect, redis_url: str, redis_prefix: str) -> None:
    async with CuttingProxy(redis_url) as proxy:
        reader = CdcLog(connect(proxy.url_for(redis_url)), redis_prefix).iter_cdc(block_ms=200)
        proxy.refuse()
        with pytest.raises(TierUnavailable):
            await read(reader)


async def test_a_waiting_reader_follows_a_server_that_lost_the_stream(own_redis: StartRedis, connect: Connect) -> None:
    server = await own_redis()
    async with CuttingProxy(server.url) as proxy:
        stream = CdcLog(connect(server.url, "p:"), "p:", ChangeStream("w"))
        # Of a server whose clock was ahead: whatever is appended from now on comes below.
        ahead = "99999999999999-0"
        servers = connect(server.url, "p:")
        fields = ("op", "DEL", "key", "old", "writer", "w", "seq", "41")
        await servers.call(servers.shards[0], "XADD", stream.key, ahead, *fields)
        reader = CdcLog(connect(proxy.url_for(server.url), "p:"), "p:").iter_cdc("1", block_ms=0)
        entries = aiter(reader)
        async with aclosing(entries):
            assert (await anext(entries)).object_id == "old"
            waiting = asyncio.ensure_future(anext(entries))
            await asyncio.sleep(0.05)
            proxy.refuse()
            await servers.call(servers.shards[0], "FLUSHALL")
            await stream.xadd_cdc_batch(deletes(2))  # before the reader has come back
            proxy.heal()
            told = [await waiting, await anext(entries)]
            await stream.xadd_cdc(CdcEntry.delete("later"))
            told.append(await anext(entries))
    assert [(entry.object_id, entry.gap) for entry in told] == [
        ("id.0", Gap("w", 42, 1)),
        ("id.1", None),
        ("later", None),
    ]


# On a cluster.


async def test_on_a_cluster_there_is_one_stream(connect: Connect, redis_cluster: ClusterSet, redis_prefix: str) -> None:
    servers = connect(redis_cluster.url)
    stream = CdcLog(servers, redis_prefix, ChangeStream("w"))
    assert stream.key == servers.shards[0].prefix + "__local__:cdc"
    await stream.xadd_cdc_batch(deletes(300))
    await stream.append([Op(kind="delete", object_id="last", stamp=5)])
    for block_ms in (None, 1):
        told = await read(stream.iter_cdc(block_ms=block_ms))
        assert [entry.seq for entry in told] == list(range(1, 302))
        assert told[-1].object_id == "last"
    with pytest.raises(ConfigError, match="on a cluster"):
        CdcLog(servers, redis_prefix, ChangeStream("w", "elsewhere"))
