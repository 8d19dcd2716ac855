"""Backward kernels of cross_attention that go by queries: the terms of each row, and dq.

There are no atomics, so the gradients have the same bits every time. Derivation: docs/ops/cross_attention.md.
"""

from __future__ import annotations

import triton
import triton.language as tl

from calm_fast.kernels.common.arithmetic import LOG2_E, matmul, matmul_add
from calm_fast.kernels.common.intervals import key_block_ranges, load_interval, load_rows, sees


@triton.jit(do_not_specialize=["M", "H"])
def _cross_attention_bwd_rows_kernel(
    out_ptr,  # (B, M, H, D) contiguous
    dout_ptr,  # (B, M, H, D)
    lse_ptr,  # (B, H, M) float32
    dlse_ptr,  # (B, H, M) float32 or None
    lse2_ptr,  # (B, H, M) float32, written: lse in log2 units; +inf for a row that sees nothing; NaN: not finite
    delta_ptr,  # (B, H, M) float32, written: sum_d out * dout - dlse
    stride_ob,
    stride_om,
    stride_oh,
    stride_gb,
    stride_gm,
    stride_gh,
    M,
    H,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    HAS_DLSE: tl.constexpr,
):
    """The two terms the backward pass needs of each query row: lse2 and delta."""
    tiles = tl.cdiv(M, BLOCK_M)
    first_row = tl.program_id(0) % tiles * BLOCK_M
    head = tl.program_id(0) // tiles % H
    b = (tl.program_id(0) // tiles // H).to(tl.int64)
    rows = first_row + tl.arange(0, BLOCK_M)
    inside = rows < M
    at = (b * H + head) * M + rows

    # load
    out_base = out_ptr + b * stride_ob + head.to(tl.int64) * stride_oh
    dout_base = dout_ptr + b * stride_gb + head.to(tl.int64) * stride_gh
    out = load_rows(out_base, first_row, stride_om, M, D, BLOCK_M, BLOCK_D, True).to(tl.float32)
    dout = load_rows(dout_base, first_row, stride_gm, M, D, BLOCK_M, BLOCK_D, True).to(tl.float32)
    # row sum
    delta = tl.sum(out * dout, 1)
    if HAS_DLSE:
        delta -= tl.load(dlse_ptr + at, mask=inside, other=0.0)
    # store: exp2(score - inf) = 0, so rows that see nothing drop out of every product without a mask. A row with a
    # score, output or upstream gradient that is not finite gets NaN and 0: its weights are NaN. x - x is 0 or NaN.
    lse = tl.load(lse_ptr + at, mask=inside, other=0.0)
    empty = (lse == float("-inf")) & (tl.sum(tl.abs(out), 1) == 0.0)
    lse2 = lse * LOG2_E + (lse - lse) + (delta - delta) + tl.sum(dout - dout, 1)
    tl.store(lse2_ptr + at, tl.where(empty, float("inf"), lse2), mask=inside)
    tl.store(delta_ptr + at, tl.where(empty | (lse2 != lse2), 0.0, delta), mask=inside)


@triton.jit
def _collect_query_grads(
    dq,
    q,
    dout,
    lse2,
    delta,
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
    """Add to dq (still without the scale) of one query tile the key blocks in [first, last)."""
    for start in tl.range(first, last, BLOCK_N):
        # load
        k = load_rows(k_base, start, stride_kn, N, D, BLOCK_N, BLOCK_D, MASKED)
        v = load_rows(v_base, start, stride_vn, N, D, BLOCK_N, BLOCK_D, MASKED)
        # scores, softmax
        p = tl.exp2(matmul(q, tl.trans(k), PRECISION, INTERPRET) * scale_log2 - lse2[:, None])
        # accumulate
        dp = matmul(dout, tl.trans(v), PRECISION, INTERPRET)
        ds = p * (dp - delta[:, None])
        if MASKED:  # after the products: p and dp of a hidden key may be anything, NaN too
            keys = start + tl.arange(0, BLOCK_N)
            ds = tl.where(sees(lo[:, None], hi[:, None], keys[None, :], HAS_LO), ds, 0.0)
        dq = matmul_add(ds.to(k.dtype), k, dq, PRECISION, INTERPRET)
    return dq


@triton.jit(do_not_specialize=["M", "N", "H", "GROUP"])
def _cross_attention_bwd_dq_kernel(
    q_ptr,  # (B, M, H, D)
    k_ptr,  # (B, N, H // GROUP, D), finite: a row that sees a NaN has lse2 NaN
    v_ptr,  # (B, N, H // GROUP, D)
    dout_ptr,  # (B, M, H, D)
    lse2_ptr,  # (B, H, M) float32
    delta_ptr,  # (B, H, M) float32
    lo_ptr,  # (B, M) int32 or None
    hi_ptr,  # (B, M) int32 or None
    dq_ptr,  # (B, M, H, D) contiguous
    stride_qb,
    stride_qm,
    stride_qh,
    stride_kb,
    stride_kn,
    stride_kh,
    stride_vb,
    stride_vn,
    stride_vh,
    stride_gb,
    stride_gm,
    stride_gh,
    stride_lob,
    stride_lom,
    stride_hib,
    stride_him,
    scale,
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
    """dq of one tile of queries of one head."""
    tiles = tl.cdiv(M, BLOCK_M)
    first_row = (tiles - 1 - tl.program_id(0) % tiles) * BLOCK_M  # as in the forward kernel
    head = tl.program_id(0) // tiles % H
    b = (tl.program_id(0) // tiles // H).to(tl.int64)
    kv_head = (head // GROUP).to(tl.int64)
    head64 = head.to(tl.int64)

    # intervals of the tile's rows
    rows = first_row + tl.arange(0, BLOCK_M)
    inside = rows < M
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
    dout_base = dout_ptr + b * stride_gb + head64 * stride_gh
    k_base = k_ptr + b * stride_kb + kv_head * stride_kh
    v_base = v_ptr + b * stride_vb + kv_head * stride_vh
    q = load_rows(q_base, first_row, stride_qm, M, D, BLOCK_M, BLOCK_D, True)
    dout = load_rows(dout_base, first_row, stride_gm, M, D, BLOCK_M, BLOCK_D, True)
    row_terms = (b * H + head64) * M + rows
    lse2 = tl.load(lse2_ptr + row_terms, mask=inside, other=float("inf"))
    delta = tl.load(delta_ptr + row_terms, mask=inside, other=0.0)

    # scores, softmax, accumulate: as in the forward kernel
    dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    if HAS_LO:
        dq = _collect_query_grads(
            dq, q, dout, lse2, delta, k_base, v_base, stride_kn, stride_vn, lo, hi, first, full_first,
            scale_log2, N, D, BLOCK_D, BLOCK_N, True, HAS_LO, PRECISION, INTERPRET,
        )  # fmt: skip
    dq = _collect_query_grads(
        dq, q, dout, lse2, delta, k_base, v_base, stride_kn, stride_vn, lo, hi, full_first, full_last,
        scale_log2, N, D, BLOCK_D, BLOCK_N, False, HAS_LO, PRECISION, INTERPRET,
    )  # fmt: skip
    dq = _collect_query_grads(
        dq, q, dout, lse2, delta, k_base, v_base, stride_kn, stride_vn, lo, hi, full_last, last,
        scale_log2, N, D, BLOCK_D, BLOCK_N, True, HAS_LO, PRECISION, INTERPRET,
    )  # fmt: skip

    # store: a NaN query that sees nothing still has gradient 0
    cols = tl.arange(0, BLOCK_D)
    dq = tl.where(seen[:, None], dq * scale, 0.0)
    tile = dq_ptr + (b * M + first_row) * H * D + head64 * D
    dq_ptrs = tile + tl.arange(0, BLOCK_M)[:, None] * (H * D) + cols[None, :]
    tl.store(dq_ptrs, dq.to(dq_ptr.dtype.element_ty), mask=inside[:, None] & (cols < D)[None, :])
