"""The n-th call of a tier fails, for every n until a scenario runs untouched: nothing acknowledged is lost or stale.

Each scenario moves a model along with what was acknowledged; afterwards L1, L2 and L3 equal the model.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Literal

import pytest

from sync_engine import Ack, SubmitOptions, SyncEngine, SyncItem, TierUnavailable
from sync_engine.testing.tiers import Breaking

from .rig import CACHE, DURABLE, Rig, on, others, until

pytestmark = pytest.mark.slow  # as a whole, and no matter of the Python that runs it

CALLS_MAX = 60  # far more than any scenario makes: a sweep that gets there does not end

Model = dict[str, SyncItem | None]
Scenario = Callable[[SyncEngine, Model, dict[str, SubmitOptions]], Awaitable[None]]

PLACES = [SyncItem.from_json(f"p.{n}", {"n": n}, state="new") for n in range(3)]


async def _put(
    engine: SyncEngine,
    model: Model,
    kept: dict[str, SubmitOptions],
    item: SyncItem,
    options: SubmitOptions = SubmitOptions(),  # noqa: B008  # frozen
    ack: Ack = Ack.LOGGED,
) -> None:
    await engine.submit(item, options, ack=ack)
    model[item.object_id], kept[item.object_id] = item, options


def _writing(ack: Ack) -> Scenario:
    async def scenario(engine: SyncEngine, model: Model, kept: dict[str, SubmitOptions]) -> None:
        for item in PLACES:
            await _put(engine, model, kept, item, ack=ack)
        await _put(engine, model, kept, SyncItem("c", b"\x00cached", state="new"), CACHE, ack)
        await _put(engine, model, kept, SyncItem("d", b"durable"), DURABLE, ack)
        # Over what is stored by now: another type, another state, another set of tiers.
        await _put(engine, model, kept, SyncItem("p.0", b"\xff", version=2), ack=ack)
        await _put(engine, model, kept, SyncItem("p.1", b"[]", version=2), CACHE, ack)
        await _put(engine, model, kept, SyncItem("p.2", b"{}", version=2), DURABLE, ack)

    return scenario


async def _setting_states_and_deleting(engine: SyncEngine, model: Model, kept: dict[str, SubmitOptions]) -> None:
    for item in PLACES:
        await _put(engine, model, kept, item)
    await _put(engine, model, kept, SyncItem("c", b"cached"), CACHE, Ack.STORED)
    await engine.flush()
    for object_id in ("p.0", "c"):
        held = model[object_id]
        assert held is not None
        assert await engine.set_state(object_id, "old")
        model[object_id] = held.with_state("old")
    assert await engine.delete("p.1", ack=Ack.STORED)
    assert await engine.delete("p.2")
    model["p.1"] = model["p.2"] = None
    await _put(engine, model, kept, SyncItem("p.2", b"again"))
    assert await engine.delete_many(["c", "p.2"]) == 2
    model["c"] = model["p.2"] = None


SCENARIOS = {
    "memory": _writing(Ack.MEMORY),
    "logged": _writing(Ack.LOGGED),
    "stored": _writing(Ack.STORED),
    "states and deletes": _setting_states_and_deleting,
}


class Sweep:
    """Rounds of one scenario, each with a fault one call later than the last, on a folder and a prefix of its own."""

    def __init__(self, tmp_path: Path, redis_url: str, redis_prefix: str, tier: str, when: str) -> None:
        self._at = (tmp_path, redis_url, redis_prefix)
        self._tier = tier
        self._when: Literal["before", "after"] = "before" if when == "before" else "after"

    async def run(self, round_: Callable[[Rig, Callable[..., SyncEngine], list[Breaking]], Awaitable[None]]) -> int:
        """Returns how many calls were broken, one per round."""
        path, url, prefix = self._at
        for n in range(1, CALLS_MAX):
            (path / str(n)).mkdir()
            rig = Rig(path / str(n), url, f"{prefix}{n}:")
            breaking: list[Breaking] = []

            def engine(rig: Rig = rig, n: int = n, breaking: list[Breaking] = breaking) -> SyncEngine:
                wrap = on(self._tier, lambda tier: Breaking(tier, at=n, when=self._when), breaking)
                return rig.engine(around=wrap, batch_flush_ms=3, batch_flush_count=2)

            before = others()
            try:
                await round_(rig, engine, breaking)
            finally:
                await rig.close()
            assert others() <= before, "tasks are left"
            if not breaking[-1].broken:
                return n - 1
        raise AssertionError(f"{CALLS_MAX} calls and no end")


@pytest.fixture(params=["l2", "l3"])
def tier(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=["before", "after"])
def sweep(request: pytest.FixtureRequest, tmp_path: Path, redis_url: str, redis_prefix: str, tier: str) -> Sweep:
    return Sweep(tmp_path, redis_url, redis_prefix, tier, request.param)


@pytest.mark.parametrize("name", SCENARIOS)
async def test_writes_reach_every_tier_whichever_call_fails(sweep: Sweep, name: str) -> None:
    async def round_(rig: Rig, make: Callable[..., SyncEngine], breaking: list[Breaking]) -> None:
        model: Model = {}
        kept: dict[str, SubmitOptions] = {}
        async with make() as engine:
            await SCENARIOS[name](engine, model, kept)
            await engine.flush()
            breaking[-1].heal()
            await rig.check(engine, model, options=kept)
            report = await engine.stop()
        assert (report.left_in_log, report.lost) == (0, 0)

    assert await sweep.run(round_) >= 2


async def test_reads_are_right_or_an_error_whichever_call_fails(sweep: Sweep, tier: str) -> None:
    in_sql_alone = SyncItem("s", b'{"from":"sql"}', state="s", stamp=7)
    in_both = SyncItem("b", b"\x00both", stamp=8)
    in_redis_alone = SyncItem("r", b"redis", stamp=9, expires_at=4_000_000_000_000)

    async def round_(rig: Rig, make: Callable[..., SyncEngine], breaking: list[Breaking]) -> None:
        await (await rig.l3()).put_batch([in_sql_alone, in_both])
        await rig.l2.put_batch([in_both, in_redis_alone])
        async with make() as engine:
            for expected in (in_sql_alone, in_both, in_redis_alone, None):
                object_id = expected.object_id if expected is not None else "absent"
                try:
                    assert await engine.contains(object_id) is (expected is not None)
                except TierUnavailable as down:
                    _blamed(down, "l2 or l3")
                assert await _answer(engine, object_id, tier) == expected
                assert await _answer(engine, object_id, tier) == expected
            try:
                found = await engine.get_many(["s", "b", "r", "absent"])
            except TierUnavailable as down:
                _blamed(down, tier, "l2")
            else:
                assert set(found) == {"s", "b", "r"}
            await engine.stop()  # waits for the copies that go upward
        promoted = await rig.l2.get("s")
        assert promoted == in_sql_alone or breaking[-1].broken

    assert await sweep.run(round_) >= 2


async def test_scans_and_state_queries_are_right_or_an_error_whichever_call_fails(sweep: Sweep, tier: str) -> None:
    async def round_(rig: Rig, make: Callable[..., SyncEngine], breaking: list[Breaking]) -> None:
        async with make() as engine:
            await engine.submit_many(PLACES, ack=Ack.MEMORY)
            for ask, expected in (
                (lambda: engine.scan_prefix("p."), PLACES),
                (lambda: engine.get_by_state("new"), PLACES),
                (lambda: engine.list_state_ids("new"), [item.object_id for item in PLACES]),
                (lambda: engine.count_by_state("new"), 3),
                (lambda: engine.count_prefix("p"), 3),
            ):
                try:
                    assert await ask() == expected
                except TierUnavailable as down:
                    _blamed(down, "l3" if tier == "l3" else "nobody")
            await engine.flush()
            breaking[-1].heal()
            assert await engine.scan_prefix("") == PLACES

    await sweep.run(round_)


async def test_recovery_loses_nothing_whichever_call_fails(sweep: Sweep) -> None:
    async def round_(rig: Rig, make: Callable[..., SyncEngine], breaking: list[Breaking]) -> None:
        model: Model = {}
        kept: dict[str, SubmitOptions] = {}
        async with rig.engine() as engine:
            await _put(engine, model, kept, SyncItem("gone", b"0", state="s"), ack=Ack.STORED)
            await _put(engine, model, kept, SyncItem("moved", b"{}", state="s"), ack=Ack.STORED)
        async with rig.engine(around=lambda tier: Breaking(tier, times=None, verbs=("apply",))) as engine:
            for item in PLACES:
                await _put(engine, model, kept, item)
            await _put(engine, model, kept, PLACES[0].with_state("old"))
            await _put(engine, model, kept, SyncItem("p.1", b"\x01", version=3), DURABLE)
            assert await engine.set_state("moved", "t")
            model["moved"] = SyncItem("moved", b"{}", state="t", updated_at=_updated_at(model, "moved"))
            assert await engine.delete("gone")
            model["gone"] = None
            assert (await engine.stop(timeout=0)).left_in_log == 7
        async with make() as engine:
            assert engine.stats().recovered == 7
            await until(lambda: not engine.stats().pending)
            breaking[-1].heal()
            await rig.check(engine, model, options=kept)
        async with rig.engine() as engine:
            assert engine.stats().recovered == 0

    assert await sweep.run(round_) >= 1


async def test_stop_leaves_nothing_behind_whichever_call_fails(sweep: Sweep) -> None:
    async def round_(rig: Rig, make: Callable[..., SyncEngine], breaking: list[Breaking]) -> None:
        async with make() as engine:
            await engine.submit_many(PLACES, ack=Ack.MEMORY)
            await engine.submit(SyncItem("c", b"cached"), CACHE)
            report = await engine.stop()
        assert (report.left_in_log, report.lost) == (0, 0)
        for item in PLACES:
            assert await rig.in_tiers(item.object_id) == (item, item)
        assert (await rig.l2.get("c")) is not None

    assert await sweep.run(round_) >= 1


async def _answer(engine: SyncEngine, object_id: str, tier: str) -> SyncItem | None:
    """What ``get`` says; where the broken call was one of those that look after Redis, once it is looked after."""
    while True:
        try:
            return await engine.get(object_id)
        except TierUnavailable as down:
            _blamed(down, tier, "l2")
            await asyncio.sleep(0.001)


def _blamed(down: TierUnavailable, *tiers: str) -> None:
    """An error is as good as an answer, if it names a tier that cannot be asked: L2 is not, until L3 vouches for it."""
    assert down.tier in tiers


def _updated_at(model: Model, object_id: str) -> int:
    item = model[object_id]
    assert item is not None
    return item.updated_at
