"""The fields of a search index: checked values, their words for FT.CREATE, their facts as FT.INFO tells them."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

from sync_engine.errors import InvalidItem

__all__ = ["Field", "FieldKind", "Word", "check", "check_count", "check_index", "check_name", "is_text"]

FieldKind = Literal["TEXT", "NUMERIC", "TAG", "GEO", "VECTOR"]
Algorithm = Literal["HNSW", "FLAT"]
Metric = Literal["COSINE", "IP", "L2"]
Element = Literal["FLOAT32", "FLOAT64"]

Word = str | int

PATH_CHARS_MAX = 512
DIM_MAX = 32_768

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}")
_INDEX = re.compile(r"[A-Za-z0-9_.:-]{1,64}")

_PATH = "must begin with $ and have neither control characters nor surrogates"

# What RediSearch takes for words that are left out.
_M, _EF_CONSTRUCTION = 16, 200


def check_index(index: str) -> str:
    """The name of an index if it is one. It becomes a part of a key, behind the prefix of the store."""
    if not isinstance(index, str) or not _INDEX.fullmatch(index):
        raise InvalidItem("index", repr(index)[:80], "must be 1 to 64 letters, digits or _ . : -")
    return index


def check_name(argument: str, name: str) -> str:
    """The name of a field or parameter if it is one: what a query can say without quoting."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise InvalidItem(argument, repr(name)[:80], "must be 1 to 64 letters, digits or _, no digit first")
    return name


@dataclass(frozen=True, slots=True)
class Field:
    """One field of an index: the values at ``path`` of a document, called ``alias`` in queries.

    Made by ``text``, ``numeric``, ``tag``, ``geo`` and ``vector``. Without a path it is ``$.payload.{alias}``: a key
    of the item's own JSON. ``noindex``: the field can be sorted by and not asked for.
    """

    alias: str
    kind: FieldKind
    path: str = ""
    sortable: bool = False
    noindex: bool = False
    weight: float = 1.0
    stemming: bool = True
    separator: str = ""
    case_sensitive: bool = False
    algorithm: Algorithm | None = None
    dim: int | None = None
    metric: Metric | None = None
    element: Element | None = None
    m: int | None = None
    ef_construction: int | None = None

    @classmethod
    def text(
        cls,
        alias: str,
        path: str = "",
        *,
        sortable: bool = False,
        noindex: bool = False,
        weight: float = 1.0,
        stemming: bool = True,
    ) -> Field:
        """Words of a text; with ``stemming`` their other forms match too. ``weight`` multiplies the score."""
        return cls(alias, "TEXT", path, sortable, noindex, weight=weight, stemming=stemming)

    @classmethod
    def numeric(cls, alias: str, path: str = "", *, sortable: bool = False, noindex: bool = False) -> Field:
        """Numbers, for ranges. RediSearch keeps doubles: beyond 2^53 integers run together."""
        return cls(alias, "NUMERIC", path, sortable, noindex)

    @classmethod
    def tag(
        cls,
        alias: str,
        path: str = "",
        *,
        separator: str = "",
        case_sensitive: bool = False,
        sortable: bool = False,
        noindex: bool = False,
    ) -> Field:
        """Whole values: a string or each of an array. ``separator``: a character that parts one string into several."""
        return cls(alias, "TAG", path, sortable, noindex, separator=separator, case_sensitive=case_sensitive)

    @classmethod
    def geo(cls, alias: str, path: str = "", *, sortable: bool = False, noindex: bool = False) -> Field:
        """Places, as ``"longitude,latitude"``."""
        return cls(alias, "GEO", path, sortable, noindex)

    @classmethod
    def vector(
        cls,
        alias: str,
        path: str = "",
        *,
        dim: int,
        metric: Metric = "COSINE",
        algorithm: Algorithm = "HNSW",
        element: Element = "FLOAT32",
        m: int | None = None,
        ef_construction: int | None = None,
    ) -> Field:
        """Arrays of ``dim`` numbers, for nearest neighbours; exact with ``FLAT``, fast with ``HNSW``."""
        return cls(
            alias,
            "VECTOR",
            path,
            algorithm=algorithm,
            dim=dim,
            metric=metric,
            element=element,
            m=m,
            ef_construction=ef_construction,
        )

    def __post_init__(self) -> None:
        check_name("field", self.alias)
        if not self.path:
            object.__setattr__(self, "path", f"$.payload.{self.alias}")
        path, kind, vector = self.path, self.kind, self.kind == "VECTOR"
        check(
            isinstance(path, str) and path.startswith("$") and min(path) >= " " and is_text(path), "path", path, _PATH
        )
        check(len(path) <= PATH_CHARS_MAX, "path", f"{len(path)} characters", f"at most {PATH_CHARS_MAX}")
        check(kind in get_args(FieldKind), "kind", kind, f"must be one of {', '.join(get_args(FieldKind))}")
        text, tag = kind == "TEXT", kind == "TAG"
        check(text or (self.weight == 1.0 and self.stemming), "weight, stemming", kind, "are for text")
        weight = self.weight
        check(type(weight) in (int, float) and 0 < weight < math.inf, "weight", weight, "must be above 0")
        check(tag or not (self.separator or self.case_sensitive), "separator, case_sensitive", kind, "are for tags")
        separator = self.separator
        one = isinstance(separator, str) and (not separator or (len(separator) == 1 and " " <= separator < "\x7f"))
        check(one, "separator", separator, "must be one printable character of ASCII")
        check(not (vector and (self.sortable or self.noindex)), "sortable, noindex", kind, "are not for vectors")
        options = (self.algorithm, self.dim, self.metric, self.element)
        check(vector or not any((*options, self.m, self.ef_construction)), "dim", kind, "is for vectors")
        if vector:
            for name, choice in (("algorithm", Algorithm), ("metric", Metric), ("element", Element)):
                told = getattr(self, name)
                check(told in get_args(choice), name, told, f"must be one of {', '.join(get_args(choice))}")
            check_count("dim", self.dim, DIM_MAX)
            flat = self.algorithm == "FLAT"
            check(not (flat and (self.m or self.ef_construction)), "m, ef_construction", "FLAT", "are for HNSW")
            for name in ("m", "ef_construction"):
                if getattr(self, name) is not None:
                    check_count(name, getattr(self, name), 4_096)

    def words(self) -> list[Word]:
        """The field as FT.CREATE takes it."""
        words: list[Word] = [self.path, "AS", self.alias, self.kind]
        if self.kind == "VECTOR":
            options: list[Word] = ["TYPE", cast(str, self.element), "DIM", cast(int, self.dim)]
            options += ["DISTANCE_METRIC", cast(str, self.metric)]
            if self.m is not None:
                options += ["M", self.m]
            if self.ef_construction is not None:
                options += ["EF_CONSTRUCTION", self.ef_construction]
            return [*words, cast(str, self.algorithm), len(options), *options]
        if not self.stemming:
            words.append("NOSTEM")
        if self.weight != 1.0:
            words += ["WEIGHT", repr(self.weight)]
        if self.separator:
            words += ["SEPARATOR", self.separator]
        flags = {"CASESENSITIVE": self.case_sensitive, "SORTABLE": self.sortable, "NOINDEX": self.noindex}
        return words + [flag for flag, is_set in flags.items() if is_set]

    def facts(self) -> dict[str, Any]:
        """What the words mean, defaults filled in, as FT.INFO tells it."""
        facts: dict[str, Any] = {"identifier": self.path, "type": self.kind}
        flags = {
            "SORTABLE": self.sortable,
            "NOINDEX": self.noindex,
            "NOSTEM": not self.stemming,
            "CASESENSITIVE": self.case_sensitive,
        }
        facts["flags"] = sorted(flag for flag, is_set in flags.items() if is_set)
        if self.kind == "TEXT":
            facts["WEIGHT"] = float(self.weight)
        elif self.kind == "TAG":
            facts["SEPARATOR"] = self.separator
        elif self.kind == "VECTOR":
            facts |= {"algorithm": self.algorithm, "data_type": self.element, "dim": self.dim}
            facts["distance_metric"] = self.metric
            if self.algorithm == "HNSW":
                facts |= {"M": self.m or _M, "ef_construction": self.ef_construction or _EF_CONSTRUCTION}
        return facts


def check(holds: bool, argument: str, shape: object, rule: str) -> None:
    if not holds:
        raise InvalidItem(argument, str(shape)[:80] if isinstance(shape, str) else repr(shape)[:80], rule)


def check_count(argument: str, count: object, most: int) -> None:
    check(type(count) is int and 0 < count <= most, argument, count, f"must be an integer from 1 to {most}")


def is_text(text: str) -> bool:
    return "\0" not in text and not any("\ud800" <= char <= "\udfff" for char in text)
