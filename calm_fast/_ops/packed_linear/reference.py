"""Definition of packed_linear: a linear layer, or a residual plus a linear layer."""

from __future__ import annotations

import torch


def packed_linear_reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """Multiply tokens with a weight, stated as directly as torch allows.

        out = x W^T [+ bias] [+ residual]

    Args:
        x: (..., K), any float dtype.
        weight: W (rows, K).
        bias: (rows,) or None. residual: (..., rows) or None.
    Returns:
        out (..., rows) in x's dtype, computed in at least float32.
    """
    compute = torch.promote_types(x.dtype, torch.float32)
    out = torch.einsum("...k,rk->...r", x.to(compute), weight.to(compute))
    if bias is not None:
        out = out + bias.to(compute)
    if residual is not None:
        out = out + residual.to(compute)
    return out.to(x.dtype)
