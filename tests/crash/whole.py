"""What a server holds under a prefix, seen in one step, and whether its parts agree: items, sets, indexes, stream.

It reads what is stored and asks none of the store's listings, so that a store cannot agree with itself and be wrong.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from redis.asyncio import Redis

from sync_engine import SyncItem
from sync_engine.codec import read_document, read_string

from .rig import Figures

__all__ = ["Whole", "look"]

LOOK = """#!lua flags=no-writes
local found = {}
for _, key in ipairs(redis.call('KEYS', ARGV[1] .. '*')) do
  local kind, value = redis.call('TYPE', key).ok, ''
  if kind == 'string' then value = redis.call('GET', key)
  elseif kind == 'ReJSON-RL' then value = redis.call('JSON.GET', key)
  elseif kind == 'set' then value = redis.call('SMEMBERS', key)
  elseif kind == 'zset' then value = redis.call('ZRANGE', key, 0, -1)
  elseif kind == 'stream' then value = redis.call('XRANGE', key, '-', '+') end
  found[#found + 1] = { string.sub(key, #ARGV[1] + 1), kind, value }
end
return found
"""


@dataclass(frozen=True, slots=True)
class Whole:
    """One moment. ``told`` is what the change stream said last of each id: whether it is there, and the stamp."""

    items: Mapping[str, SyncItem]
    strangers: list[str]
    sets: Mapping[str, set[str]]
    ids: set[str]
    by_state: set[tuple[str, str]]
    told: Mapping[str, tuple[bool, int]]

    def judge(self, figures: Figures, *, told: bool = False) -> None:
        """Count what does not agree. ``told``: every change was to be told, and no read has copied upward."""
        for trouble in [*self._listed(), *(self._streamed() if told else ())]:
            figures.tiers_differ += 1
            figures.wrong.append(f"tiers differ: {trouble}")

    def _listed(self) -> Iterator[str]:
        states: dict[str, set[str]] = {}
        for object_id, item in self.items.items():
            states.setdefault(item.state, set()).add(object_id)
        if self.strangers:
            yield f"{self.strangers} are no items"
        if self.ids != self.items.keys():
            yield f"the index of ids and the items differ in {sorted(self.ids ^ self.items.keys())}"
        pairs = {(item.state, object_id) for object_id, item in self.items.items()}
        if self.by_state != pairs:
            yield f"the index of states and the items differ in {sorted(self.by_state ^ pairs)}"
        for state in states.keys() | self.sets.keys():
            there, wanted = self.sets.get(state, set()), states.get(state, set())
            if there != wanted:
                yield f"the set of state {state!r} and the items differ in {sorted(there ^ wanted)}"

    def _streamed(self) -> Iterator[str]:
        for object_id, item in self.items.items():
            if self.told.get(object_id) != (True, item.stamp):
                yield f"{object_id} has stamp {item.stamp}, the stream told {self.told.get(object_id)}"
        for object_id, (there, _) in self.told.items():
            if not there and object_id in self.items:
                yield f"{object_id} is there, the stream told that it was deleted"


async def look(url: str, prefix: str) -> Whole:
    """Everything that the server holds under the prefix, at one moment."""
    async with Redis.from_url(url) as redis:
        found = await redis.eval(LOOK, 0, prefix)
    items: dict[str, SyncItem] = {}
    strangers: list[str] = []
    sets: dict[str, set[str]] = {}
    ours: dict[str, Any] = {}
    for raw, kind, value in found:
        name = raw.decode()
        if name.startswith("state:"):
            sets[name.removeprefix("state:")] = {member.decode() for member in value}
        elif name.startswith("__local__:"):
            ours[name.removeprefix("__local__:")] = value
        elif isinstance(item := _item(name, kind, value), SyncItem):
            items[name] = item
        else:
            strangers.append(name)
    pairs = (member.decode().split("\0", 1) for member in ours.get("by_state", ()))
    entries = (dict(zip(fields[::2], fields[1::2], strict=True)) for _, fields in ours.get("cdc", ()))
    return Whole(
        items,
        strangers,
        sets,
        {member.decode() for member in ours.get("ids", ())},
        {(state, object_id) for state, object_id in pairs},
        {entry[b"key"].decode(): (entry[b"op"] == b"PUT", int(entry[b"stamp"])) for entry in entries},
    )


def _item(name: str, kind: bytes, value: bytes) -> object:
    if kind == b"ReJSON-RL":
        return read_document(name, value)
    return read_string(name, value) if kind == b"string" else None
