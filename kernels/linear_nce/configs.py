"""Launch configs of the linear_nce kernels: dataclasses, tables, and the configs of kernels with nothing to tune."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from calm_fast.core.launch_config import LaunchConfig
from calm_fast.kernels.common.config_table import ConfigTable
from calm_fast.kernels.vocabulary.configs import CombineConfig, dlogits_tile, sweep_tile


@dataclass(frozen=True, kw_only=True)
class CalibrateConfig(LaunchConfig):
    """Tiles of the calibrate kernel. block_t: tokens of a program. block_j: tokens they are compared with at a time."""

    block_t: int
    block_j: int


@dataclass(frozen=True, kw_only=True)
class StatsConfig(LaunchConfig):
    """Tiles of the row statistics. lanes: running sums, one a thread. width: logits that a lane reads at a time."""

    lanes: int
    width: int

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_powers_of_two("lanes", "width")


@dataclass(frozen=True, kw_only=True)
class DzConfig(LaunchConfig):
    """Tiles of the row gradients. block_v: logits of a step. block_j: tokens of a step over the token's sequence."""

    block_v: int
    block_j: int


# For 16-bit inputs the defaults are the largest tiles that compile to zero spills: three accumulators, two backward,
# share a tile of weight. Sizes: "plain", and "full" with a temperature, a bias or a softcap. IEEE float32 runs on the
# ordinary cores.
SWEEP = ConfigTable(
    "linear_nce",
    "sweep",
    {
        "sm_80": {"plain": sweep_tile(64, 64, 8, 2), "full": sweep_tile(64, 64, 8, 2)},
        "sm_90": {"plain": sweep_tile(64, 128, 8, 3), "full": sweep_tile(64, 64, 8, 3)},
        "sm_100": {"plain": sweep_tile(64, 128, 8, 3), "full": sweep_tile(64, 128, 8, 3)},
        "float32": {"plain": sweep_tile(16, 32, 4, 1), "full": sweep_tile(16, 32, 4, 2)},
    },
    interpreter=sweep_tile(16, 32, 4, 1, split_v=64),
)
DLOGITS = ConfigTable(
    "linear_nce",
    "dlogits",
    {
        "sm_80": {"plain": dlogits_tile(64, 128, 8, 3), "full": dlogits_tile(64, 128, 8, 3)},
        "sm_90": {"plain": dlogits_tile(128, 128, 8, 3), "full": dlogits_tile(128, 128, 8, 3)},
        "sm_100": {"plain": dlogits_tile(128, 128, 8, 3), "full": dlogits_tile(128, 64, 8, 3)},
        "float32": {"plain": dlogits_tile(16, 32, 4, 1), "full": dlogits_tile(16, 32, 4, 1)},
    },
    interpreter=dlogits_tile(16, 32, 4, 1),
)
TABLES: dict[str, ConfigTable[str, Any]] = {table.part: table for table in (SWEEP, DLOGITS)}

# Kernels without a matrix product, with nothing to tune.
COMBINE = CombineConfig(block_t=64, num_warps=4, num_stages=1)
CALIBRATE = CalibrateConfig(block_t=64, block_j=64, num_warps=4, num_stages=1)

# Row statistics: a lane for each thread, a vector of 16 bytes for each lane. With Triton 3.6 two lanes spilled.
_STATS_16BIT = StatsConfig(lanes=256, width=8, num_warps=8, num_stages=1)
_STATS_FLOAT = StatsConfig(lanes=256, width=4, num_warps=8, num_stages=1)
_STATS_INTERPRETER = StatsConfig(lanes=8, width=8, num_warps=4, num_stages=1)
_DZ = DzConfig(block_v=4096, block_j=1024, num_warps=8, num_stages=1)
_DZ_INTERPRETER = DzConfig(block_v=64, block_j=8, num_warps=4, num_stages=1)


def stats_config(dtype: torch.dtype, interpreted: bool) -> StatsConfig:
    """Return the config of the row statistics for logits of a dtype, the same on every GPU."""
    if interpreted:
        return _STATS_INTERPRETER
    return _STATS_FLOAT if dtype == torch.float32 else _STATS_16BIT


def dz_config(interpreted: bool) -> DzConfig:
    """Return the config of the row gradients, the same on every GPU and for every dtype."""
    return _DZ_INTERPRETER if interpreted else _DZ
