"""The demo: real places through memory, Redis and SQL, a ``kill -9`` in the middle, and a comparison of every byte.

This process is the witness. The engine runs in a child (``load``), whose acknowledgements are recorded here, so
that its death takes none of them along; afterwards every tier must return what was acknowledged.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, cast

import msgspec
import typer
from pydantic import SecretStr

from sync_engine.cli.command import Call, Exit
from sync_engine.cli.load import Acknowledged, Order, parse
from sync_engine.cli.places import NAMES_EVERY, PLACES_MAX, items_of, load_places
from sync_engine.cli.story import Loaded, Story
from sync_engine.cli.verify import examine
from sync_engine.embedded import EmbeddedRedis
from sync_engine.errors import ConfigError, SyncEngineError
from sync_engine.storage.redis import RedisStore
from sync_engine.storage.sql import SqlStore

__all__ = ["demo"]

READ_BYTES_MAX = 1 << 16


class EngineProcessFailed(SyncEngineError):
    """The demo's engine process ended by itself, before it was done; it has said why."""


async def demo(
    call: Call,
    places: Annotated[
        int, typer.Option(min=1, max=PLACES_MAX, metavar="N", help="How many places, the largest first.")
    ] = 30_000,
) -> Exit:
    """Show it: real places, a kill -9 in the middle of the load, and every byte compared.

    Brings its own Redis and a temporary folder, unless told otherwise; of the settings only options and --config
    count. What it writes to a server or database of yours, it deletes again; what is in --data-dir stays.
    """
    begun = time.monotonic()
    story = Story(call.out)
    total = places + -(-places // NAMES_EVERY)
    this = asyncio.current_task()
    assert this is not None, "a coroutine runs in a task"
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, this.cancel)  # so that we clean up behind us
    async with _stores(call, places) as order:
        story.opening(places, total)
        acks: dict[str, Acknowledged] = {}
        first = await _load(order, acks, story, total, kill_at=total // 2)
        story.killed(first)
        second = await _load(msgspec.structs.replace(order, done=list(acks)), acks, story, total, kill_at=None)
        story.loaded(second)
        examination = await examine(order, acks, total)
    story.ending(places, first, second, examination, time.monotonic() - begun)
    return Exit.OK if examination.passed else Exit.CORRUPT


@asynccontextmanager
async def _stores(call: Call, places: int) -> AsyncIterator[Order]:
    """Everything that the demo runs on, and nothing of it afterwards."""
    told = _told(call)
    async with AsyncExitStack() as cleanup:
        data_dir = told.data_dir
        if data_dir is None:
            data_dir = Path(cleanup.enter_context(tempfile.TemporaryDirectory(prefix="sync-engine-demo-")))
        elif await asyncio.to_thread(lambda: data_dir.exists() and any(data_dir.iterdir())):
            raise ConfigError(f"--data-dir: {data_dir} is not empty; the demo does not touch what it did not make")
        if told.sql_url is not None:
            await _refuse_taken(told.sql_url)
        server_url = told.redis_url
        if own_redis := server_url == "embedded://":
            server = await cleanup.enter_async_context(EmbeddedRedis())
            server_url = server.url
        elif server_url is not None:
            # An engine would wait for a server that is away; a demo is better told at once.
            await (await RedisStore.connect(server_url)).close()
        order = Order(
            places=places,
            data_dir=str(data_dir),
            redis_url=server_url,
            redis_prefix=f"{told.redis_prefix}demo-{secrets.token_hex(8)}:",
            own_redis=own_redis,
            sql_url=told.sql_url,
            debug=call.debug,
        )
        if told.sql_url is not None or not own_redis:
            cleanup.push_async_callback(_forget, order)
        yield order


@dataclass(frozen=True, slots=True)
class _Told:
    """What options and --config say; the environment alone never points the demo at a store of yours."""

    data_dir: Path | None
    redis_url: str | None
    redis_prefix: str
    sql_url: str | None


def _told(call: Call) -> _Told:
    settings: dict[str, object] = {}
    if call.config_file is not None:
        config = call.config()
        settings = {field: getattr(config, field) for field in config.model_fields_set}
    settings |= call.settings
    if settings.get("sql_url", "") is None:
        raise ConfigError("sql_url: the demo compares with the truth and needs one")

    def text(field: str, default: str | None) -> str | None:
        value = settings.get(field, default)
        return value.get_secret_value() if isinstance(value, SecretStr) else cast("str | None", value)

    return _Told(
        data_dir=cast("Path | None", settings.get("data_dir")),
        redis_url=text("redis_url", "embedded://"),
        redis_prefix=text("redis_prefix", "") or "",
        sql_url=text("sql_url", None),
    )


async def _load(order: Order, acks: dict[str, Acknowledged], story: Story, total: int, kill_at: int | None) -> Loaded:
    """Run one engine process and record its acknowledgements in ``acks``; kill it once there are ``kill_at``."""
    loaded = Loaded(acknowledged_before=len(acks))
    begun = time.monotonic()
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-c", "from sync_engine.cli.load import main; main()"),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        env={name: value for name, value in os.environ.items() if not name.startswith("SYNC_ENGINE_")},
        start_new_session=True,  # Ctrl-C is ours to handle
    )
    assert process.stdin is not None, "asked for above"
    assert process.stdout is not None, "asked for above"
    try:
        with suppress(BrokenPipeError, ConnectionResetError):  # it ended at once: its exit code is looked at below
            process.stdin.write(msgspec.json.encode(order))
            await process.stdin.drain()
            process.stdin.close()
        with story.progress(total, done=len(acks)) as progress:
            async for lines in _lines(process.stdout):
                now_s = time.monotonic() - begun
                for told in map(parse, lines):
                    if isinstance(told, Acknowledged):
                        acks[told.object_id] = told
                    else:
                        loaded.note(told, now_s)
                progress.update(len(acks))
                if kill_at is not None and len(acks) >= kill_at:
                    kill_at = None
                    _kill(process)
                    loaded.killed_after_s = time.monotonic() - begun
        ended = await process.wait()
    except BaseException:  # Ctrl-C included: no engine process may outlive the demo
        _kill(process)
        await process.wait()
        raise
    loaded.acknowledged = len(acks) - loaded.acknowledged_before
    loaded.killed = ended == -signal.SIGKILL
    if ended not in (0, -signal.SIGKILL) or (loaded.killed and loaded.killed_after_s is None):
        raise EngineProcessFailed(f"the engine process ended with code {ended} after {len(acks)} acknowledgements")
    return loaded


def _kill(process: asyncio.subprocess.Process) -> None:
    if process.returncode is None:
        # Not process.kill(): it polls first, which takes the exit code away from asyncio's own waiting thread.
        with suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)


async def _lines(pipe: asyncio.StreamReader) -> AsyncIterator[list[bytes]]:
    """Whole lines as they come, some at a time. What a killed writer left of its last line tells nothing."""
    rest = b""
    while read := await pipe.read(READ_BYTES_MAX):
        *lines, rest = (rest + read).split(b"\n")
        yield lines


async def _refuse_taken(sql_url: str) -> None:
    truth = await SqlStore.connect(sql_url)
    try:
        for prefix in ("place.", "names."):
            if count := await truth.count_prefix(prefix):
                raise ConfigError(f"sql_url: the database holds {count} items {prefix}*; the demo does not touch them")
    finally:
        await truth.close()


async def _forget(order: Order) -> None:
    """Delete what was written to stores that are not ours, acknowledged or not."""
    ids = [item.object_id for item in items_of(load_places(order.places))]
    if order.sql_url is not None:
        truth = await SqlStore.connect(order.sql_url)
        try:
            await truth.delete_many(ids)
        finally:
            await truth.close()
    if not order.own_redis and order.redis_url is not None:
        cache = await RedisStore.connect(order.redis_url, order.redis_prefix)
        try:
            await cache.delete_many(ids)
            # What the store notes of itself, under a prefix that is ours alone, is of no use to anybody either.
            begin = order.redis_prefix.encode()
            async for key in cache.client.scan_iter(match="*__local__:*", count=1_000):
                if key.startswith(begin):
                    await cache.client.unlink(key)
        finally:
            await cache.close()
