"""Options of `pytest benchmarks --benchmark-only`; pytest.ini beside this file loads it as a plugin."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("calm_fast benchmarks")
    group.addoption("--suite", choices=("quick", "full"), default="quick", help="quick, or more cases and baselines")
    group.addoption("--bench-device", choices=("auto", "cpu", "cuda"), default="auto", help="where to measure")
    group.addoption(
        "--memory", choices=("kept", "system"),
        help="keep the CPU memory that a call releases for the next call, or return it to the system (default: kept "
        "where the C library is glibc)",
    )  # fmt: skip
    group.addoption("--threads", type=int, default=1, help="CPU threads of torch (default: 1)")


def pytest_configure(config: pytest.Config) -> None:
    # the project disables benchmarks by default; --benchmark-only asks for them
    if config.getoption("benchmark_only", False):
        config.option.benchmark_enable = True
