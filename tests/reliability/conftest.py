"""What the long tests share: how long they are, and the figures that they end with."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.harness import commit, machine

_FIGURES = pytest.StashKey[list[tuple[str, object, str]]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("reliability")
    group.addoption(
        "--share", type=float, default=1.0, help="of the whole length of soak and fuzz tests"
    )
    group.addoption("--figures", type=Path, help="write the figures of these tests to a JSON file")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_FIGURES] = []


@pytest.fixture
def scaled(pytestconfig: pytest.Config) -> Callable[[int], int]:
    """Call with the count of a whole run; the count of this one."""
    share = pytestconfig.getoption("--share", 1.0)  # there if the folder is named in the call
    return lambda count: max(1, math.ceil(count * share))


@pytest.fixture
def figure(pytestconfig: pytest.Config) -> Callable[[str, object, str], None]:
    """Call with a name, a value and what it means; shown at the end."""
    found = pytestconfig.stash[_FIGURES]
    return lambda name, value, detail: found.append((name, value, detail))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    config = terminalreporter.config
    found = config.stash.get(_FIGURES, [])
    if found:
        terminalreporter.section("figures")
        width = max(len(name) for name, *_ in found)
        for name, value, detail in found:
            terminalreporter.line(f"{name:{width}}  {value}  {detail}")
    if path := config.getoption("--figures", None):
        rows = [{"name": name, "value": value, "detail": detail} for name, value, detail in found]
        run = {"share": config.getoption("--share"), "commit": commit(), "machine": machine()}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({**run, "rows": rows}, indent=2) + "\n")
