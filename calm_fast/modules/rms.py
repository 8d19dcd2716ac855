"""RMS normalisation without a weight: hidden / rms(hidden)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

_LARGE = 1 << 16  # elements from which the backward below saves more than its call from Python costs


def in_dtype(t: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return `t.to(dtype)`, without the call if nothing changes."""
    return t if t.dtype == dtype else t.to(dtype)


def rms_normalise(hidden: torch.Tensor, eps: float) -> torch.Tensor:
    """Return hidden / sqrt(mean(hidden^2) + eps) over the last dimension.

    hidden (..., D), any float dtype; the result has its shape and dtype and is computed in at least float32.
    """
    if hidden.is_cuda:
        return F.rms_norm(hidden, hidden.shape[-1:], None, eps)  # one fused kernel
    if hidden.requires_grad and torch.is_grad_enabled() and hidden.numel() >= _LARGE:
        if not torch.compiler.is_compiling():
            normal: torch.Tensor = _Normalise.apply(hidden, eps)[0]
            return normal
    if hidden.dtype in (torch.float32, torch.float64):
        return hidden * _inverse_rms(hidden, eps)
    wide = hidden.float()
    return (wide * _inverse_rms(wide, eps)).to(hidden.dtype)


def _inverse_rms(wide: torch.Tensor, eps: float) -> torch.Tensor:
    # on a CPU vector_norm takes two to three times as long as these ops
    return torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)


class _Normalise(torch.autograd.Function):
    """`rms_normalise` with a backward of four passes over hidden, up to three times as fast as autograd's on a CPU."""

    generate_vmap_rule = True

    @staticmethod
    def forward(hidden: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
        wide = in_dtype(hidden, torch.promote_types(hidden.dtype, torch.float32))
        inverse = _inverse_rms(wide, eps)
        return in_dtype(wide * inverse, hidden.dtype), inverse

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[torch.Tensor, float], output: tuple[torch.Tensor, torch.Tensor]) -> None:
        hidden, ctx.eps = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(hidden, output[1])

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor | None, _: None) -> tuple[torch.Tensor | None, None]:
        if grad is None:
            return None, None
        hidden, inverse = ctx.saved_tensors
        wide, grad = in_dtype(hidden, inverse.dtype), in_dtype(grad, inverse.dtype)
        if torch.is_grad_enabled():  # double backward: the saved inverse has no graph to hidden
            inverse = _inverse_rms(wide, ctx.eps)
        along = (grad * wide).mean(-1, keepdim=True) * inverse**3
        return in_dtype(torch.addcmul(grad * inverse, wide, along, value=-1), hidden.dtype), None
