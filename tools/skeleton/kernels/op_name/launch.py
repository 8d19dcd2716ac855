"""Launcher of the op_name kernel."""

from __future__ import annotations

import torch
import triton

from calm_fast.kernels.common.launching import interpreted, launch
from calm_fast.kernels.op_name.codegen import codegen_specs
from calm_fast.kernels.op_name.configs import DEFAULT, INTERPRETER
from calm_fast.kernels.op_name.fwd import _op_name_fwd_kernel

__all__ = ["codegen_specs", "launch_op_name_fwd"]


def launch_op_name_fwd(x: torch.Tensor, scale: float) -> torch.Tensor:
    """Return scale * x for x (T, D) float32, bfloat16 or float16, in x's dtype."""
    x = x.contiguous()
    out = torch.empty_like(x)
    if x.numel():
        config = INTERPRETER if interpreted(_op_name_fwd_kernel) else DEFAULT
        programs = triton.cdiv(x.numel(), config.block)
        launch(_op_name_fwd_kernel, programs, x.device, config, x, out, x.numel(), scale, BLOCK=config.block)
    return out
