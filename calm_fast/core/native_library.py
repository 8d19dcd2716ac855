"""The compiled library (csrc/): loaded on first use, and why it cannot run an op where it cannot.

Two extension modules register kernels `calm_fast::_<op>_native_<part>` with torch: `calm_fast._cpu` for CPU tensors,
`calm_fast._cuda` for CUDA tensors. The names they registered say which ops they serve; there is no list.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import re
from typing import Any

import torch

_KERNEL = re.compile(r"calm_fast::_(\w+?)_native_(\w+)")
# the schemas are in _cpu, so it is loaded first for either device
_MODULES = {"cpu": ("_cpu",), "cuda": ("_cpu", "_cuda")}
_KEYS = {"cpu": "CPU", "cuda": "CUDA"}


@functools.cache
def _load(module: str) -> Any:
    """The extension module, or the reason (a str) why it is not here."""
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
    """`<op>_<part>` of every kernel that the loaded library has for this device type."""
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    found = (_KERNEL.match(name) for name in torch._C._dispatch_get_all_op_names())
    return frozenset(f"{m[1]}_{m[2]}" for m in found if m and has_kernel(m.string, _KEYS[device_type]))


@functools.cache
def _answer(op: str, device_type: str) -> str | None:
    if device_type not in _MODULES:
        return f"the compiled library has no code for {device_type} tensors"
    for module in _MODULES[device_type]:
        if isinstance(why := _load(module), str):
            return f"the compiled library does not load: {why}"
    if not any(name == op or name.startswith(f"{op}_") for name in _served(device_type)):
        return f"the compiled library has no {op} for {device_type} tensors"
    return None


def _obstacle(op: str, device_type: str) -> str | None:
    return _answer(op, device_type)  # dynamo looks at this function, which a cache would hide


# what torch.compiler.assume_constant_result sets; see dispatch.py
_obstacle._dynamo_marked_constant = True  # type: ignore[attr-defined]


def obstacle(op: str, device_type: str = "cpu") -> str | None:
    """Why the compiled library cannot run `op` on tensors of this device type; None where it can."""
    return _obstacle(op, device_type)


@functools.cache
def _why_slow(dtype: torch.dtype) -> str | None:
    info = build_info()["_cpu"]
    if isinstance(info, dict) and info["best lane here"] == "scalar":
        return "this CPU has neither AVX2 nor AVX-512"
    units = ("_is_amx_tile_supported", "_is_amx_fp16_supported")
    if dtype != torch.float32 and any(getattr(torch.cpu, name, bool)() for name in units):
        return "this CPU has matrix units for 16-bit products, which torch uses"
    return None


def slowness(dtype: torch.dtype) -> str | None:
    """Why torch's own matrix products are the faster ones on this CPU; None where the compiled library's are."""
    return _why_slow(dtype)


slowness._dynamo_marked_constant = True  # type: ignore[attr-defined]


def build_info() -> dict[str, dict[str, str] | str]:
    """Per extension module: compiler, torch it was built with, ABI targets, best SIMD lane; or why it is not here."""
    modules = {name: _load(name) for name in ("_cpu", "_cuda")}
    return {name: found if isinstance(found, str) else found.build_info() for name, found in modules.items()}
