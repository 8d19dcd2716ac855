"""The one form of launch config tables: target -> size -> config, for each kernel of an op.

A target is the hardware that does the products: "sm_80", "sm_90", "sm_100" for 16-bit inputs on tensor cores, "float32"
for IEEE products. A size is the other thing that the op's tiles depend on: a head dim, a number of tokens, the options
in use. Needs no Triton.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

import torch

from calm_fast.core.launch_config import Config, Measured, measured_configs, nearest
from calm_fast.kernels.common import hardware

KERNELS = Path(__file__).resolve().parents[1]  # holds <op>/tuned/<gpu>.json, written by calm_fast.benchmarks.tune
TENSOR_CORE_TARGETS = ("sm_80", "sm_90", "sm_100")

Size = TypeVar("Size", int, str)


def padded(n: int) -> int:
    """Return the next power of two from n on, at least 16 as a matrix product of a tile needs."""
    return max(16, 1 << (n - 1).bit_length())


def target(arch: int, dtype: torch.dtype) -> str:
    """Return the target of a GPU (arch = 10 * compute capability) and a dtype.

    IEEE float32 products run on the ordinary cores, alike on every architecture. Unknown architectures get the
    smallest tiles. Consumer Blackwell (120) has the 99 KiB of shared memory of sm_86 and sm_89, not the 227 KiB of
    sm_100.
    """
    if dtype == torch.float32:
        return "float32"
    return "sm_90" if arch == 90 else "sm_100" if arch in (100, 103) else "sm_80"


def measured_config(
    kind: type[Config],
    op: str,
    part: str,
    gpu: hardware.Gpu,
    dtype: torch.dtype,
    depth: int,
    shape: Mapping[str, int],
) -> Config | None:
    """Return the config measured on a GPU for the nearest shape, or None if there is none.

    Args:
        kind: the dataclass of the kernel's config.
        op: name of the op.
        part: kernel of the op.
        gpu: from `hardware.gpu`.
        dtype: of the tensors.
        depth: padded size of the tile's columns, matched exactly ("head_dim" in the file).
        shape: named sizes; the entry nearest to them wins.
    """
    found: Measured[Config] = _measured(cast(Any, kind), op, part, gpu.name, dtype, depth)
    return nearest(found, shape)


@cache
def _measured(kind: type[Any], op: str, part: str, gpu: str, dtype: torch.dtype, depth: int) -> Measured[Any]:
    return measured_configs(kind, KERNELS / op / "tuned", gpu, part, str(dtype).removeprefix("torch."), depth)


@dataclass(frozen=True, eq=False)  # hashed by identity: _chosen keeps answers per table
class ConfigTable(Generic[Size, Config]):
    """Launch configs of one kernel.

    defaults: target -> size -> config, safe without measurements. interpreter: small tiles, so that small tests cross
    tile edges.
    """

    op: str
    part: str
    defaults: Mapping[str, Mapping[Size, Config]]
    interpreter: Config

    @property
    def kind(self) -> type[Config]:
        """The dataclass of the kernel's configs."""
        return type(self.interpreter)

    def default(self, arch: int, dtype: torch.dtype, size: Size) -> Config:
        """Return the default of an architecture (10 * compute capability)."""
        return self.defaults[target(arch, dtype)][size]

    def pick(
        self,
        device: torch.device,
        dtype: torch.dtype,
        size: Size,
        depth: int,
        shape: Mapping[str, int],
        interpreted: bool,
        measured: bool = True,
    ) -> Config:
        """Return the config of a launch: measured on this GPU if possible, else the default of its architecture.

        Args:
            device: the GPU.
            dtype: of the tensors.
            size: key of the default.
            depth, shape: as in `measured_config`.
            interpreted: the interpreter runs the kernel.
            measured: look for measured configs.
        """
        if interpreted:
            return self.interpreter
        gpu = hardware.gpu(device)
        found: Config = _chosen(self, gpu, dtype, size, depth, tuple(shape.items()) if measured else None)
        return found


# A launch costs microseconds, so the choice must not cost tens of them. Bounded: decoding sees a new length every step.
@lru_cache(maxsize=4096)
def _chosen(
    table: ConfigTable[Any, Any],
    gpu: hardware.Gpu,
    dtype: torch.dtype,
    size: Any,
    depth: int,
    shape: tuple[tuple[str, int], ...] | None,
) -> Any:
    """Return the config of a launch on `gpu`; shape None: the default of its architecture."""
    found = None
    if shape is not None:
        found = measured_config(table.kind, table.op, table.part, gpu, dtype, depth, dict(shape))
    return found or table.default(gpu.arch, dtype, size)
