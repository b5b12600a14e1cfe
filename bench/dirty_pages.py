"""What a page of dirty ids costs found by the flag, and along the primary key past all clean rows: why both, and when.

On SQLite, whose rows are the nearest. The dirty ones stand behind all others in the order of ids, which is the worst
place for the second way.
"""

from __future__ import annotations

from bench.harness import Answer, Contender, Stage, Unit, check, compared
from sync_engine.storage.sql import SqlStore, dirty
from sync_engine.testing.databases import ask as told

__all__ = ["ask"]

ROWS = 600_000
DIRTY = dirty.SORTED_MAX
PAGE = 500

FILLED = """\
INSERT INTO sync_items (id, version, timestamp, payload_hash, payload, state, access_count, last_accessed, stamp,
  merkle_dirty)
WITH RECURSIVE counted (number) AS (SELECT 1 UNION ALL SELECT number + 1 FROM counted WHERE number < {rows})
SELECT printf('place.%07d', number), 1, number, '', printf('{{"number": %d, "text": "%s"}}', number,
  hex(zeroblob(100))), 'default', 0, 0, number, number > {clean} FROM counted"""


async def ask(stage: Stage) -> list[Answer]:
    """The first page."""
    rows, marked = stage.sized(ROWS, 3_000), stage.sized(DIRTY, PAGE)
    folder = stage.new_folder()
    url = f"sqlite:///{folder / 'truth.db'}"
    store = await SqlStore.connect(url)
    await told(url, FILLED.format(rows=rows, clean=rows - marked))
    by_flag, along = ByFlag(store, rows - marked), AlongIds(store, rows - marked)
    times = await stage.race(by_flag, along)
    await store.close()
    stage.drop_folder(folder)
    asked = f"a page of {PAGE} ids, {marked:,} of {rows:,} rows dirty, the last ones, SQLite"
    return [compared(asked, times, by_flag.name, [along.name], None, unit=Unit.TIME)]


class ByFlag(Contender):
    """As it is chosen for so many."""

    name = "found by the flag and sorted"

    def __init__(self, store: SqlStore, clean: int) -> None:
        super().__init__(1)
        self._store = store
        self._clean = clean

    async def run(self) -> None:
        self._found = await self._store.list_dirty_ids(PAGE)

    async def verify(self) -> None:
        wanted = [f"place.{self._clean + number:07}" for number in range(1, PAGE + 1)]
        check(self._found == wanted, f"{self.name}: another page")


class AlongIds(ByFlag):
    """As it is chosen for more."""

    name = "along the ids"

    async def run(self) -> None:
        dirty.SORTED_MAX, most = -1, dirty.SORTED_MAX  # type: ignore[misc]  # whoever it is for, nobody else is here
        try:
            await super().run()
        finally:
            dirty.SORTED_MAX = most  # type: ignore[misc]
