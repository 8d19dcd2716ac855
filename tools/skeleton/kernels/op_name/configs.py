"""Launch configs of the op_name kernel."""

from __future__ import annotations

from dataclasses import dataclass

from calm_fast.core.launch_config import LaunchConfig


@dataclass(frozen=True, kw_only=True)
class ElementwiseConfig(LaunchConfig):
    """block: elements per program."""

    block: int


DEFAULT = ElementwiseConfig(block=1024, num_warps=4, num_stages=1)
INTERPRETER = ElementwiseConfig(block=32, num_warps=4, num_stages=1)  # small, so that small tests cross tile edges
