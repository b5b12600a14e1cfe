"""L1: what it serves, what it never serves, how it counts, and whom it evicts."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sync_engine.errors import ConfigError
from sync_engine.item import SyncItem
from sync_engine.storage.memory import PASS_BYTES, TICK_HITS, L1Cache, base_score, curve
from sync_engine.testing.clock import VirtualClock

SMALL = SyncItem("id", b"x" * 100, updated_at=0).size


def cache(max_bytes: int, clock: VirtualClock | None = None) -> L1Cache:
    return L1Cache(max_bytes, clock=clock or VirtualClock(), rng=random.Random(7))


def item(object_id: str, stamp: int = 1, size: int = 100, expires_at: int | None = None) -> SyncItem:
    return SyncItem(object_id, b"x" * size, stamp=stamp, expires_at=expires_at, updated_at=0)


# Serving


def test_an_offered_item_is_served_and_an_absent_one_is_not() -> None:
    l1 = cache(10_000)
    a = item("a")
    assert l1.offer(a)
    assert l1.get("a") is a
    assert l1.peek("a") is a
    assert l1.get("b") is None
    assert l1.peek("b") is None
    assert (len(l1), l1.bytes) == (1, a.size)
    assert (l1.stats().hits, l1.stats().misses) == (1, 1)


def test_G16_an_older_copy_offered_late_does_not_replace_a_newer_one() -> None:
    l1 = cache(10_000)
    newer = item("a", stamp=2)
    assert l1.offer(newer)
    assert not l1.offer(item("a", stamp=1))
    assert l1.get("a") is newer
    same = item("a", stamp=2)
    assert l1.offer(same)
    assert l1.get("a") is same


def test_a_drop_spares_what_is_newer_than_the_delete() -> None:
    l1 = cache(10_000)
    for stamp, kept in ((4, True), (5, False), (6, False), (None, False), (0, False)):
        l1.offer(item("a", stamp=5))
        l1.drop("a", stamp)
        assert (l1.peek("a") is not None) is kept, stamp
    l1.drop("a")
    assert (len(l1), l1.bytes) == (0, 0)


def test_a_cache_of_zero_bytes_is_off() -> None:
    l1 = cache(0)
    assert not l1.offer(item("a"))
    assert l1.get("a") is None
    assert (l1.bytes, l1.pressure) == (0, 0.0)
    with pytest.raises(ConfigError, match="l1_max_bytes"):
        cache(-1)


def test_an_item_larger_than_the_cache_is_not_kept_and_its_older_copy_goes() -> None:
    l1 = cache(1_000)
    l1.offer(item("a", stamp=1))
    l1.offer(item("b", stamp=1))
    assert not l1.offer(item("a", stamp=2, size=1_000))
    assert l1.get("a") is None
    assert l1.get("b") is not None
    l1.verify()


def test_an_item_as_large_as_the_cache_is_kept_alone() -> None:
    whole = item("whole", size=5_000)
    l1 = cache(whole.size)
    for n in range(8):
        l1.offer(item(f"id{n}"))
    assert l1.offer(whole)
    assert l1.get("whole") is whole
    assert len(l1) == 1
    l1.verify()


# Deadlines


def test_G22_an_entry_past_its_deadline_is_neither_served_nor_kept() -> None:
    clock = VirtualClock()
    l1 = cache(10_000, clock)
    for id_ in ("a", "b", "c"):
        l1.offer(item(id_), deadline_ms=clock.now_ms() + 1_000)
    clock.advance(0.999)
    assert l1.get("a") is not None
    assert l1.peek("b") is not None
    clock.advance(0.001)
    assert l1.get("a") is None
    assert l1.peek("b") is None
    assert (len(l1), l1.stats().expired) == (1, 2)
    assert not l1.offer(item("c", stamp=0)), "what was newer and is over does not bring back what was older"
    assert l1.get("c") is None
    l1.verify()


def test_I11_the_sooner_of_both_deadlines_holds() -> None:
    clock = VirtualClock()
    l1 = cache(10_000, clock)
    now = clock.now_ms()
    l1.offer(item("a", expires_at=now + 1_000), deadline_ms=now + 9_000)
    l1.offer(item("b", expires_at=now + 9_000), deadline_ms=now + 1_000)
    l1.offer(item("c", expires_at=now + 1_000))
    clock.advance(1)
    assert [l1.get(id_) for id_ in "abc"] == [None, None, None]


def test_I11_an_item_offered_past_its_deadline_removes_the_older_copy() -> None:
    clock = VirtualClock()
    l1 = cache(10_000, clock)
    l1.offer(item("a", stamp=1))
    assert not l1.offer(item("a", stamp=2), deadline_ms=clock.now_ms())
    assert l1.get("a") is None


def test_I11_a_write_without_deadline_removes_one() -> None:
    clock = VirtualClock()
    l1 = cache(10_000, clock)
    l1.offer(item("a", stamp=1), deadline_ms=clock.now_ms() + 1_000)
    l1.offer(item("a", stamp=2))
    clock.advance(2)
    assert l1.get("a") is not None


# Counting. E2 and G46: the byte counter drifted and wrapped, until every write was refused for good.

operations = st.lists(
    st.tuples(
        st.sampled_from(["offer", "offer", "offer", "get", "peek", "drop", "drop_to", "clear", "advance"]),
        st.integers(0, 12),
        st.integers(0, 4),
        st.integers(0, 900),
        st.sampled_from([None, None, 500, 3_000]),
    ),
    max_size=80,
)


@given(operations, st.integers(0, 6_000))
def test_E2_G46_bytes_are_exact_and_bounded_under_every_operation(ops: list[tuple], max_bytes: int) -> None:  # type: ignore[type-arg]
    clock = VirtualClock()
    l1 = cache(max_bytes, clock)
    newest: dict[str, int] = {}
    for verb, key, stamp, size, ttl in ops:
        id_ = f"id{key}"
        if verb == "offer":
            offered = item(id_, stamp, size)
            if l1.offer(offered, None if ttl is None else clock.now_ms() + ttl):
                assert l1.peek(id_) is offered
                newest[id_] = stamp
        elif verb == "get":
            found = l1.get(id_)
            assert found is None or found.stamp == newest[id_]
        elif verb == "peek":
            l1.peek(id_)
        elif verb == "drop":
            l1.drop(id_)
            assert l1.peek(id_) is None
        elif verb == "drop_to":
            l1.drop(id_, stamp)
        elif verb == "clear":
            l1.clear()
            assert (len(l1), l1.bytes) == (0, 0)
        else:
            clock.advance(size / 1000)
        assert 0 <= l1.bytes <= max_bytes
        l1.verify()


def test_verify_notices_a_wrong_count() -> None:
    l1 = cache(10_000)
    l1.offer(item("a"))
    l1._bytes += 1
    with pytest.raises(AssertionError, match="holds"):
        l1.verify()


# The tables of BEHAVIOUR.md 4.5


@pytest.mark.parametrize(
    ("pressure", "share"),
    [
        (0.0, 1.0), (0.75, 1.0), (0.765, 1.0), (0.77, 0.933013), (0.78, 0.825806), (0.79, 0.75), (0.80, 0.691832),
        (0.82, 0.603553), (0.84, 0.532913), (0.85, 0.5), (0.86, 0.467087), (0.88, 0.396447), (0.90, 0.308168),
        (0.91, 0.25), (0.92, 0.174194), (0.93, 0.066987), (0.934, 0.009347), (0.935, 0.0), (0.95, 0.0), (1.2, 0.0),
    ],
)  # fmt: skip
def test_the_curve_has_the_values_of_its_table(pressure: float, share: float) -> None:
    assert curve(pressure) == pytest.approx(share, abs=1e-6)


def test_the_curve_leaves_one_and_reaches_zero_where_the_table_says() -> None:
    assert curve(0.765419) == 1.0
    assert curve(0.765421) < 1.0
    assert curve(0.934579) > 0.0
    assert curve(0.934581) == 0.0
    steps = [curve(n / 1000) for n in range(700, 1000)]
    assert all(after <= before for before, after in pairwise(steps))


@pytest.mark.parametrize(
    ("idle_s", "count", "size_bytes", "pressure", "score"),
    [
        (0, 0, 378, 0.50, 0.599927928),
        (3600, 0, 1024, 0.50, 0.346956655),
        (1, 100, 1024, 0.50, 0.866897970),
        (100, 10, 1024, 0.50, 0.727678939),
        (100, 10, 10_485_760, 0.50, 0.546055879),
        (1, 1000, 1024, 0.50, 0.999693782),
        (60, 5, 2048, 0.90, 0.214712288),
        (0, 1, 378, 0.85, 0.320029727),
        (1, 1000, 1024, 0.95, 0.0),
    ],
)
def test_the_score_has_the_values_of_its_table(
    idle_s: float, count: int, size_bytes: int, pressure: float, score: float
) -> None:
    assert base_score(idle_s, count, size_bytes) * curve(pressure) == pytest.approx(score, abs=1e-8)


# Eviction


def test_nothing_is_evicted_below_three_quarters() -> None:
    l1 = cache(SMALL * 100)
    for n in range(75):
        l1.offer(item(f"{n:02d}"))
    assert (len(l1), l1.stats().evicted) == (75, 0)


def test_pressure_settles_a_little_above_three_quarters() -> None:
    l1 = cache(PASS_BYTES * 100)
    for n in range(3 * PASS_BYTES * 100 // SMALL):
        l1.offer(item(f"{n:06d}"))
        assert l1.pressure < 0.85
    assert l1.pressure > 0.75
    l1.verify()


def test_the_item_just_offered_is_never_the_victim() -> None:
    l1 = cache(SMALL * 5)
    for n in range(200):
        assert l1.offer(item(f"{n:02d}"))
        assert l1.peek(f"{n:02d}") is not None


def test_what_is_read_often_outlives_what_is_not() -> None:
    clock = VirtualClock()
    l1 = cache(SMALL * 400, clock)
    favourites = [f"f{n:02d}" for n in range(40)]
    for id_ in favourites:
        l1.offer(item(id_))
        for _ in range(50):
            l1.get(id_)
    for n in range(4_000):
        l1.offer(item(f"{n:04d}"))
    assert all(l1.peek(id_) is not None for id_ in favourites)


def test_what_was_popular_yesterday_gives_way() -> None:
    clock = VirtualClock()
    l1 = cache(SMALL * 200, clock)
    for n in range(100):
        l1.offer(item(f"old{n:03d}"))
        l1.get(f"old{n:03d}")
    clock.advance(24 * 3600)
    for n in range(2_000):
        l1.offer(item(f"new{n:04d}"))
    assert sum(l1.peek(f"old{n:03d}") is not None for n in range(100)) < 10


def test_G27_new_entries_count_as_just_used() -> None:
    clock = VirtualClock()
    l1 = cache(SMALL * 100, clock)
    for n in range(70):
        l1.offer(item(f"old{n:02d}"))
    clock.advance(1800)
    for n in range(200):
        l1.offer(item(f"new{n:03d}"))
    old = sum(l1.peek(f"old{n:02d}") is not None for n in range(70))
    assert old < 5, "half an hour idle must go before what has just come"


def test_expired_entries_are_the_first_victims() -> None:
    clock = VirtualClock()
    l1 = cache(SMALL * 100, clock)
    for n in range(60):
        l1.offer(item(f"e{n:02d}"), deadline_ms=clock.now_ms() + 10)
        for _ in range(99):
            l1.get(f"e{n:02d}")
    clock.advance(1)
    kept = [f"k{n:02d}" for n in range(14)]
    for id_ in kept:
        l1.offer(item(id_))
    for n in range(30):
        l1.offer(item(f"n{n:02d}"))
    assert sum(l1.peek(id_) is not None for id_ in kept) >= 12


def test_G49_a_pass_looks_at_samples_and_never_at_the_whole_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    scored = 0

    def counted(idle_s: float, count: int, size_bytes: int) -> float:
        nonlocal scored
        scored += 1
        return base_score(idle_s, count, size_bytes)

    monkeypatch.setattr("sync_engine.storage.memory.base_score", counted)
    l1 = cache(SMALL * 20_000)
    for n in range(40_000):
        before = scored
        l1.offer(item(f"{n:05d}"))
        assert scored - before < 5_000
    assert l1.stats().evicted > 20_000
    assert scored < 8 * l1.stats().evicted


def test_recency_follows_the_clock_even_when_there_are_only_hits() -> None:
    clock = VirtualClock()
    l1 = cache(SMALL * 100, clock)
    for n in range(70):
        l1.offer(item(f"{n:02d}"))
    clock.advance(2 * 3600)
    for _ in range(TICK_HITS + 1):
        l1.get("00")
    for _ in range(5):
        l1.get("01")
    for n in range(200):
        l1.offer(item(f"n{n:03d}"))
    assert l1.peek("00") is not None
    assert l1.peek("01") is not None
    assert sum(l1.peek(f"{n:02d}") is not None for n in range(2, 70)) < 5


def test_a_resized_cache_keeps_to_its_new_bound() -> None:
    clock = VirtualClock()
    cache = L1Cache(10**6, clock=clock, rng=random.Random(1))
    for n in range(500):
        cache.offer(SyncItem(f"a.{n}", bytes(100)))
    held = cache.bytes
    cache.resize(held)
    assert cache.bytes == held, "what fits stays"
    cache.resize(held // 2)
    cache.verify()
    assert 0 < cache.bytes <= held // 2
    assert cache.peek("a.499") is not None, "what came last stays"
    cache.resize(300)
    assert (cache.bytes, len(cache)) == (0, 0)
    cache.resize(0)
    assert not cache.offer(SyncItem("b", b"x"))
    cache.resize(10**6)
    assert cache.offer(SyncItem("b", b"x"))
    cache.verify()
    with pytest.raises(ConfigError, match="l1_max_bytes = -1"):
        cache.resize(-1)
