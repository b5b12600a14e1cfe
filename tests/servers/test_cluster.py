"""RedisStore on a real cluster: the layout, every verb across shards, slots that move, nodes that go and come back."""

from __future__ import annotations

import asyncio
import random
import time
from binascii import crc_hqx
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from redis.exceptions import MovedError

from sync_engine.errors import ConfigError, NotRunning, TierUnavailable
from sync_engine.item import Op, SyncItem
from sync_engine.storage.redis import RedisStore
from sync_engine.storage.redis.refusals import NotHere, translated
from sync_engine.storage.redis.shards import Shard
from sync_engine.storage.redis.slots import SHARDS, SLOTS, TAGS, owners_of, reached_at, shard_number, slot_of
from sync_engine.testing.clusters import ClusterSet
from sync_engine.testing.fixtures import StartCluster, StartKind
from sync_engine.testing.servers import ACL_USER, KINDS, acl_rule, tls_files

BRACES = ["{", "}", "{}", "{a}", "a{b}c", "}{", "{{714}}", "{user}.1", "x{}y", "\n{\t}"]


@pytest.fixture
async def store(redis_cluster: ClusterSet, redis_prefix: str) -> AsyncIterator[RedisStore]:
    store = await RedisStore.connect(redis_cluster.url, redis_prefix)
    yield store
    await store.close()


def items(count: int, **told: Any) -> list[SyncItem]:
    return [SyncItem(f"k.{n:04}", b'{"n":%d}' % n if n % 2 else b"\x00%d" % n, **told) for n in range(count)]


def ids_of(shard: int, count: int) -> list[str]:
    """Ids that live in one shard."""
    found = (f"n{n}" for n in range(1_000_000))
    return [next(id_ for id_ in found if shard_number(id_) == shard) for _ in range(count)]


def put(object_id: str, stamp: int = 1, state: str = "default", **told: Any) -> Op:
    item = SyncItem(object_id, b'{"s":%d}' % stamp, stamp=stamp, state=state)
    return Op(kind="put", object_id=object_id, stamp=stamp, item=item, **told)


async def raw_keys(cluster: ClusterSet, prefix: str) -> dict[str, list[int]]:
    """Every key under the prefix, and the ports of the primaries that have it."""
    found: dict[str, list[int]] = {}
    for node in await cluster.primaries():
        for key in await node.server.ask("KEYS", f"{prefix}*"):
            found.setdefault(key, []).append(node.server.port)
    return found


# Where things are


def test_the_shards_lie_evenly_over_the_slots() -> None:
    slots = [slot_of(tag.encode()) for tag in TAGS]
    assert all(abs(slot - (n * 128 + 64)) <= 8 for n, slot in enumerate(slots))
    for primaries in range(1, 33):
        bounds = [SLOTS * part // primaries for part in range(primaries + 1)]
        shares = [sum(low <= slot < high for slot in slots) for low, high in pairwise(bounds)]
        assert max(shares) - min(shares) <= 2


def test_the_layout_is_the_same_for_ever() -> None:
    # Another tag, or another shard of an id, and what is stored would be looked for elsewhere.
    assert (SHARDS, TAGS[:4], TAGS[-1]) == (128, ("714", "639", "2639", "2714"), "2661")
    assert crc_hqx(" ".join(TAGS).encode(), 0) == 40_168
    assert [shard_number(id_) for id_ in ("user.1", "größe", "\U0001f600", "{user}.1")] == [45, 81, 15, 77]


async def test_a_slot_is_where_the_server_says(redis_cluster: ClusterSet) -> None:
    keys = ["", "a", "{a}b", "a{b}c{d}", "{}a", "a{}b{c}", "{", "}", "}{", "{a", "größe{ß}", "{{a}}", *TAGS]
    server = redis_cluster.servers[0]
    assert [slot_of(key.encode()) for key in keys] == [await server.ask("CLUSTER", "KEYSLOT", key) for key in keys]


def test_a_node_may_be_at_an_ipv6_address() -> None:
    moved = translated(MovedError("3999 ::1:7001"))
    assert isinstance(moved, NotHere)
    assert moved.moved_to == ("::1", 7001)
    assert owners_of([[0, 16_383, [b"::1", 7001, b"id", []]]], ("h", 1))[0] == ("::1", 7001)


def test_a_node_that_does_not_know_its_address_is_the_one_that_was_asked() -> None:
    told = [[0, 199, [None, 7000, b"id", []]], [200, 16_383, [b"10.0.0.2", 7001, b"id", []], [b"10.0.0.3", 7002, b"r"]]]
    owners = owners_of(told, ("10.0.0.1", 7000))
    assert owners[0] == ("10.0.0.1", 7000)
    assert {owners[n] for n in range(2, SHARDS)} == {("10.0.0.2", 7001)}
    assert [reached_at(host, ("h", 1)) for host in (None, b"", "", "?", "::1", b"10.0.0.2")] == [
        *"hhhh",
        "::1",
        "10.0.0.2",
    ]
    assert owners_of([[0, 63, [b"h", 1]]], ("h", 1)) == {}


async def test_everything_of_an_item_is_in_its_shards_slot(store: RedisStore, redis_cluster: ClusterSet) -> None:
    await store.put_batch(items(300, state="s"), ttl=60)
    await store.apply([put("a", 5), put("b", 5)])
    await store.apply([Op(kind="delete", object_id="a", stamp=6), Op(kind="delete", object_id="c", stamp=6)])
    tags = {tag: n for n, tag in enumerate(TAGS)}
    for key in await raw_keys(redis_cluster, store.prefix):
        tag, _, rest = key.removeprefix(store.prefix).removeprefix("{").partition("}")
        assert tag in tags
        if not rest.startswith(("__local__:", "state:")):
            assert shard_number(rest) == tags[tag]


@pytest.mark.parametrize("prefix", ["{app}:", "a{", "a}"])
def test_a_prefix_with_braces_is_refused(prefix: str) -> None:
    with pytest.raises(ConfigError, match="braces"):
        RedisStore("redis+cluster://127.0.0.1:1", prefix)


# Every verb, across shards


async def test_items_of_all_shards_go_in_and_out(store: RedisStore) -> None:
    batch = items(1_000)
    assert len({shard_number(item.object_id) for item in batch}) == SHARDS
    assert (await store.put_batch(batch)).written == 1_000
    ids = [item.object_id for item in batch]
    found = await store.get_many([*reversed(ids), "absent"])
    assert list(found) == ids[::-1]
    assert [item.content for item in batch] == [found[id_].content for id_ in ids]
    assert await store.exists_batch([*ids, "absent"]) == [True] * 1_000 + [False]
    assert [item.content for item in batch] == [item.content for item in await asyncio.gather(*map(store.get, ids))]
    assert await store.delete_many(ids[::2]) == 500
    assert not await store.delete(ids[0])
    assert await store.exists_batch(ids[:4]) == [False, True, False, True]


async def test_ids_with_braces_are_plain_ids(store: RedisStore) -> None:
    batch = [SyncItem(id_, id_.encode(), state="s") for id_ in BRACES]
    assert (await store.put_batch(batch)).written == len(BRACES)
    assert {id_: item.content.decode() for id_, item in (await store.get_many(BRACES)).items()} == dict(
        zip(BRACES, BRACES, strict=True)
    )
    assert await store.list_state_ids("s") == sorted(BRACES)
    assert [item.object_id for item in await store.scan_prefix("{")] == sorted(i for i in BRACES if i[0] == "{")
    assert await store.delete_many(BRACES) == len(BRACES)


async def test_states_span_shards(store: RedisStore) -> None:
    ids = [f"k.{n:04}" for n in range(400)]
    await store.put_batch(items(400, state="new"))
    assert await store.count_by_state("new") == 400
    assert await store.list_state_ids("new", 150) == ids[:150]
    assert await store.list_state_ids("new", 150, after=ids[149]) == ids[150:300]
    assert [item.object_id async for item in store.iter_by_state("new")] == ids
    assert await store.move_state(ids[7], "new", "old")
    assert not await store.move_state(ids[7], "new", "old")
    assert await store.is_in_state(ids[7], "old")
    assert await store.remove_from_state(ids[7], "old")
    assert await store.list_state_ids("default") == [ids[7]]
    assert await store.delete_by_state("new") == 399
    assert await store.count_by_state("new") == 0
    assert [item.object_id for item in await store.scan_prefix("k.")] == [ids[7]]


async def test_prefixes_span_shards_in_order(store: RedisStore) -> None:
    await store.put_batch([*items(700), *(SyncItem(f"other.{n}", b"{}") for n in range(50))])
    ids = [f"k.{n:04}" for n in range(700)]
    assert await store.count_prefix("k.") == 700
    assert [item.object_id for item in await store.scan_prefix("k.", 123)] == ids[:123]
    assert [item.object_id for item in await store.scan_prefix("k.", 123, after=ids[122])] == ids[123:246]
    assert [item.object_id async for item in store.iter_prefix("k.")] == ids
    assert await store.scan_prefix("k.", 0) == []
    assert await store.delete_prefix("k.0") == 700
    assert await store.count_prefix("", allow_all=True) == 50


async def test_I6_expired_members_leave_every_shard(store: RedisStore) -> None:
    await store.put_batch(items(200, state="s"), ttl=1)
    await store.put_batch([SyncItem(f"z.{n}", b"{}", state="s") for n in range(20)])
    until = time.monotonic() + 20
    while await store.count_by_state("s") != 20:
        assert time.monotonic() < until
        await asyncio.sleep(0.05)
    assert await store.count_prefix("k.") == 0
    assert [item.object_id for item in await store.scan_prefix("", allow_all=True)] == sorted(
        f"z.{n}" for n in range(20)
    )


async def test_every_primary_is_asked_once(store: RedisStore, redis_cluster: ClusterSet) -> None:
    servers = store._servers
    parts = await servers.primaries()
    assert sorted(len(part) for part in parts) == [42, 43, 43]
    assert sorted(shard.number for part in parts for shard in part) == list(range(SHARDS))
    for at in (0, -1):
        ports = {int((await servers.call(part[at], "CONFIG", "GET", "port"))[b"port"]) for part in parts}
        assert ports == {node.server.port for node in await redis_cluster.primaries() if node.slots}
    assert (await servers.capabilities()).json
    assert "3 primaries" in repr(store)


async def test_what_the_primaries_can_do_is_asked_once_however_many_want_to_know(
    redis_cluster: ClusterSet, redis_prefix: str
) -> None:
    store = RedisStore(redis_cluster.url, redis_prefix)
    servers = store._servers
    await servers.primaries()
    connections = [len(line.client.connection_pool._available_connections) for line in servers._lines.values()]
    await asyncio.gather(*(store.capabilities() for _ in range(200)))
    lines = [servers._line(node) for node in servers._topology.primaries]
    assert sum(len(line.client.connection_pool._available_connections) for line in lines) <= sum(connections) + 3
    await store.close()


async def test_the_client_reaches_every_shard(store: RedisStore) -> None:
    await store.put(SyncItem("a", b"\x00"))
    shard = store._servers.shard_of("a")
    assert await store.client.execute_command("UNLINK", f"{shard.prefix}a") == 1
    assert await store.get("a") is None


@pytest.mark.parametrize("options", ["?protocol=2", "?client_name=stock"])
async def test_the_client_is_made_as_the_url_says_and_sends_nothing_twice(
    redis_cluster: ClusterSet, redis_prefix: str, options: str
) -> None:
    store = await RedisStore.connect(redis_cluster.url + options, redis_prefix)
    assert await store.client.incr(f"{redis_prefix}n") == 1
    assert store.client.retry.get_retries() == 0
    assert await store.client.delete(f"{redis_prefix}n") == 1
    await store.close()


async def test_a_connection_that_listens_takes_none_of_the_others(store: RedisStore) -> None:
    shard = store._servers.shards[5]
    async with store._servers.listen(shard) as listener:
        assert await listener.exchange("XADD", f"{shard.prefix}stream", "*", "a", "b", timeout_s=5)
        with pytest.raises(TierUnavailable, match="MOVED"):
            await listener.exchange("GET", f"{store._servers.shards[100].prefix}x", timeout_s=5)


async def test_300_cancelled_calls_leave_no_wrong_reply_and_no_connection_in_use(store: RedisStore) -> None:
    batch = items(64)
    await store.put_batch(batch)
    seed = random.Random(7)
    for _ in range(300):
        calls: list[Callable[[], Any]] = [
            lambda: store.get_many([item.object_id for item in seed.sample(batch, 20)]),
            lambda: store.put_batch(seed.sample(batch, 10)),
            lambda: store.get(seed.choice(batch).object_id),
            lambda: store.scan_prefix("k."),
        ]
        task = asyncio.create_task(seed.choice(calls)())
        for _ in range(seed.randrange(12)):
            await asyncio.sleep(0)
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
    found = await store.get_many([item.object_id for item in batch])
    assert {id_: item.content for id_, item in found.items()} == {item.object_id: item.content for item in batch}
    lines = store._servers._lines.values()
    await store._servers._owned.over()
    assert [len(line.client.connection_pool._in_use_connections) for line in lines] == [0] * len(lines)


async def test_a_closed_store_says_so(redis_cluster: ClusterSet) -> None:
    for used in (False, True):
        store = RedisStore(redis_cluster.url, "t")
        if used:
            await store.exists("a")
        await store.close()
        await store.close()
        with pytest.raises(NotRunning):
            await store.get("a")


async def test_no_node_at_all_is_unavailable() -> None:
    store = RedisStore("redis+cluster://127.0.0.1:1,127.0.0.1:2")
    with pytest.raises(TierUnavailable):
        await store.get("a")
    with pytest.raises(TierUnavailable):
        await RedisStore.connect("redis+cluster://127.0.0.1:1")
    await store.close()


@pytest.mark.parametrize("names", ["addresses", "host names"])
async def test_tls_and_a_user_with_few_rights_on_every_node_by_whichever_name(
    own_cluster: StartCluster, tmp_path: Path, names: str
) -> None:
    by_name = names == "host names"
    config = ("cluster-announce-hostname localhost", "cluster-preferred-endpoint-type hostname") if by_name else ()
    # Its certificate is for one kind of name only, and each node is reached by that.
    files = tls_files(tmp_path, "localhost" if by_name else "127.0.0.1")
    cluster = await own_cluster(
        KINDS["redis-7"], replicas=0, config=config, tls=files, users=[f"{acl_rule('t*')} +cluster|slots"]
    )
    user, password = (quote(word, safe="") for word in ACL_USER)
    url = cluster.tls_url.replace("://", f"://{user}:{password}@")
    store = await RedisStore.connect(url.replace("127.0.0.1", "localhost") if by_name else url, "t:")
    batch = items(300, state="s")
    assert (await store.put_batch(batch)).written == 300
    shard = store._servers.shards[0]
    await cluster.move_slot(slot_of(shard.prefix.encode()), 2)
    assert len(await store.get_many([item.object_id for item in batch])) == 300
    assert await store.count_by_state("s") == 300
    assert {host for host, _ in store._servers._topology.primaries} == {"localhost" if by_name else "127.0.0.1"}
    async with store._servers.listen(shard) as listener:
        assert await listener.exchange("EXISTS", f"{shard.prefix}nothing", timeout_s=5) == 0
    if not by_name:  # redis-py makes an address of this very name
        assert await store.client.get(f"{shard.prefix}nothing") is None
    await store.close()
    with pytest.raises(TierUnavailable, match="CERTIFICATE_VERIFY_FAILED"):
        await RedisStore.connect(url.partition("?")[0], "t:")


@pytest.mark.parametrize("url", ["redis+cluster://ada:{canary}@127.0.0.1:{port}", "redis+cluster://127.0.0.1:{plain}"])
async def test_why_no_node_says_who_serves_what_is_said(
    redis_cluster: ClusterSet, own_kind: StartKind, url: str
) -> None:
    plain, canary = (await own_kind("valkey-9")).port, "canary-51f0"
    reason = "cluster support disabled" if "plain" in url else "refused the credentials"
    with pytest.raises(TierUnavailable, match=reason) as failed:
        await RedisStore.connect(url.format(canary=canary, port=redis_cluster.servers[0].port, plain=plain))
    assert canary not in f"{failed.value} {failed.value!r} {failed.value.__cause__!r}"


async def test_a_callback_that_fails_fails_the_call_and_is_called_again(own_cluster: StartCluster) -> None:
    cluster = await own_cluster(replicas=0)
    told: list[str] = []

    def notice() -> None:
        told.append("new")
        if len(told) == 1:
            raise RuntimeError("not ready")

    store = await RedisStore.connect(cluster.url, "t:", on_new_server=notice)
    node = await cluster.owner(slot_of(store._servers.shard_of("a").prefix.encode()))
    await store.get("a")
    await node.server.restart()
    async with asyncio.timeout(20):
        with pytest.raises(RuntimeError, match="not ready"):
            await eventually(lambda: store.get("a"))
        assert await eventually(lambda: store.get("a")) is None
    assert told == ["new", "new"]
    await store.close()


# Slots on the move


async def entries(cluster: ClusterSet, shard: Shard) -> dict[str, Any]:
    """What the raw keys of a shard say, and that they agree: values, indexes, state sets."""
    node = await cluster.owner(slot_of(shard.prefix.encode()))
    ask = node.server.ask
    keys = {key.removeprefix(shard.prefix) for key in await ask("KEYS", f"{shard.prefix}*")}
    states = {key.removeprefix("state:") for key in keys if key.startswith("state:")}
    ids = {key for key in keys if not key.startswith(("state:", "__local__:"))}
    by_set = {(state, id_) for state in states for id_ in await ask("SMEMBERS", f"{shard.prefix}state:{state}")}
    by_index = {tuple(entry.split("\0")) for entry in await ask("ZRANGE", f"{shard.prefix}__local__:by_state", 0, -1)}
    assert by_set == by_index
    assert set(await ask("ZRANGE", f"{shard.prefix}__local__:ids", 0, -1)) == ids
    assert sorted(id_ for _, id_ in by_set) == sorted(ids)
    return {id_: state for state, id_ in by_set}


async def test_a_call_follows_its_slot(own_cluster: StartCluster) -> None:
    cluster = await own_cluster(replicas=0)
    told: list[str] = []
    store = await RedisStore.connect(cluster.url, "t:", on_new_server=lambda: told.append("new"))
    batch = items(500, state="s")
    await store.put_batch(batch)
    ids = [item.object_id for item in batch]
    for number in (0, 42, 43, 85, 127):
        slot = slot_of(store._servers.shards[number].prefix.encode())
        before = await cluster.owner(slot)
        to = next(n for n, node in enumerate(await cluster.primaries()) if node.id != before.id)
        await cluster.move_slot(slot, to)
        assert len(await store.get_many(ids)) == 500
        assert await store.list_state_ids("s") == ids
    assert (await store.put_batch(batch)).written == 500
    await store.close()
    assert told == []  # every key came along, so there is nothing to distrust
    assert {len(ports) for ports in (await raw_keys(cluster, "t:")).values()} == {1}


@pytest.mark.slow
async def test_no_call_is_half_done_at_any_step_of_a_slot_that_moves(own_cluster: StartCluster) -> None:
    cluster = await own_cluster(replicas=0)
    store = await RedisStore.connect(cluster.url, "t:")
    store._servers._patience_s = 0.03  # it would wait for the slot to arrive, which waits for us
    number = 17
    shard = store._servers.shards[number]
    slot = slot_of(shard.prefix.encode())
    old = ids_of(number, 120)
    states = ["a", "b", "c"]
    held: dict[str, str | None] = dict.fromkeys(old)
    outcomes: Counter[str] = Counter()
    seed = random.Random(5)
    stamp = 0

    async def attempt(ops: list[Op]) -> None:
        try:
            applied = await store.apply(ops)
        except NotHere:
            outcomes["not now"] += 1  # nothing at all was done
            return
        outcomes["done"] += 1
        assert not applied.refused
        for op in ops:
            if op.kind == "put":
                held[op.object_id] = op.item.state
            elif op.kind == "delete" or held[op.object_id] is not None:
                held[op.object_id] = op.state

    def some(count: int) -> list[Op]:
        nonlocal stamp
        ops = []
        for id_ in seed.sample(old, count):
            stamp += 1
            kind = seed.choice(["put", "put", "delete", "restate"])
            state = seed.choice(states)
            if kind == "put":
                ttl = {"redis_expires_at": time.time_ns() // 1_000_000 + 60_000} if seed.random() < 0.3 else {}
                ops.append(put(id_, stamp, state, **ttl))
            elif kind == "delete":
                ops.append(Op(kind="delete", object_id=id_, stamp=stamp))
            else:
                ops.append(Op(kind="restate", object_id=id_, stamp=stamp, state=state))
        return ops

    async def between(step: str) -> None:
        outcomes[step] += 1
        for count in (1, 1, 5):
            await attempt(some(count))
        with suppress(NotHere):
            found = await store.get_many(old)
            assert {id_: item.state for id_, item in found.items()} == {id_: it for id_, it in held.items() if it}
        with suppress(NotHere):
            assert await store.count_by_state("a") == list(held.values()).count("a")

    stamp += 1
    await attempt([put(id_, stamp, seed.choice(states)) for id_ in old])
    assert outcomes == {"done": 1}
    for round_ in range(2):
        source = await cluster.owner(slot)
        to = next(n for n, node in enumerate(await cluster.primaries()) if node.id != source.id)
        await cluster.move_slot(slot, to, between)
        assert {len(ports) for ports in (await raw_keys(cluster, "t:")).values()} == {1}, round_
        found = await entries(cluster, shard)
        assert found == {id_: state for id_, state in held.items() if state}
    assert outcomes["moved"] > 2 * 5
    assert min(outcomes["done"], outcomes["not now"]) > 4
    await store.close()


async def test_members_expire_exactly_while_their_slot_moves(own_cluster: StartCluster) -> None:
    cluster = await own_cluster(replicas=0)
    store = await RedisStore.connect(cluster.url, "t:")
    store._servers._patience_s = 0.03
    number = 90
    shard = store._servers.shards[number]
    slot = slot_of(shard.prefix.encode())
    ids = ids_of(number, 90)
    deadline = time.time_ns() // 1_000_000 + 300
    await store.apply([put(id_, 1, "s", redis_expires_at=deadline) for id_ in ids[:60]])
    await store.apply([put(id_, 1, "s") for id_ in ids[60:]])

    async def between(_: str) -> None:
        await asyncio.sleep(0.05)
        for call in (
            store.count_by_state("s"),
            store.list_state_ids("s"),
            store.put(SyncItem(ids[70], b"{}", state="s")),
        ):
            with suppress(TierUnavailable):
                await call

    source = await cluster.owner(slot)
    to = next(n for n, node in enumerate(await cluster.primaries()) if node.id != source.id)
    await cluster.move_slot(slot, to, between)
    assert time.time_ns() // 1_000_000 > deadline
    assert await store.count_by_state("s") == 30
    assert await entries(cluster, shard) == dict.fromkeys(ids[60:], "s")
    await store.close()


# Nodes that go and come back


async def test_a_replica_that_takes_over_is_told_of_before_it_is_believed(own_cluster: StartCluster) -> None:
    cluster = await own_cluster()
    told: list[str] = []
    store = await RedisStore.connect(cluster.url, "t:", on_new_server=lambda: told.append("new"))
    batch = items(300)
    await store.put_batch(batch)
    await cluster.failover(1)
    assert told == []
    found = await store.get_many([item.object_id for item in batch])
    assert told
    assert len(found) == 300
    await store.put_batch(batch)
    heard = len(told)
    assert len(await store.get_many([item.object_id for item in batch])) == 300
    assert len(told) == heard
    await store.close()


async def test_a_replica_that_was_asked_before_it_took_over_is_news_once(own_cluster: StartCluster) -> None:
    cluster = await own_cluster()
    replica = (await cluster.replica_of((await cluster.primaries())[1])).server
    told: list[str] = []
    # The only address to begin with: it is asked who serves what, over a connection that stays.
    store = await RedisStore.connect(
        f"redis+cluster://127.0.0.1:{replica.port}", "t:", on_new_server=lambda: told.append("new")
    )
    batch = items(300)
    await store.put_batch(batch)
    await cluster.failover(1)
    assert len(await store.get_many([item.object_id for item in batch])) == 300
    await asyncio.gather(*(store.put_batch(batch) for _ in range(8)))
    assert len(told) == 1
    await store.close()


@pytest.mark.slow
async def test_a_primary_that_dies_is_replaced(own_cluster: StartCluster) -> None:
    cluster = await own_cluster()
    told: list[str] = []
    store = await RedisStore.connect(cluster.url, "t:", on_new_server=lambda: told.append("new"))
    batch = items(300)
    await store.put_batch(batch)
    dead = await cluster.kill_primary(0)
    with pytest.raises(TierUnavailable):
        await store.get_many([item.object_id for item in batch])
    await cluster.until_well()
    await eventually(lambda: store.put_batch(batch))
    assert told
    assert len(await store.get_many([item.object_id for item in batch])) == 300
    await dead.server.start()
    await cluster.until_well()
    assert len(await store.get_many([item.object_id for item in batch])) == 300
    await store.close()


async def test_all_nodes_die_and_come_back(own_cluster: StartCluster) -> None:
    cluster = await own_cluster(replicas=0)
    told: list[str] = []
    store = await RedisStore.connect(cluster.url, "t:", on_new_server=lambda: told.append("new"))
    batch = items(300)
    await store.put_batch(batch)
    for server in cluster.servers:
        await server.kill()
    for _ in range(3):
        with pytest.raises(TierUnavailable):
            await store.get("k.0001")
    for server in cluster.servers:
        await server.start()
    await cluster.until_well()
    await eventually(lambda: store.get_many([item.object_id for item in batch]))
    assert len(told) == 3  # once for each of them
    assert await store.get_many([item.object_id for item in batch]) == {}
    assert (await store.put_batch(batch)).written == 300
    await store.close()


async def eventually(call: Callable[[], Any]) -> Any:
    until = time.monotonic() + 30
    while True:
        try:
            return await call()
        except TierUnavailable:
            assert time.monotonic() < until
            await asyncio.sleep(0.02)
