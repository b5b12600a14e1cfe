"""What every test of this suite shares. The fixtures themselves are public: `sync_engine.testing.fixtures`."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from .fault_report import beside, fault_report

# Its asserts are then explained like those of a test file; it has to be said before anything imports it.
pytest.register_assert_rewrite("sync_engine.testing.contract")

pytest_plugins = ["sync_engine.testing.fixtures"]

HERE = Path(__file__).parent

# No deadline: the machine is shared, and how long an example takes is a question for bench/. The fixtures that
# properties use (a server, a fresh prefix) are safe to share between examples.
# Derandomized: `make test` tries the same examples every time and says the same of the same tree. New ones are what
# `--hypothesis-profile deep` is for; what it finds gets a test of its own.
settings.register_profile(
    "suite",
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.register_profile("quick", parent=settings.get_profile("suite"), max_examples=20)
settings.register_profile("deep", parent=settings.get_profile("suite"), max_examples=5_000, derandomize=False)
settings.load_profile("suite")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What a folder says of the tests in it, as a mark; and which of them are for `make faults` alone."""
    for item in items:
        for folder in ("crash", "servers"):
            if item.path.is_relative_to(HERE / folder):
                item.add_marker(folder)
    if not config.getoption("--long"):
        left_out = [item for item in items if item.get_closest_marker("long")]
        items[:] = [item for item in items if not item.get_closest_marker("long")]
        config.hook.pytest_deselected(items=left_out)


def pytest_addoption(parser: pytest.Parser) -> None:
    """``pytest tests/crash --long --fault-report docs/fault-report.md`` is `make faults`."""
    parser.addoption("--seeds", type=int, default=2_000, help="how many seeds tests/simulation runs (default: 2000)")
    parser.addoption("--long", action="store_true", help="run the crash tests over every database in their long form")
    parser.addoption("--fault-report", type=Path, help="write the figures of the crash tests to this Markdown file")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """The crash tests print one line of figures each, which pytest would show for failures alone."""
    reports = [report for outcome in ("passed", "failed") for report in terminalreporter.stats.get(outcome, [])]
    printed = [line for report in reports for line in report.capstdout.splitlines()]
    figures = sorted(line.removeprefix("FIGURES ") for line in printed if line.startswith("FIGURES "))
    if figures:
        terminalreporter.section("faults")
        for line in figures:
            terminalreporter.write_line(line)
    if figures and (path := config.getoption("--fault-report")):
        path.write_text(fault_report(figures, beside(terminalreporter)))


@pytest.fixture(autouse=True)
def _no_settings_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A developer's own SYNC_ENGINE_* variables must not decide what a test sees."""
    for name in [name for name in os.environ if name.startswith("SYNC_ENGINE_")]:
        monkeypatch.delenv(name)
