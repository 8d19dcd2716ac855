"""Specs of representative kernel launches, which `make codegen` compiles without a GPU."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from calm_fast.core.launch_config import LaunchConfig

ARCHS = (80, 90, 100)  # 10 * compute capability
_POINTER = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}
_FLOATS = ("alpha", "tau", "offset", "softcap")  # scalar arguments of type float, besides those named scale*


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


def short_name(dtype: torch.dtype) -> str:
    """Return "bf16" for torch.bfloat16, as kernels are named in the golden record."""
    return _POINTER[dtype].removeprefix("*")


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
    """Return the spec of a kernel, as a call with contiguous tensors would compile it.

    Args:
        name: name in the golden record.
        fn: the kernel; the types of its parameters follow from their names.
        dtype: element type of the pointers that `pointers` leaves out.
        constants: values of compile-time parameters, None for an absent pointer. Names that `fn` lacks are ignored.
        config: launch config; only num_warps and num_stages are read.
        tensor_core: see CodegenSpec.
        archs: architectures to compile for.
        pointers: types of the pointers that are not of `dtype`, and of tensor descriptors.
        aligned: integers that are multiples of 16. Pointers (`*_ptr`) and strides (`stride*`) always are; Triton
            turns them into vector loads.
    """
    kept = {key: value for key, value in constants.items() if key in fn.arg_names}
    aligned = set(aligned)
    signature: dict[str, str] = {}
    attrs: dict[tuple[int, ...], list[list[Any]]] = {}
    for index, parameter in enumerate(fn.arg_names):
        if parameter in kept:
            signature[parameter] = "constexpr"
            continue
        if parameter.endswith("_ptr") or parameter in (pointers or {}):
            signature[parameter] = (pointers or {}).get(parameter, _POINTER[dtype])
        else:
            signature[parameter] = "fp32" if parameter in _FLOATS or parameter.startswith("scale") else "i32"
        if parameter.endswith("_ptr") or parameter.startswith("stride") or parameter in aligned:
            attrs[(index,)] = [["tt.divisibility", 16]]
    return CodegenSpec(
        name, fn, signature, kept, attrs, config.num_warps, config.num_stages, {"tensor_core": tensor_core}, archs
    )
