"""How the command line speaks: tables or one JSON document on stdout, one line per failure on stderr.

Ids and contents come from strangers: on a terminal nothing of them is taken for markup or control codes.
Passwords in URLs never leave, whatever a message quotes.
"""

from __future__ import annotations

import base64
import re
import sys
import traceback
from collections.abc import Iterable, Sequence
from typing import Any
from urllib.parse import unquote

import orjson
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from sync_engine.item import ContentType, SyncItem

__all__ = ["Output", "fact_sheet", "fail", "full", "hide", "one_line", "redacted", "table", "visible"]

_USER_INFO = re.compile(r"(?<=://)[^\n]*@")
"""What stands before the host of a URL, up to the last @: a password may hold anything that nobody escaped."""
_HIDDEN_CHARS_MIN = 3
_hidden: set[str] = set()
"""Parts of the URLs that this process was given: a driver may quote a piece of one, without its scheme."""


_PIPE_WIDTH = 1_000


class Output:
    """Where a command's answer goes: ``--json`` prints the document, otherwise the tables are shown."""

    def __init__(self, as_json: bool) -> None:
        self.as_json = as_json
        # In a file or a pipe a row stays one line.
        width = None if sys.stdout.isatty() else _PIPE_WIDTH
        self.console = _Console(highlight=False, markup=False, emoji=False, width=width)

    def show(self, document: object, *human: Table | str) -> None:
        """Print the document, or else what a person reads."""
        if self.as_json:
            self.raw(orjson.dumps(document, option=orjson.OPT_APPEND_NEWLINE))
            return
        for each in human:
            self.console.print(each)

    def raw(self, content: bytes) -> None:
        """Bytes as they are."""
        sys.stdout.buffer.write(content)
        sys.stdout.buffer.flush()


class _Console(Console):
    """rich's console, which leaves it to us what a reader that went away means."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


def table(columns: Sequence[str], rows: Iterable[Sequence[object]], title: str | None = None) -> Table:
    """A table; a column whose name begins with ``>`` is aligned to the right."""
    made = Table(
        title=title, title_justify="left", title_style="bold", header_style="bold", box=box.SIMPLE_HEAD, pad_edge=False
    )
    for column in columns:
        number = column.startswith(">")
        made.add_column(
            column.removeprefix(">"), justify="right" if number else "left", no_wrap=number, overflow="fold"
        )
    for row in rows:
        made.add_row(*(Text(visible(str(cell))) for cell in row))
    return made


def fact_sheet(item: SyncItem) -> dict[str, Any]:
    """Everything about an item except its content, for JSON."""
    return {
        "object_id": item.object_id,
        "content_type": item.content_type.value,
        "size": len(item.content),
        "content_hash": item.content_hash,
        "version": item.version,
        "updated_at": item.updated_at,
        "state": item.state,
        "home_instance_id": item.home_instance_id,
        "trace_parent": item.trace_parent,
        "trace_state": item.trace_state,
        "stamp": item.stamp,
        "expires_at": item.expires_at,
    }


def full(item: SyncItem) -> dict[str, Any]:
    """An item for JSON: ``content`` is the JSON value, in the item's own digits, or ``content_base64`` its bytes."""
    if item.content_type is ContentType.JSON:
        return fact_sheet(item) | {"content": orjson.Fragment(item.content)}
    return fact_sheet(item) | {"content_base64": base64.b64encode(item.content).decode("ascii")}


def visible(text: str) -> str:
    """The text with every character that a terminal would obey, or hide, written as an escape."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


def hide(url: str | None) -> None:
    """Keep the user and password of this URL out of everything that ``redacted`` sees from now on."""
    user_info, at, _ = (url or "").partition("://")[2].rpartition("@")
    if at:
        password = user_info.partition(":")[2]
        _hidden.update(part for part in (user_info, password, unquote(password)) if len(part) >= _HIDDEN_CHARS_MIN)


def redacted(text: str) -> str:
    """The text without the user and password of any URL in it."""
    text = _USER_INFO.sub("***@", text)
    for part in sorted(_hidden, key=len, reverse=True):
        text = text.replace(part, "***")
    return text


def one_line(text: str) -> str:
    """The text as one printable line without passwords."""
    return visible(" | ".join(redacted(text).splitlines()))


def fail(error: BaseException, *, debug: bool, ours: bool = False) -> None:
    """Tell a failure on stderr: one line, or with ``debug`` the whole traceback."""
    if debug:
        sys.stderr.write(redacted("".join(traceback.format_exception(error))))
        return
    text = str(error) or type(error).__name__
    if isinstance(error, KeyboardInterrupt):
        text = "interrupted"
    elif ours:
        text = f"internal error: {type(error).__name__}: {text} (--debug shows where)"
    sys.stderr.write(f"sync-engine: {one_line(text)}\n")
