"""Launchers of the Triton kernels of dual_lora; the wide products around them are torch's own.

The public op (calm_fast.ops.dual_lora) has validated the arguments and made zg = [z, g] = x down^T, one product.
R = R_pos + R_neg, positive columns first; T tokens.
"""

from __future__ import annotations

import torch
import triton

from calm_fast.kernels.common.launching import addressable, float32_precision, interpreted, launch
from calm_fast.kernels.dual_lora.bwd import _dual_lora_gate_bwd_kernel, _dual_lora_gelu_bwd_kernel
from calm_fast.kernels.dual_lora.configs import (
    LaunchConfig,
    block_k,
    block_r,
    codegen_specs,
    pick_config,
    programs_wanted,
)
from calm_fast.kernels.dual_lora.fwd import _dual_lora_mix_kernel, _dual_lora_update_kernel

__all__ = [
    "LaunchConfig",
    "codegen_specs",
    "launch_dual_lora_bwd",
    "launch_dual_lora_fwd",
    "launch_dual_lora_gelu_bwd",
    "launch_dual_lora_gelu_fwd",
]

_INTERPRETED = interpreted(_dual_lora_update_kernel)


def _config(part: str, like: torch.Tensor, k: int, n: int) -> LaunchConfig:
    return pick_config(part, like.device, like.dtype, k, {"T": like.shape[0], "N": n}, _INTERPRETED)


def _update(
    a: torch.Tensor, y: torch.Tensor, w: torch.Tensor, r_pos: int, gated: bool, config: LaunchConfig | None
) -> torch.Tensor:
    """out = y + a w^T; where gated, a = [z, g] and z is weighted by the gate first."""
    tokens, n = y.shape
    out = torch.empty((tokens, n), dtype=y.dtype, device=y.device)
    if out.numel() == 0:
        return out
    a, y, w = addressable(a), addressable(y), addressable(w)
    k = w.shape[1]
    config = config or _config("update", y, k, n)
    row_tiles, col_tiles = triton.cdiv(tokens, config.block_m), triton.cdiv(n, config.block_n)
    # a program keeps its mix for several columns of tiles, as far as every multiprocessor still has work
    parts = min(col_tiles, triton.cdiv(programs_wanted(y.device, _INTERPRETED), row_tiles))
    step = triton.cdiv(col_tiles, parts) * config.block_n
    launch(
        _dual_lora_update_kernel,
        row_tiles * triton.cdiv(n, step),
        y.device,
        config,
        *(a, y, w, out, a.stride(0), y.stride(0), w.stride(0), n, tokens, n, step),
        K=k,
        R_POS=r_pos,
        GATED=gated,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=block_k(k, y.dtype, _INTERPRETED),
        BLOCK_R=block_r(k, y.dtype, _INTERPRETED),
        PRECISION=float32_precision(y.dtype),
        INTERPRET=_INTERPRETED,
    )
    return out


def launch_dual_lora_fwd(
    zg: torch.Tensor, y: torch.Tensor, up: torch.Tensor, r_pos: int, config: LaunchConfig | None = None
) -> torch.Tensor:
    """out = y + [(p_pos + 1/2) z_pos, (p_neg - 1/2) z_neg] up^T, p_neg = sigmoid(z . g).

    Args:
        zg: (T, 2R) float32, bfloat16 or float16, any strides. y: (T, N), up: (N, R), zg's dtype. r_pos: of R.
        config: launch numbers.
    Returns:
        out (T, N) in y's dtype, contiguous. Nothing else of T rows is stored. Deterministic.
    """
    return _update(zg, y, up, r_pos, True, config)


def launch_dual_lora_bwd(
    dmix: torch.Tensor, zg: torch.Tensor, r_pos: int, config: LaunchConfig | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Through the gate, from dmix (T, R) = dout up: dzg (T, 2R), and the mix (T, R) that up's gradient needs."""
    tokens, r = dmix.shape
    dzg, mix = (torch.empty((tokens, width), dtype=zg.dtype, device=zg.device) for width in (2 * r, r))
    if tokens:
        _gate_backward(addressable(dmix), None, zg, dzg, mix, r_pos, config)
    return dzg, mix


def _gate_backward(
    dmix: torch.Tensor,
    dlogit: torch.Tensor | None,
    zg: torch.Tensor,
    dzg: torch.Tensor,
    mix: torch.Tensor | None,
    r_pos: int,
    config: LaunchConfig | None = None,
) -> None:
    tokens, r = dmix.shape
    zg = addressable(zg)
    config = config or _config("gate_bwd", zg, r, r)
    launch(
        _dual_lora_gate_bwd_kernel,
        triton.cdiv(tokens, config.block_m),
        zg.device,
        config,
        *(dmix, dlogit, zg, dzg, mix, dmix.stride(0), zg.stride(0), tokens),
        R=r,
        R_POS=r_pos,
        BLOCK_M=config.block_m,
        BLOCK_R=block_r(r, zg.dtype, _INTERPRETED),
        HAS_DLOGIT=dlogit is not None,
    )


def launch_dual_lora_gelu_fwd(
    zg: torch.Tensor,
    y: torch.Tensor,
    c1: torch.Tensor,
    up: torch.Tensor,
    c2: torch.Tensor,
    r_pos: int,
    config: LaunchConfig | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """out = y + mix C2^T, mix = (p_pos + 1/2) gelu(u + z_pos up_pos^T) + (p_neg - 1/2) gelu(u + z_neg up_neg^T).

    Args:
        zg: (T, 2R), y: (T, N), c1: (H, N), up: (H, R), c2: (N, H), one dtype, any strides. r_pos: of R.
        config: launch numbers of the mix.
    Returns:
        out (T, N); u = y C1^T (T, H) and mix (T, H), which the backward pass reads. Deterministic.
    """
    u = y @ c1.mT
    tokens, h = u.shape
    mix = torch.empty((tokens, h), dtype=y.dtype, device=y.device)
    if tokens:
        zg, up = addressable(zg), addressable(up)
        r = up.shape[1]
        config = config or _config("mix", u, r, h)
        launch(
            _dual_lora_mix_kernel,
            triton.cdiv(tokens, config.block_m) * triton.cdiv(h, config.block_n),
            u.device,
            config,
            *(zg, u, up, mix, zg.stride(0), u.stride(0), up.stride(0), h, tokens, h),
            R=r,
            R_POS=r_pos,
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            BLOCK_R=block_r(max(r_pos, r - r_pos), u.dtype, _INTERPRETED),
            PRECISION=float32_precision(y.dtype),
            INTERPRET=_INTERPRETED,
        )
    return _update(mix, y, c2, r_pos, False, None), u, mix


def launch_dual_lora_gelu_bwd(
    dmix: torch.Tensor,
    zg: torch.Tensor,
    u: torch.Tensor,
    up: torch.Tensor,
    r_pos: int,
    config: LaunchConfig | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Through the mix, from dmix (T, H) = dout C2.

    Returns:
        dzg (T, 2R), and the gradients (T, H) of what the two gelus saw: their sum is u's, z^T times them are up's.
    """
    tokens, h = u.shape
    r = up.shape[1]
    dzg = torch.empty((tokens, 2 * r), dtype=zg.dtype, device=zg.device)
    dpos, dneg = (torch.empty((tokens, h), dtype=u.dtype, device=u.device) for _ in range(2))
    if not tokens:
        return dzg, dpos, dneg
    dmix, zg, u, up = (addressable(t) for t in (dmix, zg, u, up))
    dlogit = torch.empty(tokens, dtype=torch.float32, device=u.device)
    config = config or _config("gelu_bwd", u, r, h)
    launch(
        _dual_lora_gelu_bwd_kernel,
        triton.cdiv(tokens, config.block_m),
        u.device,
        config,
        *(dmix, zg, u, up, dpos, dneg, dlogit),
        *(dmix.stride(0), zg.stride(0), u.stride(0), up.stride(0), tokens, h),
        R=r,
        R_POS=r_pos,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_R=block_r(max(r_pos, r - r_pos), u.dtype, _INTERPRETED),
        PRECISION=float32_precision(u.dtype),
        INTERPRET=_INTERPRETED,
    )
    dz = torch.empty((tokens, r), dtype=zg.dtype, device=zg.device)
    torch.mm(dpos, up[:, :r_pos], out=dz[:, :r_pos])
    torch.mm(dneg, up[:, r_pos:], out=dz[:, r_pos:])
    _gate_backward(dz, dlogit, zg, dzg, None, r_pos)
    return dzg, dpos, dneg
