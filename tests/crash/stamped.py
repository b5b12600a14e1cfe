"""The account of ids that several engines write: what was acknowledged with the highest stamp, or newer, must stand."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from sync_engine import SyncEngine, SyncItem
from sync_engine.storage.redis import RedisStore
from sync_engine.storage.sql import SqlStore

from .rig import Figures, Rig

__all__ = ["Stamps"]


class Stamps:
    """Of each id the newest acknowledged writes, and every content that was ever tried."""

    def __init__(self) -> None:
        self._newest: dict[str, tuple[int, set[str]]] = {}
        self._tried: dict[str, set[str]] = {}

    def take(self, lines: Iterable[Mapping[str, Any]], figures: Figures) -> None:
        """Note what the journal has."""
        for line in lines:
            if line["e"] == "trying":
                figures.begun += 1
                self._tried.setdefault(line["id"], set()).add(line["content"])
            elif line["e"] == "won":
                figures.acked += 1
                stamp, contents = self._newest.get(line["id"], (0, set()))
                if line["stamp"] > stamp:
                    self._newest[line["id"]] = (line["stamp"], {line["content"]})
                elif line["stamp"] == stamp:
                    contents.add(line["content"])  # two engines in one millisecond: see docs/durability.md

    async def judge(self, rig: Rig, *engines: SyncEngine) -> None:
        """Compare SQL, Redis, and what each engine reads, with the account; the engines must have flushed."""
        figures, ids = rig.figures, sorted(self._tried)
        figures.read_backs += 1
        store = await SqlStore.connect(rig.sql_url)
        truth = await store.get_many(ids)
        await store.close()
        for each in ids:
            stamp, contents = self._newest.get(each, (0, set()))
            found = truth.get(each)
            if found is None:
                if stamp:
                    figures.acked_lost += 1
                    figures.wrong.append(f"lost: {each}")
                continue
            content = found.content.decode()
            if found.stamp < stamp or (found.stamp == stamp and content not in contents):
                figures.stale += 1
                figures.wrong.append(f"stale: {each} is {content} of {found.stamp}, not {contents} of {stamp}")
            elif content not in self._tried[each]:
                figures.phantom += 1
                figures.wrong.append(f"phantom: {each} is {content}")
        views = {f"engine {n}": await engine.get_many(ids) for n, engine in enumerate(engines)}
        if rig.redis_url is not None:
            cache = await RedisStore.connect(rig.redis_url, rig.prefix)
            cached = await cache.get_many(ids)
            await cache.close()
            # What is to be in SQL alone has no copy there; a read may have made one of what is to be in both.
            views["Redis"] = {each: cached.get(each, item) for each, item in truth.items()}
        for who, view in views.items():
            for each in view.keys() | truth.keys():
                if view.get(each) != truth.get(each):
                    figures.tiers_differ += 1
                    figures.wrong.append(
                        f"tiers differ: {each}: {who} has {_told(view, each)}, SQL {_told(truth, each)}"
                    )


def _told(view: Mapping[str, SyncItem], each: str) -> str:
    item = view.get(each)
    return json.dumps([item.content.decode(), item.stamp]) if item is not None else "nothing"
