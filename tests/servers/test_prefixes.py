"""Prefix work on real servers of every kind: only items, each once, in order; what others wrote, took or damaged."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Iterable
from contextlib import aclosing, suppress
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from redis.asyncio import Redis

from sync_engine.codec import to_text
from sync_engine.errors import Corruption, InvalidItem, TierUnavailable
from sync_engine.item import Op, SyncItem
from sync_engine.storage.redis import ChangeStream, RedisStore
from sync_engine.testing.clusters import ClusterSet
from sync_engine.testing.fixtures import StartRedis
from sync_engine.testing.proxy import CuttingProxy
from sync_engine.testing.servers import RunningRedis

GLOB = "*?[a]\\^-b"
"""In front of every key of these stores: each of these is a plain character (R10)."""

PLANES = [chr((plane << 16) + 0x100) for plane in range(17)]
HOSTILE = [*"*?[]\\^-{} \n\r\t\"'ab", "\x01", "\x7f", "\ud7ff", "\ue000", "\uffff", "\U0010ffff", *PLANES]

texts = st.text(st.sampled_from(HOSTILE), min_size=1, max_size=5)
id_sets = st.sets(texts, max_size=10)


@pytest.fixture
async def store(kind_url: str, redis_prefix: str) -> AsyncIterator[RedisStore]:
    store = await RedisStore.connect(kind_url, redis_prefix + GLOB)
    yield store
    await store.close()


@pytest.fixture
async def first(redis_url: str, redis_prefix: str) -> AsyncIterator[RedisStore]:
    """On one kind of server, for what no other kind can do otherwise."""
    store = await RedisStore.connect(redis_url, redis_prefix)
    yield store
    await store.close()


@pytest.fixture
async def plain(kind_url: str) -> AsyncIterator[Redis]:
    async with Redis.from_url(kind_url) as client:
        yield client


def item(object_id: str, **told: Any) -> SyncItem:
    """JSON or binary, by the length of the id."""
    return SyncItem(object_id, b'{"a":1}' if len(object_id) % 2 else b"\x00" + object_id.encode(), **told)


def some(count: int, prefix: str = "k.", **told: Any) -> list[SyncItem]:
    return [
        SyncItem(f"{prefix}{n:05}", b'{"n":%d}' % n if n % 2 else b"\x00%d" % n, updated_at=1, **told)
        for n in range(count)
    ]


def ids_of(items: Iterable[SyncItem]) -> list[str]:
    return [item.object_id for item in items]


async def expired(store: RedisStore, object_id: str) -> None:
    """Wait until a deadline of a few milliseconds has passed at the server."""
    while await store.client.exists(store.prefix + object_id):  # noqa: ASYNC110  nothing announces it
        await asyncio.sleep(0.001)


def until(item: SyncItem, deadline_ms: int) -> Op:
    return Op(kind="put", object_id=item.object_id, stamp=0, item=item, redis_expires_at=deadline_ms)


def now_ms() -> int:
    return time.time_ns() // 1_000_000


# Equal to str.startswith over a dict.


async def equals_a_dict(store: RedisStore, ids: set[str], asked: list[str], cuts: Iterable[int]) -> None:
    await store.delete_prefix("", allow_all=True)
    held = {object_id: item(object_id, updated_at=1) for object_id in sorted(ids)}
    await store.put_batch(held.values())
    for prefix in [*asked, *{object_id[:cut] for object_id in ids for cut in cuts}]:
        wanted = [object_id for object_id in held if object_id.startswith(prefix)]
        assert await store.scan_ids(prefix) == wanted
        assert await store.scan_prefix(prefix) == [held[object_id] for object_id in wanted]
        assert await store.count_prefix(prefix) == len(wanted)
    for prefix in asked:
        wanted = [object_id for object_id in held if object_id.startswith(prefix)]
        assert await store.delete_prefix(prefix) == len(wanted)
        held = {object_id: kept for object_id, kept in held.items() if object_id not in wanted}
        assert await store.scan_prefix("", allow_all=True) == list(held.values())


@settings(max_examples=30)
@given(ids=id_sets, asked=st.lists(texts, max_size=2))
@example(ids={"*", "?", "[a]", "\\", "^", "-", "{a}", "{", "}", "\\*"}, asked=["[", "\\", "{", "*"])
@example(ids={"a" * 255, "a" * 254, "\U0010ffff" * 255, "\uffff"}, asked=["a" * 254, "\U0010ffff", "\uffff"])
async def test_R10_prefixes_of_any_text_are_those_of_a_dict(
    kind_url: str, redis_prefix: str, ids: set[str], asked: list[str]
) -> None:
    store = await RedisStore.connect(kind_url, redis_prefix + GLOB)
    await equals_a_dict(store, ids, asked, cuts=(1, 255))
    await store.close()


@settings(max_examples=6)
@given(ids=id_sets, asked=st.lists(texts, max_size=2))
@example(ids={"*", "?", "[a]", "\\", "^", "-", "{a}", "{", "}", "\\*"}, asked=["[", "\\", "{", "*"])
async def test_R10_prefixes_of_any_text_are_those_of_a_dict_on_a_cluster(
    redis_cluster: ClusterSet, redis_prefix: str, ids: set[str], asked: list[str]
) -> None:
    store = await RedisStore.connect(redis_cluster.url, redis_prefix + GLOB)
    await equals_a_dict(store, ids, asked, cuts=())
    await store.close()


# Only items, each once, in order.


async def test_R9_json_and_binary_items_come_together_in_order_of_code_points(store: RedisStore) -> None:
    ids = ["a", "a\x01", "aA", "aa", "aé", "a\ud7ff", "a\ue000", "a\uffff", "a\U00010000", "a\U0010ffff"]
    put = [item(object_id, updated_at=1) for object_id in ids]
    await store.put_batch(reversed(put))
    await store.put_batch([item("A"), item("b")])
    assert await store.scan_prefix("a") == put
    assert [found async for found in store.iter_prefix("a")] == put
    assert await store.scan_ids("a") == ids


FOREIGN: dict[str, tuple[str | int, ...]] = {
    "text": ("SET", "somebody's"),
    "digits": ("SET", "5"),
    "empty": ("SET", ""),
    "almost": ("SET", '{"object_id":"almost","version":1}'),
    "list": ("RPUSH", "x"),
    "set": ("SADD", "x"),
    "hash": ("HSET", "x", "y"),
    "zset": ("ZADD", 0, "x"),
    "stream": ("XADD", "*", "x", "y"),
    "merkle:hash:": ("SET", "0" * 64),
    "merkle:children:": ("ZADD", 0, "a:" + "0" * 64),
    "cdc": ("XADD", "*", "op", "PUT"),
    "idx:users": ("SET", "x"),
    "state:": ("SADD", "nobody"),
}


async def test_R9_R11_R12_only_items_are_listed_counted_and_deleted(
    kind_url: str, redis_prefix: str, plain: Redis
) -> None:
    for name, (command, *args) in FOREIGN.items():
        await plain.execute_command(command, redis_prefix + name, *args)
    await plain.sadd(f"{redis_prefix}state:old", "never-there")
    store = await RedisStore.connect(kind_url, redis_prefix, change_stream=ChangeStream("w"))
    if (await store.capabilities()).json:
        await store.client.execute_command("JSON.SET", redis_prefix + "foreign", "$", '{"payload":1}')
    await store.put_batch([item("s", state="merkle"), item("sa", state="s"), item("m"), item("c"), item("_")], ttl=60)
    await store.apply([Op(kind="delete", object_id="tomb", stamp=5)])
    await store.reindex()
    others = {key: await plain.type(key) for key in await plain.keys(f"{redis_prefix}*")}
    names = {key.removeprefix(redis_prefix.encode()).decode() for key in others}

    assert await store.scan_ids("", allow_all=True) == ["_", "c", "m", "s", "sa"]
    for prefix in sorted({name[:cut] for name in names for cut in (1, 3, len(name))}):
        wanted = [name for name in ("_", "c", "m", "s", "sa") if name.startswith(prefix)]
        assert await store.scan_ids(prefix) == ids_of(await store.scan_prefix(prefix)) == wanted
        assert await store.count_prefix(prefix) == len(wanted)
    assert await store.delete_prefix("s") == 2
    assert await store.delete_prefix("state:") == 0
    assert await store.delete_prefix("", allow_all=True) == 3

    emptied = {"_", "c", "m", "s", "sa", "state:merkle", "state:s", "state:default"}
    emptied |= {f"__local__:{name}" for name in ("ids", "by_state", "expiring")}
    left = {key: await plain.type(key) for key in await plain.keys(f"{redis_prefix}*")}
    assert left == {key: kind for key, kind in others.items() if key.decode().removeprefix(redis_prefix) not in emptied}
    assert len([entry async for entry in store.iter_cdc()]) == 11  # five puts, a delete, five deletes
    await store.close()


async def test_R10_a_store_meets_no_other_whose_prefix_its_own_would_match_as_a_pattern(
    kind_url: str, redis_prefix: str
) -> None:
    async def stored(prefix: str) -> RedisStore:
        store = await RedisStore.connect(kind_url, redis_prefix + prefix)
        await store.put_batch([SyncItem("x", prefix.encode()), SyncItem("y", b"{}")])
        return store

    stores = [await stored(prefix) for prefix in ("*", "?*", "[ab]", "a", "b", "\\*", "\\\\", "^")]
    assert await stores[0].reindex() == 0
    assert await stores[0].scan_ids("", allow_all=True) == ["x", "y"]
    assert await stores[0].delete_prefix("x") == 1
    for store in stores:
        assert await store.count_prefix("", allow_all=True) == (1 if store is stores[0] else 2)
        await store.close()


async def test_R11_a_store_leaves_the_items_of_one_whose_prefix_is_longer_alone(
    kind_url: str, redis_prefix: str
) -> None:
    inner = await RedisStore.connect(kind_url, redis_prefix + "inner:")
    await inner.put_batch([SyncItem("j", b"{}"), SyncItem("b", b"\x00")])
    text = await RedisStore.connect(kind_url, redis_prefix + "inner:", binary_format="json")
    await text.put(SyncItem("t", b"\x00"))
    outer = await RedisStore.connect(kind_url, redis_prefix)
    await outer.put_batch([SyncItem("inner", b"{}"), SyncItem("inner:own", b"\x00")])
    await outer.reindex()
    assert ids_of(await outer.scan_prefix("inner")) == ["inner", "inner:own"]
    assert await outer.count_by_state("default") == 2
    assert await outer.delete_prefix("", allow_all=True) == 2
    assert ids_of(await inner.scan_prefix("", allow_all=True)) == ["b", "j", "t"]
    for store in (inner, text, outer):
        await store.close()


@pytest.mark.parametrize("binary_format", ["compact", "json"])
async def test_a_walk_over_the_keyspace_knows_items_of_any_id(
    kind_url: str, redis_prefix: str, binary_format: Any
) -> None:
    store = await RedisStore.connect(kind_url, redis_prefix + GLOB, binary_format=binary_format)
    ids = {
        *HOSTILE,
        *(a + b for a in '"\\/{\x01\U0010ffff' for b in HOSTILE),
        "\U0010ffff" * 255,
        '"' * 255,
        "\x01" * 255,
    }
    contents = (b'["%d"]', b"\x00%d")
    items = [SyncItem(id_, contents[n % 2] % n, updated_at=1, stamp=n % 3) for n, id_ in enumerate(sorted(ids))]
    await store.put_batch(items)
    await store.client.delete(*(f"{store.prefix}__local__:{name}" for name in ("ids", "by_state", "indexed")))
    assert await store.scan_prefix("", allow_all=True) == items
    reordered = SyncItem("loose", b"hello", updated_at=1)
    await store.client.set(
        f"{store.prefix}loose", json.dumps(dict(reversed(json.loads(to_text(reordered)).items())), indent=1)
    )
    assert await store.reindex() == 3  # an id, a state, a member
    assert await store.scan_prefix("loose") == [reordered]
    await store.close()


async def test_R9_an_item_that_stays_comes_once_whatever_changes_meanwhile(store: RedisStore) -> None:
    stays = ids_of(some(1_500))
    await store.put_batch(some(1_500))
    seen: list[str] = []
    turn = 0
    async for found in store.iter_prefix("k."):
        seen.append(found.object_id)
        turn += 1
        if turn % 100 == 0:
            n = turn % 1_500
            await store.put_batch(
                [
                    SyncItem(stays[n], b"{}" if n % 200 else b"\x00", state="new"),  # its form changes
                    SyncItem(f"k.{turn:05}+", b"{}"),  # behind the reader or before it
                    SyncItem(f"{stays[-turn]}+", b"{}"),
                ]
            )
            await store.delete(f"k.{turn - 100:05}+")
    assert seen == sorted(set(seen))
    assert [object_id for object_id in seen if not object_id.endswith("+")] == stays


async def test_pages_join_without_gap_or_repeat(store: RedisStore) -> None:
    await store.put_batch([*some(1_234), item("k"), item("l")])
    wanted = ids_of(some(1_234))
    for limit in (77, 500, 2_000):
        seen: list[str] = []
        while page := await store.scan_ids("k.", limit, after=seen[-1] if seen else None):
            assert len(page) <= limit
            assert ids_of(await store.scan_prefix("k.", limit, after=seen[-1] if seen else None)) == page
            seen += page
        assert seen == wanted
    assert [found async for found in store.iter_prefix("k.")] == some(1_234)


@pytest.mark.parametrize(
    ("after", "limit", "wanted"),
    [
        (None, 0, []),
        (None, 2, ["k", "ka"]),
        ("", 1, ["k"]),
        ("a", 1, ["k"]),
        ("k", 1, ["ka"]),
        ("ka", 9, ["kb"]),
        ("k*", 9, ["ka", "kb"]),
        ("kz", 9, []),
        ("k\U0010ffff" * 200, 9, []),
        ("z", 9, []),
    ],
)
async def test_after_may_be_any_text(first: RedisStore, after: str | None, limit: int, wanted: list[str]) -> None:
    await first.put_batch([item(object_id) for object_id in ("j", "k", "ka", "kb", "l", "z")])
    assert await first.scan_ids("k", limit, after=after) == wanted
    assert ids_of(await first.scan_prefix("k", limit, after=after)) == wanted


# What is refused.


@pytest.mark.parametrize("verb", ["scan_prefix", "scan_ids", "iter_prefix", "count_prefix", "delete_prefix"])
async def test_an_empty_prefix_must_be_meant(first: RedisStore, verb: str) -> None:
    await first.put(SyncItem("a", b"{}"))
    with pytest.raises(InvalidItem, match=r"prefix: .*allow_all=True"):
        await called(first, verb, "")
    assert await called(first, verb, "", allow_all=True) in (1, ["a"])


@pytest.mark.parametrize("verb", ["scan_prefix", "scan_ids", "iter_prefix", "count_prefix", "delete_prefix"])
@pytest.mark.parametrize("bad", [None, 5, b"a", "\ud800"])
async def test_a_prefix_that_is_no_text_is_refused(first: RedisStore, verb: str, bad: Any) -> None:
    await first.put(SyncItem("a", b"{}"))
    with pytest.raises(InvalidItem, match="prefix: "):
        await called(first, verb, bad, allow_all=True)
    assert await first.exists("a")


async def called(store: RedisStore, verb: str, *args: Any, **told: Any) -> Any:
    call = getattr(store, verb)(*args, **told)
    found = [it async for it in call] if verb == "iter_prefix" else await call
    return ids_of(found) if verb in ("scan_prefix", "iter_prefix") else found


@pytest.mark.parametrize("told", [{"limit": -1}, {"limit": 1.0}, {"limit": True}, {"after": 5}, {"after": "\ud800"}])
async def test_a_bad_limit_or_after_is_refused(first: RedisStore, told: dict[str, Any]) -> None:
    for call in (first.scan_prefix, first.scan_ids):
        with pytest.raises(InvalidItem, match=f"{next(iter(told))}: "):
            await call("a", **told)


# What expires, and what others do.


async def test_I6_what_has_expired_is_neither_listed_nor_counted(store: RedisStore) -> None:
    await store.put_batch(some(3, "k.stays"))
    # More than are swept at a time.
    await store.apply([until(it, now_ms() + 60) for it in some(2_600)])
    await expired(store, "k.02599")
    assert await store.count_prefix("k.") == 3
    assert await store.scan_ids("k.") == ids_of(some(3, "k.stays"))
    assert ids_of(await store.scan_prefix("k.")) == ids_of(some(3, "k.stays"))
    assert await store.delete_prefix("k.") == 3


async def test_what_somebody_else_deleted_is_left_out_and_then_forgotten(store: RedisStore) -> None:
    await store.put_batch(some(8, state="s"))
    gone = ids_of(some(8))[::2]
    await store.client.delete(*(store.prefix + object_id for object_id in gone))
    left = ids_of(some(8))[1::2]
    assert ids_of(await store.scan_prefix("k.")) == left
    assert await store.count_prefix("k.") == 4
    assert await store.list_state_ids("s") == left
    assert await store.count_by_state("s") == 4


@pytest.mark.parametrize("verb", ["scan_ids", "scan_prefix", "delete_prefix"])
async def test_each_listing_forgets_what_is_gone(store: RedisStore, verb: str) -> None:
    await store.put_batch(some(4))
    await store.client.delete(store.prefix + "k.00001", store.prefix + "k.00002")
    assert await called(store, verb, "k.") in (2, ["k.00000", "k.00003"])
    assert await store.client.zrange(f"{store.prefix}__local__:ids", 0, -1) == (
        [] if verb == "delete_prefix" else [b"k.00000", b"k.00003"]
    )


async def test_what_somebody_else_replaced_by_no_item_is_left_out_and_spared(store: RedisStore) -> None:
    await store.put_batch(some(4))
    await store.client.delete(store.prefix + "k.00001")
    await store.client.rpush(store.prefix + "k.00001", "somebody's")
    await store.client.set(store.prefix + "k.00002", "somebody's")
    assert ids_of(await store.scan_prefix("k.")) == ["k.00000", "k.00003"]
    assert await store.delete_prefix("k.") == 2
    assert await store.client.exists(store.prefix + "k.00001", store.prefix + "k.00002") == 2
    assert await store.count_prefix("k.") == 0


async def test_what_others_wrote_before_the_first_listing_is_in_it(store: RedisStore, plain: Redis) -> None:
    for it in some(300):
        await plain.set(store.prefix + it.object_id, to_text(it))
    await store.put(item("k.zz"))
    assert await store.scan_ids("k.") == [*ids_of(some(300)), "k.zz"]
    assert await store.count_prefix("k.") == await store.count_by_state("default") == 301


async def test_what_others_write_later_is_read_at_once_and_listed_after_reindex(
    store: RedisStore, plain: Redis
) -> None:
    await store.put(item("k.1"))
    assert await store.scan_ids("k.") == ["k.1"]
    await plain.set(f"{store.prefix}k.2", to_text(SyncItem("k.2", b"hello", state="s")), px=60_000)
    found = await store.get("k.2")
    assert found is not None
    assert found.content == b"hello"
    assert await store.is_in_state("k.2", "s")
    assert await store.reindex() == 3  # an id, a state, a member
    assert await store.reindex() == 0
    assert await store.scan_ids("k.") == ["k.1", "k.2"]
    assert await store.list_state_ids("s") == ["k.2"]
    assert await store.client.zcard(f"{store.prefix}__local__:expiring") == 1


async def test_reindex_takes_out_what_is_not_so(store: RedisStore) -> None:
    await store.put_batch(some(3, state="s"))
    await store.list_state_ids("s")
    wrong = ["gone", "k.00001"]
    await store.client.zadd(f"{store.prefix}__local__:ids", {"gone": 0, b"\xff": 0})
    await store.client.zadd(f"{store.prefix}__local__:by_state", {f"t\0{it}": 0 for it in wrong} | {"no state": 0})
    await store.client.sadd(f"{store.prefix}state:t", *wrong)
    await store.client.sadd(f"{store.prefix}state:s", "gone")
    assert await store.reindex() >= 6
    assert await store.reindex() == 0
    assert await store.scan_ids("", allow_all=True) == await store.list_state_ids("s") == ids_of(some(3))
    assert await store.count_by_state("t") == 0
    assert await store.client.smembers(f"{store.prefix}state:s") == {it.encode() for it in ids_of(some(3))}


async def test_reindexes_at_a_time_share_one_walk(store: RedisStore) -> None:
    await store.put_batch(some(1_200))
    await store.client.delete(*(f"{store.prefix}__local__:{name}" for name in ("ids", "by_state", "indexed")))
    walks = [asyncio.create_task(store.reindex()) for _ in range(4)]
    counts = [asyncio.create_task(store.count_prefix("k.")) for _ in range(4)]
    walks[0].cancel()
    assert {await walk for walk in walks[1:]} == {2_400}
    assert {await count for count in counts} == {1_200}


# Deleting.


async def test_R11_delete_prefix_returns_what_it_deleted(store: RedisStore) -> None:
    await store.put_batch([*some(700), *some(5, "l.")])
    await store.client.delete(store.prefix + "k.00001", store.prefix + "k.00301")
    assert await store.delete_prefix("k.") == 698
    assert await store.delete_prefix("k.") == 0
    assert await store.scan_ids("", allow_all=True) == ids_of(some(5, "l."))


async def test_delete_prefix_takes_bounded_chunks(first: RedisStore, redis_url: str) -> None:
    await first.put_batch(some(2_000))
    await first.reindex()
    widths: list[int] = []
    async with Redis.from_url(redis_url) as watcher, watcher.monitor() as monitor:
        assert await first.delete_prefix("k.") == 2_000
        await first.client.echo(first.prefix)
        async for told in monitor.listen():
            words = told["command"].split(" ")
            if words[0] == "EVALSHA" and f"{first.prefix}k." in words[3]:
                widths.append(int(words[2]))
            if words[:2] == ["ECHO", first.prefix]:
                break
    assert sum(widths) == 2_000
    assert max(widths) <= 250


async def test_a_delete_that_is_cancelled_in_the_middle_is_called_again(store: RedisStore) -> None:
    await store.put_batch([*some(3_000), *some(3, "l.")])
    call = asyncio.create_task(store.delete_prefix("k."))
    while await store.count_prefix("k.") == 3_000:  # noqa: ASYNC110  nothing announces it
        await asyncio.sleep(0)
    call.cancel()
    with suppress(asyncio.CancelledError):
        await call
    await settled(store)
    left = await store.count_prefix("k.")
    assert await store.delete_prefix("k.") == left
    assert await store.scan_ids("", allow_all=True) == ids_of(some(3, "l."))


async def settled(store: RedisStore) -> None:
    """Until the calls that a cancelled one had sent are done."""
    while store._servers._owned:  # noqa: ASYNC110  nothing announces it
        await asyncio.sleep(0.001)


@pytest.mark.parametrize("way", ["request", "reply"])
async def test_a_delete_that_is_cut_in_the_middle_is_called_again(
    kind_server: RunningRedis, redis_prefix: str, way: str
) -> None:
    direct = await RedisStore.connect(kind_server.url, redis_prefix)
    async with CuttingProxy(kind_server.url) as proxy:
        store = await RedisStore.connect(proxy.url_for(kind_server.url), redis_prefix)
        await direct.put_batch([*some(1_500), *some(3, "l.")])
        before, deleted, cuts = 1_500, 0, 0
        for bytes_ in range(2_000, 60_000, 12_000):
            proxy.cut_after_request_bytes(bytes_) if way == "request" else proxy.cut_after_reply_bytes(bytes_ // 3)
            try:
                deleted += await store.delete_prefix("k.")
                break
            except TierUnavailable:
                cuts += 1
                await settled(store)
                left = await direct.count_prefix("k.")
                assert left <= before
                before = left
        proxy.heal()
        # What the calls that failed had deleted, nobody counts; the last one counts its own.
        assert deleted + await store.delete_prefix("k.") == before
        assert cuts > 0
        await store.close()
    assert await direct.scan_ids("", allow_all=True) == ids_of(some(3, "l."))
    await direct.close()


async def test_delete_prefix_spares_what_arrives_elsewhere_and_counts_what_it_took(store: RedisStore) -> None:
    await store.put_batch(some(1_500))
    arrived = 0

    async def arrive() -> None:
        nonlocal arrived
        for n in range(60):
            await store.put_batch([SyncItem(f"j.{n}", b"{}"), SyncItem(f"k.{n * 25:05}+", b"{}")])
            arrived += 1

    deleted, _ = await asyncio.gather(store.delete_prefix("k."), arrive())
    left = await store.scan_ids("k.")
    assert all(object_id.endswith("+") for object_id in left)
    assert deleted == 1_500 + arrived - len(left)
    assert await store.count_prefix("j.") == arrived


# Damage, and size.


async def damaged(store: RedisStore, object_id: str) -> None:
    """Its bytes are no longer those of its hash."""
    key = store.prefix + object_id
    if await store.client.type(key) == b"ReJSON-RL":
        await store.client.execute_command("JSON.SET", key, "$.payload", '{"other":1}')
    else:
        await store.client.setrange(key, await store.client.strlen(key) - 1, "!")


@pytest.mark.parametrize("bad", ["k.00002", "k.00003"])
async def test_a_damaged_value_is_named(store: RedisStore, bad: str) -> None:
    await store.put_batch(some(6))
    await damaged(store, bad)
    with pytest.raises(Corruption, match=bad):
        await store.scan_prefix("k.")
    with pytest.raises(Corruption, match=bad):
        await store.get_by_state("default")
    items = store.iter_prefix("k.")
    assert [await anext(items) for _ in range(int(bad[-1]))] == some(int(bad[-1]))
    with pytest.raises(Corruption, match=bad):
        await anext(items)
    assert await store.scan_prefix("k.", 2) == some(2)
    assert ids_of(await store.scan_prefix("k.", after=bad)) == ids_of(some(6))[int(bad[-1]) + 1 :]
    assert await store.scan_ids("k.") == ids_of(some(6))
    assert await store.delete_prefix("k.") == 6


async def test_an_item_under_the_key_of_another_is_damage(store: RedisStore) -> None:
    await store.put_batch(some(4))
    for here, there in (("k.00000", "k.00002"), ("k.00001", "k.00003")):
        await store.client.copy(store.prefix + here, store.prefix + there, replace=True)
        with pytest.raises(Corruption, match=there):
            await store.scan_prefix(there)


async def test_large_values_end_a_page_by_bytes(kind_server: RunningRedis, redis_prefix: str) -> None:
    large = [SyncItem(f"k.{n:05}", b'["%b"]' % (b"x" * 400_000), updated_at=1) for n in range(50)]
    async with CuttingProxy(kind_server.url) as proxy:
        store = await RedisStore.connect(proxy.url_for(kind_server.url), redis_prefix)
        # Behind many small ones, by which the size of the next could be misjudged.
        await store.put_batch([*some(300, "a."), *large])
        assert await store.count_prefix("k.") == 50
        before = proxy.bytes_down
        async with aclosing(store.iter_prefix("", allow_all=True)) as items:
            async for _ in items:
                break
        await settled(store)
        assert proxy.bytes_down - before < 12_000_000  # one page, and one read ahead
        assert await store.scan_prefix("k.") == large
        await store.close()


async def test_an_iteration_that_is_left_leaves_nothing_behind(store: RedisStore) -> None:
    await store.put_batch(some(1_500))
    for _ in range(20):
        async with aclosing(store.iter_prefix("k.")) as items:
            async for found in items:
                assert found == some(1)[0]
                break
    assert await store.count_prefix("k.") == 1_500
    await settled(store)


async def test_R10_a_listing_costs_no_walk_over_the_keyspace(own_redis: StartRedis) -> None:
    server = await own_redis()
    store = await RedisStore.connect(server.url, "p:")
    await store.put_batch(some(600))
    await store.reindex()

    async def walks() -> int:
        told = await store.client.info("commandstats")
        return sum(told.get(f"cmdstat_{name}", {"calls": 0})["calls"] for name in ("scan", "keys", "smembers", "sscan"))

    before = await walks()
    await store.scan_prefix("k.")
    await store.count_prefix("k.")
    await store.delete_prefix("k.")
    assert await walks() == before > 0
    await store.close()
