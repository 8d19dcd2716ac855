"""Properties of the GPU that launch configs depend on. Needs no Triton."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch


@dataclass(frozen=True)
class Gpu:
    """Properties of a GPU that launch configs depend on; arch = 10 * compute capability."""

    name: str
    arch: int
    multiprocessors: int


@cache  # asking the driver takes microseconds, at every launch
def _properties(index: int) -> Gpu:
    found = torch.cuda.get_device_properties(index)
    return Gpu(found.name, 10 * found.major + found.minor, found.multi_processor_count)


def gpu(device: torch.device) -> Gpu:
    """Return the properties of the GPU behind a device, with or without an index."""
    return _properties(device.index if device.index is not None else torch.cuda.current_device())
