"""Stamps: strictly increasing for one engine, and apart from those of another one."""

from __future__ import annotations

import random

import pytest

from sync_engine.clock import Stamps
from sync_engine.testing.clock import VirtualClock


@pytest.mark.parametrize("back_ms", [0, 1, 3_600_000])
def test_they_increase_whatever_the_clock_does(back_ms: int) -> None:
    class Jumping(VirtualClock):
        def now_ms(self) -> int:
            return super().now_ms() - rng.choice((0, back_ms))

    rng = random.Random(1)
    stamps = Stamps(Jumping(), rng)
    given = [stamps.next() for _ in range(1_000)]
    assert given == sorted(set(given))


def test_two_engines_in_one_millisecond_give_out_no_stamp_twice() -> None:
    clock = VirtualClock()
    one, two = (Stamps(clock, random.Random(seed)) for seed in (1, 2))
    given = [each.next() for each in (one, two) for _ in range(200)]
    assert len(set(given)) == 400
    assert {stamp >> 16 for stamp in given} == {clock.now_ms()}


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
