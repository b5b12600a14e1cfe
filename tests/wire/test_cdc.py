"""The fields of the change stream: the original's vectors, ours, and what a reader makes of hostile ones."""

from __future__ import annotations

import hashlib
import threading
import tracemalloc
from typing import Any

import orjson
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from sync_engine.errors import Corruption, InvalidId, InvalidItem, StoreError
from sync_engine.item import ContentType, Op, SyncItem
from sync_engine.storage.redis.cdc_entry import BadEntry, CdcEntry, CorruptEntry, MalformedEntry
from sync_engine.storage.redis.cdc_fields import decode, fields_of, fields_of_op

MAGIC = b"\x28\xb5\x2f\xfd"
JOHN = (
    b'{"name":"John Doe","email":"john@example.com","data":"some repeated data repeated data repeated data '
    b'repeated data"}'
)
JOHN_HASH = "c32bee4887f5c64ada5d93576b10ee9a81b1bdca9355b1642ad46ab9d356834c"
JOHN_DATA = bytes.fromhex(
    "28b52ffd0058350200a2440f15a03907f8c87656ae45139e8f6ff76d79f726ff2b104bdd8c0ebdf9ecc71d13e9a99b514d3109e08aa1"
    "93072ba5d15355185fd3a7702be5d0d3a357950100c8806614"
)
META = b'{"content_type":"binary","version":2,"updated_at":1000,"trace_parent":"00-trace-span-01"}'

compress = zstandard.ZstdCompressor(level=3, write_content_size=False).compress


def sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def named(fields: list[bytes]) -> dict[bytes, bytes]:
    return dict(zip(fields[::2], fields[1::2], strict=True))


def originals(content: bytes, data: bytes, content_hash: str | None = None) -> list[bytes]:
    """A PUT as the original writes it."""
    content_hash = sha(content) if content_hash is None else content_hash
    return [b"op", b"PUT", b"key", b"k", b"hash", content_hash.encode(), b"data", data, b"meta", META]


def ours(**changed: bytes | None) -> list[bytes]:
    """A PUT of ours, with some fields changed or, where None, left out."""
    item = SyncItem("k", b"\x00content", stamp=5, state="s", updated_at=1, home_instance_id="h", expires_at=9)
    told = named([*fields_of(CdcEntry.put(item)), b"writer", b"w", b"seq", b"7"])
    told |= {name.encode(): value for name, value in changed.items()}
    return [part for name, value in told.items() if value is not None for part in (name, value)]


# What is written.


def test_a_delete_begins_with_the_original_s_fields() -> None:
    fields = fields_of(CdcEntry.delete("uk.nhs.patient.12345", 77))
    assert fields == [b"op", b"DEL", b"key", b"uk.nhs.patient.12345", b"stamp", b"77"]


def test_a_put_begins_with_the_original_s_fields_in_their_order() -> None:
    item = SyncItem(
        "test.key",
        b"data",
        content_type=ContentType.BINARY,
        version=2,
        updated_at=1000,
        trace_parent="00-trace-span-01",
        state="delta",
        home_instance_id="node-a",
        stamp=2**63 - 1,
        expires_at=5,
    )
    assert list(named(fields_of(CdcEntry.put(item))).items()) == [
        (b"op", b"PUT"),
        (b"key", b"test.key"),
        (b"hash", sha(b"data").encode()),
        (b"data", b"data"),
        (b"meta", META),
        (b"state", b"delta"),
        (b"home", b"node-a"),
        (b"enc", b"raw"),
        (b"stamp", b"9223372036854775807"),
        (b"expires_at", b"5"),
    ]


def test_meta_without_a_trace() -> None:
    item = SyncItem("k", b"{}", version=3, updated_at=1735776000000)
    told = named(fields_of(CdcEntry.put(item)))
    assert told[b"meta"] == b'{"content_type":"json","version":3,"updated_at":1735776000000}'
    assert b"home" not in told
    assert b"expires_at" not in told


def test_a_trace_is_escaped_in_meta() -> None:
    trace = '"\\\n\x01é😀'
    entry = CdcEntry.put(SyncItem("k", b"", trace_parent=trace))
    assert orjson.loads(named(fields_of(entry))[b"meta"])["trace_parent"] == trace
    assert decode("1-0", fields_of(entry)).trace_parent == trace


@pytest.mark.parametrize(
    ("content", "enc"),
    [
        pytest.param(b"a" * 63, b"raw", id="63-bytes"),
        pytest.param(b"a" * 64, b"zstd", id="64-bytes"),
        pytest.param(bytes(range(256)), b"raw", id="not-smaller-compressed"),
        pytest.param(JOHN, b"zstd", id="the-original-s-example"),
        pytest.param(b"", b"raw", id="empty"),
    ],
)
def test_content_is_compressed_from_64_bytes_where_that_is_smaller(content: bytes, enc: bytes) -> None:
    told = named(fields_of(CdcEntry.put(SyncItem("k", content))))
    assert told[b"enc"] == enc
    if enc == b"raw":
        assert told[b"data"] == content
    else:
        assert len(told[b"data"]) < len(content)
        assert zstandard.ZstdDecompressor().decompress(told[b"data"]) == content


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(MAGIC, id="magic-alone"),
        pytest.param(MAGIC + b"x" * 100, id="no-frame"),
        pytest.param(compress(b"inner" * 100), id="a-frame"),
        pytest.param(compress(compress(b"inner" * 100)), id="a-frame-in-a-frame"),
    ],
)
def test_C3_content_that_begins_with_the_magic_is_wrapped_once_more(content: bytes) -> None:
    fields = fields_of(CdcEntry.put(SyncItem("k", content)))
    told = named(fields)
    assert told[b"enc"] == b"zstd"
    # The original decompresses whatever begins with the magic, once.
    assert zstandard.ZstdDecompressor().decompress(told[b"data"]) == content
    assert decode("1-0", fields).content == content
    without_enc = [part for name, value in told.items() if name != b"enc" for part in (name, value)]
    assert decode("1-0", without_enc).content == content


def test_each_thread_compresses_for_itself() -> None:
    failed: list[Exception] = []

    def work(seed: int) -> None:
        for n in range(300):
            content = b"%d" % seed * (20 + n)
            if decode("1-0", fields_of(CdcEntry.put(SyncItem("k", content)))).content != content:
                failed.append(AssertionError(f"{seed} {n}"))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []


def put(**told: Any) -> Op:
    item = SyncItem("k", b"content", state="s", **told)
    return Op(kind="put", object_id="k", stamp=9, item=item)


def test_an_operation_tells_its_stamp_and_the_end_of_the_item_s_life() -> None:
    assert named(fields_of_op(put(stamp=3)))[b"stamp"] == b"9"
    assert named(fields_of_op(put(expires_at=5)))[b"expires_at"] == b"5"
    item = SyncItem("k", b"content")
    copy = Op(kind="put", object_id="k", stamp=9, item=item, redis_expires_at=5)
    assert b"expires_at" not in named(fields_of_op(copy)), "the end of a copy is not that of the item"
    alone = Op(kind="put", object_id="k", stamp=9, item=item, redis_expires_at=5, sql=False)
    assert named(fields_of_op(alone))[b"expires_at"] == b"5"


def test_a_restate_tells_the_whole_item_or_nothing() -> None:
    item = SyncItem("k", b"content", state="new")
    told = named(fields_of_op(Op(kind="restate", object_id="k", stamp=9, state="new", item=item)))
    assert (told[b"op"], told[b"state"], told[b"stamp"]) == (b"PUT", b"new", b"9")
    assert fields_of_op(Op(kind="restate", object_id="k", stamp=9, state="new")) == []


def test_a_put_that_redis_does_not_keep_is_told_all_the_same() -> None:
    op = Op(kind="put", object_id="k", stamp=9, item=SyncItem("k", b"content"), redis=False)
    assert named(fields_of_op(op))[b"op"] == b"PUT"


def test_a_delete_is_told_and_a_fill_is_not() -> None:
    assert fields_of_op(Op(kind="delete", object_id="é", stamp=9)) == fields_of(CdcEntry.delete("é", 9))
    fill = Op(kind="put", object_id="k", stamp=9, item=SyncItem("k", b"content"), fill=True)
    assert fields_of_op(fill) == []


@pytest.mark.parametrize(
    ("entry", "field"),
    [
        pytest.param(CdcEntry("PUT", "k"), "op", id="a-put-without-content"),
        pytest.param(CdcEntry("NOP", "k"), "op", id="no-such-op"),
        pytest.param(CdcEntry("PUT", "k", b"x", "0" * 64), "content_hash", id="another-hash"),
        pytest.param(CdcEntry("PUT", "k", b"x", content_type=ContentType.JSON), "content", id="json-that-is-none"),
        pytest.param(CdcEntry("PUT", "k", b"x", state=""), "state", id="no-state"),
        pytest.param(CdcEntry("PUT", "k", b"x", version=-1), "version", id="negative-version"),
        pytest.param(CdcEntry.delete("k", -1), "stamp", id="negative-stamp"),
        pytest.param(CdcEntry.delete("k", 2**63), "stamp", id="stamp-of-65-bits"),
    ],
)
def test_a_bad_entry_is_refused_before_it_is_written(entry: CdcEntry, field: str) -> None:
    with pytest.raises(InvalidItem) as refused:
        fields_of(entry)
    assert refused.value.field == field


@pytest.mark.parametrize("object_id", ["", "a\0b", "\ud800", "x" * 256, "state:x", "cdc"])
@pytest.mark.parametrize("op", ["PUT", "DEL"])
def test_a_bad_id_is_refused_before_it_is_written(op: Any, object_id: str) -> None:
    with pytest.raises(InvalidId):
        fields_of(CdcEntry(op, object_id, b"x" if op == "PUT" else None))


# What is read.


@given(
    content=st.one_of(st.binary(), st.binary(max_size=40).map(lambda b: b * 9), st.binary().map(lambda b: MAGIC + b)),
    object_id=st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1, max_size=255),
    state=st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1, max_size=32),
    home=st.none() | st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1),
    version=st.integers(0, 2**63 - 1),
    updated_at=st.integers(-(2**63) + 1, 2**63 - 1),
    stamp=st.integers(0, 2**63 - 1),
    expires_at=st.none() | st.integers(-(2**63) + 1, 2**63 - 1),
)
def test_what_is_told_is_read(object_id: str, content: bytes, home: str | None, **told: Any) -> None:
    try:
        item = SyncItem(object_id, content, home_instance_id=home, **told)
    except InvalidId:
        return
    fields = [*fields_of(CdcEntry.put(item)), b"writer", "wé".encode(), b"seq", b"12"]
    entry = decode("5-1", fields)
    assert entry.item() == item
    assert (entry.item().stamp, entry.item().expires_at) == (item.stamp, item.expires_at)
    assert (entry.writer, entry.seq, entry.position, entry.gap) == ("wé", 12, "5-1", None)
    assert entry.content_hash == item.content_hash


def test_the_original_s_delete() -> None:
    entry = decode("1-0", [b"op", b"DEL", b"key", b"uk.nhs.patient.12345"])
    assert (entry.op, entry.object_id, entry.stamp, entry.seq) == ("DEL", "uk.nhs.patient.12345", 0, 0)
    with pytest.raises(InvalidItem):
        entry.item()


@pytest.mark.parametrize(
    ("content", "data"),
    [
        pytest.param(JOHN, JOHN_DATA, id="compressed"),
        pytest.param(b"a" * 64, bytes.fromhex("28b52ffd00584500001061610100930016"), id="64-a"),
        pytest.param(b"a" * 63, b"a" * 63, id="63-a"),
        pytest.param(compress(b"inner" * 100), compress(b"inner" * 100), id="C3-a-frame-passed-through"),
        pytest.param(MAGIC + b"no frame", MAGIC + b"no frame", id="C3-magic-passed-through"),
        pytest.param(compress(b"inner" * 100), compress(compress(b"inner" * 100)), id="a-frame-compressed"),
    ],
)
def test_the_original_s_put(content: bytes, data: bytes) -> None:
    entry = decode("1-0", originals(content, data))
    assert entry.content == content
    assert (entry.state, entry.home_instance_id, entry.stamp, entry.expires_at, entry.seq) == (
        "default",
        None,
        0,
        None,
        0,
    )
    assert (entry.version, entry.updated_at, entry.trace_parent) == (2, 1000, "00-trace-span-01")
    assert entry.item().content == content


def test_the_original_s_put_without_a_hash() -> None:
    entry = decode("1-0", originals(JOHN, JOHN_DATA, ""))
    assert (entry.content, entry.content_hash) == (JOHN, "")
    assert entry.item().content_hash == JOHN_HASH
    with pytest.raises(MalformedEntry):
        decode("1-0", originals(b"", MAGIC + b"no frame", ""))


def test_a_frame_with_a_checksum_and_no_size_is_read() -> None:
    frame = zstandard.ZstdCompressor(level=19, write_checksum=True, write_content_size=False).compress(JOHN)
    assert decode("1-0", originals(JOHN, frame)).content == JOHN


def test_text_and_unknown_fields_are_read_as_well() -> None:
    entry = decode("1-0", ["op", "DEL", "key", "é", "later", "whatever"])
    assert entry.object_id == "é"


def test_a_wrong_hash_is_corruption_that_names_the_entry() -> None:
    with pytest.raises(CorruptEntry) as bad:
        decode("5-1", originals(b"data", b"data", "hash123"))
    assert isinstance(bad.value, Corruption)
    assert (bad.value.position, bad.value.object_id, bad.value.expected) == ("5-1", "k", "hash123")
    assert bad.value.actual == sha(b"data")


MALFORMED = [
    ("op", {"op": None}),
    ("op", {"op": b"put"}),
    ("key", {"key": None}),
    ("key", {"key": b""}),
    ("key", {"key": b"\xff"}),
    ("hash", {"hash": None}),
    ("hash", {"hash": b"\xff"}),
    ("data", {"data": None}),
    ("data", {"data": b"no frame", "enc": b"zstd"}),
    ("data", {"data": compress(b"a" * 99)[:-1], "enc": b"zstd"}),
    ("data", {"data": compress(b"a" * 99) + b"x", "enc": b"zstd"}),
    ("data", {"data": zstandard.compress(b"a" * 99) + b"x", "enc": b"zstd"}),
    ("data", {"data": compress(b"a" * 99) * 2, "enc": b"zstd"}),
    ("data", {"data": b"", "enc": b"zstd"}),
    ("enc", {"enc": b"gzip"}),
    ("meta", {"meta": None}),
    ("meta", {"meta": b"{"}),
    ("meta", {"meta": b'{"content_type":"text","version":1,"updated_at":1}'}),
    ("meta", {"meta": b'{"content_type":"json","version":"1","updated_at":1}'}),
    ("meta", {"meta": b'{"content_type":"json","version":1}'}),
    ("meta", {"meta": b"\xff"}),
    ("meta", {"meta": b"[" * 100_000}),
    ("state", {"state": b""}),
    ("state", {"state": b"x" * 33}),
    ("stamp", {"stamp": b"-1"}),
    ("stamp", {"stamp": b"1_0"}),
    ("stamp", {"stamp": b" 1"}),
    ("stamp", {"stamp": b"9223372036854775808"}),
    ("stamp", {"stamp": b"9" * 10_000}),
    ("expires_at", {"expires_at": b"soon"}),
    ("expires_at", {"expires_at": b""}),
    ("seq", {"seq": b"x"}),
    ("writer", {"writer": b"\xff"}),
    ("home", {"home": b"\xff"}),
]


@pytest.mark.parametrize(
    ("field", "changed"), MALFORMED, ids=[f"{n}-{field}" for n, (field, _) in enumerate(MALFORMED)]
)
def test_a_malformed_entry_is_told_with_its_field_and_place(field: str, changed: dict[str, bytes | None]) -> None:
    with pytest.raises(MalformedEntry) as bad:
        decode("5-1", ours(**changed))
    assert (bad.value.position, bad.value.field) == ("5-1", field)
    assert isinstance(bad.value, StoreError)
    assert isinstance(bad.value, BadEntry)


def test_half_a_pair_is_malformed() -> None:
    with pytest.raises(MalformedEntry):
        decode("5-1", [b"op", b"DEL", b"key"])


@given(st.lists(st.binary(max_size=20)))
def test_no_bytes_raise_anything_else(fields: list[bytes]) -> None:
    with pytest.raises(BadEntry):
        decode("5-1", fields)


@given(st.binary(max_size=200))
def test_no_data_raises_anything_else(noise: bytes) -> None:
    for data in (MAGIC + noise, noise):
        try:
            decode("5-1", originals(b"", data, "x"))
        except BadEntry:
            continue
        pytest.fail("a hash that nothing has was accepted")


# A bomb.

BOMB = 64 * 1024 * 1024


def _forged() -> bytes:
    """A frame that tells 64 KiB and holds 64 MiB."""
    frame = zstandard.ZstdCompressor(level=3).compress(bytes(BOMB))
    return frame.replace(BOMB.to_bytes(4, "little"), (64 * 1024).to_bytes(4, "little"), 1)


@pytest.mark.parametrize(
    "frame",
    [
        pytest.param(zstandard.ZstdCompressor(level=3).compress(bytes(BOMB)), id="size-told"),
        pytest.param(compress(bytes(BOMB)), id="size-not-told"),
        pytest.param(_forged(), id="size-forged"),
        pytest.param(MAGIC + b"\x00\xa8\x01\x00\x00", id="window-of-2-GiB"),
    ],
)
@pytest.mark.parametrize("enc", [b"zstd", None], ids=["enc", "no-enc"])
def test_C3_a_decompression_bomb_is_refused_before_it_is_made(frame: bytes, enc: bytes | None) -> None:
    fields = ours(data=frame, enc=enc)
    tracemalloc.start()
    try:
        with pytest.raises(MalformedEntry) as bad:
            decode("5-1", fields, content_bytes_max=1024 * 1024)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert bad.value.field == "data"
    assert peak < BOMB // 8


@pytest.mark.parametrize("told", [True, False], ids=["size-told", "size-not-told"])
def test_content_of_exactly_the_limit_is_read(told: bool) -> None:
    content = bytes(3 * 1024 * 1024)
    fields = originals(content, zstandard.ZstdCompressor(write_content_size=told).compress(content))
    assert decode("1-0", fields, content_bytes_max=len(content)).content == content
    with pytest.raises(MalformedEntry):
        decode("1-0", fields, content_bytes_max=len(content) - 1)


def test_a_representation_shows_no_content() -> None:
    assert "secret" not in repr(CdcEntry.put(SyncItem("k", b"secret")))
