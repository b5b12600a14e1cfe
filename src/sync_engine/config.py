"""Every setting of the engine with its default, its bounds and why: from arguments, environment or TOML."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Final, Literal

from pydantic import Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from sync_engine.errors import ConfigError
from sync_engine.options import Ack, CacheTtl

__all__ = ["AT_RUN_TIME", "REDIS_CONNECTIONS", "SQL_CONNECTIONS", "SyncEngineConfig"]

MIB = 1024 * 1024


REDIS_CONNECTIONS: Final = frozenset({"redis_response_timeout_ms", "redis_timeout_ms"})
SQL_CONNECTIONS: Final = frozenset({"sql_timeout_ms", "sql_write_concurrency"})
"""What is settled when a connection is made: a change takes new ones."""

AT_RUN_TIME: Final = (
    frozenset(
        {
            "backpressure_critical",
            "backpressure_wait_ms",
            "backpressure_warn",
            "batch_flush_bytes",
            "batch_flush_count",
            "batch_flush_ms",
            "default_ack",
            "l1_max_bytes",
            "max_payload_bytes",
            "pending_max_bytes",
            "promotion_ttl",
            "redis_eviction_start",
            "redis_eviction_target",
            "wal_max_items",
        }
    )
    | REDIS_CONNECTIONS
    | SQL_CONNECTIONS
)
"""What ``SyncEngine.reconfigure`` may change: bounds and paces that one part owns. No secret is among them."""


class SyncEngineConfig(BaseSettings):
    """Settings of one engine. Arguments win over ``SYNC_ENGINE_*`` variables, those over a TOML file.

    ``SyncEngineConfig(data_dir=...)`` alone is a working engine: SQLite in ``data_dir``, no Redis.
    URLs are secrets: no repr, log line or error prints them. A bad value raises ``ConfigError`` naming
    field, value and bound.
    """

    model_config = SettingsConfigDict(
        env_prefix="SYNC_ENGINE_",
        env_parse_none_str="none",
        extra="forbid",
        frozen=True,
        hide_input_in_errors=True,
        validate_default=True,
    )

    data_dir: Path = Path("sync-engine-data")
    """Folder of the log, the default SQLite file and an embedded Redis; made with mode 0700."""

    redis_url: SecretStr | None = None
    """``redis://``, ``rediss://`` (TLS), ``unix://``, ``redis+sentinel://``, ``redis+cluster://``, or ``embedded://``
    (a Redis of our own in ``data_dir``). None: no L2."""
    redis_ca_file: Path | None = None
    """PEM file of the authorities that may have signed for Redis; None: those that the system trusts."""
    redis_prefix: str = Field("", max_length=255)
    """Put before every Redis key, verbatim; end it with a colon."""
    redis_timeout_ms: int = Field(5_000, ge=1, le=600_000)
    """How long a connection to Redis may take to be made or to be had from the pool."""
    redis_response_timeout_ms: int = Field(5_000, ge=1, le=600_000)
    """How long Redis may take to answer one command."""
    redis_binary_format: Literal["compact", "json"] = "compact"
    """How binary items are kept in Redis: our envelope, or the original's JSON text (4 times the size)."""
    redis_eviction_enabled: bool = True
    """Whether items that SQL holds too leave Redis before its ``maxmemory`` is reached; without one nothing does."""
    redis_eviction_start: float = Field(0.75, gt=0, lt=1)
    """Share of ``maxmemory`` at which the coldest items begin to leave."""
    redis_eviction_target: float = Field(0.60, gt=0, lt=1)
    """Share of ``maxmemory`` at which they stop; less than ``redis_eviction_start``."""

    enable_cdc_stream: bool = False
    """Whether every change is told in a stream in Redis."""
    cdc_stream_maxlen: int = Field(100_000, ge=1)
    """Entries that the stream keeps, roughly; older ones are dropped."""
    cdc_stream_key: str | None = Field(None, min_length=1, max_length=255)
    """Key of the stream; None: ``__local__:cdc`` behind ``redis_prefix``."""

    sql_url: SecretStr | None = None
    """``sqlite:///path``, ``mysql://`` or ``mariadb://`` (extra `mysql`), ``postgresql://`` (extra `postgresql`).
    Unset: SQLite in ``data_dir``. None said aloud: no truth, cache-only writes."""
    sql_timeout_ms: int = Field(5_000, ge=1, le=600_000)
    """How long a statement may wait for a lock of another writer. A database server has four times as long for a
    statement, at least 5 s, and is taken for gone after that."""
    sql_write_concurrency: int = Field(1, ge=1, le=64)
    """Transactions into which a large flush is split, each with a connection and ids of its own. More pay where the
    database is some milliseconds away; SQLite has one writer, and always one."""

    l1_max_bytes: int = Field(256 * MIB, ge=0)
    """Bytes of items in process memory; 0 turns L1 off."""
    promotion_ttl: float = Field(float(CacheTtl.HOUR), ge=1, le=10 * 365 * 86_400)
    """Seconds that a Redis copy made by a read lives, so that a cold item does not settle there."""

    max_payload_bytes: int = Field(16 * MIB, ge=1, le=512 * MIB)
    """Largest content accepted; Redis ends at 512 MiB."""
    default_ack: Ack = Ack.LOGGED
    """When ``submit`` returns unless it says so itself."""

    batch_flush_ms: int = Field(100, ge=0, le=60_000)
    """Longest time a write waits for company before it is flushed; 0: flushed at once."""
    batch_flush_count: int = Field(1_000, ge=1, le=100_000)
    """Operations that trigger a flush; a backlog is taken up to four times as many at once."""
    batch_flush_bytes: int = Field(MIB, ge=1)
    """Bytes that trigger a flush; a backlog is taken up to four times as many at once."""

    wal_path: Path | None = None
    """Folder of the log; default ``data_dir/log``. One engine owns it at a time."""
    wal_max_items: int = Field(1_000_000, ge=1)
    """Unsettled operations the log may hold; beyond it writes wait, then raise ``Backpressure``."""
    wal_segment_bytes: int = Field(16 * MIB, ge=4_096, le=1024 * MIB)
    """Size at which the log starts a new file; settled files are deleted whole."""
    wal_reserve_bytes: int = Field(16 * MIB, ge=0, le=1024 * MIB)
    """Bytes of the log's disk that are held back, and given up when SQLite or the quarantine there has no room; nothing
    is accepted meanwhile. 0: none."""
    pending_max_bytes: int = Field(64 * MIB, ge=0)
    """Unsettled items kept in memory; beyond it their values are read back from the log when flushed."""
    backpressure_wait_ms: int = Field(1_000, ge=0, le=600_000)
    """How long a write waits at a bound before ``Backpressure``."""
    backpressure_warn: float = Field(0.7, gt=0, lt=1)
    """Share of ``wal_max_items`` or ``pending_max_bytes`` from which ``health`` warns; half-way to
    ``backpressure_critical`` no batch waits for company any more."""
    backpressure_critical: float = Field(0.9, gt=0, lt=1)
    """Share from which writes are slowed; half-way to 1 those that no log holds wait."""

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as bad:
            raise ConfigError("; ".join(map(_told, bad.errors(include_url=False)))) from None
        except ValueError as bad:  # not TOML, or not UTF-8: the file that SYNC_ENGINE_CONFIG names
            raise ConfigError(f"{os.environ.get('SYNC_ENGINE_CONFIG')}: not valid TOML: {bad}") from None

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        path = os.environ.get("SYNC_ENGINE_CONFIG")
        sources = (init_settings, env_settings)
        return (*sources, TomlConfigSettingsSource(settings_cls, _existing(path))) if path else sources

    @classmethod
    def from_toml(cls, path: str | Path, **values: Any) -> SyncEngineConfig:
        """Settings of a TOML file; arguments and environment win over it."""
        import tomllib

        try:
            told = tomllib.loads(_existing(path).read_text())
        except ValueError as bad:  # a TOMLDecodeError, or not UTF-8
            raise ConfigError(f"{path}: not valid TOML: {bad}") from None
        overrides = {name for name in cls.model_fields if f"SYNC_ENGINE_{name.upper()}" in os.environ}
        return cls(**{name: value for name, value in told.items() if name not in overrides} | values)

    @field_validator("redis_url", "sql_url", mode="before")
    @classmethod
    def _none(cls, value: object) -> object:
        return None if value == "none" else value  # as in the environment: TOML has no word for it

    @model_validator(mode="after")
    def _fill_in(self) -> SyncEngineConfig:
        if "sql_url" not in self.model_fields_set:
            # Absolute, so that a later chdir of the process cannot change which file is the truth.
            url = f"sqlite:///{(self.data_dir / 'truth.db').absolute()}"
            object.__setattr__(self, "sql_url", SecretStr(url))
        if self.redis_url is None and self.sql_url is None:
            raise ValueError("redis_url and sql_url are both None: there is no tier to store anything in")
        if self.enable_cdc_stream and self.redis_url is None:
            raise ValueError("enable_cdc_stream: the stream is in Redis, and redis_url is None")
        if self.redis_eviction_target >= self.redis_eviction_start:
            told = f"redis_eviction_target = {self.redis_eviction_target}: must be less than redis_eviction_start"
            raise ValueError(f"{told} = {self.redis_eviction_start}")
        if self.backpressure_warn >= self.backpressure_critical:
            told = f"backpressure_warn = {self.backpressure_warn}: must be less than backpressure_critical"
            raise ValueError(f"{told} = {self.backpressure_critical}")
        return self

    def changed(self, **changes: Any) -> SyncEngineConfig:
        """These settings with some of ``AT_RUN_TIME`` changed, checked as a whole.

        Raises ``ConfigError`` naming every setting that is unknown, needs a restart, or breaks a bound.
        """
        if unknown := changes.keys() - type(self).model_fields:
            raise ConfigError(f"{', '.join(sorted(unknown))}: no such setting")
        if fixed := changes.keys() - AT_RUN_TIME:
            raise ConfigError(f"{', '.join(sorted(fixed))}: cannot change while an engine runs; it needs a restart")
        checked = _Alone(**{name: getattr(self, name) for name in type(self).model_fields} | changes)
        return self.model_copy(update={name: getattr(checked, name) for name in changes})

    @property
    def log_dir(self) -> Path:
        """Where the log lives."""
        return self.wal_path if self.wal_path is not None else self.data_dir / "log"


class _Alone(SyncEngineConfig):
    """Settings from arguments alone: the environment and the file have been read, and may be others by now."""

    @classmethod
    def settings_customise_sources(
        cls, settings_cls: type[BaseSettings], init_settings: PydanticBaseSettingsSource, *_: Any, **__: Any
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return (init_settings,)


SECRETS = frozenset({"redis_url", "sql_url"})


def _told(error: Any) -> str:
    field = ".".join(str(part) for part in error["loc"]) or "configuration"
    given = "" if field in SECRETS or error["type"] in ("value_error", "extra_forbidden") else f" = {error['input']!r}"
    return f"{field}{given}: {error['msg'].removeprefix('Value error, ')}"


def _existing(path: str | Path) -> Path:
    found = Path(path)
    if not found.is_file():
        raise ConfigError(f"{path}: no such configuration file")
    return found
