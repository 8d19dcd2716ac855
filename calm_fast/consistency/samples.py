"""Deprecated place of `read_rows` and `write_rows`, which are names of `calm_fast.consistency`."""

import warnings

from calm_fast.consistency.voting.samples import read_rows, write_rows

__all__ = ["read_rows", "write_rows"]

warnings.warn(
    "calm_fast.consistency.samples is deprecated; import read_rows and write_rows from calm_fast.consistency",
    DeprecationWarning,
    stacklevel=2,
)
