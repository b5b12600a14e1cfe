"""Questions 1 and 2: what ``RedisStore.put_batch`` costs beside a plain pipeline, and beside its own script."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from typing import Any, cast

import hiredis
import orjson
from redis.asyncio import Redis

from bench.data import Place, batches, fresh, places
from bench.harness import Answer, Contender, Stage, Target, check, compared
from sync_engine import SyncItem
from sync_engine.item import Op
from sync_engine.storage.redis import RedisStore
from sync_engine.storage.redis.apply import Writer as Applier
from sync_engine.storage.redis.capabilities import Capabilities
from sync_engine.storage.redis.scripts import APPLY
from sync_engine.storage.redis.scripts import Script as ScriptText
from sync_engine.storage.redis.shards import Arg, Servers, Shard

__all__ = ["ask", "document_of"]

ITEMS = 20_000
CHUNK = 500


async def ask(stage: Stage) -> list[Answer]:
    """New keys and overwriting; every contender has a prefix of its own."""
    data = places(stage.sized(ITEMS, CHUNK))
    answers: list[Answer] = []
    for new in (True, False):
        case = "new keys" if new else "overwriting"
        what = f"{case}, "
        contenders = [kind(stage, data, what, new) for kind in (PutBatch, Pipeline, Script)]
        await stage.empty_redis()
        async with contenders[0], contenders[1], contenders[2]:
            times = await stage.race(*contenders)
        ours, pipeline, script = times
        asked = f"`RedisStore.put_batch`, {len(data):,} JSON items of ~250 B, chunks of {CHUNK}: {case}"
        answers += [
            compared(asked, times, ours, [pipeline], Target(1.5)),
            compared(f"the same, against its own script: {case}", times, ours, [script], Target(0.75)),
        ]
    return answers


class Writer(Contender):
    """Writes all items under a prefix. ``new``: into an empty Redis."""

    title = "?"

    def __init__(self, stage: Stage, data: Sequence[Place], what: str, new: bool) -> None:
        super().__init__(len(data))
        self.name = what + self.title
        self._stage = stage
        self._data = data
        self._new = new
        self._stamp = 0
        self._prefix = f"{type(self).__name__}:"
        self._items: list[SyncItem] = []
        self._client = Redis.from_url(stage.url)

    async def __aenter__(self) -> Writer:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._client.aclose()

    async def prepare(self) -> None:
        if self._new:
            await self._stage.empty_redis()
        self._stamp += 1  # each round is newer than the one before it, or overwriting would be leaving alone
        self._items = fresh(self._data, self._stamp)

    async def verify(self) -> None:
        members = await self._client.scard(f"{self._prefix}state:default")
        check(members == len(self._items), f"{self.name}: {members} members instead of {len(self._items)}")
        for batch in batches(self._items, 1_000):
            keys = [self._prefix + item.object_id for item in batch]
            found = await self._client.execute_command("JSON.MGET", *keys, ".")  # type: ignore[no-untyped-call]  # redis-py
            wanted = [orjson.loads(document_of(item)) for item in batch]
            check([orjson.loads(text) for text in found] == wanted, f"{self.name}: not what was written")


class PutBatch(Writer):
    """Ours."""

    title = "put_batch"

    async def __aenter__(self) -> Writer:
        self._store = await RedisStore.connect(self._stage.url, self._prefix)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._store.close()
        await super().__aexit__()

    async def run(self) -> None:
        result = await self._store.put_batch(self._items)
        check(result.written == self.units, f"{self.name}: {result}")

    async def verify(self) -> None:
        await super().verify()
        for index in ("ids", "by_state"):
            members = await self._client.zcard(f"{self._prefix}__local__:{index}")
            check(members == self.units, f"{self.name}: {members} members in {index} instead of {self.units}")


class Pipeline(Writer):
    """Chunk by chunk through redis-py's own pipeline, two commands per item."""

    title = "redis-py pipeline of JSON.SET + SADD"

    async def run(self) -> None:
        members = f"{self._prefix}state:default"
        for batch in batches(self._items, CHUNK):
            pipe = self._client.pipeline(transaction=False)
            for item in batch:
                pipe.execute_command("JSON.SET", self._prefix + item.object_id, "$", document_of(item))
                pipe.sadd(members, item.object_id)
            await pipe.execute()


class Script(Writer):
    """The script by its hash, arguments ready; as many chunks in flight as ours keeps."""

    title = "the script, arguments precomputed"

    async def prepare(self) -> None:
        await super().prepare()
        await self._client.script_load(APPLY.text)
        recorder = Recorder(self._prefix)
        ops = [Op(kind="put", object_id=item.object_id, stamp=item.stamp, item=item) for item in self._items]
        await Applier(cast(Servers, recorder), "compact").apply(ops)
        self._calls = recorder.calls

    async def run(self) -> None:
        flying: deque[asyncio.Task[Any]] = deque()
        for call in self._calls:
            if len(flying) == 2:
                await flying.popleft()
            flying.append(asyncio.create_task(self._call(call)))
            await asyncio.sleep(0)
        while flying:
            await flying.popleft()

    async def _call(self, call: tuple[Any, ...]) -> None:
        pool = self._client.connection_pool
        connection = await pool.get_connection()  # type: ignore[no-untyped-call]  # redis-py
        try:
            await connection.send_packed_command(hiredis.pack_command(call), check_health=False)
            answer = await connection.read_response()
        finally:
            await pool.release(connection)
        check(answer == [], f"the script refused: {answer}")


class Recorder:
    """``Servers`` that only write down which scripts they are asked to run."""

    single = True

    def __init__(self, prefix: str) -> None:
        self.shards = (Shard(0, prefix),)
        self.calls: list[tuple[Arg, ...]] = []

    async def capabilities(self) -> Capabilities:
        return Capabilities(json=True)

    def start(
        self, shard: Shard, script: ScriptText, keys: Sequence[Arg], args: Sequence[Arg]
    ) -> asyncio.Task[list[Any]]:
        self.calls.append(("EVALSHA", script.sha, len(keys), *keys, *args))
        return asyncio.get_running_loop().create_task(_nothing())


async def _nothing() -> list[Any]:
    return []


def document_of(item: SyncItem) -> bytes:
    """The document of an item, as one would write it by hand: every fact that we keep of it."""
    return orjson.dumps(
        {
            "access_count": item.access_count,
            "id": item.object_id,
            "last_accessed": item.last_accessed,
            "payload": orjson.Fragment(item.content),
            "payload_hash": item.content_hash,
            "stamp": item.stamp,
            "state": item.state,
            "timestamp": item.updated_at,
            "version": item.version,
        }
    )
