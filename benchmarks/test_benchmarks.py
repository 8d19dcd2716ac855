"""Every case of the registry through pytest-benchmark: `pytest benchmarks --benchmark-only`.

One test for each contestant of each case, grouped by case. A contestant with wrong values fails before it is timed;
one that this machine cannot run is skipped with the reason. pytest-benchmark times contestants one after another. For
ratios that hold on a shared machine use `calm-fast bench`, which interleaves them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from calm_fast.benchmarks import machine, memory
from calm_fast.benchmarks.measure import Ready, Setting, ready
from calm_fast.benchmarks.registry import REGISTRY, Case, cases
from calm_fast.benchmarks.timing import Budget


def _device(config: pytest.Config) -> torch.device:
    wanted = config.getoption("--bench-device", "auto")
    if wanted == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError(f"--bench-device cuda: torch {torch.__version__} sees no GPU")
    return torch.device("cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    device, suite = _device(metafunc.config), metafunc.config.getoption("--suite", "quick")
    found = [case for op in REGISTRY for case in cases(op, device, suite)]
    each = [
        pytest.param(case, contestant.name, id=f"{case.name}-{contestant.name}")
        for case in found
        for contestant in case.contestants
    ]
    metafunc.parametrize(("case", "impl"), each)


@dataclass
class Preparation:
    """Checks a case and gets it ready; keeps the latest one, so that its contestants share inputs."""

    setting: Setting
    latest: tuple[str, Ready] | None = None

    def __call__(self, case: Case) -> Ready:
        if self.latest is None or self.latest[0] != case.name:
            self.latest = None  # release its inputs first
            self.latest = case.name, ready(case, self.setting)
        return self.latest[1]


@pytest.fixture(scope="module")
def prepared(request: pytest.FixtureRequest) -> Iterator[Preparation]:
    """Return prepared(case), which checks a case and gets it ready to be timed."""
    threads = torch.get_num_threads()
    torch.set_num_threads(request.config.getoption("--threads", 1))
    device = _device(request.config)
    name = machine.device_name(device, memory.settle(device, request.config.getoption("--memory", None)))
    yield Preparation(Setting(device, name, machine.versions(), machine.commit(), Budget()))
    torch.set_num_threads(threads)


def test_case(case: Case, impl: str, prepared: Preparation, benchmark: Any) -> None:
    """Fail on wrong values, then time."""
    found = prepared(case)
    if (failure := found.failures.get(impl)) is not None:
        if failure.startswith("cannot run"):
            pytest.skip(failure)
        pytest.fail(failure, pytrace=False)
    thunk, device = found.thunks[impl], prepared.setting.device
    benchmark.group = f"{case.name}: {', '.join(f'{name} {size}' for name, size in case.shape.items())}"
    benchmark.extra_info.update(
        op=case.op, case=case.name, impl=impl, device=prepared.setting.device_name, commit=prepared.setting.commit,
        flops=case.flops, bytes=case.bytes, peak_bytes=found.peaks[impl], error=found.verdicts[impl].error,
    )  # fmt: skip

    def call() -> None:
        thunk()
        if device.type == "cuda":
            torch.cuda.synchronize()

    benchmark(call)
