"""An event loop without a world: time jumps to the next timer, and chance picks who runs next.

Nothing is waited for and nothing happens in parallel, so a run depends on its seed alone. Work that goes to threads
is done on the loop, a moment later. Tasks belong to processes, and a process can be killed: none of its tasks runs on,
no ``finally`` either.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Coroutine, Generator
from concurrent.futures import Executor
from contextlib import suppress
from contextvars import Context, ContextVar, copy_context
from heapq import heappop
from typing import Any, Final, TypeVar, TypeVarTuple

__all__ = ["Process", "SimulatedLoop", "Stuck"]

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

STEPS_MAX: Final = 200_000
"""A run of the suite takes a few thousand steps: who takes so many turns in a circle."""

THREAD_S_MAX: Final = 0.002


class Stuck(Exception):
    """Everybody waits for somebody else, or turns in a circle."""


class Process:
    """Tasks and callbacks that end together, each where it is."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.alive = True
        self.context = copy_context()
        self.context.run(_process.set, self)

    def __repr__(self) -> str:
        return f"<Process {self.name}{'' if self.alive else ', killed'}>"


_process: ContextVar[Process | None] = ContextVar("process", default=None)


class SimulatedLoop(asyncio.BaseEventLoop):
    """Runs one ready callback after the other, in an order that ``rng`` decides."""

    def __init__(self, rng: random.Random) -> None:
        super().__init__()
        self.steps = 0
        self.trace = 0
        """A number that two runs share only if they took the same steps at the same times."""
        self.problems: list[str] = []
        """What was raised where nobody listens."""
        self._rng = rng
        self._now_s = 0.0
        self._ready: list[asyncio.Handle] = []
        self._scheduled: list[asyncio.TimerHandle] = []
        self._tasks: list[_Task] = []
        self._made = 0
        self.set_exception_handler(_note_problem)

    def time(self) -> float:
        return self._now_s

    def create_future(self) -> asyncio.Future[Any]:
        return _Future(self)

    def create_task(
        self,
        coro: Generator[Any, None, T] | Coroutine[Any, Any, T],
        *,
        name: Any = None,
        context: Context | None = None,
        **_: Any,
    ) -> asyncio.Task[T]:
        task = _Task(coro, self, name, context)
        self._tasks.append(task)
        return task

    def run_in_executor(self, executor: Executor | None, func: Callable[[*Ts], T], *args: *Ts) -> asyncio.Future[T]:
        """Do it here, a moment later: a thread of its own, as far as anybody can tell."""
        done: asyncio.Future[T] = self.create_future()

        def work() -> None:
            try:
                answer = func(*args)
            except Exception as failed:  # noqa: BLE001  whoever waits for the thread is told
                if not done.done():
                    done.set_exception(failed)
            else:
                if not done.done():
                    done.set_result(answer)

        self.call_later(self._rng.uniform(0, THREAD_S_MAX), work)
        return done

    def running(self, process: Process | None = None) -> list[asyncio.Task[Any]]:
        """Tasks that are not done: of that process, or of none."""
        return [task for task in self._tasks if not task.done() and task.process is process]

    def kill(self, process: Process) -> None:
        """From now on nothing of this process happens."""
        process.alive = False

    def abandon(self) -> None:
        """End the simulation: unwind the tasks that were left where they were, without letting them do anything."""
        asyncio._set_running_loop(self)
        try:
            for task in self._tasks:
                if not task.done():
                    task._log_destroy_pending = False
                    with suppress(BaseException):  # whatever it still wants to do is not done any more
                        task.coro.close()
        finally:
            asyncio._set_running_loop(None)
        self.close()

    def _run_once(self) -> None:
        timers, ready = self._scheduled, self._ready
        while timers and timers[0].cancelled():
            heappop(timers)
        if not ready:
            if not timers:
                raise Stuck("nothing can happen any more")
            self._now_s = max(self._now_s, timers[0].when())
        while timers and timers[0].when() <= self._now_s:
            timer = heappop(timers)
            if not timer.cancelled():
                ready.append(timer)
        if not ready:
            return
        place = int(self._rng.random() * len(ready))
        ready[place], ready[-1] = ready[-1], ready[place]
        handle = ready.pop()
        process = handle._context.get(_process)  # type: ignore[attr-defined]  # asyncio keeps it without telling
        if handle.cancelled() or (process is not None and not process.alive):
            return
        self.steps += 1
        if self.steps > STEPS_MAX:
            raise Stuck(f"{STEPS_MAX} steps, and no end")
        self.trace = hash((self.trace, place, len(ready), self._now_s))
        handle._run()

    def _write_to_self(self) -> None:
        """Nobody sleeps who would have to be woken."""

    def __repr__(self) -> str:
        return f"<SimulatedLoop at {self._now_s:g} s, step {self.steps}>"


# Sets of tasks and futures are walked in an order that follows from their hashes: those must not be addresses.


class _Future(asyncio.Future[Any]):
    def __init__(self, loop: SimulatedLoop) -> None:
        loop._made += 1
        self._number = loop._made
        super().__init__(loop=loop)

    def __hash__(self) -> int:
        return self._number


class _Task(asyncio.Task[Any]):
    _log_destroy_pending: bool

    def __init__(self, coro: Any, loop: SimulatedLoop, name: Any, context: Context | None) -> None:
        loop._made += 1
        self._number = loop._made
        self.coro = coro
        self.process = _process.get() if context is None else context.get(_process)
        super().__init__(coro, loop=loop, name=name or f"task {self._number}", context=context)

    def __hash__(self) -> int:
        return self._number


def _note_problem(loop: asyncio.AbstractEventLoop, told: dict[str, Any]) -> None:
    assert isinstance(loop, SimulatedLoop)
    loop.problems.append(f"{told.get('message')}: {told.get('exception')!r}")
