"""Access to the cases of an op by its name."""

from __future__ import annotations

import importlib

from calm_fast.core.numerics import OpCases


def op_cases(op: str) -> OpCases:
    """Return the object `CASES` of `calm_fast/_ops/<op>/cases.py`."""
    cases: OpCases = importlib.import_module(f"calm_fast._ops.{op}.cases").CASES
    return cases
