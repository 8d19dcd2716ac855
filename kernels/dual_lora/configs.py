"""Launch configs of the dual_lora kernels: their dataclasses and tables."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from calm_fast.core.launch_config import LaunchConfig
from calm_fast.kernels.common import hardware
from calm_fast.kernels.common.config_table import TENSOR_CORE_TARGETS, ConfigTable, padded


@dataclass(frozen=True, kw_only=True)
class TileConfig(LaunchConfig):
    """Tiles of the update, mix and gelu_bwd kernels.

    block_tokens: tokens of a tile. block_columns: columns of the output, or units of the bottleneck.
    """

    block_tokens: int
    block_columns: int


@dataclass(frozen=True, kw_only=True)
class GateConfig(LaunchConfig):
    """Tile of the gate_bwd kernel. block_tokens: tokens of a program."""

    block_tokens: int


def tile(block_tokens: int, block_columns: int, num_warps: int, num_stages: int) -> TileConfig:
    """Return a row of a table of the update, mix or gelu_bwd kernel."""
    return TileConfig(
        block_tokens=block_tokens, block_columns=block_columns, num_warps=num_warps, num_stages=num_stages
    )


def gate_tile(block_tokens: int, num_warps: int, num_stages: int) -> GateConfig:
    """Return a row of the table of the gate_bwd kernel."""
    return GateConfig(block_tokens=block_tokens, num_warps=num_warps, num_stages=num_stages)


# Defaults that are safe on any GPU from sm_80 on. Sizes: "few" tokens (one row of tiles, and narrow tiles make more
# programs), "shallow" and "deep" products.
_FEW = 16  # tokens
_SHALLOW = 128  # depth of the products
# A deep product of the gated mix has its left operand in registers. In a pipeline Triton 3.6 waits after every one of
# its instructions on sm_90. Without one, three blocks fit on a multiprocessor instead of two; by the model the tensor
# cores' share is 33 % instead of 34.
_UPDATE = {
    "few": tile(16, 64, 4, 2),
    "shallow": tile(64, 128, 4, 2),
    "deep": tile(64, 64, 4, 2),
    "deep gated": tile(64, 64, 4, 1),
}
UPDATE = ConfigTable(
    "dual_lora",
    "update",
    {
        **dict.fromkeys(TENSOR_CORE_TARGETS, _UPDATE),
        "float32": {
            "few": tile(16, 64, 4, 2),
            "shallow": tile(64, 64, 8, 1),
            "deep": tile(64, 64, 8, 1),
            "deep gated": tile(64, 64, 8, 2),
        },
    },
    interpreter=tile(16, 32, 4, 1),
)
# Shallow, the mix is bound by the bytes of u and mix, and more blocks fit with 32 rows. With 64 rows on sm_90 ptxas
# inserts a wait before its two products (Triton 3.6, C7519).
_MIX = {"few": tile(16, 64, 4, 2), "shallow": tile(32, 64, 4, 2), "deep": tile(64, 64, 4, 2)}
MIX = ConfigTable(
    "dual_lora",
    "mix",
    {
        **dict.fromkeys(TENSOR_CORE_TARGETS, _MIX),
        "float32": {"few": tile(16, 64, 4, 2), "shallow": tile(32, 32, 8, 2), "deep": tile(32, 32, 8, 2)},
    },
    interpreter=tile(16, 32, 4, 1),
)
# two hidden tiles and their gradients: no registers are left for a pipeline
_GELU_BWD = {"few": tile(16, 64, 4, 2), "shallow": tile(32, 64, 4, 1), "deep": tile(32, 32, 4, 1)}
GELU_BWD = ConfigTable(
    "dual_lora",
    "gelu_bwd",
    {
        **dict.fromkeys(TENSOR_CORE_TARGETS, _GELU_BWD),
        "float32": {"few": tile(16, 64, 4, 2), "shallow": tile(32, 32, 4, 1), "deep": tile(32, 32, 4, 1)},
    },
    interpreter=tile(16, 32, 4, 1),
)
_GATE_BWD = {"few": gate_tile(16, 4, 2), "shallow": gate_tile(32, 4, 2), "deep": gate_tile(32, 4, 2)}
GATE_BWD = ConfigTable(
    "dual_lora",
    "gate_bwd",
    {
        **dict.fromkeys(TENSOR_CORE_TARGETS, _GATE_BWD),
        "float32": {"few": gate_tile(16, 4, 2), "shallow": gate_tile(32, 8, 2), "deep": gate_tile(32, 8, 2)},
    },
    interpreter=gate_tile(16, 4, 1),
)
TABLES: dict[str, ConfigTable[str, Any]] = {table.part: table for table in (UPDATE, MIX, GELU_BWD, GATE_BWD)}


def programs_wanted(device: torch.device, interpreted: bool) -> int:
    """Return the number of programs that keeps a GPU busy: four for each multiprocessor."""
    return 4 if interpreted or device.type != "cuda" else 4 * hardware.gpu(device).multiprocessors


def block_k(k: int, dtype: torch.dtype, interpreted: bool) -> int:
    """Return the depth of a tile of the rank update: all of K if it is small, else a chunk."""
    if interpreted:
        return 16
    if dtype == torch.float32:  # products outside the tensor cores unroll their depth
        return min(32, padded(k))
    return padded(k) if k <= 128 else 64


def block_r(r: int, dtype: torch.dtype, interpreted: bool) -> int:
    """Return the number of columns of z that are read together."""
    if interpreted:
        return 16
    return min(32 if dtype == torch.float32 else 64, padded(r))


def table_size(tokens: int, k: int, gated: bool = False) -> str:
    """Return the size, in the tables, of a number of tokens and a depth k of the products.

    gated: the rank update that makes its left operand of z and the gate.
    """
    return "few" if tokens <= _FEW else "shallow" if k <= _SHALLOW else "deep gated" if gated else "deep"
