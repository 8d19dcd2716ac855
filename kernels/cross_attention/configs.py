"""Launch configs of the cross_attention kernels: their dataclasses and tables."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch

from calm_fast.core.launch_config import LaunchConfig
from calm_fast.kernels.common.config_table import TENSOR_CORE_TARGETS, ConfigTable, padded, target


@dataclass(frozen=True, kw_only=True)
class AttentionConfig(LaunchConfig):
    """Tiles of the fwd, dkdv and dq kernels. block_m: queries of a tile. block_n: keys of a tile."""

    block_m: int
    block_n: int


@dataclass(frozen=True, kw_only=True)
class DecodeConfig(LaunchConfig):
    """Tiles of the decode kernel.

    block_r: rows of a tile, (query, head of the group) pairs. block_n: keys of a tile. split_keys: keys of a program,
    a multiple of block_n. mask_edges_only: blocks that every row of a tile sees are not masked; else every block is.
    """

    block_r: int
    block_n: int
    split_keys: int
    mask_edges_only: bool = False

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
    """Launch configs of the backward kernels.

    dkdv: of the kernel of dk and dv. dv: of a launch of its own for dv; dkdv is then of dk alone. None: one launch does
    both.
    """

    dkdv: AttentionConfig
    dq: AttentionConfig
    dv: AttentionConfig | None = None


_SPLIT_KEYS = 256  # a constant: if it depended on the batch size, a row's bits would too
_PACKED_KEYS = 4096  # keys of one sequence that packed rows spread over the GPU


def attention_tile(block_m: int, block_n: int, num_warps: int, num_stages: int) -> AttentionConfig:
    """Return a row of a table."""
    return AttentionConfig(block_m=block_m, block_n=block_n, num_warps=num_warps, num_stages=num_stages)


def _decode_tile(block_n: int, num_stages: int, split_keys: int = _SPLIT_KEYS) -> DecodeConfig:
    return DecodeConfig(block_r=16, block_n=block_n, split_keys=split_keys, num_warps=4, num_stages=num_stages)


def _packed_tile(
    block_r: int, block_n: int, num_warps: int, num_stages: int, split_keys: int = _SPLIT_KEYS
) -> DecodeConfig:
    return DecodeConfig(
        block_r=block_r,
        block_n=block_n,
        split_keys=split_keys,
        mask_edges_only=True,
        num_warps=num_warps,
        num_stages=num_stages,
    )


# For 16-bit inputs the defaults are the tiles that a model of the machine code puts first among those that compile to
# zero spills for every kind of mask (docs/ops/cross_attention.md), not measured speeds. Those of sm_80 also fit the
# 99 KiB of shared memory of sm_86, sm_89 and sm_120. Float32 tiles are small, so that their operands fit in registers.
# Sizes are padded head dims.
FWD = ConfigTable(
    "cross_attention",
    "fwd",
    {
        "sm_80": {
            64: attention_tile(128, 64, 8, 3),
            128: attention_tile(128, 32, 8, 3),
            256: attention_tile(32, 32, 4, 2),  # 64 rows spill on sm_120, which takes these tiles too
        },
        "sm_90": {
            64: attention_tile(128, 128, 8, 2),
            128: attention_tile(128, 128, 8, 2),
            256: attention_tile(128, 64, 8, 2),
        },
        "sm_100": {
            64: attention_tile(128, 64, 8, 3),
            128: attention_tile(128, 64, 8, 2),
            256: attention_tile(64, 32, 8, 2),
        },
        "float32": {
            64: attention_tile(32, 32, 8, 1),
            128: attention_tile(16, 16, 8, 1),
            256: attention_tile(16, 16, 16, 1),
        },
    },
    interpreter=attention_tile(16, 32, 4, 1),
)
# There the kernel reads k and v through tensor descriptors, with the tiles above. With pointers, for strides that a
# descriptor cannot take, addresses need registers, and the tiles are smaller.
BOX_TARGETS = ("sm_90", "sm_100")
FWD_POINTERS = ConfigTable(
    "cross_attention",
    "fwd_pointers",
    {
        "sm_90": {
            64: attention_tile(128, 128, 8, 3),
            128: attention_tile(128, 64, 8, 3),
            256: attention_tile(128, 32, 8, 2),
        },
        "sm_100": {
            64: attention_tile(128, 64, 8, 3),
            128: attention_tile(128, 64, 8, 2),
            256: attention_tile(64, 32, 8, 2),
        },
    },
    interpreter=attention_tile(16, 32, 4, 1),
)
# With tensor descriptors for q and dout on sm_90 and sm_100; pointers there take the tiles of sm_80. The two
# accumulators of 64 keys of 256 columns exceed a warpgroup's registers: there dv has a launch of its own, and dk alone
# fits on one warpgroup.
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
            128: attention_tile(64, 128, 8, 2),
            256: attention_tile(64, 64, 4, 2),
        },
        "sm_100": {
            64: attention_tile(64, 64, 4, 2),
            128: attention_tile(64, 64, 8, 1),
            256: attention_tile(32, 32, 8, 2),
        },
        "float32": {
            64: attention_tile(16, 32, 4, 1),
            128: attention_tile(16, 32, 8, 1),
            256: attention_tile(16, 16, 8, 1),
        },
    },
    interpreter=attention_tile(16, 32, 4, 1),
)
DV = ConfigTable(
    "cross_attention", "dv", {"sm_90": {256: attention_tile(64, 128, 8, 2)}}, interpreter=attention_tile(16, 32, 4, 1)
)
# Four warps of dq at D 256 on sm_90: 128 x 64 would need more shared memory than there is, and the products of 128 x 32
# have 32 columns and wait for it.
DQ = ConfigTable(
    "cross_attention",
    "dq",
    {
        "sm_80": {
            64: attention_tile(64, 64, 8, 2),
            128: attention_tile(64, 64, 8, 2),
            256: attention_tile(64, 16, 8, 1),
        },
        "sm_90": {
            64: attention_tile(128, 64, 8, 3),
            128: attention_tile(128, 64, 8, 2),
            256: attention_tile(64, 64, 4, 2),
        },
        "sm_100": {
            64: attention_tile(128, 64, 8, 2),
            128: attention_tile(128, 64, 8, 1),
            256: attention_tile(32, 32, 8, 2),
        },
        "float32": {
            64: attention_tile(16, 16, 4, 1),
            128: attention_tile(16, 16, 4, 1),
            256: attention_tile(16, 16, 4, 1),
        },
    },
    interpreter=attention_tile(16, 32, 4, 1),
)
# There dq reads k and v through tensor descriptors too; with pointers it takes these tiles.
DQ_BOX_TARGETS = ("sm_90",)
DQ_POINTERS = ConfigTable(
    "cross_attention",
    "dq_pointers",
    {
        "sm_90": {
            64: attention_tile(128, 64, 8, 3),
            128: attention_tile(128, 64, 8, 2),
            256: attention_tile(128, 32, 8, 2),
        },
    },
    interpreter=attention_tile(16, 32, 4, 1),
)
# Small tiles without a pipeline: nearly always this launch only reads flags and ends.
REPAIR = ConfigTable(
    "cross_attention",
    "repair",
    {
        **dict.fromkeys(
            TENSOR_CORE_TARGETS,
            {64: attention_tile(32, 64, 8, 1), 128: attention_tile(32, 64, 8, 1), 256: attention_tile(16, 32, 8, 1)},
        ),
        "float32": DKDV.defaults["float32"],
    },
    interpreter=DKDV.interpreter,
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
# The decode kernel on more rows than that: 17 to 128 queries, or the heads of a group. Up to 64 rows of a KV head are
# bound by the keys that they read; above, tiles of 128 read them half as often. Head dims above 128 are not packed: two
# warpgroups would have to share 64 rows, and then they wait for each other at every product. `split_keys` is replaced.
_PACKED_NARROW = {64: _packed_tile(64, 32, 8, 2), 128: _packed_tile(64, 32, 8, 3)}
_PACKED_FLOAT32 = {64: _packed_tile(32, 32, 8, 1), 128: _packed_tile(16, 16, 8, 1)}
_PACKED_INTERPRETER = _packed_tile(16, 32, 4, 1, split_keys=64)
PACKED_64 = ConfigTable(
    "cross_attention",
    "packed64",
    {
        "sm_80": _PACKED_NARROW,
        "sm_90": {64: _packed_tile(64, 64, 4, 4), 128: _packed_tile(64, 32, 4, 4)},
        "sm_100": {64: _packed_tile(64, 64, 4, 3), 128: _packed_tile(64, 32, 8, 3)},
        "float32": _PACKED_FLOAT32,
    },
    interpreter=_PACKED_INTERPRETER,
)
PACKED_128 = ConfigTable(
    "cross_attention",
    "packed128",
    {
        "sm_80": _PACKED_NARROW,
        "sm_90": {64: _packed_tile(128, 128, 8, 3), 128: _packed_tile(128, 64, 8, 3)},
        "sm_100": {64: _packed_tile(128, 64, 8, 3), 128: _packed_tile(64, 32, 8, 3)},
        "float32": _PACKED_FLOAT32,
    },
    interpreter=_PACKED_INTERPRETER,
)
PACKED_MAX_D = 128
TABLES: dict[str, ConfigTable[int, Any]] = {
    table.part: table for table in (FWD, FWD_POINTERS, DKDV, DQ, DQ_POINTERS, DECODE, PACKED_64, PACKED_128)
}

# Padded head dims at which a kernel holds narrower ones in two parts (`column_parts`). Elsewhere two parts spilled or
# had as many products as one (docs/ops/cross_attention.md).
_BOTH, _WIDE = (128, 256), (256,)
TWO_PARTS: dict[str, dict[str, tuple[int, ...]]] = {
    "fwd": {"sm_80": _BOTH, "sm_90": _BOTH, "sm_100": _BOTH, "float32": _BOTH},
    "dkdv": {"sm_80": _WIDE, "sm_90": _BOTH, "sm_100": _WIDE, "float32": ()},
    "dq": {"sm_80": (), "sm_90": _BOTH, "sm_100": _BOTH, "float32": ()},
}

# Kernels without a product, with nothing to tune. 64 rows of 256 columns spilled in the row terms kernel.
_ROW_TERMS = RowTermsConfig(block_m=64, num_warps=4, num_stages=3)
_ROW_TERMS_WIDE = RowTermsConfig(block_m=32, num_warps=4, num_stages=3)
ROW_PADDING = 128  # rows of the row terms are padded to a multiple of it, and so of block_m of every backward kernel
RANGES = RangesConfig(block_tiles=16, num_warps=4, num_stages=3)
COMBINE = CombineConfig(block_s=16, num_warps=4, num_stages=3)


def searches(name: str, dtype: torch.dtype) -> bool:
    """Return whether the forward kernel looks for NaN and Inf in masked tiles of v, instead of repairing spoiled rows.

    Repairs are free for tiles without them. IEEE float32 products at D = 256 would spill there, and on sm_100 the
    reduction that finds spoiled rows breaks the compiler of Triton 3.6.
    """
    return dtype == torch.float32 or name == "sm_100"


def column_parts(d: int, kernel: str, name: str) -> tuple[int, int]:
    """Return the columns of the two parts in which a kernel holds a head dim; the second is 0 if there is one part.

    A tile has powers of two, at least 16, as sizes. So 80 becomes 64 + 16, 96 becomes 64 + 32, 192 becomes 128 + 64;
    112 would be 64 + 64 and stays one part of 128.

    Args:
        d: head dim.
        kernel: "fwd", "dkdv" or "dq"; any other has one part.
        name: target.
    """
    if kernel not in TWO_PARTS or padded(d) not in TWO_PARTS[kernel][name] or d == padded(d):
        return padded(d), 0
    first = padded(d) // 2
    rest = padded(d - first)
    return (first, rest) if rest < first else (padded(d), 0)


def table_size(block_d: int) -> int:
    """Return the size of a padded head dim, at most 256, in the tables."""
    return max(64, block_d)


def dv_config(arch: int, dtype: torch.dtype, size: int) -> AttentionConfig | None:
    """Return the config of dv's own launch beside the default of dk, or None where one launch does both."""
    return DV.defaults.get(target(arch, dtype), {}).get(size)


def row_terms_config(block_d: int) -> RowTermsConfig:
    """Return the config of the row terms kernel at a padded head dim."""
    return _ROW_TERMS if block_d <= 128 else _ROW_TERMS_WIDE


@cache  # once per launch otherwise
def packed_config(tile: DecodeConfig, tiles: int, multiprocessors: int) -> DecodeConfig:
    """Return a tile of PACKED_64 or PACKED_128 with its `split_keys`.

    4,096 keys of one sequence become about one program per multiprocessor. Neither the number of keys nor the batch
    counts, or a row's bits would depend on them.

    Args:
        tile: from a table.
        tiles: of one sequence, over all KV heads.
        multiprocessors: of the GPU.
    """
    splits = max(multiprocessors // tiles, 1)
    keys = max(_PACKED_KEYS // splits, _SPLIT_KEYS)
    return replace(tile, split_keys=-(-keys // 128) * 128)
