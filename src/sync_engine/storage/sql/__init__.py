"""L3: items in a SQL database, the truth when tiers differ. SQLite today; the table is the same everywhere."""

from sync_engine.storage.sql.store import SqlStore
from sync_engine.storage.sql.verify import Verification

__all__ = ["SqlStore", "Verification"]
