"""The gate before the log: its bounds, its order, and that whoever gives up takes nothing with him."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sync_engine import Backpressure
from sync_engine.pressure import Gate

FOR_EVER_MS = 600_000


async def turns(count: int = 5) -> None:
    """Let every task that can run do so."""
    for _ in range(count):
        await asyncio.sleep(0)


def gate(ops_max: int = 3, bytes_max: int = 100, wait_ms: int = FOR_EVER_MS) -> Gate:
    return Gate(ops_max=ops_max, bytes_max=bytes_max, wait_ms=wait_ms)


async def test_I10_writes_up_to_the_bound_do_not_wait() -> None:
    door = gate()
    await door.enter(1, 40)
    await door.enter(2, 60)
    assert (door.ops, door.bytes) == (3, 100)
    assert not door.crowded
    assert not door.has_room(1)
    assert "3/3 operations, 100/100" in repr(door)


@pytest.mark.parametrize(("ops", "volatile_bytes"), [(4, 0), (1, 61)])
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
            assert door.bytes <= 100 or sum(1 for _, volatile_bytes in inside if volatile_bytes) == 1
            if not inside:
                break
            door.leave(*inside.pop())
        await asyncio.gather(*tasks, return_exceptions=True)
        assert (door.ops, door.bytes, door.crowded) == (0, 0, False)

    asyncio.run(play())
