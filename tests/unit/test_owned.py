"""Work that ends whoever gives up waiting: it is waited for by its owner, and its errors are told once."""

from __future__ import annotations

import asyncio
import gc
from typing import Any

import pytest

from sync_engine.owned import Owned, outlasting


@pytest.fixture
async def complaints() -> list[str]:
    """What asyncio reports of this test's tasks."""
    gc.collect()  # a report comes when a task is forgotten: not those of other tests
    told: list[str] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: told.append(context["message"]))
    return told


def shield_of_python_3_14(inner: asyncio.Future[Any]) -> asyncio.Future[Any]:
    """Since then an error reaches the loop's handler if the caller has gone, retrieved or not (CPython gh-86802)."""
    outer: asyncio.Future[Any] = inner.get_loop().create_future()

    def ended(_: asyncio.Future[Any]) -> None:
        if inner.cancelled():
            outer.cancel()
        elif (error := inner.exception()) is None:
            outer.cancelled() or outer.set_result(inner.result())
        elif not outer.cancelled():
            outer.set_exception(error)
        else:
            told = {"message": f"{type(error).__name__} exception in shielded future", "exception": error}
            inner.get_loop().call_exception_handler(told)

    inner.add_done_callback(ended)
    return outer


class Work:
    """Waits to be let on, then ends, by an error where there is one."""

    def __init__(self, error: Exception | None = None) -> None:
        self.on = asyncio.Event()
        self.ended = False
        self._error = error

    async def run(self) -> str:
        await self.on.wait()
        self.ended = True
        if self._error is not None:
            raise self._error
        return "done"


async def test_a_cancelled_caller_leaves_his_work_to_finish_and_its_owner_waits_for_it() -> None:
    owned, work = Owned(), Work()
    caller = asyncio.create_task(owned.whole(work.run()))
    await asyncio.sleep(0.001)
    caller.cancel()
    await asyncio.wait([caller])
    assert (caller.cancelled(), len(owned)) == (True, 1)
    over = asyncio.create_task(owned.over())
    await asyncio.sleep(0.001)
    assert not over.done()
    work.on.set()
    await over
    assert (work.ended, len(owned)) == (True, 0)


async def test_what_begins_while_its_owner_waits_is_waited_for_too() -> None:
    owned, first, second = Owned(), Work(), Work()
    owned.start(first.run())
    over = asyncio.create_task(owned.over())
    await asyncio.sleep(0)
    second.on.set()
    first.on.set()
    owned.start(second.run())
    await over
    assert (first.ended, second.ended) == (True, True)


async def test_who_waits_is_told_how_it_ended() -> None:
    owned, good, bad = Owned(), Work(), Work(KeyError("no"))
    for work in (good, bad):
        work.on.set()
    assert await owned.whole(good.run()) == "done"
    with pytest.raises(KeyError):
        await owned.whole(bad.run())
    await owned.over()


async def test_an_error_whose_caller_has_gone_is_not_reported(
    complaints: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With it would go what a driver quotes of a row."""
    monkeypatch.setattr(asyncio, "shield", shield_of_python_3_14)
    owned, work = Owned(), Work(KeyError("no"))
    caller = asyncio.create_task(owned.whole(work.run()))
    await asyncio.sleep(0.001)
    caller.cancel()
    await asyncio.wait([caller])
    work.on.set()
    await owned.over()
    await asyncio.sleep(0)
    del caller, work
    gc.collect()
    assert complaints == []


async def test_an_error_of_work_that_nobody_waits_for_is_reported(complaints: list[str]) -> None:
    owned, work = Owned(), Work(KeyError("no"))
    owned.alone(work.run())
    work.on.set()
    await owned.over()
    del work
    gc.collect()
    assert complaints == ["Task exception was never retrieved"]


async def test_an_error_of_a_task_that_nobody_owns_is_not_reported_once_a_caller_has_left_it(
    complaints: list[str],
) -> None:
    work = Work(KeyError("no"))
    task = asyncio.create_task(work.run())
    caller = asyncio.create_task(outlasting(task))
    await asyncio.sleep(0.001)
    caller.cancel()
    await asyncio.wait([caller])
    work.on.set()
    await asyncio.wait([task])
    assert (caller.cancelled(), task.cancelled(), work.ended) == (True, False, True)
    del task, caller, work
    gc.collect()
    assert complaints == []


async def test_what_has_ended_is_told_without_a_turn_of_the_loop() -> None:
    task = asyncio.create_task(asyncio.sleep(0, "done"))
    await asyncio.wait([task])
    turns: list[None] = []
    asyncio.get_running_loop().call_soon(turns.append, None)
    assert (await outlasting(task), turns) == ("done", [])


async def test_who_waits_for_what_others_cancel_is_told_so() -> None:
    task = asyncio.create_task(Work().run())
    caller = asyncio.create_task(outlasting(task))
    await asyncio.sleep(0.001)
    task.cancel()
    await asyncio.wait([caller])
    assert (caller.cancelled(), caller.cancelling()) == (True, 0)
