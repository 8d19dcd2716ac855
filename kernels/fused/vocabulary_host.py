"""Host side that linear_nce and linear_logprob share: launch numbers, addressing, launching, code generation specs."""

from __future__ import annotations

import contextlib
from functools import cache
from pathlib import Path
from typing import Any

import torch

from calm_fast._tuning import LaunchConfig, tuned_config

from .cross_attention_codegen import CodegenSpec

__all__ = ["CodegenSpec", "LaunchConfig", "addressable", "block_d", "constants", "gpu_config", "launch", "make_spec"]

GROUP = 8  # token tiles that share the vocabulary in L2
_MAX_STRIDE = 2**22  # 512 rows of a tile times this stay below 2**31
_POINTER = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}
_SHORT = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


def addressable(t: torch.Tensor) -> torch.Tensor:
    """t (rows, d) itself if the kernels can address it: unit last stride, tile offsets in 32 bits."""
    if (t.stride(1) == 1 or t.shape[1] == 1) and t.stride(0) < _MAX_STRIDE:
        return t
    return t.contiguous()


def precision(dtype: torch.dtype) -> str:
    """IEEE products, unless the user allowed TF32 for float32 matrix products."""
    allowed = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if allowed else "ieee"


def block_d(dtype: torch.dtype, interpreted: bool) -> int:
    """Depth of a tile of the product; float32 products outside the tensor cores unroll it."""
    return 16 if interpreted or dtype == torch.float32 else 64


def constants(
    weight: torch.Tensor, bias: torch.Tensor | None, softcap: float | None, config: LaunchConfig, interpreted: bool
) -> dict[str, Any]:
    """Compile-time arguments of every kernel that computes logits."""
    return {
        "D": weight.shape[1],
        "BLOCK_T": config.block_m,
        "BLOCK_V": config.block_n,
        "BLOCK_D": block_d(weight.dtype, interpreted),
        "HAS_BIAS": bias is not None,
        "HAS_SOFTCAP": softcap is not None,
        "PRECISION": precision(weight.dtype),
        "INTERPRET": interpreted,
    }


@cache
def _gpu(index: int) -> tuple[str, int]:
    """Name and compute capability (10 * major + minor) of a GPU."""
    properties = torch.cuda.get_device_properties(index)
    return properties.name, 10 * properties.major + properties.minor


def gpu_config(op: str, part: str, weight: torch.Tensor, tokens: int) -> tuple[LaunchConfig | None, int]:
    """The config measured on the weight's GPU for the nearest shape, None without one; and the GPU's capability."""
    device = weight.device
    name, arch = _gpu(device.index if device.index is not None else torch.cuda.current_device())
    folder = Path(__file__).resolve().parent / "tuned" / op
    v, d = weight.shape
    return tuned_config(folder, name, part, str(weight.dtype).removeprefix("torch."), d, {"T": tokens, "V": v}), arch


def launch(kernel: Any, programs: int, device: torch.device, config: LaunchConfig, *args: Any, **constant: Any) -> None:
    """Start `programs` programs on the device's current stream."""
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        kernel[(programs,)](
            *args, **constant, num_warps=config.num_warps, num_stages=config.num_stages, enable_fp_fusion=True
        )


def make_spec(
    name: str,
    fn: Any,
    dtype: torch.dtype,
    constant: dict[str, Any],
    config: LaunchConfig,
    tensor_core: bool | str,
    archs: tuple[int, ...],
    pointers: dict[str, str],
) -> CodegenSpec:
    """A spec from a kernel's parameter names: pointers and strides 16-divisible, as for contiguous tensors.

    pointers: types of the pointers that are not of `dtype`.
    """
    kept = {key: value for key, value in constant.items() if key in fn.arg_names}
    signature: dict[str, str] = {}
    attrs: dict[tuple[int, ...], list[list[Any]]] = {}
    for index, parameter in enumerate(fn.arg_names):
        if parameter in kept:
            signature[parameter] = "constexpr"
        elif parameter.endswith("_ptr"):
            signature[parameter] = pointers.get(parameter, _POINTER[dtype])
        else:
            signature[parameter] = "fp32" if parameter in ("alpha", "tau", "offset", "softcap", "scale") else "i32"
        if parameter not in kept and (parameter.endswith("_ptr") or parameter.startswith("stride")):
            attrs[(index,)] = [["tt.divisibility", 16]]
    suffix = f"_sm{archs[0]}" if len(archs) == 1 else ""
    return CodegenSpec(
        f"{name}_{_SHORT[dtype]}{suffix}", fn, signature, kept, attrs, config.num_warps, config.num_stages,
        {"tensor_core": False if dtype == torch.float32 else tensor_core}, archs,
    )  # fmt: skip
