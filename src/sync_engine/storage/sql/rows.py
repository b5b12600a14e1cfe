"""Item to row and back, and the range of ids that a prefix stands for. Pure: no I/O, no SQL."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any, Final

import orjson

from sync_engine.errors import Corruption, InvalidItem
from sync_engine.item import ContentType, SyncItem

__all__ = ["NoItem", "Row", "Value", "audit_of", "flat", "item_of", "row_of", "successor"]

Value = str | bytes | int | None
Row = tuple[Any, ...]
"""As read: id, version, timestamp, payload_hash, payload (bytes), payload_blob, audit, state, counters, stamp."""


class NoItem(Corruption):
    """A row that no rule of ours can make an item of: no content at all, or a reserved id."""


def row_of(item: SyncItem, stamp: int, batch_id: str | None = None) -> tuple[Value, ...]:
    """The bound values of one upsert, in column order without ``merkle_dirty``; stamp 0 is stored as NULL.

    ``batch_id`` takes the place of the item's own.
    """
    content = item.content
    json = item.content_type is ContentType.JSON
    return (
        item.object_id,
        item.version,
        item.updated_at,
        item.content_hash,
        content.decode() if json else None,  # JSON content is valid UTF-8, and SQL gets it verbatim
        None if json else content,
        audit_of(item, batch_id),
        item.state,
        item.access_count,
        item.last_accessed,
        stamp or None,
    )


def item_of(row: Row) -> SyncItem | Corruption:
    """The item of a row, its SHA-256 verified; a row without a hash (the original writes such) passes unverified.

    A row that is no item at all, whoever wrote it, answers ``Corruption`` too and never a made-up item.
    """
    object_id, version, updated_at, expected, text, blob, audit, state, access_count, last_accessed, stamp = row
    content = text if text is not None else blob
    if content is None:
        return NoItem(str(object_id), expected or "", "none: payload and payload_blob are both NULL")
    if type(content) is not bytes:  # a number or text in a column of no fixed type
        content = str(content).encode(errors="surrogatepass")
    if expected:
        actual = hashlib.sha256(content).hexdigest()
        if actual != expected:
            return Corruption(str(object_id), expected, actual)
    labels = _labels(audit)
    try:
        return SyncItem(
            object_id,
            content,
            content_type=ContentType.JSON if text is not None else ContentType.BINARY,
            version=version,
            updated_at=updated_at,
            state=state,
            home_instance_id=labels.get("home"),
            trace_parent=labels.get("trace"),
            trace_state=labels.get("trace_state"),
            batch_id=labels.get("batch"),
            priority_score=labels.get("priority", 0.0),
            access_count=access_count,
            last_accessed=last_accessed,
            stamp=stamp or 0,
            sql_only=labels.get("sql_only", False),
            # Bytes that match their hash are the JSON that the writer checked: no second parse.
            _form=1 if expected else 0,
            _hash=expected or "",
        )
    except InvalidItem as bad:
        return NoItem(str(object_id), expected or "", f"no item: {bad.field} {bad.rule}")


@lru_cache(maxsize=16)
def _batch_alone(batch_id: str) -> str:
    """The label that most rows have alone, and all rows of a batch alike."""
    return orjson.dumps({"batch": batch_id}).decode()


_AUDIT: Final = ("batch", "home", "trace", "trace_state")


def audit_of(item: SyncItem, batch_id: str | None = None) -> str | None:
    """Canonical JSON of the labels that are set (batch, home, trace as the original, trace_state, priority,
    ``redis``: false for what is never copied there)."""
    batch_id = batch_id or item.batch_id
    if (
        item.trace_parent is None
        and item.home_instance_id is None
        and item.trace_state is None
        and not item.priority_score
        and not item.sql_only
    ):
        return None if batch_id is None else _batch_alone(batch_id)
    told: dict[str, Any] = {}
    # In order of their names, which is what makes the text canonical.
    if batch_id is not None:
        told["batch"] = batch_id
    if item.home_instance_id is not None:
        told["home"] = item.home_instance_id
    if item.priority_score:
        told["priority"] = item.priority_score
    if item.sql_only:
        told["redis"] = False
    if item.trace_parent is not None:
        told["trace"] = item.trace_parent
    if item.trace_state is not None:
        told["trace_state"] = item.trace_state
    return orjson.dumps(told).decode()


def _labels(audit: object) -> dict[str, Any]:
    """What an audit text says; one that says nothing sensible costs the labels, not the item."""
    if not isinstance(audit, str) or not audit:
        return {}
    try:
        told = orjson.loads(audit)
    except orjson.JSONDecodeError:
        return {}
    if not isinstance(told, dict):
        return {}
    labels = {key: told[key] for key in _AUDIT if isinstance(told.get(key), str)}
    score = told.get("priority")
    if isinstance(score, int | float) and not isinstance(score, bool):
        labels["priority"] = float(score)
    labels["sql_only"] = told.get("redis") is False
    return labels


def successor(prefix: str) -> str | None:
    """The least text above every text that starts with ``prefix``, by code point; None: there is no such bound.

    >>> successor("user_"), successor("\\ud7ff"), successor("a\\U0010ffff"), successor("")
    ('user`', '\\ue000', 'b', None)
    """
    for end in range(len(prefix), 0, -1):
        point = ord(prefix[end - 1])
        if point < 0x10FFFF:
            # Surrogates are no characters: the next one after U+D7FF is U+E000.
            return prefix[: end - 1] + chr(0xE000 if point == 0xD7FF else point + 1)
    return None


def flat(rows: Iterable[Sequence[Value]]) -> list[Value]:
    """The values of many rows, one after the other, as a multi-row statement takes them."""
    return [value for row in rows for value in row]
