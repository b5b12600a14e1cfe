"""JSON as text: what counts as JSON content, and the canonical text of a value.

orjson is used on both sides because its reading agrees with the content detection of the format
(tests/wire holds the whole table) and its sorted output is the canonical text byte for byte.
"""

from __future__ import annotations

from typing import Any

import orjson

from sync_engine.errors import InvalidItem

__all__ = [
    "JSON_DEPTH_MAX",
    "canonical_json",
    "is_canonical",
    "is_json",
    "json_depth_within",
    "json_form",
    "looks_like_json",
]

JSON_DEPTH_MAX = 127
"""Nesting that counts as JSON; deeper content is binary."""

_CANONICAL = orjson.OPT_SORT_KEYS | orjson.OPT_PASSTHROUGH_DATETIME | orjson.OPT_PASSTHROUGH_DATACLASS
_WHITE = b" \t\n\r\x0c"
_OPENERS = (b"{", b"[", b'"')


def looks_like_json(content: bytes) -> int:
    """Content detection: the form of a buffer that is one JSON object, array or string, else 0 (docs/formats.md)."""
    start = content[:1]
    if start not in _OPENERS or not start:
        # Form feed counts as white space here but not in JSON, so such content ends as binary.
        start = content.lstrip(_WHITE)[:1]
        if start not in _OPENERS or not start:
            return 0
    return json_form(content)


def json_form(content: bytes) -> int:
    """What the bytes are: 0 no JSON of at most 127 levels with every number in range, 1 JSON, 2 its canonical text.

    Writing it again takes half the time of the parse, which a later question for the form would have to repeat.
    """
    try:
        value = orjson.loads(content)
    except orjson.JSONDecodeError:
        return 0
    if not json_depth_within(content, value, JSON_DEPTH_MAX):
        return 0
    return 2 if orjson.dumps(value, option=_CANONICAL) == content else 1


def is_json(content: bytes) -> bool:
    """Whether the bytes are one valid JSON text of at most 127 levels, with every number in range."""
    return json_form(content) > 0


def json_depth_within(content: bytes, value: object, limit: int) -> bool:
    """Whether parsed ``content`` nests at most ``limit`` levels; the brackets are counted first, which is free."""
    if content.count(b"[") + content.count(b"{") <= limit:
        return True
    level: list[object] = [value]
    for _ in range(limit):
        level = [child for node in level for child in _children(node)]
        if not level:
            return True
    return not any(isinstance(node, dict | list) for node in level)


def _children(node: object) -> list[object]:
    if isinstance(node, dict):
        return [child for child in node.values() if isinstance(child, dict | list)]
    if isinstance(node, list):
        return [child for child in node if isinstance(child, dict | list)]
    return []


def canonical_json(value: Any) -> tuple[bytes, int]:
    """Canonical JSON text of a Python value, and the form to note on the item (1 valid, 2 canonical).

    Canonical is what orjson writes with sorted keys: checked against every vector of docs/formats.md 1.5.
    """
    try:
        content = orjson.dumps(value, option=_CANONICAL)
        form = 2
    except TypeError as refused:
        # Integers beyond 64 bits are legal JSON; everything else that orjson refuses is refused here too.
        try:
            content = orjson.dumps(_with_big_integers(value, 0), option=_CANONICAL)
        except (TypeError, RecursionError):
            raise InvalidItem("content", f"a {type(value).__name__}", f"cannot be written as JSON: {refused}") from None
        form = 1
    if b"null" in content:
        _refuse_nan(value)  # orjson writes NaN as null
    if content.count(b"[") + content.count(b"{") > JSON_DEPTH_MAX and not is_json(content):
        raise InvalidItem("content", f"a {type(value).__name__}", f"nests deeper than {JSON_DEPTH_MAX} levels")
    return content, form


def is_canonical(content: bytes) -> bool:
    """Whether valid JSON content is its own canonical text."""
    return orjson.dumps(orjson.loads(content), option=_CANONICAL) == content


def _with_big_integers(value: Any, depth: int) -> Any:
    if depth > JSON_DEPTH_MAX + 1:
        raise TypeError(f"nests deeper than {JSON_DEPTH_MAX} levels")
    if isinstance(value, dict):
        return {key: _with_big_integers(child, depth + 1) for key, child in value.items()}
    if isinstance(value, list | tuple):
        return [_with_big_integers(child, depth + 1) for child in value]
    if type(value) is int and not -(2**63) <= value < 2**64:
        try:
            if int(float(value)) == value:
                return float(value)
        except OverflowError:
            raise TypeError("an integer beyond the range of a double") from None
        return orjson.Fragment(str(value))
    return value


def _refuse_nan(value: Any) -> None:
    stack = [value]
    while stack:
        node = stack.pop()
        if isinstance(node, dict):
            stack.extend(node.values())
        elif isinstance(node, list | tuple):
            stack.extend(node)
        elif isinstance(node, float) and (node != node or node in (float("inf"), float("-inf"))):
            raise InvalidItem("content", f"the float {node!r}", "has no JSON form")
