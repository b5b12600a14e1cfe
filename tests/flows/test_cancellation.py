"""Every public coroutine is cancelled at every await it makes: the operation happens once or not at all, nothing leaks.

Fault matrix row 16. Two moments per await: while it waits, and just as its answer has come.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Generator
from typing import Any, Literal

import pytest

from sync_engine import Ack, Backpressure, SubmitOptions, SyncEngine, SyncItem

from .rig import CACHE, Held, Hurried, Rig, on, others, soon, until

AWAITS_MAX = 200  # far more than any verb makes

Moment = Literal["waiting", "answered"]
Verb = Callable[[SyncEngine], Awaitable[Any]]

OLD = SyncItem.from_json("x", {"n": 1}, state="old", updated_at=1)
NEW = SyncItem("x", b"\x00new", state="new", updated_at=2, version=2)
NEIGHBOUR = SyncItem("y", b"neighbour", state="old", updated_at=3)

WRITES: dict[str, tuple[Verb, SyncItem | None]] = {
    "submit, memory": (lambda engine: engine.submit(NEW, ack=Ack.MEMORY), NEW),
    "submit, logged": (lambda engine: engine.submit(NEW, ack=Ack.LOGGED), NEW),
    "submit, stored": (lambda engine: engine.submit(NEW, ack=Ack.STORED), NEW),
    "submit, if_version": (lambda engine: engine.submit(NEW, SubmitOptions(if_version=1)), NEW),
    "submit_many": (lambda engine: engine.submit_many([OLD, NEW], ack=Ack.STORED), NEW),
    "delete": (lambda engine: engine.delete("x"), None),
    "delete, stored": (lambda engine: engine.delete("x", ack=Ack.STORED), None),
    "delete_many": (lambda engine: engine.delete_many(["x", "absent"]), None),
    "set_state": (lambda engine: engine.set_state("x", "moved"), OLD.with_state("moved")),
    "flush": (lambda engine: _submit_and(engine, engine.flush), NEW),
    "receipt.stored": (lambda engine: _submit_and(engine, None), NEW),
}
READS: dict[str, tuple[Verb, Any]] = {
    "get": (lambda engine: engine.get("x"), OLD),
    "get, stale_ok": (lambda engine: engine.get("x", stale_ok=True), OLD),
    "get of what is absent": (lambda engine: engine.get("absent"), None),
    "get_many": (lambda engine: engine.get_many(["x", "y"]), {"x": OLD, "y": NEIGHBOUR}),
    "contains": (lambda engine: engine.contains("x"), True),
    "status": (lambda engine: _exists(engine), True),
    "scan_prefix": (lambda engine: engine.scan_prefix(""), [OLD, NEIGHBOUR]),
    "iter_prefix": (lambda engine: _listed(engine), [OLD, NEIGHBOUR]),
    "count_prefix": (lambda engine: engine.count_prefix("x"), 1),
    "get_by_state": (lambda engine: engine.get_by_state("old"), [OLD, NEIGHBOUR]),
    "list_state_ids": (lambda engine: engine.list_state_ids("old"), ["x", "y"]),
    "count_by_state": (lambda engine: engine.count_by_state("old"), 2),
}


async def _submit_and(engine: SyncEngine, then: Callable[[], Awaitable[None]] | None) -> None:
    receipt = await engine.submit(NEW, ack=Ack.MEMORY)
    await (receipt.stored() if then is None else then())


async def _exists(engine: SyncEngine) -> bool:
    return (await engine.status("x")).exists


async def _listed(engine: SyncEngine) -> list[SyncItem]:
    return [item async for item in engine.iter_prefix("")]


class _CancelledAt:
    """Awaits a coroutine and cancels the task that does so at its k-th await (0 is the first)."""

    def __init__(self, work: Awaitable[Any], at: int, moment: Moment) -> None:
        self._work = work
        self._left = at
        self._moment = moment

    def __await__(self) -> Generator[Any, None, Any]:
        task = asyncio.current_task()
        assert task is not None
        steps = self._work.__await__()
        said: Any = None
        failure: BaseException | None = None
        while True:
            try:
                waits_for = steps.send(said) if failure is None else steps.throw(failure)
            except StopIteration as ended:
                return ended.value
            failure = None
            if self._left == 0:
                if self._moment == "waiting" or waits_for is None:
                    task.cancel()
                else:
                    waits_for.add_done_callback(lambda _: task.cancel())
            self._left -= 1
            try:
                said = yield waits_for
            except BaseException as thrown:  # noqa: BLE001  # handed on to the coroutine inside
                failure = thrown


async def _cut(work: Awaitable[Any], at: int, moment: Moment) -> tuple[bool, Any]:
    """Run in a task of its own, cancelled at its k-th await: whether it was, and else what it returned."""

    async def whole() -> Any:
        return await _CancelledAt(work, at, moment)

    task = asyncio.create_task(whole())
    await asyncio.wait({task})
    return (True, None) if task.cancelled() else (False, task.result())


@pytest.fixture(params=["waiting", "answered"])
def moment(request: pytest.FixtureRequest) -> Any:
    return request.param


async def _quiet(before: set[asyncio.Task[Any]]) -> None:
    """Work that was begun for the caller may run on; in the end no task is left of it."""
    await until(lambda: others() <= before)


@pytest.mark.parametrize("name", WRITES)
async def test_G3_a_write_cancelled_at_any_await_happens_once_or_not_at_all(
    rig: Rig, name: str, moment: Moment
) -> None:
    verb, result = WRITES[name]
    async with rig.engine(batch_flush_ms=2) as engine:
        await engine.submit(NEIGHBOUR, ack=Ack.STORED)
        happened = []
        for at in range(AWAITS_MAX):
            await engine.submit(OLD, ack=Ack.STORED)
            engine._running.l1.clear()
            before = others()
            cut, _ = await _cut(verb(engine), at, moment)
            bystander = asyncio.create_task(engine.submit(NEIGHBOUR.with_version(at), ack=Ack.STORED))
            await engine.flush()
            await bystander
            await _quiet(before)
            item = await engine.get("x")
            assert item in (OLD, result)
            happened.append(item == result)
            await rig.check(engine, {"x": item, "y": NEIGHBOUR.with_version(at)})
            if not cut:
                break
    assert happened[-1]
    assert len(happened) > 1 or name == "submit, memory"  # which makes no await at all


@pytest.mark.parametrize("name", READS)
async def test_a_read_cancelled_at_any_await_leaves_nothing_and_disturbs_nobody(
    rig: Rig, name: str, moment: Moment
) -> None:
    verb, result = READS[name]
    async with rig.engine() as engine:
        await engine.submit_many([OLD, NEIGHBOUR], ack=Ack.STORED)
        for at in range(AWAITS_MAX):
            engine._running.l1.clear()
            before = others()
            same = asyncio.create_task(verb(engine))  # shares flights with the one that is cancelled
            cut, answer = await _cut(verb(engine), at, moment)
            assert await same == result
            assert cut or answer == result
            await _quiet(before)
            rig.at_rest(engine)
            if not cut:
                break
        assert at > 0
        assert await engine.get("x") == OLD


async def test_a_read_that_lifts_a_copy_upward_may_be_cancelled(rig: Rig, moment: Moment) -> None:
    async with rig.engine() as engine:
        await engine.submit(OLD, ack=Ack.STORED)
        for at in range(AWAITS_MAX):
            engine._running.l1.clear()
            await rig.l2.delete("x")
            before = others()
            cut, _ = await _cut(engine.get("x"), at, moment)
            await _quiet(before)
            assert await rig.l2.get("x") in (OLD, None)
            assert await engine.get("x") == OLD
            if not cut:
                break


async def test_start_cancelled_at_any_await_leaves_an_engine_that_can_be_started(rig: Rig, moment: Moment) -> None:
    async with rig.engine() as engine:
        await engine.submit(OLD, ack=Ack.STORED)
    before = others()
    for at in range(AWAITS_MAX):
        engine = rig.engine()
        cut, _ = await _cut(engine.start(), at, moment)
        assert cut == repr(engine).startswith("<SyncEngine: it has not been started")
        await engine.start()
        assert await engine.get("x") == OLD
        await engine.stop()
        await _quiet(before)
        if not cut:
            break
    assert at > 2


async def test_stop_cancelled_at_any_await_still_stops_and_loses_nothing(rig: Rig, moment: Moment) -> None:
    before = others()
    for at in range(AWAITS_MAX):
        engine = rig.engine()
        await engine.start()
        item = OLD.with_version(at)
        await engine.submit(item, ack=Ack.MEMORY)
        await engine.submit(SyncItem("c", b"cached"), CACHE)
        cut, _ = await _cut(engine.stop(), at, moment)
        await engine.start()  # nothing is in its way: the log can be had again
        assert await engine.get("x") == item
        await rig.check(engine, {"x": item})
        report = await engine.stop()
        assert (report.left_in_log, report.lost) == (0, 0)
        await _quiet(before)
        if not cut:
            break
    assert at > 2


async def test_cancelled_waits_at_a_bound_give_nothing_away(rig: Rig, moment: Moment) -> None:
    held: list[Held] = []
    async with rig.engine(
        around=on("l3", Held, held), wal_max_items=1, backpressure_wait_ms=60_000, batch_flush_ms=0
    ) as engine:
        for at in range(AWAITS_MAX):
            held[0].hold()
            await engine.submit(OLD)
            work = asyncio.create_task(_cut(engine.submit(NEW), at, moment))
            await soon()
            held[0].release()
            cut, _ = await work
            await engine.flush()
            await rig.check(engine, {"x": await engine.get("x")})
            if not cut:
                break
        assert at > 0


async def test_stop_ends_the_waits_at_a_bound(rig: Rig) -> None:
    held: list[Held] = []
    engine = rig.engine(around=on("l3", Held, held), wal_max_items=1, backpressure_wait_ms=300, batch_flush_ms=0)
    await engine.start()
    held[0].hold()
    await engine.submit(OLD)
    waiting = asyncio.create_task(engine.submit(NEW))
    await soon()
    held[0].release()
    stopping = asyncio.create_task(engine.stop(timeout=5))
    outcomes = await asyncio.gather(waiting, return_exceptions=True)
    assert (await stopping).left_in_log == 0
    assert isinstance(outcomes[0], Exception)
    async with rig.engine() as engine:
        assert await engine.get("x") == OLD


async def test_G3_three_hundred_cancelled_callers_cost_the_others_nothing(rig: Rig) -> None:
    before = others()
    async with rig.engine(batch_flush_ms=1, clock=Hurried(), l1_max_bytes=4_096) as engine:
        await engine.submit_many([SyncItem.from_json(f"k.{n}", {"n": n}) for n in range(50)], ack=Ack.STORED)
        acknowledged: dict[str, SyncItem] = {}
        begun: dict[str, list[SyncItem]] = {}

        async def write(n: int) -> None:
            item = SyncItem.from_json(f"w.{n % 30}", {"n": n}, version=n)
            begun.setdefault(item.object_id, []).append(item)
            await engine.submit(item, ack=list(Ack)[n % 3])
            acknowledged[item.object_id] = item

        async def read(n: int) -> None:
            item = await engine.get(f"k.{n % 50}")
            assert item is not None
            assert item.json() == {"n": n % 50}

        for _ in range(3):
            tasks = [asyncio.create_task(write(n) if n % 2 else read(n)) for n in range(300)]
            for n, task in enumerate(tasks):
                if n % 3:
                    asyncio.get_running_loop().call_later((n % 17) / 5_000, task.cancel)
            outcomes = await asyncio.gather(*tasks, return_exceptions=True)
            failed = [o for o in outcomes if isinstance(o, Exception) and not isinstance(o, Backpressure)]
            assert failed == []
            assert sum(isinstance(o, asyncio.CancelledError) for o in outcomes) > 20
            await engine.flush()
            for object_id in begun:
                item = await engine.get(object_id)
                assert item in begun[object_id] or (item is None and object_id not in acknowledged)
                assert await rig.in_tiers(object_id) == (item, item)
            rig.at_rest(engine)
        assert (await engine.get("k.7")).json() == {"n": 7}
    await _quiet(before)
