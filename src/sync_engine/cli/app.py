"""The commands ``put``, ``get``, ``delete``, ``scan``, ``status``, ``health``, ``migrate``, ``config show``."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from pydantic import SecretStr

from sync_engine.cli.command import Call, Exit, Running, command, sure
from sync_engine.cli.demo import demo
from sync_engine.cli.quarantine import quarantine_app
from sync_engine.cli.render import fact_sheet, full, one_line, table
from sync_engine.errors import InvalidItem, TierNotConfigured
from sync_engine.item import ContentType, SyncItem
from sync_engine.options import Ack, SubmitOptions
from sync_engine.storage.sql import SqlStore
from sync_engine.storage.sql.tables import SCHEMA_VERSION

__all__ = ["main"]

EXIT_CODES = """Exit codes: 0 done; 1 the item does not exist; 2 wrong usage; 3 an id, a value or a setting breaks a
rule; 4 a tier or the log could not do its part; 5 stored bytes do not match their SHA-256."""

app = typer.Typer(
    name="sync-engine",
    help="Items in memory, Redis and SQL behind one write-ahead log.",
    epilog=EXIT_CODES,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
config_app = typer.Typer(help="Settings.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(config_app, name="config")
app.add_typer(quarantine_app, name="quarantine")

# Usage errors of typer's own click, whose module has moved between versions; its public subclass stays.
_UsageError: type[Exception] = typer.BadParameter.__mro__[2]

ObjectId = Annotated[str, typer.Argument(metavar="ID", show_default=False)]


class AckName(StrEnum):
    """``Ack`` as an option."""

    MEMORY = "memory"
    LOGGED = "logged"
    STORED = "stored"


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit with its code."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            # Names in many scripts, also where the locale is C.
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")
    words = [_utf8(word) for word in (sys.argv[1:] if argv is None else argv)]
    try:
        sys.exit(app(words, prog_name="sync-engine", standalone_mode=False))
    except _UsageError as wrong:
        message = getattr(wrong, "format_message", wrong.__str__)()
        # What stands in the wrong place may be a URL, or the half of one that somebody mistyped.
        for word in sorted((word for word in words if ":" in word), key=len, reverse=True):
            message = message.replace(word, "***")
        # Without any argument the message is the help itself.
        sys.stderr.write(
            message if message.startswith("Usage:") else f"sync-engine: {one_line(message)} (see --help)\n"
        )
        sys.exit(Exit.USAGE)
    except (typer.Abort, KeyboardInterrupt):
        sys.exit(Exit.INTERRUPTED)


@command(app, "put")
async def put(
    call: Call,
    object_id: ObjectId,
    file: Annotated[
        str | None, typer.Argument(metavar="FILE|-", help="Where the content is; - is stdin.", show_default=False)
    ] = None,
    json_value: Annotated[str | None, typer.Option(metavar="JSON", help="The content itself, as JSON text.")] = None,
    state: Annotated[str | None, typer.Option(help="State of the item (default: 'default').")] = None,
    ttl: Annotated[float | None, typer.Option(metavar="SECONDS", help="Lifetime of the Redis copy.")] = None,
    ack: Annotated[AckName | None, typer.Option(help="What must be reached before this returns.")] = None,
    binary: Annotated[bool, typer.Option("--binary", help="Opaque bytes, even where they look like JSON.")] = False,
) -> Exit:
    """Store one item, byte for byte."""
    if json_value is not None and (file is not None or binary):
        raise typer.BadParameter("give FILE or --json-value, and --binary only with FILE")
    config = call.config()
    kind = ContentType.BINARY if binary else None
    if json_value is not None:
        content, kind = json_value.encode(errors="surrogateescape"), ContentType.JSON
    else:
        content = _content(file, config.max_payload_bytes + 1)
    item = SyncItem(object_id, content) if kind is None else SyncItem(object_id, content, content_type=kind)
    if ttl is not None and config.redis_url is None:
        raise InvalidItem("ttl", f"{ttl:g} s", "bounds the Redis copy, and redis_url is none")
    options = SubmitOptions(redis_ttl=ttl, state=state, sql=config.sql_url is not None)
    async with Running(config) as engine:
        receipt = await engine.submit(item, options, ack=Ack(ack.value) if ack is not None else None)
    if state is not None:
        item = item.with_state(state)
    document = fact_sheet(item) | {"stamp": receipt.stamp, "ack": receipt.ack.value}
    call.out.show(document, one_line(f"{object_id}: {len(content)} bytes, {item.content_type}, {receipt.ack.value}"))
    return Exit.OK


@command(app, "get")
async def get(call: Call, object_id: ObjectId) -> Exit:
    """Write the content of one item to stdout, byte for byte; with --json everything known of it."""
    async with Running(call.config()) as engine:
        item = await engine.get(object_id)
    if item is None:
        return _absent(call, object_id)
    if call.out.as_json:
        call.out.show(full(item))
    else:
        call.out.raw(item.content)
    return Exit.OK


@command(app, "delete")
async def delete(
    call: Call,
    object_id: Annotated[str | None, typer.Argument(metavar="ID", show_default=False)] = None,
    under: Annotated[
        str | None, typer.Option(metavar="TEXT", help="Every item whose id begins with it.", show_default=False)
    ] = None,
    in_state: Annotated[str | None, typer.Option(metavar="STATE", help="Every item in it.", show_default=False)] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> Exit:
    """Delete one item, or many, from every tier."""
    if [object_id, under, in_state].count(None) != 2:
        raise typer.BadParameter("give one of ID, --under and --in-state")
    if object_id is None:
        which = f"in state {in_state!r}" if under is None else f"whose id begins with {under!r}"
        sure(yes, f"Delete every item {which}?")
        async with Running(call.config()) as engine:
            count = await (engine.delete_by_state(in_state or "") if under is None else engine.delete_prefix(under))
        call.out.show({"deleted": count}, f"{count:,} deleted")
        return Exit.OK
    async with Running(call.config()) as engine:
        deleted = await engine.delete(object_id)
    if not deleted:
        return _absent(call, object_id)
    call.out.show({"object_id": object_id, "deleted": True}, one_line(f"{object_id}: deleted"))
    return Exit.OK


@command(app, "scan")
async def scan(
    call: Call,
    beginning: Annotated[str, typer.Argument(metavar="PREFIX", help="Beginning of the ids; '' for all.")],
    limit: Annotated[int, typer.Option(min=1, max=100_000, help="Most items to show.")] = 50,
    after: Annotated[str | None, typer.Option(metavar="ID", help="Begin after this id.", show_default=False)] = None,
) -> Exit:
    """List items whose id begins with PREFIX, ascending by id."""
    async with Running(call.config()) as engine:
        items = await engine.scan_prefix(beginning, limit, after=after)
        total = await engine.count_prefix(beginning)
    rows = (
        (item.object_id, item.content_type, len(item.content), item.state, item.version, item.updated_at)
        for item in items
    )
    shown = table(("id", "type", ">bytes", "state", ">version", ">updated at (ms)"), rows)
    call.out.show(
        {"prefix": beginning, "total": total, "items": [full(item) for item in items]},
        shown,
        f"{len(items):,} of {total:,}",
    )
    return Exit.OK


@command(app, "status")
async def status(call: Call, object_id: ObjectId) -> Exit:
    """Show which tiers hold one item."""
    async with Running(call.config()) as engine:
        found = await engine.status(object_id)
    document: dict[str, Any] = {
        "object_id": object_id,
        "exists": found.exists,
        "pending": found.pending,
        "l1": found.l1,
        "l2": found.l2,
        "l3": found.l3,
        "quarantined": found.quarantined,
    }
    rows = [
        ("L1 memory", _told(found.l1)),
        ("L2 Redis", _told(found.l2)),
        ("L3 SQL", _told(found.l3)),
        ("pending", "yes" if found.pending else "no"),
        ("quarantined", found.quarantined or "no"),
    ]
    call.out.show(document, table(("tier", "holds it"), rows, title=one_line(object_id)))
    return Exit.OK if found.exists else Exit.NO


@command(app, "health")
async def health(call: Call) -> Exit:
    """Show whether every tier answers and takes its operations, and what deserves a look."""
    async with Running(call.config()) as engine:
        found = await engine.health()
    rows = [
        (
            name,
            "yes" if tier.answers else "no",
            tier.trouble or "none",
            f"{tier.waiting:,}",
            "no limit, or not told" if tier.full is None else f"{tier.full:.0%}",
            tier.about,
        )
        for name, tier in found.tiers.items()
    ]
    shown = table(("tier", "answers", "trouble", ">waiting", ">memory used", "about"), rows)
    warnings = [f"warning: {one_line(warning)}" for warning in found.warnings]
    call.out.show(asdict(found), shown, *warnings, "all is well" if found.ok else "not all is well")
    return Exit.OK if found.ok else Exit.UNAVAILABLE


@command(app, "migrate")
async def migrate(call: Call) -> Exit:
    """Make the tables of the SQL database, or bring them up to date. An engine does it by itself when it starts."""
    config = call.config()
    if config.sql_url is None:
        raise TierNotConfigured("sql_url", "none", "there are no tables without a database")
    store = await SqlStore.connect(config.sql_url.get_secret_value(), timeout_ms=config.sql_timeout_ms)
    await store.close()
    done = "the tables were made or changed" if store.tables_made else "the tables were up to date"
    call.out.show({"changed": store.tables_made, "version": SCHEMA_VERSION}, f"{done}: version {SCHEMA_VERSION}")
    return Exit.OK


@command(config_app, "show")
async def config_show(call: Call) -> Exit:
    """Show every setting as it would be used; of URLs only the scheme."""
    config = call.config()
    values = {field: _setting(getattr(config, field)) for field in type(config).model_fields}
    rows = [
        (field, "none" if value is None else value, "set" if field in config.model_fields_set else "")
        for field, value in values.items()
    ]
    call.out.show(values, table(("setting", "value", ""), rows))
    return Exit.OK


command(app, "demo")(demo)


def _utf8(word: str) -> str:
    """An argument as UTF-8, whatever the locale; one that is not keeps its surrogates, and is refused as an id."""
    try:
        return os.fsencode(word).decode()
    except UnicodeError:
        return word


def _content(file: str | None, bytes_max: int) -> bytes:
    """The content of a file or of stdin, read no further than the bound that refuses it."""
    if file is None or file == "-":
        return sys.stdin.buffer.read(bytes_max)
    path = Path(file)
    try:
        with path.open("rb") as source:
            return source.read(bytes_max)
    except OSError as error:
        raise InvalidItem("file", file, error.strerror or str(error)) from error


def _absent(call: Call, object_id: str) -> Exit:
    if call.out.as_json:
        call.out.show({"object_id": object_id, "exists": False})
    else:
        sys.stderr.write(f"sync-engine: {one_line(object_id)}: no such item\n")
    return Exit.NO


def _told(held: bool | None) -> str:
    return "not configured, or not to be asked" if held is None else "yes" if held else "no"


SCHEMES = (
    *("redis", "rediss", "unix", "redis+sentinel", "rediss+sentinel", "redis+cluster", "rediss+cluster"),
    *("embedded", "sqlite", "mysql", "mariadb", "postgresql", "postgres"),
)


def _setting(value: object) -> object:
    if isinstance(value, SecretStr):
        scheme = value.get_secret_value().partition("://")[0]
        return f"{scheme}://***" if scheme in SCHEMES else "***"
    if isinstance(value, Ack):
        return value.value
    return str(value) if isinstance(value, Path) else value
