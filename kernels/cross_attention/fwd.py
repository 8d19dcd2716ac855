"""Forward kernel of cross_attention: one tile of query rows against the key blocks it sees.

Derivation and measured facts: docs/ops/cross_attention.md.
"""

from __future__ import annotations

import triton
import triton.language as tl

from calm_fast.kernels.common.arithmetic import LN_2, NEG_HUGE
from calm_fast.kernels.common.intervals import key_block_ranges, load_interval, sees
from calm_fast.kernels.cross_attention import parts
from calm_fast.kernels.cross_attention.parts import load_boxes, load_parts


@triton.jit
def load_block(
    source,
    b,
    first,
    head,
    stride,
    size,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    REST_D: tl.constexpr,
    MASKED: tl.constexpr,
    BOXES: tl.constexpr,
):
    """Load rows first .. first + BLOCK of a head's keys or values, in parts; outside it is 0.

    source: where BOXES, the two descriptors for `load_boxes`, else a pointer to the head's first row.
    """
    if BOXES:
        return load_boxes(source[0], source[1], b, head, first, BLOCK, BLOCK_D, REST_D)
    else:
        return load_parts(source, first, stride, size, D, BLOCK, BLOCK_D, REST_D, MASKED)


@triton.jit
def attend_blocks(
    acc,
    row_sum,
    row_max,
    q,
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
    scale_log2,
    N,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    REST_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
    HAS_LO: tl.constexpr,
    BOXES: tl.constexpr,
    SEARCH: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """Online softmax over the key blocks in [first, last). Returns the new (acc, row_sum, row_max).

    acc (rows, D) and row_sum (rows,) are relative to exp2(row_max); row_max is in log2 units. SEARCH: masked
    blocks look for NaN and Inf in v. Without it a hidden one makes a column of acc NaN, which `repair` mends.
    """
    # Without the guard the loop has an edge of zero turns, on which moves set the sums. Then ptxas serialises every
    # wgmma of the kernel (C7515): each product waits for the one before.
    if first < last:
        for start in tl.range(first, last, BLOCK_N):
            # a hidden value times its weight of 0 may be NaN: NaN and Inf become 0, and the scores that see one NaN
            if MASKED and SEARCH:  # before the scores, which need registers too
                v = load_block(v_source, b, start, kv_head, stride_vn, N, D, BLOCK_N, BLOCK_D, REST_D, MASKED, BOXES)
                excess = parts.excess(v, False)
                v = parts.finite(v)
            # scores
            k = load_block(k_source, b, start, kv_head, stride_kn, N, D, BLOCK_N, BLOCK_D, REST_D, MASKED, BOXES)
            scores = parts.dot_rows(q, k, PRECISION, INTERPRET)
            if MASKED:
                keys = start + tl.arange(0, BLOCK_N)
                if SEARCH:
                    scores = scores + excess[None, :]
                scores = tl.where(sees(lo[:, None], hi[:, None], keys[None, :], HAS_LO), scores, float("-inf"))
            # softmax: the scale is positive (the launcher checks), so it commutes with max and joins the exponent's FMA
            new_max = tl.maximum(row_max, tl.max(scores, 1) * scale_log2)
            p = tl.exp2(scores * scale_log2 - new_max[:, None])
            shrink = tl.exp2(row_max - new_max)
            row_sum = row_sum * shrink + tl.sum(p, 1)
            # accumulate
            acc = parts.times(acc, shrink[:, None])
            if not (MASKED and SEARCH):
                v = load_block(v_source, b, start, kv_head, stride_vn, N, D, BLOCK_N, BLOCK_D, REST_D, MASKED, BOXES)
            acc = parts.add_product(acc, p.to(v[0].dtype), v, PRECISION, INTERPRET)
            row_max = new_max
    return acc, row_sum, row_max


@triton.jit
def repair(
    lse2,
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
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    REST_D: tl.constexpr,
    HAS_LO: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """Return the outputs of rows with this log-sum-exp (log2 units), with NaN only in rows that see a NaN or Inf.

    A hidden weight is 0, but 0 * NaN is NaN: NaN and Inf of values become 0, and weights that see one become NaN.
    """
    # few keys a step, no pipeline: this path is rare, and must not take more registers than the loops above
    KEYS: tl.constexpr = 16
    acc = parts.zeros(BLOCK_M, BLOCK_D, REST_D)
    for start in tl.range(first, last, KEYS, num_stages=1):
        # scores
        k = load_parts(k_base, start, stride_kn, N, D, KEYS, BLOCK_D, REST_D, True)
        scores = parts.dot_rows(q, k, PRECISION, INTERPRET)
        # weights: the sum is known, so nothing is rescaled or divided
        v = load_parts(v_base, start, stride_vn, N, D, KEYS, BLOCK_D, REST_D, True)
        excess = parts.excess(v, True)
        p = tl.exp2(scores * scale_log2 - lse2[:, None]) + excess[None, :]
        keys = start + tl.arange(0, KEYS)
        p = tl.where(sees(lo[:, None], hi[:, None], keys[None, :], HAS_LO), p, 0.0)
        # accumulate
        acc = parts.add_product(acc, p.to(v[0].dtype), parts.finite(v), PRECISION, INTERPRET)
    return acc


@triton.jit(do_not_specialize=["M", "N", "H", "GROUP"])
def _cross_attention_fwd_kernel(
    q_ptr,  # (B, M, H, D)
    k_ptr,  # (B, N, H // GROUP, D)
    v_ptr,  # (B, N, H // GROUP, D)
    k_boxes,  # descriptor of k as (B, H // GROUP, N, D) in boxes (1, 1, BLOCK_N, BLOCK_D), or None
    k_rest,  # the same with boxes of REST_D columns, or None
    v_boxes,  # the same two of v; None if k's are
    v_rest,
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
    REST_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_LO: tl.constexpr,
    HAS_HI: tl.constexpr,
    CAUSAL: tl.constexpr,
    BOXES: tl.constexpr,
    SEARCH: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """One tile of queries of one head: out and lse in a single pass over its keys."""
    # 1-D grid (the y axis ends at 65535): neighbours share a KV head, and the last rows come first because with
    # causal-like intervals they see the most keys
    tiles = tl.cdiv(M, BLOCK_M)
    first_row = (tiles - 1 - tl.program_id(0) % tiles) * BLOCK_M
    head = tl.program_id(0) // tiles % H
    kv_head = head // GROUP
    b = tl.program_id(0) // tiles // H
    b64 = b.to(tl.int64)
    kv_head64 = kv_head.to(tl.int64)
    head64 = head.to(tl.int64)

    # intervals of the tile's rows
    rows = first_row + tl.arange(0, BLOCK_M)
    lo, hi, seen = load_interval(
        lo_ptr + b64 * stride_lob if HAS_LO else lo_ptr,
        hi_ptr + b64 * stride_hib if HAS_HI else hi_ptr,
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

    # load: q by pointers, into shared memory. By a descriptor Triton keeps it in 32 registers at D = 128, and ptxas
    # (Triton 3.9) then serialises the products for want of registers (C7513).
    q_base = q_ptr + b64 * stride_qb + head64 * stride_qh
    k_base = k_ptr + b64 * stride_kb + kv_head64 * stride_kh
    v_base = v_ptr + b64 * stride_vb + kv_head64 * stride_vh
    q = load_parts(q_base, first_row, stride_qm, M, D, BLOCK_M, BLOCK_D, REST_D, True)
    k_source = (k_boxes, k_rest) if BOXES else k_base
    v_source = (v_boxes, v_rest) if BOXES else v_base

    # scores, softmax, accumulate: blocks that need a mask on the left, whole blocks, blocks that need one on the right
    acc = parts.zeros(BLOCK_M, BLOCK_D, REST_D)
    row_sum = tl.zeros((BLOCK_M,), tl.float32)
    row_max = tl.zeros((BLOCK_M,), tl.float32) + NEG_HUGE
    if HAS_LO:  # without lower bounds nothing on the left is ever masked
        acc, row_sum, row_max = attend_blocks(
            acc, row_sum, row_max, q, k_source, v_source, b, kv_head, stride_kn, stride_vn, lo, hi, first, full_first,
            scale_log2, N, D, BLOCK_D, REST_D, BLOCK_N, True, HAS_LO, BOXES, SEARCH, PRECISION, INTERPRET,
        )  # fmt: skip
    acc, row_sum, row_max = attend_blocks(
        acc, row_sum, row_max, q, k_source, v_source, b, kv_head, stride_kn, stride_vn, lo, hi, full_first, full_last,
        scale_log2, N, D, BLOCK_D, REST_D, BLOCK_N, False, HAS_LO, BOXES, SEARCH, PRECISION, INTERPRET,
    )  # fmt: skip
    acc, row_sum, row_max = attend_blocks(
        acc, row_sum, row_max, q, k_source, v_source, b, kv_head, stride_kn, stride_vn, lo, hi, full_last, last,
        scale_log2, N, D, BLOCK_D, REST_D, BLOCK_N, True, HAS_LO, BOXES, SEARCH, PRECISION, INTERPRET,
    )  # fmt: skip

    # store: a row that sees nothing may have met unmasked blocks of its neighbours, and becomes 0 and -inf here
    row_sum = tl.where(seen, row_sum, 1.0)
    out = parts.zero_unless(seen[:, None], parts.over(acc, row_sum[:, None]))
    lse = tl.where(seen, (row_max + tl.log2(row_sum)) * LN_2, float("-inf"))
    out_tile = out_ptr + (b64 * M + first_row) * H * D + head64 * D
    offsets = tl.arange(0, BLOCK_M) * (H * D)
    inside = rows < M
    tl.store(lse_ptr + (b64 * H + head64) * M + rows, lse, mask=inside)
    if SEARCH or not (HAS_LO or HAS_HI or CAUSAL):  # without bounds only the end is hidden, and loads as 0
        parts.store_rows(out_tile, offsets, out, inside, D)
    else:
        # a row that is not finite though its weights are: it sees NaN or Inf, or a hidden value of its tile is one
        total = parts.row_sums(out)
        again = (total - total != 0.0) & (row_sum == row_sum)
        parts.store_rows(out_tile, offsets, out, inside & ~again, D)
        if tl.max(again.to(tl.int32), 0) != 0:
            out = repair(
                row_max + tl.log2(row_sum), q, k_base, v_base, stride_kn, stride_vn, lo, hi, first, last,
                scale_log2, N, D, BLOCK_M, BLOCK_D, REST_D, HAS_LO, PRECISION, INTERPRET,
            )  # fmt: skip
            parts.store_rows(out_tile, offsets, out, inside & again, D)
