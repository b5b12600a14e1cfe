"""Question 7: what storing one more item costs when 200,000 are stored, beside when 10,000 are.

Each level is an engine in a process of its own, with a prefix of its own on the same Redis, so that neither
shares the other's heap. What a round adds it removes again, untimed: the level stays.
"""

from __future__ import annotations

import asyncio
import random
import sys
import time
from pathlib import Path

from bench.data import batches, fresh, places
from bench.harness import Answer, Contender, Stage, Target, Unit, check, compared
from sync_engine import SyncEngine, SyncEngineConfig

__all__ = ["ask"]

STORED = (10_000, 200_000)
ADDED = 5_000
BATCH = 1_000
MOST = 205_000


async def ask(stage: Stage) -> list[Answer]:
    """`submit_many` by the thousand and `flush`, Redis + SQLite."""
    answers: list[Answer] = []
    for spread in (False, True):
        await stage.empty_redis()
        few, many = (Level(stage, stage.sized(stored, 200), stage.sized(ADDED, 100), spread) for stored in STORED)
        try:
            await asyncio.gather(few.start(), many.start())
            times = await stage.race(many, few)
        finally:
            await asyncio.gather(few.stop(), many.stop())
        order = "ids spread over all that is stored" if spread else "ids in the order of the data set"
        asked = f"cost per stored item at {many.stored:,} against at {few.stored:,} stored, {order}"
        target = Target(1.25, at_most=True)
        answers.append(compared(asked, times, many.name, [few.name], target, unit=Unit.TIME))
    return answers


class Level(Contender):
    """Drives the process below. It times itself: a round trip between processes is not the question."""

    def __init__(self, stage: Stage, stored: int, added: int, spread: bool) -> None:
        super().__init__(added)
        self.stored = stored
        self.name = f"at {stored:,} stored{', spread' if spread else ''}"
        self._spread = spread
        self._stage = stage
        self._process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        """Start the process and wait until it has stored its level."""
        self._folder = self._stage.new_folder()
        told = [str(self._folder), str(self.stored), str(self.units), "spread" if self._spread else "in order"]
        pipe = asyncio.subprocess.PIPE
        # The URL holds the server's password, so it goes in by the pipe and not by the command line.
        self._process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "bench.growth", *told, stdin=pipe, stdout=pipe
        )
        await self._asked(self._stage.url)

    async def run(self) -> float:
        return float(await self._asked("add"))

    async def verify(self) -> None:
        await self._asked("remove")

    async def stop(self) -> None:
        """End the process, however far it got."""
        if self._process is not None:
            assert self._process.stdin is not None
            self._process.stdin.close()
            await self._process.wait()
            self._stage.drop_folder(self._folder)

    async def _asked(self, what: str) -> str:
        assert self._process is not None
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(what.encode() + b"\n")
        await self._process.stdin.drain()
        answer = (await self._process.stdout.readline()).decode().strip()
        check(bool(answer), f"{self.name}: its process ended")
        return answer


async def _serve(folder: Path, stored: int, added: int, spread: bool) -> None:
    url = sys.stdin.readline().strip()
    # From the same set for both levels: the first of it are the same places in both.
    data = places(MOST if stored in STORED else stored + added)
    if spread:
        random.Random(7).shuffle(data)
    config = SyncEngineConfig(data_dir=folder, redis_url=url, redis_prefix=f"{stored}:")
    async with SyncEngine(config) as engine:
        for first in batches(data[:stored], BATCH):
            await engine.submit_many(fresh(first))
        await engine.flush()
        print("ready", flush=True)
        round_ = 0
        for line in sys.stdin:  # blocks the loop between rounds: nothing is to happen there
            if line.strip() == "add":
                # Other ids in every round: a removed one leaves a tombstone, whose removal would be work.
                round_ += 1
                new = [(f"{object_id}.{round_}", content) for object_id, content in data[stored : stored + added]]
                items = fresh(new)
                start = time.perf_counter()
                for batch in batches(items, BATCH):
                    await engine.submit_many(batch)
                await engine.flush()
                print(time.perf_counter() - start, flush=True)
            else:
                check(await engine.count_prefix("") == stored + added, f"{await engine.count_prefix('')} are stored")
                await engine.delete_many(object_id for object_id, _ in new)
                await engine.flush()
                check(await engine.count_prefix("") == stored, f"{await engine.count_prefix('')} are stored")
                print("removed", flush=True)


if __name__ == "__main__":
    asyncio.run(_serve(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4] == "spread"))
