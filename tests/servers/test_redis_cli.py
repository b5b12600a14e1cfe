"""What redis-cli writes is read by the store, what the store writes by redis-cli, and items move between servers.

The texts are the vectors of docs/formats.md 1.4 and 2.3, typed as the original leaves them.
"""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import AsyncIterator, Callable

import pytest

from sync_engine.errors import Corruption
from sync_engine.item import ContentType, Op, SyncItem
from sync_engine.storage.redis import RedisStore
from sync_engine.testing.servers import KINDS, RedisKind, RunningRedis

DOCUMENT_A = (
    '{"access_count":0,"last_accessed":0,"payload":{"name":"Alice","role":"admin","score":1.5},'
    '"payload_hash":"16abbfef8b4d7f5f93fab4b33fadf0634d8f80ade5661408f4edf007dac44dbf","state":"default",'
    '"timestamp":1767084657058,"version":3}'
)
DOCUMENT_B = (
    '{"access_count":5,"audit":{"batch":"6f9619ff-8b86-4d01-b42d-00cf4fc964ff","home":"node-a",'
    '"trace":"00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"},"last_accessed":1700000001000,'
    '"payload":[1,"é",null,true],'
    '"payload_hash":"247e33612ea8858d596f74a99cf9fd3ad570263e46d8e0b4c28d5e24e041617e","state":"delta",'
    '"timestamp":1700000000000,"version":1}'
)
TEXT_A = (
    '{"object_id":"bin.1","version":1,"updated_at":1700000000000,"content_type":"binary","trace_parent":null,'
    '"trace_state":null,"priority_score":0.0,'
    '"content_hash":"2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824","last_accessed":0,'
    '"access_count":0,"content":[104,101,108,108,111],"home_instance_id":null,"state":"default"}'
)
HELLO = "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824"
TEXT_B = (
    '{"object_id":"bin.1","version":1,"updated_at":1700000000000,"content_type":"binary","batch_id":"b-1",'
    f'"trace_parent":"00-t-s-01","trace_state":null,"priority_score":1.5,"content_hash":"{HELLO}","last_accessed":0,'
    '"access_count":0,"content":[0,255,10],"home_instance_id":null,"state":"delta"}'
)
ITEM_A = SyncItem("bin.1", b"hello", updated_at=1_700_000_000_000)
ITEM_B = SyncItem(
    "bin.1",
    b"\x00\xff\n",
    updated_at=1_700_000_000_000,
    batch_id="b-1",
    trace_parent="00-t-s-01",
    priority_score=1.5,
    state="delta",
)


class Cli:
    """redis-cli, as typed: the words of a command on its command line, the last one through its input."""

    def __init__(self, server: RunningRedis, prefix: str) -> None:
        found = shutil.which("redis-cli")
        if found is None:
            pytest.fail("no redis-cli. Run: apt-get install redis-tools", pytrace=False)
        self._argv = (found, "-p", str(server.port), "-e", "-x")
        self.prefix = prefix

    async def __call__(self, *words: str) -> list[str]:
        """The lines of the reply. The prefix stands in a key where ``~`` does."""
        words = tuple(self.prefix + word[1:] if word.startswith("~") else word for word in words)
        process = await asyncio.create_subprocess_exec(
            *self._argv, *words[:-1], stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
        )
        said, _ = await process.communicate(words[-1].encode())
        assert process.returncode == 0, said
        return said.decode().splitlines()


@pytest.fixture
async def store(kind_server: RunningRedis, redis_prefix: str) -> AsyncIterator[RedisStore]:
    store = await RedisStore.connect(kind_server.url, redis_prefix)
    yield store
    await store.close()


@pytest.fixture
def cli(kind_server: RunningRedis, redis_prefix: str) -> Cli:
    return Cli(kind_server, redis_prefix)


@pytest.fixture(params=[kind for kind in KINDS.values() if kind.modules], ids=str)
def with_modules(request: pytest.FixtureRequest, kind_servers: Callable[[RedisKind], RunningRedis]) -> RunningRedis:
    return kind_servers(request.param)


@pytest.fixture
async def documents(with_modules: RunningRedis, redis_prefix: str) -> AsyncIterator[RedisStore]:
    store = await RedisStore.connect(with_modules.url, redis_prefix)
    yield store
    await store.close()


@pytest.fixture
def cli_there(with_modules: RunningRedis, redis_prefix: str) -> Cli:
    return Cli(with_modules, redis_prefix)


def without_counters(document: str) -> str:
    told = json.loads(document)
    del told["access_count"], told["last_accessed"]
    return json.dumps(told)


# Theirs, read by us.


@pytest.mark.parametrize("form", [str, without_counters], ids=["with counters", "of the first generation"])
async def test_documents_that_redis_cli_wrote_are_read(
    documents: RedisStore, cli_there: Cli, form: Callable[[str], str]
) -> None:
    assert await cli_there("JSON.SET", "~user.alice", "$", form(DOCUMENT_A)) == ["OK"]
    assert await cli_there("JSON.SET", "~b", "$", form(DOCUMENT_B)) == ["OK"]
    found = await documents.get_many(["user.alice", "b", "none"])
    assert found == {object_id: await documents.get(object_id) for object_id in ("user.alice", "b")}
    alice, b = found["user.alice"], found["b"]
    assert (alice.content, alice.version, alice.updated_at, alice.state) == (
        b'{"name":"Alice","role":"admin","score":1.5}',
        3,
        1_767_084_657_058,
        "default",
    )
    assert (b.content, b.version, b.updated_at, b.state) == (
        '[1,"é",null,true]'.encode(),
        1,
        1_700_000_000_000,
        "delta",
    )
    assert (b.batch_id, b.home_instance_id) == ("6f9619ff-8b86-4d01-b42d-00cf4fc964ff", "node-a")
    assert (b.access_count, b.last_accessed) == ((5, 1_700_000_001_000) if form is str else (0, 0))
    assert {item.content_type for item in found.values()} == {ContentType.JSON}
    assert {item.stamp for item in found.values()} == {0}


async def test_texts_that_redis_cli_wrote_are_read(store: RedisStore, cli: Cli) -> None:
    await cli("SET", "~bin.1", TEXT_A)
    assert await store.get("bin.1") == ITEM_A
    await cli("SET", "~bin.1", TEXT_B.replace(HELLO, ITEM_B.content_hash))
    found = await store.get_many(["bin.1"])
    assert found == {"bin.1": ITEM_B}
    assert (found["bin.1"].batch_id, found["bin.1"].priority_score) == ("b-1", 1.5)


async def test_a_text_that_does_not_match_its_hash_is_damage(store: RedisStore, cli: Cli) -> None:
    await cli("SET", "~bin.1", TEXT_B)  # vector B has the hash of vector A
    with pytest.raises(Corruption, match=f"bin.1.*{HELLO}"):
        await store.get("bin.1")
    with pytest.raises(Corruption, match=r"bin\.1"):
        await store.scan_prefix("bin")
    assert await store.scan_ids("bin") == ["bin.1"]


async def test_R16_what_is_no_item_is_none(store: RedisStore, cli: Cli) -> None:
    await cli("SET", "~text", "hello")
    await cli("RPUSH", "~list", "hello")
    assert await store.get_many(["text", "list"]) == {}
    assert await store.scan_prefix("", allow_all=True) == []


async def test_what_redis_cli_wrote_before_the_first_listing_is_in_it(documents: RedisStore, cli_there: Cli) -> None:
    await cli_there("JSON.SET", "~user.alice", "$", DOCUMENT_A)
    await cli_there("JSON.SET", "~user.b", "$", without_counters(DOCUMENT_B))
    await cli_there("SET", "~bin.1", TEXT_A)
    await cli_there("SADD", "~state:default", "user.alice")  # as the original's batches do; its single puts do not
    assert [item.object_id for item in await documents.scan_prefix("", allow_all=True)] == [
        "bin.1",
        "user.alice",
        "user.b",
    ]
    assert await documents.count_prefix("user.") == 2
    assert await documents.list_state_ids("default") == ["bin.1", "user.alice"]
    assert await documents.count_by_state("delta") == 1
    assert await cli_there("SMEMBERS", "~state:delta") == ["user.b"]


async def test_what_redis_cli_writes_later_is_in_listings_after_reindex(store: RedisStore, cli: Cli) -> None:
    await store.put(SyncItem("bin.0", b"\x00"))
    assert await store.scan_ids("bin") == ["bin.0"]
    await cli("SET", "~bin.1", TEXT_A)
    assert await store.exists("bin.1")
    assert await store.is_in_state("bin.1", "default")
    await store.reindex()
    assert await store.scan_ids("bin") == await store.list_state_ids("default") == ["bin.0", "bin.1"]
    assert await store.count_prefix("bin") == await store.count_by_state("default") == 2
    await cli("DEL", "~bin.0")
    assert await store.scan_ids("bin") == ["bin.1"]
    assert await store.count_prefix("bin") == 1


async def test_a_deadline_that_redis_cli_gave_is_kept_from_reindex_on(store: RedisStore, cli: Cli) -> None:
    await store.put_batch([SyncItem("a", b"{}"), SyncItem("b", b"\x00")])
    await store.count_by_state("default")
    await cli("PEXPIRE", "~a", "100")
    await store.reindex()
    while await cli("EXISTS", "~a") == ["1"]:
        pass
    assert await store.list_state_ids("default") == ["b"]
    assert await store.count_by_state("default") == 1


async def test_items_of_redis_cli_are_moved_replaced_and_deleted(documents: RedisStore, cli_there: Cli) -> None:
    await cli_there("JSON.SET", "~user.alice", "$", DOCUMENT_A)
    await cli_there("SADD", "~state:default", "user.alice")
    await cli_there("SET", "~bin.1", TEXT_A)
    assert await documents.move_state("user.alice", "default", "vip")
    assert await documents.move_state("bin.1", "default", "vip")
    assert await cli_there("JSON.GET", "~user.alice", "$.state") == ['["vip"]']
    assert json.loads((await cli_there("GET", "~bin.1"))[0]) == json.loads(TEXT_A) | {"state": "vip"}
    assert sorted(await cli_there("SMEMBERS", "~state:vip")) == ["bin.1", "user.alice"]
    assert await cli_there("EXISTS", "~state:default") == ["0"]
    assert (await documents.put_batch([SyncItem("bin.1", b"{}"), SyncItem("user.alice", b"\x00")])).failed == {}
    assert await documents.delete_many(["bin.1", "user.alice"]) == 2
    assert await cli_there("EXISTS", "~bin.1") == ["0"]
    assert await documents.count_prefix("", allow_all=True) == 0


# Ours, read by them.


async def test_our_documents_are_read_by_redis_cli(documents: RedisStore, cli_there: Cli) -> None:
    content = b'{"role": "admin", "name": "Alice", "score": 1.50}'
    await documents.put(SyncItem("user.alice", content, version=3, updated_at=1_767_084_657_058))
    (told,) = await cli_there("JSON.GET", "~user.alice")
    assert json.loads(told).items() >= json.loads(DOCUMENT_A).items()
    assert json.loads(told)["raw"] == content.decode()
    assert await cli_there("JSON.GET", "~user.alice", "$.payload.name") == ['["Alice"]']


async def test_our_documents_are_found_by_redis_cli(documents: RedisStore, cli_there: Cli) -> None:
    await documents.put_batch(
        [
            SyncItem.from_json("user.1", {"name": "Ada Lovelace", "age": 36}),
            SyncItem.from_json("user.2", {"name": "Alan Turing", "age": 41}),
            SyncItem("user.3", b"\x00"),
        ]
    )
    await documents.ft_create("people", ["name", "TEXT", "age", "NUMERIC"], prefixes=["user."])
    schema = ["SCHEMA", "$.payload.name", "AS", "name", "TEXT", "$.payload.age", "AS", "age", "NUMERIC"]
    await cli_there("FT.CREATE", "~theirs", "ON", "JSON", "PREFIX", "1", "~user.", *schema)
    for index in ("~idx:people", "~theirs"):
        async with asyncio.timeout(30):
            while (await cli_there("FT.SEARCH", index, "*", "NOCONTENT"))[0] != "2":  # noqa: ASYNC110  nothing tells
                await asyncio.sleep(0.01)
        assert await cli_there("FT.SEARCH", index, "@name:lovelace", "NOCONTENT") == [
            "1",
            f"{documents.prefix}user.1",
        ]
        assert await cli_there("FT.SEARCH", index, "@age:[40 50]", "NOCONTENT") == ["1", f"{documents.prefix}user.2"]
    await cli_there("FT.DROPINDEX", "~theirs")
    await documents.ft_dropindex("people")


async def test_our_state_sets_are_read_by_redis_cli(store: RedisStore, cli: Cli) -> None:
    await store.put_batch([SyncItem("a", b"{}", state="new"), SyncItem("b", b"\x00", state="new"), SyncItem("c", b"")])
    await store.move_state("c", "default", "new")
    await store.delete("a")
    assert sorted(await cli("SMEMBERS", "~state:new")) == ["b", "c"]
    assert await cli("SCARD", "~state:new") == ["2"]
    assert await cli("EXISTS", "~state:default") == ["0"]


async def test_our_texts_are_those_of_the_original(kind_server: RunningRedis, cli: Cli) -> None:
    store = await RedisStore.connect(kind_server.url, cli.prefix, binary_format="json")
    await store.put(ITEM_A)
    assert await cli("GET", "~bin.1") == [TEXT_A]
    await store.put(ITEM_B)
    assert await cli("GET", "~bin.1") == [TEXT_B.replace(HELLO, ITEM_B.content_hash)]
    await store.close()


# Between kinds of server.


JSON_ITEMS = [
    SyncItem("canonical", b'{"a":1}', state="hot", stamp=7, version=2, updated_at=1),
    SyncItem("spelled", b'{ "a" : 1.50 }', home_instance_id="node-a", updated_at=1),
    SyncItem("scalar", b"5", content_type=ContentType.JSON, updated_at=1),
]


@pytest.fixture
async def plain_store(
    kind_servers: Callable[[RedisKind], RunningRedis], redis_prefix: str
) -> AsyncIterator[RedisStore]:
    """Without RedisJSON."""
    # Of those the one whose values all others can restore.
    store = await RedisStore.connect(kind_servers(KINDS["redis-7"]).url, redis_prefix)
    yield store
    await store.close()


async def moved(there: RedisStore, here: RedisStore) -> None:
    """Every key of the prefix, as redis-cli or a replica brings it."""
    for key in await there.client.keys(f"{there.prefix}*"):
        ttl = await there.client.pttl(key)
        await here.client.restore(key, max(ttl, 0), await there.client.dump(key))


async def test_json_is_kept_as_strings_where_there_is_no_redisjson(plain_store: RedisStore) -> None:
    await plain_store.put_batch(JSON_ITEMS)
    assert {await plain_store.client.type(plain_store.prefix + item.object_id) for item in JSON_ITEMS} == {b"string"}
    found = await plain_store.get_many([item.object_id for item in JSON_ITEMS])
    assert list(found.values()) == JSON_ITEMS
    assert {item.content_type for item in found.values()} == {ContentType.JSON}


async def test_json_that_was_kept_as_strings_is_read_where_there_is_redisjson(
    plain_store: RedisStore, documents: RedisStore
) -> None:
    await plain_store.put_batch(JSON_ITEMS, ttl=600)
    await moved(plain_store, documents)
    wanted = sorted(JSON_ITEMS, key=lambda item: item.object_id)
    assert await documents.get_many([item.object_id for item in wanted]) == {item.object_id: item for item in wanted}
    assert await documents.scan_prefix("", allow_all=True) == wanted
    assert await documents.list_state_ids("hot") == ["canonical"]
    assert await documents.move_state("canonical", "hot", "cold")
    assert await documents.client.type(f"{documents.prefix}canonical") == b"string"


async def test_json_that_was_kept_as_a_string_becomes_a_document_when_it_is_written(
    plain_store: RedisStore, documents: RedisStore
) -> None:
    await plain_store.put_batch(JSON_ITEMS, ttl=600)
    await moved(plain_store, documents)
    older = JSON_ITEMS[0].replace(content=b'{"a":0}', stamp=6)
    assert not await documents.put(older)
    newer = [item.replace(content=b'{"b":2}', stamp=8, state="new") for item in JSON_ITEMS]
    assert (await documents.put_batch(newer)).written == 3
    for item in newer:
        key = documents.prefix + item.object_id
        assert await documents.client.type(key) == b"ReJSON-RL"
        assert await documents.client.pttl(key) == -1
        assert await documents.get(item.object_id) == item
    assert await documents.list_state_ids("new") == sorted(item.object_id for item in newer)
    assert await documents.client.keys(f"{documents.prefix}state:*") == [f"{documents.prefix}state:new".encode()]
    assert await documents.client.exists(f"{documents.prefix}__local__:expiring") == 0
    assert await documents.reindex() == 0


async def test_a_change_of_state_that_brings_the_item_makes_it_a_document_too(
    plain_store: RedisStore, documents: RedisStore
) -> None:
    await plain_store.put(JSON_ITEMS[0], ttl=600)
    await moved(plain_store, documents)
    item = JSON_ITEMS[0].replace(state="cold", stamp=9)
    await documents.apply([Op(kind="restate", object_id="canonical", stamp=9, item=item, state="cold")])
    key = f"{documents.prefix}canonical"
    assert await documents.client.type(key) == b"ReJSON-RL"
    assert await documents.client.pttl(key) > 0
    assert await documents.get("canonical") == item
