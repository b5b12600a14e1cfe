"""Rows of the item table: what is written for an item, what is read from any writer's row, what a prefix means."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sync_engine.errors import Corruption
from sync_engine.item import ContentType, SyncItem
from sync_engine.storage.sql import tables
from sync_engine.storage.sql.rows import NoItem, Row, item_of, row_of, successor

texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20)

ORIGINAL_B = SyncItem(
    "vector.b",
    '[1,"é",null,true]'.encode(),
    updated_at=1_700_000_000_000,
    state="delta",
    access_count=5,
    last_accessed=1_700_000_001_000,
    batch_id="6f9619ff-8b86-4d01-b42d-00cf4fc964ff",
    home_instance_id="node-a",
    trace_parent="00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
)


def as_read(values: tuple[Any, ...]) -> Row:
    """A written row as a SELECT answers it: payload as bytes."""
    row = list(values)
    if row[4] is not None:
        row[4] = row[4].encode()
    return tuple(row)


def row(**changes: Any) -> Row:
    names = [column.name for column in tables.items.columns if column.name != "merkle_dirty"]
    values = dict(zip(names, as_read(row_of(ORIGINAL_B, 0)), strict=True))
    assert changes.keys() <= values.keys()
    return tuple((values | changes).values())


def test_the_columns_are_the_originals_in_its_order_and_ours_at_the_end() -> None:
    assert [column.name for column in tables.items.columns] == [
        "id",
        "version",
        "timestamp",
        "payload_hash",
        "payload",
        "payload_blob",
        "audit",
        "merkle_dirty",
        "state",
        "access_count",
        "last_accessed",
        "stamp",
    ]


def test_the_row_of_vector_b_is_the_originals() -> None:
    assert row_of(ORIGINAL_B, 0) == (
        "vector.b",
        1,
        1_700_000_000_000,
        "247e33612ea8858d596f74a99cf9fd3ad570263e46d8e0b4c28d5e24e041617e",
        '[1,"é",null,true]',
        None,
        (
            '{"batch":"6f9619ff-8b86-4d01-b42d-00cf4fc964ff","home":"node-a",'
            '"trace":"00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"}'
        ),
        "delta",
        5,
        1_700_000_001_000,
        None,
    )


def test_the_row_of_vector_a_keeps_spaces_key_order_and_digits() -> None:
    content = b'{"role": "admin", "name": "Alice", "score": 1.50}'
    values = row_of(SyncItem("user.alice", content, version=3, updated_at=1_767_084_657_058), 7)
    assert values[3:7] == (
        "16abbfef8b4d7f5f93fab4b33fadf0634d8f80ade5661408f4edf007dac44dbf",
        content.decode(),
        None,
        None,
    )
    assert values[-1] == 7


def test_binary_content_goes_to_the_blob_and_never_to_both() -> None:
    values = row_of(SyncItem("b", b"\xff\0"), 0)
    assert values[4:6] == (None, b"\xff\0")
    item = item_of(as_read(values))
    assert isinstance(item, SyncItem)
    assert item.content_type is ContentType.BINARY


@given(
    st.binary(max_size=40) | texts.map(lambda text: f'{{"k": "{text.encode().hex()}"}}'.encode()),
    st.one_of(st.none(), texts),
    st.one_of(st.none(), texts),
    st.floats(allow_nan=False, allow_infinity=False),
    st.integers(0, 2**63 - 1),
)
def test_I5_an_item_comes_back_from_its_row(
    content: bytes, home: str | None, trace_state: str | None, score: float, number: int
) -> None:
    item = SyncItem(
        "id",
        content,
        home_instance_id=home,
        trace_state=trace_state,
        priority_score=score,
        version=number,
        batch_id=home,
        access_count=number,
        last_accessed=number,
    )
    back = item_of(as_read(row_of(item, number)))
    assert isinstance(back, SyncItem)
    assert back == item
    assert (back.batch_id, back.stamp, back.access_count, back.last_accessed) == (home, number, number, number)
    assert back.content_hash == hashlib.sha256(content).hexdigest()


def test_a_row_whose_content_fails_its_hash_is_corruption() -> None:
    wrong = item_of(row(payload=b"[1]"))
    assert isinstance(wrong, Corruption)
    assert not isinstance(wrong, NoItem)
    assert wrong.expected == ORIGINAL_B.content_hash
    assert wrong.actual == hashlib.sha256(b"[1]").hexdigest()


@pytest.mark.parametrize("absent", [None, ""])
def test_a_row_without_hash_is_an_item(absent: str | None) -> None:
    item = item_of(row(payload_hash=absent, audit=None))
    assert isinstance(item, SyncItem)
    assert item.content == ORIGINAL_B.content
    assert item.content_hash == ORIGINAL_B.content_hash


@pytest.mark.parametrize(
    "changes",
    [
        {"payload": None},
        {"id": "merkle:a"},
        {"state": "s" * 33},
        {"version": -1},
        {"payload_hash": None, "payload": b"not json"},
    ],
    ids=str,
)
def test_a_row_that_no_rule_makes_an_item_of_is_said_to_be_none(changes: dict[str, Any]) -> None:
    assert isinstance(item_of(row(**changes)), NoItem)


@pytest.mark.parametrize("audit", ["", "[]", "{", '{"batch": 5, "home": null, "priority": true}', "\0"])
def test_an_audit_that_says_nothing_sensible_costs_the_labels_alone(audit: str) -> None:
    item = item_of(row(audit=audit))
    assert isinstance(item, SyncItem)
    assert (item.batch_id, item.home_instance_id, item.priority_score) == (None, None, 0.0)


@given(texts, texts)
def test_Q12_the_range_of_a_prefix_is_startswith(prefix: str, text: str) -> None:
    above = successor(prefix)
    for candidate in (text, prefix + text, prefix):
        low, high = prefix.encode(), None if above is None else above.encode()
        inside = low <= candidate.encode() and (high is None or candidate.encode() < high)
        assert inside == candidate.startswith(prefix)


@pytest.mark.parametrize(
    ("prefix", "above"),
    [
        ("", None),
        ("a", "b"),
        ("user_", "user`"),
        ("\x7f", "\x80"),
        ("\ud7ff", "\ue000"),
        ("\U0010ffff", None),
        ("a\U0010ffff\U0010ffff", "b"),
        ("😀", "😁"),
    ],
)
def test_the_successor_of_a_prefix(prefix: str, above: str | None) -> None:
    assert successor(prefix) == above
