"""Where keys live on a Redis Cluster, as plain functions: slots, our shards among them, what CLUSTER SLOTS says.

Shard i of 128 owns the i-th of 128 equal parts of the slots, and its keys sit in one slot near the middle of that
part. So however a cluster cuts its slots into ranges, each primary has a share of the shards like its share of slots.
"""

from __future__ import annotations

from binascii import crc_hqx
from collections.abc import Mapping
from typing import Any

__all__ = ["SHARDS", "SLOTS", "TAGS", "Node", "owners_of", "reached_at", "shard_number", "slot_of"]

SLOTS = 16_384
SHARDS = 128
"""Part of the layout: another number would look for every item in another place."""

_WIDTH = SLOTS // SHARDS
_OFF_CENTRE_MAX = 8

Node = tuple[str, int]
"""Host and port."""


def slot_of(key: bytes) -> int:
    """The slot of a key: of its hash tag, what the first ``{`` and the next ``}`` enclose, if that is not empty."""
    _, opened, rest = key.partition(b"{")
    tag, closed, _ = rest.partition(b"}")
    return crc_hqx(tag if opened and closed and tag else key, 0) % SLOTS


def shard_number(object_id: str) -> int:
    """Which shard an item is in."""
    return crc_hqx(object_id.encode(), 0) % SHARDS


def owners_of(told: Any, asked: Node) -> dict[int, Node]:
    """The primary of each shard by a reply to CLUSTER SLOTS; shards whose slot nobody serves are left out."""
    owners: dict[int, Node] = {}
    for first, last, (host, port, *_), *_ in told:
        node = (reached_at(host, asked), int(port))
        owners.update((number, node) for number in _numbers(int(first), int(last)))
    return owners


def reached_at(host: str | bytes | None, asked: Node) -> str:
    """The host of a node. One that does not know its own address tells none: then it is the one that was asked."""
    told = host.decode() if isinstance(host, bytes) else host
    return told if told and told != "?" else asked[0]


def _numbers(first: int, last: int) -> Mapping[int, int]:
    return {number: slot for number, slot in enumerate(_SLOTS) if first <= slot <= last}


def _tags() -> tuple[str, ...]:
    # For each shard the smallest whole number, in decimal, whose slot is near the middle of the shard's part.
    tags: dict[int, str] = {}
    tried = 0
    while len(tags) < SHARDS:
        number, offset = divmod(slot_of(b"%d" % tried), _WIDTH)
        if abs(offset - _WIDTH // 2) <= _OFF_CENTRE_MAX:
            tags.setdefault(number, str(tried))
        tried += 1
    return tuple(tags[number] for number in range(SHARDS))


TAGS = _tags()
"""By shard; 1 ms to work out, and the same for ever."""

_SLOTS = tuple(slot_of(tag.encode()) for tag in TAGS)
