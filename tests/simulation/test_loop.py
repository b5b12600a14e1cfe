"""The loop that runs a simulation."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Iterator

import pytest

from sync_engine.testing.simulation import Process, SimulatedLoop, Stuck


@pytest.fixture
def loop() -> Iterator[SimulatedLoop]:
    made = SimulatedLoop(random.Random(1))
    yield made
    if not made.is_closed():
        made.abandon()


def test_time_jumps_to_the_next_timer(loop: SimulatedLoop) -> None:
    async def sleep() -> list[float]:
        woken = []
        for seconds in (3600.0, 0.5, 86_400.0):
            await asyncio.sleep(seconds)
            woken.append(loop.time())
        return woken

    assert loop.run_until_complete(sleep()) == [3600.0, 3600.5, 90_000.5]


def order_of(seed: int) -> list[int]:
    loop = SimulatedLoop(random.Random(seed))
    ran: list[int] = []

    async def note(number: int) -> None:
        for _ in range(3):
            ran.append(number)
            await asyncio.sleep(0)

    async def all_of_them() -> None:
        await asyncio.gather(*map(note, range(5)))

    loop.run_until_complete(all_of_them())
    loop.abandon()
    return ran


def test_the_seed_decides_who_runs_next() -> None:
    assert order_of(1) == order_of(1)
    assert len({tuple(order_of(seed)) for seed in range(20)}) > 10


def test_who_waits_for_nobody_is_told(loop: SimulatedLoop) -> None:
    async def wait() -> None:
        await loop.create_future()

    with pytest.raises(Stuck, match="nothing can happen"):
        loop.run_until_complete(wait())


def test_a_killed_process_ends_where_it_is(loop: SimulatedLoop) -> None:
    """No ``finally``, no callback, no task that it began: ``kill -9`` asks nobody."""
    ran: list[str] = []
    process = Process("victim")

    async def child() -> None:
        await asyncio.sleep(2)
        ran.append("child")

    async def victim() -> None:
        children = [asyncio.create_task(child())]
        try:
            await asyncio.wait(children)
        finally:
            ran.append("finally")

    async def murder() -> None:
        loop.create_task(victim(), context=process.context)
        loop.call_later(3, ran.append, "somebody else")
        await asyncio.sleep(1)
        assert len(loop.running(process)) == 2
        loop.kill(process)
        await asyncio.sleep(10)

    loop.run_until_complete(murder())
    assert ran == ["somebody else"]
    loop.abandon()
    assert not loop.problems


def test_what_goes_to_a_thread_is_done_on_the_loop_a_moment_later(loop: SimulatedLoop) -> None:
    def fail() -> None:
        raise OSError("no disk")

    async def work() -> threading.Thread:
        with pytest.raises(OSError, match="no disk"):
            await asyncio.to_thread(fail)
        return await asyncio.to_thread(threading.current_thread)

    assert loop.run_until_complete(work()) is threading.current_thread()
    assert loop.time() > 0


def test_what_is_raised_where_nobody_listens_is_kept(loop: SimulatedLoop) -> None:
    async def fail() -> None:
        loop.call_soon(lambda: 1 / 0)
        await asyncio.sleep(1)

    loop.run_until_complete(fail())
    assert "ZeroDivisionError" in loop.problems[0]
