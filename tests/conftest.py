"""Shared test set-up: the device of the kernels, the number of threads, the tests that need a GPU.

Environment variables are set here, before anything imports torch or Triton: Triton reads TRITON_INTERPRET when a
kernel is decorated, and OpenMP reads OMP_NUM_THREADS when it is loaded.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"  # two workers on two cores; subprocesses of tests inherit it
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

sys.path.append(str(Path(__file__).parent / "processes"))

import pytest
import torch
from forked import ForkServer

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU and os.environ.get("TRITON_INTERPRET") != "1":
    if "triton" in sys.modules:
        raise RuntimeError("Triton was imported before tests/conftest.py could turn its interpreter on")
    os.environ["TRITON_INTERPRET"] = "1"
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)

ROOT = Path(__file__).resolve().parents[1]
NO_GPU_REASON = f"needs a CUDA GPU: torch {torch.__version__} sees none"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--lane", help="run the compiled library and `auto` as on a CPU that ends at this SIMD lane: avx2")
    parser.addoption("--record-integrations", action="store_true", help="write tests/integration/versions.json")


def pytest_configure(config: pytest.Config) -> None:
    _limit_lane(config)  # before test modules ask for the best lane


def _limit_lane(config: pytest.Config) -> None:
    if lane := config.getoption("lane"):
        from calm_fast.core import native_library

        try:
            native_library.limit_lane(lane)
        except (ValueError, RuntimeError) as problem:
            raise pytest.UsageError(f"--lane: {problem}") from None
        info = native_library.build_info()["_cpu"]
        if isinstance(info, dict) and info["best lane here"] != lane:
            raise pytest.UsageError(f"--lane {lane}: the best lane of this CPU is {info['best lane here']}")


def pytest_report_header(config: pytest.Config) -> str:
    where = torch.cuda.get_device_name() if HAS_GPU else "CPU, Triton kernels in the interpreter"
    return f"calm_fast: torch {torch.__version__}, {torch.get_num_threads()} torch threads, {where}"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if HAS_GPU:
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason=NO_GPU_REASON))


@pytest.fixture(autouse=True)
def _lane(request: pytest.FixtureRequest) -> None:
    _limit_lane(request.config)  # a test that lifts its own limit lifts this one too


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


# prefixes of messages that another package causes itself
_CAUSED_ELSEWHERE = ("Passing `generation_config` together with",)  # transformers' own assisted generation


class _Deprecations(logging.Handler):
    """Keeps the deprecations that transformers logs. (Its warnings are errors by pyproject.toml.)"""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if "deprecated" in message and not message.startswith(_CAUSED_ELSEWHERE):
            self.messages.append(message)


_DEPRECATIONS = _Deprecations()
logging.getLogger("transformers").addHandler(_DEPRECATIONS)


@pytest.fixture(autouse=True)
def _no_deprecated_names(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail a test in which transformers logs a deprecation, unless it uses an old name deliberately."""
    if "transformers" in sys.modules:
        from transformers.utils.logging import warning_once

        warning_once.cache_clear()  # otherwise only the first test to cause a message would see it
    _DEPRECATIONS.messages.clear()
    yield
    if request.node.get_closest_marker("old_names") is None:
        assert not _DEPRECATIONS.messages, f"transformers logged: {_DEPRECATIONS.messages}"


@pytest.fixture(scope="session")
def kernel_device() -> torch.device:
    """Return the device of Triton kernels in this session: the GPU, or the CPU in the interpreter."""
    return torch.device("cuda" if HAS_GPU else "cpu")


@pytest.fixture(scope="session")
def forked() -> Iterator[ForkServer]:
    """Return what runs Python programs without importing torch and transformers each time (tests/processes)."""
    server = ForkServer()
    yield server
    server.close()


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Return the folder of real data beside the checkout; tests that use it skip if it is absent."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("no real data: ../shared/data is absent beside the checkout")
    return folder
