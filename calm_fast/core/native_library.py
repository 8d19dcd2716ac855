"""The compiled library (csrc/): it is loaded on first use, and a refusal says why an op cannot run.

Two extension modules register ops with torch: `calm_fast._cpu` for CPU tensors, `calm_fast._cuda` for CUDA tensors. A
registered name `calm_fast::_<op>_native_<part>` says which op it serves, so there is no list of ops here.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import re
from typing import Any

import torch

from calm_fast.core.checks import bad_value

_KERNEL = re.compile(r"calm_fast::_(\w+?)_native_(\w+)")
# _cpu holds the schemas, so it is loaded first for either device
_MODULES = {"cpu": ("_cpu",), "cuda": ("_cpu", "_cuda")}
_KEYS = {"cpu": "CPU", "cuda": "CUDA"}


@functools.cache
def _load(module: str) -> Any:
    """Return the extension module, or the reason (a str) why it cannot be loaded."""
    name = f"calm_fast.{module}"
    if importlib.util.find_spec(name) is None:
        part = "no compiler, no torch" if module == "_cpu" else "no nvcc, no CUDA build of torch"
        return (
            f"{name} is not there: calm_fast was installed without it ({part}, or switched off; "
            "`pip install -v` says which)"
        )
    try:
        return importlib.import_module(name)
    except Exception as problem:
        text = (str(problem).strip().splitlines() or [type(problem).__name__])[0]
        return f"{name} cannot be loaded with torch {torch.__version__}: {text}"


@functools.cache
def _served(device_type: str) -> frozenset[str]:
    """Return `<op>_<part>` of every kernel that the loaded library has for this device type."""
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    found = (_KERNEL.match(name) for name in torch._C._dispatch_get_all_op_names())
    return frozenset(f"{m[1]}_{m[2]}" for m in found if m and has_kernel(m.string, _KEYS[device_type]))


@functools.cache
def _find_obstacle(op: str, device_type: str) -> str | None:
    if device_type not in _MODULES:
        return f"the compiled library has no code for {device_type} tensors"
    for module in _MODULES[device_type]:
        if isinstance(why := _load(module), str):
            return f"the compiled library does not load: {why}"
    if not any(name == op or name.startswith(f"{op}_") for name in _served(device_type)):
        return f"the compiled library has no {op} for {device_type} tensors"
    return None


def _obstacle(op: str, device_type: str) -> str | None:
    # the marked function must not be the cached one: dynamo would not see the mark on a functools.cache object
    return _find_obstacle(op, device_type)


# the mark of torch.compiler.assume_constant_result; see dispatch.py
_obstacle._dynamo_marked_constant = True  # type: ignore[attr-defined]


def obstacle(op: str, device_type: str = "cpu") -> str | None:
    """Return the reason why the compiled library cannot run `op` on tensors of this device type, or None if it can.

    op: an op, or a part of one like "cross_attention_bwd".
    """
    return _obstacle(op, device_type)


LANES = ("scalar", "avx2", "avx512", "avx512_bf16")  # csrc/common/lanes.h


_limited = False  # a limit is set: no lane of LANES has matrix units


def limit_lane(name: str | None) -> None:
    """Let the compiled library use no SIMD lane beyond `name` in this process, as on a CPU without them.

    `auto` then chooses as on such a CPU too, which has no matrix units either. Call it before the first op: weights
    that are packed already and code from torch.compile stay as they are. torch has limits of its own; `calm-fast bench
    --lane` sets both.

    Args:
        name: one of LANES; None lifts the limit.
    Raises:
        ValueError: there is no such lane. RuntimeError: the library does not load.
    """
    global _limited
    if name is not None and name not in LANES:
        raise bad_value("limit_lane", "name", f"one of {', '.join(map(repr, LANES))} or None", repr(name))
    if isinstance(module := _load("_cpu"), str):
        raise RuntimeError(f"limit_lane: the compiled library does not load: {module}")
    module.limit_lane(LANES[-1] if name is None else name)
    _limited = name is not None
    _find_slowness.cache_clear()
    _find_emulation.cache_clear()


@functools.cache
def _find_slowness(dtype: torch.dtype) -> str | None:
    info = build_info()["_cpu"]
    best = info["best lane here"] if isinstance(info, dict) else None
    if best == "scalar":
        return "this CPU has neither AVX2 nor AVX-512"
    if best == "avx2" or _limited:  # no CPU has matrix units but no AVX-512
        return None
    units = ("_is_amx_tile_supported", "_is_amx_fp16_supported")
    if dtype != torch.float32 and any(getattr(torch.cpu, name, bool)() for name in units):
        return "this CPU has matrix units for 16-bit products, which torch uses"
    return None


def slowness(dtype: torch.dtype) -> str | None:
    """Return the reason why torch's matrix products beat the compiled library's on this CPU, or None if they do not."""
    return _find_slowness(dtype)


slowness._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _find_emulation(dtype: torch.dtype) -> bool:
    info = build_info()["_cpu"]
    best = info["best lane here"] if isinstance(info, dict) else None
    return dtype == torch.float16 or (dtype == torch.bfloat16 and best != "avx512_bf16")


def emulated(dtype: torch.dtype) -> bool:
    """Return True if this CPU has no instructions for products of this 16-bit dtype.

    torch then multiplies it 10 to 200 times more slowly than float32; the compiled library widens it in registers.
    """
    return _find_emulation(dtype)


emulated._dynamo_marked_constant = True  # type: ignore[attr-defined]


def build_info() -> dict[str, dict[str, str] | str]:
    """Return, for each extension module, how it was built and the best SIMD lane here, or why it cannot be loaded."""
    modules = {name: _load(name) for name in ("_cpu", "_cuda")}
    return {name: found if isinstance(found, str) else found.build_info() for name, found in modules.items()}
