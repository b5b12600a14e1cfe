"""What a search index is: its fields, and the beginnings of the ids that it covers.

Plain values. Every word that a caller chooses is checked here, before anything is sent.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from sync_engine.errors import InvalidItem
from sync_engine.storage.redis.search_fields import Field, Word, check, is_text
from sync_engine.storage.redis.search_reply import shown

__all__ = ["IndexDefinition", "fields_of"]

PREFIXES_MAX = 8
FIELDS_MAX = 1_024
"""RediSearch's own bound."""
PREFIX_CHARS_MAX = 255
"""No id is longer."""


@dataclass(frozen=True, slots=True)
class IndexDefinition:
    """An index: which items it covers, by the beginnings of their ids, and which of their fields."""

    fields: tuple[Field, ...]
    prefixes: tuple[str, ...] = ("",)

    def __post_init__(self) -> None:
        aliases = {field.alias for field in self.fields}
        check(0 < len(self.fields) <= FIELDS_MAX, "schema", f"{len(self.fields)} fields", f"must be 1 to {FIELDS_MAX}")
        check(len(aliases) == len(self.fields), "schema", f"{len(self.fields)} fields", "must have different names")
        known = f"must be 1 to {PREFIXES_MAX} different texts of at most {PREFIX_CHARS_MAX} characters"
        prefixes = self.prefixes
        check(0 < len(prefixes) <= PREFIXES_MAX and len(set(prefixes)) == len(prefixes), "prefixes", prefixes, known)
        for prefix in prefixes:
            check(isinstance(prefix, str) and len(prefix) <= PREFIX_CHARS_MAX, "prefixes", prefix, known)
            check(is_text(prefix), "prefixes", prefix, "must be text without NUL and surrogates")

    def words(self, key_prefixes: Iterable[str]) -> list[Word]:
        """All that follows the name in FT.CREATE, for the items below each of the key prefixes.

        No stop words: a query that contains one would silently drop it, and with it a condition.
        """
        begins = [key_prefix + prefix for key_prefix in key_prefixes for prefix in self.prefixes]
        words: list[Word] = ["ON", "JSON", "PREFIX", len(begins), *begins, "STOPWORDS", 0, "SCHEMA"]
        for field in self.fields:
            words += field.words()
        return words

    def difference(self, told: Mapping[str, Any], key_prefixes: Iterable[str]) -> str:
        """In what the index that FT.INFO tells of is not this one; empty if it is. What is not told is not compared."""
        known = told["index_definition"]
        begins = {shown(key_prefix + prefix) for key_prefix in key_prefixes for prefix in self.prefixes}
        if str(known.get("key_type", "JSON")) != "JSON":
            return f"it is on {known['key_type']}, not on JSON"
        if (there := set(known["prefixes"])) != begins:
            return f"it covers other keys ({_some(there - begins)} more, {_some(begins - there)} fewer)"
        if known.get("filter"):
            return f"it has the filter {known['filter']!r}"
        if told.get("stopwords_list") != []:  # the default ones are not told
            return "it has stop words"
        if options := told.get("index_options"):
            return f"it has the options {', '.join(sorted(options))}"
        held = {attribute["attribute"]: attribute for attribute in told["attributes"]}
        for field in self.fields:
            attribute = held.pop(field.alias, None)
            if attribute is None:
                return f"it has no field {field.alias!r}"
            for fact, value in field.facts().items():
                if fact in attribute and attribute[fact] != value:
                    return f"field {field.alias!r}: {fact} is {attribute[fact]!r}, not {value!r}"
        return f"it also has the field {min(held)!r}" if held else ""

    def to_json(self) -> str:
        """Text that ``from_json`` reads; equal for equal definitions."""
        return json.dumps({"prefixes": sorted(self.prefixes), "schema": [field.words() for field in self.fields]})

    @classmethod
    def from_json(cls, text: str | bytes) -> IndexDefinition:
        """What ``to_json`` wrote."""
        told = json.loads(text)
        return cls(fields_of(told["schema"]), tuple(told["prefixes"]))


def fields_of(schema: Iterable[Field | Sequence[Word]] | Sequence[Word]) -> tuple[Field, ...]:
    """The fields of a schema: of ``Field`` values, of fields in FT.CREATE's own words, or of one list of such words."""
    entries = list(schema)
    if entries and isinstance(entries[0], str):
        return tuple(_parsed(cast(list[Word], entries)))
    fields: list[Field] = []
    for entry in entries:
        if isinstance(entry, Field):
            fields.append(entry)
        else:
            check(
                isinstance(entry, Sequence) and not isinstance(entry, str), "schema", entry, "must be fields or words"
            )
            fields += _parsed(list(cast(Sequence[Word], entry)))
    return tuple(fields)


def _parsed(words: list[Word]) -> Iterable[Field]:
    """Fields from words like ``$.payload.name AS name TEXT SORTABLE``; without AS the path may be a plain name."""
    left = [str(word) for word in words]

    def take() -> str:
        check(bool(left), "schema", words, "ends in the middle of a field")
        return left.pop(0)

    while left:
        path, told = take(), dict[str, Any]()
        if left and left[0].upper() == "AS":
            take()
            told = {"path": path, "alias": take()}
        else:
            told = {"alias": path}
        kind = told["kind"] = take().upper()
        if kind == "VECTOR":
            told["algorithm"] = take().upper()
            options = [take() for _ in range(_number(take()))]
            check(len(options) % 2 == 0, "schema", options, "options of a vector are pairs")
            for option, value in zip(options[::2], options[1::2], strict=True):
                name = _VECTOR_OPTIONS.get(option.upper(), "")
                check(bool(name), "schema", option, "is no option of a vector that we know")
                told[name] = value.upper() if name in ("element", "metric") else _number(value)
        while kind != "VECTOR" and left and left[0].upper() in (_FLAGS.keys() | _VALUES.keys()):
            option = take().upper()
            told |= _FLAGS[option] if option in _FLAGS else {_VALUES[option]: take()}
        if "weight" in told:
            told["weight"] = _weight(told["weight"])
        yield Field(**told)


_FLAGS: Mapping[str, Mapping[str, bool]] = {
    "SORTABLE": {"sortable": True},
    "UNF": {},  # what RediSearch does with sortable JSON anyway
    "NOINDEX": {"noindex": True},
    "NOSTEM": {"stemming": False},
    "CASESENSITIVE": {"case_sensitive": True},
}
_VALUES = {"WEIGHT": "weight", "SEPARATOR": "separator"}
_VECTOR_OPTIONS = {
    "TYPE": "element",
    "DIM": "dim",
    "DISTANCE_METRIC": "metric",
    "M": "m",
    "EF_CONSTRUCTION": "ef_construction",
}


def _number(word: str) -> int:
    check(word.isascii() and word.isdigit() and len(word) < 8, "schema", word, "must be a number there")
    return int(word)


def _weight(word: str) -> float:
    try:
        return float(word)
    except ValueError:
        raise InvalidItem("weight", repr(word)[:80], "must be a number") from None


def _some(prefixes: set[str]) -> str:
    return ", ".join(map(repr, sorted(prefixes)[:3])) or "none"
