"""One search as a caller asks for it: its bounds, the words of FT.SEARCH, and one page of what several servers found.

Plain values; nothing here talks to a server.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from sync_engine.errors import InvalidItem, InvalidQuery
from sync_engine.storage.redis.search_fields import check_name
from sync_engine.storage.redis.search_reply import Found, Hit, merged, nearest
from sync_engine.storage.redis.shards import Arg

__all__ = ["LIMIT_MAX", "WINDOW_MAX", "Param", "SearchRequest"]

LIMIT_MAX = 10_000
WINDOW_MAX = 100_000
"""Offset and limit together: each server of a cluster is asked for all of them."""
QUERY_BYTES_MAX = 1024 * 1024
PARAMS_MAX = 1_024
TIMEOUT_MS_MAX = 3_600_000

ITEM_MARK = "$.payload_hash"
"""What every item's document has, and others hardly."""

Param = bytes | str | int | float

# Nearest neighbours stand at the end of a query: `...=>[KNN 10 @field $vector AS name]`, attributes may follow.
_KNN = re.compile(
    r"=>\s*\[\s*KNN\s+(?P<count>\$?\w+)\s+@(?P<field>\w+)\s+\$\w+(?P<options>[^\]]*)\]\s*(?:=>\s*\{(?P<more>[^}]*)\}\s*)?$",
    re.IGNORECASE | re.ASCII,
)
_ALIAS = re.compile(r"\bAS\s+(\w+)|\$yield_distance_as\s*:\s*(\w+)", re.IGNORECASE | re.ASCII)


@dataclass(frozen=True, slots=True)
class SearchRequest:
    """One search as it was asked for, checked; and what is to be sent for it."""

    query: str
    limit: int
    offset: int
    params: Mapping[str, Param]
    sort_by: str | None
    descending: bool
    return_items: bool
    with_scores: bool
    timeout_ms: int | None
    distance: str | None = field(init=False, default=None)
    """What a nearest-neighbour query calls the distance; None where it is no such query."""
    nearest: int = field(init=False, default=0)
    """How many neighbours such a query asks for."""

    def __post_init__(self) -> None:
        _check_text("query", self.query)
        if not self.query.strip():
            raise InvalidQuery("it is empty; what every item matches is *")
        _check_count("limit", self.limit, 0, LIMIT_MAX)
        _check_count("offset", self.offset, 0, WINDOW_MAX)
        _check_count("offset + limit", self.offset + self.limit, 0, WINDOW_MAX)
        if self.timeout_ms is not None:
            _check_count("timeout_ms", self.timeout_ms, 1, TIMEOUT_MS_MAX)
        if self.sort_by is not None:
            check_name("sort_by", self.sort_by)
        elif self.descending:
            raise InvalidItem("descending", "without sort_by", "is for a field that is sorted by")
        _check_count("params", len(self.params), 0, PARAMS_MAX)
        for name, value in self.params.items():
            check_name("params", name)
            if isinstance(value, str):
                _check_text(f"params {name}", value)
            elif type(value) not in (bytes, int, float):
                raise InvalidItem(f"params {name}", f"a {type(value).__name__}", "must be bytes, str, int or float")
            elif type(value) is int and not -(2**63) <= value < 2**63:
                raise InvalidItem(f"params {name}", "an integer", "must have at most 64 bits")
            elif value != value:
                raise InvalidItem(f"params {name}", "nan", "must be a number")
        if (knn := _KNN.search(self.query)) is not None:
            alias = _ALIAS.search(f"{knn['options']} {knn['more'] or ''}")
            object.__setattr__(self, "distance", (alias[1] or alias[2]) if alias else f"__{knn['field']}_score")
            count = knn["count"]
            told = self.params.get(count[1:], count) if count.startswith("$") else count
            if not str(told).isdecimal() or int(told) > LIMIT_MAX:
                raise InvalidQuery(f"KNN {told!r}: must be an integer from 0 to {LIMIT_MAX}")
            object.__setattr__(self, "nearest", int(told))

    def words(self, *, alone: bool, documents: bool) -> list[Arg]:
        """What follows the name of the index in FT.SEARCH, for one server alone or one of several.

        ``documents``: a search there can read them.
        """
        words: list[Arg] = [self.query]
        by_score = self.sort_by is None and self.distance is None
        if self.distance is None and (self.with_scores or (by_score and not alone)):
            words.append("WITHSCORES")
        if self.sort_by is not None and not alone:
            words.append("WITHSORTKEYS")
        fields = []
        if documents:
            # At least what every item has: it shows whether the document is still there, and is one.
            fields.append("$" if self.return_items else ITEM_MARK)
        if self.distance is not None and (self.with_scores or not alone):
            fields.append(self.distance)
        words += ["RETURN", len(fields), *fields] if fields and self.limit else ["NOCONTENT"]
        if self.timeout_ms is not None:
            words += ["TIMEOUT", self.timeout_ms]
        if self.sort_by is not None:
            words += ["SORTBY", self.sort_by, "DESC" if self.descending else "ASC"]
        elif self.distance is not None:
            words += ["SORTBY", self.distance, "ASC"]
        if alone:
            words += ["LIMIT", self.offset, self.limit]
        elif self.distance is not None:
            words += ["LIMIT", 0, self.nearest]
        else:
            words += ["LIMIT", 0, self.offset + self.limit if self.limit else 0]
        if self.params:
            words += ["PARAMS", 2 * len(self.params)]
            for name, value in self.params.items():
                words += [name, _sent(value)]
        return [*words, "DIALECT", 2]

    def together(self, replies: Sequence[Found]) -> Found:
        """One page of the answers of several servers."""
        page = {"offset": self.offset, "limit": self.limit}
        if self.distance is None:
            return merged(replies, sort=self.sort_by is not None, descending=self.descending, **page)
        return nearest(
            replies,
            count=self.nearest,
            distance=self.distance.encode(),
            sort=self.sort_by is not None,
            descending=self.descending,
            **page,
        )

    def score(self, hit: Hit) -> float:
        """The relevance of a match, or its distance."""
        if self.distance is None:
            return hit.score or 0.0
        return float((hit.fields or {}).get(self.distance.encode(), "nan"))


def _sent(value: Param) -> Arg:
    # In a tag RediSearch takes a backslash before punctuation away, also where it comes from a parameter: `a\.b` would
    # find the items of `a.b`. A doubled one stands for itself.
    return value.replace("\\", "\\\\") if isinstance(value, str) else repr(value) if isinstance(value, float) else value


def _check_text(argument: str, text: object) -> None:
    if not isinstance(text, str):
        raise InvalidItem(argument, f"a {type(text).__name__}", "must be text")
    # RediSearch ends a text at NUL in places: a longer value would match what a shorter one does.
    if "\0" in text:
        raise InvalidItem(argument, f"{len(text)} characters", "must not contain NUL")
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        raise InvalidItem(argument, f"{len(text)} characters", "must not contain surrogates") from None
    if size > QUERY_BYTES_MAX:
        raise InvalidItem(argument, f"{size} bytes", f"must be at most {QUERY_BYTES_MAX} bytes")


def _check_count(argument: str, count: object, least: int, most: int) -> None:
    if type(count) is not int or not least <= count <= most:
        raise InvalidItem(argument, repr(count)[:80], f"must be an integer from {least} to {most}")
