"""Settings that change under load (fault matrix 23), for engines on whatever tiers."""

from __future__ import annotations

import random
from typing import Final

import pytest

from sync_engine import Ack, ConfigError, SyncEngine

__all__ = ["BATCH_MAX", "change_settings"]

BATCH_MAX: Final = 50
"""The largest ``batch_flush_count`` among them."""


async def change_settings(engine: SyncEngine, rng: random.Random, turn: int) -> None:
    """Change every bound at once, some to next to nothing; every tenth turn also try what is refused as a whole."""
    count = rng.choice((1, 5, BATCH_MAX))
    await engine.reconfigure(
        batch_flush_count=count,
        batch_flush_bytes=rng.choice((1, 1_000, 10**6)),
        batch_flush_ms=rng.choice((0, 1, 20)),
        wal_max_items=rng.choice((5, 50, 10**6)),
        pending_max_bytes=rng.choice((0, 2_000, 10**7)),
        l1_max_bytes=rng.choice((0, 2_000, 10**7)),
        backpressure_warn=rng.choice((0.1, 0.7)),
        default_ack=rng.choice(list(Ack)),
    )
    if turn % 10 == 0:
        with pytest.raises(ConfigError):
            await engine.reconfigure(batch_flush_count=77, batch_flush_ms=-1)
    assert engine.config.batch_flush_count == count
