"""A primary dies, or stops and comes back, or hands its slots over, while everybody works: what is promised then.

Replication is asynchronous: a replica that takes over lacks what the dead primary alone had. So each test sees to it
that there is such a tail, and holds both kinds of users to what they were promised:

- Through ``SyncEngine`` with SQL nothing acknowledged is lost. No read shows anything but the last acknowledged write
  or one begun since. An item that is there is read all the time. Redis is made right again without anybody's help, and
  then holds what SQL holds, state sets included.
- Through a bare ``RedisStore`` a tail may be lost, but not in silence: no read goes back behind what was acknowledged
  unless ``on_new_server`` was called since, at the latest while the read was under way. What its state sets and counts
  say is what its items are, and what was acknowledged after the last of the failovers is there.
- A reader of the change stream goes on by itself. What it was told last of an item, since the last gap that it was told
  of, is what the item is.
"""

from __future__ import annotations

import asyncio
import json
import random
import re
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from sync_engine import Ack, SyncEngine, SyncEngineConfig, SyncItem
from sync_engine.errors import TierUnavailable
from sync_engine.item import Op
from sync_engine.storage.redis import RedisStore
from sync_engine.storage.redis.slots import TAGS, shard_number, slot_of
from sync_engine.storage.sql import SqlStore
from sync_engine.testing.clusters import ClusterNode, ClusterSet
from sync_engine.testing.fixtures import StartCluster, StartSentinel
from sync_engine.testing.servers import RunningRedis

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

STATES = ("new", "hot", "cold")
IDS = 48
WRITERS = 6
QUICK_MS = 500
"""Far below the defaults, so that a silent server does not make the test long; nothing here measures time."""
TAIL_BYTES = 24 * 1024 * 1024
"""More than the kernel keeps for a replica that has stopped reading: what comes behind stays with the primary."""

Past = dict[str, list[SyncItem | None]]


class Load:
    """Writers with ids of their own, who note what they begin and what is acknowledged, and readers of all ids."""

    def __init__(self, name: str, seed: int) -> None:
        self.ids = [f"{name}.{n:02}" for n in range(IDS)]
        self.past: Past = {id_: [None] for id_ in self.ids}
        """What each id was made by each move, the last of which may be under way."""
        self.acked = dict.fromkeys(self.ids, 0)
        self.done = 0
        self.told = 0
        """How often another server was met, where that is told of."""
        self.outcomes: Counter[str] = Counter()
        self.lies: list[str] = []
        self._rng = random.Random(seed)
        self._ending = False
        self._tasks: list[asyncio.Task[None]] = []

    def begin(self) -> None:
        parts = [self.ids[n::WRITERS] for n in range(WRITERS)]
        self._tasks = [asyncio.create_task(work) for work in (*map(self._write, parts), self._read(), self._read())]

    async def more(self, count: int) -> None:
        """Wait for further acknowledgements."""
        wanted = self.done + count
        async with asyncio.timeout(120):
            while self.done < wanted:
                ended = [task.exception() for task in self._tasks if task.done()]
                assert not ended, ended
                await asyncio.sleep(0.01)

    async def end(self) -> None:
        self._ending = True
        await asyncio.gather(*self._tasks)

    async def give_up(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _write(self, ids: list[str]) -> None:
        while not self._ending:
            id_ = self._rng.choice(ids)
            past = self.past[id_]
            last = past[self.acked[id_]] if self.acked[id_] == len(past) - 1 else None
            kind = self._rng.choice(("put", "put", "put", "put", "delete", "restate"))
            if kind == "restate" and last is not None:
                past.append(last.with_state(self._rng.choice(STATES)))
            else:
                past.append(None if kind == "delete" else self._item(id_, len(past)))
            number = len(past) - 1
            if await self._move(id_, last, past[number]):
                self.acked[id_] = number
                self.note(id_)
                self.done += 1
            if self._rng.random() < 0.3:
                await self._look(id_)
            await asyncio.sleep(0)

    def _item(self, id_: str, number: int) -> SyncItem:
        state = self._rng.choice(STATES)
        text = "ö" * self._rng.randrange(100)
        content = (
            json.dumps({"n": number, "text": text}).encode() if number % 2 else b"\0%d%b" % (number, text.encode())
        )
        return SyncItem(id_, content, version=number, updated_at=number, state=state)

    async def _read(self) -> None:
        while not self._ending:
            await self._look(self._rng.choice(self.ids))
            await asyncio.sleep(0.002)

    async def _look(self, id_: str) -> None:
        told, first = self.told, self.floor(id_)
        try:
            found = await self.get(id_)
        except TierUnavailable as unknown:
            self.outcomes["unknown"] += 1
            if self.always_there(self.past[id_][first:]):
                self.lies.append(f"{id_} is there, and was not read: {unknown}")
            return
        self.outcomes["read"] += 1
        # A read that was under way when another server was met may show what was lost with the one before, and what
        # was acknowledged since says nothing of it.
        old = min(first, self.floor(id_))
        first = old if told == self.told else 0
        if found not in self.past[id_][first:]:
            past = self.past[id_][first:]
            self.lies.append(f"{id_}: {found!r} is none of {past}; servers met: {told}, now {self.told}")

    # What differs between the two kinds of users

    async def _move(self, id_: str, before: SyncItem | None, after: SyncItem | None) -> bool:
        raise NotImplementedError

    async def get(self, id_: str) -> SyncItem | None:
        raise NotImplementedError

    def always_there(self, _: list[SyncItem | None]) -> bool:
        return False

    def floor(self, id_: str) -> int:
        """The oldest move that a read may show."""
        return self.acked[id_]

    def note(self, id_: str) -> None:
        """A move was acknowledged."""


class EngineLoad(Load):
    def __init__(self, engine: SyncEngine) -> None:
        super().__init__("e", 1)
        self._engine = engine

    async def get(self, id_: str) -> SyncItem | None:
        return await self._engine.get(id_)

    def always_there(self, possible: list[SyncItem | None]) -> bool:
        return None not in possible

    async def _move(self, id_: str, before: SyncItem | None, after: SyncItem | None) -> bool:
        ack = Ack.STORED if self._rng.random() < 0.3 else Ack.LOGGED
        self.outcomes[ack.name] += 1
        if after is None:
            await self._engine.delete(id_, ack=ack)
        elif before is not None and before.version == after.version:
            await self._engine.set_state(id_, after.state, ack=ack)
        else:
            await self._engine.submit(after, ack=ack)
        return True


class BareLoad(Load):
    def __init__(self) -> None:
        super().__init__("b", 2)
        self.store: RedisStore
        self._told_then = dict.fromkeys(self.ids, 0)

    def on_new_server(self) -> None:
        self.told += 1

    def note(self, id_: str) -> None:
        self._told_then[id_] = self.told

    def floor(self, id_: str) -> int:
        return self.acked[id_] if self._told_then[id_] == self.told else 0

    async def get(self, id_: str) -> SyncItem | None:
        return await self.store.get(id_)

    async def _move(self, id_: str, before: SyncItem | None, after: SyncItem | None) -> bool:
        # With stamps: one that is given up may still arrive, behind the next.
        told, stamp = self.told, len(self.past[id_]) - 1
        op = Op(kind="delete", object_id=id_, stamp=stamp)
        if after is not None:
            op = Op(kind="put", object_id=id_, stamp=stamp, item=after.replace(stamp=stamp))
        try:
            applied = await self.store.apply([op])
        except TierUnavailable:
            self.outcomes["failed"] += 1
            return False
        self.outcomes["applied"] += 1
        assert not applied.refused
        return told == self.told and not applied.superseded


@asynccontextmanager
async def at_work(url: str, path: Path) -> AsyncIterator[tuple[EngineLoad, BareLoad]]:
    """Both kinds of users on these servers; in the end everything is compared with everything."""
    config = SyncEngineConfig(
        data_dir=path / "data",
        redis_url=url,
        redis_prefix="e:",
        redis_timeout_ms=QUICK_MS,
        redis_response_timeout_ms=QUICK_MS,
        l1_max_bytes=0,
        batch_flush_ms=2,
        enable_cdc_stream=True,
    )
    bare = BareLoad()
    quick = {"timeout_ms": QUICK_MS, "response_timeout_ms": QUICK_MS}
    bare.store = RedisStore(url, "b:", on_new_server=bare.on_new_server, **quick)
    watcher = RedisStore(url, "e:", **quick)
    changes = Changes()
    watching = asyncio.create_task(changes.follow(watcher))
    try:
        async with SyncEngine(config) as engine:
            load = EngineLoad(engine)
            try:
                for one in (load, bare):
                    one.begin()
                    await one.more(100)
                yield load, bare
                for one in (load, bare):
                    await one.more(100)
                    await one.end()
            finally:
                for one in (load, bare):
                    await one.give_up()
            await engine_kept_its_word(engine, load)
            await changes.tell_of(engine, load)
        await store_kept_its_word(bare, url)
        print(f"\nengine {dict(load.outcomes)}, bare {dict(bare.outcomes)}, {changes}")
    finally:
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)
        await watcher.close()
        await bare.store.close()


class Changes:
    """What a reader of the change stream was told since the last gap: before it, it would have to ask SQL."""

    def __init__(self) -> None:
        self.count = self.gaps = 0
        self.last: dict[str, SyncItem | None] = {}

    async def follow(self, store: RedisStore) -> None:
        async for entry in store.iter_cdc(block_ms=0):
            self.count += 1
            if entry.gap is not None:
                self.gaps += 1
                self.last.clear()
            self.last[entry.object_id] = entry.item() if entry.op == "PUT" else None

    async def tell_of(self, engine: SyncEngine, load: Load) -> None:
        """It goes on, and what it told last of each id is what the id is."""
        await engine.submit(SyncItem("end", b"{}"))
        await until(lambda: "end" in self.last)
        for id_, past in load.past.items():
            if id_ in self.last or not self.gaps:
                assert self.last.get(id_) == past[-1], id_

    def __str__(self) -> str:
        return f"{self.count} changes told, {self.gaps} gaps"


async def engine_kept_its_word(engine: SyncEngine, load: EngineLoad) -> None:
    assert not load.lies, load.lies[:5]
    await engine.flush(60)
    await until(lambda: healed(engine))
    wanted = {id_: past[-1] for id_, past in load.past.items() if past[-1] is not None}
    assert load.acked == {id_: len(past) - 1 for id_, past in load.past.items()}
    assert await eventually(lambda: engine.get_many(load.ids)) == wanted
    assert engine.config.sql_url is not None
    assert engine.config.redis_url is not None
    truth = await SqlStore.connect(engine.config.sql_url.get_secret_value())
    cache = RedisStore(engine.config.redis_url.get_secret_value(), engine.config.redis_prefix)
    try:
        for tier in (truth, cache):
            assert await tier.get_many(load.ids) == wanted, tier
            await agrees_with_itself(tier, "e.", wanted)
    finally:
        await truth.close()
        await cache.close()
    assert engine.stats().pending == engine.stats().quarantined == 0


async def store_kept_its_word(load: BareLoad, url: str) -> None:
    assert not load.lies, load.lies[:5]
    store = RedisStore(url, "b:")
    try:
        found = await store.get_many(load.ids)
        await agrees_with_itself(store, "b.", found)
        assert await eventually(lambda: load.store.get_many(load.ids)) == found
    finally:
        await store.close()
    for id_ in load.ids:
        # What nobody knows the outcome of is there or not; what was acknowledged since the last failover is.
        assert found.get(id_) in load.past[id_][load.floor(id_) :], id_


async def agrees_with_itself(tier: RedisStore | SqlStore, prefix: str, items: dict[str, SyncItem]) -> None:
    """States, counts and scans say what the items are."""
    for state in STATES:
        members = sorted(id_ for id_, item in items.items() if item.state == state)
        assert await tier.list_state_ids(state, 10_000) == members, tier
        assert await tier.count_by_state(state) == len(members), tier
    assert await tier.count_prefix(prefix) == len(items), tier
    assert [item.object_id for item in await tier.scan_prefix(prefix)] == sorted(items), tier


async def healed(engine: SyncEngine) -> bool:
    return (await engine.health()).ok


async def until(holds: Callable[[], bool | Awaitable[bool]]) -> None:
    async with asyncio.timeout(60):
        while True:
            answer = holds()
            if answer if isinstance(answer, bool) else await answer:
                return
            await asyncio.sleep(0.02)


async def eventually(call: Callable[[], Awaitable[dict[str, SyncItem]]]) -> dict[str, SyncItem]:
    async with asyncio.timeout(60):
        while True:
            try:
                return await call()
            except TierUnavailable:
                await asyncio.sleep(0.02)


def made_up_for(caplog: pytest.LogCaptureFixture) -> int:
    """How many changes the engine brought Redis that it had lost."""
    return sum(int(count) for count in re.findall(r"made up for (\d+) changes", caplog.text))


@asynccontextmanager
async def a_tail(primary: RunningRedis, replica: RunningRedis, ballast: str, load: Load) -> AsyncIterator[None]:
    """The primary confirms writes that the replica will never hear of, if it ends here."""
    await replica.pause()
    await primary.ask("SET", ballast, bytes(TAIL_BYTES))
    await load.more(100)
    yield
    await replica.resume()


# Sentinel


@pytest.mark.parametrize("how", ["killed", "stopped"])
async def test_I3_I4_a_failover_of_sentinels_loses_nothing_and_shows_nothing_old(
    own_sentinel: StartSentinel, tmp_path: Path, caplog: pytest.LogCaptureFixture, how: str
) -> None:
    group = await own_sentinel()
    async with at_work(group.url, tmp_path) as (load, bare):
        before = await group.primary()
        replica = next(server for server in group.servers if server is not before)
        async with a_tail(before, replica, "ballast", load):
            await (before.kill() if how == "killed" else before.pause())
        await group.failed_over(before)
        await load.more(100)
        # It comes back empty, or as it was, which is old by now; and takes itself for the primary at first.
        await (before.start() if how == "killed" else before.resume())
        await load.more(100)
        await group.until_well()
        assert bare.told
    assert made_up_for(caplog), "no tail was lost: the test shows nothing"


# Cluster


@pytest.mark.parametrize("how", ["killed", "stopped"])
async def test_I3_I4_a_cluster_that_is_resharded_and_fails_over_loses_nothing_and_shows_nothing_old(
    own_cluster: StartCluster, tmp_path: Path, caplog: pytest.LogCaptureFixture, how: str
) -> None:
    cluster = await own_cluster()
    async with at_work(cluster.url, tmp_path) as (load, bare):
        await move_some_slots(cluster, load, bare)
        assert not bare.told, "every key came along"
        before = await cluster.owner(slot_of(TAGS[0].encode()))  # the change stream is there too
        replica = await cluster.replica_of(before)
        async with a_tail(before.server, replica.server, f"{{{TAGS[0]}}}", load):
            await (before.server.kill() if how == "killed" else before.server.pause())

        await until(lambda: is_primary(cluster, replica))
        await load.more(100)
        await (before.server.start() if how == "killed" else before.server.resume())
        await load.more(100)
        await cluster.until_well()
        await move_some_slots(cluster, load, bare)
        assert bare.told
    assert made_up_for(caplog), "no tail was lost: the test shows nothing"


async def is_primary(cluster: ClusterSet, node: ClusterNode) -> bool:
    return node.id in {one.id for one in await cluster.primaries()}


async def move_some_slots(cluster: ClusterSet, *loads: Load) -> None:
    """Move slots of items that are being worked with, one from each primary, and go on working at every step."""

    async def between(_: str) -> None:
        await asyncio.sleep(0.02)

    slots = [slot_of(TAGS[shard_number(id_)].encode()) for load in loads for id_ in load.ids]
    for number in range(3):
        node = (await cluster.primaries())[number]
        slot = next(slot for slot in slots if any(slot in part for part in node.slots))
        await cluster.move_slot(slot, (number + 1) % 3, between)
        for load in loads:
            await load.more(30)
