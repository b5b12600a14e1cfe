"""``get_or_load``: one loader per id however many wait, and what it brings passes nothing newer."""

from __future__ import annotations

import asyncio

import pytest

from sync_engine import Ack, InvalidId, InvalidItem, NotRunning, SyncItem, TierNotConfigured, TierUnavailable
from sync_engine.testing.tiers import Breaking

from .rig import CACHE, Held, Rig, on, soon

A = SyncItem("a", b"loaded", updated_at=1)


class Loader:
    """Answers once it is let go; counts its calls."""

    def __init__(self, answer: SyncItem | Exception | None = A) -> None:
        self.answer = answer
        self.calls: list[str] = []
        self.go = asyncio.Event()

    async def __call__(self, object_id: str) -> SyncItem | None:
        self.calls.append(object_id)
        await self.go.wait()
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


@pytest.fixture
def loader() -> Loader:
    return Loader()


async def test_one_loader_is_called_and_what_it_returns_is_stored(rig: Rig, loader: Loader) -> None:
    async with rig.engine() as engine:
        waiting = [asyncio.create_task(engine.get_or_load("a", loader)) for _ in range(50)]
        await soon()
        loader.go.set()
        assert await asyncio.gather(*waiting) == [A] * 50
        assert loader.calls == ["a"]
        assert await engine.get_or_load("a", loader) == A
        assert loader.calls == ["a"]
        await rig.check(engine, {"a": A})
    async with rig.engine() as engine:
        assert await engine.get_or_load("a", Loader(AssertionError())) == A


async def test_a_ttl_keeps_it_in_redis_alone(rig: Rig, loader: Loader) -> None:
    loader.go.set()
    async with rig.engine() as engine:
        assert await engine.get_or_load("a", loader, ttl=60) == A
        await rig.check(engine, {"a": A}, options={"a": CACHE})
        assert 0 < await rig.key("PTTL", rig.redis_prefix + "a") <= 60_000
    async with rig.engine(sql_url=None, data="other") as engine:
        loader.answer = SyncItem("b", b"without a lifetime")
        assert await engine.get_or_load("b", loader) == loader.answer
        await engine.flush()
        assert await rig.key("PTTL", rig.redis_prefix + "b") == -1


async def test_what_a_loader_raises_reaches_all_and_is_not_kept(rig: Rig, loader: Loader) -> None:
    loader.answer = ZeroDivisionError("of the test")
    async with rig.engine() as engine:
        waiting = [asyncio.create_task(engine.get_or_load("a", loader)) for _ in range(5)]
        await soon()
        loader.go.set()
        outcomes = await asyncio.gather(*waiting, return_exceptions=True)
        assert [type(each) for each in outcomes] == [ZeroDivisionError] * 5
        loader.answer = A
        assert await engine.get_or_load("a", loader) == A
        assert loader.calls == ["a", "a"]


async def test_no_such_item_is_an_answer_and_not_kept(rig: Rig, loader: Loader) -> None:
    loader.answer = None
    loader.go.set()
    async with rig.engine(redis=False) as engine:
        assert await engine.get_or_load("a", loader) is None
        assert await engine.get_or_load("a", loader) is None
        assert loader.calls == ["a", "a"]
        assert not await engine.contains("a")


async def test_who_gives_up_takes_nobody_with_him(rig: Rig, loader: Loader) -> None:
    async with rig.engine() as engine:
        first, second = (asyncio.create_task(engine.get_or_load("a", loader)) for _ in range(2))
        await soon()
        while not loader.calls:  # noqa: ASYNC110  # a read of two real servers comes first
            await asyncio.sleep(0.001)
        first.cancel()
        await asyncio.wait({first})
        assert first.cancelled()
        loader.go.set()
        assert await second == A
        last = asyncio.create_task(engine.get_or_load("b", Loader(SyncItem("b", b"x"))))
        await soon()
        last.cancel()
        await asyncio.wait({last})


async def test_a_failure_that_nobody_waits_for_any_more_is_no_noise(rig: Rig, loader: Loader) -> None:
    loader.answer = ZeroDivisionError()
    async with rig.engine(redis=False) as engine:
        alone = asyncio.create_task(engine.get_or_load("a", loader))
        while not loader.calls:  # noqa: ASYNC110  # as above
            await asyncio.sleep(0.001)
        alone.cancel()
        await asyncio.wait({alone})
        loader.go.set()
        await soon()
        assert repr(engine._loads) == "<Flights 0 under way>"


@pytest.mark.parametrize("ttl", [None, 60])
@pytest.mark.parametrize("by_another", [False, True])
@pytest.mark.parametrize("deleted", [False, True])
async def test_I1_what_is_written_while_the_loader_runs_stays(
    rig: Rig, loader: Loader, ttl: float | None, by_another: bool, deleted: bool
) -> None:
    newer = SyncItem("a", b"written", version=2, updated_at=1)
    async with rig.engine() as engine, rig.engine(data="other") as other:
        loading = asyncio.create_task(engine.get_or_load("a", loader, ttl=ttl))
        while not loader.calls:  # noqa: ASYNC110  # as above
            await asyncio.sleep(0.001)
        writer = other if by_another else engine
        await writer.submit(newer, ack=Ack.STORED if by_another else None)
        if deleted:
            await writer.delete("a", ack=Ack.STORED if by_another else None)
        loader.go.set()
        await loading
        await engine.flush()
        await other.flush()
        expected = None if deleted else newer
        assert await rig.in_tiers("a") == (expected, expected)
        assert await engine.get("a") == expected
        if not by_another:
            assert loading.result() == expected


async def test_what_may_exist_is_not_loaded_over(rig: Rig, loader: Loader) -> None:
    async with rig.engine(around=on("l3", lambda tier: Breaking(tier, times=None, verbs=("fetch",)))) as engine:
        with pytest.raises(TierUnavailable):
            await engine.get_or_load("a", loader)
        assert loader.calls == []


async def test_a_stop_cuts_the_loading_short(rig: Rig, loader: Loader) -> None:
    engine = rig.engine(redis=False)
    await engine.start()
    loading = asyncio.create_task(engine.get_or_load("a", loader))
    while not loader.calls:  # noqa: ASYNC110  # as above
        await asyncio.sleep(0.001)
    await engine.stop()
    with pytest.raises(NotRunning):
        await loading
    with pytest.raises(NotRunning):
        await engine.get_or_load("a", loader)


async def test_bad_arguments_and_bad_loaders(rig: Rig, loader: Loader) -> None:
    loader.go.set()
    async with rig.engine(redis=False) as engine:
        with pytest.raises(InvalidId):
            await engine.get_or_load("state:x", loader)
        with pytest.raises(TierNotConfigured):
            await engine.get_or_load("a", loader, ttl=60)
        with pytest.raises(InvalidItem, match="ttl"):
            await engine.get_or_load("a", loader, ttl=0)
        assert loader.calls == []
        with pytest.raises(InvalidItem, match="loader: an item of 'a'; must return that of 'b'"):
            await engine.get_or_load("b", loader)
        loader.answer = b"x"  # type: ignore[assignment]  # what a caller may get wrong
        with pytest.raises(InvalidItem, match="must be a SyncItem"):
            await engine.get_or_load("c", loader)

        async def itself(object_id: str) -> SyncItem | None:
            return await engine.get_or_load(object_id, itself)

        with pytest.raises(InvalidItem, match="wait for itself"):
            await engine.get_or_load("d", itself)
        rig.at_rest(engine)


async def test_ids_load_beside_each_other(rig: Rig) -> None:
    held: list[Held] = []
    async with rig.engine(around=on("l3", Held, held), redis=False) as engine:

        async def load(object_id: str) -> SyncItem:
            await asyncio.sleep(0)
            return SyncItem(object_id, object_id.encode(), updated_at=1)

        ids = [f"i.{n % 20}" for n in range(200)]
        found = await asyncio.gather(*(engine.get_or_load(each, load) for each in ids))
        assert [each.content.decode() for each in found] == ids
        assert await engine.count_prefix("i.") == 20
