"""Forward kernel of cross_attention: one tile of query rows against the key blocks it sees.

Derivation and measured facts: docs/ops/cross_attention.md.
"""

from __future__ import annotations

import triton
import triton.language as tl

from calm_fast.kernels.common.arithmetic import LN_2, NEG_HUGE, matmul, matmul_add
from calm_fast.kernels.common.intervals import (
    finite_or_zero,
    key_block_ranges,
    load_interval,
    load_rows,
    sees,
)


@triton.jit
def attend(
    acc,
    row_sum,
    row_max,
    q,
    k_base,
    v_base,
    stride_kn,
    stride_vn,
    lo,
    hi,
    first,
    last,
    scale_log2,
    N,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
    HAS_LO: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """Online softmax over the key blocks in [first, last). Returns the new (acc, row_sum, row_max).

    acc (rows, BLOCK_D) and row_sum (rows,) are relative to exp2(row_max); row_max is in log2 units.
    """
    for start in tl.range(first, last, BLOCK_N):
        # a hidden value times its weight of 0 may be NaN: NaN and Inf become 0, and the scores that see one NaN
        if MASKED:  # before the scores, which need registers too
            v = load_rows(v_base, start, stride_vn, N, D, BLOCK_N, BLOCK_D, MASKED)
            excess = tl.sum((v - v).to(tl.float32), 1)  # 0, or NaN
            v = finite_or_zero(v)
        # scores
        k = load_rows(k_base, start, stride_kn, N, D, BLOCK_N, BLOCK_D, MASKED)
        scores = matmul(q, tl.trans(k), PRECISION, INTERPRET)
        if MASKED:
            keys = start + tl.arange(0, BLOCK_N)
            visible = sees(lo[:, None], hi[:, None], keys[None, :], HAS_LO)
            scores = tl.where(visible, scores + excess[None, :], float("-inf"))
        # softmax: the scale is positive (the launcher checks), so it commutes with max and joins the exponent's FMA
        new_max = tl.maximum(row_max, tl.max(scores, 1) * scale_log2)
        p = tl.exp2(scores * scale_log2 - new_max[:, None])
        shrink = tl.exp2(row_max - new_max)
        row_sum = row_sum * shrink + tl.sum(p, 1)
        # accumulate
        acc = acc * shrink[:, None]
        if not MASKED:
            v = load_rows(v_base, start, stride_vn, N, D, BLOCK_N, BLOCK_D, MASKED)
        acc = matmul_add(p.to(v.dtype), v, acc, PRECISION, INTERPRET)
        row_max = new_max
    return acc, row_sum, row_max


@triton.jit(do_not_specialize=["M", "N", "H", "GROUP"])
def _cross_attention_fwd_kernel(
    q_ptr,  # (B, M, H, D)
    k_ptr,  # (B, N, H // GROUP, D)
    v_ptr,  # (B, N, H // GROUP, D)
    lo_ptr,  # (B, M) int32 or None
    hi_ptr,  # (B, M) int32 or None
    out_ptr,  # (B, M, H, D) contiguous
    lse_ptr,  # (B, H, M) float32 contiguous
    stride_qb,
    stride_qm,
    stride_qh,
    stride_kb,
    stride_kn,
    stride_kh,
    stride_vb,
    stride_vn,
    stride_vh,
    stride_lob,
    stride_lom,
    stride_hib,
    stride_him,
    scale_log2,
    M,
    N,
    H,
    GROUP,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_LO: tl.constexpr,
    HAS_HI: tl.constexpr,
    CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """One tile of queries of one head: out and lse in a single pass over its keys."""
    # 1-D grid (the y axis ends at 65535): neighbours share a KV head, and the last rows come first because with
    # causal-like intervals they see the most keys
    tiles = tl.cdiv(M, BLOCK_M)
    first_row = (tiles - 1 - tl.program_id(0) % tiles) * BLOCK_M
    head = tl.program_id(0) // tiles % H
    b = (tl.program_id(0) // tiles // H).to(tl.int64)
    kv_head = (head // GROUP).to(tl.int64)
    head64 = head.to(tl.int64)

    # intervals of the tile's rows
    rows = first_row + tl.arange(0, BLOCK_M)
    lo, hi, seen = load_interval(
        lo_ptr + b * stride_lob if HAS_LO else lo_ptr,
        hi_ptr + b * stride_hib if HAS_HI else hi_ptr,
        stride_lom,
        stride_him,
        rows,
        M,
        N,
        HAS_LO,
        HAS_HI,
        CAUSAL,
    )
    first, full_first, full_last, last = key_block_ranges(lo, hi, seen, N, BLOCK_N, HAS_LO)

    # load
    q_base = q_ptr + b * stride_qb + head64 * stride_qh
    k_base = k_ptr + b * stride_kb + kv_head * stride_kh
    v_base = v_ptr + b * stride_vb + kv_head * stride_vh
    q = load_rows(q_base, first_row, stride_qm, M, D, BLOCK_M, BLOCK_D, True)

    # scores, softmax, accumulate: blocks that need a mask on the left, whole blocks, blocks that need one on the right
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    row_sum = tl.zeros((BLOCK_M,), tl.float32)
    row_max = tl.zeros((BLOCK_M,), tl.float32) + NEG_HUGE
    if HAS_LO:  # without lower bounds nothing on the left is ever masked
        acc, row_sum, row_max = attend(
            acc, row_sum, row_max, q, k_base, v_base, stride_kn, stride_vn, lo, hi, first, full_first,
            scale_log2, N, D, BLOCK_D, BLOCK_N, True, HAS_LO, PRECISION, INTERPRET,
        )  # fmt: skip
    acc, row_sum, row_max = attend(
        acc, row_sum, row_max, q, k_base, v_base, stride_kn, stride_vn, lo, hi, full_first, full_last,
        scale_log2, N, D, BLOCK_D, BLOCK_N, False, HAS_LO, PRECISION, INTERPRET,
    )  # fmt: skip
    acc, row_sum, row_max = attend(
        acc, row_sum, row_max, q, k_base, v_base, stride_kn, stride_vn, lo, hi, full_last, last,
        scale_log2, N, D, BLOCK_D, BLOCK_N, True, HAS_LO, PRECISION, INTERPRET,
    )  # fmt: skip

    # store: a row that sees nothing may have met unmasked blocks of its neighbours, and becomes 0 and -inf here
    row_sum = tl.where(seen, row_sum, 1.0)
    out = tl.where(seen[:, None], acc / row_sum[:, None], 0.0)
    lse = tl.where(seen, (row_max + tl.log2(row_sum)) * LN_2, float("-inf"))
    cols = tl.arange(0, BLOCK_D)
    out_tile = out_ptr + (b * M + first_row) * H * D + head64 * D
    out_ptrs = out_tile + tl.arange(0, BLOCK_M)[:, None] * (H * D) + cols[None, :]
    inside = rows < M
    tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=inside[:, None] & (cols < D)[None, :])
    tl.store(lse_ptr + (b * H + head64) * M + rows, lse, mask=inside)
