"""Settings: each one's bounds, where they may come from and which wins, and that no secret is ever shown."""

from __future__ import annotations

import pickle
import traceback
from pathlib import Path
from typing import Any

import pytest

from sync_engine import Ack, CacheTtl, ConfigError, SyncEngineConfig

BOUNDS: list[tuple[str, float | None, float | None]] = [
    ("redis_timeout_ms", 1, 600_000),
    ("redis_response_timeout_ms", 1, 600_000),
    ("sql_timeout_ms", 1, 600_000),
    ("l1_max_bytes", 0, None),
    ("promotion_ttl", 1, 10 * 365 * 86_400),
    ("cdc_stream_maxlen", 1, None),
    ("max_payload_bytes", 1, 512 * 1024 * 1024),
    ("batch_flush_ms", 0, 60_000),
    ("batch_flush_count", 1, 100_000),
    ("batch_flush_bytes", 1, None),
    ("sql_write_concurrency", 1, 64),
    ("wal_max_items", 1, None),
    ("wal_segment_bytes", 4_096, 1024 * 1024 * 1024),
    ("wal_reserve_bytes", 0, 1024 * 1024 * 1024),
    ("pending_max_bytes", 0, None),
    ("backpressure_wait_ms", 0, 600_000),
]

NOT_NUMBERS = {
    "data_dir",
    "redis_url",
    "redis_prefix",
    "redis_ca_file",
    "redis_binary_format",
    "redis_eviction_enabled",
    "redis_eviction_start",  # bounds that are no values themselves: tested below
    "redis_eviction_target",
    "backpressure_warn",
    "backpressure_critical",
    "enable_cdc_stream",
    "cdc_stream_key",
    "sql_url",
    "default_ack",
    "wal_path",
}


def test_every_number_has_its_bounds_tested_here() -> None:
    assert {name for name, _, _ in BOUNDS} | NOT_NUMBERS == set(SyncEngineConfig.model_fields)


@pytest.mark.parametrize(("name", "least", "most"), BOUNDS)
def test_a_number_may_be_anywhere_within_its_bounds(name: str, least: int, most: int | None) -> None:
    for value in (least, most if most is not None else 2**40):
        assert getattr(SyncEngineConfig(**{name: value}), name) == value


@pytest.mark.parametrize(("name", "least", "most"), BOUNDS)
def test_a_number_out_of_bounds_is_refused_with_name_value_and_bound(name: str, least: int, most: int | None) -> None:
    for value, bound in ((least - 1, least), (most + 1 if most is not None else None, most)):
        if value is not None:
            with pytest.raises(ConfigError, match=f"^{name} = {value}: .*{bound}"):
                SyncEngineConfig(**{name: value})


@pytest.mark.parametrize("name", [name for name, _, _ in BOUNDS])
@pytest.mark.parametrize("value", ["many", "", None, float("nan"), [1], {}], ids=repr)
def test_what_is_no_number_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"^{name} = "):
        SyncEngineConfig(**{name: value})


def test_the_defaults_are_those_of_the_contract() -> None:
    config = SyncEngineConfig()
    assert config.redis_url is None
    assert config.redis_prefix == ""
    assert config.l1_max_bytes == 268_435_456
    assert config.max_payload_bytes == 16_777_216
    assert config.batch_flush_ms == 100
    assert config.batch_flush_count == 1_000
    assert config.batch_flush_bytes == 1_048_576
    assert config.wal_max_items == 1_000_000
    assert config.redis_timeout_ms == config.redis_response_timeout_ms == 5_000
    assert config.promotion_ttl == CacheTtl.HOUR
    assert config.default_ack is Ack.LOGGED
    assert config.redis_binary_format == "compact"
    assert config.redis_ca_file is None
    assert config.redis_eviction_enabled is True
    assert (config.redis_eviction_start, config.redis_eviction_target) == (0.75, 0.60)
    assert config.enable_cdc_stream is False
    assert (config.cdc_stream_maxlen, config.cdc_stream_key) == (100_000, None)


@pytest.mark.parametrize("value", [0, 1, -0.1, 1.5, float("nan"), "much", None], ids=repr)
@pytest.mark.parametrize("name", ["redis_eviction_start", "redis_eviction_target"])
def test_a_share_of_the_memory_is_between_0_and_1(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"^{name} = "):
        SyncEngineConfig(**{name: value})


@pytest.mark.parametrize("name", ["backpressure_warn", "backpressure_critical"])
@pytest.mark.parametrize("value", [0, 1, -0.1, 1.1, float("nan"), "much", None])
def test_an_edge_of_pressure_is_a_share(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"{name} = "):
        SyncEngineConfig(**{name: value})


def test_pressure_is_told_of_before_it_is_critical() -> None:
    assert (SyncEngineConfig().backpressure_warn, SyncEngineConfig().backpressure_critical) == (0.7, 0.9)
    with pytest.raises(ConfigError, match=r"backpressure_warn = 0.9: .* = 0.9$"):
        SyncEngineConfig(backpressure_warn=0.9)


def test_eviction_stops_below_where_it_begins() -> None:
    assert SyncEngineConfig(redis_eviction_start=0.9, redis_eviction_target=0.8).redis_eviction_target == 0.8
    for start, target in ((0.5, 0.5), (0.5, 0.6), (0.75, 0.8)):
        with pytest.raises(ConfigError, match=f"redis_eviction_target = {target}: .* = {start}$"):
            SyncEngineConfig(redis_eviction_start=start, redis_eviction_target=target)


def test_a_folder_alone_is_a_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = SyncEngineConfig(data_dir=tmp_path)
    assert config.sql_url is not None
    assert config.sql_url.get_secret_value() == f"sqlite:///{tmp_path / 'truth.db'}"
    assert config.log_dir == tmp_path / "log"
    assert SyncEngineConfig(data_dir=tmp_path, wal_path=tmp_path / "w").log_dir == tmp_path / "w"
    monkeypatch.chdir(tmp_path)
    relative = SyncEngineConfig(data_dir="here").sql_url
    assert relative is not None
    assert relative.get_secret_value() == f"sqlite:///{tmp_path / 'here' / 'truth.db'}", "a later chdir changes nothing"


def test_no_truth_has_to_be_said_aloud(monkeypatch: pytest.MonkeyPatch) -> None:
    assert SyncEngineConfig(redis_url="redis://h").sql_url is not None
    assert SyncEngineConfig(redis_url="redis://h", sql_url=None).sql_url is None
    with pytest.raises(ConfigError, match="no tier"):
        SyncEngineConfig(sql_url=None)
    monkeypatch.setenv("SYNC_ENGINE_SQL_URL", "none")
    monkeypatch.setenv("SYNC_ENGINE_REDIS_URL", "redis://h")
    assert SyncEngineConfig().sql_url is None


def test_the_environment_is_read_and_arguments_win_over_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SYNC_ENGINE_BATCH_FLUSH_MS", "7")
    monkeypatch.setenv("SYNC_ENGINE_DEFAULT_ACK", "stored")
    monkeypatch.setenv("SYNC_ENGINE_WAL_PATH", "/tmp/w")
    monkeypatch.setenv("BATCH_FLUSH_COUNT", "5")
    config = SyncEngineConfig()
    assert (config.batch_flush_ms, config.default_ack, config.wal_path) == (7, Ack.STORED, Path("/tmp/w"))
    assert config.batch_flush_count == 1_000, "only our own prefix is read"
    assert SyncEngineConfig(batch_flush_ms=8).batch_flush_ms == 8
    monkeypatch.setenv("SYNC_ENGINE_BATCH_FLUSH_MS", "-1")
    with pytest.raises(ConfigError, match=r"^batch_flush_ms = '?-1"):
        SyncEngineConfig()


def test_a_toml_file_is_read_and_environment_and_arguments_win_over_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "engine.toml"
    path.write_text('redis_prefix = "app:"\nbatch_flush_ms = 1\nbatch_flush_count = 2\nbatch_flush_bytes = 3\n')
    monkeypatch.setenv("SYNC_ENGINE_BATCH_FLUSH_COUNT", "20")
    monkeypatch.setenv("SYNC_ENGINE_BATCH_FLUSH_BYTES", "30")

    def told(config: SyncEngineConfig) -> tuple[str, int, int, int]:
        return (config.redis_prefix, config.batch_flush_ms, config.batch_flush_count, config.batch_flush_bytes)

    assert told(SyncEngineConfig.from_toml(path, batch_flush_bytes=300)) == ("app:", 1, 20, 300)
    monkeypatch.setenv("SYNC_ENGINE_CONFIG", str(path))
    assert told(SyncEngineConfig(batch_flush_bytes=300)) == ("app:", 1, 20, 300)


def test_a_toml_file_can_say_that_there_is_no_truth(tmp_path: Path) -> None:
    path = tmp_path / "engine.toml"
    path.write_text('redis_url = "redis://h"\nsql_url = "none"\n')
    assert SyncEngineConfig.from_toml(path).sql_url is None


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("batch_flush_ms = ", "not valid TOML"),
        ("batch_flush_ms = 'x'", "^batch_flush_ms"),
        ("batch_flush = 1", "^batch_flush"),
        ("[redis]\nurl = 'redis://h'", "^redis"),
    ],
)
def test_a_bad_toml_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, why: str) -> None:
    path = tmp_path / "engine.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=why):
        SyncEngineConfig.from_toml(path)
    monkeypatch.setenv("SYNC_ENGINE_CONFIG", str(path))
    with pytest.raises(ConfigError):
        SyncEngineConfig()


def test_a_toml_file_that_is_no_text_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "engine.toml"
    path.write_bytes(b'redis_prefix = "\xff"')
    with pytest.raises(ConfigError, match="not valid TOML"):
        SyncEngineConfig.from_toml(path)
    monkeypatch.setenv("SYNC_ENGINE_CONFIG", str(path))
    with pytest.raises(ConfigError, match="not valid TOML"):
        SyncEngineConfig()


def test_a_missing_toml_file_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="no such"):
        SyncEngineConfig.from_toml(tmp_path / "nowhere.toml")
    with pytest.raises(ConfigError, match="no such"):
        SyncEngineConfig.from_toml(tmp_path)
    monkeypatch.setenv("SYNC_ENGINE_CONFIG", str(tmp_path / "nowhere.toml"))
    with pytest.raises(ConfigError, match="no such"):
        SyncEngineConfig()


@pytest.mark.parametrize("name", ["batch_flush", "redis-url", "wal_drain_batch_size"])
def test_an_unknown_setting_is_refused_by_its_name(name: str) -> None:
    with pytest.raises(ConfigError, match=f"^{name}: "):
        SyncEngineConfig(**{name: 1})


def test_every_fault_is_told_at_once() -> None:
    with pytest.raises(ConfigError) as refused:
        SyncEngineConfig(batch_flush_ms=-1, wal_max_items=0, redis_binary_format="zip")
    for name in ("batch_flush_ms = -1", "wal_max_items = 0", "redis_binary_format = 'zip'"):
        assert name in str(refused.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("redis_prefix", "p" * 256),
        ("redis_prefix", 5),
        ("redis_binary_format", "Compact"),
        ("default_ack", "always"),
        ("data_dir", 5),
        ("wal_path", []),
        ("redis_ca_file", 5),
        ("redis_eviction_enabled", "perhaps"),
        ("enable_cdc_stream", 2),
        ("cdc_stream_key", ""),
        ("cdc_stream_key", "k" * 256),
    ],
)
def test_other_settings_are_checked_too(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"^{name} = "):
        SyncEngineConfig(**{name: value})


def test_a_configuration_does_not_change() -> None:
    config = SyncEngineConfig()
    with pytest.raises((ConfigError, ValueError), match="frozen"):
        config.batch_flush_ms = 1


CANARY = "canary-5f2a"
URLS = {"redis_url": f"redis://user:{CANARY}@h:1/0", "sql_url": f"sqlite:////tmp/{CANARY}.db"}


def test_no_repr_shows_a_password() -> None:
    config = SyncEngineConfig(**URLS)
    assert config.redis_url is not None
    assert config.redis_url.get_secret_value() == URLS["redis_url"]
    for shown in (repr(config), str(config), f"{config}", repr(config.redis_url), str(config.sql_url)):
        assert CANARY not in shown
    assert CANARY not in repr(config.model_dump())
    assert CANARY not in config.model_dump_json()


@pytest.mark.parametrize(
    "fields",
    [
        {**URLS, "batch_flush_ms": -1},
        {**URLS, "unknown": 1},
        {**URLS, "redis_url": [CANARY]},
        {**URLS, "sql_url": {"url": CANARY}},
        {**URLS, "redis_url": CANARY.encode() + b"\xff"},
        {**URLS, "unknown_url": CANARY},
        {"redis_url": 5, "sql_url": f"{CANARY}://", "wal_max_items": CANARY[:0]},
    ],
    ids=lambda fields: ",".join(fields),
)
def test_no_error_shows_a_password(fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as refused:
        SyncEngineConfig(**fields)
    told = "".join(traceback.format_exception(refused.value))
    assert CANARY not in str(refused.value)
    assert CANARY not in repr(refused.value.args)
    assert CANARY not in told
    assert refused.value.__cause__ is None


def test_no_environment_value_of_a_secret_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SYNC_ENGINE_REDIS_URL", URLS["redis_url"])
    monkeypatch.setenv("SYNC_ENGINE_BATCH_FLUSH_MS", "soon")
    with pytest.raises(ConfigError, match="batch_flush_ms") as refused:
        SyncEngineConfig()
    assert CANARY not in str(refused.value)
    monkeypatch.delenv("SYNC_ENGINE_BATCH_FLUSH_MS")
    assert CANARY not in repr(SyncEngineConfig())


def test_a_configuration_can_be_sent_to_another_process() -> None:
    config = SyncEngineConfig(**URLS, batch_flush_ms=3)
    assert pickle.loads(pickle.dumps(config)) == config  # noqa: S301  # our own bytes
