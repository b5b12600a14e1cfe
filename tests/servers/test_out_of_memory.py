"""A server at its `maxmemory`: what is left wherever a batch meets it, and what evictions by the server undo.

Rows 3 and 4 of the fault matrix. What is there is read back by a plain client: the store must not vouch for itself.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import pytest

from sync_engine.codec import read_document, read_string
from sync_engine.errors import TierUnavailable
from sync_engine.item import Op, OpKind, SyncItem
from sync_engine.storage.redis import ChangeStream, RedisStore
from sync_engine.storage.redis.pack import CHUNK_OPS_MAX
from sync_engine.testing.fixtures import StartKind
from sync_engine.testing.servers import RedisKind, RunningRedis

PREFIX = "p:"
STATES = ("default", "hot", "cold")
FAR = 9_999_999_999_999
INDEXES = ("ids", "by_state", "expiring")


@pytest.fixture
async def server(own_kind: StartKind, server_kind: RedisKind) -> RunningRedis:
    return await own_kind(server_kind)


@pytest.fixture
async def store(server: RunningRedis) -> AsyncIterator[RedisStore]:
    store = await RedisStore.connect(server.url, PREFIX, change_stream=ChangeStream("w"))
    yield store
    await store.close()


def op(kind: OpKind, object_id: str, stamp: int, item: SyncItem | None = None, **told: Any) -> Op:
    return Op(kind=kind, object_id=object_id, stamp=stamp, item=item, **told)


def put(object_id: str, rng: random.Random, stamp: int, *, state: str | None = None, size: int = 700) -> Op:
    """Of random bytes, since RedisJSON keeps equal texts once; JSON or binary, with a deadline or without."""
    noise = rng.randbytes(size // 2).hex().encode()
    content = b'{"n":"%b"}' % noise if rng.random() < 0.5 else b"\x00" + noise
    item = SyncItem(object_id, content, stamp=stamp, state=state or rng.choice(STATES), updated_at=1)
    return op("put", object_id, stamp, item, redis_expires_at=rng.choice((None, FAR)))


@dataclass
class Found:
    """What a plain client finds under the prefix."""

    items: dict[str, SyncItem] = field(default_factory=dict)
    deadlines: dict[str, int] = field(default_factory=dict)
    sets: dict[str, set[str]] = field(default_factory=dict)
    ids: dict[str, int] = field(default_factory=dict)
    by_state: dict[str, int] = field(default_factory=dict)
    expiring: dict[str, int] = field(default_factory=dict)

    @property
    def states(self) -> dict[str, set[str]]:
        """What the sets should be."""
        return {
            state: {object_id for object_id, item in self.items.items() if item.state == state}
            for state in {item.state for item in self.items.values()}
        }

    def agree(self) -> None:
        """Documents, sets and indexes tell the same."""
        assert self.sets == self.states
        assert self.ids == dict.fromkeys(self.items, 0)
        assert self.by_state == {f"{item.state}\0{object_id}": 0 for object_id, item in self.items.items()}
        assert self.expiring == {f"{self.items[id_].state}\0{id_}": at for id_, at in self.deadlines.items()}


async def found_in(store: RedisStore) -> Found:
    found = Found()
    keys = [key for key in await store.client.keys(f"{PREFIX}*") if not key.startswith(f"{PREFIX}__local__:".encode())]

    async def all_said(command: str, asked: Sequence[bytes], *args: str) -> dict[str, Any]:
        pipeline = store.client.pipeline(transaction=False)
        for key in asked:
            pipeline.execute_command(command, key, *args)
        return {
            key.decode().removeprefix(PREFIX): said for key, said in zip(asked, await pipeline.execute(), strict=True)
        }

    kinds = dict(zip(keys, (await all_said("TYPE", keys)).values(), strict=True))
    parts = {kind: [key for key in keys if kinds[key] == kind] for kind in (b"set", b"string", b"ReJSON-RL")}
    for name, members in (await all_said("SMEMBERS", parts[b"set"])).items():
        found.sets[name.removeprefix("state:")] = {member.decode() for member in members}
    for name, value in (await all_said("GET", parts[b"string"])).items():
        found.items[name] = whole(read_string(name, value))
    for name, value in (await all_said("JSON.GET", parts[b"ReJSON-RL"])).items():
        found.items[name] = whole(read_document(name, value))
    deadlines = await all_said("PEXPIRETIME", parts[b"string"] + parts[b"ReJSON-RL"])
    found.deadlines = {name: at for name, at in deadlines.items() if at > 0}
    for name in INDEXES:
        members = await store.client.zrange(f"{PREFIX}__local__:{name}", 0, -1, withscores=True)
        setattr(found, name, {member.decode(): int(score) for member, score in members})
    return found


def whole(read: Any) -> SyncItem:
    assert isinstance(read, SyncItem), read
    return read


async def told_by_the_stream(store: RedisStore) -> dict[str, bytes]:
    """The contents that a consumer of the stream has in the end. Restates without an item are not told there."""
    contents: dict[str, bytes] = {}
    async for entry in store.iter_cdc():
        assert entry.gap is None
        if entry.op == "DEL":
            contents.pop(entry.object_id, None)
        else:
            contents[entry.object_id] = entry.item().content
    return contents


async def seeded(store: RedisStore, rng: random.Random, count: int) -> dict[str, SyncItem]:
    """Items of stamp 1, in an empty server without a limit."""
    await limited(store, 0)
    await store.client.flushall()
    ops = [put(f"i{n:03}", rng, 1) for n in range(count)]
    await store.apply(ops)
    return {one.object_id: one.item for one in ops if one.item is not None}


async def limited(store: RedisStore, maxmemory: int, policy: str = "noeviction") -> None:
    await store.client.config_set("maxmemory-policy", policy)
    await store.client.config_set("maxmemory", maxmemory)


async def used(store: RedisStore) -> int:
    return int((await store.client.info("memory"))["used_memory"])


# Without eviction.


def changes(rng: random.Random, seeds: Iterable[str]) -> list[Op]:
    """One of every kind of change, to items that are there and to others."""
    ops = [put(f"n{n:03}", rng, 2) for n in range(450)]
    for object_id in seeds:
        match rng.randrange(4):
            case 0:
                ops.append(op("delete", object_id, 2))
            case 1:
                ops.append(op("restate", object_id, 2, state="cold"))
            case 2:
                ops.append(put(object_id, rng, 2))
            case _:
                restated = put(object_id, rng, 2)
                ops.append(op("restate", object_id, 2, restated.item, state=restated.item and restated.item.state))
    rng.shuffle(ops)
    return ops


def is_done(one: Op, held: SyncItem | None) -> bool:
    if one.kind == "delete":
        return held is None
    return held is not None and held.stamp == one.stamp and (one.item is None or held == one.item)


async def test_I6_I8_wherever_a_batch_meets_the_limit_nothing_disagrees(store: RedisStore) -> None:
    steps = 9
    outcomes: list[tuple[bool, int]] = []
    grown = 0
    for step in range(-1, steps + 1):
        rng = random.Random(step)
        seeds = await seeded(store, rng, 300)
        ops = changes(rng, seeds)
        before = await used(store)
        if step >= 0:
            await limited(store, before + grown * (step if step < steps else 2 * steps) // steps)
        try:
            applied = await store.apply(ops)
        except TierUnavailable:
            confirmed = False
        else:
            assert not applied.refused
            assert not applied.superseded
            confirmed = True
        await idle(store)
        if step < 0:
            grown = await used(store) - before  # what the whole of it takes
        await limited(store, 0)

        found = await found_in(store)
        found.agree()
        assert await told_by_the_stream(store) == {id_: item.content for id_, item in found.items.items()}
        done = [is_done(one, found.items.get(one.object_id)) for one in ops]
        for one, is_it in zip(ops, done, strict=True):
            assert is_it or found.items.get(one.object_id) == seeds.get(one.object_id), "done, or left as it was"
        if confirmed:
            assert all(done)
        outcomes.append((confirmed, sum(done)))
        if not confirmed:  # sent again, as the engine does: as if it had never been refused
            await store.apply(ops)
            (found := await found_in(store)).agree()
            assert all(is_done(one, found.items.get(one.object_id)) for one in ops)
    assert outcomes[0][0]
    assert outcomes[-1][0]
    partly = {done for confirmed, done in outcomes if not confirmed}
    assert len(partly) >= 3, "it was met at several points"


async def idle(store: RedisStore) -> None:
    """Until the chunks that were under way when one was refused have been answered."""
    while store._servers._owned:  # noqa: ASYNC110  nothing announces it
        await asyncio.sleep(0.001)


async def test_R2_a_full_server_takes_nothing_of_a_batch_that_fits_a_chunk(store: RedisStore) -> None:
    seeds = await seeded(store, random.Random(1), 50)
    await limited(store, 1)
    rng = random.Random(2)
    for ops in ([put("i001", rng, 2), put("new", rng, 2)], [put(f"n{n}", rng, 2) for n in range(CHUNK_OPS_MAX)]):
        with pytest.raises(TierUnavailable, match="out of memory"):
            await store.apply(ops)
    with pytest.raises(TierUnavailable, match="out of memory"):
        await store.put_batch([SyncItem("new", b"{}")])
    with pytest.raises(TierUnavailable, match="out of memory"):
        await store.put(SyncItem("i001", b"{}", stamp=3))
    (found := await found_in(store)).agree()
    assert found.items == seeds
    assert len(await told_by_the_stream(store)) == 50


async def test_a_full_server_answers_every_question(store: RedisStore) -> None:
    seeds = await seeded(store, random.Random(1), 300)
    soon = time.time_ns() // 1_000_000 + 30
    await store.apply(
        [op("put", f"e{n}", 1, SyncItem(f"e{n}", b"{}", stamp=1), redis_expires_at=soon) for n in range(9)]
    )
    await store.client.delete(f"{PREFIX}__local__:indexed")
    await limited(store, 1)
    while await store.client.exists(f"{PREFIX}e8"):  # noqa: ASYNC110  nothing announces it
        await asyncio.sleep(0.001)
    assert await store.scan_prefix("", allow_all=True) == list(seeds.values())
    assert await store.count_prefix("i") == await store.count_prefix("", allow_all=True) == 300
    for state in STATES:
        wanted = [id_ for id_, item in seeds.items() if item.state == state]
        assert await store.list_state_ids(state) == wanted
        assert await store.count_by_state(state) == len(wanted)
    assert await store.get_many(seeds) == seeds
    assert await store.reindex() == 0


async def test_a_full_server_takes_deletes_and_changes_of_state(store: RedisStore) -> None:
    seeds = await seeded(store, random.Random(1), 600)
    await limited(store, 1)
    left = dict(seeds)
    for object_id in [id_ for id_, item in seeds.items() if item.state == "hot"][:20]:
        assert await store.move_state(object_id, "hot", "new")
        left[object_id] = left[object_id].with_state("new")
    assert await store.remove_from_state(object_id, "new")
    left[object_id] = left[object_id].with_state("default")
    ops = [op("restate", id_, 5, state="late") for id_ in list(left)[:40]]
    ops += [op("delete", id_, 5) for id_ in list(left)[40:80]]
    assert len((await store.apply(ops)).existed) == 40
    left = {id_: item.replace(state="late", stamp=5) for id_, item in left.items() if id_ < "i040"} | {
        id_: item for id_, item in left.items() if id_ >= "i080"
    }
    assert await store.delete("i599")
    assert await store.delete_many(["i598", "i597", "none"]) == 2
    assert await store.delete_prefix("i3") == 100
    assert await store.delete_by_state("cold") == sum(
        item.state == "cold" for id_, item in left.items() if id_ < "i597" and not id_.startswith("i3")
    )
    left = {id_: it for id_, it in left.items() if it.state != "cold" and id_ < "i597" and not id_.startswith("i3")}
    (found := await found_in(store)).agree()
    assert found.items == left
    assert set(await told_by_the_stream(store)) == set(left)


async def test_the_deletes_of_a_batch_make_room_although_its_writes_find_none(store: RedisStore) -> None:
    seeds = await seeded(store, random.Random(1), 300)
    await limited(store, 1)
    rng = random.Random(2)
    gone, moved = list(seeds)[:20], list(seeds)[20:40]
    ops = [put(f"n{n:03}", rng, 2) for n in range(600)]
    ops += [op("delete", id_, 2) for id_ in gone] + [op("restate", id_, 2, state="new") for id_ in moved]
    with pytest.raises(TierUnavailable, match="out of memory"):
        await store.apply(ops)
    await idle(store)
    (found := await found_in(store)).agree()
    assert set(found.items) == set(seeds) - set(gone)
    assert found.sets["new"] == set(moved)


# Where the server evicts by itself.


LOSSES: Sequence[tuple[str, ...]] = (
    ("__local__:ids",),
    ("__local__:by_state",),
    ("__local__:expiring",),
    ("__local__:indexed",),
    ("__local__:ids", "__local__:by_state"),
    ("__local__:ids", "__local__:by_state", "__local__:expiring"),
    ("state:hot",),
    ("state:hot", "__local__:by_state"),
    ("__local__:mark", "__local__:tombs"),
    ("i000", "i003"),
    ("i000", "__local__:ids"),
)


@pytest.mark.parametrize("then", ["nothing", "a put", "a delete", "an expiry"])
@pytest.mark.parametrize("lost", LOSSES, ids=" ".join)
async def test_I6_answers_are_right_whichever_key_was_evicted(
    redis_url: str, redis_prefix: str, lost: Sequence[str], then: str
) -> None:
    store = await RedisStore.connect(redis_url, redis_prefix)
    items = [SyncItem(f"i{n:03}", b"{}" if n % 2 else b"\x00", state="hot", updated_at=1) for n in range(8)]
    held = {item.object_id: item for item in items}
    await store.put_batch(items)
    await store.put(SyncItem("e", b"{}", state="hot", updated_at=1), ttl=60)
    held["e"] = SyncItem("e", b"{}", state="hot", updated_at=1)
    assert await store.count_by_state("hot") == 9
    for key in lost:
        await store.client.delete(redis_prefix + key)
        held.pop(key, None)
    if then == "a put":
        await store.put(SyncItem("new", b"{}", state="cold", updated_at=1), ttl=60)
        held["new"] = SyncItem("new", b"{}", state="cold", updated_at=1)
    elif then == "a delete":
        await store.delete_many(["i001", "e"])
        held = {id_: item for id_, item in held.items() if id_ not in ("i001", "e")}
    elif then == "an expiry":
        await store.client.pexpire(f"{redis_prefix}e", 1)
        while await store.client.exists(f"{redis_prefix}e"):  # noqa: ASYNC110  nothing announces it
            await asyncio.sleep(0.001)
        held.pop("e")

    assert await store.scan_prefix("", allow_all=True) == sorted(held.values(), key=lambda item: item.object_id)
    for state in ("hot", "cold"):
        wanted = sorted(id_ for id_, item in held.items() if item.state == state)
        assert await store.list_state_ids(state) == wanted
        assert await store.count_by_state(state) == len(wanted)
    assert await store.count_prefix("", allow_all=True) == len(held)
    await store.reindex()
    sets = {state: await store.client.smembers(f"{redis_prefix}state:{state}") for state in ("hot", "cold")}
    assert sets == {s: {id_.encode() for id_, item in held.items() if item.state == s} for s in ("hot", "cold")}
    assert await store.reindex() == 0
    assert await store.delete_by_state("hot") == sum(item.state == "hot" for item in held.values())
    await store.close()


async def test_indexes_that_go_as_fast_as_they_are_made_are_not_taken_for_empty_ones(
    redis_url: str, redis_prefix: str
) -> None:
    store = await RedisStore.connect(redis_url, redis_prefix)
    await store.put(SyncItem("a", b"{}"))
    await store.client.delete(f"{redis_prefix}__local__:ids")

    async def index(_: object) -> None:
        """A walk whose work is gone by the time that it ends."""

    store._indexer.index = index
    for call in (store.scan_prefix("a"), store.count_prefix("a"), store.count_by_state("default")):
        with pytest.raises(TierUnavailable, match="lost as fast as they are made"):
            await call
    await store.reindex()
    assert await store.scan_ids("a") == ["a"]
    await store.close()


@pytest.mark.parametrize("policy", ["allkeys-lru", "allkeys-random"])
async def test_I4_nothing_is_invented_where_the_server_evicts(store: RedisStore, policy: str) -> None:
    rng = random.Random(policy)
    await limited(store, 0)
    await store.client.flushall()
    written: dict[str, set[bytes]] = {}
    await limited(store, await used(store) + 5_000_000, policy)
    for turn in range(8):
        ops = [put(f"i{n:04}", rng, 2 + turn) for n in rng.sample(range(4_000), 800)]
        for one in ops:
            assert one.item is not None
            written.setdefault(one.object_id, set()).add(one.item.content)
        with suppress(TierUnavailable):  # where it could not make room in time
            await store.apply(ops)
        await store.move_state(rng.choice(list(written)), "hot", "cold")
        await store.delete_many(rng.sample(list(written), 5))
        await store.count_by_state("hot")
    await limited(store, 0)
    assert (await store.client.info("stats"))["evicted_keys"] > 200

    found = await found_in(store)
    assert 0 < len(found.items) < 4_000
    for object_id, item in found.items.items():
        assert item.content in written[object_id]
    assert await store.get_many([f"i{n:04}" for n in range(4_000)]) == {i: found.items[i] for i in sorted(found.items)}
    assert await store.scan_prefix("", 4_000, allow_all=True) == [found.items[id_] for id_ in sorted(found.items)]
    for state in STATES:
        wanted = sorted(id_ for id_, item in found.items.items() if item.state == state)
        assert await store.list_state_ids(state, 4_000) == wanted
        # Listed, what is gone is forgotten: so a count is right from then on.
        assert await store.count_by_state(state) == len(wanted)
    await store.reindex()
    (await found_in(store)).agree()
