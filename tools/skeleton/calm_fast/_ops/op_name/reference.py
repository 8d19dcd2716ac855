"""Definition of op_name in plain torch, any float dtype."""

from __future__ import annotations

import torch


def op_name_reference(x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    """Return scale * x.

    Args:
        x: (T, D), any float dtype.
    Returns:
        (T, D), x's dtype.
    """
    return scale * x
