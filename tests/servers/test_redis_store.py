"""RedisStore on a real Redis: stamps, deadlines, type changes, faults of one item, faults of the server."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

import pytest
from redis.asyncio import Redis

from sync_engine.coalesce import Coalescer
from sync_engine.errors import ConfigError, InvalidId, InvalidItem, NotRunning, StoreError, TierUnavailable
from sync_engine.item import Op, SyncItem
from sync_engine.storage.redis import RedisStore
from sync_engine.storage.redis.connect import CONNECTIONS_MAX
from sync_engine.testing.fixtures import StartRedis
from sync_engine.testing.proxy import CuttingProxy


@pytest.fixture
async def store(redis_url: str, redis_prefix: str) -> AsyncIterator[RedisStore]:
    store = await RedisStore.connect(redis_url, redis_prefix)
    yield store
    await store.close()


@pytest.fixture
async def plain(redis_url: str) -> AsyncIterator[Redis]:
    async with Redis.from_url(redis_url) as client:
        yield client


def put(object_id: str, content: bytes, stamp: int = 0, **told: Any) -> Op:
    state = told.pop("state", "default")
    item = SyncItem(object_id, content, stamp=stamp, state=state)
    return Op(kind="put", object_id=object_id, stamp=stamp, item=item, **told)


def delete(object_id: str, stamp: int = 0) -> Op:
    return Op(kind="delete", object_id=object_id, stamp=stamp)


def now_ms() -> int:
    return time.time_ns() // 1_000_000


async def content(store: RedisStore, object_id: str) -> bytes | None:
    item = await store.get(object_id)
    return None if item is None else item.content


FORMS = [b"\x00old", b'{"old":1}']


# What is written, and what is left alone.


@pytest.mark.parametrize("old", FORMS)
@pytest.mark.parametrize("new", [b"\x00new", b'{"new":1}'])
async def test_R3_an_item_may_change_between_json_and_binary(store: RedisStore, old: bytes, new: bytes) -> None:
    await store.put(SyncItem("a", old, state="one"), ttl=60)
    result = await store.put_batch([SyncItem("a", new, state="two"), SyncItem("b", b"\x01")])
    assert (result.written, result.failed) == (2, {})
    assert await content(store, "a") == new
    assert await store.client.pttl(store.prefix + "a") == -1
    assert await store.list_state_ids("one") == []
    assert await store.list_state_ids("two") == ["a"]


async def test_R3_R2_one_refused_item_leaves_its_neighbours_stored(store: RedisStore) -> None:
    await store.client.rpush(store.prefix + "list", "somebody's")
    await store.client.set(store.prefix + "text", "somebody's")
    await store.client.set(store.prefix + "empty", "")
    await store.client.execute_command("JSON.SET", store.prefix + "json", "$", '{"somebody":1}')
    foreign = ["list", "text", "json", "empty"]
    items = [SyncItem(object_id, b'{"n":1}') for object_id in ["a", *foreign, "b"]]
    result = await store.put_batch(items)
    assert set(result.failed) == set(foreign)
    assert (result.written, result.verified) == (2, False)
    assert set(await store.get_many(["a", "b", *foreign])) == {"a", "b"}
    assert await store.client.get(store.prefix + "text") == b"somebody's"
    assert await store.list_state_ids("default") == ["a", "b"]
    assert await store.exists_batch(["list", "a", "text", "none", "b"]) == [False, True, False, False, True]
    with pytest.raises(StoreError, match="not an item"):
        await store.put(items[1])
    with pytest.raises(StoreError, match="not an item"):
        await store.delete("list")


async def test_R2_a_state_key_of_another_type_refuses_its_items_before_anything_is_written(store: RedisStore) -> None:
    await store.client.set(store.prefix + "state:bad", "somebody's")
    result = await store.put_batch([SyncItem("a", b"\x00", state="bad"), SyncItem("b", b"\x00")])
    assert set(result.failed) == {"a"}
    assert await store.get("a") is None
    assert await store.get("b") is not None


async def test_a_batch_with_an_id_twice_keeps_the_last(store: RedisStore) -> None:
    result = await store.put_batch([SyncItem("a", b"\x01"), SyncItem("b", b"\x02"), SyncItem("a", b"\x03")])
    assert result.written == 2
    assert await content(store, "a") == b"\x03"


async def test_apply_refuses_an_id_twice(store: RedisStore) -> None:
    with pytest.raises(InvalidItem, match="one per id"):
        await store.apply([put("a", b"\x01"), delete("a")])


async def test_more_items_than_a_chunk_holds(store: RedisStore) -> None:
    items = [SyncItem(f"i{n}", b'{"n":%d}' % n if n % 3 else b"\x00%d" % n, state=f"s{n % 4}") for n in range(1_203)]
    assert (await store.put_batch(items)).written == 1_203
    ids = [item.object_id for item in items]
    found = await store.get_many(ids)
    assert list(found) == ids
    assert all(found[item.object_id] == item for item in items)
    assert await store.exists_batch(["none", *ids]) == [False] + [True] * 1_203
    assert await store.delete_many([*ids, "none"]) == 1_203
    kept = await store.client.keys(store.prefix.replace("[", "\\[") + "*")
    assert {key.removeprefix(store.prefix.encode()) for key in kept} <= {b"__local__:mark", b"__local__:indexed"}


async def test_chunks_are_bounded_in_bytes_too(store: RedisStore) -> None:
    items = [SyncItem(f"i{n}", random.Random(n).randbytes(1_500_000)) for n in range(8)]
    assert (await store.put_batch(items)).written == 8
    assert await store.get_many([item.object_id for item in items]) == {item.object_id: item for item in items}


@pytest.mark.parametrize("new", FORMS)
@pytest.mark.parametrize("old", FORMS)
async def test_I1_an_older_stamp_never_replaces_a_newer_one(store: RedisStore, old: bytes, new: bytes) -> None:
    # Neighbours beyond 2^53, where doubles cannot tell them apart; 9 and 10, where texts compare wrongly.
    for low, high in ((9, 10), (2**53, 2**53 + 1), (2**63 - 2, 2**63 - 1)):
        await store.delete("a")
        await store.apply([put("a", old, high)])
        assert (await store.apply([put("a", new, low)])).superseded == {"a"}
        assert (await store.apply([delete("a", low)])).superseded == {"a"}
        assert await content(store, "a") == old
        assert (await store.apply([put("a", new, high)])).superseded == set()
        assert await content(store, "a") == new


async def test_I1_an_unordered_write_always_goes_through(store: RedisStore) -> None:
    await store.apply([put("a", b"\x01", 5)])
    assert await store.put(SyncItem("a", b"\x02"))
    assert await content(store, "a") == b"\x02"
    assert await store.delete("a")


async def test_I1_a_delete_keeps_older_puts_and_fills_out(store: RedisStore) -> None:
    await store.apply([put("a", b"\x01", 5)])
    assert (await store.apply([delete("a", 7)])).existed == {"a"}
    assert (await store.apply([delete("a", 7)])).existed == set()
    for late in (put("a", b"\x01", 6), put("a", b"\x01", 7, fill=True), put("a", b"\x01", 0, fill=True)):
        assert (await store.apply([late])).superseded == {"a"}
    assert await store.get("a") is None
    assert await store.client.pttl(f"{store.prefix}__local__:tomb:a") > 0
    assert (await store.apply([put("a", b"\x03", 8)])).superseded == set()
    assert (await store.apply([put("a", b"\x01", 6)])).superseded == {"a"}
    assert await content(store, "a") == b"\x03"


async def test_I1_a_put_at_the_stamp_of_its_tombstone_is_applied_again(store: RedisStore) -> None:
    await store.apply([delete("a", 7)])
    assert (await store.apply([put("a", b"\x01", 7)])).superseded == set()


async def test_an_unordered_delete_leaves_no_tombstone(store: RedisStore) -> None:
    await store.apply([delete("a", 7)])
    assert await store.delete("a") is False
    assert await store.client.exists(f"{store.prefix}__local__:tomb:a") == 0
    assert await store.put(SyncItem("a", b"\x01", stamp=3))


@pytest.mark.parametrize("held", FORMS)
async def test_I1_a_fill_never_replaces_a_copy_of_its_own_age(store: RedisStore, held: bytes) -> None:
    await store.apply([put("a", held, 5)])
    for stamp in (0, 4, 5):
        assert (await store.apply([put("a", b"\x09", stamp, fill=True)])).superseded == {"a"}
    assert (await store.apply([put("a", b"\x09", 6, fill=True)])).superseded == set()
    assert await content(store, "a") == b"\x09"


async def test_a_tier_that_shall_not_keep_an_item_loses_its_older_copy(store: RedisStore) -> None:
    await store.apply([put("a", b"\x01", 5), put("b", b"\x01", 9)])
    applied = await store.apply([put("a", b"\x02", 6, redis=False), put("b", b"\x02", 6, redis=False)])
    assert applied.superseded == {"b"}
    assert await store.exists_batch(["a", "b"]) == [False, True]
    assert (await store.apply([put("a", b"\x01", 5)])).superseded == {"a"}


@pytest.mark.parametrize("old", FORMS)
async def test_a_restate_changes_state_and_stamp_and_nothing_else(store: RedisStore, old: bytes) -> None:
    await store.apply([put("a", old, 5, redis_expires_at=now_ms() + 60_000)])
    before = await store.get("a")
    assert before is not None
    restate = Op(kind="restate", object_id="a", stamp=7, state='odd "é"/\\')
    missing = Op(kind="restate", object_id="none", stamp=7, state="x")
    await store.apply([restate, missing])
    after = await store.get("a")
    assert after == before.replace(state='odd "é"/\\')
    assert after is not None
    assert after.stamp == 7
    assert await store.client.pttl(store.prefix + "a") > 50_000
    assert await store.list_state_ids('odd "é"/\\') == ["a"]
    assert await store.list_state_ids("default") == []
    assert not await store.exists("none")
    late = Op(kind="restate", object_id="a", stamp=6, state="late")
    assert (await store.apply([late])).superseded == {"a"}


async def test_a_restate_reaches_documents_and_texts_of_the_original(store: RedisStore, redis_url: str) -> None:
    text_store = await RedisStore.connect(redis_url, store.prefix, binary_format="json")
    await text_store.put_batch([SyncItem("text", b"\x00"), SyncItem("stamped", b"\x00", stamp=4)])
    document = '{"payload":[],"payload_hash":"x","state":"default","timestamp":1,"version":1}'
    await store.client.execute_command("JSON.SET", store.prefix + "doc", "$", document)
    ids = ["doc", "stamped", "text"]
    await store.apply([Op(kind="restate", object_id=i, stamp=9, state='new "') for i in ids])
    found = await store.get_many(ids)
    assert {(item.state, item.stamp) for item in found.values()} == {('new "', 9)}
    assert await store.list_state_ids('new "') == ids
    assert (await store.apply([put("text", b"\x01", 8)])).superseded == {"text"}
    await text_store.close()


async def test_I1_the_original_format_carries_stamps_where_the_original_does_not_look(
    redis_url: str, redis_prefix: str
) -> None:
    store = await RedisStore.connect(redis_url, redis_prefix, binary_format="json")
    await store.apply([put("a", b"\x00", 2**63 - 1)])
    assert (await store.apply([put("a", b"\x01", 2**63 - 2)])).superseded == {"a"}
    await store.close()


# Deadlines.


@pytest.mark.parametrize("old", FORMS)
@pytest.mark.parametrize("new", FORMS)
async def test_R4_R5_a_deadline_is_set_changed_and_removed(store: RedisStore, old: bytes, new: bytes) -> None:
    key = store.prefix + "a"
    await store.put(SyncItem("a", old), ttl=100)
    assert 99_000 < await store.client.pttl(key) <= 100_000
    await store.put(SyncItem("a", new), ttl=1_000.5)
    assert 999_000 < await store.client.pttl(key) <= 1_000_500
    await store.put(SyncItem("a", new))
    assert await store.client.pttl(key) == -1
    assert await store.client.zcard(f"{store.prefix}__local__:expiring") == 0


async def test_R5_a_deadline_that_somebody_else_set_is_removed_too(store: RedisStore) -> None:
    await store.put(SyncItem("a", b"{}"))
    await store.client.expire(store.prefix + "a", 100)
    await store.put(SyncItem("a", b"[]"))
    assert await store.client.pttl(store.prefix + "a") == -1


@pytest.mark.parametrize("ttl", [0, -1, 0.999, float("nan"), 10**10, "1", True])
async def test_R3_a_ttl_out_of_range_is_refused_before_anything_is_written(store: RedisStore, ttl: Any) -> None:
    with pytest.raises(InvalidItem, match="ttl"):
        await store.put(SyncItem("a", b"{}"), ttl=ttl)
    assert not await store.exists("a")


@pytest.mark.parametrize("old", FORMS)
async def test_a_put_whose_deadline_is_past_leaves_nothing_behind(store: RedisStore, old: bytes) -> None:
    await store.apply([put("a", old, 5, state="hot")])
    await store.apply([put("a", b"\x01", 6, redis_expires_at=now_ms() - 1), put("b", b"\x01", 6, redis_expires_at=1)])
    assert await store.exists_batch(["a", "b"]) == [False, False]
    assert await store.count_by_state("hot") == 0
    # It was the newest write, so an older one that comes late finds it in its way.
    assert (await store.apply([put("a", old, 5)])).superseded == {"a"}


async def test_an_item_that_has_a_deadline_of_its_own_is_stored_until_then(store: RedisStore) -> None:
    deadline = now_ms() + 60_000
    await store.put(SyncItem("a", b"{}", expires_at=deadline))
    assert await store.client.pexpiretime(store.prefix + "a") == deadline
    item = await store.get("a")
    assert item is not None
    assert item.expires_at == deadline


# Reading.


async def test_R8_a_read_is_one_command_and_concurrent_reads_share_it(store: RedisStore, plain: Redis) -> None:
    await store.put_batch([SyncItem("json", b"{}"), SyncItem("bin", b"\x00")])
    await store.get("json")

    async def scripts_run() -> int:
        stats = await plain.info("commandstats")
        return int(stats["cmdstat_evalsha"]["calls"])

    before = await scripts_run()
    for object_id in ("json", "bin", "none"):
        await store.get(object_id)
    assert await scripts_run() - before == 3
    await store.get_many(["json", "bin", "none"])
    assert await scripts_run() - before == 4
    await asyncio.gather(*(store.get(object_id) for object_id in ["json", "bin", "none"] * 20))
    assert await scripts_run() - before == 5


async def test_R8_a_change_of_type_never_looks_like_a_miss(store: RedisStore) -> None:
    await store.put(SyncItem("a", b"\x00"))
    done = False

    async def flip() -> None:
        nonlocal done
        for n in range(150):
            await store.put(SyncItem("a", b"{}" if n % 2 else b"\x00"))
        done = True

    async def look() -> None:
        while not done:
            assert await content(store, "a") in (b"{}", b"\x00")

    await asyncio.gather(flip(), look(), look())


@pytest.mark.parametrize(
    "bad", ["", "state:x", "merkle:hash:", "idx:x", "__local__:tomb:x", "cdc", "x" * 256, "a\0b", 5]
)
async def test_R12_R11_no_call_reaches_a_key_that_is_not_an_items(store: RedisStore, bad: Any) -> None:
    for call in (
        store.get(bad),
        store.get_many([bad]),
        store.fetch([bad]),
        store.exists(bad),
        store.exists_batch([bad]),
        store.delete(bad),
        store.delete_many(["ok", bad]),
        store.is_in_state(bad, "default"),
        store.move_state(bad, "default", "x"),
    ):
        with pytest.raises(InvalidId):
            await call


async def test_R11_deleting_every_item_leaves_other_keys_alone(store: RedisStore) -> None:
    await store.client.xadd(store.prefix + "cdc", {"f": "v"})
    await store.client.set(store.prefix + "merkle:hash:", "0" * 64)
    await store.put_batch([SyncItem("a", b"{}"), SyncItem("b", b"\x00")])
    await store.delete_many(["a", "b"])
    await store.delete_by_state("default")
    assert await store.client.exists(store.prefix + "cdc", store.prefix + "merkle:hash:") == 2


async def test_300_cancelled_gets_leave_no_wrong_reply_and_no_connection_behind(
    store: RedisStore, plain: Redis
) -> None:
    items = {f"i{n}": SyncItem(f"i{n}", b"%d" % n) for n in range(100)}
    await store.put_batch(items.values())
    rng = random.Random(7)
    clients = len(await plain.client_list())
    for _ in range(300):
        task = asyncio.create_task(store.get(f"i{rng.randrange(100)}"))
        for _ in range(rng.randrange(6)):
            await asyncio.sleep(0)
        task.cancel()
        wanted = f"i{rng.randrange(100)}"
        assert await store.get(wanted) == items[wanted]
        await asyncio.gather(task, return_exceptions=True)
    assert len(await plain.client_list()) <= clients + CONNECTIONS_MAX
    assert len(store.client.connection_pool._in_use_connections) == 0


async def test_a_cancelled_write_is_carried_to_its_end(store: RedisStore) -> None:
    task = asyncio.create_task(store.put(SyncItem("a", b"{}")))
    while not store._servers._owned:  # noqa: ASYNC110  nothing announces it
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await store.close()
    with pytest.raises(NotRunning):
        await store.get("a")
    with pytest.raises(NotRunning):
        await store.put(SyncItem("a", b"{}"))


# Servers that fail.


async def test_R14_out_of_memory_writes_nothing_of_the_chunk_and_deletes_still_work(own_redis: StartRedis) -> None:
    server = await own_redis()
    store = await RedisStore.connect(server.url, "p:")
    await store.put_batch([SyncItem(f"i{n}", b'{"n":1}') for n in range(10)])
    await store.client.config_set("maxmemory", 1)
    with pytest.raises(TierUnavailable, match="out of memory") as caught:
        await store.put_batch([SyncItem("new", b"{}"), SyncItem("i1", b"\x00", state="x")])
    assert caught.value.tier == "l2"
    assert caught.value.retryable
    assert await store.get("new") is None
    assert await content(store, "i1") == b'{"n":1}'
    assert await store.count_by_state("x") == 0
    assert (await store.apply([delete("i1", 9)])).existed == {"i1"}
    assert await store.move_state("i2", "default", "x")
    assert await store.delete_by_state("default") == 8
    await store.close()


async def test_R13_a_server_that_does_not_answer_costs_the_configured_time(own_redis: StartRedis) -> None:
    server = await own_redis()
    store = await RedisStore.connect(server.url, "p:", response_timeout_ms=100)
    async with CuttingProxy(server.url) as proxy:
        slow = await RedisStore.connect(proxy.url_for(server.url), "p:", response_timeout_ms=100)
        proxy.blackhole()
        for call in (slow.put(SyncItem("a", b"{}")), slow.get("a"), slow.count_by_state("default")):
            with pytest.raises(TierUnavailable):
                await call
        proxy.heal()
        assert await slow.put(SyncItem("a", b"{}"))
        await slow.close()
    assert await content(store, "a") == b"{}"
    await store.close()


async def test_R14_a_call_whose_reply_is_lost_is_not_sent_twice(own_redis: StartRedis) -> None:
    server = await own_redis()
    async with CuttingProxy(server.url) as proxy, Redis.from_url(server.url) as plain:
        store = await RedisStore.connect(proxy.url_for(server.url), "p:")
        await store.put(SyncItem("a", b"{}"))
        await plain.config_resetstat()
        proxy.cut_after_reply_bytes(0)
        with pytest.raises(TierUnavailable):
            await store.put(SyncItem("a", b"[]"))
        assert (await plain.info("commandstats"))["cmdstat_evalsha"]["calls"] == 1
        await store.close()


async def test_R13_a_server_that_is_not_there_is_unavailable_and_not_empty(own_redis: StartRedis) -> None:
    server = await own_redis()
    url = server.url
    store = await RedisStore.connect(url, "p:")
    await store.put(SyncItem("a", b"{}"))
    await server.stop()
    for call in (
        store.get("a"),
        store.get_many(["a"]),
        store.exists("a"),
        store.put(SyncItem("a", b"{}")),
        store.delete("a"),
        store.count_by_state("default"),
        store.list_state_ids("default"),
    ):
        with pytest.raises(TierUnavailable):
            await call
    await store.close()
    with pytest.raises(TierUnavailable):
        await RedisStore.connect(url, "p:")


async def test_a_server_that_forgot_the_scripts_is_told_them_again(store: RedisStore) -> None:
    await store.put(SyncItem("a", b"{}"))
    await store.client.script_flush()
    assert await content(store, "a") == b"{}"
    await store.client.script_flush()
    assert await store.delete("a")


async def test_a_reply_that_is_cut_anywhere_is_unknown_and_never_wrong(own_redis: StartRedis) -> None:
    server = await own_redis()
    direct = await RedisStore.connect(server.url, "p:")
    items = {f"i{n}": SyncItem(f"i{n}", b'{"n":%d}' % n) for n in range(5)}
    await direct.put_batch(items.values())
    async with CuttingProxy(server.url) as proxy:
        store = await RedisStore.connect(proxy.url_for(server.url), "p:")
        for cut in range(0, 400, 9):
            await store.get("i0")
            proxy.cut_after_reply_bytes(cut)
            with suppress(TierUnavailable):
                assert await store.get_many(items) == items
            proxy.heal()
        assert await store.get_many(items) == items
        await store.close()
    await direct.close()


async def test_without_redisjson_json_is_kept_as_strings_and_that_is_said_once(
    own_redis: StartRedis, caplog: pytest.LogCaptureFixture
) -> None:
    server = await own_redis(modules=False)
    with caplog.at_level(logging.WARNING, "sync_engine"):
        store = await RedisStore.connect(server.url, "p:")
        item = SyncItem.from_json("a", {"n": 1.5}, state="hot")
        await store.put_batch([item, SyncItem("b", b"\x00")], ttl=60)
        await store.put(item.replace(stamp=5))
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert await store.get("a") == item
    assert await store.exists_batch(["a", "b", "c"]) == [True, True, False]
    assert (await store.apply([put("a", b"\x00", 4)])).superseded == {"a"}
    assert await store.move_state("a", "hot", "cold")
    assert await store.list_state_ids("cold") == ["a"]
    assert await store.delete_by_state("default") == 1
    await store.close()


@pytest.mark.parametrize(
    "url",
    [
        "http://u:hunter2@localhost",
        "redis://u:hunter2@localhost:port",
        "hunter2",
        "",
        "redis://u:hunter2@localhost/?nonsense=1",
        "redis://u:hunter2@[::1",
    ],
)
async def test_a_bad_url_is_refused_without_its_password(url: str) -> None:
    with pytest.raises(ConfigError) as caught:
        await RedisStore.connect(url)
    assert "hunter2" not in f"{caught.value!r} {caught.value.__cause__!r}"


async def test_wrong_credentials_are_refused_without_being_told(own_redis: StartRedis) -> None:
    server = await own_redis()
    async with Redis.from_url(server.url) as plain:
        await plain.acl_setuser("ada", enabled=True, passwords=["+lovelace"], keys=["*"], commands=["+@all"])
    at = server.url.split("://", 1)[1].rsplit("@", 1)[-1]
    scheme = server.url.split("://", 1)[0]
    with pytest.raises(TierUnavailable, match="credentials") as caught:
        await RedisStore.connect(f"{scheme}://ada:hunter2@{at}")
    assert "hunter2" not in f"{caught.value!r} {caught.value.__cause__!r}"
    assert "hunter2" not in repr(RedisStore(f"{scheme}://ada:hunter2@{at}"))


async def test_resp2_and_resp3_give_the_same_answers(redis_url: str, redis_prefix: str) -> None:
    for protocol in (2, 3):
        store = await RedisStore.connect(
            f"{redis_url}{'&' if '?' in redis_url else '?'}protocol={protocol}", redis_prefix
        )
        await store.put_batch([SyncItem("a", b"{}"), SyncItem("b", b"\x00")])
        assert set(await store.get_many(["a", "b", "c"])) == {"a", "b"}
        assert await store.exists_batch(["a", "c"]) == [True, False]
        assert await store.list_state_ids("default") == ["a", "b"]
        assert await store.delete_many(["a", "b", "c"]) == 2
        await store.close()


# The coalescer, on its own.


async def test_gets_of_one_tick_share_a_fetch_and_gets_of_one_key_a_flight() -> None:
    calls: list[list[str]] = []
    release = asyncio.Event()

    async def fetch(keys: Any) -> dict[str, str]:
        calls.append(list(keys))
        await release.wait()
        return {key: key.upper() for key in keys if key != "none"}

    coalescer = Coalescer(fetch, ids_max=2)
    gets = [asyncio.create_task(coalescer.get(key)) for key in ("a", "b", "a", "none")]
    while not calls:  # noqa: ASYNC110  nothing announces it
        await asyncio.sleep(0)
    late = asyncio.create_task(coalescer.get("a"))
    coalescer.forget("a")
    anew = asyncio.create_task(coalescer.get("a"))
    gets[0].cancel()
    release.set()
    assert await asyncio.gather(*gets[1:], late, anew) == ["B", "A", None, "A", "A"]
    assert gets[0].cancelled()
    assert calls[:2] == [["a", "b"], ["none"]]
    assert calls[2:] == [["a"]]
    await coalescer.aclose()
    with pytest.raises(NotRunning):
        await coalescer.get("a")


async def test_a_failed_fetch_reaches_every_waiter_and_the_next_get_starts_anew() -> None:
    fails = True

    async def fetch(keys: Any) -> dict[str, int]:
        if fails:
            raise TierUnavailable("l2", "down")
        return dict.fromkeys(keys, 1)

    coalescer = Coalescer(fetch)
    outcomes = await asyncio.gather(*(coalescer.get(key) for key in "aab"), return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [TierUnavailable] * 3
    fails = False
    assert await coalescer.get("a") == 1
    await coalescer.aclose()
