"""The bytes of the log: what is written is read back, and what was not written is never believed."""

from __future__ import annotations

import os
import random
from zlib import crc32

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sync_engine.errors import ConfigError
from sync_engine.item import ContentType, Op, SyncItem
from sync_engine.log_record import (
    FRAME_BYTES,
    HEADER_BYTES,
    SECTOR_BYTES,
    BadRecord,
    Header,
    decode_op,
    decode_settled,
    encode_op,
    encode_settled,
    frame,
    is_settled_mark,
    read_frame,
)
from sync_engine.log_segment import Scan, Segment, gaps, scan

FIRST = 1_000
COUNTS = st.integers(0, 2**63 - 1)
TEXTS = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=20)
LABELS = st.none() | TEXTS
IDS = TEXTS.map(lambda text: f"i{text}")
JSON_TEXTS = st.sampled_from([b"{}", b'{"a":1}', b'[1,{"b":null}]', b'"\xc3\xa4"', b' {"z":1,\n"a":1e3}'])


@st.composite
def ops(draw: st.DrawFn) -> Op:
    object_id, stamp, redis = draw(IDS), draw(COUNTS), draw(st.booleans())
    kind = draw(st.sampled_from(["put", "delete", "restate"]))
    item = None
    if kind == "put":
        item = SyncItem(
            object_id,
            draw(st.binary(max_size=60) | JSON_TEXTS),
            content_type=draw(st.sampled_from([None, ContentType.BINARY])),  # type: ignore[arg-type]  # None: detected
            version=draw(COUNTS),
            updated_at=draw(st.integers(-(2**63) + 1, 2**63 - 1)),
            state=f"s{draw(TEXTS)}",
            home_instance_id=draw(LABELS),
            trace_parent=draw(LABELS),
            trace_state=draw(LABELS),
            batch_id=draw(LABELS),
            priority_score=draw(st.floats(allow_nan=False, allow_infinity=False)),
            access_count=draw(COUNTS),
            last_accessed=draw(COUNTS),
            stamp=stamp,
            expires_at=draw(st.none() | COUNTS),
            sql_only=not redis,  # as admission stamps it; the log keeps it once
        )
    return Op(
        kind=kind,
        object_id=object_id,
        stamp=stamp,
        item=item,
        state=None if (only_in := draw(st.none() | st.none() | st.just("") | TEXTS)) is not None else draw(TEXTS),
        only_in_state=only_in,
        redis=redis,
        sql=draw(st.booleans()),
        redis_expires_at=draw(st.none() | COUNTS),
        if_version=draw(st.none() | COUNTS),
        fill=draw(st.booleans()),
    )


def told(op: Op) -> tuple[object, ...]:
    """Everything an operation says, down to the last field of its item."""
    item = op.item
    of_item = item and tuple(getattr(item, name) for name in item.__struct_fields__ if name not in ("_hash", "_form"))
    return (*(getattr(op, name) for name in op.__struct_fields__ if name != "item"), of_item)


# Operations and marks


@given(ops())
def test_an_operation_comes_back_as_it_was(op: Op) -> None:
    payload = encode_op(op)
    assert not is_settled_mark(payload)
    assert told(decode_op(payload)) == told(op)
    assert told(decode_op(memoryview(payload))) == told(op)


@pytest.mark.parametrize("form", [0, 1, 2])
def test_content_known_to_be_json_is_not_parsed_again(form: int) -> None:
    item = SyncItem("a", b"{}", content_type=ContentType.JSON, stamp=1, _form=form)
    back = decode_op(encode_op(Op(kind="put", object_id="a", stamp=1, item=item))).item
    assert back is not None
    assert back._form == (form or 2)  # unchecked content was checked when the item was made


@given(st.binary(max_size=80))
def test_bytes_that_are_no_operation_are_refused_and_nothing_else_happens(payload: bytes) -> None:
    try:
        op = decode_op(payload)
    except BadRecord:
        return
    assert isinstance(op, Op)


@given(st.sets(st.integers(0, 60) | COUNTS))
def test_marks_name_exactly_the_settled_records(seqs: set[int]) -> None:
    payloads = list(encode_settled(seqs))
    assert all(map(is_settled_mark, payloads))
    assert {seq for payload in payloads for run in decode_settled(payload) for seq in run} == seqs


def test_no_mark_grows_without_bound() -> None:
    payloads = list(encode_settled(range(0, 40_000, 2)))
    assert len(payloads) == 5
    assert sum(len(run) for payload in payloads for run in decode_settled(payload)) == 20_000


@pytest.mark.parametrize(
    "payload", [b"\x81\xa7settled\x91\x01", b"\x81\xa1x\x90", b"\x81", b"\x81\xa7settled\x91\xa1a"]
)
def test_a_mark_that_makes_no_sense_is_refused(payload: bytes) -> None:
    with pytest.raises(BadRecord):
        decode_settled(payload)


# Headers


@given(COUNTS, COUNTS, COUNTS, COUNTS, COUNTS)
def test_a_header_comes_back_as_it_was(first: int, previous: int, upto: int, last: int, stamp: int) -> None:
    header = Header(first, previous, upto, last, stamp)
    data = header.encode()
    assert len(data) == HEADER_BYTES
    assert Header.decode(data[:SECTOR_BYTES]) == Header.decode(data[SECTOR_BYTES:]) == header


def test_a_log_of_the_future_is_refused_rather_than_called_damaged() -> None:
    facts = bytearray(Header(1, 0).encode()[: SECTOR_BYTES - 4])
    facts[8] = 2
    with pytest.raises(ConfigError, match="format 2"):
        Header.decode(bytes(facts) + crc32(facts).to_bytes(4, "little"))


def test_a_sector_of_something_else_is_no_header() -> None:
    other = bytes(SECTOR_BYTES - 4)
    assert Header.decode(other + crc32(other).to_bytes(4, "little")) is None
    assert Header.decode(b"") is None


# Scanning a whole segment


def segment(payloads: list[bytes], first_seq: int = FIRST, acknowledged: int | None = None) -> bytes:
    """A segment of these operations, of which the first ``acknowledged`` lie below ``durable_upto``."""
    data = bytearray(HEADER_BYTES)
    acknowledged = len(payloads) if acknowledged is None else acknowledged
    upto = HEADER_BYTES
    for number, payload in enumerate(payloads):
        data += b"".join(frame(payload, first_seq + number, first_seq, len(data)))
        if number < acknowledged:
            upto = len(data)
    data[:HEADER_BYTES] = Header(first_seq, first_seq - 1, upto, first_seq + acknowledged - 1, 99).encode()
    return bytes(data)


def served(data: bytes, found: Scan) -> dict[int, bytes]:
    return {one.seq: data[one.start : one.end] for one in found.frames}


def small_ops(count: int) -> list[bytes]:
    return [encode_op(Op(kind="delete", object_id=f"k{number}", stamp=number)) for number in range(count)]


def test_no_changed_byte_of_a_log_of_200_records_goes_unnoticed() -> None:
    """Fault matrix row 13: each byte in turn, one random bit of it."""
    payloads = small_ops(200)
    whole = segment(payloads)
    wanted = {FIRST + number: payload for number, payload in enumerate(payloads)}
    rng = random.Random(13)
    data = bytearray(whole)
    for place in range(len(whole)):
        data[place] ^= 1 << rng.randrange(8)
        found = scan(data, FIRST)
        got = served(data, found)
        assert found.damage, f"byte {place} was changed and nobody noticed"
        assert got.items() <= wanted.items(), f"byte {place}: a record that nobody wrote"
        assert len(got) >= 199, f"byte {place}: it took more than its own record along"
        data[place] = whole[place]


def test_a_log_cut_at_any_length_is_reported_and_serves_what_is_whole() -> None:
    payloads = small_ops(200)
    whole = segment(payloads)
    ends = [one.end for one in scan(whole, FIRST).frames]
    for length in range(len(whole)):
        found = scan(whole[:length], FIRST)
        assert found.damage, f"cut at {length} and nobody noticed"
        assert len(found.frames) == sum(end <= length for end in ends)


@given(st.data())
@settings(max_examples=60)
def test_any_damage_is_reported_or_harmless_and_no_wrong_record_is_served(data: st.DataObject) -> None:
    payloads = [encode_op(op) for op in data.draw(st.lists(ops(), min_size=1, max_size=8))]
    whole = segment(payloads)
    broken = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(whole) - 1))
        junk = data.draw(st.binary(min_size=1, max_size=30))[: len(whole) - at]
        broken[at : at + len(junk)] = junk
    found = scan(broken, FIRST)
    wanted = {FIRST + number: payload for number, payload in enumerate(payloads)}
    assert served(bytes(broken), found).items() <= wanted.items()
    assert found.damage or bytes(broken) == whole


def test_beyond_what_was_acknowledged_damage_is_no_alarm_and_whole_records_are_kept() -> None:
    whole = segment(small_ops(10), acknowledged=6)
    ends = [one.end for one in scan(whole, FIRST).frames]
    for length in range(ends[5], len(whole)):
        found = scan(whole[:length], FIRST)
        assert not found.damage
        assert len(found.frames) == sum(end <= length for end in ends)
        assert found.end == max(end for end in ends if end <= length)


def test_with_both_headers_gone_every_record_still_comes_back() -> None:
    whole = segment(small_ops(20))
    found = scan(os.urandom(HEADER_BYTES) + whole[HEADER_BYTES:], FIRST)
    assert found.header is None
    assert len(found.damage) == 2
    assert len(found.frames) == 20


def test_a_log_kept_as_content_inside_a_damaged_log_is_not_mistaken_for_it() -> None:
    """Resynchronisation looks at every byte; records inside a record must not look like records of the log."""
    inner = segment(small_ops(30))
    outer = [encode_op(Op(kind="put", object_id="x", stamp=1, item=SyncItem("x", inner, stamp=1))), *small_ops(3)]
    data = bytearray(segment(outer))
    data[HEADER_BYTES + 4] ^= 0xFF  # the length of the first record: its inside is searched byte by byte
    found = scan(data, FIRST)
    assert [one.seq for one in found.frames] == [FIRST + 1, FIRST + 2, FIRST + 3]
    assert len(found.damage) == 1


def test_a_record_is_only_right_at_its_own_place() -> None:
    record = b"".join(frame(b"payload", 7, FIRST, 2_000))
    assert read_frame(memoryview(record), 0, FIRST, base=2_000) == (7, FRAME_BYTES, 7)
    assert read_frame(memoryview(record), 0, FIRST, base=2_001) is None
    assert read_frame(memoryview(record), 0, FIRST + 1, base=2_000) is None


def test_gaps_are_the_numbers_that_no_frame_has() -> None:
    frames = scan(segment(small_ops(10)), FIRST).frames
    kept = [one for one in frames if one.seq - FIRST in (1, 2, 5)]
    assert gaps(kept, FIRST, FIRST + 9) == [
        range(FIRST, FIRST + 1), range(FIRST + 3, FIRST + 5), range(FIRST + 6, FIRST + 10),
    ]  # fmt: skip
    assert gaps(frames, FIRST, FIRST + 9) == gaps([], FIRST, FIRST - 1) == []
    assert gaps(frames, FIRST, FIRST + 3) == []


def test_a_segment_counts_each_settled_record_once(tmp_path: os.PathLike[str]) -> None:
    one = Segment(tmp_path, 5)  # type: ignore[arg-type]  # any path will do
    one.grow(3)
    one.grow(2, settled=True)
    assert (one.live, one.holds(4), one.holds(5), one.holds(9), one.holds(10)) == (3, False, True, True, False)
    assert [one.settle(6), one.settle(6), one.settle(8)] == [True, False, False]
    assert one.live == 2
