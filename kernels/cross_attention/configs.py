"""Launch configs of the cross_attention kernels: their dataclasses and tables."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from calm_fast.core.launch_config import LaunchConfig
from calm_fast.kernels.common.config_table import TENSOR_CORE_TARGETS, ConfigTable


@dataclass(frozen=True, kw_only=True)
class AttentionConfig(LaunchConfig):
    """Tiles of the fwd, dkdv and dq kernels. block_m: queries of a tile. block_n: keys of a tile."""

    block_m: int
    block_n: int


@dataclass(frozen=True, kw_only=True)
class DecodeConfig(LaunchConfig):
    """Tiles of the decode kernel.

    block_r: rows of a tile, (query, head of the group) pairs. block_n: keys of a tile. split_keys: keys of a program,
    a multiple of block_n.
    """

    block_r: int
    block_n: int
    split_keys: int

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_multiple("split_keys", "block_n")


@dataclass(frozen=True, kw_only=True)
class RowTermsConfig(LaunchConfig):
    """Tile of the row terms kernel of the backward pass. block_m: queries of a program."""

    block_m: int


@dataclass(frozen=True, kw_only=True)
class RangesConfig(LaunchConfig):
    """Tile of the query ranges kernel. block_tiles: query tiles that one step looks at."""

    block_tiles: int


@dataclass(frozen=True, kw_only=True)
class CombineConfig(LaunchConfig):
    """Tile of the kernel that combines the splits of decode. block_s: splits that one step reads."""

    block_s: int


@dataclass(frozen=True)
class BackwardConfig:
    """Launch configs of the two backward kernels."""

    dkdv: AttentionConfig
    dq: AttentionConfig


_SPLIT_KEYS = 256  # a constant: if it depended on the batch size, a row's bits would too


def attention_tile(block_m: int, block_n: int, num_warps: int, num_stages: int) -> AttentionConfig:
    """Return a row of a table."""
    return AttentionConfig(block_m=block_m, block_n=block_n, num_warps=num_warps, num_stages=num_stages)


def _decode_tile(block_n: int, num_stages: int, split_keys: int = _SPLIT_KEYS) -> DecodeConfig:
    return DecodeConfig(block_r=16, block_n=block_n, split_keys=split_keys, num_warps=4, num_stages=num_stages)


# For 16-bit inputs the defaults are the largest tiles that compile to zero spills for every kind of mask (the table of
# docs/ops/cross_attention.md), not measured speeds. Those of sm_80 also fit the 99 KiB of shared memory of sm_86 and
# sm_89. Float32 tiles are small, so that their operands fit in registers. Sizes are padded head dims.
FWD = ConfigTable(
    "cross_attention",
    "fwd",
    {
        "sm_80": {
            64: attention_tile(128, 64, 8, 3),
            128: attention_tile(64, 32, 8, 3),
            256: attention_tile(64, 16, 8, 2),
        },
        "sm_90": {
            64: attention_tile(128, 128, 8, 3),
            128: attention_tile(128, 64, 8, 3),
            256: attention_tile(128, 16, 8, 2),
        },
        "sm_100": {
            64: attention_tile(128, 64, 8, 3),
            128: attention_tile(128, 64, 8, 2),
            256: attention_tile(64, 32, 8, 2),
        },
        "float32": {
            64: attention_tile(32, 32, 8, 1),
            128: attention_tile(16, 16, 8, 1),
            256: attention_tile(16, 32, 8, 1),
        },
    },
    interpreter=attention_tile(16, 32, 4, 1),
)
DKDV = ConfigTable(
    "cross_attention",
    "dkdv",
    {
        "sm_80": {
            64: attention_tile(32, 64, 8, 2),
            128: attention_tile(32, 64, 8, 2),
            256: attention_tile(16, 32, 8, 1),
        },
        "sm_90": {
            64: attention_tile(64, 128, 8, 2),
            128: attention_tile(32, 64, 8, 2),
            256: attention_tile(32, 32, 8, 2),
        },
        "sm_100": {
            64: attention_tile(64, 128, 8, 2),
            128: attention_tile(64, 64, 8, 1),
            256: attention_tile(32, 32, 8, 2),
        },
        "float32": {
            64: attention_tile(16, 16, 4, 1),
            128: attention_tile(16, 32, 8, 1),
            256: attention_tile(16, 16, 8, 1),
        },
    },
    interpreter=attention_tile(16, 32, 4, 1),
)
DQ = ConfigTable(
    "cross_attention",
    "dq",
    {
        "sm_80": {
            64: attention_tile(64, 64, 8, 2),
            128: attention_tile(64, 64, 8, 2),
            256: attention_tile(64, 32, 8, 1),
        },
        "sm_90": {
            64: attention_tile(128, 64, 8, 3),
            128: attention_tile(128, 64, 8, 2),
            256: attention_tile(64, 16, 8, 2),
        },
        "sm_100": {
            64: attention_tile(128, 64, 8, 2),
            128: attention_tile(128, 64, 8, 1),
            256: attention_tile(32, 32, 8, 1),
        },
        "float32": {
            64: attention_tile(16, 16, 4, 1),
            128: attention_tile(16, 16, 8, 1),
            256: attention_tile(16, 16, 8, 1),
        },
    },
    interpreter=attention_tile(16, 32, 4, 1),
)

_DECODE_16BIT = {64: _decode_tile(64, 3), 128: _decode_tile(64, 3), 256: _decode_tile(32, 3)}
DECODE = ConfigTable(
    "cross_attention",
    "decode",
    {
        **dict.fromkeys(TENSOR_CORE_TARGETS, _DECODE_16BIT),
        "float32": {64: _decode_tile(16, 2), 128: _decode_tile(16, 2), 256: _decode_tile(16, 2)},
    },
    interpreter=_decode_tile(32, 1, split_keys=64),
)
TABLES: dict[str, ConfigTable[int, Any]] = {table.part: table for table in (FWD, DKDV, DQ, DECODE)}

# Kernels without a product, with nothing to tune. 64 rows of 256 columns spilled in the row terms kernel.
_ROW_TERMS = RowTermsConfig(block_m=64, num_warps=4, num_stages=3)
_ROW_TERMS_WIDE = RowTermsConfig(block_m=32, num_warps=4, num_stages=3)
RANGES = RangesConfig(block_tiles=16, num_warps=4, num_stages=3)
COMBINE = CombineConfig(block_s=16, num_warps=4, num_stages=3)


def table_size(block_d: int) -> int:
    """Return the size of a padded head dim, at most 256, in the tables."""
    return max(64, block_d)


def row_terms_config(block_d: int) -> RowTermsConfig:
    """Return the config of the row terms kernel at a padded head dim."""
    return _ROW_TERMS if block_d <= 128 else _ROW_TERMS_WIDE
