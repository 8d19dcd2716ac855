"""Launch configs of Triton kernels: the base dataclass, and the lookup of measured configs in JSON files.

Each kernel that is tuned has its own subclass in ``kernels/<op>/configs.py``, next to the defaults of the op.
A measured file is ``kernels/<op>/tuned/<gpu>.json``; "config" holds the fields of the kernel's dataclass:

    {"op": ..., "gpu": ..., "versions": {...}, "entries": [
        {"part": "fwd", "dtype": "bfloat16", "head_dim": 128, "shape": {"M": 4096, "N": 4096},
         "config": {"block_m": 128, "block_n": 128, "num_warps": 8, "num_stages": 2}}, ...]}

`part`, `dtype` and `head_dim` must match exactly. Among the matches the entry with the nearest shape wins. A process
reads a file once.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any, TypeAlias, TypeVar


@dataclass(frozen=True, kw_only=True)
class LaunchConfig:
    """Compiler options of one kernel launch. Subclasses add tile sizes; every field is a compile-time constant.

    Fields named `block_*` are sizes of a tile, powers of two.

    Args:
        num_warps: warps of a program, a power of two.
        num_stages: depth of the load pipeline, at least 1.
    Raises:
        ValueError: a field has a value that no kernel can be launched with.
    """

    num_warps: int
    num_stages: int

    def __post_init__(self) -> None:
        self._require_powers_of_two(
            "num_warps", *(field.name for field in fields(self) if field.name.startswith("block_"))
        )
        if self.num_stages < 1:
            raise ValueError(f"{type(self).__name__}: `num_stages` must be at least 1, got {self.num_stages}")

    def __str__(self) -> str:
        sizes = [f"{f.name} {getattr(self, f.name)}" for f in fields(self) if not f.name.startswith("num_")]
        return ", ".join([*sizes, f"{self.num_warps} warps", f"{self.num_stages} stages"])

    def _require_powers_of_two(self, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1 or value & (value - 1):
                raise ValueError(f"{type(self).__name__}: `{name}` must be a power of two, got {value}")

    def _require_multiple(self, name: str, block: str) -> None:
        """Raise unless the field `name` is a positive multiple of the field `block`."""
        value, unit = getattr(self, name), getattr(self, block)
        if value < 1 or value % unit:
            raise ValueError(
                f"{type(self).__name__}: `{name}` must be a positive multiple of {block} {unit}, got {value}"
            )


Config = TypeVar("Config", bound=LaunchConfig)
Measured: TypeAlias = tuple[tuple[dict[str, float], Config], ...]


@cache
def gpu_slug(name: str) -> str:
    """Return the file stem of a GPU name: "NVIDIA H200" -> "nvidia_h200"."""
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")


@cache
def _entries(path: Path) -> tuple[dict[str, Any], ...]:
    return tuple(json.loads(path.read_text())["entries"]) if path.is_file() else ()


def measured_configs(
    kind: type[Config], folder: Path, gpu: str, part: str, dtype: str, head_dim: int
) -> Measured[Config]:
    """Return (log2 of the sizes it was measured at, config) of each entry of a GPU, part, dtype and head dim.

    Args:
        kind: the dataclass of the kernel's config.
        folder: ``kernels/<op>/tuned``.
        gpu: the device's name.
        part: kernel of the op, e.g. "fwd".
        dtype: "bfloat16", "float16" or "float32".
        head_dim: padded depth of the tile, as the kernel sees it.
    Raises:
        ValueError: a matching entry does not hold the fields of `kind`.
    """
    path = folder / f"{gpu_slug(gpu)}.json"
    expected = {field.name for field in fields(kind)}
    found = []
    for entry in _entries(path):
        if (entry["part"], entry["dtype"], entry["head_dim"]) != (part, dtype, head_dim):
            continue
        numbers = entry["config"]
        if set(numbers) != expected:
            raise ValueError(
                f"measured_configs: `config` of part {part} in {path} must have the fields {sorted(expected)},"
                f" got {sorted(numbers)}; remove the file or write it again: python -m calm_fast.benchmarks.tune"
            )
        sizes = {key: math.log2(max(size, 1)) for key, size in entry.get("shape", {}).items()}
        found.append((sizes, kind(**numbers)))
    return tuple(found)


def _distance(measured: dict[str, float], shape: Mapping[str, int]) -> float:
    """Return the sum of |log2 ratio| over the sizes the entry was measured at; a size missing from `shape` is far."""
    return sum(abs(math.log2(max(shape[key], 1)) - log) if key in shape else 64.0 for key, log in measured.items())


def nearest(measured: Measured[Config], shape: Mapping[str, int]) -> Config | None:
    """Return the config of `measured_configs` nearest to a shape such as {"M": 4096}, or None if there is none."""
    return min(measured, key=lambda entry: _distance(entry[0], shape))[1] if measured else None
