"""Times contenders against one another in the same process, on the same servers, in random order.

A ratio is taken inside a round, where the machine was the same for all; the median of the rounds is the answer.
Absolute figures drift with the machine and are shown only to give the ratios a scale.
"""

from __future__ import annotations

import asyncio
import gc
import random
import shutil
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from redis.asyncio import Redis

__all__ = ["Answer", "Contender", "Limit", "Stage", "Target", "Times", "Unit", "WrongResult", "check", "compared"]


class WrongResult(Exception):
    """A contender did not do its work: its time says nothing."""


def check(fact: bool, what: str) -> None:
    """Raise ``WrongResult`` unless the fact holds; unlike an assert it stays under ``-O``."""
    if not fact:
        raise WrongResult(what)


class Contender:
    """One way to do the work. ``units`` is what one ``run`` does; only ``run`` is timed."""

    name = "?"

    def __init__(self, units: int) -> None:
        self.units = units

    async def prepare(self) -> None:
        """Bring about the state in which ``run`` starts."""

    async def run(self) -> float | None:
        """Do the work. A contender that has a better view of it answers the seconds it took."""
        raise NotImplementedError

    async def verify(self) -> None:
        """Raise ``WrongResult`` if the work was not done. Takes down what ``prepare`` made."""


@dataclass(slots=True)
class Times:
    """Seconds per unit, one entry per round; ``busy`` is the processor time that this process and Redis took."""

    wall: list[float] = field(default_factory=list)
    busy: list[float] = field(default_factory=list)


class Unit(Enum):
    """What the two costs of an answer are, and so how they are shown."""

    RATE = "units per second"
    TIME = "seconds per unit"
    BYTES = "bytes per unit"


@dataclass(frozen=True, slots=True)
class Target:
    """What the ratio has to be: speed at least so many times the baseline's, or time at most so many times."""

    bound: float
    at_most: bool = False

    def met(self, answer: Answer) -> bool:
        """Whether the ratio is within the target."""
        return answer.ratio <= self.bound if self.at_most else answer.ratio >= self.bound

    def __str__(self) -> str:
        return f"{'≤' if self.at_most else '≥'} {self.bound:g} ×"


@dataclass(frozen=True, slots=True)
class Limit:
    """What our own time has to be, whatever it is beside."""

    seconds: float

    def met(self, answer: Answer) -> bool:
        """Whether our time is within the limit."""
        return answer.ours_cost <= self.seconds

    def __str__(self) -> str:
        return f"≤ {self.seconds * 1e3:g} ms"


@dataclass(frozen=True, slots=True)
class Answer:
    """One row of the table. Costs are medians, in seconds or bytes per unit; ratios are those of the rounds.

    ``busy_ratio`` is the same of processor time, which others on the machine disturb less; None where the work is
    done elsewhere. Without a target the row is there to be read beside another one.
    """

    question: str
    ours: str
    baseline: str
    ours_cost: float
    baseline_cost: float
    ratios: Sequence[float]
    busy_ratio: float | None
    target: Target | Limit | None
    unit: Unit

    @property
    def ratio(self) -> float:
        """Median of the rounds."""
        return statistics.median(self.ratios)

    @property
    def met(self) -> bool | None:
        """Whether the target was met; None without one."""
        return None if self.target is None else self.target.met(self)


def compared(
    question: str,
    times: Mapping[str, Times],
    ours: str,
    baselines: Sequence[str],
    target: Target | None,
    *,
    unit: Unit = Unit.RATE,
) -> Answer:
    """Ours against the fastest of the baselines, by its median."""
    fastest = min(baselines, key=lambda name: statistics.median(times[name].wall))
    mine, theirs = times[ours], times[fastest]
    lower = target is not None and target.at_most
    busy = _ratios(mine.busy, theirs.busy, lower) if all(mine.busy) and all(theirs.busy) else []
    return Answer(
        question,
        ours,
        fastest,
        statistics.median(mine.wall),
        statistics.median(theirs.wall),
        _ratios(mine.wall, theirs.wall, lower),
        statistics.median(busy) if busy else None,
        target,
        unit,
    )


def _ratios(mine: Sequence[float], theirs: Sequence[float], lower: bool) -> list[float]:
    return [own / base if lower else base / own for own, base in zip(mine, theirs, strict=True)]


class Stage:
    """What a question finds: a Redis of this run, a folder, sizes, and the race itself.

    ``shared`` holds what several questions use and one of them made; ``at_end`` is unwound after the last question.
    """

    def __init__(
        self,
        url: str,
        server_pid: int,
        folder: Path,
        at_end: AsyncExitStack,
        *,
        rounds: int,
        scale: float,
        rng: random.Random,
    ) -> None:
        self.url = url
        self.rounds = rounds
        self.at_end = at_end
        self.shared: dict[str, Any] = {}
        self._servers = [_schedstat(server_pid)]
        self._folder = folder
        self._scale = scale
        self._rng = rng
        self._folders = 0
        self.raced: dict[str, Times] = {}

    def sized(self, full: int, least: int = 1) -> int:
        """A number of items, smaller in a quick run."""
        return max(least, round(full * self._scale))

    def new_folder(self) -> Path:
        """An empty folder. Whoever is done with it gives it to ``drop_folder``."""
        self._folders += 1
        path = self._folder / str(self._folders)
        path.mkdir()
        return path

    def drop_folder(self, path: Path) -> None:
        """Remove a folder, so that dirty pages of one contender are not written back during the next."""
        shutil.rmtree(path, ignore_errors=True)

    async def empty_redis(self) -> None:
        """Every run that starts on an empty Redis starts on the same one."""
        async with Redis.from_url(self.url) as client:
            await client.flushall()

    @contextmanager
    def watching(self, *server_pids: int) -> Iterator[None]:
        """Count the processor time of further servers as well."""
        held = list(self._servers)
        self._servers += map(_schedstat, server_pids)
        try:
            yield
        finally:
            self._servers = held

    async def race(self, *contenders: Contender, rounds: int | None = None) -> dict[str, Times]:
        """Every contender once per round in random order, after one round that does not count (none in a quick run).

        ``rounds``, for contenders that take their time: at most so many, and all of them count.
        """
        times = {contender.name: Times() for contender in contenders}
        check(len(times) == len(contenders) and not times.keys() & self.raced.keys(), "two contenders have one name")
        first = 0 if self._scale < 1 or rounds is not None else -1
        for round_ in range(first, self.rounds if rounds is None else min(rounds, self.rounds)):
            for contender in self._rng.sample(contenders, len(contenders)):
                wall, busy = await self._timed(contender)
                if round_ >= 0:
                    times[contender.name].wall.append(wall / contender.units)
                    times[contender.name].busy.append(busy / contender.units)
        self.raced |= times
        return times

    async def _timed(self, contender: Contender) -> tuple[float, float]:
        await contender.prepare()
        await asyncio.sleep(0)
        # Alike for everybody: what stands before the start is not scanned again while the clock runs.
        gc.collect()
        gc.freeze()
        try:
            busy, start = self._busy(), time.perf_counter()
            told = await contender.run()
            wall, busy = time.perf_counter() - start, self._busy() - busy
        finally:
            gc.unfreeze()
        await contender.verify()
        return (wall, busy) if told is None else (told, 0.0)

    def _busy(self) -> float:
        """Processor seconds of this process, and of the one thread in which each Redis runs commands."""
        served = sum(int(server.read_text().split()[0]) / 1e9 for server in self._servers if server.exists())
        return time.process_time() + served


def _schedstat(pid: int) -> Path:
    return Path(f"/proc/{pid}/schedstat")
