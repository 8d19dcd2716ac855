"""Compile candidate launches without a GPU, exactly as they would run, and read their machine code.

The launcher is called with meta tensors, and each kernel is compiled for an architecture instead of started. On a
machine with a GPU this fills Triton's cache from several processes, so that the timed launches find their kernels.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch

from calm_fast.benchmarks.machine_code import Facts, hard_problems, read_facts
from calm_fast.benchmarks.tune_problems import Problem, problems
from calm_fast.core.launch_config import LaunchConfig

_MULTIPROCESSORS = 132  # of the absent GPU; only launch grids depend on it


class _Offline:
    """Answers the questions that Triton asks its driver when it compiles without launching."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def _start() -> None:
    """Clear Triton's settings in a fresh process: kernels are compiled, whatever the caller's settings are."""
    if any(name.startswith("calm_fast.kernels.") for name in sys.modules):
        raise RuntimeError("kernels were imported before Triton's settings could be cleared")
    for name in ("TRITON_INTERPRET", "TRITON_PTXAS_PATH"):
        os.environ.pop(name, None)


@contextmanager
def compiling(arch: int) -> Iterator[list[tuple[Any, LaunchConfig]]]:
    """Make launchers compile for sm_<arch> and start nothing; yields the list of (kernel, its config).

    Use it in a process of its own: Triton keeps the stand-in for its driver.
    """
    from triton.runtime import driver

    from calm_fast.kernels.common import hardware, launching

    found: list[tuple[Any, LaunchConfig]] = []

    def launch(
        kernel: Any, programs: int, device: torch.device, config: LaunchConfig, /, *args: Any, **named: Any
    ) -> None:
        options = {"num_warps": config.num_warps, "num_stages": config.num_stages, "enable_fp_fusion": True}
        found.append((kernel.warmup(*args, grid=(programs,), **named, **options), config))

    def gpu(device: torch.device) -> hardware.Gpu:
        return hardware.Gpu("none", arch, _MULTIPROCESSORS)

    replaced = {"launch": launch, "gpu": gpu}
    originals = {"launch": launching.launch, "gpu": hardware.gpu}
    modules = [module for name, module in list(sys.modules.items()) if name.startswith("calm_fast.kernels.")]
    places = [
        (module, name) for module in modules for name in replaced if getattr(module, name, None) is originals[name]
    ]
    driver.set_active(_Offline(arch))
    try:
        for module, name in places:
            setattr(module, name, replaced[name])
        yield found
    finally:
        for module, name in places:
            setattr(module, name, originals[name])


def compiled_facts(problem: Problem, config: LaunchConfig, arch: int) -> list[tuple[Facts, LaunchConfig]]:
    """Return the facts of every kernel that the problem starts with `config`, each with the kernel's own config."""
    importlib.import_module(f"calm_fast.kernels.{problem.op}.launch")  # before `compiling` replaces its functions
    with compiling(arch) as found:
        problem.prepare(torch.device("meta"))(config)
    return [
        (
            read_facts(kernel.asm["cubin"], arch, kernel.metadata.shared, kernel.metadata.tmem_size or 0),
            own,
        )
        for kernel, own in found
    ]


def examine(op: str, index: int, config: LaunchConfig, arch: int) -> list[str]:
    """Return the faults of a candidate of the op's problem number `index`; [] if it is worth timing."""
    problem = problems((op,))[index]
    try:
        found = compiled_facts(problem, config, arch)
    except Exception as failure:  # noqa: BLE001 - a candidate that does not compile is an answer
        return [f"does not compile: {type(failure).__name__}: {str(failure).strip()[-200:]}"]
    expected = "warp" if problem.matrix else False
    # by identity: the other kernels of the launch chose their own configs, which may be equal
    return sorted({text for facts, own in found if own is config for text in hard_problems(facts, expected)})


class Screen:
    """Compiles candidates in other processes; `problems_of` waits for one answer."""

    def __init__(self, arch: int, processes: int) -> None:
        self.arch = arch
        context = multiprocessing.get_context("spawn")
        self._pool = ProcessPoolExecutor(processes, mp_context=context, initializer=_start)
        self._answers: dict[tuple[str, int, LaunchConfig], Future[list[str]]] = {}

    def submit(self, op: str, index: int, config: LaunchConfig) -> None:
        self._answers[op, index, config] = self._pool.submit(examine, op, index, config, self.arch)

    def problems_of(self, op: str, index: int, config: LaunchConfig, timeout: float | None = None) -> list[str]:
        """Return the faults of a submitted candidate. Raises TimeoutError after `timeout` seconds without an answer."""
        return self._answers[op, index, config].result(timeout)

    def close(self) -> None:
        """Cancel the compilations that have not begun."""
        self._pool.shutdown(wait=False, cancel_futures=True)
