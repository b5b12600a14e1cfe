"""How the demo is told: a progress bar or a line a second, then tables and a verdict, or all of it as one document."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from sync_engine.cli.load import Event
from sync_engine.cli.render import Output, fact_sheet, table
from sync_engine.cli.verify import Examination, TierFacts

__all__ = ["Loaded", "Story"]

LINE_EVERY_S = 1.0


@dataclass(slots=True)
class Loaded:
    """One engine process as its witness saw it; times in seconds since it was started."""

    acknowledged_before: int
    acknowledged: int = 0
    killed: bool = False
    killed_after_s: float | None = None
    recovered: int = 0
    started_s: float = 0.0
    loaded_s: float = 0.0
    flushed_s: float = 0.0

    def note(self, event: Event, now_s: float) -> None:
        """Take down what the process said of itself."""
        match event.name:
            case "started":
                self.started_s, self.recovered = now_s, event.recovered
            case "loaded":
                self.loaded_s = now_s
            case "flushed":
                self.flushed_s = now_s

    @property
    def items_per_s(self) -> float:
        """Acknowledgements per second while it was loading."""
        took_s = (self.killed_after_s or self.loaded_s) - self.started_s
        return self.acknowledged / took_s if took_s > 0 else 0.0


class Counter(Protocol):
    """Something that shows how far the load is."""

    def update(self, done: int) -> None:
        """So many items are acknowledged."""
        ...


class Story:
    """Tells each step as it happens, unless one document was asked for."""

    def __init__(self, out: Output) -> None:
        self._out = out

    def opening(self, places: int, total: int) -> None:
        """What is about to happen."""
        self._say(f"{places:,} places of the world: {total:,} items into memory, Redis and SQL")

    @contextmanager
    def progress(self, total: int, done: int) -> Iterator[Counter]:
        """A bar on a terminal; elsewhere a line about every second."""
        console = self._out.console
        if self._out.as_json:
            yield _Nothing()
        elif not console.is_terminal or console.is_dumb_terminal:
            yield _Lines(console, total, done)
        else:
            with _Bar(console, total, done).shown as bar:
                yield bar

    def killed(self, first: Loaded) -> None:
        """The engine process is gone."""
        if first.killed:
            self._say(f"kill -9 of the engine process, after {first.acknowledged:,} acknowledgements")
        else:
            self._say(
                f"the engine process was done before the kill reached it: {first.acknowledged:,} acknowledgements"
            )

    def loaded(self, second: Loaded) -> None:
        """Its successor has done the rest."""
        self._say(
            f"started again: {second.recovered:,} operations recovered from the log",
            f"{second.acknowledged:,} more items acknowledged, everything flushed",
            "comparing every byte in every tier ...",
        )

    def ending(self, places: int, first: Loaded, second: Loaded, found: Examination, seconds: float) -> None:
        """Tables and verdict, or the document."""
        scan = f"{found.scan.count:,} items in {found.scan.milliseconds:.1f} ms, the first of them:"
        verdict = (
            f"{'OK' if found.passed else 'FAILED'}: {found.acknowledged:,} of {found.expected:,} items acknowledged, "
            f"{found.differ:,} differ, {found.missing:,} missing"
        )
        self._out.show(
            _document(places, first, second, found, seconds),
            "",
            _tiers(found),
            "",
            f"scan_prefix({found.scan.prefix!r}): {scan}",
            _scanned(found),
            "",
            _states(found),
            "",
            f"counts {'agree' if found.counts_agree else 'DISAGREE'}; {seconds:.1f} s in all",
            verdict,
        )

    def _say(self, *lines: str) -> None:
        if not self._out.as_json:
            for line in lines:
                self._out.console.print(line)


class _Nothing:
    def update(self, done: int) -> None:
        """Say nothing."""


class _Lines:
    def __init__(self, console: Console, total: int, done: int) -> None:
        self._console = console
        self._total = total
        self._pace = _Pace(done)
        self._next_s = time.monotonic() + LINE_EVERY_S

    def update(self, done: int) -> None:
        """Print a line if the last one is a second old."""
        pace = self._pace.at(done)
        if pace and time.monotonic() >= self._next_s:
            self._next_s = time.monotonic() + LINE_EVERY_S
            self._console.print(f"  {done:,} of {self._total:,} acknowledged, {pace:,.0f} items/s")


class _Bar:
    def __init__(self, console: Console, total: int, done: int) -> None:
        self._progress = Progress(
            TextColumn("acknowledged"),
            BarColumn(bar_width=40),
            MofNCompleteColumn(),
            TextColumn("{task.fields[pace]:,.0f} items/s"),
            TimeElapsedColumn(),
            console=console,
        )
        self._pace = _Pace(done)
        self._task = self._progress.add_task("load", total=total, completed=done, pace=0.0)

    @property
    @contextmanager
    def shown(self) -> Iterator[_Bar]:
        """The bar on the screen."""
        with self._progress:
            yield self

    def update(self, done: int) -> None:
        """Move the bar."""
        self._progress.update(self._task, completed=done, pace=self._pace.at(done))


class _Pace:
    """Items per second since the first of them."""

    def __init__(self, done: int) -> None:
        self._done = done
        self._begun: float | None = None

    def at(self, done: int) -> float:
        if self._begun is None or done == self._done:
            self._begun, self._done = time.monotonic(), done
            return 0.0
        return (done - self._done) / max(time.monotonic() - self._begun, 1e-9)


def _tiers(found: Examination) -> Table:
    columns = ("tier", ">items", ">content", ">takes up", ">p50", ">p99", ">differ", ">missing")
    return table(columns, (_tier_row(facts) for facts in found.tiers), "What each tier returns (p50, p99: one get)")


def _tier_row(facts: TierFacts) -> tuple[str, ...]:
    return (
        facts.tier,
        f"{facts.compared.items:,}",
        _bytes(facts.compared.content_bytes),
        _bytes(facts.occupied_bytes),
        _duration(facts.latency.p50_us),
        _duration(facts.latency.p99_us),
        f"{facts.compared.differ:,}",
        f"{facts.compared.missing:,}",
    )


def _scanned(found: Examination) -> Table:
    rows = []
    for item in found.scan.first:
        place = item.json()
        rows.append((item.object_id, place["name"], " ".join(place["names"].values()), f"{place['population']:,}"))
    return table(("id", "name", "names", ">population"), rows)


def _states(found: Examination) -> Table:
    rows = (
        (each.state, f"{each.expected:,}", "-" if each.redis is None else f"{each.redis:,}", f"{each.sql:,}")
        for each in found.states
    )
    return table(("state", ">acknowledged", ">Redis", ">SQL"), rows, "count_by_state")


def _document(places: int, first: Loaded, second: Loaded, found: Examination, seconds: float) -> dict[str, object]:
    return {
        "places": places,
        "seconds": seconds,
        "load": [
            {field: value for field, value in asdict(each).items() if field != "acknowledged_before"}
            | {"items_per_s": each.items_per_s}
            for each in (first, second)
        ],
        "recovered": second.recovered,
        "tiers": [
            {"tier": facts.tier, "occupied_bytes": facts.occupied_bytes}
            | asdict(facts.compared)
            | {"latency": asdict(facts.latency)}
            for facts in found.tiers
        ],
        "scan": {
            "prefix": found.scan.prefix,
            "count": found.scan.count,
            "expected": found.scan.expected,
            "milliseconds": found.scan.milliseconds,
            "first": [fact_sheet(item) | {"content": item.json()} for item in found.scan.first],
        },
        "states": [asdict(each) for each in found.states],
        "verdict": {
            "ok": found.passed,
            "expected": found.expected,
            "acknowledged": found.acknowledged,
            "differ": found.differ,
            "missing": found.missing,
            "counts_agree": found.counts_agree,
        },
    }


def _bytes(count: int | None) -> str:
    return "-" if count is None else f"{count / 1e6:,.1f} MB"


def _duration(microseconds: float) -> str:
    return f"{microseconds:,.1f} µs" if microseconds < 1_000 else f"{microseconds / 1e3:,.1f} ms"
