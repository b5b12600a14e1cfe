"""Question 10: what another client notices while a state of 1,000,000 items is read or deleted; and what indexes take.

Nothing is raced here: each runs once, and the delete takes the crowd with it.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from statistics import mean

from redis.asyncio import Redis

from bench.bystander import Bystander, Waits
from bench.crowd import PREFIX, STATE, Crowd, crowd_of
from bench.harness import Answer, Limit, Stage, Unit, check

__all__ = ["ask"]

IDLE_MS = 2_000
SAMPLED = 1_000
OTHERS_P99 = Limit(0.020)

INDEXES = {
    "ids in order (`scan_prefix`, `count_prefix`)": f"{PREFIX}__local__:ids",
    "states in order (`iter_by_state`, `delete_by_state`)": f"{PREFIX}__local__:by_state",
    "the state set": f"{PREFIX}state:{STATE}",
}


async def ask(stage: Stage) -> list[Answer]:
    """Reads of one item, from another process, beside the same reads of an idle server."""
    crowd = await crowd_of(stage)
    answers = await _memory(crowd)
    idle_s = stage.sized(IDLE_MS, 50) / 1_000
    witness = f"{PREFIX}{next(iter(crowd.wanted))}"
    try:
        async with Bystander(crowd.server.url, witness) as other:
            idle, _ = await _beside(other, lambda: asyncio.sleep(idle_s))
            for verb, work in (("iter_by_state", _read), ("delete_by_state", _delete)):
                busy, took = await _beside(other, lambda work=work: work(crowd))  # type: ignore[misc]  # mypy cannot infer it
                what = f"another client's read while `{verb}` is at work on {crowd.others:,} items"
                ours = f"beside {crowd.others / took:,.0f} items/s"
                answers += [
                    _latency(f"{what}: p99", ours, busy.p99, idle.p99, OTHERS_P99),
                    _latency(f"{what}: longest of {busy.count:,}", ours, busy.most, idle.most, None),
                ]
        left = await crowd.store.count_prefix("", allow_all=True)
        check(left == len(crowd.wanted), f"{left} items are left instead of {len(crowd.wanted)}")
    finally:
        await crowd.close()
    return answers


async def _beside(other: Bystander, work: Callable[[], Awaitable[None]]) -> tuple[Waits, float]:
    await other.begin()
    start = time.perf_counter()
    await work()
    took = time.perf_counter() - start
    return await other.end(), took


async def _read(crowd: Crowd) -> None:
    count = 0
    async for item in crowd.store.iter_by_state(STATE):
        count += item.state == STATE
    check(count == crowd.others, f"iter_by_state: {count} items instead of {crowd.others}")


async def _delete(crowd: Crowd) -> None:
    count = await crowd.store.delete_by_state(STATE)
    check(count == crowd.others, f"delete_by_state: {count} items instead of {crowd.others}")


async def _memory(crowd: Crowd) -> list[Answer]:
    """Bytes per item of each index, beside the documents themselves."""
    async with Redis.from_url(crowd.server.url) as client:
        pipe = client.pipeline(transaction=False)
        for object_id in random.Random(8).sample(list(crowd.wanted), min(SAMPLED, len(crowd.wanted))):
            pipe.memory_usage(PREFIX + object_id, samples=0)
        documents: list[int] = await pipe.execute()
        document = mean(documents)
        answers = []
        for name, key in INDEXES.items():
            members = await (client.scard(key) if key.endswith(STATE) else client.zcard(key))
            check(members >= crowd.others, f"{key}: {members} members for {crowd.others} items")
            each = (await client.memory_usage(key, samples=0) or 0) / members
            asked = f"memory of an index per item, {members:,} members: {name}"
            answers.append(
                Answer(asked, "the index", "the document", each, document, [each / document], None, None, Unit.BYTES)
            )
    return answers


def _latency(asked: str, ours: str, busy: float, idle: float, limit: Limit | None) -> Answer:
    return Answer(asked, ours, "beside nothing", busy, idle, [busy / idle], None, limit, Unit.TIME)
