"""Launch config dataclasses that linear_nce and linear_logprob share, and the constants of their tiles."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from calm_fast.core.launch_config import LaunchConfig

GROUP = 8  # token tiles that share the vocabulary in L2
SPLIT_V = 2048  # a constant, so that a token's bits do not depend on how many tokens there are


@dataclass(frozen=True, kw_only=True)
class SweepConfig(LaunchConfig):
    """Tiles of a sweep over the vocabulary.

    block_t: tokens of a tile. block_v: vocabulary entries of a tile. split_v: vocabulary entries of a program, a
    multiple of block_v.
    """

    block_t: int
    block_v: int
    split_v: int

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_multiple("split_v", "block_v")


@dataclass(frozen=True, kw_only=True)
class DlogitsConfig(LaunchConfig):
    """Tiles of the logit gradients. block_t: tokens of a tile. block_v: vocabulary entries of a tile."""

    block_t: int
    block_v: int


@dataclass(frozen=True, kw_only=True)
class CombineConfig(LaunchConfig):
    """Tile of the kernel that combines the splits of a sweep. block_t: tokens of a program."""

    block_t: int


def sweep_tile(block_t: int, block_v: int, num_warps: int, num_stages: int, split_v: int = SPLIT_V) -> SweepConfig:
    """Return a row of a sweep's table."""
    return SweepConfig(block_t=block_t, block_v=block_v, split_v=split_v, num_warps=num_warps, num_stages=num_stages)


def dlogits_tile(block_t: int, block_v: int, num_warps: int, num_stages: int) -> DlogitsConfig:
    """Return a row of the logit gradients' table."""
    return DlogitsConfig(block_t=block_t, block_v=block_v, num_warps=num_warps, num_stages=num_stages)


def block_d(dtype: torch.dtype, interpreted: bool) -> int:
    """Return the depth of a tile of the product; float32 products outside the tensor cores unroll it."""
    return 16 if interpreted or dtype == torch.float32 else 64


def table_size(plain: bool) -> str:
    """Return the size in the tables: "plain" for a kernel without any of its options, else "full"."""
    return "plain" if plain else "full"
