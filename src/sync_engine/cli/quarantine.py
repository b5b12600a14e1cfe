"""The commands ``quarantine list``, ``show``, ``retry``, ``drop``: what tiers have refused, and what becomes of it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Annotated, Any

import typer

from sync_engine.cli.command import Call, Exit, Running, command, sure
from sync_engine.cli.render import one_line, table
from sync_engine.item import check_id
from sync_engine.report import QuarantinedOp

__all__ = ["quarantine_app"]

FLUSH_TIMEOUT_S = 10.0
"""How long ``retry`` waits for the tiers; what they have not answered by then the next start takes up from the log."""

quarantine_app = typer.Typer(help="Operations that a tier refused.", no_args_is_help=True, rich_markup_mode=None)


@command(quarantine_app, "list")
async def list_refused(call: Call) -> Exit:
    """List every refused operation, oldest first."""
    async with Running(call.config()) as engine:
        found = await engine.quarantine()
    call.out.show({"quarantined": [_told(each) for each in found]}, _table(found), f"{len(found):,} refused operations")
    return Exit.OK


@command(quarantine_app, "show")
async def show(call: Call, object_id: Annotated[str, typer.Argument(metavar="ID", show_default=False)]) -> Exit:
    """Show one refused operation; ``get ID`` writes its content."""
    check_id(object_id)
    async with Running(call.config()) as engine:
        found = [each for each in await engine.quarantine() if each.object_id == object_id]
    if not found:
        return _nothing(call, [object_id])
    told = _told(found[0])
    call.out.show(told, table(("", "refused operation"), told.items()))
    return Exit.OK


@command(quarantine_app, "retry")
async def retry(
    call: Call,
    ids: Annotated[
        list[str] | None, typer.Argument(metavar="[ID]...", help="Which ones; without: all.", show_default=False)
    ] = None,
) -> Exit:
    """Send refused operations again; what is newer than them stays."""
    async with Running(call.config()) as engine:
        before = {each.object_id for each in await engine.quarantine()}
        if ids and (missing := _missing(ids, before)):
            return _nothing(call, missing)
        sent = await engine.retry_quarantined(ids or None)
        await engine.flush(FLUSH_TIMEOUT_S)
        after = {each.object_id: each for each in await engine.quarantine()}
    still = [after[object_id] for object_id in (ids or sorted(before)) if object_id in after]
    told = {"sent": sent, "still_refused": [_told(each) for each in still]}
    summary = f"{sent:,} sent again, {len(still):,} still refused"
    call.out.show(told, *([_table(still)] if still else []), summary)
    return Exit.UNAVAILABLE if still else Exit.OK


@command(quarantine_app, "drop")
async def drop(
    call: Call,
    ids: Annotated[list[str], typer.Argument(metavar="ID...", help="Which ones.", show_default=False)],
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> Exit:
    """Give refused operations up for good. Reads are then answered with what the tiers hold."""
    for object_id in ids:
        check_id(object_id)
    sure(yes, f"Drop {len(set(ids)):,} refused operations for good?")
    async with Running(call.config()) as engine:
        if missing := _missing(ids, {each.object_id for each in await engine.quarantine()}):
            return _nothing(call, missing)
        dropped = await engine.drop_quarantined(ids)
    call.out.show({"dropped": dropped}, f"{dropped:,} dropped")
    return Exit.OK


def _told(refused: QuarantinedOp) -> dict[str, Any]:
    since = datetime.fromtimestamp(refused.since_ms / 1000, UTC).isoformat(timespec="milliseconds")
    return asdict(refused) | {"since": since}


def _table(found: Sequence[QuarantinedOp]) -> Any:
    columns = ("id", "kind", "tier", ">size", "since (UTC)", "reason")
    rows = ((each.object_id, each.kind, each.tier, each.size, _told(each)["since"], each.reason) for each in found)
    return table(columns, rows)


def _missing(ids: Sequence[str], held: set[str]) -> list[str]:
    return [object_id for object_id in dict.fromkeys(map(check_id, ids)) if object_id not in held]


def _nothing(call: Call, ids: Sequence[str]) -> Exit:
    """Nothing of the kind: and then nothing was done to the others either."""
    if call.out.as_json:
        call.out.show({"not_quarantined": list(ids)})
    else:
        for object_id in ids:
            sys.stderr.write(f"sync-engine: {one_line(object_id)}: nothing of it is quarantined\n")
    return Exit.NO
