"""Host code that every launcher of a Triton kernel shares.

`launch` runs a kernel on its tensors' device and that device's current stream. `addressable` gives a tensor strides
that a kernel can take. `float32_precision` follows the user's TF32 setting.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import triton

from calm_fast.core.launch_config import LaunchConfig

_MAX_STRIDE = 2**22  # 512 rows of a tile times this stay below 2**31: offsets inside a tile are 32-bit


def interpreted(kernel: Any) -> bool:
    """Return True if TRITON_INTERPRET made this kernel a Python function when it was defined."""
    return not isinstance(kernel, triton.runtime.JITFunction)


def addressable(t: torch.Tensor, rows: int = 0) -> torch.Tensor:
    """Return t if a kernel can address it, else a contiguous copy.

    Kernels take no stride of the last dim, and the offsets of a tile's elements are 32-bit.

    Args:
        t: any shape and strides. A tile takes rows along dim `rows` and columns along the last dim.
        rows: dim of the rows.
    """
    if (t.stride(-1) == 1 or t.shape[-1] == 1) and t.stride(rows) < _MAX_STRIDE:
        return t
    return t.contiguous()


def float32_precision(dtype: torch.dtype) -> str:
    """Return "tf32" if `dtype` is float32 and the user allowed TF32 in matrix products, else "ieee".

    Triton's own default is TF32.
    """
    allowed = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if allowed else "ieee"


def launch(kernel: Any, programs: int, device: torch.device, config: LaunchConfig, /, *args: Any, **named: Any) -> None:
    """Start `programs` programs of `kernel` on the device's current stream.

    Triton launches on the current device, which need not be the tensors'. Fused multiply-adds make the exponent of a
    softmax one instruction and one rounding.

    Args:
        args: tensors and their strides, in the order of the kernel's parameters.
        named: scalars and compile-time constants, by the names of the kernel's parameters.
    """
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        kernel[(programs,)](
            *args, **named, num_warps=config.num_warps, num_stages=config.num_stages, enable_fp_fusion=True
        )
