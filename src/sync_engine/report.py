"""What an engine tells of itself: figures of a moment, the health of its tiers, what a stop left behind."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from sync_engine.item import OpKind
from sync_engine.pressure import Level
from sync_engine.resilience import Phase
from sync_engine.storage.memory import L1Stats

__all__ = ["EngineStats", "Health", "LaneStats", "QuarantinedOp", "StopReport", "TierHealth"]


@dataclass(frozen=True, slots=True)
class StopReport:
    """What ``stop`` left behind: nothing, if both are 0.

    ``left_in_log`` operations are applied at the next start. ``lost`` ones skip SQL, are in no log, and
    Redis did not take them in time.
    """

    left_in_log: int
    lost: int


@dataclass(frozen=True, slots=True)
class QuarantinedOp:
    """One refused operation, without its content.

    ``tier`` refused it for ``reason``. ``stamp`` is the moment it was accepted, ``size`` what it counts in every byte
    bound, ``since_ms`` when it was refused first (epoch ms).
    """

    object_id: str
    kind: OpKind
    tier: str
    reason: str
    stamp: int
    size: int
    since_ms: int


@dataclass(frozen=True, slots=True)
class LaneStats:
    """One tier's queue: operations waiting, why it is stuck if it is, and how often anything was tried again."""

    waiting: int
    trouble: str | None
    retries: int = 0


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Figures of one moment."""

    l1: L1Stats
    pending: int
    pending_bytes: int
    quarantined: int
    recovered: int
    log_records: int
    log_bytes: int
    log_damage: tuple[str, ...]
    pressure: float = 0.0
    """How near its bounds is what is accepted and not settled; 1 at a bound."""
    level: Level = "normal"
    """What that means for writes: normal, warn, hurry, slow, refuse."""
    evicted: int = 0
    """Items that left Redis to make room there."""
    lanes: dict[str, LaneStats] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class TierHealth:
    """One tier, as it answered just now.

    ``trouble`` says why it does not answer, is not read, or does not take its operations; None: all is well.
    ``waiting`` operations are queued for it. ``about`` describes the server, as far as it is known. ``full`` is the
    share of its memory limit that the fullest server uses, None where there is no limit or it may not be asked.
    """

    answers: bool
    trouble: str | None
    circuit: Phase
    waiting: int
    about: str = ""
    full: float | None = None


@dataclass(frozen=True, slots=True)
class Health:
    """``ok``: every tier answers, is read and takes its operations. ``warnings`` name what else deserves a look.

    ``level`` is that of ``EngineStats``: how near its bounds is what is accepted and not settled.
    """

    ok: bool
    tiers: Mapping[str, TierHealth]
    warnings: tuple[str, ...] = ()
    level: Level = "normal"
