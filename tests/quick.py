"""``pytest --quick``: of every test the first case, without the tests that `slow.txt` lists.

``pytest --note-slow`` writes that list anew.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

SLOW = Path(__file__).parent / "slow.txt"
# processor time of a first case from which a test is slow
SLOW_S = 1.0
_SPENT = "processor_s"
_FIRST = pytest.StashKey[bool]()
_BEGAN = pytest.StashKey[float]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("actckpt")
    group.addoption("--quick", action="store_true", help="the first case of tests that are quick")
    group.addoption("--note-slow", action="store_true", help=f"write {SLOW.name} anew")


def name_of(nodeid: str) -> str:
    """A test without its parameters: ``test_file.py::test_name``."""
    return nodeid.partition("[")[0].removeprefix("tests/")


def slow_tests() -> list[str]:
    """The names in `slow.txt`."""
    return SLOW.read_text(encoding="utf-8").split()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tells first cases from others, and leaves out what is not quick."""
    firsts: dict[str, pytest.Item] = {}
    for item in items:
        item.stash[_FIRST] = firsts.setdefault(name_of(item.nodeid), item) is item
    if not config.getoption("quick"):
        return
    for name in slow_tests():
        firsts.pop(name, None)
    config.hook.pytest_deselected(items=[i for i in items if i not in firsts.values()])
    items[:] = firsts.values()


def _processor_s() -> float:
    """Seconds of the processor so far, those of ended children included."""
    return sum(os.times()[:4])


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    item.stash[_BEGAN] = _processor_s()
    yield


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    """Has a test's report say how long it took, its fixtures included."""
    if call.when == "call" and item.stash[_FIRST]:
        item.user_properties.append((_SPENT, _processor_s() - item.stash[_BEGAN]))
    yield


class Noted:
    """Where the reports of all processes arrive: writes the list of slow tests."""

    def __init__(self) -> None:
        self._spent_s: dict[str, float] = {}

    def pytest_runtest_logreport(self, report: Any) -> None:
        spent_s = dict(report.user_properties).get(_SPENT)
        if report.when == "call" and spent_s is not None:
            self._spent_s[name_of(report.nodeid)] = spent_s

    def pytest_sessionfinish(self) -> None:
        slow = sorted(name for name, spent_s in self._spent_s.items() if spent_s >= SLOW_S)
        SLOW.write_text("".join(f"{name}\n" for name in slow), encoding="utf-8")


def note_slow(config: pytest.Config) -> None:
    """Has the list written, if it was asked for: by the process that hears of all tests."""
    if config.getoption("note_slow") and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Noted())
