"""Launch configs of the linear_logprob kernels: tables, and the configs of kernels with nothing to tune."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from calm_fast.core.launch_config import LaunchConfig
from calm_fast.kernels.common.config_table import ConfigTable
from calm_fast.kernels.vocabulary.configs import CombineConfig, dlogits_tile, sweep_tile


@dataclass(frozen=True, kw_only=True)
class TargetConfig(LaunchConfig):
    """Tile of the kernel that computes the targets' logits. block_t: tokens. block_d: depth of a step."""

    block_t: int
    block_d: int


# For 16-bit inputs the defaults are the largest tiles that compile to zero spills with Triton 3.6 and 3.9. Sizes:
# "plain", and "full" with an entropy, a rank, a bias or a softcap. IEEE float32 runs on the ordinary cores.
SWEEP = ConfigTable(
    "linear_logprob",
    "sweep",
    {
        "sm_80": {"plain": sweep_tile(128, 128, 8, 3), "full": sweep_tile(128, 64, 8, 3)},
        "sm_90": {"plain": sweep_tile(128, 256, 8, 3), "full": sweep_tile(128, 64, 8, 3)},
        "sm_100": {"plain": sweep_tile(128, 128, 8, 4), "full": sweep_tile(128, 64, 4, 3)},
        "float32": {"plain": sweep_tile(16, 32, 4, 1), "full": sweep_tile(16, 32, 4, 1)},
    },
    interpreter=sweep_tile(16, 32, 4, 1, split_v=64),
)
DLOGITS = ConfigTable(
    "linear_logprob",
    "dlogits",
    {
        "sm_80": {"plain": dlogits_tile(128, 128, 8, 3), "full": dlogits_tile(128, 64, 8, 3)},
        "sm_90": {"plain": dlogits_tile(256, 128, 8, 3), "full": dlogits_tile(128, 128, 8, 3)},
        "sm_100": {"plain": dlogits_tile(128, 128, 8, 3), "full": dlogits_tile(128, 128, 8, 3)},
        "float32": {"plain": dlogits_tile(16, 32, 4, 1), "full": dlogits_tile(16, 32, 4, 1)},
    },
    interpreter=dlogits_tile(16, 32, 4, 1),
)
TABLES: dict[str, ConfigTable[str, Any]] = {table.part: table for table in (SWEEP, DLOGITS)}

# Kernels without a matrix product, with nothing to tune.
COMBINE = CombineConfig(block_t=64, num_warps=4, num_stages=1)
TARGET = TargetConfig(block_t=16, block_d=64, num_warps=4, num_stages=1)
