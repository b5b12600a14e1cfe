"""Retry, breaker and guard, by a clock that only the test moves."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sync_engine.errors import DiskFull, StoreError, TierUnavailable
from sync_engine.item import Op
from sync_engine.ports import Applied
from sync_engine.resilience import (
    Breaker,
    BreakerPolicy,
    Circuit,
    Guarded,
    Retries,
    RetryBudget,
    RetryPolicy,
    allow,
    on_abandoned,
    on_failure,
    on_success,
    retrying,
)
from sync_engine.testing.clock import VirtualClock
from sync_engine.testing.contract import put
from sync_engine.testing.tiers import Breaking, Counting, Deaf, MemoryTier, Refusing, Slow

POLICY = BreakerPolicy(failures_max=3, window_s=10, rest_s=5)


def failed(circuit: Circuit, *times: float) -> Circuit:
    for at in times:
        circuit = on_failure(circuit, POLICY, circuit.turn, at)
    return circuit


# The circuit


def test_it_opens_after_enough_failures_in_the_window() -> None:
    assert failed(Circuit(), 1, 2).phase == "closed"
    assert failed(Circuit(), 1, 2, 3).phase == "open"


def test_failures_out_of_the_window_do_not_count() -> None:
    assert failed(Circuit(), 1, 2, 12.5).phase == "closed"
    assert failed(Circuit(), 1, 9, 10, 10.9).phase == "open"


def test_a_success_starts_the_count_anew() -> None:
    circuit = on_success(failed(Circuit(), 1, 2), 0)
    assert failed(circuit, 3, 4).phase == "closed"
    assert on_success(circuit, 0) is circuit, "a success on a well tier costs nothing"


def test_half_open_lets_exactly_one_probe_through() -> None:
    circuit = failed(Circuit(), 1, 2, 3)
    assert allow(circuit, POLICY, 7.9) == (circuit, False)
    probing, allowed = allow(circuit, POLICY, 8)
    assert (probing.phase, allowed) == ("half-open", True)
    assert allow(probing, POLICY, 8) == (probing, False)
    assert allow(probing, POLICY, 1_000) == (probing, False)


def test_a_probe_closes_or_opens_again() -> None:
    probing, _ = allow(failed(Circuit(), 1, 2, 3), POLICY, 8)
    closed = on_success(probing, probing.turn)
    assert (closed.phase, closed.failed_at_s) == ("closed", ())
    opened = on_failure(probing, POLICY, probing.turn, 9)
    assert (opened.phase, opened.opened_at_s) == ("open", 9)
    assert not allow(opened, POLICY, 13)[1]
    assert allow(opened, POLICY, 14)[1]


def test_an_abandoned_probe_gives_its_place_to_the_next_call() -> None:
    probing, _ = allow(failed(Circuit(), 1, 2, 3), POLICY, 8)
    again = on_abandoned(probing, probing.turn)
    assert again.phase == "open"
    assert allow(again, POLICY, 8)[1]
    closed = Circuit()
    assert on_abandoned(closed, 0) is closed


def test_outcomes_of_an_earlier_turn_move_nothing() -> None:
    opened = failed(Circuit(), 1, 2, 3)
    assert on_success(opened, 0) is opened
    assert on_failure(opened, POLICY, 0, 4) is opened
    probing, _ = allow(opened, POLICY, 8)
    for stale in (0, opened.turn):
        assert on_success(probing, stale) is probing
        assert on_failure(probing, POLICY, stale, 8) is probing
        assert on_abandoned(probing, stale) is probing


@given(st.lists(st.tuples(st.sampled_from(["call", "succeed", "fail", "abandon"]), st.floats(0, 4), st.integers(0, 5))))
def test_no_history_wedges_it_and_only_one_probe_is_ever_out(history: list[tuple[str, float, int]]) -> None:
    circuit, now_s = Circuit(), 0.0
    out: list[int] = []
    for verb, seconds, which in history:
        now_s += seconds
        if verb == "call":
            circuit, allowed = allow(circuit, POLICY, now_s)
            if allowed:
                out.append(circuit.turn)
        elif out:
            turn = out.pop(which % len(out))
            if verb == "succeed":
                circuit = on_success(circuit, turn)
            elif verb == "fail":
                circuit = on_failure(circuit, POLICY, turn, now_s)
            else:
                circuit = on_abandoned(circuit, turn)
        assert circuit.phase != "half-open" or out.count(circuit.turn) == 1
        assert len(circuit.failed_at_s) <= POLICY.failures_max
    for turn in out:
        circuit = on_abandoned(circuit, turn)
    assert allow(circuit, POLICY, now_s + POLICY.rest_s)[1], "once it has rested, somebody may ask"


def test_a_breaker_shows_its_state() -> None:
    clock = VirtualClock()
    breaker = Breaker("l2", clock, BreakerPolicy(failures_max=5, window_s=10))
    assert repr(breaker) == "<Breaker l2 closed | 0/5 in 10s>"
    for _ in range(5):
        breaker.failed(breaker.enter())
    assert repr(breaker) == "<Breaker l2 open | 5/5 in 10s>"
    with pytest.raises(TierUnavailable, match="l2 is unavailable: circuit open for another 1 s"):
        breaker.enter()
    clock.advance(1)
    breaker.enter()
    with pytest.raises(TierUnavailable, match="a probe is on its way"):
        breaker.enter()


# Retry


def test_waits_double_up_to_the_cap() -> None:
    policy = RetryPolicy(first_s=0.05, factor=2, cap_s=5, jitter=0)
    waits = [policy.wait_s(attempt) for attempt in range(1, 10)]
    assert waits == pytest.approx([0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5, 5])
    assert policy.wait_s(10**6) == 5


def test_jitter_takes_away_at_most_its_share() -> None:
    policy = RetryPolicy(first_s=1, cap_s=1, jitter=0.25)
    assert policy.wait_s(1, chance=0) == 0.75
    assert policy.wait_s(1, chance=1) == 1


async def test_it_retries_what_it_is_told_to_and_sleeps_by_the_given_clock() -> None:
    slept: list[float] = []
    tier = Breaking(MemoryTier(), at=1, times=3)

    async def sleep(seconds: float) -> None:
        slept.append(seconds)

    async for attempt in retrying(RetryPolicy(jitter=0), sleep, on=lambda exc: isinstance(exc, TierUnavailable)):
        with attempt:
            await tier.apply([put("a")])
    assert slept == [0.05, 0.1, 0.2]
    assert tier.calls == 4


async def test_it_raises_other_errors_at_once_and_as_they_are() -> None:
    calls = 0

    async def refused() -> None:
        nonlocal calls
        async for attempt in retrying(RetryPolicy(), asyncio.sleep, on=lambda exc: isinstance(exc, TierUnavailable)):
            with attempt:
                calls += 1
                raise StoreError("l3", "no such thing")

    with pytest.raises(StoreError, match="no such thing"):
        await refused()
    assert calls == 1


async def test_it_ends_after_the_attempts_it_was_given() -> None:
    tier = Breaking(MemoryTier(), times=None)

    async def sleep(_: float) -> None: ...

    async def in_vain() -> None:
        async for attempt in retrying(RetryPolicy(attempts_max=4), sleep, on=lambda _: True, rng=random.Random(1)):
            with attempt:
                await tier.newest_stamp()

    with pytest.raises(TierUnavailable, match="call 4 "):
        await in_vain()


async def test_a_cancelled_retry_ends() -> None:
    clock = VirtualClock()
    tier = Breaking(MemoryTier(), times=None)

    async def forever() -> None:
        async for attempt in retrying(RetryPolicy(), clock.sleep, on=lambda exc: isinstance(exc, TierUnavailable)):
            with attempt:
                await tier.count_prefix("")

    task = asyncio.create_task(forever())
    await clock.run_for(60)
    assert tier.calls > 10
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


# The budget of retries


class Leaping(VirtualClock):
    """Who sleeps is alone, and wakes at once, later."""

    async def sleep(self, seconds: float, /) -> None:
        self.advance(seconds)


async def test_the_budget_lets_a_burst_through_and_the_rest_at_its_pace() -> None:
    clock = Leaping()
    retries = Retries(clock, RetryBudget(per_s=2, burst=3))
    begun_s, at_s = clock.monotonic(), []
    for _ in range(7):
        await retries.wait(0)
        at_s.append(clock.monotonic() - begun_s)
    assert at_s == pytest.approx([0, 0, 0, 0.5, 1, 1.5, 2])
    assert retries.count == 7


async def test_who_waits_for_the_budget_is_served_in_order_and_none_is_kept_out() -> None:
    clock = VirtualClock()
    retries = Retries(clock, RetryBudget(per_s=1, burst=1))
    served: list[int] = []

    async def retry(number: int) -> None:
        await retries.wait(0)
        served.append(number)

    waiting = [asyncio.create_task(retry(number)) for number in range(5)]
    await clock.run_for(3.5)
    assert served == [0, 1, 2, 3]
    await clock.run_for(1)
    assert served == [0, 1, 2, 3, 4]
    await asyncio.gather(*waiting)


async def test_an_idle_budget_fills_up_to_its_burst_and_no_further() -> None:
    clock = Leaping()
    retries = Retries(clock, RetryBudget(per_s=1, burst=2))
    clock.advance(3600)
    begun_s = clock.monotonic()
    for _ in range(4):
        await retries.wait(0)
    assert clock.monotonic() - begun_s == pytest.approx(2)


@given(st.lists(st.tuples(st.floats(0, 3), st.floats(0, 1)), max_size=60), st.floats(0.1, 50), st.integers(1, 20))
def test_no_pattern_of_failures_gets_more_retries_than_the_budget(
    pattern: list[tuple[float, float]], per_s: float, burst: int
) -> None:
    """A tier that answers now and then lets every policy begin anew: the waits are short, the budget is not."""

    async def lived() -> None:
        clock = Leaping()
        retries = Retries(clock, RetryBudget(per_s, burst))
        at_s: list[float] = []
        for idle_s, wait_s in pattern:
            clock.advance(idle_s)
            await retries.wait(wait_s)
            at_s.append(clock.monotonic())
        longest_s = max((wait_s for _, wait_s in pattern), default=0)
        for first, begun_s in enumerate(at_s):
            for last, ended_s in enumerate(at_s[first:], first):
                # Within any time: what may have been saved up by then, and what has come in since the first wait began.
                assert last - first + 1 <= burst + (ended_s - begun_s + longest_s) * per_s + 1e-6

    asyncio.run(lived())


@given(st.lists(st.tuples(st.integers(0, 9), st.floats(0, 1)), max_size=60), st.integers(1, 20), st.floats(0, 1))
def test_answers_earn_retries_and_no_more_than_a_burst_is_saved_up(
    pattern: list[tuple[int, float]], burst: int, per_answer: float
) -> None:
    async def lived() -> None:
        clock = Leaping()
        retries = Retries(clock, RetryBudget(1, burst, per_answer))
        waits: list[tuple[float, float, int]] = []  # when it began and ended, and the answers until then
        for answers, wait_s in pattern:
            for _ in range(answers):
                retries.answered()
            begun_s = clock.monotonic()
            await retries.wait(wait_s)
            waits.append((begun_s, clock.monotonic(), retries.answers))
        for first, (begun_s, _, before) in enumerate(waits):
            for last, (_, ended_s, until) in enumerate(waits[first:], first):
                assert last - first + 1 <= burst + (ended_s - begun_s) + (until - before) * per_answer + 1e-6

    asyncio.run(lived())


async def test_a_tier_that_answers_four_calls_of_five_waits_for_no_budget() -> None:
    # Its failures alone were counted: asked 50 times a second, it was let try again twice, and its listings raised
    # all the while.
    clock = Leaping()
    retries = Retries(clock)
    for _ in range(1_000):
        for _ in range(4):
            clock.advance(0.02)
            retries.answered()
        clock.advance(0.02)
        begun_s = clock.monotonic()
        await retries.wait(0)
        assert clock.monotonic() == begun_s
    assert (retries.count, retries.answers) == (1_000, 4_000)


async def test_a_wait_keeps_its_jitter_when_the_budget_adds_to_it() -> None:
    """Engines that fail at one moment must not come back at one moment, budget or not."""
    clock = Leaping()
    retries = Retries(clock, RetryBudget(per_s=1, burst=1))
    await retries.wait(0)
    begun_s = clock.monotonic()
    await retries.wait(0.3)
    assert clock.monotonic() - begun_s == pytest.approx(1.3)


# Guarded


def guarded(tier: object, clock: VirtualClock, deadline_s: float | None = None, **more: float) -> Guarded:
    return Guarded(tier, Breaker("l2", clock, POLICY), clock, deadline_s, **more)  # type: ignore[arg-type]  # any wrapper


async def test_an_open_circuit_asks_nobody() -> None:
    clock = VirtualClock()
    broken = Breaking(MemoryTier("l2"), times=None)
    tier = guarded(broken, clock)
    for _ in range(3):
        with pytest.raises(TierUnavailable, match="broken by the test"):
            await tier.fetch(["a"])
    for _ in range(10):
        with pytest.raises(TierUnavailable, match="circuit open"):
            await tier.apply([put("a")])
    assert broken.calls == 3


async def test_the_circuit_closes_when_the_probe_is_answered() -> None:
    clock = VirtualClock()
    tier = guarded(Breaking(MemoryTier("l2"), times=4), clock)
    for _ in range(3):
        with pytest.raises(TierUnavailable):
            await tier.fetch(["a"])
    clock.advance(5)
    with pytest.raises(TierUnavailable, match="broken by the test"):
        await tier.fetch(["a"])
    assert tier.breaker.phase == "open"
    clock.advance(5)
    await tier.apply([put("a")])
    assert tier.breaker.phase == "closed"
    assert await tier.exists_batch(["a"]) == [True]


async def test_a_tier_that_refuses_is_well() -> None:
    clock = VirtualClock()
    tier = guarded(Refusing(MemoryTier("l2"), ["a"]), clock)
    for _ in range(10):
        assert set((await tier.apply([put("a"), put("b")])).refused) == {"a"}
    with pytest.raises(AssertionError, match="was asked"):
        await guarded(Deaf(MemoryTier()), clock).fetch(["a"])
    assert tier.breaker.phase == "closed"


class Full(MemoryTier):
    """Has no room for a write, and answers every read."""

    async def apply(self, ops: Sequence[Op], /) -> Applied:
        raise DiskFull(self.name, "the disk is full")


async def test_a_full_disk_opens_no_circuit_for_reads_need_no_room() -> None:
    tier = guarded(Full("l3"), VirtualClock())
    for _ in range(10):
        with pytest.raises(DiskFull):
            await tier.apply([put("a")])
    assert await tier.exists_batch(["a"]) == [False]
    assert tier.breaker.phase == "closed"


async def test_a_missed_deadline_is_a_failure_once_and_the_call_runs_on() -> None:
    clock = VirtualClock()
    memory = MemoryTier("l2")
    tier = guarded(Slow(memory, 3, clock), clock, deadline_s=1)
    call = asyncio.create_task(tier.apply([put("a")]))
    await clock.run_for(1)
    with pytest.raises(TierUnavailable, match="no answer within 1 s"):
        await call
    assert len(tier.breaker.circuit.failed_at_s) == 1
    assert memory.rows == {}
    await clock.run_for(2)
    assert set(memory.rows) == {"a"}
    assert len(tier.breaker.circuit.failed_at_s) == 1, "the late answer takes nothing back"
    await tier.close()


async def test_writes_may_have_a_deadline_of_their_own() -> None:
    clock = VirtualClock()
    tier = guarded(Slow(MemoryTier("l2"), 3, clock), clock, deadline_s=1, write_deadline_s=10)
    write = asyncio.create_task(tier.apply([put("a")]))
    read = asyncio.create_task(tier.fetch(["a"]))
    await clock.run_for(4)
    await write
    with pytest.raises(TierUnavailable):
        await read
    await tier.close()


async def test_a_cancelled_caller_does_not_cancel_the_call() -> None:
    clock = VirtualClock()
    memory = MemoryTier("l2")
    for deadline_s in (None, 60.0):
        tier = guarded(Slow(memory, 3, clock), clock, deadline_s)
        call = asyncio.create_task(tier.apply([put(f"a{deadline_s}")]))
        await clock.run_for(1)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        await clock.run_for(2)
    assert len(memory.rows) == 2
    assert clock.sleepers == 0


async def test_a_cancelled_probe_does_not_keep_the_circuit_half_open() -> None:
    clock = VirtualClock()
    slow = Slow(Breaking(MemoryTier("l2"), times=3), 0, clock)
    tier = guarded(slow, clock)
    for _ in range(3):
        with pytest.raises(TierUnavailable):
            await tier.fetch(["a"])
    clock.advance(5)
    slow.seconds = 100
    probe = asyncio.create_task(tier.fetch(["a"]))
    await clock.run_for(1)
    assert tier.breaker.phase == "half-open"
    probe.cancel()
    with pytest.raises(asyncio.CancelledError):
        await probe
    slow.seconds = 0
    await tier.fetch(["a"])
    assert tier.breaker.phase == "closed"
    await clock.run_for(100)


async def test_of_many_callers_at_the_end_of_the_rest_one_is_the_probe() -> None:
    clock = VirtualClock()
    counting = Counting(Breaking(MemoryTier("l2"), times=3))
    tier = guarded(counting, clock)
    await asyncio.gather(*(tier.fetch(["a"]) for _ in range(3)), return_exceptions=True)
    clock.advance(5)
    answers = await asyncio.gather(*(tier.fetch(["a"]) for _ in range(50)), return_exceptions=True)
    assert sum(not isinstance(answer, TierUnavailable) for answer in answers) == 1
    assert counting.calls["fetch"] == 4
    assert tier.breaker.phase == "closed"


async def test_no_failure_of_an_unwaited_call_is_reported_as_never_retrieved() -> None:
    clock = VirtualClock()
    tier = guarded(Slow(Breaking(MemoryTier("l2"), times=None), 2, clock), clock, deadline_s=1)
    complaints: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
    call = asyncio.create_task(tier.fetch(["a"]))
    await clock.run_for(5)
    with pytest.raises(TierUnavailable):
        await call
    del call
    await tier.close()
    assert not complaints


def test_a_guard_shows_what_it_guards() -> None:
    clock = VirtualClock()
    shown = repr(guarded(MemoryTier("l2"), clock))
    assert shown == "<Guarded <MemoryTier l2 0 items, 0 tombstones> by <Breaker l2 closed | 0/3 in 10s>>"


# The tools themselves


async def test_virtual_sleepers_wake_in_order_and_at_their_moment() -> None:
    clock = VirtualClock()
    woken: list[tuple[str, float]] = []

    async def sleeper(name: str, *naps: float) -> None:
        for nap in naps:
            await clock.sleep(nap)
            woken.append((name, clock.monotonic()))

    async with asyncio.TaskGroup() as group:
        group.create_task(sleeper("late", 3))
        group.create_task(sleeper("often", 1, 1, 1))
        cancelled = group.create_task(sleeper("never", 2))
        await clock.run_for(0)
        cancelled.cancel()
        await clock.run_for(3)
    assert woken == [("often", 1), ("often", 2), ("late", 3), ("often", 3)]


async def test_advance_wakes_who_is_due_in_order() -> None:
    clock = VirtualClock(now_ms=1_000)
    woken: list[int] = []

    async def sleeper(seconds: int) -> None:
        await clock.sleep(seconds)
        woken.append(seconds)

    tasks = [asyncio.create_task(sleeper(seconds)) for seconds in (3, 1, 2, 9)]
    await asyncio.sleep(0)
    clock.advance(5)
    await asyncio.gather(*tasks[:3])
    assert woken == [1, 2, 3]
    assert (clock.now_ms(), clock.monotonic(), clock.sleepers) == (6_000, 5, 1)
    clock.jump_wall(-4)
    assert (clock.now_ms(), clock.monotonic()) == (2_000, 5)
    clock.advance(4)
    await tasks[3]


@pytest.mark.parametrize(("when", "held"), [("before", False), ("after", True)])
async def test_a_broken_write_took_effect_or_not(when: str, held: bool) -> None:
    memory = MemoryTier()
    tier = Breaking(memory, at=2, when=when, verbs={"apply"})  # type: ignore[arg-type]  # a parameter of the test
    await tier.apply([put("a")])
    await tier.fetch(["a"])
    with pytest.raises(TierUnavailable):
        await tier.apply([put("b")])
    assert ("b" in memory.rows) is held
    await tier.apply([put("c")])
    assert (tier.calls, tier.broken) == (3, 1)


async def test_a_tier_broken_for_ever_heals_when_told() -> None:
    tier = Breaking(MemoryTier(), times=None)
    for _ in range(3):
        with pytest.raises(TierUnavailable):
            await tier.fetch(["a"])
    tier.heal()
    await tier.fetch(["a"])


def test_policies_are_values() -> None:
    assert replace(POLICY, failures_max=9) != POLICY
    assert RetryPolicy() == RetryPolicy()
