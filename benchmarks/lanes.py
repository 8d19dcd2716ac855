"""Measure as on a CPU with narrower vectors: `bench --lane avx2` on an AVX-512 machine.

The compiled library is limited by a call (`native_library.limit_lane`). torch, its math libraries and numpy read their
limits from the environment when they are loaded, so a run with a lane is a process of its own.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence

import torch

from calm_fast.core import native_library

AUTO = "auto"

# ATen's own kernels, then products: oneDNN, MKL, and numpy's OpenBLAS
_VARIABLES: Mapping[str, Mapping[str, str]] = {
    "scalar": {
        "ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2",
        "OPENBLAS_CORETYPE": "Nehalem",
    },
    "avx2": {
        "ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "OPENBLAS_CORETYPE": "Haswell",
    },
    "avx512": {
        "ATEN_CPU_CAPABILITY": "avx512", "ONEDNN_MAX_CPU_ISA": "AVX512_CORE", "MKL_ENABLE_INSTRUCTIONS": "AVX512",
    },
    "avx512_bf16": {
        "ATEN_CPU_CAPABILITY": "avx512", "ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16", "MKL_ENABLE_INSTRUCTIONS": "AVX512",
    },
}  # fmt: skip
CHOICES = (AUTO, *_VARIABLES)
_NUMPY_BEYOND = {"scalar": ("AVX", "FMA", "X86_V3", "X86_V4"), "avx2": ("AVX512", "X86_V4")}
_CAPABILITIES = {"scalar": "DEFAULT", "avx2": "AVX2", "avx512": "AVX512", "avx512_bf16": "AVX512"}


class LaneError(RuntimeError):
    """This process cannot measure in the lane that was asked for; the message gives the reason."""


def must_start_again(lane: str) -> bool:
    """Return True if a new process is needed, because this one was not started with the lane's environment."""
    return lane != AUTO and any(os.environ.get(name) != value for name, value in environment(lane).items())


def environment(lane: str) -> dict[str, str]:
    """Return the variables that keep torch and numpy to `lane` in a process that starts with them."""
    found = dict(_VARIABLES[lane])
    beyond = [name for name in _numpy_features() if name.startswith(_NUMPY_BEYOND.get(lane, ()))]
    return {**found, "NPY_DISABLE_CPU_FEATURES": " ".join(beyond)} if beyond else found


def _numpy_features() -> list[str]:
    """Return the features that numpy has loops for beyond its baseline; other names make it warn."""
    try:
        core = importlib.import_module("numpy._core._multiarray_umath")
    except ImportError:  # another layout of numpy: its loops stay as they are
        return []
    return list(getattr(core, "__cpu_dispatch__", ()))


def start_again(lane: str, argv: Sequence[str]) -> int:
    """Run `argv` of benchmarks.run in a process with the environment of `lane`; return its exit code."""
    command = [sys.executable, "-m", "calm_fast.benchmarks.run", *argv]
    return subprocess.run(command, env={**os.environ, **environment(lane)}).returncode


def settle(lane: str) -> str:
    """Limit the compiled library to `lane` and make sure that torch is limited too.

    Args:
        lane: one of CHOICES; "auto" limits nothing.
    Returns:
        the lane as the rows record it.
    Raises:
        LaneError: this CPU does not have the lane, or torch or the library does not keep to it.
    """
    if lane == AUTO:
        return _own_lane()
    if not hasattr(native_library, "limit_lane"):  # a revision of `--compare`
        raise LaneError("this revision of calm_fast cannot limit the lane of its compiled library")
    try:
        native_library.limit_lane(lane)
    except RuntimeError as problem:
        raise LaneError(str(problem)) from problem
    if (best := _library_lane()) != lane:
        raise LaneError(f"the best lane of this CPU is {best}")
    if (seen := torch.backends.cpu.get_cpu_capability()) != _CAPABILITIES[lane]:
        raise LaneError(f"torch reports {seen}, expected {_CAPABILITIES[lane]}: ATEN_CPU_CAPABILITY had no effect")
    return lane


def _own_lane() -> str:
    """Return the lane of this CPU, and its matrix units if torch uses them."""
    units = ("_is_amx_tile_supported", "_is_amx_fp16_supported")
    matrix_units = any(getattr(torch.cpu, name, bool)() for name in units)
    lane = _library_lane() or f"{torch.backends.cpu.get_cpu_capability()} in torch, no compiled library"
    return lane + (", matrix units" if matrix_units else "")


def _library_lane() -> str | None:
    info = native_library.build_info()["_cpu"]
    return info["best lane here"] if isinstance(info, dict) else None
