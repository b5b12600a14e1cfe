"""What every command shares: its common options, how its failures end, and its exit codes.

A command is a coroutine that is given a ``Call`` and its own options, and returns an exit code.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import os
import sys
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from sync_engine.cli.render import Output, fail, hide, one_line, redacted
from sync_engine.config import SyncEngineConfig
from sync_engine.engine import SyncEngine
from sync_engine.errors import ConfigError, Corruption, InvalidItem, NotJson, SyncEngineError, VersionConflict

__all__ = ["Call", "Exit", "Running", "command", "exit_code", "quiet_log", "sure"]

STOP_TIMEOUT_S = 2.0
"""How long a command that ends waits for tiers that do not answer; what they did not take stays in the log."""


class Exit(IntEnum):
    """What the exit code of a command says. The texts are those of ``sync-engine --help``."""

    OK = 0
    NO = 1  # the item does not exist
    USAGE = 2  # the command line is wrong
    INVALID = 3  # an id, a value or a setting breaks a rule; nothing was written
    UNAVAILABLE = 4  # a tier or the log could not do its part
    CORRUPT = 5  # stored bytes do not match their SHA-256, or the demo's comparison failed
    BUG = 70  # a fault of ours
    INTERRUPTED = 130


def exit_code(error: BaseException) -> Exit:
    """The exit code of a failure."""
    match error:
        case InvalidItem() | ConfigError() | NotJson() | VersionConflict():
            return Exit.INVALID
        case Corruption():
            return Exit.CORRUPT
        case SyncEngineError() | OSError():
            return Exit.UNAVAILABLE
        case KeyboardInterrupt() | asyncio.CancelledError():
            return Exit.INTERRUPTED
        case _:
            return Exit.BUG


ConfigFile = Annotated[
    Path | None, typer.Option("--config", metavar="FILE", help="TOML file with settings.", show_default=False)
]
DataDir = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="Folder of the log and of the default SQLite file.", show_default=False),
]
RedisUrl = Annotated[
    str | None,
    typer.Option(
        metavar="URL",
        help="redis://, rediss://, unix:// or embedded://; 'none': no Redis. Other users of this machine can read "
        "arguments: SYNC_ENGINE_REDIS_URL is the safer place for a password.",
        show_default=False,
    ),
]
SqlUrl = Annotated[
    str | None,
    typer.Option(
        metavar="URL",
        help="sqlite:///path, mysql://…, postgresql://…; 'none': no SQL. "
        "SYNC_ENGINE_SQL_URL is the safer place for a password.",
        show_default=False,
    ),
]
Prefix = Annotated[
    str | None,
    typer.Option(metavar="TEXT", help="Put before every Redis key; end it with a colon.", show_default=False),
]
AsJson = Annotated[bool, typer.Option("--json", help="Answer with one JSON document.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of a failure.")]


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a command: what it was told of the stores, and where its answer goes."""

    config_file: Path | None
    settings: dict[str, object]
    out: Output
    debug: bool

    def config(self) -> SyncEngineConfig:
        """The settings: options win over ``SYNC_ENGINE_*``, those over the file. Raises ``ConfigError``."""
        if self.config_file is not None:
            config = SyncEngineConfig.from_toml(self.config_file, **self.settings)
        else:
            config = SyncEngineConfig(**self.settings)
        for url in (config.redis_url, config.sql_url):
            hide(url.get_secret_value() if url is not None else None)
        return config


class Running:
    """A started engine for one command; what it could not hand to a tier when it ends is told on stderr."""

    def __init__(self, config: SyncEngineConfig) -> None:
        self._engine = SyncEngine(config)

    async def __aenter__(self) -> SyncEngine:
        await self._engine.start()
        return self._engine

    async def __aexit__(self, *_: object) -> None:
        report = await self._engine.stop(timeout=STOP_TIMEOUT_S)
        if report.left_in_log:
            logging.getLogger(__name__).warning(
                "%d operations are in the log and not yet in every tier; the next start takes them up",
                report.left_in_log,
            )
        if report.lost:
            logging.getLogger(__name__).error("%d cache-only operations were lost: Redis took none", report.lost)


def command(app: typer.Typer, name: str, **more: Any) -> Callable[[Callable[..., Coroutine[Any, Any, Exit]]], None]:
    """Register a coroutine as a command that has the common options beside its own."""

    def register(body: Callable[..., Coroutine[Any, Any, Exit]]) -> None:
        def run(**values: Any) -> None:
            call = _call(**{option: values.pop(option) for option in common})
            raise typer.Exit(_run(body(call, **values), call.debug))

        own = [*inspect.signature(body, eval_str=True).parameters.values()][1:]
        shared = [*inspect.signature(_call, eval_str=True).parameters.values()]
        common = [parameter.name for parameter in shared]
        parameters = [each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in (*own, *shared)]
        # typer reads both: the names and defaults from the one, the types from the other.
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # inspect looks for it
        run.__annotations__ = {each.name: each.annotation for each in parameters}
        run.__doc__ = body.__doc__
        app.command(name, **more)(run)

    return register


def sure(yes: bool, question: str) -> None:
    """Ask at a terminal unless it was said; elsewhere it has to be said."""
    if yes:
        return
    if not at_a_terminal():
        raise typer.BadParameter("this cannot be undone: say --yes")
    typer.confirm(one_line(question), abort=True, err=True)


def at_a_terminal() -> bool:
    """Whether somebody can answer a question."""
    return sys.stdin.isatty()


def quiet_log(debug: bool) -> None:
    """Send warnings of the library to stderr, a line each; tracebacks only with ``debug``."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_OneLine(debug))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)


def _call(
    config: ConfigFile = None,
    data_dir: DataDir = None,
    redis_url: RedisUrl = None,
    sql_url: SqlUrl = None,
    prefix: Prefix = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> Call:
    quiet_log(debug)
    for url in (redis_url, sql_url, os.environ.get("SYNC_ENGINE_REDIS_URL"), os.environ.get("SYNC_ENGINE_SQL_URL")):
        hide(url)
    told = {"data_dir": data_dir, "redis_url": redis_url, "sql_url": sql_url, "redis_prefix": prefix}
    settings: dict[str, object] = {field: value for field, value in told.items() if value is not None}
    for field in ("redis_url", "sql_url"):
        if settings.get(field) == "none":
            settings[field] = None
    return Call(config, settings, Output(as_json), debug)


def _run(work: Coroutine[Any, Any, Exit], debug: bool) -> Exit:
    try:
        return asyncio.run(work)
    except BrokenPipeError:
        # Whoever read our output has enough (`sync-engine scan x | head`); Python's own flush at exit must not fail.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return Exit.OK
    except (typer.BadParameter, typer.Abort):
        raise
    except (Exception, KeyboardInterrupt, asyncio.CancelledError) as error:  # noqa: BLE001  # the edge: told below
        fail(error, debug=debug, ours=exit_code(error) is Exit.BUG)
        return exit_code(error)


class _OneLine(logging.Formatter):
    """``sync-engine: warning: text``."""

    def __init__(self, debug: bool) -> None:
        super().__init__()
        self._debug = debug

    def format(self, record: logging.LogRecord) -> str:
        if self._debug:
            return redacted(super().format(record))
        return one_line(f"sync-engine: {record.levelname.lower()}: {record.getMessage()}")
