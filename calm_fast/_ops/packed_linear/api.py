"""packed_linear: x W^T with a weight that was packed once for the compiled library.

An internal op: `CrossAttention` and `DualLoRALinear` multiply the weights they keep for inference with it, on a CPU.
Packing needs float32 and AVX2 or AVX-512 (csrc/packed_linear/packed_product.h). Everywhere else a weight stays as it is
and the product is torch's. A packed product has no gradient.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from calm_fast._ops.packed_linear.torch_impl import linear_into_torch, linear_torch
from calm_fast.core import native_library
from calm_fast.core.dispatch import active_transform

_OP = "packed_linear"


class Packed(NamedTuple):
    """A weight W (rows, K) as the compiled library reads it: panels (ceil(rows / w), K, w) float32, w 32 or 16."""

    panels: torch.Tensor
    rows: int


def can_pack(*tensors: torch.Tensor) -> bool:
    """Return True if these tensors may be multiplied with a packed weight.

    They must be plain float32 CPU tensors, and nothing may record the product: no autograd, torch.func transform,
    torch.compile or dispatch mode.
    """
    grad = torch.is_grad_enabled()
    for t in tensors:
        if type(t) is not torch.Tensor or not t.is_cpu or t.dtype != torch.float32 or (grad and t.requires_grad):
            return False
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() or active_transform():
        return False
    return native_library.obstacle(_OP) is None


def pack(weight: torch.Tensor) -> Packed | torch.Tensor:
    """Pack `weight` (rows, K) if it is a plain float32 tensor on a CPU with AVX2; else return it unchanged.

    For weights that are kept: packing costs about what it saves on 200 tokens.
    """
    # a subclass multiplies in its own way: quantized, sharded
    plain = type(weight) in (torch.Tensor, torch.nn.Parameter)
    if not plain or weight.dtype != torch.float32 or not weight.is_cpu or native_library.obstacle(_OP):
        return weight
    panels = torch.ops.calm_fast._packed_linear_native_pack(weight.contiguous())
    return Packed(panels, weight.shape[0]) if panels.dim() == 3 else weight  # the scalar lane packs nothing


def linear(x: torch.Tensor, weight: Packed | torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Multiply tokens with a weight, packed or not: out = x W^T [+ bias].

    Args:
        x: (..., K), float32 if the weight is packed, else of the weight's dtype.
        weight: W (rows, K), a tensor or what `pack` made of it.
        bias: (rows,) or None.
    Returns:
        out (..., rows) in x's dtype. Each token's bits are the same alone and among others if the weight is packed.
    Raises:
        RuntimeError: from the product, if shapes or dtypes do not fit.
    """
    if not isinstance(weight, Packed):
        return linear_torch(x, weight, bias)
    out = torch.ops.calm_fast._packed_linear_native_fwd(x.contiguous(), weight.panels, weight.rows)
    return out if bias is None else out.add_(bias)


def linear_into(residual: torch.Tensor, x: torch.Tensor, weight: Packed | torch.Tensor) -> torch.Tensor:
    """Add a product to a residual in one pass over the residual: out = residual + x W^T.

    Args:
        residual: (..., rows), of x's dtype; it is not changed.
        x, weight: as in `linear`.
    Returns:
        out (..., rows).
    Raises:
        RuntimeError: from the product, if shapes or dtypes do not fit.
    """
    if not isinstance(weight, Packed):
        return linear_into_torch(residual, x, weight)
    return torch.ops.calm_fast._packed_linear_native_fwd(
        x.contiguous(), weight.panels, weight.rows, residual.contiguous()
    )
