"""What counts as JSON content, and the canonical text of a value: the tables of the stored formats, row by row."""

from __future__ import annotations

import hashlib
import json

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sync_engine import ContentType, InvalidItem, NotJson, SyncItem
from sync_engine.json_text import JSON_DEPTH_MAX, canonical_json, is_canonical, is_json

JSON, BINARY = ContentType.JSON, ContentType.BINARY

TABLE = {
    "empty": (b"", BINARY),
    "white space alone": (b" \t\r\n", BINARY),
    "form feed alone": (b"\x0c", BINARY),
    "object": (b'{"a":1}', JSON),
    "array": (b"[1,2]", JSON),
    "string": (b'"text"', JSON),
    "white space before": (b" \t\r\n{}", JSON),
    "form feed before": (b'\x0c{"a":1}', BINARY),
    "form feed between": (b'{"a":\x0c1}', BINARY),
    "vertical tab before": (b'\x0b{"a":1}', BINARY),
    "newline after": (b'{"a":1}\n', JSON),
    "letter after": (b'{"a":1}x', BINARY),
    "NUL after": (b'{"a":1}\0', BINARY),
    "two texts": (b"{}{}", BINARY),
    "byte order mark": (b"\xef\xbb\xbf{}", BINARY),
    "UTF-16": ('{"a":1}'.encode("utf-16"), BINARY),
    "UTF-16 without mark": ('{"a":1}'.encode("utf-16-le"), BINARY),
    "UTF-32": ('{"a":1}'.encode("utf-32"), BINARY),
    "bare number": (b"1", BINARY),
    "bare true": (b"true", BINARY),
    "bare null": (b"null", BINARY),
    "bare negative": (b"-1", BINARY),
    "NaN": (b'{"a":NaN}', BINARY),
    "Infinity": (b'{"a":Infinity}', BINARY),
    "minus Infinity": (b"[-Infinity]", BINARY),
    "number out of range": (b'{"a":1e400}', BINARY),
    "number that underflows": (b'{"a":1e-400}', JSON),
    "integer of 20 digits": (b"[18446744073709551616]", JSON),
    "integer of 30 digits": (b"[123456789012345678901234567890]", JSON),
    "lone surrogate escape": (b'{"a":"\\ud800"}', BINARY),
    "lone low surrogate escape": (b'{"a":"\\udc00x"}', BINARY),
    "surrogate pair escape": (b'{"a":"\\ud83d\\ude00"}', JSON),
    "surrogate in UTF-8": (b'"\xed\xa0\x80"', BINARY),
    "invalid UTF-8": (b'{"a":"\xff"}', BINARY),
    "overlong UTF-8": (b'"\xc0\xaf"', BINARY),
    "cut UTF-8": (b'"\xe2\x82"', BINARY),
    "escaped NUL": (b'"\\u0000"', JSON),
    "raw control byte": (b'"a\x01b"', BINARY),
    "raw newline in a string": (b'"a\nb"', BINARY),
    "raw DEL": (b'"a\x7fb"', JSON),
    "leading zero": (b"[01]", BINARY),
    "no integer part": (b"[.5]", BINARY),
    "no fraction": (b"[5.]", BINARY),
    "plus sign": (b"[+1]", BINARY),
    "hexadecimal": (b"[0x1]", BINARY),
    "trailing comma": (b'{"a":1,}', BINARY),
    "trailing comma in an array": (b"[1,]", BINARY),
    "single quotes": (b"{'a':1}", BINARY),
    "comment": (b"{}//", BINARY),
    "unclosed object": (b'{"a":1', BINARY),
    "unclosed string": (b'"a', BINARY),
    "bad escape": (b'"\\x41"', BINARY),
    "duplicate keys": (b'{"a":1,"a":2}', JSON),
    "empty key": (b'{"":1}', JSON),
    "127 arrays": (b"[" * 127 + b"]" * 127, JSON),
    "128 arrays": (b"[" * 128 + b"]" * 128, BINARY),
    "127 objects": (b'{"a":' * 127 + b"1" + b"}" * 127, JSON),
    "128 objects": (b'{"a":' * 128 + b"1" + b"}" * 128, BINARY),
    "128 of both": (b'[{"a":' * 64 + b"1" + b"}]" * 64, BINARY),
    "100,000 arrays": (b"[" * 100_000 + b"]" * 100_000, BINARY),
    "1,000 arrays side by side": (b"[" + b",".join([b"[]"] * 1_000) + b"]", JSON),
    "brackets in a string": (b'"' + b"[" * 1_000 + b'"', JSON),
}


@pytest.mark.parametrize("name", TABLE)
def test_content_is_detected_as_the_format_says(name: str) -> None:
    content, wanted = TABLE[name]
    item = SyncItem("a", content)
    assert item.content_type is wanted
    assert item.content == content
    assert SyncItem("a", content, content_type="binary").content_type is BINARY


@pytest.mark.parametrize("name", [name for name in TABLE if not name.startswith("bare")])
def test_what_is_given_as_json_must_be_json(name: str) -> None:
    content, wanted = TABLE[name]
    if wanted is JSON:
        assert SyncItem("a", content, content_type=JSON).content == content
    else:
        with pytest.raises(InvalidItem, match=r"^content"):
            SyncItem("a", content, content_type=JSON)


@pytest.mark.parametrize("content", [b"1", b"true", b"null", b"-1", b" 5 "])
def test_a_bare_scalar_is_json_where_the_caller_says_so(content: bytes) -> None:
    assert SyncItem("a", content, content_type="json").json() == json.loads(content)


def test_the_last_of_duplicate_keys_wins() -> None:
    assert SyncItem("a", b'{"a":1,"a":2}').json() == {"a": 2}


@pytest.mark.parametrize(
    "digits", ["18446744073709551616", "123456789012345678901234567890", "-99999999999999999999999"]
)
def test_big_integers_keep_their_digits(digits: str) -> None:
    item = SyncItem("a", f'{{"n":{digits}}}'.encode())
    assert item.json() == {"n": int(digits)}
    assert digits in item.content.decode()


def test_binary_content_has_no_json() -> None:
    with pytest.raises(NotJson) as refused:
        SyncItem("a", b"\xff").json()
    assert isinstance(refused.value, TypeError)


@given(st.binary(max_size=64))
def test_detection_never_fails_and_never_changes_a_byte(content: bytes) -> None:
    item = SyncItem("a", content)
    assert item.content == content
    if item.content_type is JSON:
        assert content.lstrip(b" \t\n\r")[:1] in (b"{", b"[", b'"')
        item.json()


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=("Cs",)), max_size=8),
    lambda child: (
        st.lists(child, max_size=4)
        | st.dictionaries(st.text(st.characters(exclude_categories=("Cs",)), max_size=4), child, max_size=4)
    ),
    max_leaves=12,
)


@given(values)
def test_the_canonical_text_says_the_same_value_and_is_its_own_canonical_text(value: object) -> None:
    content, form = canonical_json(value)
    assert form == 2
    assert is_json(content)
    assert is_canonical(content)
    assert json.loads(content) == value
    assert SyncItem.from_json("a", value).json() == value


CANONICAL = {
    '{"Z":[1.0,100.0],"a":{"y":"é","z":1.5},"b":1}': {"b": 1, "a": {"z": 1.50, "y": "\u00e9"}, "Z": [1.0, 1e2]},
    "1.8446744073709552e+19": 18446744073709551616,
    "18446744073709551615": 2**64 - 1,
    "-9223372036854775808": -(2**63),
    "-0.0": -0.0,
    "100.0": 1e2,
    "1e+16": 1e16,
    "1000000000000000.0": 1e15,
    "0.0001": 0.0001,
    "0.00001": 1e-5,
    "0.000012": 1.2e-5,
    "1e-6": 1e-6,
    "1.234e-9": 1.234e-9,
    '"\\"\\\\\\b\\t\\n\\f\\r\\u0001\\u001f"': '"\\\b\t\n\f\r\x01\x1f',
    '"/\x7f\u2028é\U0001f600"': "/\x7f\u2028é\U0001f600",
    '{"A":1,"a":2,"é":3,"\uffff":4,"\U0001f600":5}': {"\U0001f600": 5, "\uffff": 4, "é": 3, "a": 2, "A": 1},
    "null": None,
    "true": True,
    '{"":{"":[]}}': {"": {"": []}},
}


@pytest.mark.parametrize("text", CANONICAL)
def test_canonical_json(text: str) -> None:
    item = SyncItem.from_json("a", CANONICAL[text])
    assert item.content.decode() == text
    assert item.content_type is JSON


def test_an_integer_that_no_double_holds_keeps_its_digits() -> None:
    digits = "123456789012345678901234567890"
    item = SyncItem.from_json("a", {"n": int(digits)})
    assert item.content.decode() == f'{{"n":{digits}}}'
    assert item.json() == {"n": int(digits)}


def cyclic() -> list[object]:
    circle: list[object] = []
    circle.append(circle)
    return circle


@pytest.mark.parametrize(
    "value",
    [
        float("nan"),
        {"a": [float("inf")]},
        [-float("inf")],
        "\ud800",
        {"\udc00": 1},
        {1: 2},
        {("a",): 2},
        b"bytes",
        {"a": ...},
        {1, 2},
        1j,
        10**400,
        cyclic(),
    ],
    ids=repr,
)
def test_what_has_no_json_form_is_refused_by_name(value: object) -> None:
    with pytest.raises(InvalidItem) as refused:
        SyncItem.from_json("a", value)
    assert refused.value.field == "content"


@pytest.mark.parametrize("wrap", [lambda child: [child], lambda child: {"a": child}], ids=["arrays", "objects"])
def test_a_value_nests_as_deep_as_content_may(wrap) -> None:
    value: object = 1
    for _ in range(JSON_DEPTH_MAX):
        value = wrap(value)
    assert SyncItem.from_json("a", value).json() == value
    with pytest.raises(InvalidItem, match=r"^content"):
        SyncItem.from_json("a", wrap(value))


HASHES = {
    b"": "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
    b"hello": "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824",
    b'{"name":"Alice"}': "3cba1e3cf23c8ce24b7e08171d823fbd9a4929aafd9f27516e30699d3a42026a",
}


@pytest.mark.parametrize("content", HASHES)
def test_the_hash_is_sha_256_of_the_bytes(content: bytes) -> None:
    assert SyncItem("a", content).content_hash == HASHES[content]
    assert SyncItem("a", content).content_hash == hashlib.sha256(content).hexdigest()


def test_the_size_is_the_estimate_of_the_format() -> None:
    assert SyncItem("bin.1", b"hello").size == 378
    labelled = SyncItem("ä\U0001f600", b"hello", trace_parent="00-t-s-01", trace_state="é", home_instance_id="here")
    assert labelled.size == 304 + 6 + 9 + 2 + 64 + 5 + 4
    assert SyncItem("bin.1", b"hello", state="x" * 32, batch_id="b-1").size == 378, "neither counts"


def test_our_json_reader_is_the_one_the_table_was_made_with() -> None:
    """orjson decides detection; a version of it that reads otherwise has to be noticed here and not in the field."""
    assert orjson.loads(b'{"a":1e-400}') == {"a": 0.0}
    with pytest.raises(orjson.JSONDecodeError):
        orjson.loads(b"[1e400]")
