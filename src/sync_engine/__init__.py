"""sync-engine: one object that keeps a service's items in memory, Redis and SQL, and keeps the three true.

This module re-exports the public names and holds nothing else.
"""

from sync_engine.config import SyncEngineConfig
from sync_engine.engine import SyncEngine
from sync_engine.errors import (
    Backpressure,
    ConfigError,
    Corruption,
    DiskFull,
    IndexConflict,
    IndexNotFound,
    InvalidId,
    InvalidItem,
    InvalidQuery,
    InvalidState,
    NotJson,
    NotRunning,
    PayloadTooLarge,
    SearchError,
    SearchUnavailable,
    StoreError,
    SyncEngineError,
    TierNotConfigured,
    TierUnavailable,
    VersionConflict,
)
from sync_engine.item import ContentType, SyncItem
from sync_engine.options import Ack, CacheTtl, ItemStatus, Receipt, SubmitOptions
from sync_engine.report import EngineStats, Health, LaneStats, QuarantinedOp, StopReport, TierHealth

__all__ = [
    "Ack",
    "Backpressure",
    "CacheTtl",
    "ConfigError",
    "ContentType",
    "Corruption",
    "DiskFull",
    "EngineStats",
    "Health",
    "IndexConflict",
    "IndexNotFound",
    "InvalidId",
    "InvalidItem",
    "InvalidQuery",
    "InvalidState",
    "ItemStatus",
    "LaneStats",
    "NotJson",
    "NotRunning",
    "PayloadTooLarge",
    "QuarantinedOp",
    "Receipt",
    "SearchError",
    "SearchUnavailable",
    "StopReport",
    "StoreError",
    "SubmitOptions",
    "SyncEngine",
    "SyncEngineConfig",
    "SyncEngineError",
    "SyncItem",
    "TierHealth",
    "TierNotConfigured",
    "TierUnavailable",
    "VersionConflict",
]
