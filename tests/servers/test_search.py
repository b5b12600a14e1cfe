"""Search through RedisStore on one real server of each kind that has it, by RESP3 and by RESP2."""

from __future__ import annotations

import asyncio
import math
import re
import string
import struct
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from redis.asyncio import Redis

from sync_engine.errors import (
    Corruption,
    IndexConflict,
    IndexNotFound,
    InvalidItem,
    InvalidQuery,
    SearchError,
    SearchUnavailable,
    TierUnavailable,
)
from sync_engine.item import Op, SyncItem
from sync_engine.storage.redis import Field, RedisStore, SearchHits
from sync_engine.testing.fixtures import StartKind
from sync_engine.testing.servers import ACL_USER, KINDS, RedisKind, RunningRedis

SEARCHING = ["redis-8-modules", "valkey-9-modules"]
WITHOUT = ["valkey-9", "redis-7"]
Urls = dict[str, str]

# The document of WIRE.md 2.3, vector B, as the original engine writes it.
THEIRS = (
    '{"access_count":5,"audit":{"batch":"6f9619ff-8b86-4d01-b42d-00cf4fc964ff","home":"node-a"},'
    '"last_accessed":1700000001000,"payload":{"name":"Ada","n":7},'
    '"payload_hash":"247e33612ea8858d596f74a99cf9fd3ad570263e46d8e0b4c28d5e24e041617e","state":"delta",'
    '"timestamp":1700000000000,"version":1}'
)


@pytest.fixture
def urls(kind_servers: Callable[[RedisKind], RunningRedis]) -> Urls:
    """The session's servers that have search."""
    return {kind: kind_servers(KINDS[kind]).url for kind in SEARCHING}


@pytest.fixture(params=WITHOUT)
def bare_url(request: pytest.FixtureRequest, kind_servers: Callable[[RedisKind], RunningRedis]) -> str:
    """One of the session's servers that have none."""
    return kind_servers(KINDS[request.param]).url


@pytest.fixture(
    params=[(kind, 3) for kind in SEARCHING] + [("redis-8-modules", 2)], ids=lambda it: f"{it[0]}-resp{it[1]}"
)
async def store(request: pytest.FixtureRequest, urls: Urls, redis_prefix: str) -> AsyncIterator[RedisStore]:
    kind, protocol = request.param
    async with opened(urls[kind], redis_prefix, protocol) as store:
        yield store


@pytest.fixture
async def plain_store(urls: Urls, redis_prefix: str) -> AsyncIterator[RedisStore]:
    """Of one kind, where kind and protocol have no part in what is tested."""
    async with opened(urls["redis-8-modules"], redis_prefix) as store:
        yield store


@asynccontextmanager
async def opened(url: str, prefix: str, protocol: int = 3) -> AsyncIterator[RedisStore]:
    store = await RedisStore.connect(f"{url}?protocol={protocol}", prefix)
    try:
        yield store
    finally:
        await store.close()


async def made(store: RedisStore, *fields: Field, index: str = "people", prefixes: Sequence[str] = ("",)) -> None:
    """Make an index and wait until it is whole."""
    assert await store.ft_create(index, fields, prefixes=prefixes)
    await whole(store, index)


async def whole(store: RedisStore, index: str = "people") -> None:
    while (await store.ft_info(index)).indexing:  # noqa: ASYNC110  nothing announces it
        await asyncio.sleep(0.01)


async def put(store: RedisStore, **values: Any) -> None:
    await store.put_batch([SyncItem.from_json(object_id, value) for object_id, value in values.items()])


async def found(store: RedisStore, query: str, limit: int = 100, index: str = "people", **params: Any) -> set[str]:
    """The ids of a search that is expected to be complete."""
    hits = await store.ft_search(index, query, limit, params=params)
    assert hits.warnings == []
    assert hits.total == len(hits.ids)
    return set(hits.ids)


async def expiring(store: RedisStore, *ids: str, value: Any = None, within_ms: int = 5) -> None:
    """Put items that have expired when this returns."""
    deadline = now_ms() + within_ms
    items = [SyncItem.from_json(object_id, {"n": 1} if value is None else value) for object_id in ids]
    for start in range(0, len(items), 250):
        chunk = items[start : start + 250]
        await store.apply(
            [Op(kind="put", object_id=it.object_id, stamp=0, item=it, redis_expires_at=deadline) for it in chunk]
        )
    while now_ms() <= deadline + 1:  # noqa: ASYNC110  nothing announces it
        await asyncio.sleep(0.001)


def now_ms() -> int:
    return time.time_ns() // 1_000_000


def floats(*numbers: float) -> bytes:
    return struct.pack(f"<{len(numbers)}f", *numbers)


# Indexes


async def test_S12_creating_the_same_index_again_is_a_no_op(store: RedisStore) -> None:
    schema = [
        Field.text("name", sortable=True, weight=2.5),
        Field.text("about", stemming=False),
        Field.numeric("n", sortable=True),
        Field.tag("tags", "$.payload.tags[*]", separator=",", case_sensitive=True),
        Field.tag("state", "$.state", noindex=True, sortable=True),
        Field.geo("place"),
        Field.vector("flat", dim=3, metric="L2", algorithm="FLAT", element="FLOAT64"),
        Field.vector("near", dim=2, m=24, ef_construction=300),
    ]
    assert await store.ft_create("people", schema, prefixes=["a", "b*"]) is True
    assert await store.ft_create("people", schema, prefixes=["b*", "a"]) is False
    assert (
        await store.ft_create("people", [word for field in schema for word in field.words()], prefixes=["a", "b*"])
        is False
    )


@pytest.mark.parametrize(
    ("schema", "prefixes", "difference"),
    [
        ([Field.text("name")], ("",), "it also has the field 'n'"),
        ([Field.text("name"), Field.numeric("n"), Field.geo("g")], ("",), "it has no field 'g'"),
        ([Field.text("name"), Field.tag("n")], ("",), "field 'n': type is 'NUMERIC', not 'TAG'"),
        ([Field.text("name", weight=2), Field.numeric("n")], ("",), "field 'name': WEIGHT is 1.0, not 2.0"),
        ([Field.text("name", "$.state"), Field.numeric("n")], ("",), "identifier is '$.payload.name', not '$.state'"),
        ([Field.text("name", sortable=True), Field.numeric("n")], ("",), "flags is [], not ['SORTABLE']"),
        ([Field.text("name"), Field.numeric("n")], ("a",), "it covers other keys"),
    ],
)
async def test_another_index_of_the_same_name_is_a_conflict_that_says_in_what(
    store: RedisStore, schema: list[Field], prefixes: Sequence[str], difference: str
) -> None:
    await made(store, Field.text("name"), Field.numeric("n"))
    with pytest.raises(IndexConflict) as refused:
        await store.ft_create("people", schema, prefixes=prefixes)
    assert difference in refused.value.difference


@pytest.mark.parametrize(
    ("words", "difference"),
    [
        ("ON JSON PREFIX 1 {p} SCHEMA", "it has stop words"),
        ("ON JSON PREFIX 1 {p} STOPWORDS 1 the SCHEMA", "it has stop words"),
        ("ON JSON NOFREQS PREFIX 1 {p} STOPWORDS 0 SCHEMA", "it has the options NOFREQS"),
        ("ON HASH PREFIX 1 {p} STOPWORDS 0 SCHEMA", "it is on HASH, not on JSON"),
        ("ON JSON PREFIX 1 {p} FILTER @name=='x' STOPWORDS 0 SCHEMA", "it has the filter"),
    ],
)
async def test_an_index_that_somebody_else_made_otherwise_is_a_conflict(
    store: RedisStore, words: str, difference: str
) -> None:
    command = f"FT.CREATE {store.prefix}idx:people {words} $.payload.name AS name TAG".format(p=store.prefix)
    await store.client.execute_command(*command.split())
    with pytest.raises(IndexConflict, match=difference):
        await store.ft_create("people", [Field.tag("name")])


async def test_S12_two_who_create_at_once_agree_on_one(store: RedisStore) -> None:
    created = await asyncio.gather(*(store.ft_create("people", [Field.tag("t")]) for _ in range(8)))
    assert sorted(created) == [False] * 7 + [True]


async def test_indexes_of_a_prefix_are_listed_by_name(store: RedisStore) -> None:
    assert await store.ft_list() == []
    for index in ("b", "a", "c.d:e-f_1"):
        await store.ft_create(index, [Field.tag("t")])
    assert await store.ft_list() == ["a", "b", "c.d:e-f_1"]


async def test_S12_a_dropped_index_is_gone_and_its_items_stay(store: RedisStore) -> None:
    await made(store, Field.tag("t"))
    await put(store, a={"t": "x"})
    await store.ft_dropindex("people")
    assert await store.ft_list() == []
    assert await store.get("a") is not None
    assert await store.ft_create("people", [Field.numeric("n")])


async def test_S10_an_index_that_is_not_there_is_an_error(store: RedisStore) -> None:
    for call in (
        store.ft_search("nobody", "*"),
        store.ft_search("nobody", "*", 0),
        store.ft_info("nobody"),
        store.ft_dropindex("nobody"),
    ):
        with pytest.raises(IndexNotFound, match="'nobody'"):
            await call


async def test_info_tells_what_is_covered(store: RedisStore) -> None:
    await put(store, **{"u.a": {"n": 1}, "u.b": {"n": 2}, "x.c": {"n": 3}})
    await made(store, Field.numeric("n", sortable=True), prefixes=["u.", "v."])
    info = await store.ft_info("people")
    assert (info.name, info.num_docs, info.indexing, info.percent_indexed) == ("people", 2, False, 1.0)
    assert (info.prefixes, info.hash_indexing_failures) == (["u.", "v."], 0)
    (field,) = info.fields
    assert (field["attribute"], field["identifier"], field["type"]) == ("n", "$.payload.n", "NUMERIC")
    assert field["flags"] == ["SORTABLE"]


async def test_a_value_of_another_type_is_counted_and_its_item_not_found(store: RedisStore) -> None:
    await made(store, Field.numeric("n"), Field.tag("t"), Field.vector("v", dim=2, algorithm="FLAT"))
    await put(
        store,
        good={"n": 1, "t": "x"},
        text={"n": "one", "t": "x"},
        wide={"v": [1, 2, 3], "t": "x"},
        null={"n": None, "t": "x"},
    )
    assert (await store.ft_info("people")).hash_indexing_failures == 2
    assert await found(store, "@t:{x}") == {"good", "null"}


async def test_a_schema_that_the_server_refuses_is_a_search_error_in_its_words(store: RedisStore) -> None:
    with pytest.raises(SearchError, match="Invalid JSONPath"):
        await store.ft_create("people", [Field.text("t", "$..[")])
    assert await store.ft_list() == []


async def test_the_words_of_FT_CREATE_are_a_schema_too(store: RedisStore) -> None:
    words = "$.payload.name AS name TEXT SORTABLE $.payload.v AS v VECTOR FLAT 6 TYPE FLOAT32 DIM 2 DISTANCE_METRIC L2"
    assert await store.ft_create("people", [*words.split(), "age", "NUMERIC"])
    await put(store, a={"name": "Ada", "age": 36, "v": [1, 2]})
    await whole(store)
    assert await found(store, "@name:ada @age:[36 36]") == {"a"}


HOSTILE = [
    "",
    "a b",
    "a-b",
    "a:b",
    "1a",
    "a]",
    "@a",
    "`a`",
    "a|b",
    "é",
    "a\n",
    "a\0",
    "x" * 65,
    "$.a",
    "a}=>{$weight:2}",
]


@pytest.mark.parametrize("name", HOSTILE)
async def test_S5_the_name_of_a_field_cannot_be_syntax(plain_store: RedisStore, name: str) -> None:
    for field in (Field.text, Field.numeric, Field.tag, Field.geo):
        with pytest.raises(InvalidItem, match="field"):
            field(name)
    for schema in ([name, "TAG"], ["$.a", "AS", name, "TAG"]):
        with pytest.raises(InvalidItem, match="field"):
            await plain_store.ft_create("people", schema)


@pytest.mark.parametrize("name", HOSTILE)
async def test_S5_the_name_of_a_parameter_or_sort_field_cannot_be_syntax(plain_store: RedisStore, name: str) -> None:
    await made(plain_store, Field.tag("t"))
    with pytest.raises(InvalidItem, match="params"):
        await plain_store.ft_search("people", "*", params={name: "x"})
    with pytest.raises(InvalidItem, match="sort_by"):
        await plain_store.ft_search("people", "*", sort_by=name)


@pytest.mark.parametrize("index", ["", "a b", "a{b}", "é", "a\n", "a\0b", "x" * 65, "*", 5])
async def test_a_name_that_no_index_may_have_is_refused(plain_store: RedisStore, index: Any) -> None:
    for call in (
        plain_store.ft_create(index, [Field.tag("t")]),
        plain_store.ft_dropindex(index),
        plain_store.ft_info(index),
        plain_store.ft_search(index, "*"),
    ):
        with pytest.raises(InvalidItem, match="index"):
            await call


@pytest.mark.parametrize(
    "prefixes", ["abc", (), ("a", "a"), ("a\0",), ("\ud800",), ("x" * 256,), tuple("abcdefghi"), (5,)], ids=repr
)
async def test_prefixes_that_are_none_are_refused(plain_store: RedisStore, prefixes: Any) -> None:
    with pytest.raises(InvalidItem, match="prefixes"):
        await plain_store.ft_create("people", [Field.tag("t")], prefixes=prefixes)


async def test_a_server_without_search_says_so(bare_url: str, redis_prefix: str) -> None:
    async with opened(bare_url, redis_prefix) as store:
        for call in (
            store.ft_create("people", [Field.tag("t")]),
            store.ft_dropindex("people"),
            store.ft_list(),
            store.ft_info("people"),
            store.ft_search("people", "*"),
        ):
            with pytest.raises(SearchUnavailable):
                await call


async def test_a_user_who_may_do_little_may_search(redis_acl: RunningRedis, redis_prefix: str) -> None:
    async with opened(redis_acl.url_as(*ACL_USER), redis_prefix) as store:
        await made(store, Field.tag("t"))
        await put(store, a={"t": "x"})
        assert await found(store, "@t:{x}") == {"a"}
        assert await store.ft_list() == ["people"]
        await store.ft_dropindex("people")


async def test_the_rights_that_the_documents_name_are_enough(own_kind: StartKind) -> None:
    told = (Path(__file__).parents[2] / "docs" / "redis.md").read_text().partition("## Rights that a user needs")[2]
    rights = [
        right for words in re.findall(r"`(\+[^`]+)`", told) for right in words.split() if not words.startswith("+@all")
    ]
    assert "+ft._list" in rights
    server = await own_kind("redis-8-modules", users=[f"ada on >pw resetchannels ~t:* {' '.join(rights)}"])
    for protocol in (3, 2):
        async with opened(server.url_as("ada", "pw"), "t:", protocol) as store:
            await made(store, Field.tag("t"))
            await put(store, a={"t": "x"})
            assert await store.move_state("a", "default", "hot")
            assert await found(store, "@t:{x}") == {"a"}
            assert await store.ft_list() == ["people"]
            await store.ft_dropindex("people")


# What is found


async def test_S1_ids_come_without_the_prefix(store: RedisStore) -> None:
    await made(store, Field.tag("t"))
    await put(store, **{"user.1": {"t": "x"}, "user 2/é": {"t": "x"}})
    ids, total = await store.ft_search("people", "@t:{x}")
    assert sorted(ids) == ["user 2/é", "user.1"]
    assert total == 2
    assert set(await store.get_many(ids)) == set(ids)


async def test_each_kind_of_field_is_searched_in_its_way(store: RedisStore) -> None:
    await made(
        store,
        Field.text("name"),
        Field.numeric("age"),
        Field.tag("roles", "$.payload.roles[*]"),
        Field.geo("place"),
        Field.vector("face", dim=2, metric="L2", algorithm="FLAT"),
        Field.tag("state", "$.state"),
    )
    await put(
        store,
        ada={"name": "Ada Lovelace", "age": 36, "roles": ["admin", "math"], "place": "-0.12,51.5", "face": [1, 1]},
        bob={"name": "Bob running", "age": 25, "roles": ["math"], "place": "2.35,48.85", "face": [5, 5]},
    )
    await store.put(SyncItem.from_json("eve", {"name": "Eve"}, state="hot"))
    assert await found(store, "@name:lovelace") == {"ada"}
    assert await found(store, "@name:($w)", w="run") == {"bob"}
    assert await found(store, "@age:[$least 30]", least=20.5) == {"bob"}
    assert await found(store, "@age:[(25 inf]") == {"ada"}
    assert await found(store, "@roles:{$r}", r="math") == {"ada", "bob"}
    assert await found(store, "@place:[$lon $lat 50 km]", lon=2.3, lat=48.8) == {"bob"}
    assert await found(store, "@face:[VECTOR_RANGE $r $v]", r=3, v=floats(0, 0)) == {"ada"}
    assert await found(store, "@state:{hot}") == {"eve"}
    assert await found(store, "-@state:{hot} -@roles:{admin}") == {"bob"}
    assert await found(store, "*") == {"ada", "bob", "eve"}


async def test_S13_a_word_that_others_call_a_stop_word_is_a_condition(store: RedisStore) -> None:
    await made(store, Field.text("name"), Field.tag("tenant"))
    await put(store, a={"name": "the end", "tenant": "x"}, b={"name": "an end", "tenant": "x"})
    assert await found(store, "@tenant:{x} @name:the") == {"a"}
    assert await found(store, "@tenant:{x} @name:($w)", w="the") == {"a"}


async def test_S7_a_pipe_binds_as_dialect_2_has_it(store: RedisStore) -> None:
    await made(store, Field.text("name"), Field.tag("tenant"))
    await put(store, a={"name": "x", "tenant": "A"}, b={"name": "y", "tenant": "B"})
    assert await found(store, "@tenant:{A} @name:x | @name:y") == {"a", "b"}
    assert await found(store, "@tenant:{A} (@name:x | @name:y)") == {"a"}


async def test_S15_the_total_is_true_beyond_the_page(store: RedisStore) -> None:
    await made(store, Field.numeric("n", sortable=True))
    await put(store, **{f"i{n:03}": {"n": n} for n in range(250)})
    ids = [f"i{n:03}" for n in range(250)]

    async def page(limit: int, offset: int = 0, **told: Any) -> tuple[list[str], int]:
        return tuple(await store.ft_search("people", "@n:[0 inf]", limit, offset, **told))

    assert await page(10, sort_by="n") == (ids[:10], 250)
    assert await page(7, 100, sort_by="n") == (ids[100:107], 250)
    assert await page(10, 245, sort_by="n", descending=True) == (ids[4::-1], 250)
    assert await page(10, 250, sort_by="n") == ([], 250)
    assert await page(10, 99_990) == ([], 250)
    assert await page(0) == ([], 250)
    assert await page(0, 5) == ([], 250)
    assert len((await page(250))[0]) == 250
    assert sorted((await page(125))[0] + (await page(125, 125))[0]) == ids


@pytest.mark.parametrize(
    "bounds",
    [
        {"limit": -1},
        {"limit": 10_001},
        {"limit": True},
        {"limit": 1.0},
        {"offset": -1},
        {"offset": 100_000, "limit": 1},
        {"timeout_ms": 0},
        {"descending": True},
        {"query": 5},
        {"query": "a\0b"},
        {"query": "\ud800"},
        {"params": {"p": "a\0b"}},
        {"params": {"p": "\udfff"}},
        {"params": {"p": None}},
        {"params": {"p": True}},
        {"params": {"p": math.nan}},
        {"params": {"p": 2**63}},
        {"params": {f"p{n}": 1 for n in range(1_025)}},
    ],
    ids=lambda bounds: repr(bounds)[:30],
)
async def test_an_argument_that_breaks_a_rule_is_refused(plain_store: RedisStore, bounds: dict[str, Any]) -> None:
    with pytest.raises(InvalidItem, match=next(iter(bounds))):
        await plain_store.ft_search("people", **{"query": "*"} | bounds)


async def test_items_come_along_verified(store: RedisStore) -> None:
    await made(store, Field.numeric("n", sortable=True))
    items = [SyncItem(f"i{n}", b'{"n": %d, "x": 1.50}' % n, state="hot", version=n + 1) for n in range(3)]
    await store.put_batch(items)
    hits = await store.ft_search("people", "*", sort_by="n", descending=True, return_items=True)
    assert hits.items is not None
    assert [(it.object_id, it.content, it.state, it.version) for it in hits.items] == [
        (it.object_id, it.content, it.state, it.version) for it in reversed(items)
    ]
    assert hits.ids == [it.object_id for it in hits.items]
    assert (await store.ft_search("people", "*")).items is None


async def test_a_damaged_item_is_never_handed_out(store: RedisStore) -> None:
    await made(store, Field.numeric("n"))
    await put(store, a={"n": 1})
    await store.client.execute_command("JSON.SET", f"{store.prefix}a", "$.payload.n", "2")
    with pytest.raises(Corruption):
        await store.ft_search("people", "*", return_items=True)


async def test_scores_are_in_the_order_of_the_ids_best_first(store: RedisStore) -> None:
    await made(store, Field.text("name"))
    await put(store, often={"name": "cat cat cat"}, once={"name": "cat dog dog dog"}, none={"name": "dog"})
    hits = await store.ft_search("people", "@name:cat", with_scores=True)
    assert hits.ids == ["often", "once"]
    assert hits.scores is not None
    assert hits.scores[0] > hits.scores[1] > 0
    assert (await store.ft_search("people", "@name:cat")).scores is None


async def test_the_text_of_a_sorted_field_is_ordered_by_code_point_and_missing_ones_are_last(store: RedisStore) -> None:
    await made(store, Field.text("name", sortable=True))
    names = ["b", "B", "a", "10", "9", " x", "é", "É", "aa", "a b", "\U0001f600", "\uffff"]
    await put(store, **{f"i{n}": {"name": name} for n, name in enumerate(names)}, none={}, null={"name": None})
    wanted = [f"i{names.index(name)}" for name in sorted(names)]
    up = await store.ft_search("people", "*", 100, sort_by="name")
    down = await store.ft_search("people", "*", 100, sort_by="name", descending=True)
    assert up.ids[:-2] == wanted
    assert down.ids[:-2] == wanted[::-1]
    assert set(up.ids[-2:]) == set(down.ids[-2:]) == {"none", "null"}


async def test_binary_items_are_not_found(store: RedisStore) -> None:
    await made(store, Field.tag("t"))
    await put(store, json={"t": "x"})
    await store.put(SyncItem("binary", b'\x00{"t": "x"}'))
    assert await found(store, "*") == {"json"}


async def test_documents_that_are_no_items_are_left_out(store: RedisStore) -> None:
    await made(store, Field.tag("t"))
    await put(store, ours={"t": "x"})
    for key in ("foreign", "__local__:x", "y" * 256):
        await store.client.execute_command("JSON.SET", store.prefix + key, "$", '{"payload":{"t":"x"}}')
    await store.client.execute_command("JSON.SET", store.prefix.encode() + b"\xff", "$", '{"payload":{"t":"x"}}')
    for items in (False, True):
        hits = await store.ft_search("people", "@t:{x}", return_items=items)
        assert hits.ids == ["ours"]


async def test_documents_of_the_original_are_found(store: RedisStore) -> None:
    await made(store, Field.text("name"), Field.tag("state", "$.state"))
    await store.client.execute_command("JSON.SET", f"{store.prefix}user.alice", "$", THEIRS)
    hits = await store.ft_search("people", "@name:ada @state:{delta}", return_items=True)
    assert hits.ids == ["user.alice"]
    assert hits.items is not None
    assert hits.items[0].json() == {"name": "Ada", "n": 7}


async def test_ours_are_found_by_a_plain_client(store: RedisStore) -> None:
    await made(store, Field.text("name", sortable=True), Field.numeric("n"))
    await put(store, **{"user.1": {"name": "Ada", "n": 7}})
    url = store.client.connection_pool.connection_kwargs
    async with Redis(host=url["host"], port=url["port"], protocol=2, decode_responses=True) as plain:
        reply = await plain.execute_command("FT.SEARCH", f"{store.prefix}idx:people", "@name:ada", "RETURN", 1, "n")
    assert reply == [1, f"{store.prefix}user.1", ["n", "7"]]


async def test_an_index_of_the_original_is_searched(store: RedisStore) -> None:
    prefix = store.prefix
    # WIRE.md 7.1
    command = (
        f"FT.CREATE {prefix}idx:users ON JSON PREFIX 1 {prefix}crdt:users: SCHEMA $.payload.name AS name TEXT SORTABLE "
        "$.payload.email AS email TEXT $.payload.age AS age NUMERIC SORTABLE $.payload.roles AS roles TAG"
    )
    await store.client.execute_command(*command.split())
    await put(store, **{"crdt:users:1": {"name": "Ada", "age": 36, "roles": ["x", "y"]}, "other": {"name": "Ada"}})
    await whole(store, "users")
    assert await store.ft_list() == ["users"]
    assert await found(store, "@name:ada @roles:{y}", index="users") == {"crdt:users:1"}
    assert (await store.ft_info("users")).prefixes == ["crdt:users:"]


async def test_every_change_of_an_item_is_reflected(store: RedisStore) -> None:
    await made(store, Field.tag("t"), Field.tag("state", "$.state"))

    async def seen() -> dict[str, set[str]]:
        queries = {"x": "@t:{x}", "y": "@t:{y}", "hot": "@state:{hot}"}
        return {name: hits for name, query in queries.items() if (hits := await found(store, query))}

    await store.put(SyncItem.from_json("a", {"t": "x"}))
    assert await seen() == {"x": {"a"}}
    await store.put(SyncItem.from_json("a", {"t": "y"}, version=2))
    assert await seen() == {"y": {"a"}}
    assert await store.move_state("a", "default", "hot")
    assert await seen() == {"y": {"a"}, "hot": {"a"}}
    await store.put(SyncItem("a", b"\x00", version=3))
    assert await seen() == {}
    await store.put(SyncItem.from_json("a", {"t": "x"}, version=4))
    assert await seen() == {"x": {"a"}}
    await store.delete("a")
    assert await seen() == {}
    await expiring(store, "a", value={"t": "x"})
    assert await seen() == {}


async def test_S15_what_has_expired_is_in_no_page_and_no_total(own_kind: StartKind) -> None:
    server = await own_kind("redis-8-modules")
    await server.ask("DEBUG", "SET-ACTIVE-EXPIRE", 0)  # else the server's own sweep may come first
    for protocol in (3, 2):
        async with opened(server.url, f"t{protocol}:", protocol) as store:
            await made(store, Field.numeric("n", sortable=True))
            await put(store, **{f"stays{n}": {"n": n} for n in range(3)})
            await expiring(store, *(f"gone{n}" for n in range(1_200)), within_ms=2_000)
            answers = await asyncio.gather(*(store.ft_search("people", "*", 2, sort_by="n") for _ in range(5)))
            assert [(hits.ids, hits.total, hits.warnings) for hits in answers] == [(["stays0", "stays1"], 3, [])] * 5
            await expiring(store, "again")
            assert tuple(await store.ft_search("people", "*", 0)) == ([], 3)


async def test_S15_what_others_let_expire_is_in_no_page(own_kind: StartKind) -> None:
    server = await own_kind("redis-8-modules")
    await server.ask("DEBUG", "SET-ACTIVE-EXPIRE", 0)
    for protocol in (3, 2):
        async with opened(server.url, f"t{protocol}:", protocol) as store:
            await made(store, Field.numeric("n", sortable=True))
            await put(store, **{f"i{n}": {"n": n} for n in range(5)})
            await server.ask("PEXPIRE", f"{store.prefix}i1", 1)
            while await server.ask("PTTL", f"{store.prefix}i1") > 0:  # noqa: ASYNC110  nothing announces it
                await asyncio.sleep(0.001)
            hits = await store.ft_search("people", "*", 2, sort_by="n", return_items=True)
            assert (hits.ids, hits.total) == (["i0", "i2"], 4)


async def test_R15_both_protocols_give_the_same(urls: Urls, redis_prefix: str) -> None:
    for kind in SEARCHING:
        url = urls[kind]
        async with opened(url, redis_prefix, 3) as three, opened(url, redis_prefix, 2) as two:
            fields = [Field.text("name", sortable=True), Field.numeric("n", sortable=True), Field.tag("t")]
            fields += [Field.vector("v", dim=2, algorithm="FLAT"), Field.geo("g"), Field.tag("c", case_sensitive=True)]
            await made(three, *fields)
            values = {f"i{n}": {"name": f"w{n} cat", "n": n / 7, "t": "ab"[n % 2], "v": [n, 1]} for n in range(20)}
            await put(three, **values)
            told: list[dict[str, Any]] = [
                {"query": "*", "sort_by": "n"},
                {"query": "@name:cat", "with_scores": True, "limit": 3, "offset": 4},
                {"query": "*", "sort_by": "name", "descending": True, "with_scores": True},
                {"query": "@t:{a}", "return_items": True, "sort_by": "n"},
                {"query": "*=>[KNN 4 @v $v]", "params": {"v": floats(3, 1)}, "with_scores": True, "return_items": True},
                {"query": "*", "limit": 0},
                {"query": "@t:{nobody}"},
            ]
            for search in told:
                answers: list[SearchHits] = [await store.ft_search("people", **search) for store in (three, two)]
                assert answers[0] == answers[1]
                assert answers[0].total == (0 if "nobody" in search["query"] else answers[0].total or 1)
            assert await three.ft_info("people") == await two.ft_info("people")
            assert await two.ft_create("people", fields) is False
            with pytest.raises(InvalidQuery) as refused_two:
                await two.ft_search("people", "@@:")
            with pytest.raises(InvalidQuery) as refused_three:
                await three.ft_search("people", "@@:")
            assert refused_two.value.reason == refused_three.value.reason
            await three.ft_dropindex("people")


# Nearest neighbours


@pytest.mark.parametrize("algorithm", ["FLAT", "HNSW"])
async def test_S7_the_nearest_come_first(store: RedisStore, algorithm: Any) -> None:
    await made(store, Field.vector("v", dim=2, metric="L2", algorithm=algorithm), Field.numeric("n", sortable=True))
    await put(store, **{f"i{n}": {"v": [n, 0], "n": -n} for n in (5, 1, 9, 3, 7)}, none={"n": 1})
    vector = floats(4.4, 0)
    for query in ("*=>[KNN 3 @v $v]", "*=>[KNN $k @v $v AS d]", "(*)=>[knn 3 @v $v]=>{$yield_distance_as: far}"):
        hits = await store.ft_search("people", query, params={"v": vector, "k": 3}, with_scores=True)
        assert (hits.ids, hits.total) == (["i5", "i3", "i7"], 3)
        assert hits.scores == pytest.approx([0.36, 1.96, 6.76], rel=1e-5)
    assert (await store.ft_search("people", "*=>[KNN 3 @v $v]", 1, 1, {"v": vector})).ids == ["i3"]
    by_field = await store.ft_search("people", "*=>[KNN 3 @v $v]", params={"v": vector}, sort_by="n", with_scores=True)
    assert by_field.ids == ["i7", "i5", "i3"]
    assert by_field.scores == pytest.approx([6.76, 0.36, 1.96], rel=1e-5)
    assert (await store.ft_search("people", "@n:[-4 inf]=>[KNN 2 @v $v]", params={"v": vector})).ids == ["i3", "i1"]
    assert tuple(await store.ft_search("people", "*=>[KNN 0 @v $v]", params={"v": vector})) == ([], 0)


@pytest.mark.parametrize("count", ["10001", "$k", "$absent", "-1", "x"])
async def test_a_number_of_neighbours_that_is_none_is_refused(store: RedisStore, count: str) -> None:
    await made(store, Field.vector("v", dim=2))
    with pytest.raises(InvalidQuery):
        await store.ft_search("people", f"*=>[KNN {count} @v $v]", params={"v": floats(1, 2), "k": 10_001})


async def test_a_vector_of_another_size_is_refused_in_the_servers_words(store: RedisStore) -> None:
    await made(store, Field.vector("v", dim=2))
    with pytest.raises(InvalidQuery, match="vector blob size"):
        await store.ft_search("people", "*=>[KNN 1 @v $v]", params={"v": floats(1, 2, 3)})


# Queries and values of others


@pytest.mark.parametrize(
    ("query", "words"),
    [
        ("@@:", "Syntax error"),
        ("@t:{a", "Syntax error"),
        ("(a", "Syntax error"),
        ("@t:{$absent}", "No such parameter"),
        ("@n:[x y]", "Syntax error|Invalid"),
        ("", "empty"),
        (" \t\n", "empty"),
    ],
)
async def test_S10_a_bad_query_is_refused_in_the_servers_words(store: RedisStore, query: str, words: str) -> None:
    await made(store, Field.tag("t"), Field.numeric("n"))
    with pytest.raises(InvalidQuery, match=words):
        await store.ft_search("people", query)


async def test_S10_sorting_by_what_is_not_there_is_refused(store: RedisStore) -> None:
    await made(store, Field.tag("t"))
    with pytest.raises(InvalidQuery, match="nope"):
        await store.ft_search("people", "*", sort_by="nope")


PUNCTUATION = [f"a{char}b" for char in string.punctuation] + list(string.punctuation)
HOSTILE_VALUES = [
    *PUNCTUATION,
    "x} @tenant:{B",
    "x} | @tenant:{*}",
    "*",
    "a*",
    "%a%",
    "user\\@example.com",
    "a\\",
    "a|b",
    "the",
    " lead",
    "trail ",
    "a  b",
    "\t",
    "\n",
    "é",
    "É",
    "ẞ",
    "İ",
    "\u200b",
    "\u2028",
    "\U0001f600",
    "\U0010ffff",
    "$value",
    "inf",
    "(1",
]

texts = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1, max_size=12)
odd = st.text(st.sampled_from(string.punctuation + " aB1é\t\n\U0001f600"), min_size=1, max_size=6)
values = texts | odd | st.sampled_from(HOSTILE_VALUES)
items_of_tenants = st.lists(st.tuples(st.sampled_from("AB"), values), min_size=1, max_size=12)


@pytest.mark.parametrize("kind", SEARCHING)
@settings(max_examples=50)
@given(rows=items_of_tenants, others=st.lists(values, max_size=4))
@example(rows=[(tenant, value) for value in HOSTILE_VALUES for tenant in "AB"], others=["nothing like it"])
async def test_S5_a_tag_is_found_by_its_exact_value_and_never_by_another(
    urls: Urls, redis_prefix: str, kind: str, rows: list[tuple[str, str]], others: list[str]
) -> None:
    async with opened(urls[kind], redis_prefix) as store:
        await store.ft_create("exact", [Field.tag("tenant"), Field.tag("t", case_sensitive=True)])
        await store.ft_create("loose", [Field.tag("tenant"), Field.tag("t")])
        ids = {f"i{n}": row for n, row in enumerate(rows)}
        await put(store, **{id_: {"tenant": tenant, "t": value} for id_, (tenant, value) in ids.items()})
        await whole(store, "exact")
        await whole(store, "loose")

        async def check(value: str) -> None:
            wanted = {id_ for id_, row in ids.items() if row == ("A", value)}
            query = "(@tenant:{$tenant}) (@t:{$value})"
            assert await found(store, query, index="exact", tenant="A", value=value) == wanted
            loose = await found(store, query, index="loose", tenant="A", value=value)
            like = {id_ for id_, row in ids.items() if row[0] == "A" and row[1].casefold() == value.casefold()}
            assert wanted <= loose <= like

        await asyncio.gather(*map(check, {value for _, value in rows} | set(others)))
        await store.delete_prefix("", allow_all=True)


@settings(max_examples=50)
@given(rows=items_of_tenants, others=st.lists(values, max_size=4))
@example(rows=[(tenant, value) for value in HOSTILE_VALUES for tenant in "AB"], others=["a", "b", "tenant", "B"])
async def test_S5_no_word_gets_a_search_out_of_its_tenant(
    urls: Urls, redis_prefix: str, rows: list[tuple[str, str]], others: list[str]
) -> None:
    async with opened(urls["redis-8-modules"], redis_prefix) as store:
        await store.ft_create("people", [Field.tag("tenant"), Field.text("t", stemming=False)])
        ids = {f"i{n}": row for n, row in enumerate(rows)}
        await put(store, **{id_: {"tenant": tenant, "t": value} for id_, (tenant, value) in ids.items()})
        await whole(store)
        for value in {value for _, value in rows} | set(others):
            hits = await found(store, "(@tenant:{$tenant}) (@t:($value))", tenant="A", value=value)
            assert hits <= {
                i for i, (tenant, text) in ids.items() if tenant == "A" and value.casefold() in text.casefold()
            }
            if value.isascii() and value.isalnum():
                assert hits >= {i for i, row in ids.items() if row == ("A", value)}
        await store.delete_prefix("", allow_all=True)


numbers = (
    st.floats(allow_nan=False, allow_infinity=False)
    | st.integers(-(2**53), 2**53)
    | st.sampled_from([0, -0.0, 1e-7, 1e21])
)


@settings(max_examples=60)
@given(held=st.lists(numbers, min_size=1, max_size=20), ranges=st.lists(st.tuples(numbers, numbers), max_size=5))
async def test_a_range_of_numbers_is_what_a_brute_force_says(
    urls: Urls, redis_prefix: str, held: list[float], ranges: list[tuple[float, float]]
) -> None:
    async with opened(urls["redis-8-modules"], redis_prefix) as store:
        await store.ft_create("people", [Field.numeric("n", sortable=True)])
        await put(store, **{f"i{n}": {"n": number} for n, number in enumerate(held)})
        await whole(store)
        for least, most in ranges:
            wanted = {f"i{n}" for n, number in enumerate(held) if least <= number <= most}
            if least <= most:
                assert await found(store, "@n:[$least $most]", least=least, most=most) == wanted
        everything = await store.ft_search(
            "people", "@n:[$least $most]", 100, params={"least": -math.inf, "most": math.inf}, sort_by="n"
        )
        assert [held[int(id_[1:])] for id_ in everything.ids] == sorted(held)
        await store.delete_prefix("", allow_all=True)


ODD = ["*", "a*", "?", "[ab]", "\\", "a b", "\n", "é", "\U0001f600", '"', "'", "^", "-", "a|b", "$"]


async def test_a_prefix_is_literal_whatever_characters_it_has(urls: Urls, redis_prefix: str) -> None:
    for kind in SEARCHING:
        url = urls[kind]
        for odd_ in ODD:
            async with opened(url, f"{redis_prefix}{odd_}:") as store:
                await store.ft_create("people", [Field.tag("t")])
                await put(store, **{odd_: {"t": "x"}})
        for odd_ in ODD:
            async with opened(url, f"{redis_prefix}{odd_}:") as store:
                await whole(store)
                assert await found(store, "*") == {odd_}
                assert await store.ft_list() == ["people"]
                assert (await store.ft_info("people")).prefixes == [""]


async def test_the_beginnings_of_an_index_are_literal(store: RedisStore) -> None:
    ids = [f"{odd}{rest}" for odd in ["", *ODD] for rest in ("axb", "ab", "1")]
    await put(store, **{id_: {"t": "x"} for id_ in ids})
    for number, odd_ in enumerate(ODD):
        await made(store, Field.tag("t"), index=f"n{number}", prefixes=[odd_, f"{odd_}ab"])
        assert await found(store, "*", index=f"n{number}") == {id_ for id_ in ids if id_.startswith(odd_)}


async def test_a_store_without_a_prefix_searches_too(own_kind: StartKind) -> None:
    server = await own_kind("valkey-9-modules")
    async with opened(server.url, "") as store:
        await put(store, a={"t": "x"}, b={"t": "y"})
        await made(store, Field.tag("t"))
        assert await found(store, "@t:{x}") == {"a"}
        assert await store.ft_list() == ["people"]
        assert await store.ft_create("people", [Field.tag("t")]) is False


# What can go wrong


async def test_S10_a_search_that_ran_out_of_time_is_no_answer(own_kind: StartKind) -> None:
    server = await own_kind("redis-8-modules")
    for protocol in (3, 2):
        async with opened(server.url, "t:", protocol) as store:
            if protocol == 3:
                await store.put_batch([SyncItem.from_json(f"i{n}", {"n": n, "w": f"w{n}"}) for n in range(20_000)])
                await made(store, Field.numeric("n"), Field.text("w"))
            heavy = " | ".join(f"@n:[{n} inf]" for n in range(20))
            with pytest.raises(TierUnavailable, match="in time"):
                await store.ft_search("people", heavy, sort_by="w", timeout_ms=1)
            assert (await store.ft_search("people", heavy, sort_by="w", timeout_ms=60_000)).total == 20_000
            await server.ask("FT.CONFIG", "SET", "ON_TIMEOUT", "FAIL")
            with pytest.raises(TierUnavailable, match="in time"):
                await store.ft_search("people", heavy, sort_by="w", timeout_ms=1)
            await server.ask("FT.CONFIG", "SET", "ON_TIMEOUT", "RETURN")


async def test_S10_an_index_being_made_says_so(own_kind: StartKind) -> None:
    server = await own_kind("redis-8-modules")
    async with opened(server.url, "t:") as store:
        await store.put_batch([SyncItem.from_json(f"i{n}", {"w": f"w{n} w{n + 1}"}) for n in range(10_000)])
        warned = 0
        while not warned:  # a stall of this process may let the server finish first
            await store.ft_create("people", [Field.text("w")])
            while (hits := await store.ft_search("people", "*", 0)).warnings:
                assert "being built" in hits.warnings[0]
                warned += 1
            assert hits.total == 10_000
            await store.ft_dropindex("people")


async def test_a_server_that_comes_back_empty_has_no_index(own_kind: StartKind) -> None:
    server = await own_kind("redis-8-modules")
    async with opened(server.url, "t:") as store:
        await made(store, Field.tag("t"))
        await put(store, a={"t": "x"})
        assert await found(store, "*") == {"a"}
        await server.restart(empty=True)
        with pytest.raises(IndexNotFound):
            await again(lambda: store.ft_search("people", "*"))
        assert await store.ft_create("people", [Field.tag("t")])
        assert await found(store, "*") == set()


async def test_S12_an_index_survives_a_restart_of_its_server(own_kind: StartKind) -> None:
    server = await own_kind("redis-8-modules")
    async with opened(server.url, "t:") as store:
        await made(store, Field.tag("t"))
        await put(store, a={"t": "x"}, b={"t": "y"})
        await server.restart()
        assert await again(lambda: store.ft_create("people", [Field.tag("t")])) is False
        await whole(store)
        assert await found(store, "@t:{x}") == {"a"}


async def test_S10_a_server_that_is_not_there_is_no_empty_answer(own_kind: StartKind) -> None:
    server = await own_kind("redis-8-modules")
    async with opened(server.url, "t:") as store:
        await made(store, Field.tag("t"))
        await server.kill()
        for call in (store.ft_search("people", "*"), store.ft_list(), store.ft_info("people")):
            with pytest.raises(TierUnavailable):
                await call


async def test_cancelled_searches_leave_no_wrong_reply(plain_store: RedisStore) -> None:
    await made(plain_store, Field.tag("t"))
    await put(plain_store, **{f"i{n}": {"t": f"v{n}"} for n in range(20)})
    for turn in range(100):
        task = asyncio.create_task(plain_store.ft_search("people", f"@t:{{v{turn % 20}}}"))
        for _ in range(turn % 9):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])
    answers = await asyncio.gather(*(plain_store.ft_search("people", f"@t:{{v{n}}}") for n in range(20)))
    assert [hits.ids for hits in answers] == [[f"i{n}"] for n in range(20)]


async def again(call: Callable[[], Any]) -> Any:
    """A call whose connection may just have been cut."""
    for _ in range(20):
        try:
            return await call()
        except TierUnavailable:
            await asyncio.sleep(0.05)
    return await call()
