"""What RediSearch answers, decoded: FT.SEARCH and FT.INFO, as RESP3 tells them or flattened for RESP2; pages of several
servers put together into one. Pure functions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from sync_engine.errors import StoreError

__all__ = ["Found", "Hit", "merged", "nearest", "read_info", "read_search", "shown"]


@dataclass(frozen=True, slots=True)
class Hit:
    """One match. ``fields`` is None where the index names a document that the server does not find."""

    key: bytes
    score: float | None
    sort_key: bytes | None
    fields: dict[bytes, bytes] | None


@dataclass(frozen=True, slots=True)
class Found:
    """One reply to FT.SEARCH: how many match, the page asked for, what the server warns of."""

    total: int
    hits: list[Hit]
    warnings: list[str]


def read_search(reply: Any) -> Found:
    """Decode a reply to FT.SEARCH: a map, or its names and values in turn. Raises ``StoreError`` where it is none.

    (What FT.SEARCH itself says in RESP2 is not read: it leaves the warnings out, so that nobody can tell the whole
    answer from a part of it.)
    """
    try:
        told = _as_map(reply)
        hits = [_hit(_as_map(result)) for result in told[b"results"]]
        return Found(int(told[b"total_results"]), hits, [_text(warning) for warning in told.get(b"warning", ())])
    except (AttributeError, KeyError, TypeError, ValueError):
        raise StoreError("l2", f"a {type(reply).__name__} that is no reply to FT.SEARCH") from None


def read_info(reply: Any) -> dict[str, Any]:
    """Decode a reply to FT.INFO: text and numbers, ``attributes`` as maps whose ``flags`` are a sorted list."""
    try:
        told: dict[str, Any] = _plain(_as_map(reply))
        told["index_definition"] = _as_map(told["index_definition"])
        told["attributes"] = [_attribute(attribute) for attribute in told["attributes"]]
    except (IndexError, KeyError, TypeError, ValueError):
        raise StoreError("l2", f"a {type(reply).__name__} that is no reply to FT.INFO") from None
    return told


def shown(name: str) -> str:
    """A name or prefix as FT._LIST and FT.INFO have it, on one line."""
    return name.replace("\r", "\\r").replace("\n", "\\n")


def merged(replies: Sequence[Found], *, sort: bool, descending: bool, offset: int, limit: int) -> Found:
    """One page of what several servers found, each asked for the first ``offset + limit`` of its own.

    By sort key, those without one last, or else by score, best first. What is equal keeps the order of the servers.
    """
    hits, twice = _distinct(replies)
    if sort:
        having = [hit for hit in hits if hit.sort_key is not None]
        having.sort(key=_sort_value, reverse=descending)
        hits = having + [hit for hit in hits if hit.sort_key is None]
    else:
        hits.sort(key=lambda hit: hit.score or 0.0, reverse=True)
    total = sum(reply.total for reply in replies) - twice
    return Found(total, hits[offset : offset + limit], _warnings(replies))


def nearest(
    replies: Sequence[Found], *, count: int, distance: bytes, sort: bool, descending: bool, offset: int, limit: int
) -> Found:
    """As ``merged`` for a nearest-neighbour query, whose every server gave the ``count`` nearest of its own."""
    hits, _ = _distinct(replies)
    # One that is gone, and has no distance any more, must show, so that it is asked for again.
    hits.sort(key=lambda hit: float(hit.fields[distance]) if hit.fields and distance in hit.fields else 0.0)
    hits = hits[:count]
    if sort:
        chosen = Found(len(hits), hits, [])
        hits = merged([chosen], sort=True, descending=descending, offset=0, limit=len(hits)).hits
    return Found(len(hits), hits[offset : offset + limit], _warnings(replies))


def _hit(told: dict[Any, Any]) -> Hit:
    score, fields = told.get(b"score"), told.get(b"extra_attributes")
    return Hit(
        key=told[b"id"],
        score=None if score is None else float(score),
        sort_key=told.get(b"sortkey"),
        fields=None if fields is None else _as_map(fields),
    )


def _attribute(told: Any) -> dict[str, Any]:
    if not isinstance(told, dict):
        # RESP2: pairs, and behind them flags that are single words.
        words = list(told)
        flags = []
        while words[-1] in _FLAGS:
            flags.append(words.pop())
        told = {**_as_map(words), "flags": flags}
    told = {**told, "flags": sorted(flag for flag in told.get("flags", ()) if flag != "UNF")}
    if "WEIGHT" in told:
        told["WEIGHT"] = float(told["WEIGHT"])
    return {name: int(value) if name in _COUNTS else value for name, value in told.items()}


_FLAGS = frozenset(
    {"SORTABLE", "UNF", "NOINDEX", "NOSTEM", "CASESENSITIVE", "WITHSUFFIXTRIE", "INDEXEMPTY", "INDEXMISSING"}
)
_COUNTS = frozenset({"dim", "M", "ef_construction"})


def _distinct(replies: Iterable[Found]) -> tuple[list[Hit], int]:
    # A document that moves from server to server may show on both for a moment.
    hits: dict[bytes, Hit] = {}
    count = 0
    for reply in replies:
        count += len(reply.hits)
        for hit in reply.hits:
            if hit.key not in hits or hits[hit.key].fields is None:
                hits[hit.key] = hit
    return list(hits.values()), count - len(hits)


def _warnings(replies: Iterable[Found]) -> list[str]:
    return list(dict.fromkeys(warning for reply in replies for warning in reply.warnings))


def _sort_value(hit: Hit) -> tuple[bool, float, bytes]:
    key = hit.sort_key or b""
    # `#` before a number, `$` before a text.
    return (False, float(key[1:]), b"") if key[:1] == b"#" else (True, 0.0, key[1:])


def _as_map(told: Any) -> dict[Any, Any]:
    return told if isinstance(told, dict) else dict(zip(told[::2], told[1::2], strict=True))


def _plain(told: Any) -> Any:
    plain: Callable[[Any], Any] = _plain
    if isinstance(told, bytes):
        return _text(told)
    if isinstance(told, dict):
        return {plain(name): plain(value) for name, value in told.items()}
    if isinstance(told, list | tuple):
        return [plain(value) for value in told]
    return told


def _text(told: bytes | str) -> str:
    return told.decode(errors="replace") if isinstance(told, bytes) else told
