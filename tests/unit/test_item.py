"""The item: every limit and one beyond it, what may be replaced, and that nothing derived goes stale."""

from __future__ import annotations

import hashlib
import time
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sync_engine import ContentType, InvalidId, InvalidItem, InvalidState, SyncItem
from sync_engine.item import Op, check_id, check_state

EMOJI = "\U0001f600"

IDS = [
    "a",
    " ",
    "a" * 255,
    EMOJI,
    EMOJI * 255,
    "user:1",
    "state",
    "state.",
    "States:x",
    "STATE:x",
    " state:x",
    "xstate:x",
    "merkle",
    "merkles:x",
    "Merkle:x",
    "idx",
    "idxs:1",
    "__local__",
    "__local__.x",
    "_local__:x",
    "__LOCAL__:x",
    "CDC",
    "cdc ",
    "cdc:",
    "cdcs",
    "xcdc",
    "a\nb",
    "\x01",
    "\x7f",
    "*",
    "a[b]?",
    "{slot}",
    "../../etc/passwd",
    "'; DROP TABLE sync_items; --",
    "100%_",
    "e\u0301",
    "\u00e9",
    "\ufeff",
    "\u202e",
    "\uffff",
    "\U0010ffff",
]
BAD_IDS: list[tuple[Any, str]] = [
    ("", "0 characters"),
    ("a" * 256, "256 characters"),
    (EMOJI * 256, "256 characters"),
    ("\0", "NUL"),
    ("a\0b", "NUL"),
    ("é\0", "NUL"),
    ("\ud800", "surrogate"),
    ("a\udfffb", "surrogate"),
    ("state:", "reserved"),
    ("state:default", "reserved"),
    ("merkle:", "reserved"),
    ("merkle:hash:", "reserved"),
    ("idx:", "reserved"),
    ("idx:users", "reserved"),
    ("__local__:", "reserved"),
    ("__local__:cdc", "reserved"),
    ("state:é", "reserved"),
    ("cdc", "reserved"),
    (None, "NoneType"),
    (1, "int"),
    (b"a", "bytes"),
    (["a"], "list"),
]


@pytest.mark.parametrize("object_id", IDS, ids=ascii)
def test_an_id_is_1_to_255_characters_of_any_text(object_id: str) -> None:
    assert SyncItem(object_id, b"").object_id == object_id
    assert check_id(object_id) is object_id


@pytest.mark.parametrize(("object_id", "why"), BAD_IDS, ids=lambda told: ascii(told)[:20])
def test_R12_an_id_that_breaks_a_rule_is_refused_with_the_rule(object_id: Any, why: str) -> None:
    with pytest.raises(InvalidId, match=why) as refused:
        SyncItem(object_id, b"")
    assert refused.value.field == "object_id"
    with pytest.raises(InvalidId):
        check_id(object_id)


@pytest.mark.parametrize("state", ["s", "s" * 32, EMOJI * 32, " ", "a:b", "\n", "é"], ids=ascii)
def test_a_state_is_1_to_32_characters_of_any_text(state: str) -> None:
    assert SyncItem("a", b"", state=state).state == check_state(state) == state


@pytest.mark.parametrize("state", ["", "s" * 33, EMOJI * 33, "a\0", "\ud800", None, 1, b"s"], ids=ascii)
def test_a_state_that_breaks_a_rule_is_refused(state: Any) -> None:
    with pytest.raises(InvalidState) as refused:
        SyncItem("a", b"", state=state)
    assert refused.value.field == "state"
    with pytest.raises(InvalidState):
        SyncItem("a", b"").with_state(state)


GOOD: list[tuple[str, Any]] = [
    ("version", 0),
    ("version", 2**63 - 1),
    ("updated_at", 0),
    ("updated_at", -1),
    ("updated_at", 2**63 - 1),
    ("access_count", 2**63 - 1),
    ("last_accessed", 1),
    ("stamp", 2**63 - 1),
    ("priority_score", 1.5),
    ("priority_score", -0.0),
    ("priority_score", 1e308),
    ("home_instance_id", ""),
    ("trace_parent", "t" * 512),
    ("trace_state", EMOJI * 512),
    ("batch_id", "b"),
]
BAD: list[tuple[str, Any]] = [
    ("version", -1),
    ("version", 2**63),
    ("version", True),
    ("version", 1.0),
    ("version", "1"),
    ("version", None),
    ("updated_at", 2**63),
    ("updated_at", -(2**64)),
    ("updated_at", 1.5),
    ("updated_at", True),
    ("updated_at", "now"),
    ("access_count", -1),
    ("last_accessed", -1),
    ("last_accessed", 0.5),
    ("stamp", 2**63),
    ("priority_score", float("nan")),
    ("priority_score", float("inf")),
    ("priority_score", True),
    ("priority_score", 2**53),
    ("priority_score", "high"),
    ("priority_score", None),
    ("home_instance_id", "h" * 513),
    ("home_instance_id", "\0"),
    ("home_instance_id", "\ud800"),
    ("home_instance_id", 1),
    ("trace_parent", "t" * 513),
    ("trace_state", b"t"),
    ("batch_id", "\udc00"),
    ("content_type", "Json"),
    ("content_type", 1),
    ("content", "text"),
    ("content", None),
    ("content", 5),
    ("content", [1, 2]),
]


@pytest.mark.parametrize(("field", "value"), GOOD, ids=repr)
def test_a_field_takes_its_whole_range(field: str, value: Any) -> None:
    assert getattr(SyncItem("a", b"", **{field: value}), field) == value
    assert getattr(SyncItem("a", b"").replace(**{field: value}), field) == value


@pytest.mark.parametrize(("field", "value"), BAD, ids=lambda told: repr(told)[:20])
def test_what_a_field_does_not_take_is_refused_by_its_name(field: str, value: Any) -> None:
    fields = {"content": b"", field: value}
    with pytest.raises(InvalidItem, match=f"^{field}") as refused:
        SyncItem("a", **fields)
    assert refused.value.field == field
    with pytest.raises(InvalidItem, match=f"^{field}"):
        SyncItem("a", b"").replace(**{field: value})


def test_the_priority_may_be_given_as_an_integer() -> None:
    score = SyncItem("a", b"", priority_score=2).priority_score
    assert (type(score), score) == (float, 2.0)


@pytest.mark.parametrize(
    "content", [bytearray(b"{}"), memoryview(b"{}"), memoryview(b"x{}y")[1:3]], ids=["bytearray", "memoryview", "slice"]
)
def test_content_is_copied_out_of_other_buffers(content: Any) -> None:
    item = SyncItem("a", content)
    assert type(item.content) is bytes
    assert item.content == b"{}"
    if isinstance(content, bytearray):
        content[:] = b"[]"
        assert item.content == b"{}"
        assert item.content_hash == hashlib.sha256(b"{}").hexdigest()


def test_an_item_is_frozen_and_knows_no_further_fields() -> None:
    item = SyncItem("a", b"")
    with pytest.raises(AttributeError):
        item.content = b"other"  # type: ignore[misc]  # that it cannot is what is tested
    with pytest.raises(AttributeError):
        item.colour = "red"  # type: ignore[attr-defined]  # likewise
    with pytest.raises(TypeError):
        SyncItem("a", b"", colour="red")  # type: ignore[call-arg]  # likewise
    with pytest.raises(TypeError):
        item.replace(colour="red")
    with pytest.raises(TypeError):
        SyncItem("a", b"", "json")  # type: ignore[misc]  # likewise
    assert not hasattr(item, "__dict__")


def test_an_item_without_a_time_is_of_now() -> None:
    before = time.time_ns() // 1_000_000
    item = SyncItem("a", b"")
    assert before <= item.updated_at <= time.time_ns() // 1_000_000


def test_a_repr_tells_no_content() -> None:
    item = SyncItem.from_json("user.1", {"secret": "canary"}, state="hot")
    assert "canary" not in repr(item)
    assert "canary" not in str(item)
    assert "user.1" in repr(item)
    assert "hot" in repr(item)


def test_an_error_tells_no_content() -> None:
    with pytest.raises(InvalidItem) as refused:
        SyncItem("a", b"{canary", content_type="json")
    assert "canary" not in str(refused.value)


contents = st.one_of(
    st.binary(max_size=24),
    st.sampled_from([b"", b"{}", b"[1]", b'"x"', b'{"b":1, "a":2}', b"{", b"\xff", b"1", b"[" * 128 + b"]" * 128]),
)
states = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"), min_size=1, max_size=32)
changes = st.fixed_dictionaries(
    {},
    optional={
        "content": contents,
        "state": states,
        "version": st.integers(0, 2**63 - 1),
        "updated_at": st.integers(-(2**62), 2**62),
        "trace_parent": st.none() | states,
        "home_instance_id": st.none() | states,
        "content_type": st.sampled_from([None, "json", "binary"]),
    },
)


@given(contents, st.lists(changes, min_size=1, max_size=5), st.booleans())
def test_G14_no_chain_of_changes_leaves_a_stale_hash_type_or_size(
    content: bytes, chain: list[dict[str, Any]], look: bool
) -> None:
    """The original computed hash and size once, so that a changed item carried those of its past."""
    item = SyncItem("a", content)
    for change in chain:
        if look:
            assert item.content_hash, "a hash that has been asked for is kept, and must not be kept too long"
        try:
            item = item.replace(**change)
        except InvalidItem as refused:
            assert refused.field == "content"  # noqa: PT017  # only one of the two outcomes raises
            assert change["content_type"] == "json"
            continue
        for name, value in change.items():
            if name != "content_type":
                assert getattr(item, name) == value
        asked = change.get("content_type")
        detected = SyncItem("a", item.content).content_type
        if asked is not None:
            assert item.content_type == asked
        elif "content" in change or "content_type" in change:
            assert item.content_type is detected
        fresh = SyncItem("a", item.content, trace_parent=item.trace_parent, home_instance_id=item.home_instance_id)
        assert item.content_hash == fresh.content_hash == hashlib.sha256(item.content).hexdigest()
        assert item.size == fresh.size
        if item.content_type is ContentType.JSON:
            item.json()


def test_G14_a_canonical_item_given_new_content_is_checked_anew() -> None:
    item = SyncItem.from_json("a", {"n": 1})
    assert item.content_hash
    other = item.replace(content=b"\xff\x00")
    assert other.content_type is ContentType.BINARY
    assert other.content_hash == hashlib.sha256(b"\xff\x00").hexdigest()
    with pytest.raises(InvalidItem):
        item.replace(content=b"\xff", content_type="json")
    back = item.replace(content_type="binary")
    assert back.content_type is ContentType.BINARY
    with pytest.raises(InvalidItem):
        SyncItem("a", b"\xff").replace(content_type=ContentType.JSON)


@given(states, st.integers(0, 2**63 - 1))
def test_with_state_and_with_version_change_that_alone(state: str, version: int) -> None:
    item = SyncItem.from_json("a", {"n": 1}, trace_parent="t", home_instance_id="h", priority_score=0.5)
    moved = item.with_state(state).with_version(version)
    assert (moved.state, moved.version) == (state, version)
    assert moved.replace(state=item.state, version=item.version) == item
    assert moved.content is item.content
    assert item.state == "default"


def test_replace_checks_the_id_too() -> None:
    assert SyncItem("a", b"x").replace(object_id="b").object_id == "b"
    with pytest.raises(InvalidId):
        SyncItem("a", b"x").replace(object_id="cdc")


def test_equality_is_about_what_the_caller_said() -> None:
    item = SyncItem("a", b"x", updated_at=1)
    assert item == SyncItem("a", b"x", updated_at=1, stamp=5, access_count=3, batch_id="b", expires_at=7)
    assert hash(item) == hash(item.replace(stamp=5))
    for change in ({"content": b"y"}, {"state": "s"}, {"version": 2}, {"updated_at": 2}, {"trace_state": "t"}):
        assert item != item.replace(**change)
    assert item != "a"
    assert len({item, item.replace(stamp=9), item.replace(version=2)}) == 2


def test_an_operation_counts_its_item_or_its_own_bare_size() -> None:
    item = SyncItem("ab", b"12345")
    assert Op(kind="put", object_id="ab", stamp=1, item=item).size == item.size
    assert Op(kind="delete", object_id="ab", stamp=1).size == item.size - 5
    with pytest.raises(AttributeError):
        Op(kind="delete", object_id="a", stamp=1).stamp = 2  # type: ignore[misc]  # that it cannot is what is tested


def test_a_field_of_ours_cannot_be_given_by_position() -> None:
    with pytest.raises(TypeError):
        SyncItem("a")  # type: ignore[call-arg]  # that it cannot is what is tested
    assert msgspec.structs.fields(SyncItem)[0].name == "object_id"
