"""Representative launches of the cross_attention kernels for machine-code checks without a GPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from .cross_attention_bwd import _cross_attention_bwd_dq_kernel, _cross_attention_bwd_rows_kernel
from .cross_attention_bwd_keys import _cross_attention_bwd_dkdv_kernel, _cross_attention_query_ranges_kernel
from .cross_attention_configs import LaunchConfig, default_config
from .cross_attention_decode import _cross_attention_combine_kernel, _cross_attention_decode_kernel
from .cross_attention_fwd import _cross_attention_fwd_kernel

_POINTER = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}
_SHORT = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
_FLOAT32 = ("lse_ptr", "dlse_ptr", "lse2_ptr", "delta_ptr", "part_ptr", "part_lse_ptr")
_INT32 = ("lo_ptr", "hi_ptr", "ranges_ptr")
_UNIT = ("stride_lom", "stride_him")  # 1 at run time, so Triton makes them constants
_MASKS = {"full": (False, False, False), "causal": (False, False, True), "hi": (False, True, False)}
_MASKS["interval"] = (True, True, False)


@dataclass(frozen=True)
class CodegenSpec:
    """One kernel with its compile-time arguments, as triton.compile(ASTSource(...)) takes them."""

    name: str
    fn: Any
    signature: dict[str, str]
    constexprs: dict[str, Any]
    attrs: dict[tuple[int, ...], list[list[Any]]]
    num_warps: int
    num_stages: int
    expectations: dict[str, bool | str]
    archs: tuple[int, ...] = (80, 90, 100)


def make_spec(
    name: str,
    fn: Any,
    dtype: torch.dtype,
    constants: dict[str, Any],
    config: LaunchConfig,
    tensor_core: bool | str,
    archs: tuple[int, ...] = (80, 90, 100),
) -> CodegenSpec:
    """A spec from a kernel's parameter names: pointers and strides 16-divisible, as for contiguous tensors."""
    signature: dict[str, str] = {}
    constexprs = dict(constants)
    attrs: dict[tuple[int, ...], list[list[Any]]] = {}
    for index, parameter in enumerate(fn.arg_names):
        if parameter in constexprs:
            signature[parameter] = "constexpr"
        elif parameter in _UNIT:
            signature[parameter], constexprs[parameter] = "constexpr", 1
        elif parameter.startswith("scale"):
            signature[parameter] = "fp32"
        elif parameter.endswith("_ptr") or parameter.startswith("stride_"):
            if parameter in _FLOAT32:
                signature[parameter] = "*fp32"
            elif parameter in _INT32:
                signature[parameter] = "*i32"
            else:
                signature[parameter] = _POINTER[dtype] if parameter.endswith("_ptr") else "i32"
            attrs[(index,)] = [["tt.divisibility", 16]]
        else:
            signature[parameter] = "i32"
    return CodegenSpec(
        name, fn, signature, constexprs, attrs, config.num_warps, config.num_stages,
        {"tensor_core": tensor_core}, archs,
    )  # fmt: skip


def attention_spec(
    part: str,
    dtype: torch.dtype,
    d: int,
    mask: str,
    config: LaunchConfig,
    tensor_core: bool | str,
    archs: tuple[int, ...] = (80, 90, 100),
) -> CodegenSpec:
    """The spec of the forward, decode, dkdv or dq kernel at one head dim and kind of mask."""
    fn = {
        "fwd": _cross_attention_fwd_kernel,
        "decode": _cross_attention_decode_kernel,
        "dkdv": _cross_attention_bwd_dkdv_kernel,
        "dq": _cross_attention_bwd_dq_kernel,
    }[part]
    has_lo, has_hi, causal = _MASKS[mask]
    constants: dict[str, Any] = {"D": d, "BLOCK_D": max(16, 1 << (d - 1).bit_length())}
    constants |= {"HAS_LO": has_lo, "HAS_HI": has_hi, "CAUSAL": causal, "PRECISION": "ieee", "INTERPRET": False}
    constants |= {"BLOCK_R" if part == "decode" else "BLOCK_M": config.block_m, "BLOCK_N": config.block_n}
    if part == "decode":
        constants |= {"SPLIT_KEYS": config.split_keys, "DIRECT": False}
    absent = {"lo_ptr": has_lo, "hi_ptr": has_hi, "ranges_ptr": part != "dkdv" or has_lo or has_hi}
    constants |= {pointer: None for pointer, there in absent.items() if not there}
    name = f"{part}_{_SHORT[dtype]}_d{d}_{mask}" + (f"_sm{archs[0]}" if len(archs) == 1 else "")
    return make_spec(name, fn, dtype, constants, config, tensor_core, archs)


def codegen_specs() -> list[CodegenSpec]:
    """Every kernel with the default config of each architecture; bf16 must use the tensor cores, fp32 must not."""
    specs = []
    bf16, fp32 = torch.bfloat16, torch.float32
    cases = [("fwd", bf16, d, "causal") for d in (64, 128, 256)]
    cases += [("fwd", bf16, 128, "interval"), ("fwd", bf16, 128, "hi"), ("fwd", bf16, 80, "causal")]
    cases += [(part, bf16, d, "causal") for part in ("dkdv", "dq") for d in (64, 128, 256)]
    cases += [(part, bf16, d, "interval") for part in ("dkdv", "dq") for d in (64, 128)]
    cases += [(part, fp32, 64, "causal") for part in ("fwd", "dkdv", "dq")]
    cases += [(part, fp32, d, "interval") for part in ("fwd", "dkdv", "dq") for d in (128, 256)]
    cases += [(part, bf16, 256, "interval") for part in ("fwd", "dkdv", "dq")]
    cases += [("decode", bf16, 64, "full"), ("decode", bf16, 128, "interval"), ("decode", bf16, 128, "hi")]
    for arch in (80, 90, 100):
        for part, dtype, d, mask in cases:
            config = default_config(part, arch, dtype, max(16, 1 << (d - 1).bit_length()))
            # tiles of 16 or 32 rows are too small for warpgroup instructions; IEEE float32 uses no tensor core
            small = part == "decode" or (part != "fwd" and d == 256)
            expected: bool | str = False if dtype == fp32 else "warp" if small else True
            specs.append(attention_spec(part, dtype, d, mask, config, expected, (arch,)))
    plain = LaunchConfig(64, 64, 4, 3)
    rows = {"D": 128, "BLOCK_D": 128, "BLOCK_M": 64, "HAS_DLSE": True}
    specs.append(make_spec("rows_bf16_d128", _cross_attention_bwd_rows_kernel, bf16, rows, plain, False))
    combine = {"D": 128, "BLOCK_D": 128, "BLOCK_S": 16}
    specs.append(make_spec("combine_bf16_d128", _cross_attention_combine_kernel, bf16, combine, plain, False))
    ranges = {"BLOCK_M": 64, "BLOCK_N": 128, "TILES": 16, "HAS_LO": True, "HAS_HI": True}
    specs.append(make_spec("ranges", _cross_attention_query_ranges_kernel, bf16, ranges, plain, False))
    return specs
