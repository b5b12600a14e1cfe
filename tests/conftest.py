"""What every test of this suite shares. The fixtures themselves are public: `sync_engine.testing.fixtures`."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# Its asserts are then explained like those of a test file; it has to be said before anything imports it.
pytest.register_assert_rewrite("sync_engine.testing.contract")

pytest_plugins = ["sync_engine.testing.fixtures"]

HERE = Path(__file__).parent

# No deadline: the machine is shared, and how long an example takes is a question for bench/. The fixtures that
# properties use (a server, a fresh prefix) are safe to share between examples.
settings.register_profile(
    "suite", deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
)
settings.register_profile("quick", parent=settings.get_profile("suite"), max_examples=20)
settings.register_profile("deep", parent=settings.get_profile("suite"), max_examples=5_000)
settings.load_profile("suite")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything under tests/crash kills something and carries the mark that says so."""
    for item in items:
        if item.path.is_relative_to(HERE / "crash"):
            item.add_marker(pytest.mark.crash)


@pytest.fixture(autouse=True)
def _no_settings_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A developer's own SYNC_ENGINE_* variables must not decide what a test sees."""
    for name in [name for name in os.environ if name.startswith("SYNC_ENGINE_")]:
        monkeypatch.delenv(name)
