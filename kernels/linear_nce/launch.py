"""Launchers of the Triton kernels of linear_nce, and what the code generation checks compile.

The public op (calm_fast.ops.linear_nce) has validated the arguments; the products that consume a chunk of logit
gradients are torch's own, called there.
"""

from __future__ import annotations

import torch
import triton

from calm_fast.kernels.linear_nce.bwd import _linear_nce_dlogits_kernel
from calm_fast.kernels.linear_nce.fwd import (
    PARTS_PLAIN,
    PARTS_SOFT,
    _linear_nce_calibrate_kernel,
    _linear_nce_combine_kernel,
    _linear_nce_sweep_kernel,
)
from calm_fast.kernels.linear_nce.step import launch_linear_nce_step, step_specs
from calm_fast.kernels.vocabulary.launch import (
    GROUP,
    CodegenSpec,
    LaunchConfig,
    addressable,
    block_d,
    constants,
    gpu_config,
    launch,
    make_spec,
)

__all__ = ["codegen_specs", "launch_linear_nce_dlogits", "launch_linear_nce_fwd", "launch_linear_nce_step"]

# True where TRITON_INTERPRET made the kernels Python functions
_INTERPRETED = not isinstance(_linear_nce_sweep_kernel, triton.runtime.JITFunction)

# columns a program sweeps: a constant, so that a token's bits do not depend on how many tokens there are
_SPLIT = 2048
_INTERPRETER = {"sweep": LaunchConfig(16, 32, 4, 1, split_keys=64), "dlogits": LaunchConfig(16, 32, 4, 1)}
_SMALL = LaunchConfig(64, 64, 4, 1)  # combine and calibrate: BLOCK_T, BLOCK_J


# (BLOCK_T, BLOCK_V, warps, stages) for 16-bit inputs by architecture: the largest tiles that compile to zero spills
# (three accumulators, two backwards, share a tile of weight); the second for temperatures, biases and softcaps
_TILES = {
    80: {"sweep": ((64, 64, 8, 2), (64, 64, 8, 2)), "dlogits": ((64, 128, 8, 3), (64, 128, 8, 3))},
    90: {"sweep": ((64, 128, 8, 3), (64, 64, 8, 3)), "dlogits": ((128, 128, 8, 3), (128, 128, 8, 3))},
    100: {"sweep": ((64, 128, 8, 3), (64, 128, 8, 3)), "dlogits": ((128, 128, 8, 3), (128, 64, 8, 3))},
}


def default_config(part: str, arch: int, dtype: torch.dtype, plain: bool) -> LaunchConfig:
    """Launch numbers that fit the architecture without spills; unknown architectures get the smallest tiles.

    Args:
        part: "sweep" or "dlogits". arch: 10 * major + minor. dtype: of the tensors.
        plain: temperature 1, no bias and no softcap.
    """
    split = _SPLIT if part == "sweep" else 0
    if dtype == torch.float32:  # IEEE products run on the ordinary cores
        return LaunchConfig(16, 32, 4, 1, split_keys=split)
    family = 90 if arch == 90 else 100 if arch in (100, 103) else 80  # consumer Blackwell (120) has 99 KiB
    return LaunchConfig(*_TILES[family][part][0 if plain else 1], split_keys=split)


def _pick(part: str, weight: torch.Tensor, tokens: int, plain: bool) -> LaunchConfig:
    if _INTERPRETED:
        return _INTERPRETER[part]  # small tiles, so that small tests cross tile edges
    tuned, arch = gpu_config("linear_nce", part, weight, tokens)
    return tuned if tuned and plain else default_config(part, arch, weight.dtype, plain)


def _plain(temperature: float, bias: torch.Tensor | None, softcap: float | None) -> bool:
    return temperature == 1.0 and bias is None and softcap is None


def launch_linear_nce_fwd(
    student: torch.Tensor,
    nat: torch.Tensor,
    neg: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    seq_ids: torch.Tensor,
    alpha: float,
    temperature: float,
    offset: float,
    softcap: float | None,
    ignore_index: int,
    config: LaunchConfig | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The NCE loss by one sweep over the vocabulary.

    Args:
        student, nat, neg: (T, d) float32, bfloat16 or float16, any strides. weight: (V, d), bias (V,) or None.
        targets, seq_ids: (T,) int64. config: launch numbers of the sweep; split_keys = columns of a program.
    Returns:
        loss (), lse (3, T) and coefficients (2, T) as `linear_nce_torch_fwd`, float32.
    Deterministic; a token's log-sum-exps do not depend on the other tokens.
    """
    tokens, v, device = student.shape[0], weight.shape[0], student.device
    lse, terms, coefficients = (torch.empty((n, tokens), dtype=torch.float32, device=device) for n in (3, 3, 2))
    if tokens == 0:
        return lse.new_zeros(()), lse, coefficients
    config = config or _pick("sweep", weight, tokens, _plain(temperature, bias, softcap))
    plain, tau = temperature == 1.0, 1.0 / temperature
    splits = triton.cdiv(v, config.split_keys)
    part = lse.new_empty((PARTS_PLAIN if plain else PARTS_SOFT, splits, tokens))
    at_target = lse.new_empty(tokens)
    student, nat, neg, weight = (addressable(t) for t in (student, nat, neg, weight))
    targets, seq_ids = targets.contiguous(), seq_ids.contiguous()
    bias = None if bias is None else bias.contiguous()
    launch(
        _linear_nce_sweep_kernel,
        triton.cdiv(tokens, config.block_m) * splits,
        device,
        config,
        *(student, nat, neg, weight, bias, targets, part, at_target),
        *(t.stride(0) for t in (student, nat, neg, weight)),
        *(tokens, v, splits, tau, softcap or 0.0, ignore_index),
        SPLIT_V=config.split_keys,
        PLAIN=plain,
        GROUP=GROUP,
        **constants(weight, bias, softcap, config, _INTERPRETED),
    )
    programs = triton.cdiv(tokens, _SMALL.block_m)
    arguments = (part, at_target, targets, lse, terms, tokens, splits, tau, ignore_index)
    launch(_linear_nce_combine_kernel, programs, device, _SMALL, *arguments, PLAIN=plain, BLOCK_T=_SMALL.block_m)
    launch(
        _linear_nce_calibrate_kernel,
        programs,
        device,
        _SMALL,
        *(terms, targets, seq_ids, coefficients, tokens, alpha, tau, offset, ignore_index),
        BLOCK_T=_SMALL.block_m,
        BLOCK_J=_SMALL.block_n,
    )
    return (coefficients * terms[:2]).sum(), lse, coefficients


def launch_linear_nce_dlogits(
    dloss: torch.Tensor,
    student: torch.Tensor,
    nat: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    lse: torch.Tensor,
    coefficients: torch.Tensor,
    temperature: float,
    softcap: float | None,
    rows: slice,
    columns: slice,
    out: torch.Tensor,
    config: LaunchConfig | None = None,
) -> None:
    """Fill `out` (rows, columns), contiguous, in the inputs' dtype, with the gradient of the logits before the softcap.

    Args:
        dloss: () float32. lse, coefficients: what the forward pass returned. rows, columns: which tokens and which
        part of the vocabulary. The rest as in the forward pass.
    """
    if out.numel() == 0:
        return
    config = config or _pick("dlogits", weight, student.shape[0], _plain(temperature, bias, softcap))
    student, nat, weight = (addressable(t) for t in (student, nat, weight))
    blocks = triton.cdiv(columns.stop - columns.start, config.block_n)
    launch(
        _linear_nce_dlogits_kernel,
        triton.cdiv(rows.stop - rows.start, config.block_m) * blocks,
        student.device,
        config,
        *(student, nat, weight, None if bias is None else bias.contiguous(), targets.contiguous()),
        *(lse, coefficients, dloss, out),
        *(t.stride(0) for t in (student, nat, weight)),
        *(rows.start, rows.stop, columns.start, columns.stop, student.shape[0], weight.shape[0], blocks),
        *(1.0 / temperature, softcap or 0.0),
        PLAIN=temperature == 1.0,
        GROUP=GROUP,
        **constants(weight, bias, softcap, config, _INTERPRETED),
    )


_POINTERS = {"targets_ptr": "*i64", "seq_ids_ptr": "*i64"} | {
    f"{name}_ptr": "*fp32" for name in ("part", "at_target", "lse", "terms", "coefficients", "dloss")
}


def codegen_specs() -> list[CodegenSpec]:
    """Every kernel with the default config of each architecture; bf16 must use the tensor cores, fp32 must not."""
    specs = []
    for arch in (80, 90, 100):
        for dtype in (torch.bfloat16, torch.float32):
            for part, fn in (("sweep", _linear_nce_sweep_kernel), ("dlogits", _linear_nce_dlogits_kernel)):
                for plain in (True, False):
                    config = default_config(part, arch, dtype, plain)
                    constant = {
                        "D": 4096 if plain else 576, "BLOCK_T": config.block_m, "BLOCK_V": config.block_n,
                        "BLOCK_D": block_d(dtype, False), "GROUP": GROUP, "SPLIT_V": config.split_keys,
                        "PLAIN": plain, "HAS_BIAS": not plain, "HAS_SOFTCAP": not plain,
                        "PRECISION": "ieee", "INTERPRET": False,
                    }  # fmt: skip
                    constant |= {"bias_ptr": None} if plain else {}
                    name = f"linear_nce_{part}" + ("" if plain else "_full")
                    specs.append(make_spec(name, fn, dtype, constant, config, True, (arch,), _POINTERS))
    for plain in (True, False):
        constant = {"PLAIN": plain, "BLOCK_T": _SMALL.block_m}
        name = "linear_nce_combine" + ("" if plain else "_full")
        fn = _linear_nce_combine_kernel
        specs.append(make_spec(name, fn, torch.float32, constant, _SMALL, False, (80, 90, 100), _POINTERS))
    constant = {"BLOCK_T": _SMALL.block_m, "BLOCK_J": _SMALL.block_n}
    fn = _linear_nce_calibrate_kernel
    specs.append(
        make_spec("linear_nce_calibrate", fn, torch.float32, constant, _SMALL, False, (80, 90, 100), _POINTERS)
    )
    return specs + step_specs()
