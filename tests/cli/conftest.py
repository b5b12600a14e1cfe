"""The command line, called in this process: its exit code, its bytes, its words."""

from __future__ import annotations

import io
import logging
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import orjson
import pytest

from sync_engine.cli import main


@dataclass(frozen=True)
class Ran:
    """What one call left behind."""

    code: int
    out: bytes
    err: str

    @property
    def json(self) -> Any:
        return orjson.loads(self.out)


Run = Callable[..., Ran]


@pytest.fixture
def run(capfdbinary: pytest.CaptureFixture[bytes], monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    """``run("get", "a", stdin=b"")``."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level

    def call(*argv: object, stdin: bytes = b"") -> Ran:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        capfdbinary.readouterr()
        with pytest.raises(SystemExit) as ended:
            main([str(each) for each in argv])
        out, err = capfdbinary.readouterr()
        return Ran(int(ended.value.code or 0), out, err.decode())

    yield call
    root.handlers[:], root.level = handlers, level
