"""Long work of the event loop gives way in between: to other tasks, and to threads that somebody waits for."""

from __future__ import annotations

import asyncio
import threading
import time
from typing import Final

__all__ = ["WAITED_FOR", "at_once", "give_way"]

WAITED_FOR: Final[set[threading.Thread]] = set()
"""Threads with something to do that callers wait for. Of the whole process, as the GIL is."""


def at_once() -> int:
    """How many things of some 6 µs each to do before the next ``give_way``."""
    return 8 if WAITED_FOR else 64


async def give_way() -> None:
    """Let threads that are waited for and then other tasks have their turn.

    An event loop with more to do gives the GIL away for microseconds between two callbacks. A thread that waits for it
    wakes too late, finds it taken again, and begins the wait of 5 ms anew after which it may insist: that of the log
    was seen to wait 24 ms, and 200 callers with it.
    """
    if WAITED_FOR:
        time.sleep(1e-6)  # noqa: ASYNC251 - to be gone for as long as another thread takes to wake: some 60 µs
    await asyncio.sleep(0)
