"""Run today's cases on a revision from before "one folder per op".

The cases import a few internal modules by today's names. An older library has the same functions in other modules, so
`bridge` lets it answer to today's names. Only the processes of `bench --compare` call it.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types

_OPS = ("cross_attention", "dual_lora", "linear_logprob", "linear_nce", "maj_at_k", "vote")
# today's module -> the older folder
_PARTS = {"api": "ops", "native": "ops", "reference": "reference", "torch_impl": "torch_impl"}
# internal modules that cases import -> their older names
MODULES = {"calm_fast.core.native_library": "calm_fast._native"} | {
    f"calm_fast._ops.{op}.{part}": f"calm_fast.{folder}.{op}" for op in _OPS for part, folder in _PARTS.items()
}
MODULES["calm_fast._ops.packed_linear.api"] = "calm_fast._packed"


def bridge() -> None:
    """Alias the modules of an older library under today's names; do nothing in a library of today's layout."""
    if importlib.util.find_spec("calm_fast._ops") is not None:
        return
    for package in ("calm_fast.core", "calm_fast._ops", *(f"calm_fast._ops.{op}" for op in (*_OPS, "packed_linear"))):
        module = types.ModuleType(package)
        module.__path__ = []  # a package without files: everything in it is in sys.modules
        sys.modules[package] = module
    for today, older in MODULES.items():
        try:
            sys.modules[today] = importlib.import_module(older)
        except ModuleNotFoundError:  # older than this op, whose cases then cannot run
            continue
