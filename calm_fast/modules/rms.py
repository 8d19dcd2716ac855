"""hidden / rms(hidden), the part of an RMSNorm that has no weight."""

from __future__ import annotations

import torch
import torch.nn.functional as F

_LARGE = 1 << 16  # elements from which a backward of our own saves more than its call from Python costs


def in_dtype(t: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`t.to(dtype)` without the call where nothing changes."""
    return t if t.dtype == dtype else t.to(dtype)


def normalised(hidden: torch.Tensor, eps: float) -> torch.Tensor:
    """hidden / sqrt(mean(hidden^2) + eps) over the last dimension, in hidden's dtype, computed in at least float32."""
    if hidden.is_cuda:
        return F.rms_norm(hidden, hidden.shape[-1:], None, eps)  # one fused kernel there
    if hidden.requires_grad and torch.is_grad_enabled() and hidden.numel() >= _LARGE:
        if not torch.compiler.is_compiling():
            return _Normalise.apply(hidden, eps)[0]
    if hidden.dtype in (torch.float32, torch.float64):
        return hidden * _inverse_rms(hidden, eps)
    wide = hidden.float()
    return (wide * _inverse_rms(wide, eps)).to(hidden.dtype)


def _inverse_rms(wide: torch.Tensor, eps: float) -> torch.Tensor:
    # on a CPU vector_norm takes two to three times as long as these two steps
    return torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)


class _Normalise(torch.autograd.Function):
    """The same with a backward of four passes over hidden; autograd's own takes up to three times as long on a CPU."""

    generate_vmap_rule = True

    @staticmethod
    def forward(hidden: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
        wide = in_dtype(hidden, torch.promote_types(hidden.dtype, torch.float32))
        inverse = _inverse_rms(wide, eps)
        return in_dtype(wide * inverse, hidden.dtype), inverse

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: tuple) -> None:
        hidden, ctx.eps = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(hidden, output[1])

    @staticmethod
    def backward(ctx, grad: torch.Tensor | None, _: None) -> tuple[torch.Tensor | None, None]:
        if grad is None:
            return None, None
        hidden, inverse = ctx.saved_tensors
        wide, grad = in_dtype(hidden, inverse.dtype), in_dtype(grad, inverse.dtype)
        if torch.is_grad_enabled():  # differentiated again: what was kept knows nothing of hidden
            inverse = _inverse_rms(wide, ctx.eps)
        along = (grad * wide).mean(-1, keepdim=True) * inverse**3
        return in_dtype(torch.addcmul(grad * inverse, wide, along, value=-1), hidden.dtype), None
