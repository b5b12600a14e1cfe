"""The whole engine against a dict, on a real Redis that dies and loses everything, through crashes and restarts.

The model knows what each id must answer. It is unsure in two cases only, both promised nowhere: writes that were
acknowledged in memory alone are gone or not after a crash, and items that live in Redis alone are gone with it.
"""

from __future__ import annotations

import asyncio
import shutil
import sys
import time
from collections.abc import Coroutine, Iterable
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from queue import Empty
from typing import Any, TypeVar

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from redis.asyncio import Redis

from sync_engine import (
    Ack,
    Backpressure,
    SubmitOptions,
    SyncEngine,
    SyncEngineConfig,
    SyncItem,
    TierUnavailable,
    VersionConflict,
)
from sync_engine.build import REDIS_PATIENCE_S
from sync_engine.embedded import EmbeddedRedis
from sync_engine.log_writer import Work
from sync_engine.parts import Parts
from sync_engine.storage.redis import RedisStore
from sync_engine.storage.sql import SqlStore
from sync_engine.testing.fixtures import StartRedis

T = TypeVar("T")

IDS = ("a", "a.1", "a.2", "b", "ä\U0001f600", "z:state:x")
STATES = ("default", "hot", "cöld\U0001f9ca")
CONTENTS = (
    b"",
    b"\x00\xff\xf5\x01 bytes",
    b'{"b": 1.50, "a": 1}',
    b'{"a":1,"b":[1,2]}',
    b'"text"',
    b'{"n":123456789012345678901234567890,"n":1}',
    b"x" * 400,
)
FASTER = 50.0
TIMEOUT_MS = 5_001
DEADLINES_S = (REDIS_PATIENCE_S, 4 * TIMEOUT_MS / 1000)


class HastyClock:
    """The real wall clock; intervals pass fifty times as fast, so that retries and circuits need no patience.

    Deadlines come out of this clock too. They stay what they are, or a busy machine would look like a sick Redis.
    """

    def now_ms(self) -> int:
        return self.now_us() // 1000

    def now_us(self) -> int:
        return time.time_ns() // 1000

    def monotonic(self) -> float:
        return time.monotonic() * FASTER

    async def sleep(self, seconds: float, /) -> None:
        await asyncio.sleep(seconds if seconds in DEADLINES_S else seconds / FASTER)


@dataclass(frozen=True)
class Known:
    """One item and the tiers that keep it."""

    item: SyncItem
    redis: bool = True
    sql: bool = True

    def restated(self, state: str) -> Known:
        return Known(self.item.with_state(state), self.redis, self.sql)


@dataclass
class Slot:
    """What one id must answer: ``now``, or None where ``lossy``. After a crash also what is in ``before``."""

    now: Known | None = None
    lossy: bool = False
    before: list[Known | None] = field(default_factory=list)
    volatile: bool = False  # something since the last sure point was in no log
    l2_loose: bool = False  # Redis lost its copy, and nothing has to bring it back

    @property
    def kept_by_sql(self) -> bool:
        return self.now is not None and self.now.sql

    def sure(self) -> None:
        self.before, self.volatile = [], False


def item(id_: str, content: bytes, version: int, state: str, home: str | None) -> SyncItem:
    return SyncItem(
        id_, content, version=version, state=state, home_instance_id=home, updated_at=1_700_000_000_000 + version
    )


items = st.builds(
    item,
    st.sampled_from(IDS),
    st.sampled_from(CONTENTS),
    st.integers(0, 3),
    st.sampled_from(STATES),
    st.sampled_from((None, "here")),
)
options = st.one_of(
    st.none(),
    st.builds(SubmitOptions, redis_ttl=st.sampled_from((None, 60, 3600)), state=st.sampled_from((None, *STATES))),
    st.just(SubmitOptions.cache(600)),
    st.builds(SubmitOptions, redis=st.just(False), state=st.sampled_from((None, *STATES))),
)
acks = st.sampled_from((None, Ack.MEMORY, Ack.LOGGED, Ack.STORED))
ids = st.sampled_from(IDS)
states = st.sampled_from(STATES)


class Machine(RuleBasedStateMachine):
    """Rules run one after the other; the engine's own tasks run in between, as far as they get."""

    def __init__(self, server: EmbeddedRedis, folder: Path, number: int) -> None:
        super().__init__()
        self.server = server
        self.folder = folder / str(number)
        self.prefix = f"m{number}:"
        self.runner = asyncio.Runner()
        self.up = True
        self.engine: SyncEngine | None = None
        self.slots = {id_: Slot() for id_ in IDS}

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return self.runner.run(work)

    @property
    def parts(self) -> Parts:
        assert self.engine is not None
        assert self.engine._running is not None
        return self.engine._running

    @initialize(
        l1_max_bytes=st.sampled_from((0, 1_500, 1 << 20)),
        batch_flush_ms=st.sampled_from((0, 5, 60_000)),
        batch_flush_count=st.sampled_from((1, 3, 1_000)),
        pending_max_bytes=st.sampled_from((0, 1_000, 1 << 20)),
        redis_binary_format=st.sampled_from(("compact", "json")),
        wal_segment_bytes=st.sampled_from((4_096, 1 << 20)),
    )
    def begin(self, **varied: Any) -> None:
        self.config = SyncEngineConfig(
            data_dir=self.folder,
            redis_url=self.server.url,
            redis_prefix=self.prefix,
            redis_timeout_ms=TIMEOUT_MS,
            redis_response_timeout_ms=TIMEOUT_MS,
            backpressure_wait_ms=200,
            **varied,
        )
        self.run(self._start())

    # Writing

    @rule(item=items, given=options, ack=acks)
    def submit(self, item: SyncItem, given: SubmitOptions | None, ack: Ack | None) -> None:
        self.run(self._submit([item], given, ack))

    @rule(batch=st.lists(items, max_size=8), given=options, ack=acks)
    def submit_many(self, batch: list[SyncItem], given: SubmitOptions | None, ack: Ack | None) -> None:
        self.run(self._submit(batch, given, ack, many=True))

    @rule(item=items, other=items)
    def submit_at_once(self, item: SyncItem, other: SyncItem) -> None:
        other = other.replace(object_id=item.object_id)

        async def both() -> None:
            slot = self.slots[item.object_id]
            one, two, found = await asyncio.gather(
                self.engine.submit(item),
                self.engine.submit(other),
                self._read(item.object_id),
            )
            assert found in ("silent", item, other) or self._may_be(slot, found)
            self._put(item if one.stamp > two.stamp else other, SubmitOptions(), Ack.LOGGED)

        self.run(both())

    @precondition(lambda self: self.up)
    @rule(item=items, expected=st.integers(0, 3))
    def compare_and_set(self, item: SyncItem, expected: int) -> None:
        slot = self.slots[item.object_id]

        async def attempt() -> None:
            await self._flush()  # a write that skips SQL takes the older row away only then
            if slot.lossy or (slot.now is not None and not slot.now.sql):
                await self._delete([item.object_id])
            now = self.slots[item.object_id].now
            actual = now.item.version if now is not None else 0
            if now is not None and actual == 0:
                return  # version 0 cannot be told from no item
            try:
                await self.engine.submit(item, SubmitOptions(if_version=expected))
            except VersionConflict as conflict:
                assert (conflict.expected, conflict.actual) == (expected, actual)
                assert actual != expected
            else:
                assert actual == expected
                self._put(item, SubmitOptions(), Ack.STORED)

        self.run(attempt())

    @rule(id_=ids)
    def delete(self, id_: str) -> None:
        self.run(self._delete([id_]))

    @rule(some=st.lists(ids, max_size=4))
    def delete_many(self, some: list[str]) -> None:
        self.run(self._delete(some))

    @rule(id_=ids, state=states, ack=st.sampled_from((None, Ack.MEMORY)))
    def set_state(self, id_: str, state: str, ack: Ack | None) -> None:
        slot = self.slots[id_]
        done = self.run(self.engine.set_state(id_, state, ack=ack))
        if slot.now is None:
            assert not done or not self.up
        elif not done:
            assert slot.lossy
        if slot.now is not None and done:
            if ack is Ack.MEMORY:
                slot.before.append(slot.now)
            else:
                self._logged_so_far()
            slot.now = slot.now.restated(state)

    # Reading

    @rule(id_=ids, stale_ok=st.booleans())
    def get(self, id_: str, stale_ok: bool) -> None:
        found = self.run(self._read(id_, stale_ok=stale_ok))
        if not (found is None and stale_ok and not self.up):
            self._check(id_, found)

    @rule(some=st.lists(ids, max_size=6))
    def get_many(self, some: list[str]) -> None:
        try:
            found = self.run(self.engine.get_many(some))
        except TierUnavailable as silent:
            assert not self.up, silent
            assert any(not self.slots[id_].kept_by_sql for id_ in some)
            return
        assert set(found) <= set(some)
        for id_ in some:
            self._check(id_, found.get(id_))

    @rule(id_=ids)
    def peek(self, id_: str) -> None:
        async def peeked() -> SyncItem | None:
            return self.engine.peek(id_)

        found = self.run(peeked())
        assert found is None or self._may_be(self.slots[id_], found)

    @rule(id_=ids)
    def contains(self, id_: str) -> None:
        slot = self.slots[id_]
        try:
            there = self.run(self.engine.contains(id_))
        except TierUnavailable as silent:
            assert not self.up, silent
            assert not slot.kept_by_sql
            return
        assert there == (slot.now is not None) or (slot.lossy and not there)

    @rule(id_=ids)
    def status(self, id_: str) -> None:
        slot = self.slots[id_]
        status = self.run(self.engine.status(id_))
        assert status.quarantined is None
        if self.up:
            assert status.l2 is not None
            if not slot.lossy:
                # A change of state that was accepted unseen, for what turned out not to exist, is pending too.
                assert status.exists == (slot.now is not None) or (status.pending and slot.now is None)
        elif slot.kept_by_sql:
            assert status.exists

    @rule(state=states)
    def count_by_state(self, state: str) -> None:
        self._scan(self.engine.count_by_state(state), len(self._in_state(state)))

    @rule(state=states, limit=st.integers(1, 4), after=st.one_of(st.none(), ids))
    def list_state_ids(self, state: str, limit: int, after: str | None) -> None:
        wanted = [item.object_id for item in self._in_state(state) if after is None or item.object_id > after]
        self._scan(self.engine.list_state_ids(state, limit, after=after), wanted[:limit])

    @rule(state=states)
    def get_by_state(self, state: str) -> None:
        self._scan(self.engine.get_by_state(state), self._in_state(state))

    @rule(prefix=st.sampled_from(("", "a", "a.", "ä", "z:s", "nothing")), limit=st.integers(1, 6))
    def scan_prefix(self, prefix: str, limit: int) -> None:
        wanted = [item for item in self._in_sql() if item.object_id.startswith(prefix)]
        self._scan(self.engine.scan_prefix(prefix, limit), wanted[:limit])
        self._scan(self.engine.count_prefix(prefix), len(wanted))

    # Time, memory, and what goes wrong

    @rule()
    def flush(self) -> None:
        self.run(self._flush())

    @rule(ms=st.sampled_from((0, 1, 10)))
    def let_it_run(self, ms: int) -> None:
        self.run(asyncio.sleep(ms / 1000))

    @rule()
    def memory_is_dropped(self) -> None:
        self.parts.l1.clear()

    @precondition(lambda self: self.up)
    @rule()
    def redis_is_emptied(self) -> None:
        async def emptied() -> None:
            async with Redis.from_url(self.server.url) as client:
                await client.flushall()

        self.run(emptied())
        self._redis_lost_everything()

    @precondition(lambda self: self.up)
    @rule()
    def redis_dies(self) -> None:
        self.run(self.server.kill())
        self.up = False
        self._redis_lost_everything()

    @precondition(lambda self: not self.up)
    @rule()
    def redis_comes_back(self) -> None:
        self.run(self._redis_up())

    @rule()
    def stop_and_start(self) -> None:
        async def again() -> None:
            report = await self.engine.stop(timeout=20 if self.up else 0.1)
            if self.up:
                assert (report.left_in_log, report.lost) == (0, 0)
                self._all_sure()
            else:
                self._logged_so_far()
            await self._start()
            await self._after_a_loss()

        self.run(again())

    @rule()
    def crash_and_start(self) -> None:
        async def again() -> None:
            await crash(self.engine)
            if self.up:
                await self._silence()
            await self._start()
            await self._after_a_loss()

        self.run(again())

    @rule()
    def verify_all(self) -> None:
        self.run(self._verify())

    @invariant()
    def memory_adds_up(self) -> None:
        if self.engine is not None:
            self.parts.l1.verify()

    def teardown(self) -> None:
        try:
            if self.engine is not None:
                # After a failed step only the mess is cleared away: a second failure would hide the first.
                self.run(crash(self.engine) if sys.exc_info()[0] is not None else self._end())
        finally:
            self.runner.close()
            shutil.rmtree(self.folder, ignore_errors=True)

    # The model's part of a write

    async def _submit(
        self, batch: list[SyncItem], given: SubmitOptions | None, ack: Ack | None, *, many: bool = False
    ) -> None:
        if ack is Ack.STORED and not self.up:
            ack = None
        try:
            if many:
                receipts = await self.engine.submit_many(batch, given, ack=ack)
            else:
                receipts = [await self.engine.submit(batch[0], given, ack=ack)]
        except Backpressure:
            # Only what no log holds (yet) is bounded this tightly: a Redis that is away keeps it waiting.
            assert ack is Ack.MEMORY or (given is not None and not given.sql)
            return
        assert [receipt.object_id for receipt in receipts] == [item.object_id for item in batch]
        for item in batch:
            self._put(item, given or SubmitOptions(), ack or Ack.LOGGED)

    def _put(self, item: SyncItem, given: SubmitOptions, ack: Ack) -> None:
        slot = self.slots[item.object_id]
        before = slot.now
        slot.now = Known(item if given.state is None else item.with_state(given.state), given.redis, given.sql)
        slot.l2_loose = False
        if ack is Ack.STORED:
            slot.sure()
        elif not given.sql:
            slot.before.append(before)
            slot.volatile = True
        elif ack is Ack.MEMORY:
            slot.before.append(before)
        else:
            slot.sure()
        if given.sql and ack is not Ack.MEMORY:
            self._logged_so_far()
        slot.lossy = not given.sql and not self.up

    async def _delete(self, some: list[str]) -> None:
        least = {id_ for id_ in some if self.slots[id_].now is not None and not self.slots[id_].lossy}
        most = {id_ for id_ in some if self.slots[id_].now is not None or not self.up}
        done = await self.engine.delete_many(some)
        assert len(least) <= done <= len(most)
        for id_ in some:
            self.slots[id_] = Slot()
        if done:
            self._logged_so_far()

    def _logged_so_far(self) -> None:
        """The log is written in order: one durable record makes all earlier ones durable."""
        for slot in self.slots.values():
            if not slot.volatile:
                slot.sure()

    def _all_sure(self) -> None:
        for slot in self.slots.values():
            slot.sure()

    def _redis_lost_everything(self) -> None:
        for slot in self.slots.values():
            slot.l2_loose = True
            slot.lossy = slot.now is not None and not slot.now.sql

    # The model's part of a read

    def _in_sql(self) -> list[SyncItem]:
        return [slot.now.item for _, slot in sorted(self.slots.items()) if slot.now is not None and slot.now.sql]

    def _in_state(self, state: str) -> list[SyncItem]:
        return [item for item in self._in_sql() if item.state == state]

    def _scan(self, asked: Coroutine[Any, Any, T], wanted: T) -> None:
        try:
            found = self.run(asked)
        except TierUnavailable as silent:
            assert not self.up, silent
        else:
            assert found == wanted

    async def _read(self, id_: str, *, stale_ok: bool = False) -> SyncItem | str | None:
        try:
            return await self.engine.get(id_, stale_ok=stale_ok)
        except TierUnavailable as silent:
            assert not self.up, silent
            assert not stale_ok
            return "silent"

    @staticmethod
    def _may_be(slot: Slot, found: object) -> bool:
        return found == (slot.now.item if slot.now is not None else None) or (found is None and slot.lossy)

    def _check(self, id_: str, found: SyncItem | str | None) -> None:
        slot = self.slots[id_]
        if found == "silent":
            assert not slot.kept_by_sql, f"{id_!r} is in SQL, which answers"
            return
        assert self._may_be(slot, found), f"{id_!r} is {found!r}, and should be {slot.now!r}"
        if found is not None:
            assert found.content_hash == slot.now.item.content_hash
        elif self.up:
            self.slots[id_] = Slot(l2_loose=slot.l2_loose)

    # What the engine goes through

    async def _start(self) -> None:
        self.engine = SyncEngine(self.config, clock=HastyClock())
        await self.engine.start()
        assert self.parts.journal.damage == []

    async def _flush(self) -> None:
        if self.up:
            await self.engine.flush(timeout=20)
            self._all_sure()
        else:
            try:
                await self.engine.flush(timeout=0.05)
            except TierUnavailable:
                pass
            else:
                self._all_sure()

    async def _redis_up(self) -> None:
        await self.server.start()
        self.up = True
        while not await self._healed():
            await asyncio.sleep(0.005)

    async def _silence(self) -> None:
        """Let Redis finish what the dead engine's sockets still held: it serves them round by round."""
        async with Redis.from_url(self.server.url) as client:
            for _ in range(3):
                await client.ping()

    async def _healed(self) -> bool:
        """Whether the engine has noticed that Redis is back."""
        try:
            await self.parts.l2.exists_batch(["a"])
        except TierUnavailable:
            return False
        return not any(lane.trouble for lane in self.engine.stats().lanes.values())

    async def _after_a_loss(self) -> None:
        """Whatever was unsure is one of the things it may be; then it is deleted, and so made sure again."""
        if self.up:
            # What the log replays may be older than what is in Redis alone, and hides it until it has passed.
            await self.engine.flush(timeout=20)
        for id_, slot in self.slots.items():
            if not slot.before:
                continue
            found = await self._read(id_)
            may_be = {known.item if known is not None else None for known in (slot.now, *slot.before)}
            if slot.volatile:
                # A change of state that was logged may have met an older item than the one it was meant for.
                some = [item for item in may_be if item is not None]
                may_be |= {item.with_state(other.state) for item in some for other in some}
            if slot.lossy or any(known is not None and not known.sql for known in slot.before):
                may_be.add(None)  # what came before was in Redis alone, and is gone with it
            if found == "silent":
                assert slot.volatile or None in may_be
            else:
                assert found in may_be, f"{id_!r} is {found!r}, and should be one of {may_be!r}"
            await self.engine.delete(id_)
            self.slots[id_] = Slot()

    async def _verify(self) -> None:
        """Every tier holds what the model says, no more and no less."""
        if not self.up:
            await self._redis_up()
        await self._flush()
        stats = self.engine.stats()
        assert (stats.pending, stats.pending_bytes, stats.quarantined, stats.log_records) == (0, 0, 0, 0)
        gate = self.parts.writes._gate
        assert (gate.ops, gate.bytes) == (0, 0)
        await self._verify_sql()
        await self._verify_redis()
        for id_ in IDS:
            in_memory = self.engine.peek(id_)
            assert in_memory is None or self._may_be(self.slots[id_], in_memory), f"{id_!r}: {in_memory!r}"
        self.parts.l1.clear()
        found = await self.engine.get_many(IDS)
        for id_ in IDS:
            self._check(id_, found.get(id_))

    async def _verify_sql(self) -> None:
        store = await SqlStore.connect(f"sqlite:///{self.folder / 'truth.db'}")
        try:
            assert await store.scan_prefix("") == self._in_sql()
        finally:
            await store.close()

    async def _verify_redis(self) -> None:
        store = await RedisStore.connect(self.server.url, self.prefix)
        try:
            held = await store.get_many(IDS)
            keys = {
                key.decode().removeprefix(self.prefix)
                async for key in store.client.scan_iter(match=f"{self.prefix}*", count=1000)
            }
            listed = {state: set(await store.list_state_ids(state)) for state in STATES}
        finally:
            await store.close()
        for id_, slot in self.slots.items():
            wanted = slot.now.item if slot.now is not None and slot.now.redis else None
            assert held.get(id_) == wanted or (held.get(id_) is None and (slot.l2_loose or slot.lossy)), (
                f"Redis holds {held.get(id_)!r} of {id_!r}, and should hold {slot!r}"
            )
        internal = {key for key in keys if key.startswith(("state:", "__local__:"))}
        assert keys - internal == set(held)
        for state, members in listed.items():
            assert members == {id_ for id_, item in held.items() if item.state == state}
        assert internal >= {f"state:{state}" for state, members in listed.items() if members}

    async def _end(self) -> None:
        await self._verify()
        await self.engine.stop()
        await self._start()
        await self._verify()
        await self.engine.stop()
        self.engine = None


async def crash(engine: SyncEngine) -> None:
    """What ``kill -9`` leaves: the files as they are, nothing that was only on its way to them.

    Work that the log's thread has not begun is dropped, no last mark is written, and every task ends where it is;
    a SQL transaction that was open is rolled back, as SQLite would on the next start.
    """
    parts, engine._parts, engine._running = engine._parts, None, None
    assert parts is not None
    assert parts.journal is not None
    journal, writer = parts.journal, parts.journal._writer
    if journal._scheduled is not None:
        journal._scheduled.cancel()
    journal._work = Work()
    journal._closing = asyncio.get_running_loop().create_future()
    journal._closing.set_result(None)
    writer._tell = lambda outcome: None
    writer._finish = lambda: None
    try:
        while True:
            writer._queue.get_nowait()
    except Empty:
        writer.stop()
    await asyncio.to_thread(writer.join)
    await cancelled(asyncio.all_tasks() - {asyncio.current_task()})
    await parts._opened.aclose()


async def cancelled(tasks: Iterable[asyncio.Task[Any]]) -> None:
    tasks = list(tasks)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def examples(profile: int) -> int:
    """How many runs: 60 where a property has the usual 100 examples."""
    return max(10, profile * 6 // 10)


@pytest.mark.slow
@pytest.mark.timeout(0)  # its length is that of the profile
def test_I2_I3_I4_I6_the_engine_is_a_dict_that_survives(own_redis: StartRedis, tmp_path: Path) -> None:
    server = asyncio.run(own_redis())
    numbers = count()

    def machine() -> Machine:
        if not server.running:
            asyncio.run(server.start())
        return Machine(server, tmp_path, next(numbers))

    run_state_machine_as_test(
        machine,
        settings=settings(max_examples=examples(settings().max_examples), stateful_step_count=30),
    )
