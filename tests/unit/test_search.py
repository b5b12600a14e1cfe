"""The pure parts of search: fields and their words, what a query asks for, what is made of several servers' answers.

And where indexes lie on servers that do what no server here does when asked, so a few lines stand in for them.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sync_engine.errors import IndexNotFound, InvalidItem, InvalidQuery, StoreError, TierUnavailable
from sync_engine.storage.redis import Field
from sync_engine.storage.redis.search_places import EveryPrimary, Place
from sync_engine.storage.redis.search_reply import Found, Hit, merged, nearest, read_info, read_search
from sync_engine.storage.redis.search_request import SearchRequest
from sync_engine.storage.redis.search_schema import IndexDefinition, fields_of
from sync_engine.storage.redis.shards import Servers, Shard

# Fields


@pytest.mark.parametrize(
    ("words", "field"),
    [
        ("$.payload.name AS name TEXT SORTABLE", Field.text("name", sortable=True)),
        ("$.payload.name AS name TEXT NOSTEM WEIGHT 2.5", Field.text("name", stemming=False, weight=2.5)),
        ("name text", Field.text("name")),
        ("$.state AS state TAG NOINDEX SORTABLE UNF", Field.tag("state", "$.state", noindex=True, sortable=True)),
        ("tags TAG SEPARATOR ; CASESENSITIVE", Field.tag("tags", separator=";", case_sensitive=True)),
        ("$.payload.n AS n NUMERIC", Field.numeric("n")),
        ("$.payload.g AS g GEO", Field.geo("g")),
        (
            "$.payload.v AS v VECTOR HNSW 10 TYPE FLOAT32 DIM 1536 DISTANCE_METRIC COSINE M 24 EF_CONSTRUCTION 300",
            Field.vector("v", dim=1536, m=24, ef_construction=300),
        ),
        (
            "$.payload.v AS v VECTOR FLAT 6 TYPE FLOAT64 DIM 3 DISTANCE_METRIC L2",
            Field.vector("v", dim=3, metric="L2", algorithm="FLAT", element="FLOAT64"),
        ),
    ],
)
def test_a_field_in_words_is_that_field(words: str, field: Field) -> None:
    assert fields_of(words.split()) == (field,)
    assert fields_of([words.split(), Field.tag("other")]) == (field, Field.tag("other"))
    assert fields_of(field.words()) == (field,)


def test_the_words_are_those_of_the_original() -> None:
    definition = IndexDefinition(
        (
            Field.text("name", sortable=True),
            Field.text("email"),
            Field.numeric("age", sortable=True),
            Field.tag("roles"),
        ),
        ("crdt:users:",),
    )
    # Theirs (WIRE.md 7.1), and no stop words.
    assert " ".join(map(str, definition.words(["app:"]))) == (
        "ON JSON PREFIX 1 app:crdt:users: STOPWORDS 0 SCHEMA $.payload.name AS name TEXT SORTABLE $.payload.email AS "
        "email TEXT $.payload.age AS age NUMERIC SORTABLE $.payload.roles AS roles TAG"
    )


@pytest.mark.parametrize(
    "words",
    [
        "",
        "name",
        "name AS",
        "$.a AS a",
        "$.a TAG",
        "name WORD",
        "name TAG WEIGHT 2",
        "name TEXT SEPARATOR ,",
        "name TEXT WEIGHT",
        "name TEXT WEIGHT x",
        "name TEXT WEIGHT nan",
        "name TEXT WEIGHT -1",
        "name TEXT PHONETIC dm:en",
        "name TAG name NUMERIC",
        "name TAG SEPARATOR ab",
        "v VECTOR HNSW 6 TYPE FLOAT32 DIM 2",
        "v VECTOR HNSW 5 TYPE FLOAT32 DIM 2 DISTANCE_METRIC",
        "v VECTOR HNSW x",
        "v VECTOR HNSW 6 TYPE FLOAT32 DIM 0 DISTANCE_METRIC L2",
        "v VECTOR HNSW 6 TYPE FLOAT32 DIM 2 DISTANCE_METRIC L3",
        "v VECTOR HNSW 6 TYPE INT8 DIM 2 DISTANCE_METRIC L2",
        "v VECTOR HNSW 6 TYPE FLOAT32 DIM 2 COLOUR red",
        "v VECTOR FLAT 8 TYPE FLOAT32 DIM 2 DISTANCE_METRIC L2 M 4",
        "v VECTOR FLAT 6 TYPE FLOAT32 DIM 2 DISTANCE_METRIC L2 SORTABLE",
    ],
)
def test_words_that_are_no_schema_are_refused(words: str) -> None:
    with pytest.raises(InvalidItem):
        IndexDefinition(fields_of(words.split()))


@pytest.mark.parametrize("path", ["a", " $.a", "$.a\n", "$.a\0", "$.\ud800", "$" + "a" * 512])
def test_a_path_that_is_none_is_refused(path: str) -> None:
    with pytest.raises(InvalidItem, match="path"):
        Field.tag("a", path)


def test_a_schema_of_something_else_is_refused() -> None:
    for schema in ([5], [Field.tag("a"), "b"], [Field.tag("a"), Field.text("a")], []):
        with pytest.raises(InvalidItem, match="schema"):
            IndexDefinition(fields_of(cast(Any, schema)))


def test_a_definition_survives_being_written_down() -> None:
    definition = IndexDefinition(
        (Field.text("a", "$.x", weight=0.3), Field.tag("b", separator=","), Field.vector("c", dim=3)), ("z", "", "é\n")
    )
    again = IndexDefinition.from_json(definition.to_json())
    assert again.fields == definition.fields
    assert again.to_json() == definition.to_json()
    assert IndexDefinition(definition.fields, ("é\n", "z", "")).to_json() == definition.to_json()


# Requests


def request(query: str = "*", **told: Any) -> SearchRequest:
    defaults: dict[str, Any] = {"limit": 10, "offset": 5, "params": {}, "sort_by": None, "descending": False}
    defaults |= {"return_items": False, "with_scores": False, "timeout_ms": None}
    return SearchRequest(query, **defaults | told)


def asked(request: SearchRequest, *, alone: bool = True, documents: bool = True) -> str:
    return " ".join(map(str, request.words(alone=alone, documents=documents)))


@pytest.mark.parametrize(
    ("told", "alone", "among_others"),
    [
        ({}, "* RETURN 1 $.payload_hash LIMIT 5 10", "* WITHSCORES NOCONTENT LIMIT 0 15"),
        ({"limit": 0}, "* NOCONTENT LIMIT 5 0", "* WITHSCORES NOCONTENT LIMIT 0 0"),
        ({"return_items": True}, "* RETURN 1 $ LIMIT 5 10", "* WITHSCORES NOCONTENT LIMIT 0 15"),
        (
            {"sort_by": "n", "descending": True, "with_scores": True, "timeout_ms": 9},
            "* WITHSCORES RETURN 1 $.payload_hash TIMEOUT 9 SORTBY n DESC LIMIT 5 10",
            "* WITHSCORES WITHSORTKEYS NOCONTENT TIMEOUT 9 SORTBY n DESC LIMIT 0 15",
        ),
        (
            {"query": "*=>[KNN 7 @v $v AS far]", "params": {"v": "x"}},
            "*=>[KNN 7 @v $v AS far] RETURN 1 $.payload_hash SORTBY far ASC LIMIT 5 10 PARAMS 2 v x",
            "*=>[KNN 7 @v $v AS far] RETURN 1 far SORTBY far ASC LIMIT 0 7 PARAMS 2 v x",
        ),
    ],
)
def test_S7_a_search_is_put_in_words(told: dict[str, Any], alone: str, among_others: str) -> None:
    told = {"query": "*"} | told
    assert asked(request(**told)) == f"{alone} DIALECT 2"
    assert asked(request(**told), alone=False, documents=False) == f"{among_others} DIALECT 2"


@pytest.mark.parametrize(
    ("query", "distance", "count"),
    [
        ("*=>[KNN 3 @v $b]", "__v_score", 3),
        ("(@t:{a}) => [ knn $k @v $b EF_RUNTIME 10 as d ] ", "d", 4),
        ("*=>[KNN 3 @v $b]=>{$yield_distance_as: d}", "d", 3),
        ("*=>[KNN 3 @v $b] => { $EF_RUNTIME: 5; $YIELD_DISTANCE_AS: d; }", "d", 3),
        ("@v:[VECTOR_RANGE 3 $b]=>{$YIELD_DISTANCE_AS: d}", None, 0),
        ("knn 3", None, 0),
    ],
)
def test_S7_a_query_for_neighbours_is_known_for_one(query: str, distance: str | None, count: int) -> None:
    found = request(query, params={"k": 4, "b": b"x"})
    assert (found.distance, found.nearest) == (distance, count)


def test_S5_a_backslash_in_a_value_is_sent_twice() -> None:
    words = request("@t:{$p}", params={"p": "a\\.b", "raw": b"\\", "n": 1e-7}).words(alone=True, documents=True)
    assert words[-10:] == ["PARAMS", 6, "p", "a\\\\.b", "raw", b"\\", "n", "1e-07", "DIALECT", 2]


def test_an_empty_query_is_no_query_for_everything() -> None:
    for query in ("", " ", "\n\t"):
        with pytest.raises(InvalidQuery):
            request(query)


# Replies


MAP = {
    b"total_results": 7,
    b"results": [
        {b"id": b"p:a", b"score": 0.5, b"sortkey": b"#1", b"extra_attributes": {b"$": b"{}"}, b"values": []},
        {b"id": b"p:b", b"extra_attributes": None},
        {b"id": b"p:c"},
    ],
    b"warning": [b"Timeout limit was reached"],
    b"format": b"STRING",
}
FLAT = [
    *(b"results", [[b"id", b"p:a", b"score", b"0.5", b"sortkey", b"#1", b"extra_attributes", [b"$", b"{}"]]]),
    *(b"total_results", 7, b"warning", [b"Timeout limit was reached"]),
]


def test_R15_maps_and_flat_lists_tell_the_same() -> None:
    found = read_search(MAP)
    assert found == Found(
        7,
        [Hit(b"p:a", 0.5, b"#1", {b"$": b"{}"}), Hit(b"p:b", None, None, None), Hit(b"p:c", None, None, None)],
        ["Timeout limit was reached"],
    )
    flat = read_search(FLAT)
    assert (flat.total, flat.hits, flat.warnings) == (7, found.hits[:1], found.warnings)


@pytest.mark.parametrize(
    "reply", [None, 5, b"OK", [], [1, b"a"], [2, b"a", b"b"], {}, {b"results": [], b"total_results": b"x"}]
)
def test_R15_a_reply_that_is_none_is_an_error_and_not_no_hits(reply: Any) -> None:
    with pytest.raises(StoreError):
        read_search(reply)
    with pytest.raises(StoreError):
        read_info(reply)


def hits(keys: Sequence[tuple[Any, ...]]) -> list[Hit]:
    return [Hit(b"k%d" % n, None if score is None else float(score), key, None) for n, key, score in keys]


@given(
    values=st.lists(st.none() | st.integers(-5, 5), max_size=30),
    servers=st.integers(1, 4),
    offset=st.integers(0, 12),
    limit=st.integers(0, 12),
    descending=st.booleans(),
    seed=st.randoms(use_true_random=False),
)
def test_S15_a_page_of_several_servers_is_that_of_one(
    values: list[int | None], servers: int, offset: int, limit: int, descending: bool, seed: random.Random
) -> None:
    def ranked(of: list[tuple[int, int | None]]) -> list[tuple[int, int | None]]:
        having = sorted((row for row in of if row[1] is not None), key=lambda row: row[1] or 0, reverse=descending)
        return having + [row for row in of if row[1] is None]

    rows = list(enumerate(values))
    parts: list[list[tuple[int, int | None]]] = [[] for _ in range(servers)]
    for row in rows:
        seed.choice(parts).append(row)
    replies = [
        Found(
            len(part),
            hits([(n, None if value is None else b"#%d" % value, None) for n, value in ranked(part)[: offset + limit]]),
            [f"warning {len(part)}", "the same"],
        )
        for part in parts
    ]
    page = merged(replies, sort=True, descending=descending, offset=offset, limit=limit)
    assert page.total == len(rows)
    wanted = [value for _, value in ranked(rows)[offset : offset + limit]]
    assert [values[int(hit.key[1:])] for hit in page.hits] == wanted
    assert page.warnings.count("the same") == 1


def test_what_two_servers_have_while_it_moves_is_counted_once() -> None:
    replies = [Found(2, hits([(1, b"#1", 1), (2, b"#2", 1)]), []), Found(2, hits([(2, b"#2", 1), (3, b"#3", 1)]), [])]
    page = merged(replies, sort=True, descending=False, offset=0, limit=10)
    assert (page.total, [hit.key for hit in page.hits]) == (3, [b"k1", b"k2", b"k3"])


def test_S7_the_nearest_of_several_servers_are_the_nearest_of_all() -> None:
    def near(*rows: tuple[int, float]) -> Found:
        return Found(len(rows), [Hit(b"k%d" % n, None, b"#%d" % -n, {b"d": b"%r" % far}) for n, far in rows], [])

    told: dict[str, Any] = {"count": 3, "distance": b"d", "offset": 0, "limit": 10}
    replies = [near((1, 0.5), (2, 9.0), (3, 11.0)), near((4, 2.0)), near()]
    page = nearest(replies, sort=False, descending=False, **told)
    assert (page.total, [hit.key for hit in page.hits]) == (3, [b"k1", b"k4", b"k2"])
    page = nearest(replies, sort=True, descending=False, **told | {"offset": 1, "limit": 1})
    assert (page.total, [hit.key for hit in page.hits]) == (3, [b"k2"])


# Servers that pass a search on to each other, and other things that no real one does when asked


class TwoServers:
    """As much as ``EveryPrimary`` needs of two servers with two shards each."""

    single = False

    def __init__(self, *, coordinated: bool = False) -> None:
        self.shards = [Shard(n, f"p:{{{n}}}") for n in range(4)]
        self.parts = [tuple(self.shards[:2]), tuple(self.shards[2:])]
        self.memory: dict[str, bytes] = {}
        self.coordinated = coordinated
        self.indexes: list[set[str]] = [set(), set()]
        self.drop_at_create = False

    async def primaries(self) -> list[tuple[Shard, ...]]:
        return self.parts

    async def call(self, shard: Shard, command: str, *args: Any) -> Any:
        held = self.indexes[shard.number // 2]
        match command:
            case "HSETNX":
                is_new = args[1] not in self.memory
                self.memory.setdefault(args[1], args[2].encode())
                return int(is_new)
            case "HSET":
                self.memory[args[1]] = b"%d" % args[2]
            case "HGET":
                return self.memory.get(args[1])
            case "HMGET":
                return [self.memory.get(name) for name in args[1:]]
            case "HDEL":
                return sum(self.memory.pop(name, None) is not None for name in args[1:])
            case "HKEYS":
                return [name.encode() for name in self.memory]
            case "FT._LIST":
                return [name.encode() for name in held]
            case "FT.CREATE":
                for indexes in self.indexes if self.coordinated else [held]:
                    indexes.add(args[0])
                if self.drop_at_create:
                    self.memory.clear()
            case "FT.DROPINDEX":
                if args[0] not in held:
                    raise StoreError("l2", "Unknown index name")
                for indexes in self.indexes if self.coordinated else [held]:
                    indexes.remove(args[0])
            case "FT.INFO":
                field = {"identifier": "$.payload.t", "attribute": "t", "type": "TAG", "SEPARATOR": "", "flags": []}
                prefixes = [shard.prefix for shard in self.shards]
                return {"index_definition": {"prefixes": prefixes}, "attributes": [field], "stopwords_list": []}
        return b"OK"


DEFINITION = IndexDefinition((Field.tag("t"),))


def places_of(servers: TwoServers) -> EveryPrimary:
    return EveryPrimary(cast(Servers, servers), "p:")


async def test_servers_that_ask_each_other_are_asked_once() -> None:
    servers = TwoServers(coordinated=True)
    places, others = places_of(servers), places_of(servers)
    assert await places.create("people", DEFINITION) is True
    assert servers.indexes == [{"p:idx:people{1}"}] * 2
    assert await places.find("people") == (Place(servers.shards[1], "p:idx:people{1}", ()),)
    assert await others.create("people", DEFINITION) is False
    assert await others.find("people") == await places.find("people")
    assert await places.names() == ["people"]
    await others.drop("people")
    assert (servers.indexes, servers.memory) == ([set(), set()], {})
    with pytest.raises(IndexNotFound):
        await places.mend("people")


async def test_an_index_dropped_while_a_search_mends_it_stays_dropped() -> None:
    servers = TwoServers()
    places = places_of(servers)
    assert await places.create("people", DEFINITION) is True
    assert servers.indexes == [{"p:idx:people{1}"}, {"p:idx:people{3}"}]
    servers.indexes[1].clear()
    servers.drop_at_create = True  # by somebody else, just then
    with pytest.raises(IndexNotFound):
        await places.mend("people")
    assert servers.indexes == [set(), set()]


async def test_a_shard_that_nobody_serves_makes_no_smaller_answer() -> None:
    servers = TwoServers()
    places = places_of(servers)
    await places.create("people", DEFINITION)
    servers.parts = servers.parts[:1]
    with pytest.raises(TierUnavailable, match="no node"):
        await places.find("people")
