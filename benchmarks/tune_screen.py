"""Compile a launch without a GPU, exactly as it would run, and read its machine code: what is worth timing.

The launcher is called with meta tensors; instead of starting, each kernel is compiled for an architecture. On a machine
with a GPU this fills Triton's cache from several processes, so that the launches that are timed find their kernels.
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

_MULTIPROCESSORS = 132  # of the GPU that is not there; only launch grids depend on it


class _Offline:
    """What Triton asks its driver when it compiles without launching."""

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
    """In a fresh process: kernels are compiled, whatever the caller's settings are."""
    if any(name.startswith("calm_fast.kernels.") for name in sys.modules):
        raise RuntimeError("kernels were imported before Triton's settings could be cleared")
    for name in ("TRITON_INTERPRET", "TRITON_PTXAS_PATH"):
        os.environ.pop(name, None)


@contextmanager
def compiling(arch: int) -> Iterator[list[tuple[Any, LaunchConfig]]]:
    """Inside, launchers compile for sm_<arch> and start nothing; yields the list of (kernel, its launch numbers).

    For a process of its own: Triton keeps the stand-in for its driver.
    """
    from triton.runtime import driver

    from calm_fast.kernels.common import launching

    found: list[tuple[Any, LaunchConfig]] = []

    def launch(kernel: Any, programs: int, device: torch.device, config: LaunchConfig, *args: Any, **constant: Any):
        options = {"num_warps": config.num_warps, "num_stages": config.num_stages, "enable_fp_fusion": True}
        found.append((kernel.warmup(*args, grid=(programs,), **constant, **options), config))

    def gpu(device: torch.device) -> launching.Gpu:
        return launching.Gpu("none", arch, _MULTIPROCESSORS)

    replaced = {"launch": launch, "gpu": gpu}
    originals = {name: getattr(launching, name) for name in replaced}
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
    """The machine code of every kernel that a launch of the problem with `config` starts."""
    importlib.import_module(f"calm_fast.kernels.{problem.op}.launch")  # what is replaced must be there
    with compiling(arch) as found:
        problem.prepare(torch.device("meta"))(config)
    return [
        (
            read_facts(
                kernel.asm["cubin"], arch, kernel.metadata.shared, getattr(kernel.metadata, "tmem_size", 0) or 0
            ),
            own,
        )
        for kernel, own in found
    ]


def examine(op: str, index: int, config: LaunchConfig, arch: int) -> list[str]:
    """What is wrong with a candidate of the op's problem number `index`: [] where it is worth timing."""
    problem = problems((op,))[index]
    try:
        found = compiled_facts(problem, config, arch)
    except Exception as failure:  # noqa: BLE001 - a candidate that does not compile is an answer
        return [f"does not compile: {type(failure).__name__}: {str(failure).strip()[-200:]}"]
    expected = "warp" if problem.matrix else False
    # identity: the other kernels of the launch chose theirs themselves, equal ones among them
    return sorted({text for facts, own in found if own is config for text in hard_problems(facts, expected)})


class Screen:
    """Candidates being compiled in other processes: `problems_of` waits for one answer."""

    def __init__(self, arch: int, processes: int) -> None:
        self.arch = arch
        context = multiprocessing.get_context("spawn")
        self._pool = ProcessPoolExecutor(processes, mp_context=context, initializer=_start)
        self._answers: dict[tuple[str, int, LaunchConfig], Future[list[str]]] = {}

    def submit(self, op: str, index: int, config: LaunchConfig) -> None:
        self._answers[op, index, config] = self._pool.submit(examine, op, index, config, self.arch)

    def problems_of(self, op: str, index: int, config: LaunchConfig, timeout: float | None = None) -> list[str]:
        """What is wrong with it. Raises TimeoutError where there is no answer after `timeout` seconds."""
        return self._answers[op, index, config].result(timeout)

    def close(self) -> None:
        """Forget what has not begun."""
        self._pool.shutdown(wait=False, cancel_futures=True)
