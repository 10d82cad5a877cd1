"""Counts the trials of every family; see trials.py."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path

import pytest

OUTCOMES: dict[str, dict[str, int]] = defaultdict(lambda: {"tried": 0, "survived": 0, "did not come about": 0})


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]):
    report = (yield).get_result()
    mark = item.get_closest_marker("fault")
    if mark is None:
        return
    outcomes = OUTCOMES[mark.args[0]]
    if report.skipped and report.when in ("setup", "call"):
        outcomes["did not come about"] += 1
    elif report.when == "call" or (report.when == "setup" and report.failed):
        count = dict(item.user_properties).get("trials", 1)
        assert isinstance(count, int)
        outcomes["tried"] += count
        outcomes["survived"] += count * report.passed


def pytest_sessionfinish(session: pytest.Session) -> None:
    if (file := session.config.getoption("--faults-json")) is not None:
        Path(file).write_text(json.dumps(OUTCOMES, indent=1) + "\n")
