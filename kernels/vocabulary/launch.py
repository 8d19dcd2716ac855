"""Host side that linear_nce and linear_logprob share: compile-time arguments, launch numbers, code generation specs."""

from __future__ import annotations

from typing import Any

import torch

from calm_fast.kernels.common import launching
from calm_fast.kernels.common.launching import CodegenSpec, LaunchConfig, addressable, launch

__all__ = ["CodegenSpec", "LaunchConfig", "addressable", "block_d", "constants", "gpu_config", "launch", "make_spec"]

GROUP = 8  # token tiles that share the vocabulary in L2


def block_d(dtype: torch.dtype, interpreted: bool) -> int:
    """Depth of a tile of the product; float32 products outside the tensor cores unroll it."""
    return 16 if interpreted or dtype == torch.float32 else 64


def constants(
    weight: torch.Tensor, bias: torch.Tensor | None, softcap: float | None, config: LaunchConfig, interpreted: bool
) -> dict[str, Any]:
    """Compile-time arguments of every kernel that computes logits."""
    return {
        "D": weight.shape[1],
        "BLOCK_T": config.block_m,
        "BLOCK_V": config.block_n,
        "BLOCK_D": block_d(weight.dtype, interpreted),
        "HAS_BIAS": bias is not None,
        "HAS_SOFTCAP": softcap is not None,
        "PRECISION": launching.float32_precision(weight.dtype),
        "INTERPRET": interpreted,
    }


def gpu_config(op: str, part: str, weight: torch.Tensor, tokens: int) -> tuple[LaunchConfig | None, int]:
    """The config measured on the weight's GPU for the nearest shape, None without one; and the GPU's architecture."""
    v, d = weight.shape
    measured = launching.measured_config(op, part, weight.device, weight.dtype, d, {"T": tokens, "V": v})
    return measured, launching.gpu(weight.device).arch


def make_spec(
    name: str,
    fn: Any,
    dtype: torch.dtype,
    constant: dict[str, Any],
    config: LaunchConfig,
    tensor_core: bool | str,
    archs: tuple[int, ...],
    pointers: dict[str, str],
) -> CodegenSpec:
    """`launching.make_spec` under a name with the dtype, and the architecture where it is one; float32 is IEEE."""
    name = f"{name}_{launching.short_name(dtype)}" + (f"_sm{archs[0]}" if len(archs) == 1 else "")
    core = False if dtype == torch.float32 else tensor_core
    return launching.make_spec(name, fn, dtype, constant, config, core, archs, pointers)
