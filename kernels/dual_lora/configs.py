"""Launch configs of the dual_lora kernels, and the representative launches that code generation checks."""

from __future__ import annotations

from typing import Any

import torch
import triton

from calm_fast.kernels.common.launching import CodegenSpec, LaunchConfig, gpu, make_spec, measured_config, short_name
from calm_fast.kernels.dual_lora.bwd import _dual_lora_gate_bwd_kernel, _dual_lora_gelu_bwd_kernel
from calm_fast.kernels.dual_lora.fwd import _dual_lora_mix_kernel, _dual_lora_update_kernel

_INTERPRETER = LaunchConfig(16, 32, 4, 1)  # small tiles, so that small tests cross tile edges
_FEW = 16  # tokens that get the small tile: decoding


def programs_wanted(device: torch.device, interpreted: bool) -> int:
    """How many programs keep a GPU busy: four for each multiprocessor."""
    return 4 if interpreted or device.type != "cuda" else 4 * gpu(device).multiprocessors


def block_k(k: int, dtype: torch.dtype, interpreted: bool) -> int:
    """Depth of a tile of the rank update: all of K where it is small, else chunks."""
    if interpreted:
        return 16
    if dtype == torch.float32:  # products outside the tensor cores unroll their depth
        return min(32, max(16, triton.next_power_of_2(k)))
    return max(16, triton.next_power_of_2(k)) if k <= 128 else 64


def block_r(r: int, dtype: torch.dtype, interpreted: bool) -> int:
    """Columns of z read together."""
    if interpreted:
        return 16
    return min(32 if dtype == torch.float32 else 64, max(16, triton.next_power_of_2(r)))


def default_config(part: str, dtype: torch.dtype, tokens: int, k: int) -> LaunchConfig:
    """Safe launch numbers for any GPU from sm_80 on.

    Args:
        part: "update", "mix", "gate_bwd" or "gelu_bwd". dtype: of the tensors. tokens: T. k: depth of the products.
    """
    if tokens <= _FEW:  # one row of tiles: narrow tiles make more programs
        return LaunchConfig(16, 64, 4, 2)
    if part == "gelu_bwd":  # two hidden tiles and their gradients: no registers left for a pipeline
        return LaunchConfig(32, 32, 4, 1) if dtype == torch.float32 or k > 128 else LaunchConfig(32, 64, 4, 1)
    if dtype == torch.float32:
        return LaunchConfig(64, 64, 8, 2) if part == "update" else LaunchConfig(32, 32, 8, 2)
    if part == "update":
        return LaunchConfig(64, 128 if k <= 128 else 64, 4, 2)
    return LaunchConfig(64, 64, 4, 2) if part == "mix" else LaunchConfig(32, 64, 4, 2)


def pick_config(
    part: str, device: torch.device, dtype: torch.dtype, k: int, shape: dict[str, int], interpreted: bool
) -> LaunchConfig:
    """Launch numbers of one kernel: measured on this GPU if there are any, else the default."""
    if interpreted:
        return _INTERPRETER
    depth = max(16, triton.next_power_of_2(k))
    measured = measured_config("dual_lora", part, device, dtype, depth, shape)
    return measured or default_config(part, dtype, shape["T"], k)


def _spec(
    name: str, fn: Any, dtype: torch.dtype, constants: dict[str, Any], config: LaunchConfig, tensor_core: bool | str
) -> CodegenSpec:
    tiles = {"BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "PRECISION": "ieee", "INTERPRET": False}
    core = False if dtype == torch.float32 else tensor_core
    pointers, widths = {"dlogit_ptr": "*fp32"}, ("N", "H", "N_STEP")  # all but the number of tokens
    name = f"dual_lora_{name}_{short_name(dtype)}"
    return make_spec(name, fn, dtype, tiles | constants, config, core, pointers=pointers, aligned=widths)


def codegen_specs() -> list[CodegenSpec]:
    """Every kernel with its default configs, small and large ranks; bf16 must use the tensor cores, fp32 must not."""
    specs = []
    for dtype in (torch.bfloat16, torch.float32):
        few, many = 1, 8192
        for r, tokens in ((16, many), (128, many), (512, many), (16, few)):
            config = default_config("update", dtype, tokens, r)
            options = {
                "K": r,
                "R_POS": r // 2,
                "GATED": True,
                "BLOCK_K": block_k(r, dtype, False),
                "BLOCK_R": block_r(r, dtype, False),
            }
            # a depth of 16 rows of tokens is too small for warpgroup instructions
            core: bool | str = "warp" if tokens == few else True
            name = f"update_r{r}" + ("_decode" if tokens == few else "")
            specs.append(_spec(name, _dual_lora_update_kernel, dtype, options, config, core))
        for h in (128, 256):
            config = default_config("update", dtype, many, h)
            options = {"K": h, "R_POS": 8, "GATED": False, "BLOCK_K": block_k(h, dtype, False), "BLOCK_R": 16}
            specs.append(_spec(f"update_h{h}", _dual_lora_update_kernel, dtype, options, config, True))
        for r in (16, 512):
            options = {"R": r, "R_POS": r // 2, "BLOCK_R": block_r(r // 2, dtype, False)}
            config = default_config("mix", dtype, many, r)
            specs.append(_spec(f"mix_r{r}", _dual_lora_mix_kernel, dtype, options, config, True))
            config = default_config("gelu_bwd", dtype, many, r)
            specs.append(_spec(f"gelu_bwd_r{r}", _dual_lora_gelu_bwd_kernel, dtype, options, config, "warp"))
            config = default_config("gate_bwd", dtype, many, r)
            paper = options | {"BLOCK_R": block_r(r, dtype, False), "HAS_DLOGIT": False, "dlogit_ptr": None}
            specs.append(_spec(f"gate_bwd_r{r}", _dual_lora_gate_bwd_kernel, dtype, paper, config, False))
            released = options | {"BLOCK_R": block_r(r, dtype, False), "HAS_DLOGIT": True, "mix_ptr": None}
            specs.append(_spec(f"gate_bwd_given_r{r}", _dual_lora_gate_bwd_kernel, dtype, released, config, False))
    return specs
