"""Schemas: a name and prefixes become a table, then routes to it, then rows in it; each step can be taken again.

Only one step changes what is asked of which table: the routes appear, and later are called complete, in a transaction
that holds every bucket. So no writer is under way then; the next one finds the new version behind his locks.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from functools import partial
from typing import Final

from sync_engine.errors import ConfigError, SyncEngineError, TierUnavailable
from sync_engine.ports import Clock
from sync_engine.storage.sql.buckets import EVERY_BUCKET
from sync_engine.storage.sql.dialect import Database, Session
from sync_engine.storage.sql.lanes import Lane
from sync_engine.storage.sql.migrate import make_items
from sync_engine.storage.sql.moving import Mover
from sync_engine.storage.sql.routing import SUFFIX, TABLE, TABLES_MAX, Router
from sync_engine.storage.sql.words import ROUTES_VERSION

__all__ = ["Schemas"]

ROUTES_MAX: Final = 10_000
"""Most prefixes of a database: every engine keeps all of them in memory."""

AGAIN_S: Final = 1.0
"""How long what goes on in the background waits for a database that cannot be asked."""

_log = logging.getLogger(__name__)


class Schemas:
    """What a store does about schemas, on a connection that is open only meanwhile."""

    def __init__(self, database: Database, router: Router, clock: Clock) -> None:
        self._database = database
        self._router = router
        self._clock = clock
        self._turn = asyncio.Lock()
        self._stopped = False

    def stop(self) -> None:
        """Begin no further page."""
        self._stopped = True

    async def register(self, name: str, prefixes: Sequence[str]) -> int:
        """``SqlStore.register_schema``, for a checked name and checked prefixes."""
        table = name + SUFFIX
        async with self._turn:
            lane = Lane(self._database)
            try:
                await make_items(self._database, await lane.session(), table)
                mover = self._mover(lane)
                routes = await self._router.learn(lane.rows)
                if table not in routes.tables:
                    await mover.empty(table)
                self._raise_if_stopped()
                await lane.transaction(partial(self._announce, table, prefixes))
                if not await mover.run():
                    raise TierUnavailable("l3", "the store was closed; the rows go on moving at the next start")
            finally:
                await lane.close()
        _log.info("schema %s: moved %d rows", name, mover.moved)
        return mover.moved

    async def resume(self) -> None:
        """Finish what an earlier call has left, however long the database cannot be asked meanwhile."""
        async with self._turn:
            lane = Lane(self._database)
            try:
                mover = self._mover(lane)
                _log.info("going on to move the rows of %d prefixes", len(self._router.routes.moving))
                while not self._stopped:
                    try:
                        if await mover.run():
                            _log.info("moved %d rows", mover.moved)
                            return
                    except TierUnavailable as down:
                        _log.warning("rows cannot be moved now, trying again: %s", down)
                        await self._clock.sleep(AGAIN_S)
            except SyncEngineError as failed:
                # No traceback: what the driver said beneath it may quote a row.
                _log.error("rows cannot be moved (%s); reads ask every table until they are", failed)
            finally:
                await lane.close()

    def _mover(self, lane: Lane) -> Mover:
        return Mover(lane, self._router, self._clock, lambda: self._stopped)

    def _raise_if_stopped(self) -> None:
        if self._stopped:
            raise TierUnavailable("l3", "the store is closed")

    async def _announce(self, table: str, prefixes: Sequence[str], own: Session) -> None:
        await own.lock(EVERY_BUCKET)
        routes = await self._router.learn(own.rows)
        new = [prefix for prefix in prefixes if (r := routes.by_prefix.get(prefix)) is None or r.table != table]
        if not new:
            return
        if len({*routes.tables, table}) > TABLES_MAX + 1:
            raise ConfigError(f"there are {TABLES_MAX} schemas already, and no more are kept")
        if len(routes.by_prefix) + len(new) > ROUTES_MAX:
            raise ConfigError(f"there would be more than {ROUTES_MAX} prefixes")
        words = self._router.words()
        for prefix in new:
            if prefix in routes.by_prefix:
                await own.run(words.unroute(prefix))
            await own.run(words.route(prefix, table))
        await own.run(words.note_most(TABLE + table, 1))
        await own.run(words.note_most(ROUTES_VERSION, routes.version + 1))
