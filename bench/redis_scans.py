"""Question 8: ``scan_prefix`` of 10,000 of 1,010,000 items, beside what redis-py's users write and beside the wire."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import hiredis
import orjson
from redis.asyncio import Redis

from bench.crowd import PREFIX, Crowd, crowd_of
from bench.data import batches
from bench.harness import Answer, Contender, Stage, Target, check, compared
from sync_engine import SyncItem

__all__ = ["ask"]

CHUNK = 500
SLOW_ROUNDS = 2


async def ask(stage: Stage) -> list[Answer]:
    """The items of one prefix, all of them, in one call."""
    crowd = await crowd_of(stage)
    wanted = len(crowd.wanted)
    asked = f"`scan_prefix` of {wanted:,} of {crowd.others + wanted:,} items"
    async with Redis.from_url(crowd.server.url) as client:
        with stage.watching(crowd.server.pid):
            times = await stage.race(Scan("scan_prefix", crowd), KnownKeys(crowd, client))
            ours, known = times
            answers = [compared(f"{asked}, against the replies alone", times, ours, [known], Target(0.5))]
            contenders = (
                Scan("scan_prefix, among the slow", crowd),
                ScanThenGet(crowd, client, None),
                ScanThenGet(crowd, client, 1_000),
            )
            times = await stage.race(*contenders, rounds=SLOW_ROUNDS)
    ours, plain, wide = times
    return [
        compared(asked, times, ours, [plain], Target(50)),
        compared("the same, against a scan of 1,000 keys a step", times, ours, [wide], None),
        *answers,
    ]


class Scan(Contender):
    """Ours: items in the order of their ids, hashes checked."""

    def __init__(self, name: str, crowd: Crowd) -> None:
        super().__init__(len(crowd.wanted))
        self.name = name
        self._crowd = crowd
        self._found: list[SyncItem] = []

    async def run(self) -> None:
        self._found = await self._crowd.store.scan_prefix(self._crowd.wanted_prefix, limit=self.units)

    async def verify(self) -> None:
        found = [(item.object_id, item.content) for item in self._found]
        check(found == list(self._crowd.wanted.items()), f"{self.name}: {len(found)} items, not those that are there")
        self._found = []


class Replies(Contender):
    """Documents by key, as they come: neither parsed nor checked while the clock runs."""

    def __init__(self, crowd: Crowd, client: Redis) -> None:
        super().__init__(len(crowd.wanted))
        self._crowd = crowd
        self._client = client
        self._replies: Mapping[bytes, bytes] = {}

    async def verify(self) -> None:
        found = {key: orjson.loads(document)["payload"] for key, document in self._replies.items()}
        wanted = {f"{PREFIX}{id_}".encode(): orjson.loads(text) for id_, text in self._crowd.wanted.items()}
        check(found == wanted, f"{self.name}: {len(found)} items, not those that are there")
        self._replies = {}


class ScanThenGet(Replies):
    """``scan_iter`` over the whole keyspace, and a ``JSON.GET`` for each key that it names. ``count``: keys a step."""

    def __init__(self, crowd: Crowd, client: Redis, count: int | None) -> None:
        super().__init__(crowd, client)
        self.name = f"redis-py scan_iter{'' if count is None else f'(count={count:,})'} and a JSON.GET each"
        self._count = count

    async def run(self) -> None:
        found = {}
        match = f"{PREFIX}{self._crowd.wanted_prefix}*"
        async for key in self._client.scan_iter(match=match, count=self._count):
            found[key] = await self._client.execute_command("JSON.GET", key)  # type: ignore[no-untyped-call]  # redis-py
        self._replies = found


class KnownKeys(Replies):
    """``JSON.MGET`` of keys known beforehand, packed beforehand, the next request sent before a reply is awaited."""

    name = f"JSON.MGET of {CHUNK} known keys each, precomputed"

    async def prepare(self) -> None:
        self._keys = [f"{PREFIX}{object_id}".encode() for object_id in self._crowd.wanted]
        calls = (("JSON.MGET", *keys, ".") for keys in batches(self._keys, CHUNK))
        self._calls = [hiredis.pack_command(call) for call in calls]  # type: ignore[arg-type]  # its stub: one word

    async def run(self) -> None:
        pool = self._client.connection_pool
        connection = await pool.get_connection()  # type: ignore[no-untyped-call]  # redis-py
        documents: list[bytes] = []
        try:
            for number, call in enumerate(self._calls):
                await connection.send_packed_command(call, check_health=False)
                if number:
                    documents += await connection.read_response()
            documents += await connection.read_response()
        finally:
            await pool.release(connection)
        self._documents: Sequence[bytes] = documents

    async def verify(self) -> None:
        self._replies = dict(zip(self._keys, self._documents, strict=True))
        await super().verify()
