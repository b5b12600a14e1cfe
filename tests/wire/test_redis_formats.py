"""The stored formats of Redis, byte by byte: docs/formats.md 1.4 and 2.3, our envelope, and what readers accept.

Every vector is written by a plain client, as the original would, and read by the store.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import orjson
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sync_engine.codec import Unverified, read_document, read_string, to_document, to_envelope, to_text
from sync_engine.errors import Corruption
from sync_engine.item import ContentType, SyncItem
from sync_engine.storage.redis import RedisStore

TEXT_A = (
    b'{"object_id":"bin.1","version":1,"updated_at":1700000000000,"content_type":"binary","trace_parent":null,'
    b'"trace_state":null,"priority_score":0.0,'
    b'"content_hash":"2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824","last_accessed":0,'
    b'"access_count":0,"content":[104,101,108,108,111],"home_instance_id":null,"state":"default"}'
)
TEXT_B = (
    b'{"object_id":"bin.1","version":1,"updated_at":1700000000000,"content_type":"binary","batch_id":"b-1",'
    b'"trace_parent":"00-t-s-01","trace_state":null,"priority_score":1.5,'
    b'"content_hash":"2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824","last_accessed":0,'
    b'"access_count":0,"content":[0,255,10],"home_instance_id":null,"state":"delta"}'
)
DOCUMENT_A = (
    b'{"access_count":0,"last_accessed":0,"payload":{"name":"Alice","role":"admin","score":1.5},'
    b'"payload_hash":"16abbfef8b4d7f5f93fab4b33fadf0634d8f80ade5661408f4edf007dac44dbf","state":"default",'
    b'"timestamp":1767084657058,"version":3}'
)
DOCUMENT_B = (
    '{"access_count":5,"audit":{"batch":"6f9619ff-8b86-4d01-b42d-00cf4fc964ff","home":"node-a",'
    '"trace":"00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"},"last_accessed":1700000001000,'
    '"payload":[1,"é",null,true],'
    '"payload_hash":"247e33612ea8858d596f74a99cf9fd3ad570263e46d8e0b4c28d5e24e041617e","state":"delta",'
    '"timestamp":1700000000000,"version":1}'
).encode()
HELLO = "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824"
MANDATORY = {"version", "timestamp", "state", "payload", "payload_hash"}

FULL = {
    "version": 7,
    "updated_at": -5,
    "state": 'odd "state"/\\ é',
    "home_instance_id": "node-a",
    "trace_parent": "00-t-s-01",
    "trace_state": "k=v",
    "batch_id": "b-1",
    "priority_score": 0.1,
    "access_count": 3,
    "last_accessed": 2**53 + 1,
    "stamp": 2**63 - 1,
    "expires_at": 9_999_999_999_999,
}


@pytest.fixture
async def store(redis_url: str, redis_prefix: str) -> AsyncIterator[RedisStore]:
    store = await RedisStore.connect(redis_url, redis_prefix)
    yield store
    await store.close()


def same(left: SyncItem, right: object) -> bool:
    """Equal in the engine's notes too."""
    notes = ("stamp", "expires_at", "batch_id", "access_count", "last_accessed", "content_hash")
    return left == right and all(getattr(left, note) == getattr(right, note) for note in notes)


def test_vector_1_4_A_is_written_byte_for_byte() -> None:
    assert to_text(SyncItem("bin.1", b"hello", updated_at=1_700_000_000_000)) == TEXT_A


def test_vector_1_4_B_is_written_byte_for_byte() -> None:
    item = SyncItem(
        "bin.1",
        b"\x00\xff\n",
        updated_at=1_700_000_000_000,
        batch_id="b-1",
        trace_parent="00-t-s-01",
        priority_score=1.5,
        state="delta",
        _hash=HELLO,
    )
    assert to_text(item) == TEXT_B


def test_vector_1_4_B_is_read_as_damaged_because_its_hash_is_of_other_bytes() -> None:
    found = read_string("bin.1", TEXT_B)
    assert isinstance(found, Corruption)
    assert found.expected == HELLO


async def test_texts_of_the_original_are_read_from_redis(store: RedisStore) -> None:
    await store.client.set(store.prefix + "bin.1", TEXT_A)
    found = await store.get("bin.1")
    assert found == SyncItem("bin.1", b"hello", updated_at=1_700_000_000_000)


A: dict[str, Any] = json.loads(TEXT_A)


def changed(**keys: Any) -> bytes:
    return json.dumps({name: value for name, value in (A | keys).items() if value is not ...}).encode()


@pytest.mark.parametrize(
    "text",
    [
        pytest.param(json.dumps(dict(reversed(A.items()))).encode(), id="keys in another order"),
        pytest.param(changed(more=1), id="an unknown key"),
        pytest.param(changed(content="hello"), id="content as a string"),
        pytest.param(changed(content_hash=..., merkle_root=HELLO), id="the hash by its old name"),
        pytest.param(changed(content_type=...), id="no content type"),
        pytest.param(changed(state=...), id="no state"),
        pytest.param(changed(trace_parent=..., trace_state=..., home_instance_id=...), id="no labels"),
        pytest.param(changed(priority_score=0), id="an integer priority"),
        pytest.param(b"\n " + TEXT_A + b" ", id="white space around"),
        pytest.param(
            orjson.dumps(
                [
                    "bin.1",
                    1,
                    1700000000000,
                    "binary",
                    None,
                    None,
                    None,
                    0.0,
                    HELLO,
                    0,
                    0,
                    list(b"hello"),
                    None,
                    "default",
                ]
            ),
            id="the positional form",
        ),
    ],
)
async def test_what_a_reader_of_1_4_must_accept(store: RedisStore, text: bytes) -> None:
    expected = SyncItem("bin.1", b"hello", updated_at=1_700_000_000_000)
    assert same(expected, read_string("bin.1", text))
    # The script must see the same item, or it would refuse to replace it.
    await store.client.set(store.prefix + "bin.1", text)
    assert await store.exists("bin.1")
    assert (await store.put_batch([expected.replace(content=b"new")])).failed == {}


@pytest.mark.parametrize(
    "text",
    [
        pytest.param(changed(merkle_root=HELLO), id="both names of the hash"),
        pytest.param(changed(content_type=None), id="content type null"),
        pytest.param(changed(content_type="Json"), id="content type misspelt"),
        pytest.param(changed(state=None), id="state null"),
        pytest.param(changed(version=-1), id="a negative version"),
        *[
            pytest.param(changed(**{name: ...}), id=f"no {name}")
            for name in (
                "object_id",
                "version",
                "updated_at",
                "priority_score",
                "content_hash",
                "last_accessed",
                "access_count",
                "content",
            )
        ],
        pytest.param(b"", id="empty"),
        pytest.param(b"hello", id="not JSON"),
        pytest.param(b"{", id="broken JSON"),
        pytest.param(b"[1,2]", id="too few values"),
    ],
)
def test_what_a_reader_of_1_4_must_not_take_for_an_item(text: bytes) -> None:
    assert read_string("bin.1", text) is None


async def test_a_document_of_the_original_without_its_exact_bytes_is_unverified(store: RedisStore) -> None:
    await store.client.execute_command("JSON.SET", store.prefix + "user.alice", "$", DOCUMENT_A)
    fetched = await store.fetch(["user.alice"])
    assert fetched.items == {}
    assert fetched.corrupt == {}
    item = fetched.unverified["user.alice"]
    assert (item.content, item.version, item.updated_at) == (
        b'{"name":"Alice","role":"admin","score":1.5}',
        3,
        1_767_084_657_058,
    )
    assert item.content_hash == "6ed3918d35ed75e727641d8d682ad5d8c003244b29fcfcbc113a22991416b076"
    assert await store.get("user.alice") == item


async def test_a_document_of_the_original_with_canonical_content_is_verified(store: RedisStore) -> None:
    await store.client.execute_command("JSON.SET", store.prefix + "b", "$", DOCUMENT_B)
    item = (await store.fetch(["b"])).items["b"]
    assert item.content == '[1,"é",null,true]'.encode()
    assert (item.state, item.access_count, item.last_accessed) == ("delta", 5, 1_700_000_001_000)
    assert (item.batch_id, item.home_instance_id) == ("6f9619ff-8b86-4d01-b42d-00cf4fc964ff", "node-a")
    assert (item.stamp, item.expires_at, item.content_type) == (0, None, ContentType.JSON)


async def test_a_document_of_the_first_generation_has_no_counters(store: RedisStore) -> None:
    told = json.loads(DOCUMENT_B)
    del told["access_count"], told["last_accessed"], told["audit"]
    await store.client.execute_command("JSON.SET", store.prefix + "b", "$", json.dumps(told))
    item = (await store.fetch(["b"])).items["b"]
    assert (item.access_count, item.last_accessed, item.home_instance_id) == (0, 0, None)


async def test_wrong_types_in_a_document_of_the_original_count_as_their_defaults(store: RedisStore) -> None:
    told = json.loads(DOCUMENT_B) | {"version": "x", "timestamp": "x", "access_count": {}, "audit": 5}
    await store.client.execute_command("JSON.SET", store.prefix + "b", "$", json.dumps(told))
    item = (await store.fetch(["b"])).items["b"]
    assert (item.version, item.updated_at, item.access_count, item.home_instance_id) == (1, 0, 0, None)


@pytest.mark.parametrize("missing", sorted(MANDATORY))
async def test_R16_a_foreign_document_is_a_miss_and_not_an_item(store: RedisStore, missing: str) -> None:
    told = json.loads(DOCUMENT_B)
    del told[missing]
    await store.client.execute_command("JSON.SET", store.prefix + "b", "$", json.dumps(told))
    assert await store.get("b") is None
    assert not await store.exists("b")


@pytest.mark.parametrize("document", [b"null", b"5", b"[]", b"{}", b'"text"', b'{"stamp":"x","state":5}'])
async def test_R16_json_of_any_other_shape_is_a_miss(store: RedisStore, document: bytes) -> None:
    await store.client.execute_command("JSON.SET", store.prefix + "b", "$", document)
    assert await store.get("b") is None
    assert not await store.exists("b")
    assert "b" in (await store.put_batch([SyncItem("b", b"{}")])).failed


async def test_our_documents_have_the_keys_that_other_readers_need(store: RedisStore) -> None:
    item = SyncItem.from_json("user.1", {"name": "Ada"}, version=4, updated_at=12, state="hot")
    await store.put(item)
    told = orjson.loads(await store.client.execute_command("JSON.GET", store.prefix + "user.1"))
    assert told == {
        "access_count": 0,
        "id": "user.1",
        "last_accessed": 0,
        "payload": {"name": "Ada"},
        "payload_hash": item.content_hash,
        "stamp": 0,
        "state": "hot",
        "timestamp": 12,
        "version": 4,
    }
    assert list(told) == sorted(told)
    assert await store.client.smembers(store.prefix + "state:hot") == {b"user.1"}


@pytest.mark.parametrize(
    "content", [b'{"a":1}', b'"text"', b"5", b"1.5", b"true", b"null", b'{"a":1.5,"b":"1e5, e-mail 1e+x"}']
)
async def test_canonical_content_is_kept_once(store: RedisStore, content: bytes) -> None:
    await store.put(SyncItem("a", content, content_type=ContentType.JSON))
    told = orjson.loads(await store.client.execute_command("JSON.GET", store.prefix + "a"))
    assert "raw" not in told
    assert (await store.fetch(["a"])).items["a"].content == content


@pytest.mark.parametrize(
    "content",
    [
        b'{ "z" : 1 }',
        b'{"b":1,"a":2}',
        b'{"a":1,"a":2}',
        b'{"a":1.50}',
        b"[1e2]",
        b"[1e-400]",
        b"[-0]",
        b"[1e+16]",
        b"1e-7",
        b"[12345678901234567.0]",
        b"[0.12345678901234568]",
        b"[123456789012345678901234567890]",
        b'["\\u00e9"]',
        b'{"deep":[' + b"1.2345678901234567," * 3 + b"1]}",
        b'{"a":1}\n',
    ],
)
async def test_R1_content_that_redisjson_would_rewrite_comes_back_byte_for_byte(
    store: RedisStore, content: bytes
) -> None:
    await store.put(SyncItem("a", content, content_type=ContentType.JSON))
    told = orjson.loads(await store.client.execute_command("JSON.GET", store.prefix + "a"))
    assert told["raw"] == content.decode()
    assert set(told) >= MANDATORY
    assert (await store.fetch(["a"])).items["a"].content == content


@pytest.mark.parametrize("depth", [125, 126, 127])
async def test_R1_the_deepest_json_comes_back_byte_for_byte(store: RedisStore, depth: int) -> None:
    content = b"[" * depth + b"]" * depth
    item = SyncItem("a", content, content_type=ContentType.JSON)
    await store.put(item)
    assert same(item, await store.get("a"))
    # The document is one level deeper than its payload, and RedisJSON ends at 127.
    kind = await store.client.type(store.prefix + "a")
    assert kind == (b"ReJSON-RL" if depth <= 126 else b"string")


async def test_R17_a_binary_item_takes_its_own_size_and_not_four_times_that(store: RedisStore) -> None:
    content = bytes(range(256)) * 400
    await store.put(SyncItem("a", content))
    assert await store.client.strlen(store.prefix + "a") < len(content) + 200


def test_every_field_survives_every_format() -> None:
    json_item = SyncItem.from_json("a", {"x": [1, "é"]}, **FULL)
    binary = SyncItem("a", b"\x00\xff", **FULL)
    document = to_document(json_item)
    assert document is not None
    assert same(json_item, read_document("a", document))
    for item in (json_item, binary):
        assert same(item, read_string("a", to_envelope(item)))
        assert same(item, read_string("a", to_text(item)))


async def test_every_field_survives_redis(store: RedisStore, redis_url: str) -> None:
    text_store = await RedisStore.connect(redis_url, store.prefix, binary_format="json")
    for item in (SyncItem.from_json("a", {"x": [1, "é"]}, **FULL), SyncItem("a", b"\x00\xff", **FULL)):
        for writer in (store, text_store):
            await store.delete("a")
            await writer.put(item)
            # Both formats are readable whatever the reader itself would write.
            assert same(item, await store.get("a"))
            assert same(item, await text_store.get("a"))
    await text_store.close()


def test_a_priority_that_redisjson_would_rewrite_is_kept_as_text() -> None:
    item = SyncItem.from_json("a", 1, priority_score=1.2345678901234567)
    document = to_document(item)
    assert document is not None
    assert b'"priority":"1.2345678901234567"' in document
    assert same(item, read_document("a", document))


@pytest.mark.parametrize("form", ["document", "envelope", "text"])
async def test_I5_damage_is_reported_and_never_served(store: RedisStore, form: str) -> None:
    key = store.prefix + "a"
    if form == "document":
        await store.put(SyncItem.from_json("a", {"n": 1}))
        await store.client.execute_command("JSON.SET", key, "$.payload.n", "2")
    elif form == "envelope":
        await store.put(SyncItem("a", b"\x00\x01"))
        await store.client.setrange(key, await store.client.strlen(key) - 1, b"\x02")
    else:
        await store.client.set(key, TEXT_B.replace(b"bin.1", b"a"))
    fetched = await store.fetch(["a"])
    assert set(fetched.corrupt) == {"a"}
    assert fetched.items == {}
    with pytest.raises(Corruption):
        await store.get("a")
    with pytest.raises(Corruption):
        await store.get_many(["a"])
    # What is damaged can be replaced.
    assert await store.put(SyncItem("a", b"\x07"))
    assert await store.get("a") == SyncItem("a", b"\x07", updated_at=(await store.get("a")).updated_at)  # type: ignore[union-attr]  # it is there


@pytest.mark.parametrize("item", [SyncItem.from_json("other", {"n": 1}), SyncItem("other", b"\x00")])
async def test_I5_a_value_under_another_ids_key_is_damage(store: RedisStore, item: SyncItem) -> None:
    await store.put(item)
    await store.client.copy(store.prefix + "other", store.prefix + "a")
    assert set((await store.fetch(["a"])).corrupt) == {"a"}


def test_every_cut_of_an_envelope_is_damage_and_never_an_item() -> None:
    whole = to_envelope(SyncItem("a", b"\x00\x01\x02", **FULL))
    for end in range(2, len(whole)):
        assert isinstance(read_string("a", whole[:end]), Corruption)


@given(st.binary())
@example(b"\xf5\x01")
@example(b"\xf5\x01" + b"0" * 60)
def test_any_bytes_at_a_key_are_read_without_a_crash(value: bytes) -> None:
    for found in (read_string("a", value), read_document("a", value)):
        assert found is None or isinstance(found, Corruption | Unverified)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda children: st.lists(children, max_size=5) | st.dictionaries(st.text(), children, max_size=5),
    max_leaves=20,
)


@st.composite
def json_texts(draw: st.DrawFn) -> bytes:
    value = draw(json_values)
    text = json.dumps(
        value,
        ensure_ascii=draw(st.booleans()),
        indent=draw(st.sampled_from([None, 1])),
        separators=draw(st.sampled_from([(",", ":"), (" , ", " : "), (",", ": ")])),
        sort_keys=draw(st.booleans()),
    )
    return text.encode("utf-8", "surrogatepass")


@settings(max_examples=400)
@given(content=json_texts() | st.binary(max_size=300))
async def test_I5_any_bytes_come_back_from_redis_byte_for_byte(store: RedisStore, content: bytes) -> None:
    item = SyncItem("a", content)
    await store.put(item)
    assert same(item, (await store.fetch(["a"])).items.get("a"))


@settings(max_examples=300)
@given(value=json_values)
async def test_I5_any_json_value_comes_back_from_redis_byte_for_byte(store: RedisStore, value: Any) -> None:
    try:
        item = SyncItem.from_json("a", value)
    except ValueError:  # a lone surrogate, or an integer that no JSON reader takes
        return
    await store.put(item)
    assert same(item, (await store.fetch(["a"])).items.get("a"))


@settings(max_examples=300)
@given(number=st.floats(allow_nan=False, allow_infinity=False))
async def test_I5_any_float_comes_back_from_redis_byte_for_byte(store: RedisStore, number: float) -> None:
    item = SyncItem.from_json("a", {"n": [number]})
    await store.put(item)
    assert same(item, (await store.fetch(["a"])).items.get("a"))
