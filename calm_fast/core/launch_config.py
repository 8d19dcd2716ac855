"""Launch numbers of Triton kernels: a frozen dataclass, safe defaults given by the caller, measured ones from JSON.

A measured file is ``kernels/<op>/tuned/<gpu>.json``:

    {"op": ..., "gpu": ..., "versions": {...}, "entries": [
        {"part": "fwd", "dtype": "bfloat16", "head_dim": 128, "shape": {"M": 4096, "N": 4096},
         "config": {"block_m": 128, "block_n": 128, "num_warps": 8, "num_stages": 2}}, ...]}

`part`, `dtype` and `head_dim` must match exactly; among the matches the entry with the nearest shape wins.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class LaunchConfig:
    """Tile sizes and compiler options of one kernel launch; every field is a compile-time constant.

    block_m: query rows per tile. block_n: keys per tile. num_stages: depth of the load pipeline.
    split_keys: keys per program where the key axis is split over programs (decode), else 0.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    split_keys: int = 0

    def __post_init__(self) -> None:
        for name in ("block_m", "block_n", "num_warps"):
            value = getattr(self, name)
            if value < 1 or value & (value - 1):
                raise ValueError(f"LaunchConfig: `{name}` must be a power of two, got {value}")
        if self.num_stages < 1:
            raise ValueError(f"LaunchConfig: `num_stages` must be at least 1, got {self.num_stages}")
        if self.split_keys < 0 or self.split_keys % self.block_n:
            raise ValueError(
                f"LaunchConfig: `split_keys` must be a multiple of block_n {self.block_n}, got {self.split_keys}"
            )


def gpu_slug(name: str) -> str:
    """File stem for a GPU name: "NVIDIA H200" -> "nvidia_h200"."""
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")


@cache
def _entries(path: Path) -> tuple[dict[str, Any], ...]:
    return tuple(json.loads(path.read_text())["entries"]) if path.is_file() else ()


def _distance(entry: dict[str, Any], shape: dict[str, int]) -> float:
    """Sum of |log2 ratio| over the sizes the entry was measured at; a size we do not know counts as far."""
    measured = entry.get("shape", {})
    return sum(
        abs(math.log2(max(shape[key], 1) / max(size, 1))) if key in shape else 64.0 for key, size in measured.items()
    )


def tuned_config(
    folder: Path, gpu: str, part: str, dtype: str, head_dim: int, shape: dict[str, int]
) -> LaunchConfig | None:
    """The measured config nearest to `shape`, or None where this GPU, part, dtype or head dim was never measured.

    Args:
        folder: ``kernels/<op>/tuned``. gpu: the device's name. part: which kernel of the op.
        dtype: "bfloat16" and so on. head_dim: as the kernel pads it. shape: named sizes, e.g. {"M": .., "N": ..}.
    """
    matches = [
        entry
        for entry in _entries(folder / f"{gpu_slug(gpu)}.json")
        if (entry["part"], entry["dtype"], entry["head_dim"]) == (part, dtype, head_dim)
    ]
    if not matches:
        return None
    return LaunchConfig(**min(matches, key=lambda entry: _distance(entry, shape))["config"])
