"""What becomes of appends when the log answers, on a log that answers when a test says so."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterable, Sequence

import pytest

from sync_engine import StoreError, SyncItem, TierUnavailable
from sync_engine.item import Op
from sync_engine.ports import Logged
from sync_engine.pressure import Gate
from sync_engine.testing.clock import VirtualClock
from sync_engine.write.batcher import Batcher
from sync_engine.write.commits import Commits
from sync_engine.write.pending import Entry, PendingIndex
from sync_engine.write.route import Route
from sync_engine.write.shown import Shown


class Log:
    """A journal that answers for its oldest append when it is told to."""

    def __init__(self) -> None:
        self._asked: deque[tuple[Sequence[Op], Callable[[Sequence[Logged]], None], Callable[[Exception], None]]] = (
            deque()
        )
        self._seq = 0

    def append(
        self, ops: Sequence[Op], on_durable: Callable[[Sequence[Logged]], None], on_failed: Callable[[Exception], None]
    ) -> None:
        self._asked.append((ops, on_durable, on_failed))

    def hold(self) -> None:
        ops, on_durable, _ = self._asked.popleft()
        records = [Logged(op, self._seq + n, n) for n, op in enumerate(ops, 1)]
        self._seq += len(records)
        on_durable(records)

    def refuse(self, error: Exception | None = None) -> None:
        self._asked.popleft()[2](error or TierUnavailable("log", "no"))

    def settle(self, seqs: Iterable[int], /) -> None: ...

    async def read(self, records: Sequence[Logged], /) -> list[Op]:
        return [record.op for record in records]

    def relieve_until_settled(self) -> None: ...

    def relieve_until_drained(self) -> None: ...

    def drained(self) -> None: ...


class Readers:
    """What readers are shown, in the order in which they are."""

    def __init__(self) -> None:
        self.shown: list[str] = []

    def written(self, op: Op, /) -> None:
        self.shown.append(op.object_id)

    def touch(self, object_id: str, /) -> None: ...

    def outdone(self, object_id: str, stamp: int, /) -> None: ...


class Bench:
    """``Commits`` between real parts, with one tier behind them."""

    def __init__(self, *, with_log: bool = True) -> None:
        clock = VirtualClock()
        self.log = Log()
        journal = self.log if with_log else None
        self.readers = Readers()
        self.gate = Gate(ops_max=100, bytes_max=1 << 20, wait_ms=1, sleep=clock.sleep)
        self.queue = Batcher(flush_count=100, flush_bytes=1 << 20, flush_after_ms=0, clock=clock)
        self.pending = PendingIndex(1 << 20, journal)
        self.commits = Commits(
            journal,
            gate=self.gate,
            pending=self.pending,
            shown=Shown(self.pending, self.readers),
            route=Route(self.gate, truth=self.queue, cache=None),
        )
        self._stamp = 0

    async def entry(self, object_id: str, *, volatile: bool = False, kind: str = "put", sql: bool = True) -> Entry:
        self._stamp += 1
        item = SyncItem(object_id, b"x", stamp=self._stamp) if kind == "put" else None
        entry = Entry(Op(kind=kind, object_id=object_id, stamp=self._stamp, item=item, state="s", sql=sql))  # type: ignore[arg-type]  # one of the kinds
        if volatile:
            entry.volatile_bytes = entry.size
        await self.gate.enter(1, entry.volatile_bytes)
        return entry

    async def queued(self) -> list[str]:
        """What is on its way to the tier."""
        return [entry.op.object_id for entry in await self.queue.take()] if len(self.queue) else []


async def test_what_is_to_be_logged_is_shown_and_sent_once_it_is_durable_and_not_before() -> None:
    bench = Bench()
    entry = await bench.entry("a")
    done = bench.commits.append([entry], in_memory=False)
    assert done is not None
    assert (done.done(), bench.readers.shown, len(bench.queue)) == (False, [], 0)
    assert bench.commits.unseen() == {"a"}
    bench.log.hold()
    await done
    assert (bench.readers.shown, await bench.queued(), bench.commits.unseen()) == (["a"], ["a"], set())
    assert entry.logged is not None


async def test_what_was_promised_memory_alone_is_shown_at_once_and_sent_whatever_the_log_says() -> None:
    bench = Bench()
    held, refused = [await bench.entry(name, volatile=True) for name in "ab"]
    for entry in (held, refused):
        assert bench.commits.append([entry], in_memory=True) is None
    assert (bench.readers.shown, len(bench.queue)) == (["a", "b"], 0)
    assert bench.commits.unseen() == set()
    bench.log.hold()
    bench.log.refuse()
    assert await bench.queued() == ["a", "b"]
    assert (held.volatile_bytes, bench.gate.bytes) == (0, refused.size), "what the log holds takes no memory's place"
    assert (held.logged is not None, refused.logged) == (True, None)


async def test_a_refused_append_leaves_nothing_behind_but_the_doubt_whether_the_log_holds_it() -> None:
    bench = Bench()
    done = bench.commits.append([await bench.entry("a"), await bench.entry("b", kind="delete")], in_memory=False)
    assert done is not None
    bench.log.refuse()
    with pytest.raises(TierUnavailable, match="log"):
        await done
    assert (bench.readers.shown, len(bench.queue), bench.gate.ops) == ([], 0, 0)
    assert bench.commits.unseen() == {"a"}, "a restart may find it; of a delete no read shows anything"
    assert bench.commits.append([await bench.entry("c")], in_memory=False) is not None
    bench.log.hold()
    assert bench.commits.unseen() == set(), "the log has noted by now what it refused"


async def test_an_error_that_is_not_ours_is_told_as_a_refusal_of_the_log() -> None:
    bench = Bench()
    done = bench.commits.append([await bench.entry("a")], in_memory=False)
    assert done is not None
    bench.log.refuse(ValueError("strange"))
    with pytest.raises(StoreError, match="ValueError: strange"):
        await done


async def test_what_no_log_holds_is_shown_at_once_and_sent_behind_what_was_stamped_before() -> None:
    bench = Bench()
    for name in "ab":
        bench.commits.append([await bench.entry(name)], in_memory=False)
    bench.commits.bypass([await bench.entry("past", sql=False)])
    bench.commits.append([await bench.entry("c")], in_memory=False)
    assert (bench.readers.shown, len(bench.queue)) == (["past"], 0)
    bench.log.hold()
    assert await bench.queued() == ["a"]
    bench.queue.done(1)
    bench.log.refuse()
    assert await bench.queued() == ["past"], "an append that failed is answered too"
    bench.queue.done(1)
    bench.log.hold()
    assert await bench.queued() == ["c"]


async def test_with_nothing_at_the_log_what_it_does_not_hold_is_sent_at_once() -> None:
    for bench in (Bench(), Bench(with_log=False)):
        entry = await bench.entry("past", sql=False)
        assert not bench.commits.holds(entry.op)
        bench.commits.bypass([entry])
        assert (bench.readers.shown, await bench.queued()) == (["past"], ["past"])


async def test_a_change_of_state_is_not_shown_before_what_it_follows() -> None:
    # In memory alone it would be shown at once, and the put before it, which is promised the log, only later.
    bench = Bench()
    bench.commits.append([await bench.entry("a")], in_memory=False)
    follows = bench.commits.append([await bench.entry("a", kind="restate")], in_memory=True)
    assert follows is not None
    assert bench.readers.shown == []
    bench.log.hold()
    bench.log.hold()
    await follows
    assert bench.readers.shown == ["a", "a"]
    assert bench.commits.append([await bench.entry("a", kind="restate")], in_memory=True) is None


async def test_who_waits_for_the_log_waits_for_what_was_given_to_it_before_and_no_more() -> None:
    bench = Bench()
    await bench.commits.answered()  # at once
    bench.commits.append([await bench.entry("a")], in_memory=False)
    waiting = asyncio.create_task(bench.commits.answered())
    await asyncio.sleep(0)
    bench.commits.append([await bench.entry("b")], in_memory=False)
    assert not waiting.done()
    bench.log.hold()
    await waiting


async def test_a_caller_who_gives_up_changes_nothing_for_the_write_or_for_others() -> None:
    bench = Bench()
    done = bench.commits.append([await bench.entry("a")], in_memory=False)
    assert done is not None
    waiting = [asyncio.create_task(bench.commits.answered()) for _ in range(2)]
    await asyncio.sleep(0)
    done.cancel()
    waiting[0].cancel()
    await asyncio.sleep(0)
    bench.log.hold()
    await waiting[1]
    assert (bench.readers.shown, await bench.queued()) == (["a"], ["a"])
