"""x W^T with a weight that was packed once for the compiled library: what layers keep for inference on a CPU.

Not a public op: `CrossAttention` and `DualLoRALinear` multiply their kept weights with it. float32 and AVX-512 only
(csrc/packed_linear/packed_product.h); everywhere else a weight stays as it is and the product is torch's. No gradients.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

from calm_fast.core import native_library
from calm_fast.core.dispatch import active_transform

_OP = "packed_linear"


class Packed(NamedTuple):
    """A weight (rows, k) as the compiled library reads it: panels (ceil(rows / 32), k, 32)."""

    panels: torch.Tensor
    rows: int


def can_pack(*tensors: torch.Tensor) -> bool:
    """Whether these tensors can be multiplied with a packed weight: plain float32 on a CPU, and nothing has to
    follow what is computed (autograd, torch.func, torch.compile, a dispatch mode).
    """
    grad = torch.is_grad_enabled()
    for t in tensors:
        if type(t) is not torch.Tensor or not t.is_cpu or t.dtype != torch.float32 or (grad and t.requires_grad):
            return False
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() or active_transform():
        return False
    return native_library.obstacle(_OP) is None


def pack(weight: torch.Tensor) -> Packed | torch.Tensor:
    """`weight` (rows, k), any dtype, packed where it is plain float32 on a CPU with AVX-512; elsewhere itself.

    For weights that are kept: packing costs about what it saves on 200 tokens.
    """
    plain = type(weight) in (torch.Tensor, torch.nn.Parameter)  # others multiply in their own way: quantized, sharded
    if not plain or weight.dtype != torch.float32 or not weight.is_cpu or native_library.obstacle(_OP):
        return weight
    panels = torch.ops.calm_fast._packed_linear_native_pack(weight.contiguous())
    return Packed(panels, weight.shape[0]) if panels.dim() == 3 else weight  # no panels without AVX-512


def linear(x: torch.Tensor, weight: Packed | torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x (..., k) times the weight (rows, k), transposed, plus bias (rows,): (..., rows). All float32 where it is
    Packed, else of one dtype; RuntimeError from the product where shapes do not fit.
    """
    if type(weight) is not Packed:
        return F.linear(x, weight, bias)
    out = torch.ops.calm_fast._packed_linear_native_fwd(x.contiguous(), weight.panels, weight.rows)
    return out if bias is None else out.add_(bias)


def linear_into(residual: torch.Tensor, x: torch.Tensor, weight: Packed | torch.Tensor) -> torch.Tensor:
    """residual (..., rows) + x (..., k) times the weight (rows, k), transposed; one pass over the residual. Dtypes and
    errors as in `linear`.
    """
    if type(weight) is Packed:
        return torch.ops.calm_fast._packed_linear_native_fwd(
            x.contiguous(), weight.panels, weight.rows, residual.contiguous()
        )
    rows = residual.shape[-1]
    flat = torch.addmm(residual.reshape(-1, rows), x.reshape(-1, x.shape[-1]), weight.t())
    return flat.view(residual.shape)
