"""The dict tier keeps the contract that flows are tested against; so does each wrapper that passes calls on."""

from __future__ import annotations

import pytest

from sync_engine.clock import SystemClock
from sync_engine.resilience import Breaker, Guarded
from sync_engine.testing.contract import CacheContract, TruthContract
from sync_engine.testing.tiers import Breaking, Counting, MemoryTier, Refusing, Slow


class TestMemoryTruth(TruthContract):
    @pytest.fixture
    def tier(self) -> MemoryTier:
        return MemoryTier("l3")


class TestMemoryCache(CacheContract):
    @pytest.fixture
    def tier(self) -> MemoryTier:
        return MemoryTier("l2")


class TestGuardedMemoryTruth(TruthContract):
    @pytest.fixture
    def tier(self) -> Guarded:
        clock = SystemClock()
        return Guarded(MemoryTier("l3"), Breaker("l3", clock), clock, deadline_s=60)


class TestGuardedMemoryCache(CacheContract):
    @pytest.fixture
    def tier(self) -> Guarded:
        clock = SystemClock()
        return Guarded(MemoryTier("l2"), Breaker("l2", clock), clock, deadline_s=60)


class TestWrappersThatDoNothing(TruthContract):
    @pytest.fixture
    def tier(self) -> Counting:
        return Counting(Breaking(Slow(Refusing(MemoryTier("l3"), ()), 0, SystemClock()), at=10_000))
