"""sync-engine: one object that keeps a service's items in memory, Redis and SQL, and keeps the three true.

This module re-exports the public names and holds nothing else.
"""

from sync_engine.config import SyncEngineConfig
from sync_engine.engine import EngineStats, StopReport, SyncEngine
from sync_engine.errors import (
    Backpressure,
    ConfigError,
    Corruption,
    InvalidId,
    InvalidItem,
    InvalidState,
    NotJson,
    NotRunning,
    PayloadTooLarge,
    StoreError,
    SyncEngineError,
    TierNotConfigured,
    TierUnavailable,
    VersionConflict,
)
from sync_engine.item import ContentType, SyncItem
from sync_engine.options import Ack, CacheTtl, ItemStatus, Receipt, SubmitOptions

__all__ = [
    "Ack",
    "Backpressure",
    "CacheTtl",
    "ConfigError",
    "ContentType",
    "Corruption",
    "EngineStats",
    "InvalidId",
    "InvalidItem",
    "InvalidState",
    "ItemStatus",
    "NotJson",
    "NotRunning",
    "PayloadTooLarge",
    "Receipt",
    "StopReport",
    "StoreError",
    "SubmitOptions",
    "SyncEngine",
    "SyncEngineConfig",
    "SyncEngineError",
    "SyncItem",
    "TierNotConfigured",
    "TierUnavailable",
    "VersionConflict",
]
