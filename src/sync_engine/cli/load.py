"""The demo's engine process: takes an order on stdin, loads the items, and tells every acknowledgement on stdout.

It is started by ``demo`` and killed by it. A line of stdout is either ``+id<TAB>sha256<TAB>state``, written after
the submit of that item returned, or a JSON object: an event.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import msgspec

from sync_engine.cli.command import Exit, exit_code, quiet_log
from sync_engine.cli.places import items_of, load_places
from sync_engine.cli.render import fail, hide
from sync_engine.config import SyncEngineConfig
from sync_engine.engine import SyncEngine
from sync_engine.item import SyncItem
from sync_engine.options import Ack

__all__ = ["Acknowledged", "Event", "Order", "parse"]

CHUNK = 250
SUBMITTERS = 4
"""Chunks of 250 by four tasks: 33,000 items were acknowledged at 7,400 to 9,700/s, by 200 tasks of single submits
at 6,100/s (a busy 2-core machine, Python 3.11). Small chunks let the kill fall between acknowledgements."""


FLUSH_TIMEOUT_S = 120.0


class Order(msgspec.Struct, frozen=True):
    """What one engine process is to do. Travels through stdin: arguments and environment are for all to see."""

    places: int
    data_dir: str
    redis_url: str | None
    redis_prefix: str
    own_redis: bool
    sql_url: str | None
    done: list[str] = []
    debug: bool = False

    def config(self) -> SyncEngineConfig:
        """Settings of the engine that the order describes: nothing that the environment says."""
        defaults = {field: info.default for field, info in SyncEngineConfig.model_fields.items()}
        told = {
            "data_dir": Path(self.data_dir),
            "redis_url": self.redis_url,
            "redis_prefix": self.redis_prefix,
            "sql_url": self.sql_url if self.sql_url is not None else f"sqlite:///{self.own_truth}",
            "l1_max_bytes": 1 << 30,  # the comparison wants every item in memory
        }
        return SyncEngineConfig(**defaults | told)

    @property
    def own_truth(self) -> Path:
        """The SQLite file that is used where no other database was named."""
        return Path(self.data_dir).absolute() / "truth.db"


class Acknowledged(msgspec.Struct, frozen=True):
    """One acknowledgement: from here on the item must come back with these bytes."""

    object_id: str
    content_hash: str
    state: str


class Event(msgspec.Struct, frozen=True):
    """``started`` carries the operations taken up from the log, ``loaded`` and ``flushed`` nothing more."""

    name: str
    recovered: int = 0


def parse(line: bytes) -> Acknowledged | Event:
    """A whole line of the engine process."""
    if line.startswith(b"+"):
        object_id, content_hash, state = line[1:].decode().split("\t")
        return Acknowledged(object_id, content_hash, state)
    return msgspec.json.decode(line, type=Event)


def main() -> None:
    """Carry out the order on stdin; exits like a command."""
    quiet_log(debug=False)
    debug = False
    try:
        order = msgspec.json.decode(sys.stdin.buffer.read(), type=Order)
        debug = order.debug
        hide(order.redis_url)
        hide(order.sql_url)
        asyncio.run(load(order))
    except BrokenPipeError:
        sys.exit(Exit.INTERRUPTED)  # nobody is left to acknowledge to
    except Exception as error:  # noqa: BLE001  # the edge of a process: told and turned into its exit code
        fail(error, debug=debug, ours=exit_code(error) is Exit.BUG)
        sys.exit(exit_code(error))


async def load(order: Order) -> None:
    """Submit whatever is not done, flush, stop; tell each step."""
    done = frozenset(order.done)
    places = load_places(order.places)
    async with SyncEngine(order.config()) as engine:
        _event(Event("started", recovered=engine.stats().recovered))
        # A small load in smaller chunks, so that its middle can be hit.
        size = min(CHUNK, 1 + order.places // 50)
        chunks = _chunks((item for item in items_of(places) if item.object_id not in done), size)

        async def submit() -> None:
            for chunk in chunks:  # shared: each submitter takes the next one
                await engine.submit_many(chunk, ack=Ack.LOGGED)
                _acknowledge(chunk)

        async with asyncio.TaskGroup() as submitters:
            for _ in range(SUBMITTERS):
                submitters.create_task(submit())
        _event(Event("loaded"))
        await engine.flush(timeout=FLUSH_TIMEOUT_S)
        _event(Event("flushed"))


def _chunks(items: Iterable[SyncItem], size: int) -> Iterator[list[SyncItem]]:
    remaining = iter(items)
    while chunk := list(islice(remaining, size)):
        yield chunk


def _acknowledge(items: Sequence[SyncItem]) -> None:
    _write("".join(f"+{item.object_id}\t{item.content_hash}\t{item.state}\n" for item in items).encode())


def _event(event: Event) -> None:
    _write(msgspec.json.encode(event) + b"\n")


def _write(content: bytes) -> None:
    """Unbuffered: what was written survives our kill."""
    while content:
        content = content[os.write(1, content) :]


if __name__ == "__main__":
    main()
