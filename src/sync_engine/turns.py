"""Long work of the event loop gives way in between: to other tasks, and to other threads."""

from __future__ import annotations

import asyncio
import time

__all__ = ["give_way"]


async def give_way() -> None:
    """Let other threads and then other tasks have their turn.

    An event loop with more to do gives the GIL away for microseconds between two callbacks. A thread that waits for it
    wakes too late, finds it taken again, and begins the wait of 5 ms anew after which it may insist: that of the log
    was seen to wait 24 ms, and 200 callers with it.
    """
    time.sleep(1e-6)  # noqa: ASYNC251 - to be gone for as long as another thread takes to wake: some 60 µs
    await asyncio.sleep(0)
