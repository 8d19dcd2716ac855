"""What every launcher of a Triton kernel does in the same way; a family adds only its tiles and its arguments.

At run time: a kernel runs on its tensors' device and that device's current stream (`launch`), on tensors it can address
(`addressable`), in the float32 precision the user chose (`float32_precision`), with the launch numbers measured on this
GPU where there are any (`measured_config`). Without a GPU: representative launches (`CodegenSpec`, `make_spec`) that
code generation checks compile.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import triton

from calm_fast.core.launch_config import LaunchConfig, tuned_config

__all__ = [
    "ARCHS", "CodegenSpec", "Gpu", "LaunchConfig", "addressable", "dtype_name", "family", "float32_precision", "gpu",
    "interpreted", "launch", "make_spec", "measured_config", "short_name",
]  # fmt: skip

ARCHS = (80, 90, 100)  # 10 * compute capability: what default tiles are made for and machine code is checked on
KERNELS = Path(__file__).resolve().parents[1]  # holds <op>/tuned/<gpu>.json, written by calm_fast.benchmarks.tune
_MAX_STRIDE = 2**22  # 512 rows of a tile times this stay below 2**31: offsets inside a tile are 32-bit
_POINTER = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}
_FLOATS = ("alpha", "tau", "offset", "softcap")  # scalar arguments that are no integers, and whatever begins with scale


def interpreted(kernel: Any) -> bool:
    """Whether TRITON_INTERPRET made this kernel a Python function when it was defined."""
    return not isinstance(kernel, triton.runtime.JITFunction)


def addressable(t: torch.Tensor, rows: int = 0) -> torch.Tensor:
    """t itself if a kernel can address it, else a contiguous copy.

    Args:
        t: any shape and strides; a tile takes rows along dim `rows` and columns along the last dim.
    Kernels take no stride of the last dim, and the offsets of a tile's elements are 32-bit.
    """
    if (t.stride(-1) == 1 or t.shape[-1] == 1) and t.stride(rows) < _MAX_STRIDE:
        return t
    return t.contiguous()


def float32_precision(dtype: torch.dtype) -> str:
    """IEEE products, unless the user allowed TF32 for float32 matrix products: Triton's own default is TF32."""
    allowed = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if allowed else "ieee"


def launch(kernel: Any, programs: int, device: torch.device, config: LaunchConfig, *args: Any, **constant: Any) -> None:
    """Start `programs` programs of `kernel` on the device's current stream; tile sizes are among `constant`.

    Triton launches on the current device, which need not be the tensors'. Fused multiply-adds make the exponent of a
    softmax one instruction and one rounding.
    """
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        kernel[(programs,)](
            *args, **constant, num_warps=config.num_warps, num_stages=config.num_stages, enable_fp_fusion=True
        )


@dataclass(frozen=True)
class Gpu:
    """What launch numbers depend on: arch = 10 * compute capability, and the number of multiprocessors."""

    name: str
    arch: int
    multiprocessors: int


@cache  # asking the driver takes microseconds, at every launch
def _properties(index: int) -> Gpu:
    found = torch.cuda.get_device_properties(index)
    return Gpu(found.name, 10 * found.major + found.minor, found.multi_processor_count)


def gpu(device: torch.device) -> Gpu:
    """The GPU behind a device, with or without an index."""
    return _properties(device.index if device.index is not None else torch.cuda.current_device())


def family(arch: int) -> int:
    """The entry of ARCHS whose tiles fit `arch`: unknown architectures get the smallest ones.

    Consumer Blackwell (120) has the 99 KiB of shared memory of sm_86 and sm_89, not the 227 KiB of sm_100.
    """
    return 90 if arch == 90 else 100 if arch in (100, 103) else 80


def measured_config(
    op: str, part: str, device: torch.device, dtype: torch.dtype, depth: int, shape: Mapping[str, int]
) -> LaunchConfig | None:
    """The launch numbers measured on this GPU for the nearest shape, None where there are none.

    Args:
        part: which kernel of the op. depth: the padded size of the tile's columns, matched exactly ("head_dim").
        shape: named sizes; the entry nearest to them wins.
    """
    return tuned_config(KERNELS / op / "tuned", gpu(device).name, part, dtype_name(dtype), depth, dict(shape))


def dtype_name(dtype: torch.dtype) -> str:
    """ "bfloat16" of torch.bfloat16, as tuned files name it."""
    return str(dtype).removeprefix("torch.")


def short_name(dtype: torch.dtype) -> str:
    """ "bf16" of torch.bfloat16, as kernels are named in code generation."""
    return _POINTER[dtype].removeprefix("*")


@dataclass(frozen=True)
class CodegenSpec:
    """One kernel with its compile-time arguments, as triton.compile(ASTSource(...)) takes them.

    expectations["tensor_core"]: True = the large matrix instruction of the architecture, "warp" = any tensor-core
    instruction (tiles too small for the large one), False = none (IEEE float32, or no product).
    """

    name: str
    fn: Any
    signature: dict[str, str]
    constexprs: dict[str, Any]
    attrs: dict[tuple[int, ...], list[list[Any]]]
    num_warps: int
    num_stages: int
    expectations: dict[str, bool | str]
    archs: tuple[int, ...] = ARCHS


def make_spec(
    name: str,
    fn: Any,
    dtype: torch.dtype,
    constants: Mapping[str, Any],
    config: LaunchConfig,
    tensor_core: bool | str,
    archs: tuple[int, ...] = ARCHS,
    pointers: Mapping[str, str] | None = None,
    aligned: Iterable[str] = (),
) -> CodegenSpec:
    """A spec from a kernel's parameter names, as a call with contiguous tensors would compile it.

    Args:
        constants: values of compile-time parameters, None for an absent pointer; those that `fn` lacks are ignored.
        pointers: types of the pointers that are not of `dtype`. aligned: integers that are multiples of 16, as
            pointers (`*_ptr`) and strides (`stride*`) are anyway: Triton makes vector loads of them.
    """
    kept = {key: value for key, value in constants.items() if key in fn.arg_names}
    aligned = set(aligned)
    signature: dict[str, str] = {}
    attrs: dict[tuple[int, ...], list[list[Any]]] = {}
    for index, parameter in enumerate(fn.arg_names):
        if parameter in kept:
            signature[parameter] = "constexpr"
            continue
        if parameter.endswith("_ptr"):
            signature[parameter] = (pointers or {}).get(parameter, _POINTER[dtype])
        else:
            signature[parameter] = "fp32" if parameter in _FLOATS or parameter.startswith("scale") else "i32"
        if parameter.endswith("_ptr") or parameter.startswith("stride") or parameter in aligned:
            attrs[(index,)] = [["tt.divisibility", 16]]
    return CodegenSpec(
        name, fn, signature, kept, attrs, config.num_warps, config.num_stages, {"tensor_core": tensor_core}, archs
    )
