"""Stamps: strictly increasing for one engine, and apart from those of another one."""

from __future__ import annotations

import random

import pytest

from sync_engine.clock import Stamps
from sync_engine.testing.clock import VirtualClock


@pytest.mark.parametrize("back_ms", [0, 1, 3_600_000])
def test_they_increase_whatever_the_clock_does(back_ms: int) -> None:
    class Jumping(VirtualClock):
        def now_us(self) -> int:
            return super().now_us() - 1000 * rng.choice((0, back_ms))

    rng = random.Random(1)
    stamps = Stamps(Jumping(), rng)
    given = [stamps.next() for _ in range(1_000)]
    assert given == sorted(set(given))


def test_of_two_engines_on_one_machine_the_later_write_is_newer() -> None:
    """In one millisecond too: two workers of one service take two requests of one client, one after the other."""
    clock = VirtualClock()
    engines = [Stamps(clock, random.Random(seed)) for seed in range(2)]
    rng = random.Random(3)
    given = []
    for _ in range(900):
        given.append(rng.choice(engines).next())
        clock.advance(0.000_001)
    assert given == sorted(set(given))
    assert {stamp >> 16 for stamp in given} == {clock.now_ms()}


def test_who_has_just_read_a_stamp_is_not_far_ahead_of_the_clock() -> None:
    for seed in range(200):
        clock = VirtualClock()
        one, two = (Stamps(clock, random.Random(f"{seed} {which}")) for which in (1, 2))
        two.observe(one.next())
        earlier = two.next()
        clock.advance(0.000_020)
        assert one.next() > earlier


def test_two_engines_in_one_microsecond_rarely_give_out_one_stamp() -> None:
    clock = VirtualClock()
    same = 0
    for seed in range(2_000):
        one, two = (Stamps(clock, random.Random(f"{seed} {which}")) for which in (1, 2))
        same += one.next() == two.next()
    assert 0 < same < 80


def test_two_that_have_read_the_same_newer_stamp_go_on_apart() -> None:
    clock = VirtualClock()
    ahead = (clock.now_ms() + 40) << 16
    one, two = (Stamps(clock, random.Random(seed), after=1) for seed in (1, 2))
    for each in (one, two):
        each.observe(ahead)
    given = [each.next() for each in (one, two) for _ in range(200)]
    assert len(set(given)) == 400
    assert min(given) > ahead
    assert {stamp >> 16 for stamp in given} == {ahead >> 16}, "no further ahead of the clock than it must be"
