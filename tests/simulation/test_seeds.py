"""Thousands of runs, each of which decides by its seed who writes what, who crashes and which calls are lost.

``pytest tests/simulation --seeds 20000`` runs more of them. What fails says how to replay it.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from sync_engine.testing.simulation import simulate

BLOCK = 50


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Blocks of seeds, which the processes of pytest-xdist share."""
    if "first" in metafunc.fixturenames:
        blocks = range(0, metafunc.config.getoption("--seeds"), BLOCK)
        quick, *slow = blocks
        marked = [quick, *(pytest.param(first, marks=pytest.mark.slow) for first in slow)]
        metafunc.parametrize("first", marked, ids=[f"{first}-{first + BLOCK - 1}" for first in blocks])


@pytest.mark.timeout(0)  # their number is up to whoever runs them
def test_I1_I2_I3_I4_hold_whatever_happens(first: int) -> None:
    for seed in range(first, first + BLOCK):
        simulate(seed)


def test_a_seed_is_one_run() -> None:
    for seed in range(5):
        assert simulate(seed) == simulate(seed)
    assert len({simulate(seed).trace for seed in range(5)}) == 5


@pytest.mark.parametrize("hash_seed", ["1", "2"])
def test_a_seed_is_the_same_run_in_another_process(hash_seed: str) -> None:
    """Where sets of text are walked, and addresses are hashed, differs from process to process."""
    seeds = [1, 2, 7]
    command = [sys.executable, "-m", "sync_engine.testing.simulation", *map(str, seeds)]
    environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
    told = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    assert told.splitlines()[:-1] == [repr(simulate(seed)) for seed in seeds]
