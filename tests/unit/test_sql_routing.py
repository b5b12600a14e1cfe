"""The routes themselves: which prefix counts, which tables a prefix may have ids in, what a schema may be called."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sync_engine.errors import InvalidItem, StoreError
from sync_engine.schema import PREFIXES_MAX, check_schema
from sync_engine.storage.sql.routing import DEFAULT, WORDS_KEPT, Route, Router, Routes, routes_of
from sync_engine.storage.sql.sqlite import Sqlite
from sync_engine.storage.sql.tables import index_name

short = st.text("ab", max_size=4)
routes = st.builds(
    Routes,
    st.just(1),
    st.dictionaries(short.filter(bool), st.tuples(st.sampled_from("xyz"), st.booleans()), max_size=6).map(
        lambda told: [Route(prefix, f"{table}_items", moving) for prefix, (table, moving) in told.items()]
    ),
    st.just(["x_items", "y_items", "z_items"]),
)


@given(routes, short)
def test_G61_the_longest_prefix_counts(known: Routes, id_: str) -> None:
    fitting = [route for route in known.by_prefix.values() if id_.startswith(route.prefix)]
    longest = max(fitting, key=lambda route: len(route.prefix), default=None)
    assert known.route_of(id_) == longest
    assert known.home_of(id_) == (DEFAULT if longest is None else longest.table)
    assert list(known.places_of(id_)) == [table for table in known.tables if table in known.places_of(id_)]
    assert set(known.places_of(id_)) == (
        set(known.tables) if longest is not None and longest.moving else {known.home_of(id_)}
    )


@given(routes, short, short)
def test_Q7_a_prefix_may_have_ids_in_every_table_that_one_of_them_may_be_in(
    known: Routes, prefix: str, rest: str
) -> None:
    assert set(known.places_of(prefix + rest)) <= set(known.places_under(prefix))


@given(routes, st.lists(short, unique=True))
def test_ids_are_grouped_whole(known: Routes, ids: list[str]) -> None:
    grouped = known.by_places(ids)
    assert sorted(id_ for group in grouped.values() for id_ in group) == sorted(ids)
    assert all(known.places_of(id_) == places for places, group in grouped.items() for id_ in group)
    at_home = known.by_home(ids)
    assert sorted(id_ for group in at_home.values() for id_ in group) == sorted(ids)
    assert all(known.home_of(id_) == home for home, group in at_home.items() for id_ in group)
    assert list(at_home) == [table for table in known.tables if table in at_home]


def test_before_the_first_schema_all_is_in_one_table() -> None:
    assert Routes().by_places(["a", "b"]) == {(DEFAULT,): ["a", "b"]}
    assert Routes().places_under("") == Routes().tables == (DEFAULT,)


HOSTILE = [
    "", "sync", "sync_items", "sync_x", "sqlite", "sqlite_x", "Users", "users\n", "users ", "us-ers",
    "1users", "_users",
    "users; DROP TABLE sync_items", "users'", 'users"', "users`", "üsers", "users\0", "u" * 42, "users_\u0660", None, 7,
    b"users",
]  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE, ids=repr)
def test_G61_a_name_that_is_none_is_refused(name: object) -> None:
    with pytest.raises(InvalidItem, match="name"):
        check_schema(name, ["user."])


BAD_PREFIXES = [
    "user.", b"user.", None, 7, [], [""], ["a" * 256], ["a\0"], ["\ud800"], ["state:x"], [b"a"], [None], ["a", ""],
    [str(n) for n in range(PREFIXES_MAX + 1)],
]  # fmt: skip


@pytest.mark.parametrize("prefixes", BAD_PREFIXES, ids=lambda told: repr(told)[:20])
def test_prefixes_that_are_none_are_refused(prefixes: object) -> None:
    with pytest.raises(InvalidItem, match="prefixes"):
        check_schema("users", prefixes)


def test_a_schema_may_have_any_plain_prefix() -> None:
    assert check_schema("u" * 41, iter(["%", "_", "'", "\U0010ffff", "cdc", "%"])) == (
        "%",
        "_",
        "'",
        "\U0010ffff",
        "cdc",
    )


@pytest.mark.parametrize("table", ["x", "sync_items", "x_items; DROP TABLE y", "x_items\n", "X_items", 5, b"x_items"])
def test_a_table_that_no_schema_has_is_refused_wherever_it_is_read(table: object) -> None:
    with pytest.raises(StoreError, match="none of a schema"):
        routes_of([("a", table, 0)])
    if isinstance(table, str):
        with pytest.raises(StoreError, match="none of a schema"):
            routes_of([(f"table:{table}", None, 1)])


def test_index_names_fit_into_what_postgresql_keeps() -> None:
    names = {index_name(f"{'u' * 40}{end}_items", "merkle_dirty") for end in "abc"}
    assert len(names) == 3
    assert all(len(name) <= 63 for name in names)


def test_Q6_G51_looking_up_the_table_of_an_id_makes_and_keeps_nothing(tmp_path: Path) -> None:
    """The original leaked a copy of the table's name at every look-up."""
    table = "users_items"
    known = Routes(1, [Route("user.", table, False)], [table])
    assert all(known.home_of(f"user.{n}") is table for n in range(1000))
    router = Router(Sqlite(tmp_path / "never made", 1))
    for n in range(3 * WORDS_KEPT):
        router.words(DEFAULT, f"t{n}_items")
    assert len(router._words) <= WORDS_KEPT
