"""L2: items in Redis, one atomic script per chunk of writes, one round trip per read."""

from sync_engine.storage.redis.cdc import CdcEntry, ChangeStream
from sync_engine.storage.redis.search import IndexInfo, SearchHits
from sync_engine.storage.redis.search_fields import Field
from sync_engine.storage.redis.store import RedisStore

__all__ = ["CdcEntry", "ChangeStream", "Field", "IndexInfo", "RedisStore", "SearchHits"]
