"""The rows of the fault matrix that concern one store on one server, on every kind of server.

Rows 3 and 4 are in test_out_of_memory.py, what whole engines live through under tests/crash.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from typing import Any

import pytest

from sync_engine.errors import Corruption, StoreError, SyncEngineError, TierUnavailable
from sync_engine.item import Op, SyncItem
from sync_engine.storage.redis import ChangeStream, RedisStore
from sync_engine.storage.redis.connect import CONNECTIONS_MAX
from sync_engine.testing.fixtures import StartKind
from sync_engine.testing.proxy import CuttingProxy
from sync_engine.testing.servers import RedisKind

QUICK = {"timeout_ms": 300, "response_timeout_ms": 300}
STATES = ("default", "hot")


@pytest.fixture
async def store(kind_url: str, redis_prefix: str) -> AsyncIterator[RedisStore]:
    store = await RedisStore.connect(kind_url, redis_prefix)
    yield store
    await store.close()


@pytest.fixture
async def proxy(kind_url: str) -> AsyncIterator[CuttingProxy]:
    async with CuttingProxy(kind_url) as proxy:
        yield proxy


def put(n: int, stamp: int) -> Op:
    """JSON or binary, in a state that changes with the stamp."""
    content = b'{"s":%d}' % stamp if n % 2 else b"\x00%d" % stamp
    item = SyncItem(f"i{n:04}", content, stamp=stamp, state=STATES[(n // 2 + stamp) % 2], updated_at=1)
    return Op(kind="put", object_id=item.object_id, stamp=stamp, item=item)


def delete(n: int, stamp: int) -> Op:
    return Op(kind="delete", object_id=f"i{n:04}", stamp=stamp)


def content_of(n: int, stamp: int) -> SyncItem:
    item = put(n, stamp).item
    assert item is not None
    return item


async def agrees(store: RedisStore) -> dict[str, SyncItem]:
    """What is there, told alike by values, by the ordered indexes, by the sets and by the counts."""
    items = {item.object_id: item for item in await store.scan_prefix("", 10_000, allow_all=True)}
    assert await store.count_prefix("", allow_all=True) == len(items)
    assert await store.get_many(items) == items
    for state in STATES:
        ids = [object_id for object_id, item in items.items() if item.state == state]
        assert await store.list_state_ids(state, 10_000) == ids
        assert await store.count_by_state(state) == len(ids)
        assert await store.client.smembers(f"{store.prefix}state:{state}") == {id_.encode() for id_ in ids}
    return items


async def idle(store: RedisStore) -> None:
    """Until what is under way has been answered."""
    while store._servers._owned:  # noqa: ASYNC110  nothing announces it
        await asyncio.sleep(0.001)


# Rows 1 and 2: the server dies.


async def test_a_server_that_is_killed_within_a_batch_holds_whole_chunks(
    own_kind: StartKind, server_kind: RedisKind, redis_prefix: str
) -> None:
    server = await own_kind(server_kind, extra_args=("--appendonly", "yes"))
    async with CuttingProxy(server.url) as proxy:
        store = await RedisStore.connect(proxy.url_for(server.url), redis_prefix)
        for stamp, bytes_ in enumerate((1, 30_000, 60_000, 90_000), start=2):
            old = [put(n, stamp * 2) for n in range(1_000)]
            await store.apply(old)
            new = [put(n, stamp * 2 + 1) for n in range(1_000)]
            proxy.call_after_request_bytes(bytes_, lambda: os.kill(server.pid, signal.SIGKILL))
            with pytest.raises(TierUnavailable):
                await store.apply(new)
            proxy.heal()
            await server.kill()  # which waits until it is gone
            await server.start()
            items = await until_it_answers(store)
            kept = [items[f"i{n:04}"].stamp for n in range(1_000)]
            assert len(kept) == len(items)
            assert set(kept) <= {stamp * 2, stamp * 2 + 1}
            for start in range(0, 1_000, 250):
                assert len(set(kept[start : start + 250])) == 1, "a chunk is there as a whole or not at all"
            assert not (await store.apply(new)).superseded
            assert {item.stamp for item in (await agrees(store)).values()} == {stamp * 2 + 1}
        await store.close()


async def test_a_server_that_comes_back_empty_is_empty_and_can_be_filled(
    own_kind: StartKind, server_kind: RedisKind, redis_prefix: str
) -> None:
    server = await own_kind(server_kind)
    store = await RedisStore.connect(server.url, redis_prefix)
    await store.apply([put(n, 5) for n in range(300)])
    await agrees(store)
    await server.restart(empty=True)
    assert await until_it_answers(store) == {}
    assert await store.get("i0000") is None
    await store.apply([put(n, 3) for n in range(10)])  # no stamp of before is in the way
    assert len(await agrees(store)) == 10
    await store.close()


# Rows 5, 7 and 24: it does not answer, or not always.


async def test_a_server_that_stands_still_is_unavailable_and_not_empty(
    own_kind: StartKind, server_kind: RedisKind, redis_prefix: str
) -> None:
    server = await own_kind(server_kind)
    store = await RedisStore.connect(server.url, redis_prefix, **QUICK)
    await store.apply([put(n, 1) for n in range(300)])
    await store.reindex()
    await server.pause()
    await every_call_fails(store)
    await server.resume()
    assert len(await until_it_answers(store)) in (299, 300)  # a delete that nobody waited for may have been carried out
    await store.close()


@pytest.mark.parametrize("how", ["swallowed", "refused"])
async def test_a_server_that_cannot_be_reached_is_unavailable_and_not_empty(
    kind_url: str, proxy: CuttingProxy, redis_prefix: str, how: str
) -> None:
    store = await RedisStore.connect(proxy.url_for(kind_url), redis_prefix, **QUICK)
    await store.apply([put(n, 1) for n in range(300)])
    await store.reindex()
    proxy.blackhole() if how == "swallowed" else proxy.refuse()
    await every_call_fails(store)
    with pytest.raises(TierUnavailable):
        await RedisStore.connect(proxy.url_for(kind_url), redis_prefix, **QUICK)
    proxy.heal()
    assert len(await until_it_answers(store)) == 300
    await store.close()


async def every_call_fails(store: RedisStore) -> None:
    calls: list[Awaitable[Any]] = [
        store.get("i0001"),
        store.get("none"),
        store.get_many(["i0001"]),
        store.exists("i0001"),
        store.put(content_of(1, 1)),
        store.delete("i0000"),
        store.scan_prefix("i"),
        store.scan_ids("i"),
        anext(store.iter_prefix("i")),
        store.count_prefix("i"),
        store.delete_prefix("none"),
        store.list_state_ids("hot"),
        store.count_by_state("hot"),
        store.is_in_state("i0001", "hot"),
        store.move_state("i0001", "none", "hot"),
        store.delete_by_state("none"),
        store.reindex(),
    ]
    outcomes = await asyncio.gather(*calls, return_exceptions=True)
    assert {type(outcome) for outcome in outcomes} == {TierUnavailable}, outcomes


async def until_it_answers(store: RedisStore) -> dict[str, SyncItem]:
    """What is there, as soon as no connection of before is met any more."""
    await idle(store)
    async with asyncio.timeout(30):
        while True:
            with suppress(TierUnavailable):
                return await agrees(store)


async def test_a_server_that_comes_and_goes_loses_and_invents_nothing(
    kind_url: str, proxy: CuttingProxy, redis_prefix: str
) -> None:
    store = await RedisStore.connect(proxy.url_for(kind_url), redis_prefix, **QUICK)
    confirmed: dict[int, int] = {}
    failed = 0
    for turn in range(1, 41):
        if turn % 4 == 0:
            proxy.refuse()
        elif turn % 4 == 1:
            proxy.heal()
        ns = range(turn % 5, 100, 5)
        try:
            await store.apply([put(n, turn) for n in ns])
            confirmed |= dict.fromkeys(ns, turn)
        except TierUnavailable:
            failed += 1
    proxy.heal()
    items = await until_it_answers(store)
    assert failed >= 10
    for n, stamp in confirmed.items():
        item = items[f"i{n:04}"]
        assert item.stamp >= stamp
        assert item == content_of(n, item.stamp)
    await store.close()


# Row 6: a reply is cut.


@pytest.mark.parametrize("verb", ["put", "delete", "move", "delete state"])
async def test_a_write_whose_reply_is_cut_is_unknown_and_done_at_most_once(
    kind_url: str, proxy: CuttingProxy, redis_prefix: str, verb: str
) -> None:
    cut = await RedisStore.connect(proxy.url_for(kind_url), redis_prefix, change_stream=ChangeStream("w"))
    direct = await RedisStore.connect(kind_url, redis_prefix, change_stream=ChangeStream("seed"))
    for turn, bytes_ in enumerate((0, 1, 2, 3, 10_000), start=1):
        await direct.apply([put(n, turn * 10) for n in range(40)])
        await cut.exists("i0000")  # so that a connection is there
        before = await told_by(direct, "w")
        proxy.cut_after_reply_bytes(bytes_)
        calls: dict[str, Callable[[], Awaitable[Any]]] = {
            "put": lambda stamp=turn * 10 + 1: cut.apply([put(n, stamp) for n in range(40)]),  # type: ignore[misc]
            "delete": lambda: cut.delete_many([f"i{n:04}" for n in range(40)]),
            "move": lambda: cut.move_state("i0000", STATES[0], "hot"),
            "delete state": lambda: cut.delete_by_state("hot"),
        }
        with suppress(TierUnavailable):
            await calls[verb]()
        proxy.heal()
        await idle(cut)
        await agrees(direct)
        told = await told_by(direct, "w") - before
        assert told in {"put": (0, 40), "delete": (0, 40), "move": (0,), "delete state": (0, 20)}[verb]
    assert proxy.cuts >= 3
    for store in (cut, direct):
        await store.close()


async def told_by(store: RedisStore, writer: str) -> int:
    return sum([entry.writer == writer async for entry in store.iter_cdc()])


async def test_a_read_whose_reply_is_cut_anywhere_is_unknown_and_never_wrong(
    kind_url: str, proxy: CuttingProxy, redis_prefix: str
) -> None:
    store = await RedisStore.connect(proxy.url_for(kind_url), redis_prefix)
    wanted = [content_of(n, 1) for n in range(6)]
    await store.apply([put(n, 1) for n in range(6)])
    reads: list[tuple[Callable[[], Awaitable[Any]], Any]] = [
        (lambda: store.get("i0001"), wanted[1]),
        (lambda: store.get("none"), None),
        (lambda: store.scan_prefix("i"), wanted),
        (lambda: store.scan_ids("i"), [item.object_id for item in wanted]),
        (lambda: store.count_prefix("i"), 6),
        (lambda: store.count_by_state("hot"), 4),
    ]
    cut = 0
    for read, answer in reads:
        for bytes_ in (0, 1, 2, 3, 4, 7, 11, 40, 200, 700, 1_500):
            proxy.cut_after_reply_bytes(bytes_)
            try:
                assert await read() == answer
            except TierUnavailable:
                cut += 1
            proxy.heal()
            with suppress(TierUnavailable):  # cut behind the last byte: the next call finds the connection reset
                assert await read() == answer
            assert await read() == answer
    assert cut >= 20
    await store.close()


# Row 16: callers that give up.


async def test_300_cancelled_calls_leave_no_wrong_reply_and_no_connection_behind(store: RedisStore) -> None:
    await store.apply([put(n, 1) for n in range(600)])
    await store.reindex()
    rng = random.Random(1)
    verbs: list[Callable[[int], Awaitable[Any]]] = [
        lambda n: store.scan_prefix(f"i{n:04}"[:4]),
        lambda n: store.scan_ids("i", 700),
        lambda n: store.count_prefix(f"i{n:04}"),
        lambda n: store.list_state_ids("hot"),
        lambda n: store.get_by_state("hot", 600),
        lambda n: store.apply([put(n, 2)]),
        lambda n: store.move_state(f"i{n:04}", "none", "hot"),
        lambda n: store.delete_prefix(f"i{n:04}none"),
    ]
    for turn in range(300):
        call = asyncio.ensure_future(verbs[turn % len(verbs)](turn))
        for _ in range(rng.randrange(12)):
            await asyncio.sleep(0)
        call.cancel()
        with suppress(asyncio.CancelledError):
            await call
    await idle(store)
    items = await agrees(store)
    assert list(items) == [f"i{n:04}" for n in range(600)]
    assert all(item == content_of(n, item.stamp) for n, item in enumerate(items.values()))
    clients = [client for client in await store.client.client_list() if client["name"] == "sync-engine"]
    assert len(clients) <= CONNECTIONS_MAX


# Rows 17 to 19: bad items, large ones, damaged ones.


async def test_R2_R3_an_item_that_is_refused_leaves_its_neighbours_stored(store: RedisStore) -> None:
    await store.client.rpush(f"{store.prefix}i0001", "somebody's")
    await store.client.set(f"{store.prefix}i0002", "somebody's")
    await store.client.set(f"{store.prefix}state:taken", "somebody's")
    bad = SyncItem("i0003", b"{}", state="taken")
    ops = [put(n, 1) for n in range(300) if n != 3] + [Op(kind="put", object_id="i0003", stamp=0, item=bad)]
    ops.append(Op(kind="delete", object_id="i0300", stamp=1))
    applied = await store.apply(ops)
    assert set(applied.refused) == {"i0001", "i0002", "i0003"}
    assert {type(reason) for reason in applied.refused.values()} == {StoreError}
    assert list(await agrees(store)) == [f"i{n:04}" for n in range(300) if n not in (1, 2, 3)]


async def test_an_item_of_16_mib_comes_back(store: RedisStore) -> None:
    large = SyncItem("large", b'{"a":"%b"}' % (b"x" * (16 * 2**20)), updated_at=1)
    assert (await store.put_batch([large, content_of(1, 1)])).written == 2
    assert await store.get("large") == large
    assert await store.scan_prefix("l") == [large]
    assert await store.move_state("large", "default", "hot")
    assert await store.delete_by_state("hot") >= 1
    assert await store.get("large") is None


async def test_a_value_that_was_changed_or_stands_in_the_wrong_place_is_damage(store: RedisStore) -> None:
    await store.apply([put(n, 1) for n in range(8)])
    for n in (0, 1):
        await store.client.copy(f"{store.prefix}i000{n}", f"{store.prefix}i000{n + 2}", replace=True)
    for n in (4, 5):
        key = f"{store.prefix}i000{n}"
        if await store.client.type(key) == b"string":
            await store.client.setrange(key, await store.client.strlen(key) - 1, "!")
        else:
            await store.client.execute_command("JSON.SET", key, "$.payload.s", "2")
    for n in range(8):
        if n in (2, 3, 4, 5):
            with pytest.raises(Corruption, match=f"i000{n}"):
                await store.get(f"i000{n}")
        else:
            assert await store.get(f"i000{n}") == content_of(n, 1)
    assert set((await store.fetch([f"i000{n}" for n in range(8)])).corrupt) == {f"i000{n}" for n in (2, 3, 4, 5)}
    await store.apply([put(n, 2) for n in range(8)])  # a write puts it right
    assert {item.stamp for item in (await agrees(store)).values()} == {2}


# Rows 20 and 22: things come twice, late, and at the same time.


async def test_I1_what_comes_again_and_in_any_order_ends_alike(store: RedisStore) -> None:
    rng = random.Random(1)
    ops = [rng.choice((put, delete))(n, stamp) for n in range(60) for stamp in range(1, 6)]
    last = {op.object_id: op for op in ops}
    for _ in range(4):
        turn = rng.sample(ops, len(ops))
        while turn:
            batch = {op.object_id: op for op in turn[:50]}
            late = [op for op in turn[:50] if batch[op.object_id] is not op]
            await store.apply(list(batch.values()))
            turn = late + turn[50:]
        items = await agrees(store)
        assert items == {id_: op.item for id_, op in sorted(last.items()) if op.kind == "put"}


async def test_I1_deletes_win_against_older_writes_at_the_same_time(store: RedisStore) -> None:
    await store.apply([put(n, 1) for n in range(100)])

    async def write(rng: random.Random, *kinds: Callable[[int], Op]) -> None:
        for _ in range(15):
            ns = rng.sample(range(100), 20)
            with suppress(SyncEngineError):
                await store.apply([rng.choice(kinds)(n) for n in ns])

    def fill(n: int) -> Op:
        return Op(kind="put", object_id=f"i{n:04}", stamp=4, item=content_of(n, 4), fill=True)

    def restate(n: int) -> Op:
        return Op(kind="restate", object_id=f"i{n:04}", stamp=3, state="hot")

    older = (lambda n: put(n, 2), restate, fill)
    await asyncio.gather(
        *(write(random.Random(seed), *older) for seed in range(4)),
        store.apply([delete(n, 5) for n in range(0, 100, 2)]),
        store.apply([put(n, 6) for n in range(1, 100, 2)]),
    )
    items = await agrees(store)
    assert items == {f"i{n:04}": content_of(n, 6) for n in range(1, 100, 2)}
