"""Representative launches of the dual_lora kernels for `make codegen`."""

from __future__ import annotations

from typing import Any

import torch

from calm_fast.core.launch_config import Config
from calm_fast.kernels.common.codegen import CodegenSpec, make_spec, short_name
from calm_fast.kernels.common.config_table import ConfigTable
from calm_fast.kernels.dual_lora.bwd import _dual_lora_gate_bwd_kernel, _dual_lora_gelu_bwd_kernel
from calm_fast.kernels.dual_lora.configs import (
    GATE_BWD,
    GELU_BWD,
    MIX,
    UPDATE,
    GateConfig,
    TileConfig,
    block_k,
    block_r,
    table_size,
)
from calm_fast.kernels.dual_lora.fwd import _dual_lora_mix_kernel, _dual_lora_update_kernel

_FEW, _MANY = 1, 8192  # tokens
_ARCH = 80  # the defaults are the same on every architecture


def _config(table: ConfigTable[str, Config], dtype: torch.dtype, tokens: int, k: int, gated: bool = False) -> Config:
    return table.default(_ARCH, dtype, table_size(tokens, k, gated))


def _spec(
    name: str,
    fn: Any,
    dtype: torch.dtype,
    options: dict[str, Any],
    config: TileConfig | GateConfig,
    tensor_core: bool | str,
) -> CodegenSpec:
    constants = {"BLOCK_M": config.block_tokens, "PRECISION": "ieee", "INTERPRET": False}
    if isinstance(config, TileConfig):
        constants["BLOCK_N"] = config.block_columns
    core = False if dtype == torch.float32 else tensor_core
    pointers, widths = {"dlogit_ptr": "*fp32"}, ("N", "H", "N_STEP")  # all but the number of tokens
    name = f"dual_lora_{name}_{short_name(dtype)}"
    return make_spec(name, fn, dtype, constants | options, config, core, pointers=pointers, aligned=widths)


def codegen_specs() -> list[CodegenSpec]:
    """Return every kernel with its default configs, for small and large ranks.

    bfloat16 must use the tensor cores, float32 must not.
    """
    specs = []
    for dtype in (torch.bfloat16, torch.float32):
        specs += _update_specs(dtype)
        for r in (16, 512):
            options = {"R": r, "R_POS": r // 2, "BLOCK_R": block_r(r // 2, dtype, False)}
            config = _config(MIX, dtype, _MANY, r)
            # tiles of 32 tokens are too small for warpgroup instructions
            core: bool | str = "warp" if config.block_tokens < 64 else True
            specs.append(_spec(f"mix_r{r}", _dual_lora_mix_kernel, dtype, options, config, core))
            config = _config(GELU_BWD, dtype, _MANY, r)
            specs.append(_spec(f"gelu_bwd_r{r}", _dual_lora_gelu_bwd_kernel, dtype, options, config, "warp"))
            gate = _config(GATE_BWD, dtype, _MANY, r)
            paper = options | {"BLOCK_R": block_r(r, dtype, False), "HAS_DLOGIT": False, "dlogit_ptr": None}
            specs.append(_spec(f"gate_bwd_r{r}", _dual_lora_gate_bwd_kernel, dtype, paper, gate, False))
            released = options | {"BLOCK_R": block_r(r, dtype, False), "HAS_DLOGIT": True, "mix_ptr": None}
            specs.append(_spec(f"gate_bwd_given_r{r}", _dual_lora_gate_bwd_kernel, dtype, released, gate, False))
    return specs


def _update_specs(dtype: torch.dtype) -> list[CodegenSpec]:
    """Return the rank update with the gate (K = R), and without (K = the bottleneck H)."""
    specs = []
    for r, tokens in ((16, _MANY), (128, _MANY), (512, _MANY), (16, _FEW)):
        options = {
            "K": r,
            "R_POS": r // 2,
            "GATED": True,
            "HAS_Y": True,
            "BLOCK_K": block_k(r, dtype, False),
            "BLOCK_R": block_r(r, dtype, False),
        }
        # tiles of 16 tokens are too small for warpgroup instructions
        core: bool | str = "warp" if tokens == _FEW else True
        name = f"update_r{r}" + ("_decode" if tokens == _FEW else "")
        config = _config(UPDATE, dtype, tokens, r, gated=True)
        specs.append(_spec(name, _dual_lora_update_kernel, dtype, options, config, core))
        if (r, tokens) == (16, _MANY):
            alone = options | {"HAS_Y": False, "y_ptr": None}
            specs.append(_spec("residual_r16", _dual_lora_update_kernel, dtype, alone, config, core))
    for h in (128, 256):
        options = {
            "K": h,
            "R_POS": 8,
            "GATED": False,
            "HAS_Y": True,
            "BLOCK_K": block_k(h, dtype, False),
            "BLOCK_R": 16,
        }
        config = _config(UPDATE, dtype, _MANY, h)
        specs.append(_spec(f"update_h{h}", _dual_lora_update_kernel, dtype, options, config, True))
    return specs
