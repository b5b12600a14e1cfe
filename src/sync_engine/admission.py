"""Turns what a caller says into drafts of operations, or says precisely what is wrong with it."""

from __future__ import annotations

from msgspec.structs import replace

from sync_engine.config import SyncEngineConfig
from sync_engine.errors import InvalidItem, PayloadTooLarge, TierNotConfigured
from sync_engine.item import Op, SyncItem, check_id
from sync_engine.options import Ack, SubmitOptions, Ttl, ttl_ms
from sync_engine.ports import Clock

__all__ = ["Admission"]

DEFAULT = SubmitOptions()


class Admission:
    """The limits of one configuration. Drafts carry stamp 0; the write path stamps them."""

    def __init__(self, config: SyncEngineConfig, clock: Clock) -> None:
        self._redis = config.redis_url is not None
        self._sql = config.sql_url is not None
        self._clock = clock
        self.bound(config)

    def bound(self, config: SyncEngineConfig) -> None:
        """Take up what may change at run time."""
        self._payload_bytes_max = config.max_payload_bytes
        self._ack = config.default_ack

    def put(self, item: SyncItem, options: SubmitOptions | None, ack: Ack | None) -> tuple[Op, Ack]:
        """The draft of one write, and the acknowledgement it waits for. Raises ``InvalidItem``."""
        if not isinstance(item, SyncItem):
            raise InvalidItem("item", f"a {type(item).__name__}", "must be a SyncItem")
        if len(item.content) > self._payload_bytes_max:
            raise PayloadTooLarge(
                "content", f"{len(item.content)} bytes", f"must have at most {self._payload_bytes_max} bytes"
            )
        if options is None:
            options = DEFAULT
        elif not isinstance(options, SubmitOptions):
            raise InvalidItem("options", f"a {type(options).__name__}", "must be SubmitOptions")
        self.refuse_impossible(options)
        if options.state is not None:
            item = item.with_state(options.state)
        expires_at = None
        if options.redis_ttl is not None:
            expires_at = self._clock.now_ms() + ttl_ms(options.redis_ttl)
        if options.if_version is None:
            ack = self.ack(ack)
        elif ack is None:
            ack = Ack.STORED
        elif ack is not Ack.STORED:
            raise InvalidItem("if_version", f"{options.if_version} with {ack}", "is only known with Ack.STORED")
        draft = Op(
            kind="put",
            object_id=item.object_id,
            stamp=0,
            item=item,
            redis=options.redis,
            sql=options.sql,
            redis_expires_at=expires_at,
            if_version=options.if_version,
        )
        return draft, ack

    def delete(self, object_id: str) -> Op:
        """The draft of one deletion."""
        return Op(kind="delete", object_id=check_id(object_id), stamp=0, sql=self._sql)

    def restate(self, object_id: str, state: str) -> Op:
        """The draft of one change of state."""
        return Op(kind="restate", object_id=check_id(object_id), stamp=0, state=state, sql=self._sql)

    def again(self, op: Op, state: str) -> Op:
        """The draft of a put that no tier has, in another state."""
        item = op.item.with_state(state) if op.item is not None else None
        return replace(op, stamp=0, item=item, if_version=None)

    def ack(self, ack: Ack | None) -> Ack:
        """What to wait for. Raises ``InvalidItem`` for anything but an ``Ack``."""
        if ack is None:
            return self._ack
        if not isinstance(ack, Ack):
            raise InvalidItem("ack", f"a {type(ack).__name__}", "must be an Ack")
        return ack

    def loaded(self, ttl: Ttl | None) -> SubmitOptions:
        """Where what was loaded is kept: everywhere, or with a lifetime in Redis alone. Raises ``InvalidItem``."""
        options = SubmitOptions(sql=self._sql) if ttl is None else SubmitOptions.cache(ttl)
        self.refuse_impossible(options)
        return options

    def refuse_impossible(self, options: SubmitOptions) -> None:
        """Raise ``TierNotConfigured`` for a tier that is not there."""
        if options.sql and not self._sql:
            raise TierNotConfigured(
                "options", "sql=True", "there is no truth (sql_url is None): only SubmitOptions.cache(...) is accepted"
            )
        if not options.sql and not self._redis:
            raise TierNotConfigured("options", "sql=False", "needs Redis, and redis_url is None")
