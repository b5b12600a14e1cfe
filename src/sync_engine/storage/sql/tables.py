"""The one definition of every table, for all databases. Columns and names are those of docs/formats.md 3.1.

The first eleven columns of an item table are the original engine's, in its order; ``stamp`` is ours, at the
end and nullable, so that both can use one table.
"""

from __future__ import annotations

import zlib
from typing import Final

from sqlalchemy import BigInteger, Column, Index, Integer, LargeBinary, MetaData, String, Table, Text, text
from sqlalchemy.dialects import mysql

__all__ = [
    "ADOPTABLE",
    "SCHEMA_VERSION",
    "TOMBSTONE_LIFE_MS",
    "index_name",
    "index_names",
    "item_table",
    "items",
    "locks",
    "meta",
    "metadata",
    "routes",
    "tombstones",
]

SCHEMA_VERSION: Final = 1
"""Raised when a table changes so that older code would misread it."""

ADOPTABLE: Final = frozenset({"merkle_dirty", "state", "access_count", "last_accessed", "stamp"})
"""Columns that tables of older writers lack and that can be added: all are nullable or have a default."""

TOMBSTONE_LIFE_MS: Final = 7 * 86_400_000
"""How long a delete is remembered: far longer than a put waits in a log that is being flushed."""

_Int64 = BigInteger().with_variant(Integer(), "sqlite")
_Flag = Integer().with_variant(mysql.TINYINT(), "mysql")
_Text = Text().with_variant(mysql.LONGTEXT(), "mysql")
_Bytes = LargeBinary().with_variant(mysql.LONGBLOB(), "mysql")


def _short(length: int) -> String:
    """Text that is compared, by its bytes: so does SQLite by itself, and MySQL by the table's collation."""
    plain = String(length)
    return plain.with_variant(Text(), "sqlite").with_variant(String(length, collation="C"), "postgresql")


_Id = _short(255)

metadata = MetaData()


INDEXED: Final = ("timestamp", "merkle_dirty", "state", "stamp")


def item_table(name: str, among: MetaData | None = None) -> Table:
    """The table of items called ``name``; times are epoch milliseconds."""
    return Table(
        name,
        MetaData() if among is None else among,
        Column("id", _Id, primary_key=True),
        Column("version", _Int64, nullable=False, server_default=text("1")),
        Column("timestamp", _Int64, nullable=False),
        Column("payload_hash", _short(64)),
        Column("payload", _Text),
        Column("payload_blob", _Bytes),
        Column("audit", Text),
        Column("merkle_dirty", _Flag, nullable=False, server_default=text("1")),
        Column("state", _short(32), nullable=False, server_default=text("'default'")),
        Column("access_count", _Int64, nullable=False, server_default=text("0")),
        Column("last_accessed", _Int64, nullable=False, server_default=text("0")),
        Column("stamp", _Int64),
        Index(index_name(name, "timestamp"), "timestamp"),
        Index(index_name(name, "merkle_dirty"), "merkle_dirty"),
        Index(index_name(name, "state"), "state", "id"),  # with the id: pages of a state are read in order, by key
        Index(
            index_name(name, "stamp"), "stamp", "id"
        ),  # what changed since, in order; by key, since stamps may be equal
    )


def index_name(table: str, column: str) -> str:
    """The name of an index of an item table: SQLite's and PostgreSQL's share one name space."""
    if table == "sync_items":
        return f"idx_{column}"
    name = f"idx_{table}_{column}"
    # PostgreSQL would cut it at 63 bytes, and no longer find it by its whole name.
    return name if len(name) <= 63 else f"idx_{zlib.crc32(table.encode()):08x}_{column}"


def index_names(table: str) -> frozenset[str]:
    """The names of all indexes of a table of ours; of another one those that it would have if it were a schema's."""
    if table == tombstones.name:
        return frozenset(str(index.name) for index in tombstones.indexes)
    return frozenset(index_name(table, column) for column in INDEXED)


items = item_table("sync_items", metadata)

tombstones = Table(
    "sync_tombstones",
    metadata,
    Column("id", _Id, primary_key=True),
    Column("stamp", _Int64, nullable=False),
    Column("deleted_at_ms", _Int64, nullable=False),
    Index("idx_tombstones_deleted_at", "deleted_at_ms"),
    Index("idx_tombstones_stamp", "stamp", "id"),
)
"""Ids deleted by a stamped operation, so that an older put that arrives late stays out."""

meta = Table(
    "sync_meta",
    metadata,
    Column("name", _Id, primary_key=True),
    Column("value", _Int64, nullable=False),
)
"""Numbers by name.

``schema_version``; ``newest_stamp``, which no accepted write exceeds; ``forgotten_ms``: deletes before that moment may
be forgotten; ``late:{ms}``: the oldest stamp that Redis was given late from that moment on (``Truth.note_late``);
``routes``: the version of sync_routes, once a schema was registered; ``table:{name}``: that there is this table."""

routes = Table(
    "sync_routes",
    metadata,
    Column("prefix", _Id, primary_key=True),
    Column("table_name", _short(64), nullable=False),
    Column("phase", Integer, nullable=False),
)
"""Which table the ids of a prefix are in; phase 1: rows of theirs may still be in others, 0: none is."""

locks = Table("sync_locks", MetaData(), Column("bucket", Integer, primary_key=True, autoincrement=False))
"""For MySQL, which has no other locks that end with a transaction: a row for each bucket of ids (dialect.BUCKETS)."""
