"""Launch configs of the cross_attention kernels, and the representative launches that code generation checks."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from calm_fast.kernels.common.launching import LaunchConfig, family, gpu, measured_config

_INTERPRETER = {
    "fwd": LaunchConfig(16, 32, 4, 1),
    "dkdv": LaunchConfig(16, 32, 4, 1),
    "dq": LaunchConfig(16, 32, 4, 1),
    "decode": LaunchConfig(16, 32, 4, 1, split_keys=64),
}


@dataclass(frozen=True)
class BackwardConfig:
    """Launch configs of the two backward kernels."""

    dkdv: LaunchConfig
    dq: LaunchConfig


# (block_m, block_n, num_warps, num_stages) by architecture and head dim, for 16-bit inputs: the largest tiles that
# compile to zero spills for every kind of mask (the table of docs/ops/cross_attention.md), not measured speeds.
_Tiles = dict[int, tuple[int, int, int, int]]
_HALF: dict[int, dict[str, _Tiles]] = {
    80: {  # also within the 99 KiB of shared memory of sm_86 and sm_89
        "fwd": {64: (128, 64, 8, 3), 128: (128, 32, 8, 3), 256: (64, 32, 8, 2)},
        "dkdv": {64: (32, 64, 8, 2), 128: (32, 64, 8, 2), 256: (16, 32, 8, 1)},
        "dq": {64: (64, 64, 8, 2), 128: (64, 64, 8, 2), 256: (64, 32, 8, 1)},
    },
    90: {
        "fwd": {64: (128, 128, 8, 3), 128: (128, 64, 8, 3), 256: (128, 32, 8, 2)},
        "dkdv": {64: (64, 128, 8, 2), 128: (32, 64, 8, 2), 256: (32, 32, 8, 2)},
        "dq": {64: (128, 64, 8, 3), 128: (128, 64, 8, 2), 256: (64, 16, 8, 2)},
    },
    100: {
        "fwd": {64: (128, 64, 8, 3), 128: (128, 64, 8, 2), 256: (64, 32, 8, 2)},
        "dkdv": {64: (64, 128, 8, 2), 128: (64, 64, 8, 1), 256: (32, 32, 8, 1)},
        "dq": {64: (128, 64, 8, 2), 128: (128, 64, 8, 1), 256: (32, 32, 8, 1)},
    },
}
# IEEE float32 products run on the ordinary cores: small tiles, whose operands fit in registers
_FLOAT32: dict[str, _Tiles] = {
    "fwd": {64: (32, 32, 8, 1), 128: (16, 16, 8, 1), 256: (16, 16, 8, 1)},
    "dkdv": {64: (16, 16, 4, 1), 128: (16, 32, 8, 1), 256: (16, 16, 8, 1)},
    "dq": {64: (16, 16, 4, 1), 128: (16, 16, 8, 1), 256: (16, 16, 8, 1)},
}
_DECODE_HALF: _Tiles = {64: (16, 64, 4, 3), 128: (16, 64, 4, 3), 256: (16, 32, 4, 3)}
_DECODE_FLOAT32: _Tiles = {64: (16, 16, 4, 2), 128: (16, 16, 4, 2), 256: (16, 16, 4, 2)}
_SPLIT_KEYS = 256  # a constant: were it to follow the batch size, a row's bits would too


def default_config(part: str, arch: int, dtype: torch.dtype, block_d: int) -> LaunchConfig:
    """Launch numbers that fit the architecture without spills; unknown architectures get the smallest tiles.

    Args:
        part: "fwd", "dkdv", "dq" or "decode". arch: 10 * major + minor. block_d: padded head dim, at most 256.
    """
    d = max(64, block_d)
    if part == "decode":
        tiles = _DECODE_FLOAT32 if dtype == torch.float32 else _DECODE_HALF
        return LaunchConfig(*tiles[d], split_keys=_SPLIT_KEYS)
    if dtype == torch.float32:
        return LaunchConfig(*_FLOAT32[part][d])
    return LaunchConfig(*_HALF[family(arch)][part][d])


def pick_config(
    part: str, device: torch.device, dtype: torch.dtype, block_d: int, shape: dict[str, int], interpreted: bool
) -> LaunchConfig:
    """Launch numbers of one kernel: measured on this GPU if there are any, else the default of its architecture."""
    if interpreted:
        return _INTERPRETER[part]  # small tiles, so that small tests cross tile edges
    measured = measured_config("cross_attention", part, device, dtype, block_d, shape)
    return measured or default_config(part, gpu(device).arch, dtype, block_d)
