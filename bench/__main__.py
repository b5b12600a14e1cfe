"""``python -m bench [--quick] [NAME ...]``: asks the questions and prints the table; ``make bench`` runs them all."""

from __future__ import annotations

import argparse
import asyncio
import datetime
import random
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from pathlib import Path

from bench import (
    acks,
    dirty_pages,
    drain,
    end_to_end,
    flush_writers,
    growth,
    l1_reads,
    log_latency,
    log_writes,
    redis_binary,
    redis_cluster,
    redis_counts,
    redis_reads,
    redis_scans,
    redis_states,
    redis_writes,
    sql_drivers,
    sql_writes,
)
from bench.harness import Answer, Stage
from bench.report import facts, table, written
from sync_engine.embedded import EmbeddedRedis

QUESTIONS: Mapping[str, Callable[[Stage], Awaitable[list[Answer]]]] = {
    "redis_writes": redis_writes.ask,
    "redis_reads": redis_reads.ask,
    "redis_scans": redis_scans.ask,
    "redis_counts": redis_counts.ask,
    "redis_states": redis_states.ask,
    "redis_binary": redis_binary.ask,
    "redis_cluster": redis_cluster.ask,
    "l1_reads": l1_reads.ask,
    "log_writes": log_writes.ask,
    "log_latency": log_latency.ask,
    "sql_writes": sql_writes.ask_all,
    "sql_drivers": sql_drivers.ask,
    "end_to_end": end_to_end.ask,
    "end_to_end_mariadb": end_to_end.ask_mariadb,
    "end_to_end_postgresql": end_to_end.ask_postgresql,
    "flush_writers": flush_writers.ask,
    "acks": acks.ask,
    "drain": drain.ask,
    "drain_servers": drain.ask_servers,
    "growth": growth.ask,
    "dirty_pages": dirty_pages.ask,
}
RESULTS = Path(__file__).parent / "results"
ROUNDS = 5
QUICK_SCALE = 0.005


def main(args: Sequence[str] | None = None) -> int:
    """Ask, print, and after a complete run write the results. Missing a target is a finding, not a failure."""
    parser = argparse.ArgumentParser("python -m bench", description="Our figures against their baselines.")
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"which questions: {', '.join(QUESTIONS)}; default all"
    )
    parser.add_argument(
        "--quick", action="store_true", help="tiny sizes, to see that it works; the figures say nothing"
    )
    parser.add_argument("--rounds", type=int, help=f"how often each contender runs; default {ROUNDS}, with --quick 1")
    parser.add_argument("--seed", type=int, default=0, help="of the order in which contenders run")
    told = parser.parse_args(args)
    unknown = set(told.names) - set(QUESTIONS)
    if unknown:
        parser.error(f"no such question: {', '.join(sorted(unknown))}")
    rounds = told.rounds or (1 if told.quick else ROUNDS)
    asyncio.run(_asked(list(dict.fromkeys(told.names)) or list(QUESTIONS), told.quick, rounds, told.seed))
    return 0


async def _asked(names: Sequence[str], quick: bool, rounds: int, seed: int) -> None:
    known = facts(rounds)
    when = datetime.datetime.now(datetime.UTC)
    answers: list[Answer] = []
    # Beside the code rather than in /tmp, which may be memory: what is asked of a disk must be a disk's work.
    with tempfile.TemporaryDirectory(prefix=".bench-", dir=RESULTS.parent) as folder:
        async with EmbeddedRedis() as redis, AsyncExitStack() as at_end:
            stage = Stage(
                redis.url,
                redis.pid,
                Path(folder),
                at_end,
                rounds=rounds,
                scale=QUICK_SCALE if quick else 1,
                rng=random.Random(seed),
            )
            for name in names:
                print(f"{name} …", file=sys.stderr, flush=True)
                start = time.perf_counter()
                answers += await QUESTIONS[name](stage)
                print(f"  took {time.perf_counter() - start:.1f} s", file=sys.stderr, flush=True)
    print(table(answers))
    if not quick and len(names) == len(QUESTIONS):
        print(f"\nwritten: {written(RESULTS, answers, stage.raced, known, when)}")


if __name__ == "__main__":
    sys.exit(main())
