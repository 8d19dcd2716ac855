"""Code that the codegen specs of linear_nce and linear_logprob share."""

from __future__ import annotations

from typing import Any

import torch

from calm_fast.core.launch_config import LaunchConfig
from calm_fast.kernels.common import codegen
from calm_fast.kernels.vocabulary.configs import GROUP, DlogitsConfig, SweepConfig, block_d

Constants = dict[str, Any]


def tile_constants(config: SweepConfig | DlogitsConfig, dtype: torch.dtype, plain: bool) -> Constants:
    """Return the compile-time arguments of a kernel that computes tiles of logits; plain: no bias and no softcap."""
    constants: Constants = {
        "D": 4096 if plain else 576,
        "BLOCK_T": config.block_t,
        "BLOCK_V": config.block_v,
        "BLOCK_D": block_d(dtype, False),
        "GROUP": GROUP,
        "HAS_BIAS": not plain,
        "HAS_SOFTCAP": not plain,
        "PRECISION": "ieee",
        "INTERPRET": False,
    }
    if isinstance(config, SweepConfig):
        constants["SPLIT_V"] = config.split_v
    if plain:
        constants["bias_ptr"] = None
    return constants


def make_spec(
    name: str,
    fn: Any,
    dtype: torch.dtype,
    constants: Constants,
    config: LaunchConfig,
    tensor_core: bool | str,
    pointers: dict[str, str],
    archs: tuple[int, ...] = codegen.ARCHS,
) -> codegen.CodegenSpec:
    """Return the spec under a name with the dtype, and with the architecture if there is only one; float32 is IEEE."""
    name = f"{name}_{codegen.short_name(dtype)}" + (f"_sm{archs[0]}" if len(archs) == 1 else "")
    core = False if dtype == torch.float32 else tensor_core
    return codegen.make_spec(name, fn, dtype, constants, config, core, archs, pointers)
