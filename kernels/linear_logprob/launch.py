"""Launchers of the Triton kernels of linear_logprob, and what the code generation checks compile.

The public op (calm_fast.ops.linear_logprob) has validated the arguments; the products that consume a chunk of logit
gradients are torch's own, called there.
"""

from __future__ import annotations

import torch
import triton

from calm_fast.kernels.common.launching import family, interpreted
from calm_fast.kernels.linear_logprob.kernels import (
    _linear_logprob_combine_kernel,
    _linear_logprob_dlogits_kernel,
    _linear_logprob_sweep_kernel,
    _linear_logprob_target_kernel,
)
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

__all__ = ["codegen_specs", "launch_linear_logprob_dlogits", "launch_linear_logprob_fwd"]

_INTERPRETED = interpreted(_linear_logprob_sweep_kernel)

# columns a program sweeps: a constant, so that a token's bits do not depend on how many tokens there are
_SPLIT = 2048
_INTERPRETER = {"sweep": LaunchConfig(16, 32, 4, 1, split_keys=64), "dlogits": LaunchConfig(16, 32, 4, 1)}
_SMALL = LaunchConfig(64, 64, 4, 1)  # combine
_TARGET = LaunchConfig(16, 64, 4, 1)  # logits of the targets alone: tokens, depth

# (BLOCK_T, BLOCK_V, warps, stages) for 16-bit inputs by architecture: the largest tiles that compile to zero spills
# with Triton 3.6 and 3.9; the second for entropies, ranks, biases and softcaps
_TILES = {
    80: {"sweep": ((128, 128, 8, 3), (128, 64, 8, 3)), "dlogits": ((128, 128, 8, 3), (128, 64, 8, 3))},
    90: {"sweep": ((128, 256, 8, 3), (128, 64, 8, 3)), "dlogits": ((256, 128, 8, 3), (128, 128, 8, 3))},
    100: {"sweep": ((128, 128, 8, 4), (128, 64, 8, 3)), "dlogits": ((128, 128, 8, 3), (128, 128, 8, 3))},
}


def default_config(part: str, arch: int, dtype: torch.dtype, plain: bool) -> LaunchConfig:
    """Launch numbers that fit the architecture without spills; unknown architectures get the smallest tiles.

    Args:
        part: "sweep" or "dlogits". arch: 10 * major + minor. dtype: of the tensors.
        plain: no bias, no softcap, no entropy and no rank.
    """
    split = _SPLIT if part == "sweep" else 0
    if dtype == torch.float32:  # IEEE products run on the ordinary cores
        return LaunchConfig(16, 32, 4, 1, split_keys=split)
    return LaunchConfig(*_TILES[family(arch)][part][0 if plain else 1], split_keys=split)


def _pick(part: str, weight: torch.Tensor, tokens: int, plain: bool) -> LaunchConfig:
    if _INTERPRETED:
        return _INTERPRETER[part]  # small tiles, so that small tests cross tile edges
    tuned, arch = gpu_config("linear_logprob", part, weight, tokens)
    return tuned if tuned and plain else default_config(part, arch, weight.dtype, plain)


def launch_linear_logprob_fwd(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    temperature: float,
    softcap: float | None,
    ignore_index: int,
    want_entropy: bool,
    want_rank: bool,
    config: LaunchConfig | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-probability, entropy and rank of each target by one sweep over the vocabulary.

    Args:
        hidden: (T, d) float32, bfloat16 or float16, any strides. weight: (V, d), bias: (V,) or None.
        targets: (T,) int64. config: launch numbers of the sweep; split_keys = columns of a program.
    Returns:
        logprob, entropy, rank and lse as `linear_logprob_torch_fwd`, float32 and int64.
    Deterministic; a token's results do not depend on the other tokens.
    """
    tokens, v, device = hidden.shape[0], weight.shape[0], hidden.device
    logprob, lse = (torch.empty(tokens, dtype=torch.float32, device=device) for _ in range(2))
    entropy, rank = logprob.new_empty(tokens if want_entropy else 0), targets.new_empty(tokens if want_rank else 0)
    if tokens == 0:
        return logprob, entropy, rank, lse
    plain = bias is None and softcap is None and not want_entropy and not want_rank
    config = config or _pick("sweep", weight, tokens, plain)
    splits, tau = triton.cdiv(v, config.split_keys), 1.0 / temperature
    part = logprob.new_empty((2 + want_entropy, splits, tokens))
    above = torch.empty((splits, tokens), dtype=torch.int32, device=device) if want_rank else None
    at_target, alone = logprob.new_empty(tokens), logprob.new_empty(tokens) if want_rank else None
    hidden, weight, targets = addressable(hidden), addressable(weight), targets.contiguous()
    bias = None if bias is None else bias.contiguous()
    constant = constants(weight, bias, softcap, config, _INTERPRETED)
    if want_rank:
        names = ("D", "HAS_BIAS", "HAS_SOFTCAP")
        launch(
            _linear_logprob_target_kernel,
            triton.cdiv(tokens, _TARGET.block_m),
            device,
            _TARGET,
            *(hidden, weight, bias, targets, alone, hidden.stride(0), weight.stride(0)),
            *(tokens, v, softcap or 0.0, ignore_index),
            BLOCK_T=_TARGET.block_m,
            BLOCK_D=_TARGET.block_n,
            **{name: constant[name] for name in names},
        )
    wanted = {"HAS_ENTROPY": want_entropy, "HAS_RANK": want_rank}
    launch(
        _linear_logprob_sweep_kernel,
        triton.cdiv(tokens, config.block_m) * splits,
        device,
        config,
        *(hidden, weight, bias, targets, alone, part, above, at_target, hidden.stride(0), weight.stride(0)),
        *(tokens, v, splits, tau, softcap or 0.0, ignore_index),
        SPLIT_V=config.split_keys,
        GROUP=GROUP,
        **wanted,
        **constant,
    )
    launch(
        _linear_logprob_combine_kernel,
        triton.cdiv(tokens, _SMALL.block_m),
        device,
        _SMALL,
        *(part, above, at_target, targets, logprob, entropy, rank, lse, tokens, splits, tau, ignore_index),
        BLOCK_T=_SMALL.block_m,
        **wanted,
    )
    return logprob, entropy, rank, lse


def launch_linear_logprob_dlogits(
    dlogprob: torch.Tensor,
    dentropy: torch.Tensor | None,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    lse: torch.Tensor,
    entropy: torch.Tensor,
    temperature: float,
    softcap: float | None,
    ignore_index: int,
    rows: slice,
    columns: slice,
    out: torch.Tensor,
    config: LaunchConfig | None = None,
) -> None:
    """Fill `out` (rows, columns), contiguous, in the inputs' dtype, with the gradient of the logits before the softcap.

    Args:
        dlogprob: (T,) float32. dentropy: (T,) float32 or None. lse, entropy: what the forward pass returned.
        rows, columns: which tokens and which part of the vocabulary. The rest as in the forward pass.
    """
    if out.numel() == 0:
        return
    plain = bias is None and softcap is None and dentropy is None
    config = config or _pick("dlogits", weight, hidden.shape[0], plain)
    hidden, weight = addressable(hidden), addressable(weight)
    blocks = triton.cdiv(columns.stop - columns.start, config.block_n)
    launch(
        _linear_logprob_dlogits_kernel,
        triton.cdiv(rows.stop - rows.start, config.block_m) * blocks,
        hidden.device,
        config,
        *(hidden, weight, None if bias is None else bias.contiguous(), targets.contiguous(), lse, entropy),
        *(dlogprob.contiguous(), None if dentropy is None else dentropy.contiguous(), out),
        *(hidden.stride(0), weight.stride(0), rows.start, rows.stop, columns.start, columns.stop, weight.shape[0]),
        *(blocks, 1.0 / temperature, softcap or 0.0, ignore_index),
        HAS_DENTROPY=dentropy is not None,
        GROUP=GROUP,
        **constants(weight, bias, softcap, config, _INTERPRETED),
    )


_POINTERS = {"targets_ptr": "*i64", "rank_ptr": "*i64", "above_ptr": "*i32"} | {
    f"{name}_ptr": "*fp32"
    for name in ("part", "at_target", "alone", "lse", "entropy", "logprob", "dlogprob", "dentropy")
}


def codegen_specs() -> list[CodegenSpec]:
    """Every kernel with the default config of each architecture; bf16 must use the tensor cores, fp32 must not."""
    specs = []
    for arch in (80, 90, 100):
        for dtype in (torch.bfloat16, torch.float32):
            for part, fn in (("sweep", _linear_logprob_sweep_kernel), ("dlogits", _linear_logprob_dlogits_kernel)):
                for plain in (True, False):
                    config = default_config(part, arch, dtype, plain)
                    constant = {
                        "D": 4096 if plain else 576, "BLOCK_T": config.block_m, "BLOCK_V": config.block_n,
                        "BLOCK_D": block_d(dtype, False), "GROUP": GROUP, "SPLIT_V": config.split_keys,
                        **{f"HAS_{flag}": not plain for flag in ("BIAS", "SOFTCAP", "ENTROPY", "RANK", "DENTROPY")},
                        "PRECISION": "ieee", "INTERPRET": False,
                    }  # fmt: skip
                    absent = ("bias_ptr", "alone_ptr", "above_ptr", "dentropy_ptr")
                    constant |= dict.fromkeys(absent) if plain else {}
                    name = f"linear_logprob_{part}" + ("" if plain else "_full")
                    specs.append(make_spec(name, fn, dtype, constant, config, True, (arch,), _POINTERS))
    archs = (80, 90, 100)
    for plain in (True, False):
        constant = {"HAS_ENTROPY": not plain, "HAS_RANK": not plain, "BLOCK_T": _SMALL.block_m}
        constant |= {"above_ptr": None} if plain else {}
        name, fn = "linear_logprob_combine" + ("" if plain else "_full"), _linear_logprob_combine_kernel
        specs.append(make_spec(name, fn, torch.float32, constant, _SMALL, False, archs, _POINTERS))
    constant = {
        "D": 4096,
        "BLOCK_T": _TARGET.block_m,
        "BLOCK_D": _TARGET.block_n,
        "HAS_BIAS": True,
        "HAS_SOFTCAP": True,
    }
    fn = _linear_logprob_target_kernel
    specs.append(make_spec("linear_logprob_target", fn, torch.bfloat16, constant, _TARGET, False, archs, _POINTERS))
    return specs
