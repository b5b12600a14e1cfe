"""Work that is done to its end, whoever gives up waiting for it.

I/O that is cut short leaves a connection in the middle of a reply, a transaction with its locks, a thread that
writes on behind what others do then. So each piece runs in a task, and whoever has to be there until it ends owns it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from functools import partial
from typing import Any, TypeVar

__all__ = ["Owned", "outlasting"]

T = TypeVar("T")


class Owned:
    """The work of one owner that is under way. Nothing is refused here: who closes says what may still begin."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()

    async def whole(self, work: Coroutine[Any, Any, T]) -> T:
        """What comes of the work. A caller that is cancelled goes, and the work goes on."""
        return await outlasting(self.start(work))

    def start(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """The same as a task: for ``outlasting``."""
        task = self._begun(work)
        task.add_done_callback(self._ended)
        return task

    def alone(self, work: Coroutine[Any, Any, object]) -> None:
        """Work that nobody waits for: an error that it does not catch is reported by asyncio."""
        task = self._begun(work)
        task.add_done_callback(self._tasks.discard)

    async def over(self) -> None:
        """Wait for what is under way, and for what begins meanwhile. However it ends, nothing is raised."""
        while self._tasks:
            await asyncio.wait(self._tasks)

    def __len__(self) -> int:
        return len(self._tasks)

    def __repr__(self) -> str:
        return f"<Owned {len(self._tasks)} under way>"

    def _begun(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        return task

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        _seen(task)


async def outlasting(task: asyncio.Future[T]) -> T:
    """What comes of a task or a future. A caller that is cancelled goes, and it goes on.

    ``asyncio.shield`` would not do: from Python 3.14 on (gh-86802) it gives an error whose caller has gone to the
    loop's handler, though it was retrieved, and so what a driver quotes of a row to somebody's log. This costs as much,
    in the same steps of the loop; ``asyncio.wait`` costs more.
    """
    if not task.done():
        ended: asyncio.Future[None] = task.get_loop().create_future()
        task.add_done_callback(tell := partial(_tell, ended))
        ended.add_done_callback(lambda _: task.remove_done_callback(tell))
        try:
            await ended
        except asyncio.CancelledError:
            task.add_done_callback(_seen)
            raise
    return task.result()


def _tell(ended: asyncio.Future[None], _: object) -> None:
    if not ended.done():
        ended.set_result(None)


def _seen(task: asyncio.Future[Any]) -> None:
    """Keep asyncio from reporting its error: who awaits it is told, or is gone."""
    if not task.cancelled():
        task.exception()
