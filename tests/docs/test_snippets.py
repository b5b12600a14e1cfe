"""Runs the examples of README.md and docs/: one test per block.

- A ``python`` block runs in an empty folder; ``await``, ``async with`` and ``async for`` may stand at its top.
- In a ``console`` block, every command that begins with ``sync-engine``, or pipes into it, runs in bash, in one empty
  folder per block, and must exit with 0. The output shown is compared where ``<!-- output compared -->`` stands above.
- ``<!-- not executed: reason -->`` above a block leaves it out.
"""

from __future__ import annotations

import ast
import asyncio
import inspect
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import CodeType

import pytest

ROOT = Path(__file__).resolve().parents[2]
FENCE = re.compile(r"(?P<indent> *)(?P<ticks>`{3,}|~{3,})(?P<language>[\w-]*)")
NOT_EXECUTED = re.compile(r"<!-- not executed: \S.*-->")
COMPARED = "<!-- output compared -->"
COMMAND = re.compile(r"(^|\| *)sync-engine\b")
COMMAND_TIMEOUT_S = 100


@dataclass(frozen=True)
class Block:
    """One fenced block: where its first line of code stands, and the line above its fence."""

    document: str
    line: int
    language: str
    text: str
    above: str

    def __str__(self) -> str:
        return f"{self.document}:{self.line}"


def blocks_of(document: str, text: str) -> list[Block]:
    """The fenced blocks of a Markdown text. A fence that is never closed is an error."""
    found: list[Block] = []
    above, opened, start, body = "", None, 0, []
    for number, line in enumerate(text.splitlines(), 1):
        if opened is None:
            if opened := FENCE.match(line):
                start, body = number + 1, []
            elif line.strip():
                above = line.strip()
        elif line.strip().startswith(opened["ticks"]) and not line.strip().strip(opened["ticks"][0]):
            code = "".join(f"{row.removeprefix(opened['indent'])}\n" for row in body)
            found.append(Block(document, start, opened["language"], code, above))
            above, opened = "", None
        else:
            body.append(line)
    if opened is not None:
        raise ValueError(f"{document}:{start - 1}: this fence is never closed")
    return found


def executed() -> list[Block]:
    """Every block of the documents that is to be run."""
    documents = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    blocks = [
        block
        for document in documents
        if document.is_file()
        for block in blocks_of(str(document.relative_to(ROOT)), document.read_text(encoding="utf-8"))
    ]
    return [block for block in blocks if not NOT_EXECUTED.fullmatch(block.above)]


def commands_of(block: Block) -> list[tuple[str, str]]:
    """The sync-engine commands of a console block, each with the output shown below it."""
    found: list[tuple[str, str]] = []
    lines = iter(block.text.splitlines())
    for line in lines:
        if line.startswith("$ "):
            while line.endswith("\\"):
                line += "\n" + next(lines)
            found.append((line.removeprefix("$ "), ""))
        elif found:
            found[-1] = (found[-1][0], found[-1][1] + line + "\n")
    return [(command, shown) for command, shown in found if COMMAND.search(command)]


PYTHON = [block for block in executed() if block.language == "python"]
CONSOLE = [block for block in executed() if block.language == "console" and commands_of(block)]


@pytest.mark.parametrize("block", PYTHON, ids=str)
def test_a_python_example_runs(block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run(compiled(block))


@pytest.mark.parametrize("block", CONSOLE, ids=str)
def test_a_console_example_succeeds(block: Block, tmp_path: Path) -> None:
    command = tmp_path / "bin" / "sync-engine"
    command.parent.mkdir()
    # This tree and this interpreter, whatever sync-engine may be installed elsewhere.
    start = f"import sys; sys.argv[0] = 'sync-engine'; sys.path.insert(0, {str(ROOT / 'src')!r}); "
    start += "from sync_engine.cli import main; main()"
    command.write_text(f'#!/bin/sh\nexec {shlex.join([sys.executable, "-c", start])} "$@"\n')
    command.chmod(0o755)
    folder = tmp_path / "folder"
    folder.mkdir()
    # Empty home, plain and wide output: what a reader sees must not depend on who runs it.
    environment = {
        "HOME": str(folder), "PATH": f"{command.parent}:{os.environ['PATH']}", "LANG": "C.UTF-8", "TERM": "dumb",
        "COLUMNS": "100", "NO_COLOR": "1",
    }  # fmt: skip
    for line, shown in commands_of(block):
        ran = subprocess.run(
            ["bash", "-o", "pipefail", "-c", line],
            cwd=folder, env=environment, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S, check=False,
        )  # fmt: skip
        assert ran.returncode == 0, f"{block}: {line}\nexited with {ran.returncode}\n{ran.stdout}{ran.stderr}"
        if block.above == COMPARED:
            assert ran.stdout.rstrip() == shown.rstrip(), f"{block}: {line}"


def test_a_block_knows_its_place_its_language_and_the_line_above() -> None:
    found = blocks_of("x.md", "a\n\n<!-- not executed: needs a server -->\n```python\nb = 1\n```\n\n```\nplain\n```\n")
    assert found == [
        Block("x.md", 5, "python", "b = 1\n", "<!-- not executed: needs a server -->"),
        Block("x.md", 9, "", "plain\n", ""),
    ]


def test_a_fence_that_is_never_closed_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"^x\.md:1: "):
        blocks_of("x.md", "```python\n1\n")


def test_a_failing_example_fails_at_its_line_in_the_document() -> None:
    block = Block("x.md", 7, "python", "import asyncio\nawait asyncio.sleep(0)\nassert 1 == 2\n", "")
    with pytest.raises(AssertionError) as failure:
        run(compiled(block))
    assert (failure.traceback[-1].frame.code.raw.co_filename, failure.traceback[-1].lineno) == (str(ROOT / "x.md"), 8)


def test_commands_and_the_output_shown_below_them_belong_together() -> None:
    text = "$ sync-engine get a\n1\n2\n$ ls\nb\n$ sync-engine put \\\n  c\n$ cat | sync-engine put d\n$ ls sync-engine"
    assert commands_of(Block("x.md", 1, "console", text, "")) == [
        ("sync-engine get a", "1\n2\n"),
        ("sync-engine put \\\n  c", ""),
        ("cat | sync-engine put d", ""),
    ]


def compiled(block: Block) -> CodeType:
    """The code of a block, with the line numbers of its document."""
    code = compile(
        "\n" * (block.line - 1) + block.text,
        str(ROOT / block.document),
        "exec",
        flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT,
        dont_inherit=True,
    )
    assert isinstance(code, CodeType)
    return code


def run(code: CodeType) -> None:
    """Run a block as a main program of its own would."""
    names: dict[str, object] = {"__name__": "__main__"}
    if not code.co_flags & inspect.CO_COROUTINE:
        exec(code, names)  # noqa: S102 - running the documentation is what this file is for
        return

    async def main() -> None:
        await eval(code, names)  # noqa: S307 - the same, for code with a top-level await

    asyncio.run(main())
