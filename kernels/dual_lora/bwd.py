"""Backward kernels of dual_lora: through the gate, and through the two gelus of the released form.

R = R_pos + R_neg columns, positive first; zg (T, 2R) = [z, g]. Derivation: docs/ops/dual_lora.md.
"""

from __future__ import annotations

import triton
import triton.language as tl

from calm_fast.kernels.dual_lora.fwd import lora_hidden, normal_cdf
from calm_fast.kernels.dual_lora.gate import column_weights, gate_logit, load_tile, negative_weight, sigmoid

INV_SQRT_2PI = tl.constexpr(0.3989422804014327)


@triton.jit
def gelu_slope(x, cdf):
    """Return the derivative of the exact gelu at x; cdf = normal_cdf(x)."""
    return cdf + x * INV_SQRT_2PI * tl.exp(-0.5 * x * x)


@triton.jit(do_not_specialize=["T"])
def _dual_lora_gate_bwd_kernel(
    dmix_ptr,  # (T, R): gradient of the gated z; with dlogit, the gradient of z past the gate
    dlogit_ptr,  # (T,) float32 gradient of the gate's logit, or None
    zg_ptr,  # (T, 2R)
    dzg_ptr,  # (T, 2R), written
    mix_ptr,  # (T, R), written: z weighted by the gate; None with dlogit
    stride_dmix,
    stride_zg,
    T,
    R: tl.constexpr,
    R_POS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    HAS_DLOGIT: tl.constexpr,
):
    """dz = weight dmix + dlogit g, dg = dlogit z, with dlogit = p (1 - p) (dmix_neg . z_neg - dmix_pos . z_pos)."""
    first_row = tl.program_id(0).to(tl.int64) * BLOCK_M
    rows = tl.arange(0, BLOCK_M)
    inside = first_row + rows < T
    zg_base = zg_ptr + first_row * stride_zg
    dmix_base = dmix_ptr + first_row * stride_dmix
    dzg_base = dzg_ptr + first_row * (2 * R)

    # gate: the logit's gradient
    if HAS_DLOGIT:
        dlogit = tl.load(dlogit_ptr + first_row + rows, mask=inside, other=0.0)
    else:
        logit = tl.zeros((BLOCK_M,), tl.float32)
        dp = tl.zeros((BLOCK_M,), tl.float32)
        for first in tl.range(0, R, BLOCK_R):
            cols = first + tl.arange(0, BLOCK_R)
            z = load_tile(zg_base, rows, stride_zg, inside, cols, R).to(tl.float32)
            g = load_tile(zg_base + R, rows, stride_zg, inside, cols, R).to(tl.float32)
            dmix = load_tile(dmix_base, rows, stride_dmix, inside, cols, R).to(tl.float32)
            logit += tl.sum(z * g, 1)
            dp += tl.sum(tl.where((cols < R_POS)[None, :], -dmix * z, dmix * z), 1)
        a_neg = negative_weight(logit)
        p_neg = sigmoid(logit)
        dlogit = p_neg * (1.0 - p_neg) * dp

    for first in tl.range(0, R, BLOCK_R):
        # load
        cols = first + tl.arange(0, BLOCK_R)
        stored = inside[:, None] & (cols < R)[None, :]
        z = load_tile(zg_base, rows, stride_zg, inside, cols, R).to(tl.float32)
        g = load_tile(zg_base + R, rows, stride_zg, inside, cols, R).to(tl.float32)
        dz = load_tile(dmix_base, rows, stride_dmix, inside, cols, R).to(tl.float32)
        # store
        if not HAS_DLOGIT:
            weight = column_weights(a_neg, cols, R_POS)
            dz *= weight
            mix_ptrs = mix_ptr + first_row * R + rows[:, None] * R + cols[None, :]
            tl.store(mix_ptrs, (weight * z).to(mix_ptr.dtype.element_ty), mask=stored)
        dz += dlogit[:, None] * g
        dg = dlogit[:, None] * z
        ptrs = dzg_base + rows[:, None] * (2 * R) + cols[None, :]
        tl.store(ptrs, dz.to(dzg_ptr.dtype.element_ty), mask=stored)
        tl.store(ptrs + R, dg.to(dzg_ptr.dtype.element_ty), mask=stored)


@triton.jit(do_not_specialize=["T"])
def _dual_lora_gelu_bwd_kernel(
    dmix_ptr,  # (T, H)
    zg_ptr,  # (T, 2R)
    u_ptr,  # (T, H)
    up_ptr,  # (H, R)
    dpos_ptr,  # (T, H), written: gradient of the positive gelu's input
    dneg_ptr,  # (T, H), written: gradient of the negative gelu's input
    dlogit_ptr,  # (T,) float32, written
    stride_dmix,
    stride_zg,
    stride_u,
    stride_up,
    T,
    H,
    R: tl.constexpr,
    R_POS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """Gradients through mix = a_pos gelu(h_pos) + a_neg gelu(h_neg); h_* = u + z_* up_*^T is computed again."""
    first_row = tl.program_id(0).to(tl.int64) * BLOCK_M
    rows = tl.arange(0, BLOCK_M)
    inside = first_row + rows < T
    zg_base = zg_ptr + first_row * stride_zg
    # gate
    a_neg = negative_weight(gate_logit(zg_base, rows, stride_zg, inside, R, BLOCK_R))
    dp = tl.zeros((BLOCK_M,), tl.float32)
    for start in tl.range(0, H, BLOCK_N):
        # load
        hidden = start + tl.arange(0, BLOCK_N)
        u = load_tile(u_ptr + first_row * stride_u, rows, stride_u, inside, hidden, H).to(tl.float32)
        dmix = load_tile(dmix_ptr + first_row * stride_dmix, rows, stride_dmix, inside, hidden, H).to(tl.float32)
        stored = inside[:, None] & (hidden < H)[None, :]
        offsets = first_row * H + rows[:, None] * H + hidden[None, :]

        # accumulate and store the positive part
        pos = lora_hidden(
            zg_base, up_ptr, rows, stride_zg, inside, hidden, stride_up, H, u, 0, R_POS, BLOCK_R, PRECISION, INTERPRET
        )
        cdf = normal_cdf(pos)
        dp -= tl.sum(dmix * pos * cdf, 1)
        dpos = (1.0 - a_neg)[:, None] * dmix * gelu_slope(pos, cdf)
        tl.store(dpos_ptr + offsets, dpos.to(dpos_ptr.dtype.element_ty), mask=stored)

        # accumulate and store the negative part
        neg = lora_hidden(
            zg_base, up_ptr, rows, stride_zg, inside, hidden, stride_up, H, u, R_POS, R, BLOCK_R, PRECISION, INTERPRET
        )
        cdf = normal_cdf(neg)
        dp += tl.sum(dmix * neg * cdf, 1)
        dneg = a_neg[:, None] * dmix * gelu_slope(neg, cdf)
        tl.store(dneg_ptr + offsets, dneg.to(dneg_ptr.dtype.element_ty), mask=stored)
    # store: the logit once more, because keeping it through the loop would cost registers
    p_neg = sigmoid(gate_logit(zg_base, rows, stride_zg, inside, R, BLOCK_R))
    tl.store(dlogit_ptr + first_row + rows, p_neg * (1.0 - p_neg) * dp, mask=inside)
