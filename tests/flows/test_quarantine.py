"""An item that a tier refuses is put aside with its reason; the rest goes through, nothing stalls behind it (I7)."""

from __future__ import annotations

import asyncio
import shutil

import pytest

from sync_engine import Ack, StoreError, SubmitOptions, SyncItem, VersionConflict
from sync_engine.testing.tiers import Breaking, Counting, Refusing

from .rig import CACHE, DURABLE, Rig, on

POISON = SyncItem("poison", b"\x00", state="s", updated_at=1)
OTHERS = [SyncItem.from_json(f"k.{n}", {"n": n}, state="s", updated_at=1) for n in range(20)]


def _refusing(*ids: str) -> object:
    return lambda tier: Refusing(tier, ids)


async def _foreign(rig: Rig, object_id: str = "poison") -> None:
    """Somebody else's set stands at the item's key: Redis cannot take the item."""
    await rig.key("SADD", rig.redis_prefix + object_id, "not an item")


async def test_I7_a_foreign_key_in_redis_refuses_its_item_alone_and_is_left_as_it_is(rig: Rig) -> None:
    await _foreign(rig)
    async with rig.engine() as engine:
        await engine.submit_many([*OTHERS[:10], POISON, *OTHERS[10:]])
        await engine.flush()
        status = await engine.status("poison")
        assert status.quarantined is not None
        assert "not an item" in status.quarantined
        assert status.l3
        assert not status.pending
        assert engine.stats().quarantined == 1
        assert await engine.get("poison") == POISON
        assert await rig.l2.get_many([item.object_id for item in OTHERS]) == {item.object_id: item for item in OTHERS}
        assert await (await rig.l3()).get("poison") == POISON
        rig.at_rest(engine)
    assert await rig.key("SMEMBERS", rig.redis_prefix + "poison") == {b"not an item"}


@pytest.mark.parametrize(
    ("tier", "options"),
    [("l2", SubmitOptions()), ("l2", CACHE), ("l3", SubmitOptions()), ("l3", DURABLE)],
)
async def test_I7_what_a_tier_refuses_is_quarantined_answered_for_and_survives_a_restart(
    rig: Rig, tier: str, options: SubmitOptions
) -> None:
    async with rig.engine(around=on(tier, _refusing("poison"))) as engine:
        receipt = await engine.submit(POISON, options)
        with pytest.raises(StoreError, match="refused by the test"):
            await receipt.stored()
        with pytest.raises(StoreError, match="refused by the test"):
            await engine.submit(POISON.with_version(2), options, ack=Ack.STORED)
        await engine.submit_many(OTHERS, ack=Ack.STORED)
        assert await engine.get("poison") == POISON.with_version(2)
        rig.at_rest(engine)
    async with rig.engine() as engine:
        assert engine.stats().quarantined == 1
        assert "refused by the test" in ((await engine.status("poison")).quarantined or "")
        assert await engine.get("poison") == POISON.with_version(2), "it was acknowledged"
        assert await engine.contains("poison")
        # A newer write that is taken ends it.
        await engine.submit(POISON.with_version(3), options)
        await engine.flush()
        assert engine.stats().quarantined == 0
        assert (await engine.status("poison")).quarantined is None
    async with rig.engine() as engine:
        assert engine.stats().quarantined == 0
        assert await engine.get("poison") == POISON.with_version(3)


async def test_I7_a_delete_ends_a_quarantine_too(rig: Rig) -> None:
    async with rig.engine(around=on("l3", _refusing("poison"))) as engine:
        await engine.submit(POISON)
        await engine.flush()
    async with rig.engine() as engine:
        assert await engine.delete("poison", ack=Ack.STORED)
        assert engine.stats().quarantined == 0
        assert await engine.get("poison") is None
    async with rig.engine() as engine:
        await rig.check(engine, {"poison": None})


async def test_I7_a_refused_delete_is_visible_and_still_answers_absent(rig: Rig) -> None:
    async with rig.engine() as engine:
        await engine.submit(POISON, ack=Ack.STORED)
    async with rig.engine(around=on("l3", _refusing("poison"))) as engine:
        assert await engine.delete("poison")
        await engine.flush()
        assert await engine.get("poison") is None
        assert (await engine.status("poison")).quarantined
    async with rig.engine() as engine:
        assert await engine.get("poison") is None
        await engine.submit(POISON.with_version(2), ack=Ack.STORED)
        await rig.check(engine, {"poison": POISON.with_version(2)})
        assert engine.stats().quarantined == 0


async def test_I7_an_older_refusal_never_comes_back_behind_a_newer_one(rig: Rig) -> None:
    folder = rig.path / "data" / "quarantine"
    async with rig.engine(around=on("l2", _refusing("poison"))) as engine:
        await engine.submit(POISON)
        await engine.flush()
        shutil.copytree(folder, rig.path / "aside")
        await engine.submit(POISON.with_version(2))
        await engine.flush()
    # A crash between writing the second and removing the first leaves both.
    for file in (rig.path / "aside").iterdir():
        shutil.copy(file, folder)
    async with rig.engine() as engine:
        assert (engine.stats().quarantined, await engine.get("poison")) == (1, POISON.with_version(2))
        await engine.submit(POISON.with_version(3), ack=Ack.STORED)
    async with rig.engine() as engine:
        assert engine.stats().quarantined == 0
        assert await engine.get("poison") == POISON.with_version(3)


async def test_I7_G40_R14_one_poisoned_item_among_many_costs_the_others_no_retry(rig: Rig) -> None:
    await _foreign(rig)
    counting: list[Counting] = []
    async with rig.engine(around=lambda tier: counting.append(Counting(tier)) or counting[-1]) as engine:
        await engine.submit_many([*OTHERS, POISON])
        await engine.flush()
        assert [each.calls["apply"] for each in counting] == [1, 1]


async def test_I7_a_tier_that_refuses_a_batch_as_a_whole_is_asked_in_halves(rig: Rig) -> None:
    class Whole(Refusing):
        async def apply(self, ops: object, /) -> object:
            if {op.object_id for op in ops} & self.ids:  # type: ignore[attr-defined]  # operations
                raise StoreError(self.name, "the whole of it")
            return await self.tier.apply(ops)  # type: ignore[arg-type]  # operations

    for tier in ("l3", "l2"):
        async with rig.engine(around=on(tier, lambda t: Whole(t, ["poison", "k.7"])), data=tier) as engine:
            await engine.submit_many([*OTHERS, POISON])
            await engine.flush()
            assert engine.stats().quarantined == 2
            for item in OTHERS:
                assert (await engine.status(item.object_id)).quarantined == (
                    f"{tier} refused: the whole of it" if item.object_id == "k.7" else None
                )
            rig.at_rest(engine)


async def test_I7_a_lost_compare_and_set_is_an_answer_and_not_a_fault(rig: Rig) -> None:
    async with rig.engine() as engine:
        await engine.submit(POISON, ack=Ack.STORED)
        outcomes = await asyncio.gather(
            *(engine.submit(POISON.with_version(n), SubmitOptions(if_version=1)) for n in range(2, 12)),
            return_exceptions=True,
        )
        won = [outcome for outcome in outcomes if not isinstance(outcome, VersionConflict)]
        assert len(won) == 1, "exactly one of ten"
        assert engine.stats().quarantined == 0
        upper, lower = await rig.in_tiers("poison")
        assert upper == lower == await engine.get("poison") == POISON.with_version(2 + outcomes.index(won[0]))
        rig.at_rest(engine)


async def test_I7_the_reason_names_no_content_and_the_file_is_private(rig: Rig) -> None:
    async with rig.engine(around=on("l3", _refusing("poison"))) as engine:
        await engine.submit(POISON.replace(content=b"secret bytes"))
        await engine.flush()
        assert "secret" not in repr(engine)
        assert "secret" not in ((await engine.status("poison")).quarantined or "")
    folder = rig.path / "data" / "quarantine"
    assert folder.stat().st_mode & 0o077 == 0


async def test_I7_what_was_refused_does_not_hide_another_engines_newer_write(rig: Rig) -> None:
    async with rig.engine(around=on("l2", _refusing("poison"))) as engine:
        await engine.submit(POISON)
        await engine.flush()
    async with rig.engine(data="other") as engine:
        await engine.submit(POISON.with_version(2), ack=Ack.STORED)
    async with rig.engine() as engine:
        assert await engine.get("poison") == POISON.with_version(2)
        assert await engine.get_many(["poison"]) == {"poison": POISON.with_version(2)}


async def test_I7_what_was_refused_is_answered_with_while_a_tier_is_down(rig: Rig) -> None:
    async with rig.engine(around=on("l3", _refusing("poison"))) as engine:
        await engine.submit(POISON, ack=Ack.MEMORY)
        await engine.flush()
    async with rig.engine(around=lambda tier: Breaking(tier, times=None)) as engine:
        assert await engine.get("poison") == POISON
        assert await engine.get_many(["poison"]) == {"poison": POISON}


async def test_a_folder_that_somebody_removes_under_a_running_engine_costs_what_was_in_it_and_no_more(rig: Rig) -> None:
    """The end of a refused write could not be noted there, so the log kept the record of the newer one for good."""
    folder = rig.path / "data" / "quarantine"
    kept: list[Refusing] = []
    ids = ("poison", "dropped", "forgotten")
    newer = POISON.with_version(2)
    async with rig.engine(around=on("l3", lambda tier: Refusing(tier, ids), kept)) as engine:
        await engine.submit_many([SyncItem(object_id, b"1") for object_id in ids])
        await engine.flush()
        shutil.rmtree(folder)
        kept[0].ids = {"new"}
        await engine.submit(newer)
        await engine.flush()
        rig.at_rest(engine)
        assert await engine.drop_quarantined(["dropped"]) == 1
        assert not folder.exists()
        await engine.submit(SyncItem("new", b"1"))
        await engine.flush()
        assert [refused.object_id for refused in await engine.quarantine()] == ["forgotten", "new"]
        assert len(list(folder.iterdir())) == 1, "it is made anew"
    async with rig.engine() as engine:
        assert engine.stats().recovered == 0
        assert [refused.object_id for refused in await engine.quarantine()] == ["new"]
        assert await engine.get_many(ids) == {"poison": newer}
