"""Forward kernels of dual_lora: the gated mix of the released form, and the rank update with gate and residual.

R = R_pos + R_neg columns, positive first; zg (T, 2R) = [z, g]. Derivation: docs/ops/dual_lora.md.
"""

from __future__ import annotations

import triton
import triton.language as tl

from calm_fast.kernels.common.arithmetic import matmul_add
from calm_fast.kernels.dual_lora.gate import column_weights, gate_logit, load_tile, negative_weight

SQRT_HALF = tl.constexpr(0.7071067811865476)


@triton.jit
def lora_hidden(
    zg_base,
    up_base,
    rows,
    stride_zg,
    inside,
    hidden,  # rows of `up`: units of the bottleneck
    stride_up,
    H,
    acc,  # C1 y, (rows, hidden) float32
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """Return acc + z[:, FIRST:LAST] up[:, FIRST:LAST]^T, the input of one LoRA's gelu."""
    for first in tl.range(FIRST, LAST, BLOCK_R):
        cols = first + tl.arange(0, BLOCK_R)
        z = load_tile(zg_base, rows, stride_zg, inside, cols, LAST)
        up = load_tile(up_base, hidden, stride_up, hidden < H, cols, LAST)
        acc = matmul_add(z, tl.trans(up), acc, PRECISION, INTERPRET)
    return acc


@triton.jit
def normal_cdf(x):
    """Return the standard normal distribution function at x."""
    return 0.5 + 0.5 * tl.erf(x * SQRT_HALF)


@triton.jit(do_not_specialize=["T"])
def _dual_lora_mix_kernel(
    zg_ptr,  # (T, 2R)
    u_ptr,  # (T, H) = C1 y
    up_ptr,  # (H, R)
    mix_ptr,  # (T, H), written
    stride_zg,
    stride_u,
    stride_up,
    stride_mix,
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
    """mix = a_pos gelu(u + z_pos up_pos^T) + a_neg gelu(u + z_neg up_neg^T), a_* from the gate."""
    blocks = tl.cdiv(H, BLOCK_N)
    first_row = (tl.program_id(0) // blocks).to(tl.int64) * BLOCK_M
    hidden = tl.program_id(0) % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = tl.arange(0, BLOCK_M)
    inside = first_row + rows < T
    zg_base = zg_ptr + first_row * stride_zg

    # gate
    a_neg = negative_weight(gate_logit(zg_base, rows, stride_zg, inside, R, BLOCK_R))[:, None]
    # accumulate: the inputs of the two gelus
    u = load_tile(u_ptr + first_row * stride_u, rows, stride_u, inside, hidden, H).to(tl.float32)
    pos = lora_hidden(
        zg_base, up_ptr, rows, stride_zg, inside, hidden, stride_up, H, u, 0, R_POS, BLOCK_R, PRECISION, INTERPRET
    )
    neg = lora_hidden(
        zg_base, up_ptr, rows, stride_zg, inside, hidden, stride_up, H, u, R_POS, R, BLOCK_R, PRECISION, INTERPRET
    )
    # store
    mix = (1.0 - a_neg) * pos * normal_cdf(pos) + a_neg * neg * normal_cdf(neg)
    ptrs = mix_ptr + first_row * stride_mix + rows[:, None] * stride_mix + hidden[None, :]
    tl.store(ptrs, mix.to(mix_ptr.dtype.element_ty), mask=inside[:, None] & (hidden < H)[None, :])


@triton.jit
def load_mix(
    a_base,
    rows,
    stride,
    inside,
    first,
    a_neg,
    K: tl.constexpr,
    R_POS: tl.constexpr,
    GATED: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Load columns first .. first + BLOCK_K of the rank update's left operand: a itself, or z weighted by the gate."""
    cols = first + tl.arange(0, BLOCK_K)
    a = load_tile(a_base, rows, stride, inside, cols, K)
    if GATED:
        weight = column_weights(a_neg, cols, R_POS)
        a = (a.to(tl.float32) * weight).to(a_base.dtype.element_ty)
    return a


@triton.jit(do_not_specialize=["T"])
def _dual_lora_update_kernel(
    a_ptr,  # (T, K) the mix, or (T, 2K) = [z, g] where GATED
    y_ptr,  # (T, N), one row for all tokens where stride_y is 0; None: zeros
    w_ptr,  # (N, K)
    out_ptr,  # (T, N), written
    stride_a,
    stride_y,
    stride_w,
    stride_out,
    T,
    N,
    N_STEP,  # columns of out per program, a multiple of BLOCK_N
    K: tl.constexpr,
    R_POS: tl.constexpr,
    HAS_Y: tl.constexpr,
    GATED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """out = y + mix w^T. The mix is read, or made of z and the gate once per program."""
    parts = tl.cdiv(N, N_STEP)
    first_row = (tl.program_id(0) // parts).to(tl.int64) * BLOCK_M
    start = tl.program_id(0) % parts * N_STEP
    rows = tl.arange(0, BLOCK_M)
    inside = first_row + rows < T
    a_base = a_ptr + first_row * stride_a
    y_base = y_ptr + first_row * stride_y if HAS_Y else y_ptr
    out_base = out_ptr + first_row * stride_out

    # gate
    a_neg = tl.zeros((BLOCK_M,), tl.float32)
    if GATED:
        a_neg = negative_weight(gate_logit(a_base, rows, stride_a, inside, K, BLOCK_R))
    # load: a mix of one chunk stays in place for all columns of out
    if K <= BLOCK_K:
        a = load_mix(a_base, rows, stride_a, inside, 0, a_neg, K, R_POS, GATED, BLOCK_K)
    for first in tl.range(start, tl.minimum(start + N_STEP, N), BLOCK_N):
        # accumulate onto y
        cols = first + tl.arange(0, BLOCK_N)
        w_base = w_ptr + tl.cast(first, tl.int64) * stride_w
        w_rows = tl.arange(0, BLOCK_N)
        if HAS_Y:
            acc = load_tile(y_base, rows, stride_y, inside, cols, N).to(tl.float32)
        else:
            acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        if K <= BLOCK_K:
            w = load_tile(w_base, w_rows, stride_w, cols < N, tl.arange(0, BLOCK_K), K)
            acc = matmul_add(a, tl.trans(w), acc, PRECISION, INTERPRET)
        else:
            for k in tl.range(0, K, BLOCK_K):
                a = load_mix(a_base, rows, stride_a, inside, k, a_neg, K, R_POS, GATED, BLOCK_K)
                w = load_tile(w_base, w_rows, stride_w, cols < N, k + tl.arange(0, BLOCK_K), K)
                acc = matmul_add(a, tl.trans(w), acc, PRECISION, INTERPRET)
        # store
        ptrs = out_base + rows[:, None] * stride_out + cols[None, :]
        tl.store(ptrs, acc.to(out_ptr.dtype.element_ty), mask=inside[:, None] & (cols < N)[None, :])
