"""Options of one write: lifetimes kept exactly, every bound and one beyond it, contradictions refused."""

from __future__ import annotations

from datetime import timedelta
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sync_engine import Ack, CacheTtl, InvalidItem, InvalidState, ItemStatus, Receipt, SubmitOptions
from sync_engine.options import TTL_SECONDS_MAX, ttl_ms

TTLS: list[tuple[Any, int]] = [
    (1, 1_000),
    (1.0, 1_000),
    (1.001, 1_001),
    (1.5, 1_500),
    (61, 61_000),
    (91, 91_000),
    (451.25, 451_250),
    (864_001, 864_001_000),
    (TTL_SECONDS_MAX, TTL_SECONDS_MAX * 1000),
    (timedelta(seconds=1), 1_000),
    (timedelta(milliseconds=1_234), 1_234),
    (timedelta(days=3650), TTL_SECONDS_MAX * 1000),
    (CacheTtl.MINUTE, 60_000),
    (CacheTtl.SHORT, 300_000),
    (CacheTtl.MEDIUM, 900_000),
    (CacheTtl.HOUR, 3_600_000),
    (CacheTtl.DAY, 86_400_000),
    (CacheTtl.WEEK, 604_800_000),
]
BAD_TTLS: list[Any] = [
    0,
    -1,
    0.999,
    -0.0,
    TTL_SECONDS_MAX + 1,
    2**63,
    10**400,
    10**5_000,
    float("nan"),
    float("inf"),
    -float("inf"),
    True,
    False,
    "60",
    b"60",
    Decimal(60),
    1j,
    timedelta(0),
    timedelta(milliseconds=999),
    timedelta(seconds=-5),
    timedelta.max,
    [60],
]


@pytest.mark.parametrize(("ttl", "ms"), TTLS, ids=repr)
def test_a_lifetime_is_kept_exactly(ttl: Any, ms: int) -> None:
    assert ttl_ms(ttl) == ms
    assert SubmitOptions(redis_ttl=ttl).redis_ttl == ttl
    assert SubmitOptions.cache(ttl).redis_ttl == ttl


@pytest.mark.parametrize("ttl", BAD_TTLS, ids=lambda ttl: "huge" if ttl == 10**5_000 else repr(ttl)[:20])
def test_a_lifetime_that_is_none_is_refused(ttl: Any) -> None:
    with pytest.raises(InvalidItem, match=r"^redis_ttl") as refused:
        SubmitOptions(redis_ttl=ttl)
    assert refused.value.field == "redis_ttl"
    with pytest.raises(InvalidItem, match=r"^redis_ttl"):
        SubmitOptions.cache(ttl)


def test_a_cache_item_needs_a_lifetime() -> None:
    with pytest.raises(TypeError):
        SubmitOptions.cache()  # type: ignore[call-arg]  # that it cannot is what is tested


@given(st.integers(1_000, TTL_SECONDS_MAX * 1000))
def test_every_millisecond_survives_in_either_form(ms: int) -> None:
    assert ttl_ms(ms / 1000) == ms
    assert ttl_ms(timedelta(milliseconds=ms)) == ms


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"redis": False, "sql": False}, "options"),
        ({"redis": 1}, "redis"),
        ({"sql": None}, "sql"),
        ({"redis": "yes"}, "redis"),
        ({"redis": False, "redis_ttl": 60}, "redis_ttl"),
        ({"if_version": -1}, "if_version"),
        ({"if_version": 2**63}, "if_version"),
        ({"if_version": True}, "if_version"),
        pytest.param({"if_version": 10**5_000}, "if_version", id="huge"),
        ({"if_version": 1.0}, "if_version"),
        ({"if_version": "1"}, "if_version"),
        ({"if_version": 1, "sql": False}, "if_version"),
        ({"state": ""}, "state"),
        ({"state": "s" * 33}, "state"),
        ({"state": "\0"}, "state"),
        ({"state": 1}, "state"),
    ],
)
def test_what_cannot_be_meant_is_refused_by_the_name_of_the_field(fields: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidItem) as refused:
        SubmitOptions(**fields)
    assert refused.value.field == field
    assert isinstance(refused.value, InvalidState) == (field == "state")


@pytest.mark.parametrize("version", [0, 1, 2**63 - 1])
def test_any_version_may_be_compared(version: int) -> None:
    assert SubmitOptions(if_version=version).if_version == version


def test_the_shorthands() -> None:
    assert SubmitOptions() == SubmitOptions(redis=True, sql=True, redis_ttl=None, state=None, if_version=None)
    assert SubmitOptions.cache(60) == SubmitOptions(sql=False, redis_ttl=60)
    assert SubmitOptions.durable() == SubmitOptions(redis=False)
    with pytest.raises(AttributeError):
        SubmitOptions().redis = False  # type: ignore[misc]  # that it cannot is what is tested


def test_acknowledgements_have_names_for_files_and_environment() -> None:
    assert [ack.value for ack in Ack] == ["memory", "logged", "stored"]
    assert Ack("stored") is Ack.STORED


async def test_a_receipt_says_what_it_proves() -> None:
    async def settled() -> None:
        raise RuntimeError("asked")

    receipt = Receipt("a", 7, Ack.LOGGED, settled)
    assert repr(receipt) == "<Receipt 'a' logged stamp 7>"
    with pytest.raises(RuntimeError, match="asked"):
        await receipt.stored()


@pytest.mark.parametrize(
    ("pending", "l1", "l2", "l3", "exists"),
    [
        (False, False, False, False, False),
        (False, False, None, None, False),
        (True, False, None, None, True),
        (False, True, None, False, True),
        (False, False, True, None, True),
        (False, False, None, True, True),
    ],
)
def test_an_item_exists_where_any_tier_is_known_to_hold_it(
    pending: bool, l1: bool, l2: bool | None, l3: bool | None, exists: bool
) -> None:
    assert ItemStatus("a", pending=pending, quarantined=None, l1=l1, l2=l2, l3=l3).exists == exists
