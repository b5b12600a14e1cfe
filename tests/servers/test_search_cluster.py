"""Search on a real cluster: an index on every primary, one answer of all of them, and the same one as of one server."""

from __future__ import annotations

import asyncio
import struct
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sync_engine.errors import (
    Corruption,
    IndexConflict,
    IndexNotFound,
    InvalidQuery,
    SearchError,
    TierUnavailable,
)
from sync_engine.item import Op, SyncItem
from sync_engine.storage.redis import Field, RedisStore, SearchHits
from sync_engine.storage.redis.slots import TAGS, slot_of
from sync_engine.testing.clusters import ClusterSet
from sync_engine.testing.fixtures import StartCluster
from sync_engine.testing.servers import KINDS

FIELDS = (
    Field.text("name", sortable=True),
    Field.numeric("n", sortable=True),
    Field.numeric("plain"),
    Field.tag("t"),
    Field.tag("state", "$.state"),
    Field.vector("v", dim=2, metric="L2", algorithm="FLAT"),
)


@pytest.fixture(params=[3, 2], ids=["resp3", "resp2"])
async def store(
    request: pytest.FixtureRequest, redis_cluster: ClusterSet, redis_prefix: str
) -> AsyncIterator[RedisStore]:
    async with opened(redis_cluster.url, redis_prefix, request.param) as store:
        yield store


@asynccontextmanager
async def opened(url: str, prefix: str, protocol: int = 3, **told: Any) -> AsyncIterator[RedisStore]:
    store = await RedisStore.connect(f"{url}?protocol={protocol}", prefix, **told)
    try:
        yield store
    finally:
        await store.close()


async def made(store: RedisStore, *fields: Field) -> None:
    assert await store.ft_create("people", fields or FIELDS)
    await whole(store)


async def whole(store: RedisStore) -> None:
    while (await store.ft_info("people")).indexing:  # noqa: ASYNC110  nothing announces it
        await asyncio.sleep(0.01)


def items(count: int) -> list[SyncItem]:
    return [SyncItem.from_json(f"i{n:03}", value(n)) for n in range(count)]


def value(n: int) -> dict[str, Any]:
    return {"name": f"w{n:03} cat", "n": n, "plain": n, "t": "abc"[n % 3], "v": [n, 1]}


def floats(*numbers: float) -> bytes:
    return struct.pack(f"<{len(numbers)}f", *numbers)


async def names(cluster: ClusterSet, prefix: str) -> dict[str, list[str]]:
    """By node, its indexes of the prefix."""
    return {
        node.id: [name for name in await node.server.ask("FT._LIST") if name.startswith(prefix)]
        for node in await cluster.primaries()
        if node.slots
    }


async def again(call: Callable[[], Any]) -> Any:
    """A call while the cluster settles."""
    until = time.monotonic() + 30
    while True:
        try:
            return await call()
        except TierUnavailable:
            assert time.monotonic() < until
            await asyncio.sleep(0.02)


# Indexes


async def test_every_primary_has_an_index_that_a_call_reaches(store: RedisStore, redis_cluster: ClusterSet) -> None:
    await made(store)
    held = await names(redis_cluster, store.prefix)
    assert len(held) == 3
    for id_, (name,) in held.items():
        assert name.startswith(f"{store.prefix}idx:people{{")
        assert (await redis_cluster.owner(slot_of(name.encode()))).id == id_
    assert await store.ft_list() == ["people"]


async def test_S12_the_same_index_again_is_a_no_op_and_another_a_conflict(
    store: RedisStore, redis_cluster: ClusterSet
) -> None:
    await made(store)
    assert await store.ft_create("people", FIELDS) is False
    async with opened(redis_cluster.url, store.prefix) as other:
        assert await other.ft_create("people", FIELDS) is False
        for schema, difference in (
            (FIELDS[1:], "it also has the field 'name'"),
            ([*FIELDS[1:], Field.text("name")], r"flags is \['SORTABLE'\]"),
        ):
            with pytest.raises(IndexConflict, match=difference):
                await other.ft_create("people", schema)
        with pytest.raises(IndexConflict, match="covers other keys"):
            await other.ft_create("people", FIELDS, prefixes=["a"])


async def test_S12_two_who_create_at_once_agree_on_one(store: RedisStore, redis_cluster: ClusterSet) -> None:
    async with opened(redis_cluster.url, store.prefix) as other:
        created = await asyncio.gather(*(one.ft_create("people", FIELDS) for one in (store, other) * 4))
    assert sorted(created) == [False] * 7 + [True]
    assert {len(held) for held in (await names(redis_cluster, store.prefix)).values()} == {1}


async def test_a_dropped_index_is_gone_from_every_primary(store: RedisStore, redis_cluster: ClusterSet) -> None:
    await made(store)
    await store.put_batch(items(10))
    async with opened(redis_cluster.url, store.prefix) as other:
        assert (await other.ft_search("people", "*", 0)).total == 10
        await store.ft_dropindex("people")
        assert set(map(tuple, (await names(redis_cluster, store.prefix)).values())) == {()}
        assert await store.ft_list() == []
        for call in (
            other.ft_search("people", "*"),
            other.ft_info("people"),
            other.ft_dropindex("people"),
            store.ft_search("people", "*"),
        ):
            with pytest.raises(IndexNotFound):
                await call
    assert await store.count_prefix("i") == 10
    assert await store.ft_create("people", [Field.tag("t")])


async def test_a_schema_that_the_servers_refuse_leaves_nothing(store: RedisStore, redis_cluster: ClusterSet) -> None:
    with pytest.raises(SearchError, match="Invalid JSONPath"):
        await store.ft_create("people", [Field.text("t", "$..[")])
    assert await store.ft_list() == []
    assert set(map(tuple, (await names(redis_cluster, store.prefix)).values())) == {()}


async def test_info_is_of_all_primaries_together(store: RedisStore) -> None:
    await store.put_batch(items(60))
    await store.put(SyncItem.from_json("wrong", {"n": "x"}))
    assert await store.ft_create("people", FIELDS, prefixes=["i", "wrong"])
    await whole(store)
    info = await store.ft_info("people")
    assert (info.name, info.num_docs, info.percent_indexed) == ("people", 60, 1.0)
    assert (info.prefixes, info.hash_indexing_failures) == (["i", "wrong"], 1)


async def test_an_index_that_a_primary_lost_is_made_anew(store: RedisStore, redis_cluster: ClusterSet) -> None:
    await made(store)
    await store.put_batch(items(90))
    for (name,) in (await names(redis_cluster, store.prefix)).values():
        await (await redis_cluster.owner(slot_of(name.encode()))).server.ask("FT.DROPINDEX", name)
        await store.ft_info("people")
        await whole(store)
        hits = await store.ft_search("people", "*", 0)
        assert (hits.total, hits.warnings) == (90, [])


async def test_S10_an_index_made_anew_is_not_taken_for_whole(own_cluster: StartCluster) -> None:
    cluster = await own_cluster(replicas=0)
    async with opened(cluster.url, "t:") as store:
        await store.put_batch([SyncItem.from_json(f"i{n}", {"name": f"w{n}", "n": n}) for n in range(9_000)])
        await made(store)
        warned = 0
        while not warned:  # a stall of this process may let the server finish first
            assert (await store.ft_search("people", "*", 0)).total == 9_000
            node = (await cluster.primaries())[1]
            await node.server.ask("FT.DROPINDEX", (await names(cluster, "t:"))[node.id][0])
            while (hits := await store.ft_search("people", "*", 0)).warnings:
                warned += 1
            assert hits.total == 9_000


# What is found


async def test_S1_S15_pages_of_all_primaries_are_one(store: RedisStore) -> None:
    await made(store)
    await store.put_batch(items(250))
    ids = [f"i{n:03}" for n in range(250)]

    async def page(limit: int, offset: int = 0, **told: Any) -> tuple[Any, ...]:
        return tuple(await store.ft_search("people", "@n:[0 inf]", limit, offset, **told))

    assert await page(10, sort_by="n") == (ids[:10], 250)
    assert await page(7, 100, sort_by="name") == (ids[100:107], 250)
    assert await page(10, 245, sort_by="n", descending=True) == (ids[4::-1], 250)
    assert await page(10, 250, sort_by="n") == ([], 250)
    assert await page(0) == ([], 250)
    assert await page(0, sort_by="n") == ([], 250)
    halves = [(await page(125, offset))[0] for offset in (0, 125)]
    assert sorted(halves[0] + halves[1]) == ids


async def test_items_come_along_verified(store: RedisStore) -> None:
    await made(store)
    await store.put_batch(items(60))
    hits = await store.ft_search("people", "@t:{b}", 5, 3, sort_by="n", return_items=True)
    assert hits.items is not None
    assert [item.json()["n"] for item in hits.items] == [10, 13, 16, 19, 22]
    assert hits.ids == [item.object_id for item in hits.items]
    assert hits.total == 20


async def test_a_damaged_item_is_never_handed_out(store: RedisStore, redis_cluster: ClusterSet) -> None:
    await made(store)
    await store.put_batch(items(3))
    key = f"{store._servers.shard_of('i001').prefix}i001"
    node = await redis_cluster.owner(slot_of(key.encode()))
    await node.server.ask("JSON.SET", key, "$.payload.n", "7")
    with pytest.raises(Corruption):
        await store.ft_search("people", "*", return_items=True)


async def test_scores_of_all_primaries_are_one_descending_list(store: RedisStore) -> None:
    await made(store)
    words = [SyncItem.from_json(f"i{n}", {"name": "cat " * (n % 5 + 1) + "dog " * (n % 7)}) for n in range(60)]
    await store.put_batch(words)
    hits = await store.ft_search("people", "@name:cat", 60, with_scores=True)
    assert hits.scores is not None
    assert hits.scores == sorted(hits.scores, reverse=True)
    assert (len(hits.ids), hits.total, len(set(hits.scores)) > 3) == (60, 60, True)
    pages = [await store.ft_search("people", "@name:cat", 20, offset, with_scores=True) for offset in (0, 20, 40)]
    assert [id_ for page in pages for id_ in page.ids] == hits.ids


async def test_S7_the_nearest_of_all_primaries_come_first(store: RedisStore) -> None:
    await made(store)
    await store.put_batch(items(90))
    at = {"v": floats(40.2, 1)}
    hits = await store.ft_search("people", "*=>[KNN 5 @v $v AS d]", params=at, with_scores=True, return_items=True)
    assert (hits.ids, hits.total) == (["i040", "i041", "i039", "i042", "i038"], 5)
    assert hits.scores == pytest.approx([0.04, 0.64, 1.44, 3.24, 4.84], rel=1e-3)
    assert hits.items is not None
    assert [item.object_id for item in hits.items] == hits.ids
    assert tuple(await store.ft_search("people", "*=>[KNN 5 @v $v]", 2, 1, at)) == (["i041", "i039"], 5)
    assert tuple(await store.ft_search("people", "*=>[KNN 5 @v $v]", 0, 0, at)) == ([], 5)
    assert (await store.ft_search("people", "@t:{c}=>[KNN 2 @v $v]", params=at)).ids == ["i041", "i038"]
    down = await store.ft_search("people", "*=>[KNN 5 @v $v]", 3, params=at, sort_by="n", descending=True)
    assert (down.ids, down.total) == (["i042", "i041", "i040"], 5)
    assert (await store.ft_search("people", "*=>[KNN 500 @v $v]", 3, params=at)).total == 90


async def test_a_field_that_is_not_sortable_is_refused_for_sorting(store: RedisStore) -> None:
    await made(store)
    with pytest.raises(InvalidQuery, match="sortable"):
        await store.ft_search("people", "*", sort_by="plain")


@pytest.mark.parametrize(
    ("query", "words"), [("@@:", "Syntax error"), ("@t:{$absent}", "No such parameter"), ("", "empty")]
)
async def test_S10_a_bad_query_is_refused_in_the_servers_words(store: RedisStore, query: str, words: str) -> None:
    await made(store)
    with pytest.raises(InvalidQuery, match=words) as refused:
        await store.ft_search("people", query)
    assert "script" not in refused.value.reason


async def test_every_change_of_an_item_is_reflected(store: RedisStore) -> None:
    await made(store)
    await store.put_batch(items(30))
    assert await store.move_state("i004", "default", "hot")
    assert (await store.ft_search("people", "@state:{hot}")).ids == ["i004"]
    await store.put(SyncItem("i004", b"\x00"))
    assert tuple(await store.ft_search("people", "@state:{hot}")) == ([], 0)
    await store.delete("i005")
    assert (await store.ft_search("people", "*", 0)).total == 28


async def test_S15_what_has_expired_is_in_no_page_and_no_total(own_cluster: StartCluster) -> None:
    cluster = await own_cluster(replicas=0)
    for server in cluster.servers:
        await server.ask("DEBUG", "SET-ACTIVE-EXPIRE", 0)  # else the server's own sweep may come first
    for protocol in (3, 2):
        async with opened(cluster.url, f"t{protocol}:", protocol) as store:
            await made(store)
            await store.put_batch(items(40)[37:])
            deadline = time.time_ns() // 1_000_000 + 500
            ops = [
                Op(kind="put", object_id=it.object_id, stamp=0, item=it, redis_expires_at=deadline) for it in items(37)
            ]
            await store.apply(ops)
            while time.time_ns() // 1_000_000 <= deadline + 1:  # noqa: ASYNC110  nothing announces it
                await asyncio.sleep(0.01)
            answers = await asyncio.gather(*(store.ft_search("people", "*", 2, sort_by="n") for _ in range(4)))
            assert [(hits.ids, hits.total, hits.warnings) for hits in answers] == [(["i037", "i038"], 3, [])] * 4


tags = st.sampled_from(["x", "y", "a.b", "é"])
rows = st.lists(st.tuples(tags, st.integers(-50, 50)), min_size=1, max_size=25, unique_by=lambda row: row[1])
searches = st.fixed_dictionaries(
    {
        "query": st.sampled_from(
            ["*", "@t:{$t}", "-@t:{$t}", "@n:[$n inf]", "@t:{$t} @n:[-inf $n]", "@t:{$t}=>[KNN 3 @v $v]"]
        ),
        "limit": st.integers(0, 12),
        "offset": st.integers(0, 12),
        "params": st.fixed_dictionaries({"t": tags, "n": st.integers(-50, 50), "v": st.just(floats(-60, 0))}),
        "sort_by": st.sampled_from(["n", "name"]),
        "descending": st.booleans(),
        "return_items": st.booleans(),
    }
)


@settings(max_examples=25)
@given(rows=rows, searches=st.lists(searches, min_size=1, max_size=6))
async def test_a_cluster_answers_as_one_server_does(
    redis_cluster: ClusterSet,
    redis_url: str,
    redis_prefix: str,
    rows: list[tuple[str, int]],
    searches: list[dict[str, Any]],
) -> None:
    batch = [
        SyncItem.from_json(f"i{n}", {"t": tag, "n": number, "name": f"w{number}", "v": [number, 0]}, updated_at=1)
        for n, (tag, number) in enumerate(rows)
    ]
    async with opened(redis_cluster.url, redis_prefix) as cluster, opened(redis_url, redis_prefix) as single:
        for store in (cluster, single):
            await store.ft_create("people", FIELDS)
            await store.put_batch(batch)
            await whole(store)
        for search in searches:
            answers: list[SearchHits] = [await store.ft_search("people", **search) for store in (cluster, single)]
            assert answers[0] == answers[1]
        for store in (cluster, single):
            await store.delete_prefix("", allow_all=True)


# Slots and nodes that change


async def complete(store: RedisStore, count: int) -> None:
    """All items are found, whatever is asked first."""
    await again(lambda: store.ft_info("people"))
    await whole(store)
    hits = await store.ft_search("people", "*", count, sort_by="n", return_items=True)
    assert (hits.ids, hits.total, hits.warnings) == ([f"i{n:03}" for n in range(count)], count, [])


def slot_of_shard(number: int) -> int:
    return slot_of(TAGS[number].encode())


@pytest.mark.slow
async def test_a_slot_that_moves_takes_its_items_along(own_cluster: StartCluster) -> None:
    cluster = await own_cluster(replicas=0)
    async with opened(cluster.url, "t:") as store:
        await made(store)
        await store.put_batch(items(300))
        store._servers._patience_s = 0.03  # it would wait for the slot to arrive, which waits for us
        counted = 0

        async def between(_: str) -> None:
            nonlocal counted
            try:
                hits = await store.ft_search("people", "*", 0)
            except TierUnavailable:
                return
            assert hits.total == 300 or "being built" in hits.warnings[0]
            counted += 1

        # The last shard of a primary has the index there: it goes, it comes back.
        for number, to in ((0, 1), (20, 2), (42, 1), (42, 0), (127, 0), (84, 2)):
            await cluster.move_slot(slot_of_shard(number), to, between)
            await complete(store, 300)
        assert counted
        assert await store.ft_create("people", FIELDS) is False
        await store.ft_dropindex("people")
        with pytest.raises(IndexNotFound):
            await store.ft_search("people", "*")
        await made(store, Field.numeric("n", sortable=True))
        await complete(store, 300)


@pytest.mark.slow
async def test_a_new_primary_gets_its_index(own_cluster: StartCluster) -> None:
    cluster = await own_cluster(replicas=1)
    replica = next(node for node in await cluster.nodes() if not node.primary)
    async with opened(cluster.url, "t:") as store:
        await made(store)
        await store.put_batch(items(300))
        await replica.server.ask("CLUSTER", "RESET", "SOFT")
        await cluster.servers[0].ask("CLUSTER", "MEET", "127.0.0.1", replica.server.port)
        await cluster.until_well()
        for number in (3, 60, 100):
            await cluster.move_slot(slot_of_shard(number), to=3)
        await complete(store, 300)
        assert [len(held) for held in (await names(cluster, "t:")).values()] == [1] * 4
        await store.put_batch(items(330)[300:])
        await complete(store, 330)


@pytest.mark.slow
async def test_a_replica_that_takes_over_answers_with_its_index(own_cluster: StartCluster) -> None:
    cluster = await own_cluster()
    async with opened(cluster.url, "t:", timeout_ms=1_000, response_timeout_ms=1_000) as store:
        await made(store)
        await store.put_batch(items(120))
        await cluster.failover(1)
        await complete(store, 120)
        dead = await cluster.kill_primary(0)
        with pytest.raises(TierUnavailable):
            await store.ft_search("people", "*")
        await cluster.until_well()
        await again(lambda: store.put_batch(items(120)))
        await complete(store, 120)
        await dead.server.start()
        await cluster.until_well()
        await complete(store, 120)


@pytest.mark.slow
async def test_a_cluster_that_comes_back_empty_has_no_index(own_cluster: StartCluster) -> None:
    cluster = await own_cluster(replicas=0)
    async with opened(cluster.url, "t:", timeout_ms=1_000, response_timeout_ms=1_000) as store:
        await made(store)
        await store.put_batch(items(30))
        for server in cluster.servers:
            await server.kill()
        with pytest.raises(TierUnavailable):
            await store.ft_search("people", "*")
        for server in cluster.servers:
            await server.start()
        await cluster.until_well()
        with pytest.raises(IndexNotFound):
            await again(lambda: store.ft_search("people", "*"))
        await made(store)
        await store.put_batch(items(30))
        await complete(store, 30)


@pytest.mark.slow
@pytest.mark.parametrize("primaries", [1, 3])
async def test_other_kinds_and_sizes_of_clusters_answer_alike(own_cluster: StartCluster, primaries: int) -> None:
    cluster = await own_cluster(KINDS["valkey-9-modules"], primaries=primaries, replicas=0)
    for protocol in (3, 2):
        async with opened(cluster.url, f"t{protocol}:", protocol) as store:
            await store.put_batch(items(90))
            await made(store)
            await complete(store, 90)
            hits = await store.ft_search("people", "*=>[KNN 2 @v $v]", params={"v": floats(7.2, 1)})
            assert hits.ids == ["i007", "i008"]
            with pytest.raises(InvalidQuery, match="sortable"):
                await store.ft_search("people", "*", sort_by="plain")
