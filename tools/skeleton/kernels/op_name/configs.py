"""Launch configs of the op_name kernel: its dataclass and its table."""

from __future__ import annotations

from dataclasses import dataclass

from calm_fast.core.launch_config import LaunchConfig
from calm_fast.kernels.common.config_table import TENSOR_CORE_TARGETS, ConfigTable


@dataclass(frozen=True, kw_only=True)
class ElementwiseConfig(LaunchConfig):
    """block_size: elements of a program."""

    block_size: int


# not measured: one size for every architecture and dtype
_DEFAULT = {"any": ElementwiseConfig(block_size=1024, num_warps=4, num_stages=1)}
FWD = ConfigTable(
    "op_name",
    "fwd",
    dict.fromkeys((*TENSOR_CORE_TARGETS, "float32"), _DEFAULT),
    interpreter=ElementwiseConfig(block_size=32, num_warps=4, num_stages=1),
)
