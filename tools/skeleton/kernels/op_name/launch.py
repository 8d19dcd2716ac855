"""Launcher of the op_name kernel."""

from __future__ import annotations

import torch
import triton

from calm_fast.kernels.common.config_table import padded
from calm_fast.kernels.common.launching import interpreted, launch
from calm_fast.kernels.op_name.configs import FWD
from calm_fast.kernels.op_name.fwd import _op_name_fwd_kernel

__all__ = ["launch_op_name_fwd"]


def launch_op_name_fwd(x: torch.Tensor, scale: float) -> torch.Tensor:
    """Return scale * x for x (T, D) float32, bfloat16 or float16, in x's dtype."""
    x = x.contiguous()
    out = torch.empty_like(x)
    tokens, width = x.shape
    if x.numel():
        shape = {"T": tokens, "D": width}
        config = FWD.pick(x.device, x.dtype, "any", padded(width), shape, interpreted(_op_name_fwd_kernel))
        programs = triton.cdiv(x.numel(), config.block_size)
        scalars = {"size": x.numel(), "scale": scale, "BLOCK": config.block_size}
        launch(_op_name_fwd_kernel, programs, x.device, config, x, out, **scalars)
    return out
