"""Launch configs of the dual_lora kernels, and the representative launches that code generation checks."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import triton

from calm_fast._tuning import LaunchConfig, tuned_config

from .dual_lora_bwd import _dual_lora_gate_bwd_kernel, _dual_lora_gelu_bwd_kernel
from .dual_lora_fwd import _dual_lora_mix_kernel, _dual_lora_update_kernel

_TUNED = Path(__file__).resolve().parent / "tuned" / "dual_lora"
_INTERPRETER = LaunchConfig(16, 32, 4, 1)  # small tiles, so that small tests cross tile edges
_FEW = 16  # tokens that get the small tile: decoding


@cache
def _gpu(index: int) -> tuple[str, int]:
    """Name and number of multiprocessors of a GPU."""
    properties = torch.cuda.get_device_properties(index)
    return properties.name, properties.multi_processor_count


def _index(device: torch.device) -> int:
    return device.index if device.index is not None else torch.cuda.current_device()


def programs_wanted(device: torch.device, interpreted: bool) -> int:
    """How many programs keep a GPU busy: four for each multiprocessor."""
    return 4 if interpreted or device.type != "cuda" else 4 * _gpu(_index(device))[1]


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
    name = str(dtype).removeprefix("torch.")
    tuned = tuned_config(_TUNED, _gpu(_index(device))[0], part, name, depth, shape)
    return tuned or default_config(part, dtype, shape["T"], k)


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


_POINTER = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}
_SHORT = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


def _spec(
    name: str, fn: Any, dtype: torch.dtype, constants: dict[str, Any], config: LaunchConfig, tensor_core: bool | str
) -> CodegenSpec:
    """A spec from a kernel's parameter names: pointers and strides 16-divisible, as for contiguous tensors."""
    tiles = {"BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "PRECISION": "ieee", "INTERPRET": False}
    constants = {key: value for key, value in (tiles | constants).items() if key in fn.arg_names}
    signature: dict[str, str] = {}
    attrs: dict[tuple[int, ...], list[list[Any]]] = {}
    for index, parameter in enumerate(fn.arg_names):
        if parameter in constants:
            signature[parameter] = "constexpr"
            continue
        pointer = "*fp32" if parameter == "dlogit_ptr" else _POINTER[dtype]
        signature[parameter] = pointer if parameter.endswith("_ptr") else "i32"
        if parameter != "T":
            attrs[(index,)] = [["tt.divisibility", 16]]
    expectations = {"tensor_core": False if dtype == torch.float32 else tensor_core}
    return CodegenSpec(
        f"dual_lora_{name}_{_SHORT[dtype]}",
        fn,
        signature,
        constants,
        attrs,
        config.num_warps,
        config.num_stages,
        expectations,
    )


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
