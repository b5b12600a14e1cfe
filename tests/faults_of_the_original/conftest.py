"""The fixture of the regression tests."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from ..flows.rig import Rig, hurry_retries


@pytest.fixture
async def rig(tmp_path: Path, redis_url: str, redis_prefix: str, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Rig]:
    """A folder, a prefix, and engines on them; stops what the test left running."""
    hurry_retries(monkeypatch)
    made = Rig(tmp_path, redis_url, redis_prefix)
    yield made
    await made.close()
