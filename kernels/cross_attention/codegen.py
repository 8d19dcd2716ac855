"""Representative launches of the cross_attention kernels for `make codegen`."""

from __future__ import annotations

from typing import Any

import torch

from calm_fast.kernels.common.codegen import ARCHS, CodegenSpec, make_spec, short_name
from calm_fast.kernels.common.config_table import padded
from calm_fast.kernels.cross_attention.bwd_kv import (
    _cross_attention_bwd_dkdv_kernel,
    _cross_attention_query_ranges_kernel,
)
from calm_fast.kernels.cross_attention.bwd_q import _cross_attention_bwd_dq_kernel, _cross_attention_bwd_rows_kernel
from calm_fast.kernels.cross_attention.configs import (
    COMBINE,
    RANGES,
    TABLES,
    AttentionConfig,
    DecodeConfig,
    row_terms_config,
    table_size,
)
from calm_fast.kernels.cross_attention.decode import _cross_attention_combine_kernel, _cross_attention_decode_kernel
from calm_fast.kernels.cross_attention.fwd import _cross_attention_fwd_kernel

_POINTERS = dict.fromkeys(("lse_ptr", "dlse_ptr", "lse2_ptr", "delta_ptr", "part_ptr", "part_lse_ptr"), "*fp32")
_POINTERS |= dict.fromkeys(("lo_ptr", "hi_ptr", "ranges_ptr"), "*i32")
_UNIT = {"stride_lom": 1, "stride_him": 1}  # as at run time, where Triton makes constants of ones
# HAS_LO, HAS_HI, CAUSAL of each kind of mask
_MASKS = {"full": (False, False, False), "causal": (False, False, True), "hi": (False, True, False)}
_MASKS["interval"] = (True, True, False)
_KERNELS = {
    "fwd": _cross_attention_fwd_kernel,
    "decode": _cross_attention_decode_kernel,
    "dkdv": _cross_attention_bwd_dkdv_kernel,
    "dq": _cross_attention_bwd_dq_kernel,
}


def attention_spec(
    part: str,
    dtype: torch.dtype,
    d: int,
    mask: str,
    config: AttentionConfig | DecodeConfig,
    tensor_core: bool | str,
    arch: int,
) -> CodegenSpec:
    """Return the spec of the forward, decode, dkdv or dq kernel at one head dim and kind of mask."""
    has_lo, has_hi, causal = _MASKS[mask]
    constants: dict[str, Any] = {"D": d, "BLOCK_D": padded(d)}
    constants |= {"HAS_LO": has_lo, "HAS_HI": has_hi, "CAUSAL": causal, "PRECISION": "ieee", "INTERPRET": False}
    if isinstance(config, DecodeConfig):
        constants |= {"BLOCK_R": config.block_r, "BLOCK_N": config.block_n}
        constants |= {"SPLIT_KEYS": config.split_keys, "DIRECT": False}
    else:
        constants |= {"BLOCK_M": config.block_m, "BLOCK_N": config.block_n}
    present = {"lo_ptr": has_lo, "hi_ptr": has_hi, "ranges_ptr": part != "dkdv" or has_lo or has_hi}
    constants |= {pointer: None for pointer, there in present.items() if not there}
    name = f"{part}_{short_name(dtype)}_d{d}_{mask}_sm{arch}"
    return make_spec(name, _KERNELS[part], dtype, constants | _UNIT, config, tensor_core, (arch,), _POINTERS)


def codegen_specs() -> list[CodegenSpec]:
    """Return every kernel with the default config of each architecture.

    bfloat16 must use the tensor cores, float32 must not.
    """
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
    for arch in ARCHS:
        for part, dtype, d, mask in cases:
            config = TABLES[part].default(arch, dtype, table_size(padded(d)))
            # tiles of 16 or 32 rows are too small for warpgroup instructions; IEEE float32 uses no tensor core
            small = part == "decode" or (part != "fwd" and d == 256)
            expected: bool | str = False if dtype == fp32 else "warp" if small else True
            specs.append(attention_spec(part, dtype, d, mask, config, expected, arch))
    return specs + _specs_without_products()


def _specs_without_products() -> list[CodegenSpec]:
    specs = []
    for d in (128, 256):
        terms = row_terms_config(d)
        constants: dict[str, Any] = {"D": d, "BLOCK_D": d, "BLOCK_M": terms.block_m, "HAS_DLSE": True}
        name, fn = f"rows_bf16_d{d}", _cross_attention_bwd_rows_kernel
        specs.append(make_spec(name, fn, torch.bfloat16, constants, terms, False, pointers=_POINTERS))
    constants = {"D": 128, "BLOCK_D": 128, "BLOCK_S": COMBINE.block_s}
    name, fn = "combine_bf16_d128", _cross_attention_combine_kernel
    specs.append(make_spec(name, fn, torch.bfloat16, constants, COMBINE, False, pointers=_POINTERS))
    constants = {"BLOCK_M": 64, "BLOCK_N": 128, "TILES": RANGES.block_tiles, "HAS_LO": True, "HAS_HI": True} | _UNIT
    fn = _cross_attention_query_ranges_kernel
    specs.append(make_spec("ranges", fn, torch.bfloat16, constants, RANGES, False, pointers=_POINTERS))
    return specs
