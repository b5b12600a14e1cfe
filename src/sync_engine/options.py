"""What a caller may say about a write, and what comes back: options, acknowledgement, receipt, status."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import timedelta
from enum import Enum, IntEnum

import msgspec

from sync_engine.errors import InvalidItem
from sync_engine.item import check_state

__all__ = ["Ack", "CacheTtl", "ItemStatus", "Receipt", "SubmitOptions", "ttl_ms"]

TTL_SECONDS_MAX = 10 * 365 * 86_400
"""Ten years: beyond it a TTL is a mistake, and Redis would overflow long after."""


class Ack(Enum):
    """When ``submit`` returns: how much is already safe by then."""

    MEMORY = "memory"
    """In this process: readable here, lost if the process is killed before the log has it."""
    LOGGED = "logged"
    """In the local log and synced to disk: survives ``kill -9`` and power loss. The default."""
    STORED = "stored"
    """Committed in every tier that was asked for."""


class CacheTtl(IntEnum):
    """Named lifetimes, in seconds."""

    MINUTE = 60
    SHORT = 300
    MEDIUM = 900
    HOUR = 3_600
    DAY = 86_400
    WEEK = 604_800


Ttl = int | float | timedelta


def ttl_ms(ttl: Ttl, field: str = "ttl") -> int:
    """A lifetime in milliseconds, exactly as given. Raises ``InvalidItem`` outside 1 s to 10 years."""
    seconds = ttl.total_seconds() if isinstance(ttl, timedelta) else ttl
    if isinstance(seconds, bool) or not isinstance(seconds, int | float):
        raise InvalidItem(field, f"a {type(ttl).__name__}", "must be a number of seconds or a timedelta")
    if not 1 <= seconds <= TTL_SECONDS_MAX:  # also refuses NaN
        raise InvalidItem(field, f"{_shown(seconds)} s", f"must be from 1 to {TTL_SECONDS_MAX} seconds")
    return round(seconds * 1000)


def _shown(value: object) -> str:
    # An integer of thousands of digits cannot be written out: Python refuses, with an error that is none of ours.
    return f"an integer of {value.bit_length()} bits" if type(value) is int and abs(value) >= 2**128 else repr(value)


@dataclass(frozen=True, slots=True)
class SubmitOptions:
    """Where one write goes.

    ``redis`` and ``sql`` name the tiers that keep the item; a tier that is left out loses any older
    copy of it. ``redis_ttl`` bounds the Redis copy, and the whole item where ``sql`` is False.
    ``state`` overrides the item's own. ``if_version`` is a compare-and-set against the truth (0: the
    item must not exist) and needs ``Ack.STORED``.
    """

    redis: bool = True
    sql: bool = True
    redis_ttl: Ttl | None = None
    state: str | None = None
    if_version: int | None = None

    def __post_init__(self) -> None:
        for name in ("redis", "sql"):
            if not isinstance(getattr(self, name), bool):
                raise InvalidItem(name, f"a {type(getattr(self, name)).__name__}", "must be a bool")
        if not (self.redis or self.sql):
            raise InvalidItem("options", "redis=False, sql=False", "an item must be kept somewhere")
        if self.redis_ttl is not None:
            ttl_ms(self.redis_ttl, "redis_ttl")
            if not self.redis:
                raise InvalidItem("redis_ttl", f"{self.redis_ttl!r} with redis=False", "needs redis=True")
        if self.state is not None:
            check_state(self.state)
        if self.if_version is not None:
            if type(self.if_version) is not int or not 0 <= self.if_version < 2**63:
                raise InvalidItem("if_version", _shown(self.if_version), "must be an integer from 0 to 2^63-1")
            if not self.sql:
                raise InvalidItem("if_version", f"{self.if_version} with sql=False", "compares against the truth")

    @classmethod
    def cache(cls, ttl: Ttl) -> SubmitOptions:
        """Keep the item in Redis alone, for ``ttl``."""
        return cls(sql=False, redis_ttl=ttl)

    @classmethod
    def durable(cls) -> SubmitOptions:
        """Keep the item in SQL alone."""
        return cls(redis=False)


class Receipt(msgspec.Struct, frozen=True, eq=False):
    """Proof of one accepted write. ``ack`` is what had been reached when ``submit`` returned."""

    object_id: str
    stamp: int
    ack: Ack
    _settled: Callable[[], Awaitable[None]]

    async def stored(self) -> None:
        """Wait until the write, or a newer one of the same id, is in every tier it asked for.

        Raises ``StoreError`` if a tier refused the item; it is then quarantined, not dropped.
        """
        await self._settled()

    def __repr__(self) -> str:
        return f"<Receipt {self.object_id!r} {self.ack.value} stamp {self.stamp}>"


@dataclass(frozen=True, slots=True)
class ItemStatus:
    """Where an item is right now. ``None`` for a tier means that it is not configured or could not be asked."""

    object_id: str
    pending: bool
    quarantined: str | None
    l1: bool
    l2: bool | None
    l3: bool | None

    @property
    def exists(self) -> bool:
        """Whether any tier is known to hold the item."""
        return self.pending or self.l1 or bool(self.l2) or bool(self.l3)
