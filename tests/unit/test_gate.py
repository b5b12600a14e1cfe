"""The gate before the log: its bounds, its order, and that whoever gives up takes nothing with him."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sync_engine import Backpressure
from sync_engine.pressure import SLOWED_S_MAX, Bands, Gate, pressure_of

FOR_EVER_MS = 600_000


async def turns(count: int = 5) -> None:
    """Let every task that can run do so."""
    for _ in range(count):
        await asyncio.sleep(0)


def gate(ops_max: int = 3, bytes_max: int = 100, wait_ms: int = FOR_EVER_MS) -> Gate:
    return Gate(ops_max=ops_max, bytes_max=bytes_max, wait_ms=wait_ms, sleep=no_sleep)


async def no_sleep(seconds: float) -> None:
    await asyncio.sleep(0)


async def test_I10_writes_up_to_the_bound_do_not_wait() -> None:
    door = gate()
    await door.enter(1, 40)
    await door.enter(1, 55)
    await door.enter(1)
    assert (door.ops, door.bytes) == (3, 95)
    assert not door.crowded
    assert not door.has_room(1)
    assert "3/3 operations, 95/100" in repr(door)


@pytest.mark.parametrize(("ops", "volatile_bytes"), [(4, 0), (1, 56)])
async def test_I10_one_beyond_the_bound_waits_until_there_is_room(ops: int, volatile_bytes: int) -> None:
    door = gate()
    await door.enter(1, 40)
    waiting = asyncio.create_task(door.enter(ops, volatile_bytes))
    await turns()
    assert not waiting.done()
    assert door.crowded
    door.leave(1, 40)
    await waiting
    assert (door.ops, door.bytes) == (ops, volatile_bytes)
    assert not door.crowded


async def test_what_the_log_holds_does_not_count_as_bytes() -> None:
    door = gate(ops_max=10)
    await door.enter(1, 100)
    await door.enter(1)
    assert not door.has_room(1, 1)
    assert door.has_room(1, 0)


async def test_a_write_larger_than_the_bound_goes_alone() -> None:
    door = gate()
    await door.enter(50, 5_000)
    assert not door.has_room(1)
    small = asyncio.create_task(door.enter(1, 1))
    await turns()
    assert not small.done()
    door.leave(50, 5_000)
    await small
    large = asyncio.create_task(door.enter(50, 5_000))
    await turns()
    assert not large.done()
    door.leave(1, 1)
    await large


async def test_a_bound_of_zero_bytes_lets_one_in_at_a_time() -> None:
    door = gate(bytes_max=0)
    await door.enter(1, 10)
    assert not door.has_room(1, 10)
    assert door.has_room(1, 0)
    door.leave(1, 10)
    assert door.has_room(1, 10)


async def test_who_waits_is_let_in_in_order_and_nobody_overtakes() -> None:
    door = gate(ops_max=2)
    await door.enter(2)
    order: list[str] = []

    async def enter(name: str, ops: int) -> None:
        await door.enter(ops)
        order.append(name)

    tasks = [asyncio.create_task(enter(name, ops)) for name, ops in (("two", 2), ("one", 1), ("other", 1))]
    await turns()
    door.leave(1)
    await turns()
    assert order == [], "the small ones fit, but the large one is first"
    late = asyncio.create_task(enter("late", 1))
    await turns()
    assert order == []
    door.leave(1)
    await turns()
    assert order == ["two"]
    door.leave(2)
    await turns()
    assert order == ["two", "one", "other"]
    door.leave(1)
    await asyncio.gather(*tasks, late)
    assert order[-1] == "late"
    assert door.ops == 2


@pytest.mark.parametrize("wait_ms", [0, 1])
async def test_I10_who_waits_in_vain_gets_backpressure_and_counts_for_nothing(wait_ms: int) -> None:
    door = gate(wait_ms=wait_ms)
    await door.enter(3, 100)
    with pytest.raises(Backpressure, match="3 of 3 operations and 100 of 100") as refused:
        await door.enter(1, 1)
    assert refused.value.retryable
    assert (door.ops, door.bytes, door.crowded) == (3, 100, False)
    door.leave(3, 100)
    await door.enter(1, 1)


async def test_who_gives_up_lets_those_behind_through() -> None:
    door = gate(ops_max=2)
    await door.enter(1)
    large = asyncio.create_task(door.enter(2))
    small = asyncio.create_task(door.enter(1))
    await turns()
    assert not small.done()
    large.cancel()
    await small
    assert large.cancelled()
    assert (door.ops, door.crowded) == (2, False)


async def test_cancellation_at_the_moment_of_entry_gives_the_room_back() -> None:
    door = gate(ops_max=1)
    await door.enter(1, 5)
    first = asyncio.create_task(door.enter(1, 7))
    second = asyncio.create_task(door.enter(1, 9))
    await turns()
    door.leave(1, 5)  # lets the first one in, who has not run yet
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    await second
    assert (door.ops, door.bytes) == (1, 9)


async def test_what_a_recovered_log_holds_counts_bound_or_no_bound() -> None:
    door = gate()
    door.readmit(10)
    assert door.ops == 10
    waiting = asyncio.create_task(door.enter(1))
    await turns()
    door.leave(7)
    await turns()
    assert not waiting.done()
    door.leave(1)
    await waiting
    assert door.ops == 3


# Bands of pressure


@pytest.mark.parametrize(
    ("pressure", "level"),
    [
        (0.0, "normal"),
        (0.6999999, "normal"),
        (0.7, "warn"),
        (0.7999999, "warn"),
        (0.8, "hurry"),
        (0.8999999, "hurry"),
        (0.9, "slow"),
        (0.9499999, "slow"),
        (0.95, "refuse"),
        (1.0, "refuse"),
        (50.0, "refuse"),
    ],
)
def test_G47_each_band_begins_at_its_edge(pressure: float, level: str) -> None:
    assert Bands().level(pressure) == level


@given(st.floats(0.01, 0.98), st.floats(0.001, 0.99), st.floats(0, 3))
def test_the_bands_of_any_setting_are_in_order_and_the_delay_is_bounded(
    warn: float, more: float, pressure: float
) -> None:
    bands = Bands(warn, warn + (1 - warn) * more * 0.99)
    assert 0 < bands.warn <= bands.hurry <= bands.critical <= bands.refuse <= 1
    levels = ["normal", "warn", "hurry", "slow", "refuse"]
    assert levels.index(bands.level(pressure)) <= levels.index(bands.level(pressure + 0.01))
    delay_s = bands.delay_s(pressure, 2.0)
    assert 0 <= delay_s <= 2.0
    assert (delay_s == 0) == (pressure <= bands.critical)
    assert delay_s <= bands.delay_s(pressure + 0.01, 2.0)


@pytest.mark.parametrize(("pressure", "delay_s"), [(0.9, 0.0), (0.95, 1.0), (0.975, 1.5), (1.0, 2.0), (9.0, 2.0)])
def test_the_delay_grows_in_proportion(pressure: float, delay_s: float) -> None:
    assert Bands().delay_s(pressure, 2.0) == pytest.approx(delay_s)


def test_pressure_is_a_share_and_a_bound_of_nothing_is_full_at_once() -> None:
    assert [pressure_of(*each) for each in ((0, 10), (7, 10), (10, 10), (25, 10), (0, 0), (1, 0))] == [
        0.0,
        0.7,
        1.0,
        2.5,
        0.0,
        1.0,
    ]


@pytest.mark.parametrize(
    ("ops", "volatile_bytes", "level", "presses"),
    [
        (69, 0, "normal", False),
        (70, 0, "warn", False),
        (80, 0, "hurry", True),
        (1, 800, "hurry", True),
        (90, 0, "slow", True),
        (95, 0, "refuse", True),
        (1, 950, "refuse", True),
    ],
)
async def test_the_fuller_bound_is_the_pressure(ops: int, volatile_bytes: int, level: str, presses: bool) -> None:
    door = gate(ops_max=100, bytes_max=1_000)
    door.readmit(ops, volatile_bytes)
    assert (door.level, door.presses) == (level, presses)
    assert door.pressure == max(ops / 100, volatile_bytes / 1_000)


async def test_writes_are_slowed_in_proportion_and_deletes_are_not() -> None:
    slept: list[float] = []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)

    door = Gate(ops_max=100, bytes_max=1_000, wait_ms=FOR_EVER_MS, sleep=sleep)
    for _ in range(100):
        await door.enter(1)
    # The 92nd finds 91, and so on; the bands leave the rest alone.
    assert slept == [pytest.approx(SLOWED_S_MAX * n / 10) for n in range(1, 10)]
    door.leave(5)
    slept.clear()
    await door.enter(1, slowed=False)
    assert slept == []
    assert door.ops == 96


async def test_who_is_told_not_to_wait_is_not_slowed_either() -> None:
    slept: list[float] = []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)

    door = Gate(ops_max=100, bytes_max=1_000, wait_ms=0, sleep=sleep)
    door.readmit(99)
    await door.enter(1)
    assert slept == []


async def test_what_no_log_holds_waits_from_095_on_and_what_the_log_holds_does_not() -> None:
    for filled in ((95, 0), (1, 950)):
        door = gate(ops_max=100, bytes_max=1_000)
        door.readmit(*filled)
        assert not door.has_room(1, 1)
        assert door.has_room(1)
        waiting = asyncio.create_task(door.enter(1, 1))
        await turns()
        assert not waiting.done()
        door.leave(1, 1 if filled[1] else 0)
        await waiting


async def test_one_who_was_slowed_may_find_the_room_gone_and_waits() -> None:
    asleep: list[asyncio.Future[None]] = []

    async def sleep(seconds: float) -> None:
        asleep.append(asyncio.get_running_loop().create_future())
        await asleep[-1]

    door = Gate(ops_max=100, bytes_max=0, wait_ms=FOR_EVER_MS, sleep=sleep)
    door.readmit(99)
    slowed = [asyncio.create_task(door.enter(1)) for _ in range(2)]
    await turns()
    assert len(asleep) == 2
    for each in asleep:
        each.set_result(None)
    await turns()
    assert [each.done() for each in slowed] == [True, False]
    door.leave(1)
    await asyncio.gather(*slowed)
    cancelled = asyncio.create_task(door.enter(1, slowed=True))
    door.leave(1)
    await turns()
    cancelled.cancel()
    await asyncio.wait({cancelled})
    assert door.ops == 99, "who gives up while he is slowed counts for nothing"


async def test_new_bounds_hold_at_once_and_let_in_who_waits() -> None:
    door = gate(ops_max=1)
    await door.enter(1)
    waiting = asyncio.create_task(door.enter(1))
    await turns()
    door.bound(ops_max=2, bytes_max=100, wait_ms=0, bands=Bands(0.1, 0.2))
    await waiting
    assert door.ops == 2
    door.bound(ops_max=1, bytes_max=100, wait_ms=0, bands=Bands())
    with pytest.raises(Backpressure, match="2 of 1 operations"):
        await door.enter(1)
    door.leave(2)
    await door.enter(1)


steps = st.lists(
    st.one_of(
        st.tuples(st.just("enter"), st.integers(1, 6), st.integers(0, 150)),
        st.tuples(st.just("leave"), st.integers(0, 20), st.just(0)),
        st.tuples(st.just("cancel"), st.integers(0, 20), st.just(0)),
        st.tuples(st.just("run"), st.integers(0, 3), st.just(0)),
    ),
    max_size=40,
)


@given(steps)
def test_I10_what_goes_in_comes_out(script: list[tuple[str, int, int]]) -> None:
    async def play() -> None:
        door = gate(ops_max=5)
        inside: list[tuple[int, int]] = []
        tasks: list[asyncio.Task[None]] = []

        async def visit(ops: int, volatile_bytes: int) -> None:
            await door.enter(ops, volatile_bytes)
            inside.append((ops, volatile_bytes))

        for action, number, volatile_bytes in script:
            if action == "enter":
                tasks.append(asyncio.create_task(visit(number, volatile_bytes)))
            elif action == "leave" and inside:
                door.leave(*inside.pop(number % len(inside)))
            elif action == "cancel" and tasks:
                tasks[number % len(tasks)].cancel()
            elif action == "run":
                await turns(number)
        while True:
            await turns()
            assert door.ops == sum(ops for ops, _ in inside)
            assert door.bytes == sum(volatile_bytes for _, volatile_bytes in inside)
            assert door.ops <= 5 or len(inside) == 1
            assert door.bytes <= 95 or sum(1 for _, volatile_bytes in inside if volatile_bytes) == 1
            if not inside:
                break
            door.leave(*inside.pop())
        await asyncio.gather(*tasks, return_exceptions=True)
        assert (door.ops, door.bytes, door.crowded) == (0, 0, False)

    asyncio.run(play())
