"""Backward kernels of cross_attention that go by queries: the terms of each row, and dq.

There are no atomics, so the gradients have the same bits every time. Derivation: docs/ops/cross_attention.md.
"""

from __future__ import annotations

import triton
import triton.language as tl

from calm_fast.kernels.common.arithmetic import LOG2_E
from calm_fast.kernels.common.intervals import (
    is_finite,
    key_block_ranges,
    load_interval,
    load_rows,
    sees,
)
from calm_fast.kernels.cross_attention import parts
from calm_fast.kernels.cross_attention.fwd import load_block
from calm_fast.kernels.cross_attention.parts import load_parts


@triton.jit(do_not_specialize=["M", "H"])
def _cross_attention_bwd_rows_kernel(
    q_ptr,  # (B, M, H, D), or None if poison_ptr is
    out_ptr,  # (B, M, H, D) contiguous
    dout_ptr,  # (B, M, H, D)
    lse_ptr,  # (B, H, M) float32
    dlse_ptr,  # (B, H, M) float32 or None
    lse2_ptr,  # (B, H, ROWS) float32, written: lse in log2 units; NaN: not finite; +inf: sees nothing or beyond M
    delta_ptr,  # (B, H, ROWS) float32, written: sum_d out * dout - dlse
    poison_ptr,  # (B, H, ROWS // BLOCK_M) int32, written: 1 where a row of q or dout is not finite; or None
    stride_qb,
    stride_qm,
    stride_qh,
    stride_ob,
    stride_om,
    stride_oh,
    stride_gb,
    stride_gm,
    stride_gh,
    M,
    H,
    ROWS,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    HAS_DLSE: tl.constexpr,
    HAS_POISON: tl.constexpr,
):
    """The two terms the backward pass needs of each query row, lse2 and delta, and which tiles are not finite.

    Rows are padded to ROWS, a multiple of every tile's, so that the kernels that read them need no mask.
    """
    tiles = ROWS // BLOCK_M
    first_row = tl.program_id(0) % tiles * BLOCK_M
    head = tl.program_id(0) // tiles % H
    b = (tl.program_id(0) // tiles // H).to(tl.int64)
    rows = first_row + tl.arange(0, BLOCK_M)
    inside = rows < M
    at = (b * H + head) * M + rows
    padded_at = (b * H + head) * ROWS + rows

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
    tl.store(lse2_ptr + padded_at, tl.where(empty | (rows >= M), float("inf"), lse2))
    tl.store(delta_ptr + padded_at, tl.where(empty | (lse2 != lse2), 0.0, delta))
    if HAS_POISON:
        q_base = q_ptr + b * stride_qb + head.to(tl.int64) * stride_qh
        q = load_rows(q_base, first_row, stride_qm, M, D, BLOCK_M, BLOCK_D, True)
        poison = tl.max(tl.where(is_finite(q) & is_finite(dout), 0, 1))
        tl.store(poison_ptr + (b * H + head) * tiles + tl.program_id(0) % tiles, poison)


@triton.jit
def _finite_or_huge(x):
    """Return x with 0 in place of NaN and the largest number of its dtype in place of Inf.

    Who sees a NaN has weights NaN anyway. Inf stays huge, so that a score of -inf keeps its weight of 0.
    """
    HUGE: tl.constexpr = (
        65504.0 if x.dtype == tl.float16 else 3.3895313892515355e38 if x.dtype == tl.bfloat16 else 3.4028234663852886e38
    )
    wide = x.to(tl.float32)
    wide = tl.where(wide == wide, wide, 0.0)
    return tl.minimum(tl.maximum(wide, -HUGE), HUGE).to(x.dtype)


@triton.jit
def _parts_finite_or_huge(a):
    if len(a) == 2:
        return (_finite_or_huge(a[0]), _finite_or_huge(a[1]))
    else:
        return (_finite_or_huge(a[0]),)


@triton.jit
def _collect_query_grads(
    dq,
    q,
    dout,
    lse2,
    delta,
    k_source,
    v_source,
    b,
    kv_head,
    stride_kn,
    stride_vn,
    lo,
    hi,
    first,
    last,
    full_first,
    full_last,
    scale_log2,
    N,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    REST_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
    HAS_LO: tl.constexpr,
    BOXES: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """Add to dq (still without the scale) of one query tile the key blocks in [first, last).

    MASKED: there are blocks to mask among them, outside [full_first, full_last).
    """
    BRANCH: tl.constexpr = MASKED and BOXES and BLOCK_D + REST_D > 128  # some need no mask; else all are masked
    # A loop that may run zero times sets the accumulator by moves on that edge; ptxas then serialises all its wgmma.
    if first < last:
        for start in tl.range(first, last, BLOCK_N):
            # load
            k = load_block(k_source, b, start, kv_head, stride_kn, N, D, BLOCK_N, BLOCK_D, REST_D, MASKED, BOXES)
            v = load_block(v_source, b, start, kv_head, stride_vn, N, D, BLOCK_N, BLOCK_D, REST_D, MASKED, BOXES)
            if MASKED and BLOCK_D + REST_D <= 128:
                # a hidden key's 0 times NaN would be NaN. Before the scores, where registers are free; 256 columns do
                # not fit even there, and the launcher passes a copy
                k = _parts_finite_or_huge(k)
            # scores, softmax
            p = tl.exp2(parts.dot_rows(q, k, PRECISION, INTERPRET) * scale_log2 - lse2[:, None])
            # accumulate
            dp = parts.dot_rows(dout, v, PRECISION, INTERPRET)
            ds = p * (dp - delta[:, None])
            # after the products: p and dp of a hidden key may be anything, NaN too
            if BRANCH:
                if (start < full_first) | (start >= full_last):
                    keys = tl.arange(0, BLOCK_N)  # the number of the step on the side of the rows: a thread has two
                    ds = tl.where(sees((lo - start)[:, None], (hi - start)[:, None], keys[None, :], HAS_LO), ds, 0.0)
            elif MASKED:
                keys = start + tl.arange(0, BLOCK_N)
                ds = tl.where(sees(lo[:, None], hi[:, None], keys[None, :], HAS_LO), ds, 0.0)
            dq = parts.add_product(dq, ds.to(k[0].dtype), k, PRECISION, INTERPRET)
    return dq


@triton.jit(do_not_specialize=["M", "N", "H", "GROUP"])
def _cross_attention_bwd_dq_kernel(
    q_ptr,  # (B, M, H, D)
    k_ptr,  # (B, N, H // GROUP, D), finite if D is above 128
    v_ptr,  # (B, N, H // GROUP, D)
    dout_ptr,  # (B, M, H, D)
    k_boxes,  # tensor descriptor of k as (B, H // GROUP, N, D) in boxes (1, 1, BLOCK_N, BLOCK_D), or None
    k_rest,  # the same with boxes of REST_D columns, or None
    v_boxes,  # the same two of v
    v_rest,
    lse2_ptr,  # (B, H, ROWS) float32
    delta_ptr,  # (B, H, ROWS) float32
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
    ROWS,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    REST_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_LO: tl.constexpr,
    HAS_HI: tl.constexpr,
    CAUSAL: tl.constexpr,
    BOXES: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """dq of one tile of queries of one head."""
    tiles = tl.cdiv(M, BLOCK_M)
    first_row = (tiles - 1 - tl.program_id(0) % tiles) * BLOCK_M  # as in the forward kernel
    head = tl.program_id(0) // tiles % H
    kv_head = head // GROUP
    b32 = tl.program_id(0) // tiles // H
    b = b32.to(tl.int64)
    kv_head64 = kv_head.to(tl.int64)
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
    k_base = k_ptr + b * stride_kb + kv_head64 * stride_kh
    v_base = v_ptr + b * stride_vb + kv_head64 * stride_vh
    q = load_parts(q_base, first_row, stride_qm, M, D, BLOCK_M, BLOCK_D, REST_D, True)
    dout = load_parts(dout_base, first_row, stride_gm, M, D, BLOCK_M, BLOCK_D, REST_D, True)
    row_terms = (b * H + head64) * ROWS + rows
    lse2 = tl.load(lse2_ptr + row_terms)
    delta = tl.load(delta_ptr + row_terms)

    k_source = (k_boxes, k_rest) if BOXES else k_base
    v_source = (v_boxes, v_rest) if BOXES else v_base

    # scores, softmax, accumulate: as in the forward kernel
    dq = parts.zeros(BLOCK_M, BLOCK_D, REST_D)
    if BOXES and BLOCK_D + REST_D > 128:  # one loop, with a branch around the mask: two or three spill at this size
        dq = _collect_query_grads(
            dq, q, dout, lse2, delta, k_source, v_source, b32, kv_head, stride_kn, stride_vn, lo, hi,
            first, last, full_first, full_last,
            scale_log2, N, D, BLOCK_D, REST_D, BLOCK_N, True, HAS_LO, BOXES, PRECISION, INTERPRET,
        )  # fmt: skip
    else:
        if HAS_LO:
            dq = _collect_query_grads(
                dq, q, dout, lse2, delta, k_source, v_source, b32, kv_head, stride_kn, stride_vn, lo, hi,
                first, full_first, full_first, full_last,
                scale_log2, N, D, BLOCK_D, REST_D, BLOCK_N, True, HAS_LO, BOXES, PRECISION, INTERPRET,
            )  # fmt: skip
        dq = _collect_query_grads(
            dq, q, dout, lse2, delta, k_source, v_source, b32, kv_head, stride_kn, stride_vn, lo, hi,
            full_first, full_last, full_first, full_last,
            scale_log2, N, D, BLOCK_D, REST_D, BLOCK_N, False, HAS_LO, BOXES, PRECISION, INTERPRET,
        )  # fmt: skip
        dq = _collect_query_grads(
            dq, q, dout, lse2, delta, k_source, v_source, b32, kv_head, stride_kn, stride_vn, lo, hi,
            full_last, last, full_first, full_last,
            scale_log2, N, D, BLOCK_D, REST_D, BLOCK_N, True, HAS_LO, BOXES, PRECISION, INTERPRET,
        )  # fmt: skip

    # store: a NaN query that sees nothing still has gradient 0
    dq = parts.zero_unless(seen[:, None], parts.times(dq, scale))
    tile = dq_ptr + (b * M + first_row) * H * D + head64 * D
    parts.store_rows(tile, tl.arange(0, BLOCK_M) * (H * D), dq, inside, D)
