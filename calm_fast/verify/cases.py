"""One file per op: its cases and its rounding analysis (see `calm_fast.core.numerics.OpCases`)."""

from __future__ import annotations

import importlib

from calm_fast.core.numerics import OpCases


def op_cases(op: str) -> OpCases:
    """The cases of one op: the object `CASES` of `calm_fast/_ops/<op>/cases.py`."""
    return importlib.import_module(f"calm_fast._ops.{op}.cases").CASES
