"""Host code that the launchers of linear_nce and linear_logprob share: choice of configs, compile-time arguments."""

from __future__ import annotations

from typing import Any

import torch

from calm_fast.core.launch_config import Config
from calm_fast.kernels.common.config_table import ConfigTable
from calm_fast.kernels.common.launching import float32_precision
from calm_fast.kernels.vocabulary.configs import GROUP, DlogitsConfig, SweepConfig, block_d, table_size


def pick_config(
    table: ConfigTable[str, Config], weight: torch.Tensor, tokens: int, plain: bool, interpreted: bool
) -> Config:
    """Return the config of a kernel. Only plain kernels are measured, so only they use measured configs."""
    v, d = weight.shape
    shape = {"T": tokens, "V": v}
    return table.pick(weight.device, weight.dtype, table_size(plain), d, shape, interpreted, measured=plain)


def constants(
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    softcap: float | None,
    config: SweepConfig | DlogitsConfig,
    interpreted: bool,
) -> dict[str, Any]:
    """Return the compile-time arguments of every kernel that computes tiles of logits."""
    return {
        "D": weight.shape[1],
        "BLOCK_T": config.block_t,
        "BLOCK_V": config.block_v,
        "BLOCK_D": block_d(weight.dtype, interpreted),
        "GROUP": GROUP,
        "HAS_BIAS": bias is not None,
        "HAS_SOFTCAP": softcap is not None,
        "PRECISION": float32_precision(weight.dtype),
        "INTERPRET": interpreted,
    }
