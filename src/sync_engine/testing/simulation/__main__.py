"""Replays seeds, or tries many: ``python -m sync_engine.testing.simulation [SEED ...] [--seeds N] [--from SEED]``."""

from __future__ import annotations

import argparse
import logging
import sys
import time

from sync_engine.testing.simulation.world import Failed, simulate


def main() -> int:
    """Prints what failed, with its story where single seeds were asked for; 1 if anything did."""
    parser = argparse.ArgumentParser(prog="python -m sync_engine.testing.simulation", description=__doc__)
    parser.add_argument("seed", type=int, nargs="*", help="replay these seeds and tell what happens")
    parser.add_argument("--seeds", type=int, default=0, help="run so many seeds")
    parser.add_argument("--from", type=int, default=0, dest="first", help="the first of them (default: 0)")
    asked = parser.parse_args()
    logging.disable(logging.CRITICAL)  # engines complain of every fault
    seeds = asked.seed or range(asked.first, asked.first + (asked.seeds or 2_000))
    began = time.monotonic()
    failed: list[int] = []
    steps = 0
    for seed in seeds:
        try:
            run = simulate(seed)
        except Failed as found:
            failed.append(seed)
            print(*(found.story if asked.seed else ()), found, "", sep="\n")
        else:
            steps += run.steps
            if asked.seed:
                print(run)
    print(f"{len(seeds)} seeds, {steps} steps in {time.monotonic() - began:.1f} s; failed: {failed or 'none'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
