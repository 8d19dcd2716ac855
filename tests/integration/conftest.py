"""Tests with other tools: a missing tool skips its tests, unless CALM_FAST_INTEGRATIONS=1 says it must be there.

``pytest tests/integration --record-integrations`` writes the versions that the tests passed with into versions.json
(tools/integrations.py makes docs/integrations.md of it).
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import sys
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[2]
FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER))  # modules that several tests share, under --import-mode=importlib
MISSING = re.compile(r"could not import|has __version__")  # what pytest.importorskip says
REQUIRED = os.environ.get("CALM_FAST_INTEGRATIONS") == "1"
ASK = "CALM_FAST_INTEGRATIONS=1 asks for every library of the extra `integrations`: make integrations installs them"

# tests of this session by "file::function": the tools named by their marks, and whether all of their cases passed
_tools: dict[str, set[str]] = {}
_passed: dict[str, bool] = {}


def _missing(report: pytest.CollectReport | pytest.TestReport) -> str:
    """Return the reason of a skip for want of a library, or ""."""
    if report.outcome != "skipped" or not isinstance(report.longrepr, tuple):
        return ""
    reason = str(report.longrepr[2])
    return reason if MISSING.search(reason) else ""


def _own(node: pytest.Item | pytest.Collector) -> bool:
    return FOLDER in node.path.parents


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    if REQUIRED and _own(collector) and (reason := _missing(report)):
        report.outcome, report.longrepr = "failed", f"{reason}\n{ASK}"
    return report


def _test(item: pytest.Item) -> str:
    function = getattr(item, "originalname", None) or item.name
    return f"{item.path.relative_to(ROOT).as_posix()}::{function}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if not _own(item):
        return report
    if REQUIRED and (reason := _missing(report)):
        report.outcome, report.longrepr = "failed", f"{reason}\n{ASK}"
    report.user_properties.append(("integration", (_test(item), *_named(item))))
    return report


def _named(item: pytest.Item) -> list[str]:
    return [str(mark.kwargs.get("tool")) for mark in item.iter_markers("integration")]


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Collect outcomes where the reports of all workers arrive."""
    for name, value in report.user_properties:
        if name != "integration":
            continue
        test, *tools = value  # type: ignore[misc]  # user_properties hold objects
        _tools.setdefault(test, set()).update(tools)
        good = report.outcome == "passed"
        _passed[test] = _passed.get(test, True) and good


def pytest_sessionfinish(session: pytest.Session) -> None:
    if not session.config.getoption("record_integrations") or hasattr(session.config, "workerinput"):
        return
    if not (ROOT / "tools").is_dir():
        raise pytest.UsageError("--record-integrations needs the checkout: the folder tools is not beside the tests")
    sys.path.insert(0, str(ROOT))
    from tools import integrations

    found = {
        canonicalize_name(d.metadata["Name"]): Version(d.version).public for d in importlib.metadata.distributions()
    }
    integrations.record({test: sorted(tools) for test, tools in _tools.items() if tools and _passed[test]}, found)


@pytest.fixture(scope="module")
def composed(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A tiny composition that is served, and its tokenizer."""
    from served import composition

    return composition(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="module")
def url(composed: Any) -> Iterator[str]:
    """Where it is served."""
    from served import running

    with running(*composed) as url:
        yield url
