"""What every tier must do, as test classes to inherit (pytest, pytest-asyncio).

A backend's test file gives the fixture ``tier`` and inherits ``TierContract``, or ``CacheContract``
(adds deadlines and fills) or ``TruthContract`` (adds scans, compare-and-set and the newest stamp):

    class TestMyStore(TruthContract):
        @pytest.fixture
        async def tier(self, tmp_path):
            ...

Every test uses ids of its own tier, which must be empty at first. Nothing here sleeps for long.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from msgspec.structs import replace

from sync_engine.errors import InvalidId, InvalidItem, VersionConflict
from sync_engine.item import ContentType, Op, SyncItem
from sync_engine.ports import Applied, Tier, Truth

__all__ = ["CacheContract", "TierContract", "TruthContract", "delete", "fill", "put", "restate"]

HOSTILE_PREFIXES = (
    "a%",
    "a_",
    "a*",
    "a?",
    "a[b]",
    "a\\",
    "a'",
    'a"',
    "a:",
    "a b",
    "ä",
    "\U0001f600",
    "\ue000",
    "a\uffff",
)
CONTENTS = {
    "canonical json": b'{"a":1,"b":[true,null,"x"]}',
    "json in its own spelling": b'{ "b" : 1.0e2, "a" : [ ] }',
    "duplicate keys": b'{"a":1,"a":2}',
    "thirty digits": b'{"n":123456789012345678901234567890}',
    "seventeen-digit float": b'{"f":0.30000000000000004}',
    "a json string": '"größe \U0001f600"'.encode(),
    "empty": b"",
    "nul": b"\x00",
    "every byte": bytes(range(256)),
    "not utf-8": b"\xff\xfe\xfd",
    "nearly json": b'{"a":',
    "one hundred kilobytes": b"0123456789" * 10_000,
}


def put(object_id: str, stamp: int = 1, content: bytes = b"{}", **fields: Any) -> Op:
    """A put of a small item, and of its other fields if there are any to be told."""
    item = SyncItem(object_id, content, stamp=stamp, **{"updated_at": 1_700_000_000_000, **fields})
    return Op(kind="put", object_id=object_id, stamp=stamp, item=item)


def fill(object_id: str, stamp: int = 1, content: bytes = b"{}") -> Op:
    """A copy made by a read."""
    item = SyncItem(object_id, content, stamp=stamp, updated_at=1_700_000_000_000)
    return Op(kind="put", object_id=object_id, stamp=stamp, item=item, fill=True)


def delete(object_id: str, stamp: int = 1) -> Op:
    """A delete."""
    return Op(kind="delete", object_id=object_id, stamp=stamp)


def restate(object_id: str, state: str, stamp: int = 1) -> Op:
    """A change of state."""
    return Op(kind="restate", object_id=object_id, stamp=stamp, state=state)


async def content_of(tier: Tier, object_id: str) -> bytes | None:
    item = (await tier.fetch([object_id])).items.get(object_id)
    return None if item is None else item.content


async def apply_each(tier: Tier, *ops: Op) -> list[Applied]:
    return [await tier.apply([op]) for op in ops]


async def members(tier: Tier, *states: str) -> dict[str, list[str]]:
    return {state: ids for state in states if (ids := await tier.list_state_ids(state))}


async def eventually(holds: Callable[[], Awaitable[bool]]) -> None:
    """Wait for what real time brings about; the bound is generous because only hanging must fail."""
    until = time.monotonic() + 20
    while not await holds():
        assert time.monotonic() < until, "did not come about within 20 s"
        await asyncio.sleep(0.01)


class TierContract:
    """What Redis, SQL and a dict have in common."""

    @pytest.mark.parametrize("content", CONTENTS.values(), ids=CONTENTS.keys())
    async def test_content_comes_back_byte_for_byte(self, tier: Tier, content: bytes) -> None:
        applied = await tier.apply([put("a", content=content)])
        assert applied == Applied()
        assert await content_of(tier, "a") == content

    async def test_every_field_comes_back(self, tier: Tier) -> None:
        item = SyncItem(
            "größe/\U0001f600",
            b'{"a":1}',
            version=2**53 + 1,
            updated_at=1_700_000_000_001,
            state="in review",
            home_instance_id="node-1",
            trace_parent="00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
            trace_state="vendor=1",
            batch_id="batch-7",
            priority_score=0.1,
            stamp=2**62 + 1,
        )
        await tier.apply([Op(kind="put", object_id=item.object_id, stamp=item.stamp, item=item)])
        back = (await tier.fetch([item.object_id])).items[item.object_id]
        assert back == item
        assert (back.stamp, back.batch_id, back.content_hash) == (item.stamp, item.batch_id, item.content_hash)

    async def test_json_given_as_binary_stays_binary(self, tier: Tier) -> None:
        item = SyncItem("a", b'{"a":1}', content_type=ContentType.BINARY, stamp=1)
        await tier.apply([Op(kind="put", object_id="a", stamp=1, item=item)])
        assert (await tier.fetch(["a"])).items["a"].content_type is ContentType.BINARY

    async def test_a_top_level_number_given_as_json_stays_json(self, tier: Tier) -> None:
        item = SyncItem("a", b"12", content_type=ContentType.JSON, stamp=1)
        await tier.apply([Op(kind="put", object_id="a", stamp=1, item=item)])
        back = (await tier.fetch(["a"])).items["a"]
        assert (back.content_type, back.content) == (ContentType.JSON, b"12")

    async def test_absent_ids_are_absent_from_the_answer(self, tier: Tier) -> None:
        await tier.apply([put("a"), put("c")])
        fetched = await tier.fetch(["a", "b", "c", "d"])
        assert set(fetched.items) == {"a", "c"}
        assert not fetched.unverified
        assert not fetched.corrupt

    async def test_asking_for_nothing_and_doing_nothing_is_fine(self, tier: Tier) -> None:
        assert (await tier.fetch([])).items == {}
        assert await tier.exists_batch([]) == []
        assert await tier.apply([]) == Applied()

    async def test_an_id_asked_for_twice_is_answered(self, tier: Tier) -> None:
        await tier.apply([put("a")])
        assert set((await tier.fetch(["a", "a"])).items) == {"a"}
        assert await tier.exists_batch(["a", "b", "a"]) == [True, False, True]

    async def test_exists_batch_keeps_the_order_of_the_question(self, tier: Tier) -> None:
        await tier.apply([put("b"), put("d", content=b"\x00")])
        assert await tier.exists_batch(["d", "c", "b", "a"]) == [True, False, True, False]

    async def test_an_invalid_id_is_refused_before_any_io(self, tier: Tier) -> None:
        with pytest.raises(InvalidId):
            await tier.fetch(["state:sneaky"])

    async def test_many_items_go_in_and_out(self, tier: Tier) -> None:
        ops = [put(f"{n:05d}", content=b'{"n":%d}' % n if n % 3 else b"\x00%d" % n) for n in range(1_234)]
        assert await tier.apply(ops) == Applied()
        items = (await tier.fetch([op.object_id for op in ops])).items
        assert {id_: item.content for id_, item in items.items()} == {
            op.object_id: op.item.content for op in ops if op.item is not None
        }

    # Which write wins

    async def test_I1_the_newest_stamp_wins_in_every_order(self, tier: Tier) -> None:
        for n, order in enumerate(itertools.permutations((1, 2, 3))):
            id_ = f"id{n}"
            applied = await apply_each(tier, *(put(id_, stamp, b"v%d" % stamp) for stamp in order))
            assert await content_of(tier, id_) == b"v3"
            for index, stamp in enumerate(order):
                assert (id_ in applied[index].superseded) == (stamp < max(order[: index + 1]))

    async def test_I1_puts_deletes_and_older_puts_end_alike_in_every_order(self, tier: Tier) -> None:
        for n, order in enumerate(itertools.permutations("pqd")):
            id_ = f"id{n}"
            kinds = {"p": put(id_, 1, b"v1"), "q": put(id_, 3, b"v3"), "d": delete(id_, 2)}
            await apply_each(tier, *(kinds[kind] for kind in order))
            assert await content_of(tier, id_) == b"v3", order
            kinds = {"p": put(id_, 4, b"v4"), "q": put(id_, 5, b"v5"), "d": delete(id_, 6)}
            await apply_each(tier, *(kinds[kind] for kind in order))
            assert await content_of(tier, id_) is None, order

    async def test_stamps_are_compared_as_whole_numbers(self, tier: Tier) -> None:
        base = 2**62  # beyond the 53 bits of a double
        await apply_each(tier, put("a", base + 1, b"newer"), put("a", base, b"older"))
        assert await content_of(tier, "a") == b"newer"
        await apply_each(tier, put("b", 10, b"newer"), put("b", 9, b"older"))
        assert await content_of(tier, "b") == b"newer"

    async def test_applying_a_batch_twice_is_applying_it_once(self, tier: Tier) -> None:
        batch = [put("a", 5, b"1"), put("b", 6, b"\x00", state="s"), delete("c", 7), restate("d", "s", 8)]
        await tier.apply([put("c", 1, b"1"), put("d", 1, b"1")])
        first = await tier.apply(batch)
        before = (await tier.fetch(["a", "b", "c", "d"])).items
        again = await tier.apply(batch)
        after = (await tier.fetch(["a", "b", "c", "d"])).items
        assert first.existed == {"c"}
        assert first.superseded == again.superseded == frozenset()
        assert not again.existed
        assert before == after
        assert {id_: item.stamp for id_, item in after.items()} == {"a": 5, "b": 6, "d": 8}
        assert await members(tier, "default", "s") == {"default": ["a"], "s": ["b", "d"]}

    async def test_stamp_zero_is_unordered_and_always_writes(self, tier: Tier) -> None:
        await apply_each(tier, put("a", 9, b"1"), put("a", 0, b"2"))
        assert await content_of(tier, "a") == b"2"
        await apply_each(tier, delete("b", 9), put("b", 0, b"2"))
        assert await content_of(tier, "b") == b"2"
        await apply_each(tier, put("c", 9, b"1"), delete("c", 0))
        assert await content_of(tier, "c") is None

    async def test_a_stamped_put_replaces_an_unordered_copy(self, tier: Tier) -> None:
        await apply_each(tier, put("a", 0, b"1"), put("a", 1, b"2"))
        assert await content_of(tier, "a") == b"2"

    # Deletes

    async def test_a_delete_tells_what_existed(self, tier: Tier) -> None:
        await tier.apply([put("a", stamp=1), put("b", content=b"\x00", stamp=1)])
        applied = await tier.apply([delete("a", 2), delete("b", 2), delete("c", 2)])
        assert applied.existed == {"a", "b"}
        assert not applied.superseded
        assert await tier.exists_batch(["a", "b", "c"]) == [False, False, False]

    async def test_I2_a_tombstone_stops_an_older_put(self, tier: Tier) -> None:
        await apply_each(tier, put("a", 1, b"1"), delete("a", 5))
        applied = await tier.apply([put("a", 4, b"2")])
        assert applied.superseded == {"a"}
        assert await content_of(tier, "a") is None
        await tier.apply([put("a", 6, b"3")])
        assert await content_of(tier, "a") == b"3"

    async def test_I2_a_tombstone_is_left_where_nothing_was(self, tier: Tier) -> None:
        applied = await apply_each(tier, delete("a", 5), put("a", 4, b"1"))
        assert not applied[0].existed
        assert applied[1].superseded == {"a"}
        assert await content_of(tier, "a") is None

    async def test_an_older_delete_leaves_a_newer_put(self, tier: Tier) -> None:
        applied = await apply_each(tier, put("a", 5, b"1"), delete("a", 4))
        assert applied[1].superseded == {"a"}
        assert not applied[1].existed
        assert await content_of(tier, "a") == b"1"

    async def test_an_older_delete_does_not_weaken_a_tombstone(self, tier: Tier) -> None:
        await apply_each(tier, delete("a", 9), delete("a", 3), put("a", 5, b"1"))
        assert await content_of(tier, "a") is None

    # States

    async def test_restate_changes_state_and_stamp_and_nothing_else(self, tier: Tier) -> None:
        for id_, content in (("json", b'{"a":1}'), ("binary", b"\x00\x01")):
            await tier.apply([put(id_, 3, content, version=7)])
            applied = await tier.apply([restate(id_, "done", 5)])
            assert not applied.superseded
            back = (await tier.fetch([id_])).items[id_]
            assert (back.state, back.stamp, back.version, back.content) == ("done", 5, 7, content)
            assert back.updated_at == 1_700_000_000_000

    async def test_an_older_restate_and_one_of_nothing_change_nothing(self, tier: Tier) -> None:
        await tier.apply([put("a", stamp=5, state="new")])
        await tier.apply([restate("a", "old", 4), restate("b", "old", 4)])
        assert (await tier.fetch(["a"])).items["a"].state == "new"
        assert await tier.exists_batch(["b"]) == [False]
        assert await members(tier, "old", "new") == {"new": ["a"]}

    async def test_an_older_put_does_not_undo_a_restate(self, tier: Tier) -> None:
        await apply_each(tier, put("a", stamp=1), restate("a", "done", 5), put("a", stamp=3))
        assert await members(tier, "default", "done") == {"done": ["a"]}

    async def test_I6_membership_follows_puts_restates_type_changes_and_deletes(self, tier: Tier) -> None:
        states = ("default", "one", "two")
        await tier.apply([put("a", 1, b"{}"), put("b", 1, b"\x00", state="one"), put("c", 1, b"{}", state="one")])
        assert await members(tier, *states) == {"default": ["a"], "one": ["b", "c"]}
        await tier.apply([put("a", 2, b"{}", state="two"), put("b", 2, b"{}", state="two")])  # b: binary to JSON
        assert await members(tier, *states) == {"one": ["c"], "two": ["a", "b"]}
        await tier.apply([put("c", 3, b"\x00", state="default"), restate("a", "one", 3)])  # c: JSON to binary
        assert await members(tier, *states) == {"default": ["c"], "one": ["a"], "two": ["b"]}
        await tier.apply([delete("a", 4), delete("b", 4), put("c", 1, b"\x00", state="two")])
        assert await members(tier, *states) == {"default": ["c"]}
        assert [await tier.count_by_state(state) for state in states] == [1, 0, 0]

    async def test_states_may_hold_any_text(self, tier: Tier) -> None:
        states = ["a:b", "a*", "a%", "größe", "\U0001f600" * 32, " ", "default:"]
        await tier.apply([put(f"id{n}", state=state) for n, state in enumerate(states)])
        assert await members(tier, *states) == {state: [f"id{n}"] for n, state in enumerate(states)}

    async def test_list_state_ids_ascends_by_code_point_and_pages(self, tier: Tier) -> None:
        ids = ["a", "a:", "ab", "b", "é", "\ue000", "\uffff", "\U00010000", "\U0001f600"]  # UTF-16 order differs
        await tier.apply([put(id_, state="s") for id_ in reversed(ids)])
        assert await tier.list_state_ids("s") == ids
        assert await tier.list_state_ids("s", 3) == ids[:3]
        assert await tier.list_state_ids("s", 4, after=ids[2]) == ids[3:7]
        assert await tier.list_state_ids("s", after="\U0001f600") == []
        assert await tier.list_state_ids("s", after="aa") == ids[2:]
        assert await tier.list_state_ids("nobody") == []

    async def test_count_by_state_counts(self, tier: Tier) -> None:
        assert await tier.count_by_state("s") == 0
        await tier.apply([put(f"id{n}", state="s") for n in range(321)])
        assert await tier.count_by_state("s") == 321

    # Isolation

    async def test_I7_a_superseded_neighbour_does_not_hold_up_the_batch(self, tier: Tier) -> None:
        await tier.apply([put("b", 9, b"newer"), delete("d", 9)])
        applied = await tier.apply([put(id_, 5, b"x") for id_ in "abcde"])
        assert applied.superseded == {"b", "d"}
        assert not applied.refused
        held = {id_: item.content for id_, item in (await tier.fetch(list("abcde"))).items.items()}
        assert held == {"a": b"x", "b": b"newer", "c": b"x", "e": b"x"}

    async def test_concurrent_batches_end_with_the_newest(self, tier: Tier) -> None:
        await asyncio.gather(*(tier.apply([put("a", n, b"%d" % n), put(f"b{n}", n, b"x")]) for n in range(1, 21)))
        assert await content_of(tier, "a") == b"20"
        assert all(await tier.exists_batch([f"b{n}" for n in range(1, 21)]))

    async def test_a_cancelled_call_leaves_the_tier_usable(self, tier: Tier) -> None:
        calls = [asyncio.create_task(tier.apply([put(f"a{n}", content=b"x")])) for n in range(10)]
        calls += [asyncio.create_task(tier.apply([put("z", n, b"y")])) for n in range(1, 5)]
        await asyncio.sleep(0)
        for call in calls:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)
        await tier.apply([put("z", 9, b"last")])
        assert await content_of(tier, "z") == b"last"

    async def test_closing_twice_is_closing_once(self, tier: Tier) -> None:
        await tier.apply([put("a")])
        await tier.close()
        await tier.close()


class CacheContract(TierContract):
    """A tier whose copies may have a deadline: Redis."""

    async def test_R5_a_write_without_deadline_removes_one(self, tier: Tier) -> None:
        soon = now_ms() + 300
        await tier.apply([until(put("a", 1, b"{}"), soon), until(put("b", 1, b"{}"), soon), put("c", 1, b"{}")])
        await tier.apply([put("a", 2, b"{}")])
        await eventually(lambda: gone(tier, "b"))
        assert await tier.exists_batch(["a", "b", "c"]) == [True, False, True]

    @pytest.mark.parametrize("content", [b"{}", b"\x00"], ids=["json", "binary"])
    async def test_I6_an_expired_copy_is_gone_from_its_state_too(self, tier: Tier, content: bytes) -> None:
        await tier.apply(
            [until(put("a", content=content, state="s"), now_ms() + 50), put("b", content=content, state="s")]
        )
        await eventually(lambda: gone(tier, "a"))
        assert await tier.list_state_ids("s") == ["b"]
        assert await tier.count_by_state("s") == 1

    @pytest.mark.parametrize("content", [b"{}", b"\x00"], ids=["json", "binary"])
    async def test_I11_a_copy_whose_deadline_is_past_is_not_visible(self, tier: Tier, content: bytes) -> None:
        await tier.apply([put("a", 1, content, state="s")])
        await tier.apply([until(put("a", 2, content, state="s"), now_ms() - 1_000)])
        assert (await tier.fetch(["a"])).items == {}
        assert await tier.exists_batch(["a"]) == [False]
        assert await members(tier, "s") == {}

    async def test_restating_keeps_the_deadline(self, tier: Tier) -> None:
        await tier.apply([until(put("a", 1, b"{}"), now_ms() + 100)])
        await tier.apply([restate("a", "done", 2)])
        await eventually(lambda: gone(tier, "a"))
        assert await members(tier, "default", "done") == {}

    async def test_I1_a_restate_that_meets_nothing_keeps_out_what_is_older_and_lets_its_own_item_in(
        self, tier: Tier
    ) -> None:
        for stamp in (2, 5, 10, 1_000, 112_000_000_000_000_000):
            id_ = f"a.{stamp}"
            item = put(id_, stamp, b"{}", state="s").item
            assert item is not None
            await tier.apply([Op(kind="restate", object_id=id_, stamp=stamp, state="s", item=item)])
            late = [put(id_, stamp - 2, b"{}")] if stamp > 2 else []
            assert (await tier.apply(late)).superseded == {op.object_id for op in late}
            await tier.apply([fill(id_, stamp - 1, b"{}")])
            assert await content_of(tier, id_) is None
            await tier.apply([fill(id_, stamp, b"{}")])
            assert await content_of(tier, id_) == b"{}"

    @pytest.mark.parametrize("content", [b"{}", b"\x00"], ids=["json", "binary"])
    async def test_a_restate_that_brings_the_item_replaces_an_older_copy_and_nothing_else(
        self, tier: Tier, content: bytes
    ) -> None:
        later = now_ms() + 60_000
        await tier.apply([until(put("a", 1, b"stale"), later), put("c", 9, b"newer")])
        ops = []
        for id_ in "abc":
            item = put(id_, 5, content, state="s").item
            ops.append(Op(kind="restate", object_id=id_, stamp=5, state="s", item=item))
        assert (await tier.apply(ops)).superseded == {"c"}
        assert [await content_of(tier, id_) for id_ in "abc"] == [content, None, b"newer"]
        assert await members(tier, "s", "default") == {"s": ["a"], "default": ["c"]}
        await tier.apply([until(put("a", 6, content), now_ms() + 50)])
        item = put("a", 7, content, state="s").item
        await tier.apply([Op(kind="restate", object_id="a", stamp=7, state="s", item=item)])
        await eventually(lambda: gone(tier, "a"))

    async def test_the_deadline_of_an_item_that_lives_here_alone_comes_back(self, tier: Tier) -> None:
        deadline_ms = now_ms() + 60_000
        for id_, content in (("json", b"{}"), ("binary", b"\x00")):
            op = put(id_, content=content)
            assert op.item is not None
            item = op.item.replace(expires_at=deadline_ms)
            await tier.apply(
                [Op(kind="put", object_id=id_, stamp=1, item=item, sql=False, redis_expires_at=deadline_ms)]
            )
            assert (await tier.fetch([id_])).items[id_].expires_at == deadline_ms

    async def test_a_fill_takes_an_empty_or_older_place(self, tier: Tier) -> None:
        await tier.apply([put("b", 3, b"older")])
        await tier.apply([fill("a", 5, b"filled"), fill("b", 5, b"filled"), fill("c", 0, b"filled")])
        assert [await content_of(tier, id_) for id_ in "abc"] == [b"filled"] * 3

    async def test_I1_a_fill_never_passes_its_equal_or_a_newer_copy(self, tier: Tier) -> None:
        await tier.apply([put("a", 5, b"kept"), put("b", 9, b"kept"), put("c", 0, b"kept")])
        await tier.apply([fill("a", 5, b"filled"), fill("b", 5, b"filled"), fill("c", 0, b"filled")])
        assert [await content_of(tier, id_) for id_ in "abc"] == [b"kept"] * 3

    async def test_I2_a_fill_never_passes_a_tombstone_of_its_stamp_or_later(self, tier: Tier) -> None:
        await tier.apply([delete("a", 5), delete("b", 5), delete("c", 5), delete("d", 5)])
        await tier.apply([fill("a", 4, b"x"), fill("b", 5, b"x"), fill("c", 6, b"x"), fill("d", 0, b"x")])
        assert await tier.exists_batch(["a", "b", "c", "d"]) == [False, False, True, False]


class TruthContract(TierContract):
    """A tier that can be scanned in order and compared with: SQL."""

    async def test_restate_answers_with_the_whole_item(self, tier: Truth) -> None:
        await tier.apply([put("a", 1, b'{"a":1}'), put("b", 1, b"\x00"), put("c", 9, b"x")])
        applied = await tier.apply(
            [restate("a", "s", 5), restate("b", "s", 5), restate("c", "s", 5), restate("d", "s", 5)]
        )
        assert set(applied.restated) == {"a", "b"}
        assert applied.restated["a"] == (await tier.fetch(["a"])).items["a"]
        assert (applied.restated["b"].state, applied.restated["b"].stamp) == ("s", 5)
        assert applied.superseded <= {"c"}

    async def test_a_restate_that_is_applied_again_answers_with_the_item_again(self, tier: Truth) -> None:
        """The first answer may have been lost on its way; without the item Redis would bless an older one."""
        await tier.apply([put("a", 1, b'{"a":1}')])
        applied = [await tier.apply([restate("a", "s", 5)]) for _ in range(2)]
        assert applied[0].restated["a"] == applied[1].restated["a"]
        assert applied[1].restated["a"].state == "s"

    async def test_if_version_writes_only_over_that_version(self, tier: Truth) -> None:
        await tier.apply([put("a", 1, b"1", version=4)])
        applied = await tier.apply(
            [when(put("a", 2, b"2", version=5), 3), when(put("b", 2, b"2"), 1), put("c", 2, b"2")]
        )
        assert {id_: (bad.expected, bad.actual) for id_, bad in conflicts(applied).items()} == {
            "a": (3, 4),
            "b": (1, 0),
        }
        assert {id_: await content_of(tier, id_) for id_ in "abc"} == {"a": b"1", "b": None, "c": b"2"}
        applied = await tier.apply([when(put("a", 3, b"3", version=5), 4), when(put("b", 3, b"3"), 0)])
        assert applied == Applied()
        assert [await content_of(tier, id_) for id_ in "ab"] == [b"3", b"3"]

    async def test_if_version_zero_means_must_not_exist(self, tier: Truth) -> None:
        await tier.apply([put("a", 1, b"1")])
        applied = await tier.apply([when(put("a", 2, b"2"), 0)])
        assert conflicts(applied)["a"].actual == 1

    async def test_a_compare_and_set_applied_twice_is_no_conflict_with_itself(self, tier: Truth) -> None:
        op = when(put("a", 5, b"1", version=1), 0)
        assert [await tier.apply([op]) for _ in range(2)] == [Applied(), Applied()]
        assert await content_of(tier, "a") == b"1"

    async def test_a_compare_and_set_that_is_older_than_what_stands_is_a_conflict(self, tier: Truth) -> None:
        await tier.apply([put("a", 5, b"v1"), put("b", 5, b"v1")])
        await tier.apply([delete("b", 6)])
        for id_, version in (("a", 1), ("b", 0)):
            refused = (await tier.apply([when(put(id_, 4, b"late"), version)])).refused
            assert isinstance(refused.get(id_), VersionConflict)
            assert (await tier.apply([when(put(id_, 7, b"v2"), version)])).refused == {}

    async def test_of_two_racing_compare_and_sets_one_wins(self, tier: Truth) -> None:
        await tier.apply([put("a", 1, b"0", version=1)])
        answers = await asyncio.gather(*(tier.apply([when(put("a", n, b"x", version=2), 1)]) for n in range(2, 10)))
        assert sum("a" not in answer.refused for answer in answers) == 1

    async def test_R7_a_conditional_delete_takes_only_what_is_in_its_state_and_no_newer(self, tier: Truth) -> None:
        await tier.apply([put("a", stamp=1, state="s"), put("b", stamp=1, state="t"), put("c", stamp=9, state="s")])
        await tier.apply([put("d", stamp=0, state="s"), put("e", stamp=1, state="s"), put("g", stamp=1, state="s")])
        await tier.apply([delete("g", 7), put("h", stamp=1, state="s")])
        sweep = [replace(delete(id_, 5), only_in_state="s") for id_ in "abcdfgh"]
        for _ in range(2):  # the answer to the first may have been lost
            applied = await tier.apply(sweep)
            assert applied.spared == {"b", "c", "f", "g"}
            assert (applied.refused, applied.superseded) == ({}, frozenset())
        assert await tier.list_prefix_ids("") == ["b", "c", "e"]
        assert await tier.list_state_ids("s") == ["c", "e"]
        await tier.apply([put("a", stamp=4), put("a", stamp=6, state="s")])
        assert (await tier.apply(sweep)).spared == {"a", "b", "c", "f", "g"}, "what was written since is newer"

    async def test_a_conditional_delete_may_be_of_any_state(self, tier: Truth) -> None:
        await tier.apply([put("a", stamp=1, state="s"), put("b", stamp=9)])
        applied = await tier.apply([replace(delete(id_, 5), only_in_state="") for id_ in "abc"])
        assert (sorted(applied.spared), sorted(applied.existed)) == (["b", "c"], ["a"])
        assert await tier.list_prefix_ids("") == ["b"]
        await tier.apply([put("c", stamp=4)])
        assert await tier.list_prefix_ids("c") == ["c"], "where there was nothing, nothing is left behind"

    async def test_pages_of_ids_join_without_gap_or_repeat(self, tier: Truth) -> None:
        ids = sorted(f"p{n}é\U0001f600"[: n % 4 + 1] + f".{n}" for n in range(25))
        await tier.apply([put(id_) for id_ in [*ids, "o", "q"]])
        seen: list[str] = []
        after: str | None = None
        while page := await tier.list_prefix_ids("p", 4, after=after):
            seen += page
            after = page[-1]
        assert seen == ids
        assert await tier.list_prefix_ids("p", 0) == []

    @pytest.mark.parametrize("prefix", HOSTILE_PREFIXES)
    async def test_Q12_a_prefix_is_plain_text(self, tier: Truth, prefix: str) -> None:
        inside = sorted(prefix + tail for tail in ("", "0", "%", "\\", "z", "\U0010ffff"))
        outside = {"a", "aa", "ax", "A%", "aXb", "ab", "b", "z", "\U0010ffff", "a\U00010000"}
        outside = {id_ for id_ in outside if not id_.startswith(prefix)}
        await tier.apply([put(id_) for id_ in sorted({*inside, *outside})])
        assert [item.object_id for item in await tier.scan_prefix(prefix)] == inside
        assert await tier.count_prefix(prefix) == len(inside)
        assert await tier.list_prefix_ids(prefix) == inside

    async def test_a_prefix_may_end_at_the_last_code_point_or_before_the_surrogates(self, tier: Truth) -> None:
        ids = ["a\ud7ff", "a\ud7ffx", "a\ue000", "a\U0010ffff", "a\U0010ffffx", "b"]
        await tier.apply([put(id_) for id_ in ids])
        for prefix in ("a\ud7ff", "a\U0010ffff", "\U0010ffff", "a"):
            wanted = [id_ for id_ in ids if id_.startswith(prefix)]
            assert [item.object_id for item in await tier.scan_prefix(prefix)] == wanted
            assert await tier.count_prefix(prefix) == len(wanted)

    async def test_the_empty_prefix_is_everything(self, tier: Truth) -> None:
        await tier.apply([put(id_) for id_ in ("b", "\U0001f600", "a", "\ue000")])
        assert [item.object_id for item in await tier.scan_prefix("")] == ["a", "b", "\ue000", "\U0001f600"]
        assert await tier.count_prefix("") == 4

    async def test_Q18_pages_of_a_scan_join_without_gap_or_repeat(self, tier: Truth) -> None:
        ids = [f"p{n:03d}" for n in range(25)]
        await tier.apply([put(id_, content=b"x", state="s") for id_ in ids] + [put("q", state="s")])
        for size in (1, 7, 25, 100):
            seen: list[str] = []
            while page := await tier.scan_prefix("p", size, after=seen[-1] if seen else None):
                assert len(page) <= size
                seen += [item.object_id for item in page]
            assert seen == ids
        assert [item.object_id for item in await tier.scan_prefix("p", 2, after="a")] == ids[:2]
        assert await tier.scan_prefix("p", after="pz") == []

    async def test_a_scan_returns_whole_items(self, tier: Truth) -> None:
        await tier.apply([put("a", 3, b'{ "a" : 1 }', state="s"), put("b", 4, b"\x00", state="s")])
        fetched = (await tier.fetch(["a", "b"])).items
        assert await tier.scan_prefix("") == [fetched[id_] for id_ in "ab"]
        assert await tier.get_by_state("s") == [fetched[id_] for id_ in "ab"]

    async def test_get_by_state_ascends_and_pages(self, tier: Truth) -> None:
        await tier.apply([put(f"{n:02d}", state="s" if n % 2 else "t") for n in range(20)])
        odd = [f"{n:02d}" for n in range(1, 20, 2)]
        assert [item.object_id for item in await tier.get_by_state("s")] == odd
        assert [item.object_id for item in await tier.get_by_state("s", 3, after="05")] == odd[3:6]
        assert await tier.get_by_state("nobody") == []

    async def test_newest_stamp_covers_puts_deletes_and_restates(self, tier: Truth) -> None:
        assert await tier.newest_stamp() == 0
        await tier.apply([put("a", stamp=2**62), put("b", stamp=3)])
        assert await tier.newest_stamp() == 2**62
        await tier.apply([restate("b", "s", 2**62 + 2)])
        assert await tier.newest_stamp() >= 2**62 + 2
        await tier.apply([delete("c", 2**62 + 5)])
        assert await tier.newest_stamp() >= 2**62 + 5

    async def test_G61_a_schema_is_registered_at_any_time_and_changes_no_answer(self, tier: Truth) -> None:
        await tier.apply([put("alpha.1", 5, b"1"), put("beta.1", 6, b"2"), delete("alpha.2", stamp=7)])
        assert await tier.register_schema("letters", ["alpha.", "alpha.1.", "%"]) in (0, 1)
        assert await tier.register_schema("letters", iter(["alpha."])) == 0
        await tier.apply([put("alpha.2", content=b"older", stamp=6), put("alpha.3", content=b"3", stamp=8)])
        assert [item.object_id for item in await tier.scan_prefix("")] == ["alpha.1", "alpha.3", "beta.1"]
        assert await tier.held_stamps(["alpha.1", "beta.1"]) == {"alpha.1": 5, "beta.1": 6}
        assert [op.object_id for op in (await tier.changed_since(5)).ops] == ["alpha.1", "beta.1", "alpha.2", "alpha.3"]
        for name, prefixes in (("sync", ["a"]), ("a; --", ["a"]), ("a", []), ("a", [""]), ("a", "a")):
            with pytest.raises(InvalidItem):
                await tier.register_schema(name, prefixes)

    async def test_a_deadline_of_the_redis_copy_means_nothing_here(self, tier: Truth) -> None:
        await tier.apply([until(put("a", 1, b"{}"), now_ms() - 1_000)])
        assert await content_of(tier, "a") == b"{}"


def now_ms() -> int:
    return time.time_ns() // 1_000_000


def until(op: Op, deadline_ms: int) -> Op:
    return Op(kind=op.kind, object_id=op.object_id, stamp=op.stamp, item=op.item, redis_expires_at=deadline_ms)


def when(op: Op, version: int) -> Op:
    return Op(kind=op.kind, object_id=op.object_id, stamp=op.stamp, item=op.item, if_version=version)


def conflicts(applied: Applied) -> dict[str, VersionConflict]:
    return {id_: bad for id_, bad in applied.refused.items() if isinstance(bad, VersionConflict)}


async def gone(tier: Tier, object_id: str) -> bool:
    return not (await tier.exists_batch([object_id]))[0]
