"""L2: items in Redis, one atomic script per chunk of writes, one round trip per read."""

from sync_engine.storage.redis.store import RedisStore

__all__ = ["RedisStore"]
