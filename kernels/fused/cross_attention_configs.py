"""Launch configs of the cross_attention kernels, and the representative launches that code generation checks."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch

from calm_fast._tuning import LaunchConfig, tuned_config

_TUNED = Path(__file__).resolve().parent / "tuned" / "cross_attention"
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


@cache
def _gpu(index: int) -> tuple[str, int]:
    """Name and compute capability (10 * major + minor) of a GPU."""
    properties = torch.cuda.get_device_properties(index)
    return properties.name, 10 * properties.major + properties.minor


def default_config(part: str, arch: int, dtype: torch.dtype, block_d: int) -> LaunchConfig:
    raise NotImplementedError


def pick_config(
    part: str, device: torch.device, dtype: torch.dtype, block_d: int, shape: dict[str, int], interpreted: bool
) -> LaunchConfig:
    """Launch numbers of one kernel: measured on this GPU if there are any, else the default of its architecture."""
    if interpreted:
        return _INTERPRETER[part]  # small tiles, so that small tests cross tile edges
    name, arch = _gpu(device.index if device.index is not None else torch.cuda.current_device())
    tuned = tuned_config(_TUNED, name, part, str(dtype).removeprefix("torch."), block_d, shape)
    return tuned or default_config(part, arch, dtype, block_d)


def codegen_specs():
    return []
