"""Host code that every launcher of a Triton kernel shares.

`launch` runs a kernel on its tensors' device and that device's current stream. `addressable` gives a tensor strides
that a kernel can take, `describe` a descriptor for the copy engine. `float32_precision` follows the user's setting.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

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


def describable(t: torch.Tensor) -> bool:
    """Return True if a tensor descriptor can address t: the copy engine of sm_90 wants multiples of 16 bytes.

    A stride of 0 (an expanded dim) is left to pointers: the driver's word on it is not documented.
    """
    unit = 16 // t.element_size()
    strides = [stride for size, stride in zip(t.shape, t.stride(), strict=True) if size > 1]
    return (
        t.data_ptr() % 16 == 0
        and (t.stride(-1) == 1 or t.shape[-1] == 1)
        and all(stride > 0 and stride % unit == 0 for stride in strides[: -1 if t.shape[-1] > 1 else None])
    )


def describe(t: torch.Tensor, block: list[int]) -> TensorDescriptor:
    """Return a descriptor of a `describable` tensor, loaded in blocks of this shape.

    It is made on the host. One made in the kernel needs memory from `triton.set_allocator`: a setting of the whole
    process, which is not ours, and memory that must outlive a captured graph, per stream and device. This one travels
    in the launch's arguments, as pointers do. It costs a few microseconds of Python.
    """
    unit = 16 // t.element_size()
    # torch leaves strides of dims of size 1 undefined; they are never used, but checked
    strides = [stride if size > 1 else unit for size, stride in zip(t.shape, t.stride(), strict=True)]
    return TensorDescriptor(t, list(t.shape), [*strides[:-1], 1], block)


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
