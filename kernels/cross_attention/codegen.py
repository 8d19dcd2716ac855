"""Representative launches of the cross_attention kernels for `make codegen`."""

from __future__ import annotations

from typing import Any

import torch

from calm_fast.kernels.common.codegen import ARCHS, CodegenSpec, make_spec, short_name
from calm_fast.kernels.common.config_table import padded, target
from calm_fast.kernels.cross_attention.bwd_kv import (
    _cross_attention_bwd_dkdv_kernel,
    _cross_attention_query_ranges_kernel,
)
from calm_fast.kernels.cross_attention.bwd_q import _cross_attention_bwd_dq_kernel, _cross_attention_bwd_rows_kernel
from calm_fast.kernels.cross_attention.configs import (
    BOX_TARGETS,
    COMBINE,
    DKDV,
    DQ_BOX_TARGETS,
    DQ_POINTERS,
    DV,
    RANGES,
    REPAIR,
    TABLES,
    AttentionConfig,
    DecodeConfig,
    column_parts,
    dv_config,
    row_terms_config,
    searches,
    table_size,
)
from calm_fast.kernels.cross_attention.decode import _cross_attention_combine_kernel, _cross_attention_decode_kernel
from calm_fast.kernels.cross_attention.fwd import _cross_attention_fwd_kernel

_POINTERS = dict.fromkeys(("lse_ptr", "dlse_ptr", "lse2_ptr", "delta_ptr", "part_ptr", "part_lse_ptr"), "*fp32")
_POINTERS |= dict.fromkeys(("lo_ptr", "hi_ptr", "ranges_ptr", "poison_ptr"), "*i32")
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
# parts that are forms of a kernel
_FORMS = {"fwd_pointers": "fwd", "packed64": "decode", "packed128": "decode", "dkdv_pointers": "dkdv", "dv": "dkdv"}
_FORMS |= {"repair": "dkdv", "dq_pointers": "dq"}


def attention_spec(
    part: str,
    dtype: torch.dtype,
    d: int,
    mask: str,
    config: AttentionConfig | DecodeConfig,
    tensor_core: bool | str,
    arch: int,
) -> CodegenSpec:
    """Return the spec of the forward, decode, dkdv or dq kernel at one head dim and kind of mask.

    part "fwd_pointers", "dkdv_pointers", "dq_pointers": without tensor descriptors on an architecture that has them.
    "dv": the dkdv kernel for dv alone; "dkdv" is then for dk alone. "repair": for KV heads with a query that is not
    finite.
    """
    has_lo, has_hi, causal = _MASKS[mask]
    box_targets = {"fwd": BOX_TARGETS, "dkdv": BOX_TARGETS, "dv": BOX_TARGETS, "dq": DQ_BOX_TARGETS}.get(part, ())
    boxes = dtype != torch.float32 and target(arch, dtype) in box_targets
    kernel = _FORMS.get(part, part)
    wide, rest = column_parts(d, kernel, target(arch, dtype))
    constants: dict[str, Any] = {
        "D": d,
        "BLOCK_D": wide,
        "REST_D": rest,
        "BOXES": boxes,
        "SEARCH": searches(target(arch, dtype), dtype),
    }
    constants |= {"HAS_LO": has_lo, "HAS_HI": has_hi, "CAUSAL": causal, "PRECISION": "ieee", "INTERPRET": False}
    pointers, present = dict(_POINTERS), {"lo_ptr": has_lo, "hi_ptr": has_hi}
    if isinstance(config, DecodeConfig):
        constants |= {"BLOCK_R": config.block_r, "BLOCK_N": config.block_n}
        constants |= {"DIRECT": False, "EDGES": config.mask_edges_only}
    else:
        constants |= {"BLOCK_M": config.block_m, "BLOCK_N": config.block_n}
        size = table_size(padded(d))
        constants |= {"REPAIR": part == "repair", "HAS_DK": part != "dv"}
        constants["HAS_DV"] = part != "dkdv" or dv_config(arch, dtype, size) is None
        present |= {"dk_ptr": constants["HAS_DK"], "dv_ptr": constants["HAS_DV"], "poison_ptr": part == "repair"}
        for name, rows in (
            ("k", config.block_n),
            ("v", config.block_n),
            ("q", config.block_m),
            ("dout", config.block_m),
        ):
            for box, width in ((f"{name}_boxes", wide), (f"{name}_rest", rest)):
                pointers[box] = f"tensordesc<{short_name(dtype)}[1, 1, {rows}, {width}]>"
                present[box] = boxes and width > 0
    present |= {"ranges_ptr": part != "repair" and (has_lo or has_hi)}
    constants |= {pointer: None for pointer, there in present.items() if not there}
    name = f"{part}_{short_name(dtype)}_d{d}_{mask}_sm{arch}"
    return make_spec(
        name, _KERNELS[kernel], dtype, constants | _UNIT, config, tensor_core, (arch,), pointers, ("ROWS",)
    )


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
    cases += [(part, bf16, d, "interval") for part in ("packed64", "packed128") for d in (64, 128)]
    cases += [("packed64", bf16, 128, "causal"), ("packed128", bf16, 128, "hi"), ("packed128", bf16, 128, "causal")]
    cases += [("packed128", fp32, d, "interval") for d in (64, 128)]
    # head dims in two column parts
    cases += [(part, bf16, d, "interval") for part in ("fwd", "dkdv", "dq") for d in (96, 192)]
    cases += [(part, bf16, 80, "causal") for part in ("dkdv", "dq")]
    cases += [("fwd", fp32, 80, "interval"), ("fwd", fp32, 192, "causal")]
    pointers = [("fwd_pointers", bf16, d, mask) for d in (64, 128, 256) for mask in ("causal", "interval")]
    for arch in ARCHS:
        for part, dtype, d, mask in cases + (pointers if target(arch, bf16) in BOX_TARGETS else []):
            config = TABLES[part].default(arch, dtype, table_size(padded(d)))
            # tiles of 16 or 32 rows are too small for warpgroup instructions; IEEE float32 uses no tensor core
            small = part == "decode" or (part in ("dkdv", "dq") and d > 128 and arch == 100)
            expected: bool | str = False if dtype == fp32 else "warp" if small else True
            specs.append(attention_spec(part, dtype, d, mask, config, expected, arch))
        specs += _other_key_grad_specs(arch)
    return specs + _specs_without_products()


def _other_key_grad_specs(arch: int) -> list[CodegenSpec]:
    """Return the other forms of the kernel of dk and dv, at the head dims that have them."""
    bf16, name = torch.bfloat16, target(arch, torch.bfloat16)
    specs = [
        attention_spec("repair", dtype, d, "interval", REPAIR.default(arch, dtype, d), tensor_core, arch)
        for dtype, d, tensor_core in ((bf16, 128, "warp"), (bf16, 256, "warp"), (torch.float32, 64, False))
    ]
    for d, config in DV.defaults.get(name, {}).items():
        specs += [attention_spec("dv", bf16, d, mask, config, True, arch) for mask in ("causal", "interval")]
        specs += [attention_spec("dv", bf16, 192, "interval", config, True, arch)]
    if name in DQ_BOX_TARGETS:
        for d, config in DQ_POINTERS.defaults[name].items():
            expected: bool | str = "warp" if d == 256 else True
            specs.append(attention_spec("dq_pointers", bf16, d, "interval", config, expected, arch))
    if name in BOX_TARGETS:  # with the tiles of sm_80
        specs += [
            attention_spec("dkdv_pointers", bf16, d, "interval", DKDV.default(80, bf16, d), "warp", arch)
            for d in (64, 128, 256)
        ]
    return specs


def _specs_without_products() -> list[CodegenSpec]:
    specs = []
    for d in (128, 256):
        terms = row_terms_config(d)
        constants: dict[str, Any] = {"D": d, "BLOCK_D": d, "BLOCK_M": terms.block_m, "HAS_DLSE": True}
        constants["HAS_POISON"] = True
        name, fn = f"rows_bf16_d{d}", _cross_attention_bwd_rows_kernel
        specs.append(
            make_spec(name, fn, torch.bfloat16, constants, terms, False, pointers=_POINTERS, aligned=("ROWS",))
        )
    constants = {"D": 128, "BLOCK_D": 128, "BLOCK_S": COMBINE.block_s}
    name, fn = "combine_bf16_d128", _cross_attention_combine_kernel
    specs.append(make_spec(name, fn, torch.bfloat16, constants, COMBINE, False, pointers=_POINTERS))
    constants = {"BLOCK_M": 64, "BLOCK_N": 128, "TILES": RANGES.block_tiles, "HAS_LO": True, "HAS_HI": True} | _UNIT
    fn = _cross_attention_query_ranges_kernel
    specs.append(make_spec("ranges", fn, torch.bfloat16, constants, RANGES, False, pointers=_POINTERS))
    return specs
