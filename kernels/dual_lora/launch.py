"""Launchers of the Triton kernels of dual_lora; the wide products around them are torch's own.

The public op (calm_fast.ops.dual_lora) has validated the arguments and computed zg = [z, g] = x down^T in one product.
R = R_pos + R_neg, positive columns first; T tokens; a_pos = p_pos + 1/2 and a_neg = p_neg - 1/2 are the gate's weights,
p_neg = sigmoid(z . g) and p_pos = 1 - p_neg.
"""

from __future__ import annotations

import torch
import triton

from calm_fast.core.launch_config import Config
from calm_fast.kernels.common.config_table import ConfigTable, padded
from calm_fast.kernels.common.launching import addressable, float32_precision, interpreted, launch
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
    programs_wanted,
    table_size,
)
from calm_fast.kernels.dual_lora.fwd import _dual_lora_mix_kernel, _dual_lora_update_kernel

__all__ = [
    "launch_dual_lora_bwd",
    "launch_dual_lora_fwd",
    "launch_dual_lora_gelu_bwd",
    "launch_dual_lora_gelu_fwd",
    "launch_dual_lora_residual",
]

_INTERPRETED = interpreted(_dual_lora_update_kernel)


def _config(table: ConfigTable[str, Config], like: torch.Tensor, k: int, n: int, gated: bool = False) -> Config:
    """Return the config of a kernel: tokens, dtype and device are those of `like`; k: depth, n: columns."""
    tokens = like.shape[0]
    size, shape = table_size(tokens, k, gated), {"T": tokens, "N": n}
    return table.pick(like.device, like.dtype, size, padded(k), shape, _INTERPRETED)


def _update(
    a: torch.Tensor, y: torch.Tensor | None, w: torch.Tensor, r_pos: int, gated: bool, config: TileConfig | None
) -> torch.Tensor:
    """Return y + a w^T, without y where it is None. If gated, a = [z, g] and z is weighted by the gate first."""
    tokens, n = a.shape[0], w.shape[0]
    out = torch.empty((tokens, n), dtype=w.dtype, device=w.device)
    if out.numel() == 0:
        return out
    a, w = addressable(a), addressable(w)
    y = None if y is None else addressable(y)
    k = w.shape[1]
    config = config or _config(UPDATE, out, k, n, gated)
    row_tiles, col_tiles = triton.cdiv(tokens, config.block_tokens), triton.cdiv(n, config.block_columns)
    # a program keeps its mix for several columns of tiles, as long as every multiprocessor still has work
    parts = min(col_tiles, triton.cdiv(programs_wanted(out.device, _INTERPRETED), row_tiles))
    step = triton.cdiv(col_tiles, parts) * config.block_columns
    launch(
        _dual_lora_update_kernel,
        row_tiles * triton.cdiv(n, step),
        out.device,
        config,
        *(a, y, w, out, a.stride(0), 0 if y is None else y.stride(0), w.stride(0), n),
        T=tokens,
        N=n,
        N_STEP=step,
        K=k,
        R_POS=r_pos,
        HAS_Y=y is not None,
        GATED=gated,
        BLOCK_M=config.block_tokens,
        BLOCK_N=config.block_columns,
        BLOCK_K=block_k(k, out.dtype, _INTERPRETED),
        BLOCK_R=block_r(k, out.dtype, _INTERPRETED),
        PRECISION=float32_precision(out.dtype),
        INTERPRET=_INTERPRETED,
    )
    return out


def launch_dual_lora_residual(
    zg: torch.Tensor, up: torch.Tensor, bias: torch.Tensor | None, r_pos: int, config: TileConfig | None = None
) -> torch.Tensor:
    """What the paper's form adds to a product x W^T: the residual and the bias of the linear layer.

        out = bias + [a_pos z_pos, a_neg z_neg] up^T

    Args:
        zg: (T, 2R) float32, bfloat16 or float16, any strides.
        up: (N, R), zg's dtype.
        bias: (N,), zg's dtype, or None.
        r_pos: number of positive columns.
        config: launch config. None chooses one.
    Returns:
        out (T, N), contiguous.

    Deterministic.
    """
    return _update(zg, None if bias is None else bias.expand(zg.shape[0], -1), up, r_pos, True, config)


def launch_dual_lora_fwd(
    zg: torch.Tensor, y: torch.Tensor, up: torch.Tensor, r_pos: int, config: TileConfig | None = None
) -> torch.Tensor:
    """The paper's form: gate and rank update in one kernel.

        out = y + [a_pos z_pos, a_neg z_neg] up^T

    Args:
        zg: (T, 2R) float32, bfloat16 or float16, any strides.
        y: (T, N), zg's dtype.
        up: (N, R), zg's dtype.
        r_pos: number of positive columns.
        config: launch config. None chooses one.
    Returns:
        out (T, N) in y's dtype, contiguous. Nothing else of T rows is stored.

    Deterministic.
    """
    return _update(zg, y, up, r_pos, True, config)


def launch_dual_lora_bwd(
    dmix: torch.Tensor, zg: torch.Tensor, r_pos: int, config: GateConfig | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of the paper's form through the gate.

    Args:
        dmix: (T, R) = dout up, zg's dtype.
        zg, r_pos: as in the forward pass.
        config: launch config. None chooses one.
    Returns:
        dzg (T, 2R), and the mix (T, R) that up's gradient needs.

    Deterministic.
    """
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
    config: GateConfig | None = None,
) -> None:
    """Fill dzg, and the mix unless it is None. dlogit None: the kernel derives it from dmix."""
    tokens, r = dmix.shape
    zg = addressable(zg)
    config = config or _config(GATE_BWD, zg, r, r)
    launch(
        _dual_lora_gate_bwd_kernel,
        triton.cdiv(tokens, config.block_tokens),
        zg.device,
        config,
        *(dmix, dlogit, zg, dzg, mix, dmix.stride(0), zg.stride(0)),
        T=tokens,
        R=r,
        R_POS=r_pos,
        BLOCK_M=config.block_tokens,
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
    config: TileConfig | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The released form: one product, the gated mix of two gelus, the rank update.

        out = y + mix C2^T,  mix = a_pos gelu(u + z_pos up_pos^T) + a_neg gelu(u + z_neg up_neg^T),  u = y C1^T

    Args:
        zg: (T, 2R) float32, bfloat16 or float16, any strides.
        y: (T, N), zg's dtype.
        c1: (H, N), zg's dtype.
        up: (H, R), zg's dtype.
        c2: (N, H), zg's dtype.
        r_pos: number of positive columns.
        config: launch config of the mix. None chooses one.
    Returns:
        out (T, N); u (T, H) and mix (T, H), which the backward pass reads.

    Deterministic.
    """
    u = y @ c1.mT
    tokens, h = u.shape
    mix = torch.empty((tokens, h), dtype=y.dtype, device=y.device)
    if tokens:
        zg, up = addressable(zg), addressable(up)
        r = up.shape[1]
        config = config or _config(MIX, u, r, h)
        launch(
            _dual_lora_mix_kernel,
            triton.cdiv(tokens, config.block_tokens) * triton.cdiv(h, config.block_columns),
            u.device,
            config,
            *(zg, u, up, mix, zg.stride(0), u.stride(0), up.stride(0), h),
            T=tokens,
            H=h,
            R=r,
            R_POS=r_pos,
            BLOCK_M=config.block_tokens,
            BLOCK_N=config.block_columns,
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
    config: TileConfig | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of the released form through the mix.

    Args:
        dmix: (T, H) = dout C2, zg's dtype.
        zg, up, r_pos: as in the forward pass.
        u: (T, H) from the forward pass.
        config: launch config of the gelus. None chooses one.
    Returns:
        dzg (T, 2R), and the gradients (T, H) of the inputs of the two gelus. Their sum is u's gradient; z^T times
        each of them is up's.

    Deterministic.
    """
    tokens, h = u.shape
    r = up.shape[1]
    dzg = torch.empty((tokens, 2 * r), dtype=zg.dtype, device=zg.device)
    dpos, dneg = (torch.empty((tokens, h), dtype=u.dtype, device=u.device) for _ in range(2))
    if not tokens:
        return dzg, dpos, dneg
    dmix, zg, u, up = (addressable(t) for t in (dmix, zg, u, up))
    dlogit = torch.empty(tokens, dtype=torch.float32, device=u.device)
    config = config or _config(GELU_BWD, u, r, h)
    launch(
        _dual_lora_gelu_bwd_kernel,
        triton.cdiv(tokens, config.block_tokens),
        u.device,
        config,
        *(dmix, zg, u, up, dpos, dneg, dlogit),
        *(dmix.stride(0), zg.stride(0), u.stride(0), up.stride(0)),
        T=tokens,
        H=h,
        R=r,
        R_POS=r_pos,
        BLOCK_M=config.block_tokens,
        BLOCK_N=config.block_columns,
        BLOCK_R=block_r(max(r_pos, r - r_pos), u.dtype, _INTERPRETED),
        PRECISION=float32_precision(u.dtype),
        INTERPRET=_INTERPRETED,
    )
    dz = torch.empty((tokens, r), dtype=zg.dtype, device=zg.device)
    torch.mm(dpos, up[:, :r_pos], out=dz[:, :r_pos])
    torch.mm(dneg, up[:, r_pos:], out=dz[:, r_pos:])
    _gate_backward(dz, dlogit, zg, dzg, None, r_pos)
    return dzg, dpos, dneg
