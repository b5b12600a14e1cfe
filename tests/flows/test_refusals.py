"""What was refused is listed, sent again without passing anything newer, or dropped; always through the public API."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Sequence

import pytest

from sync_engine import Ack, InvalidId, InvalidItem, NotRunning, StoreError, SubmitOptions, SyncItem, TierUnavailable
from sync_engine.forward import Forwarding
from sync_engine.item import Op
from sync_engine.ports import Applied
from sync_engine.testing.tiers import Breaking, Refusing

from .rig import CACHE, DURABLE, Held, Rig, on

POISON = SyncItem("poison", b"secret bytes", state="s", updated_at=1)
EVERYWHERE = SubmitOptions()


def refusing(kept: list[Refusing], *ids: str) -> object:
    def wrap(tier: object) -> Refusing:
        kept.append(Refusing(tier, ids))  # type: ignore[arg-type]  # a tier
        return kept[-1]

    return wrap


async def test_I7_the_list_tells_everything_but_the_content(rig: Rig) -> None:
    async with rig.engine(around=on("l3", refusing([], "poison", "b"))) as engine:
        receipt = await engine.submit(POISON)
        await engine.submit(SyncItem("b", b"\x00"))
        await engine.flush()
        first, second = await engine.quarantine()
        assert (first.object_id, first.kind, first.tier, first.stamp) == ("poison", "put", "l3", receipt.stamp)
        assert (first.size, "refused by the test" in first.reason) == (POISON.size, True)
        assert first.since_ms >= receipt.stamp >> 16
        assert second.object_id == "b"
        assert "secret" not in repr(first)
    async with rig.engine() as engine:
        assert await engine.quarantine() == [first, second], "as it was"


@pytest.mark.parametrize(("tier", "options"), [("l2", EVERYWHERE), ("l2", CACHE), ("l3", EVERYWHERE), ("l3", DURABLE)])
async def test_I7_what_was_refused_goes_through_once_the_cause_is_gone(
    rig: Rig, tier: str, options: SubmitOptions
) -> None:
    kept: list[Refusing] = []
    async with rig.engine(around=on(tier, refusing(kept, "poison", "other"))) as engine:
        await engine.submit_many([POISON, SyncItem("other", b"1")], options)
        await engine.flush()
        (before,) = [each for each in await engine.quarantine() if each.object_id == "poison"]
        assert await engine.retry_quarantined(["poison"]) == 1
        await engine.flush()
        assert [each for each in await engine.quarantine() if each.object_id == "poison"] == [before], "still refused"
        kept[0].ids.clear()
        assert await engine.retry_quarantined(["poison", "nobody"]) == 1
        await engine.flush()
        assert [each.object_id for each in await engine.quarantine()] == ["other"]
        assert await engine.retry_quarantined() == 1
        await engine.flush()
        assert await engine.quarantine() == []
        assert await engine.retry_quarantined() == 0
        await rig.check(
            engine,
            {"poison": POISON, "other": SyncItem("other", b"1", updated_at=(await engine.get("other")).updated_at)},
            options={"poison": options, "other": options},
        )
    async with rig.engine() as engine:
        assert await engine.quarantine() == []
        assert await engine.get("poison") == POISON


async def test_I7_what_was_refused_and_retried_survives_a_restart_at_any_point(rig: Rig) -> None:
    async with rig.engine(around=on("l3", refusing([], "poison"))) as engine:
        await engine.submit(POISON)
        await engine.flush()
    down = on("l3", lambda tier: Breaking(tier, times=None, verbs=("apply",)))
    async with rig.engine(around=down) as engine:
        assert await engine.retry_quarantined() == 1
        assert await engine.retry_quarantined() == 0, "it is on its way"
        assert await engine.drop_quarantined(["poison"]) == 0, "it is on its way"
        assert await engine.get("poison") == POISON
        assert (await engine.stop(timeout=0)).left_in_log == 1
    async with rig.engine() as engine:
        assert engine.stats().recovered == 1
        await engine.flush()
        assert await engine.quarantine() == []
        await rig.check(engine, {"poison": POISON})


@pytest.mark.parametrize("tier", ["l2", "l3"])
@pytest.mark.parametrize("by_another", [False, True])
async def test_I1_an_older_refused_write_never_passes_a_newer_one(rig: Rig, tier: str, by_another: bool) -> None:
    newer = POISON.with_version(2)
    kept: list[Refusing] = []
    async with rig.engine(around=on(tier, refusing(kept, "poison"))) as engine:
        await engine.submit(POISON)
        await engine.flush()
        if by_another:
            async with rig.engine(data="other") as other:
                await other.submit(newer, ack=Ack.STORED)
            kept[0].ids.clear()
        else:
            held: list[Held] = []
            kept[0].ids.clear()
            kept[0].tier = Held(kept[0].tier)
            held.append(kept[0].tier)
            held[0].hold()
            await engine.submit(newer)
            assert await engine.retry_quarantined() == 0
            held[0].release()
        assert await engine.retry_quarantined() == 0
        await engine.flush()
        assert await engine.quarantine() == []
        assert await rig.in_tiers("poison") == (newer, newer)
        assert await engine.get("poison") == newer
        rig.at_rest(engine)


async def test_I1_a_newer_delete_of_another_engine_is_not_undone(rig: Rig) -> None:
    kept: list[Refusing] = []
    for options in (EVERYWHERE, CACHE):
        async with rig.engine(around=on("l2", refusing(kept, "poison")), data=str(options.sql)) as engine:
            await engine.submit(POISON, options)
            await engine.flush()
            async with rig.engine(data="other") as other:
                await other.submit(POISON)
                await other.delete("poison", ack=Ack.STORED)
            kept[-1].ids.clear()
            await rig.key("DEL", f"{rig.redis_prefix}__local__:tomb:poison")
            assert await engine.retry_quarantined() == 0
            assert await engine.quarantine() == []
            assert await engine.get("poison") is None
            assert await rig.in_tiers("poison") == (None, None)


async def test_I1_a_newer_write_while_the_old_one_is_on_its_way_again_wins(rig: Rig) -> None:
    kept: list[Refusing] = []
    held: list[Held] = []
    around = on("l3", lambda tier: Refusing(held.append(Held(tier)) or held[0], []), kept)
    async with rig.engine(around=around, batch_flush_ms=0) as engine:
        kept[0].ids.add("poison")
        await engine.submit(POISON)
        await engine.flush()
        kept[0].ids.clear()
        held[0].hold()
        assert await engine.retry_quarantined() == 1
        async with asyncio.timeout(60):
            async with rig.engine(data="other") as other:  # passes it on the way
                await other.submit(POISON.with_version(7), ack=Ack.STORED)
        held[0].release()
        await engine.flush()
        assert await engine.quarantine() == []
        assert await engine.get("poison") == POISON.with_version(7)
        assert await rig.in_tiers("poison") == (POISON.with_version(7), POISON.with_version(7))


async def test_I1_a_change_of_state_does_not_bring_a_refused_write_over_a_newer_one(rig: Rig) -> None:
    kept: list[Refusing] = []
    async with rig.engine(around=on("l3", refusing(kept, "poison"))) as engine:
        await engine.submit(POISON)
        await engine.flush()
        async with rig.engine(data="other") as other:
            await other.submit(POISON.with_version(2), ack=Ack.STORED)
        kept[0].ids.clear()
        assert await engine.get("poison") == POISON, "in memory still, as any item that another engine writes"
        assert await engine.set_state("poison", "t")
        await engine.flush()
        assert await rig.in_tiers("poison") == (POISON.with_version(2).with_state("t"),) * 2


@pytest.mark.parametrize("tier", ["l2", "l3"])
async def test_a_refused_delete_is_sent_again_or_given_up(rig: Rig, tier: str) -> None:
    kept: list[Refusing] = []
    async with rig.engine(around=on(tier, refusing(kept))) as engine:
        for give_up in (True, False):
            await engine.submit(POISON, ack=Ack.STORED)
            kept[0].ids.add("poison")
            assert await engine.delete("poison")
            await engine.flush()
            (refused,) = await engine.quarantine()
            assert (refused.kind, refused.tier) == ("delete", tier)
            assert await engine.get("poison") is None
            kept[0].ids.clear()
            if give_up:
                assert await engine.drop_quarantined(["poison"]) == 1
                # What SQL has deleted is deleted; where SQL did not, the item was never gone.
                assert await engine.get("poison") == (POISON if tier == "l3" else None)
                await rig.check(engine, {"poison": POISON if tier == "l3" else None})
            else:
                assert await engine.retry_quarantined() == 1
                await rig.check(engine, {"poison": None})
            assert await engine.quarantine() == []


async def test_a_refused_change_of_state_is_sent_again(rig: Rig) -> None:
    for tier in ("l2", "l3"):
        kept: list[Refusing] = []
        async with rig.engine(around=on(tier, refusing(kept)), data=tier) as engine:
            await engine.submit(POISON, ack=Ack.STORED)
            kept[0].ids.add("poison")
            await engine.set_state("poison", "t")
            await engine.flush()
            assert [each.kind for each in await engine.quarantine()] == ["restate"]
            assert (await engine.get("poison")).state == "t"
            kept[0].ids.clear()
            assert await engine.retry_quarantined() == 1
            await engine.flush()
            assert await engine.quarantine() == []
            assert await engine.get("poison") == POISON.with_state("t")
            # The older copy had to go where the change was refused; reads bring the new one.
            upper, lower = await rig.in_tiers("poison")
            assert (upper, lower) == (None if tier == "l2" else lower, POISON.with_state("t"))


async def test_I4_what_redis_refuses_leaves_no_older_copy_there_for_others_to_read(rig: Rig) -> None:
    async with rig.engine(around=on("l2", refusing([], "poison"))) as engine:
        async with rig.engine(data="other") as other:
            await other.submit(POISON, ack=Ack.STORED)
        await engine.submit(POISON.with_version(2))
        await engine.flush()
        assert await rig.in_tiers("poison") == (None, POISON.with_version(2))
        assert await engine.drop_quarantined(["poison"]) == 1
        assert await engine.get("poison") == POISON.with_version(2)


async def test_a_drop_is_loud_final_and_names_no_content(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    async with rig.engine(around=on("l3", refusing([], "poison"))) as engine:
        await engine.submit(POISON)
        await engine.flush()
        assert await engine.get("poison") == POISON
        with caplog.at_level(logging.WARNING):
            caplog.clear()
            assert await engine.drop_quarantined(["poison", "poison", "nobody"]) == 1
        (record,) = caplog.records
        assert record.levelno == logging.WARNING
        assert "dropped for good" in record.message
        assert "'poison'" in record.message
        assert "refused by the test" in record.message
        assert "secret" not in record.message
        assert await engine.get("poison") is None
        assert await engine.quarantine() == []
        assert list((rig.path / "data" / "quarantine").iterdir()) == []
    async with rig.engine() as engine:
        assert (engine.stats().quarantined, await engine.get("poison")) == (0, None)


async def test_what_could_not_be_filed_and_was_dropped_does_not_come_back_from_the_log(rig: Rig) -> None:
    """The log had kept it, and the next start replayed what somebody had given up for good."""
    in_the_way = rig.path / "data" / "quarantine"
    async with rig.engine(around=on("l3", refusing([], "poison"))) as engine:
        in_the_way.touch()
        await engine.submit(POISON)
        await engine.flush()
        assert (engine.stats().quarantined, engine.stats().log_records) == (1, 1)
        in_the_way.unlink()
        assert await engine.drop_quarantined(["poison"]) == 1
        rig.at_rest(engine)
    async with rig.engine() as engine:
        assert engine.stats().recovered == 0
        assert await engine.get("poison") is None


async def test_a_retry_that_cannot_know_what_is_newer_sends_nothing(rig: Rig) -> None:
    breaking: list[Breaking] = []
    around = on("l3", lambda tier: Refusing(Breaking(tier, times=None, verbs=("held_stamps",)), {"poison"}), breaking)
    async with rig.engine(around=around) as engine:
        await engine.submit(POISON)
        await engine.flush()
        with pytest.raises(TierUnavailable):
            await engine.retry_quarantined()
        assert len(await engine.quarantine()) == 1
        rig.at_rest(engine)


async def test_a_compare_and_set_that_was_refused_compares_again(rig: Rig) -> None:
    kept: list[Refusing] = []
    async with rig.engine(around=on("l3", refusing(kept, "poison"))) as engine:
        for expected, found in ((0, POISON), (1, POISON)):
            with pytest.raises(StoreError):
                await engine.submit(found.with_version(expected + 1), SubmitOptions(if_version=expected))
            kept[0].ids.clear()
            if expected:  # somebody else was quicker, and is newer
                await (await rig.l3()).put(POISON.with_version(9).replace(stamp=0))
            assert await engine.retry_quarantined() == 1
            await engine.flush()
            assert await engine.quarantine() == []
            kept[0].ids.add("poison")
        assert (await (await rig.l3()).get("poison")).version == 9


async def test_more_than_fit_the_log_at_once_are_sent_page_by_page(rig: Rig) -> None:
    class Picky(Forwarding):
        picky = True

        async def apply(self, ops: Sequence[Op], /) -> Applied:
            if not self.picky:
                return await super().apply(ops)
            return Applied(refused={op.object_id: StoreError(self.name, "no") for op in ops})

    kept: list[Picky] = []
    items = [SyncItem(f"i.{n:03}", b"x", updated_at=1) for n in range(450)]
    async with rig.engine(around=on("l3", Picky, kept), redis=False) as engine:
        await engine.submit_many(items)
        await engine.flush()
        assert engine.stats().quarantined == len(items)
        kept[0].picky = False
        assert await engine.retry_quarantined() == len(items)
        await engine.flush()
        assert await engine.quarantine() == []
        assert await engine.scan_prefix("i.") == items


async def test_what_its_tier_is_missing_for_stays(rig: Rig) -> None:
    async with rig.engine(around=on("l2", refusing([], "poison"))) as engine:
        await engine.submit(POISON, CACHE)
        await engine.flush()
    async with rig.engine(redis=False) as engine:
        assert await engine.retry_quarantined() == 0
        assert len(await engine.quarantine()) == 1


async def test_arguments_are_checked_and_an_engine_that_does_not_run_has_no_quarantine(rig: Rig) -> None:
    async with rig.engine(redis=False) as engine:
        for call in (engine.retry_quarantined, engine.drop_quarantined):
            with pytest.raises(InvalidItem, match="ids"):
                await call("poison")
            with pytest.raises(InvalidId):
                await call(["a", "state:x"])
            assert await call(["../../etc/passwd", "\x1b[2J", "ü" * 255]) == 0
    with pytest.raises(NotRunning):
        await engine.quarantine()


async def test_hostile_ids_are_quarantined_found_again_and_dropped(rig: Rig) -> None:
    ids = ["../../../x", "a/b\x1b[2J\n", "名" * 255, "-rf", "."]
    async with rig.engine(around=on("l3", refusing([], *ids)), redis=False) as engine:
        await engine.submit_many([SyncItem(object_id, b"x") for object_id in ids])
        await engine.flush()
    async with rig.engine(redis=False) as engine:
        assert [each.object_id for each in await engine.quarantine()] == ids
        assert await engine.drop_quarantined(ids[:2]) == 2
        assert await engine.retry_quarantined() == 3
        await engine.flush()
        assert await engine.quarantine() == []


PROGRAM = """
import asyncio, os, signal, sys
from sync_engine import SyncEngine, SyncEngineConfig, SyncItem
from sync_engine.testing.tiers import Breaking, Refusing

async def main(folder, retry):
    refuse = lambda tier: Refusing(tier, [] if retry else ["poison"])
    hold = lambda tier: Breaking(tier, times=None, verbs=("apply",)) if retry else tier
    engine = SyncEngine(SyncEngineConfig(data_dir=folder), around=lambda tier: refuse(hold(tier)))
    await engine.start()
    if retry:
        assert await engine.retry_quarantined() <= 1  # 0: the log was killed before it noted that it was refused
    else:
        await engine.submit(SyncItem("poison", b"secret bytes", state="s", updated_at=1))
        await engine.flush()
    os.kill(os.getpid(), signal.SIGKILL)

asyncio.run(main(sys.argv[1], sys.argv[2] == "retry"))
"""


async def test_I3_I7_what_is_refused_and_what_is_sent_again_survive_kill_9(rig: Rig) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    for step in ("submit", "retry"):
        command = [sys.executable, "-c", PROGRAM, str(rig.path / "data"), step]
        died = await asyncio.to_thread(subprocess.run, command, env=environment, check=False)
        assert died.returncode == -signal.SIGKILL
    async with rig.engine(redis=False, sql_url=f"sqlite:///{rig.path / 'data' / 'truth.db'}") as engine:
        assert engine.stats().recovered == 1
        await engine.flush()
        assert await engine.quarantine() == []
        assert await engine.get("poison") == POISON
        assert (await engine.status("poison")).l3
